"""Calls every compiled operator a few times, on parameters that several thread blocks share: for compute-sanitizer.

    compute-sanitizer python benchmarks/operators/every_operator.py

Without a GPU the CPU's are called. Prints how many results differ from the reference's, and ends with 1 if some do.
"""
import sys
from pathlib import Path

import torch
from thinwire import ops
from thinwire.core.blocks import Layout
from thinwire.ops import reference

BLOCK, RANKS, BITS = 16, 3, 4


def calls(device):
    """name and arguments, made from a seed."""
    generator = torch.Generator().manual_seed(0)
    layout = Layout(("a", "b", "c", "d"), (50_003, 7, 400, 9_000), BLOCK)
    slots = layout.slots((700, 1, 5, layout.blocks[3]))
    table, units, k, m = slots.table, layout.units, slots.total, layout.first_blocks[-1]

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def longs(*shape):
        return torch.zeros(*shape, dtype=torch.int64)

    chosen, places, united = longs(RANKS, k), longs(m), torch.zeros_like(table)
    reference.draw_blocks(table, units, BLOCK, 1, 2, range(RANKS), [0] * RANKS, chosen)
    turns, row_slots = longs(4), k // RANKS + 4
    reference.place_slots(table, BLOCK, turns, RANKS, row_slots, places)
    grad, flat, payload = normal(layout.numel), normal(layout.numel), normal(slots.numel)
    status, good = torch.full((5,), ops.TOUCHED, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    rows = torch.zeros(RANKS, row_slots * (2 + ops.code_bytes(BLOCK, BITS)), dtype=torch.uint8)
    coded = torch.randint(100, rows.shape, generator=generator).to(torch.uint8)
    named = torch.randint(-1, m, (RANKS, 900), generator=generator, dtype=torch.int32)
    shares = torch.tensor([0, *(-(-(b - a) // RANKS) for a, b in zip(slots.offsets, slots.offsets[1:]))])
    begins, part = shares.cumsum(0)[:-1], int(shares.sum())
    one, some = chosen[0], places[:k]
    yield "accumulate_", flat, flat + 1, grad, 0.9, table, BLOCK, torch.zeros(m), status
    yield "examine", grad, table, status
    yield "draw_blocks", table, units, BLOCK, 3, 4, [0, 1], [0, 5], longs(2, k)
    yield "select_blocks", normal(m).abs(), table, BLOCK, longs(k)
    yield "gather_blocks", flat, one, table, BLOCK, status, None, payload.half()
    yield "take_blocks_", flat, one, table, BLOCK, None, torch.tensor(2.0), payload.bfloat16()
    yield "scatter_blocks_", normal(RANKS, slots.numel), None, chosen, table, BLOCK, torch.ones(4), False, flat
    yield "settle_", flat, flat + 1, grad, 0.9, payload, None, one, table, BLOCK, status, good
    yield "settle_", flat, flat + 1, grad, 0.9, payload, None, one, table, BLOCK, status, good + 1
    yield "quantise_blocks_", flat, one, table, BLOCK, status, some, BITS, True, rows
    yield "unquantise_blocks", coded, BITS, some, table, BLOCK, payload[None]
    yield "add_quantised", coded, BITS, BLOCK, normal(row_slots * BLOCK)
    yield "add_rows_", normal(row_slots * BLOCK), some, row_slots, one, table, BLOCK, -1.0, good, flat
    yield "deal_elements", payload, table, BLOCK, begins, normal(RANKS, part)
    yield "undeal_elements", normal(RANKS, part), table, BLOCK, begins, payload
    yield "unite_blocks", named, table, BLOCK, longs(m), united
    yield "place_slots", table, BLOCK, turns, RANKS, row_slots, longs(m)


def main(device):
    wrong = []
    for name, *args in calls(device):
        got, want = ([arg.to(to, copy=True) if isinstance(arg, torch.Tensor) else arg for arg in args]
                     for to in (device, "cpu"))  # fmt: skip
        getattr(torch.ops.thinwire, name)(*got)
        getattr(reference, name)(*want)
        for a, b in zip(got, want):
            if isinstance(b, torch.Tensor) and not torch.equal(a.cpu().nan_to_num(7), b.nan_to_num(7)):
                wrong.append(name)
    print(f"{len(wrong)} results differ from the reference's on {device}: {wrong}")
    return bool(wrong)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "hooks"))
    sys.exit(main("cuda" if torch.cuda.is_available() else "cpu"))
