"""Elastic scheduling for DistributedDataParallel (Nadiradze et al., 2001.05918): see ``thinwire.Elastic``.

DDP waits for every bucket's future at the end of the backward pass. So a bucket that is late leaves a copy behind,
which travels in a thread and a process group of its own, and its future gives what is ready: what was late before,
and nothing or this rank's own gradient of this step. ``scheduling.py`` decides, ``lateness.py`` keeps count.
"""

import contextlib
import copy
import logging
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from thinwire import agree
from thinwire.channel import Channel
from thinwire.checks import check_model, check_momentum, check_owned
from thinwire.courier import Courier
from thinwire.ddp import HookState, hook
from thinwire.groups import backend_of
from thinwire.lateness import Late, Ledger
from thinwire.methods import Elastic
from thinwire.names import parameter_names
from thinwire.scheduling import Agreed, Arrival, Bucket, Lane
from thinwire.stats import Stats

_log = logging.getLogger("thinwire")


def attach_elastic(ddp, method: Elastic, optimizer, **options) -> "ElasticState":
    """See ``thinwire.attach``. A collective: what is wrong on one rank is raised on all."""
    if not isinstance(ddp, DistributedDataParallel):
        check_model(ddp)  # there is no process group to tell the others
    optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    state = None

    def check():
        nonlocal state
        check_model(ddp)
        check_elastic(method, ddp, optimizer, options.get("grad_scaler"))
        state = ElasticState(method, optimizer, **options)
        return method.describe()

    agree.check_together(lambda thing: _gather_objects(thing, ddp.process_group), check)
    state.bind(ddp)
    ddp.register_comm_hook(state, hook)
    return state


def check_elastic(method: Elastic, ddp: DistributedDataParallel, optimizer, grad_scaler) -> None:
    """Raise TypeError or ValueError where elastic scheduling would not be sound."""
    if optimizer is None:
        raise ValueError("Elastic applies gradients late, at the optimizer's learning rates: pass optimizer=")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}: it must be a torch.optim.Optimizer")
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        raise TypeError("ZeroRedundancyOptimizer steps each parameter on one rank only: use the optimizer inside it")
    check_momentum(method.method, optimizer)
    check_owned(optimizer, [(name, p) for p, name in parameter_names(ddp.module, ddp.parameters_to_ignore).items()])
    if method.replicas_differ:
        plain = isinstance(optimizer, torch.optim.SGD) and not any(
            group["momentum"] or group["weight_decay"] for group in optimizer.param_groups
        )
        if not plain:
            what = "speculate=True" if method.speculate else "decide='arrival'"
            raise ValueError(
                f"Elastic({what}) lets ranks apply a gradient in different steps, which comes to the same only with a "
                f"torch.optim.SGD without momentum and weight decay, and the optimizer is {optimizer!r}: use "
                "decide='agreed' without speculate, or such an SGD; BlockSparse(momentum=...) keeps momentum soundly"
            )
    if method.decide == "arrival" and method.beta < 1:
        if grad_scaler is not None:
            raise ValueError(
                "Elastic(decide='arrival') with grad_scaler=: a bucket with inf may be late on one rank only, and "
                "then not all ranks would skip the same step: use decide='agreed'"
            )
        if ddp.find_unused_parameters:
            raise ValueError(
                "Elastic(decide='arrival') with find_unused_parameters=True: what is late of a parameter that is not "
                "used would be lost: use decide='agreed'"
            )


