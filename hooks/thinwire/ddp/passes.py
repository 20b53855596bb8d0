"""Where one backward pass of a DDP model ends and the next one begins, seen from the buckets that its hook is given."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


class Passes:
    """Which bucket begins a pass and which ends it.

    DDP gives buckets in the order of their index, the last one saying that it is. But with
    skip_all_reduce_unused_params (``may_skip``) it leaves out those that no rank uses, the first and the last of a pass
    too. Then the pass is over when autograd has run through it, which is before DDP waits for any bucket.
    """

    def __init__(self, may_skip: bool = False):
        self._may_skip = may_skip
        self._last: int | None = None  # index of the pass's last bucket so far; None between passes

    def begins(self, bucket: dist.GradBucket, end: Callable[[], None]) -> bool:
        """Whether a pass begins with this bucket. end: called where autograd alone knows that it is over."""
        begins = self._last is None or bucket.index() <= self._last  # the pass before broke off
        if begins and self._may_skip and torch._C._current_graph_task_id() != -1:  # none in what join() sends
            torch.autograd.Variable._execution_engine.queue_callback(lambda: end() if self._over() else None)
        self._last = bucket.index()
        return begins

    def ends(self, bucket: dist.GradBucket) -> bool:
        """Whether it was the last one of its pass; ask when it has been dealt with."""
        return bucket.is_last() and self._over()

    def _over(self):
        was_open, self._last = self._last is not None, None
        return was_open


def may_skip(ddp: DistributedDataParallel) -> bool:
    """Whether buckets can be left out; versions of PyTorch that cannot have no such attribute."""
    return ddp.find_unused_parameters and getattr(ddp, "skip_all_reduce_unused_params", False)
