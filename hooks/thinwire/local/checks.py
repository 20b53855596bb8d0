"""What local steps cannot work with, refused before training starts."""

from typing import Any

import torch

from thinwire.replicas.means import Named
from thinwire.state.checks import check_followed


def check_local(module: torch.nn.Module, optimizer: Any, parameters: list[Named]) -> None:
    """Raise TypeError or ValueError for a model or an optimizer whose ranks cannot step by themselves. parameters:
    those that are trained."""
    check_followed(optimizer, parameters, "LocalSteps counts the optimizer's steps")
    devices = sorted({str(p.device) for _, p in parameters})
    if len(devices) > 1:
        raise ValueError(f"the model is on {', '.join(devices)}: LocalSteps needs a model on one device")
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.SyncBatchNorm):
            raise ValueError(
                f"module {name!r} is a SyncBatchNorm, which sums statistics over all ranks in every forward pass: "
                "local steps are for links where that is too slow, and ranks may be in different steps: use BatchNorm, "
                "whose statistics are averaged in every round (average_buffers), or GroupNorm or LayerNorm"
            )
