# No "from __future__ import annotations" here: DDP inspects the hook's annotations and refuses strings.
"""The front door for DistributedDataParallel: ``attach``, or ``register_comm_hook(HookState(...), hook)``."""

import gc
import logging

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from thinwire.channel import Channel
from thinwire.checks import check_model, check_momentum
from thinwire.ddp_replicas import attach_replicas
from thinwire.exchange import gather_now, gather_objects
from thinwire.handle import Handle
from thinwire.methods import DivideAndShuffle, Elastic, Method
from thinwire.names import parameter_names
from thinwire.replicas import Replicas

_log = logging.getLogger("thinwire")


def attach(ddp, method: Method, *, optimizer: torch.optim.Optimizer | None = None, grad_scaler=None,
           consistency_every: int = 0, log=None) -> "HookState | Replicas":  # fmt: skip
    """Make a DDP model average by ``method``. Call it once, on every rank, before the first backward.

    ddp: a DistributedDataParallel, or what torch.compile made of one. optimizer: needed where the method keeps
    momentum itself, to see that the optimizer keeps none; by DivideAndShuffle, which averages when it has made its
    step; and by Elastic, for the learning rates. grad_scaler: the torch.amp.GradScaler in use, if any: a memory is
    kept in step when the scale changes, and with DivideAndShuffle a step that one rank skips does not stop the others.
    consistency_every: measure the inconsistency every so many steps, as ``handle.consistency()`` does; 0 is never,
    and costs nothing. log: what gets the measurements on this rank, beside ``handle.consistency_log``: a TensorBoard
    ``SummaryWriter``, or a callable that takes the dictionary that ``handle.consistency()`` describes.

    Returns the handle, with ``stats()``, ``consistency()``, ``state_dict()`` and ``load_state_dict()``; of
    DivideAndShuffle it is a :class:`thinwire.replicas.Replicas`, with ``averaged_model()`` and ``finalize()``, and of
    Elastic an :class:`thinwire.elastic.ElasticState`, with ``drained()`` and ``finalize()``.
    Raises TypeError or ValueError for a model, method or optimizer that cannot work, before anything is changed.
    """
    ddp = getattr(ddp, "_orig_mod", ddp)
    if isinstance(method, DivideAndShuffle):
        return attach_replicas(ddp, method, optimizer, grad_scaler, consistency_every, log)
    options = {"grad_scaler": grad_scaler, "consistency_every": consistency_every, "log": log}
    if isinstance(method, Elastic):
        from thinwire.elastic import attach_elastic  # which is a HookState, so it imports this module

        return attach_elastic(ddp, method, optimizer, **options)
    state = HookState(method, **options)
    check_model(ddp)
    check_momentum(method, optimizer)
    state.bind(ddp)
    ddp.register_comm_hook(state, hook)
    return state


def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """PyTorch's communication hook, for ``ddp.register_comm_hook(thinwire.HookState(method), thinwire.hook)``."""
    return state.reduce(bucket)


class HookState(Handle):
    """A method at work on one DDP model: the state of the hook, and the handle that ``attach`` returns.

    Registered by hand, it finds its model at the first backward pass; then nothing can check the optimizer, so with
    ``momentum`` see to it yourself that the optimizer's is 0.
    """

    is_copy = False

    def __init__(self, method: Method, *, grad_scaler=None, consistency_every: int = 0, log=None,
                 runs: Method | None = None):  # fmt: skip
        super().__init__(method, grad_scaler, consistency_every, log, runs)
        self._names: dict[torch.Tensor, str] | None = None

    def __reduce__(self):
        """What copy and pickle make of it: the method alone, and a warning, because DDP copies hooks but does not
        call the copies."""
        return _copied, (type(self), self.method)

    def bind(self, ddp: DistributedDataParallel) -> None:
        """Take names, sizes and the process group from the model."""
        self._names = parameter_names(ddp.module, ddp.parameters_to_ignore)
        self._group = ddp.process_group
        numels = {name: parameter.numel() for parameter, name in self._names.items()}
        self._start(numels, self._group.rank(), self._group.size())
        self._channel = Channel(self._group, self._reducer, self._stats)
        if self._group.size() == 1 and self._block_sparse.momentum:
            _log.warning("thinwire: on one rank nothing is averaged and no memory is kept, so there is no momentum "
                         "either: momentum=%g acts from two ranks on", self._block_sparse.momentum)  # fmt: skip

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Average one bucket; the body of the hook."""
        if self._names is None:
            self.bind(_owner(self, bucket.parameters()[0]))
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
            return _completed(bucket.buffer())
        return self._exchange(bucket, step)

    def _exchange(self, bucket, step):
        return self._channel.average(bucket.buffer(), *self._parameters_of(bucket), step, self._density_at(step))

    def _parameters_of(self, bucket):
        """Names and numels, in order."""
        parameters = bucket.parameters()
        if parameters[0] not in self._names:
            raise RuntimeError("this HookState belongs to another DistributedDataParallel: make one for each model")
        return tuple(self._names[p] for p in parameters), tuple(p.numel() for p in parameters)

    def _gather_numbers(self, values):
        device = next(iter(self._names)).device  # NCCL gathers what is on its device only
        return gather_now(values.to(device), self._group)

    def _gather_objects(self, thing):
        return gather_objects(thing, self._group)


def _copied(kind, method):
    _log.warning("thinwire: a DistributedDataParallel with a hook was copied or unpickled. PyTorch never calls the "
                 "hook of the copy, so if you train it, it averages whole gradients: call thinwire.attach on it, which "
                 "starts without memory.")  # fmt: skip
    state = kind(method)
    state.is_copy = True
    return state


def _completed(value):
    future = torch.futures.Future()
    future.set_result(value)
    return future


def _owner(state, parameter):
    """The DDP model that registered this state: the hook is not told, and only the model knows names and group."""
    for thing in gc.get_objects():
        if issubclass(type(thing), DistributedDataParallel):
            registered = any(s is state for _, s in getattr(thing, "_comm_hooks", ()))
            if registered and any(p is parameter for p in thing.parameters()):
                check_model(thing, hooks_allowed=1)
                return thing
    raise RuntimeError("thinwire.hook was called for no DistributedDataParallel that registered its HookState")
