"""Which runs the benchmark suite consists of. A run is a value; what came of it is in the ledger."""
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

from suite.methods import CONTESTANTS, DDP
from suite.tasks import TASKS

UNSHAPED = 0.0
RANKS, RATE = 4, 100.0  # of the main comparison; Mbit/s
ALL_RANKS, ALL_RATES = (2, 4, 8), (50.0, 100.0, 1000.0, UNSHAPED)
TUNING_SEED, SEEDS = 0, (1, 2, 3)  # what was tuned on one seed is shown on others
MAIN_TASK = "bytes-adamw"
HEADLINE = (
    "dense", "dense-one-bucket", "fp16", "bf16", "powersgd-1", "powersgd-2", "powersgd-4", "powersgd-4-fp16",
    "independent", "permuted", "shared", "topk-1", "nominated-1", "nominated-4", "nominated-16", "nominated-4-bf16",
    "nominated-4-momentum", "ds-sync", "elastic-nominated", "horovod", "horovod-fp16", "horovod-nominated-4",
)  # fmt: skip
QUICK = ("dense", "fp16", "powersgd-1", "independent", "nominated-4", "nominated-4-bf16", "ds-sync")
QUICK_STEPS = 100


@dataclass(frozen=True)
class Training:
    """One training of a task under a method. options: the optimizer's, as JSON; tuned_as: the method whose they are.

    purpose: ``tune`` is one point of the grid; ``quality`` gives the loss against steps, which does not depend on the
    link's rate, so the link is not shaped; ``direct`` is the same over shaped links, to check just that.
    """

    purpose: str
    task: str
    method: str
    options: str
    tuned_as: str
    ranks: int = RANKS
    mbit: float = UNSHAPED
    seed: int = SEEDS[0]
    steps: int = 0
    kind = "train"

    @property
    def methods(self) -> tuple[str, ...]:
        return (self.method,)

    @property
    def weight(self) -> float:
        """Roughly how long it takes, for the progress."""
        return self.steps * self.ranks

    @property
    def timed(self) -> bool:
        return self.purpose == "direct"

    def without(self, method: str) -> None:
        """What remains to be done without a method: nothing."""

    def key(self, method: str) -> dict:
        """What identifies its row in the ledger."""
        return {"kind": self.kind} | asdict(self)

    def for_rank(self) -> dict:
        return self.key(self.method) | {"options": json.loads(self.options), "door": CONTESTANTS[self.method].door}


@dataclass(frozen=True)
class Speed:
    """Steps of several methods in turns, over links of one rate; a row for each method."""

    task: str
    methods: tuple[str, ...]
    ranks: int
    mbit: float
    turns: int = 4
    seed: int = 0
    kind = "speed"
    timed = True

    @property
    def weight(self) -> float:
        return 10 * self.turns * self.ranks * len(self.methods)

    def without(self, method: str) -> "Speed | None":
        rest = tuple(one for one in self.methods if one != method)
        return replace(self, methods=rest) if set(rest) - {"noop"} else None

    def key(self, method: str) -> dict:
        """``among``: the methods that took turns; rows with another among were not measured side by side."""
        return {"kind": self.kind} | asdict(self) | {"method": method, "methods": None, "among": list(self.methods)}

    def for_rank(self) -> dict:
        return {"kind": self.kind} | asdict(self) | {"door": CONTESTANTS[self.methods[0]].door}


Run = Training | Speed
Best = Callable[[str, str], tuple[str, str]]


def tuning(tasks: list[str], methods: list[str]) -> Iterator[Training]:
    """Every method over its task's grid: one seed, the main number of ranks."""
    for task in tasks:
        for method in _trained(methods, RANKS):
            for options in grid(task, method):
                yield Training("tune", task, method, json.dumps(options), method, seed=TUNING_SEED,
                               steps=TASKS[task].tuning_steps)  # fmt: skip


def grid(task: str, method: str) -> tuple[dict, ...]:
    """The options that a method is tried with."""
    return TASKS[task].without_momentum if CONTESTANTS[method].momentum else TASKS[task].grid


def quality(tasks: list[str], methods: list[str], best: Best, seeds=SEEDS, steps: int = 0) -> Iterator[Training]:
    for task in tasks:
        for seed in seeds:
            for method in _trained(methods, RANKS):
                yield Training("quality", task, method, *best(task, method), seed=seed,
                               steps=steps or TASKS[task].steps)  # fmt: skip


def direct(methods: list[str], best: Best) -> Iterator[Training]:
    for method in _trained(methods, RANKS):
        yield Training("direct", MAIN_TASK, method, *best(MAIN_TASK, method), mbit=RATE, steps=TASKS[MAIN_TASK].steps)


def speed(tasks: list[str], methods: list[str], ranks=(RANKS,), rates=ALL_RATES, turns: int = 4) -> Iterator[Speed]:
    """Horovod's methods take turns among themselves: its background thread would slow down the others."""
    for task in tasks:
        for n in ranks:
            for mbit in rates:
                fitting = ["noop"] + [method for method in methods if CONTESTANTS[method].least_ranks <= n]
                for ours in (True, False):
                    turn = tuple(method for method in fitting if (CONTESTANTS[method].door == DDP) == ours)
                    if set(turn) - {"noop"}:
                        yield Speed(task, turn, n, mbit, turns)


def everything(tasks: list[str], methods: list[str], best: Best) -> Iterator[Run]:
    """The full set, but for the tuning: the step times first, as they need a machine with nothing else to do."""
    yield from speed(tasks, methods)
    if MAIN_TASK in tasks:
        yield from speed([MAIN_TASK], methods, ranks=[n for n in ALL_RANKS if n != RANKS])
        yield from direct([method for method in HEADLINE if method in methods], best)
    yield from quality(tasks, methods, best)


def quick(methods: list[str], best: Best) -> Iterator[Run]:
    yield from speed([MAIN_TASK], methods, rates=(RATE, 1000.0), turns=3)
    yield from quality([MAIN_TASK], methods, best, seeds=SEEDS[:1], steps=QUICK_STEPS)


def _trained(methods, ranks):
    return [m for m in methods if CONTESTANTS[m].trains and CONTESTANTS[m].least_ranks <= ranks]
