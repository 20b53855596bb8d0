"""What every front door gives its user: one handle, with the same verbs for every method."""

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

from thinwire.consistency import measure as consistency
from thinwire.core.stats import Stats
from thinwire.methods import Method

KEPT = 1000  # measurements in a handle's log


class Handle:
    """A method at work on one model: its figures, its state and its end.

    ``thinwire.attach`` and Horovod's compressors give you one. Every method has every verb, and a verb that has
    nothing to do for a method does nothing, so a loop that calls them all works with any. But for ``stats`` and
    ``state_dict`` they are collectives where they have something to do: call them on every rank.

    method: as given. module: the model that is trained, None where the front door is not given one. closed: whether
    ``close`` was called. consistency_log: the last 1000 measurements that were made every ``consistency_every`` steps;
    see :meth:`consistency`.
    """

    module: torch.nn.Module | None = None
    closed = False
    _borrowed = False  # evaluating() is at work: the model in it is put back at its end

    def __init__(self, method: Method, consistency_every: int = 0, log: Any = None):
        consistency.check_log(consistency_every, log)
        self.method = method
        self.consistency_log: deque[dict] = deque(maxlen=KEPT)
        self._every = consistency_every
        self._log = None if log is None else consistency.writer(log)
        self._stats = Stats()

    def __repr__(self):
        return f"<{type(self).__name__} of {self.method}, {self._stats.steps} steps>"

    def stats(self) -> dict[str, float]:
        """Totals of this rank since it was attached; see :class:`thinwire.core.stats.Stats`."""
        return self._stats.as_dict()

    def consistency(self) -> dict:
        """Measure ||x - v|| / lr, how far what the ranks compute with is from the ideal iterate (2001.05918, Def. 1).

        Returns the same dictionary on all ranks, with step, inconsistency_max, inconsistency_mean, gradient_norm and
        bound at least; a method may know more.
        """
        raise NotImplementedError

    def state_dict(self) -> dict:
        """This rank's state: only tensors, numbers and strings, keyed by parameter name. Save one a rank.

        It loads under ``torch.load(weights_only=True)``.
        """
        raise NotImplementedError

    def load_state_dict(self, state: Any) -> None:
        """Continue where a state was saved. Raises ValueError, with nothing changed, where it does not fit."""
        raise NotImplementedError

    def finalize(self) -> None:
        """Bring the replicas together: apply what is late, average what differs. Call it after the last step;
        training may go on."""

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[torch.nn.Module | None]:
        """The model as ``finalize`` would leave it, to evaluate or to save; as it was again afterwards.

        Gives ``module``. It is restored bit for bit, also when the body raises.
        """
        yield self.module

    def skip_step(self) -> None:
        """No step of the optimizer is made with the gradients that there are: no memory keeps anything of them.

        Call it in the place of ``optimizer.step()``, and clear the gradients. A step that is left out is noticed by
        itself where the optimizer was given and the gradients are cleared, or a GradScaler given to ``attach`` leaves
        it out.
        """

    def close(self) -> None:
        """End it: ``finalize``, and then nothing more is sent, threads and process groups that were made are gone,
        and the front door averages whole gradients as it would without thinwire. What waits in a memory is dropped:
        take ``state_dict`` first to keep it. Call it between a step and the next backward pass. A later
        ``thinwire.attach`` to the same model works. Then ``finalize``, ``evaluating``, ``skip_step`` and ``close`` do
        nothing, and ``load_state_dict`` raises RuntimeError.

        Raises RuntimeError inside ``evaluating()``, with nothing changed; what ``finalize`` raises comes when it is
        closed."""
        self._refuse_if_evaluating("close()")
        if self.closed:
            return
        try:
            self.finalize()
        finally:
            self.closed = True
            self._release()

    def _release(self) -> None:
        """Give back all that was made and held."""

    def _refuse_if_evaluating(self, what: str) -> None:
        if self._borrowed:
            raise RuntimeError(f"{what} inside evaluating(): what it changes would be undone at the end")

    def _refuse_if_closed(self, what: str) -> None:
        if self.closed:
            raise RuntimeError(f"{what}: this handle was closed, so nothing would use it: attach again first")

    def _record(self, found: dict) -> None:
        """A measurement that was due."""
        self.consistency_log.append(found)
        if self._log is not None:
            self._log(found)
