# No "from __future__ import annotations" here: DDP inspects the hook's annotations and refuses strings.
"""DDP takes one hook, once, and keeps its state for good: a seat, which one can leave and another take."""

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from thinwire.core.ends import Callback

_log = logging.getLogger("thinwire")


def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """PyTorch's hook, for ``ddp.register_comm_hook(thinwire.HookState(method, model), thinwire.hook)``."""
    return state.take(bucket)


class Occupant:
    """What averages the buckets of one DDP model. One verb, ``reduce``: the future of what DDP is to take for one.

    seat: its place behind the model's hook. gone: it can do nothing any more and holds the seat for nobody.
    """

    seat: "Seat"
    is_copy = False

    @property
    def gone(self) -> bool:
        return False

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        raise NotImplementedError

    @property
    def group(self) -> dist.ProcessGroup:
        """DDP's process group."""
        raise NotImplementedError

    # ---- what DDP calls, and asks, of a state that was registered by hand ----

    def take(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        return self.seat.take(bucket)

    @property
    def vacant(self) -> bool:
        return self.seat.vacant

    def __reduce__(self):
        return self.seat.__reduce__()


class Seat:
    """The state of a model's hook. Where nobody has the seat, buckets are averaged whole, as without a hook."""

    is_copy = False

    def __init__(self, occupant: Occupant):
        self.occupant: Occupant | None = occupant
        self._group: dist.ProcessGroup | None = None

    @property
    def vacant(self) -> bool:
        """Whether another may take it."""
        return self.occupant is None or self.occupant.gone

    def take(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """The body of the hook."""
        if self.occupant is not None:
            return self.occupant.reduce(bucket)
        return all_reduced(bucket.buffer(), dist.group.WORLD if self._group is None else self._group)

    def leave(self) -> None:
        """The occupant has ended."""
        if self.occupant is not None:
            self._group, self.occupant = self.occupant.group, None

    def __reduce__(self):
        return Copied, (getattr(self.occupant, "broadcast_buffers", None),)


class Copied:
    """What is copied or unpickled of any of them: nothing, for PyTorch copies hooks and never calls the copies.

    broadcast_buffers: what the model's was before the method turned it off, None where none did.
    """

    is_copy = True

    def __init__(self, broadcast_buffers: bool | None = None):
        self.broadcast_buffers = broadcast_buffers
        _log.warning("thinwire: a DistributedDataParallel with a hook was copied or unpickled. PyTorch never calls the "
                     "hook of the copy, so if you train it, it averages whole gradients: call thinwire.attach on it, "
                     "which starts without memory.")  # fmt: skip


def mount(ddp: DistributedDataParallel, occupant: Occupant) -> None:
    """Give it the seat behind the model's hook: check_model has seen that there is none, or a vacant one."""
    for _, state in ddp._comm_hooks:
        seat = getattr(state, "seat", state)
        if isinstance(seat, Seat) and seat.vacant:
            seat.occupant, occupant.seat = occupant, seat
            return
    hooks = list(ddp._comm_hooks)
    try:
        ddp.register_comm_hook(occupant.seat, hook)
    except BaseException:  # PyTorch notes it before it registers it
        ddp._comm_hooks[:] = hooks
        raise


def restore_copied(ddp: DistributedDataParallel) -> None:
    """Undo what a method that was copied with the model had changed of it."""
    for _, state in ddp._comm_hooks:
        if isinstance(state, Copied) and state.broadcast_buffers is not None:
            ddp.broadcast_buffers, state.broadcast_buffers = state.broadcast_buffers, None


def completed(value: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    """A future that is done."""
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(value)
    return future


def all_reduced(flat: torch.Tensor, group: dist.ProcessGroup,
                finish: Callable[[torch.Tensor], None] | None = None
                ) -> torch.futures.Future[torch.Tensor]:  # fmt: skip
    """Average flat [N] as DDP does it without a hook, by the backend's all-reduce. finish: to be done with it then."""
    if not flat.numel():  # of nothing, nothing is sent
        return completed(flat)
    flat.mul_(1 / group.size())  # not div_: DDP multiplies, which gives other bits
    future = dist.all_reduce(flat, group=group, async_op=True).get_future()

    def done(future):
        future.value()  # raises if the collective failed; what it holds differs between backends
        if finish is not None:
            finish(flat)
        return flat

    return future.then(Callback(group, done))
