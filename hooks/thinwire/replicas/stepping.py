"""Calls back when an optimizer has made its step, or makes the step piece by piece; skipped steps too."""

from typing import Any

import torch

# Each parameter's step depends on that parameter alone, so they can be stepped in pieces.
ELEMENTWISE = (
    "SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD",
)  # fmt: skip


def check_steps_in_pieces(optimizer: torch.optim.Optimizer) -> None:
    """Raise TypeError for an optimizer that is not known to treat its parameters one by one."""
    kind = type(optimizer)
    if not (kind.__module__.startswith("torch.optim") and kind.__name__ in ELEMENTWISE):
        raise TypeError(
            f"DivideAndShuffle(overlap='bucket') steps the parameters piece by piece, which is known to be right for "
            f"torch.optim's {', '.join(ELEMENTWISE)}, and this is {kind.__module__}.{kind.__qualname__}: use "
            "overlap='none' or 'delayed'"
        )


class StepHooks:
    """Hooks on one optimizer. listener: the Replicas, whose ``stepped`` is called after every step; or
    in_pieces, ``pieces_to_step`` and ``pieces_stepped``. grad_scaler: a step that it skips counts as a step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, listener: Any, in_pieces: bool,
                 grad_scaler: torch.amp.GradScaler | None = None):  # fmt: skip
        self._optimizer, self._listener, self._in_pieces = optimizer, listener, in_pieces
        self._params: list[list[torch.Tensor]] | None = None
        self._called = 0
        self._before_handle = optimizer.register_step_pre_hook(self._before)
        self._after_handle = optimizer.register_step_post_hook(self._after)
        self._scaler = grad_scaler
        if grad_scaler is not None:
            self._scalers_own = "step" not in grad_scaler.__dict__  # and not another model's wrapper
            self._scalers_step = grad_scaler.step
            grad_scaler.step = self._scaler_step  # type: ignore[method-assign]

    def remove(self) -> None:
        self._before_handle.remove()
        self._after_handle.remove()
        scaler, self._scaler = self._scaler, None  # a wrapper around ours may stay, and ours then only passes on
        if scaler is not None and scaler.__dict__.get("step") == self._scaler_step:
            if self._scalers_own:
                del scaler.step
            else:
                scaler.step = self._scalers_step  # type: ignore[method-assign]

    def _before(self, optimizer, args, kwargs):
        self._restore()  # where the step before failed
        if not self._in_pieces or any(one is not None for one in (*args[1:], *kwargs.values())):
            return  # a closure computes the gradients only now
        if next(reversed(optimizer._optimizer_step_pre_hooks)) != self._before_handle.id:
            raise RuntimeError(
                "DivideAndShuffle(overlap='bucket') makes the optimizer's step in its own step pre-hook, and another "
                "was registered after it, which would come too late: register it before thinwire.attach, or use "
                "overlap='none'"
            )
        groups = optimizer.param_groups
        self._params = [group["params"] for group in groups]
        step = type(optimizer).step
        step = getattr(step, "__wrapped__", step)  # without the hooks, which have been called for the whole step
        ours = set()
        try:
            for piece in self._listener.pieces_to_step():
                chosen = {id(parameter) for _, parameter in piece}
                ours |= chosen
                self._restrict(lambda p, chosen=chosen: id(p) in chosen)
                step(optimizer)
        except BaseException:
            self._restore()
            raise
        self._restrict(lambda p: id(p) not in ours)  # what is not the model's: the step that follows

    def _after(self, optimizer, args, kwargs):
        self._called += 1
        if self._params is None:
            self._listener.stepped()
            return
        self._restore()
        self._listener.pieces_stepped()

    def _scaler_step(self, optimizer, *args, **kwargs):
        before = self._called
        result = self._scalers_step(optimizer, *args, **kwargs)
        ours = self._scaler is not None and getattr(optimizer, "optimizer", optimizer) is self._optimizer
        if ours and self._called == before:
            self._listener.stepped()
        return result

    def _restrict(self, keep):
        """Leave the optimizer those parameters for which keep is true."""
        for group, params in zip(self._optimizer.param_groups, self._params):
            group["params"] = [p for p in params if keep(p)]

    def _restore(self):
        for group, params in zip(self._optimizer.param_groups, self._params or ()):
            group["params"] = params
        self._params = None
