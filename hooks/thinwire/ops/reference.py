"""Every operator of :mod:`thinwire.ops` in plain PyTorch: what it means, and what runs without a compiler.

The C++ and CUDA versions give the same bits on float32 and float64. Two orders make that possible: a block's squared
norm is summed in 16 interleaved lanes that are then folded in halves, and payloads are added in rank order.
"""

import torch

from thinwire.ops.reference_owners import deal_elements, place_slots, undeal_elements, unite_blocks
from thinwire.ops.reference_wire import (
    NONFINITE,
    TOUCHED,
    add_quantised,
    add_rows_,
    quantise_blocks_,
    unquantise_blocks,
)

__all__ = [
    "NONFINITE", "TOUCHED", "accumulate_", "add_quantised", "add_rows_", "deal_elements", "draw_blocks", "examine",
    "gather_blocks", "place_slots", "quantise_blocks_", "scatter_blocks_", "select_blocks", "settle_", "take_blocks_",
    "undeal_elements", "unite_blocks", "unquantise_blocks",
]  # fmt: skip

LANES = 16
LARGEST = {torch.float32: 2.0**62, torch.float64: 2.0**500}
_GOLDEN = 0x9E3779B97F4A7C15


def accumulate_(residual, velocity, grad, momentum, table, block_size, norms, status, residual_before=None,
                velocity_before=None):  # fmt: skip
    if residual_before is not None:
        residual.copy_(residual_before)
    if velocity is not None and velocity_before is not None:
        velocity.copy_(velocity_before)
    _examine(grad, table, status, _usable(grad, residual.dtype))
    for s, (start, numel, first_block, *_) in enumerate(table.tolist()):
        piece = slice(start, start + numel)
        if status[s] & TOUCHED:
            step = _usable_or_zero(grad[piece], residual.dtype)
            if velocity is not None:
                step = velocity[piece].mul_(momentum).add_(step)
            residual[piece].add_(step)
        squared = _squared_norms(residual[piece], block_size)
        norms[first_block : first_block + len(squared)] = squared
        if not bool(torch.isfinite(squared).all()):
            status[s] |= NONFINITE
            status[-1] |= NONFINITE


def examine(grad, table, status):
    _examine(grad, table, status, torch.isfinite(grad))


def _examine(grad, table, status, fine):
    status.zero_()
    for s, (start, numel, *_) in enumerate(table.tolist()):
        piece = grad[start : start + numel]
        touched = TOUCHED if bool((piece != 0).any()) else 0
        status[s] = touched | (0 if bool(fine[start : start + numel].all()) else NONFINITE)
        status[-1] |= status[s]


