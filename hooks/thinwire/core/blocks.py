"""A flat tensor seen as blocks.

A DDP bucket is one flat tensor that holds several parameters one after the other. Each parameter is a *segment*
of it, and each segment is cut into blocks of ``block_size`` elements of which the last may be ragged. Blocks never
straddle two parameters, and everything that is drawn or chosen is drawn or chosen per parameter: DDP rearranges its
buckets after the first backward pass, and after a resume, and nothing that thinwire computes depends on how.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

# Columns of the int64 table [segments, 6] from which every operator reads the geometry.
START, NUMEL, FIRST_BLOCK, SLOTS, FIRST_SLOT, OFFSET = range(6)


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
    def _units(self) -> dict[torch.device, torch.Tensor]:
        return {}

    def units_on(self, device: torch.device) -> torch.Tensor:
        """The units on a device, copied there once."""
        if device not in self._units:
            self._units[device] = self.units.to(device)
        return self._units[device]

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

    @cached_property
    def _tables(self) -> dict[torch.device, torch.Tensor]:
        return {}

    def table_on(self, device: torch.device) -> torch.Tensor:
        """The table on a device, copied there once."""
        if device not in self._tables:
            self._tables[device] = self.table.to(device)
        return self._tables[device]

    @cached_property
    def every_block(self) -> torch.Tensor:
        """int64 [total]: the block in each slot when every parameter travels whole."""
        nothing = torch.empty(0, dtype=torch.int64, device="cpu")
        return torch.cat([torch.arange(blocks, device="cpu") for blocks in self.layout.blocks] or [nothing])


def _running_sum(values: Iterable[int]) -> tuple[int, ...]:
    total, sums = 0, [0]
    for value in values:
        total += value
        sums.append(total)
    return tuple(sums)
