"""Gradients averaged by a reducer: the handle of BlockSparse, Dense and what runs them late."""

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from thinwire.consistency import measure as consistency
from thinwire.consistency.controller import DensityController
from thinwire.core.reducer import Reducer
from thinwire.core.wire import Wire
from thinwire.methods import Dense, Method, block_sparse
from thinwire.state import agree, checkpoint
from thinwire.state.checks import check_grad_scaler
from thinwire.state.handle import Handle
from thinwire.state.steps import Steps

EVERY_IF_AUTO = 10  # steps from one measurement to the next with density="auto" and no consistency_every


class GradientHandle(Handle):
    """A reducer at work on the gradients of one model. runs: what the reducer runs, where it is not ``method``."""

    def __init__(self, method: Method, grad_scaler: Any = None, consistency_every: int = 0, log: Any = None,
                 runs: Method | None = None):  # fmt: skip
        runs = method if runs is None else runs
        self._block_sparse, self._of_backend = block_sparse(runs), runs.of_backend
        super().__init__(method, consistency_every or EVERY_IF_AUTO * self._block_sparse.automatic, log)
        check_grad_scaler(grad_scaler)
        self._grad_scaler = grad_scaler
        self._scale: float | None = None
        self._step = 0
        self._agreed = False
        self._reducer: Reducer | None = None
        self._waiting_state = None
        self._steps: Steps | None = None
        self._controller = None
        if self._block_sparse.automatic:
            limits = self._block_sparse
            self._controller = DensityController(
                limits.max_inconsistency, limits.min_density, limits.max_density, self._every
            )
        self._squares: list[torch.Tensor] = []
        self._gradient_norm = 0.0

    def stats(self) -> dict[str, float]:
        """Totals of this rank: steps, bytes_sent, bytes_received, dense_bytes, compression, encode_s, exchange_s,
        decode_s, waited_s, and density where it is "auto". See :class:`thinwire.core.stats.Stats`."""
        return self._stats.as_dict() | ({} if self._controller is None else {"density": self._density_at(self._step)})

    def consistency(self) -> dict:
        """Measure ||x - v|| / lr, the elastic-consistency constant B, after a step. Call it on every rank.

        x is the ideal iterate, v what a rank computes its next gradient at; in the units of a gradient's norm. With
        error feedback it is the norm of the mean residual, without a memory 0; with Elastic what is late is in it.

        Returns the same dictionary on all ranks: step; inconsistency_max and inconsistency_mean over the ranks, to
        about 2 % (thinwire.consistency.measure); residual, the norm of the mean residual that is in it; gradient_norm,
        the paper's M: the largest norm of a rank's gradient so far, in the steps that ``consistency_every`` measures;
        bound, the paper's B for this method at that M, or None where it has none or no gradient was measured. Costs
        one all-gather of 16 KB a rank, or 32 KB.
        Raises RuntimeError where there is no model yet.
        """
        if self._reducer is None:
            raise RuntimeError("consistency(): there is no model yet; call it after the first step")
        self._look()
        waits, alone = self._apart()
        scale = self._scale or 1.0
        squares, self._squares = self._squares, []
        norm = math.sqrt(math.fsum(map(float, squares)))
        sketches = [None if held is None else consistency.sketch(held) / scale for held in (waits, alone)]
        found = consistency.measure(*sketches, norm, self._gather_numbers)
        if math.isfinite(found.gradient_norm):
            self._gradient_norm = max(self._gradient_norm, found.gradient_norm)
        numels = tuple(self._numels.values())
        last, block_size = max(self._step - 1, 0), self._block_sparse.block_size
        counts = self._block_sparse.counts_at(last, self._world_size, numels, self._density_at(last))
        shares = [count / -(-numel // block_size) for count, numel in zip(counts, numels) if numel]
        norm = self._gradient_norm or None
        bound = None if norm is None else consistency.bound(self.method, shares, norm)
        return {"step": self._step, "inconsistency_max": max(found.apart),
                "inconsistency_mean": math.fsum(found.apart) / len(found.apart), "residual": found.residual,
                "gradient_norm": norm, "bound": bound}  # fmt: skip

    def state_dict(self) -> dict:
        """This rank's state: only tensors, numbers and strings, keyed by parameter name. Save one a rank.

        It loads under ``torch.load(weights_only=True)``. Raises RuntimeError where there is no model yet.
        """
        if self._reducer is None:
            raise RuntimeError("state_dict(): this HookState has no model yet; call it after the first backward pass")
        self._look()
        scale = 0.0 if self._scale is None else self._scale
        controller = {} if self._controller is None else self._controller.state_dict()
        return checkpoint.save(self.method, self._reducer, self._in_memory()) | {
            "step": self._step, "scale": scale, "controller": controller, "gradient_norm": self._gradient_norm,
        }  # fmt: skip

    def load_state_dict(self, state: Any) -> None:
        """Continue where a state was saved. Call it on every rank: in the next step they compare where they are.

        state: this rank's shard; or the list of all ranks' shards, which also fits another number of ranks: old
        rank i's residual goes to rank i modulo the new number, scaled so that the mean over ranks, which is what
        training will see of it, is unchanged; a control variate restarts on every rank from the common mean.
        Buckets may differ. Raises ValueError, with nothing changed, where the state does not fit.
        """
        self._refuse_if_closed("load_state_dict()")
        if self._reducer is None:
            checkpoint.check(state, self.method, {name: p.numel() for name, p in self._in_memory().items()} or None)
            self._waiting_state = state
        else:
            self._put_back(checkpoint.load(state, self.method, self._reducer, self._numels, self._in_memory()))
            if self._scale != 1.0 and (self._grad_scaler is None or not self._grad_scaler.is_enabled()):
                self._rescale(1 / self._scale)  # it was saved under a GradScaler
                self._scale = 1.0

    def skip_step(self) -> None:
        """The optimizer makes no step with the gradients that there are: the memory is as if their backward passes had
        not been, and what was late and is in them is late again.

        Call it in the place of ``optimizer.step()``, on every rank that leaves the step out, and clear the gradients: a
        step or a backward pass that would use them raises RuntimeError. With ``optimizer=`` a step that is left out is
        also noticed by itself, once the gradients have been cleared, and there this does nothing more. Raises
        RuntimeError where there is a memory and no optimizer was given, for then nothing is kept that it could go back
        to.
        """
        if self.closed or self._steps is None:
            return
        if self._steps.number is None and self._reducer.memory.stores():
            raise RuntimeError(
                "skip_step() without optimizer=, with a method that remembers gradients: what its memory was before "
                "the step is kept only where steps can be seen: pass optimizer= to attach, HookState or Compressor"
            )
        self._steps.skip()

    def _release(self):
        super()._release()
        if self._steps is not None:
            self._steps.close()
        if self._reducer is not None:
            for store in self._reducer.memory.stores().values():
                store.clear()

    def _put_back(self, shard):
        if self._steps is not None:
            self._steps.forget()
        self._step, self._scale, self._agreed = shard["step"], shard["scale"] or 1.0, False
        self._gradient_norm = float(shard.get("gradient_norm", 0.0))
        if self._controller is not None:
            fresh = {"density": self._block_sparse.max_density, "before": 0.0}
            self._controller.load_state_dict(shard.get("controller") or fresh)

    def _start(self, numels: dict[str, int], rank: int, world_size: int, wire: Wire | None = None) -> None:
        """Make the reducer, for a model whose parameters have these sizes."""
        self._numels = numels
        self._numel = sum(numels.values())
        self._world_size = world_size
        self._reducer = Reducer(self._block_sparse, rank, world_size, wire)
        if self._waiting_state is not None:
            try:
                self.load_state_dict(self._waiting_state)
            except ValueError:
                self._reducer = None  # nothing has begun: without the state it would train as if there were none
                raise
            self._waiting_state = None

    def _in_memory(self) -> dict[str, torch.Tensor]:
        """Parameters by name whose flat gradients come in the order of memory; see thinwire.state.order."""
        return {}

    def _watch(self, named: Mapping[torch.Tensor, str], optimizer: torch.optim.Optimizer | None) -> None:
        """Find out which backward passes belong to a step, where that makes a difference: see thinwire.state.steps."""
        sums = isinstance(self.method, Dense) and self.method.memory == "none"  # then what is added is averaged, as is
        if self._world_size > 1 and not sums:
            weak = weakref.ref(self)
            self._steps = Steps(named, optimizer, _calling(weak, "_drop"), _calling(weak, "_keep"))

    def _look(self) -> None:
        """What was dropped without a word is not to be seen in a state, a figure or an end."""
        if self._steps is not None:
            self._steps.look()

    def _drop(self, names: set[str], step: int) -> None:
        """The step will not be made with these parameters' gradients."""
        self._reducer.memory.put_back(names, step)

    def _keep(self, names: set[str], step: int) -> None:
        """It has been made."""
        self._reducer.memory.keep(names, step)

    def _agree(self, all_gather_object) -> None:
        """Compare with the other ranks, once; see thinwire.state.agree."""
        if not self._agreed:
            mine = {"consistency_every": str(self._every)} if self._every else {}
            mine |= {"density now": str(self._density_at(self._step))} if self._controller is not None else {}
            agree.require(all_gather_object(agree.describe(self.method, self._step, self._numels) | mine))
            self._agreed = True

    def _begin_step(self) -> None:
        """What is to be done before a step, on every rank."""
        self._reducer.begin()
        self._follow_scale()
        if self._every and self._step and self._step % self._every == 0 and self._world_size > 1:
            self._take_in(self.consistency())

    def _take_in(self, found: dict) -> None:
        """A measurement that was due."""
        if self._controller is not None:
            if found["step"] > self._block_sparse.warmup_steps:
                self._controller.update(found["residual"])
                # Logarithms differ in their last bit between machines: rank 0's density counts.
                mine = torch.tensor([self._controller.density], dtype=torch.float64, device="cpu")
                self._controller.density = float(self._gather_numbers(mine)[0])
            found["density"] = self._controller.density
        self._record(found)

    def _density_at(self, step: int) -> float | None:
        """The density of a step, where the method does not know it."""
        if self._controller is None:
            return None
        return 1.0 if step < self._block_sparse.warmup_steps else self._controller.density

    def _note_gradient(self, flat: torch.Tensor, step: int) -> None:
        """A part of this rank's gradient, whose norm is wanted in steps that are measured."""
        if self._every and (step + 1) % self._every == 0:
            self._squares.append((torch.linalg.vector_norm(flat, dtype=torch.float64) / (self._scale or 1.0)) ** 2)

    def _apart(self):
        """What makes up x - v: names and tensors of what waits on this rank, whose mean over ranks will be applied;
        and of what this rank's own has besides, or None."""
        return [item for item in self._reducer.memory.waiting().items()], None

    def _follow_scale(self) -> None:
        """Gradients arrive multiplied by the GradScaler's scale; what memory holds must be too."""
        if self._grad_scaler is None or not self._grad_scaler.is_enabled():
            return
        scale = self._grad_scaler.get_scale()
        if self._scale not in (None, scale):
            self._rescale(scale / self._scale)
        self._scale = scale

    def _rescale(self, factor: float) -> None:
        self._reducer.memory.rescale(factor)


def _calling(weak: "weakref.ref[GradientHandle]", name: str) -> Callable[[set[str], int], None]:
    """A handle's method, without holding the handle: the optimizer's hooks hold this."""

    def call(names, step):
        if (handle := weak()) is not None:
            getattr(handle, name)(names, step)

    return call
