"""Which blocks each rank sends: one class a selection, one verb, ``choose``; and ``ask`` where it talks first."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from thinwire import ops
from thinwire.core.blocks import Slots, United, unite

INT16_BLOCKS, INT32_BLOCKS = 2**16, 2**31  # the numbers of so many blocks fit 16 bits, and int32


@dataclass
class Question:
    """What a selection may know: this rank's step, shapes and, if it ``ranks`` blocks, their squared norms [M].

    answers: what all ranks asked, [world_size, L], where the selection talks. max_age: the most steps that a block may
    wait, where there is such a limit; the counts are twice what that needs, or more.
    """

    slots: Slots
    step: int
    rank: int
    world_size: int
    seed: int
    device: torch.device
    norms: torch.Tensor | None = None
    answers: torch.Tensor | None = None
    max_age: int | None = None


@dataclass
class Choice:
    """The blocks of this rank, int64 [K], and how the other ranks' are known.

    common: they are the same on every rank. indices: what must travel for the others to know them, see index_dtype, or
    None.
    rows: from the indices that arrived (or None) to all ranks' blocks, int64 [R, K], R = 1 where common.
    """

    slots: Slots | United
    own: torch.Tensor
    common: bool
    rows: Callable[[torch.Tensor | None], torch.Tensor]
    indices: torch.Tensor | None = None


class Selection:
    """Base of every selection.

    ranks: it needs the blocks' norms. common: the blocks are the same on every rank, once they are chosen. talks: the
    ranks tell each other what they ``ask`` before they choose. sends_indices: the numbers of its blocks travel, because
    no other rank can compute them.
    """

    ranks = False
    common = False
    talks = False
    sends_indices = False

    def ask(self, q: Question) -> torch.Tensor:
        """What every other rank must hear first: integers [L], as many on every rank."""
        raise NotImplementedError

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


def _common(slots: Slots | United, blocks: torch.Tensor) -> Choice:
    return Choice(slots, blocks, True, lambda _: blocks[None])


class Whole(Selection):
    """Every block: dense steps."""

    common = True

    def choose(self, q: Question) -> Choice:
        return _common(q.slots, q.slots.every_block_on(q.device))


class Shared(Selection):
    """The same random blocks on every rank."""

    common = True

    def choose(self, q: Question) -> Choice:
        return _common(q.slots, _draw(q, [0], [0])[0])


class Independent(Selection):
    """Every rank draws its own blocks, and computes the others' from the same generator (1901.09437, §2)."""

    def choose(self, q: Question) -> Choice:
        n = q.world_size
        return _drawn(q, range(1, n + 1), [0] * n)


class Permuted(Selection):
    """One common permutation, dealt to the ranks in order: disjoint sets up to a density of 1 / world_size."""

    def choose(self, q: Question) -> Choice:
        n = q.world_size
        return _drawn(q, [0] * n, range(n))


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
        sent = q.slots.plan(("sparse slots", q.device), lambda: _sparse_slots(q.slots).to(q.device))

        def rows(indices):
            all_rows = own.repeat(q.world_size, 1)
            all_rows[:, sent] = _widened(indices)
            return all_rows

        return Choice(q.slots, own, False, rows, own[sent].to(_widest(q.slots)))


class Nominated(Selection):
    """Each rank names its share of the heaviest blocks, and all ranks send the union of what was named.

    The places are dealt to the ranks in turn, each parameter from a rank of its own and one further in every step,
    so that the ranks together name exactly the blocks that the density allows, however many ranks there are. With a
    max_age some blocks are due in a step, and named whatever their norms are.
    """

    ranks = True
    common = True
    talks = True

    @staticmethod
    def asked_bytes(slots: Slots, step: int, world_size: int) -> int:
        named = int(named_by_rank(slots, step, world_size).sum(1).max())
        return named * _widest(slots).itemsize

    def ask(self, q: Question) -> torch.Tensor:
        mine = _places(q)
        named = torch.zeros(_firsts(q).shape[1], dtype=_widest(q.slots), device=q.device)
        named[: mine.total] = _heaviest(q.norms if q.max_age is None else _due_first(q), mine, q.device)
        return named

    def choose(self, q: Question) -> Choice:
        assert q.answers is not None  # ``talks`` says so
        firsts = _firsts(q).roll(q.step % q.world_size, 0)
        named = torch.where(firsts < 0, firsts, firsts + _widened(q.answers))
        return _common(*unite(named, q.slots))


