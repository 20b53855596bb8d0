"""What DDP's buckets may hold: parameters without elements, frozen since, of no known name, or of very many blocks."""

import contextlib

import pytest
import thinwire
import torch
from models import (
    ALL_METHODS,
    SMALL_BUCKET_MB,
    attach,
    data,
    equal_on_all_ranks,
    flat,
    label,
    logged,
    mlp,
    sgd,
    step,
    watched,
    wrap,
)
from thinwire import BlockSparse, Dense, DivideAndShuffle, Elastic
from thinwire.core import selection
from thinwire.core.blocks import Layout

TOPK = BlockSparse("topk", density=0.1, block_size=16)
NOMINATED = BlockSparse("nominated", density=0.1, block_size=16)


# ---- parameters without elements ----


class WithNothing(torch.nn.Module):
    """mlp(), and where a dtype is given a layer of that dtype that has no outputs."""

    def __init__(self, dtype=None):
        super().__init__()
        self.body = mlp(layers=3)
        self.nothing = None if dtype is None else torch.nn.Linear(40, 0).to(dtype)

    def forward(self, x):
        y = self.body(x)
        return y if self.nothing is None else y + self.nothing(x.to(self.nothing.weight.dtype)).sum().to(y.dtype)


def without_elements(rank, n, dtype, options, methods):
    """Each method's outcome with the layer that has no elements, and without it."""
    outcomes = []
    for method in methods:
        found = []
        for model in (WithNothing(dtype), WithNothing()):
            ddp = wrap(model, **options)
            optimizer, batches = sgd(ddp), data(rank)
            handle = attach(ddp, method, optimizer)
            with watched() as collectives:
                for _ in range(4):
                    step(ddp, optimizer, next(batches))
                measured = handle.consistency()["inconsistency_max"]
                handle.load_state_dict(handle.state_dict())
                step(ddp, optimizer, next(batches))
                handle.finalize()
            found.append((flat(model.body.parameters()), handle.stats()["bytes_sent"], collectives.started, measured))
        (ours, *rest), (theirs, *wanted) = found
        of_replicas = isinstance(method, (DivideAndShuffle, Elastic))  # which ask and sum more, not buckets
        outcomes.append((label_of(method), torch.equal(ours, theirs), of_replicas or rest == wanted))
    return outcomes


def label_of(method):
    return label(method) if isinstance(method, BlockSparse) else repr(method)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("dtype", "options"), [(torch.bfloat16, {}), (torch.float32, {"bucket_cap_mb": 0})],
                         ids=["a-dtype-of-its-own", "a-bucket-for-each"])  # fmt: skip
def test_a_bucket_without_elements_changes_nothing_and_is_not_sent(ranks, dtype, options):
    methods = [
        *ALL_METHODS, Dense(), Dense(torch.float16), DivideAndShuffle(), DivideAndShuffle(overlap="delayed"),
        Elastic(TOPK, beta=0.5), Elastic(Dense(), beta=0.5, speculate=True),
    ]  # fmt: skip
    for outcomes in ranks(2).run(without_elements, dtype, options, methods):
        for name, same_parameters, same_exchange in outcomes:
            assert same_parameters and same_exchange, name


# ---- layers that are frozen and thawed ----


@contextlib.contextmanager
def frozen(layer):
    layer.requires_grad_(False)
    try:
        yield
    finally:
        layer.requires_grad_(True)


def freezing(rank, n, methods):
    """The first layer is frozen before attach, after it and for three steps in the middle."""
    outcomes = []
    for method in methods:
        model = mlp(layers=4)
        ddp = wrap(model, find_unused_parameters=True)
        layer = model[0]
        with frozen(layer):
            rest = [p for p in model.parameters() if p.requires_grad]
            optimizer, batches = torch.optim.SGD(rest, lr=0.5), data(rank)
            handle = attach(ddp, method, optimizer)
            for _ in range(2):
                step(ddp, optimizer, next(batches))
        optimizer.add_param_group({"params": list(layer.parameters()), "lr": 0.5})
        start = flat(layer.parameters())
        for _ in range(3):
            step(ddp, optimizer, next(batches))
        thawed = flat(layer.parameters())
        with frozen(layer):
            for _ in range(3):
                step(ddp, optimizer, next(batches))
            handle.finalize()
            equal = equal_on_all_ranks(model.parameters())
        again = flat(layer.parameters())
        for _ in range(3):
            step(ddp, optimizer, next(batches))
        handle.finalize()
        moved = not torch.equal(start, thawed) and not torch.equal(again, flat(layer.parameters()))
        outcomes.append((repr(method), equal and equal_on_all_ranks(model.parameters()), moved))
        handle.close()
    return outcomes


