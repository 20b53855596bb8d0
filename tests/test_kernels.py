"""The CUDA kernels' logic without a GPU: csrc/cuda compiled as C++ against cuda_on_cpu/, compared with the reference.

Every tensor lies between guards, at addresses that allow packs or not, and what lies around it must stay as it is.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import test_wire_ops
import torch
import torch.utils.cpp_extension
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_ops import DATA, cases, draws, gradient, numbers, nvcc, same, status_of, unavailable
from thinwire import ops
from thinwire.core.blocks import Layout
from thinwire.ops import reference

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent / "cuda_on_cpu"
EXAMPLES = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
WIDE, BITS = DATA[:2], [8, 4, 2]
KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
GUARD = 64  # elements around every tensor
NO_SLOT = ops.NO_SLOT
# What the kernels are compiled with: no fused multiply-add; addresses, shifts and bounds that C++ does not define are
# reported on stderr. With libstdc++ within the library, as some compilers link it: messages must be whole there too.
FLAGS = ["-std=c++17", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing",
         "-U_FORTIFY_SOURCE", "-fsanitize=alignment,bounds,null,shift"]  # fmt: skip
OWN_LIBSTDCXX = ["-static-libstdc++"] if sys.platform == "linux" else []

pytestmark = pytest.mark.skipif(bool(unavailable("cpu")), reason=str(unavailable("cpu")))


def compiler():
    return os.environ.get("CXX", "g++")


@pytest.fixture(scope="module", autouse=True)
def emulated(tmp_path_factory):
    """csrc/cuda for the CPU, loaded under a key of its own: under CUDA it would stand in the way of a real one."""
    folder = tmp_path_factory.mktemp("kernels")
    paths = [f"-I{path}" for path in (HERE, *torch.utils.cpp_extension.include_paths())]
    sources = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), HERE / "ops.cpp"]

    def compile(source):
        run([compiler(), "-c", "-x", "c++", source, "-o", folder / f"{source.name}.o", *FLAGS, *paths])
        return folder / f"{source.name}.o"

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, sources))
    libraries = [f"-L{path}" for path in torch.utils.cpp_extension.library_paths()]
    run([compiler(), "-shared", "-o", folder / "kernels.so", *objects, *FLAGS, *libraries, "-lc10", "-ltorch_cpu",
         *OWN_LIBSTDCXX])  # fmt: skip
    torch.ops.load_library(folder / "kernels.so")


@pytest.fixture(autouse=True)
def nothing_undefined(capfd):
    yield
    assert "runtime error" not in capfd.readouterr().err


def run(command):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


class Guarded:
    """A copy of a tensor, with its strides, in the middle of bytes that nobody may touch."""

    def __init__(self, tensor, shift):
        extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
        size = (extent + 2 * GUARD + shift) * tensor.element_size()
        self.place = tensor.shape, tensor.stride(), GUARD + shift
        self.buffer = torch.full((size,), 0xA5, dtype=torch.uint8).view(tensor.dtype)
        self.tensor = self.buffer.as_strided(*self.place).copy_(tensor)
        if not tensor.numel():  # its address is null, as a GPU's is: in the middle of the buffer it could be read
            self.tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        self.before = self._around()

    def _around(self):
        around = self.buffer.clone()
        around.as_strided(*self.place).zero_()
        return around.view(torch.uint8)

    def intact(self):
        return torch.equal(self.before, self._around())


def emulate(name, *args, shift=0):
    """Run a kernel on copies of the arguments, which are returned."""
    # Not all by as much: one address that allows packs says nothing of another.
    shifts = [shift * (position + 1) % 5 for position in range(len(args))]
    guarded = [Guarded(arg, by) if isinstance(arg, torch.Tensor) else arg for arg, by in zip(args, shifts)]
    args = [arg.tensor if isinstance(arg, Guarded) else arg for arg in guarded]
    getattr(torch.ops.thinwire, name).default.redispatch(KEY, *args)
    for position, arg in enumerate(guarded):
        assert not isinstance(arg, Guarded) or arg.intact(), f"{name}: wrote beside argument {position}"
    return args


def both(name, *args, shift=0, compare=True):
    """Run the kernel and the reference on equal arguments; every tensor must end with equal bits."""
    got = emulate(name, *args, shift=shift)
    want = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
    getattr(reference, name)(*want)
    for position, (a, b) in enumerate(zip(got, want, strict=True)):
        assert not isinstance(b, torch.Tensor) or same(a, b), f"{name}: argument {position} differs"
    return want


OF_A_GPU = {"quantise", "unquantise", "add_quantised", "add_rows", "deal_and_undeal", "unite", "place", "empty"}


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(OF_A_GPU))
def test_what_a_gpu_is_given(name, monkeypatch):
    """The very cases that test_wire_ops.py has for a GPU: lists longer than they must be, and tables without a row."""
    monkeypatch.setattr(test_wire_ops, "both", lambda _, *args: both(*args))
    getattr(test_wire_ops.TestEqualsReference(), f"test_{name}")(device="cuda")


def test_lists_of_slots_beside_a_table_without_a_row():
    """A launch's K counts entries of chosen or places, and no row of the table may be looked into for them."""
    slots = Layout((), (), 16).slots(())
    table, nothing, fine = slots.table, torch.empty(0), torch.ones(1, dtype=torch.int32)
    chosen, floats = torch.tensor([0, NO_SLOT]), torch.full((33,), 7.0)
    rows = torch.full((2, 30), 77, dtype=torch.uint8)
    calls = {
        "gather_blocks": (floats, chosen, table, 16, fine, None, floats),
        "take_blocks_": (floats, chosen, table, 16, fine, None, floats),
        "scatter_blocks_": (floats[None], None, chosen[None], table, 16, nothing, True, floats),
        "settle_": (floats, floats, floats, 0.9, floats, None, chosen, table, 16, fine, fine),
        "unquantise_blocks": (rows, 4, chosen, table, 16, floats[None]),
        "add_rows_": (floats[:32], chosen, 0, chosen, table, 16, 1.0, fine - 1, floats),
        "draw_blocks": (table, chosen[:0], 16, 1, 2, [0], [0], chosen[None]),
        "select_blocks": (floats, table, 16, chosen),
    }
    for name, args in calls.items():
        for before, after in zip(args, emulate(name, *args), strict=True):
            assert not isinstance(before, torch.Tensor) or same(after, before), name
    *_, rows = emulate("quantise_blocks_", floats, chosen, table, 16, fine, chosen, 4, True, rows)
    assert not rows.any()
    status = emulate("accumulate_", floats[:32], None, floats[:32], 0.9, table, 16, floats[:2], fine)[-1]
    assert status.tolist() == [0]


