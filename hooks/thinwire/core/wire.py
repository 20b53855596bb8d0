"""Values as they cross the network: a dtype, a scale where the dtype needs one, and the bytes of a message.

Wires of fewer than 16 bits are in ``levels.py``.
"""

from dataclasses import dataclass
from typing import Any

import torch

from thinwire.core.blocks import Slots, United
from thinwire.core.dealing import ByElement, by_element


@dataclass
class Payload:
    """What one rank sends of one flat gradient.

    values [P] in the wire dtype, or uint8 [n, bytes] where a block's values share a scale (see ``levels.py``); scale,
    0-d float32 power of two by which values were multiplied, or None; indices, integers, the block numbers that the
    other ranks cannot compute, or None. dealing: how it is dealt to owners, or None where all goes to all.
    """

    values: torch.Tensor
    scale: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    dealing: Any = None


@dataclass
class Arrived:
    """What R ranks sent: values [R, P], inverses float32 [R] to multiply them by or None, indices [R, I] or None.

    finite: whether all values are, 0-d, where that is known already.
    """

    values: torch.Tensor
    inverses: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    finite: torch.Tensor | None = None

    def all_finite(self) -> torch.Tensor:
        """0-d bool."""
        return all_finite(self.values) if self.finite is None else self.finite


class Wire:
    """Packs payloads of one dtype into messages and back. A message is uint8: scale, indices, values.

    takes_blocks: blocks are packed with a scale of their own, by the wire itself. saturates: large values are cut off.
    """

    takes_blocks = False
    saturates = False

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    # ---- values ----

    def scale(self, largest: torch.Tensor) -> torch.Tensor | None:
        """The power of two that brings values of up to ``largest`` (0-d) just under 2^15; None where none is needed.

        float16 ends at 65504 and is coarse below 6e-5: unscaled, large gradients would become inf and small ones 0.
        inf and NaN are left to travel as they are.
        """
        if self.dtype != torch.float16:
            return None
        largest = largest.to(torch.float32)
        usable = torch.isfinite(largest) & (largest > 0)
        exponent = torch.frexp(torch.where(usable, largest, torch.full_like(largest, 2.0**14))).exponent
        return _power_of_two((15 - exponent).clamp(-100, 100))

    def narrowed_to(self, dtype: torch.dtype) -> "Wire":
        """The wire for gradients of a dtype where no memory needs more: nothing is gained by more bytes than theirs."""
        return Wire(dtype) if dtype.itemsize < self.dtype.itemsize else self

    def pack(self, values: torch.Tensor) -> Payload:
        """Values [P] of any float dtype in the wire dtype."""
        if self.dtype != torch.float16:
            return Payload(values.to(self.dtype))
        scale = self.scale(values.abs().max() if values.numel() else values.new_zeros(()))
        assert scale is not None  # float16 always has one
        return Payload((values * scale.to(values.dtype)).to(self.dtype), scale)

    def unpack(self, payload: Payload, slots: Slots | United, dtype: torch.dtype) -> torch.Tensor:
        """The values [P] that the other ranks will see, in ``dtype``."""
        values = payload.values.to(dtype)
        return values if payload.scale is None else values * (1 / payload.scale.to(dtype))

    def take(self, source: torch.Tensor, choice: Any, status: torch.Tensor | None, dealing: Any,
             keep: bool) -> Payload:  # fmt: skip
        """The chosen blocks of source [N], where the wire ``takes_blocks``."""
        raise NotImplementedError

    # ---- messages to all ranks ----

    def message(self, payload: Payload) -> torch.Tensor:
        """The payload as uint8 [bytes]; the values themselves, not a copy, where nothing goes before them."""
        parts = [part.reshape(-1).view(torch.uint8) for part in (payload.scale, payload.indices) if part is not None]
        values = payload.values.view(torch.uint8)
        return torch.cat([*parts, values, values.new_zeros(-values.numel() % 4)]) if parts else values

    def parse(self, messages: torch.Tensor, like: Payload, slots: Slots | United, wide: torch.dtype) -> Arrived:
        """The messages [R, bytes] of ranks whose payloads all have the shapes of ``like``. wide: of sums."""
        scale, messages = split(messages, like.scale)
        indices, messages = split(messages, like.indices)
        values = seen_as(messages[:, : like.values.numel() * self.dtype.itemsize], self.dtype)
        return Arrived(values, None if scale is None else 1 / scale.reshape(-1), indices)

    # ---- messages to owners, and what comes back from them ----

    def dealing(self, slots: Slots | United, n: int, device: torch.device) -> ByElement:
        """How a payload is dealt to n owners."""
        return by_element(slots, n, device)

    def rows(self, payload: Payload) -> torch.Tensor:
        """What each owner is sent, uint8 [n, bytes]."""
        values = payload.dealing.deal(payload.values).view(torch.uint8)
        if payload.scale is None:
            return values
        scale = payload.scale.reshape(1).view(torch.uint8).expand(len(values), -1)
        return torch.cat([scale, values, values.new_zeros(len(values), -values.shape[1] % 4)], 1)

    def add_up(self, rows: torch.Tensor, sent: Payload, slots: Slots | United, wide: torch.dtype,
               keeps_lost: bool) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """What a rank owns of all ranks' payloads, from the rows [n, bytes] that it was sent, added up in rank order:
        the message that brings it back, and what that loses to the wire dtype, or None."""
        like = Payload(sent.values.new_empty(sent.dealing.part), sent.scale)
        arrived = self.parse(rows, like, slots, wide)
        total = torch.zeros(like.values.shape, dtype=wide, device=rows.device)
        for rank, values in enumerate(arrived.values.to(wide)):
            total += values if arrived.inverses is None else values * arrived.inverses[rank]
        result = self.pack(total)
        lost = total - self.unpack(result, slots, wide) if keeps_lost and self.dtype != wide else None
        return self.message(result), lost

    def spread(self, messages: torch.Tensor, sent: Payload, slots: Slots | United, wide: torch.dtype) -> Arrived:
        """The sum, from the messages [n, bytes] of its owners."""
        like = Payload(sent.values.new_empty(sent.dealing.part), sent.scale)
        parts = self.parse(messages, like, slots, wide)
        values = parts.values
        if parts.inverses is not None:
            values = values.to(torch.float32) * parts.inverses[:, None]
        return Arrived(sent.dealing.undo(values)[None])

    # ---- sizes, for estimates ----

    def message_bytes(self, slots: Slots, index_bytes: int) -> int:
        """Bytes of a message to all ranks."""
        return slots.numel * self.dtype.itemsize + index_bytes

    def row_bytes(self, slots: Slots, n: int) -> tuple[int, int]:
        """Bytes to and from each owner."""
        sizes = [end - begin for begin, end in zip(slots.offsets, slots.offsets[1:])]
        each = self.dtype.itemsize * sum(-(-size // n) for size in sizes)
        return each, each


class SummableHalf(Wire):
    """float16 for an all-reduce that adds in float16, where all ranks must use one scale, known beforehand.

    Values are divided by the power of two above the number of ranks, and finite ones saturate at 32768, so that no
    sum overflows.
    """

    saturates = True
    limit = 2.0**15

    def __init__(self, world_size: int):
        super().__init__(torch.float16)
        self.exponent = -(world_size - 1).bit_length()

    def scale(self, largest: torch.Tensor) -> torch.Tensor:
        return torch.tensor(2.0**self.exponent, device=largest.device)

    def pack(self, values: torch.Tensor) -> Payload:
        scale = self.scale(values)
        scaled = values * scale.to(values.dtype)
        highest = self.limit * float(scale)
        limited = torch.where(torch.isfinite(scaled), scaled.clamp(-highest, highest), scaled)
        return Payload(limited.to(self.dtype), scale)


class SummableFloat(Wire):
    """float32 for an all-reduce that adds in the wire dtype; float16 gradients travel as float16."""

    def __init__(self, world_size: int):
        super().__init__(torch.float32)
        self.world_size = world_size

    def narrowed_to(self, dtype: torch.dtype) -> Wire:
        return SummableHalf(self.world_size) if dtype == torch.float16 else self


def all_finite(values: torch.Tensor) -> torch.Tensor:
    """0-d bool. inf and NaN show in the extremes; isfinite() of all elements takes ten times as long."""
    if not values.numel():
        return torch.ones((), dtype=torch.bool, device=values.device)
    return torch.isfinite(torch.stack(torch.aminmax(values))).all()


def split(messages, part):
    if part is None:
        return None, messages
    end = part.numel() * part.element_size()
    return seen_as(messages[:, :end], part.dtype), messages[:, end:]


def seen_as(messages, dtype):
    """Bytes [R, B] as elements of a dtype: themselves, or a copy where they are not aligned to it."""
    if messages.numel() == 0:  # no view: PyTorch asks for strides that a tensor without elements need not have
        return messages.new_empty(len(messages), 0, dtype=dtype)
    if messages.stride(0) % dtype.itemsize or messages.storage_offset() % dtype.itemsize:
        messages = messages.clone(memory_format=torch.contiguous_format)
    return messages.view(dtype)


def _power_of_two(exponent):
    """2**exponent as float32 from its bits: exact, where pow on a GPU need not be."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)
