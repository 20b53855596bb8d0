"""The front door for DistributedDataParallel: gradients averaged bucket by bucket, inside the backward pass."""

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from thinwire.core.channel import Channel
from thinwire.core.exchange import gather_now, gather_objects
from thinwire.ddp.mount import Occupant, Seat, completed, mount, restore_copied
from thinwire.methods import Method
from thinwire.state.cautions import caution
from thinwire.state.checks import check_model, check_module, check_momentum, check_optimizer_type
from thinwire.state.gradients import GradientHandle
from thinwire.state.names import parameter_names

_log = logging.getLogger("thinwire")


def attach_hook(ddp, method: Method, optimizer, **options) -> "HookState":
    """See ``thinwire.attach``."""
    state = HookState(method, getattr(ddp, "module", None), **options)
    check_model(ddp)
    check_optimizer_type(optimizer)
    check_momentum(method, optimizer)
    caution(method, optimizer, ddp.process_group.size())
    restore_copied(ddp)
    state.bind(ddp)
    mount(ddp, state)
    return state


class HookState(Occupant, GradientHandle):
    """A method at work on one DDP model: the state of the hook, and the handle that ``attach`` returns.

    To register it by hand: ``ddp.register_comm_hook(thinwire.HookState(method, model), thinwire.hook)``, for loops
    that make the DistributedDataParallel themselves and take a hook and its state. module: what it wraps, whose
    parameters' names the state is kept by. process_group: the one that it was given, the default one if none. Then
    nothing checks the optimizer: with error feedback see to it yourself that its momentum is 0.
    """

    def __init__(self, method: Method, module: torch.nn.Module, *, process_group: dist.ProcessGroup | None = None,
                 grad_scaler: torch.amp.GradScaler | None = None, consistency_every: int = 0, log: Any = None,
                 runs: Method | None = None):  # fmt: skip
        super().__init__(method, grad_scaler, consistency_every, log, runs)
        if isinstance(module, DistributedDataParallel):
            raise TypeError("HookState got a DistributedDataParallel as its module: pass the model that it wraps, "
                            "ddp.module, or call thinwire.attach(ddp, method)")  # fmt: skip
        self.module = module
        self.seat = Seat(self)
        self._group = process_group
        self._ignored = tuple(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))  # where DDP looks
        self._names: dict[torch.Tensor, str] | None = None

    @property
    def group(self) -> dist.ProcessGroup:
        return dist.group.WORLD if self._group is None else self._group

    def bind(self, ddp: DistributedDataParallel) -> None:
        """Take the process group from the model."""
        self._group, self._ignored = ddp.process_group, tuple(ddp.parameters_to_ignore)
        self._open()

    def _open(self) -> None:
        """Make what is needed to average; the process groups of the job are there."""
        self._group = self.group
        self._names = parameter_names(self.module, self._ignored)
        numels = {name: parameter.numel() for parameter, name in self._names.items()}
        try:
            self._start(numels, self._group.rank(), self._group.size())
        except ValueError:  # a state that was waiting for the model does not fit
            self._names = None
            raise
        self._channel = Channel(self._group, self._reducer, self._stats)
        if self._group.size() == 1 and self._block_sparse.momentum:
            _log.warning("thinwire: on one rank nothing is averaged and no memory is kept, so there is no momentum "
                         "either: momentum=%g acts from two ranks on", self._block_sparse.momentum)  # fmt: skip

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        if self._names is None:  # it was registered by hand
            check_module(self.module, self._ignored)
            self._open()
            caution(self.method, None, self._group.size())
        self._agree(self._gather_objects)
        if bucket.index() == 0:
            self._channel.forget()
            self._begin_step()
        step = self._step
        self._note_gradient(bucket.buffer(), step)
        if bucket.is_last():
            self._step += 1
            self._stats.steps += 1
        if self._group.size() == 1:
            return completed(bucket.buffer())
        return self._exchange(bucket, step)

    def _release(self):
        super()._release()
        self.seat.leave()

    def _in_memory(self):
        names = parameter_names(self.module, self._ignored) if self._names is None else self._names
        return {name: p for p, name in names.items() if not is_lazy(p)}

    def _exchange(self, bucket, step):
        return self._channel.average(bucket.buffer(), *self._parameters_of(bucket), step, self._density_at(step))

    def _parameters_of(self, bucket):
        """Names and numels, in order."""
        parameters = bucket.parameters()
        if any(p not in self._names for p in parameters):
            raise RuntimeError("this HookState belongs to another DistributedDataParallel: make one for each model, "
                               "with the module that it wraps")  # fmt: skip
        return tuple(self._names[p] for p in parameters), tuple(p.numel() for p in parameters)

    def _gather_numbers(self, values):
        device = next(iter(self._names)).device  # NCCL gathers what is on its device only
        return gather_now(values.to(device), self._group)

    def _gather_objects(self, thing):
        return gather_objects(thing, self._group)
