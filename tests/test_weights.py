"""memory="weights": what a round does not send stays in the rank's own weights, to the bit, and not for long."""

import pytest
import thinwire
import torch
import torch.distributed as dist
from models import mlp, wrap
from simulated_horovod import World, hvd
from thinwire import BlockSparse, Dense, DivideAndShuffle, Elastic, LocalSteps
from thinwire.advice.candidates import candidate
from thinwire.core.channel import Channel
from thinwire.core.exchange import GroupLinks
from thinwire.core.reducer import Reducer
from thinwire.core.stats import Stats
from thinwire.methods import block_sparse

WIRES = (torch.float32, torch.bfloat16, torch.float16, "int8", "int4", "int2")
BUCKETS = (
    (("a", "b", "c"), (1000, 7, 333)), (("d",), (2048,)), (("e", "f"), (1, 640)), (("g", "h"), (517, 3000)),
)  # fmt: skip
TOGETHER = (sum((names for names, _ in BUCKETS), ()), sum((numels for _, numels in BUCKETS), ()))


def partial(wire_dtype=torch.float32, **options):
    options = {"density": 0.25, "block_size": 16, "dense_below": 20} | options
    return BlockSparse("nominated", memory="weights", wire_dtype=wire_dtype, **options)


def channel(method, rank, n):
    return Channel(GroupLinks(dist.group.WORLD), Reducer(method, rank, n), Stats())


def whole_numbers(numels, generator, largest=2**14):
    """Pseudo-gradients of which every sum is exact, and no element is 0."""
    numel = sum(numels)
    signs = 1 - 2 * torch.randint(0, 2, (numel,), generator=generator)
    return (torch.randint(1, largest, (numel,), generator=generator) * signs).float()


def averaged(channel, moved, step):
    """A round of the buckets in ``moved``: of each the mean, what is left, and what was sent."""
    encoded = [channel.encode(one.clone(), *bucket, step) for one, bucket in zip(moved, BUCKETS, strict=True)]
    channel.carry(encoded)
    return [came_of(one) for one in encoded]


def came_of(encoded):
    return encoded.reading.grad, encoded.reading.source, encoded.sent()


def on_all_ranks(mine):
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone)


# ---- nothing is lost ----


def conserve(rank, n, wire_dtype, rounds=5):
    """In how many elements the ranks' moves are not what the mean has and what is left, and other such numbers."""
    averages, generator = channel(partial(wire_dtype), rank, n), torch.Generator().manual_seed(rank)
    lost = touched = differing = sent_exactly = waiting = rounded = 0
    for step in range(rounds):
        moved = [whole_numbers(numels, generator) for _, numels in BUCKETS]
        for before, (mean, left, sent) in zip(moved, averaged(averages, moved, step), strict=True):
            total = on_all_ranks(before.double() - left.double()).sum(0)
            lost += int((total.float() * torch.tensor(1 / n) != mean).sum())
            touched += int(((left != before) & ~sent).sum()) + int(((mean != 0) & ~sent).sum())
            differing += int((on_all_ranks(sent.int()) != sent).sum())
            sent_exactly += int(((left == 0) != sent).sum())
            waiting, rounded = waiting + int((~sent).sum()), rounded + int(left[sent].count_nonzero())
    return lost, touched, differing, sent_exactly, waiting, rounded


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("wire_dtype", WIRES, ids=str)
def test_what_is_sent_and_what_is_left_are_what_had_moved(ranks, n, wire_dtype):
    for lost, touched, differing, sent_exactly, waiting, rounded in ranks(n).run(conserve, wire_dtype):
        assert (lost, touched, differing) == (0, 0, 0)
        assert waiting, "everything was sent, so nothing is shown"
        if wire_dtype == torch.float32:
            assert sent_exactly == 0 and rounded == 0
        else:
            assert rounded, "nothing was rounded, so nothing is shown"


def spoilt(rank, n, wire_dtype, value):
    """Rank 1 spoils the second bucket: of each bucket whether the mean is finite, in this round and in the next, and in
    how many elements of the second what is left is not what had moved."""
    averages, generator = channel(partial(wire_dtype), rank, n), torch.Generator().manual_seed(rank)
    first, second = ([whole_numbers(numels, generator) for _, numels in BUCKETS] for _ in range(2))
    if rank == 1:
        first[1][5] = value
    found, after = averaged(averages, first, 0), averaged(averages, second, 1)
    wrong = int((found[1][1] != torch.where(first[1].isfinite(), first[1], 0.0)).sum())
    return [[bool(mean.isfinite().all()) for mean, _, _ in results] for results in (found, after)], wrong


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30], ids=str)
@pytest.mark.parametrize("wire_dtype", [torch.float32, torch.bfloat16, torch.float16, "int4"], ids=str)
def test_a_round_that_is_not_finite_leaves_all_where_it_was(ranks, wire_dtype, value):
    """1e30 is finite, and its square is not."""
    for finite, wrong in ranks(3).run(spoilt, wire_dtype, value):
        assert finite == [[True, False, True, True], [True] * 4] and wrong == 0


# ---- age ----


