"""Asynchronous SGD in shared memory: worker processes that read and write one set of parameters without locks.

One update of a worker, after Hogwild (Niu et al., 1106.5730) and the asynchronous shared-memory model of elastic
consistency (Nadiradze et al., 2001.05918, whose second version has the sparsified form in its experiments):

1. v = read(x): copy the shared parameters, while others write them;
2. the gradient at v, and one step of this worker's own optimizer: u = v - optimizer(v), which is lr * gradient for
   plain SGD. So all that follows, the memory too, is in units of the learning rate, as the theory has it;
3. choose blocks of w = u + e, where e is what error feedback kept back before: q = blocks(w), e = w - q;
4. x = x - q on those blocks.

Step 4 is a plain addition and not an atomic one: where two workers write the same elements at the same moment, one's
additions can be lost. That is rare, because a write takes microseconds and the rest of an update much longer.
"""

import logging
import math
import multiprocessing
import multiprocessing.connection
import pickle
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import torch

from thinwire.consistency import bounds
from thinwire.core.blocks import Layout, Slots
from thinwire.hogwild.shared import DISTANCES, DROPPED, FARTHEST, LONGEST, SAMPLES, STEP, WRITTEN, Shared
from thinwire.hogwild.worker import Job, serve, trainable
from thinwire.methods import BlockSparse

__all__ = ["Report", "WorkerError", "Workers", "train"]

_log = logging.getLogger("thinwire")
_GRACE = 5.0  # seconds that workers get to finish the update that they are in
_OFTEN = {
    "SIGKILL": ", as the kernel does when memory runs out",
    "SIGBUS": ", as happens when shared memory (/dev/shm) is full",
}


@dataclass(frozen=True, eq=False)
class Report:
    """What came of a run.

    updates: that are in the parameters. dropped: that were left out because the gradient or the step was inf or NaN.
    seconds: from the moment when all workers were ready to the end of the last one; starting them is not in it.
    stopped_by: ``updates``, ``seconds`` or ``batches``, whichever ended it; ``interrupted`` or ``failed``.
    share: elements that an update writes, as a share of all.
    max_delay, delays: by how many updates of other workers an update was late, at most and as {delay: updates}. All
        are counted that may have written anything between the update's read and its write; delays of 4095 and more
        are one entry.
    inconsistency_max, inconsistency_mean: ||x - v|| / lr at the sampled updates, None where there was no sample. v is
        where the gradient was computed and x the ideal iterate just before the update: the shared parameters with all
        residuals applied. Elements of a parameter group are divided by that group's lr.
    largest_step: M, the largest norm of u / lr; with plain SGD that of the gradient.
    bound: the paper's constant B for what was seen (its table of B, rows of asynchronous shared memory and of
        compression with error feedback; thinwire.consistency.bounds): sqrt(N) * max_delay * M', with M' the largest
        norm of q / lr, because what error feedback writes may be longer than one step; and with error feedback
        workers * sqrt((2 - g) g / (1 - g)^3) * M on top, because x and the parameters differ by the sum of all
        residuals, and each is bounded by one such term. 1 - g is the smallest share of blocks that any parameter
        sends. It holds while lr is constant, and for random selections with error feedback in expectation only.
    losses: (number of the update, mean loss since the same worker's point before), by number.
    unsent: what error feedback had kept back at the end, summed over workers, by parameter name; in the parameter's
        shape, empty without error feedback. Subtracting it from the parameters gives the ideal iterate.
    """

    updates: int
    dropped: int
    seconds: float
    stopped_by: str
    workers: int
    share: float
    max_delay: int
    delays: dict[int, int] = field(repr=False)
    inconsistency_max: float | None
    inconsistency_mean: float | None
    largest_step: float
    bound: float
    losses: tuple[tuple[int, float], ...] = field(repr=False)
    unsent: dict[str, torch.Tensor] = field(repr=False)

    @property
    def updates_per_second(self) -> float:
        return self.updates / self.seconds if self.seconds else 0.0


