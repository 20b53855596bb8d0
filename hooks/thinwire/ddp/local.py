"""Local steps' way in for DistributedDataParallel: gradients stay local, but in the warm-up."""

import logging
import weakref

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from thinwire.consistency.measure import check_log
from thinwire.core.behind import Behind
from thinwire.core.exchange import gather_objects
from thinwire.ddp.hook import ALONE
from thinwire.ddp.mount import all_reduced, completed, mount, restore_copied
from thinwire.ddp.replicas import LocalGradients, attach_groups
from thinwire.local.checks import check_local
from thinwire.local.steps import Anchored
from thinwire.methods import LocalSteps
from thinwire.replicas.groups import another, destroy
from thinwire.state import agree
from thinwire.state.cautions import caution_local
from thinwire.state.checks import check_grad_scaler, check_model
from thinwire.state.handle import Handle
from thinwire.state.names import parameter_names

_log = logging.getLogger("thinwire")


def attach_local(ddp, method: LocalSteps, optimizer, *, grad_scaler=None, consistency_every: int = 0,
                 log=None) -> Handle:  # fmt: skip
    """See ``thinwire.attach``. A collective: what is wrong on one rank is raised on all."""
    if not isinstance(ddp, DistributedDataParallel):
        check_model(ddp)  # there is no process group to tell the others
    parameters = [(name, p) for p, name in parameter_names(ddp.module, ddp.parameters_to_ignore).items()]

    def check():
        check_model(ddp)
        check_local(ddp.module, optimizer, parameters)
        check_grad_scaler(grad_scaler, steps=True)
        check_log(consistency_every, log)
        return method.describe() | {"consistency_every": str(consistency_every)}

    group = ddp.process_group
    if method.group_size is not None:
        return attach_groups(ddp, method, optimizer, parameters, check, grad_scaler, consistency_every, log)
    agree.check_together(lambda thing: gather_objects(thing, group), check)
    caution_local(method, optimizer, group.size())
    restore_copied(ddp)
    behind = Behind.over(group, parameters[0][1].device, another)
    handle = None
    try:
        handle = DDPAnchored(ddp, optimizer, method, behind, grad_scaler, consistency_every, log)
        mount(ddp, handle.local)
    except BaseException:
        if handle is not None:
            handle._release()
        elif (made := behind.close()) is not None:
            destroy(made)
        raise
    return handle


class DDPAnchored(Anchored):
    """The anchor of one DDP model, whose own broadcast of buffers is off when ranks step by themselves."""

    def __init__(self, ddp: DistributedDataParallel, optimizer, method, behind, grad_scaler, consistency_every, log):
        group = ddp.process_group
        super().__init__(ddp.module, optimizer, method, behind, lambda thing: gather_objects(thing, group),
                         group.size() == 1 and not ALONE, grad_scaler, ddp.parameters_to_ignore, consistency_every,
                         log)  # fmt: skip
        self.local = AnchoredGradients(ddp, self, method)
        self._ddp = weakref.ref(ddp)

    def _part(self) -> None:
        ddp = self._ddp()
        if ddp is not None and ddp.broadcast_buffers:
            # DDP would put rank 0's buffers over every rank's own, in a broadcast before every forward pass.
            ddp.broadcast_buffers = False
            _log.info("thinwire: DDP's broadcast_buffers is turned off: buffers are averaged in rounds")

    def _release(self) -> None:
        super()._release()
        self.local.seat.leave()
        if (ddp := self._ddp()) is not None:
            ddp.broadcast_buffers = self.local.broadcast_buffers
        if (group := self._behind.close()) is not None:
            destroy(group)


class AnchoredGradients(LocalGradients):
    """Every rank steps on its own gradients, but in the warm-up."""

    def give(self, handle: Anchored, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        if handle.warming:
            return all_reduced(bucket.buffer(), self.group)
        handle.take_in(bucket.parameters(), bucket.buffer())
        return completed(bucket.buffer())
