"""Which of a step's buckets DDP gets the average of now, and which later: one class a rule of ``Elastic.decide``.

A rule is given each bucket by ``take`` and told of the step's end by ``end``, both in the hook's body; it completes
the buckets' futures. Averages are computed by couriers, in the same order on every rank.
"""

import math
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from thinwire.core.channel import Channel
from thinwire.core.courier import Courier
from thinwire.core.exchange import gather_now
from thinwire.core.memory import Pass
from thinwire.core.stats import Stats
from thinwire.elastic.lateness import Factor, Late, Ledger, Usual, add_in_rank_order, heaviest
from thinwire.methods import Elastic


@dataclass
class Lane:
    """A courier, and the process group and channel that it alone uses."""

    group: dist.ProcessGroup
    courier: Courier
    channel: Channel
    stats: Stats


class Bucket:
    """One of DDP's buckets in one step: flat [N] is what DDP gets when ``give`` is called.

    lrs: the learning rates now, by parameter name. of: see memory.Pass. were: views of flat, and what is to be added
    to them in the end, of earlier passes of the same step; or nothing.
    """

    def __init__(self, flat: torch.Tensor, names: tuple[str, ...], numels: tuple[int, ...], lrs: dict[str, float],
                 step: int, density: float | None, of: Pass, were: tuple):  # fmt: skip
        self.flat, self.names, self.numels, self.lrs, self.step, self.density = flat, names, numels, lrs, step, density
        self.of, self.were = of, were
        self.averaged = threading.Event()
        self.norms = torch.stack(torch._foreach_norm(list(flat.split(numels)), 2, torch.float64))
        self.late: Late | None = None
        self._error: BaseException | None = None
        self._ready: torch.futures.Future[None] = torch.futures.Future()
        self.future = self._ready.then(self._result)

    def leave_copy(self) -> Late:
        """What travels in the place of flat, which DDP gets back at once."""
        self.late = Late(self.step, self.names, self.numels, self.flat.clone(),
                         tuple(self.lrs[name] for name in self.names))  # fmt: skip
        return self.late

    def add_what_was(self) -> None:
        if self.were:
            torch._foreach_add_(*self.were)

    def give(self) -> None:
        if not self._ready.done():
            self._ready.set_result(None)

    def fail(self, error: BaseException) -> None:
        if not self._ready.done():
            self._error = error
            self._ready.set_result(None)

    def _result(self, ready):
        ready.value()
        if self._error is not None:
            raise RuntimeError(f"thinwire: an exchange in the background failed: {self._error!r}") from self._error
        return self.flat


@dataclass
class Rule:
    """What the rules share.

    has_memory: averaging a bucket changes state of its own. factor: from learning rates now, by parameter name, to
    what Ledger.deliver asks for. may_be_unused: DDP may drop what it is given of a parameter. counts: buckets and
    late_buckets so far.
    """

    method: Elastic
    ledger: Ledger
    lanes: list[Lane]
    has_memory: bool
    factor: Callable[[dict[str, float]], Factor]
    may_be_unused: bool
    counts: dict[str, int]
    buckets: list[Bucket] = field(default_factory=list)
    under_way: list[Late] = field(default_factory=list)

    def __post_init__(self):
        self._prepare()

    def forget_late(self) -> None:
        """Forget which buckets were to be late in the next step."""

    def dropped(self, names: Collection[str]) -> None:
        """No step is made with these parameters' gradients."""

    def land_all(self) -> None:
        """Wait until nothing is under way."""
        for lane in self.lanes:
            lane.courier.wait()
        for late in self.under_way:
            late.landed.wait()
        for lane in self.lanes:
            lane.courier.check()

    def fail(self, error: BaseException) -> None:
        """An exchange has failed: DDP is not to wait for what will not come. The courier knows of it already."""
        for late in self.under_way:
            late.landed.set()
        for bucket in self.buckets:
            bucket.averaged.set()
            bucket.fail(error)

    def _average(self, lane, bucket, flat, done):
        """Average flat in a courier's job; ``done`` is called when that is over."""
        lane.channel.average(flat, bucket.names, bucket.numels, bucket.step, bucket.density, bucket.of)
        if flat.is_cuda:
            torch.cuda.current_stream().synchronize()
        done()

    def _leave(self, lates):
        """These are on their way."""
        self.under_way = [late for late in self.under_way if not late.landed.is_set()] + lates
        for late in lates:
            self.ledger.add(late)

    def _wait_for_memory(self, bucket):
        """What left in an earlier step must have landed, where it changes the same memory."""
        if self.has_memory:
            for late in self.under_way:
                if late.step < bucket.step and not set(late.names).isdisjoint(bucket.names):
                    late.landed.wait()

    def _count(self, late):
        self.counts["buckets"] += len(self.buckets)
        self.counts["late_buckets"] += late