class WorkerError(RuntimeError):
    """A worker raised, was killed or left. The model holds the parameters as they were when the others had stopped.

    worker: its number; report: the :class:`Report` up to then. The message has the worker's traceback or the signal.
    """

    def __init__(self, message: str, worker: int, report: Report):
        super().__init__(message)
        self.worker, self.report = worker, report


class Workers:
    """Worker processes that several runs share, so that only the first run waits for them to start.

        with hogwild.Workers(2) as workers:
            for lr in (0.1, 0.2):
                hogwild.train(..., workers=workers)

    workers: how many, at least 1. threads: of torch in each; with as many workers as cores, leave it at 1. After a
    run that did not end well they are started anew for the next one.

    Raises TypeError or ValueError for other values.
    """

    def __init__(self, workers: int, threads: int = 1):
        _check_integer("Workers", "workers", workers, 1)
        _check_integer("Workers", "threads", threads, 1)
        self.workers, self.threads = int(workers), int(threads)
        self._members: list[tuple[Any, Any]] = []  # processes, and the connection to each

    def __enter__(self) -> "Workers":
        self._start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for _, connection in self._members:
            connection.close()
        deadline = time.monotonic() + _GRACE
        for process, _ in self._members:
            process.join(max(0.0, deadline - time.monotonic()))
        self._kill()

    def _start(self):
        if self._members:
            return
        # Not fork, which copies locks of threads that the copy does not have. A fork server that has imported torch
        # makes a worker in milliseconds instead of seconds.
        way = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(way)
        if way == "forkserver":
            context.set_forkserver_preload(["torch", "torch._dynamo", "thinwire.hogwild.worker"])
        self._tickets = context.Value("q", 0)
        self._stop = context.RawValue("b", 0)  # no lock: a worker that is killed would take it along
        try:
            for worker in range(self.workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=serve, name=f"thinwire-hogwild-{worker}", daemon=True,
                                          args=(worker, theirs, self._tickets, self._stop, self.threads))  # fmt: skip
                process.start()
                theirs.close()
                self._members.append((process, ours))
        except BaseException:
            self._kill()
            raise

    def _kill(self):
        for process, connection in self._members:
            process.kill()
            connection.close()
        for process, _ in self._members:
            process.join()
        self._members = []


