"""The process groups that thinwire makes, on real ranks: their names, their timeouts, and what is decided over them."""

import contextlib
import datetime

import pytest
import simulated_horovod
import torch
import torch.distributed as dist
from models import attach, data, equal_on_all_ranks, mlp, sgd, step, wrap
from thinwire import BlockSparse, Dense, DivideAndShuffle, Elastic
from thinwire.elastic.lateness import add_in_rank_order
from thinwire.horovod.elastic import ElasticCompressor
from thinwire.replicas.averager import DivideAndShuffleAverager
from thinwire.replicas.groups import another, timeout_of

MEMBERS = [0, 1]


@contextlib.contextmanager
def part_of_the_job(rank, alone=0):
    """A group of two of three ranks, of which the first is in a few groups more."""
    groups = [dist.new_group([0]) for _ in range(alone)]
    members = dist.new_group(MEMBERS)
    yield members
    for group in [*groups, members]:
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)


# ---- groups of a part of the job ----


def elastic_on_a_part(rank, n, alone, times):
    """Members attach, train and close, several times over, on the store that the earlier ones have written to."""
    with part_of_the_job(rank, alone) as members:
        if rank not in MEMBERS:
            return None
        model = mlp()
        ddp, optimizer, batches = wrap(model, process_group=members), sgd(model), data(rank)
        before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        for method in (Elastic(Dense(), beta=0.5), Elastic(BlockSparse("nominated", density=0.1), beta=0.5))[:times]:
            handle = attach(ddp, method, optimizer)
            for _ in range(4):
                step(ddp, optimizer, next(batches))
            assert handle.stats()["late_buckets"] > 0
            handle.close()
        mine = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        both = [torch.empty_like(mine) for _ in MEMBERS]
        dist.all_gather(both, mine, group=members)
        return torch.equal(*both) and not torch.equal(mine, before)


@pytest.mark.parametrize("alone", [0, 1, 3])
def test_elastic_attaches_where_ranks_are_in_different_numbers_of_groups(ranks, alone):
    assert ranks(3).run(elastic_on_a_part, alone, 1, seconds=60) == [True, True, None]


def test_elastic_attaches_again_on_a_part_of_the_job(ranks):
    assert ranks(3).run(elastic_on_a_part, 1, 2, seconds=60) == [True, True, None]


def make_and_destroy(rank, n):
    """Groups of the same ranks, one after the other and some at once, each of which must carry what it is given."""
    with part_of_the_job(rank, alone=1) as members:
        if rank not in MEMBERS:
            return None
        first = kept = another(members)
        names = [first.group_name]
        for _ in range(3):
            group = another(members)
            names.append(group.group_name)
            one = torch.ones(1)
            dist.all_reduce(one, group=group)
            assert one.item() == len(MEMBERS)
            dist.destroy_process_group(first)
            first = group
        dist.destroy_process_group(first)
        del kept
        return names


def test_no_two_groups_of_the_same_ranks_have_the_same_name(ranks):
    here, there, _ = ranks(3).run(make_and_destroy, seconds=60)
    assert here == there and len(set(here)) == len(here)


def groups_left_alone(rank, n):
    """How many groups each rank is in, before and after."""
    counts = []
    with part_of_the_job(rank, alone=2) as members:
        if rank in MEMBERS:
            counts.append(len(dist.distributed_c10d._world.pg_names))
            dist.destroy_process_group(another(members))
            counts.append(len(dist.distributed_c10d._world.pg_names))
    return counts


def test_groups_made_to_agree_on_a_name_are_gone(ranks):
    for counts in ranks(3).run(groups_left_alone, seconds=60):
        assert len(set(counts)) <= 1


def made_by_one_rank_alone(rank, n):
    """PyTorch counts a group of the whole job where it is asked for one, so ranks may be apart there too."""
    alone = dist.new_group([0]) if rank == 0 else None
    model = mlp()
    ddp, optimizer = wrap(model), sgd(model)
    handle = attach(ddp, Elastic(Dense(), beta=0.5), optimizer)
    for _, batch in zip(range(3), data(rank)):
        step(ddp, optimizer, batch)
    handle.close()
    same = equal_on_all_ranks(model.parameters())
    if alone is None:
        dist.new_group([0])  # so that the groups of later tests are named alike
    else:
        dist.destroy_process_group(alone)
    return same


def test_elastic_attaches_where_one_rank_alone_has_asked_for_a_group(ranks):
    assert ranks(2).run(made_by_one_rank_alone, seconds=60) == [True, True]


# ---- timeouts ----


