"""Elastic scheduling for Horovod, over the stock ``hvd.DistributedOptimizer``: see ``thinwire.Elastic``.

Horovod's optimizer waits for every operation that it started itself, and only for those. So one element of each
parameter travels through it, and at the first ``decompress`` of a step, when all gradients are known, what is waited
for is averaged; the rest is left under way in operations that the optimizer does not know of.
"""

import gc
import itertools
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from thinwire.core.reducer import Encoded
from thinwire.core.selection import BY_NAME
from thinwire.elastic.late_steps import LateSteps, check_optimizer
from thinwire.elastic.lateness import Late, Usual, add_in_rank_order, heaviest
from thinwire.horovod.compressor import GradientCompressor, _InFlight
from thinwire.horovod.stock import hvd
from thinwire.methods import Elastic
from thinwire.state.checks import check_owned

_numbers = itertools.count()


@dataclass
class _Gradients:
    """Gradients of some parameters, one after the other in flat [N]. again: see memory.Pass."""

    names: tuple[str, ...]
    numels: tuple[int, ...]
    flat: torch.Tensor
    again: bool = False

    def views(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.names, self.flat.split(self.numels), strict=True))


@dataclass
class _Sent:
    """An all-reduce under way. late: whose average it is, where nothing waits for it. over: see Reducer.decode."""

    encoded: Encoded
    handle: int
    over: tuple | None
    divide_by: float
    late: Late | None = None


