"""Where one backward pass of a DDP model ends and the next one begins, seen from the buckets that its hook is given."""

from collections.abc import Callable

import torch
import torch.distributed as dist


class Passes:
    """Calls ``begin`` before the first bucket of every pass, and ``end`` after its last.

    DDP gives buckets in the order of their index, the last one saying that it is. But with
    skip_all_reduce_unused_params it leaves out those that no rank uses, the first and the last of a pass too: ``may_skip``.
    Then the pass is over when autograd has run through it, and that is before DDP waits for any bucket.
    """

    def __init__(self, begin: Callable[[], None], end: Callable[[], None], may_skip: bool = False):
        self._begin, self._end = begin, end
        self._may_skip = may_skip
        self._last: int | None = None  # index of the pass's last bucket so far; None between passes

    def comes(self, bucket: dist.GradBucket) -> None:
        """Call it first in the hook's body."""
        if self._last is None or bucket.index() <= self._last:  # the pass before broke off
            self._begin()
            if self._may_skip and torch._C._current_graph_task_id() != -1:  # none in what join() sends for a rank
                torch.autograd.Variable._execution_engine.queue_callback(self._over)
        self._last = bucket.index()

    def has_gone(self, bucket: dist.GradBucket) -> None:
        """Call it last."""
        if bucket.is_last():
            self._over()

    def _over(self):
        if self._last is not None:
            self._last = None
            self._end()
