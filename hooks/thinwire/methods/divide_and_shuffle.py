"""Divide-and-Shuffle: replicas averaged in small groups that change."""

from dataclasses import dataclass

import torch

from thinwire.methods import schedules
from thinwire.methods.base import Method, check_count, check_integer, check_one_of, given
from thinwire.methods.block_sparse import BlockSparse

OVERLAPS = ("none", "bucket", "delayed")


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
            check_integer(self, "group_size", 2)
        if not isinstance(self.schedule, schedules.Schedule):
            check_one_of(self, "schedule", tuple(schedules.BY_NAME))
        check_one_of(self, "average_buffers", (True, False))
        if self.average_optimizer_state != "auto" and not isinstance(self.average_optimizer_state, bool):
            check_integer(self, "average_optimizer_state", 1)
        check_one_of(self, "overlap", OVERLAPS)
        check_integer(self, "global_every", 0)
        check_integer(self, "seed", 0, 2**63)
        self._check_blocks()

    def partitions(self, world_size: int, hosts: tuple[str, ...] = ()) -> tuple[schedules.Partition, ...]:
        """The cycle of partitions for these ranks.

        hosts: see thinwire.schedules. Raises ValueError where group_size is above world_size, or ranks never meet, and
        TypeError or ValueError where world_size is no number of ranks.
        """
        check_count("DivideAndShuffle.partitions", "world_size", world_size, 1)
        size = schedules.default_group_size(world_size) if self.group_size is None else self.group_size
        if size > world_size:
            raise ValueError(f"{given(self, 'group_size')}: there are only {world_size} ranks")
        schedule = schedules.BY_NAME[self.schedule] if isinstance(self.schedule, str) else self.schedule
        partitions = schedule.partitions(world_size, size, self.seed, hosts)
        if not self.global_every and not schedules.connected(partitions):
            raise ValueError(
                f"{given(self, 'schedule')} with groups of {size} leaves some of the {world_size} ranks apart for "
                "good, so replicas would drift: use another schedule, or global_every"
            )
        return partitions

    def as_block_sparse(self) -> BlockSparse:
        raise TypeError(
            f"method is {self!r}: it averages parameters, not gradients; use thinwire.attach(ddp, method, "
            "optimizer=optimizer), or with Horovod thinwire.horovod.DivideAndShuffleAverager"
        )

    def _check_blocks(self):
        if self.blocks is None:
            return
        if not isinstance(self.blocks, BlockSparse):
            raise TypeError(f"{given(self, 'blocks')}: blocks must be a BlockSparse or None")
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
