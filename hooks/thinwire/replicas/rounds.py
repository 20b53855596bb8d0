"""Rounds of Divide-and-Shuffle: which group is this rank's now, and the averages of one round under way."""

from collections.abc import Iterable
from typing import Any

import torch

from thinwire.core.stats import Stats
from thinwire.methods import BlockSparse, DivideAndShuffle
from thinwire.methods.schedules import Group, Partition
from thinwire.replicas.means import Mean, Named, pieces

# What an optimizer keeps of a parameter, by name in its state; None where it keeps nothing yet.
Moments = dict[str, list[torch.Tensor | None]]


class Rounds:
    """Counts rounds and starts them. groups: carries the sums, see thinwire.replicas.groups.

    Everything follows from ``done``, the number of rounds done: it must be the same on every rank.
    """

    def __init__(self, method: DivideAndShuffle, partitions: tuple[Partition, ...], groups: Any, stats: Stats):
        self.method = method
        self.partitions = partitions
        self.groups = groups
        self.stats = stats
        self.done = 0
        self._means: dict[tuple, Mean] = {}
        self._everyone = tuple(range(groups.size))

    @property
    def members(self) -> Group:
        """The ranks that this rank averages with in the next round, itself among them."""
        every = self.method.global_every
        if every and (self.done + 1) % every == 0:
            return self._everyone
        return self._group_in(self.done)

    def moment_members(self, every: int) -> Group | None:
        """The same for the optimizer's state, averaged every so many rounds (0: never); None where it is not its turn.

        It has a cycle of its own: with the parameters' it could meet the same partition every time.
        """
        if not every or (self.done + 1) % every:
            return None
        return self.members if every == 1 else self._group_in(self.done // every)

    def begin(self, moments_every: int = 0) -> "Round":
        """The next round; it counts as done."""
        round_ = Round(self, self.members, self.moment_members(moments_every))
        self.done += 1
        self.stats.steps += 1
        return round_

    def over_all(self) -> "Round":
        """A round of all ranks outside the schedule, whose bytes and seconds are not counted."""
        return Round(self, self._everyone, self._everyone, scheduled=False)

    def mean_of(self, kind: str, piece: list[Named], blocks: BlockSparse | None) -> Mean:
        """The Mean for a piece, made once."""
        key = kind, tuple((name, tensor.numel()) for name, tensor in piece), blocks is None
        if key not in self._means:
            self._means[key] = Mean(piece, blocks)
        return self._means[key]

    def _group_in(self, index):
        partition = self.partitions[index % len(self.partitions)]
        return next(group for group in partition if self.groups.rank in group)


class Round:
    """One round under way. ``send`` pieces, in the same order on every rank of the group; then ``finish``."""

    def __init__(self, rounds: Rounds, members: Group, moment_members: Group | None,
                 scheduled: bool = True):  # fmt: skip
        self._rounds = rounds
        self._index = rounds.done
        self._stats = rounds.stats if scheduled else Stats()
        self._blocks = rounds.method.blocks if scheduled else None
        self._keep = scheduled and rounds.method.overlap == "delayed"
        self._members, self._moment_members = members, moment_members
        self._parts: list[tuple[str, list[Named], Mean]] = []
        self._moments: list[tuple[str, list[Named], Mean, list[bool]]] = []

    @property
    def wants_moments(self) -> bool:
        return self._moment_members is not None

    def send(self, parameters: list[Named], moments: Moments) -> None:
        """A piece of the parameters, and what the optimizer keeps of them where it is the turn of that."""
        self._start("parameters", parameters, self._blocks)
        for key, tensors in moments.items() if self.wants_moments else ():
            filled = [
                (f"{name}.{key}", torch.zeros_like(p) if tensor is None else tensor)
                for (name, p), tensor in zip(parameters, tensors, strict=True)
            ]
            mean = self._rounds.mean_of(key, filled, None)
            self._launch(mean, filled, self._moment_members)
            self._moments.append((key, parameters, mean, [tensor is not None for tensor in tensors]))

    def send_rest(self, buffers: Iterable[Named]) -> None:
        """The buffers, and which moments this rank has: a rank that skipped its first step has none to average."""
        for piece in pieces(buffers):
            self._start("buffers", piece, None)
        self._present = None
        if self._moments:
            device = self._moments[0][1][0][1].device  # of a parameter: NCCL carries no tensors of the CPU
            present = [one for *_, present in self._moments for one in present]
            has = torch.tensor(present, dtype=torch.float32, device=device)
            self._present = self._rounds.mean_of("present", [("present", has)], None)
            self._launch(self._present, [("present", has)], self._moment_members)

    def finish(self) -> None:
        """Wait, and put the means in the tensors' place."""
        self._wait()
        for _, _, mean in self._parts:
            mean.write()
        for _, _, mean, present in self._moments:
            mean.write(present)

    def corrections(self) -> dict[str, dict[str, torch.Tensor]]:
        """Wait, and give the means less what was sent: by kind ("parameters", "buffers", "exp_avg"...) and name."""
        self._wait()
        found: dict[str, dict[str, torch.Tensor]] = {}
        for kind, piece, mean in self._parts:
            found.setdefault(kind, {}).update(zip((name for name, _ in piece), mean.correction()))
        for key, piece, mean, present in self._moments:
            names = (name for name, _ in piece)
            found.setdefault(key, {}).update(
                (name, one) for name, one, has in zip(names, mean.correction(), present) if has
            )
        return found

    def _start(self, kind, piece, blocks):
        mean = self._rounds.mean_of(kind, piece, blocks)
        self._launch(mean, piece, self._members)
        self._parts.append((kind, piece, mean))

    def _launch(self, mean, piece, members):
        mean.start(piece, members, self._rounds.groups, self._index, self._stats, self._keep)

    def _wait(self):
        for _, _, mean in self._parts:
            mean.wait()
        if not self._moments:
            return
        self._present.wait([1.0])
        counts = self._present.values().tolist()
        for _, _, mean, present in self._moments:
            mine, counts = counts[: len(present)], counts[len(present) :]
            mean.wait([max(count, 1.0) for count in mine])
