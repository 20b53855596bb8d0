"""The operators' speed against that of plain PyTorch operators, measured side by side in one run.

Contestants are timed in turns and the fastest of many turns counts, because that is what other work on the machine
disturbs least. Ratios and their targets are printed and stored; a miss is a number to look at and fails nothing.

    python -m pytest benchmarks/operators/test_ops_speed.py --benchmark-only -s
    python -m pytest benchmarks/operators/test_ops_speed.py --benchmark-only -s -k cuda      every operator on a GPU
"""
import pytest
import torch
from thinwire import ops
from thinwire.core.blocks import Layout

from operators.timing import MEGABYTES, OPERATORS, Problem, fastest_of_each, in_words, measure, why_not

NUMEL = 6_500_000
pytestmark = pytest.mark.skipif(not ops.native("cpu"), reason=f"no compiled operators: {ops.why_not_native()}")


def size_name(megabytes):
    return f"{megabytes}MB" if megabytes < 1000 else f"{megabytes // 1000}GB"


EVERY_SIZE = [pytest.param(device, megabytes, id=f"{device}-{size_name(megabytes)}")
              for device, sizes in MEGABYTES.items() for megabytes in sizes]  # fmt: skip


@pytest.mark.parametrize("device, megabytes", EVERY_SIZE)
@pytest.mark.parametrize("name", OPERATORS)
def test_operator(benchmark, name, device, megabytes):
    if reason := why_not(device, megabytes):
        pytest.skip(reason)
    benchmark.pedantic(lambda: None)  # the timing is our own
    found = measure(name, Problem(megabytes, device))
    benchmark.extra_info["operator"] = found
    print(f"\n{in_words(found)}")


def report(benchmark, what, against, seconds, target):
    """seconds: ours and theirs. target: the ratio ours / theirs that we want to stay below."""
    ours, theirs = seconds
    comparison = {"what": what, "ours": 1e3 * ours, "against": against, "theirs": 1e3 * theirs, "unit": "ms",
                  "ratio": ours / theirs, "target": target}  # fmt: skip
    benchmark.extra_info["comparisons"] = [comparison]
    print(f"\n{what}: {1e3 * ours:.2f} ms against {against}: {1e3 * theirs:.2f} ms, ratio {ours / theirs:.3f}, "
          f"target {target:.3f}")  # fmt: skip


def problem(block_size, density):
    layout = Layout(("weight", "other", "bias"), (NUMEL * 3 // 4, NUMEL // 4 - 1000, 1000), block_size)
    slots = layout.slots(tuple(max(1, round(density * blocks)) for blocks in layout.blocks))
    norms, status = torch.empty(layout.first_blocks[-1]), torch.empty(4, dtype=torch.int32)
    return layout, slots, norms, status


@pytest.mark.parametrize("block_size", [16, 64])
def test_accumulate(benchmark, block_size):
    layout, slots, norms, status = problem(block_size, 0.01)
    residual, grad = torch.zeros(layout.numel), torch.randn(layout.numel)
    plain = torch.zeros(layout.numel)

    def ours():
        ops.accumulate_(residual, None, grad, 0.0, slots.table, block_size, norms, status)

    def theirs():
        torch.add(plain, grad, out=plain)

    benchmark.pedantic(ours, rounds=5)
    seconds = fastest_of_each([ours, theirs])
    report(benchmark, f"accumulate_ with norms, blocks of {block_size}", "torch.add", seconds, 1.3)


def test_topk_encode(benchmark):
    layout, slots, norms, status = problem(64, 0.01)
    residual, grad = torch.zeros(layout.numel), torch.randn(layout.numel)
    chosen, payload = torch.empty(slots.total, dtype=torch.int64), torch.empty(slots.numel)

    def ours():
        ops.accumulate_(residual, None, grad, 0.0, slots.table, 64, norms, status)
        ops.select_blocks(norms, slots.table, 64, chosen)
        ops.take_blocks_(residual, chosen, slots.table, 64, status, None, payload)

    def theirs():
        torch.topk(grad.abs(), NUMEL // 100)

    benchmark.pedantic(ours, rounds=5)
    report(benchmark, "top-k encode at 1 %, blocks of 64", "torch.topk", fastest_of_each([ours, theirs]), 0.1)


@pytest.mark.parametrize("density", [0.01, 0.25])
def test_scatter(benchmark, density):
    ranks = 4
    layout, slots, *_ = problem(64, density)
    chosen = torch.empty(ranks, slots.total, dtype=torch.int64)
    ops.draw_blocks(slots.table, layout.units, 64, 1, 2, range(ranks), [0] * ranks, chosen)
    payloads, out, factors = torch.randn(ranks, slots.numel), torch.empty(layout.numel), torch.ones(3)
    copies = torch.empty_like(payloads)

    def ours():
        ops.scatter_blocks_(payloads, None, chosen, slots.table, 64, factors, False, out)

    def theirs():
        out.zero_()
        copies.copy_(payloads)

    benchmark.pedantic(ours, rounds=5)
    report(benchmark, f"scatter_blocks_ of 4 payloads, density {density}", "zero_ and copy_",
           fastest_of_each([ours, theirs]), 1.5)  # fmt: skip


@pytest.mark.parametrize("rows", [1, 8])
def test_draw(benchmark, rows):
    layout, slots, *_ = problem(64, 0.125)
    chosen = torch.empty(rows, slots.total, dtype=torch.int64)

    def ours():
        ops.draw_blocks(slots.table, layout.units, 64, 1, 2, range(rows), [0] * rows, chosen)

    def theirs():
        for _ in range(rows):
            torch.randperm(layout.first_blocks[-1])

    benchmark.pedantic(ours, rounds=5)
    report(benchmark, f"draw_blocks of {rows} rows", "torch.randperm", fastest_of_each([ours, theirs]), 1.0)
