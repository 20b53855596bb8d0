"""Elastic scheduling for DistributedDataParallel (Nadiradze et al., 2001.05918): see ``thinwire.Elastic``.

DDP waits for every bucket's future at the end of the backward pass. So a bucket that is late leaves a copy behind,
which travels in a thread and a process group of its own, and its future gives what is ready: what was late before,
and nothing or this rank's own gradient of this step. ``scheduling.py`` decides, ``lateness.py`` keeps count.
"""

import atexit
import logging
import weakref

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from thinwire.core.channel import Channel
from thinwire.core.courier import Courier
from thinwire.core.exchange import GroupLinks, gather_objects
from thinwire.core.memory import Pass
from thinwire.core.stats import Stats
from thinwire.ddp.hook import HookState
from thinwire.ddp.mount import mount, restore_copied
from thinwire.elastic.late_steps import LateSteps, check_optimizer
from thinwire.elastic.scheduling import Agreed, Arrival, Bucket, Lane
from thinwire.methods import Elastic
from thinwire.replicas.groups import another, destroy
from thinwire.state import agree, order
from thinwire.state.cautions import caution
from thinwire.state.checks import check_model, check_momentum, check_owned
from thinwire.state.names import parameter_names

_log = logging.getLogger("thinwire")


def attach_elastic(ddp, method: Elastic, optimizer, **options) -> "ElasticState":
    """See ``thinwire.attach``. A collective: what is wrong on one rank is raised on all."""
    if not isinstance(ddp, DistributedDataParallel):
        check_model(ddp)  # there is no process group to tell the others
    state = None

    def check():
        nonlocal state
        check_model(ddp)
        check_elastic(method, ddp, optimizer, options.get("grad_scaler"))
        state = ElasticState(method, ddp.module, optimizer, **options)
        return method.describe()

    agree.check_together(lambda thing: gather_objects(thing, ddp.process_group), check)
    caution(method.method, optimizer, ddp.process_group.size())
    restore_copied(ddp)
    try:
        state.bind(ddp)
        mount(ddp, state)
    except BaseException:
        state._release()
        raise
    return state


