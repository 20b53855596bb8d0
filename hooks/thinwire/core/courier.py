"""A thread that does one job after another while training goes on."""

import queue
import threading
import weakref
from collections.abc import Callable

import torch

from thinwire.core import ends


class Courier:
    """Runs jobs in the order in which they were given, in a thread of its own and, on a GPU, on a stream of its own.

    A job is done when the device has done it too. When one raises, the courier stops: ``on_error`` hears of it, and
    everything asked of it afterwards raises. When it is closed, it does what it was given before and nothing more.
    """

    error: BaseException | None = None
    closed = False

    def __init__(self, name: str, device: torch.device, on_error: Callable[[BaseException], None]):
        self._device = device
        self._on_error = on_error
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._ended = threading.Event()
        # A daemon: a rank that fails must be able to leave while another one's answer is still being waited for.
        threading.Thread(target=_work, args=(self._jobs, weakref.ref(self), device, self._ended), name=name,
                         daemon=True).start()  # fmt: skip
        weakref.finalize(self, self._jobs.put, None).atexit = False
        ends.at_exit(self)

    def do(self, job: Callable[[], None]) -> None:
        """Run a job when all earlier ones are done, and after what the caller's stream has been given so far.

        Raises RuntimeError after ``close``.
        """
        self.check()
        if self.closed:
            raise RuntimeError("thinwire: a job for a courier that was closed, which does no more")
        ready = None
        if self._device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))
        self._jobs.put((job, ready))

    def wait(self, seconds: float | None = None) -> None:
        """Until all jobs so far are done, for ``seconds`` at most; raises what one of them raised."""
        if self.error is None:
            done = threading.Event()
            self._jobs.put(done)
            if self._ended.is_set():  # it may have looked for the last time before
                done.set()
            done.wait(seconds)
        self.check()

    def check(self) -> None:
        """Raise RuntimeError if a job has failed."""
        if self.error is not None:
            raise RuntimeError(f"thinwire: an exchange in the background failed: {self.error!r}") from self.error

    def close(self, seconds: float = 0.0) -> None:
        """End the thread when it has done its jobs; after a failure it does none of them.

        seconds: how long to wait for that, at most; not after a failure, when it may be waiting for another rank.
        """
        self.closed = True
        self._jobs.put(None)
        if self.error is None:
            self._ended.wait(seconds)

    def finish(self, seconds: float) -> None:
        """At the interpreter's end: give it some time."""
        if self.error is None and not self._ended.is_set():
            self.wait(seconds)

    def fail(self, error: BaseException) -> None:
        """Stop: do no further job."""
        if self.error is None:
            self.error = error
            self._on_error(error)


def _work(jobs, courier, device, ended):
    stream = None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        stream = torch.cuda.Stream(device)
        torch.cuda.set_stream(stream)
    while (item := jobs.get()) is not None:
        if isinstance(item, threading.Event):
            item.set()
        elif (alive := courier()) is not None and alive.error is None:
            job, ready = item
            try:
                if stream is not None:
                    stream.wait_event(ready)
                job()
                if stream is not None:
                    stream.synchronize()
            except BaseException as error:
                alive.fail(error)
        item = job = alive = None  # else the last job's tensors would live until the next one
    ended.set()
    while not jobs.empty():
        if isinstance(item := jobs.get(), threading.Event):
            item.set()
