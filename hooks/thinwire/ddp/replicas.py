"""Divide-and-Shuffle's way in for DistributedDataParallel: gradients stay local, buffers are left to the rounds."""

import logging
import weakref

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from thinwire.consistency.measure import check_log
from thinwire.core.exchange import gather_objects
from thinwire.ddp.mount import Occupant, Seat, completed, mount, restore_copied
from thinwire.ddp.passes import Passes, may_skip
from thinwire.methods import DivideAndShuffle
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

    partitions = agreed_partitions(
        method, optimizer, lambda thing: gather_objects(thing, ddp.process_group),
        parameters + float_buffers(ddp.module, ddp.parameters_to_ignore), check, consistency_every,
    )  # fmt: skip
    groups = Groups(partitions, ddp.process_group)
    if ddp.find_unused_parameters:
        _log.warning("thinwire: with find_unused_parameters=True DDP itself waits for all ranks in every backward "
                     "pass, so small groups gain little: use it only if the model needs it")  # fmt: skip
    restore_copied(ddp)
    try:
        replicas = DDPReplicas(ddp, optimizer, method, groups, partitions, grad_scaler, consistency_every, log)
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

    def __init__(self, ddp: DistributedDataParallel, optimizer, method, groups, partitions, grad_scaler,
                 consistency_every, log):  # fmt: skip
        super().__init__(ddp.module, optimizer, method, groups, partitions, grad_scaler, ddp.parameters_to_ignore,
                         consistency_every, log)  # fmt: skip
        self.local = LocalGradients(ddp, self)
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

    It holds the model weakly: DDP's C++ part holds the state, and no collector sees that cycle.
    """

    def __init__(self, ddp: DistributedDataParallel, replicas: DDPReplicas):
        self.seat = Seat(self)
        self.broadcast_buffers = ddp.broadcast_buffers  # as it was
        self._group = ddp.process_group
        self._passes = Passes(may_skip(ddp))
        self._ddp, self._replicas = weakref.ref(ddp), weakref.ref(replicas)

    @property
    def gone(self) -> bool:
        return self._replicas() is None

    @property
    def group(self) -> dist.ProcessGroup:
        return self._group

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        replicas = self._replicas()
        if replicas is None:
            raise RuntimeError(
                "this model's DivideAndShuffle is gone, because nothing holds its handle or its optimizer any more, so "
                "nothing would average its replicas: keep the optimizer that was given to thinwire.attach, or attach "
                "again with the new one, and call the handle's close() to train on without it"
            )
        if self._ddp()._join_config.enable:
            raise RuntimeError(
                "DivideAndShuffle does not work inside join(): a rank that has run out of data makes no steps, and the "
                "others of its group would wait for it. Give all ranks the same number of batches"
            )
        if self._passes.begins(bucket, lambda: None):
            replicas.begin_pass()
        self._passes.ends(bucket)
        return completed(bucket.buffer())
