"""Divide-and-Shuffle's way in for Horovod: groups are process sets, and gradients are not exchanged at all."""

import itertools
import logging
import weakref
from collections.abc import Iterable
from typing import Any

import torch

from thinwire.consistency.measure import check_log
from thinwire.horovod.stock import hvd, require
from thinwire.local.checks import check_local
from thinwire.methods import DivideAndShuffle, LocalSteps
from thinwire.methods.schedules import Group, Partition
from thinwire.replicas.agreement import agreed_partitions, check_optimizer
from thinwire.replicas.groups import needed
from thinwire.replicas.handle import Replicas
from thinwire.state.checks import check_grad_scaler, check_gradient
from thinwire.state.names import float_buffers, parameter_names

_log = logging.getLogger("thinwire")
_sets: dict[Group, "hvd.ProcessSet"] = {}  # Horovod allows one process set of the same ranks
_numbers = itertools.count()  # of averagers, which are made in the same order on every rank


class DivideAndShuffleAverager(Replicas):
    """``thinwire.attach(ddp, DivideAndShuffle(...), optimizer=...)`` for Horovod: averages after every step.

    model: after ``hvd.broadcast_parameters``. optimizer: the plain one, not ``hvd.DistributedOptimizer``, which would
    average gradients first. process_sets: those that ``hvd.init`` was given, if any; the others that the schedule
    needs are added, for which Horovod needs HOROVOD_DYNAMIC_PROCESS_SETS=1. They stay until Horovod shuts down and
    are used again by further averagers. grad_scaler, consistency_every, log: as for ``thinwire.attach``. method: a
    ``DivideAndShuffle``; ``thinwire.horovod.LocalSteps`` gives it a ``LocalSteps`` with a group_size.

    Make one on every rank. Raises TypeError or ValueError, on every rank, for what cannot work, ImportError without
    Horovod, RuntimeError where Horovod does not let process sets be added.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer,
                 method: DivideAndShuffle | LocalSteps | None = None, *, process_sets: Iterable = (),
                 grad_scaler: torch.amp.GradScaler | None = None, consistency_every: int = 0,
                 log: Any = None):  # fmt: skip
        require()
        method = DivideAndShuffle() if method is None else method
        in_groups = isinstance(method, LocalSteps) and method.group_size is not None
        rounds: Any = method.in_groups() if in_groups else method  # type: ignore[union-attr]
        parameters = [(name, p) for p, name in parameter_names(model).items()]

        def check():
            _check(rounds, optimizer, parameters)
            if in_groups:
                check_local(model, optimizer, parameters)
            check_grad_scaler(grad_scaler, steps=True)
            check_log(consistency_every, log)

        partitions = agreed_partitions(
            rounds, optimizer, lambda thing: hvd.allgather_object(thing, name="thinwire.shuffle.agree"),
            parameters + float_buffers(model), check, consistency_every, method,
        )  # fmt: skip
        _sets.update({tuple(sorted(one.ranks)): one for one in process_sets})
        super().__init__(model, optimizer, rounds, ProcessSets(partitions), partitions, grad_scaler,
                         consistency_every=consistency_every, log=log, asked=method)  # fmt: skip
        self._pass_hook = parameters[0][1].register_post_accumulate_grad_hook(_beginning(weakref.ref(self)))

    def close(self) -> None:
        """As of any method, but for what comes then: Horovod averages in its own optimizer only, and this one is plain.
        Make an ``hvd.DistributedOptimizer`` of it to train on; a warning says so. Process sets stay, for others."""
        super().close()

    def _release(self):
        super()._release()
        self._pass_hook.remove()
        _log.warning("thinwire: DivideAndShuffleAverager is closed, and nothing averages this model any more: make an "
                     "hvd.DistributedOptimizer of its optimizer to train on")  # fmt: skip


def _beginning(weak):
    def begin(parameter):
        if (averager := weak()) is not None:
            averager.begin_pass()

    return begin


class ProcessSets:
    """What :class:`thinwire.replicas.groups.Groups` is, with Horovod."""

    def __init__(self, partitions: tuple[Partition, ...]):
        self.rank, self.size = hvd.rank(), hvd.size()
        self._label = f"thinwire.shuffle.{next(_numbers)}"
        self._sent: dict[Group, int] = {}
        self._under_way: dict[Group, int] = {}
        self._groups: dict[Group, hvd.ProcessSet] = {tuple(range(self.size)): hvd.global_process_set}
        for members in needed(partitions, self.size):
            if members not in _sets or _sets[members].process_set_id is None:  # Horovod was shut down since
                _sets[members] = _added(members)
            if self.rank in members:
                self._groups[members] = _sets[members]

    def __len__(self) -> int:
        return len(self._groups) - 1

    def start_sum(self, tensor: torch.Tensor, members: Group) -> "_Sum":
        # Numbers begin again when nothing of the group is under way: Horovod caches what it knows by name.
        number = self._sent[members] = self._sent.get(members, 0) + 1 if self._under_way.get(members) else 0
        self._under_way[members] = self._under_way.get(members, 0) + 1
        name = f"{self._label}.{'-'.join(map(str, members))}.{number}"
        return _Sum(hvd.allreduce_async_(tensor, op=hvd.Sum, name=name, process_set=self._groups[members]),
                    self._under_way, members)  # fmt: skip

    def broadcast(self, tensor: torch.Tensor) -> None:
        hvd.broadcast_(tensor, 0, name=f"{self._label}.broadcast")

    def gather_objects(self, thing: Any) -> list:
        return hvd.allgather_object(thing, name=f"{self._label}.objects")

    def close(self) -> None:
        """Nothing: other averagers may use the process sets."""


class _Sum:
    def __init__(self, handle, under_way, members):
        self._handle, self._under_way, self._members = handle, under_way, members

    def wait(self):
        hvd.synchronize(self._handle)
        self._under_way[self._members] -= 1


def _added(members):
    try:
        return hvd.add_process_set(list(members))
    except Exception as error:
        raise RuntimeError(
            f"Horovod did not add a process set of ranks {list(members)} ({error}): start the job with "
            "HOROVOD_DYNAMIC_PROCESS_SETS=1, or give hvd.init(process_sets=...) one for each group of "
            "method.partitions(world_size), and the same list to this averager as process_sets="
        ) from error


def check_plain(optimizer: Any) -> None:
    """Raise TypeError for an optimizer of Horovod's, which averages gradients."""
    if hasattr(optimizer, "_allreduce_grad_async"):
        raise TypeError("optimizer is an hvd.DistributedOptimizer, which averages gradients: pass the plain one")


def _check(method, optimizer, parameters):
    if not isinstance(method, DivideAndShuffle):
        raise TypeError(f"method is {method!r}: it must be a DivideAndShuffle")
    check_plain(optimizer)
    for name, parameter in parameters:
        check_gradient(name, parameter)
    check_optimizer(method, optimizer, parameters)
