"""Calls back when an optimizer has made its step, or makes the step piece by piece; skipped steps too."""

from collections.abc import Callable
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
    """Hooks on one optimizer. listener: the handle, whose ``stepped`` is called after every step; or
    in_pieces, ``pieces_to_step`` and ``pieces_stepped``. grad_scaler: where it skips one, ``skip_step`` is.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, listener: Any, in_pieces: bool,
                 grad_scaler: torch.amp.GradScaler | None = None):  # fmt: skip
        self._optimizer, self._listener, self._in_pieces = optimizer, listener, in_pieces
        self._params: list[list[torch.Tensor]] | None = None
        self._called = 0
        self._before_handle = optimizer.register_step_pre_hook(self._before)
        self._after_handle = optimizer.register_step_post_hook(self._after)
        self._scaler: _Wrapped | None = None
        if grad_scaler is not None:
            try:
                self._scaler = _Wrapped(grad_scaler, self)
            except BaseException:
                self.remove()
                raise

    def remove(self) -> None:
        self._before_handle.remove()
        self._after_handle.remove()
        scaler, self._scaler = self._scaler, None
        if scaler is not None:
            scaler.unwrap()

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

    def scaled_step(self, step: Callable, optimizer: Any) -> Any:
        """Make a GradScaler's step; one that it skips counts too."""
        before = self._called
        result = step()
        if getattr(optimizer, "optimizer", optimizer) is self._optimizer and self._called == before:
            self._listener.skip_step()
        return result

    def _restrict(self, keep):
        """Leave the optimizer those parameters for which keep is true."""
        for group, params in zip(self._optimizer.param_groups, self._params):
            group["params"] = [p for p in params if keep(p)]

    def _restore(self):
        for group, params in zip(self._optimizer.param_groups, self._params or ()):
            group["params"] = params
        self._params = None


class _Wrapped:
    """A GradScaler whose ``step`` tells of steps that it skips. What is copied or pickled of it is a plain one.

    hooks: the StepHooks to tell, until ``unwrap``.
    """

    def __init__(self, scaler: Any, hooks: StepHooks):
        self._scaler = scaler
        self._hooks: StepHooks | None = hooks
        self._own = "step" not in scaler.__dict__  # and not another model's wrapper
        self._step_before = scaler.step
        scaler.step = self._step
        # Pickle and copy ask the object for it, an attribute of its own too. Of several wrappers the innermost answers.
        self._answers = not isinstance(getattr(scaler.__dict__.get("__getstate__"), "__self__", None), _Wrapped)
        if self._answers:
            self._state_before = getattr(scaler, "__getstate__", lambda: dict(scaler.__dict__))  # object's since 3.11
            scaler.__getstate__ = self._state

    def unwrap(self) -> None:
        """As it was, but where something was wrapped around this since: then this stays and only passes on."""
        self._hooks = None
        if self._scaler.__dict__.get("step") != self._step:
            return
        if self._own:
            del self._scaler.step
        else:
            self._scaler.step = self._step_before
        if self._answers:
            del self._scaler.__getstate__

    def _step(self, optimizer, *args, **kwargs):
        step = lambda: self._step_before(optimizer, *args, **kwargs)
        return step() if self._hooks is None else self._hooks.scaled_step(step, optimizer)

    def _state(self):
        state = {key: value for key, value in self._state_before().items() if key not in ("step", "__getstate__")}
        return state if self._own else state | {"step": self._step_before}
