"""Wires of 8, 4 and 2 bits, and Dense with a memory: what holds of every other wire holds of them, to the bit."""

import contextlib

import pytest
import thinwire
import torch
import torch.distributed as dist
from models import SMALL_BUCKET_MB, attach, data, equal_on_all_ranks, flat, label, learner, mlp, sgd, step, wrap
from thinwire import BlockSparse, Dense, Elastic
from thinwire.core.blocks import Layout, unit_of
from thinwire.core.exchange import OwnerExchange
from thinwire.core.levels import Levels
from thinwire.core.reducer import Reducer
from thinwire.core.selection import Choice
from thinwire.methods import block_sparse

WIRES = ("int8", "int4", "int2")
DENSITIES = {"independent": None, "permuted": None, "shared": 0.3, "topk": 0.1, "nominated": 0.1}
RANDOM = ("independent", "permuted", "shared")


def sparse(selection, wire_dtype, memory="error_feedback", **options):
    options = {"density": DENSITIES[selection], "block_size": 16, "dense_below": 20} | options
    return BlockSparse(selection, memory=memory, wire_dtype=wire_dtype, **options)


def dense(wire_dtype):
    return Dense(wire_dtype, memory="error_feedback")


def name_of(method):
    if isinstance(method, Elastic):
        return f"elastic-{name_of(method.method)}"
    return label(method) if isinstance(method, BlockSparse) else f"dense-{method.memory}-{method.wire_dtype}"


FEEDBACK = [sparse(selection, wire) for selection in DENSITIES for wire in WIRES]
VARIATES = [sparse(selection, wire, "control_variate") for selection in RANDOM for wire in WIRES]
DENSE = [dense(wire) for wire in WIRES]
EVERY = FEEDBACK + VARIATES + DENSE

# Every selection, every memory and every wire, and each exchange with each wire.
SOME = [
    sparse("nominated", "int8"), sparse("nominated", "int4"), sparse("nominated", "int2"), sparse("topk", "int4"),
    sparse("topk", "int2"), sparse("independent", "int8"), sparse("permuted", "int2", "control_variate"),
    sparse("shared", "int4", "control_variate"), sparse("shared", "int2"), dense("int8"), dense("int4"), dense("int2"),
]  # fmt: skip

LATE = [Elastic(sparse("nominated", "int4"), beta=0.5), Elastic(dense("int8"), beta=0.5)]


class Given(torch.nn.Module):
    """Parameters, a bucket or so for each, whose gradients are what the forward pass is given."""

    SHAPES = ((24, 40), (7,), (16, 16), (333,), (1,), (64, 30), (50,))

    def __init__(self, dtype=torch.float32):
        super().__init__()
        for i, shape in enumerate(self.SHAPES):
            self.register_parameter(f"p{i}", torch.nn.Parameter(torch.zeros(shape, dtype=dtype)))

    def forward(self, gradients):
        return sum((p * g).sum() for p, g in zip(self.parameters(), gradients, strict=True))


def whole_numbers(generator, dtype=torch.float32):
    """Gradients of which every sum is exact; none is 0, since what is left of a 0 has ever finer digits."""
    return [
        (torch.randint(1, 100, shape, generator=generator) * (1 - 2 * torch.randint(0, 2, shape, generator=generator)))
        .to(dtype)
        for shape in Given.SHAPES
    ]  # fmt: skip


def start(method, dtype=torch.float32, cap=0.002, **options):
    model = Given(dtype)
    ddp = wrap(model, bucket_cap_mb=cap)
    optimizer = sgd(ddp)
    return model, ddp, optimizer, attach(ddp, method, optimizer, **options)


def held(handle, model, kind="residual"):
    """What the memory holds, flat and as float64, in the order of the parameters; zeros where it has nothing."""
    state = handle.state_dict()["memory"].get(kind, {})
    return flat(state[name] if name in state else torch.zeros(p.numel()) for name, p in model.named_parameters())


