"""What becomes of what was not sent: one class a memory.

A step goes through three verbs. ``add`` reads the flat gradient, ``pack`` makes the payload of the chosen blocks, and
``settle`` writes the averaged gradient over the flat one and brings the memory up to date. A gradient with inf or NaN
sends NaN, every rank gets NaN back, and no memory keeps anything of that flat gradient, to rounding. What the passes of
a step have changed can be put back as long as that step is not made: ``put_back``, and ``keep`` where it is made.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

from thinwire import ops
from thinwire.core.blocks import Layout, Slots, United
from thinwire.core.selection import Choice
from thinwire.core.store import FlatStore
from thinwire.core.wire import Arrived, Payload, Wire, all_finite


@dataclass(frozen=True)
class Pass:
    """Where a backward pass stands among the optimizer's steps.

    step: the number of the one that it is for, None where nobody knows of steps; then nothing can be put back. again:
    for the same step these parameters had a pass before, so a momentum is not to decay once more.
    """

    step: int | None = None
    again: bool = False


UNKNOWN = Pass()


@dataclass
class Reading:
    """A flat gradient as a memory presents it: source [N] to send from, and what thinwire.ops says of its blocks.

    norms [M] are None where nobody asked for them. restored: state, and what it is to be again if the pass turns out
    bad, where that cannot be computed backwards. others: further state [N] that the pass changes: where it is now, for
    what is put back meanwhile is somewhere else.
    """

    layout: Layout
    grad: torch.Tensor
    source: torch.Tensor
    status: torch.Tensor
    norms: torch.Tensor | None = None
    restored: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    others: tuple[torch.Tensor, ...] = ()


@dataclass
class Sum:
    """What arrived, ready to be added: payloads of R ranks, their shape, their blocks [R, K], and factors.

    to_mean and to_estimate are [S]: they turn the sum into the mean of what was sent, and into the estimate of the
    mean gradient (the same unless the method is unbiased: papers' 1 / (n tau)). lost is what the exchange rounded
    off the part of the sum that this rank owns, as the payload's dealing has it, or None.
    """

    arrived: Arrived
    slots: Slots | United
    rows: torch.Tensor
    to_mean: torch.Tensor
    to_estimate: torch.Tensor
    lost: torch.Tensor | None = None


class Memory:
    """Base of every memory.

    keeps_lost: what the exchange rounds off the sum is kept, by its owner.
    """

    keeps_lost = True

    def add(self, flat: torch.Tensor, slots: Slots, ranks_blocks: bool, of: Pass) -> Reading:
        raise NotImplementedError

    def pack(self, reading: Reading, choice: Choice, wire: Wire, dealing: Any = None) -> Payload:
        """The payload of the chosen blocks. dealing: how it is dealt to owners, if it is; see Payload."""
        raise NotImplementedError

    def wire_for(self, wire: Wire, dtype: torch.dtype) -> Wire:
        """The wire for gradients of a dtype."""
        return wire

    def settle(self, reading: Reading, choice: Choice, sent: Payload, wire: Wire, total: Sum, rank: int) -> None:
        """Write the average over the gradient, and bring the memory up to date. rank: this one."""
        raise NotImplementedError

    def stores(self) -> dict[str, FlatStore]:
        """All that it keeps, by what a checkpoint calls it."""
        return {}

    def waiting(self) -> dict[str, torch.Tensor]:
        """What has yet to be sent, 1-D, by parameter name."""
        return {}

    def rescale(self, factor: float) -> None:
        for store in self.stores().values():
            store.scale(factor)

    def put_back(self, names: Collection[str], step: int) -> None:
        """Be as before this step, for these parameters."""
        for store in self.stores().values():
            store.put_back(names, step)

    def keep(self, names: Collection[str], step: int) -> None:
        """This step has been made, for these parameters."""
        for store in self.stores().values():
            store.keep(names, step)


class NoMemory(Memory):
    """What is not sent is forgotten."""

    keeps_lost = False

    def add(self, flat: torch.Tensor, slots: Slots, ranks_blocks: bool, of: Pass) -> Reading:
        if ranks_blocks:
            return _accumulated_from_zero(flat, slots)
        return _examined(flat, slots)

    def pack(self, reading: Reading, choice: Choice, wire: Wire, dealing: Any = None) -> Payload:
        if wire.dtype == torch.float16:
            payload = wire.pack(_gather(reading.source, choice, reading.status, wide(reading.grad.dtype)))
        else:
            payload = Payload(_gather(reading.source, choice, reading.status, wire.dtype))
        payload.dealing = dealing
        return payload

    def wire_for(self, wire: Wire, dtype: torch.dtype) -> Wire:
        return wire.narrowed_to(dtype)

    def settle(self, reading: Reading, choice: Choice, sent: Payload, wire: Wire, total: Sum, rank: int) -> None:
        _scatter(total.arrived, total.rows, total.slots, total.to_estimate, reading.grad)


class ErrorFeedback(Memory):
    """What is not sent waits in the residual and is added to the next gradient; with momentum, see BlockSparse."""

    def __init__(self, momentum: float = 0.0):
        self.momentum = momentum
        self.residual = FlatStore()
        self.velocity = FlatStore() if momentum else None

    def add(self, flat: torch.Tensor, slots: Slots, ranks_blocks: bool, of: Pass) -> Reading:
        kept = slots.layout, wide(flat.dtype), flat.device
        residual, before = self.residual.change(*kept, of.step)
        velocity, was = (None, None) if self.velocity is None else self.velocity.change(*kept, of.step)
        others = () if velocity is None else (velocity,)
        if velocity is None or not of.again:
            reading = _accumulated(flat, slots, residual, velocity, self.momentum, before, was)
            reading.others = others
            return reading
        for now, then in ((residual, before), (velocity, was)):
            if then is not None:
                now.copy_(then)
        restored = (residual, residual.clone()), (velocity, velocity.clone())
        reading = _accumulated(flat, slots, residual)
        velocity += torch.where(torch.isfinite(flat), flat, torch.zeros_like(flat))
        reading.restored, reading.others = restored, others
        return reading

    def pack(self, reading: Reading, choice: Choice, wire: Wire, dealing: Any = None) -> Payload:
        if wire.takes_blocks:
            return wire.take(reading.source, choice, reading.status, dealing, keep=True)
        if wire.saturates:
            values = self._take(reading, choice, reading.source.dtype, None)
            payload = wire.pack(values)
            rounded = values - wire.unpack(payload, choice.slots, values.dtype)
            left = torch.where(torch.isfinite(values), rounded, 0.0)
            factors = torch.ones(_parameters(choice), dtype=values.dtype, device=values.device)
            _scatter(Arrived(left[None]), choice.own[None], choice.slots, factors, reading.source, accumulate=True)
            return payload
        scale = None
        if wire.dtype == torch.float16:  # no element is larger than its block's norm
            assert reading.norms is not None  # add has asked for them
            largest = reading.norms.max().sqrt() if reading.norms.numel() else reading.norms.new_zeros(())
            scale = wire.scale(largest)
        return Payload(self._take(reading, choice, wire.dtype, scale), scale, dealing=dealing)

    def settle(self, reading: Reading, choice: Choice, sent: Payload, wire: Wire, total: Sum, rank: int) -> None:
        layout, residual = choice.slots.layout, reading.source
        good = total.arrived.all_finite()
        bad = _flag(~good)
        undo = torch.zeros_like(bad) if reading.restored else bad
        values = sent.values
        if wire.takes_blocks:  # what it took is asked for only to be given back
            gives_back = undo.is_cuda or bool(undo)
            values = wire.unpack(sent, choice.slots, residual.dtype) if gives_back else choice.slots.room(
                residual.dtype, residual.device)  # fmt: skip
        ops.settle_(
            residual, reading.others[0] if reading.others else None, reading.grad, self.momentum, values,
            None if sent.scale is None else 1 / sent.scale, choice.own, choice.slots.table_on(residual.device),
            layout.block_size, reading.status, undo,
        )  # fmt: skip
        for state, before in reading.restored:
            state.copy_(torch.where(good, state, before))
        if total.lost is not None:
            sent.dealing.add_part(total.lost, rank, choice.own, 1.0, bad, residual)
        _scatter(total.arrived, total.rows, total.slots, total.to_mean, reading.grad)

    def stores(self) -> dict[str, FlatStore]:
        return {"residual": self.residual} | ({} if self.velocity is None else {"velocity": self.velocity})

    def waiting(self) -> dict[str, torch.Tensor]:
        return self.residual.views()

    def _take(self, reading, choice, dtype, scale):
        values = choice.slots.room(dtype, reading.source.device)
        table, block_size = choice.slots.table_on(values.device), choice.slots.layout.block_size
        ops.take_blocks_(reading.source, choice.own, table, block_size, reading.status, scale, values)
        return values


class Weights(ErrorFeedback):
    """What is not sent stays where it came from, in the rank's own weights; for the pseudo-gradients of LocalSteps.

    Error feedback that starts from zero in every round: nothing is kept here from one to the next. After ``settle`` the
    reading's source [N] is what the mean does not have of this rank: what was not sent, and what was rounded off, of
    the sum as well where this rank owns it. In a round with inf or NaN that is all that was finite.
    """

    def add(self, flat: torch.Tensor, slots: Slots, ranks_blocks: bool, of: Pass) -> Reading:
        return _accumulated_from_zero(flat, slots)

    def settle(self, reading: Reading, choice: Choice, sent: Payload, wire: Wire, total: Sum, rank: int) -> None:
        grad, left = reading.grad, reading.source
        good = total.arrived.all_finite()
        if left.is_cuda or not bool(good):
            left.copy_(torch.where(good, left, torch.where(torch.isfinite(grad), grad, 0.0)))
        if total.lost is not None:
            sent.dealing.add_part(total.lost, rank, choice.own, 1.0, _flag(~good), left)
        _scatter(total.arrived, total.rows, total.slots, total.to_mean, grad)

    def stores(self) -> dict[str, FlatStore]:
        return {}


class ControlVariate(Memory):
    """ISEGA (1901.09437, Alg. 2) for a collective: h on every rank, its mean on all, differences on the wire.

    Ranks send (g_i - h_i) on their blocks; with S the sum of what arrived, the estimate is mean_h + S / (n tau), and
    then mean_h += S / n and h_i += what rank i sent.
    """

    def __init__(self):
        self.own = FlatStore()
        self.mean = FlatStore()

    def add(self, flat: torch.Tensor, slots: Slots, ranks_blocks: bool, of: Pass) -> Reading:
        reading = _examined(flat, slots)
        for store in (self.own, self.mean):
            now, before = store.change(slots.layout, wide(flat.dtype), flat.device, of.step)
            if before is not None:
                now.copy_(before)
            reading.others += (now,)
        return reading

    def pack(self, reading: Reading, choice: Choice, wire: Wire, dealing: Any = None) -> Payload:
        dtype, (own, _) = wide(reading.grad.dtype), reading.others
        if wire.takes_blocks:  # TOUCHED: where there is no gradient, minus h is the difference
            return wire.take(reading.grad.to(dtype) - own, choice, reading.status | ops.TOUCHED, dealing, keep=False)
        difference = _gather(reading.grad, choice, None, dtype) - _gather(own, choice, None, dtype)
        spoilt = (reading.status[-1:] & ops.NONFINITE) != 0
        payload = wire.pack(torch.where(spoilt, torch.full_like(difference, float("nan")), difference))
        payload.dealing = dealing
        return payload

    def settle(self, reading: Reading, choice: Choice, sent: Payload, wire: Wire, total: Sum, rank: int) -> None:
        slots, grad, (own, mean) = choice.slots, reading.grad, reading.others
        estimate = mean.clone()
        _scatter(total.arrived, total.rows, total.slots, total.to_estimate, estimate, accumulate=True)
        good = total.arrived.all_finite() & all_finite(estimate)  # a sum of finite values need not be
        changes = Arrived(_zero_unless(good, total.arrived.values), total.arrived.inverses)
        _scatter(changes, total.rows, total.slots, total.to_mean, mean, accumulate=True)
        mine = _zero_unless(good, wire.unpack(sent, slots, own.dtype))
        _scatter(Arrived(mine[None]), choice.own[None], slots, torch.ones_like(total.to_mean), own, accumulate=True)
        if total.lost is not None:
            sent.dealing.add_part(total.lost, rank, choice.own, -1.0, _flag(~good), own)
        grad.copy_(torch.where(good, estimate, torch.full_like(estimate, float("nan"))))

    def stores(self) -> dict[str, FlatStore]:
        return {"own": self.own, "mean": self.mean}


BY_NAME: dict[str | None, Callable[..., Memory]] = {
    "none": NoMemory, "error_feedback": ErrorFeedback, "control_variate": ControlVariate, "weights": Weights,
}  # fmt: skip


def of(name: str | None, momentum: float) -> Memory:
    """The memory that BlockSparse names. momentum: with error feedback only."""
    return BY_NAME[name](momentum) if momentum else BY_NAME[name]()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of memories for gradients of a dtype: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _examined(flat, slots):
    status = torch.empty(len(slots.counts) + 1, dtype=torch.int32, device=flat.device)
    ops.examine(flat, slots.table_on(flat.device), status)
    return Reading(slots.layout, flat, flat, status)


def _accumulated(flat, slots, residual, velocity=None, momentum=0.0, before=None, velocity_before=None):
    layout = slots.layout
    status = torch.empty(len(slots.counts) + 1, dtype=torch.int32, device=flat.device)
    norms = torch.empty(layout.first_blocks[-1], dtype=residual.dtype, device=flat.device)
    table = slots.table_on(flat.device)
    ops.accumulate_(residual, velocity, flat, momentum, table, layout.block_size, norms, status, before,
                     velocity_before)  # fmt: skip
    return Reading(layout, flat, residual, status, norms)


def _accumulated_from_zero(flat, slots):
    return _accumulated(flat, slots, torch.zeros(flat.shape, dtype=wide(flat.dtype), device=flat.device))


def _gather(source, choice, status, dtype):
    payload = choice.slots.room(dtype, source.device)
    table = choice.slots.table_on(source.device)
    ops.gather_blocks(source, choice.own, table, choice.slots.layout.block_size, status, None, payload)
    return payload


def _scatter(arrived, rows, slots, factors, out, accumulate=False):
    table = slots.table_on(out.device)
    ops.scatter_blocks_(
        arrived.values, arrived.inverses, rows, table, slots.layout.block_size, factors, accumulate, out
    )


def _parameters(choice):
    return len(choice.slots.layout.names)


def _flag(condition):
    """0-d bool as int32 [1], as operators take it."""
    return condition.to(torch.int32).reshape(1)


def _zero_unless(good, values):
    return torch.where(good, values, torch.zeros_like(values))
