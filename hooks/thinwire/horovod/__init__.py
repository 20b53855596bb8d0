"""The front door for Horovod: a compressor for ``hvd.DistributedOptimizer``, local steps, and replicas averaged in
process sets."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from thinwire.horovod.compressor import GradientCompressor
from thinwire.horovod.elastic import ElasticCompressor
from thinwire.horovod.local import LocalSteps
from thinwire.horovod.replicas import DivideAndShuffleAverager
from thinwire.methods import Elastic, Method

__all__ = ["Compressor", "DivideAndShuffleAverager", "ElasticCompressor", "GradientCompressor", "LocalSteps"]


def Compressor(named_parameters: Iterable[tuple[str, torch.Tensor]], method: Method, *, process_set: Any = None,
               optimizer: torch.optim.Optimizer | None = None, grad_scaler: torch.amp.GradScaler | None = None,
               consistency_every: int = 0, log: Any = None) -> GradientCompressor:  # noqa: N802 # fmt: skip
    """Drop-in for ``hvd.DistributedOptimizer(optimizer, named_parameters=..., compression=Compressor(...))``.

    named_parameters: ``model.named_parameters()``. method: BlockSparse with any selection but topk, or Dense; or
    Elastic over one of them. process_set: the one that the DistributedOptimizer is given. optimizer: the inner
    optimizer; needed where the method keeps momentum itself, and by Elastic. grad_scaler, consistency_every, log: as
    for ``thinwire.attach``.

    Returns a :class:`thinwire.Handle`, which is the compressor. Make one for each DistributedOptimizer. Raises
    TypeError or ValueError for what cannot work, ImportError without Horovod.
    """
    kind: Callable[..., GradientCompressor] = ElasticCompressor if isinstance(method, Elastic) else GradientCompressor
    return kind(named_parameters, method, process_set=process_set, optimizer=optimizer, grad_scaler=grad_scaler,
                consistency_every=consistency_every, log=log)  # fmt: skip
