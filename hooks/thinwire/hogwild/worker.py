"""A worker process of asynchronous shared-memory SGD: what it is given, how it serves, and one update of its."""

import multiprocessing.connection
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from thinwire import ops
from thinwire.core.blocks import unit_of
from thinwire.core.memory import ErrorFeedback
from thinwire.core.reducer import Reducer
from thinwire.core.store import FlatStore
from thinwire.core.wire import Wire
from thinwire.hogwild.shared import BEGUN, ENDED, Shared, Tally
from thinwire.methods import BlockSparse
from thinwire.ops import reference


@dataclass
class Job:
    """One run. user: the pickled (model, make_batches, loss_fn, optimizer); the rest as in thinwire.hogwild.train."""

    user: bytes
    method: BlockSparse
    workers: int
    shared: Shared
    updates: int | None
    seconds: float | None
    consistency_every: int


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that a run shares, in the order in which they lie in the flat tensor."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def serve(worker: int, connection: Any, tickets: Any, stop: Any, threads: int) -> None:
    """Take jobs from the connection until it closes.

    Messages back: ("ready", None), whereupon one from the parent starts the run; then ("done", (why, buffers)), the
    buffers pickled, or ("failed", traceback). tickets: a multiprocessing.Value that numbers updates; stop: a flag.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes: the parent decides what it means
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()
    torch.set_num_threads(threads)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            answer = "done", _run(worker, job, connection, tickets, stop)
        except BaseException:  # a SystemExit in the user's functions too
            answer = "failed", traceback.format_exc()
        del job
        connection.send(answer)


def _leave_with_the_parent():
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _run(worker, job, connection, tickets, stop):
    _seed(job.method.seed, worker)
    model, make_batches, loss_fn, make_optimizer = pickle.loads(job.user)
    replica = Replica(model, loss_fn, make_optimizer, job, worker)
    batches = iter(make_batches(worker, job.workers))
    connection.send(("ready", None))
    connection.recv()
    end = float("inf") if job.seconds is None else time.monotonic() + job.seconds
    why = None
    while why is None:
        batch = next(batches, batches)
        if batch is batches:
            why = "batches"
        elif time.monotonic() >= end:
            why = "seconds"
        elif (number := _ticket(tickets, stop, job.updates)) is None:
            why = "stop" if stop.value else "updates"
        else:
            replica.update(batch, number)
    # Pickled here and as plain bytes: the connection itself would pass tensors as shared memory of a process that ends.
    return why, pickle.dumps({name: buffer.detach() for name, buffer in model.named_buffers()})


def _ticket(tickets, stop, updates):
    """The number of the next update, from 0; None where the run is over.

    A worker that was killed may have taken the lock with it: the others then wait until the parent sees that.
    """
    while not stop.value:
        if tickets.get_lock().acquire(timeout=0.2):
            try:
                if updates is not None and tickets.value >= updates:
                    return None
                tickets.value += 1
                return tickets.value - 1
            finally:
                tickets.get_lock().release()
    return None


def _seed(seed, worker):
    """Give this process random numbers of its own: processes forked from one would all draw the same."""
    own = unit_of(f"hogwild {seed} {worker}")
    random.seed(own)
    torch.manual_seed(own)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(own % 2**32)


class Replica:
    """A worker's own copy of the model, whose parameters are views of one flat tensor."""

    def __init__(self, model: torch.nn.Module, loss_fn: Callable, make_optimizer: Callable, job: Job, worker: int):
        self.model, self.loss_fn, self.shared = model, loss_fn, job.shared
        self.every, self.done = job.consistency_every, 0
        parameters = trainable(model)
        self.names, self.numels = tuple(parameters), tuple(p.numel() for p in parameters.values())
        self.parameters = list(parameters.values())
        self.flat = job.shared.parameters.clone()
        for p, values in zip(self.parameters, self.flat.split(self.numels)):
            p.data = values.view(p.shape)
        self.optimizer = make_optimizer(self.parameters)
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer returned a {type(self.optimizer).__name__}: it must return a torch.optim.Optimizer over "
                "the parameters that it is given"
            )
        self.rates = _Rates(self.optimizer, self.parameters)
        self.view, self.step = torch.empty_like(self.flat), torch.empty_like(self.flat)
        self.tally = Tally(job.shared, worker)
        # No network: values are written as they are, and only what a method leaves out stays behind.
        self.reducer = Reducer(job.method, worker, job.workers, Wire(self.flat.dtype))
        if job.method.memory == "error_feedback":
            assert isinstance(self.reducer.memory, ErrorFeedback)
            self.reducer.memory.residual = _Given(job.shared.residuals[worker])
        self.weights, self.minus_one = None, None

    def update(self, batch: Any, number: int) -> None:
        """Read the shared parameters, compute, and subtract the chosen blocks of the optimizer's step from them."""
        counts = self.shared.counts
        seen = int(counts[ENDED].sum())
        self.view.copy_(self.shared.parameters)  # while others write: every element is as old as it happens to be
        self.flat.copy_(self.view)
        loss = self.loss_fn(self.model, batch)
        self.optimizer.zero_grad()
        loss.backward()
        if not self._gradient_is_finite():
            return self.tally.drop()
        self.optimizer.step()
        torch.sub(self.view, self.flat, out=self.step)
        step = self.rates.norm(self.step)
        if self.every and self.done % self.every == 0:
            self.tally.sample(self._inconsistency())
        encoded = self.reducer.encode(self.step, self.names, self.numels, self.done, None)
        values, choice = encoded.payload.values, encoded.choice
        if int(encoded.reading.status[-1]) & ops.NONFINITE:
            self._undo(encoded)
            return self.tally.drop()
        self._prepare(choice.slots)
        if self.weights is not None:
            values *= self.weights
        written = self.rates.at_most(values)
        delay = int(counts[BEGUN].sum()) - seen
        self.tally.begin()
        self._write(values, choice)
        self.done += 1
        self.tally.end(number, delay, float(loss.detach()), step, written)

    def _write(self, values, choice):
        """Subtract values [P] from the chosen blocks of the shared parameters, and leave all other elements alone."""
        shared, table, block_size = self.shared.parameters, choice.slots.table, choice.slots.layout.block_size
        if ops.native("cpu"):
            ops.scatter_blocks_(values[None], None, choice.own[None], table, block_size, self.minus_one, True, shared)
            return
        # The operator's plain-PyTorch version reads all of its output and writes all of it back: it would undo what
        # other workers wrote in the meantime.
        for _, elements, places in reference._segments(choice.own, table, block_size):
            shared.index_add_(0, elements, values[places], alpha=-1)

    def _gradient_is_finite(self):
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        gradients = [g.coalesce().values() if g.is_sparse else g for g in gradients]
        return all(bool(torch.isfinite(g).all()) for g in gradients)

    def _inconsistency(self):
        """||x - v|| / lr. x, the ideal iterate, is the parameters with every worker's residual applied.

        Residuals of others are read while those may be changing them: exact to within the updates under way.
        """
        ideal = self.shared.parameters.clone()
        if self.shared.residuals.shape[1]:
            ideal -= self.shared.residuals.sum(0)
        return self.rates.norm(ideal - self.view)

    def _prepare(self, slots):
        """What depends on the payload's shape alone, which is the same in every update."""
        if self.minus_one is None:
            self.minus_one = torch.full((len(slots.counts),), -1.0, dtype=self.flat.dtype, device="cpu")
            if self.reducer.method.unbiased and not all(slots.whole):
                lengths = torch.tensor(slots.offsets, device="cpu").diff()
                shares = torch.tensor(slots.shares, dtype=torch.float64, device="cpu")
                self.weights = (1 / shares).repeat_interleave(lengths).to(self.flat.dtype)

    def _undo(self, encoded):
        """Take a step that is not finite out of the residual again."""
        reading, slots = encoded.reading, encoded.choice.slots
        bad = torch.ones(1, dtype=torch.int32, device="cpu")
        ops.settle_(reading.source, None, reading.grad, 0.0, encoded.payload.values, None, encoded.choice.own,
                    slots.table, slots.layout.block_size, reading.status, bad)  # fmt: skip