def added_up(tensor):
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def watch_buckets(handle):
    """A list to which the number of every bucket goes that the hook is given."""
    numbers, reduce = [], handle.reduce
    handle.reduce = lambda bucket: (numbers.append(bucket.index()), reduce(bucket))[1]
    return numbers


# ---- replicas ----


def train(rank, n, methods, steps):
    outcomes = []
    for method in methods:
        model = learner()
        ddp = wrap(model)
        optimizer, batches = sgd(ddp, lr=1.0), data(rank)
        handle = attach(ddp, method, optimizer)
        buckets = watch_buckets(handle)
        losses = [step(ddp, optimizer, next(batches)) for _ in range(steps)]
        handle.finalize()
        reached = sum(losses[-5:]) < 0.7 * sum(losses[:5])
        outcomes.append((name_of(method), equal_on_all_ranks(model.parameters()), reached, buckets[-1]))
    return outcomes


@pytest.mark.parametrize(("n", "methods", "steps"), [
    (2, SOME, 30), (3, [*SOME, *LATE], 30), (4, SOME[:8:2] + SOME[9:], 30),
    *(pytest.param(n, EVERY + LATE, 100, marks=pytest.mark.full) for n in (2, 3, 4)),
], ids=lambda value: f"{len(value)}-methods" if isinstance(value, list) else None)  # fmt: skip
def test_replicas_are_bitwise_equal_and_learn(ranks, n, methods, steps):
    for outcomes in ranks(n).run(train, methods, steps, seconds=1200):
        for name, equal, reached, buckets in outcomes:
            assert equal and reached, (name, equal, reached)
            assert buckets >= 4, "too few buckets to show anything"


# ---- conservation ----


def conserve(rank, n, methods, dtype, cap=0.002, steps=6):
    """Of each method, in how many elements some step lost or made something, summed in float64 over the ranks."""
    wrong = {}
    for method in methods:
        model, ddp, optimizer, handle = start(method, dtype, cap)
        generator, wrong[name_of(method)] = torch.Generator().manual_seed(rank), 0
        before = held(handle, model)
        for _ in range(steps):
            gradients = whole_numbers(generator, dtype)
            optimizer.zero_grad()
            ddp(gradients).backward()
            averaged, kept = flat(p.grad for p in model.parameters()), held(handle, model)
            assert bool(kept.any()), "nothing waits, so nothing is shown"
            brought, both = added_up(before + flat(gradients)), added_up(kept) + n * averaged
            wrong[name_of(method)] += int((brought != both).sum())
            before = kept
            optimizer.step()
    return wrong


@pytest.mark.parametrize(("n", "dtype"), [(2, torch.float32), (4, torch.float32), (2, torch.float64)], ids=str)
def test_what_is_sent_and_what_is_kept_are_what_there_was(ranks, n, dtype):
    methods = FEEDBACK + DENSE if n == 2 and dtype == torch.float32 else [m for m in SOME if m in FEEDBACK + DENSE]
    for wrong in ranks(n).run(conserve, methods, dtype):
        assert not any(wrong.values()), wrong


def control(rank, n, methods, dtype, steps=5):
    """Of each method, how often the mean differed from the ranks' own, and whether it holds anything."""
    outcomes = []
    for method in methods:
        model, ddp, optimizer, handle = start(method, dtype)
        generator, wrong = torch.Generator().manual_seed(rank), 0
        for _ in range(steps):
            optimizer.zero_grad()
            ddp(whole_numbers(generator, dtype)).backward()
            mean = held(handle, model, "mean")
            wrong += int((added_up(held(handle, model, "own")) != n * mean).sum())
            optimizer.step()
        outcomes.append((name_of(method), wrong, bool(mean.any())))
    return outcomes


@pytest.mark.parametrize(("n", "methods"), [(2, VARIATES), (4, [m for m in SOME if m in VARIATES])])
def test_a_control_variates_mean_is_the_mean_of_the_ranks_own(ranks, n, methods):
    for outcomes in ranks(n).run(control, methods, torch.float32):
        for name, wrong, holds in outcomes:
            assert wrong == 0 and holds, name


# ---- buckets ----


