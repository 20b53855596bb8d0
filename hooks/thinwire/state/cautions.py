"""What works, and costs quality or gains nothing: said in the log where a method meets its model, with numbers."""

import logging

import torch

from thinwire.methods import BlockSparse, DivideAndShuffle, Method
from thinwire.methods.block_sparse import RANDOM
from thinwire.methods.schedules import Partition
from thinwire.state.suggest import final_density, suggest

_log = logging.getLogger("thinwire")


def caution(method: Method, optimizer: torch.optim.Optimizer | None, world_size: int) -> None:
    """Warn of what a gradient method is unlikely to be meant to do. method: not Elastic, but the one inside.

    optimizer: None where it was not given, and then nothing can be said of it.
    """
    if world_size == 1 or not isinstance(method, BlockSparse):
        return
    if method.selection not in RANDOM and method.density is None:
        _log.warning("thinwire: BlockSparse(%r) has the default density, 1 / world_size = %.3g, which is the paper's "
                     "for random blocks: the heaviest are worth sending alone, so give it one, such as density=0.04 (a "
                     "share: 4 %%)", method.selection, 1 / world_size)  # fmt: skip
    if optimizer is not None and method.memory == "error_feedback" and not method.momentum:
        _caution_momentum(method, optimizer, world_size)


def _caution_momentum(method, optimizer, world_size):
    """Momentum of the optimizer's own beside error feedback."""
    density = final_density(method, world_size)
    beta1 = max((group["betas"][0] for group in optimizer.param_groups if "betas" in group), default=0.0)
    momentum = max((group.get("momentum") or 0.0 for group in optimizer.param_groups), default=0.0)
    if density == 1 or not (beta1 or momentum):
        return
    kind, lr = type(optimizer).__name__, suggest(method, optimizer, world_size).lr
    own = f"beta1 of {beta1:g}" if beta1 else f"momentum of {momentum:g}"
    otherwise = "" if beta1 else (f", or let the method keep it: BlockSparse(..., momentum={momentum:g}) with the "
                                  "optimizer's at 0")  # fmt: skip
    _log.warning("thinwire: %s's %s acts on sums that error feedback delays by about %.0f steps, which acts as "
                 "momentum already: this can train far worse than plain DDP. Set it to 0 and begin a search for the "
                 "learning rate at %.3g (thinwire.suggest(method, optimizer) says why)%s",
                 kind, own, 1 / density, lr, otherwise)  # fmt: skip


def caution_groups(method: DivideAndShuffle, partitions: tuple[Partition, ...]) -> None:
    """Warn where every round has one group, of all ranks."""
    if all(len(partition) == 1 for partition in partitions):
        ranks = len(partitions[0][0])
        if ranks > 1:
            _log.warning("thinwire: DivideAndShuffle has groups of %d on %d ranks: that is one group of all, so every "
                         "round is a plain average of all parameters and nothing is saved: it is for more ranks than a "
                         "group has", ranks, ranks)  # fmt: skip
