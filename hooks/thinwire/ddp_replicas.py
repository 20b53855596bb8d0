# No "from __future__ import annotations" here: DDP inspects the hook's annotations and refuses strings.
"""Divide-and-Shuffle's way in for DistributedDataParallel: gradients stay local, buffers are left to the rounds."""

import logging

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer

from thinwire import agree, hosts
from thinwire.checks import check_model
from thinwire.groups import Groups
from thinwire.methods import DivideAndShuffle
from thinwire.names import parameter_names
from thinwire.replicas import Replicas
from thinwire.stepping import check_steps_in_pieces

_log = logging.getLogger("thinwire")


def attach_replicas(ddp, method: DivideAndShuffle, optimizer, grad_scaler) -> Replicas:
    """See ``thinwire.attach``. A collective: what is wrong on one rank is raised on all."""
    check_model(ddp)
    optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    group = ddp.process_group
    everyone = [None] * group.size()
    says = method.describe() | {"model": agree.digest({name: p.numel() for p, name in _parameters(ddp)})}
    mine = {"host": hosts.mine(), "refusal": _refusal(ddp, method, optimizer), "says": says}
    dist.all_gather_object(everyone, mine, group=group)
    partitions = agreed_partitions(method, everyone)
    groups = Groups(partitions, group)
    if ddp.broadcast_buffers:
        # DDP would put rank 0's buffers over those that the groups averaged, before every forward pass.
        ddp.broadcast_buffers = False
        _log.info("thinwire: DDP's broadcast_buffers is turned off: buffers are averaged in the groups")
    ddp.register_comm_hook(ddp, keep_local)
    return Replicas(ddp.module, optimizer, method, groups, partitions, grad_scaler, ddp.parameters_to_ignore)


def agreed_partitions(method: DivideAndShuffle, everyone: list[dict]):
    """The cycle of partitions, from what all ranks said of themselves (host, refusal, says).

    Raises ValueError, on every rank alike, where a rank refused or the ranks differ.
    """
    refusals = [f"rank {rank}: {one['refusal']}" for rank, one in enumerate(everyone) if one["refusal"]]
    if refusals:
        raise ValueError("thinwire: " + "; ".join(refusals))
    agree.require([one["says"] for one in everyone])
    return method.partitions(len(everyone), tuple(one["host"] for one in everyone))


def keep_local(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The communication hook: every rank steps on its own gradients. state: the DDP model."""
    if state._join_config.enable:
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
    owned = {id(p) for param_group in optimizer.param_groups for p in param_group["params"]}
    missing = [name for name, p in parameters if id(p) not in owned]
    if missing:
        raise ValueError(
            f"the optimizer does not own {len(missing)} of the model's {len(parameters)} trainable parameters "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}): give it model.parameters(), after the "
            "model is where it stays"
        )
    if method.overlap == "bucket":
        check_steps_in_pieces(optimizer)


def _refusal(ddp, method, optimizer):
    try:
        check_optimizer(method, optimizer, [(n, p) for p, n in _parameters(ddp)])
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def _parameters(ddp):
    return list(parameter_names(ddp.module, ddp.parameters_to_ignore).items())
