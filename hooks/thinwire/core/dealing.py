"""A payload dealt to n owners, each of whom adds up its part: by the parameter, whatever else is in the bucket.

Which rank keeps a rounding error follows from who owns what, and DDP's buckets change. So each parameter is dealt by
itself: by elements where each travels by itself, by whole slots where a block's values share a scale.
"""

from dataclasses import dataclass

import torch

from thinwire import ops
from thinwire.core.blocks import SLOTS, Slots, United, sizes_of


@dataclass(frozen=True)
class ByElement:
    """Of every parameter's elements the i-th n-th to rank i: rows of ``part`` elements.

    begins: int64 [segments], where each parameter's begin in a row.
    """

    slots: Slots | United
    n: int
    part: int
    begins: torch.Tensor

    def deal(self, values: torch.Tensor) -> torch.Tensor:
        """values [numel] as [n, part]; zeros where a parameter has no more."""
        rows = values.new_empty(self.n, self.part)
        ops.deal_elements(values, self.slots.table_on(values.device), self.slots.layout.block_size, self.begins, rows)
        return rows

    def undo(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [n, part] as the values [numel] that deal() would make them of."""
        values = self.slots.room(rows.dtype, rows.device)
        table, block_size = self.slots.table_on(rows.device), self.slots.layout.block_size
        ops.undeal_elements(rows, table, block_size, self.begins, values)
        return values

    def add_part(self, part: torch.Tensor, rank: int, chosen: torch.Tensor, factor: float, bad: torch.Tensor,
                 out: torch.Tensor) -> None:  # fmt: skip
        """Add factor times a rank's part [part] where its elements are in out [N], unless bad."""
        rows = part.new_zeros(self.n, self.part)
        rows[rank] = torch.where(bad != 0, torch.zeros_like(part), part)
        payload, table = self.undo(rows)[None], self.slots.table_on(out.device)
        factors = torch.full((len(table),), factor, dtype=out.dtype, device=out.device)
        ops.scatter_blocks_(payload, None, chosen[None], table, self.slots.layout.block_size, factors, True, out)


@dataclass(frozen=True)
class BySlot:
    """Every parameter's slots in turn to the ranks, from one of its own on: rows of ``part`` slots.

    places: int64 [total], rank * part + place of each slot.
    """

    slots: Slots | United
    n: int
    part: int
    places: torch.Tensor

    def add_part(self, part: torch.Tensor, rank: int, chosen: torch.Tensor, factor: float, bad: torch.Tensor,
                 out: torch.Tensor) -> None:  # fmt: skip
        """Add factor times a rank's part [part * block_size] where its blocks are in out [N], unless bad."""
        table, block_size = self.slots.table_on(out.device), self.slots.layout.block_size
        ops.add_rows_(part, self.places, rank * self.part, chosen, table, block_size, factor, bad, out)


def by_element(slots: Slots | United, n: int, device: torch.device) -> ByElement:
    if isinstance(slots, Slots):
        return slots.plan((ByElement, n, device), lambda: _by_element(slots, n, device))
    return _by_element(slots, n, device)


def by_slot(slots: Slots | United, n: int, device: torch.device) -> BySlot:
    if isinstance(slots, Slots):
        return slots.plan((BySlot, n, device), lambda: _by_slot(slots, n, device))
    return _by_slot(slots, n, device)


def most_slots(counts: torch.Tensor, turns: torch.Tensor, n: int) -> int:
    """Slots of the rank that owns most, of parameters with so many, int64 [segments] in the host's memory."""
    after = (torch.arange(n, device="cpu")[:, None] - turns) % n
    return int(((counts - after + n - 1) // n).sum(1).max()) if n and len(counts) else 0


def _by_element(slots, n, device):
    shares = (sizes_of(slots, device) + n - 1) // n
    ends = shares.cumsum(0)
    if isinstance(slots, United) and device.type != "cpu":
        part = by_element(slots.within, n, device).part
    else:
        part = int(ends[-1]) if len(ends) else 0
    return ByElement(slots, n, part, ends - shares)


def _by_slot(slots, n, device):
    turns, table = slots.layout.turns_on(device, n), slots.table_on(device)
    if isinstance(slots, United) and device.type != "cpu":
        part = by_slot(slots.within, n, device).part
    else:
        part = most_slots(table[:, SLOTS].cpu(), turns.cpu(), n)
    places = torch.empty(slots.total, dtype=torch.int64, device=device)
    ops.place_slots(table, slots.layout.block_size, turns, n, part, places)
    return BySlot(slots, n, part, places)
