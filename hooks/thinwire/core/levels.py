"""Wires of 8, 4 and 2 bits: whole numbers of levels, and one scale for each block of values.

A block's scale is its largest magnitude divided by the largest number (127, 7 or 1), as bfloat16 and rounded up, so
that nothing is cut off; each value is divided by it and rounded to the nearest number, ties to even. bfloat16 because
it has float32's range: blocks of a gradient differ by more than float8 spans, which would need a second scale above
these. It is exact besides: number times scale, and value less that, are float32s.

On the wire of ``block_size`` values and ``slots`` blocks, a row is

    slots x 2 bytes             scales, bfloat16, little-endian; NaN where a gradient was not finite
    slots x ceil(block_size * bits / 8) bytes      numbers in two's complement, the first in the lowest bits

Sums are quantised once, by their owner. int2 comes back in 4 bits: of a sum three levels would be too few.
"""

import functools

import torch

from thinwire import ops
from thinwire.core.blocks import Layout, Slots, United
from thinwire.core.dealing import BySlot, by_slot, most_slots
from thinwire.core.selection import Choice
from thinwire.core.wire import Arrived, Payload, Wire, seen_as, split

BITS = {"int8": (8, 8), "int4": (4, 4), "int2": (2, 4)}  # there and back


class Levels(Wire):
    """Packs blocks in few bits; only for what has a memory of what that rounds off.

    dtype: of what it unpacks to.
    """

    takes_blocks = True

    def __init__(self, name: str):
        super().__init__(torch.float32)
        self.name = name
        self.there, self.back = BITS[name]

    def narrowed_to(self, dtype: torch.dtype) -> Wire:
        return self

    def scale(self, largest: torch.Tensor) -> torch.Tensor | None:
        return None

    def take(self, source: torch.Tensor, choice: Choice, status: torch.Tensor | None, dealing: BySlot | None,
             keep: bool) -> Payload:  # fmt: skip
        """The chosen blocks of source [N], which keeps what was rounded off where ``keep`` says so. status: see
        thinwire.ops; what is not finite there is sent as NaN."""
        slots = choice.slots
        places, n, part = (None, 1, slots.total) if dealing is None else (dealing.places, dealing.n, dealing.part)
        block_size = slots.layout.block_size
        rows = torch.empty(n, part * slot_bytes(block_size, self.there), dtype=torch.uint8, device=source.device)
        table = slots.table_on(source.device)
        ops.quantise_blocks_(source, choice.own, table, block_size, status, places, self.there, keep, rows)
        return Payload(rows, dealing=dealing)

    def unpack(self, payload: Payload, slots: Slots | United, dtype: torch.dtype) -> torch.Tensor:
        values = slots.room(dtype, payload.values.device)
        places = None if payload.dealing is None else payload.dealing.places
        self._unquantise(payload.values, self.there, places, slots, values[None])
        return values

    def message(self, payload: Payload) -> torch.Tensor:
        row = payload.values.view(-1)
        return row if payload.indices is None else torch.cat([payload.indices.view(torch.uint8), row])

    def parse(self, messages: torch.Tensor, like: Payload, slots: Slots | United, wide: torch.dtype) -> Arrived:
        indices, rows = split(messages, like.indices)
        values = torch.empty(len(rows), slots.numel, dtype=wide, device=rows.device)
        self._unquantise(rows, self.there, None, slots, values)
        return Arrived(values, None, indices, _finite(rows, self.there, slots.layout.block_size))

    def dealing(self, slots: Slots | United, n: int, device: torch.device) -> BySlot:  # type: ignore[override]
        return by_slot(slots, n, device)

    def rows(self, payload: Payload) -> torch.Tensor:
        return payload.values

    def add_up(self, rows: torch.Tensor, sent: Payload, slots: Slots | United, wide: torch.dtype,
               keeps_lost: bool) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        block_size, part, device = slots.layout.block_size, sent.dealing.part, rows.device
        total = torch.empty(part * block_size, dtype=wide, device=device)
        ops.add_quantised(rows, self.there, block_size, total)
        result = torch.empty(1, part * slot_bytes(block_size, self.back), dtype=torch.uint8, device=device)
        whole = _in_a_row(part, block_size)
        ops.quantise_blocks_(total, whole.every_block_on(device), whole.table_on(device), block_size, None, None,
                             self.back, keeps_lost, result)  # fmt: skip
        return result[0], total if keeps_lost else None

    def spread(self, messages: torch.Tensor, sent: Payload, slots: Slots | United, wide: torch.dtype) -> Arrived:
        values = slots.room(wide, messages.device)[None]
        self._unquantise(messages, self.back, sent.dealing.places, slots, values)
        return Arrived(values, finite=_finite(messages, self.back, slots.layout.block_size))

    def message_bytes(self, slots: Slots, index_bytes: int) -> int:
        return slots.total * slot_bytes(slots.layout.block_size, self.there) + index_bytes

    def row_bytes(self, slots: Slots, n: int) -> tuple[int, int]:
        counts = torch.tensor(slots.counts, dtype=torch.int64, device="cpu")
        part = most_slots(counts, slots.layout.units % n, n)
        return tuple(part * slot_bytes(slots.layout.block_size, bits) for bits in (self.there, self.back))  # type: ignore

    @staticmethod
    def _unquantise(rows, bits, places, slots, values):
        ops.unquantise_blocks(rows, bits, places, slots.table_on(rows.device), slots.layout.block_size, values)


def slot_bytes(block_size: int, bits: int) -> int:
    """Bytes of a block on the wire, its scale among them."""
    return 2 + (block_size * bits + 7) // 8


def wire_of(wire_dtype: torch.dtype | str) -> Wire:
    """The wire that a method asks for."""
    return Levels(wire_dtype) if isinstance(wire_dtype, str) else Wire(wire_dtype)


def _finite(rows, bits, block_size):
    """Whether all blocks in rows [n, bytes] are: no scale is NaN."""
    count = rows.shape[1] // slot_bytes(block_size, bits)
    return ~torch.isnan(seen_as(rows[:, : 2 * count], torch.bfloat16)).any()


@functools.lru_cache(maxsize=8)
def _in_a_row(part, block_size):
    """So many blocks, one after the other, as the one parameter of a flat tensor."""
    return Layout(("",), (part * block_size,), block_size).slots((part,))
