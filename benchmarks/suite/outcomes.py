"""What the rows of the ledger add up to: step times, losses over seeds, and the time to a given quality."""
import itertools
import statistics
from dataclasses import dataclass

from suite.ledger import Ledger, final_loss
from suite.methods import CONTESTANTS
from suite.tasks import TASKS

PEERS = ("dense", "fp16", "bf16", "powersgd", "horovod", "horovod-fp16")  # what a user would pick instead
SHARES = (0.5, 1.0)  # the targets are plain DDP's losses after these shares of its steps


@dataclass(frozen=True)
class Span:
    """A middle and how far it is spread."""

    low: float
    middle: float
    high: float

    def overlaps(self, other: "Span") -> bool:
        return self.low <= other.high and other.low <= self.high


def is_peer(method: str) -> bool:
    return method in PEERS or method.startswith("powersgd")


class Outcomes:
    """Questions to one ledger. Times are in seconds."""

    def __init__(self, ledger: Ledger):
        self.ledger = ledger
        self.tasks = [task for task in TASKS if self._quality(task, "dense") or ledger.find(kind="speed", task=task)]

    def methods(self, task: str) -> list[str]:
        """Those whose quality was measured for a task."""
        return [method for method in CONTESTANTS if self._quality(task, method)]

    def step(self, task: str, method: str, ranks: int, mbit: float) -> dict | None:
        """The newest row of a method's steps, or None."""
        rows = self.ledger.find(kind="speed", task=task, method=method, ranks=ranks, mbit=mbit, status="done")
        return rows[-1] if rows else None

    def step_time(self, task: str, method: str, ranks: int, mbit: float) -> Span | None:
        row = self.step(task, method, ranks, mbit)
        return row and Span(*(row["step_ms"][name] / 1e3 for name in ("q1", "median", "q3")))

    def curves(self, task: str, method: str) -> list[list[tuple[int, float]]]:
        """For each seed (step, held-out loss)."""
        return [[(step, loss) for step, _, loss in row["curve"]] for row in self._quality(task, method)]

    def loss(self, task: str, method: str) -> Span | None:
        """At the end of all steps, the same for all methods: the mean over the seeds, and the range."""
        losses = [final_loss(row) for row in self._quality(task, method)]
        return Span(min(losses), statistics.mean(losses), max(losses)) if losses else None

    def target(self, task: str, share: float) -> float | None:
        """Plain DDP's loss after a share of its steps, mean of the seeds."""
        reached = []
        for curve in self.curves(task, "dense"):
            last = share * curve[-1][0]
            reached.append(statistics.mean([loss for step, loss in curve if step <= last][-2:]))
        return statistics.mean(reached) if reached else None

    def steps_to(self, task: str, method: str, target: float) -> list[float] | None:
        """For each seed, after how many steps; None where one seed does not get there."""
        found = [_crossing(curve, target) for curve in self.curves(task, method)]
        return found if found and None not in found else None

    def time_to(self, task: str, method: str, target: float, ranks: int, mbit: float) -> Span | None:
        """Mean steps of the seeds times the median step; spread: fewest times lower quartile to most times upper."""
        steps, step = self.steps_to(task, method, target), self.step_time(task, method, ranks, mbit)
        if not steps or step is None:
            return None
        return Span(min(steps) * step.low, statistics.mean(steps) * step.middle, max(steps) * step.high)

    def breaks_even(self, task: str, method: str, ranks: int, rates: list[float]) -> float | None:
        """The link's rate in Mbit/s from which plain DDP's step is as short; None where the method's stays shorter.

        Between two measured rates a step takes a + b / rate. 0 where plain DDP's is shorter at all rates.
        """
        gains = []
        for mbit in sorted(rates, key=lambda rate: rate or float("inf")):
            ours, dense = (self.step_time(task, name, ranks, mbit) for name in (method, "dense"))
            if ours and dense:
                gains.append((1 / mbit if mbit else 0.0, dense.middle - ours.middle))
        if not gains or gains[0][1] <= 0:
            return 0.0 if gains else None
        for (inverse, gain), (next_inverse, next_gain) in itertools.pairwise(gains):
            if next_gain <= 0:
                crossing = inverse + (next_inverse - inverse) * gain / (gain - next_gain)
                return 1 / crossing if crossing else float("inf")
        return None

    def _quality(self, task, method):
        rows = self.ledger.find(kind="train", purpose="quality", task=task, method=method, status="done")
        longest = max((row["steps"] for row in rows), default=0)
        newest = {row["seed"]: row for row in rows if row["steps"] == longest}
        return [newest[seed] for seed in sorted(newest)]


def _crossing(curve, target):
    """The step at which the straight lines through a curve's points first go down to the target."""
    for (step, loss), (next_step, next_loss) in itertools.pairwise(curve):
        if next_loss <= target:
            return step + (next_step - step) * (loss - target) / (loss - next_loss) if loss > target else step
    return None
