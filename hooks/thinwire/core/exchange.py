"""The collectives that carry payloads, of one flat gradient or of several at once, in as many messages.

They are started and waited for in one thread, never in a future's callback: on Gloo that deadlocks as soon as two are
in flight, because callbacks run on the very threads that carry collectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from thinwire.core.reducer import Encoded
from thinwire.core.wire import Arrived

# torch 2.13 renames it and warns of the old name.
_all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

SHORT = 2**14  # bytes to each rank: of such messages a network's latency takes longer than the bytes
_LEAST_PIECE, _MOST_PIECES = 2**16, 8  # bytes to a rank in one of several all-to-alls, and how many of them


class Links(Protocol):
    """How a rank's bytes reach the others, in the same order on every rank."""

    rank: int
    size: int

    def ask(self, mine: torch.Tensor) -> torch.Tensor:
        """What must be known before blocks are chosen, mine [L]: everyone's [size, L]."""

    def gather(self, mine: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Start to bring mine [L] to all: everyone's [size, L] once what comes beside it, or None, has been waited
        for."""

    def swap(self, rows: torch.Tensor) -> torch.Tensor:
        """The i-th row of rows [size, L] goes to rank i; what came from the ranks, [size, L]."""


class GroupLinks:
    """Links over a process group of torch.distributed."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, group.rank(), group.size()

    def ask(self, mine: torch.Tensor) -> torch.Tensor:
        everyone, work = self.gather(mine)
        work.wait()
        return everyone

    def gather(self, mine: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Gloo's all-gather is a ring, in which a message waits for size - 1 others: short ones go to all at once."""
        everyone = mine.new_empty(self.size, mine.numel())
        if not mine.is_cuda and mine.numel() * mine.element_size() <= SHORT:
            rows = mine.expand(self.size, -1).contiguous()
            return everyone, dist.all_to_all_single(everyone, rows, group=self.group, async_op=True)
        return everyone, _all_gather_single(everyone.view(-1), mine, group=self.group, async_op=True)

    def swap(self, rows: torch.Tensor) -> torch.Tensor:
        """Gloo's all-to-all sends before it receives, which leaves half of a two-way link idle; several at once do
        not."""
        pieces = 1 if rows.is_cuda else min(_MOST_PIECES, max(1, rows.shape[1] // _LEAST_PIECE))
        there = [piece.contiguous() for piece in rows.chunk(pieces, dim=1)]
        here = [torch.empty_like(piece) for piece in there]
        works = [dist.all_to_all_single(*pair, group=self.group, async_op=True) for pair in zip(here, there)]
        for work in works:
            work.wait()
        return here[0] if pieces == 1 else torch.cat(here, dim=1)


@dataclass
class InFlight:
    """Flat gradients whose last message is under way: messages [size, bytes], each gradient's one beside the other.

    lost: of each, what its owner's part of the sum lost to the wire dtype, or None. bytes_sent: by this rank.
    """

    encoded: Sequence[Encoded]
    messages: torch.Tensor
    work: Any
    widths: list[int]
    lost: list[torch.Tensor | None]
    bytes_sent: int

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()


class AllGather:
    """Every rank gets every rank's message: for blocks that differ between ranks. Sends (n - 1) messages a rank."""

    @staticmethod
    def start(encoded: Sequence[Encoded], links: Links) -> InFlight:
        mine = [one.wire.message(one.payload) for one in encoded]
        message, widths = _side_by_side(mine)
        everyone, work = _gather(message, links)
        return InFlight(encoded, everyone, work, widths, [None] * len(mine), (links.size - 1) * message.numel())

    @staticmethod
    def collect(one: Encoded, messages: torch.Tensor) -> Arrived:
        return one.wire.parse(messages, one.payload, one.choice.slots, one.wide)


class OwnerExchange:
    """An all-reduce with sums in float32 (``wide``) and in rank order: for blocks common to all ranks.

    Each rank owns one n-th of what every parameter sends (see ``dealing.py``). An all-to-all brings it every rank's
    version of that part, it adds them, and an all-gather brings the sums to all: the bytes of a ring all-reduce, in few
    bits as well, and the same bits however parameters are put into buckets.
    """

    @staticmethod
    def start(encoded: Sequence[Encoded], links: Links) -> InFlight:
        outgoing, widths = _side_by_side([one.wire.rows(one.payload) for one in encoded])
        incoming = links.swap(outgoing) if outgoing.numel() else outgoing
        results = [
            one.wire.add_up(rows, one.payload, one.choice.slots, one.wide, one.keeps_lost)
            for one, rows in zip(encoded, incoming.split(widths, dim=1))
        ]
        message, widths = _side_by_side([result for result, _ in results])
        everyone, work = _gather(message, links)
        sent = (links.size - 1) * (outgoing.shape[1] + message.numel())
        return InFlight(encoded, everyone, work, widths, [lost for _, lost in results], sent)

    @staticmethod
    def collect(one: Encoded, messages: torch.Tensor) -> Arrived:
        return one.wire.spread(messages, one.payload, one.choice.slots, one.wide)


def _gather(message, links):
    """Where nothing is to be sent no rank waits for a collective: shapes are the same on all of them."""
    return links.gather(message) if message.numel() else (message.new_empty(links.size, 0), None)


def _side_by_side(parts):
    """Bytes [..., B] of several as one tensor, and how many are whose."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1), [part.shape[-1] for part in parts]


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