class _Rates:
    """The optimizer's learning rates, to measure in their units."""

    def __init__(self, optimizer, parameters):
        self.groups = optimizer.param_groups
        starts, at = {}, 0
        for p in parameters:
            starts[p] = at, at + p.numel()
            at += p.numel()
        self.spans = [_joined(sorted(starts[p] for p in group["params"])) for group in self.groups]

    def norm(self, flat: torch.Tensor) -> float:
        """||flat / lr|| over flat [N]. Groups whose rate is 0 are left out: they do not move."""
        total = 0.0
        for group, spans in zip(self.groups, self.spans):
            if rate := abs(float(group["lr"])):
                total += sum((float(flat[start:end].norm()) / rate) ** 2 for start, end in spans)
        return total**0.5

    def at_most(self, values: torch.Tensor) -> float:
        """||values / lr|| with the smallest rate: exact where the groups share one, and otherwise too large."""
        rates = [abs(float(group["lr"])) for group in self.groups]
        smallest = min((rate for rate in rates if rate), default=None)
        return 0.0 if smallest is None else float(values.norm()) / smallest


def _joined(spans):
    joined = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((start, end))
    return joined


class _Given(FlatStore):
    """A store of one buffer that is given: here a row of shared memory, so that all processes see the residual."""

    def __init__(self, flat: torch.Tensor):
        super().__init__()
        self._given = flat

    def flat(self, layout, dtype, device):
        return self._given

    def change(self, layout, dtype, device, step):
        return self._given, None
