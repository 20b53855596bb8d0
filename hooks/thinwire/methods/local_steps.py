"""Local steps: each rank trains on its own for a round, and then the ranks average what that has moved."""

import math
from dataclasses import dataclass

from thinwire.methods import schedules
from thinwire.methods.base import Method, check_integer, check_number, check_one_of, given
from thinwire.methods.block_sparse import BlockSparse, Dense
from thinwire.methods.divide_and_shuffle import DivideAndShuffle

AUTO = "auto"
MOMENTUM = 0.7  # of the outer optimizer, where the ranks have an anchor


@dataclass(frozen=True)
class LocalSteps(Method):
    """Ranks step on their own gradients and average after every few steps (DiLoCo, 2311.08105; Local SGD).

    The ranks agree on an anchor. Each goes on from it by itself, and every so many steps sends how far it has come, the
    pseudo-gradient: anchor minus its parameters. An outer optimizer, torch.optim.SGD with Nesterov momentum, steps the
    anchor by the ranks' mean, with the same bits on every rank, and all go on from the new one. Evaluate and save the
    anchor: ``with handle.evaluating()``. Use it with ``thinwire.attach(ddp, method, optimizer=optimizer)`` or
    ``thinwire.horovod.LocalSteps(model, optimizer, method)``, and call ``finalize()`` at the end.

    every: steps of a round (H). More is fewer bytes and a higher loss. ``auto`` is the fewest at which what the network
        takes is hidden or costs at most a twentieth of the round's computation, chosen anew, and the same on every
        rank, when either has changed by a fifth.
    method: how pseudo-gradients travel: a ``BlockSparse`` or ``Dense``, with any wire and memory; their steps are then
        rounds. With memory="weights" what is not sent stays in the rank's own parameters. None is
        ``Dense(wire_dtype="int4", memory="error_feedback")``, and ``Dense()`` with group_size.
    outer_lr: learning rate of the outer optimizer, above 0.
    outer_momentum: its momentum, in [0, 1). None is 0.7, and 0 with group_size. DiLoCo's usual 0.9 is for hundreds of
        rounds.
    fragments: send the parameters in so many parts, which take turns, each once in ``every`` steps. An exchange is then
        as much shorter, and easier to hide behind ``overlap`` steps. overlap times fragments must be at most ``every``.
    overlap: how many further steps are made while a round's average travels; then each rank keeps what it has done
        meanwhile: its parameters move by the new anchor minus what it had sent from. 0 waits for it.
        ``auto`` is as many as the exchange takes, agreed on from what was measured, and the next round begins as soon
        as the one before is there; ``every`` is then the most.
    warmup_steps: steps at the beginning in which gradients are averaged as DDP does it.
    average_buffers: average floating-point buffers (BatchNorm's statistics) in every round too. Integer ones are left.
    group_size: average in Divide-and-Shuffle's changing groups of so many ranks in the place of all, without an anchor
        and an outer optimizer: parameters themselves, in their own precision, with an overlap of 0 or 1.
    schedule: of the groups, see DivideAndShuffle. global_every: every so many rounds average over all ranks; 0 is
        never. seed: of the random schedule, in [0, 2**63).

    Raises TypeError or ValueError for a wrong value or a combination that cannot be right.
    """

    every: int | str = 16
    method: BlockSparse | Dense = None  # type: ignore[assignment]  # until __post_init__
    outer_lr: float = 1.0
    outer_momentum: float = None  # type: ignore[assignment]
    fragments: int = 1
    overlap: int | str = 1
    warmup_steps: int = 0
    average_buffers: bool = True
    group_size: int | None = None
    schedule: str | schedules.Schedule = "butterfly"
    global_every: int = 0
    seed: int = 0

    def __post_init__(self):
        in_groups = self.group_size is not None
        if self.method is None:
            default = Dense() if in_groups else Dense(wire_dtype="int4", memory="error_feedback")
            object.__setattr__(self, "method", default)
        if self.outer_momentum is None:
            object.__setattr__(self, "outer_momentum", 0.0 if in_groups else MOMENTUM)
        for name, least in (("every", 1), ("overlap", 0)):
            if isinstance(getattr(self, name), str):
                if getattr(self, name) != AUTO:
                    raise ValueError(f"{given(self, name)}: {name} must be an integer of at least {least}, or {AUTO!r}")
            else:
                check_integer(self, name, least)
        check_integer(self, "fragments", 1)
        check_number(self, "outer_lr", "a positive number", lambda x: 0 < x < math.inf)
        check_number(self, "outer_momentum", "a number in [0, 1)", lambda x: 0 <= x < 1)
        check_integer(self, "warmup_steps", 0)
        check_one_of(self, "average_buffers", (True, False))
        self._check_times()
        self._check_method()
        if in_groups:
            self._check_groups()
        elif self.global_every or self.schedule != "butterfly":
            raise ValueError(
                f"LocalSteps(schedule={self.schedule!r}, global_every={self.global_every}): they act with group_size "
                "only; without it every round is over all ranks"
            )
        check_integer(self, "seed", 0, 2**63)

    def describe(self) -> dict[str, str]:
        return super().describe() | {"method": type(self).__name__, "pseudo-gradients": str(self.method)}

    @property
    def averages_alone(self) -> bool:
        """Whether the outer optimizer does nothing but take the mean."""
        return self.outer_lr == 1 and self.outer_momentum == 0

    def in_groups(self) -> DivideAndShuffle:
        """How a round averages where there is a group_size."""
        return DivideAndShuffle(self.group_size, self.schedule, self.average_buffers, False,
                                "delayed" if self.overlap else "none", self.global_every, seed=self.seed)  # fmt: skip

    def as_block_sparse(self) -> BlockSparse:
        raise TypeError(
            f"method is {self!r}: it averages parameters once a round, not gradients; use thinwire.attach(ddp, method, "
            "optimizer=optimizer), or with Horovod thinwire.horovod.LocalSteps"
        )

    def _check_times(self):
        if self.every == AUTO:
            return
        least = max(1, self.overlap if isinstance(self.overlap, int) else 1) * self.fragments
        if self.every < least:
            raise ValueError(
                f"LocalSteps(every={self.every}, fragments={self.fragments}, overlap={self.overlap!r}): what is under "
                f"way must be there before the next is sent, so every must be at least {least}, overlap * fragments"
            )

    def _check_method(self):
        inner = self.method
        if not isinstance(inner, (BlockSparse, Dense)):
            raise TypeError(f"{given(self, 'method')}: method must be a thinwire.BlockSparse or thinwire.Dense")
        sparse = inner.as_block_sparse()
        if sparse.automatic:
            raise ValueError(
                f"LocalSteps(method={inner}): density='auto' follows the inconsistency of gradients, and of a round "
                "there is none: give it a density"
            )
        if sparse.momentum and self.outer_momentum:
            raise ValueError(
                f"LocalSteps(outer_momentum={self.outer_momentum}, method=BlockSparse(momentum={sparse.momentum})): "
                "momentum would act twice: set one of them to 0"
            )

    def _check_groups(self):
        needed = {
            "method": (Dense(), "replicas in groups have no anchor in common, so parameters travel, as they are"),
            "outer_lr": (1, "there is no anchor to step"),
            "outer_momentum": (0, "there is no anchor to step"),
            "fragments": (1, "a round averages all of the parameters"),
            "warmup_steps": (0, "train the first steps with plain DDP, and attach then"),
        }
        for name, (value, reason) in needed.items():
            if getattr(self, name) != value:
                raise ValueError(f"LocalSteps(group_size={self.group_size}, {name}={getattr(self, name)!r}): {name} "
                                 f"must be {value!r}: {reason}")  # fmt: skip
        if self.every == AUTO or self.overlap not in (0, 1):
            raise ValueError(
                f"LocalSteps(group_size={self.group_size}, every={self.every!r}, overlap={self.overlap!r}): with "
                "groups give every as a number, and an overlap of 0 or 1"
            )
        self.in_groups()
