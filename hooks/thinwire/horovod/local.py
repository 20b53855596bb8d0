"""Local steps' way in for Horovod: gradients stay local, but in the warm-up, and rounds travel in a thread's exchanges
of their own."""

import atexit
import functools
import itertools
import logging
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from thinwire import methods
from thinwire.consistency.measure import check_log
from thinwire.core.behind import Behind
from thinwire.horovod.links import PatientLinks
from thinwire.horovod.passes import Passes
from thinwire.horovod.replicas import DivideAndShuffleAverager, check_plain
from thinwire.horovod.stock import hvd, require
from thinwire.local.anchor import in_pieces
from thinwire.local.checks import check_local
from thinwire.local.steps import Anchored
from thinwire.state import agree
from thinwire.state.cautions import caution_local
from thinwire.state.checks import check_grad_scaler, check_module
from thinwire.state.handle import Handle
from thinwire.state.names import parameter_names

_log = logging.getLogger("thinwire")
_numbers = itertools.count()  # of models, which come in the same order on every rank
_AT_EXIT = 3.0  # seconds for what is under way then


def LocalSteps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, method: methods.LocalSteps | None = None, *,
               process_sets: Iterable = (), grad_scaler: torch.amp.GradScaler | None = None, consistency_every: int = 0,
               log: Any = None) -> Handle:  # noqa: N802 # fmt: skip
    """``thinwire.attach(ddp, thinwire.LocalSteps(...), optimizer=...)`` for Horovod: a round every so many steps.

    model: after ``hvd.broadcast_parameters``. optimizer: the plain one, not ``hvd.DistributedOptimizer``, which would
    average gradients. method: a ``thinwire.LocalSteps``, as it is by default unless given. process_sets: with
    group_size, as for :class:`DivideAndShuffleAverager`, which is what comes then. grad_scaler, consistency_every, log:
    as for ``thinwire.attach``. In the warm-up gradients are averaged at the end of every backward pass.

    Call it once, on every rank. Returns a :class:`thinwire.Handle`. Raises TypeError or ValueError, on every rank, for
    what cannot work, ImportError without Horovod.
    """
    require()
    method = methods.LocalSteps() if method is None else method
    if isinstance(method, methods.LocalSteps) and method.group_size is not None:
        return DivideAndShuffleAverager(model, optimizer, method, process_sets=process_sets, grad_scaler=grad_scaler,
                                        consistency_every=consistency_every, log=log)  # fmt: skip

    def check():
        _check(model, method, optimizer)
        check_grad_scaler(grad_scaler, steps=True)
        check_log(consistency_every, log)
        return method.describe() | {"consistency_every": str(consistency_every)}

    agree.check_together(lambda thing: hvd.allgather_object(thing, name="thinwire.local.agree"), check)
    caution_local(method, optimizer, hvd.size())
    return HorovodAnchored(model, optimizer, method, f"thinwire.local.{next(_numbers)}", grad_scaler,
                           consistency_every, log)  # fmt: skip


class HorovodAnchored(Anchored):
    """The anchor of one model. label: of its collectives, the same on all ranks."""

    _same_start = "parameters, which hvd.broadcast_parameters(model.state_dict(), root_rank=0) makes equal"

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, method: methods.LocalSteps, label: str,
                 grad_scaler: Any, consistency_every: int, log: Any):  # fmt: skip
        self._label = label
        self._passes = Passes(self, model.parameters())
        behind = _behind(next(model.parameters()).device, label)
        try:
            super().__init__(model, optimizer, method, behind,
                             lambda thing: hvd.allgather_object(thing, name=f"{label}.objects"), hvd.size() == 1,
                             grad_scaler, (), consistency_every, log)  # fmt: skip
        except BaseException:
            self._passes.close()
            behind.close()
            raise

    def close(self) -> None:
        """As of any method, after a step, but for what comes then: Horovod averages in its own optimizer only, and this
        one is plain. Make an ``hvd.DistributedOptimizer`` of it to train on; a warning says so."""
        super().close()

    def take_in(self, parameters: list[torch.Tensor], flat: torch.Tensor) -> None:
        if not self.warming:
            super().take_in(parameters, flat)

    def end_pass(self) -> None:
        if self.warming and not self._alone:
            self._average_gradients()
        super().end_pass()

    def _average_gradients(self):
        """As hvd.DistributedOptimizer does it, those that this rank does not use too. After every pass of a step: what
        the passes before it have left is a mean already, and stays one."""
        parameters = [(name, p) for name, p in self._parameters() if p.requires_grad]
        for _, p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        pieces = in_pieces((name, p.grad) for name, p in parameters)
        flats = [piece.read() for piece in pieces]
        sums = [hvd.allreduce_async_(flat, op=hvd.Average, name=f"{self._label}.gradients.{i}")
                for i, flat in enumerate(flats)]  # fmt: skip
        for piece, flat, one in zip(pieces, flats, sums):
            hvd.synchronize(one)
            piece.write(flat)

    def _release(self) -> None:
        super()._release()
        self._passes.close()
        self._behind.close()
        _log.warning("thinwire: LocalSteps is closed, and nothing averages this model any more: make an "
                     "hvd.DistributedOptimizer of its optimizer to train on")  # fmt: skip


def _behind(device, label):
    """With a thread of its own, which ends when it is closed, or nothing holds it any more."""
    behind = Behind.in_thread(PatientLinks(hvd.global_process_set, label), device, lambda: atexit.unregister(end))
    # Called before Horovod's own shutdown, which was registered earlier: what is under way ends, and the thread rests.
    end = functools.partial(_finish, weakref.ref(behind))
    atexit.register(end)
    return behind


def _finish(behind):
    if (alive := behind()) is not None:
        alive.finish(_AT_EXIT)


def _check(model, method, optimizer):
    if not isinstance(method, methods.LocalSteps):
        raise TypeError(
            f"method is {method!r}: it must be a thinwire.LocalSteps(...), the value that says how; "
            "thinwire.horovod.LocalSteps puts it to work. A BlockSparse or Dense goes into it as its method="
        )
    if isinstance(model, DistributedDataParallel):
        raise TypeError(
            "model is a DistributedDataParallel, which averages gradients: pass the model inside it, or use "
            "thinwire.attach(ddp, method, optimizer=optimizer)"
        )
    check_plain(optimizer)
    check_module(model, ())
    check_local(model, optimizer, [(name, p) for p, name in parameter_names(model).items()])