def test_layers_are_frozen_and_thawed_with_every_method(ranks):
    gradients = [TOPK, NOMINATED, BlockSparse(), BlockSparse(memory="control_variate"), Dense()]
    elastic = [Elastic(TOPK, beta=0.5), Elastic(NOMINATED, beta=0.5, speculate=True)]
    for outcomes in ranks(2).run(freezing, [*gradients, *elastic]):
        for name, equal, moved in outcomes:
            assert equal and moved, name


def test_replicas_in_groups_become_equal_where_they_are_frozen(ranks):
    """Two groups of two: what was frozen between two partitions still differs between the groups."""
    methods = [DivideAndShuffle(2, overlap=overlap) for overlap in ("none", "bucket", "delayed")]
    for outcomes in ranks(4).run(freezing, methods):
        for name, equal, moved in outcomes:
            assert equal and moved, name


def residuals(rank, n, method):
    """What waits for a frozen layer waits until it is thawed, in this run or in one that goes on from a checkpoint."""
    model, runs = mlp(layers=4), []
    ddp = wrap(model, find_unused_parameters=True)
    optimizer = sgd(ddp)
    handle, batches = attach(ddp, method, optimizer), data(rank)
    held = lambda one: {k: t for k, t in one.state_dict()["memory"]["residual"].items() if k.startswith("0.")}
    for _ in range(3):
        step(ddp, optimizer, next(batches))
    before = held(handle)
    with frozen(model[0]):
        for _ in range(3):
            step(ddp, optimizer, next(batches))
        weights, state = {k: t.clone() for k, t in model.state_dict().items()}, handle.state_dict()
    twin = mlp(layers=4)
    twin.load_state_dict(weights)
    twin_ddp = wrap(twin, find_unused_parameters=True)
    twin_optimizer = sgd(twin_ddp)
    with frozen(twin[0]):
        twin_handle = attach(twin_ddp, method, twin_optimizer)
        twin_handle.load_state_dict(state)
    rest = [next(batches) for _ in range(3)]
    for one_ddp, one_optimizer, one in ((ddp, optimizer, handle), (twin_ddp, twin_optimizer, twin_handle)):
        waited = held(one)
        kept = all(torch.equal(before[k], waited[k]) for k in before) and len(before) == 2
        for batch in rest:
            step(one_ddp, one_optimizer, batch)
        went_on = any(not torch.equal(before[k], held(one)[k]) for k in before)
        runs.append((flat(one_ddp.module.parameters()), kept, went_on))
    (here, *first), (there, *second) = runs
    return torch.equal(here, there), first, second


@pytest.mark.parametrize("method", [TOPK, NOMINATED], ids=label)
def test_the_residual_of_a_frozen_layer_waits_and_survives_a_checkpoint(ranks, method):
    assert ranks(2).run(residuals, method) == [(True, [True, True], [True, True])] * 2


def conserved(rank, n, methods):
    """The relative difference between what should have been applied and what was, or waits, when a layer is frozen."""
    errors = []
    for method in methods:
        model = mlp(layers=4)
        ddp = wrap(model, find_unused_parameters=True)
        optimizer = sgd(ddp, lr=0.1)
        handle, generator = attach(ddp, method, optimizer), torch.Generator().manual_seed(rank)
        before, due = flat(model.parameters()), torch.zeros(flat(model.parameters()).numel(), dtype=torch.float64)

        def known(steps):
            for _ in range(steps):
                gradients = [torch.randn(p.shape, generator=generator) * p.requires_grad for p in model.parameters()]
                due.add_(flat(gradients))
                optimizer.zero_grad()
                loss = sum((p * g).sum() for p, g in zip(model.parameters(), gradients))  # of frozen ones nothing
                (ddp(torch.zeros(1, 40)).sum() * 0 + loss).backward()
                optimizer.step()

        known(4)
        for layer in (model[0], model[4], model[0]):
            with frozen(layer):
                known(2)
            known(1)
        with frozen(model[2]):
            known(1)
            handle.finalize()
        waits = handle.state_dict()["memory"].get("residual", {})
        waits = flat(waits[k] if k in waits else torch.zeros(p.numel()) for k, p in model.named_parameters())
        for one in (due, waits):
            torch.distributed.all_reduce(one)
        applied = (before - flat(model.parameters())) / 0.1
        errors.append(float((applied + waits / n - due / n).norm() / (due / n).norm()))
    return errors


