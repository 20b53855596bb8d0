"""What travels behind the computation for longer than a backward pass: jobs, each waited for where it is needed."""

import threading
import time
import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist

from thinwire.core.courier import Courier
from thinwire.core.ends import keep
from thinwire.core.exchange import GroupLinks, Links


class Job:
    """One exchange under way."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._span: tuple[torch.cuda.Event, torch.cuda.Event] | None = None  # on a GPU
        self._seconds: float | None = None

    @property
    def failed(self) -> bool:
        return self._error is not None

    def wait(self) -> None:
        """Until it is done; on a GPU the current stream waits. Raises RuntimeError where it has failed."""
        self._done.wait()
        if self._error is not None:
            found = f"{type(self._error).__name__}: {self._error}"
            raise RuntimeError(f"thinwire: an exchange in the background failed: {found}") from self._error
        if self._span is not None:
            torch.cuda.current_stream(self._span[1].device).wait_event(self._span[1])

    @property
    def seconds(self) -> float | None:
        """What it took, the wait for other ranks included; None where that is not known yet."""
        if self._span is not None and self._done.is_set() and self._span[1].query():
            return self._span[0].elapsed_time(self._span[1]) / 1000
        return self._seconds

    def run(self, work: Callable[[], None], device: torch.device) -> None:
        """Do it, on the current stream."""
        begin = time.perf_counter()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        if events:
            events[0].record(torch.cuda.current_stream(device))
        work()
        if events:
            events[1].record(torch.cuda.current_stream(device))
            self._span = events[0], events[1]
        else:
            self._seconds = time.perf_counter() - begin
        self._done.set()

    def fail(self, error: BaseException) -> None:
        if not self._done.is_set():
            self._error = error
            self._done.set()


class Behind:
    """Runs jobs one after the other, in the same order on every rank, while the caller goes on.

    links: what a job may use to reach the other ranks, and nobody else. courier: the thread that does them; None where
    collectives do not hold up the host, and they are started from the caller's thread, on a stream of their own.
    started: how many jobs.
    """

    def __init__(self, links: Links, device: torch.device, courier: Courier | None,
                 leave: Callable[[], dist.ProcessGroup | None]):  # fmt: skip
        self.links = links
        self._device, self._courier, self._leave = device, courier, leave
        self._stream = torch.cuda.Stream(device) if courier is None else None
        self._under_way: list[Job] = []
        self.started = 0

    @classmethod
    def over(cls, group: dist.ProcessGroup, device: torch.device,
             make_group: Callable[[dist.ProcessGroup], dist.ProcessGroup]) -> "Behind":  # fmt: skip
        """Over a process group: call it on every rank. make_group: for one that nobody else uses.

        Each has a group of its own, and over Gloo a thread: a rank may begin a round a step later than the others, and
        then the rounds of two models are begun in another order there.
        """
        keep(group)
        made = make_group(group)
        keep(made)
        if device.type == "cuda" and "nccl" in str(dist.get_backend_config(group)):
            return cls(GroupLinks(made), device, None, lambda: made)
        return cls.in_thread(GroupLinks(made), device, lambda: made)

    @classmethod
    def in_thread(cls, links: Links, device: torch.device,
                  leave: Callable[[], dist.ProcessGroup | None]) -> "Behind":  # fmt: skip
        """Over links whose collectives hold up the thread that starts them. leave: called when it has ended."""
        waiting: list[weakref.ref[Behind]] = []

        def on_error(error):
            if waiting and (alive := waiting[0]()) is not None:
                alive.fail(error)

        behind = cls(links, device, Courier("thinwire", device, on_error), leave)
        waiting.append(weakref.ref(behind))
        return behind

    def start(self, work: Callable[[], None]) -> Job:
        """Begin a job, after those that were begun before and what the current stream has been given so far."""
        job = Job()
        self.started += 1
        self._under_way = [one for one in self._under_way if not one._done.is_set()] + [job]
        if self._courier is not None:
            self._courier.do(lambda: job.run(work, self._device))
        else:
            assert self._stream is not None
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                job.run(work, self._device)
        return job

    def finish(self, seconds: float) -> None:
        """At the interpreter's end: give what is under way some time."""
        if self._courier is not None:
            self._courier.finish(seconds)

    @property
    def on_stream(self) -> bool:
        """Whether jobs are started from the caller's thread, which must not wait for the device."""
        return self._courier is None

    def close(self) -> dist.ProcessGroup | None:
        """Be done. Returns a group to be destroyed, where one was made."""
        if self._courier is not None:
            self._courier.close(seconds=1.0)  # else it might ask for Python's lock when the interpreter ends
        return self._leave()

    def fail(self, error: BaseException) -> None:
        """An exchange has failed: nobody is to wait for what will not come."""
        for job in self._under_way:
            job.fail(error)