class ElasticState(HookState):
    """Elastic scheduling at work on one DDP model; the handle that ``thinwire.attach`` returns.

    All methods but ``stats`` wait for the other ranks: call them on every rank.
    """

    _closed = _borrowed = False

    def __init__(self, method: Elastic, optimizer: torch.optim.Optimizer, **options):
        super().__init__(method, runs=method.method, **options)
        self._optimizer = optimizer
        self._ledger = Ledger()
        self._rule: Agreed | Arrival | None = None

    def __reduce__(self):
        return HookState(self.method.method).__reduce__()

    # ---- what a user calls ----

    def stats(self) -> dict[str, float]:
        """As of any method; exchange_s adds up what may run side by side. And buckets and late_buckets, how many
        were averaged in all and how many of those were late."""
        if self._rule is None:
            return super().stats() | {"buckets": 0, "late_buckets": 0}
        total = sum((lane.stats for lane in self._rule.lanes), self._stats)
        return super().stats() | total.as_dict() | self._rule.counts

    def consistency(self) -> dict:
        """As of any method: what is late is in it. Waits until all that is under way has landed."""
        self._land()
        return super().consistency()

    def finalize(self) -> None:
        """Apply all that is late, now: one more step of the optimizer, on the parameters that have something pending
        and at the learning rate of the step that issued it.

        Then nothing is pending and replicas are bitwise equal: with speculate or arrival, where they may differ by
        rounding, by taking rank 0's parameters. Training may go on. What is pending is dropped, with a warning, where
        it is not finite.
        """
        self._apply_pending()
        self._ledger.clear()

    @contextlib.contextmanager
    def drained(self) -> Iterator[torch.nn.Module]:
        """The model as ``finalize`` would leave it, to evaluate or to save it; as it was again afterwards.

        Parameters and the optimizer's state are restored bit for bit, also when the body raises.
        """
        parameters = self._parameters()
        saved = {name: p.detach().clone() for name, p in parameters.items()}
        states = {p: copy.deepcopy(self._optimizer.state.get(p)) for p in parameters.values()}
        try:
            self._apply_pending()
            self._borrowed = True
            yield self._ddp.module
        finally:
            self._borrowed = False
            for name, p in parameters.items():
                p.detach().copy_(saved[name])
                if states[p] is None:
                    self._optimizer.state.pop(p, None)
                else:
                    self._optimizer.state[p] = states[p]

    def state_dict(self) -> dict:
        """As of any method, and what is late, landed. Save the model beside it as it is, not ``drained()``.

        Where replicas may differ, with speculate or arrival, save each rank's own model, or call ``finalize()``
        first. A resumed run waits for every bucket in its first two steps, because DDP has yet to arrange them; no
        gradient is lost or applied twice.
        """
        self._land()
        late = [
            {"step": one.step, "lr": {name: lr for name, (_, lr) in one.parts().items()},
             "tensors": {name: part.clone() for name, (part, _) in one.parts().items()}}
            for one in self._ledger.lates
        ]  # fmt: skip
        return super().state_dict() | {"late": late}

    def load_state_dict(self, state) -> None:
        if self._rule is not None:
            self._land()
        super().load_state_dict(state)

    def close(self) -> None:
        """End the threads and destroy the process groups that were made. Call ``finalize`` first; the DDP model
        cannot be trained any more."""
        if self._rule is not None:
            self._land()
            for lane in self._rule.lanes:
                lane.courier.close()
                dist.destroy_process_group(lane.group)
        self._rule, self._closed = None, True

    # ---- what HookState calls ----

    def bind(self, ddp: DistributedDataParallel) -> None:
        super().bind(ddp)
        self._ddp = ddp
        if self.method.beta == 1 or self._group.size() == 1:
            return
        kind = Agreed if self.method.decide == "agreed" else Arrival
        device = next(iter(self._names)).device
        lanes = [self._lane(device, name) for name in (("now", "later") if kind is Agreed else ("later",))]
        self._rule = kind(
            self.method, self._ledger, lanes, bool(self._reducer.memory.stores()), self._factor,
            ddp.find_unused_parameters,
        )  # fmt: skip

    def _lane(self, device, name):
        group = dist.new_group(
            dist.get_process_group_ranks(self._group), backend=backend_of(self._group),
            use_local_synchronization=self._group.size() < dist.get_world_size(),
        )  # fmt: skip
        stats = Stats()
        courier = Courier(f"thinwire-{name}", device, lambda error: self._rule.fail(error))
        return Lane(group, courier, Channel(group, self._reducer, stats), stats)

    def _exchange(self, bucket, step):
        if self._closed:
            raise RuntimeError("this model's Elastic was closed: wrap the module in a new DistributedDataParallel")
        if self._borrowed:
            raise RuntimeError("a backward pass inside drained(): what it changes would be undone at the end")
        if self._rule is None:
            return super()._exchange(bucket, step)
        names, numels = self._parameters_of(bucket)
        if bucket.index() == 0:
            self._lrs = self._learning_rates()
        one = Bucket(bucket.buffer(), names, numels, self._lrs, step, self._density_at(step))
        self._rule.take(one)
        if bucket.is_last():
            self._rule.end(step)
        return one.future

    def _apart(self):
        waits, alone = super()._apart()
        if self._rule is None:
            return waits, alone
        factor = self._factor(self._learning_rates())
        return waits, [(name, part * (factor(name, lr) or 1.0)) for name, parts in self._ledger.pending().items()
                       for part, lr in parts]  # fmt: skip

    def _put_back(self, shard):
        super()._put_back(shard)
        self._ledger.clear()
        for one in shard.get("late", ()):
            tensors = one["tensors"]
            late = Late(one["step"], tuple(tensors), tuple(t.numel() for t in tensors.values()),
                        torch.cat(list(tensors.values())).to(next(iter(self._names)).device),
                        tuple(one["lr"][name] for name in tensors))  # fmt: skip
            late.landed.set()
            self._ledger.add(late)

    def _rescale(self, factor):
        self._land()
        super()._rescale(factor)
        self._ledger.scale(factor)

    # ---- late gradients and learning rates ----

    def _land(self):
        if self._rule is not None:
            self._rule.land_all()

    def _apply_pending(self):
        self._land()
        if pending := self._ledger.pending():
            self._step_with(pending)
        if self.method.replicas_differ and self._rule is not None:
            first = dist.get_global_rank(self._group, 0)
            for p in self._names:
                dist.broadcast(p.detach(), first, group=self._group)

    def _step_with(self, pending):
        """A step of the optimizer with what is pending as the gradient."""
        groups = self._optimizer.param_groups
        gradients = [(p, p.grad) for group in groups for p in group["params"]]
        rates = [group["lr"] for group in groups]
        try:
            for group in groups:
                found = {p: pending.get(self._names.get(p), ()) for p in group["params"]}
                issued = [lr for parts in found.values() for _, lr in parts]
                group["lr"] = max(issued, default=0.0) or group["lr"]
                factor = self._factor({self._names[p]: float(group["lr"]) for p, parts in found.items() if parts})
                for p, parts in found.items():
                    total = sum(part * factor(self._names[p], lr) for part, lr in parts) / (self._scale or 1.0)
                    p.grad = total.view_as(p) if parts else None
            if all(bool(torch.isfinite(p.grad).all()) for p, _ in gradients if p.grad is not None):
                self._optimizer.step()
            else:
                _log.warning("thinwire: what was late is not finite, and is dropped")
        finally:
            for (p, gradient) in gradients:
                p.grad = gradient
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def _factor(self, lrs):
        """What to multiply a late gradient by, when it is applied at these learning rates; see lateness.Factor."""
        if not isinstance(self._optimizer, torch.optim.SGD):
            return lambda name, issued: 1.0

        def factor(name, issued):
            if issued == lrs[name]:
                return 1.0
            return issued / lrs[name] if lrs[name] else None

        return factor

    def _parameters(self):
        return {name: p for p, name in self._names.items()}

    def _learning_rates(self):
        """Each parameter's, now, by name."""
        return {self._names[p]: float(group["lr"]) for group in self._optimizer.param_groups
                for p in group["params"] if p in self._names}  # fmt: skip


def _gather_objects(thing, group):
    everyone = [None] * group.size()
    dist.all_gather_object(everyone, thing, group=group)
    return everyone