SHIFTS = st.sampled_from([0, 0, 1, 2, 4])


@EXAMPLES
@given(cases(), st.sampled_from(WIDE), st.sampled_from(DATA), st.booleans(), st.booleans(), st.booleans(), SHIFTS)
def test_accumulate(case, wide, dtype, with_velocity, spoil, beside, shift):
    slots, seed = case
    layout, generator = slots.layout, torch.Generator().manual_seed(seed)
    residual, velocity = (numbers(layout.numel, wide, generator) for _ in range(2))
    velocity = velocity if with_velocity else None
    grad = gradient(slots, dtype, generator, spoil)
    norms = torch.full((layout.first_blocks[-1],), 7.0, dtype=wide)
    status = torch.full((len(layout.names) + 1,), 7, dtype=torch.int32)
    before = (residual + 1, None if velocity is None else velocity - 1) if beside else ()
    both("accumulate_", residual, velocity, grad, 0.9, slots.table, layout.block_size, norms, status, *before,
         shift=shift)  # fmt: skip
    both("examine", grad, slots.table, status, shift=shift)


def test_accumulate_of_parameters_that_begin_with_zeros():
    """Whether a parameter has a gradient can show late in it."""
    layout = Layout(("a", "b", "c", "d"), (9000, 300, 9001, 40), 64)
    slots, grad = layout.slots((1, 1, 1, 1)), torch.zeros(layout.numel)
    grad[8990], grad[9299], grad[9300 + 5000] = 1.0, float("nan"), -1.0
    residual, norms = torch.randn(layout.numel), torch.empty(layout.first_blocks[-1])
    args = both("accumulate_", residual, residual - 1, grad, 0.5, slots.table, 64, norms, torch.ones(5).int())
    assert args[7].tolist() == [1, 3, 1, 0, 3]