@contextlib.contextmanager
def first_bucket(nbytes):
    """DDP's default: one small bucket for the last layers, and large ones."""
    kept, dist._DEFAULT_FIRST_BUCKET_BYTES = dist._DEFAULT_FIRST_BUCKET_BYTES, nbytes
    try:
        yield
    finally:
        dist._DEFAULT_FIRST_BUCKET_BYTES = kept


def memory_of(handle):
    memory = handle.state_dict()["memory"]
    return {f"{kind}.{name}": memory[kind][name] for kind in memory for name in memory[kind]}


def in_buckets(rank, n, methods):
    """Parameters and memory with one bucket, as by default, and with a bucket a layer; and how many there were."""
    outcomes = []
    for method in methods:
        found, buckets = [], []
        for cap in (1000, None, 0.02, SMALL_BUCKET_MB):
            model = mlp()
            with first_bucket(7000):
                ddp = wrap(model, bucket_cap_mb=cap)
            optimizer, batches = sgd(ddp, lr=1.0), data(rank)
            handle = attach(ddp, method, optimizer)
            numbers = watch_buckets(handle)
            for _ in range(5):
                step(ddp, optimizer, next(batches))
            found.append({"parameters": flat(model.parameters())} | memory_of(handle))
            buckets.append(1 + numbers[-1])
        same = [all(torch.equal(one[key], found[0][key]) for key in found[0]) for one in found]
        outcomes.append((name_of(method), same, buckets))
    return outcomes


def test_nothing_depends_on_buckets(ranks):
    for outcomes in ranks(3).run(in_buckets, [*SOME, Dense(exact=True), Dense(torch.bfloat16, "error_feedback")]):
        for name, same, (one, default, *_, many) in outcomes:
            assert all(same), (name, same)
            assert one == 1 < default < many and many >= 6, "the same buckets each time show nothing"


# ---- resuming ----


