"""What a step costs, as arithmetic: the time of collectives on a link, and of a step that exchanges gradients.

Nothing here measures or communicates. Times are seconds, sizes bytes, and a rate is what one rank sends in a second
while it receives as much. The model is the usual one of latency and bandwidth: a collective of ``hops`` messages one
after the other, in which a rank sends ``sent`` bytes, takes

    hops * latency_s + sent / bytes_per_s

and of collectives under way at once, bytes queue for the link, latencies do not. No more than ``Link.at_once`` are: a
backend has so many threads or streams, and what is started beyond them waits until one ends, latency and all. With n
ranks and S bytes a rank:

    collective               hops                 sent
    ring all-reduce          2 (n - 1)            2 (n - 1) / n S
    tree all-reduce          2 ceil(log2 n)       2 S                    two binary trees, each with half, in a pipeline
    ring all-gather          n - 1                (n - 1) S
    tree all-gather          ceil(log2 n)         (n - 1) S              recursive doubling
    all-to-all               1                    (n - 1) / n S          S is all rows together; the same either way

Gloo's all-reduce and all-gather are rings. All of an all-to-all's messages are posted at once, so nobody waits for
another's, but they get in each other's way at the receivers: ``Link.all_to_all`` is the share of the rate that is left.
"""

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from thinwire.core import selection
from thinwire.core.blocks import Layout
from thinwire.core.exchange import SHORT
from thinwire.core.levels import wire_of
from thinwire.methods import Method, block_sparse

KINDS = ("all_reduce", "all_gather", "all_to_all")
ALGORITHMS = ("ring", "tree")


@dataclass(frozen=True)
class Link:
    """What a rank's link can do.

    latency_s: of one hop, software included. bytes_per_s: see above; of payload, so protocol headers are taken off.
    On Gloo a hop is a round trip: a message is sent once its receiver has asked for it.
    all_to_all: the share of bytes_per_s that an all-to-all reaches, in (0, 1]. at_once: collectives under way together.
    """

    latency_s: float
    bytes_per_s: float
    all_to_all: float = 1.0
    at_once: float = math.inf

    def __post_init__(self):
        if not (self.latency_s >= 0 and self.bytes_per_s > 0 and 0 < self.all_to_all <= 1 and self.at_once >= 1):
            raise ValueError(
                f"{self}: latency_s must be 0 or more, bytes_per_s above 0, all_to_all in (0, 1] and at_once 1 or more"
            )


@dataclass(frozen=True)
class Collective:
    """One collective. nbytes: what each rank gives; of an all-to-all, its rows for all ranks together."""

    kind: str
    nbytes: float
    ranks: int
    algorithm: str = "ring"

    def __post_init__(self):
        if self.kind not in KINDS or self.algorithm not in ALGORITHMS or self.ranks < 1 or not self.nbytes >= 0:
            raise ValueError(
                f"{self}: kind must be one of {', '.join(KINDS)}, algorithm one of {', '.join(ALGORITHMS)}, ranks 1 "
                "or more, nbytes 0 or more"
            )

    @property
    def hops(self) -> int:
        """Messages that have to wait for one another."""
        n, tree = self.ranks, self.algorithm == "tree"
        deep = (n - 1).bit_length() if tree else n - 1  # ceil(log2 n)
        return {"all_reduce": 2 * deep, "all_gather": deep, "all_to_all": min(n - 1, 1)}[self.kind]

    @property
    def sent(self) -> float:
        """Bytes that a rank sends, and receives."""
        n = self.ranks
        if n == 1:
            return 0.0
        if self.kind == "all_reduce":
            return 2 * self.nbytes * (1.0 if self.algorithm == "tree" else (n - 1) / n)
        return (n - 1) * self.nbytes / (n if self.kind == "all_to_all" else 1)

    def wire_s(self, link: Link) -> float:
        """For how long it keeps the link busy."""
        return self.sent / (link.bytes_per_s * (link.all_to_all if self.kind == "all_to_all" else 1.0))

    def seconds(self, link: Link) -> float:
        """From its start to its end, with the link to itself."""
        return self.hops * link.latency_s + self.wire_s(link)


def all_reduce(nbytes: float, ranks: int, algorithm: str = "ring") -> tuple[Collective, ...]:
    """Of gradients, casts or factors."""
    return (Collective("all_reduce", nbytes, ranks, algorithm),)


def owner_exchange(nbytes: float, ranks: int, algorithm: str = "ring",
                   back: float | None = None) -> tuple[Collective, ...]:  # fmt: skip
    """See thinwire.core.exchange.OwnerExchange: an all-to-all of nbytes, and an all-gather of the n-th that a rank
    owns, ``back`` bytes; as many as each rank sent it where that is None."""
    return (Collective("all_to_all", nbytes, ranks, algorithm),
            gathered(nbytes / ranks if back is None else back, ranks, algorithm))  # fmt: skip


def gathered(nbytes: float, ranks: int, algorithm: str = "ring") -> Collective:
    """nbytes of each rank on all: see thinwire.core.exchange.GroupLinks.gather."""
    if nbytes <= SHORT:
        return Collective("all_to_all", ranks * nbytes, ranks, algorithm)
    return Collective("all_gather", nbytes, ranks, algorithm)