@EXAMPLES
@given(cases(), st.integers(-(2**62), 2**62),
       st.lists(st.tuples(st.integers(0, 3), st.integers(-3, 9)), min_size=1, max_size=3))  # fmt: skip
def test_draw(case, seed, rows):
    slots, step = case
    streams, deals = [stream for stream, _ in rows], [deal for _, deal in rows]
    chosen = torch.full((len(rows), slots.total), -1, dtype=torch.int64)
    both("draw_blocks", slots.table, slots.layout.units, slots.layout.block_size, seed, step, streams, deals, chosen)


@EXAMPLES
@given(cases(), st.sampled_from(WIDE), st.booleans())
def test_select(case, dtype, coarse):
    slots, seed = case
    norms = numbers(slots.layout.first_blocks[-1], dtype, torch.Generator().manual_seed(seed))
    if coarse:  # many ties
        norms = (norms * 2).round()
    if len(norms) > 3 and seed % 3 == 0:
        norms[[0, len(norms) // 2]] = torch.tensor([float("nan"), float("inf")], dtype=dtype)
    chosen = torch.full((slots.total,), -1, dtype=torch.int64)
    both("select_blocks", norms, slots.table, slots.layout.block_size, chosen)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("ties", [False, True])
def test_order_of_large_parameters(dtype, ties):
    """Several thread blocks share a parameter: 2,048 keys each, or more where there are very many."""
    layout = Layout(("a", "b", "c"), (30_001, 7, 9_000), 1)
    for counts in ((3_000, 1, 9_000), (30_000, 3, 1)):
        slots = layout.slots(counts)
        norms = torch.randn(layout.first_blocks[-1], dtype=dtype)
        norms = norms.round() if ties else norms
        both("select_blocks", norms, slots.table, 1, torch.empty(slots.total, dtype=torch.int64))
    chosen = torch.empty(2, slots.total, dtype=torch.int64)
    both("draw_blocks", slots.table, layout.units, 1, 5, 6, [1, 2], [1, 3], chosen)


def test_rows_of_many_draws():
    """More rows than one launch takes."""
    slots = Layout(("a",), (50,), 1).slots((7,))
    chosen = torch.empty(18, 7, dtype=torch.int64)
    both("draw_blocks", slots.table, slots.layout.units, 1, 5, 6, list(range(18)), [0, 1, 2] * 6, chosen)


@EXAMPLES
@given(cases(), st.sampled_from(DATA), st.sampled_from(DATA), st.sampled_from([None, 0.125, 8.0]), st.booleans(),
       st.booleans())  # fmt: skip
def test_gather_and_take(case, dtype, sent, scale, with_status, spoil):
    slots, seed = case
    generator = torch.Generator().manual_seed(seed)
    source = numbers(slots.layout.numel, dtype, generator)
    status = status_of(slots, gradient(slots, dtype, generator, spoil)) if with_status else None
    factor = None if scale is None else torch.tensor(scale)
    source[::7] *= 60000.0  # with the scale beyond float16
    payload = torch.full((slots.numel,), 7.0, dtype=sent)
    for name in ("gather_blocks", "take_blocks_"):
        both(name, source, draws(slots, 1, seed)[0], slots.table, slots.layout.block_size, status, factor, payload)


@EXAMPLES
@given(cases(), st.sampled_from(DATA), st.sampled_from(DATA), st.integers(1, 5), st.booleans(), st.booleans(),
       st.integers(0, 2), st.booleans())  # fmt: skip
def test_scatter(case, dtype, sent, ranks, with_inverses, accumulate, gap, alike):
    slots, seed = case
    generator = torch.Generator().manual_seed(seed)
    payloads = numbers((ranks, slots.numel + gap), sent, generator)[:, : slots.numel]
    chosen = draws(slots, 1, seed).repeat(ranks, 1) if alike else draws(slots, ranks, seed)
    inverses = torch.rand(ranks, generator=generator) if with_inverses else None
    out = numbers(slots.layout.numel, dtype, generator)
    factors = torch.rand(len(slots.counts), generator=generator, dtype=torch.float64).to(reference._wide(dtype))
    both("scatter_blocks_", payloads, inverses, chosen, slots.table, slots.layout.block_size, factors, accumulate, out)


@pytest.mark.parametrize("ranks", [31, 32, 33, 70])
def test_scatter_from_many_ranks(ranks):
    """Beyond 32 a warp looks them up in several turns."""
    slots = Layout(("a", "b"), (900, 77), 16).slots((2, 1))
    payloads = torch.randn(ranks, slots.numel)
    for accumulate in (False, True):
        both("scatter_blocks_", payloads, None, draws(slots, ranks, 3), slots.table, 16, torch.rand(2), accumulate,
             torch.ones(977))  # fmt: skip


@EXAMPLES
@given(cases(), st.sampled_from(WIDE), st.sampled_from(DATA), st.sampled_from(DATA), st.booleans(), st.booleans(),
       st.sampled_from([None, 0.125]), st.integers(0, 1))  # fmt: skip
def test_settle(case, wide, dtype, sent, with_velocity, spoil, inverse, bad):
    slots, seed = case
    layout, generator = slots.layout, torch.Generator().manual_seed(seed)
    grad = gradient(slots, dtype, generator, spoil)
    residual, velocity = (numbers(layout.numel, wide, generator) for _ in range(2))
    payload = numbers(slots.numel, sent, generator)
    both("settle_", residual, velocity if with_velocity else None, grad, 0.9, payload,
         None if inverse is None else torch.tensor(inverse), draws(slots, 1, seed)[0], slots.table, layout.block_size,
         status_of(slots, grad), torch.tensor([bad], dtype=torch.int32))  # fmt: skip


def test_long_blocks():
    """Several thread blocks share a slot."""
    slots = Layout(("a", "b"), (21_000, 4_100), 10_000).slots((2, 1))
    source, chosen = torch.randn(25_100), torch.tensor([0, 2, 0])
    taken = both("take_blocks_", source, chosen, slots.table, 10_000, None, None, torch.empty(slots.numel))
    both("scatter_blocks_", taken[6][None], None, chosen[None], slots.table, 10_000, torch.ones(2), True, taken[0])
    good, fine = torch.zeros(1, dtype=torch.int32), torch.full((3,), ops.TOUCHED, dtype=torch.int32)
    both("settle_", source, source + 1, source, 0.9, taken[6], None, chosen, slots.table, 10_000, fine, good)


def test_many_slots():
    """So many that a warp looks up several at a time, for itself or for several ranks."""
    slots = Layout(("a", "b", "c"), (50_001, 7, 3_000), 2).slots((24_000, 1, 1_500))
    chosen = draws(slots, 4, 1)
    source, payload = torch.randn(slots.layout.numel), torch.empty(slots.numel)
    both("take_blocks_", source, chosen[0], slots.table, 2, None, None, payload)
    for ranks in (1, 4):
        both("scatter_blocks_", torch.randn(ranks, slots.numel), None, chosen[:ranks], slots.table, 2, torch.rand(3),
             False, source)  # fmt: skip
    whole = Layout(("a",), (35_000,), 1).slots((35_000,))
    both("gather_blocks", torch.randn(35_000), torch.arange(35_000), whole.table, 1, None, None, torch.empty(35_000))


def row_of(slots, bits):
    """Bytes of a slot."""
    return 2 + ops.code_bytes(slots.layout.block_size, bits)


def dealt(slots, ranks, generator):
    """Places of a payload's slots in rows of so many ranks, shuffled, and slots in a row."""
    row_slots = -(-slots.total // ranks) + 1
    return torch.randperm(ranks * row_slots, generator=generator)[: slots.total], row_slots


@EXAMPLES
@given(cases(), st.sampled_from(WIDE), st.sampled_from(BITS), st.booleans(), st.sampled_from([None, 1, 3]),
       st.booleans(), st.booleans(), st.integers(0, 4), st.integers(0, 3))  # fmt: skip
def test_quantise(case, wide, bits, keep, ranks, with_status, spoil, magnitude, shift):
    slots, seed = case
    layout, generator = slots.layout, torch.Generator().manual_seed(seed)
    source = numbers(layout.numel, wide, generator) * 10.0 ** (magnitude * 13 - 39)
    if spoil and layout.numel:
        source[seed % layout.numel] = [float("nan"), float("inf"), 3e38][seed % 3]
    places, row_slots = (None, slots.total) if ranks is None else dealt(slots, ranks, generator)
    status = status_of(slots, gradient(slots, wide, generator, seed % 2)) if with_status else None
    rows = torch.full((ranks or 1, row_slots * row_of(slots, bits)), 77, dtype=torch.uint8)
    *_, rows = both("quantise_blocks_", source, draws(slots, 1, seed)[0], slots.table, layout.block_size, status,
                    places, bits, keep, rows, shift=shift)  # fmt: skip
    payloads = torch.full((1, slots.numel), 7.0, dtype=wide)
    both("unquantise_blocks", rows, bits, places, slots.table, layout.block_size, payloads, shift=shift)
    total = torch.full((row_slots * layout.block_size,), 7.0, dtype=wide)
    both("add_quantised", rows, bits, layout.block_size, total, shift=shift)


def test_one_nan_spoils_its_block_wherever_it_is():
    slots = Layout(("a",), (6400,), 64).slots((100,))
    source = torch.randn(100, 64)
    source.fill_diagonal_(float("nan"))
    rows = torch.zeros(1, 100 * row_of(slots, 4), dtype=torch.uint8)
    both("quantise_blocks_", source.flatten(), torch.arange(100), slots.table, 64, None, None, 4, True, rows)


@EXAMPLES
@given(cases(), st.sampled_from(WIDE), st.sampled_from(BITS), st.integers(1, 4), st.integers(0, 3))
def test_rows_of_any_bytes(case, wide, bits, ranks, gap):
    """Rows that are apart, and codes and scales that no operator would write."""
    slots, seed = case
    size = slots.total * row_of(slots, bits)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(256, (ranks, size + gap), dtype=torch.uint8, generator=generator)[:, :size]
    both("unquantise_blocks", rows, bits, None, slots.table, slots.layout.block_size,
         torch.full((ranks, slots.numel), 7.0, dtype=wide))  # fmt: skip
    total = torch.full((slots.total * slots.layout.block_size,), 7.0, dtype=wide)
    both("add_quantised", rows, bits, slots.layout.block_size, total)


@EXAMPLES
@given(cases(), st.sampled_from(WIDE), st.integers(1, 4), st.sampled_from([1.0, -1.0]), st.integers(0, 4))
def test_add_rows(case, wide, ranks, factor, bad):
    slots, seed = case
    generator = torch.Generator().manual_seed(seed)
    places, row_slots = dealt(slots, ranks, generator)
    values = numbers(row_slots * slots.layout.block_size, wide, generator)
    out = numbers(slots.layout.numel, wide, generator)
    both("add_rows_", values, places, (seed % ranks) * row_slots, draws(slots, 1, seed)[0], slots.table,
         slots.layout.block_size, factor, torch.tensor([bad // 4], dtype=torch.int32), out)  # fmt: skip


@EXAMPLES
@given(cases(), st.sampled_from(DATA), st.integers(1, 5), st.integers(0, 2), SHIFTS)
def test_deal(case, dtype, n, gap, shift):
    slots, seed = case
    sizes = [end - begin for begin, end in zip(slots.offsets, slots.offsets[1:])]
    shares = torch.tensor([0, *(-(-size // n) for size in sizes)])
    begins, part = shares.cumsum(0)[:-1], int(shares.sum())
    payload = numbers(slots.numel, dtype, torch.Generator().manual_seed(seed))
    rows = torch.full((n, part + gap), 7.0, dtype=dtype)
    *_, rows = both("deal_elements", payload, slots.table, slots.layout.block_size, begins, rows, shift=shift)
    apart = rows[:, :part]
    both("undeal_elements", apart, slots.table, slots.layout.block_size, begins, torch.full_like(payload, 7.0),
         shift=shift)  # fmt: skip


@EXAMPLES
@given(cases(), st.sampled_from([torch.int32, torch.int64]), st.integers(1, 4), st.integers(0, 60), st.integers(1, 4),
       st.integers(0, 3))  # fmt: skip
def test_unite_and_place(case, dtype, ranks, length, owners, spare):
    slots, seed = case
    layout, generator = slots.layout, torch.Generator().manual_seed(seed)
    blocks = layout.first_blocks[-1]
    named = torch.randint(-1, max(blocks, 1), (ranks, length if blocks else 0), generator=generator).to(dtype)
    chosen, united = torch.full((blocks + spare,), 7), torch.full_like(slots.table, 7)
    *_, chosen, united = both("unite_blocks", named, slots.table, layout.block_size, chosen, united)
    turns = torch.randint(owners, (len(layout.names),), generator=generator)
    both("place_slots", united, layout.block_size, turns, owners, blocks, torch.full_like(chosen, 7))


def test_many_names():
    """More than a thread block of names, parameters and places."""
    layout = Layout(tuple(f"p{i}" for i in range(600)), tuple(1 + i % 7 for i in range(600)), 2)
    slots = layout.slots(tuple(blocks if i % 5 == 0 else 0 for i, blocks in enumerate(layout.blocks)))
    named = torch.randint(-1, layout.first_blocks[-1], (3, 500))
    chosen, united = torch.empty(layout.first_blocks[-1], dtype=torch.int64), torch.empty_like(slots.table)
    *_, chosen, united = both("unite_blocks", named, slots.table, 2, chosen, united)
    both("place_slots", united, 2, torch.arange(600) % 3, 3, len(chosen), torch.empty_like(chosen))


def test_names_out_of_range_are_ignored():
    slots = Layout(("a", "b"), (40, 33), 16).slots((1, 3))
    named, nothing = torch.tensor([[5, 99, -7, 2**62, 6]]), torch.empty(8, dtype=torch.int64)
    united = torch.empty_like(slots.table)
    *_, chosen, united = emulate("unite_blocks", named, slots.table, 16, nothing, united)
    assert chosen.tolist() == [0, 1, 2, *[NO_SLOT] * 5] and united[:, 3].tolist() == [0, 3]


def test_rows_that_are_too_short_get_no_slot():
    slots = Layout(("a",), (6,), 1).slots((6,))
    *_, places = emulate("place_slots", slots.table, 1, torch.tensor([1]), 2, 2, torch.empty(7, dtype=torch.int64))
    assert places.tolist() == [2, 0, 3, 1, NO_SLOT, NO_SLOT, NO_SLOT]


@pytest.mark.parametrize("beyond", [NO_SLOT, -1, 3])
def test_slots_that_are_not_there_are_skipped(beyond):
    """A block or a place that does not exist, and slots beyond the table's, as unite_blocks leaves them."""
    slots = Layout(("a", "b"), (40, 33), 16).slots((2, 1))
    table, full = slots.table, torch.arange(73.0)
    chosen, places = torch.tensor([0, beyond, 1, beyond, beyond]), torch.tensor([4, 0, 1, beyond, beyond])
    sevens = torch.full((slots.numel,), 7.0)
    source, *_, payload = emulate("take_blocks_", full, chosen, table, 16, None, None, sevens)
    assert not source[:16].any() and source[16:40].equal(full[16:40]) and payload[16:32].eq(7).all()
    *_, out = emulate("scatter_blocks_", sevens[None], None, chosen[None], table, 16, torch.ones(2), False, full)
    assert out[:16].eq(7).all() and not out[16:56].any() and out[56:72].eq(7).all() and out[72] == 0
    good, fine = torch.zeros(1, dtype=torch.int32), torch.ones(3, dtype=torch.int32)
    _, velocity, *_ = emulate("settle_", full, full + 1, full, 0.9, sevens, None, chosen, table, 16, fine, good)
    assert velocity.eq(0).sum() == 32
    rows = torch.full((2, 3 * (2 + 16)), 77, dtype=torch.uint8)
    source, *_, rows = emulate("quantise_blocks_", full, chosen, table, 16, None, places, 8, True, rows)
    scales = rows[:, :6].reshape(-1, 2).any(1)
    assert scales.tolist() == [False, True, False, False, True, False] and source[16:56].equal(full[16:56])
    places[0] = beyond if beyond != 3 else 6
    *_, payloads = emulate("unquantise_blocks", rows, 8, places, table, 16, sevens[None])
    assert payloads[0, :16].eq(7).all() and not payloads[0, 32:].eq(7).any()
    *_, out = emulate("add_rows_", torch.ones(96), places, 0, chosen, table, 16, 1.0, good, full)
    assert out[:56].equal(full[:56]) and out[56:72].equal(full[56:72] + 1)


@pytest.mark.parametrize("name", ["take_blocks_", "settle_", "scatter_blocks_", "quantise_blocks_", "accumulate_"])
def test_tables_of_larger_tensors_touch_nothing_beyond(name):
    """No host reads the table: what it would put outside of the tensors is left alone."""
    slots = Layout(("a", "b"), (64, 64), 16).slots((4, 2))
    small, payload, chosen = torch.ones(40), torch.ones(30), torch.tensor([0, 1, 2, 3, 0, 1])
    fine, bad, table = torch.ones(3, dtype=torch.int32), torch.ones(1, dtype=torch.int32), slots.table
    calls = {
        "take_blocks_": (small, chosen, table, 16, None, None, payload),
        "settle_": (small, small + 1, small, 0.9, payload, None, chosen, table, 16, fine, bad),
        "scatter_blocks_": (payload[None], None, chosen[None], table, 16, torch.ones(2), True, small),
        "quantise_blocks_": (small, chosen, table, 16, None, None, 4, True, torch.zeros(1, 60, dtype=torch.uint8)),
        "accumulate_": (small, None, small, 0.0, table, 16, torch.ones(4), fine),
    }
    emulate(name, *calls[name])


def test_empty():
    slots = Layout((), (), 16).slots(())
    table, nothing, flag = slots.table, torch.empty(0), torch.zeros(1, dtype=torch.int32)
    none, no_rows = torch.empty(0, dtype=torch.int64), torch.empty(2, 0, dtype=torch.uint8)
    both("accumulate_", nothing, None, nothing, 0.0, table, 16, nothing, flag + 7)
    both("examine", nothing, table, flag + 7)
    both("draw_blocks", table, slots.layout.units, 16, 1, 2, [0], [0], none.view(1, 0))
    both("select_blocks", nothing, table, 16, none)
    both("take_blocks_", nothing, none, table, 16, flag, None, nothing)
    both("scatter_blocks_", nothing.view(2, 0), None, none.view(2, 0).clone(), table, 16, nothing, False, nothing)
    both("settle_", nothing, None, nothing, 0.9, nothing, None, none, table, 16, flag, flag + 1)
    both("quantise_blocks_", nothing, none, table, 16, flag, none, 4, True, no_rows)
    both("unquantise_blocks", no_rows, 4, None, table, 16, nothing.view(2, 0))
    both("add_quantised", no_rows, 4, 16, nothing)
    both("add_rows_", nothing, none, 0, none, table, 16, 1.0, flag, nothing)
    both("deal_elements", nothing, table, 16, none, nothing.view(2, 0))
    both("undeal_elements", nothing.view(2, 0), table, 16, none, nothing)
    both("unite_blocks", none.view(2, 0), table, 16, torch.zeros(3, dtype=torch.int64), table)
    both("place_slots", table, 16, none, 2, 0, torch.zeros(3, dtype=torch.int64))


def test_sizes_are_checked():
    slots = Layout(("a",), (40,), 16).slots((2,))
    flat, chosen, table, status = torch.zeros(40), torch.tensor([0, 2]), slots.table, torch.ones(2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="norms has 9 elements; allowed are 3 to 3"):
        emulate("accumulate_", flat, None, flat, 0.0, table, 16, torch.zeros(9), status)
    with pytest.raises(RuntimeError, match="bits is 3; allowed is 8, 4 or 2"):
        emulate("add_quantised", torch.zeros(1, 20, dtype=torch.uint8), 3, 16, flat)
    with pytest.raises(RuntimeError, match="places has 1 elements; allowed are 2 or more, as chosen has"):
        emulate("quantise_blocks_", flat, chosen, table, 16, None, chosen[:1], 4, True,
                torch.zeros(1, 20, dtype=torch.uint8))  # fmt: skip
    with pytest.raises(RuntimeError, match=r"grad is Int \[2, 20\] with strides \[20, 1\] on cpu; allowed is Float or "
                       r"Double or BFloat16 or Half \[40\], contiguous, on cpu"):  # fmt: skip
        emulate("accumulate_", flat, None, flat.int().view(2, 20), 0.0, table, 16, torch.zeros(3), status)
    with pytest.raises(RuntimeError, match="slots of 2 [+] 8 bytes"):
        emulate("add_quantised", torch.zeros(1, 19, dtype=torch.uint8), 4, 16, flat)
    with pytest.raises(RuntimeError, match="a row has 1 slots and chosen 2"):
        emulate("quantise_blocks_", flat, chosen, table, 16, None, None, 4, True, torch.zeros(1, 10, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="whole blocks of 16"):
        emulate("add_rows_", flat, chosen, 0, chosen, table, 16, 1.0, status[:1], flat)


@pytest.mark.skipif(nvcc() is None, reason="no CUDA headers here")
def test_ops_cpp_compiles(tmp_path):
    """Against CUDA's and torch's own headers. A torch for the CPU lacks one of them, which is of macros alone."""
    macros = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"
    macros.parent.mkdir(parents=True)
    macros.touch()
    cuda = Path(nvcc()).resolve().parent.parent
    paths = [*torch.utils.cpp_extension.include_paths(), tmp_path, cuda / "include", "/usr/local/cuda/include"]
    run([compiler(), "-fsyntax-only", "-std=c++17", ROOT / "csrc/cuda/ops.cpp", *(f"-I{path}" for path in paths)])


def test_the_emulation_notices_who_waits_for_ever(tmp_path):
    source = tmp_path / "hangs.cpp"
    source.write_text("""
#include "emulate.h"
#include <iostream>
void barrier_of_some() { if (threadIdx.x < 7) __syncthreads(); }
void shuffle_of_some() { if (threadIdx.x % 32 < 7) __shfl_sync(~0u, 1, 0); }
void not_in_mask() { __ballot_sync(2u, threadIdx.x % 32 == 1); }
int main() {
    cudaLaunchConfig_t config{1, 64};
    for (auto kernel : {barrier_of_some, shuffle_of_some, not_in_mask}) {
        try {
            cudaLaunchKernelEx(&config, kernel);
        } catch (const std::exception& error) {
            std::cout << error.what() << "\\n";
        }
    }
}
""")
    paths = [f"-I{path}" for path in (HERE, *torch.utils.cpp_extension.include_paths())]
    libraries = [f"-L{path}" for path in torch.utils.cpp_extension.library_paths()]
    run([compiler(), source, "-o", tmp_path / "hangs", "-std=c++17", "-U_FORTIFY_SOURCE", *paths, *libraries, "-lc10"])
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(torch.utils.cpp_extension.library_paths())}
    said = subprocess.run([tmp_path / "hangs"], capture_output=True, text=True, env=environment).stdout.splitlines()
    assert [line.removeprefix("emulated kernel: ") for line in said] == [
        "7 threads wait for others for ever", "14 threads wait for others for ever",
        "a lane is not in its own mask",
    ]  # fmt: skip