def check_elastic(method: Elastic, ddp: DistributedDataParallel, optimizer, grad_scaler) -> None:
    """Raise TypeError or ValueError where elastic scheduling would not be sound."""
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        raise TypeError("ZeroRedundancyOptimizer steps each parameter on one rank only: use the optimizer inside it")
    check_optimizer(optimizer)
    check_momentum(method.method, optimizer)
    check_owned(optimizer, [(name, p) for p, name in parameter_names(ddp.module, ddp.parameters_to_ignore).items()])
    if method.replicas_differ:
        found = type(optimizer).__name__
        wrong = not isinstance(optimizer, torch.optim.SGD)
        for group in optimizer.param_groups if not wrong else ():
            settings = {key: group[key] for key in ("momentum", "weight_decay") if group[key]}
            if settings:
                wrong, found = True, f"SGD with {settings}"
        if wrong:
            what = "speculate=True" if method.speculate else "decide='arrival'"
            raise ValueError(
                f"Elastic({what}) lets ranks apply a gradient in different steps, which comes to the same only with a "
                f"torch.optim.SGD without momentum and weight decay, and the optimizer is {found}: use "
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


class ElasticState(LateSteps, HookState):
    """Elastic scheduling at work on one DDP model; the handle that ``thinwire.attach`` returns.

    Call all methods but ``stats`` on every rank: ``consistency`` waits for the others, and replicas that one rank
    alone finalizes differ from then on.
    """

    def __init__(self, method: Elastic, module: torch.nn.Module, optimizer: torch.optim.Optimizer, **options):
        super().__init__(method, module, runs=method.method, optimizer=optimizer, **options)
        self._rule: Agreed | Arrival | None = None
        self._counts = {"buckets": 0, "late_buckets": 0}
        atexit.register(_remind, weakref.ref(self))

    # ---- what a user calls ----

    def stats(self) -> dict[str, float]:
        """As of any method; exchange_s adds up what may run side by side. And buckets and late_buckets, how many
        were averaged in all and how many of those were late."""
        lanes = self._rule.lanes if self._rule is not None else ()
        return super().stats() | sum((lane.stats for lane in lanes), self._stats).as_dict() | self._counts

    def state_dict(self) -> dict:
        """As of any method, and what is late, landed. Save the model beside it as it is, not ``evaluating()``.

        Where replicas may differ, with speculate or arrival, save each rank's own model, or call ``finalize()``
        first. A resumed run waits for every bucket in its first two steps, because DDP has yet to arrange them; no
        gradient is lost or applied twice.
        """
        return super().state_dict()

    # ---- what HookState calls ----

    def bind(self, ddp: DistributedDataParallel) -> None:
        super().bind(ddp)
        if self.method.beta == 1 or self._group.size() == 1:
            return
        kind = Agreed if self.method.decide == "agreed" else Arrival
        device = next(iter(self._names)).device
        lanes = [self._lane(device, name) for name in (("now", "later") if kind is Agreed else ("later",))]
        self._rule = kind(
            self.method, self._ledger, lanes, bool(self._reducer.memory.stores()), self._factor,
            ddp.find_unused_parameters, self._counts,
        )  # fmt: skip

    def _lane(self, device, name):
        group = another(self._group)
        stats = Stats()
        courier = Courier(f"thinwire-{name}", device, lambda error: self._rule.fail(error))
        return Lane(group, courier, Channel(GroupLinks(group), self._reducer, stats), stats)

    def _exchange(self, bucket, step):
        if self._borrowed:
            raise RuntimeError("a backward pass inside evaluating(): what it changes would be undone at the end")
        if self._rule is None:
            return super()._exchange(bucket, step)
        parameters = bucket.parameters()
        names, numels = self._parameters_of(bucket, parameters)
        if self._ddp()._join_config.enable:
            raise RuntimeError(
                "Elastic does not work inside join(): a rank that has run out of data makes no steps, so it would not "
                "apply what is late. Give all ranks the same number of batches, or use the method without Elastic"
            )
        if not self._lrs.keys() >= set(names):  # what was frozen at first may be new
            self._lrs = self._learning_rates()
        were, flat = self._own_share(bucket, parameters, may_be_zero=True), bucket.buffer()
        self._note_gradient(flat, step)
        of = Pass(self._steps.number, again=bool(were))
        one = Bucket(flat, names, numels, self._lrs, step, self._density_at(step), of, were)
        self._rule.take(one)
        return one.future

    def _begin_pass(self):
        super()._begin_pass()
        self._lrs = self._learning_rates()

    def _end_pass(self):
        if self._rule is not None:
            buckets = len(self._rule.buckets)
            self._rule.end(self._step)
            if self._step == 2 and buckets < 3:
                _log.warning("thinwire: DDP has put this model into %d bucket(s), so Elastic has little to choose from:"
                             " give DistributedDataParallel a smaller bucket_cap_mb", buckets)  # fmt: skip
        super()._end_pass()

    def _drop(self, names, step):
        if self._rule is not None:
            self._rule.dropped(names)
        super()._drop(names, step)

    def _is_elastic(self):
        return self._rule is not None

    def _put_back(self, shard):
        super()._put_back(shard)
        if self._rule is not None:
            self._rule.forget_late()

    def _unflattened(self, flat, p):
        return order.shaped(flat, p)

    def _land(self):
        if self._rule is not None:
            self._rule.land_all()

    def _release(self):
        """End the threads too, and destroy the process groups that were made."""
        super()._release()
        rule, self._rule = self._rule, None
        if rule is None:
            return
        self._stats = sum((lane.stats for lane in rule.lanes), self._stats)
        if all(lane.courier.error is None for lane in rule.lanes):
            dist.barrier(group=self._group)  # another rank may still be connecting to the groups
        for lane in rule.lanes:
            lane.courier.close()
            destroy(lane.group)

    def _apply_pending(self):
        super()._apply_pending()
        if self.method.replicas_differ and self._rule is not None:
            first = dist.get_global_rank(self._group, 0)
            for p in self._names:
                dist.broadcast(p.detach(), first, group=self._group)


def _remind(state):
    if (alive := state()) is not None and alive._ledger.lates:
        steps = {late.step for late in alive._ledger.lates}
        _log.warning("thinwire: the program ends with gradients of %d step(s) not yet applied: call handle.finalize() "
                     "on every rank after the last step", len(steps))  # fmt: skip
