"""Which buckets are waited for, and what became of the others: gradients that are applied in a later step.

Every average that is late is in the :class:`Ledger` from the step that issued it until it has been added to a later
step's gradient, once, parameter by parameter, because DDP may have put them into other buckets meanwhile.
"""

import itertools
import math
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch

# From a parameter's name and the learning rate when its gradient was issued to what to multiply that by when it is
# applied now; None where it has to wait.
Factor = Callable[[str, float], float | None]

OUTLIER = 10.0  # times the norm of the step before
_numbers = itertools.count()


def heaviest(norms: Sequence[float], beta: float) -> set[int]:
    """Numbers of the fewest norms that together make up ``beta`` of the sum of all; of equal ones, the first.

    The elastic scheduler's rule (Nadiradze et al., 2001.05918), for buckets. All of them where a norm is not finite
    or beta is 1.
    """
    if beta >= 1 or not all(map(math.isfinite, norms)):
        return set(range(len(norms)))
    target, reached, chosen = beta * math.fsum(norms), 0.0, set()
    for i in sorted(range(len(norms)), key=lambda i: (-norms[i], i)):
        if reached >= target:
            break
        chosen.add(i)
        reached += norms[i]
    return chosen


class Usual:
    """Notices a step whose gradient is far larger than that of the step before.

    Loops clip such gradients, or leave their step out, by the norm that they see in that step: nothing of it may be
    late, or it would meet another step's.
    """

    def __init__(self) -> None:
        self._norms: list[float] = []
        self._names: frozenset[str] = frozenset()

    def outlies(self, norm: float, names: Iterable[str]) -> bool:
        """Whether a step of these parameters with this norm does; it is the step before from now on. One with inf or
        NaN is no step."""
        if not math.isfinite(norm):
            return False
        before = self._norms[-1] if self._norms else math.inf
        self._norms, self._names = [*self._norms[-1:], norm], frozenset(names)
        return norm > OUTLIER * before

    def dropped(self, names: Collection[str]) -> None:
        """No step is made with these parameters' gradients. Where those are all that the last one had, there was none.
        """
        if self._names and self._names <= set(names):
            self._norms, self._names = self._norms[:-1], frozenset()


def add_in_rank_order(everyone: torch.Tensor) -> torch.Tensor:
    """The sum of rows [ranks, L], the same bits on every rank: what is late is decided by it, and an all-reduce need
    not give that."""
    everyone = everyone.cpu()
    total = everyone[0].clone()
    for row in everyone[1:]:
        total += row
    return total


class Late:
    """One bucket's gradient of one step: flat [N] is this rank's until it has ``landed``, and then the average.

    lrs: the learning rate of each parameter in the step that issued it. own: this rank's gradient [N] where that was
    used in the average's place: what is still to be applied is then the difference.
    """

    def __init__(self, step: int, names: tuple[str, ...], numels: tuple[int, ...], flat: torch.Tensor,
                 lrs: tuple[float, ...], own: torch.Tensor | None = None):  # fmt: skip
        self.step, self.names, self.flat, self.own = step, names, flat, own
        self.number = next(_numbers)
        self.landed = threading.Event()
        self._all = {name: (view, lr) for name, view, lr in zip(names, flat.split(numels), lrs, strict=True)}
        self._parts = dict(self._all)

    def land(self) -> None:
        """The average is here."""
        if self.own is not None:
            self.flat -= self.own
            self.own = None
        self.landed.set()

    def parts(self) -> dict[str, tuple[torch.Tensor, float]]:
        """What has not been applied yet: 1-D view and learning rate, by parameter name."""
        return dict(self._parts)

    def give_up(self, name: str) -> None:
        """A part has been applied."""
        del self._parts[name]

    def part(self, name: str) -> tuple[torch.Tensor, float]:
        """A part, whether it has been applied or not."""
        return self._all[name]

    def take_back(self, name: str) -> None:
        """It has not, after all."""
        self._parts[name] = self._all[name]


class Ledger:
    """The late gradients of one rank, in the order of their steps.

    What a step of the optimizer that has yet to be made has issued and been given can be put back: ``put_back``; once
    it is made, ``keep``.
    """

    def __init__(self) -> None:
        self.lates: list[Late] = []
        self._issued: set[tuple[Late, str]] = set()
        self._given: list[tuple[Late, str]] = []

    def add(self, late: Late) -> None:
        """What a step that has yet to be made has issued."""
        self.restore(late)
        self._issued.update((late, name) for name in late.parts())

    def restore(self, late: Late) -> None:
        """What an earlier step has issued."""
        self.lates.append(late)

    def deliver(self, lates: list[Late], bucket: Any, factor: Factor) -> None:
        """Add what these, which have landed, hold of a bucket's parameters to its flat, once.

        bucket: with names, numels and flat [N].
        """
        if not lates:
            return
        views = dict(zip(bucket.names, bucket.flat.split(bucket.numels), strict=True))
        for late in lates:
            for name, (part, lr) in late.parts().items():
                if name in views and (times := factor(name, lr)) is not None:
                    views[name].add_(part, alpha=times)
                    late.give_up(name)
                    self._given.append((late, name))
        self._sort_out()

    def drop(self, step: int) -> None:
        """Forget what this step issued."""
        self.lates = [late for late in self.lates if late.step != step]

    def under_way(self, names: Collection[str]) -> bool:
        """Whether something of these parameters that the step has issued has not landed."""
        return any(name in names and not late.landed.is_set() for late, name in self._issued)

    def put_back(self, names: Collection[str]) -> None:
        """The step is not made with these parameters' gradients: what it issued of them is void, and what it was given
        has yet to be applied."""
        for late, name in self._issued:
            if name in names and name in late.parts():
                late.give_up(name)
        back = [(late, name) for late, name in self._given if name in names and (late, name) not in self._issued]
        for late, name in back:
            late.take_back(name)
        self.lates = sorted({*self.lates, *(late for late, _ in back)}, key=lambda late: late.number)
        self._sort_out()
        self.keep(names)

    def keep(self, names: Collection[str]) -> None:
        """The step is made with these parameters' gradients."""
        self._issued = {(late, name) for late, name in self._issued if name not in names}
        self._given = [(late, name) for late, name in self._given if name not in names]

    def clear(self) -> None:
        self.lates, self._issued, self._given = [], set(), []

    def pending(self) -> dict[str, list[tuple[torch.Tensor, float]]]:
        """All that has yet to be applied of each parameter, each with its learning rate; all must have landed. Without
        the step that has yet to be made: what it was given has not been applied."""
        found: dict[str, list[tuple[torch.Tensor, float]]] = {}
        for late in self.lates:
            for name, part in late.parts().items():
                if (late, name) not in self._issued:
                    found.setdefault(name, []).append(part)
        for late, name in self._given:
            if (late, name) not in self._issued:
                found.setdefault(name, []).append(late.part(name))
        return found

    def scale(self, factor: float) -> None:
        """Multiply all that waits; all must have landed."""
        for late in {*self.lates, *(late for late, _ in self._given)}:
            late.flat *= factor

    def _sort_out(self):
        self.lates = [late for late in self.lates if late.parts()]
