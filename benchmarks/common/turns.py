"""Methods side by side in one run: a few steps of each in turn, and one's turns against another's.

The machine is never quiet, and what disturbs it lasts longer than a turn. So a figure compares each turn of a method
with the turns of its baseline just before and just after it, and the median of these comparisons counts.
"""
import statistics
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist
from thinnet import interface_bytes

SKIPPED = 1  # steps at the beginning of a turn, with cold caches, that are not counted
COUNTED = ("bytes_sent", "encode_s", "exchange_s", "decode_s", "waited_s")  # of stats()


def take_turn(contestant, steps: int, skipped: int = SKIPPED) -> dict:
    """Some steps on every rank, and the same row on each of what they took. The first, skipped, are not counted.

    contestant: has ``step()``, and ``handle``, which is thinwire's or None. ms: of each counted step, the mean over
    the ranks; last_ms: a step of the rank that is the last to be done. All else is a rank's, a step: sent, bytes that
    left through its interface; stats, what the handle says.
    """
    dist.barrier()
    before = _so_far(contestant)
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        contestant.step()
        seconds.append(time.perf_counter() - begin)
    dist.barrier()  # what others still wait for has been sent, too
    after = _so_far(contestant)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (seconds[skipped:], {key: (after[key] - before[key]) / steps for key in after}))
    of_steps, counts = zip(*everyone)
    row = {"ms": [round(1e3 * statistics.mean(step), 3) for step in zip(*of_steps)],
           "last_ms": round(1e3 * max(map(statistics.mean, of_steps)), 3)}  # fmt: skip
    means = {key: statistics.mean(one[key] for one in counts) for key in counts[0]}
    if "sent" in means:
        row["sent"] = round(means.pop("sent"))
    return row | ({"stats": means} if means else {})


def in_turns(names: list[str], baseline: str, cycles: int) -> Iterator[tuple[int, str]]:
    """(cycle, name): in a cycle every name, there and back again, each between turns of the baseline."""
    for cycle in range(cycles):
        for name in names if cycle % 2 == 0 else reversed(names):
            yield cycle, baseline
            yield cycle, name
        yield cycle, baseline


def pairs(rows: list[dict], ours: str, against: str, of: Callable = statistics.median) -> list[tuple[float, float]]:
    """For each turn of ours its median step, and that of the turns of the other just before and after it. In ms.

    of: what a turn is taken for, in the place of its median step.
    """
    found = []
    for i, row in enumerate(rows):
        if row["method"] == ours:
            near = (_next(rows[i + 1:], against), _next(rows[i::-1], against))
            theirs = [of(one["ms"]) for one in near if one]
            if theirs:
                found.append((of(row["ms"]), statistics.mean(theirs)))
    return found


def ratios(rows: list[dict], ours: str, against: str, of: Callable = statistics.median) -> list[float]:
    """Turn by turn."""
    return [mine / theirs for mine, theirs in pairs(rows, ours, against, of)]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower, median, upper."""
    return tuple(statistics.quantiles(values, n=4, method="inclusive")) if len(values) > 1 else (values[0],) * 3


def shown(values: list[float], digits: int = 2) -> str:
    """The median, with the quartiles in brackets."""
    low, median, high = quartiles(values)
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def steps_of(rows: list[dict], name: str) -> list[float]:
    """All counted steps of a method, ms."""
    return [ms for row in rows if row["method"] == name for ms in row["ms"]]


def mean_of(rows: list[dict], name: str, *path: str) -> float | None:
    """A count's mean over a method's turns; None where it was not counted."""
    found = []
    for row in rows:
        if row["method"] == name:
            for key in path:
                row = (row or {}).get(key)
            found.append(row)
    return None if None in found or not found else statistics.mean(found)


def _so_far(contestant):
    counts = {}
    if interface := interface_bytes():
        counts["sent"] = interface.tx
    if contestant.handle:
        stats = contestant.handle.stats()
        counts |= {key: stats[key] for key in COUNTED if key in stats}
    return counts


def _next(rows, name):
    return next((row for row in rows if row["method"] == name), None)