def resume(rank, n, methods):
    outcomes = []
    for method in methods:
        model = mlp()
        ddp = wrap(model)
        optimizer, batches = sgd(ddp, lr=1.0), data(rank)
        handle = attach(ddp, method, optimizer)
        for _ in range(4):
            step(ddp, optimizer, next(batches))
        state, weights = handle.state_dict(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
        again = mlp(seed=9)
        again.load_state_dict(weights)
        ddp2 = wrap(again, bucket_cap_mb=25)
        optimizer2 = sgd(ddp2, lr=1.0)
        handle2 = attach(ddp2, method, optimizer2)
        handle2.load_state_dict(state)
        for batch in [next(batches) for _ in range(3)]:
            step(ddp, optimizer, batch)
            step(ddp2, optimizer2, batch)
        ours, theirs = memory_of(handle), memory_of(handle2)
        same = torch.equal(flat(model.parameters()), flat(again.parameters())) and ours.keys() == theirs.keys()
        kept = any(bool(tensor.any()) for tensor in ours.values())
        outcomes.append((name_of(method), same and all(torch.equal(ours[key], theirs[key]) for key in ours), kept))
    return outcomes


def test_resumed_is_uninterrupted(ranks):
    for outcomes in ranks(3).run(resume, SOME):
        for name, same, kept in outcomes:
            assert same and kept, name


# ---- inf, NaN and what is too large ----


def spoilt(rank, n, methods, value):
    """Of the third step, in which the last rank's gradient holds such a value: whose gradients are not finite then,
    whether their memory is as it was, to rounding and once they are cleared to the bit, and whether that of another
    bucket changed; and of every other step, whether it is as ever."""
    outcomes = []
    for method in methods:
        model, ddp, optimizer, handle = start(method)
        generator, fine = torch.Generator().manual_seed(rank), []
        for number in range(5):
            gradients = [torch.randn(shape, generator=generator) for shape in Given.SHAPES]
            if number == 2 and rank == n - 1:
                gradients[3][17] = value
            before = memory_of(handle)
            optimizer.zero_grad()
            ddp(gradients).backward()
            bad = [i for i, p in enumerate(model.parameters()) if not bool(torch.isfinite(p.grad).all())]
            after = memory_of(handle)
            fine += [bool(torch.isfinite(tensor).all()) for tensor in after.values()]
            if number != 2:
                fine.append(not bad)
                optimizer.step()
                continue
            of_bad = [key for key in before if int(key[-1]) in bad]
            told = bad, all(torch.allclose(after[key], before[key], rtol=1e-5, atol=1e-5) for key in of_bad)
            others = any(not torch.equal(after[key], before[key]) for key in before if key not in of_bad)
            optimizer.zero_grad()
            cleared = memory_of(handle)
            same = all(torch.equal(cleared[key], before[key]) for key in before)
        outcomes.append((name_of(method), *told, others, same, all(fine)))
    return outcomes


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_on_one_rank_is_seen_by_all_and_kept_by_none(ranks, value):
    first, second = ranks(2).run(spoilt, SOME, value)
    assert first == second
    for name, bad, *rest in first:
        assert 3 in bad and len(bad) < len(Given.SHAPES) and all(rest), (name, bad, rest)


def too_large(rank, n, methods, dtype, size):
    """Whether the results of each step are finite, and what is kept, where one step's gradients are so large."""
    outcomes = []
    for method in methods:
        model, ddp, optimizer, handle = start(method, dtype)
        generator, finite, kept = torch.Generator().manual_seed(rank), [], True
        for factor in (1.0, 1.0, size, 1.0, 1.0):
            gradients = [torch.randn(s, generator=generator, dtype=dtype).clamp(-1, 1) * factor for s in Given.SHAPES]
            optimizer.zero_grad()
            ddp(gradients).backward()
            finite.append(all(bool(torch.isfinite(p.grad).all()) for p in model.parameters()))
            kept &= all(bool(torch.isfinite(tensor).all()) for tensor in memory_of(handle).values())
            if finite[-1]:
                optimizer.step()
            else:
                optimizer.zero_grad()
        outcomes.append((name_of(method), finite, kept))
    return outcomes


@pytest.mark.parametrize(("dtype", "size", "fits"), [
    (torch.float32, 1e17, WIRES), (torch.float32, 1e38, None), (torch.float32, 3.3e38, ()),
    (torch.float64, 1e38, WIRES), (torch.float64, 1e39, ("int8", "int4")), (torch.float64, 1e41, ()),
], ids=str)  # fmt: skip
def test_what_is_too_large_does_not_stay(ranks, dtype, size, fits):
    """Memories of float32 end at 2^62, and of float64 too a block's scale has to fit bfloat16. fits: in which wires;
    None where it depends on the memory."""
    for outcomes in ranks(2).run(too_large, SOME, dtype, size):
        for name, (*before, then, one, other), kept in outcomes:
            assert kept and all(before) and one and other, name
            assert fits is None or then == name.endswith(fits), name


def under_scaler(rank, n, method, enabled):
    """Parameters and unscaled memory after some steps, of which one is left out, and the scale. With a GradScaler that
    is for an inf on the last rank; without one the loop says so."""
    model = mlp()
    ddp = wrap(model)
    optimizer, batches = sgd(ddp, lr=1.0), data(rank)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2, enabled=enabled)
    handle = attach(ddp, method, optimizer, grad_scaler=scaler)
    for number in range(6):
        x, y = next(batches)
        optimizer.zero_grad()
        loss = ((ddp(x) - y) ** 2).mean()
        overflows = enabled and number == 2 and rank == n - 1
        scaler.scale(loss * float("inf") if overflows else loss).backward()
        if number == 2 and not enabled:
            handle.skip_step()
        else:
            scaler.step(optimizer)
            scaler.update()
    optimizer.zero_grad()
    memory = {key: tensor / (handle._scale or 1.0) for key, tensor in memory_of(handle).items()}
    return {"parameters": flat(model.parameters())} | memory, scaler.get_scale()


