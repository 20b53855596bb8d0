"""The operators of a wire of 8, 4 or 2 bits in plain PyTorch: a block is one bfloat16 scale and a code an element.

The scale is the block's largest magnitude over the largest code, rounded up to bfloat16, so that the largest code
fits. A code is the nearest multiple of the scale. Code times scale is exact in float32, and so is what it leaves of the
element: what is sent plus what is kept is what there was, to the bit.

A *row* holds Q slots: Q scales of two bytes, the lower first, then Q times ``code_bytes`` bytes of codes, the first
element in the lowest bits. A block of which a multiple of the scale would not be finite has the scale NaN, and so
decodes to NaN.
"""

import torch

TOUCHED, NONFINITE = 1, 2


def code_bytes(block_size: int, bits: int) -> int:
    """Bytes that a slot's codes take in a row, beside the two of its scale."""
    return -(-block_size * bits // 8)


def quantise_blocks_(source, chosen, table, block_size, status, places, bits, keep, rows):
    scales, codes = _slots(rows, block_size, bits)
    rows.zero_()
    spoilt = status is not None and bool(status[-1] & NONFINITE)
    for s, first, element, inside in _segments(chosen, table, block_size):
        silent = not spoilt and status is not None and not status[s] & TOUCHED
        values = source[element].masked_fill_(~inside, 0.0)
        if silent:
            values.zero_()
        scale = _scales(values, bits)
        if spoilt:
            scale.fill_(float("nan"))
        code = _codes(values, scale, bits)
        if keep and not spoilt and not silent:
            kept = torch.where(scale.isnan()[:, None], values, values - code * scale[:, None])
            source[element[inside]] = kept[inside]
        slot = torch.arange(first, first + len(scale), device=rows.device)
        place = slot if places is None else places[slot]
        row, column = place // max(scales.shape[1], 1), place % max(scales.shape[1], 1)
        scales[row, column] = _bytes_of_scales(scale)
        codes[row, column] = _pack(code, bits)


def unquantise_blocks(rows, bits, places, table, block_size, payloads):
    decoded = _decode(rows, block_size, bits, payloads.dtype)
    if places is not None:
        slots = int(table[:, 3].sum())
        decoded = decoded.flatten(0, 1)[places[:slots]][None]
    for _, numel, _, slots, first_slot, offset in table.tolist():
        size = numel if slots == -(-numel // block_size) else slots * block_size
        piece = decoded[:, first_slot : first_slot + slots].flatten(1)
        payloads[:, offset : offset + size] = piece[:, :size]


def add_quantised(rows, bits, block_size, total):
    total.zero_()
    for decoded in _decode(rows, block_size, bits, total.dtype).flatten(1):
        total.add_(decoded)


def add_rows_(values, places, first, chosen, table, block_size, factor, bad, out):
    if bool(bad):
        return
    blocks = values.view(-1, block_size)
    for _, first_slot, element, inside in _segments(chosen, table, block_size):
        place = places[first_slot : first_slot + len(element)] - first
        mine = (place >= 0) & (place < len(blocks))
        inside = inside & mine[:, None]
        out[element[inside]] += factor * blocks[place.clamp(0, max(len(blocks) - 1, 0))][inside]


def _segments(chosen, table, block_size):
    """For each parameter: its row, its first slot, the elements of its slots and which of them exist."""
    within = torch.arange(block_size, device=chosen.device)
    for s, (start, numel, _, slots, first_slot, _) in enumerate(table.tolist()):
        if slots:
            element = chosen[first_slot : first_slot + slots, None] * block_size + within
            yield s, first_slot, start + element.clamp(max=numel - 1), element < numel


def _scales(values, bits):
    """[K] in the dtype of values [K, block_size]; NaN where it is not finite, or its largest multiple is not."""
    largest = values.abs().amax(1)
    steps = (largest / torch.full_like(largest, _largest(bits))).float()
    up = ((steps.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32).to(values.dtype)
    return torch.where(torch.isfinite(steps) & torch.isfinite(up * _largest(bits)), up, torch.nan)


def _codes(values, scale, bits):
    """Whole numbers, in the dtype of values; never -0, so that a -0 is kept as it is."""
    used = (scale > 0)[:, None]
    code = torch.round(values / torch.where(used, scale[:, None], 1.0)).clamp(-_largest(bits), _largest(bits))
    return torch.where(used, code + 0.0, 0.0)


def _largest(bits):
    return 2 ** (bits - 1) - 1


def _slots(rows, block_size, bits):
    """Views of rows: the scales' bytes [n, Q, 2] and the codes' [n, Q, code_bytes]."""
    per_slot = 2 + code_bytes(block_size, bits)
    slots = rows.shape[1] // per_slot
    return (rows[:, : 2 * slots].unflatten(1, (slots, 2)),
            rows[:, 2 * slots :].unflatten(1, (slots, per_slot - 2)))  # fmt: skip


def _bytes_of_scales(scale):
    upper = scale.float().view(torch.int32) >> 16
    return torch.stack([upper & 255, (upper >> 8) & 255], dim=1).to(torch.uint8)


def _pack(code, bits):
    per_byte = 8 // bits
    padded = code.new_zeros(len(code), code_bytes(code.shape[1], bits) * per_byte, dtype=torch.int32)
    padded[:, : code.shape[1]] = code.to(torch.int32) & (2**bits - 1)
    shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=code.device)
    return (padded.unflatten(1, (padded.shape[1] // per_byte, per_byte)) << shifts).sum(2).to(torch.uint8)


def _decode(rows, block_size, bits, dtype):
    """Codes times scales [n, Q, block_size]."""
    scales, codes = _slots(rows, block_size, bits)
    lower, upper = scales.to(torch.int32).unbind(2)
    scale = ((lower | upper << 8) << 16).view(torch.float32).to(dtype)
    shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=rows.device)
    unsigned = (codes[..., None].to(torch.int32) >> shifts) & (2**bits - 1)
    code = unsigned - (unsigned >> (bits - 1) << bits)
    return code.flatten(2)[..., :block_size].to(dtype) * scale[..., None]
