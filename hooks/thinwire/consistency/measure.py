"""How far what the ranks compute with is from the ideal iterate: elastic consistency, measured.

Elastic consistency (Nadiradze et al., 2001.05918, Def. 1) is E||x - v||^2 <= lr^2 B^2: x has had every gradient
applied to it, v is what a rank computes its next gradient at. x - v is the same sum of gradients that wait somewhere,
in the mean of the residuals, or late, for all ranks, plus what one rank alone has or lacks.

Vectors of the model's size are not sent to be measured: :func:`sketch` maps each to SKETCH numbers whose norm is the
vector's, to about 1 / sqrt(SKETCH) = 2 %, and sketches of sums are sums of sketches.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch

from thinwire.consistency import bounds
from thinwire.core.blocks import unit_of
from thinwire.core.selection import BY_NAME
from thinwire.methods import BlockSparse, Dense, Elastic, LocalSteps, Method

SKETCH = 2048


def sketch(tensors: Iterable[tuple[str, torch.Tensor]]) -> torch.Tensor:
    """float64 [SKETCH], on the CPU: every element, with a random sign, added to a random one of SKETCH sums.

    tensors: parameters' names and 1-D tensors. Signs and sums depend on the names alone.
    """
    total = torch.zeros(SKETCH, dtype=torch.float64, device="cpu")
    for name, tensor in tensors:
        generator = torch.Generator(tensor.device).manual_seed(unit_of(name))
        drawn = torch.randint(0, 2 * SKETCH, (tensor.numel(),), generator=generator, device=tensor.device)
        signed = (1 - 2 * (drawn & 1)) * tensor.detach().to(torch.float64)
        total += torch.bincount(drawn >> 1, weights=signed, minlength=SKETCH).cpu()
    return total


@dataclass(frozen=True)
class Measured:
    """apart: ||x - v_i|| of every rank i; residual: the part of it that waits in the ranks' memories; gradient_norm:
    the largest of the ranks', NaN where one is not finite."""

    apart: list[float]
    residual: float
    gradient_norm: float


def measure(waits: torch.Tensor, alone: torch.Tensor | None, gradient_norm: float,
            all_gather: Callable[[torch.Tensor], torch.Tensor]) -> Measured:  # fmt: skip
    """What the ranks' sketches say, the same numbers on all of them.

    waits: sketch of what waits on this rank and will be applied as its mean over ranks. alone: sketch of what this
    rank's x - v has besides, or None where no rank has anything. all_gather: float64 [L] to [ranks, L].
    """
    norm = torch.tensor([gradient_norm], dtype=torch.float64, device="cpu")
    everyone = all_gather(torch.cat([norm, waits] if alone is None else [norm, waits, alone])).cpu()
    norms = everyone[:, 0].tolist()
    total = torch.zeros(SKETCH, dtype=torch.float64, device="cpu")
    for row in everyone[:, 1 : 1 + SKETCH]:  # in rank order: a sum that no machine's instructions can change
        total += row
    mean = total / len(everyone)
    residual = _norm(mean)
    apart = [residual] * len(norms) if alone is None else [_norm(mean + row) for row in everyone[:, 1 + SKETCH :]]
    return Measured(apart, residual, max(norms) if all(map(math.isfinite, norms)) else math.nan)


def bound(method: Method, shares: Iterable[float], gradient_norm: float,
          optimizer: torch.optim.Optimizer | None = None) -> float | None:  # fmt: skip
    """The paper's B for a method (2001.05918; see thinwire.consistency.bounds), or None where it has none.

    For a constant learning rate: after it falls tenfold, what is late weighs ten times as much.

    shares: of its blocks that each parameter sends, as rounded; gradient_norm: M, the largest norm of a rank's
    gradient. optimizer: what makes the steps of LocalSteps, of which the paper says nothing and our own bound is for
    SGD without momentum and weight decay; None is such a one. Of other methods it is not looked at.
    """
    if isinstance(method, Dense) and method.memory == "none":
        return 0.0
    if isinstance(method, Elastic):
        inner = bound(method.method, shares, gradient_norm)
        if inner is None:
            return None
        # The most that can be late: the norms that decide are those of the step before, or the rank's own, so what
        # beta lets be late of the average has no smaller bound. A correction is the average less the own gradient.
        late = method.max_delay * gradient_norm if method.beta < 1 else 0.0
        return inner + (2 if method.speculate else 1) * late
    if isinstance(method, LocalSteps):
        return _of_local_steps(method, shares, gradient_norm) if _steps_by_gradients(optimizer) else None
    if not isinstance(method, BlockSparse) or BY_NAME[method.selection].talks and method.memory != "none":
        return None  # a rank's own residual need not shrink where others nominate the blocks
    if isinstance(method.wire_dtype, str):
        return None  # how much its rounding leaves behind is not known beforehand
    if method.memory != "error_feedback":
        return 0.0
    return bounds.error_feedback(1 - min(shares, default=1.0), gradient_norm / (1 - method.momentum))


def _steps_by_gradients(optimizer):
    """Whether a step is the learning rate times the gradient."""
    if optimizer is None:
        return True
    groups = optimizer.param_groups
    return isinstance(optimizer, torch.optim.SGD) and not any(g["momentum"] or g["weight_decay"] for g in groups)


def _of_local_steps(method, shares, gradient_norm):
    """Where rounds take the mean of all ranks, but for what waits."""
    if not method.averages_alone or method.group_size is not None or isinstance(method.every, str):
        return None  # momentum is no SGD; groups have no anchor; nobody knows how many steps a round will have
    sparse = method.method.as_block_sparse()
    rounds, waits = 1, None
    if sparse.memory == "weights" and not isinstance(sparse.wire_dtype, str):
        rounds, waits = sparse.longest_wait, 0.0  # what is not sent is a rank's own, for so many rounds at most
    elif sparse.memory in ("none", "error_feedback") and not sparse.momentum:
        waits = bound(method.method, shares, method.every * gradient_norm)  # of a round's steps, as one gradient
    if waits is None:
        return None
    overlap = method.every if isinstance(method.overlap, str) else method.overlap
    return waits + bounds.local_steps(rounds * method.every, overlap, gradient_norm)


def check_log(consistency_every: int, log: Any) -> None:
    """Raise TypeError or ValueError where the steps between measurements, or what takes them, cannot be right."""
    if isinstance(consistency_every, bool) or not isinstance(consistency_every, Integral):
        raise TypeError(f"consistency_every={consistency_every!r}: it must be an integer, steps between measurements")
    if consistency_every < 0:
        raise ValueError(f"consistency_every={consistency_every!r}: it must be at least 0; 0 is never")
    if log is not None:
        writer(log)
        if not consistency_every:
            raise ValueError("log= is given and consistency_every is 0, so nothing would be measured: set it too")


def writer(log: Any) -> Callable[[dict], None]:
    """What takes the measurements: a callable as it is, or one that writes to a TensorBoard ``SummaryWriter``.

    Raises TypeError for anything else.
    """
    if hasattr(log, "add_scalar"):
        return lambda found: _write_scalars(log, found)
    if not callable(log):
        raise TypeError(
            f"log is a {type(log).__name__}: it must be a SummaryWriter, or a callable that takes a dictionary, such "
            "as list.append"
        )
    return log


def _write_scalars(summary_writer, found):
    for key, value in found.items():
        if key != "step" and value is not None:
            summary_writer.add_scalar(f"thinwire/{key}", value, found["step"])


def _norm(vector):
    """Exactly rounded, so the same on every machine."""
    return math.sqrt(math.fsum((vector * vector).tolist()))