def scaled(rank, n, methods):
    outcomes = []
    for method in methods:
        (ours, scale), (theirs, _) = (under_scaler(rank, n, method, enabled) for enabled in (True, False))
        outcomes.append((name_of(method), all(torch.equal(ours[key], theirs[key]) for key in theirs), scale))
    return outcomes


def test_under_a_grad_scaler_nothing_differs_but_the_scale(ranks):
    """A scale is a power of two, and scales of blocks follow it exactly."""
    for outcomes in ranks(2).run(scaled, SOME):
        for name, same, scale in outcomes:
            assert same and scale == 2.0**11, name


# ---- what differs between ranks, and what is refused ----


def message(function):
    try:
        function()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def differing(rank, n, methods):
    model, ddp, _, _ = start(methods[rank])
    return message(lambda: ddp(whole_numbers(torch.Generator())).backward())


@pytest.mark.parametrize(("methods", "says"), [
    ((sparse("nominated", "int4"), sparse("nominated", torch.float32), sparse("nominated", "int4")),
     "wire_dtype: int4 on rank 0,2, torch.float32 on rank 1"),
    ((dense("int8"), dense("int4"), dense("int2")), "wire_dtype: int8 on rank 0, int4 on rank 1, int2 on rank 2"),
    ((Dense(), Dense(exact=True), Dense()), "exact: False on rank 0,2, True on rank 1"),
    ((Dense(), Dense(), Dense(memory="error_feedback")), "memory: none on rank 0,1, error_feedback on rank 2"),
], ids=["int4-float32", "three-widths", "exact", "memory"])  # fmt: skip
def test_what_differs_is_named_on_every_rank(ranks, methods, says):
    for said in ranks(3).run(differing, methods):
        assert said.startswith("ValueError: thinwire: the ranks differ in") and says in said, said


ALL_NAMES = "torch.float32, torch.bfloat16, torch.float16, 'int8', 'int4', 'int2'"


@pytest.mark.parametrize(("make", "says"), [
    *((lambda w=wire: BlockSparse(wire_dtype=w), f"BlockSparse(wire_dtype={wire!r}, memory='none')") for wire in WIRES),
    *((lambda w=wire: BlockSparse("topk", memory="none", wire_dtype=w), f"{wire} rounds off") for wire in WIRES),
    *((lambda w=wire: Dense(w), f"Dense(wire_dtype={wire!r}, memory='none')") for wire in WIRES),
    (lambda: BlockSparse(wire_dtype="int4"), "memory='error_feedback' or 'control_variate'"),
    (lambda: Dense("int4"), "it needs a memory that keeps it: memory='error_feedback'"),
    (lambda: BlockSparse("topk", wire_dtype="int3"), f"wire_dtype='int3'): wire_dtype must be one of {ALL_NAMES}"),
    (lambda: BlockSparse("topk", wire_dtype=torch.int8), f"torch.int8): wire_dtype must be one of {ALL_NAMES}"),
    (lambda: BlockSparse("topk", wire_dtype=torch.int8), "did you mean 'int8'?"),
    (lambda: Dense("int16"), f"Dense(wire_dtype='int16'): wire_dtype must be one of {ALL_NAMES}"),
    (lambda: Dense(4), f"Dense(wire_dtype=4): wire_dtype must be one of {ALL_NAMES}"),
    (lambda: Dense(None), "Dense(wire_dtype=None)"),
    (lambda: Dense(["int4"]), "Dense(wire_dtype=['int4'])"),
    (lambda: Dense(exact=1), "Dense(exact=1): exact must be True or False"),
    (lambda: Dense(exact="yes"), "Dense(exact='yes'): exact must be True or False"),
    (lambda: Dense(memory="control_variate"), "Dense(memory='control_variate'): memory must be one of 'none', "
                                              "'error_feedback'"),
    (lambda: BlockSparse("shared", memory="error_feedback", wire_dtype="INT4"), "wire_dtype='INT4'"),
])  # fmt: skip
def test_what_cannot_be_a_wire_is_refused(make, says):
    said = message(make)
    assert said.startswith(("TypeError: ", "ValueError: ")) and says in said, said


