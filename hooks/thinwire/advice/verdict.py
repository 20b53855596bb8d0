"""Would it help me? Measure a step and the link, predict the step of every method, and say which is worth it."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from thinwire.advice import candidates, own_step, trial
from thinwire.advice.candidates import PLAIN, Candidate
from thinwire.advice.cost import Compute, Link
from thinwire.advice.rehearsal import Refused, together
from thinwire.advice.trial import Trial
from thinwire.core.exchange import gather_objects
from thinwire.methods import LocalSteps, Method
from thinwire.state import agree
from thinwire.state.checks import check_model
from thinwire.state.names import parameter_names

WORTH_IT = 0.1  # a smaller share of a step is not worth a change
NEARLY = 0.05  # PyTorch's 16-bit hook is preferred where the fastest is not faster by more: it changes training least
HALVED = 2  # how many of the best are tried with a 16-bit wire too
OF_LOCAL_STEPS = ("LocalSteps needs attach(..., optimizer=). Evaluate and save the anchor, inside handle.evaluating(), "
                  "and end with handle.finalize(). A longer round sends less and ends at a higher loss.")  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """A method's step. what: as given to advise. bytes_sent: by one rank, in a step, payload. speedup: against plain
    DDP, both predicted. verdict: in words."""

    label: str
    what: Method | str
    step_s: float
    bytes_sent: float
    speedup: float
    verdict: str


@dataclass(frozen=True)
class Advice:
    """What advise found, the same on every rank; print it.

    ranks; compute_s: a step with DDP but without any communication; link: as measured, None with one rank; rows: plain
    DDP first, then the fastest first; best: the label of the one to take, PLAIN where none is worth it; conclusion: in
    words; left_out: what cannot run here, and why, a line a method.
    """

    ranks: int
    compute_s: float
    link: Link | None
    rows: tuple[Prediction, ...]
    best: str
    conclusion: str
    left_out: tuple[str, ...] = ()

    def __str__(self):
        heads = ("method", "step", "sent a step", "speed-up", "")
        cells = [(row.label, _ms(row.step_s), _size(row.bytes_sent), f"{row.speedup:.2f}", row.verdict)
                 for row in self.rows]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(heads, *cells)]
        lines = [f"A step without communication takes {_ms(self.compute_s)} on {self.ranks} ranks."]
        if self.link is not None:
            lines += [f"The link: {8e-6 * self.link.bytes_per_s:.0f} Mbit/s each way, {1e3 * self.link.latency_s:.2f} "
                      "ms a message. Predicted:", ""]  # fmt: skip
            for row in (heads, *cells):
                first, *numbers, last = (text.ljust(w) if i in (0, 4) else text.rjust(w)
                                         for i, (text, w) in enumerate(zip(row, widths)))  # fmt: skip
                lines.append("  ".join([first, *numbers, last]).rstrip())
            lines += ["", *self.left_out]
        local = any(isinstance(row.what, LocalSteps) for row in self.rows)
        return "\n".join([*lines, self.conclusion, *([OF_LOCAL_STEPS] if local else [])])


def advise(ddp: DistributedDataParallel, make_batch: Callable[[], object], loss_fn: Callable[..., torch.Tensor], *,
           optimizer: torch.optim.Optimizer | None = None, methods: Sequence[Method | str] | None = None,
           steps: int = 10) -> Advice:  # fmt: skip
    """Predict what plain DDP, PyTorch's hooks and thinwire's methods would make of your step. Call it on every rank.

    It measures your step without communication, the link with short collectives, and each method's own work on
    your gradients with all ranks at it at once; the rest is arithmetic (:mod:`thinwire.advice.cost`). Nothing of your
    training is changed: parameters, gradients, buffers, DDP's hook, the optimizer and the global random generators are
    as they were. make_batch is called a few times more than ``steps``, and what else it, loss_fn and your modules keep
    in Python (counters, caches, the place in the data) goes on as they leave it.

    make_batch: gives a batch. loss_fn: ``loss_fn(ddp, batch)`` gives the loss. optimizer: with it the optimizer's step
    counts too, timed on a copy, which costs as much memory as the model and the optimizer's state; and
    DivideAndShuffle and LocalSteps, which need it, can be predicted. methods: thinwire methods, and "fp16", "bf16",
    "powersgd-1" and so on for PyTorch's hooks; None is those worth asking about, and the best of them with a 16-bit
    wire; what of those cannot run here is told, not raised. For LocalSteps(every="auto") it proposes the steps of a
    round that this link asks for: a power of two, 64 at the most. Elastic cannot be predicted, since what is late
    depends on the gradients. steps: how many to time.

    Communication is left out with DDP's ``no_sync()``, not with PyTorch's noop hook, because DDP cannot forget a hook;
    gradients come from ``torch.autograd.grad``, so DDP's reducer hears nothing of them. (Activation checkpoints must
    therefore be made with ``use_reentrant=False``.) DDP's copying in and out of its buckets is measured apart; the
    broadcast of BatchNorm's buffers before a step, the same with every method, is left out. Each rank makes these steps
    by itself, so make_batch, loss_fn and the model must not communicate; SyncBatchNorm, which does, is refused.

    The same on every rank is returned. With one rank there is nothing to predict, and it says so. Raises RuntimeError
    where there is no process group, and on every rank TypeError, where an argument is of a wrong type, or ValueError,
    where one is wrong or ranks differ, or make_batch or loss_fn raised on some rank; so too, by itself, inside
    ``join()``.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("advise needs a process group: call torch.distributed.init_process_group(...) on every rank "
                           "first, under torchrun for example")  # fmt: skip
    inner = getattr(ddp, "_orig_mod", ddp)
    is_ddp = isinstance(inner, DistributedDataParallel)
    if is_ddp and inner._join_config.enable:  # ranks that are out of data answer DDP alone
        raise ValueError("advise was called inside join(), where ranks without data do not answer: call it before")
    group = inner.process_group if is_ddp else dist.group.WORLD
    gather = lambda thing: gather_objects(thing, group)
    asked: list[Candidate] = []

    def check():
        if not is_ddp:
            raise TypeError(f"advise got a {type(ddp).__name__}: it must be a DistributedDataParallel; wrap the model "
                            "first: advise(DistributedDataParallel(model), ...)")  # fmt: skip
        _check(inner, make_batch, loss_fn, optimizer, steps)
        names = parameter_names(inner.module, inner.parameters_to_ignore)
        gloo = candidates.over_gloo(group, next(iter(names)).device)
        asked.extend(candidates.named(methods, group.size(), gloo, inner.module, optimizer, names))
        numels = {name: p.numel() for p, name in names.items()}
        return {"methods": ", ".join(one.label for one in asked), "steps": str(steps), "model": agree.digest(numels),
                "optimizer": type(optimizer).__name__}  # fmt: skip

    agree.check_together(gather, check)
    names = parameter_names(inner.module, inner.parameters_to_ignore)
    device = next(iter(names)).device
    with own_step.generators_kept():  # make_batch draws from them, and PowerSGD's hook seeds them
        with torch.enable_grad():  # what DDP broadcasts in the next forward pass, if that is the second: here, together
            inner._has_rebuilt_buckets = inner.reducer._rebuild_buckets() or inner._has_rebuilt_buckets
        first = [together(gather, make_batch)]
        next_batch = lambda: first.pop() if first else make_batch()
        mine = together(gather, lambda: own_step.measure(ddp, next_batch, loss_fn, optimizer, names, steps, device))
        everyone = gather((mine.seconds, mine.ready, mine.backward_share))
        # The slowest rank sets the pace of a step.
        compute_s = statistics.median(max(times) for times in zip(*(seconds for seconds, _, _ in everyone)))
        if group.size() == 1:
            return alone(compute_s)
        backward_s = compute_s * statistics.mean(share for _, _, share in everyone)
        ready = {name: backward_s * statistics.mean(ready[name] for _, ready, _ in everyone) for name in mine.ready}
        order = gather(sorted(mine.ready, key=mine.ready.get))[0]  # as rank 0 sees it, like DDP
        cut = trial.buckets(inner, order, {name: parameter for parameter, name in names.items()})
        arrivals = trial.rising(max(ready[name] for name in bucket) for bucket in cut)
        # With gradient_as_bucket_view, gradients that zero_grad() set to None are copied in, but not out.
        tried = Trial(group, device, cut, mine.gradients, Compute(arrivals, max(compute_s, arrivals[-1])),
                      lambda method: trial.replica_bytes(inner, optimizer, method),
                      copies_in=True, copies_out=not inner.gradient_as_bucket_view)  # fmt: skip
        return conclude(tried, asked, by_default=methods is None)


