# No "from __future__ import annotations" here: DDP inspects the hook's annotations and refuses strings.
"""DDP takes one hook, once, and keeps it for good. What stands behind that hook can end, and another can follow."""

import logging

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

_log = logging.getLogger("thinwire")


def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """PyTorch's hook, for ``ddp.register_comm_hook(thinwire.HookState(method, model), thinwire.hook)``."""
    return state.take(bucket)


class Mounted:
    """What DDP has as the state of its hook. One verb, ``reduce``: the future of what DDP is to take for a bucket.

    Once it is closed, DDP's buckets are averaged whole, as without a hook, until something else follows in its place.
    """

    closed = False
    _follower: "Mounted | None" = None

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        raise NotImplementedError

    @property
    def group(self) -> dist.ProcessGroup:
        """DDP's process group."""
        raise NotImplementedError

    @property
    def vacant(self) -> bool:
        """Whether nothing is at work behind the hook, so that something may follow."""
        return self.closed if self._follower is None else self._follower.vacant

    def take(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """``reduce``, by what is at work now."""
        if self._follower is not None:
            return self._follower.take(bucket)
        return _averaged_whole(bucket, self.group) if self.closed else self.reduce(bucket)

    def __reduce__(self):
        return Copied, ()


class Copied(Mounted):
    """What is copied or unpickled of any of them: nothing, for PyTorch copies hooks and never calls the copies."""

    is_copy = True

    def __init__(self):
        _log.warning("thinwire: a DistributedDataParallel with a hook was copied or unpickled. PyTorch never calls the "
                     "hook of the copy, so if you train it, it averages whole gradients: call thinwire.attach on it, "
                     "which starts without memory.")  # fmt: skip


def mount(ddp: DistributedDataParallel, state: Mounted) -> None:
    """Put a state behind the model's hook: check_model has seen that there is none, or one that was closed."""
    for _, first in ddp._comm_hooks:
        if isinstance(first, Mounted) and first.vacant:
            first._follower = state
            return
    ddp.register_comm_hook(state, hook)


def completed(value: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    """A future that is done."""
    future = torch.futures.Future()
    future.set_result(value)
    return future


def _averaged_whole(bucket, group):
    """What DDP does without a hook."""
    flat = bucket.buffer().div_(group.size())
    return dist.all_reduce(flat, group=group, async_op=True).get_future().then(lambda future: _done(future, flat))


def _done(future, flat):
    future.value()  # raises if the collective failed; what it holds differs between backends
    return flat