def test_only_dense_alone_on_float32_is_the_backends():
    theirs = [Dense()]
    ours = [Dense(exact=True), Dense(torch.bfloat16), Dense(memory="error_feedback"), dense("int4"), BlockSparse()]
    assert [method.of_backend for method in theirs + ours] == [True] + [False] * len(ours)


# ---- the message, byte by byte ----


def taken(name, values, block_size, chosen=None, keep=True):
    """The row of a parameter's chosen blocks, and what the parameter keeps."""
    layout = Layout(("w",), (len(values),), block_size)
    blocks = list(range(layout.blocks[0])) if chosen is None else chosen
    slots, source = layout.slots((len(blocks),)), torch.tensor(values)
    own, status = torch.tensor(blocks), torch.tensor([1, 0], dtype=torch.int32)
    wire = Levels(name)
    payload = wire.take(source, Choice(slots, own, False, lambda _: own[None]), status, None, keep)
    return in_hex(wire.message(payload)), source.tolist(), wire.unpack(payload, slots, torch.float32)


def test_a_row_in_8_bits():
    """1 / 127 is 0x3c010204 as float32, so 0x3c02 as bfloat16, rounded up; 126 of it are the nearest to 1."""
    row, kept, values = taken("int8", [1.0, -1.0, 0.5, 254.0, 0.0, -3.0], 3)
    assert row == "02 3c 00 40 " "7e 82 3f " "7f 00 fe"
    scale = 0.00793457031250
    assert values.tolist() == [126 * scale, -126 * scale, 63 * scale, 254.0, 0.0, -4.0]
    assert kept == [1.0 - 126 * scale, 126 * scale - 1.0, 0.5 - 63 * scale, 0.0, 0.0, 1.0]


def test_a_row_in_4_bits():
    """Of five values a block, of which the last holds three; ties go to the even number."""
    row, kept, values = taken("int4", [7.0, -7.0, 3.5, 1.0, 2.5, -14.0, 1.0, 6.0], 5)
    assert row == "80 3f 00 40 " "97 14 02 " "09 03 00"
    assert values.tolist() == [7.0, -7.0, 4.0, 1.0, 2.0, -14.0, 0.0, 6.0]
    assert kept == [0.0, 0.0, -0.5, 0.0, 0.5, 0.0, 1.0, 0.0]


def test_a_row_in_2_bits():
    row, kept, values = taken("int2", [2.0, -2.0, 1.0, -1.5, 0.9, 0.75, -0.25], 5)
    assert row == "00 40 40 3f " "cd 00 " "01 00"
    assert values.tolist() == [2.0, -2.0, 0.0, -2.0, 0.0, 0.75, 0.0]
    assert kept == [0.0, 0.0, 1.0, 0.5, torch.tensor(0.9).item(), 0.0, -0.25]


def test_a_row_of_some_blocks():
    """A block of zeros has the scale 0; what is not chosen is kept, and where ``keep`` says no, all is."""
    values = [0.0, 0.0, 5.0, 5.0, 7.0, -1.0]
    row, kept, sent = taken("int4", values, 2, [0, 2])
    assert row == "00 00 80 3f " "00 f7"
    assert kept == [0.0, 0.0, 5.0, 5.0, 0.0, 0.0] and sent.tolist() == [0.0, 0.0, 7.0, -1.0]
    assert taken("int4", values, 2, [0, 2], keep=False)[1] == values


def encoded(method, values, names=("w",), numels=None, rank=0, n=2):
    """A reducer's first step on a rank, and what it gives the exchange."""
    reducer = Reducer(block_sparse(method), rank, n)
    one = reducer.take_in(torch.tensor(values), names, numels or (len(values),), 0)
    return reducer, one


def test_a_message_of_topk_begins_with_the_numbers_of_its_blocks():
    method = BlockSparse("topk", density=1 / 3, block_size=2, dense_below=0, wire_dtype="int4")
    reducer, one = encoded(method, [0.0, 1.0, 0.0, 0.0, 7.0, -6.0])
    reducer.pack(one)
    assert in_hex(one.wire.message(one.payload)) == "02 00 " "80 3f " "a7"


