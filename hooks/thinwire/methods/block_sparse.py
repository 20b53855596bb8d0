"""Gradients averaged block by block: BlockSparse, and Dense, which sends every block."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from thinwire.methods.base import Method, check_integer, check_number, check_one_of, check_wire_dtype

# Whether blocks are drawn at random: then what is sent, divided by the density, is an unbiased estimate. The classes
# that choose are in thinwire.core.selection.
SELECTIONS = {"independent": True, "permuted": True, "shared": True, "topk": False, "nominated": False}
RANDOM = tuple(name for name, random in SELECTIONS.items() if random)
MEMORIES = ("none", "error_feedback", "control_variate", "weights")


@dataclass(frozen=True)
class BlockSparse(Method):
    """Every rank sends some blocks of its gradient and the ranks average those (Mishchenko et al., 1901.09437).

    selection: which blocks a rank sends in a step, per parameter and without replacement.
        ``independent``  drawn afresh by every rank; nothing but values travels (the paper's method)
        ``permuted``     one common permutation deals the ranks disjoint sets (PermK)
        ``shared``       the same random blocks on every rank
        ``topk``         each rank's heaviest blocks by L2 norm; bytes grow with the number of ranks
        ``nominated``    each rank names its heaviest, all send the union; bytes do not grow with the ranks
    density: share of each parameter's blocks that one rank sends, in (0, 1]; for nominated, the share that all
        ranks together name. At least one block of every parameter. None is 1 / world_size, the paper's m/n,
        which is meant for the random selections: give topk and nominated one of their own, such as 0.01. ``auto``
        is the smallest that keeps the measured inconsistency under max_inconsistency, chosen anew every so many
        steps and the same on every rank (see :mod:`thinwire.consistency.controller`); error feedback only.
    block_size: elements a block. Small blocks choose better, large ones run faster: 16 to 64 is the range to tune.
    memory: what becomes of what was not sent.
        ``none``             forgotten; random selections are scaled so that the result is an unbiased estimate of
                             the mean gradient (paper, Alg. 2's g_i), topk and nominated are not and so are biased
        ``error_feedback``   kept and added to the next gradient, unscaled
        ``control_variate``  unbiased, with a running estimate of every rank's gradient (paper, Alg. 2, ISEGA);
                             random selections only
        ``weights``          stays in the rank's own weights until it is sent: inside ``LocalSteps`` only, and with
                             nominated, which then names the blocks that have drifted furthest from the anchor
        None picks ``none`` for random selections and ``error_feedback`` for topk and nominated.
    momentum: in [0, 1), with error feedback only: the memory accumulates ``u = momentum * u + gradient``, adds u to
        the residual and clears u in the blocks that were sent (Deep Gradient Compression's momentum correction and
        factor masking). The optimizer's own momentum must then be 0. Parameters that travel whole keep their u, so
        at density 1 this is ordinary momentum SGD.
    wire_dtype: dtype of values on the network: torch.float32, bfloat16 or float16, or "int8", "int4" or "int2". Sums
        are in float32. float16 values travel with a power-of-two scale, so none overflows. Of int8, int4 and int2 each
        block has a scale of its own (bfloat16: its largest magnitude / 127, 7 or 1, rounded up), values are rounded to
        the nearest level, and sums come back in as many bits, in 4 with "int2"; they need a memory, and small blocks
        (16). With a memory the rounding error is kept.
    warmup_steps: dense steps before anything is left out. ramp_steps: steps after those over which density falls
        geometrically from 1.
    dense_below: parameters with fewer elements always travel whole. The default, 256, is four default blocks: below
        it a share of the blocks means little, the whole costs at most 1 KB, and biases and scales of small layers
        are where a late update shows. Wider biases and norms are sparsified like the rest: at a density of 1 %
        they would be about a third of what a transformer of width 256 sends.
    seed: of the random selections, in [0, 2**63). The same on every rank.
    max_inconsistency: with density="auto", the limit for the norm of the mean residual, which is ||x - v|| / lr but
        for what Elastic makes late, in the units of a gradient's norm: see the "residual" of ``handle.consistency()``
        with a density that you know to work.
    min_density, max_density: with density="auto", its bounds, in (0, 1].
    max_age: with memory="weights", the most rounds that a block may wait, at least 2 / density: so at most half of what
        is sent is sent because of its age. None is just that.

    Raises TypeError or ValueError for a wrong value or a combination that cannot be right.
    """

    selection: str = "independent"
    density: float | str | None = None
    block_size: int = 64
    memory: str | None = None
    momentum: float = 0.0
    wire_dtype: torch.dtype | str = torch.float32
    warmup_steps: int = 0
    ramp_steps: int = 0
    dense_below: int = 256
    seed: int = 0
    max_inconsistency: float | None = None
    min_density: float = 0.001
    max_density: float = 1.0
    max_age: int | None = None

    def __post_init__(self):
        check_one_of(self, "selection", tuple(SELECTIONS))
        if self.memory is None:
            object.__setattr__(self, "memory", "none" if self.selection in RANDOM else "error_feedback")
        check_one_of(self, "memory", MEMORIES)
        if self.density is not None and not self.automatic:
            allowed = "a share of the blocks in (0, 1] (4 % is density=0.04), 'auto', or None for 1 / world_size"
            check_number(self, "density", allowed, lambda x: 0 < x <= 1)
            object.__setattr__(self, "density", float(self.density))
        check_number(self, "momentum", "a number in [0, 1)", lambda x: 0 <= x < 1)
        check_wire_dtype(self)
        check_integer(self, "block_size", 1, 2**31)
        check_integer(self, "warmup_steps", 0)
        check_integer(self, "ramp_steps", 0)
        check_integer(self, "dense_below", 0)
        check_integer(self, "seed", 0, 2**63)
        if self.momentum and self.memory != "error_feedback":
            raise ValueError(
                f"BlockSparse(momentum={self.momentum}, memory={self.memory!r}): momentum correction needs "
                "memory='error_feedback'; without it, leave momentum to the optimizer"
            )
        if self.memory == "control_variate" and self.selection not in RANDOM:
            raise ValueError(
                f"BlockSparse(selection={self.selection!r}, memory='control_variate'): the control variate is "
                f"unbiased only for blocks drawn at random ({', '.join(RANDOM)}); with {self.selection} use "
                "memory='error_feedback'"
            )

        self._check_automatic()
        self._check_weights()

    def as_block_sparse(self) -> "BlockSparse":
        return self

    @property
    def automatic(self) -> bool:
        """Whether the density follows the measured inconsistency."""
        return self.density == "auto"

    @property
    def unbiased(self) -> bool:
        """Whether what a rank sends is divided by its density, so that its expectation is the gradient."""
        return self.selection in RANDOM and self.memory != "error_feedback"

    @property
    def longest_wait(self) -> int | None:
        """The most rounds that a block may wait, with memory="weights"; else None."""
        if self.memory != "weights":
            return None
        return math.ceil(2 / float(self.density)) if self.max_age is None else self.max_age  # type: ignore[arg-type]

    def density_at(self, step: int, world_size: int) -> float:
        """The density of a step (from 0): 1 in the warm-up, then a geometric fall to the final density; of "auto",
        the largest that it may be."""
        names: dict[Any, float] = {None: 1 / world_size, "auto": self.max_density}
        final: Any = names.get(self.density, self.density)
        if step < self.warmup_steps:
            return 1.0
        done = step - self.warmup_steps + 1
        return final if done > self.ramp_steps else final ** (done / (self.ramp_steps + 1))

    def counts_at(self, step: int, world_size: int, numels: tuple[int, ...],
                  density: float | None = None) -> tuple[int, ...]:  # fmt: skip
        """How many blocks of each parameter travel in a step: from each rank, or for nominated in all.

        density: the step's, where it is not the method's to know.
        """
        density = self.density_at(step, world_size) if density is None else density
        counts = []
        for numel in numels:
            blocks = -(-numel // self.block_size)
            count = blocks if numel < self.dense_below else min(blocks, max(1, math.floor(density * blocks + 0.5)))
            if self.selection == "permuted" and world_size <= blocks and density * world_size <= 1:
                count = min(count, blocks // world_size)  # rounding up would let two ranks send the same block
            counts.append(count)
        return tuple(counts)

    def _check_weights(self):
        if self.memory != "weights":
            if self.max_age is not None:
                raise ValueError(
                    f"BlockSparse(max_age={self.max_age!r}, memory={self.memory!r}): max_age acts with "
                    "memory='weights' only"
                )
            return
        if self.selection != "nominated":
            raise ValueError(
                f"BlockSparse(selection={self.selection!r}, memory='weights'): all ranks must send the same blocks, "
                "those that have drifted furthest: use selection='nominated'"
            )
        if self.density is None:
            raise ValueError(
                "BlockSparse(density=None, memory='weights'): give it a density, the share of the blocks that all "
                "ranks together name in a round"
            )
        if self.max_age is not None:
            least = math.ceil(2 / float(self.density))
            check_integer(self, "max_age", 1)
            if self.max_age < least:
                raise ValueError(
                    f"BlockSparse(max_age={self.max_age}, density={self.density}): blocks that are due must leave "
                    f"room for those that have drifted: max_age must be at least 2 / density, {least}"
                )

    def _check_automatic(self):
        for name in ("min_density", "max_density"):
            check_number(self, name, "a number in (0, 1]", lambda x: 0 < x <= 1)
        if self.min_density > self.max_density:
            raise ValueError(
                f"BlockSparse(min_density={self.min_density}, max_density={self.max_density}): min_density must not "
                "be above max_density"
            )
        if not self.automatic:
            if self.max_inconsistency is not None:
                raise ValueError(
                    f"BlockSparse(density={self.density!r}, max_inconsistency={self.max_inconsistency}): "
                    "max_inconsistency acts with density='auto' only"
                )
            return
        check_number(self, "max_inconsistency", "a positive number, with density='auto'", lambda x: 0 < x < math.inf)
        for name, needed, reason in (
            ("memory", "error_feedback", "without a residual the inconsistency is 0 at any density"),
            ("ramp_steps", 0, "it begins at max_density and comes down by itself"),
        ):
            if getattr(self, name) != needed:
                raise ValueError(
                    f"BlockSparse(density='auto', {name}={getattr(self, name)!r}): {name} must be {needed!r}: {reason}"
                )


@dataclass(frozen=True)
class Dense(Method):
    """Average whole gradients: the baseline.

    wire_dtype: torch.float32, bfloat16 or float16, or "int8", "int4" or "int2", as of BlockSparse, in blocks of 16: in
        larger ones most values of a block are small beside its largest, and wait in the memory for many steps.
    memory: ``none``, or ``error_feedback``: what the wire rounds off is added to the next gradient. int8, int4 and int2
        need it.
    exact: sums in float32 (float64 of float64) and in rank order, whatever the backend, as every other method has them.
        By default float32 gradients on a float32 wire, without a memory, are averaged by the backend's own all-reduce,
        as DDP does it without a hook. On any other wire, of any other gradients, and of what Elastic may have arrive
        late, sums are exact.

    Raises TypeError or ValueError for a wrong value or a combination that cannot be right.
    """

    wire_dtype: torch.dtype | str = torch.float32
    memory: str = "none"
    exact: bool = False

    def __post_init__(self):
        check_one_of(self, "memory", ("none", "error_feedback"))
        check_wire_dtype(self)
        if not isinstance(self.exact, bool):
            raise TypeError(f"Dense(exact={self.exact!r}): exact must be True or False")

    @property
    def of_backend(self) -> bool:
        return not self.exact and self.memory == "none" and self.wire_dtype == torch.float32

    def as_block_sparse(self) -> "BlockSparse":
        """The same method as the reducer sees it: every block of every rank."""
        return BlockSparse("shared", density=1.0, block_size=16, memory=self.memory, wire_dtype=self.wire_dtype)


def block_sparse(method: Method) -> BlockSparse:
    """The method as the reducer runs it.

    Raises TypeError for what is no method, and for a method that a reducer alone cannot run; ValueError for one that
    works on no gradients but those of LocalSteps.
    """
    if isinstance(method, Method):
        sparse = method.as_block_sparse()
        if sparse.memory == "weights":
            raise ValueError(
                f"method is {method!r}: what it does not send stays in the rank's own weights, and those differ only "
                "with local steps: use it inside thinwire.LocalSteps(method=...)"
            )
        return sparse
    hint = f"; call it: thinwire.{method.__name__}()" if isinstance(method, type) and issubclass(method, Method) else ""
    found = repr(method) if isinstance(method, (type, str, int, float)) else f"a {type(method).__name__}"
    raise TypeError(f"method is {found}: it must be a thinwire method, such as thinwire.BlockSparse(){hint}")
