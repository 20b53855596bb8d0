"""Which blocks each rank sends: one class a selection, one verb, ``choose``."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from thinwire import ops
from thinwire.core.blocks import Slots

INT32_BLOCKS = 2**31  # the numbers of so many blocks fit int32


@dataclass
class Question:
    """What a selection may know: this rank's step, shapes and, if it ``ranks`` blocks, their squared norms [M].

    all_gather: integers [L] of this rank to [world_size, L] of all, at once.
    """

    slots: Slots
    step: int
    rank: int
    world_size: int
    seed: int
    device: torch.device
    norms: torch.Tensor | None = None
    all_gather: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass
class Choice:
    """The blocks of this rank, int64 [K], and how the other ranks' are known.

    common: they are the same on every rank. indices: what must travel for the others to know them, see index_dtype, or
    None.
    rows: from the indices that arrived (or None) to all ranks' blocks, int64 [R, K], R = 1 where common.
    """

    slots: Slots
    own: torch.Tensor
    common: bool
    rows: Callable[[torch.Tensor | None], torch.Tensor]
    indices: torch.Tensor | None = None


class Selection:
    """Base of every selection.

    ranks: it needs the blocks' norms. common: the blocks are the same on every rank, once they are chosen. talks: it
    asks the other ranks before it chooses. sends_indices: the numbers of its blocks travel, because no other rank can
    compute them.
    """

    ranks = False
    common = False
    talks = False
    sends_indices = False

    def choose(self, q: Question) -> Choice:
        raise NotImplementedError

    @staticmethod
    def asked_bytes(slots: Slots, step: int, world_size: int) -> int:
        """Bytes that a rank sends to every other before it chooses."""
        return 0

    @staticmethod
    def index_bytes(slots: Slots) -> int:
        """Bytes of the numbers of its blocks that a rank sends to every other with the blocks."""
        return 0


def _common(slots: Slots, blocks: torch.Tensor) -> Choice:
    return Choice(slots, blocks, True, lambda _: blocks[None])


class Whole(Selection):
    """Every block: dense steps."""

    common = True

    def choose(self, q: Question) -> Choice:
        return _common(q.slots, q.slots.every_block.to(q.device))


class Shared(Selection):
    """The same random blocks on every rank."""

    common = True

    def choose(self, q: Question) -> Choice:
        return _common(q.slots, _draw(q, [0], [0])[0])


class Independent(Selection):
    """Every rank draws its own blocks, and computes the others' from the same generator (1901.09437, §2)."""

    def choose(self, q: Question) -> Choice:
        streams = range(1, q.world_size + 1)
        own = _draw(q, [streams[q.rank]], [0])[0]
        return Choice(q.slots, own, False, lambda _: _draw(q, streams, [0] * q.world_size))


class Permuted(Selection):
    """One common permutation, dealt to the ranks in order: disjoint sets up to a density of 1 / world_size."""

    def choose(self, q: Question) -> Choice:
        own = _draw(q, [0], [q.rank])[0]
        return Choice(q.slots, own, False, lambda _: _draw(q, [0] * q.world_size, range(q.world_size)))


class TopK(Selection):
    """Each rank's heaviest blocks. Their numbers travel, but for parameters that travel whole."""

    ranks = True
    sends_indices = True

    @staticmethod
    def index_bytes(slots: Slots) -> int:
        sparse = sum(count for count, whole in zip(slots.counts, slots.whole) if not whole)
        return sparse * _widest(slots).itemsize

    def choose(self, q: Question) -> Choice:
        own = _heaviest(q.norms, q.slots, q.device)
        sent = _sparse_slots(q.slots).to(q.device)

        def rows(indices):
            all_rows = own.repeat(q.world_size, 1)
            all_rows[:, sent] = indices.to(torch.int64)
            return all_rows

        return Choice(q.slots, own, False, rows, own[sent].to(_widest(q.slots)))


