"""A flat tensor seen as blocks.

A DDP bucket is one flat tensor that holds several parameters one after the other. Each parameter is a *segment*
of it, and each segment is cut into blocks of ``block_size`` elements of which the last may be ragged. Blocks never
straddle two parameters, and everything that is drawn or chosen is drawn or chosen per parameter: DDP rearranges its
buckets after the first backward pass, and after a resume, and nothing that thinwire computes depends on how.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from thinwire import ops

# Columns of the int64 table [segments, 6] from which every operator reads the geometry.
START, NUMEL, FIRST_BLOCK, SLOTS, FIRST_SLOT, OFFSET = range(6)
NOWHERE = torch.iinfo(torch.int64).max  # the number of a block in a slot that is not used


def unit_of(name: str) -> int:
    """A parameter's key for the random generator: 63 bits of its name, the same on every rank and in every run."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Layout:
    """Which parameters a flat tensor holds, in order and without gaps, and how they are cut into blocks.

    names: the parameters' names; numels: their numbers of elements; block_size: elements a block.
    """

    names: tuple[str, ...]
    numels: tuple[int, ...]
    block_size: int

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Element at which each parameter starts."""
        return _running_sum(self.numels)[:-1]

    @cached_property
    def numel(self) -> int:
        return sum(self.numels)

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """Number of blocks of each parameter."""
        return tuple(-(-numel // self.block_size) for numel in self.numels)

    @cached_property
    def first_blocks(self) -> tuple[int, ...]:
        """Each parameter's first block, counted over the whole flat tensor; one entry more, the total."""
        return _running_sum(self.blocks)

    @cached_property
    def units(self) -> torch.Tensor:
        """int64 [segments]: the generator's key of each parameter."""
        return torch.tensor([unit_of(name) for name in self.names], dtype=torch.int64, device="cpu")

    @cached_property
    def firsts(self) -> torch.Tensor:
        """int64 [segments]: first_blocks without the total."""
        return torch.tensor(self.first_blocks[:-1], dtype=torch.int64, device="cpu")

    def units_on(self, device: torch.device) -> torch.Tensor:
        """The units on a device."""
        return self.plan(("units", device), lambda: self.units.to(device))

    def turns_on(self, device: torch.device, n: int) -> torch.Tensor:
        """int64 [segments], on a device: of n ranks the one with which each parameter begins, whatever is around it."""
        return self.plan(("turns", device, n), lambda: (self.units % n).to(device))

    def plan(self, key: tuple, make: Callable[[], Any]) -> Any:
        """What follows from the layout alone, made once."""
        return _made_once(self._plans, key, make)

    @cached_property
    def _plans(self) -> dict[tuple, Any]:
        return {}

    def slots(self, counts: tuple[int, ...]) -> "Slots":
        """The payload in which the i-th parameter sends ``counts[i]`` of its blocks."""
        return Slots(self, tuple(counts))