@pytest.mark.parametrize(("name", "first"), [("a", 0), ("x", 1)])
def test_rows_to_owners_and_the_sum_that_comes_back_in_4_bits(name, first):
    """Four blocks of a parameter dealt to two ranks in turn, from ``first`` on; int2's sums come back as int4."""
    assert unit_of(name) % 2 == first
    method = BlockSparse("shared", density=1.0, memory="error_feedback", block_size=3, wire_dtype="int2")
    pairs, rows = [], []
    for rank, values in enumerate(([1.0, -1.0, 0.0] + [2.0] * 3 + [4.0] * 3 + [8.0, 0.0],
                                   [2.0, 0.0, 0.0] + [2.0] * 3 + [0.0] * 3 + [-8.0, 1.0])):  # fmt: skip
        reducer, one = encoded(method, values, (name,), rank=rank)
        reducer.pack(one, to_owners=True)
        pairs.append((reducer, one))
        rows.append(one.wire.rows(one.payload))
    even = [in_hex(of_rank[first]) for of_rank in rows]
    odd = [in_hex(of_rank[1 - first]) for of_rank in rows]
    assert even == ["80 3f 80 40 " "0d 15", "00 40 00 00 " "01 00"]
    assert odd == ["00 40 00 41 " "15 01", "00 40 00 41 " "15 03"]
    messages, lost = [], []
    for owner, (_, one) in enumerate(pairs):
        mine = torch.stack([row[owner] for row in rows])
        message, rest = one.wire.add_up(mine, one.payload, one.choice.slots, torch.float32, True)
        messages.append(message)
        lost.append(rest)
    # 3, -1, 0 in steps of 3 / 7, and 4, 4, 4 in steps of 4 / 7, both rounded up; then 4, 4, 4 and 0, 0.
    assert in_hex(messages[first]) == "dc 3e 13 3f " "e7 00 " "77 07"
    assert in_hex(messages[1 - first]) == "13 3f 00 00 " "77 07 " "00 00"
    for rank, (reducer, one) in enumerate(pairs):
        reducer.decode(one, OwnerExchange.collect(one, torch.stack(messages)), lost[rank])
    three, four = 0.4296875, 0.57421875
    expected = [7 * three / 2, -2 * three / 2, 0.0] + 6 * [7 * four / 2] + 2 * [0.0]
    assert all(one.reading.grad.tolist() == expected for _, one in pairs)
    kept = pairs[first][1].reading.source.tolist()
    assert kept[:3] == [3.0 - 7 * three, 2 * three - 1.0, 0.0]


def in_hex(row):
    return bytes(row.tolist()).hex(" ")


# ---- bytes ----


class Part(torch.nn.Module):
    """Some of a model's parameters, by their names."""

    def __init__(self, named):
        super().__init__()
        self.named = dict(named)

    def named_parameters(self, *args, **options):
        yield from self.named.items()