def train(
    model: torch.nn.Module,
    make_batches: Callable[[int, int], Iterable],
    loss_fn: Callable[[torch.nn.Module, Any], torch.Tensor],
    *,
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    workers: int | Workers,
    selection: str = "topk",
    density: float | None = 1.0,
    memory: str | None = None,
    block_size: int = 64,
    dense_below: int = 256,
    updates: int | None = None,
    seconds: float | None = None,
    consistency_every: int = 50,
    seed: int = 0,
    threads: int = 1,
) -> Report:
    """Train the model by asynchronous SGD in worker processes; its parameters change in place.

    model: on the CPU, its trainable parameters all float32 or all float64. Every worker has a copy, in the mode
        (train or eval) that the model is in. Buffers are not shared: each worker keeps its own (BatchNorm's running
        statistics are of the batches that it saw), and those of the lowest-numbered worker that ended by itself come
        back into the model.
    make_batches(worker, workers): the batches of one worker, any iterable, made in the worker; a worker stops at its
        end. Deal the data out by ``worker``, or have every worker draw from all of it in an order of its own.
    loss_fn(model, batch): a 0-d loss.
    optimizer(parameters): a torch.optim.Optimizer over a worker's own copy, with state of its own, such as
        ``functools.partial(torch.optim.SGD, lr=0.1)``. With many workers the delay acts as momentum: lower the
        optimizer's. Optimizers whose step needs a closure are not for this.
    workers: how many processes, or a :class:`Workers`.
    selection, density, block_size, dense_below, memory: which blocks of a step are written, and what becomes of the
        others, as in :class:`thinwire.BlockSparse`: ``topk`` or ``independent``, ``none`` or ``error_feedback``.
        With ``independent`` and no memory the blocks are divided by their share, so that what is written is on
        average the step; with ``topk`` they are not. With error feedback they never are. density None is 1 / workers.
        memory None is ``none`` for density 1 and else BlockSparse's.
    updates: end after so many updates of all workers together, dropped ones included.
    seconds: end after so much time, from when all workers are ready. None of either is no limit: without both, the
        batches must come to an end.
    consistency_every: each worker measures the inconsistency in every such update of its; 0 is never.
    seed: of the random selection, and of each worker's torch, random and numpy generators, all different. One worker
        gives the same result in every run; several do not, since their order is the operating system's.
    threads: of torch in each worker; a Workers has its own.

    model, make_batches, loss_fn and optimizer are pickled: functions must be importable, not lambdas or local ones,
    and a script must call this under ``if __name__ == "__main__":``. Nothing random of the calling process changes.
    Shared memory holds the parameters once and, with error feedback, once more for every worker (in a container,
    mind the size of /dev/shm).

    Returns a :class:`Report`. In every case below the model holds the parameters as they were last:
    Raises WorkerError where a worker raises, is killed or leaves. Re-raises KeyboardInterrupt after Ctrl-C, with the
    Report as its ``report``. Raises TypeError or ValueError, before anything starts, for what cannot work.
    """
    parameters = _check_model(model)
    count = _check_workers(workers, threads)
    method = _method(selection, density, memory, block_size, dense_below, seed)
    if updates is not None:
        _check_integer("train", "updates", updates, 1)
    _check_seconds(seconds)
    _check_integer("train", "consistency_every", consistency_every, 0)
    user = _pickled(model, make_batches, loss_fn, optimizer)

    numels = tuple(p.numel() for p in parameters.values())
    flat = torch.cat([p.detach().reshape(-1) for p in parameters.values()])
    shared = Shared.around(flat, count, method.memory == "error_feedback")
    slots = Layout(tuple(parameters), numels, block_size).slots(method.counts_at(0, count, numels))
    pool = workers if isinstance(workers, Workers) else Workers(workers, threads)
    run = _Run(pool, Job(user, method, count, shared, updates, seconds, consistency_every))

    def report(stopped_by):
        return _report(run, shared, method, slots, parameters, stopped_by)

    try:
        run.follow()
    except KeyboardInterrupt as interrupt:
        interrupt.report = report("interrupted")  # type: ignore[attr-defined]
        _log.warning("thinwire: interrupted after %d updates; the model holds the parameters", shared.ended)
        raise
    finally:
        if pool is not workers:
            pool.close()
        with torch.no_grad():
            for p, values in zip(parameters.values(), flat.split(numels)):
                p.copy_(values.view(p.shape))
            _return_buffers(model, run.answers)
    if run.failure is not None:
        worker, text = run.failure
        what = f"worker {worker} {text}"
        note = f"The model holds the parameters after {shared.ended} updates of {count} workers."
        raise WorkerError(f"{what}\n{note}", worker, report("failed"))
    reasons = [why for why, _ in run.answers.values()]
    return report(next(why for why in ("updates", "seconds", "batches") if why in reasons))


