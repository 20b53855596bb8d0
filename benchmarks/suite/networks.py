"""On which networks a step is timed, of which models, and under which ways."""
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from suite import ways
from suite.tasks import LARGE, MAIN, TASKS

NOOP = ways.ALONE  # the baseline: no exchange at all
UNSHAPED = 0.0
RATES, DELAYS = (50.0, 100.0, 250.0, 1000.0, UNSHAPED), (0.1, 10.0, 50.0)
MODELS = {MAIN: TASKS[MAIN], "large": LARGE, "clicks": TASKS["clicks"]}
IN_ONE = ", one bucket"  # at the end of a way's name: DDP's gradients in one bucket, not in its default
TIMED = (
    ways.DDP, ways.DDP + IN_ONE, ways.HALF, ways.HALF + IN_ONE, ways.ACCUMULATION_4, ways.POWERSGD, ways.POST_LOCAL,
    ways.NOMINATED, ways.NOMINATED + IN_ONE, "nominated-12-int4" + IN_ONE, ways.LOCAL_4, ways.LOCAL_8, ways.LOCAL,
)  # fmt: skip
MORE = (ways.ACCUMULATION, "powersgd-1", "powersgd-4-fp16", "independent", "ds-sync", "topk-1", ways.INT4,
        "nominated-1-int4", "nominated-4-int4" + IN_ONE, ways.LATE_8,
        "local-64", ways.LATE, ways.FRAGMENTS, ways.LOCAL_WAITS)  # fmt: skip
FEWER = (ways.DDP, ways.HALF, ways.POWERSGD, ways.POST_LOCAL, ways.NOMINATED + IN_ONE, ways.LOCAL_4, ways.LOCAL_8,
         ways.LOCAL)  # fmt: skip


@dataclass(frozen=True)
class Network:
    """Where a model's steps are timed. mbit: each way, 0 for no limit; delay_ms: one way. Even the shortest is added,
    so that all links are made by the same means.

    methods, cycles: what takes turns there, and how often.
    """

    model: str = MAIN
    ranks: int = 4
    mbit: float = 100.0
    delay_ms: float = DELAYS[0]
    methods: tuple[str, ...] = TIMED
    cycles: int = 2

    def key(self) -> dict:
        """What identifies it."""
        return {name: value for name, value in asdict(self).items() if name not in ("methods", "cycles")}

    def __str__(self) -> str:
        return f"{self.model}, {self.ranks} ranks, {link(self.mbit, self.delay_ms)}"


def link(mbit: float, delay_ms: float) -> str:
    """In words."""
    return (f"{mbit:g} Mbit/s" if mbit else "no limit") + f", {delay_ms:g} ms"


def everywhere() -> Iterator[Network]:
    """The most important first: the main task's links on 4 ranks, other numbers of ranks, other models."""
    yield Network(delay_ms=10, methods=TIMED + MORE, cycles=3)
    for delay in (10.0, 0.1, 50.0):
        for mbit in (100.0, 250.0, 50.0, 1000.0, UNSHAPED):
            if (mbit, delay) != (100.0, 10.0):
                yield Network(mbit=mbit, delay_ms=delay)
    for ranks in (2, 8):
        for delay in (10.0, 0.1):
            yield Network(ranks=ranks, delay_ms=delay, methods=FEWER)
    for delay in (10.0, 0.1):
        yield Network("clicks", delay_ms=delay, methods=FEWER)
    yield Network("large", delay_ms=10, methods=FEWER)


QUICK = (Network(delay_ms=10, methods=(ways.DDP, ways.HALF, ways.POWERSGD, ways.NOMINATED + IN_ONE, ways.LOCAL),
                 cycles=1),)  # fmt: skip