def _check(ddp, make_batch, loss_fn, optimizer, steps):
    """Raise TypeError or ValueError for what cannot be measured."""
    check_model(ddp, hook_allowed=True)  # one that has a method already may be asked about
    if any(isinstance(module, torch.nn.SyncBatchNorm) for module in ddp.module.modules()):
        raise ValueError("advise times each rank's steps by themselves, and SyncBatchNorm communicates in the forward "
                         "pass: ask about the model with BatchNorm in its place, or run the script under "
                         "python -m thinwire advise")  # fmt: skip
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"advise(steps={steps!r}): steps must be an integer of at least 1")
    for name, value in (("make_batch", make_batch), ("loss_fn", loss_fn)):
        if not callable(value):
            raise TypeError(f"advise({name}={value!r}): {name} must be a function")
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"advise(optimizer={optimizer!r}): optimizer must be a torch.optim.Optimizer or None")
    own_step.check_steps(optimizer)


def conclude(tried: Trial, asked: Sequence[Candidate], by_default: bool) -> Advice:
    """Predict every candidate, plain DDP being the first, and say which is worth it. A collective.

    by_default: nobody named them, so leave out those that cannot run; and try the best with a 16-bit wire too.
    """
    found, left_out = {}, []

    def predict(one):
        try:
            if isinstance(one.what, LocalSteps):
                one = tried.settle(one)
            found[one] = tried.predict(one)
        except Refused as error:
            if not by_default or one.label == PLAIN:
                raise
            left_out.append(f"{one.label} cannot run here: {str(error).removeprefix('advise: ').splitlines()[0]}")

    for one in asked:
        predict(one)
    if by_default:
        fastest = sorted((one for one in found if candidates.in_16_bits(one.what)), key=lambda one: found[one][0])
        for one in fastest[:HALVED]:
            predict(candidates.candidate(candidates.in_16_bits(one.what), gloo=False))
    plain_s = found[asked[0]][0]
    order = sorted(found, key=lambda one: (one.label != PLAIN, found[one][0]))
    best, conclusion = _verdict({one.label: found[one][0] for one in order}, tried.alone_s)
    rows = tuple(
        Prediction(one.label, one.what, found[one][0], found[one][1], plain_s / found[one][0],
                   _said(one.label, plain_s / found[one][0], best))
        for one in order
    )  # fmt: skip
    return Advice(tried.group.size(), tried.alone_s, tried.link, rows, best, conclusion, tuple(left_out))


