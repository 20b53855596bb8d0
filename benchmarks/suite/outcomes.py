"""What the losses and the step times add up to: the time to a given quality."""
import functools
import itertools
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from common.record import RESULTS, read_rows

from suite import ways
from suite.networks import IN_ONE, NOOP, Network
from suite.plan import SEEDS, Plan, key
from suite.tasks import TASKS
from suite.ways import WAYS

LOSSES, STEPS = "losses", "step_times"
HALF, END = 0.5, 1.0  # the targets are plain DDP's losses after these shares of its steps
RANKS = 4  # of the trainings
EXACT = 1e-9  # of a loss: the rounding of a mean
PARTS = (SEEDS, *itertools.combinations(SEEDS, len(SEEDS) - 1))  # all seeds, and without each in turn


@dataclass(frozen=True)
class Span:
    """A middle and how far it is spread."""

    low: float
    middle: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def over(values: list[float], mean=statistics.mean) -> Span:
    """Mean and range."""
    return Span(min(values), mean(values), max(values))


def newest(rows: list[dict]) -> list[dict]:
    """Of equal trainings the last counts, and of each task none on other data than its last one."""
    data = {row["task"]: row["data"] for row in rows}
    return list({key(row): row for row in rows if row["data"] == data[row["task"]]}.values())


def found(out: Path = RESULTS) -> "Outcomes":
    """Of what is committed and what out has beside: its losses as well, but its step times in the place of those."""
    losses, steps = ([read_rows(place / f"{name}.jsonl") for place in dict.fromkeys((RESULTS, out))]
                     for name in (LOSSES, STEPS))  # fmt: skip
    return Outcomes(sum(losses, []), steps[-1] or steps[0])


