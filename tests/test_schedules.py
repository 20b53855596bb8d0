"""Who averages with whom: the cycles of partitions, by their matrices and on real process groups of 2 to 17 ranks."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from thinwire import DivideAndShuffle, DivideAndShuffleAverager
from thinwire.methods.schedules import BY_NAME, Butterfly, Hosts, Random, Ring, connected, default_group_size

SIZES = range(2, 18)
FEW = (2, 3, 4, 6, 8, 9)  # those of them on real groups in make test


def averaging(partition):
    """The matrix of one round."""
    n = sum(map(len, partition))
    matrix = np.zeros((n, n))
    for group in partition:
        matrix[np.ix_(group, group)] = 1 / len(group)
    return matrix


def after(partitions):
    """The matrix of all rounds of a cycle."""
    return np.linalg.multi_dot([np.eye(sum(map(len, partitions[0])))] + [averaging(p) for p in partitions][::-1])


def largest_prime_factor(n):
    return max(p for p in range(2, n + 1) if n % p == 0 and all(p % q for q in range(2, p)))


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("n", SIZES)
def test_partitions_are_partitions_and_cycles_mix(name, n):
    hosts = tuple(str(rank // 3) for rank in range(n))
    for size in range(2, n + 1):
        cycle = BY_NAME[name].partitions(n, size, 0, hosts)
        for partition in cycle:
            assert sorted(rank for group in partition for rank in group) == list(range(n))
            assert max(map(len, partition)) <= size
        rest = np.abs(np.linalg.eigvals(after(cycle) - 1 / n)).max()
        assert rest < 1 - 1e-9, f"groups of {size}: the ranks never agree"
        if name == "butterfly" and largest_prime_factor(n) <= size:
            assert np.allclose(after(cycle), 1 / n)


def test_four_ranks_in_pairs_take_the_authors_pattern():
    expected = (((0, 1), (2, 3)), ((0, 3), (1, 2)))
    assert DivideAndShuffle(group_size=2).partitions(4) == expected
    assert DivideAndShuffle().partitions(4) == expected


@pytest.mark.parametrize(("n", "size", "rounds"), [(4, 2, 2), (8, 2, 3), (9, 3, 2), (16, 4, 2), (16, 2, 4), (12, 4, 2)])
def test_butterflies_are_exact_wherever_the_cycle_begins(n, size, rounds):
    cycle = Butterfly().partitions(n, size, 0, ())
    assert len(cycle) == rounds
    for start in range(rounds):
        assert np.allclose(after(cycle[start:] + cycle[:start]), 1 / n)


@pytest.mark.parametrize(("n", "size"), [(16, 4), (8, 2), (12, 3)])
def test_random_partitions_contract_as_computed(n, size):
    rho = (n - size) / (size * (n - 1))
    generator, ratios = np.random.default_rng(0), []
    for partition in Random(family=4000).partitions(n, size, 3, ()):
        x = generator.standard_normal(n)
        x -= x.mean()
        ratios.append(np.square(averaging(partition) @ x).sum() / np.square(x).sum())
    assert abs(np.mean(ratios) - rho) < 4 * np.std(ratios) / len(ratios) ** 0.5


def stationary(partitions, n, rounds):
    """The mean of (1/n) sum |x_i - mean|^2 under unit noise in every round, exactly: a covariance goes round."""
    covariance, total, counted = np.zeros((n, n)), 0.0, 0
    centre = np.eye(n) - 1 / n
    for t in range(rounds):
        w = averaging(partitions[t % len(partitions)])
        covariance = w @ (covariance + np.eye(n)) @ w.T
        if t >= rounds // 2:
            total, counted = total + np.trace(centre @ covariance) / n, counted + 1
    return total / counted


def test_stationary_distance_is_as_computed():
    n, size = 16, 4
    rho = (n - size) / (size * (n - 1))
    random = stationary(Random(family=2000).partitions(n, size, 1, ()), n, 2000)
    assert abs(random / (rho * (1 - 1 / n) / (1 - rho)) - 1) < 0.03
    assert stationary(Butterfly().partitions(n, size, 0, ()), n, 40) == pytest.approx(1 / 4 - 1 / 16)
    fixed = Butterfly().partitions(n, size, 0, ())[:1]
    assert stationary(fixed, n, 400) > 1.9 * stationary(fixed, n, 200) > 20  # a random walk: it grows with time


def test_hosts_are_crossed_in_every_fourth_round_only():
    hosts = ("a", "a", "a", "a", "b", "b", "b", "b")
    cycle = Hosts().partitions(8, 4, 0, hosts)
    for t, partition in enumerate(cycle):
        crossing = any(len({hosts[rank] for rank in group}) > 1 for group in partition)
        assert crossing == (t % 4 == 3)
    assert np.allclose(after(cycle), 1 / 8)
    assert Hosts(hosts=hosts).partitions(8, 4, 0, ("x",) * 8) == cycle
    with pytest.raises(ValueError, match="names 3 hosts"):
        Hosts(hosts=("a", "a", "b")).partitions(4, 2, 0, ())


@pytest.mark.parametrize("across_every", [2, 3, 4])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("layout", [(8, 8), (4, 4), (16, 16), (3, 2, 1), (5, 5, 5)], ids=str)
def test_hosts_mix_in_every_layout(layout, size, across_every):
    hosts = tuple(str(host) for host, ranks in enumerate(layout) for _ in range(ranks))
    method = DivideAndShuffle(group_size=size, schedule=Hosts(across_every=across_every))
    cycle = method.partitions(len(hosts), hosts)
    assert np.abs(np.linalg.eigvals(after(cycle) - 1 / len(hosts))).max() < 1 - 1e-9


def test_ranks_that_never_meet_are_refused():
    for schedule in (Random(family=1), Hosts(across_every=1, hosts=("a", "a", "b", "b"))):
        with pytest.raises(ValueError, match="apart for good"):
            DivideAndShuffle(group_size=2, schedule=schedule).partitions(4)
        DivideAndShuffle(group_size=2, schedule=schedule, global_every=8).partitions(4)
    for seed in range(200):
        assert connected(DivideAndShuffle(group_size=2, schedule=Random(family=2), seed=seed).partitions(8))


@pytest.mark.parametrize(("n", "size"), [(2, 2), (3, 2), (4, 2), (5, 2), (8, 2), (9, 3), (16, 4), (12, 3), (64, 8)])
def test_default_group_size(n, size):
    assert default_group_size(n) == size


def test_the_family_of_groups_is_small():
    for n in (16, 64, 100):
        for schedule in (Butterfly(), Ring(), Random()):
            assert len(schedule.partitions(n, default_group_size(n), 0, ())) <= 8


# ---- on real process groups ----


@pytest.fixture(scope="module")
def many():
    """many(n): ranks of which the first n can be made a world."""
    few, all_ = Ranks(max(FEW)), Ranks(max(SIZES))
    yield lambda n: few if n <= few.n else all_
    few.stop()
    all_.stop()


def world_of(rank, n, folder):
    """Make the first n ranks a world of their own; whether this rank is in it."""
    dist.destroy_process_group()
    if rank < n:
        dist.init_process_group("gloo", init_method=f"file://{folder}/{n}", rank=rank, world_size=n)
    else:
        dist.init_process_group("gloo", init_method=f"file://{folder}/alone-{rank}", rank=0, world_size=1)
    return rank < n


def mean_over_ranks(tensor):
    total = tensor.detach().double().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def means(rank, _, n, folder):
    """By schedule and group size: how far the mean moved in a cycle, and how far this rank is from it, at the end and
    at the start."""
    if not world_of(rank, n, folder):
        return None
    found = {}
    for name in ("butterfly", Ring(), Random(family=3)):
        for size in {2, min(3, n), default_group_size(n), n}:
            generator = torch.Generator().manual_seed(rank)
            x = torch.nn.Parameter(torch.randn(57, generator=generator))
            averager = DivideAndShuffleAverager(DivideAndShuffle(group_size=size, schedule=name))
            before, moved = mean_over_ranks(x), 0.0
            for _ in range(len(averager._rounds.partitions)):
                averager.average_parameters([x])
                moved = max(moved, float((mean_over_ranks(x) - before).abs().max()))
            started = float((torch.randn(57, generator=generator.manual_seed(rank)) - before).norm())
            found[str(name), size] = moved, float((x.detach() - before).norm()), started
            averager.close()
    return found


@pytest.mark.parametrize("n", [n if n in FEW else pytest.param(n, marks=pytest.mark.full) for n in SIZES])
def test_every_round_keeps_the_mean(many, tmp_path, n):
    results = many(n).run(means, n, str(tmp_path))[:n]
    for name, size in results[0]:
        moved, apart, started = (np.array([found[name, size][i] for found in results]) for i in range(3))
        assert moved.max() < 1e-6
        assert np.square(apart).sum() < 0.8 * np.square(started).sum()
        if name == "butterfly" and largest_prime_factor(n) <= size:
            assert apart.max() < 1e-5


def noisy(rank, _, n, folder, schedule, rounds):
    """The consensus distance after each round under unit noise, on real groups."""
    if not world_of(rank, n, folder):
        return None
    averager = DivideAndShuffleAverager(DivideAndShuffle(group_size=2, schedule=schedule))
    if schedule == "ring":  # the counter-example: always the same partition
        averager._rounds.partitions = averager._rounds.partitions[:1]
    generator = torch.Generator().manual_seed(rank)
    x = torch.nn.Parameter(torch.zeros(400))
    distances = []
    for _ in range(rounds):
        x.data += torch.randn(400, generator=generator)
        averager.average_parameters([x])
        apart = (x.detach().double() - mean_over_ranks(x)).square().mean()
        distances.append(float(mean_over_ranks(apart)))
    return distances


def test_replicas_stay_together_only_because_groups_are_shuffled(many, tmp_path):
    n, rho = 8, 6 / 14
    expected = {"butterfly": (1 / 2 - 1 / 8) + (1 / 4 - 1 / 8), "random": rho * (1 - 1 / n) / (1 - rho)}
    for i, (schedule, distance) in enumerate(expected.items()):
        folder = tmp_path / str(i)
        os.mkdir(folder)
        measured = np.mean(many(n).run(noisy, n, str(folder), schedule, 80)[0][20:])
        assert measured == pytest.approx(distance, rel=0.05 if schedule == "butterfly" else 0.25)
    fixed = many(n).run(noisy, n, str(tmp_path), "ring", 60)[0]
    assert fixed[-1] > 1.7 * fixed[29] > 10
