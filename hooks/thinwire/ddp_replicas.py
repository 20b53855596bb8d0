# No "from __future__ import annotations" here: DDP inspects the hook's annotations and refuses strings.
"""Divide-and-Shuffle's way in for DistributedDataParallel: gradients stay local, buffers are left to the rounds."""

import logging
import weakref

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from thinwire import agree, hosts
from thinwire.averager import float_buffers
from thinwire.checks import check_model, check_owned
from thinwire.consistency import check_log
from thinwire.groups import Groups
from thinwire.methods import DivideAndShuffle
from thinwire.names import parameter_names
from thinwire.replicas import Replicas, moment_names, moments_every
from thinwire.schedules import Hosts
from thinwire.stepping import check_steps_in_pieces

_log = logging.getLogger("thinwire")


def attach_replicas(ddp, method: DivideAndShuffle, optimizer, grad_scaler, consistency_every=0, log=None) -> Replicas:
    """See ``thinwire.attach``. A collective: what is wrong on one rank is raised on all."""
    if not isinstance(ddp, DistributedDataParallel):
        check_model(ddp)  # there is no process group to tell the others
    optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    group = ddp.process_group
    everyone = [None] * group.size()
    parameters = [(name, p) for p, name in _parameters(ddp)]
    refusal = refusal_of(lambda: (check_model(ddp), check_optimizer(method, optimizer, parameters),
                                  check_log(consistency_every, log)))  # fmt: skip
    mine = introduction(method, optimizer, refusal, parameters + float_buffers(ddp.module, ddp.parameters_to_ignore),
                        consistency_every)  # fmt: skip
    dist.all_gather_object(everyone, mine, group=group)
    partitions = agreed_partitions(method, everyone)
    groups = Groups(partitions, group)
    if ddp.broadcast_buffers:
        # DDP would put rank 0's buffers over those that the groups averaged, before every forward pass.
        ddp.broadcast_buffers = False
        _log.info("thinwire: DDP's broadcast_buffers is turned off: buffers are averaged in the groups")
    if ddp.find_unused_parameters:
        _log.warning("thinwire: with find_unused_parameters=True DDP itself waits for all ranks in every backward "
                     "pass, so small groups gain little: use it only if the model needs it")  # fmt: skip
    replicas = Replicas(ddp.module, optimizer, method, groups, partitions, grad_scaler, ddp.parameters_to_ignore,
                        consistency_every, log)  # fmt: skip
    ddp.register_comm_hook(LocalGradients(ddp, replicas), keep_local)
    return replicas


def introduction(method: DivideAndShuffle, optimizer, refusal: str, tensors, consistency_every: int = 0) -> dict:
    """What a rank says of itself before groups are made. tensors: (name, tensor) of all that is averaged."""
    says = {}
    if not refusal:
        kinds = {name: f"{t.dtype} {t.numel()}" for name, t in tensors}
        every = moments_every(method, optimizer)
        says = method.describe() | {
            "model": f"{len(kinds)} parameters and buffers, digest {agree.digest_of(kinds)}",
            "consistency_every": str(consistency_every),
            "optimizer's state": f"{moment_names(optimizer)} every {every} rounds" if every else "not averaged",
        }
    return {"host": hosts.mine(), "refusal": refusal, "says": says}


def agreed_partitions(method: DivideAndShuffle, everyone: list[dict]):
    """The cycle of partitions, from what all ranks said of themselves (host, refusal, says).

    Raises ValueError, on every rank alike, where a rank refused or the ranks differ.
    """
    refusals = [f"rank {rank}: {one['refusal']}" for rank, one in enumerate(everyone) if one["refusal"]]
    if refusals:
        raise ValueError("thinwire: " + "; ".join(refusals))
    agree.require([one["says"] for one in everyone])
    partitions = method.partitions(len(everyone), tuple(one["host"] for one in everyone))
    if isinstance(method.schedule, Hosts) or method.schedule == "hosts":
        names = method.schedule.hosts if isinstance(method.schedule, Hosts) else None
        if len(set(names or (one["host"] for one in everyone))) == 1:
            _log.warning("thinwire: all ranks say that they are on one host, so schedule 'hosts' is a butterfly of all "
                         "ranks: give thinwire.schedules.Hosts(hosts=...) if that is wrong")  # fmt: skip
    return partitions


class LocalGradients:
    """The hook's state. It holds the model weakly: DDP's C++ part holds the state, and no collector sees that cycle."""

    is_copy = False

    def __init__(self, ddp: DistributedDataParallel, replicas: Replicas):
        self.ddp, self.replicas = weakref.ref(ddp), weakref.ref(replicas)

    def __reduce__(self):
        """What copy and pickle make of it: a warning, because DDP copies hooks but does not call the copies."""
        return _copied, ()


def _copied():
    _log.warning("thinwire: a DistributedDataParallel with DivideAndShuffle was copied or unpickled. PyTorch never "
                 "calls the hook of the copy, so if you train it, it averages whole gradients: call thinwire.attach on "
                 "it, with its own optimizer.")  # fmt: skip
    state = LocalGradients.__new__(LocalGradients)
    state.is_copy = True
    return state


def keep_local(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The communication hook: every rank steps on its own gradients. state: LocalGradients."""
    replicas = state.replicas()
    if replicas is None or replicas.closed:
        raise RuntimeError(
            "this model's DivideAndShuffle was closed, so nothing averages its replicas any more: wrap the module in a "
            "new DistributedDataParallel to train on"
        )
    if state.ddp()._join_config.enable:
        raise RuntimeError(
            "DivideAndShuffle does not work inside join(): a rank that has run out of data makes no steps, and the "
            "others of its group would wait for it. Give all ranks the same number of batches"
        )
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def check_optimizer(method: DivideAndShuffle, optimizer, parameters) -> None:
    """Raise TypeError or ValueError for an optimizer whose steps the rounds cannot follow. parameters: (name, p)."""
    if optimizer is None:
        raise ValueError("DivideAndShuffle averages after every optimizer step: pass optimizer=")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}: it must be a torch.optim.Optimizer")
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        raise TypeError("ZeroRedundancyOptimizer steps each parameter on one rank only: use the optimizer inside it")
    check_owned(optimizer, parameters)
    every = method.average_optimizer_state
    if every != "auto" and every and "betas" not in optimizer.defaults:
        raise ValueError(
            f"DivideAndShuffle(average_optimizer_state={every!r}) averages the moments of Adam-like optimizers, and "
            f"{type(optimizer).__name__} has none: use 'auto' or False"
        )
    if method.overlap == "bucket":
        check_steps_in_pieces(optimizer)


def refusal_of(checks) -> str:
    """What the checks raised, or nothing."""
    try:
        checks()
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def _parameters(ddp):
    return list(parameter_names(ddp.module, ddp.parameters_to_ignore).items())