class _Run:
    """One run: starts the workers together, and ends all of them when one ends badly.

    answers: by worker that ended by itself, why, and its buffers. failure: the first worker that did not, and what
    happened to it, or None. seconds: since all were ready.
    """

    def __init__(self, pool: Workers, job: Job):
        self.answers: dict[int, tuple[str, bytes]] = {}
        self.failure: tuple[int, str] | None = None
        self.seconds = 0.0
        self._pool, self._job = pool, job
        self._running: dict[int, tuple[Any, Any]] = {}
        self._ready: set[int] = set()
        self._began: float | None = None
        self._deadline: float | None = None

    def follow(self) -> None:
        """Return when no worker writes any more; so too when Ctrl-C or another exception comes out of it."""
        pool = self._pool
        try:
            pool._start()
            pool._tickets.value, pool._stop.value = 0, 0
            self._running = dict(enumerate(pool._members))
            for worker, (_, connection) in list(self._running.items()):
                try:
                    connection.send(self._job)
                except OSError:
                    self._lost(worker)
            self._listen()
        except BaseException:
            self._end_all()
            self._listen()
            raise
        finally:
            if self._began is not None:
                self.seconds = time.monotonic() - self._began
            if self._deadline is not None:
                pool._kill()

    def _listen(self):
        while self._running:
            left = None if self._deadline is None else self._deadline - time.monotonic()
            if left is not None and left <= 0:
                return
            members = self._running.values()
            multiprocessing.connection.wait([c for _, c in members] + [p.sentinel for p, _ in members], left)
            for worker, (process, connection) in list(self._running.items()):
                try:
                    if connection.poll():
                        self._take(worker, *connection.recv())
                    elif not process.is_alive():
                        self._lost(worker)
                except (EOFError, OSError):
                    self._lost(worker)

    def _take(self, worker, what, value):
        if what == "ready":
            self._ready.add(worker)
            if self._deadline is not None:
                self._go([worker])  # it sees the stop flag then
            elif len(self._ready) == self._pool.workers:
                self._began = time.monotonic()
                self._go(self._running)
            return
        del self._running[worker]
        if what == "done":
            self.answers[worker] = value
        else:
            self._fail(worker, f"raised:\n\n{value}")

    def _lost(self, worker):
        process, _ = self._running.pop(worker)
        process.join(_GRACE)
        code = process.exitcode
        if code is not None and code < 0:
            name = {one.value: one.name for one in signal.Signals}.get(-code, f"signal {-code}")
            text = f"was killed by {name}" + _OFTEN.get(name, "")
        else:
            text = f"left with exit code {code} and no word"
            if worker not in self._ready:
                text += ': see what it printed; a script must call train under if __name__ == "__main__":'
        self._fail(worker, text + ".")

    def _fail(self, worker, text):
        if self.failure is None:
            self.failure = worker, text
        self._end_all()

    def _end_all(self):
        if self._deadline is not None:
            return
        self._deadline = time.monotonic() + _GRACE
        if self._pool._members:
            self._pool._stop.value = 1
        if self._began is None:
            self._go(self._ready & self._running.keys())

    def _go(self, workers):
        for worker in workers:
            try:
                self._running[worker][1].send("go")
            except OSError:
                pass  # it is gone, which will be noticed when it is its turn


def _report(run: "_Run", shared: Shared, method: BlockSparse, slots: Slots,
            parameters: dict[str, torch.nn.Parameter], stopped_by: str) -> Report:  # fmt: skip
    counts, figures = shared.counts, shared.figures
    workers, elements = counts.shape[1], shared.parameters.numel()
    samples, longest = int(counts[SAMPLES].sum()), int(counts[LONGEST].max())
    largest_step = float(figures[STEP].max())
    bound = bounds.shared_memory(elements, longest, float(figures[WRITTEN].max()))
    unsent = {}
    if method.memory == "error_feedback":
        bound += workers * bounds.error_feedback(1 - min(slots.shares, default=1.0), largest_step)
        pieces = shared.residuals.sum(0).split(slots.layout.numels)
        unsent = {name: piece.view(p.shape) for (name, p), piece in zip(parameters.items(), pieces)}
    sent = sum(min(n, count * method.block_size) for n, count in zip(slots.layout.numels, slots.counts))
    return Report(
        updates=shared.ended, dropped=int(counts[DROPPED].sum()), seconds=run.seconds, stopped_by=stopped_by,
        workers=workers, share=sent / elements, max_delay=longest, delays=shared.histogram(),
        inconsistency_max=float(figures[FARTHEST].max()) if samples else None,
        inconsistency_mean=float(figures[DISTANCES].sum()) / samples if samples else None,
        largest_step=largest_step, bound=bound, losses=shared.losses(), unsent=unsent,
    )  # fmt: skip


