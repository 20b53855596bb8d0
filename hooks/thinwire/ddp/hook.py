"""The front door for DistributedDataParallel: gradients averaged bucket by bucket, inside the backward pass."""

import logging
import os
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from thinwire.core.beside import Beside
from thinwire.core.ends import keep
from thinwire.core.exchange import gather_now, gather_objects
from thinwire.core.memory import Pass
from thinwire.core.stats import ring_all_reduce_bytes
from thinwire.ddp.mount import Occupant, Seat, all_reduced, completed, mount, restore_copied
from thinwire.ddp.passes import Passes, may_skip
from thinwire.methods import Method
from thinwire.replicas.groups import another, destroy
from thinwire.state import checkpoint
from thinwire.state.cautions import caution
from thinwire.state.checks import (
    check_closure,
    check_gradient,
    check_model,
    check_module,
    check_momentum,
    check_optimizer_type,
)
from thinwire.state.gradients import GradientHandle
from thinwire.state.names import parameter_names
from thinwire.state.steps import check_own

_log = logging.getLogger("thinwire")
ALONE = os.environ.get("THINWIRE_EXCHANGE_ALONE") == "1"  # one rank goes all the way as well: for tests on one GPU
BUCKETS_KEPT = 1000  # whose parameters are known by heart; DDP arranges them anew once or twice


def attach_hook(ddp, method: Method, optimizer, **options) -> "HookState":
    """See ``thinwire.attach``."""
    state = HookState(method, getattr(ddp, "module", None), optimizer=optimizer, **options)
    check_model(ddp)
    check_optimizer_type(optimizer)
    check_own(optimizer, parameter_names(ddp.module, ddp.parameters_to_ignore))
    check_momentum(method, optimizer)
    check_closure(method, optimizer)
    caution(method, optimizer, ddp.process_group.size())
    restore_copied(ddp)
    try:
        state.bind(ddp)
        mount(ddp, state)
    except BaseException:
        state._release()  # it may be watching the optimizer by now
        raise
    return state


