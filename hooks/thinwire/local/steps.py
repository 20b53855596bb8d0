"""Local steps at work on one model: the handle, which counts steps, sends rounds and lands them."""

import contextlib
import logging
import math
import os
import statistics
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from thinwire.consistency import measure as consistency
from thinwire.core.behind import Behind
from thinwire.core.stats import Stats, ring_all_reduce_bytes
from thinwire.local import saved
from thinwire.local.anchor import Anchor, digest_of, in_pieces
from thinwire.local.flight import Flight, Landed, Rounds
from thinwire.local.fragments import fragments_of
from thinwire.local.pace import Pace
from thinwire.local.verdicts import Verdicts
from thinwire.methods import LocalSteps
from thinwire.replicas.means import Named
from thinwire.replicas.stepping import StepHooks
from thinwire.state import agree
from thinwire.state.handle import Handle
from thinwire.state.names import float_buffers, parameter_names
from thinwire.state.steps import Steps

_log = logging.getLogger("thinwire")
_FEW = 64
DEBUG = os.environ.get("THINWIRE_DEBUG") == "1"  # compare the ranks' anchors after every round


class Anchored(Handle):
    """One model whose ranks step by themselves, and its anchor: the handle of LocalSteps.

    ``evaluating`` and ``stats`` are no collectives. ``state_dict`` waits for what is under way, and ``skip_step`` is a
    step, which may send a round. The others are collectives: call them on every rank.
    """

    module: torch.nn.Module
    method: LocalSteps
    _same_start = "parameters"  # what must be equal when the ranks begin, as a refusal names it

    def __init__(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, method: LocalSteps, behind: Behind,
                 everyone: Callable[[Any], list], alone: bool, grad_scaler: Any = None, ignored: Collection[str] = (),
                 consistency_every: int = 0, log: Any = None):  # fmt: skip
        """everyone: what every rank gives, in rank order, of what this one gives. alone: nothing is to be sent."""
        super().__init__(method, consistency_every, log)
        self.module = module
        self._optimizer, self._ignored = optimizer, frozenset(ignored)
        self._behind, self._everyone, self._alone = behind, everyone, alone
        self._all = {name: p for p, name in parameter_names(module, self._ignored, frozen=True).items()}
        self._device = next(iter(self._all.values())).device
        self._sent = Stats()
        self._rounds = Rounds(method.method, behind, alone, self._sent)
        self._anchor = Anchor(method.outer_lr, method.outer_momentum, alone)
        self._anchor_buffers: dict[str, torch.Tensor] = {}
        self._pace = Pace(method)
        self._step = self._round = 0
        self._launched, self._begins_at, self._lands_at = 0, 0, 0
        self._flight: Flight | None = None
        self._begun = self._agreed = False
        self._dense_bytes: int | None = None  # of a step
        self._together_at: int | None = None  # the step after which the ranks were, by finalize()
        self._owed = 0  # steps that were found to have been left out inside a backward pass, where nothing may move
        self._trained: set[str] = set()
        self._anchored: set[str] = set()
        self._verdicts = Verdicts(0, [])
        self._squares: list[torch.Tensor] = []
        self._gradient_norm = 0.0
        self._clock = 0.0
        self._durations: list[float] = []
        self._step_s = self._exchange_s = 0.0
        named = {p: name for name, p in self._all.items()}
        weak = weakref.ref(self)
        nothing = lambda names, step: None
        self._steps = Steps(named, optimizer, nothing, nothing, _calling(weak, "_left_out"), apart=False)
        try:
            self._hooks = StepHooks(optimizer, self, False, grad_scaler)
        except BaseException:
            self._steps.close()
            raise

    def __repr__(self):
        return f"<{type(self).__name__} of {self.method}, step {self._step}, round {self._round}>"

    # ---- what a user calls ----

    def stats(self) -> dict[str, float]:
        """As of any method: steps are those of the optimizer, dense_bytes what their gradients would have been; the
        seconds of exchanges are the background's, waited_s those that a step has waited for one to land. The few bytes
        in which ranks say what they measured, and which round it is, are not counted; those of ``finalize`` are. And
        rounds, how many have been sent, each fragment counted; every and overlap, as they are now."""
        own = Stats(steps=self._stats.steps, dense_bytes=self._stats.dense_bytes, waited_s=self._stats.waited_s)
        sent = self._sent + own
        sent.dense_bytes = own.dense_bytes
        return sent.as_dict() | {"rounds": self._round, "every": self._pace.every, "overlap": self._pace.overlap}

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[torch.nn.Module]:
        """The model with the anchor in it, to evaluate or to save: what all ranks agreed on when the last round landed,
        the same bits on every rank. Its own parameters and buffers are restored bit for bit, also when the body raises.

        No collective. Floating-point buffers are those of the last round, with ``average_buffers``; before the first
        step after the warm-up everything is as it is. A step of the optimizer in the body would be lost, so it raises
        RuntimeError.
        """
        self._refuse_if_evaluating("evaluating()")
        if self.closed or not self._begun:
            yield self.module
            return
        parameters = in_pieces((name, p) for name, p in self._all.items() if name in self._anchored)
        buffers = in_pieces((n, one) for n, one in self._float_buffers() if n in self._anchor_buffers)
        kept = [(piece, piece.read()) for piece in parameters]
        kept_buffers = [(one, one.clone()) for _, one in self._buffers()]
        refusal = "optimizer.step() inside evaluating(): what it changes would be undone at the end"
        try:
            for piece in parameters:
                piece.write(self._anchor.values(piece))
            for piece in buffers:
                piece.write(piece.flat(self._anchor_buffers))
            self._borrowed = True
            with self._steps.refusing(refusal):
                yield self.module
        finally:
            self._borrowed = False
            for piece, values in kept:
                piece.write(values)
            for buffer, value in kept_buffers:
                buffer.copy_(value)

    def finalize(self) -> None:
        """End the round now, exactly: what is under way lands, and then all that ranks have done since, with what
        waits in a memory, is averaged in float32. Parameters and floating-point buffers are the anchor then, the same
        bits on every rank, integer buffers rank 0's. Training may go on."""
        self._refuse_if_evaluating("finalize()")
        if self.closed or not self._begun:
            return
        self._steps.look()
        if self._steps.open:
            self._steps.forget()  # a step that was left out at the very end: it counts, as on the ranks that made it
            self._over()
        if self._flight is not None:
            self._land()
        elif self._together_at == self._step:
            return
        self._trained.update(self._anchored)  # what was frozen meanwhile may be apart in its last bits
        # In a part of a round, or of a fragment's, the momentum of whole ones would act as if it were one.
        whole = self.method.fragments == 1 and self._step - self._launched >= self._pace.every
        self._rounds.flushed(self._arrive(self._send(meanwhile=False, exactly=True), momentum=whole, together=True))
        self._launched, self._begins_at, self._together_at = self._step, self._step + self._pace.first, self._step
        self._restart_clock()
        integers = [(name, one) for name, one in self._buffers() if not one.is_floating_point()]
        for name, value in self._of_rank0(integers).items() if integers else ():
            dict(integers)[name].copy_(value)

    def consistency(self) -> dict:
        """Where the ranks stand: as of any method, step, inconsistency_max and inconsistency_mean, here the distance
        of a rank's parameters from the anchor over the learning rate; gradient_norm, the largest norm of a rank's
        gradient in the steps that ``consistency_every`` measures, and bound, or None. And anchor_distance, the mean
        over ranks of ||x_i - anchor||^2. Costs an exchange of three numbers."""
        if self._borrowed:
            raise RuntimeError("consistency() inside evaluating(): the model holds the anchor: call it outside")
        rates = {p: float(group["lr"]) or math.nan for group in self._optimizer.param_groups for p in group["params"]}
        apart = scaled = 0.0
        rate_of = {name: rates.get(p, math.inf) for name, p in self._parameters()}
        for piece in in_pieces(self._parameters()) if self._begun else ():
            for name, one in piece.by_name(piece.read() - self._anchor.values(piece)).items():
                square = float(one.double().square().sum())
                apart, scaled = apart + square, scaled + square / rate_of[name] ** 2
        squares, self._squares = self._squares, []
        norm = math.sqrt(math.fsum(map(float, squares)))
        found = self._everyone((apart, math.sqrt(scaled), norm))
        distances, over_lr, norms = zip(*found)
        self._gradient_norm = max(self._gradient_norm, *(one for one in norms if math.isfinite(one)), 0.0)
        largest = self._gradient_norm or None
        bound = None if largest is None else consistency.bound(self.method, self._shares(), largest, self._optimizer)
        return {"step": self._step, "inconsistency_max": max(over_lr),
                "inconsistency_mean": math.fsum(over_lr) / len(over_lr),
                "anchor_distance": math.fsum(distances) / len(distances), "gradient_norm": largest,
                "bound": bound}  # fmt: skip

    def skip_step(self) -> None:
        """This rank makes no step with the gradients that there are, and the step counts: rounds stay where they are.

        Call it in the place of ``optimizer.step()``, and clear the gradients. A GradScaler that was given to
        ``attach`` does it by itself. A step that is left out without a word counts when the next backward pass begins
        and finds its gradients cleared; until then the others may wait for this rank, and if it waits for them in a
        collective of the loop's own, for good. A batch without a backward pass is not seen at all: say it.
        """
        self._refuse_if_evaluating("skip_step()")
        if self.closed:
            return
        before = self._step
        self._steps.skip(void=False)
        if self._step == before:  # no pass was seen: all of its were under no_sync(), say
            self._over()

    def state_dict(self, anchor: bool = False) -> dict:
        """This rank's state: only tensors, numbers and strings, keyed by parameter name. Save one a rank, beside each
        rank's own model and optimizer; then a resumed run is bitwise the uninterrupted one. What is under way is
        waited for, and kept. Raises RuntimeError where that has failed: this rank's memory does not fit its parameters
        then.

        anchor: one for all ranks, of any number: the anchor and its momentum, without what ranks have done since. It
        may be asked for inside ``evaluating()`` too, and after a failure.
        """
        if anchor and not self._begun:
            raise RuntimeError("state_dict(anchor=True): there is no anchor before the first step after the warm-up; "
                               "the model itself is the same on all ranks: save that")  # fmt: skip
        if self._borrowed and not anchor:
            raise RuntimeError("state_dict() inside evaluating(): the model holds the anchor, not this rank's own "
                               "parameters: save outside of it, or state_dict(anchor=True)")  # fmt: skip
        if self._flight is not None and not (anchor and self._flight.failed):
            self._flight.wait()
        return saved.save(self, anchor)

    def load_state_dict(self, state: Any) -> None:
        """Continue where a state was saved. Call it on every rank: in the next step they compare their anchors.

        state: this rank's shard, and the model has this rank's own parameters; or one of ``state_dict(anchor=True)``,
        or shards of another number of ranks: then the model's parameters are set to the anchor, and a warning says what
        is lost. Raises ValueError, with nothing changed, where the state does not fit.
        """
        self._refuse_if_closed("load_state_dict()")
        self._refuse_if_evaluating("load_state_dict()")
        saved.load(self, state)

    def close(self) -> None:
        """As of any method, after a step: RuntimeError, with nothing changed, between a backward pass and its step, for
        the gradients are then this rank's own."""
        if not self.closed and not self.warming:
            self._steps.look()
            if all(self._everyone(self._steps.open)):  # where some are not, the others have left out the last step
                raise RuntimeError(
                    "close() between backward() and optimizer.step(): the gradients are this rank's own, so that step "
                    "would let the replicas differ for good: close after the step"
                )
        super().close()

    def _release(self) -> None:
        super()._release()
        self._hooks.remove()
        self._steps.close()

    # ---- what a front door calls ----

    @property
    def warming(self) -> bool:
        """Whether gradients are to be averaged still, in the warm-up."""
        return self._step < self.method.warmup_steps

    def begin_pass(self) -> None:
        """A backward pass begins whose gradients will be this rank's own, but in the warm-up."""
        if not self._agreed:
            self._agree()
        if not self._begun and not self.warming:
            self._begin()
        if self._begun and any(p.requires_grad and name not in self._anchored for name, p in self._all.items()):
            self._anchor_new()
        self._steps.begin_pass()

    def take_in(self, parameters: list[torch.Tensor], flat: torch.Tensor) -> None:
        """The pass gives these parameters' gradients [N]."""
        self._steps.take_in(parameters, _is_zero(flat))
        if self._every and (self._step + 1) % self._every == 0:
            self._squares.append(torch.linalg.vector_norm(flat, dtype=torch.float64) ** 2)

    def end_pass(self) -> None:
        """It has given all."""
        self._steps.end_pass()

    # ---- steps and rounds ----

    def stepped(self) -> None:
        """The optimizer has made a step: its hooks call this."""
        self._over()

    def _left_out(self) -> None:
        """A step of the loop was."""
        if torch._C._current_graph_task_id() != -1:
            self._owed += 1
        else:
            self._over()

    def _over(self) -> None:
        """A step of the loop is over, whether this rank has made it or left it out."""
        steps, self._owed = 1 + self._owed, 0
        for _ in range(steps):
            self._count()

    def _count(self) -> None:
        self._step += 1
        if self._dense_bytes is None:
            nbytes = sum(p.numel() * p.element_size() for _, p in self._parameters())
            self._dense_bytes = ring_all_reduce_bytes(nbytes, self._behind.links.size)
        self._stats.add(steps=1, dense_bytes=self._dense_bytes)
        if self._step <= self.method.warmup_steps:
            self._sent.count_bytes(self._dense_bytes)
            return
        if not self._begun:
            if any(p.grad is not None for p in self._all.values()):
                raise RuntimeError(
                    "the optimizer has made a step, and no backward pass of the model was seen before it, so the ranks "
                    "would go apart and never meet: call the DistributedDataParallel, not the module that it wraps, "
                    "and make the first pass outside no_sync()"
                )
            return
        now = time.perf_counter()
        self._durations.append(now - self._clock)
        if self._flight is not None and self._step >= self._lands_at:
            self._land()
        if self._step >= self._begins_at:
            self._launch()
        if self._every and self._step % self._every == 0:
            self._record(self.consistency())
        self._clock = time.perf_counter()

    def _begin(self) -> None:
        """The parameters as they are now are the anchor, the same on all ranks: see ``_agree``."""
        self._part()
        if self.method.average_buffers:  # which a forward pass has changed already, on every rank in its own way
            self._anchor_buffers = self._of_rank0(self._float_buffers())
        self._launched, self._begins_at, self._begun = self._step, self._step + self._pace.first, True
        self._anchor_new()
        self._restart_clock()

    def _anchor_new(self) -> None:
        """What is trained from now on, and was not before, is the same on all ranks still: so is the anchor's."""
        new = [(name, p) for name, p in self._parameters() if name not in self._anchored]
        for piece in in_pieces(new):
            self._anchor.values(piece)
        self._anchored.update(name for name, _ in new)
        self._dense_bytes = None

    def _part(self) -> None:
        """From now on the ranks' parameters and buffers are their own."""

    def _launch(self) -> None:
        if self._durations:
            self._step_s = statistics.median(self._durations)  # an evaluation between two steps is none of them
        if self._flight is not None:  # rounds are never on top of each other
            self._land()
        self._flight = self._send(meanwhile=self._pace.overlap > 0, exactly=False)
        self._launched, self._lands_at = self._step, self._step + self._pace.overlap
        self._begins_at = self._lands_at if self._pace.follows else self._step + self._pace.spacing
        self._restart_clock()
        if not self._pace.overlap:
            self._land()

    def _send(self, meanwhile: bool, exactly: bool) -> Flight:
        number, turn = divmod(self._round, self.method.fragments)
        self._round += 1
        parameters = self._parameters()
        if not exactly:
            found = fragments_of(parameters, self.method.fragments)
            parameters = found[turn % len(found)]
        self._trained.difference_update(name for name, _ in parameters)
        buffers = self._float_buffers() if exactly or (self.method.average_buffers and turn == 0) else []
        tell = [self._exchange_s, self._step_s] if self._pace.measures and not exactly else []
        return self._rounds.send(number, self._step, self._anchor, parameters, buffers, meanwhile, tell, exactly)

    def _land(self) -> None:
        """The round under way is waited for, and the anchor and this rank's parameters move by it."""
        flight = self._flight
        assert flight is not None
        self._arrive(flight)  # what fails stays: the memory has taken in what it never brought
        self._flight = None
        if flight.told is not None and flight.job is not None:
            self._exchange_s = flight.job.seconds or 0.0
            self._pace.hear(flight.told)
            if not self._pace.follows:
                self._begins_at = max(self._step, flight.launched + self._pace.spacing)

    def _arrive(self, flight: Flight, momentum: bool = True, together: bool = False) -> Landed:
        begin = time.perf_counter()
        flight.wait()
        waited = time.perf_counter() - begin
        self._stats.add(waited_s=waited)
        buffers = self._anchor_buffers if self.method.average_buffers else {}
        self._verdicts.say()
        found = flight.land(self._anchor, buffers, momentum, together)
        self._verdicts = Verdicts(self._round, found)
        self._verdicts.say()
        if DEBUG:
            digests = f"{self._anchor.digest()} {digest_of(self._anchor_buffers)}"
            agree.require(self._everyone({f"anchor after round {self._round}": digests}))
        return found

    def _agree(self) -> None:
        """All ranks run the same thing, and go on from the same anchor. A collective."""
        named = {name: parameter.numel() for name, parameter in self._parameters()}
        buffers = {name: buffer.numel() for name, buffer in self._float_buffers()}
        if self._begun:
            start = f"{self._anchor.digest()} {digest_of(self._anchor_buffers)}"
        else:
            start = digest_of(dict(self._parameters()))
        agree.require(self._everyone(agree.describe(self.method, self._step, named) | {
            "buffers": agree.digest(buffers), "anchor" if self._begun else self._same_start: start,
            "rounds": f"{self._round}, the next at step {self._begins_at}", "exchanges": str(self._behind.started),
            "consistency_every": str(self._every),
        }))  # fmt: skip
        self._agreed = True

    def _restart_clock(self) -> None:
        self._clock = time.perf_counter()
        self._durations.clear()

    def _of_rank0(self, buffers: list[Named]) -> dict[str, torch.Tensor]:
        mine = {name: one.detach().to("cpu") for name, one in buffers}
        first = self._everyone(mine if self._behind.links.rank == 0 else None)[0]
        return {name: one.to(self._device) for name, one in first.items()}

    def _shares(self) -> list[float]:
        """Of its blocks that each parameter sends in a round."""
        sparse = self.method.method.as_block_sparse()
        numels = tuple(p.numel() for _, p in self._parameters())
        counts = sparse.counts_at(max(0, self._round - 1), self._behind.links.size, numels)
        return [count / -(-numel // sparse.block_size) for count, numel in zip(counts, numels) if numel]

    def _parameters(self) -> list[Named]:
        """What is trained now, or was when the round began: what was frozen since has still moved in it."""
        self._trained.update(name for name, p in self._all.items() if p.requires_grad)
        return [(name, p) for name, p in self._all.items() if name in self._trained]

    def _buffers(self) -> list[Named]:
        return [(name, one) for name, one in self.module.named_buffers() if name not in self._ignored]

    def _float_buffers(self) -> list[Named]:
        return float_buffers(self.module, self._ignored)


def _is_zero(flat: torch.Tensor) -> bool | torch.Tensor:
    """Whether flat [N] is zero everywhere; on a GPU, for which nobody waits, 0-d."""
    if not flat.numel():
        return True
    if not flat.is_cuda and bool(flat[:_FEW].any()):  # almost always: a pass over all of it is spared
        return False
    lowest, highest = torch.aminmax(flat)
    return (lowest == 0) & (highest == 0)


def _calling(weak: "weakref.ref[Anchored]", name: str) -> Callable[[], None]:
    def call():
        if (handle := weak()) is not None:
            getattr(handle, name)()

    return call