class Outcomes:
    """Questions to the rows of both files. Times are in seconds.

    A target is reached where the mean over the seeds is at plain DDP's mean; how much that hangs on one seed is told by
    leaving each out in turn, of both, and a span is the range of that, widened by how far the step times' turns are
    spread. A time to quality is steps times step time; a way that sends all in its first steps, or once at its end, is
    charged with plain DDP's step for those.
    """

    def __init__(self, losses: list[dict], steps: list[dict], stages=None):
        self.losses, self.networks = newest(losses), steps
        self.plan = Plan(self.losses, **({"stages": stages} if stages else {}))
        self._rows = {key(row): row for row in self.losses}

    # ---- losses ----

    @functools.cache  # noqa: B019  an Outcomes is asked over and over, and made anew for each report
    def runs(self, task: str, method: str, steps: int | None = None) -> dict[int, dict]:
        """By seed, those with the settings found, of the task's own number of steps or another."""
        settings = self.plan.settled(task, method)
        rows = {seed: self._rows.get(key(self.plan.run(task, method, settings, seed, steps))) for seed in SEEDS
                if settings}  # fmt: skip
        return {seed: row for seed, row in rows.items() if row}

    def methods(self, task: str) -> list[str]:
        """Those with a row to show."""
        return [method for method in WAYS if self.runs(task, method)]

    def loss(self, task: str, method: str) -> Span | None:
        """At the end of equally many steps; None where there is none, or one has diverged."""
        losses = [row["loss"] for row in self.runs(task, method).values()]
        return over(losses) if losses and None not in losses else None

    def loss_over(self, task: str, method: str, other: str) -> Span | None:
        """By how much the loss exceeds another way's, over the seeds that both have."""
        ours, theirs = self.runs(task, method), self.runs(task, other)
        pairs = [(ours[seed]["loss"], theirs[seed]["loss"]) for seed in ours if seed in theirs]
        return None if not pairs or None in sum(pairs, ()) else over([a - b for a, b in pairs])

    def compression(self, task: str, method: str) -> float | None:
        """Bytes that plain DDP sends for each one that the way does, its last exchange included: the mean over the
        seeds; infinite where it sends none, None where it is not known."""
        rows = list(self.runs(task, method).values())
        if method == ways.ALONE and rows:
            return math.inf
        found = [row.get("compression_whole", row["compression"]) for row in rows]
        return statistics.mean(found) if found and None not in found else None

    def of_all_seeds(self, task: str) -> list[str]:
        """Those with every seed, none of which has diverged; and no controls."""
        return [method for method in self.methods(task) if not WAYS[method].control
                and len(self.runs(task, method)) == len(SEEDS) and self.loss(task, method)]  # fmt: skip

    # ---- steps ----

    @functools.cache  # noqa: B019
    def network(self, model: str, ranks: int, mbit: float, delay_ms: float) -> dict | None:
        """The newest row of a network, or None."""
        wanted = Network(model, ranks, mbit, delay_ms).key()
        rows = [row for row in self.networks if {name: row[name] for name in wanted} == wanted]
        return rows[-1] if rows else None

    @functools.cache  # noqa: B019
    def step_time(self, method: str, model: str, ranks: int, mbit: float, delay_ms: float) -> Span | None:
        """A step of the rank that is the last to be done: the mean of the turns, and their range. In DDP's buckets or
        in one, whichever is shorter there."""
        row = self.network(model, ranks, mbit, delay_ms)
        found = []
        for name in (method, method + IN_ONE):
            if turns := [turn["last_ms"] / 1e3 for turn in (row or {"turns": []})["turns"] if turn["method"] == name]:
                found.append(over(turns))
        return min(found, key=lambda span: span.middle, default=None)

    def sent(self, method: str, *network) -> float | None:
        """Bytes a step that left a rank's interface, TCP's own and what was sent twice included."""
        row = self.network(*network)
        found = [turn["sent"] for turn in (row or {"turns": []})["turns"] if "sent" in turn
                 and turn["method"].removesuffix(IN_ONE) == method]  # fmt: skip
        return statistics.mean(found) if found else None

    def over_no_exchange(self, method: str, *network) -> float | None:
        """A way's step over one of the same network without exchange."""
        ours, alone = (self.step_time(name, *network) for name in (method, NOOP))
        return ours.middle / alone.middle if ours and alone else None

    # ---- time to quality ----

    def target(self, task: str, share: float, seeds: tuple[int, ...] = SEEDS) -> float | None:
        """Plain DDP's loss after a share of its steps, the mean over the seeds."""
        runs = self.runs(task, ways.DDP)
        if any(seed not in runs or runs[seed]["loss"] is None for seed in seeds):
            return None
        upto = share * self.plan.steps(task)
        return statistics.mean([loss for step, loss in runs[seed]["curve"] if step <= upto][-1] for seed in seeds)

    @functools.cache  # noqa: B019
    def steps_to(self, task: str, method: str, share: float) -> dict[tuple[int, ...], float | None] | None:
        """After how many steps the mean curve of all seeds is down to the mean target, and that of each part of them;
        None for a part that does not get there. Of all lengths of runs that with the fewest steps; None where no
        length's mean gets there."""
        best = None
        for steps in self.plan.lengths(task):
            runs = self.runs(task, method, steps)
            if self.target(task, share) is None or any(s not in runs or runs[s]["loss"] is None for s in SEEDS):
                continue
            found = {part: crossing(mean_curve([runs[seed] for seed in part]), self.target(task, share, part))
                     for part in PARTS}  # fmt: skip
            if found[SEEDS] is not None and (best is None or found[SEEDS] < best[SEEDS]):
                best = found
        return best

    def times(self, task: str, method: str, share: float, mbit: float, delay_ms: float) -> dict[tuple, Span] | None:
        """By part of the seeds, the seconds to the target over such links, infinite where it does not get there; None
        where all together do not, or no step was timed."""
        where = (task, RANKS, mbit, delay_ms)
        step, dense = self.step_time(method, *where), self.step_time(ways.DDP, *where)
        steps = self.steps_to(task, method, share)
        if step is None or steps is None:
            return None
        more = whole_exchanges(task, method) * max(0.0, dense.middle - step.middle) if dense else 0.0
        return {part: Span(*((math.inf if n is None else n) * s + more for s in (step.low, step.middle, step.high)))
                for part, n in steps.items()}  # fmt: skip

    def time_to(self, *where) -> Span | None:
        """Of all seeds together, and the range over its parts: (task, method, share, mbit, delay_ms)."""
        times = self.times(*where)
        if times is None:
            return None
        spans = times.values()
        return Span(min(s.low for s in spans), times[SEEDS].middle, max(s.high for s in spans))

    def speedup(self, task: str, method: str, against: str, share: float, mbit: float, delay_ms: float) -> Span | None:
        """The other's time to the target over the way's, of the same seeds; a tie where 1 is in it."""
        ours, theirs = (self.times(task, name, share, mbit, delay_ms) for name in (method, against))
        if ours is None or theirs is None:
            return None
        ratios = [Span(_over(theirs[part].low, ours[part].high), _over(theirs[part].middle, ours[part].middle),
                       _over(theirs[part].high, ours[part].low)) for part in PARTS]  # fmt: skip
        return Span(min(r.low for r in ratios), ratios[0].middle, max(r.high for r in ratios))

    def first(self, task: str, share: float, mbit: float, delay_ms: float, ours: bool) -> str | None:
        """The way, thinwire's or a peer, that gets to the target first; controls do not count."""
        return next((m for m in self.ranking(task, share, mbit, delay_ms) if WAYS[m].ours == ours), None)

    def ranking(self, task: str, share: float, mbit: float, delay_ms: float) -> list[str]:
        """Those that get to the target, the first one first."""
        times = {method: self.time_to(task, method, share, mbit, delay_ms) for method in self.methods(task)
                 if not WAYS[method].control}  # fmt: skip
        return sorted((m for m, time in times.items() if time), key=lambda m: times[m].middle)


def whole_exchanges(task: str, method: str) -> int:
    """How many of its steps send all, and are not in its step time."""
    if method == ways.POST_LOCAL:
        return TASKS[task].warm_up
    if method.startswith("powersgd"):
        return ways.PowerSgd.DENSE
    return int(WAYS[method].outer)  # finalize()


def mean_curve(runs: list[dict]) -> list[tuple[int, float]]:
    """The mean of several runs' curves, point by point."""
    return [(points[0][0], statistics.mean(loss for _, loss in points)) for points in zip(*(r["curve"] for r in runs))]


def crossing(curve: list, target: float) -> float | None:
    """The step at which the straight lines through a curve's points first go down to the target."""
    if curve and curve[0][1] <= target + EXACT:
        return float(curve[0][0])
    for (step, loss), (next_step, next_loss) in itertools.pairwise(curve):
        if next_loss <= target + EXACT:
            return step + (next_step - step) * min(1.0, (loss - target) / (loss - next_loss))
    return None


def _over(theirs, ours):
    """A ratio of times; of two that are never there, 1."""
    return 1.0 if math.isinf(theirs) and math.isinf(ours) else theirs / ours
