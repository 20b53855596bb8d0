"""Measure a user's own step without communication, and leave no trace of it.

Gradients are computed with ``torch.autograd.grad`` under DDP's ``no_sync()``: DDP cannot unregister a hook, so no noop
hook can be lent to it, and its reducer listens to every ``.backward()``, also under ``no_sync()`` (with static_graph it
counts them). This way it hears nothing, no ``.grad`` is touched and no post-accumulate hook runs. What is missing
against a step with a noop hook is DDP's copying of gradients into its buckets and back, which is measured apart.
"""

import contextlib
import copy
import inspect
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from thinwire.advice.rehearsal import clock

SKIPPED = 2  # steps that warm up caches and allocators
WATCHED = 2  # steps more, in which every gradient's arrival is noted, which disturbs the time of the whole

# DDP's flags with which it neither broadcasts buffers nor begins its first step under static_graph.
_QUIET = {"require_forward_param_sync": False, "_static_graph_delay_allreduce_enqueued": True}


@dataclass
class OwnStep:
    """seconds: of each step. ready: of the time until the last gradient, the share after which each parameter's was
    there, by name; backward_share: that time as a share of the step. gradients: the last ones, by name."""

    seconds: list[float]
    ready: dict[str, float]
    backward_share: float
    gradients: dict[str, torch.Tensor]


def measure(ddp, make_batch: Callable, loss_fn: Callable, optimizer, names: dict[torch.Tensor, str], steps: int,
            device: torch.device) -> OwnStep:  # fmt: skip
    """Run steps on this rank alone. names: of the parameters whose gradients count. No collective of ours."""
    parameters = list(names)
    with undisturbed(getattr(ddp, "_orig_mod", ddp), parameters, device):
        twin = None if optimizer is None else _twin(optimizer)

        def step():
            begin = clock(device)
            gradients = _gradients(loss_fn(ddp, make_batch()), parameters)
            between = clock(device)
            if twin is not None:
                for parameter, gradient in zip(parameters, gradients):
                    if parameter in twin.copies:
                        twin.copies[parameter].grad = gradient
                twin.step()
            return begin, between, clock(device), gradients

        for _ in range(SKIPPED):
            step()
        seconds = []
        for _ in range(steps):
            begin, _, end, _ = step()
            seconds.append(end - begin)
        ready, shares = {name: [] for name in names.values()}, []
        for _ in range(WATCHED):
            arrived = {}
            with _watching(parameters, lambda i: arrived.update({i: clock(device)})):
                begin, between, end, gradients = step()
            last = max(arrived.values(), default=between)
            shares.append((last - begin) / (end - begin))
            for i, name in enumerate(names.values()):
                ready[name].append((arrived.get(i, begin) - begin) / max(last - begin, 1e-9))
    found = {name: torch.zeros_like(p) if g is None else g.detach() for (p, name), g in zip(names.items(), gradients)}
    return OwnStep(seconds, {name: statistics.mean(times) for name, times in ready.items()}, statistics.mean(shares),
                   found)  # fmt: skip


@contextlib.contextmanager
def undisturbed(ddp, parameters: list[torch.Tensor], device: torch.device) -> Iterator[None]:
    """Put back what a forward pass changes: buffers (the tensors, and what was in them), DDP's own flags, and the
    state of the random generators. What else a module keeps, in attributes of Python, stays as the pass leaves it."""
    registered = [(m._buffers, dict(m._buffers)) for m in ddp.module.modules() if isinstance(m._buffers, dict)]
    values = {buffer: buffer.detach().clone() for buffer in ddp.module.buffers()}
    hooks = {p: p._backward_hooks for p in parameters}
    flags = {name: getattr(ddp, name) for name in _QUIET if hasattr(ddp, name)}
    with generators_kept():
        try:
            for name in flags:
                setattr(ddp, name, _QUIET[name])
            with ddp.no_sync():
                yield
        finally:
            for name, value in flags.items():
                setattr(ddp, name, value)
            for p, before in hooks.items():
                if before is None:
                    p._backward_hooks = None
            for buffers, before in registered:
                buffers.clear()
                buffers.update(before)
            with torch.no_grad():
                for buffer, before in values.items():
                    buffer.copy_(before)


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Put the global random generators back: PyTorch's of the CPU and, where CUDA is in use, of its devices, Python's,
    and NumPy's if it is in use."""
    python, numpy = random.getstate(), sys.modules.get("numpy")
    before = None if numpy is None else numpy.random.get_state()
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        random.setstate(python)
        if before is not None:
            numpy.random.set_state(before)


def _gradients(loss, parameters):
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        is_tensor = isinstance(loss, torch.Tensor)
        found = f"a tensor of shape {list(loss.shape)}" if is_tensor else f"a {type(loss).__name__}"
        raise TypeError(f"loss_fn(ddp, batch) gave {found}: it must return the loss, a tensor of one element")
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    if any(gradient is not None and gradient.layout != torch.strided for gradient in gradients):
        raise TypeError("a gradient is sparse: thinwire needs dense ones")
    return gradients


@contextlib.contextmanager
def _watching(parameters, note):
    # What note gives is None, or autograd would take it for the gradient.
    handles = [p.register_hook(lambda gradient, i=i: note(i)) for i, p in enumerate(parameters)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _twin(optimizer):
    """A copy of the optimizer with parameters and state of its own, to time its steps. ``copies`` is by parameter."""
    memo = {}
    twin = copy.deepcopy(optimizer, memo)
    twin.copies = {p: memo[id(p)] for group in optimizer.param_groups for p in group["params"]}
    return twin


def check_steps(optimizer: torch.optim.Optimizer) -> None:
    """Raise TypeError where a step cannot be timed by itself."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise TypeError(f"advise(optimizer={type(optimizer).__name__}): its step needs a closure that computes losses, "
                        "as often as it likes, so there is no step to predict; ask without optimizer=")  # fmt: skip
