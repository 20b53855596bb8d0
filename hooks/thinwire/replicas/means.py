"""Means of tensors over a group of ranks, as flat pieces that travel while something else runs."""

import time
from collections.abc import Iterable
from typing import Any

import torch

from thinwire import ops
from thinwire.core.blocks import Layout
from thinwire.core.memory import wide
from thinwire.core.stats import Stats, ring_all_reduce_bytes
from thinwire.methods import BlockSparse
from thinwire.methods.schedules import Group

PIECE_BYTES = 8 * 2**20

Named = tuple[str, torch.Tensor]


def pieces(tensors: Iterable[Named]) -> list[list[Named]]:
    """The named tensors in lists of one dtype and device and at most PIECE_BYTES (or one tensor), in their order."""
    found: list[list[Named]] = []
    open_lists: dict[tuple, tuple[list[Named], int]] = {}
    for name, tensor in tensors:
        kind, nbytes = (tensor.dtype, tensor.device), tensor.numel() * tensor.element_size()
        piece, filled = open_lists.get(kind, (None, 0))
        if piece is None or filled + nbytes > PIECE_BYTES:
            piece, filled = [], 0
            found.append(piece)
        piece.append((name, tensor))
        open_lists[kind] = piece, filled + nbytes
    return found


class Mean:
    """The mean of one piece over a group, in the dtype of sums; keeps its flat buffer from round to round.

    blocks: average only these blocks, see DivideAndShuffle; None is everything.
    """

    def __init__(self, piece: list[Named], blocks: BlockSparse | None = None):
        names, tensors = zip(*piece)
        self._numels = tuple(t.numel() for t in tensors)
        dtype, device = wide(tensors[0].dtype), tensors[0].device
        self._flat = torch.empty(sum(self._numels), dtype=dtype, device=device)
        self._blocks = blocks
        self._layout = None if blocks is None else Layout(names, self._numels, blocks.block_size)

    def start(self, piece: list[Named], members: Group, groups: Any, round_: int, stats: Stats,
              keep: bool = False) -> None:  # fmt: skip
        """Read the piece's tensors as they are now and start adding them up over the members.

        groups: carries the sum, see thinwire.replicas.groups. keep: remember what was read, for ``correct``.
        """
        begin = time.perf_counter()
        self._stats = stats
        self._tensors = [tensor.detach() for _, tensor in piece]
        self._members = len(members)
        torch.cat([t.reshape(-1).to(self._flat.dtype) for t in self._tensors], out=self._flat)
        self._before = self._flat.clone() if keep else None
        self._sent, self._chosen, self._work = self._flat, None, None
        if self._members > 1:
            if self._layout is not None:
                self._take(round_, groups.size)
            stats.count_bytes(ring_all_reduce_bytes(self._sent.numel() * self._sent.element_size(), self._members))
            self._work = groups.start_sum(self._sent, members)
        stats.encode_s += time.perf_counter() - begin

    def wait(self, divisors: list[float] | None = None) -> None:
        """Wait for the sum and make it a mean. divisors: one a tensor; None is the number of members."""
        begin = time.perf_counter()
        if self._work is not None:
            self._work.wait()
        self._work = None
        arrived = time.perf_counter()
        self._stats.exchange_s += arrived - begin
        if divisors is None:
            self._sent /= self._members
        else:
            for part, divisor in zip(self._flat.split(self._numels), divisors, strict=True):
                part /= divisor
        if self._chosen is not None:  # the chosen blocks are zero, so this writes the mean itself
            chosen, slots = self._chosen
            ones = torch.ones(len(slots.counts), dtype=self._flat.dtype, device=self._flat.device)
            ops.scatter_blocks_(self._sent[None], None, chosen, slots.table_on(self._flat.device),
                                self._layout.block_size, ones, True, self._flat)  # fmt: skip
        self._stats.decode_s += time.perf_counter() - arrived

    def write(self, only: list[bool] | None = None) -> None:
        """Put the mean in the tensors' place, in the storage that they have. only: which of them; None is all."""
        begin = time.perf_counter()
        for i, (tensor, mean) in enumerate(zip(self._tensors, self._flat.split(self._numels), strict=True)):
            if only is None or only[i]:
                tensor.copy_(mean.view(tensor.shape))
        self._stats.decode_s += time.perf_counter() - begin

    def values(self) -> torch.Tensor:
        """The mean, flat."""
        return self._flat

    def correction(self) -> list[torch.Tensor]:
        """The mean less what was read, a tensor each."""
        assert self._before is not None  # start was told to keep it
        return [c.view(t.shape) for c, t in zip((self._flat - self._before).split(self._numels), self._tensors)]

    def _take(self, round_, world_size):
        counts = self._blocks.counts_at(round_, world_size, self._numels)
        slots = self._layout.slots(counts)
        if all(slots.whole):
            return
        table, device = slots.table_on(self._flat.device), self._flat.device
        chosen = torch.empty(1, slots.total, dtype=torch.int64, device=device)
        ops.draw_blocks(table, self._layout.units_on(device), self._layout.block_size, self._blocks.seed, round_,
                        [0], [0], chosen)  # fmt: skip
        touched = torch.full((len(counts) + 1,), ops.TOUCHED, dtype=torch.int32, device=device)
        self._sent = torch.empty(slots.numel, dtype=self._flat.dtype, device=device)
        ops.take_blocks_(self._flat, chosen[0], table, self._layout.block_size, touched, None, self._sent)
        self._chosen = chosen, slots