class Nominated(Selection):
    """Each rank names its share of the heaviest blocks, and all ranks send the union of what was named.

    The places are dealt to the ranks in turn, each parameter from a rank of its own and one further in every step,
    so that the ranks together name exactly the blocks that the density allows, however many ranks there are.
    """

    ranks = True
    common = True
    talks = True

    @staticmethod
    def asked_bytes(slots: Slots, step: int, world_size: int) -> int:
        named = int(named_by_rank(slots, step, world_size).sum(1).max())
        return named * index_dtype(slots.layout.first_blocks[-1]).itemsize

    def choose(self, q: Question) -> Choice:
        layout = q.slots.layout
        quotas = named_by_rank(q.slots, q.step, q.world_size)
        mine = layout.slots(tuple(quotas[q.rank].tolist()))
        first = torch.tensor(layout.first_blocks[:-1], device=q.device).repeat_interleave(quotas[q.rank].to(q.device))
        dtype = index_dtype(layout.first_blocks[-1])  # they are counted over the whole flat tensor
        named = torch.full((int(quotas.sum(1).max()),), -1, dtype=dtype, device=q.device)
        named[: mine.total] = _heaviest(q.norms, mine, q.device) + first
        assert q.all_gather is not None  # every front door that allows nominated has one
        union = q.all_gather(named).flatten().to(torch.int64).cpu()
        whole = _whole_blocks(q.slots)
        union = torch.unique(torch.cat([union[union >= 0], whole]))
        bounds = torch.tensor(layout.first_blocks, device="cpu")
        row = torch.bucketize(union, bounds[1:], right=True)
        slots = layout.slots(tuple(torch.bincount(row, minlength=len(layout.names)).tolist()))
        return _common(slots, (union - bounds[row]).to(q.device))


BY_NAME: dict[str, type[Selection]] = {
    "independent": Independent, "permuted": Permuted, "shared": Shared, "topk": TopK, "nominated": Nominated,
}  # fmt: skip


def index_dtype(blocks: int) -> torch.dtype:
    """The dtype in which numbers of that many blocks travel; shapes alone decide, so it is the same on every rank."""
    return torch.int32 if blocks <= INT32_BLOCKS else torch.int64


def _widest(slots):
    """The dtype of numbers that are counted within each parameter."""
    return index_dtype(max(slots.layout.blocks, default=0))


def _draw(q, streams, deals):
    chosen = torch.empty(len(streams), q.slots.total, dtype=torch.int64, device=q.device)
    table, units = q.slots.table_on(q.device), q.slots.layout.units_on(q.device)
    ops.draw_blocks(table, units, q.slots.layout.block_size, q.seed, q.step, streams, deals, chosen)
    return chosen


def _heaviest(norms, slots, device):
    chosen = torch.empty(slots.total, dtype=torch.int64, device=device)
    ops.select_blocks(norms, slots.table_on(device), slots.layout.block_size, chosen)
    return chosen


def named_by_rank(slots: Slots, step: int, world_size: int) -> torch.Tensor:
    """int64 [world_size, S]: how many blocks of each parameter each rank nominates; together, its count."""
    sparse = [0 if whole else count for count, whole in zip(slots.counts, slots.whole)]
    counts = torch.tensor(sparse, dtype=torch.int64, device="cpu")
    ranks = torch.arange(world_size, device="cpu")[:, None]
    turns = (ranks - slots.layout.units % world_size - step) % world_size
    return counts // world_size + (turns < counts % world_size)


def _sparse_slots(slots):
    """Positions in the payload of the blocks whose numbers no other rank can compute."""
    spans = zip(slots.first_slots, slots.counts, slots.whole)
    pieces = [torch.arange(first, first + count, device="cpu") for first, count, whole in spans if not whole]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64, device="cpu")


def _whole_blocks(slots):
    """All blocks of the parameters that travel whole, counted over the flat tensor."""
    spans = zip(slots.layout.first_blocks, slots.counts, slots.whole)
    pieces = [torch.arange(first, first + count, device="cpu") for first, count, whole in spans if whole]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64, device="cpu")