def test_nothing_is_lost_where_a_layer_is_frozen(ranks):
    methods = [Dense(), TOPK, NOMINATED, Elastic(Dense(), beta=0.5), Elastic(TOPK, beta=0.3, max_delay=2),
               Elastic(NOMINATED, beta=0.3, speculate=True)]  # fmt: skip
    for errors in ranks(2).run(conserved, methods):
        assert max(errors) < 1e-4, dict(zip(map(repr, methods), errors))


# ---- a hook without names ----


def nameless(rank, n, method, with_module):
    model = mlp()
    ddp = wrap(model)
    optimizer, batches = sgd(ddp), data(rank)
    modules = [model] if with_module else []
    state = thinwire.HookState(method, *modules, optimizer=optimizer)
    ddp.register_comm_hook(state, thinwire.hook)
    for _ in range(6):
        step(ddp, optimizer, next(batches))
    measured = state.consistency()
    state.skip_step()
    step(ddp, optimizer, next(batches))
    numbers = [state.stats()[key] for key in ("steps", "bytes_sent", "dense_bytes")]
    refused = [message(state.state_dict), message(lambda: state.load_state_dict({}))] if not with_module else []
    parameters = flat(model.parameters())
    state.close()
    step(ddp, optimizer, next(batches))
    return parameters, flat(model.parameters()), numbers, measured["step"], measured["bound"], refused


def message(call):
    try:
        call()
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("method", [TOPK, Dense(), BlockSparse("topk", density=0.1, block_size=16, momentum=0.9)],
                         ids=["topk", "dense", "momentum"])  # fmt: skip
def test_a_hook_state_without_a_module_averages_as_one_with_it(ranks, method):
    """Of methods that draw nothing from the names."""
    for (ours, closed, *rest, refused), (theirs, wanted, *expected, _) in zip(
        ranks(2).run(nameless, method, False), ranks(2).run(nameless, method, True), strict=True
    ):
        assert torch.equal(ours, theirs) and torch.equal(closed, wanted)
        assert rest == expected
        assert [said.partition(":")[0] for said in refused] == ["state_dict()", "load_state_dict()"]
        assert all("HookState(method, model)" in said for said in refused)


def nameless_draws(rank, n):
    model = mlp()
    ddp = wrap(model, find_unused_parameters=True)
    ddp.register_comm_hook(thinwire.HookState(BlockSparse("permuted")), thinwire.hook)
    optimizer, batches = sgd(ddp, lr=1.0), data(rank)
    with frozen(model[0]):
        step(ddp, optimizer, next(batches))
    losses = [step(ddp, optimizer, next(batches)) for _ in range(8)]
    return equal_on_all_ranks(model.parameters()), losses[-1] < losses[0]


def test_a_hook_state_without_a_module_draws_the_same_blocks_on_every_rank(ranks):
    assert ranks(3).run(nameless_draws) == [(True, True)] * 3


def nameless_refusals(rank, n):
    spectrum = torch.nn.Linear(4, 4, dtype=torch.complex64)
    table = torch.nn.Embedding(50, 4, sparse=True)
    said = []
    for model, x in ((spectrum, torch.ones(1, 4, dtype=torch.complex64)), (table, torch.tensor([1, 2]))):
        ddp = wrap(model)
        ddp.register_comm_hook(thinwire.HookState(BlockSparse()), thinwire.hook)
        try:
            ddp(x).abs().sum().backward()
        except TypeError as error:
            said.append(str(error))
    return said


def test_a_hook_state_without_a_module_refuses_what_a_bucket_shows(ranks):
    for said in ranks(2).run(nameless_refusals):
        assert "complex64: thinwire averages real gradients only" in said[0] and "sparse=False" in said[1]


