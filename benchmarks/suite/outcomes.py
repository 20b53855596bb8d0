"""What the rows of the ledger add up to: step times, losses over seeds, and the time to a given quality."""
import functools
import itertools
import math
import statistics
from dataclasses import dataclass

from suite.ledger import Ledger, final_loss
from suite.methods import CONTESTANTS
from suite.tasks import TASKS

HALF, END = 0.5, 1.0  # the targets are plain DDP's losses after these shares of its steps
# PowerSGD cannot begin earlier, and the heaviest blocks are not known before: their first steps send all.
DENSE_AT_FIRST = 2
BEGIN_DENSE = ("powersgd", "topk", "nominated", "elastic-nominated", "horovod-nominated")


@dataclass(frozen=True)
class Span:
    """A middle and how far it is spread."""

    low: float
    middle: float
    high: float

    def __mul__(self, other: "Span") -> "Span":
        return Span(self.low * other.low, self.middle * other.middle, self.high * other.high)

    def __add__(self, more: float) -> "Span":
        return Span(self.low + more, self.middle + more, self.high + more)

    def __truediv__(self, other: "Span") -> "Span":
        return Span(self.low / other.high, self.middle / other.middle, self.high / other.low)

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def over(values: list[float]) -> Span:
    """Mean and range."""
    return Span(min(values), statistics.mean(values), max(values))


def enclosing(spans: list[Span], mean=statistics.mean) -> Span:
    """The mean of their middles, and from the lowest to the highest."""
    return Span(min(span.low for span in spans), mean(span.middle for span in spans), max(span.high for span in spans))


def side_by_side(rows: list[dict]) -> dict | None:
    """Of rows of one method's steps on one network, that of the newest turns with the most methods, or None."""
    return max(reversed(rows), key=lambda row: len(row.get("among", ())), default=None)


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

    @functools.cache  # noqa: B019  an Outcomes is asked over and over, and made anew for each report
    def step(self, task: str, method: str, ranks: int, mbit: float) -> dict | None:
        """The row of a method's steps from the newest turns with the most methods, or None."""
        rows = self.ledger.find(kind="speed", task=task, method=method, ranks=ranks, mbit=mbit, status="done")
        return side_by_side(rows)

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
        """The link's rate in Mbit/s at which the method's step gets as long as plain DDP's, by their means.

        0 where it is already at the lowest rate measured, None where it is at none. Between two measured rates a step
        takes a + b / rate; infinite where that is the unshaped link's.
        """
        rates = {row["mbit"] for row in self.ledger.find(kind="speed", task=task, method=method, ranks=ranks)}
        before = None
        for mbit in sorted(rates, key=lambda rate: rate or math.inf):
            ours, dense = (self.step_time(task, name, ranks, mbit) for name in (method, "dense"))
            if ours is None or dense is None:
                continue
            gain, inverse = dense.middle - ours.middle, 1 / mbit if mbit else 0.0
            if gain <= 0:
                if before is None:
                    return 0.0
                inverse += (before[0] - inverse) * -gain / (before[1] - gain)
                return 1 / inverse if inverse else math.inf
            before = inverse, gain
        return None

    # ---- losses ----

    @functools.cache  # noqa: B019
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
        return dict(sorted({row["seed"]: row for row in rows}.items()))

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
                if seed in dense and math.isfinite(final_loss(dense[seed]))]  # fmt: skip
        return over(more) if more else None

    # ---- time to quality ----

    def target(self, task: str, share: float, seed: int) -> float | None:
        """Plain DDP's loss after a share of its steps; None where it did not get to their end."""
        row = self.quality(task, "dense").get(seed)
        if row is None or not math.isfinite(final_loss(row)):
            return None
        return [loss for step, loss in self.curve(task, "dense", seed) if step <= share * row["steps"]][-1]

    @functools.cache  # noqa: B019
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
        """In all seeds that plain DDP was trained with."""
        return set(self.steps_to(task, method, share)) == set(self.quality(task, "dense")) != set()

    def time_to(self, task: str, method: str, share: float, ranks: int, mbit: float) -> Span | None:
        """Steps times step time, the first of some methods taking plain DDP's; None where a seed does not get there."""
        times = self._times(task, method, share, ranks, mbit)
        return times and enclosing(list(times.values()))

    def speedup(self, task: str, method: str, against: str, share: float, ranks: int, mbit: float) -> Span | None:
        """The other's time to quality over the method's, seed by seed; 1 is within a tie. The middle is geometric."""
        theirs, ours = (self._times(task, name, share, ranks, mbit) for name in (against, method))
        if not (ours and theirs):
            return None
        return enclosing([theirs[seed] / ours[seed] for seed in ours], statistics.geometric_mean)

    def _times(self, task, method, share, ranks, mbit) -> dict[int, Span] | None:
        """Seed by seed."""
        step = self.step_time(task, method, ranks, mbit)
        if step is None or not self.gets_there(task, method, share):
            return None
        begin = self.at_first(task, method, ranks, mbit)
        return {seed: over([steps]) * step + begin for seed, steps in self.steps_to(task, method, share).items()}

    def at_first(self, task: str, method: str, ranks: int, mbit: float) -> float:
        """Seconds that the method's first steps take more than its others."""
        ours, dense = (self.step_time(task, name, ranks, mbit) for name in (method, "dense"))
        if dense is None or not method.startswith(BEGIN_DENSE):
            return 0.0
        return DENSE_AT_FIRST * max(0.0, dense.middle - ours.middle)

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
