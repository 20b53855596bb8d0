"""What to do with gradients or replicas, as values: frozen, validated where they are made, compared in step one."""

import difflib
import math
from dataclasses import dataclass, fields
from numbers import Integral, Real

import torch

from thinwire import schedules

RANDOM = ("independent", "permuted", "shared")
HEAVIEST = ("topk", "nominated")
MEMORIES = ("none", "error_feedback", "control_variate")
WIRE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OVERLAPS = ("none", "bucket", "delayed")
DECISIONS = ("agreed", "arrival")


@dataclass(frozen=True)
class Method:
    """Base of every method. Methods hold no tensors; what runs them holds the state."""

    def describe(self) -> dict[str, str]:
        """Field names and values as strings: what must be equal on every rank, and what a checkpoint records."""
        return {"method": type(self).__name__} | {f.name: str(getattr(self, f.name)) for f in fields(self)}


@dataclass(frozen=True)
class Dense(Method):
    """Average whole gradients: the baseline, with sums in float32 and in rank order whatever the wire dtype.

    wire_dtype: float32, bfloat16 or float16.
    """

    wire_dtype: torch.dtype = torch.float32

    def __post_init__(self):
        _check_wire_dtype(self)

    def as_block_sparse(self) -> "BlockSparse":
        """The same method as the reducer sees it: every block of every rank, no memory."""
        return BlockSparse(selection="shared", density=1.0, memory="none", wire_dtype=self.wire_dtype)


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
        steps and the same on every rank (:class:`thinwire.controller.DensityController`); error feedback only.
    block_size: elements a block. Small blocks choose better, large ones run faster: 16 to 64 is the range to tune.
    memory: what becomes of what was not sent.
        ``none``             forgotten; random selections are scaled so that the result is an unbiased estimate of
                             the mean gradient (paper, Alg. 2's g_i), topk and nominated are not and so are biased
        ``error_feedback``   kept and added to the next gradient, unscaled
        ``control_variate``  unbiased, with a running estimate of every rank's gradient (paper, Alg. 2, ISEGA);
                             random selections only
        None picks ``none`` for random selections and ``error_feedback`` for topk and nominated.
    momentum: in [0, 1), with error feedback only: the memory accumulates ``u = momentum * u + gradient``, adds u to
        the residual and clears u in the blocks that were sent (Deep Gradient Compression's momentum correction and
        factor masking). The optimizer's own momentum must then be 0. Parameters that travel whole keep their u, so
        at density 1 this is ordinary momentum SGD.
    wire_dtype: dtype of values on the network: float32, bfloat16 or float16. Sums are in float32. float16 values
        travel with a power-of-two scale, so none overflows. With error feedback the rounding error is kept.
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

    Raises TypeError or ValueError for a wrong value or a combination that cannot be right.
    """

    selection: str = "independent"
    density: float | str | None = None
    block_size: int = 64
    memory: str | None = None
    momentum: float = 0.0
    wire_dtype: torch.dtype = torch.float32
    warmup_steps: int = 0
    ramp_steps: int = 0
    dense_below: int = 256
    seed: int = 0
    max_inconsistency: float | None = None
    min_density: float = 0.001
    max_density: float = 1.0

    def __post_init__(self):
        _check_one_of(self, "selection", RANDOM + HEAVIEST)
        if self.memory is None:
            object.__setattr__(self, "memory", "none" if self.selection in RANDOM else "error_feedback")
        _check_one_of(self, "memory", MEMORIES)
        if self.density is not None and not self.automatic:
            allowed = "a number in (0, 1], 'auto', or None for 1 / world_size"
            _check_number(self, "density", allowed, lambda x: 0 < x <= 1)
            object.__setattr__(self, "density", float(self.density))
        _check_number(self, "momentum", "a number in [0, 1)", lambda x: 0 <= x < 1)
        _check_wire_dtype(self)
        _check_integer(self, "block_size", 1, 2**31)
        _check_integer(self, "warmup_steps", 0)
        _check_integer(self, "ramp_steps", 0)
        _check_integer(self, "dense_below", 0)
        _check_integer(self, "seed", 0, 2**63)
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

    @property
    def automatic(self) -> bool:
        """Whether the density follows the measured inconsistency."""
        return self.density == "auto"

    @property
    def unbiased(self) -> bool:
        """Whether what a rank sends is divided by its density, so that its expectation is the gradient."""
        return self.selection in RANDOM and self.memory != "error_feedback"

    def density_at(self, step: int, world_size: int) -> float:
        """The density of a step (from 0): 1 in the warm-up, then a geometric fall to the final density; of "auto",
        the largest that it may be."""
        final = {None: 1 / world_size, "auto": self.max_density}.get(self.density, self.density)
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


    def _check_automatic(self):
        for name in ("min_density", "max_density"):
            _check_number(self, name, "a number in (0, 1]", lambda x: 0 < x <= 1)
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
        _check_number(self, "max_inconsistency", "a positive number, with density='auto'", lambda x: 0 < x < math.inf)
        for name, needed, reason in (
            ("memory", "error_feedback", "without a residual the inconsistency is 0 at any density"),
            ("ramp_steps", 0, "it begins at max_density and comes down by itself"),
        ):
            if getattr(self, name) != needed:
                raise ValueError(
                    f"BlockSparse(density='auto', {name}={getattr(self, name)!r}): {name} must be {needed!r}: {reason}"
                )


@dataclass(frozen=True)
class Elastic(Method):
    """Do not wait for all of a step's averages; apply the rest a little later (Nadiradze et al., 2001.05918).

    A bucket that is not waited for is late: it travels behind the next steps' computation, and its average is added
    to the gradient of a later step. No gradient is lost or applied twice. Buckets are DDP's: with few of them (see
    its ``bucket_cap_mb``) there is little to choose from. Use it with ``thinwire.attach(ddp, method,
    optimizer=optimizer)`` or ``thinwire.horovod.Compressor(named_parameters, method, optimizer=optimizer)``, and call
    ``finalize()`` at the end, and evaluate in ``drained()``; both on every rank.

    method: how a bucket is averaged: ``Dense()`` or a ``BlockSparse``.
    beta: the share of the gradient's norm, a sum over its parameters' L2 norms, that must have been averaged before a
        step is made, in [0, 1]. At 1 nothing is late, which is ``method`` itself, bit for bit; at 0 everything is.
        Lower hides more of the network and delays more of the gradient: begin at 0.8.
    max_delay: by how many steps a late average may be late, at least 1.
    speculate: use the rank's own gradient in the place of a late average, and correct it when that is there (the
        paper's variance-bounded scheduler), instead of nothing (norm-bounded). Replicas then differ by what is not
        yet corrected. It helps where the ranks' gradients are alike: where their deviation is below their mean.
    decide: which buckets are late.
        ``agreed``   decided before a step from the norms of the step before, added up over the ranks: the fewest
                     buckets, the heaviest first, that make up beta of the norm are waited for, and the others are
                     applied exactly max_delay steps later. The same on every rank, so replicas stay bitwise equal
                     (but for speculate) and every optimizer works
        ``arrival``  the paper's rule: wait until the buckets that have arrived, whichever they are, carry beta of
                     the rank's norm. Replicas differ by what is late until ``finalize()``

    The learning rate that counts for a late average is that of the step that issued it, as its backward pass found
    it, for ``torch.optim.SGD`` without momentum: the average is multiplied by the ratio of the two. Other optimizers'
    steps are not proportional to the gradient, and in a momentum buffer the ratio would outlive the rate it was meant
    for, so there it is the rate of the step that applies it.

    Where replicas may differ, with speculate or arrival, the optimizer must be a ``torch.optim.SGD`` without momentum
    and weight decay: only then is the result the same, to rounding, in whichever step a gradient is applied.
    ``BlockSparse(momentum=...)`` keeps momentum before anything is sent, and is allowed.

    Raises TypeError or ValueError for a wrong value or a combination that cannot be right.
    """

    method: Method
    beta: float = 0.8
    max_delay: int = 1
    speculate: bool = False
    decide: str = "agreed"

    def __post_init__(self):
        if not isinstance(self.method, (Dense, BlockSparse)):
            raise TypeError(f"{_given(self, 'method')}: method must be a Dense or a BlockSparse")
        _check_number(self, "beta", "a number in [0, 1]", lambda x: 0 <= x <= 1)
        object.__setattr__(self, "beta", float(self.beta))
        _check_integer(self, "max_delay", 1)
        _check_one_of(self, "speculate", (True, False))
        _check_one_of(self, "decide", DECISIONS)

    @property
    def replicas_differ(self) -> bool:
        """Whether ranks may apply the same average in different steps."""
        return self.beta < 1 and (self.speculate or self.decide == "arrival")

    @staticmethod
    def differed(described: dict[str, str]) -> bool:
        """``replicas_differ`` of the method that was described so."""
        return described.get("elastic.speculate") == "True" or described.get("elastic.decide") == "arrival"

    def describe(self) -> dict[str, str]:
        """As any method's; the fields of the method inside are among them, under their own names."""
        mine = {f"elastic.{f.name}": str(getattr(self, f.name)) for f in fields(self) if f.name != "method"}
        return self.method.describe() | mine


