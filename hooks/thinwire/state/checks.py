"""What cannot work is refused before training starts, with the reason and the way out."""

from collections.abc import Container
from typing import Any

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from thinwire.methods import BlockSparse, Method


def check_model(ddp: Any, hook_allowed: bool = False) -> None:
    """Raise TypeError or ValueError where the model cannot be given the hook."""
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(
            f"attach got a {type(ddp).__name__}: it must be a DistributedDataParallel; wrap the model first: "
            "attach(DistributedDataParallel(model), ...)"
        )
    dead = lambda state: getattr(state, "is_copy", False) or getattr(state, "vacant", False)
    live = [(hook, state) for hook, state in ddp._comm_hooks if not dead(state)]
    if live and not hook_allowed:
        names = [_name_of(hook) for hook, _ in live]
        raise ValueError(
            f"this DistributedDataParallel already has a communication hook ({', '.join(names)}); DDP allows one. " +
            ("To change thinwire's method, call close() on the handle that attach returned, and attach again"
             if names == ["thinwire's"] else "Take out what registers it, and wrap the model anew")
        )  # fmt: skip
    if any(isinstance(part, DistributedDataParallel) for part in ddp.module.modules()):
        raise ValueError(
            "there is a DistributedDataParallel inside this one: each averages the same gradients: wrap the model once"
        )
    if getattr(ddp, "_use_python_reducer", False):
        raise ValueError(
            "under torch._dynamo.config.optimize_ddp = 'python_reducer' DistributedDataParallel gives its hook single "
            "parameters and drops what the hook returns: set it to 'ddp_optimizer' or 'no_optimization' before the "
            "model is wrapped"
        )
    if getattr(ddp, "mixed_precision", None) is not None:
        raise ValueError(
            "DistributedDataParallel(mixed_precision=...) registers a communication hook of its own; use "
            "torch.autocast instead, and wire_dtype for fewer bytes"
        )
    check_module(ddp.module, ddp.parameters_to_ignore)


def check_module(module: torch.nn.Module, ignored: Container[str]) -> None:
    """Raise TypeError or ValueError where what DDP wraps has gradients that cannot be averaged. ignored: names."""
    for name, parameter in module.named_parameters():
        if name in ignored:
            continue
        check_gradient(name, parameter)
        if hasattr(parameter, "_in_backward_optimizers"):
            raise ValueError(f"parameter {name!r} has its optimizer in the backward pass, which takes DDP's only hook")
    for name, part in module.named_modules():
        if f"{name}.weight" in ignored:
            continue
        if getattr(part, "sparse", False) and isinstance(part, (torch.nn.Embedding, torch.nn.EmbeddingBag)):
            raise TypeError(
                f"module {name!r} has sparse gradients; make it with sparse=False: thinwire needs dense ones"
            )


def _name_of(hook):
    module = getattr(hook, "__module__", None) or ""
    return "thinwire's" if module.startswith("thinwire.") else getattr(hook, "__qualname__", str(hook))


def check_gradient(name: str, parameter: torch.Tensor) -> None:
    """Raise TypeError where a parameter's gradient is of a kind that cannot be averaged."""
    if parameter.is_complex():
        raise TypeError(f"parameter {name!r} is {parameter.dtype}: thinwire averages real gradients only")


def check_optimizer_type(optimizer: Any) -> None:
    """Raise TypeError for what is given as an optimizer and is none of PyTorch's kind."""
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer is {_shown(optimizer)}: it must be a torch.optim.Optimizer; of several give one, and leave it "
            "out where it is another kind"
        )


def check_grad_scaler(grad_scaler: Any, steps: bool = False) -> None:
    """Raise TypeError for what is given as a GradScaler and is none, nor works like one. steps: whether its ``step`` is
    needed too."""
    needed = ("get_scale", "is_enabled") + (("step",) if steps else ())
    callables = all(callable(getattr(grad_scaler, name, None)) for name in needed)
    if grad_scaler is not None and (isinstance(grad_scaler, type) or not callables):
        raise TypeError(
            f"grad_scaler is {_shown(grad_scaler)}: it must be a torch.amp.GradScaler, or have its "
            f"{', '.join(needed[:-1])} and {needed[-1]}; leave it out where the loss is not scaled"
        )


def _shown(thing):
    return f"the class {thing.__name__}" if isinstance(thing, type) else f"a {type(thing).__name__}"


def check_closure(method: Method, optimizer: torch.optim.Optimizer | None) -> None:
    """Raise TypeError for an optimizer that compares gradients with each other, where blocks of them are left out."""
    if isinstance(optimizer, torch.optim.LBFGS) and isinstance(method, BlockSparse):
        raise TypeError(
            "LBFGS takes the curvature from differences of gradients, and with BlockSparse those differ by which "
            "blocks are sent: use thinwire.Dense(), or another optimizer"
        )


def check_momentum(method: Method, optimizer: torch.optim.Optimizer | None) -> None:
    """Raise ValueError where both the method and the optimizer would keep momentum, or that cannot be seen."""
    momentum = getattr(method, "momentum", 0.0)
    if not momentum:
        return
    if optimizer is None:
        raise ValueError(
            f"BlockSparse(momentum={momentum}) keeps the momentum itself: pass optimizer=, so that it can be seen "
            "that the optimizer keeps none"
        )
    for i, group in enumerate(optimizer.param_groups):
        own = group.get("momentum") or (group["betas"][0] if "betas" in group else 0.0)
        if own:
            raise ValueError(
                f"BlockSparse(momentum={momentum}) keeps the momentum, and {type(optimizer).__name__}'s parameter "
                f"group {i} has {own} of its own: set the optimizer's to 0, or the method's"
            )


def check_followed(optimizer: Any, parameters: list[tuple[str, torch.Tensor]], why: str) -> None:
    """Raise TypeError or ValueError for an optimizer whose steps nobody can follow. parameters: (name, p) that it must
    step on every rank. why: it is needed."""
    if optimizer is None:
        raise ValueError(f"{why}: pass optimizer=")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}: it must be a torch.optim.Optimizer")
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        raise TypeError("ZeroRedundancyOptimizer steps each parameter on one rank only: use the optimizer inside it")
    check_owned(optimizer, parameters)


def check_owned(optimizer: torch.optim.Optimizer, parameters: list[tuple[str, torch.Tensor]]) -> None:
    """Raise ValueError where some of the parameters, (name, p), are not the optimizer's."""
    owned = {id(p) for param_group in optimizer.param_groups for p in param_group["params"]}
    missing = [name for name, p in parameters if id(p) not in owned]
    if missing:
        raise ValueError(
            f"the optimizer does not own {len(missing)} of the model's {len(parameters)} trainable parameters "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}): give it model.parameters(), after the "
            "model is where it stays"
        )
