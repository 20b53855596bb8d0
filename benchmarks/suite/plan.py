"""Which trainings are wanted, given those that are there: each way's search for its settings, its seeds, longer runs.

Ways are tuned by one rule, at full length on a seed of its own: from a start, compare with the learning rate doubled
and halved and go on from the best, until neither is better; then with the next momenta and outer momenta, and if one is
better begin again from there. So the best is never at an edge of the learning rates that were tried. A stage may say
that the learning rate alone is searched for, for lack of time, and tables say that, too; and a way may have another's
settings, where the two differ in nothing that they should depend on.
"""
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from suite import ways
from suite.tasks import MAIN, TASKS
from suite.ways import WAYS

KEY = ("task", "method", "lr", "momentum", "outer_momentum", "seed", "steps")
TUNING_SEED, SEEDS = 0, (1, 2, 3)
MOMENTA = (0.0, 0.5, 0.9)  # of SGD, or Adam's first beta
OUTER = (0.3, 0.5, 0.7, 0.9)
OUTER_START = 0.7
LONGER = (4 / 3, 5 / 3, 2, 8 / 3)  # times a task's steps, until plain DDP's loss is reached


@dataclass(frozen=True)
class Stage:
    """Ways of a task that are measured together.

    longer: beyond the task's steps, once at least, and until they reach plain DDP's loss. rates_only: of their
    settings, the learning rate alone is searched for. seeds: those that are shown.
    """

    task: str
    methods: tuple[str, ...]
    longer: bool = False
    rates_only: bool = False
    seeds: tuple[int, ...] = SEEDS


CHOICES = tuple(name for name, way in WAYS.items() if not way.control)
CONTROLS = tuple(name for name, way in WAYS.items() if way.control)
SHORT = (ways.DDP, ways.HALF, ways.POWERSGD, "powersgd-1", ways.ACCUMULATION_4, ways.POST_LOCAL, "nominated-1-int4",
         "nominated-4-int4", ways.NOMINATED, "topk-1", ways.INT4, "independent", ways.LOCAL_8, ways.LOCAL)  # fmt: skip
# In the order of their importance: what is measured when the time is over is whole.
STAGES = (
    Stage(MAIN, (ways.DDP, ways.POWERSGD, ways.LOCAL, ways.NOMINATED)),
    Stage(MAIN, (ways.LOCAL_8, ways.LOCAL_4, ways.HALF), rates_only=True),
    Stage(MAIN, ("nominated-12-int4",)),
    Stage(MAIN, (ways.DDP, ways.LOCAL_8, ways.POWERSGD, ways.HALF, ways.NOMINATED), longer=True),
    Stage("clicks", (ways.DDP, ways.POWERSGD, "nominated-4-int4", ways.NOMINATED, ways.LOCAL_8), rates_only=True),
    Stage(MAIN, (ways.ACCUMULATION_4,), rates_only=True),
    Stage(MAIN, (ways.LATE_8,)),
    Stage(MAIN, ("nominated-4-int4", ways.POST_LOCAL), rates_only=True),
    Stage("clicks", SHORT, rates_only=True),
    Stage(MAIN, (ways.LOCAL_4, ways.LATE_8, ways.ACCUMULATION_4), longer=True),
    Stage("digits", SHORT, rates_only=True),
    Stage(MAIN, ("powersgd-4-fp16", ways.LATE, ways.INT4, "powersgd-1"), rates_only=True),
    Stage(MAIN, (ways.LOCAL, ways.POST_LOCAL), longer=True),
    Stage(MAIN, CHOICES, rates_only=True),
    Stage(MAIN, CONTROLS, rates_only=True),
    Stage("bytes-sgd", CHOICES),
    Stage("gpt2-adamw", CHOICES),
)
QUICK, QUICK_STEPS = (ways.DDP, ways.POWERSGD, ways.NOMINATED, ways.LOCAL_8), 300  # of the main task


def key(run: dict) -> tuple:
    return tuple(run[name] for name in KEY)


