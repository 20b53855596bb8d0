"""What local steps cannot work with, refused before training starts."""

from typing import Any

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer

from thinwire.methods import LocalSteps
from thinwire.replicas.means import Named
from thinwire.state.checks import check_owned

_TOGETHER = (torch.nn.SyncBatchNorm,)


def check_local(method: LocalSteps, module: torch.nn.Module, optimizer: Any, parameters: list[Named]) -> None:
    """Raise TypeError or ValueError for a model or an optimizer whose ranks cannot step by themselves. parameters:
    those that are trained."""
    if optimizer is None:
        raise ValueError("LocalSteps counts the optimizer's steps: pass optimizer=")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}: it must be a torch.optim.Optimizer")
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        raise TypeError("ZeroRedundancyOptimizer steps each parameter on one rank only: use the optimizer inside it")
    check_owned(optimizer, parameters)
    devices = sorted({str(p.device) for _, p in parameters})
    if len(devices) > 1:
        raise ValueError(f"the model is on {', '.join(devices)}: LocalSteps needs a model on one device")
    for name, part in module.named_modules():
        if isinstance(part, _TOGETHER):
            raise ValueError(
                f"module {name!r} is a SyncBatchNorm, which sums statistics over all ranks in every forward pass: "
                "local steps are for links where that is too slow, and ranks may be in different steps: use BatchNorm, "
                "whose statistics are averaged in every round (average_buffers), or GroupNorm or LayerNorm"
            )
