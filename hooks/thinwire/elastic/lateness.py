"""Which buckets are waited for, and what became of the others: gradients that are applied in a later step.

Every average that is late is in the :class:`Ledger` from the step that issued it until it has been added to a later
step's gradient, once, parameter by parameter, because DDP may have put them into other buckets meanwhile.
"""

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

# From a parameter's name and the learning rate when its gradient was issued to what to multiply that by when it is
# applied now; None where it has to wait.
Factor = Callable[[str, float], float | None]


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
        self.landed = threading.Event()
        self._parts = {name: (view, lr) for name, view, lr in zip(names, flat.split(numels), lrs, strict=True)}

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


class Ledger:
    """The late gradients of one rank, in the order of their steps."""

    def __init__(self) -> None:
        self.lates: list[Late] = []

    def add(self, late: Late) -> None:
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
        self.lates = [late for late in self.lates if late.parts()]

    def drop(self, step: int) -> None:
        """Forget what this step issued."""
        self.lates = [late for late in self.lates if late.step != step]

    def clear(self) -> None:
        self.lates = []

    def pending(self) -> dict[str, list[tuple[torch.Tensor, float]]]:
        """All that has yet to be applied of each parameter, each with its learning rate; all must have landed."""
        found: dict[str, list[tuple[torch.Tensor, float]]] = {}
        for late in self.lates:
            for name, part in late.parts().items():
                found.setdefault(name, []).append(part)
        return found

    def scale(self, factor: float) -> None:
        """Multiply all that waits; all must have landed."""
        for late in self.lates:
            late.flat *= factor