@dataclass(frozen=True)
class Slots:
    """A payload's shape: how many blocks of each parameter it carries, and where.

    A parameter that travels whole takes exactly its elements; any other takes ``count * block_size``, the ragged
    block padded with zeros, so that the size depends on the counts alone and is the same on every rank.
    """

    layout: Layout
    counts: tuple[int, ...]

    @cached_property
    def whole(self) -> tuple[bool, ...]:
        """For each parameter, whether all of its blocks travel."""
        return tuple(count == blocks for count, blocks in zip(self.counts, self.layout.blocks, strict=True))

    @cached_property
    def first_slots(self) -> tuple[int, ...]:
        return _running_sum(self.counts)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        return _running_sum(
            numel if whole else count * self.layout.block_size
            for count, numel, whole in zip(self.counts, self.layout.numels, self.whole, strict=True)
        )

    @property
    def total(self) -> int:
        """Slots in the payload."""
        return self.first_slots[-1]

    @property
    def numel(self) -> int:
        """Elements in the payload, padding included."""
        return self.offsets[-1]

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """The density of each parameter as it really is, after rounding to blocks: count / blocks."""
        return tuple(c / b if b else 1.0 for c, b in zip(self.counts, self.layout.blocks, strict=True))

    @cached_property
    def table(self) -> torch.Tensor:
        """int64 [segments, 6]: start, numel, first block, slots, first slot, payload offset."""
        layout = self.layout
        rows = zip(layout.starts, layout.numels, layout.first_blocks, self.counts, self.first_slots, self.offsets)
        return torch.tensor(list(rows), dtype=torch.int64, device="cpu").view(-1, 6)

    def table_on(self, device: torch.device) -> torch.Tensor:
        """The table on a device."""
        return self.plan(("table", device), lambda: self.table.to(device))

    def every_block_on(self, device: torch.device) -> torch.Tensor:
        return self.plan(("every block", device), lambda: self.every_block.to(device))

    def room(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A payload [numel] to be written."""
        return torch.empty(self.numel, dtype=dtype, device=device)

    def plan(self, key: tuple, make: Callable[[], Any]) -> Any:
        """What follows from the shape alone, made once."""
        return _made_once(self._plans, key, make)

    @cached_property
    def _plans(self) -> dict[tuple, Any]:
        return {}

    @cached_property
    def every_block(self) -> torch.Tensor:
        """int64 [total]: the block in each slot when every parameter travels whole."""
        nothing = torch.empty(0, dtype=torch.int64, device="cpu")
        return torch.cat([torch.arange(blocks, device="cpu") for blocks in self.layout.blocks] or [nothing])


@dataclass(frozen=True)
class United:
    """A payload's shape that a step has found, as a table on its device.

    within: the shape of what was asked for, which has as many slots of each parameter or more. total and numel: slots
    and elements; on a GPU those of ``within``, because the host does not know how many there are, and what is beyond
    them is nothing: its blocks are NOWHERE, its elements 0.
    """

    within: Slots
    table: torch.Tensor
    total: int
    numel: int

    @property
    def layout(self) -> Layout:
        return self.within.layout

    def table_on(self, device: torch.device) -> torch.Tensor:
        return self.table

    def room(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A payload [numel] to be written."""
        make = torch.zeros if self.table.is_cuda else torch.empty
        return make(self.numel, dtype=dtype, device=device)


def unite(named: torch.Tensor, asked: Slots) -> tuple[United, torch.Tensor]:
    """Shape and block numbers, int64 [total], of the union of what was named and of the parameters asked for whole.

    named: numbers counted over the whole flat tensor, [n, L]; -1 where there is none.
    """
    device, block_size = named.device, asked.layout.block_size
    chosen = torch.empty(asked.total, dtype=torch.int64, device=device)
    table = torch.empty(len(asked.counts), 6, dtype=torch.int64, device=device)
    ops.unite_blocks(named, asked.table_on(device), block_size, chosen, table)
    if device.type != "cpu" or not len(table):
        return United(asked, table, asked.total, asked.numel), chosen
    _, numel, _, slots, first_slot, offset = table[-1].tolist()
    total = first_slot + slots
    width = numel if slots == asked.layout.blocks[-1] else slots * block_size
    return United(asked, table, total, offset + width), chosen[:total]


def sizes_of(slots: Slots | United, device: torch.device) -> torch.Tensor:
    """int64 [segments]: elements that each parameter has in a payload."""
    layout, table = slots.layout, slots.table_on(device)
    blocks = layout.plan(
        ("blocks", device), lambda: torch.tensor(layout.blocks, dtype=torch.int64, device="cpu").to(device)
    )
    return torch.where(table[:, SLOTS] == blocks, table[:, NUMEL], table[:, SLOTS] * layout.block_size)


def _made_once(plans, key, make):
    if key not in plans:
        plans[key] = make()
    return plans[key]


def _running_sum(values: Iterable[int]) -> tuple[int, ...]:
    total, sums = 0, [0]
    for value in values:
        total += value
        sums.append(total)
    return tuple(sums)
