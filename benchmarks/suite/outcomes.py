"""What the rows of the ledger add up to: step times, losses over seeds, and the time to a given quality."""
import itertools
import math
import statistics
from dataclasses import dataclass

from suite.ledger import Ledger, final_loss
from suite.methods import CONTESTANTS
from suite.tasks import TASKS

HALF, END = 0.5, 1.0  # the targets are plain DDP's losses after these shares of its steps


@dataclass(frozen=True)
class Span:
    """A middle and how far it is spread."""

    low: float
    middle: float
    high: float

    def __mul__(self, other: "Span") -> "Span":
        return Span(self.low * other.low, self.middle * other.middle, self.high * other.high)

    def __truediv__(self, other: "Span") -> "Span":
        return Span(self.low / other.high, self.middle / other.middle, self.high / other.low)

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def over(values: list[float]) -> Span:
    """Mean and range."""
    return Span(min(values), statistics.mean(values), max(values))


def is_peer(method: str) -> bool:
    """Whether a user would pick it instead of thinwire."""
    return method.startswith(("dense", "fp16", "bf16", "powersgd")) or method in ("horovod", "horovod-fp16")


class Outcomes:
    """Questions to one ledger. Times are in seconds.

    Seeds differ in their data, training and held out, so methods are compared seed by seed: each seed has targets of
    its own, and the span of a ratio is that over the seeds, widened by how far the step times are spread.
    """

    def __init__(self, ledger: Ledger):
        self.ledger = ledger
        self.tasks = [task for task in TASKS if self.quality(task, "dense") or ledger.find(kind="speed", task=task)]

    # ---- steps ----

    def step(self, task: str, method: str, ranks: int, mbit: float) -> dict | None:
        """The row of a method's steps from the newest turns with the most methods, or None."""
        rows = self.ledger.find(kind="speed", task=task, method=method, ranks=ranks, mbit=mbit, status="done")
        return max(reversed(rows), key=lambda row: len(row["among"]), default=None)

    def step_time(self, task: str, method: str, ranks: int, mbit: float) -> Span | None:
        """The mean of all steps, from the turn with the lowest mean to that with the highest.

        The mean, because many steps take as long as their sum, the rare slow ones included.
        """
        row = self.step(task, method, ranks, mbit)
        if row is None:
            return None
        turns = [statistics.mean(turn) / 1e3 for turn in row["turns_ms"]]
        return over(turns)

    def step_ends(self, task: str, method: str, ranks: int) -> float | None:
        """The link's rate in Mbit/s up to which the method's step is shorter than plain DDP's by more than the spread.

        0 where it is not at the lowest rate, infinite where only that of the unshaped link is not, None where all are.
        Between two measured rates a step takes a + b / rate.
        """
        rates = {row["mbit"] for row in self.ledger.find(kind="speed", task=task, method=method, ranks=ranks)}
        before = None
        for mbit in sorted(rates, key=lambda rate: rate or math.inf):
            ours, dense = (self.step_time(task, name, ranks, mbit) for name in (method, "dense"))
            if ours is None or dense is None:
                continue
            gain, inverse = dense.middle - ours.middle, 1 / mbit if mbit else 0.0
            if gain <= 0 or 1.0 in dense / ours:
                if before is None:
                    return 0.0
                if gain < 0:  # else it is a tie just here
                    inverse += (before[0] - inverse) * -gain / (before[1] - gain)
                return 1 / inverse if inverse else math.inf
            before = inverse, gain
        return None

    # ---- losses ----

    def quality(self, task: str, method: str) -> dict[int, dict]:
        """The newest row of each seed, all with the newest one's options and number of steps."""
        rows = self.ledger.find(kind="train", purpose="quality", task=task, method=method)
        if rows and method != "dense":
            steps = {row["steps"] for row in self.quality(task, "dense").values()}
            rows = [row for row in rows if row["steps"] in steps]
        if rows:
            longest = max(row["steps"] for row in rows)
            options = [row for row in rows if row["steps"] == longest][-1]["options"]
            rows = [row for row in rows if (row["steps"], row["options"]) == (longest, options)]
        return {seed: row for seed, row in sorted((row["seed"], row) for row in rows)} if rows else {}

    def methods(self, task: str) -> list[str]:
        """Those whose quality was measured, failed or not."""
        return [method for method in CONTESTANTS if self.quality(task, method)]

    def curve(self, task: str, method: str, seed: int) -> list[tuple[int, float]]:
        """(step, held-out loss), each the mean of two evaluations one after the other."""
        points = [(step, loss) for step, _, loss in self.quality(task, method)[seed].get("curve", [])]
        return [(b, (loss + next_loss) / 2) for (_, loss), (b, next_loss) in itertools.pairwise(points)]

    def loss(self, task: str, method: str) -> Span | None:
        """At the end of all steps, which are as many for every method."""
        losses = [final_loss(row) for row in self.quality(task, method).values()]
        return over(losses) if losses else None

    def loss_more(self, task: str, method: str) -> Span | None:
        """By how much the loss at the end exceeds plain DDP's of the same seed."""
        dense = self.quality(task, "dense")
        more = [final_loss(row) - final_loss(dense[seed]) for seed, row in self.quality(task, method).items()
                if seed in dense]  # fmt: skip
        return over(more) if more else None

    # ---- time to quality ----

    def target(self, task: str, share: float, seed: int) -> float | None:
        """Plain DDP's loss after a share of its steps."""
        if seed not in self.quality(task, "dense"):
            return None
        curve = self.curve(task, "dense", seed)
        return [loss for step, loss in curve if step <= share * curve[-1][0]][-1]

    def steps_to(self, task: str, method: str, share: float) -> dict[int, float]:
        """For each seed in which the method gets to the target and does not diverge later, after how many steps."""
        found = {}
        for seed, row in self.quality(task, method).items():
            target = self.target(task, share, seed)
            if target is not None and math.isfinite(final_loss(row)):
                crossing = _crossing(self.curve(task, method, seed), target)
                if crossing is not None:
                    found[seed] = crossing
        return found

    def gets_there(self, task: str, method: str, share: float) -> bool:
        """In all seeds."""
        return len(self.steps_to(task, method, share)) == len(self.quality(task, method)) > 0

    def time_to(self, task: str, method: str, share: float, ranks: int, mbit: float) -> Span | None:
        """Steps times step time; None where one seed does not get there."""
        step = self.step_time(task, method, ranks, mbit)
        if step is None or not self.gets_there(task, method, share):
            return None
        return over(list(self.steps_to(task, method, share).values())) * step

    def speedup(self, task: str, method: str, against: str, share: float, ranks: int, mbit: float) -> Span | None:
        """The other's time to quality over the method's, seed by seed; 1 is within a tie."""
        if not (self.gets_there(task, method, share) and self.gets_there(task, against, share)):
            return None
        ours, theirs = self.steps_to(task, method, share), self.steps_to(task, against, share)
        both = [theirs[seed] / ours[seed] for seed in ours if seed in theirs]
        steps = [self.step_time(task, name, ranks, mbit) for name in (against, method)]
        return over(both) * (steps[0] / steps[1]) if both and None not in steps else None

    def best_peer(self, task: str, share: float, ranks: int, mbit: float) -> str | None:
        """The peer that gets there first."""
        return self._first(filter(is_peer, self.methods(task)), task, share, ranks, mbit)

    def best_of_ours(self, task: str, share: float, ranks: int, mbit: float) -> str | None:
        """The method of thinwire that gets there first."""
        return self._first((m for m in self.methods(task) if not is_peer(m)), task, share, ranks, mbit)

    def _first(self, methods, *where):
        times = {method: self.time_to(where[0], method, *where[1:]) for method in methods}
        return min((m for m, time in times.items() if time), key=lambda m: times[m].middle, default=None)


def _crossing(curve, target):
    """The step at which the straight lines through a curve's points first go down to the target."""
    if curve and curve[0][1] <= target:
        return float(curve[0][0])
    for (step, loss), (next_step, next_loss) in itertools.pairwise(curve):
        if next_loss <= target:
            return step + (next_step - step) * (loss - target) / (loss - next_loss)
    return None
