"""Uneven inputs: join(), and the mean over the ranks that still have data, as DDP without a hook takes it."""

import pytest
import thinwire
import torch
from models import attach, data, equal_on_all_ranks, flat, mlp, sgd, step, watched, wrap
from thinwire import BlockSparse, Dense
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

EVERY_BLOCK = BlockSparse("nominated", density=1.0, block_size=16)
TOPK = BlockSparse("topk", density=0.1, block_size=16)
NOMINATED = BlockSparse("nominated", density=0.1, block_size=16)


def joined(rank, n, methods, batches, options, by_initial):
    """Parameters after training by each method (None: plain DDP) with so many batches on each rank."""
    found = []
    for method in methods:
        model = mlp(layers=4)
        ddp = wrap(model, **options)
        if method is not None:
            attach(ddp, method)
        optimizer, stream = sgd(ddp, lr=0.5), data(rank)
        with ddp.join(divide_by_initial_world_size=by_initial):
            for _ in range(batches[rank]):
                step(ddp, optimizer, next(stream))
        found.append(flat(model.parameters()))
    return found


@pytest.mark.parametrize(("options", "by_initial"), [
    ({}, False), ({}, True), ({"find_unused_parameters": True}, False), ({"static_graph": True}, False),
    ({"gradient_as_bucket_view": True}, False), ({"bucket_cap_mb": 25}, False),
], ids=lambda value: next(iter(value), "plain") if isinstance(value, dict) else "of-all" if value else "of-those-left")
def test_the_mean_inside_join_is_plain_ddps(ranks, options, by_initial):
    methods = [None, Dense(), EVERY_BLOCK, BlockSparse(density=1.0, memory="control_variate")]
    # A rank that has no data at all hangs plain DDP too where the graph is static.
    for batches in ((2, 6, 4), (1 if "static_graph" in options else 0, 5, 5)):
        for want, *found in ranks(3).run(joined, methods, batches, options, by_initial):
            for method, one in zip(methods[1:], found, strict=True):
                assert (one - want).abs().max() < 1e-6, method


def memories(rank, n, method, optimizer_known=False):
    """Rank 0 runs out of data first. What each memory held then and at the end, and whether the replicas are equal."""
    model = mlp(layers=4)
    ddp = wrap(model)
    optimizer, stream = sgd(ddp), data(rank)
    handle = attach(ddp, method, optimizer if optimizer_known else None)
    held = lambda: {kind: flat(tensors.values()) for kind, tensors in handle.state_dict()["memory"].items()}
    with ddp.join(divide_by_initial_world_size=False):
        for _ in range(3 + 4 * rank):
            step(ddp, optimizer, next(stream))
        then = held()
    if optimizer_known:  # the next epoch, whose first zero_grad() clears what no step was made with
        for _ in range(2):
            step(ddp, optimizer, next(stream))
    return then, held(), equal_on_all_ranks(model.parameters()), handle.stats()["steps"]


@pytest.mark.parametrize("method", [TOPK, NOMINATED], ids=lambda method: method.selection)
def test_a_residual_waits_where_its_rank_has_no_data(ranks, method):
    found = ranks(3).run(memories, method)
    then, end, _, _ = found[0]
    assert then["residual"].any() and torch.equal(then["residual"], end["residual"])
    assert all(equal and steps == 11 for _, _, equal, steps in found)


@pytest.mark.parametrize("optimizer_known", [False, True])
def test_a_control_variate_stays_the_mean_of_all_ranks(ranks, optimizer_known):
    found = ranks(3).run(memories, BlockSparse(block_size=16, memory="control_variate"), optimizer_known)
    own = sum(end["own"] for _, end, _, _ in found) / 3
    for _, end, equal, _ in found:
        assert equal and end["mean"].any()
        torch.testing.assert_close(end["mean"], own, rtol=1e-4, atol=1e-7)


def estimates(rank, n, selection):
    """What the ranks that have data get, and would get without the others, averaged over many draws."""
    total = 0.0
    with torch.random.fork_rng(devices=[]):
        for seed in range(150):
            model = mlp(width=20, layers=1)
            ddp = wrap(model)
            attach(ddp, BlockSparse(selection, density=0.5, block_size=4, dense_below=0, seed=seed))
            x, y = next(data(rank, width=20))
            with ddp.join(divide_by_initial_world_size=False):
                if rank:
                    ((ddp(x) - y) ** 2).mean().backward()
                    total += flat(p.grad for p in model.parameters()) / 150
    model = mlp(width=20, layers=1)
    ((model(x) - y) ** 2).mean().backward()
    return total, flat(p.grad for p in model.parameters())


@pytest.mark.parametrize("selection", ["independent", pytest.param("shared", marks=pytest.mark.full)])
def test_random_blocks_estimate_the_mean_of_those_left(ranks, selection):
    _, (one, first), (other, second) = ranks(3).run(estimates, selection)
    mean = (first + second) / 2
    assert torch.equal(one, other)
    assert (one - mean).norm() < 0.15 * mean.norm()  # 1 / sqrt(150) = 0.08 of it is to be expected


def by_hand(rank, n):
    """A hook that DDP is given knows no DDP: as PyTorch's own, it divides by all ranks."""
    found = []
    for kind in ("ours", "PyTorch's"):
        model = mlp(layers=4)
        ddp = wrap(model)
        if kind == "ours":
            ddp.register_comm_hook(thinwire.HookState(Dense(), model), thinwire.hook)
        else:
            ddp.register_comm_hook(None, allreduce_hook)
        optimizer, stream = sgd(ddp, lr=0.5), data(rank)
        with ddp.join(divide_by_initial_world_size=False):
            for _ in range(2 + 3 * rank):
                step(ddp, optimizer, next(stream))
        found.append(flat(model.parameters()))
    return float((found[0] - found[1]).abs().max())


def test_by_hand_it_divides_by_all_as_pytorchs_hooks(ranks):
    assert max(ranks(2).run(by_hand)) < 1e-6


def costs(rank, n):
    """Collectives and bytes of a step outside of join(), inside it, and inside it with a mean of those left."""
    found = []
    for options in (None, {}, {"divide_by_initial_world_size": False}):
        model = mlp(layers=4)
        ddp = wrap(model)
        handle, optimizer, stream = attach(ddp, Dense()), sgd(ddp), data(rank)
        step(ddp, optimizer, next(stream))
        before = handle.stats()["bytes_sent"]
        with watched() as collectives:
            if options is None:
                step(ddp, optimizer, next(stream))
            else:
                with ddp.join(**options):
                    step(ddp, optimizer, next(stream))
        found.append((collectives.started, handle.stats()["bytes_sent"] - before))
    return found


def test_it_costs_one_small_collective_a_pass_and_only_there(ranks):
    for outside, inside, of_those_left in ranks(2).run(costs):
        assert inside[1] == outside[1]
        assert of_those_left == (inside[0] + 1, inside[1] + 4)
