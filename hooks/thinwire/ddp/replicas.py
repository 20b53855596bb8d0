"""Divide-and-Shuffle's way in for DistributedDataParallel: gradients stay local, buffers are left to the rounds."""

import logging
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from thinwire.consistency.measure import check_log
from thinwire.core.exchange import gather_objects
from thinwire.ddp.mount import Occupant, Seat, completed, mount, restore_copied
from thinwire.ddp.passes import Passes, may_skip
from thinwire.methods import DivideAndShuffle, LocalSteps, Method
from thinwire.replicas.agreement import agreed_partitions, check_optimizer
from thinwire.replicas.groups import Groups
from thinwire.replicas.handle import Replicas
from thinwire.state.checks import check_grad_scaler, check_model
from thinwire.state.names import float_buffers, parameter_names

_log = logging.getLogger("thinwire")


def attach_replicas(ddp, method: DivideAndShuffle, optimizer, *, grad_scaler=None, consistency_every: int = 0,
                    log=None) -> "DDPReplicas":  # fmt: skip
    """See ``thinwire.attach``. A collective: what is wrong on one rank is raised on all."""
    if not isinstance(ddp, DistributedDataParallel):
        check_model(ddp)  # there is no process group to tell the others
    parameters = [(name, p) for p, name in parameter_names(ddp.module, ddp.parameters_to_ignore).items()]

    def check():
        check_model(ddp)
        check_optimizer(method, optimizer, parameters)
        check_grad_scaler(grad_scaler, steps=True)
        check_log(consistency_every, log)

    return _attach(ddp, method, method, optimizer, parameters, check, grad_scaler, consistency_every, log)


def attach_groups(ddp, method: LocalSteps, optimizer, parameters, check, grad_scaler, consistency_every,
                  log) -> "DDPReplicas":  # fmt: skip
    """LocalSteps in groups: rounds of Divide-and-Shuffle, every so many steps. check: see ``agreed_partitions``."""
    return _attach(ddp, method.in_groups(), method, optimizer, parameters, check, grad_scaler, consistency_every, log)


def _attach(ddp, rounds, method, optimizer, parameters, check, grad_scaler, consistency_every, log):
    """rounds: how a round averages; method: what the user has asked for."""
    partitions = agreed_partitions(
        rounds, optimizer, lambda thing: gather_objects(thing, ddp.process_group),
        parameters + float_buffers(ddp.module, ddp.parameters_to_ignore), check, consistency_every,
        method,
    )  # fmt: skip
    groups = Groups(partitions, ddp.process_group)
    if ddp.find_unused_parameters:
        _log.warning("thinwire: with find_unused_parameters=True DDP itself waits for all ranks in every backward "
                     "pass, so small groups gain little: use it only if the model needs it")  # fmt: skip
    restore_copied(ddp)
    try:
        replicas = DDPReplicas(ddp, optimizer, rounds, groups, partitions, grad_scaler, consistency_every, log, method)
    except BaseException:
        groups.close()
        raise
    try:
        mount(ddp, replicas.local)
    except BaseException:
        replicas._release()  # or its hooks would average a model whose gradients are averaged already
        raise
    return replicas


class DDPReplicas(Replicas):
    """The replicas of one DDP model, whose own broadcast of buffers is off as long as it is at work."""

    def __init__(self, ddp: DistributedDataParallel, optimizer, rounds, groups, partitions, grad_scaler,
                 consistency_every, log, method):  # fmt: skip
        super().__init__(ddp.module, optimizer, rounds, groups, partitions, grad_scaler, ddp.parameters_to_ignore,
                         consistency_every, log, method)  # fmt: skip
        self.local = LocalGradients(ddp, self, method)
        self._ddp = weakref.ref(ddp)
        if ddp.broadcast_buffers:
            # DDP would put rank 0's buffers over those that the groups averaged, before every forward pass.
            ddp.broadcast_buffers = False
            _log.info("thinwire: DDP's broadcast_buffers is turned off: buffers are averaged in the groups")

    def close(self) -> None:
        """As of any method, after a step: RuntimeError, with nothing changed, between a backward pass and its step, for
        the gradients are then this rank's own."""
        if not self.closed and self._gradients_wait and any(p.grad is not None for _, p in self._parameters()):
            raise RuntimeError("close() between backward() and optimizer.step(): the gradients are this rank's own, so "
                               "that step would let the replicas differ for good: close after the step")  # fmt: skip
        super().close()

    def _release(self):
        super()._release()
        self.local.seat.leave()
        if (ddp := self._ddp()) is not None:
            ddp.broadcast_buffers = self.local.broadcast_buffers


class LocalGradients(Occupant):
    """Every rank steps on its own gradients.

    It holds the model weakly: DDP's C++ part holds the state, and no collector sees that cycle. handle: what averages
    the replicas, by ``method``.
    """

    def __init__(self, ddp: DistributedDataParallel, handle: Any, method: Method):
        self.seat = Seat(self)
        self.broadcast_buffers = ddp.broadcast_buffers  # as it was
        self._group, self._kind = ddp.process_group, type(method).__name__
        self._passes = Passes(may_skip(ddp))
        self._ddp, self._handle = weakref.ref(ddp), weakref.ref(handle)

    @property
    def gone(self) -> bool:
        return self._handle() is None

    @property
    def group(self) -> dist.ProcessGroup:
        return self._group

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        handle = self._handle()
        if handle is None:
            raise RuntimeError(
                f"this model's {self._kind} is gone, because nothing holds its handle or its optimizer any more, so "
                "nothing would average its replicas: keep the optimizer that was given to thinwire.attach, or attach "
                "again with the new one, and call the handle's close() to train on without it"
            )
        if self._ddp()._join_config.enable:
            raise RuntimeError(
                f"{self._kind} does not work inside join(): a rank that has run out of data makes no steps, and the "
                "others of its group would wait for it. Give all ranks the same number of batches"
            )
        if self._passes.begins(bucket, handle.end_pass):
            handle.begin_pass()
        future = self.give(handle, bucket)
        if self._passes.ends(bucket):
            handle.end_pass()
        return future

    def give(self, handle: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """What DDP is to take for a bucket."""
        return completed(bucket.buffer())
