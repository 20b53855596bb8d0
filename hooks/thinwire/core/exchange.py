"""The collectives that carry payloads. Each is started in the hook's body, never in a future's callback.

A collective that is started or waited for inside a callback deadlocks on Gloo as soon as two buckets are in flight,
because its callbacks run on the very threads that carry collectives.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from thinwire.core.blocks import Slots
from thinwire.core.wire import Arrived, Payload, Wire

# torch 2.13 renames it and warns of the old name.
_all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

_LEAST_PIECE, _MOST_PIECES = 2**16, 8  # bytes to a rank in one of several all-to-alls, and how many of them


@dataclass
class InFlight:
    """A collective under way: its future, its messages [R, bytes] once that is done, and the bytes a rank sends.

    numel: elements of the payload. dealt: how it was dealt to owners, or None. lost: what this rank's part of the sum
    lost to the wire dtype, positions in the payload and values, each [part], or None.
    """

    future: torch.futures.Future
    messages: torch.Tensor
    like: Payload
    bytes_sent: int
    numel: int
    dealt: "Dealt | None" = None
    lost: tuple[torch.Tensor, torch.Tensor] | None = None


class AllGather:
    """Every rank gets every rank's message: for blocks that differ between ranks. Sends (n - 1) messages a rank."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def start(self, payload: Payload, wire: Wire, slots: Slots, wide: torch.dtype) -> InFlight:
        n = self.group.size()
        message = wire.message(payload)
        if not slots.numel:
            return _nothing_to_send(payload, message, n)
        messages = message.new_empty(n, message.numel())
        work = _all_gather_single(messages.view(-1), message, group=self.group, async_op=True)
        return InFlight(work.get_future(), messages, payload, (n - 1) * message.numel(), slots.numel)

    def collect(self, flight: InFlight, wire: Wire) -> Arrived:
        return wire.parse(flight.messages, flight.like)


class OwnerExchange:
    """An all-reduce with sums in float32 (``wide``) and in rank order: for blocks common to all ranks.

    Each rank owns one n-th of what every parameter sends. An all-to-all brings it every rank's version of that part,
    it adds them, and an all-gather brings the sums to all: the bytes of a ring all-reduce, in a 16-bit dtype as well,
    and the same bits however parameters are put into buckets. The all-to-all is waited for in the hook's body.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def start(self, payload: Payload, wire: Wire, slots: Slots, wide: torch.dtype) -> InFlight:
        n, rank = self.group.size(), self.group.rank()
        dealt = Dealt(slots, n)
        if not slots.numel:
            return _nothing_to_send(payload, wire.message(payload), n, dealt)
        outgoing = dealt.deal(payload.values)
        if payload.scale is None:
            outgoing = outgoing.view(torch.uint8)
        else:
            outgoing = torch.stack([wire.message(Payload(part, payload.scale)) for part in outgoing])
        incoming = _all_to_all(outgoing, self.group)
        like = Payload(payload.values.new_empty(dealt.part), payload.scale)
        total = _sum_in_rank_order(wire.parse(incoming, like), wide)
        result = wire.pack(total)
        message = wire.message(result)
        messages = message.new_empty(n, message.numel())
        work = _all_gather_single(messages.view(-1), message, group=self.group, async_op=True)
        sent = (n - 1) * (outgoing.shape[1] + message.numel())
        lost = None
        if wire.dtype != total.dtype:
            lost = dealt.positions(rank).to(total.device), total - wire.unpack(result, total.dtype)
        return InFlight(work.get_future(), messages, like, sent, slots.numel, dealt, lost)

    def collect(self, flight: InFlight, wire: Wire) -> Arrived:
        parts = wire.parse(flight.messages, flight.like)
        values = parts.values
        if parts.inverses is not None:
            values = values.to(torch.float32) * parts.inverses[:, None]
        assert flight.dealt is not None  # by start
        return Arrived(flight.dealt.undo(values)[None])


def _nothing_to_send(payload: Payload, message: torch.Tensor, n: int, dealt: "Dealt | None" = None) -> InFlight:
    """A bucket of parameters without elements has none on any rank, so no rank waits for a collective: it is done."""
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(None)
    return InFlight(future, message.repeat(n, 1), payload, 0, 0, dealt)


class Dealt:
    """A payload dealt to n owners, rows of ``part`` elements: of every parameter the i-th n-th to rank i.

    Per parameter, so that which rank keeps a rounding error does not depend on what else is in the bucket. By slices
    and not by an index of every element, which takes longer than the sums.
    """

    def __init__(self, slots: Slots, n: int):
        self.n = n
        self.numel = slots.numel
        self._cuts = []  # begin in the payload, elements, elements of an owner, begin in its row
        self.part = 0
        for begin, end in zip(slots.offsets, slots.offsets[1:]):
            if end > begin:
                share = -((begin - end) // n)
                self._cuts.append((begin, end - begin, share, self.part))
                self.part += share

    def deal(self, values: torch.Tensor) -> torch.Tensor:
        """values [numel] as [n, part]; zeros where a parameter has no more."""
        rows = values.new_zeros(self.n, self.part)
        for row, piece in self._pieces(rows, values):
            row.copy_(piece)
        return rows

    def undo(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [n, part] as the values [numel] that deal() would make them of."""
        values = rows.new_empty(self.numel)
        for row, piece in self._pieces(rows, values):
            piece.copy_(row)
        return values

    def positions(self, rank: int) -> torch.Tensor:
        """int64 [part]: where in the payload a rank's elements are; beyond the last one where it has none."""
        found = torch.full((self.part,), self.numel, device="cpu")
        for begin, numel, share, at in self._cuts:
            first, last = min(rank * share, numel), min((rank + 1) * share, numel)
            found[at : at + last - first] = torch.arange(begin + first, begin + last, device="cpu")
        return found

    def _pieces(self, rows, values):
        for begin, numel, share, at in self._cuts:
            full = numel // share
            end = begin + full * share
            yield rows[:full, at : at + share], values[begin:end].view(full, share)
            if end < begin + numel:
                yield rows[full, at : at + begin + numel - end], values[end : begin + numel]


def _all_to_all(outgoing: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The i-th row of outgoing [n, bytes] goes to rank i; what came from the ranks, [n, bytes], waited for.

    Gloo's all-to-all sends before it receives, which leaves half of a two-way link idle; several at once do not.
    """
    pieces = 1 if outgoing.is_cuda else min(_MOST_PIECES, max(1, outgoing.shape[1] // _LEAST_PIECE))
    there = [piece.contiguous() for piece in outgoing.chunk(pieces, dim=1)]
    here = [torch.empty_like(piece) for piece in there]
    works = [dist.all_to_all_single(*pair, group=group, async_op=True) for pair in zip(here, there)]
    for work in works:
        work.wait()
    return here[0] if pieces == 1 else torch.cat(here, dim=1)


def gather_now(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """values [L] of every rank, [n, L], waited for."""
    gathered = values.new_empty(group.size(), values.numel())
    _all_gather_single(gathered.view(-1), values, group=group)
    return gathered


def gather_objects(thing: Any, group: dist.ProcessGroup) -> list:
    """What every rank gives, in rank order, waited for; it is pickled."""
    everyone = [None] * group.size()
    dist.all_gather_object(everyone, thing, group=group)
    return everyone


def _sum_in_rank_order(arrived, dtype):
    total = torch.zeros(arrived.values.shape[1], dtype=dtype, device=arrived.values.device)
    for rank, values in enumerate(arrived.values.to(dtype)):
        total += values if arrived.inverses is None else values * arrived.inverses[rank]
    return total
