"""Which trainings are wanted, given those that are there: each way's search for its settings, its seeds, longer runs.

Ways are tuned by one rule, at full length on a seed of its own: from a start, compare with the neighbours - the
learning rate doubled and halved, the next momenta, the next outer momenta - and go on from the best of them, until no
neighbour is better. So the best is never at an edge of the learning rates that were tried. Of controls the learning
rate alone is looked for, and variants of local steps have the settings that these ended with: time is short.
"""
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from local import ways
from local.tasks import TASKS

KEY = ("task", "method", "lr", "momentum", "outer_momentum", "seed", "steps")
TUNING_SEED, SEEDS = 0, (1, 2, 3)
MOMENTA = (0.0, 0.5, 0.9)  # of SGD, or Adam's first beta
OUTER = (0.3, 0.5, 0.7, 0.9)
LONGER = (2000, 2500, 3000, 4000)  # steps, until plain DDP's loss is reached
MAIN = (ways.DDP, ways.POWERSGD, ways.LOCAL, ways.LOCAL_8, ways.LATE)
CONTROLS = (ways.ACCUMULATION, ways.OUTER_DDP, ways.POST_LOCAL, ways.ALONE, ways.NOMINATED)
VARIANTS = (ways.LOCAL_8, ways.LATE, ways.FRAGMENTS, ways.LOCAL_WAITS, ways.LOCAL_EXACT, ways.LOCAL_64,
            ways.PARTIAL_WEIGHTS, ways.PARTIAL_ERROR)  # fmt: skip
WITH_OUTER = {ways.LOCAL, ways.OUTER_DDP, *VARIANTS}
# (learning rate, momentum, outer momentum) to start from.
STARTS = {
    "AdamW": {
        ways.DDP: (6e-3, 0.5, None), ways.POWERSGD: (6e-3, 0.5, None), ways.LOCAL: (3e-3, 0.5, 0.7),
        ways.ACCUMULATION: (1.2e-2, 0.5, None), ways.OUTER_DDP: (3e-3, 0.5, 0.5),
        ways.POST_LOCAL: (3e-3, 0.9, None), ways.ALONE: (3e-3, 0.5, None), ways.NOMINATED: (1.2e-2, 0.0, None),
    },
    "SGD": {
        ways.DDP: (0.1, 0.9, None), ways.POWERSGD: (0.2, 0.5, None), ways.LOCAL: (0.2, 0.5, 0.7),
        ways.ACCUMULATION: (0.2, 0.9, None), ways.OUTER_DDP: (0.1, 0.5, 0.5),
        ways.POST_LOCAL: (0.1, 0.9, None), ways.ALONE: (0.1, 0.9, None), ways.NOMINATED: (0.4, 0.0, None),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """Ways of a task that are measured together: at equal steps or, where longer, until they reach plain DDP's loss."""

    task: str
    methods: tuple[str, ...]
    longer: bool = False


# In the order of their importance: what is measured when the time is over is whole.
STAGES = (
    Stage("bytes-adamw", MAIN),
    Stage("bytes-adamw", (ways.LOCAL, ways.POWERSGD, ways.FRAGMENTS, ways.LOCAL_8), longer=True),
    Stage("bytes-adamw", CONTROLS),
    Stage("bytes-adamw", VARIANTS),
    Stage("bytes-adamw", (ways.NOMINATED, ways.ACCUMULATION), longer=True),
    Stage("bytes-sgd", MAIN),
    Stage("bytes-sgd", CONTROLS),
    Stage("gpt2-adamw", MAIN),
)


def key(run: dict) -> tuple:
    return tuple(run[name] for name in KEY)


class Plan:
    """What is there, and what is wanted of it. steps: of every run, in the place of its task's; then none is longer."""

    def __init__(self, rows: list[dict], steps: int | None = None):
        self._steps = steps
        self._losses = {key(row): math.inf if row["loss"] is None else row["loss"] for row in rows}

    def wanted(self, stages=STAGES) -> Iterator[dict]:
        """Runs that are not there and can be named now, the most important first."""
        for stage in stages:
            for method in stage.methods:
                if not stage.longer:
                    yield from self._equal_steps(stage.task, method)
                elif not self._steps:
                    yield from self._longer(stage.task, method)

    def steps(self, task: str) -> int:
        return self._steps or TASKS[task].steps

    def settled(self, task: str, method: str) -> tuple | None:
        """The settings that its search has ended with, None while it is under way."""
        return self._search(task, method)[0]

    def loss(self, task: str, method: str, seed: int, steps: int | None = None) -> float | None:
        """With the settings found."""
        return self._losses.get(key(self._run(task, method, self.settled(task, method), seed, steps)))

    def mean(self, task: str, method: str, steps: int | None = None) -> float | None:
        """Over the seeds; None where one is not there."""
        losses = [self.loss(task, method, seed, steps) for seed in SEEDS] if self.settled(task, method) else [None]
        return None if None in losses else statistics.mean(losses)

    def _equal_steps(self, task, method):
        settings, missing = self._search(task, method)
        yield from missing
        if settings:
            yield from self._missing(task, method, SEEDS)

    def _longer(self, task, method):
        """Of each length the first seed and, where it is as low as plain DDP's, the others."""
        dense = self.mean(task, ways.DDP)
        if dense is None or self.mean(task, method) is None or self.mean(task, method) <= dense:
            return
        for steps in LONGER:
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
        if method in VARIANTS:
            return self.settled(task, ways.LOCAL), []
        at = STARTS[TASKS[task].optimizer][method]
        while at:
            around = [at, *_neighbours(*at, rates_only=method in CONTROLS)]
            losses = [self._losses.get(key(self._run(task, method, point, TUNING_SEED))) for point in around]
            if None in losses:
                missing = [point for point, loss in zip(around, losses) if loss is None]
                return None, [self._run(task, method, point, TUNING_SEED) for point in missing]
            best = around[losses.index(min(losses))]  # the first of equals
            if best == at:
                return at, []
            at = best
        return None, []

    def _missing(self, task, method, seeds, steps=None):
        for seed in seeds:
            if self.loss(task, method, seed, steps) is None:
                yield self._run(task, method, self.settled(task, method), seed, steps)

    def _run(self, task, method, settings, seed, steps=None):
        lr, momentum, outer = settings
        return {"task": task, "method": method, "lr": lr, "momentum": momentum, "outer_momentum": outer, "seed": seed,
                "steps": steps or self.steps(task)}  # fmt: skip


def _neighbours(lr, momentum, outer, rates_only):
    yield from ((2 * lr, momentum, outer), (lr / 2, momentum, outer))
    if rates_only:
        return
    yield from ((lr, other, outer) for other in _beside(momentum, MOMENTA))
    if outer is not None:
        yield from ((lr, momentum, other) for other in _beside(outer, OUTER))


def _beside(value, axis):
    i = axis.index(value)
    return axis[max(0, i - 1) : i] + axis[i + 1 : i + 2]