def _return_buffers(model, answers):
    if not answers:
        return
    _, pickled = answers[min(answers)]
    returned = pickle.loads(pickled)
    for name, buffer in model.named_buffers():
        if name in returned:  # a model may drop one while it trains
            buffer.copy_(returned[name])


# ---- what is refused before anything starts ----


def _check_model(model):
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"train(model=...) got a {type(model).__name__}: it must be a torch.nn.Module")
    parameters = trainable(model)
    if not parameters:
        raise ValueError(f"train(model={type(model).__name__}): it has no parameters that require a gradient")
    first = next(iter(parameters.values()))
    for name, p in parameters.items():
        if p.device.type != "cpu":
            raise ValueError(
                f"parameter {name!r} is on {p.device}: workers share memory of the CPU; use model.cpu(), and for "
                "several GPUs thinwire.attach"
            )
        if p.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"parameter {name!r} is {p.dtype}: it must be torch.float32 or torch.float64, since small updates "
                "vanish in anything shorter"
            )
        if p.dtype != first.dtype:
            raise TypeError(f"parameter {name!r} is {p.dtype} and others are {first.dtype}: all must be of one dtype")
    return parameters


def _check_workers(workers, threads):
    _check_integer("train", "threads", threads, 1)
    if not isinstance(workers, Workers):
        _check_integer("train", "workers", workers, 1, " or a thinwire.hogwild.Workers")
        return int(workers)
    if threads not in (1, workers.threads):
        raise ValueError(
            f"train(threads={threads}): the Workers were started with threads={workers.threads}; set it there"
        )
    return workers.workers


def _method(selection, density, memory, block_size, dense_below, seed):
    if selection not in ("topk", "independent"):
        raise ValueError(
            f"train(selection={selection!r}): it must be 'topk' or 'independent'; the others need workers that step "
            "together"
        )
    if memory not in (None, "none", "error_feedback"):
        raise ValueError(f"train(memory={memory!r}): it must be 'none', 'error_feedback' or None")
    if memory is None and density == 1:
        memory = "none"  # nothing is left to keep
    return BlockSparse(selection=selection, density=density, memory=memory, block_size=block_size,
                       dense_below=dense_below, seed=seed)  # fmt: skip


def _check_integer(where, name, value, least, more=""):
    allowed = f"{where}({name}={value!r}): it must be an integer of at least {least}{more}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(allowed)
    if value < least:
        raise ValueError(allowed)


def _check_seconds(seconds):
    allowed = f"train(seconds={seconds!r}): it must be a number above 0, or None for no limit"
    if seconds is None:
        return
    if isinstance(seconds, bool) or not isinstance(seconds, Real):
        raise TypeError(allowed)
    if not 0 < seconds < math.inf:
        raise ValueError(allowed)


def _pickled(model, make_batches, loss_fn, optimizer):
    given = {"model": model, "make_batches": make_batches, "loss_fn": loss_fn, "optimizer": optimizer}
    if isinstance(optimizer, torch.optim.Optimizer):
        name = type(optimizer).__name__
        raise TypeError(
            f"train(optimizer=...) got a {name}: each worker makes its own, so pass what makes it, such as "
            f"functools.partial(torch.optim.{name}, lr=...)"
        )
    for name, value in given.items():
        if not callable(value):
            raise TypeError(f"train({name}=...) got a {type(value).__name__}: it must be callable")
    try:
        return pickle.dumps(tuple(given.values()), protocol=pickle.HIGHEST_PROTOCOL)
    except Exception:
        for name, value in given.items():
            try:
                pickle.dumps(value)
            except Exception as error:
                shown = getattr(value, "__qualname__", type(value).__name__)
                raise TypeError(
                    f"train({name}={shown}) cannot be sent to worker processes ({error}): it is pickled, so define "
                    "functions and classes at the top level of a module, and use functools.partial for arguments"
                ) from error
        raise
