"""The compiled operators give the reference's bits, and the reference does what its words say."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils.cpp_extension
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from thinwire import ops
from thinwire.core.blocks import Layout
from thinwire.ops import reference

ROOT = Path(__file__).resolve().parent.parent
DATA = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BLOCK_SIZES = [1, 3, 16, 64, 100]
EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def unavailable(device):
    if device == "cuda" and not torch.cuda.is_available():
        return "no GPU here"
    return None if ops.native(device) else f"no compiled operators for {device}: {ops.why_not_native()}"


DEVICES = [
    pytest.param(device, marks=pytest.mark.skipif(bool(unavailable(device)), reason=str(unavailable(device))))
    for device in ("cpu", "cuda")
]


def same(got, want):
    """Equal bits; any NaN equals any other."""
    got = got.cpu()
    if not want.is_floating_point():
        return torch.equal(got, want)
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[want.element_size()]
    return bool(((got.view(whole) == want.view(whole)) | (got.isnan() & want.isnan())).all())


def both(device, name, *args):
    """Run the compiled operator and the reference on equal arguments; every tensor must end with equal bits."""

    def copied(to):  # with their strides, which .to(copy=True) drops where rows are apart
        return [
            torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device=to).copy_(arg)
            if isinstance(arg, torch.Tensor)
            else arg
            for arg in args
        ]

    got, want = copied(device), copied("cpu")
    getattr(torch.ops.thinwire, name)(*got)
    getattr(reference, name)(*want)
    for position, (a, b) in enumerate(zip(got, want, strict=True)):
        if isinstance(b, torch.Tensor):
            assert same(a, b), f"{name}: argument {position} differs"
    return want


@st.composite
def cases(draw):
    """A layout, how many blocks of each parameter travel, and a seed for the numbers."""
    block_size = draw(st.sampled_from(BLOCK_SIZES))
    numels = draw(st.lists(st.one_of(st.integers(0, 40), st.integers(0, 700)), max_size=5))
    layout = Layout(tuple(f"p{i}" for i in range(len(numels))), tuple(numels), block_size)
    counts = tuple(draw(st.integers(0, blocks)) for blocks in layout.blocks)
    if draw(st.booleans()):
        counts = layout.blocks
    return layout.slots(counts), draw(st.integers(0, 2**31))


def numbers(size, dtype, generator):
    """Normal numbers with zeros of both signs and some that are tiny."""
    values = torch.randn(size, generator=generator, dtype=torch.float64)
    pick = torch.rand(size, generator=generator)
    values[pick < 0.1], values[pick > 0.9] = 0.0, -0.0
    return torch.where((pick > 0.4) & (pick < 0.5), values * 1e-6, values).to(dtype)


def gradient(slots, dtype, generator, spoil):
    """As numbers; some parameters are all zero, and with spoil some elements are not finite."""
    layout = slots.layout
    grad = numbers(layout.numel, dtype, generator)
    for start, numel in zip(layout.starts, layout.numels, strict=True):
        kind = int(torch.randint(4, (), generator=generator))
        if kind == 0:
            grad[start : start + numel] = -0.0 if spoil else 0.0
        if kind == 1 and spoil and numel:
            at = start + int(torch.randint(numel, (), generator=generator))
            grad[at] = [float("inf"), float("-inf"), float("nan")][at % 3]
    return grad


def status_of(slots, grad):
    status = torch.empty(len(slots.counts) + 1, dtype=torch.int32)
    reference.examine(grad, slots.table, status)
    return status


def draws(slots, rows, seed, stream=None):
    chosen = torch.empty(rows, slots.total, dtype=torch.int64)
    streams = list(range(rows)) if stream is None else [stream] * rows
    deals = [0] * rows if stream is None else list(range(rows))
    layout = slots.layout
    reference.draw_blocks(slots.table, layout.units, layout.block_size, seed, 1, streams, deals, chosen)
    return chosen


@pytest.mark.parametrize("device", DEVICES)
class TestEqualsReference:
    @EXAMPLES
    @given(cases(), st.sampled_from(DATA[:2]), st.sampled_from(DATA), st.booleans(), st.booleans())
    def test_accumulate(self, device, case, wide, dtype, with_velocity, spoil):
        slots, seed = case
        generator = torch.Generator().manual_seed(seed)
        layout = slots.layout
        residual = numbers(layout.numel, wide, generator)
        velocity = numbers(layout.numel, wide, generator) if with_velocity else None
        grad = gradient(slots, dtype, generator, spoil)
        norms = torch.full((layout.first_blocks[-1],), 7.0, dtype=wide)
        status = torch.full((len(layout.names) + 1,), 7, dtype=torch.int32)
        both(device, "accumulate_", residual, velocity, grad, 0.9, slots.table, layout.block_size, norms, status)
        both(device, "examine", grad, slots.table, status)
        places = [torch.full_like(residual, 7.0), None if velocity is None else torch.full_like(velocity, 7.0)]
        beside = both(device, "accumulate_", places[0], places[1], grad, 0.9, slots.table, layout.block_size, norms,
                      status, residual, velocity)  # fmt: skip
        within = both(device, "accumulate_", residual, velocity, grad, 0.9, slots.table, layout.block_size, norms,
                      status)  # fmt: skip
        for one, other in zip(beside, within):
            assert not isinstance(one, torch.Tensor) or same(one, other)

    @pytest.mark.parametrize("sent", DATA)
    @pytest.mark.parametrize("wide", DATA[:2])
    @pytest.mark.parametrize("block_size", [16, 40])
    def test_values_too_large_for_a_memory(self, device, block_size, wide, sent):
        """Around the limit of what a memory takes, and where only a sum, a square or the wire dtype overflows."""
        limit = 2.0**62 if wide == torch.float32 else 2.0**500
        sizes = [limit, -limit * 1.001, limit / 2, 1e38, 1e39, 70000.0, 1.0]
        layout = Layout(tuple(f"p{i}" for i in range(len(sizes))), (100,) * len(sizes), block_size)
        slots = layout.slots((2,) * len(sizes))
        chosen = draws(slots, 1, 5)[0]
        grad = torch.tensor(sizes, dtype=torch.float64).repeat_interleave(100).to(wide)
        norms = torch.zeros(layout.first_blocks[-1], dtype=wide)
        status = torch.zeros(len(sizes) + 1, dtype=torch.int32)
        before = torch.ones(layout.numel, dtype=wide)
        args = both(device, "accumulate_", before, None, grad, 0.0, slots.table, block_size, norms, status)
        residual, norms, status = args[0], args[6], args[7]
        assert bool(torch.isfinite(residual).all())
        bad = [bool(one & reference.NONFINITE) for one in status[:-1]]
        overflows = [not bool(torch.isfinite(one).all()) for one in norms.view(len(sizes), -1)]
        assert bad == [abs(size) > limit or over for size, over in zip(sizes, overflows)]
        assert bad[1] and not bad[-1]
        payload = torch.zeros(slots.numel, dtype=sent)
        taken = both(device, "take_blocks_", residual, chosen, slots.table, block_size, None, None, payload)
        assert bool(torch.isfinite(taken[0]).all())
        fine, bad_step = torch.full_like(status, reference.TOUCHED), torch.ones(1, dtype=torch.int32)
        settled = both(device, "settle_", taken[0], None, grad, 0.0, taken[6], None, chosen, slots.table, block_size,
                       fine, bad_step)  # fmt: skip
        assert bool(torch.isfinite(settled[0]).all())

    @EXAMPLES
    @given(cases(), st.integers(-(2**62), 2**62), st.lists(st.tuples(st.integers(0, 3), st.integers(-3, 9)),
                                                           min_size=1, max_size=4))  # fmt: skip
    def test_draw(self, device, case, seed, rows):
        slots, step = case
        streams, deals = [stream for stream, _ in rows], [deal for _, deal in rows]
        chosen = torch.full((len(rows), slots.total), -1, dtype=torch.int64)
        layout = slots.layout
        both(device, "draw_blocks", slots.table, layout.units, layout.block_size, seed, step, streams, deals, chosen)

    @EXAMPLES
    @given(cases(), st.sampled_from(DATA[:2]), st.booleans())
    def test_select(self, device, case, dtype, coarse):
        slots, seed = case
        norms = numbers(slots.layout.first_blocks[-1], dtype, torch.Generator().manual_seed(seed))
        if coarse:  # many ties
            norms = (norms * 2).round()
        if len(norms) > 3 and seed % 3 == 0:
            norms[[0, len(norms) // 2]] = torch.tensor([float("nan"), float("inf")], dtype=dtype)
        chosen = torch.full((slots.total,), -1, dtype=torch.int64)
        both(device, "select_blocks", norms, slots.table, slots.layout.block_size, chosen)

    @EXAMPLES
    @given(cases(), st.sampled_from(DATA), st.sampled_from(DATA), st.sampled_from([None, 0.125, 8.0]),
           st.booleans(), st.booleans())  # fmt: skip
    def test_gather_and_take(self, device, case, dtype, sent, scale, with_status, spoil):
        slots, seed = case
        generator = torch.Generator().manual_seed(seed)
        source = numbers(slots.layout.numel, dtype, generator)
        status = status_of(slots, gradient(slots, dtype, generator, spoil)) if with_status else None
        factor = None if scale is None else torch.tensor(scale)
        payload = torch.full((slots.numel,), 7.0, dtype=sent)
        chosen = draws(slots, 1, seed)[0]
        for name in ("gather_blocks", "take_blocks_"):
            both(device, name, source, chosen, slots.table, slots.layout.block_size, status, factor, payload)

    @EXAMPLES
    @given(cases(), st.sampled_from(DATA), st.sampled_from(DATA), st.integers(1, 4), st.booleans(), st.booleans(),
           st.integers(0, 2))  # fmt: skip
    def test_scatter(self, device, case, dtype, sent, ranks, with_inverses, accumulate, gap):
        slots, seed = case
        generator = torch.Generator().manual_seed(seed)
        payloads = numbers((ranks, slots.numel + gap), sent, generator)[:, : slots.numel]
        chosen = draws(slots, ranks, seed)
        inverses = torch.rand(ranks, generator=generator) if with_inverses else None
        out = numbers(slots.layout.numel, dtype, generator)
        factors = torch.rand(len(slots.counts), generator=generator, dtype=torch.float64).to(reference._wide(dtype))
        both(device, "scatter_blocks_", payloads, inverses, chosen, slots.table, slots.layout.block_size, factors,
             accumulate, out)  # fmt: skip

    @EXAMPLES
    @given(cases(), st.sampled_from(DATA[:2]), st.sampled_from(DATA), st.sampled_from(DATA), st.booleans(),
           st.booleans(), st.sampled_from([None, 0.125]), st.integers(0, 1))  # fmt: skip
    def test_settle(self, device, case, wide, dtype, sent, with_velocity, spoil, inverse, bad):
        slots, seed = case
        generator = torch.Generator().manual_seed(seed)
        layout = slots.layout
        grad = gradient(slots, dtype, generator, spoil)
        residual = numbers(layout.numel, wide, generator)
        velocity = numbers(layout.numel, wide, generator) if with_velocity else None
        payload = numbers(slots.numel, sent, generator)
        both(device, "settle_", residual, velocity, grad, 0.9, payload,
             None if inverse is None else torch.tensor(inverse), draws(slots, 1, seed)[0], slots.table,
             layout.block_size, status_of(slots, grad), torch.tensor([bad], dtype=torch.int32))  # fmt: skip

    def test_large_parameters(self, device):
        """Sizes at which the operators hash in windows, take radix digits and start several threads."""
        layout = Layout(("a", "b", "c"), (700_001, 5, 300_000), 3)
        slots = layout.slots((70_000, 1, 1_234))
        chosen = torch.empty(5, slots.total, dtype=torch.int64)
        streams, deals = [0, 1, 1, 1, 2], [0, 0, 1, 3, 7]
        *_, chosen = both(device, "draw_blocks", slots.table, layout.units, 3, 5, 6, streams, deals, chosen)
        residual, grad = torch.randn(layout.numel), torch.randn(layout.numel)
        grad[:600_000] = 0
        grad[-1] = float("nan")
        norms, status = torch.empty(layout.first_blocks[-1]), torch.empty(4, dtype=torch.int32)
        args = both(device, "accumulate_", residual, None, grad, 0.0, slots.table, 3, norms, status)
        both(device, "select_blocks", args[6], slots.table, 3, chosen[0].clone())
        both(device, "select_blocks", args[6].double(), slots.table, 3, chosen[0].clone())
        payloads, out = torch.randn(5, slots.numel), torch.empty(layout.numel)
        both(device, "scatter_blocks_", payloads, None, chosen, slots.table, 3, torch.rand(3), False, out)
        both(device, "take_blocks_", residual, chosen[0], slots.table, 3, None, None, torch.empty(slots.numel))

    def test_empty(self, device):
        slots = Layout((), (), 16).slots(())
        nothing, flag = torch.empty(0), torch.zeros(1, dtype=torch.int32)
        no_blocks = torch.empty(0, dtype=torch.int64)
        both(device, "accumulate_", nothing, None, nothing, 0.0, slots.table, 16, nothing, flag)
        both(device, "examine", nothing, slots.table, flag)
        both(device, "draw_blocks", slots.table, slots.layout.units, 16, 1, 2, [0], [0], no_blocks.view(1, 0))
        both(device, "select_blocks", nothing, slots.table, 16, no_blocks)
        both(device, "take_blocks_", nothing, no_blocks, slots.table, 16, flag, None, nothing)
        both(device, "scatter_blocks_", nothing.view(2, 0), None, no_blocks.view(2, 0).clone(), slots.table, 16,
             nothing, False, nothing)  # fmt: skip
        both(device, "settle_", nothing, None, nothing, 0.9, nothing, None, no_blocks, slots.table, 16, flag,
             flag + 1)  # fmt: skip

    def test_opcheck(self, device):
        slots = Layout(("a", "b"), (70, 33), 16).slots((2, 3))
        table, units, chosen = slots.table, slots.layout.units, draws(slots, 2, 1)
        flat, payload = torch.randn(103), torch.zeros(slots.numel)
        norms, status = torch.zeros(8), torch.ones(3, dtype=torch.int32)
        bad = torch.ones(1, dtype=torch.int32)
        calls = {
            "accumulate_": (flat, flat + 1, flat + 2, 0.9, table, 16, norms, status),
            "examine": (flat, table, status),
            "draw_blocks": (table, units, 16, 1, 2, [0, 1], [0, 0], chosen),
            "select_blocks": (norms, table, 16, chosen[0].clone()),
            "gather_blocks": (flat, chosen[0].clone(), table, 16, status, None, payload),
            "take_blocks_": (flat, chosen[0].clone(), table, 16, None, torch.tensor(2.0), payload),
            "scatter_blocks_": (torch.randn(2, slots.numel), torch.ones(2), chosen, table, 16, torch.ones(2), False,
                                flat),
            "settle_": (flat, flat + 1, flat + 2, 0.9, payload, None, chosen[0].clone(), table, 16, status, bad),
        }  # fmt: skip
        for name, args in calls.items():
            args = tuple(arg.to(device, copy=True) if isinstance(arg, torch.Tensor) else arg for arg in args)
            torch.library.opcheck(getattr(torch.ops.thinwire, name).default, args)


@pytest.mark.parametrize("sent", DATA)
def test_nothing_is_lost(sent):
    """What was sent and what stays add up to what was there, exactly, whatever the wire dtype."""
    slots = Layout(("a", "b"), (1000, 77), 16).slots((20, 5))
    before = torch.randn(slots.layout.numel, generator=torch.Generator().manual_seed(0))
    chosen, payload = draws(slots, 1, 3)[0], torch.empty(slots.numel, dtype=sent)
    after, out = before.clone(), torch.empty_like(before)
    scale = torch.tensor(4.0)
    ops.take_blocks_(after, chosen, slots.table, 16, None, scale, payload)
    ops.scatter_blocks_(payload[None], (1 / scale)[None], chosen[None], slots.table, 16, torch.ones(2), False, out)
    assert torch.equal((after.double() + out.double()).float(), before)
    assert (out != 0).sum() >= 20 * 16 and not torch.equal(after, before)


def test_draws_are_uniform():
    """Chi-square over the 20 subsets of 3 blocks out of 6, and over the 15 of 2 that a wrapping deal takes."""
    from scipy.stats import chisquare

    steps = 4000
    for count, deal, subsets in ((3, 0, 20), (4, 1, 15)):
        slots = Layout(("weight",), (6,), 1).slots((count,))
        seen = {}
        for step in range(steps):
            chosen = torch.empty(1, count, dtype=torch.int64)
            ops.draw_blocks(slots.table, slots.layout.units, 1, 11, step, [0], [deal], chosen)
            blocks = tuple(chosen[0].tolist())
            assert len(set(blocks)) == count and list(blocks) == sorted(blocks)
            seen[blocks] = seen.get(blocks, 0) + 1
        assert len(seen) == subsets
        assert chisquare(list(seen.values())).pvalue > 1e-3


def test_deals_are_disjoint_and_streams_independent():
    slots = Layout(("weight",), (8000,), 1).slots((1000,))
    chosen = torch.empty(8, 1000, dtype=torch.int64)
    ops.draw_blocks(slots.table, slots.layout.units, 1, 1, 2, [5] * 8, list(range(8)), chosen)
    assert torch.equal(chosen.flatten().sort().values, torch.arange(8000))
    ops.draw_blocks(slots.table, slots.layout.units, 1, 1, 2, list(range(8)), [0] * 8, chosen)
    overlap = len(set(chosen[0].tolist()) & set(chosen[1].tolist()))
    assert 125 - 60 < overlap < 125 + 60  # hypergeometric: standard deviation 10


@pytest.mark.skipif(bool(unavailable("cpu")), reason=str(unavailable("cpu")))
class TestErrors:
    def test_messages_repeat_the_arguments(self):
        slots = Layout(("a",), (40,), 16).slots((2,))
        flat, payload = torch.zeros(40), torch.zeros(32)
        chosen, native = torch.tensor([0, 2]), torch.ops.thinwire
        with pytest.raises(RuntimeError, match=r"source is Float \[41\].*allowed is Float.*\[40\]"):
            native.gather_blocks(torch.zeros(41), chosen, slots.table, 16, None, None, payload)
        with pytest.raises(RuntimeError, match=r"payload is Int"):
            native.gather_blocks(flat, chosen, slots.table, 16, None, None, payload.int())
        with pytest.raises(RuntimeError, match="block_size is 0; allowed is 1 or more"):
            native.gather_blocks(flat, chosen, slots.table, 0, None, None, payload)
        with pytest.raises(RuntimeError, match=r"strides \[2\]"):
            native.gather_blocks(torch.zeros(80)[::2], chosen, slots.table, 16, None, None, payload)
        with pytest.raises(RuntimeError, match="row 0 of table"):
            native.gather_blocks(flat, chosen, slots.table, 40, None, None, payload)
        with pytest.raises(RuntimeError, match="2 streams.*1 deals|are 2 streams"):
            native.draw_blocks(slots.table, slots.layout.units, 16, 1, 1, [0, 1], [0], chosen.repeat(2, 1))

    @pytest.mark.parametrize("blocks", [[0, 3], [-1, 0], [1, 1], [2, 0]])
    def test_blocks_that_do_not_exist_or_ascend(self, blocks):
        slots = Layout(("a",), (40,), 16).slots((2,))
        chosen = torch.tensor(blocks)
        with pytest.raises(RuntimeError, match="chosen has block"):
            torch.ops.thinwire.take_blocks_(torch.zeros(40), chosen, slots.table, 16, None, None, torch.zeros(32))
        with pytest.raises(RuntimeError, match="chosen has block"):
            torch.ops.thinwire.scatter_blocks_(torch.zeros(1, 32), None, chosen[None], slots.table, 16,
                                               torch.ones(1), False, torch.zeros(40))  # fmt: skip


def available_memory():
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 0


@pytest.mark.skipif(available_memory() < 6e9 or bool(unavailable("cpu")), reason="needs 6 GB and the CPU operators")
def test_beyond_31_bits():
    numel, block_size = 2**31 + 1000, 2**20
    slots = Layout(("huge",), (numel,), block_size).slots((2,))
    flat = torch.from_numpy(np.zeros(numel, np.int16)).view(torch.bfloat16)  # pages come as they are written
    flat[-1000:] = 3
    chosen, payload = torch.tensor([0, 2048]), torch.empty(2 * block_size, dtype=torch.bfloat16)
    ops.take_blocks_(flat, chosen, slots.table, block_size, None, None, payload)
    assert payload[block_size : block_size + 1000].eq(3).all() and not flat[-1000:].any()
    ops.scatter_blocks_(payload[None], None, chosen[None], slots.table, block_size, torch.ones(1), True, flat)
    assert flat[-1000:].eq(3).all() and flat[-1001] == 0


def nvcc():
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@pytest.mark.skipif(nvcc() is None, reason="no nvcc here")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc/cuda").glob("*.cu")), ids=lambda path: path.name)
def test_cuda_compiles(source, tmp_path):
    of_torch = torch.utils.cpp_extension.COMMON_NVCC_FLAGS  # which forbid what nvcc by itself lets pass
    command = [nvcc(), "-c", source, "-o", tmp_path / "out.o", "-std=c++17", "-fmad=false", "-arch=sm_80", *of_torch]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_without_compiled_operators():
    code = """
import torch
import torch.utils.cpp_extension
from thinwire import ops
from thinwire.core.blocks import Layout
slots = Layout(("a",), (40,), 16).slots((3,))
for _ in range(3):
    payload = torch.zeros(40)
    ops.gather_blocks(torch.ones(40), torch.arange(3), slots.table, 16, None, None, payload)
assert payload.eq(1).all() and not ops.native("cpu")
"""
    environment = {**os.environ, "THINWIRE_REFERENCE": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("no compiled operators") == 1