@dataclass(frozen=True)
class DivideAndShuffle(Method):
    """Ranks step on their own gradients and average their parameters in small groups that change (DS-Sync).

    After every optimizer step each rank averages its parameters with the other ranks of its group; the next round has
    other groups. The mean over all ranks moves as with plain DDP, so keep its learning rate; the replicas differ by
    a little, as ``handle.consistency()`` shows. Nothing else of the gradients travels.

    group_size: the most ranks in a group, at least 2. None is the divisor of world_size next to its square root.
    schedule: the cycle of partitions, as a name or as a value of :mod:`thinwire.schedules`.
        ``butterfly``  the exact mean after each cycle where the prime factors of world_size are at most group_size;
                       a ring elsewhere
        ``ring``       any number of ranks, ragged groups
        ``random``     a seeded cycle over a fixed family of 8 random partitions
        ``hosts``      three rounds in four inside a host, one across; see :class:`thinwire.schedules.Hosts`
    average_buffers: average floating-point buffers (BatchNorm's statistics) too. Integer ones are left.
    average_optimizer_state: average the moments of Adam-like optimizers too, which otherwise take smaller steps than
        with plain DDP, in directions that differ: ``exp_avg`` and ``exp_avg_sq`` (``exp_inf`` of Adamax, and
        ``max_exp_avg_sq`` with amsgrad). True is in every round, a number k in every k-th (of a cycle of its own),
        False never; "auto" is True for optimizers with betas and else False. It triples what a round sends. Momentum
        buffers of SGD are linear and need no average.
    overlap: what runs while averages travel.
        ``none``     nothing: the optimizer's step, then the average
        ``bucket``   the step goes through the parameters in pieces, and each piece travels while the next is
                     stepping; the same bits as none. For torch.optim's elementwise optimizers
        ``delayed``  the average of the parameters x_t travels while the gradient at x_t is computed, and is applied
                     after that step: x_(t+1) = average(x_t) - lr * g(x_t). Other iterates, the same fixed points.
                     Costs three buffers of the size of the model, and of each moment that is averaged
    global_every: every so many rounds average over all ranks instead; 0 is never.
    blocks: average only some blocks of the parameters in each round, as a ``BlockSparse("shared")`` without memory.
        That is the only sound composition: all ranks of a group must average the same blocks, or the mean moves;
        and error feedback would add stale differences of replicas.
    seed: of the random schedule, in [0, 2**63). The same on every rank.

    Raises TypeError or ValueError for a wrong value or a combination that cannot be right.
    """

    group_size: int | None = None
    schedule: str | schedules.Schedule = "butterfly"
    average_buffers: bool = True
    average_optimizer_state: str | bool | int = "auto"
    overlap: str = "none"
    global_every: int = 0
    blocks: BlockSparse | None = None
    seed: int = 0

    def __post_init__(self):
        if self.group_size is not None:
            _check_integer(self, "group_size", 2)
        if not isinstance(self.schedule, schedules.Schedule):
            _check_one_of(self, "schedule", tuple(schedules.BY_NAME))
        _check_one_of(self, "average_buffers", (True, False))
        if self.average_optimizer_state != "auto" and not isinstance(self.average_optimizer_state, bool):
            _check_integer(self, "average_optimizer_state", 1)
        _check_one_of(self, "overlap", OVERLAPS)
        _check_integer(self, "global_every", 0)
        _check_integer(self, "seed", 0, 2**63)
        self._check_blocks()

    def partitions(self, world_size: int, hosts: tuple[str, ...] = ()) -> tuple[schedules.Partition, ...]:
        """The cycle of partitions for these ranks.

        hosts: see thinwire.schedules. Raises ValueError where group_size is above world_size, or ranks never meet.
        """
        size = schedules.default_group_size(world_size) if self.group_size is None else self.group_size
        if size > world_size:
            raise ValueError(f"{_given(self, 'group_size')}: there are only {world_size} ranks")
        schedule = schedules.BY_NAME[self.schedule] if isinstance(self.schedule, str) else self.schedule
        partitions = schedule.partitions(world_size, size, self.seed, hosts)
        if not self.global_every and not schedules.connected(partitions):
            raise ValueError(
                f"{_given(self, 'schedule')} with groups of {size} leaves some of the {world_size} ranks apart for "
                "good, so replicas would drift: use another schedule, or global_every"
            )
        return partitions

    def _check_blocks(self):
        if self.blocks is None:
            return
        if not isinstance(self.blocks, BlockSparse):
            raise TypeError(f"{_given(self, 'blocks')}: blocks must be a BlockSparse or None")
        reasons = {
            "selection": ("shared", "ranks that average different blocks would move the mean"),
            "memory": ("none", "a residual of a gradient is no difference of replicas"),
            "wire_dtype": (torch.float32, "parameters are averaged in their own precision"),
        }
        for name, (needed, reason) in reasons.items():
            if getattr(self.blocks, name) != needed:
                raise ValueError(f"DivideAndShuffle(blocks={self.blocks}): its {name} must be {needed!r}: {reason}")
        if self.overlap == "delayed":
            raise ValueError(
                f"DivideAndShuffle(overlap='delayed', blocks={self.blocks}): use overlap='none' or 'bucket' with blocks"
            )