class Agreed(Rule):
    """Late is what all ranks computed beforehand: replicas stay equal. Two lanes: now, and later.

    At the end of a step the norms of all its buckets are added up over the ranks. From that every rank knows which
    buckets will be late in the next step, and whether some rank's gradient is not finite: then the whole step is bad
    on all ranks, late buckets included, as it is without lateness, and what is due waits for the next good step. And
    whether this step's gradient is far larger than the last: then it waits for all of its buckets (see Usual).
    """

    def _prepare(self):
        self.now, self.later = self.lanes
        self._usual = Usual()
        self._will_be_late: set[tuple[str, ...]] = set()

    def forget_late(self) -> None:
        """Wait for every bucket of the next step."""
        self._will_be_late = set()

    def dropped(self, names: Collection[str]) -> None:
        self._usual.dropped(names)

    def take(self, bucket: Bucket) -> None:
        self.buckets.append(bucket)
        if bucket.names in self._will_be_late:
            late = bucket.leave_copy()
            if self.method.speculate:
                late.own = bucket.flat.clone()
            else:
                bucket.flat.zero_()
        else:
            self.now.courier.do(lambda: self._average_now(bucket))

    def end(self, step: int) -> None:
        buckets = list(self.buckets)
        late = [bucket for bucket in buckets if bucket.late is not None]
        self._leave([bucket.late for bucket in late])
        self._count(len(late))
        ended = time.perf_counter()
        self.now.courier.do(lambda: self._settle(step, buckets, ended))
        for bucket in late:
            self.later.courier.do(lambda bucket=bucket: self._send(bucket))

    def _average_now(self, bucket):
        self._wait_for_memory(bucket)
        self._average(self.now, bucket, bucket.flat, bucket.averaged.set)

    def _send(self, bucket):
        self._wait_for_memory(bucket)
        self._average(self.later, bucket, bucket.late.flat, bucket.late.land)

    def _settle(self, step, buckets, ended):
        norms = self._add_up([bucket.norms for bucket in buckets])
        finite = all(map(math.isfinite, (norm for some in norms for norm in some)))
        waited = heaviest([math.fsum(some) for some in norms], self.method.beta)
        self._will_be_late = {bucket.names for i, bucket in enumerate(buckets) if i not in waited}
        if self.may_be_unused:
            for bucket, some in zip(buckets, norms):
                _give_up_unused(bucket, some)
        until = step - self.method.max_delay
        whole = math.fsum(norm for some in norms for norm in some)
        if self._usual.outlies(whole, (name for bucket in buckets for name in bucket.names)):
            until = step
        due = [late for late in self.ledger.lates if late.step <= until]
        for arrival in [late.landed for late in due] + [b.averaged for b in buckets if b.late is None]:
            arrival.wait()
        for lane in self.lanes:
            lane.courier.check()
        if finite:
            for bucket, some in zip(buckets, norms):
                factor = self.factor(bucket.lrs)
                if self.may_be_unused:  # by no rank: then DDP would throw away what it is given
                    factor = _only({name for name, norm in zip(bucket.names, some) if norm > 0}, factor)
                self.ledger.deliver(due, bucket, factor)
        else:
            self.ledger.drop(step)
            for bucket, some in zip(buckets, norms):
                if bucket.late is not None and not all(map(math.isfinite, some)):
                    bucket.flat.fill_(math.nan)
        self.buckets.clear()
        self.now.stats.add(waited_s=time.perf_counter() - ended)
        _finish(buckets)

    def _add_up(self, norms):
        """The norms of parameters, over the ranks; only of buckets where that is enough."""
        if not self.may_be_unused:
            norms = [some.sum()[None] for some in norms]
        mine = torch.cat(norms)
        self.now.stats.count_bytes((self.now.group.size() - 1) * mine.numel() * mine.element_size())
        total = add_in_rank_order(gather_now(mine, self.now.group))
        return [some.tolist() for some in total.split([len(some) for some in norms])]


