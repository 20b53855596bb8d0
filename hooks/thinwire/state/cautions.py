"""What works, and costs quality or gains nothing: said in the log where a method meets its model, with numbers."""

import logging

import torch

from thinwire.methods import BlockSparse, DivideAndShuffle, LocalSteps, Method
from thinwire.methods.block_sparse import RANDOM
from thinwire.methods.schedules import Partition
from thinwire.state.suggest import final_density, suggest

_log = logging.getLogger("thinwire")
HIGH_BETA1 = 0.9  # Adam's default


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
    found = suggest(method, optimizer, world_size)
    kind, delay = type(optimizer).__name__, 1 / final_density(method, world_size)
    own = found.was_beta1 or found.was_momentum
    if delay == 1 or not own:
        return
    name = "beta1" if found.was_beta1 else "momentum"
    also = " (and nesterov to False)" if any(group.get("nesterov") for group in optimizer.param_groups) else ""
    otherwise = "" if found.was_beta1 else (f", or let the method keep it: BlockSparse(..., momentum={own:g}) with the "
                                            "optimizer's at 0")  # fmt: skip
    _log.warning("thinwire: %s's %s of %g acts on sums that error feedback delays by about %.0f steps, which acts as "
                 "momentum already: this can train far worse than plain DDP. Set it to 0%s and begin a search for the "
                 "learning rate at %.2g times plain DDP's, %.3g (thinwire.suggest(method, optimizer) says why)%s",
                 kind, name, own, delay, also, found.factor, found.lr, otherwise)  # fmt: skip


def caution_groups(method: DivideAndShuffle, partitions: tuple[Partition, ...],
                   name: str = "DivideAndShuffle") -> None:  # fmt: skip
    """Warn where every round has one group, of all ranks, and averages all of the parameters."""
    if method.blocks is None and all(len(partition) == 1 for partition in partitions):
        ranks = len(partitions[0][0])
        if ranks > 1:
            _log.warning("thinwire: %s has groups of %d on %d ranks: that is one group of all, so every "
                         "round is a plain average of all parameters, which saves no bytes: it is for more ranks than "
                         "a group has", name, ranks, ranks)  # fmt: skip


def caution_local(method: LocalSteps, optimizer: torch.optim.Optimizer, world_size: int) -> None:
    """Warn of a high beta1 of Adam beside the momentum of the outer optimizer."""
    found = suggest(method, optimizer, world_size)
    if world_size > 1 and found.was_beta1 >= HIGH_BETA1 > (found.beta1 or 0.0):
        _log.warning("thinwire: %s's beta1 of %g beside LocalSteps' outer momentum of %g can train worse than a lower "
                     "one: begin a search at %g (thinwire.suggest(method, optimizer) says why)",
                     type(optimizer).__name__, found.was_beta1, method.outer_momentum, found.beta1)  # fmt: skip