def draw_blocks(table, units, block_size, seed, step, streams, deals, chosen):
    for row, (stream, deal) in enumerate(zip(streams, deals, strict=True)):
        for (_, numel, _, slots, first_slot, _), unit in zip(table.tolist(), units.tolist(), strict=True):
            blocks = -(-numel // block_size)
            order = torch.sort(_keys(blocks, seed, step, unit, stream), stable=True).indices
            dealt = (torch.arange(slots, device="cpu") + deal * slots) % max(blocks, 1)
            chosen[row, first_slot : first_slot + slots] = order[dealt].sort().values.to(chosen.device)


def select_blocks(norms, table, block_size, chosen):
    for _, numel, first_block, slots, first_slot, _ in table.tolist():
        blocks = -(-numel // block_size)
        order = torch.sort(norms[first_block : first_block + blocks], descending=True, stable=True).indices
        chosen[first_slot : first_slot + slots] = order[:slots].sort().values


def gather_blocks(source, chosen, table, block_size, status, scale, payload):
    _gather(source, chosen, table, block_size, status, scale, payload, clear=False)


def take_blocks_(source, chosen, table, block_size, status, scale, payload):
    _gather(source, chosen, table, block_size, status, scale, payload, clear=True)


def _gather(source, chosen, table, block_size, status, scale, payload, clear):
    if status is not None and status[-1] & NONFINITE:
        payload.fill_(float("nan"))
        return
    payload.zero_()
    wide = _wide(source.dtype)
    factor = torch.ones((), dtype=wide, device=source.device) if scale is None else scale.to(wide)
    for s, index, slot in _segments(chosen, table, block_size):
        if status is None or status[s] & TOUCHED:
            values = source[index].to(wide)
            payload[slot] = (values * factor).to(payload.dtype)
            if clear:
                taken = payload[slot].to(wide) * (1 / factor)
                source[index] = torch.where(torch.isfinite(taken), values - taken, values).to(source.dtype)


def scatter_blocks_(payloads, inverses, chosen, table, block_size, factors, accumulate, out):
    wide = _wide(out.dtype)
    total = torch.zeros(out.shape, dtype=wide, device=out.device)
    touched = torch.zeros(out.shape, dtype=torch.bool, device=out.device)
    for rank in range(payloads.shape[0]):
        for _, index, slot in _segments(chosen[rank], table, block_size):
            values = payloads[rank, slot].to(wide)
            total[index] += values if inverses is None else values * inverses[rank].to(wide)
            touched[index] = True
    for s, (start, numel, *_) in enumerate(table.tolist()):
        total[start : start + numel] *= factors[s].to(wide)
    before = out.to(wide) if accumulate else torch.zeros_like(total)
    out.copy_(torch.where(touched, before + total if accumulate else total, before))


def settle_(residual, velocity, grad, momentum, payload, inverse, chosen, table, block_size, status, bad):
    segments = [(s, i, j) for s, i, j in _segments(chosen, table, block_size) if status[s] & TOUCHED]
    rows = table.tolist()
    if not bool(bad):
        for s, index, _ in segments if velocity is not None else ():
            _, numel, _, slots, *_ = rows[s]
            if slots < -(-numel // block_size):
                velocity[index] = 0
        return
    if not status[-1] & NONFINITE:
        for _, index, slot in segments:
            values = payload[slot].to(residual.dtype)
            taken = values if inverse is None else values * inverse.to(residual.dtype)
            residual[index] += torch.where(torch.isfinite(taken), taken, 0.0)  # else take_blocks_ took nothing
    for s, (start, numel, *_) in enumerate(rows):
        if status[s] & TOUCHED:
            piece = slice(start, start + numel)
            step = _usable_or_zero(grad[piece], residual.dtype)
            residual[piece].sub_(step if velocity is None else velocity[piece])
            if velocity is not None:
                velocity[piece].sub_(step).div_(momentum)


def _segments(chosen, table, block_size):
    """For each parameter: its row, the elements of its chosen blocks, and where they lie in the payload."""
    within = torch.arange(block_size, device=chosen.device)
    for s, (start, numel, _, slots, first_slot, offset) in enumerate(table.tolist()):
        element = (chosen[first_slot : first_slot + slots, None] * block_size + within).flatten()
        slot = offset + torch.arange(slots * block_size, device=chosen.device)
        inside = element < numel
        yield s, start + element[inside], slot[inside]


def _squared_norms(piece, block_size):
    blocks = -(-piece.numel() // block_size)
    flat = piece.new_zeros(blocks * block_size)
    flat[: piece.numel()] = piece
    padded = piece.new_zeros(blocks, -(-block_size // LANES) * LANES)
    padded[:, :block_size] = flat.view(blocks, block_size)
    lanes = piece.new_zeros(blocks, LANES)
    for column in padded.view(blocks, padded.shape[1] // LANES, LANES).unbind(1):
        lanes = lanes + column * column
    for half in (8, 4, 2, 1):
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def _keys(blocks, seed, step, unit, stream):
    """int64 [blocks]: splitmix64's sequence, started from the four numbers; equal bits in C++ and CUDA."""
    start = torch.zeros((), dtype=torch.int64, device="cpu")
    for number in (seed, step, unit, stream):
        start = _mix((start ^ _wrap(number)) + _wrap(_GOLDEN))
    return _mix(start + (torch.arange(blocks, dtype=torch.int64, device="cpu") + 1) * _wrap(_GOLDEN))


def _mix(z):
    z = (z ^ _shift(z, 30)) * _wrap(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _wrap(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z, bits):
    """Logical right shift: torch's is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _wrap(number):
    """A number modulo 2^64 as the int64 with the same bits."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _usable(grad, wide):
    """Which elements a memory can take: beyond LARGEST, squared norms would overflow."""
    return grad.to(wide).abs() <= LARGEST[wide]  # false for NaN


def _usable_or_zero(grad, wide):
    return torch.where(_usable(grad, wide), grad, torch.zeros_like(grad)).to(wide)


def _wide(dtype):
    """The dtype in which values of ``dtype`` are added."""
    return torch.float64 if dtype == torch.float64 else torch.float32
