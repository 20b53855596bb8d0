"""The collectives that carry payloads. Each is started in the hook's body, never in a future's callback.

A collective that is started or waited for inside a callback deadlocks on Gloo as soon as two buckets are in flight,
because its callbacks run on the very threads that carry collectives.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from thinwire.wire import Arrived, Payload, Wire

# torch 2.13 renames it and warns of the old name.
_all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass
class InFlight:
    """A collective under way: its future, its messages [R, bytes] once that is done, and the bytes a rank sends.

    lost: first position and values of what this rank's part of the sum lost to the wire dtype, or None.
    """

    future: torch.futures.Future
    messages: torch.Tensor
    like: Payload
    bytes_sent: int
    lost: tuple[int, torch.Tensor] | None = None


class AllGather:
    """Every rank gets every rank's message: for blocks that differ between ranks. Sends (n - 1) messages a rank."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def start(self, payload: Payload, wire: Wire, wide: torch.dtype) -> InFlight:
        n = self.group.size()
        message = wire.message(payload)
        messages = message.new_empty(n, message.numel())
        work = _all_gather_single(messages.view(-1), message, group=self.group, async_op=True)
        return InFlight(work.get_future(), messages, payload, (n - 1) * message.numel())

    def collect(self, flight: InFlight, wire: Wire) -> Arrived:
        return wire.parse(flight.messages, flight.like)


class OwnerExchange:
    """An all-reduce with sums in float32 (``wide``) and in rank order: for blocks common to all ranks.

    Each rank owns one n-th of the payload. An all-to-all brings it every rank's version of that part, it adds them,
    and an all-gather brings the sums to all: the bytes of a ring all-reduce, in a 16-bit dtype as well, and the same
    bits however the payload is divided. The all-to-all is waited for in the hook's body.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def start(self, payload: Payload, wire: Wire, wide: torch.dtype) -> InFlight:
        n, rank = self.group.size(), self.group.rank()
        part = -(-payload.values.numel() // n)
        parts = payload.values.new_zeros(n * part)
        parts[: payload.values.numel()] = payload.values
        outgoing = torch.stack([wire.message(Payload(values, payload.scale)) for values in parts.view(n, part)])
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=self.group)
        total = _sum_in_rank_order(wire.parse(incoming, Payload(parts[:part], payload.scale)), wide)
        result = wire.pack(total)
        message = wire.message(result)
        messages = message.new_empty(n, message.numel())
        work = _all_gather_single(messages.view(-1), message, group=self.group, async_op=True)
        sent = (n - 1) * (outgoing.shape[1] + message.numel())
        lost = None
        if wire.dtype != total.dtype:
            begin, end = (min(r * part, payload.values.numel()) for r in (rank, rank + 1))
            error = total - wire.unpack(result, total.dtype)
            lost = (begin, error[: end - begin])
        like = Payload(payload.values, None if payload.scale is None else result.scale)
        return InFlight(work.get_future(), messages, like, sent, lost)

    def collect(self, flight: InFlight, wire: Wire) -> Arrived:
        n = self.group.size()
        part = -(-flight.like.values.numel() // n)
        parts = wire.parse(flight.messages, Payload(flight.like.values.new_empty(part), flight.like.scale))
        values = parts.values
        if parts.inverses is not None:
            values = values.to(torch.float32) * parts.inverses[:, None]
        return Arrived(values.reshape(1, -1)[:, : flight.like.values.numel()])


def gather_now(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """values [L] of every rank, [n, L], waited for."""
    gathered = values.new_empty(group.size(), values.numel())
    _all_gather_single(gathered.view(-1), values, group=group)
    return gathered


def _sum_in_rank_order(arrived, dtype):
    total = torch.zeros(arrived.values.shape[1], dtype=dtype, device=arrived.values.device)
    for rank, values in enumerate(arrived.values.to(dtype)):
        total += values if arrived.inverses is None else values * arrived.inverses[rank]
    return total
