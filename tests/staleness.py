"""Seeded delays on averaged gradients: what asynchrony does to training, on one machine and always the same.

    injector = StalenessInjector(ddp, max_delay=4, seed=0)
    ddp.register_comm_hook(injector, staleness.hook)

No "from __future__ import annotations" here: DDP inspects the hook's annotations and refuses strings.
"""

import hashlib
from numbers import Integral

import torch
import torch.distributed as dist
from thinwire.state.names import parameter_names
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook


def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The communication hook whose state a StalenessInjector is."""
    return state.reduce(bucket)


class StalenessInjector:
    """Averages gradients, and lets each parameter's average of step t into the gradient of step t + r only.

    r is uniform on 0 .. max_delay, drawn for every step and parameter from a hash of (seed, step, parameter's name),
    as in Dai et al. (1810.03264), where an update is seen up to s steps late. A step is one that communicates: those
    under ``no_sync`` do not count. Averages that become due together are added in the order of their steps.

    ddp: the model that it will be registered with. max_delay: in steps, at least 0; 0 changes no bit. inner: state
    and hook that average, such as ``(HookState(method, model), hook)``; by default a plain all-reduce.
    common: delays are the same on all ranks, so replicas stay equal; or else each rank draws its own, replicas
    differ by what is under way to them, and are equal again, to rounding, when that has been delivered.

    Where DDP leaves gradients of unused parameters alone (find_unused_parameters, static_graph), it would drop what
    is due to them: a parameter whose average is zero everywhere then gets nothing in that step, and what is due waits
    for a step that uses it. Raises TypeError or ValueError for a max_delay that cannot be.
    """

    def __init__(self, ddp, max_delay: int, seed: int = 0, inner=None, common: bool = True):
        if isinstance(max_delay, bool) or not isinstance(max_delay, Integral):
            raise TypeError(f"StalenessInjector(max_delay={max_delay!r}): expected a number of steps")
        if max_delay < 0:
            raise ValueError(f"StalenessInjector(max_delay={max_delay}): expected at least 0")
        self.max_delay, self.seed = max_delay, seed
        self.step = 0
        self._rank = None if common else dist.get_rank(ddp.process_group)
        self._names = parameter_names(ddp.module, ddp.parameters_to_ignore)
        self._shapes = {name: parameter.shape for parameter, name in self._names.items()}
        # By name, as DDP moves parameters to other buckets after the first backward. Callbacks of several buckets run
        # at once, and each changes the lists of its own parameters only.
        self._held = {name: [] for name in self._shapes}
        self._may_be_unused = ddp.find_unused_parameters or ddp.static_graph
        self._inner, self._inner_hook = inner or (ddp.process_group, allreduce_hook)

    def delay(self, step: int, name: str) -> int:
        """By how many steps this parameter's average of a step is late."""
        key = f"{self.seed} {step} {'' if self._rank is None else self._rank} {name}"
        drawn = hashlib.blake2b(key.encode(), digest_size=8).digest()
        return int.from_bytes(drawn, "little") % (self.max_delay + 1)

    def pending(self) -> dict[str, torch.Tensor]:
        """The sum of what is held for each parameter, in its shape; parameters without any are left out."""
        return {
            name: torch.stack([grad for _, grad in held]).sum(0).view(self._shapes[name])
            for name, held in self._held.items() if held
        }  # fmt: skip

    def flush(self) -> dict[str, torch.Tensor]:
        """As :meth:`pending`, and nothing is held any more: whoever calls it delivers."""
        found = self.pending()
        for held in self._held.values():
            held.clear()
        return found

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Average one bucket and exchange the average for what is due; the body of the hook."""
        step, parameters = self.step, bucket.parameters()
        self.step += bucket.is_last()

        def exchange(future):  # local work only: a collective in here would deadlock on Gloo
            flat = future.value()
            start = 0
            for parameter in parameters:
                self._exchange(self._names[parameter], step, flat[start : start + parameter.numel()])
                start += parameter.numel()
            return flat

        return self._inner_hook(self._inner, bucket).then(exchange)

    def _exchange(self, name, step, grad):
        if self._may_be_unused and not grad.any():
            return
        held, delay = self._held[name], self.delay(step, name)
        due = [late for due_at, late in held if due_at <= step]
        held[:] = [(due_at, late) for due_at, late in held if due_at > step]
        if delay:
            held.append((step + delay, grad.clone()))
            grad.zero_()
        elif due:  # in the order of their steps: this one's comes last
            due.append(grad.clone())
            grad.zero_()
        for late in due:
            grad += late
