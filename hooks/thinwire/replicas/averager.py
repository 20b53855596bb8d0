"""Divide-and-Shuffle as PyTorch's ModelAverager: for PostLocalSGDOptimizer, or a loop that averages by itself."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.algorithms.model_averaging.averagers import ModelAverager

from thinwire.core.exchange import gather_objects
from thinwire.core.stats import Stats, ring_all_reduce_bytes
from thinwire.methods import DivideAndShuffle
from thinwire.replicas import hosts
from thinwire.replicas.groups import Groups
from thinwire.replicas.means import pieces
from thinwire.replicas.rounds import Rounds
from thinwire.state import agree
from thinwire.state.cautions import caution_groups
from thinwire.state.names import float_buffers


class DivideAndShuffleAverager(ModelAverager):
    """Averages parameters in the groups of a DivideAndShuffle, one round a call.

    method: with ``overlap="none"``; ``average_optimizer_state`` is not used, since a ModelAverager sees parameters
    only. module: average its floating-point buffers too, if the method does. process_group: the default one.

    Give the model to DDP with a hook that leaves gradients local, such as PyTorch's ``noop_hook``, and with
    ``broadcast_buffers=False``. ``step`` counts the calls, as in PyTorch's averagers; PostLocalSGDOptimizer saves it.
    Making one is a collective: every rank must. Raises ValueError, on every rank, for what cannot work.
    """

    def __init__(self, method: DivideAndShuffle | None = None, process_group: dist.ProcessGroup | None = None, *,
                 module: torch.nn.Module | None = None):  # fmt: skip
        super().__init__(process_group)
        method = DivideAndShuffle() if method is None else method
        self._module = module
        self._stats = Stats()
        group = self.process_group
        found = agree.check_together(lambda thing: gather_objects(thing, group), lambda: _checked(method), hosts.mine())
        partitions = method.partitions(group.size(), tuple(found))
        caution_groups(method, partitions)
        self._groups = Groups(partitions, group)
        self._rounds = Rounds(method, partitions, self._groups, self._stats)
        self._agreed = False

    def average_parameters(self, params: Iterable) -> None:
        """One round, over parameters or over an optimizer's parameter groups; frozen ones are left.

        Raises ValueError, on every rank, where after a resume the ranks are in different rounds.
        """
        if not self._agreed or self._rounds.done != self.step:
            agree.require(self._groups.gather_objects({"round": str(self.step)}))
            self._agreed, self._rounds.done = True, self.step
        named = _named(params)
        nbytes = sum(p.numel() * p.element_size() for _, p in named)
        self._stats.dense_bytes += ring_all_reduce_bytes(nbytes, self._groups.size)
        round_ = self._rounds.begin()
        for piece in pieces(named):
            round_.send(piece, {})
        round_.send_rest(float_buffers(self._module) if self._module and self._rounds.method.average_buffers else ())
        round_.finish()
        self.step += 1

    def stats(self) -> dict[str, float]:
        """As ``Replicas.stats()``."""
        return self._stats.as_dict() | {"process_groups": len(self._groups)}

    def close(self) -> None:
        """Destroy the process groups that were made, on every rank."""
        self._groups.close()


def _checked(method):
    """What must be equal on every rank. Raises TypeError or ValueError for what no averager can do."""
    if not isinstance(method, DivideAndShuffle):
        raise TypeError(f"DivideAndShuffleAverager got method={method!r}: it must be a DivideAndShuffle")
    if method.overlap != "none":
        raise ValueError(
            f"DivideAndShuffleAverager got overlap={method.overlap!r}: an averager is called when the step is over, "
            "so it takes overlap='none'; thinwire.attach(..., optimizer=...) can do the others"
        )
    return method.describe()


def _named(params):
    """Trainable parameters, each once, with their places for names."""
    found = {}
    for one in params:
        for parameter in one["params"] if isinstance(one, dict) else (one,):
            if parameter.requires_grad:
                found.setdefault(id(parameter), parameter)
    return [(str(i), parameter) for i, parameter in enumerate(found.values())]