def figures(rank, n, methods, cap, apart=False):
    """What was sent in a step, and what was foretold of each bucket's parameters, and how many buckets there were.
    apart: every rank names blocks of its own."""
    outcomes = []
    for method in methods:
        model, ddp, optimizer, handle = start(method, cap=cap)
        generator, sent, seen = torch.Generator().manual_seed(rank), [0], {}
        names, reduce = {p: name for name, p in model.named_parameters()}, handle.reduce

        def watch(bucket):
            seen[bucket.index()] = [(names[p], p) for p in bucket.parameters()]
            return reduce(bucket)

        handle.reduce = watch
        for _ in range(4):
            gradients = [torch.randn(shape, generator=generator) for shape in Given.SHAPES]
            if apart:
                for gradient in gradients:
                    blocks = gradient.view(-1)[: gradient.numel() // 16 * 16].view(-1, 16)
                    blocks[rank::n] *= 1e4
            optimizer.zero_grad()
            ddp(gradients).backward()
            optimizer.step()
            sent.append(handle.stats()["bytes_sent"])
        step, counts = 3, [b - a for a, b in zip(sent, sent[1:])]
        foretold = sum(thinwire.estimate(method, Part(part), n, step)["bytes_sent"] for part in seen.values())
        outcomes.append((name_of(method), counts[-1], foretold, len(seen)))
    return outcomes


@pytest.mark.parametrize(("n", "cap"), [(2, 25), (3, 25), (3, 0.002), pytest.param(2, 0.002, marks=pytest.mark.full)])
def test_estimate_is_what_is_sent(ranks, n, cap):
    for outcomes in ranks(n).run(figures, EVERY, cap):
        for name, sent, foretold, buckets in outcomes:
            assert (buckets == 1) == (cap == 25) and buckets != 2
            assert sent <= foretold if name.startswith("nominated") else sent == foretold, (name, sent, foretold)


@pytest.mark.parametrize("cap", [25, 0.002])
def test_nominated_sends_what_is_estimated_where_no_block_is_named_twice(ranks, cap):
    methods = [sparse("nominated", wire) for wire in WIRES]
    for outcomes in ranks(3).run(figures, methods, cap, True):
        for name, sent, foretold, _ in outcomes:
            assert sent == foretold, (name, sent, foretold)


# ---- other gradients ----


def in_bfloat16(rank, n, methods):
    """Of each method, in how many elements the average was not that of what left the memory, rounded once."""
    wrong = {}
    for method in methods:
        model, ddp, optimizer, handle = start(method, torch.bfloat16)
        generator, wrong[name_of(method)] = torch.Generator().manual_seed(rank), 0
        before = held(handle, model)
        for _ in range(4):
            gradients = whole_numbers(generator, torch.bfloat16)
            optimizer.zero_grad()
            ddp(gradients).backward()
            kept, averaged = held(handle, model), torch.cat([p.grad.view(-1) for p in model.parameters()])
            left = added_up(before + flat(gradients) - kept) / n
            wrong[name_of(method)] += int((left.to(torch.bfloat16) != averaged).sum())
            before = kept
            optimizer.step()
    return wrong


def test_averages_in_bfloat16_are_rounded_once(ranks):
    for wrong in ranks(2).run(in_bfloat16, [m for m in SOME if m in FEEDBACK + DENSE]):
        assert not any(wrong.values()), wrong


# ---- Dense ----


def averages(rank, n, method, dtype, cap):
    """Averaged gradients of two steps, flat, in the dtype that they came in; method None: DDP without a hook."""
    model = Given(dtype)
    ddp = wrap(model, bucket_cap_mb=cap)
    optimizer, generator, found = sgd(ddp), torch.Generator().manual_seed(rank), []
    if method is not None:
        attach(ddp, method, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        ddp([torch.randn(shape, generator=generator, dtype=dtype) for shape in Given.SHAPES]).backward()
        found.append(torch.cat([p.grad.view(-1) for p in model.parameters()]))
        optimizer.step()
    return torch.stack(found)


@pytest.mark.parametrize("n", [2, 3])
def test_dense_has_the_bits_of_ddp_without_a_hook(ranks, n):
    for cap in (25, 0.002):
        ours, plain = (ranks(n).run(averages, method, torch.float32, cap) for method in (Dense(), None))
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def by_hand(n, dtype):
    """Added up in rank order and multiplied by 1 / n; float64 travels as float32, there and back."""
    generators, found = [torch.Generator().manual_seed(rank) for rank in range(n)], []
    for _ in range(3):
        total = torch.zeros(())
        for generator in generators:
            one = [torch.randn(shape, generator=generator, dtype=dtype).view(-1) for shape in Given.SHAPES]
            total = total + torch.cat(one).float().to(dtype)
        found.append(total.float().to(dtype) * torch.tensor(1 / n, dtype=dtype))
    return torch.stack(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_sums_are_in_rank_order_whatever_the_buckets(ranks, dtype):
    expected = by_hand(3, dtype)
    for cap in (25, 0.002):
        assert all(torch.equal(found, expected) for found in ranks(3).run(averages, Dense(exact=True), dtype, cap))