class ElasticCompressor(LateSteps, GradientCompressor):
    """Elastic scheduling at work in one ``hvd.DistributedOptimizer``; what ``Compressor(..., Elastic(...))`` gives.

    What differs from DDP: parameters are late, not buckets. Those that are waited for are exchanged at the end of
    the backward pass and do not overlap with it, because Horovod's optimizer takes all gradients at once, in
    ``step()``; the late ones travel behind the next forward and backward pass. Horovod carries one thing after the
    other, so what does not fit behind that holds up the next step, also with a larger max_delay. decide="agreed"
    only, without speculate. With beta = 1 it is the Compressor of the method inside, bit for bit.

    optimizer: the one that is given to the DistributedOptimizer. Learning rates are read in its ``step()`` or
    ``synchronize()``. Call ``finalize()`` after the last step. All methods but ``stats`` wait for the other ranks:
    call them on every rank of the process set, between ``step()`` and the next backward pass.

    Raises TypeError or ValueError for what cannot work, ImportError without Horovod.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, torch.Tensor]], method: Elastic, *,
                 optimizer: torch.optim.Optimizer | None = None, **options: Any):  # fmt: skip
        _check_decision(method)
        check_optimizer(optimizer)
        if hasattr(optimizer, "_allreduce_grad_async"):
            raise TypeError("optimizer is an hvd.DistributedOptimizer: pass the plain one that it is to be made from")
        super().__init__(named_parameters, method, optimizer=optimizer, runs=method.method, **options)
        assert optimizer is not None  # check_optimizer
        check_owned(optimizer, self._parameters)
        self._names = {p: name for name, p in self._parameters}
        self._plain, self._horovods = optimizer, None
        self._number = self._label = next(_numbers)
        self._defers |= self._is_elastic()
        self._late_next: frozenset[str] = frozenset()
        self._usual = Usual()
        self._may_be_zero = self._is_elastic()
        self._under_way: list[_Sent] = []
        self._counts = {"buckets": 0, "late_buckets": 0}

    def _sums_itself(self, selection):
        """Never: what is late is left under way in an all-reduce of Horovod's."""
        return False

    # ---- what a user calls ----

    def stats(self) -> dict[str, float]:
        """As of any method. And buckets and late_buckets: how many parameters were averaged in all, added up over
        the steps, and how many of those were late."""
        return super().stats() | self._counts

    def state_dict(self) -> dict:
        """As of any method, and what is late, landed. Save the model beside it as it is, not ``evaluating()``."""
        return super().state_dict() | {"late_next": sorted(self._late_next)}

    # ---- what Horovod and GradientCompressor call ----

    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, _InFlight | None]:
        if self._borrowed:
            raise RuntimeError("a backward pass inside evaluating(): what it changes would be undone at the end")
        return super().compress(tensor)

    def _agree(self, all_gather_object):
        begins = not self._agreed
        super()._agree(all_gather_object)
        if begins and self._is_elastic():  # ranks may have made other compressors besides
            self._label = max(all_gather_object(self._number))

    def _check_process_set(self):
        super()._check_process_set()
        self._horovods = self._calling_optimizer() or self._horovods

    def _put_back(self, shard):
        super()._put_back(shard)
        self._late_next = frozenset(shard.get("late_next", ()))

    def _drop(self, names, step):
        self._usual.dropped(names)
        super()._drop(names, step)

    def _exchange_deferred(self, ones_added):
        if not self._is_elastic():
            return super()._exchange_deferred(ones_added)
        step, late_now = self._step - 1, self._late_next
        groups = self._take_deferred()
        norms = self._added_norms(groups)
        waited = heaviest(list(norms.values()), self.method.beta)
        self._late_next = frozenset(name for i, name in enumerate(norms) if i not in waited)
        if self._usual.outlies(math.fsum(norms.values()), norms):
            late_now = frozenset()
        if not all(map(math.isfinite, norms.values())):  # what is due waits for a good step
            for one in (one for group in groups for one in group):
                self._averaged[one.name] = torch.full_like(one.grad, math.nan).reshape(-1)
            return
        overdue = step - self.method.max_delay
        # Memory must know what became of what was sent before the same parameters send again.
        self._receive_until(step if self._reducer.memory.stores() else overdue)
        due = [late for late in self._ledger.lates if late.step <= overdue]
        now = [unit for group in groups for unit in self._units(group, lambda name: name not in late_now)]
        later = [unit for group in groups for unit in self._units(group, late_now.__contains__)]
        divide_by = self._set.size() / ones_added
        sent = [self._send(unit, f"thinwire.payload.{unit.names[0]}", step, divide_by) for unit in now]
        for one in sent:
            self._receive(one)
        self._leave(later, step, divide_by)
        self._apply(groups, now, due)
        self._counts["buckets"] += len(norms)
        self._counts["late_buckets"] += sum(len(unit.names) for unit in later)

    # ---- the exchange ----

    def _added_norms(self, groups):
        """Each parameter's norm, added up over the ranks: the same numbers on all of them."""
        names = [one.name for group in groups for one in group]
        mine = torch.cat([
            torch.stack(torch._foreach_norm([one.grad for one in group], 2, torch.float64)).cpu() for group in groups
        ])  # fmt: skip
        self._stats.count_bytes((self._set.size() - 1) * mine.numel() * mine.element_size())
        total = add_in_rank_order(hvd.allgather(mine[None], name="thinwire.norms", process_set=self._set))
        return dict(zip(names, total.tolist(), strict=True))

    def _units(self, group, wanted):
        """What is encoded at once: all that is wanted where ranks talk first, else each parameter by itself."""
        chosen = [one for one in group if wanted(one.name)]
        together = BY_NAME[self._block_sparse.selection].talks
        return [
            _Gradients(tuple(one.name for one in some), tuple(one.grad.numel() for one in some),
                       torch.cat([one.grad.reshape(-1) for one in some]), any(one.was is not None for one in some))
            for some in ([chosen] if together and chosen else [[one] for one in chosen])
        ]  # fmt: skip

    def _send(self, unit, name, step, divide_by, late=None):
        begin = time.perf_counter()
        encoded, values, over = self._encode(unit.flat, unit.names, unit.numels, step, unit.again)
        handle = hvd.allreduce_async(values, op=hvd.Sum, name=name, process_set=self._set)
        self._stats.encode_s += time.perf_counter() - begin
        return _Sent(encoded, handle, over, divide_by, late)

    def _receive(self, sent):
        begin = time.perf_counter()
        total = hvd.synchronize(sent.handle)
        arrived = time.perf_counter()
        self._decode(sent.encoded, total, sent.over, sent.divide_by)
        if sent.late is not None:
            sent.late.land()
        self._stats.exchange_s += arrived - begin
        self._stats.decode_s += time.perf_counter() - arrived

    def _receive_until(self, step):
        """Land what was issued up to a step."""
        for one in self._under_way:
            if one.late.step <= step:
                self._receive(one)
        self._under_way = [one for one in self._under_way if one.late.step > step]

    def _leave(self, units, step, divide_by):
        """Leave these under way. Names are used again once what had them has landed: Horovod caches them."""
        lrs = self._learning_rates()
        turn = step % (self.method.max_delay + 1)
        for unit in units:
            late = Late(step, unit.names, unit.numels, unit.flat, tuple(lrs[name] for name in unit.names))
            name = f"thinwire.late.{self._label}.{turn}.{unit.names[0]}"
            self._under_way.append(self._send(unit, name, step, divide_by, late))
            self._ledger.add(late)

    def _apply(self, groups, now, due):
        """This step's gradients: averages, or zeros in the place of what is late, and what is due."""
        averages = {name: view for unit in now for name, view in unit.views().items()}
        factor = self._factor(self._learning_rates())
        for group in groups:
            parts = [averages[one.name] if one.name in averages else torch.zeros_like(one.grad).reshape(-1)
                     for one in group]  # fmt: skip
            given = _Gradients(tuple(one.name for one in group), tuple(map(len, parts)), torch.cat(parts))
            self._ledger.deliver(due, given, factor)
            self._averaged |= given.views()

    # ---- what LateSteps calls ----

    def _is_elastic(self):
        return self.method.beta < 1 and self._set.included() and self._set.size() > 1

    def _land(self):
        self._receive_until(math.inf)

    def _make_step(self):
        optimizer = self._optimizer
        if self._horovods is None:
            optimizer.step()
            return
        with optimizer.skip_synchronize():
            optimizer.step()

    @property
    def _optimizer(self):
        """The optimizer that Horovod made of the one that was given, whose state alone is used in training.

        Horovod does not say which that is before the first gradient, when a resumed run may already ask, and keeps no
        list of what it made: then it is found among all objects that there are.
        """
        if self._horovods is None:
            for thing in gc.get_objects():
                if issubclass(type(thing), torch.optim.Optimizer) and getattr(thing, "_compression", None) is self:
                    self._horovods = thing
        return self._plain if self._horovods is None else self._horovods


def _check_decision(method):
    if method.replicas_differ:
        what = "speculate=True" if method.speculate else "decide='arrival'"
        raise ValueError(
            f"Elastic({what}) does not work with Horovod: its optimizer takes all gradients at once in step(), and "
            "nothing tells it what has arrived meanwhile: use decide='agreed' without speculate, or thinwire.attach "
            "with DistributedDataParallel"
        )