def exchanges(method: Method, numels: Sequence[int], ranks: int, *, algorithm: str = "ring",
              names: Sequence[str] | None = None) -> tuple[Collective, ...]:  # fmt: skip
    """The collectives of one step of Dense or BlockSparse after its ramp, with all float32 parameters in one wave.

    numels: of the parameters. Together they send what :func:`thinwire.estimate` says. Raises TypeError for a method
    that does not average gradients.
    """
    if method.of_backend:
        return all_reduce(4 * sum(numels), ranks, algorithm)
    method = block_sparse(method)
    names = tuple(f"{i}" for i in range(len(numels))) if names is None else tuple(names)
    step = method.warmup_steps + method.ramp_steps
    slots = Layout(names, tuple(numels), method.block_size).slots(method.counts_at(step, ranks, tuple(numels)))
    wire = wire_of(method.wire_dtype)
    chosen = selection.Whole if all(slots.whole) else selection.BY_NAME[method.selection]
    if chosen.common:
        there, back = wire.row_bytes(slots, ranks)
        found = owner_exchange(ranks * there, ranks, algorithm, back)
        if chosen.talks:
            found = (gathered(chosen.asked_bytes(slots, step, ranks), ranks, algorithm), *found)
        return found
    message = wire.message_bytes(slots, chosen.index_bytes(slots))
    return (gathered(message, ranks, algorithm),)


@dataclass(frozen=True)
class Local:
    """Work of this rank."""

    seconds: float


@dataclass(frozen=True)
class Start:
    """A collective is started, and the work goes on."""

    collective: Collective


@dataclass(frozen=True)
class Wait:
    """The work stops until everything that this bucket has started is there."""


@dataclass(frozen=True)
class Script:
    """What a communication hook does with one bucket.

    body: in the hook, which stops the backward pass for as long. after: once what the body started is there, beside
    the backward pass. in_turn: one thread, or stream, does that for such buckets, waits and all, one after the other.
    """

    body: tuple[Local | Start | Wait, ...] = ()
    after: tuple[Local | Start | Wait, ...] = ()
    in_turn: bool = False

    @property
    def sent(self) -> float:
        """Bytes that a rank sends."""
        return math.fsum(event.collective.sent for event in self.body + self.after if isinstance(event, Start))


@dataclass(frozen=True)
class Compute:
    """A step without any communication: when, since it began, the gradients of each bucket were complete, in the order
    in which they were; and when all of it, the optimizer included, was done."""

    ready_s: tuple[float, ...]
    step_s: float

    def __post_init__(self):
        if not self.ready_s or list(self.ready_s) != sorted(self.ready_s) or self.step_s < self.ready_s[-1]:
            raise ValueError(f"{self}: ready_s must rise, and step_s be no earlier than its last")

    def in_one_bucket(self) -> "Compute":
        """The same step with all gradients in one bucket."""
        return Compute(self.ready_s[-1:], self.step_s)


def step_time(compute: Compute, scripts: Sequence[Script], link: Link, at_end: Script | None = None) -> float:
    """Seconds of a step in which each bucket, when it is ready, is put through its script.

    A hook's body delays the rest of the backward pass; what it started runs beside that. The step ends with the rest
    of compute (optimizer and so on) once all buckets are there. at_end: done after that, as averaging replicas is.
    Collectives get the link in the order in which they are started, those of callbacks after those of bodies; one
    processor does the work of all callbacks, beside the one that does the backward pass, in the order in which it comes
    up, while others wait for the link; see Script for those that take turns.
    """
    wire = _Wire(link)
    late, arrivals = 0.0, []
    for ready, script in zip(compute.ready_s, scripts, strict=True):
        now, there = _run(script.body, ready + late, wire)
        late = now - ready
        arrivals.append((max(now, there), script))
    ends = [compute.ready_s[-1] + late, *_callbacks(arrivals, wire)]
    end = max(ends) + compute.step_s - compute.ready_s[-1]
    return end if at_end is None else max(_run(at_end.body + (Wait(),) + at_end.after, end, wire))


def script_time(script: Script, link: Link) -> float:
    """Seconds of a script with the link, and a processor, to itself."""
    return max(_run(script.body + (Wait(),) + script.after, 0.0, _Wire(link)))


def _callbacks(arrivals, wire):
    """When each is done. arrivals: (when it may begin, its script). Their work is done in the order in which it comes
    up."""
    free, ends = 0.0, []
    turns = deque(i for i, (_, script) in enumerate(arrivals) if script.in_turn)  # the first is on, the others wait
    first = [i for i, (_, script) in enumerate(arrivals) if not script.in_turn or i == turns[0]]
    queue = [(arrivals[i][0], i, arrivals[i][0], arrivals[i][1].after) for i in first]
    heapq.heapify(queue)
    while queue:
        now, i, there, events = heapq.heappop(queue)
        if not events:
            ends.append(max(now, there))
            if turns and i == turns[0]:
                turns.popleft()
                if turns:
                    begin, script = arrivals[turns[0]]
                    begin = max(begin, ends[-1])
                    heapq.heappush(queue, (begin, turns[0], begin, script.after))
            continue
        if isinstance(events[0], Local):
            now = free = max(now, free) + events[0].seconds
        else:
            now, there = _run_one(events[0], now, there, wire)
        heapq.heappush(queue, (now, i, there, events[1:]))
    return ends


class _Wire:
    """A rank's link as a queue."""

    def __init__(self, link):
        self.link, self.free = link, 0.0
        self._ends: list[float] = []  # of what is under way, a heap

    def start(self, collective, now):
        """When it will be there."""
        if len(self._ends) >= self.link.at_once:
            now = max(now, heapq.heappop(self._ends))
        self.free = max(self.free, now) + collective.wire_s(self.link)
        end = self.free + collective.hops * self.link.latency_s
        heapq.heappush(self._ends, end)
        return end


def _run(events, now, wire):
    """When the events are done, and when the last collective that they started is there."""
    there = now
    for event in events:
        now, there = _run_one(event, now, there, wire)
    return now, there


def _run_one(event, now, there, wire):
    if isinstance(event, Local):
        return now + event.seconds, there
    if isinstance(event, Start):
        return now, max(there, wire.start(event.collective, now))
    return max(now, there), there
