"""Divide-and-Shuffle's way in for DistributedDataParallel: gradients stay local, buffers are left to the rounds."""

import logging
import weakref

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from thinwire.consistency.measure import check_log
from thinwire.core.exchange import gather_objects
from thinwire.ddp.mount import Mounted, completed, mount
from thinwire.methods import DivideAndShuffle
from thinwire.replicas.agreement import agreed_partitions, check_optimizer
from thinwire.replicas.groups import Groups
from thinwire.replicas.handle import Replicas
from thinwire.state.checks import check_model
from thinwire.state.names import float_buffers, parameter_names

_log = logging.getLogger("thinwire")


def attach_replicas(ddp, method: DivideAndShuffle, optimizer, *, grad_scaler=None, consistency_every: int = 0,
                    log=None) -> "DDPReplicas":  # fmt: skip
    """See ``thinwire.attach``. A collective: what is wrong on one rank is raised on all."""
    if not isinstance(ddp, DistributedDataParallel):
        check_model(ddp)  # there is no process group to tell the others
    optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    parameters = [(name, p) for p, name in parameter_names(ddp.module, ddp.parameters_to_ignore).items()]

    def check():
        check_model(ddp)
        check_optimizer(method, optimizer, parameters)
        check_log(consistency_every, log)

    partitions = agreed_partitions(
        method, optimizer, lambda thing: gather_objects(thing, ddp.process_group),
        parameters + float_buffers(ddp.module, ddp.parameters_to_ignore), check, consistency_every,
    )  # fmt: skip
    groups = Groups(partitions, ddp.process_group)
    if ddp.find_unused_parameters:
        _log.warning("thinwire: with find_unused_parameters=True DDP itself waits for all ranks in every backward "
                     "pass, so small groups gain little: use it only if the model needs it")  # fmt: skip
    replicas = DDPReplicas(ddp, optimizer, method, groups, partitions, grad_scaler, consistency_every, log)
    mount(ddp, replicas.local)
    return replicas


class DDPReplicas(Replicas):
    """The replicas of one DDP model, whose own broadcast of buffers is off as long as it is at work."""

    def __init__(self, ddp: DistributedDataParallel, optimizer, method, groups, partitions, grad_scaler,
                 consistency_every, log):  # fmt: skip
        super().__init__(ddp.module, optimizer, method, groups, partitions, grad_scaler, ddp.parameters_to_ignore,
                         consistency_every, log)  # fmt: skip
        self.local = LocalGradients(ddp, self)
        self._ddp, self._broadcast = weakref.ref(ddp), ddp.broadcast_buffers
        if ddp.broadcast_buffers:
            # DDP would put rank 0's buffers over those that the groups averaged, before every forward pass.
            ddp.broadcast_buffers = False
            _log.info("thinwire: DDP's broadcast_buffers is turned off: buffers are averaged in the groups")

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        self.local.closed = True
        if (ddp := self._ddp()) is not None:
            ddp.broadcast_buffers = self._broadcast


class LocalGradients(Mounted):
    """Every rank steps on its own gradients.

    It holds the model weakly: DDP's C++ part holds the state, and no collector sees that cycle.
    """

    def __init__(self, ddp: DistributedDataParallel, replicas: DDPReplicas):
        self._ddp, self._replicas = weakref.ref(ddp), weakref.ref(replicas)

    @property
    def group(self) -> dist.ProcessGroup:
        return self._ddp().process_group

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        if self._replicas() is None:
            raise RuntimeError(
                "this model's DivideAndShuffle is gone, because nothing holds its handle or its optimizer any more, so "
                "nothing would average its replicas: keep the handle, and call its close() to train on without it"
            )
        if self._ddp()._join_config.enable:
            raise RuntimeError(
                "DivideAndShuffle does not work inside join(): a rank that has run out of data makes no steps, and the "
                "others of its group would wait for it. Give all ranks the same number of batches"
            )
        return completed(bucket.buffer())