class Plan:
    """What is there, and what is wanted of it. steps: of every run, in the place of its task's; then none is longer."""

    def __init__(self, rows: list[dict], steps: int | None = None, stages=STAGES):
        self._steps, self._stages = steps, stages
        self._searches = {}  # what is known of each: rows do not change
        self._losses = {key(row): math.inf if row["loss"] is None else row["loss"] for row in rows}

    def wanted(self) -> Iterator[dict]:
        """Runs that are not there and can be named now, the most important first."""
        for stage in self._stages:
            for method in stage.methods:
                if not stage.longer:
                    yield from self._equal_steps(stage.task, method, stage.seeds)
                elif not self._steps:
                    yield from self._longer(stage.task, method)

    def steps(self, task: str) -> int:
        return self._steps or TASKS[task].steps

    def lengths(self, task: str) -> tuple[int, ...]:
        """Of runs: the task's own, and those beyond it."""
        return tuple(round(times * self.steps(task)) for times in (1, *LONGER))

    def settled(self, task: str, method: str) -> tuple | None:
        """The settings that its search has ended with, None while it is under way."""
        return self._search(task, method)[0]

    def rates_only(self, task: str, method: str) -> bool:
        """Whether the learning rate alone is searched for: the first stage with this task and method says so."""
        if WAYS[method].like:
            return self.rates_only(task, WAYS[method].like)
        of = [stage.rates_only for stage in self._stages if stage.task == task and method in stage.methods
              and not stage.longer]  # fmt: skip
        return bool(of) and of[0]

    def tried(self, task: str, method: str) -> int:
        """How many settings its search has tried."""
        return sum(found[:2] == (task, method) and found[5] == TUNING_SEED for found in self._losses)

    def loss(self, task: str, method: str, seed: int, steps: int | None = None) -> float | None:
        """With the settings found."""
        return self._losses.get(key(self.run(task, method, self.settled(task, method), seed, steps)))

    def mean(self, task: str, method: str, steps: int | None = None) -> float | None:
        """Over the seeds; None where one is not there."""
        losses = [self.loss(task, method, seed, steps) for seed in SEEDS] if self.settled(task, method) else [None]
        return None if None in losses else statistics.mean(losses)

    def run(self, task, method, settings, seed, steps=None) -> dict:
        lr, momentum, outer = settings
        return {"task": task, "method": method, "lr": lr, "momentum": momentum, "outer_momentum": outer, "seed": seed,
                "steps": steps or self.steps(task)}  # fmt: skip

    def _equal_steps(self, task, method, seeds):
        settings, missing = self._search(task, method)
        yield from missing
        if settings:
            yield from self._missing(task, method, seeds)

    def _longer(self, task, method):
        """Of each length the first seed and, where it is as low as plain DDP's of the task's own length, the others.
        Those that are so low without it, plain DDP itself, have the first of them too: with more steps ahead a learning
        rate is high for longer, and a loss is reached sooner."""
        dense = self.mean(task, ways.DDP)
        if dense is None or self.mean(task, method) is None:
            return
        for steps in self.lengths(task)[1:]:
            first = self.loss(task, method, SEEDS[0], steps)
            if first is None:
                return (yield from self._missing(task, method, SEEDS[:1], steps))
            if first <= self.loss(task, ways.DDP, SEEDS[0]):
                if missing := list(self._missing(task, method, SEEDS, steps)):
                    return (yield from missing)
                if self.mean(task, method, steps) <= dense:
                    return

    def _search(self, task, method):
        """The settings, or None, and the runs that it takes to go on."""
        if (task, method) not in self._searches:
            self._searches[task, method] = self._searched(task, method, WAYS[method])
        return self._searches[task, method]

    def _searched(self, task, method, way):
        if way.like:
            return self.settled(task, way.like), []
        at = self._start(task, method, way)
        kinds = (_rates,) if self.rates_only(task, method) else (_rates, _momenta)
        while at:
            for neighbours in kinds:
                around = [at, *neighbours(*at)]
                losses = [self._losses.get(key(self.run(task, method, point, TUNING_SEED))) for point in around]
                if None in losses:
                    missing = [point for point, loss in zip(around, losses) if loss is None]
                    return None, [self.run(task, method, point, TUNING_SEED) for point in missing]
                best = around[losses.index(min(losses))]  # the first of equals
                if best != at:
                    break
            else:
                return (at if math.isfinite(losses[0]) else None), []
            at = best
        return None, []

    def _start(self, task, method, way):
        if method == ways.DDP:
            return *TASKS[task].start, None
        if dense := self.settled(task, ways.DDP):
            return way.rate * dense[0], dense[1], OUTER_START if way.outer else None
        return None

    def _missing(self, task, method, seeds, steps=None):
        for seed in seeds:
            if self.loss(task, method, seed, steps) is None:
                yield self.run(task, method, self.settled(task, method), seed, steps)


def quick(rows: list[dict]) -> list[dict]:
    """A few short runs, with the settings that were found at full length."""
    plan = Plan(rows)
    settled = {method: plan.settled(MAIN, method) for method in QUICK}
    return [plan.run(MAIN, method, settings, SEEDS[0], QUICK_STEPS) for method, settings in settled.items() if settings]


def expected(rows: list[dict], steps: int | None = None, stages=STAGES) -> list[dict]:
    """The runs that are left where every search ends at its start, and nothing longer reaches plain DDP's loss."""
    runs, rows = [], list(rows)
    while wanted := next(Plan(rows, steps, stages).wanted(), None):
        runs.append(wanted)
        worse = wanted["method"] != ways.DDP
        rows.append(wanted | {"loss": 1.0 + worse + len(rows) / 1e6})  # of a search, the first is the best
    return runs


def _rates(lr, momentum, outer):
    return (2 * lr, momentum, outer), (lr / 2, momentum, outer)


def _momenta(lr, momentum, outer):
    yield from ((lr, other, outer) for other in _beside(momentum, MOMENTA))
    if outer is not None:
        yield from ((lr, momentum, other) for other in _beside(outer, OUTER))


def _beside(value, axis):
    i = axis.index(value)
    return axis[max(0, i - 1) : i] + axis[i + 1 : i + 2]