def _verdict(step_s: dict[str, float], compute_s: float) -> tuple[str, str]:
    """The label to take, and the conclusion."""
    plain_s = step_s[PLAIN]
    share = max(0.0, 1 - compute_s / plain_s)
    if share < WORTH_IT:
        return PLAIN, f"The network costs you {share:.0%} of a step: nothing here can save more. Stay with plain DDP."
    best = fastest = min(step_s, key=step_s.get)
    if plain_s / step_s[best] < 1 + WORTH_IT:
        return PLAIN, (f"The network costs you {share:.0%} of a step, but no method here is a tenth faster than plain "
                       "DDP: stay with that.")  # fmt: skip
    for cast in ("PyTorch's bf16 hook", "PyTorch's fp16 hook"):
        cast_s = step_s.get(cast, plain_s)
        if cast_s < step_s[fastest] * (1 + NEARLY) and plain_s / cast_s >= 1 + WORTH_IT:
            best = cast
            break
    saved = f"{_ms(plain_s)} to {_ms(step_s[best])} a step, {plain_s / step_s[best]:.1f} times as fast"
    return best, (
        f"Worth it: {best} takes plain DDP's {saved}. Without any network it would be {_ms(compute_s)}.\n"
        "A method that leaves something out trades quality a step for steps a second: compare at equal time."
    )


def _said(label, speedup, best):
    if label == PLAIN:
        return "what you have" + (", and the best" if best == PLAIN else "")
    if label == best:
        return "take this"
    if speedup >= 1 + WORTH_IT:
        return "faster"
    return "no gain" if speedup > 1 - NEARLY else "slower"


def alone(compute_s: float) -> Advice:
    """What there is to say of one rank."""
    row = Prediction(PLAIN, PLAIN, compute_s, 0.0, 1.0, "what you have, and the best")
    return Advice(1, compute_s, None, (row,), PLAIN, "There is one rank, so nothing crosses a network, and nothing "
                  "here can help. Ask again with as many ranks as you will train on.")  # fmt: skip


def _ms(seconds):
    return f"{1e3 * seconds:.0f} ms" if seconds >= 0.02 else f"{1e3 * seconds:.1f} ms"


def _size(nbytes):
    return f"{nbytes / 1e6:.3g} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:.3g} kB"