def _places(q: Question) -> Slots:
    """How many blocks of each parameter this rank names in this step: what the rank as many places before it, as steps
    have been, named in the first one."""
    turn = (q.rank - q.step) % q.world_size
    named = lambda: tuple(named_by_rank(q.slots, 0, q.world_size)[turn].tolist())
    return q.slots.plan(("places", turn, q.world_size), lambda: q.slots.layout.slots(named()))


def _due_first(q: Question) -> torch.Tensor:
    """The norms [M], but infinite for the blocks that are due and this rank's to name.

    In step t the blocks b of a parameter are due for which b + t is a multiple of max_age: so no block waits longer,
    and nobody has to remember when each was sent. They are dealt as the places are, in turn and to the same rank first.
    There are no more of them than places, so each rank has a place for all of its own.
    """
    age, n = q.max_age, q.world_size
    assert age is not None and q.norms is not None
    starts, ends, turns = q.slots.plan(("due", age, n, q.device), lambda: _runs(q.slots, age, n).to(q.device))
    due = starts + -q.step % age
    mine = (due < ends) & (turns == (q.rank - q.step) % n)
    norms = torch.nn.functional.pad(q.norms, (0, 1))  # one more, for what is not mine
    return norms.index_fill_(0, torch.where(mine, due, len(q.norms)), torch.inf)[:-1]


def _firsts(q: Question) -> torch.Tensor:
    """int64 [n, L]: in the first step, for each number that a rank names the first block of the parameter in which it
    counts; -1 where a rank has no more."""

    def make():
        quotas = named_by_rank(q.slots, 0, q.world_size)
        firsts = torch.full((q.world_size, int(quotas.sum(1).max())), -1, device="cpu")
        for mine, row in zip(quotas, firsts):
            named = q.slots.layout.firsts.repeat_interleave(mine)
            row[: len(named)] = named
        return firsts.to(q.device)

    return q.slots.plan(("firsts", q.world_size, q.device), make)


BY_NAME: dict[str, type[Selection]] = {
    "independent": Independent, "permuted": Permuted, "shared": Shared, "topk": TopK, "nominated": Nominated,
}  # fmt: skip


def index_dtype(blocks: int) -> torch.dtype:
    """The dtype in which numbers of that many blocks travel; shapes alone decide, so it is the same on every rank.

    int16 holds 16 bits without a sign: see _widened.
    """
    if blocks <= INT16_BLOCKS:
        return torch.int16
    return torch.int32 if blocks <= INT32_BLOCKS else torch.int64


def _widest(slots):
    """The dtype of numbers that are counted within each parameter."""
    return slots.layout.plan(("widest",), lambda: index_dtype(max(slots.layout.blocks, default=0)))


def _widened(numbers):
    """Numbers as int64."""
    return numbers.to(torch.int64) & 0xFFFF if numbers.dtype == torch.int16 else numbers.to(torch.int64)


def _drawn(q, streams, deals):
    """This rank's draw now, and the others' when they are asked for."""
    n, rank = q.world_size, q.rank
    chosen = torch.empty(n, q.slots.total, dtype=torch.int64, device=q.device)
    _draw(q, streams[rank : rank + 1], deals[rank : rank + 1], chosen[rank : rank + 1])

    def rows(_):
        for others in (slice(0, rank), slice(rank + 1, n)):
            if streams[others]:
                _draw(q, streams[others], deals[others], chosen[others])
        return chosen

    return Choice(q.slots, chosen[rank], False, rows)


def _draw(q, streams, deals, chosen=None):
    if chosen is None:
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


def _runs(slots, age, n):
    """Runs of so many blocks in each parameter that does not travel whole, int64 [3, runs]: where each begins, counted
    over the whole flat tensor, where its parameter ends, and whose turn it is in the first step."""
    layout = slots.layout
    runs = [-(-blocks // age) if not whole else 0 for blocks, whole in zip(layout.blocks, slots.whole)]
    runs = torch.tensor(runs, dtype=torch.int64, device="cpu")
    number = torch.arange(int(runs.sum()), device="cpu") - (runs.cumsum(0) - runs).repeat_interleave(runs)
    first = layout.firsts.repeat_interleave(runs)
    ends = torch.tensor(layout.first_blocks[1:], dtype=torch.int64, device="cpu").repeat_interleave(runs)
    return torch.stack([first + number * age, ends, (number + (layout.units % n).repeat_interleave(runs)) % n])


def _sparse_slots(slots):
    """Positions in the payload of the blocks whose numbers no other rank can compute."""
    spans = zip(slots.first_slots, slots.counts, slots.whole)
    pieces = [torch.arange(first, first + count, device="cpu") for first, count, whole in spans if not whole]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64, device="cpu")
