"""Real process groups for tests: n worker processes over Gloo that stay up and run one function after another."""

import multiprocessing
import os
import queue
import tempfile
import time
import traceback

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
# Whoever starts the fork server first decides for all, so what hogwild's workers import is in it too.
_context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "thinwire", "thinwire.hogwild.worker"])


class RankError(AssertionError):
    """A function raised on some rank; the message holds every rank's traceback."""


class Ranks:
    """n ranks. ``run(function, ...)`` calls it on all of them and returns their results in rank order.

    The function must be importable; it is given (rank, n, ...). A hang ends in RankError after ``seconds``.
    """

    def __init__(self, n: int):
        self.n = n
        self._processes = []

    def run(self, function, *args, seconds: float = 300.0):
        if not self._processes:
            self._start()
        for inbox in self._inboxes:
            inbox.put((function, args))
        results, failures = [None] * self.n, []
        try:
            for _ in range(self.n):
                # Once one has failed, the others may be waiting for it inside a collective.
                rank, ok, value = self._outbox.get(timeout=20.0 if failures else seconds)
                results[rank] = value
                if not ok:
                    failures.append(f"rank {rank}:\n{value}")
        except queue.Empty:
            failures.append(f"{function.__name__}: no answer in time from all of {self.n} ranks")
        except BaseException:  # pytest's own timeout, say
            self.stop(seconds=0)
            raise
        if failures:
            self.stop(seconds=0)
            raise RankError("\n".join(failures))
        return results

    def stop(self, seconds: float = 5.0):
        """End the ranks; those that do not end by themselves in time, which is when coverage.py saves, are killed."""
        end = time.monotonic() + seconds
        for inbox in self._inboxes if self._processes else ():
            inbox.put(None)
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
            process.join()
        self._processes = []

    def _start(self):
        handle, store = tempfile.mkstemp(prefix="thinwire-ranks-")
        os.close(handle)
        os.remove(store)
        self._inboxes = [_context.Queue() for _ in range(self.n)]
        self._outbox = _context.Queue()
        for rank, inbox in enumerate(self._inboxes):
            process = _context.Process(target=_serve, args=(rank, self.n, store, inbox, self._outbox), daemon=True)
            process.start()
            self._processes.append(process)


def _serve(rank, n, store, inbox, outbox):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=n)
    while (job := inbox.get()) is not None:
        function, args = job
        try:
            outbox.put((rank, True, function(rank, n, *args)))
        except BaseException:
            outbox.put((rank, False, traceback.format_exc()))
