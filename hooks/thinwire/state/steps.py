"""Which backward passes belong to a step of the optimizer: asked by all that remembers what passes gave it.

A gradient goes into a memory in the backward pass, and reaches the model in the optimizer's step. In between, loops
throw gradients away (another net's loss has left them there; they are too large; SAM's first pass), or take several
passes for one step. So a pass is *open* until its step is

- *taken*: the optimizer has stepped, with these gradients;
- *dropped*: they were cleared (``None``, or zeros) before a step, or the loop has said ``skip_step()``. Then nothing
  must remember them, and no step or pass may use what is left of them: until it is cleared it is *void*.

An open pass whose gradients are still there when the next backward pass begins is of the same step as that one, which
adds to them: its own share is what it finds in ``p.grad`` less what was there.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

# Times in a row that parameters may have changed, from pass to pass, without a step of the optimizer's: where it has
# made none at all, and where it has (a loop may make some steps by itself in between).
AT_FIRST, LATER = 5, 20
_SAMPLES, _SAMPLE = 16, 64  # parameters that are looked at for that, and elements of each


class Steps:
    """Watches the gradients of some parameters, and the optimizer where it is known.

    named: names by parameter. optimizer: None where it is not known: then nothing is ever found to be dropped, and
    what was cleared counts as taken, as it does for parameters that are not the optimizer's. drop and keep: called
    with names of parameters whose open passes are dropped or taken, and with the number of the step. dropped: called
    where that was all that was open, so that a step has been left out. apart: whether ``take_in`` must tell passes of
    one step apart, which costs a copy of the gradients.

    Raises RuntimeError out of a backward pass, on every rank that trains alike, where parameters change again and
    again and the optimizer makes no step: it is not the one that trains them.
    """

    def __init__(self, named: Mapping[torch.Tensor, str], optimizer: torch.optim.Optimizer | None,
                 drop: Callable[[set[str], int], None], keep: Callable[[set[str], int], None],
                 dropped: Callable[[], None] = lambda: None, apart: bool = True):  # fmt: skip
        self._optimizer = optimizer
        self._drop, self._keep, self._dropped, self._apart = drop, keep, dropped, apart
        self._number = 0
        self._named: dict[torch.Tensor, str] = {}
        # Whether its gradient may be zero without having been cleared.
        self._open: dict[torch.Tensor, bool | torch.Tensor] = {}
        self._found: dict[torch.Tensor, torch.Tensor] = {}  # what a parameter's next pass begins with
        self._in_pass: set[torch.Tensor] = set()
        self._void: set[torch.Tensor] = set()
        self._backward = -1  # the one that was looked at last, in autograd's numbers
        self._ignores = False
        self._refusal = ""
        self._lock = threading.Lock()
        self._alone = Alone(optimizer)
        self._weak = weakref.ref(self)
        self._handles: list = []
        if optimizer is not None:
            self._handles.append(optimizer.register_step_pre_hook(_before(self._weak)))
            self._handles.append(optimizer.register_step_post_hook(_stepping(self._weak)))
        for parameter, name in named.items():
            self.watch(parameter, name)

    @property
    def number(self) -> int | None:
        """Of the step that passes are for now; None where steps cannot be seen."""
        return None if self._optimizer is None else self._number

    def watch(self, parameter: torch.Tensor, name: str) -> None:
        """This parameter too."""
        self._named[parameter] = name
        if parameter.requires_grad:
            # What adds to its gradient in autograd's graph; DDP, and Horovod, keep it alive.
            node: Any = torch.autograd.graph.get_gradient_edge(parameter).node
            self._handles.append(node.register_prehook(_looking(self._weak)))

    def begin_pass(self) -> None:
        """A backward pass has begun whose gradients will be taken in; where one before broke off, that is dropped."""
        if self._in_pass:
            self._forget(set(self._in_pass), self._drop)
            self._in_pass.clear()
        self._backward = torch._C._current_graph_task_id()
        if not self._open:  # not a further pass of a step, between which loops may move parameters as they like
            self._alone.passes()

    def take_in(self, parameters: list[torch.Tensor],
                may_be_zero: bool | torch.Tensor = False) -> dict[int, torch.Tensor]:  # fmt: skip
        """The pass gives gradients of these parameters. Returns what was in them, of earlier passes of the same step,
        by place in the list: this pass's own is what is there less that.

        may_be_zero: what comes of it may be zero everywhere, so that zeros will not say that it was cleared; a 0-d bool
        is read only where that is asked.
        """
        found = {i: self._found.pop(p) for i, p in enumerate(parameters) if p in self._found}
        self._in_pass.update(parameters)
        self._open.update(dict.fromkeys(parameters, may_be_zero))
        return found

    def end_pass(self) -> None:
        """All gradients of the pass have been taken in."""
        self._in_pass.clear()

    def look(self) -> None:
        """Find out what has become of the open passes: those whose gradients have been cleared are dropped."""
        in_pass = self._in_pass if torch._C._current_graph_task_id() != -1 else ()  # outside of one, it has broken off
        before = {p: may_be_zero for p, may_be_zero in self._open.items() if p not in in_pass}
        cleared = _cleared(before)
        owned = _owned_by(self._optimizer) if cleared else set()
        self._forget(cleared & owned, self._drop)
        self._forget(cleared - owned, self._keep)
        if cleared & owned and not self._open and not self._alone.inside:
            self._dropped()

    @property
    def open(self) -> bool:
        """Whether a pass is."""
        return bool(self._open)

    def skip(self, void: bool = True) -> None:
        """The gradients of all open passes will not be used. void: nor may what is left of them."""
        was_open = self.open
        if void:
            self._void.update(self._open)
        self._forget(set(self._open), self._drop)
        if was_open:
            self._dropped()

    def forget(self) -> None:
        """What passes have given is no more: another state has been loaded."""
        for held in (self._open, self._found, self._in_pass):
            held.clear()

    @contextlib.contextmanager
    def refusing(self, why: str) -> Iterator[None]:
        """The optimizer must make no step: it raises RuntimeError that says why."""
        self._refusal = why
        try:
            yield
        finally:
            self._refusal = ""

    @contextlib.contextmanager
    def ignoring(self) -> Iterator[None]:
        """The optimizer makes steps that are none of the loop's."""
        before, self._ignores = self._ignores, True
        try:
            yield
        finally:
            self._ignores = before

    def close(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._alone.close()
        for held in (self._named, self._open, self._found, self._in_pass, self._void):
            held.clear()

    # ---- what the hooks call ----

    def refuse_void(self) -> None:
        """Raise RuntimeError where gradients that were dropped are still there, and would be used."""
        self._void -= _cleared(dict.fromkeys(self._void, False))
        if self._void:
            raise RuntimeError(
                f"{len(self._void)} gradients of a step that was skipped, by skip_step() or finalize(), are still "
                "there, and memory has dropped them: clear them first, as with optimizer.zero_grad()"
            )

    def backward_adds(self) -> None:
        """A backward pass, of whatever kind, is about to add to a gradient."""
        backward = torch._C._current_graph_task_id()
        if backward == self._backward:
            return
        with self._lock:  # autograd has a thread for each device, and none may add before all has been seen
            if backward != self._backward:  # of one, the first; reentrant checkpointing has several in one
                self.refuse_void()
                self.look()
                for p in self._open if self._apart else ():
                    if p not in self._in_pass and p not in self._found and p.grad is not None:
                        self._found[p] = p.grad.detach().clone()
            self._backward = backward

    def stepped(self) -> None:
        """The optimizer has made a step."""
        if self._ignores:
            return
        self._alone.stepped()
        mine = _owned_by(self._optimizer).intersection(self._open) if self._open else set()
        self._forget({p for p in mine if p.grad is None}, self._drop)
        self._forget({p for p in mine if p.grad is not None}, self._keep)
        self._number += 1

    def _forget(self, parameters, say):
        for p in parameters:
            self._open.pop(p, None)
            self._found.pop(p, None)
        if parameters and self.number is not None:
            say({self._named[p] for p in parameters}, self.number)


class Alone:
    """Notices that parameters change without the optimizer, pass after pass: it is not the one that trains them."""

    def __init__(self, optimizer: torch.optim.Optimizer | None):
        self._optimizer = optimizer
        self._handle = None if optimizer is None else optimizer.register_step_pre_hook(_entering(weakref.ref(self)))
        self._passes = self._changes = 0
        self._allowed = AT_FIRST
        self._seen: torch.Tensor | None = None
        self.inside = False

    def passes(self) -> None:
        """A backward pass begins."""
        self._passes += 1
        if self._optimizer is None or self.inside or self._passes == 1:
            return
        now = _sample(self._optimizer)
        if self._seen is not None and not torch.equal(now, self._seen):
            self._changes += 1
        self._seen = now
        if self._changes >= self._allowed:
            raise RuntimeError(
                f"the model's parameters have changed {self._changes} times since the last step of the "
                f"{type(self._optimizer).__name__} that was given as optimizer=, so another one trains them, or a "
                "wrapper that does not call its step(): give the optimizer whose step() the loop, or its wrapper, "
                "calls in the end; after replacing it call close() on the handle, and attach again with the new one"
            )

    def stepped(self) -> None:
        """The optimizer has made a step."""
        self._passes = self._changes = 0
        self._allowed, self._seen, self.inside = LATER, None, False

    def enters(self) -> None:
        """The optimizer begins a step: a closure may make passes in it."""
        self.inside = True

    def close(self) -> None:
        if self._handle is not None:
            self._handle.remove()


def check_own(optimizer: torch.optim.Optimizer | None, named: Mapping[torch.Tensor, str]) -> None:
    """Raise ValueError for an optimizer that owns none of these parameters: it is another model's."""
    if optimizer is None or not named:
        return
    owned = _owned_by(optimizer)
    if not any(p in owned for p in named):
        raise ValueError(
            f"the {type(optimizer).__name__} that was given as optimizer= owns none of the model's {len(named)} "
            "parameters: give the one that steps this model, made of its parameters after the model is where it stays"
        )


def _owned_by(optimizer):
    return {p for group in optimizer.param_groups for p in group["params"]} if optimizer is not None else set()


def _looking(weak):
    def look(gradients):
        steps = weak()
        if steps is not None and (steps._open or steps._void):
            steps.backward_adds()

    return look


def _before(weak):
    def before(optimizer, args, kwargs):
        steps = weak()
        if steps is None or steps._ignores:
            return
        if steps._refusal:
            raise RuntimeError(steps._refusal)
        if steps._void:
            steps.refuse_void()

    return before


def _stepping(weak):
    def stepped(optimizer, args, kwargs):
        if (steps := weak()) is not None:
            steps.stepped()

    return stepped


def _entering(weak):
    def enters(optimizer, args, kwargs):
        if (alone := weak()) is not None:
            alone.enters()

    return enters


def _cleared(may_be_zero):
    """Which of these parameters, by whether that is no sign, have no gradient, or one that is zero everywhere."""
    held = [p for p in may_be_zero if p.grad is not None]
    cleared = set(may_be_zero).difference(held)
    zeros: set[torch.Tensor] = set()
    for device in {p.grad.device for p in held}:
        some = [p for p in held if p.grad.device == device]
        largest = torch.stack([size.double() for size in torch._foreach_norm([p.grad for p in some], float("inf"))])
        zeros.update(p for p, size in zip(some, largest.tolist()) if size == 0)
    telling = {p for p, no_sign in may_be_zero.items() if not no_sign}
    cleared |= zeros & telling
    return cleared | zeros if telling and telling <= cleared else cleared


def _sample(optimizer):
    """The bits of some elements of some of its parameters, int64 on the CPU: NaN is equal to itself."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    some = parameters[:: -(-len(parameters) // _SAMPLES)]
    values = torch.cat([p.detach().reshape(-1)[:_SAMPLE].to("cpu", torch.float64) for p in some])
    return values.view(torch.int64)