def nameless_alone(rank, n):
    model = mlp(layers=2)
    ddp = wrap(model)
    state = thinwire.HookState(BlockSparse("topk", density=0.1), consistency_every=1)
    ddp.register_comm_hook(state, thinwire.hook)
    optimizer, batches = sgd(ddp), data(rank)
    with logged():
        step(ddp, optimizer, next(batches)), step(ddp, optimizer, next(batches))
    return state.consistency()["inconsistency_max"], state.stats()["steps"]


def test_a_hook_state_without_a_module_on_one_rank(ranks):
    assert ranks(1).run(nameless_alone) == [(0.0, 2)]


# ---- numbers of blocks beyond int32 ----


def test_numbers_of_blocks_travel_in_a_dtype_that_holds_them():
    limits = {2**16: torch.int16, 2**16 + 1: torch.int32, 2**31: torch.int32, 2**31 + 1: torch.int64}
    assert all(selection.index_dtype(blocks) == dtype for blocks, dtype in limits.items())
    for numels, width in (((2**16, 64), 2), ((2**16 + 1, 64), 4), ((2**30, 2**30, 64), 4), ((2**31 + 1, 64), 8)):
        slots = Layout(tuple("abc"[: len(numels)]), numels, 1).slots((6,) * len(numels))
        assert selection.TopK.index_bytes(slots) == 6 * len(numels) * width
        assert selection.Nominated.asked_bytes(slots, 0, 3) == 2 * len(numels) * width


def many_blocks(rank, n, methods, limits):
    """Training where only so many blocks' numbers fit so many bits: parameters, bytes sent, and what was foretold."""
    kept = selection.INT16_BLOCKS, selection.INT32_BLOCKS
    selection.INT16_BLOCKS, selection.INT32_BLOCKS = limits
    try:
        found = []
        for method in methods:
            model = mlp(layers=3)
            ddp = wrap(model, bucket_cap_mb=SMALL_BUCKET_MB if method.wire_dtype == torch.float16 else 25)
            handle, optimizer, batches = attach(ddp, method), sgd(ddp), data(rank)
            for _ in range(5):
                step(ddp, optimizer, next(batches))
            foretold = thinwire.estimate(method, model, n)["bytes_sent"]
            found.append((flat(model.parameters()), handle.stats()["bytes_sent"] / 5, foretold))
        return found
    finally:
        selection.INT16_BLOCKS, selection.INT32_BLOCKS = kept


@pytest.mark.parametrize("limits", [(50, 2**31), (50, 50)], ids=["int32", "int64"])
def test_blocks_whose_numbers_need_more_bits_are_sent_all_the_same(ranks, limits):
    methods = [method for selection_ in ("topk", "nominated") for method in (
        BlockSparse(selection_, density=0.1, block_size=16),
        BlockSparse(selection_, density=0.1, block_size=16, wire_dtype=torch.float16),
    )]  # fmt: skip
    wide, narrow = (ranks(3).run(many_blocks, methods, some) for some in (limits, (2**16, 2**31)))
    for of_wide, of_narrow in zip(wide, narrow, strict=True):
        for method, (ours, sent, foretold), (theirs, sent_narrow, foretold_narrow) in zip(methods, of_wide, of_narrow):
            assert torch.equal(ours, theirs), label(method)
            assert sent > sent_narrow, label(method)
            if method.wire_dtype == torch.float32:  # in one bucket
                assert sent - sent_narrow == foretold - foretold_narrow, label(method)
                assert method.selection == "nominated" or sent == foretold


def large_numbers(rank, n, selection_, limit):
    """Training with blocks whose numbers take the highest of 16 bits, where so many count as fitting 16 bits."""
    kept, selection.INT16_BLOCKS = selection.INT16_BLOCKS, limit
    try:
        model = mlp(width=250, layers=1)
        ddp = wrap(model)
        handle = attach(ddp, BlockSparse(selection_, density=0.1, block_size=1))
        optimizer, batches = sgd(ddp), data(rank, width=250)
        for _ in range(2):
            step(ddp, optimizer, next(batches))
        return flat(model.parameters()), handle.stats()["bytes_sent"]
    finally:
        selection.INT16_BLOCKS = kept


@pytest.mark.parametrize("selection_", ["topk", "nominated"])
def test_numbers_use_all_of_their_16_bits(ranks, selection_):
    for (narrow, few), (wide, more) in zip(*(ranks(2).run(large_numbers, selection_, limit) for limit in (2**16, 9))):
        assert torch.equal(narrow, wide) and few < more
