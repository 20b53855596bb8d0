"""The operators on blocks: C++ or CUDA where they were built, :mod:`thinwire.ops.reference` where not.

All write into tensors that the caller allocated and return nothing, so that one schema serves every device. Shapes:
``N`` elements of a flat tensor, ``S`` parameters in it, ``M`` blocks, ``K`` slots and ``P`` elements in a payload,
``R`` ranks. ``table`` is :attr:`thinwire.core.blocks.Slots.table`, int64 [S, 6], on the device of the data. ``chosen``
holds int64 block numbers counted from each parameter's first block, ascending within a parameter.

``status`` is int32 [S + 1]: for each parameter, bit 1 (``TOUCHED``) says that its gradient has a nonzero element and
bit 2 (``NONFINITE``) that it has an inf or NaN, or is too large for a memory; the last entry is the union of all.

Data may be float32, float64, bfloat16 or float16; sums are in float32, or in float64 for float64.
"""

from collections.abc import Iterable

from torch import Tensor

from thinwire.ops.dispatch import call
from thinwire.ops.reference import NONFINITE, TOUCHED

__all__ = [
    "NONFINITE", "TOUCHED", "accumulate_", "draw_blocks", "examine", "gather_blocks", "scatter_blocks_",
    "select_blocks", "settle_", "take_blocks_",
]  # fmt: skip


def accumulate_(residual: Tensor, velocity: Tensor | None, grad: Tensor, momentum: float, table: Tensor,
                block_size: int, norms: Tensor, status: Tensor, residual_before: Tensor | None = None,
                velocity_before: Tensor | None = None) -> None:  # fmt: skip
    """Add the gradient to the residual and give each block's squared norm, in one pass.

    residual_before and velocity_before [N], like residual and velocity: read in their place and left as they are,
    while those, whose values do not count then, get the result.

    residual [N] float32 or float64, changed: ``+= grad``; with velocity [N] (same dtype, changed), velocity becomes
    ``momentum * velocity + grad`` and is what the residual gains. Elements of grad [N] that are inf, NaN or beyond 2^62
    (2^500 for float64) count as zero and make the status NONFINITE, as does a block whose squared norm overflows. A
    parameter whose gradient is zero everywhere (unused in this step) keeps residual and velocity as they are.
    norms [M], dtype of residual, is written: squared L2 norm of each block of the new residual, added in 16
    interleaved lanes folded in halves. status [S + 1] is written.
    """
    call("accumulate_", grad.device, residual, velocity, grad, momentum, table, block_size, norms, status,
         residual_before, velocity_before)  # fmt: skip


def examine(grad: Tensor, table: Tensor, status: Tensor) -> None:
    """Write status [S + 1] of grad [N], which stays as it is."""
    call("examine", grad.device, grad, table, status)


def draw_blocks(table: Tensor, units: Tensor, block_size: int, seed: int, step: int, streams: Iterable[int],
                deals: Iterable[int], chosen: Tensor) -> None:  # fmt: skip
    """Draw blocks uniformly without replacement, for several ranks at once; every device gives the same ones.

    A counter-based generator (splitmix64 started from seed, step, the parameter's unit and the stream) gives every
    block of a parameter a 64-bit key. In the order of their keys, row r takes the ``slots`` blocks that follow the
    first ``deals[r] * slots``, cyclically: equal streams and different deals give disjoint sets, different streams
    independent ones. units int64 [S]; streams, deals: R integers; chosen int64 [R, K] is written.
    """
    call("draw_blocks", chosen.device, table, units, block_size, seed, step, list(streams), list(deals), chosen)


def select_blocks(norms: Tensor, table: Tensor, block_size: int, chosen: Tensor) -> None:
    """Write to chosen [K] each parameter's ``slots`` blocks of largest norms [M]; ties go to the lower number."""
    call("select_blocks", norms.device, norms, table, block_size, chosen)


def gather_blocks(source: Tensor, chosen: Tensor, table: Tensor, block_size: int, status: Tensor | None,
                  scale: Tensor | None, payload: Tensor) -> None:  # fmt: skip
    """Copy the chosen blocks of source [N] into payload [P], times scale (0-d float32 or None), in payload's dtype.

    Padding is zero. With a status, parameters that are not TOUCHED send zeros, and if any is NONFINITE the whole
    payload is NaN, so that every rank learns of it.
    """
    call("gather_blocks", source.device, source, chosen, table, block_size, status, scale, payload)


def take_blocks_(source: Tensor, chosen: Tensor, table: Tensor, block_size: int, status: Tensor | None,
                 scale: Tensor | None, payload: Tensor) -> None:  # fmt: skip
    """As :func:`gather_blocks`, and source keeps what was not sent: zero, or the rounding error of payload's dtype.

    scale must be a power of two, so that source's new value plus what was sent is its old value exactly. Parameters
    that send zeros or NaN keep all, and so does an element that payload's dtype turns into inf.
    """
    call("take_blocks_", source.device, source, chosen, table, block_size, status, scale, payload)


def scatter_blocks_(payloads: Tensor, inverses: Tensor | None, chosen: Tensor, table: Tensor, block_size: int,
                    factors: Tensor, accumulate: bool, out: Tensor) -> None:  # fmt: skip
    """Add the payloads [R, P] of R ranks block by block in rank order: the same bits on every rank and in every run.

    out [N] = factors[s] * sum over r of payloads[r] * inverses[r] where any rank sent a block, and 0 elsewhere; or,
    with accumulate, out plus that. inverses float32 [R] or None; chosen int64 [R, K]; factors [S] in the dtype of
    the sum. No atomics: each block of out has one writer.
    """
    call("scatter_blocks_", out.device, payloads, inverses, chosen, table, block_size, factors, accumulate, out)


def settle_(residual: Tensor, velocity: Tensor | None, grad: Tensor, momentum: float, payload: Tensor,
            inverse: Tensor | None, chosen: Tensor, table: Tensor, block_size: int, status: Tensor,
            bad: Tensor) -> None:  # fmt: skip
    """End a step of error feedback, when it is known whether some rank's gradient was inf or NaN (bad, int32 [1]).

    bad is 0: velocity, if any, is cleared in the blocks sent of parameters that did not travel whole. bad is not 0:
    the step is undone; what this rank took (payload [P] times inverse, a 0-d float32 or None) returns to residual,
    and accumulate_'s addition is subtracted again from residual and velocity, to rounding.
    """
    call("settle_", grad.device, residual, velocity, grad, momentum, payload, inverse, chosen, table, block_size,
         status, bad)  # fmt: skip
