"""What every front door of Elastic does with gradients that are late: apply them, show the model with them, save them.

The learning rate that counts is that of the step that issued a gradient; see ``thinwire.Elastic``.
"""

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch

from thinwire.elastic.lateness import Late, Ledger
from thinwire.state import order

_log = logging.getLogger("thinwire")
_BORROWED = "optimizer.step() inside evaluating(): what it changes would be undone at the end"


def check_optimizer(optimizer: Any) -> None:
    """Raise TypeError or ValueError where it is none that could apply late gradients."""
    if optimizer is None:
        raise ValueError("Elastic applies gradients late, at the optimizer's learning rates: pass optimizer=")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}: it must be a torch.optim.Optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("LBFGS makes its steps with a closure, and late gradients have none: use another optimizer")


class LateSteps:
    """A mixin, before a GradientHandle that has ``_names``, parameters' names by parameter, and ``_optimizer``.

    ``finalize``, ``evaluating``, ``state_dict``, ``load_state_dict`` and ``close`` are to be called on every rank.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._ledger = Ledger()

    # ---- what a user calls ----

    def consistency(self) -> dict:
        """As of any method: what is late is in it. Waits until all that is under way has landed."""
        self._land()
        return super().consistency()

    def finalize(self) -> None:
        """Apply all that is late, now: one more step of the optimizer, on the parameters that have something pending
        and at the learning rate of the step that issued it.

        Then nothing is pending and replicas are bitwise equal: with speculate or arrival, where they may differ by
        rounding, by taking rank 0's parameters. Training may go on. What is pending is dropped, with a warning, where
        it is not finite. A backward pass whose step has not been made counts as skipped: ``skip_step()``. Raises
        RuntimeError inside ``evaluating()``.
        """
        self._refuse_if_evaluating("finalize()")
        self._look()
        if self._steps is not None and self._steps.open:
            self._steps.skip()
        self._apply_pending()
        self._ledger.clear()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[torch.nn.Module | None]:
        """The model as ``finalize`` would leave it, to evaluate or to save it; as it was again afterwards.

        Parameters and the optimizer's state are restored bit for bit, also when the body raises. A backward pass whose
        step has not been made is not in it. Raises RuntimeError
        inside another ``evaluating()``; training, ``finalize()`` and ``state_dict()`` raise it in the body.
        """
        self._refuse_if_evaluating("evaluating()")
        self._look()
        parameters = self._by_name()
        saved = {name: p.detach().clone() for name, p in parameters.items()}
        states = {p: copy.deepcopy(self._optimizer.state.get(p)) for p in parameters.values()}
        # Some optimizers keep more than settings there.
        settings = [{key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
                    for group in self._optimizer.param_groups]  # fmt: skip
        try:
            self._apply_pending()
            self._borrowed = True
            with contextlib.nullcontext() if self._steps is None else self._steps.refusing(_BORROWED):
                yield self.module
        finally:
            self._borrowed = False
            for name, p in parameters.items():
                p.detach().copy_(saved[name])
                if states[p] is None:
                    self._optimizer.state.pop(p, None)
                else:
                    self._optimizer.state[p] = states[p]
            for group, were in zip(self._optimizer.param_groups, settings, strict=True):
                group.update(were)

    def state_dict(self) -> dict:
        """As of any method, and what is late, landed. Save the model beside it as it is: RuntimeError inside
        ``evaluating()``, since what is late would be applied twice."""
        self._refuse_if_evaluating("state_dict()")
        self._look()
        self._land()
        held = self._in_memory()
        late = [
            {"step": one.step, "lr": {name: lr for name, (_, lr) in one.parts().items()},
             "tensors": {name: order.to_saved(part.clone(), held.get(name)) for name, (part, _) in one.parts().items()}}
            for one in self._ledger.lates
        ]  # fmt: skip
        return super().state_dict() | {"late": late}

    def load_state_dict(self, state: Any) -> None:
        self._refuse_if_evaluating("load_state_dict()")
        self._land()
        super().load_state_dict(state)

    # ---- what a Handle calls ----

    def _apart(self):
        waits, alone = super()._apart()
        if not self._is_elastic():
            return waits, alone
        factor = self._factor(self._learning_rates())
        late = [(name, part, factor(name, lr)) for name, parts in self._ledger.pending().items() for part, lr in parts]
        return waits, [(name, part * (1.0 if times is None else times)) for name, part, times in late]

    def _put_back(self, shard):
        super()._put_back(shard)
        self._ledger.clear()
        parameters, held = self._by_name(), self._in_memory()
        for one in shard.get("late", ()):
            tensors = one["tensors"]
            parts = [order.from_saved(t.detach().to(parameters[name]), held.get(name)) for name, t in tensors.items()]
            late = Late(one["step"], tuple(tensors), tuple(map(len, parts)), torch.cat(parts),
                        tuple(float(one["lr"][name]) for name in tensors))  # fmt: skip
            late.landed.set()
            self._ledger.restore(late)

    def _drop(self, names, step):
        if self._ledger.under_way(names):
            self._land()  # it is encoded in a thread, and memory must have taken it in to put it back
        self._ledger.put_back(names)
        super()._drop(names, step)

    def _keep(self, names, step):
        self._ledger.keep(names)
        super()._keep(names, step)

    def _rescale(self, factor):
        self._land()
        super()._rescale(factor)
        self._ledger.scale(factor)

    # ---- what each front door has of its own ----

    def _is_elastic(self) -> bool:
        """Whether anything can be late."""
        raise NotImplementedError

    def _land(self) -> None:
        """Wait until nothing is under way."""
        raise NotImplementedError

    def _unflattened(self, flat: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """A gradient [N] in the shape of its parameter."""
        return flat.view_as(p)

    def _make_step(self) -> None:
        """A step of the optimizer on the gradients that there are."""
        self._optimizer.step()

    # ---- late gradients and learning rates ----

    def _apply_pending(self):
        self._land()
        if pending := self._ledger.pending():
            self._step_with(pending)

    def _step_with(self, pending):
        """A step of the optimizer with what is pending as the gradient."""
        groups = self._optimizer.param_groups
        gradients = [(p, p.grad) for group in groups for p in group["params"]]
        rates = [group["lr"] for group in groups]
        try:
            for group in groups:
                found = {p: pending.get(self._names.get(p), ()) for p in group["params"]}
                issued = [lr for parts in found.values() for _, lr in parts]
                group["lr"] = max(issued, default=0.0) or group["lr"]
                factor = self._factor({self._names[p]: float(group["lr"]) for p, parts in found.items() if parts})
                for p, parts in found.items():
                    total = sum(part * factor(self._names[p], lr) for part, lr in parts) / (self._scale or 1.0)
                    p.grad = self._unflattened(total, p) if parts else None
            if all(bool(torch.isfinite(p.grad).all()) for p, _ in gradients if p.grad is not None):
                with contextlib.nullcontext() if self._steps is None else self._steps.ignoring():
                    self._make_step()
            else:
                _log.warning("thinwire: what was late is not finite, and is dropped")
        finally:
            for (p, gradient) in gradients:
                p.grad = gradient
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def _factor(self, lrs):
        """What to multiply a late gradient by, when it is applied at these learning rates; see lateness.Factor."""
        if not isinstance(self._optimizer, torch.optim.SGD):
            return lambda name, issued: 1.0
        # A gradient that was scaled up for a small rate would stay in the momentum until rates are large again.
        plain = {self._names[p] for group in self._optimizer.param_groups if not group["momentum"]
                 for p in group["params"] if p in self._names}  # fmt: skip

        def factor(name, issued):
            if issued == lrs[name] or name not in plain:
                return 1.0
            return issued / lrs[name] if lrs[name] else None

        return factor

    def _by_name(self):
        return {name: p for p, name in self._names.items()}

    def _learning_rates(self):
        """Each parameter's, now, by name; 0 of what the optimizer does not step, because it was frozen."""
        rates = dict.fromkeys(self._names.values(), 0.0)
        return rates | {self._names[p]: float(group["lr"]) for group in self._optimizer.param_groups
                        for p in group["params"] if p in self._names}  # fmt: skip
