"""``thinwire.attach``: one registry, from a method's type to what runs it on a DDP model."""

from collections.abc import Callable
from typing import Any

import torch

from thinwire.ddp import attach_elastic, attach_hook, attach_local, attach_replicas
from thinwire.methods import BlockSparse, Dense, DivideAndShuffle, Elastic, LocalSteps, Method
from thinwire.state.handle import Handle

_RUN_BY: dict[type[Method], Callable[..., Handle]] = {
    BlockSparse: attach_hook,
    Dense: attach_hook,
    DivideAndShuffle: attach_replicas,
    Elastic: attach_elastic,
    LocalSteps: attach_local,
}


def attach(ddp: torch.nn.Module, method: Method, *, optimizer: torch.optim.Optimizer | None = None,
           grad_scaler: torch.amp.GradScaler | None = None, consistency_every: int = 0,
           log: Any = None) -> Handle:  # fmt: skip
    """Make a DDP model average by ``method``. Call it once, on every rank, before the first backward.

    ddp: a DistributedDataParallel, or what torch.compile made of one. optimizer: give the one that steps the model; it
    is needed by DivideAndShuffle and LocalSteps, which follow its steps, by Elastic, for the learning rates, and where
    the method keeps momentum itself, to see that the optimizer keeps none; with the others, what cannot go well
    together is warned of. grad_scaler: the torch.amp.GradScaler in use, if any: a memory is kept in step when the scale
    changes, and with DivideAndShuffle and LocalSteps a step that one rank skips does not stop the others.
    consistency_every: measure the inconsistency every so many steps, as ``handle.consistency()`` does; 0 is never, and
    costs nothing. log: what gets the measurements on this rank, beside ``handle.consistency_log``: a TensorBoard
    ``SummaryWriter``, or a callable that takes the dictionary that ``handle.consistency()`` describes.

    Returns the handle, with the same verbs for every method: see :class:`thinwire.Handle`.
    Raises TypeError or ValueError for a model, method, optimizer or GradScaler that cannot work. Whatever it raises,
    the model, the optimizer and the GradScaler are as they were.
    """
    ddp = getattr(ddp, "_orig_mod", ddp)
    optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    kinds = (_RUN_BY[kind] for kind in type(method).__mro__ if kind in _RUN_BY)
    run_by = next(kinds, attach_hook)  # which refuses what is no method
    return run_by(ddp, method, optimizer, grad_scaler=grad_scaler, consistency_every=consistency_every, log=log)