def choose(reducers, moved, names, numels, step):
    """What each rank says was sent in a round, bool [n, N]."""
    encoded = [r.take_in(one.clone(), names, numels, step) for r, one in zip(reducers, moved, strict=True)]
    answers = None if encoded[0].asked is None else torch.stack([one.asked for one in encoded])
    for reducer, one in zip(reducers, encoded, strict=True):
        reducer.pack(one, answers, to_owners=True)
    return torch.stack([one.sent() for one in encoded])


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("density", "max_age"), [(0.25, None), (0.25, 13), (0.1, None), (0.6, None), (0.3, 7), (0.04, None)]
)
def test_no_block_waits_longer_than_max_age(n, density, max_age):
    """Of parameters with 1 to 60 blocks, and 400, where the ranks' heaviest blocks are the same in every round."""
    method = partial(density=density, max_age=max_age, block_size=4, dense_below=0)
    numels = (*(4 * blocks - 1 for blocks in range(1, 61)), 1600)
    names = tuple(f"p{i}" for i in range(len(numels)))
    age = method.longest_wait
    assert age == max_age or max_age is None and 2 / density <= age < 2 / density + 1
    heavy = torch.cat([torch.linspace(100, 1, numel) for numel in numels])
    moved = [heavy * (1 + 0.001 * rank) for rank in range(n)]
    reducers = [Reducer(method, rank, n) for rank in range(n)]
    last, waited = torch.full(heavy.shape, -1), torch.zeros(heavy.shape, dtype=torch.int64)
    for step in range(2 * age + 3):
        (sent, *others) = choose(reducers, moved, names, numels, step)
        assert all(torch.equal(sent, other) for other in others)
        waited = torch.maximum(waited, step - last)
        last[sent] = step
        assert sent[-1600], "the heaviest block has no room beside those that are due"
    assert int(waited.max()) == age


def from_the_middle(rank, n, wire_dtype):
    """Whether a round is the same after others as it is by itself, and with all parameters in one bucket."""
    old, alone, together = (channel(partial(wire_dtype), rank, n) for _ in range(3))
    generator = torch.Generator().manual_seed(rank)
    for step in range(7):
        moved = [whole_numbers(numels, generator) for _, numels in BUCKETS]
        then = averaged(old, moved, step)
    parts = [torch.cat(one) for one in zip(*then, strict=True)]
    whole = together.encode(torch.cat(moved), *TOGETHER, step)
    together.carry([whole])
    ways = zip(*averaged(alone, moved, step), strict=True), zip(came_of(whole))
    return [all(torch.equal(torch.cat(one), part) for one, part in zip(way, parts, strict=True)) for way in ways]


@pytest.mark.parametrize("wire_dtype", [torch.float32, "int4"], ids=str)
def test_a_round_follows_from_its_number_and_from_no_other_round(ranks, wire_dtype):
    assert ranks(3).run(from_the_middle, wire_dtype) == [[True, True]] * 3


def test_nothing_is_kept_for_a_checkpoint():
    assert Reducer(partial("int4"), 0, 4).memory.stores() == {}
    assert Reducer(partial("int4"), 0, 4).memory.waiting() == {}


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "says"),
    [
        *(({"selection": one, "density": 0.25}, f"selection='{one}', memory='weights'.*use selection='nominated'")
          for one in ("independent", "permuted", "shared", "topk")),
        ({"selection": "nominated"}, "density=None, memory='weights'.*give it a density"),
        ({"selection": "nominated", "density": 0.25, "momentum": 0.9}, "momentum correction needs memory='error_f"),
        ({"selection": "nominated", "density": 0.25, "max_age": 7}, "max_age=7, density=0.25.*at least 2 / density, 8"),
        ({"selection": "nominated", "density": "auto", "max_inconsistency": 1.0}, "memory must be 'error_feedback'"),
        ({"selection": "nominated", "density": 0.25, "memory": "error_feedback", "max_age": 8}, "max_age acts with"),
        ({"memory": "none", "max_age": 8}, "max_age=8, memory='none'.*max_age acts with memory='weights' only"),
    ],
)  # fmt: skip
def test_combinations_that_cannot_be_right_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        BlockSparse(**{"memory": "weights"} | options)


def test_max_age_is_an_integer():
    with pytest.raises(TypeError, match="max_age=8.0.*must be an integer"):
        partial(max_age=8.0)
    assert partial(max_age=8).longest_wait == partial().longest_wait == 8
    assert partial(density=0.3).longest_wait == 7
    assert BlockSparse("nominated", density=0.25).longest_wait is None


INSIDE = "stays in the rank's own weights.*use it inside thinwire.LocalSteps"


@pytest.mark.parametrize(
    "make",
    [
        lambda: block_sparse(partial()),
        lambda: thinwire.HookState(partial(), mlp()),
        lambda: Elastic(partial()),
        lambda: candidate(partial(), True),
        lambda: thinwire.suggest(partial(), torch.optim.SGD(mlp().parameters(), lr=0.1), world_size=4),
    ],
    ids=["reducer", "HookState", "Elastic", "advise", "suggest"],
)
def test_only_local_steps_run_it(make):
    with pytest.raises(ValueError, match=INSIDE):
        make()
    assert LocalSteps(method=partial("int4")).method == partial("int4")
    assert block_sparse(Dense()).memory == "none"


def test_nor_does_divide_and_shuffle_take_it():
    with pytest.raises(ValueError, match="its selection must be 'shared'"):
        DivideAndShuffle(blocks=partial())


def attached(rank, n):
    try:
        thinwire.attach(wrap(mlp(layers=2)), partial())
    except ValueError as error:
        return str(error)


def test_attach_refuses_it(ranks):
    assert all("use it inside thinwire.LocalSteps" in said for said in ranks(2).run(attached))


@pytest.mark.skipif(hvd is None, reason="Horovod is not installed: 'make horovod' builds it")
def test_horovods_compressor_refuses_it(one_thread):
    def refused():
        with pytest.raises(ValueError, match=INSIDE):
            thinwire.horovod.Compressor(mlp(layers=3).named_parameters(), partial())

    errors = World(1).run(refused)
    assert not any(errors), "\n".join(errors)