class Arrival(Rule):
    """Late is what has not arrived when beta of the norm has (the paper's rule). One lane.

    Averages arrive in the order in which they left. Whichever thread sees that enough has arrived ends the step.
    """

    def _prepare(self):
        (self.lane,) = self.lanes
        self._lock = threading.RLock()
        self._ending: int | None = None
        self._ended = 0.0

    def take(self, bucket: Bucket) -> None:
        self.buckets.append(bucket)
        with self._lock:
            self._leave([bucket.leave_copy()])
        self.lane.courier.do(lambda: self._send(bucket))

    def end(self, step: int) -> None:
        with self._lock:
            self._norms = [math.fsum(bucket.norms.tolist()) for bucket in self.buckets]
            self._ending, self._ended = step, time.perf_counter()
            self._try_to_settle()

    def _send(self, bucket):
        self._wait_for_memory(bucket)
        self._average(self.lane, bucket, bucket.late.flat, lambda: self._land(bucket))

    def _land(self, bucket):
        with self._lock:
            bucket.late.land()
            self._try_to_settle()

    def fail(self, error: BaseException) -> None:
        with self._lock:
            super().fail(error)

    def _try_to_settle(self):
        self.lane.courier.check()  # what has landed then is no average
        if self._ending is None or not self._enough():
            return
        self._ending = None
        absent = [bucket for bucket in self.buckets if not bucket.late.landed.is_set()]
        for bucket in self.buckets:
            if bucket in absent and self.method.speculate:
                bucket.late.own = bucket.flat.clone()
            else:
                bucket.flat.zero_()
        landed = [late for late in self.ledger.lates if late.landed.is_set()]
        for bucket in self.buckets:
            self.ledger.deliver(landed, bucket, self.factor(bucket.lrs))
        self._count(len(absent))
        buckets, self.buckets = self.buckets, []
        self.lane.stats.add(waited_s=time.perf_counter() - self._ended)
        _finish(buckets)

    def _enough(self):
        overdue = self._ending - self.method.max_delay
        if any(late.step <= overdue and not late.landed.is_set() for late in self.ledger.lates):
            return False
        here = [norm for norm, bucket in zip(self._norms, self.buckets) if bucket.late.landed.is_set()]
        if len(here) == len(self.buckets):
            return True
        return math.fsum(here) >= self.method.beta * math.fsum(self._norms)  # false where one is not a number


def _give_up_unused(bucket, norms):
    """What no rank used has no gradient to be applied later."""
    for name, norm in zip(bucket.names, norms):
        if bucket.late is not None and norm == 0:
            bucket.late.give_up(name)


def _only(names, factor):
    return lambda name, lr: factor(name, lr) if name in names else None


def _finish(buckets):
    for bucket in buckets:
        bucket.add_what_was()
    if buckets[0].flat.is_cuda:
        torch.cuda.current_stream().synchronize()
    for bucket in buckets:
        bucket.give()