class HookState(Occupant, GradientHandle):
    """A method at work on one DDP model: the state of the hook, and the handle that ``attach`` returns.

    To register it by hand: ``ddp.register_comm_hook(thinwire.HookState(method, model), thinwire.hook)``, for loops
    that make the DistributedDataParallel themselves and take a hook and its state. module: what it wraps, whose
    parameters' names the state is kept by; without it parameters are numbered as DDP's buckets show them, and there is
    no ``state_dict``, which needs names. process_group: the one that DDP was given, the default one if none. optimizer:
    as for ``thinwire.attach``; without it nothing sees which steps are made and nothing checks it: with error feedback
    see to it yourself that its momentum is 0. And inside ``join(divide_by_initial_world_size=False)`` the mean is still
    over all ranks, as with PyTorch's own hooks: a hook is not told which ranks have run out of data, and ``attach``
    asks the model.
    """

    def __init__(self, method: Method, module: torch.nn.Module | None = None, *,
                 process_group: dist.ProcessGroup | None = None, optimizer: torch.optim.Optimizer | None = None,
                 grad_scaler: torch.amp.GradScaler | None = None, consistency_every: int = 0, log: Any = None,
                 runs: Method | None = None):  # fmt: skip
        super().__init__(method, grad_scaler, consistency_every, log, runs)
        if isinstance(module, DistributedDataParallel):
            raise TypeError("HookState got a DistributedDataParallel as its module: pass the model that it wraps, "
                            "ddp.module, or call thinwire.attach(ddp, method)")  # fmt: skip
        check_optimizer_type(optimizer)
        self.module = module
        self.seat = Seat(self)
        self._group = process_group
        self._optimizer = optimizer
        self._passes = Passes()
        self._ignored = tuple(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))  # where DDP looks
        self._names: dict[torch.Tensor, str] | None = None
        self._ddp: weakref.ref[DistributedDataParallel] | None = None  # it owns this, in C++, where cycles stay
        self._beside: Beside | None = None
        self._known: dict[tuple[int, ...], tuple[tuple[str, ...], tuple[int, ...]]] = {}

    @property
    def group(self) -> dist.ProcessGroup:
        return dist.group.WORLD if self._group is None else self._group

    def bind(self, ddp: DistributedDataParallel) -> None:
        """Take the process group from the model."""
        self._group, self._ignored = ddp.process_group, tuple(ddp.parameters_to_ignore)
        self._passes = Passes(may_skip(ddp))
        self._ddp = weakref.ref(ddp)
        self._open()

    def state_dict(self) -> dict:
        """As of any method. Raises RuntimeError where no module was given, so that there are no names."""
        self._require_names("state_dict()")
        return super().state_dict()

    def load_state_dict(self, state: Any) -> None:
        """As of any method. What it holds of parameters that are frozen now waits until they are trained again.
        Raises RuntimeError where no module was given, so that there are no names."""
        self._require_names("load_state_dict()")
        if self._names is not None and not self.closed:
            held = _names_in(checkpoint.check(state, self.method))
            self._know({p: name for p, name in self._all_names().items() if name in held})
        super().load_state_dict(state)

    def _open(self) -> None:
        """Make what is needed to average; the process groups of the job are there."""
        self._group = self.group
        self._names = {} if self.module is None else parameter_names(self.module, self._ignored)
        numels = {name: parameter.numel() for parameter, name in self._names.items()}
        try:
            self._start(numels, self._group.rank(), self._group.size())
        except ValueError:  # a state that was waiting for the model does not fit
            self._names = None
            raise
        keep(self._group)
        self._watch(self._names, self._optimizer)
        if self._group.size() == 1 and self._block_sparse.momentum:
            _log.warning("thinwire: on one rank nothing is averaged and no memory is kept, so there is no momentum "
                         "either: momentum=%g acts from two ranks on", self._block_sparse.momentum)  # fmt: skip

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        if self._names is None:  # it was registered by hand
            if self.module is not None:
                check_module(self.module, self._ignored)
            self._open()
            caution(self.method, None, self._group.size())
        if self._passes.begins(bucket, self._end_pass):
            self._begin_pass()
        if self._group.size() == 1 and not ALONE:
            self._note_gradient(bucket.buffer(), self._step)
            future = completed(bucket.buffer())
        else:
            future = self._exchange(bucket, self._step)
        if self._passes.ends(bucket):
            self._end_pass()
        return future

    def _begin_pass(self):
        self._agree(self._gather_objects)
        if self._beside is not None:
            self._beside.begin()
        self._begin_step()
        self._with_data = self._ranks_with_data()
        if self._steps is not None and self._is_own_pass():
            self._steps.begin_pass()

    def _end_pass(self):
        if self._beside is not None:
            self._beside.end()
        self._step += 1
        self._stats.steps += 1
        if self._steps is not None:
            self._steps.end_pass()

    def _release(self):
        super()._release()
        self.seat.leave()
        beside, self._beside = self._beside, None
        if beside is not None and (group := beside.close()) is not None:
            destroy(group)

    def _look(self):
        if self._beside is not None:
            self._beside.rest()
        super()._look()

    def _in_memory(self):
        names = parameter_names(self.module, self._ignored) if self._names is None else self._names
        return {name: p for p, name in names.items() if not is_lazy(p)}

    def _exchange(self, bucket, step):
        parameters = bucket.parameters()
        names, numels = self._parameters_of(bucket, parameters)
        were, flat = self._own_share(bucket, parameters), bucket.buffer()
        self._note_gradient(flat, step)
        n = self._group.size()
        # Here and not in the memory's factors: a control variate goes on being a mean over all ranks.
        finish = _finishing(n / self._with_data, were)
        if self._of_backend and flat.dtype == torch.float32:
            nbytes = ring_all_reduce_bytes(flat.numel() * flat.element_size(), n)
            self._stats.count_bytes(nbytes)
            self._stats.add(dense_bytes=nbytes)
            return all_reduced(flat, self._group, finish)
        if self._beside is None:
            self._beside = Beside(self._group, flat.device, self._reducer, self._stats, another)
        of = Pass(self._steps.number if self._steps is not None and self._is_own_pass() else None, again=bool(were))
        encoded = self._beside.channel.encode(flat, names, numels, step, self._density_at(step), of)
        return self._beside.average(encoded, finish, self._numel)

    def _own_share(self, bucket, parameters, may_be_zero=False):
        """Leave in the bucket what this pass has added to gradients. Returns what was there of earlier passes of the
        same step, as (views of the bucket, tensors to be added again), or nothing."""
        if self._steps is None or not self._is_own_pass():
            return ()
        found = self._steps.take_in(parameters, may_be_zero)
        if not found:
            return ()
        views = bucket.gradients()
        were = [views[i] for i in found], list(found.values())
        torch._foreach_sub_(*were)
        return were

    def _ranks_with_data(self):
        """How many ranks the mean is over: all, but inside join(divide_by_initial_world_size=False).

        There the ranks ask each other, once a pass: DDP has counted them too, and tells its C++ part only.
        """
        n, ddp = self._group.size(), None if self._ddp is None else self._ddp()
        if ddp is None or not ddp._join_config.enable or getattr(ddp, "_divide_by_initial_world_size", True):
            return n
        mine = torch.tensor([self._is_own_pass()], dtype=torch.int32, device="cpu")
        self._stats.count_bytes((n - 1) * mine.element_size())
        return int(self._gather_numbers(mine).sum()) or n

    def _is_own_pass(self):
        """Whether this rank is in a backward pass. One that has run out of data stands in from join(), which calls the
        hook outside of any, and no step will follow."""
        return torch._C._current_graph_task_id() != -1

    def _parameters_of(self, bucket, parameters):
        """Names and numels, in order.

        DDP's buckets hold what was trainable when it was made. What was frozen when this was opened, and without a
        module everything, gets its name when a bucket first shows it: in the same order on every rank.
        """
        key = tuple(map(id, parameters))  # of tensors that _names keeps
        if key in self._known:
            return self._known[key]
        new = [p for p in parameters if p not in self._names]
        if new:
            found = self._all_names()
            if self.module is None:
                _check_bucket(bucket)
                found = {p: f"#{i}" for i, p in enumerate(new, len(self._names))}
                for p, name in found.items():
                    check_gradient(name, p)
            if any(p not in found for p in new):
                raise RuntimeError("this HookState belongs to another DistributedDataParallel: make one for each "
                                   "model, with the module that it wraps")  # fmt: skip
            self._know({p: found[p] for p in new})
        if len(self._known) >= BUCKETS_KEPT:
            self._known.clear()
        self._known[key] = tuple(self._names[p] for p in parameters), tuple(p.numel() for p in parameters)
        return self._known[key]

    def _know(self, names):
        """These parameters are DDP's too."""
        new = {p: name for p, name in names.items() if p not in self._names}
        self._names |= new
        self._numels |= {name: p.numel() for p, name in new.items()}
        self._numel = sum(self._numels.values())
        if self._steps is not None:
            for p, name in new.items():
                self._steps.watch(p, name)

    def _all_names(self):
        """Of every parameter of the module, whether it is trainable now or not."""
        return {} if self.module is None else parameter_names(self.module, self._ignored, frozen=True)

    def _require_names(self, what):
        if self.module is None:
            raise RuntimeError(
                f"{what}: this HookState was given no module, so it has no names of parameters to keep a state by: "
                "give it the model that DDP wraps, HookState(method, model)"
            )

    def _gather_numbers(self, values):
        if self._group.size() == 1:
            return values[None]
        device = next(iter(self._names)).device  # NCCL gathers what is on its device only
        return gather_now(values.to(device), self._group)

    def _gather_objects(self, thing):
        return gather_objects(thing, self._group)


def _finishing(factor, were):
    """What is left to do with an average: see HookState._exchange."""
    if factor == 1 and not were:
        return None

    def finish(flat):
        if factor != 1:
            flat *= factor
        if were:
            torch._foreach_add_(*were)

    return finish


def _names_in(shards):
    """Parameters of which the shards of a state hold something."""
    kept = [tensors for shard in shards for tensors in shard["memory"].values()]
    late = [one["tensors"] for shard in shards for one in shard.get("late", ())]
    return {name for tensors in kept + late for name in tensors}


def _check_bucket(bucket):
    """Raise TypeError for what check_module refuses, where there is no module to ask."""
    if bucket.buffer().is_sparse:
        raise TypeError("a gradient is sparse: make its module with sparse=False: thinwire needs dense ones")