def timeouts_of_what_is_made(rank, n):
    patience = datetime.timedelta(seconds=77)
    everyone = dist.new_group(timeout=patience)
    model = mlp()
    ddp, optimizer = wrap(model, process_group=everyone), sgd(model)
    made, new_group = [], dist.new_group
    dist.new_group = lambda *args, **options: made.append(new_group(*args, **options)) or made[-1]
    try:
        averager = DivideAndShuffleAverager(DivideAndShuffle(group_size=2), everyone)
        averagers = len(made)
        handle = attach(ddp, DivideAndShuffle(group_size=2), optimizer)
        shuffles = len(made) - averagers
        found = {timeout_of(group) for group in made if group is not dist.GroupMember.NON_GROUP_MEMBER}
        handle.close()
        averager.close()
        handle = attach(ddp, Elastic(Dense(), beta=0.5), optimizer)
        found |= {timeout_of(lane.group) for lane in handle._rule.lanes}
        handle.close()
    finally:
        dist.new_group = new_group
    dist.destroy_process_group(everyone)
    return averagers, shuffles, found == {patience}


def test_groups_wait_as_long_as_the_job_does(ranks):
    for averagers, shuffles, right in ranks(4).run(timeouts_of_what_is_made, seconds=60):
        assert averagers and shuffles and right


# ---- what all ranks decide alike ----


@contextlib.contextmanager
def all_reduce_to_an_ulp(rank):
    """A backend may add up in another order on every rank: then float64 sums differ in their last bits."""
    all_reduce = dist.all_reduce

    def inexact(tensor, *args, **options):
        work = all_reduce(tensor, *args, **options)
        if tensor.dtype == torch.float64 and not options.get("async_op"):
            some = tensor[rank :: dist.get_world_size()]
            some.copy_(torch.nextafter(some, torch.full_like(some, torch.inf)))
        return work

    dist.all_reduce = inexact
    try:
        yield
    finally:
        dist.all_reduce = all_reduce


def decide_at_the_edge(rank, n, unused):
    """Layers with equal gradients, so that the norms' last bit says which are heaviest. Which are late, by step."""
    width, layers = 20, 4
    model = torch.nn.Sequential(*[torch.nn.Linear(width, width, bias=False) for _ in range(layers)])
    ddp = wrap(model, bucket_cap_mb=1e-4, find_unused_parameters=unused)
    optimizer = sgd(model, lr=1e-4)
    handle = attach(ddp, Elastic(Dense(), beta=0.5), optimizer)
    late = []
    with all_reduce_to_an_ulp(rank):
        for number in range(6):
            generator = torch.Generator().manual_seed(10 * number + rank)
            gradient = torch.randn(width, width, generator=generator)
            optimizer.zero_grad()
            loss = 0 * ddp(torch.zeros(1, width)).sum()
            (loss + sum((p * gradient).sum() for p in model.parameters())).backward()
            optimizer.step()
            late.append(sorted(handle._rule._will_be_late))
    handle.close()
    return late, equal_on_all_ranks(model.parameters())


@pytest.mark.parametrize("unused", [False, True])
def test_an_all_reduce_that_differs_by_an_ulp_decides_nothing(ranks, unused):
    results = ranks(3).run(decide_at_the_edge, unused, seconds=60)
    assert all(late == results[0][0] and same for late, same in results)
    assert any(results[0][0])


@pytest.mark.skipif(simulated_horovod.hvd is None, reason="Horovod is not installed: 'make horovod' builds it")
def test_nor_does_horovods(monkeypatch):
    world, late = simulated_horovod.World(3), []
    results = simulated_horovod._Operation.results

    def inexact(self, rank):
        found = results(self, rank)
        for tensor in found:
            if tensor.dtype == torch.float64 and tensor.dim() == 1:  # a sum, where what is gathered has rows
                some = tensor[rank :: world.n]
                some.copy_(torch.nextafter(some, torch.full_like(some, torch.inf)))
        return found

    monkeypatch.setattr(simulated_horovod._Operation, "results", inexact)

    def train():
        model = torch.nn.Sequential(*[torch.nn.Linear(20, 20, bias=False) for _ in range(4)])
        plain = sgd(model, lr=1e-4)
        compressor = ElasticCompressor(model.named_parameters(), Elastic(Dense(), beta=0.5), optimizer=plain)
        optimizer = simulated_horovod.hvd.DistributedOptimizer(
            plain, named_parameters=model.named_parameters(), compression=compressor
        )
        for number in range(6):
            gradient = torch.randn(20, 20, generator=torch.Generator().manual_seed(10 * number + world.rank))
            optimizer.zero_grad()
            sum((p * gradient).sum() for p in model.parameters()).backward()
            optimizer.step()
            late.append((number, sorted(compressor._late_next)))
        compressor.finalize()

    errors = world.run(train)
    assert not any(errors), "\n".join(errors)
    decided = {number: [some for other, some in late if other == number] for number, _ in late}
    assert all(len(some) == 3 and some[0] == some[1] == some[2] for some in decided.values())
    assert any(some[0] for some in decided.values())


def test_rows_are_added_in_their_order():
    rows = torch.rand(5, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = [((((a + b) + c) + d) + e) for a, b, c, d, e in rows.T.tolist()]
    assert add_in_rank_order(rows).tolist() == expected
    assert add_in_rank_order(rows[:1]).tolist() == rows[0].tolist()
