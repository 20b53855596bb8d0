"""Measure a link with short collectives: an empty all-reduce, several empty all-to-alls at once, an all-reduce of some
size, and an all-to-all like it."""

import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist

from thinwire.advice.cost import Collective, Link
from thinwire.advice.rehearsal import clock, together
from thinwire.core.exchange import gather_objects

EMPTY, TIMES, FIRST = 256, 20, 3  # bytes; how many; the first ones, which open connections, do not count
LEAST, GROWTH = 2**16, 4  # bytes of the first one of some size, and what each next is larger by
MOST = 2**26  # bytes: with it goes an all-to-all of twice as many, twice
LONG_ENOUGH = 0.2  # seconds: long against bursts and queues
MANY, AGAIN = 8, 5  # empty ones at once; how often
PIECES = 4  # at once in an all-to-all; thinwire cuts large ones into pieces too


def measure(group: dist.ProcessGroup, device: torch.device, most_bytes: int) -> Link:
    """The link between these ranks, the same on all. A collective: call it on every rank.

    most_bytes: the largest message that is worth a measurement, such as twice the gradient; MOST at the most. Takes
    about two seconds on links of any rate, as long as such a message takes some tenths of a second. Where a rank has
    no memory for it, all raise ValueError.
    """
    n, most_bytes = group.size(), min(most_bytes, MOST)
    allocated = lambda make: together(lambda thing: gather_objects(thing, group), make)
    empty = torch.zeros(EMPTY // 4, device=device)
    spent = [_slowest(lambda: dist.all_reduce(empty, group=group), group, device) for _ in range(TIMES)]
    latency = statistics.mean(spent[FIRST:]) / Collective("all_reduce", 0, n).hops
    at_once = _at_once(group, device)
    nbytes = LEAST
    while True:
        full = allocated(lambda: torch.zeros(nbytes // 4, device=device))
        reduce = lambda: dist.all_reduce(full, group=group)
        if _slowest(reduce, group, device) > LONG_ENOUGH or GROWTH * nbytes > most_bytes:
            break
        full, nbytes = None, GROWTH * nbytes
    collective = Collective("all_reduce", nbytes, n)
    rate = _rate(collective, [_slowest(reduce, group, device) for _ in range(3)], latency)
    full = None
    shape = PIECES, n, 2 * nbytes // (4 * n * PIECES)
    rows, there = allocated(lambda: (torch.zeros(shape, device=device), torch.empty(shape, device=device)))
    collective = Collective("all_to_all", 4 * rows.numel(), n)
    exchange = lambda: _wait([dist.all_to_all_single(*pair, group=group, async_op=True) for pair in zip(there, rows)])
    share = _rate(collective, [_slowest(exchange, group, device) for _ in range(3)], latency) / rate
    return Link(latency, rate, min(1.0, share), at_once)


def _at_once(group, device) -> int:
    """How many collectives the backend has under way together, MANY at the most: where latencies overlap, many empty
    ones take no longer than one. Gloo has two threads."""
    pairs = [(torch.zeros(group.size(), device=device), torch.empty(group.size(), device=device)) for _ in range(MANY)]
    start = lambda pair: dist.all_to_all_single(*pair, group=group, async_op=True)
    one, many = (
        statistics.median(_slowest(lambda: _wait([start(pair) for pair in some]), group, device) for _ in range(AGAIN))
        for some in (pairs[:1], pairs)
    )
    return max(1, min(MANY, round(MANY * one / many)))


def _rate(collective, spent, latency):
    taken = statistics.median(spent)
    return collective.sent / max(taken - collective.hops * latency, taken / 2)


def _slowest(run: Callable[[], object], group, device) -> float:
    """Seconds that the slowest rank takes, from a common start."""
    dist.barrier(group=group)
    begin = clock(device)
    run()
    spent = torch.tensor([clock(device) - begin], dtype=torch.float64, device=device)
    dist.all_reduce(spent, dist.ReduceOp.MAX, group=group)
    return float(spent)


def _wait(works):
    for work in works:
        work.wait()
