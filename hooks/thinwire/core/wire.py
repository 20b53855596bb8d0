"""Values as they cross the network: a dtype, a scale where the dtype needs one, and the bytes of a message."""

from dataclasses import dataclass

import torch


@dataclass
class Payload:
    """What one rank sends of one flat gradient.

    values [P] in the wire dtype; scale, 0-d float32 power of two by which they were multiplied, or None; indices,
    int32 or int64, the block numbers that the other ranks cannot compute, or None.
    """

    values: torch.Tensor
    scale: torch.Tensor | None = None
    indices: torch.Tensor | None = None


@dataclass
class Arrived:
    """What R ranks sent: values [R, P], inverses float32 [R] to multiply them by or None, indices [R, I] or None."""

    values: torch.Tensor
    inverses: torch.Tensor | None = None
    indices: torch.Tensor | None = None


class Wire:
    """Packs payloads of one dtype into messages and back. A message is uint8: scale, indices, values."""

    saturates = False

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

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

    def unpack(self, payload: Payload, dtype: torch.dtype) -> torch.Tensor:
        """The values [P] that the other ranks will see, in ``dtype``."""
        values = payload.values.to(dtype)
        return values if payload.scale is None else values * (1 / payload.scale.to(dtype))

    def message(self, payload: Payload) -> torch.Tensor:
        """The payload as uint8 [bytes]; the values themselves, not a copy, where nothing goes before them."""
        parts = [part.reshape(-1).view(torch.uint8) for part in (payload.scale, payload.indices) if part is not None]
        values = payload.values.view(torch.uint8)
        return torch.cat([*parts, values, values.new_zeros(-values.numel() % 4)]) if parts else values

    def parse(self, messages: torch.Tensor, like: Payload) -> Arrived:
        """The messages [R, bytes] of ranks whose payloads all have the shapes of ``like``."""
        scale, messages = _split(messages, like.scale)
        indices, messages = _split(messages, like.indices)
        values = _seen_as(messages[:, : like.values.numel() * self.dtype.itemsize], self.dtype)
        return Arrived(values, None if scale is None else 1 / scale.reshape(-1), indices)


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


def _split(messages, part):
    if part is None:
        return None, messages
    end = part.numel() * part.element_size()
    return _seen_as(messages[:, :end], part.dtype), messages[:, end:]


def _seen_as(messages, dtype):
    """Bytes [R, B] as elements of a dtype: themselves, or a copy where they are not aligned to it."""
    if messages.numel() == 0:  # no view: PyTorch asks for strides that a tensor without elements need not have
        return messages.new_empty(len(messages), 0, dtype=dtype)
    if messages.stride(0) % dtype.itemsize or messages.storage_offset() % dtype.itemsize:
        messages = messages.clone(memory_format=torch.contiguous_format)
    return messages.view(dtype)


def _power_of_two(exponent):
    """2**exponent as float32 from its bits: exact, where pow on a GPU need not be."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)