def block_sparse(method: Method) -> BlockSparse:
    """The method as the reducer runs it.

    Raises TypeError for anything that is not a method.
    """
    if isinstance(method, Dense):
        return method.as_block_sparse()
    if isinstance(method, BlockSparse):
        return method
    if isinstance(method, Elastic):
        raise TypeError(
            f"method is {method!r}: it needs the optimizer; use thinwire.attach(ddp, method, optimizer=optimizer)"
        )
    if isinstance(method, DivideAndShuffle):
        raise TypeError(
            f"method is {method!r}: it averages parameters, not gradients; use thinwire.attach(ddp, method, "
            "optimizer=optimizer), or with Horovod thinwire.horovod.DivideAndShuffleAverager"
        )
    hint = f"; call it: thinwire.{method.__name__}()" if isinstance(method, type) and issubclass(method, Method) else ""
    found = repr(method) if isinstance(method, (type, str, int, float)) else f"a {type(method).__name__}"
    raise TypeError(f"method is {found}: it must be a thinwire method, such as thinwire.BlockSparse(){hint}")


def _check_one_of(method, name, allowed):
    value = getattr(method, name)
    if value not in allowed:
        near = difflib.get_close_matches(str(value), map(str, allowed), n=1)
        raise ValueError(
            f"{_given(method, name)}: {name} must be one of {', '.join(map(repr, allowed))}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )


def _check_wire_dtype(method):
    if method.wire_dtype not in WIRE_DTYPES:
        raise ValueError(
            f"{_given(method, 'wire_dtype')}: wire_dtype must be one of {', '.join(map(str, WIRE_DTYPES))}"
        )


def _check_number(method, name, allowed, is_allowed):
    value = getattr(method, name)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{_given(method, name)}: {name} must be {allowed}")
    if not is_allowed(value):  # false for nan too
        raise ValueError(f"{_given(method, name)}: {name} must be {allowed}")


def _check_integer(method, name, least, below=None):
    value = getattr(method, name)
    allowed = f"an integer of at least {least}" + (f" and below {below}" if below else "")
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{_given(method, name)}: {name} must be {allowed}")
    if value < least or (below is not None and value >= below):
        raise ValueError(f"{_given(method, name)}: {name} must be {allowed}")


def _given(method, name):
    return f"{type(method).__name__}({name}={getattr(method, name)!r})"
