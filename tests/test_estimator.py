"""Without memory, random selections estimate the mean gradient: unbiased, with the variances of 1901.09437.

For n ranks with gradients g_i, density tau and the estimate q (papers' section on why independent blocks work):
independent (1 - tau) / (tau n) * mean |g_i|^2; shared (1 - tau) / tau * |mean g|^2; permuted at tau = 1/n
mean |g_i|^2 - |mean g|^2.
"""

import pytest
import torch
from simulated import Simulated
from thinwire import BlockSparse

N, D, BLOCK = 4, 64, 4
TAU = 1 / N
DRAWS = 2000


def method(selection, **options):
    return BlockSparse(selection, density=TAU, block_size=BLOCK, dense_below=0, **options)


def gradients(alike):
    generator = torch.Generator().manual_seed(5)
    common, own = torch.randn(D, generator=generator), torch.randn(N, D, generator=generator)
    return (common + 0.1 * own if alike else own).to(torch.float64)


def variance(selection, g):
    mean_square, square_of_mean = (g**2).sum(1).mean(), (g.mean(0) ** 2).sum()
    return {
        "independent": (1 - TAU) / (TAU * N) * mean_square,
        "shared": (1 - TAU) / TAU * square_of_mean,
        "permuted": mean_square - square_of_mean,
    }[selection]


@pytest.mark.parametrize("alike", [True, False], ids=["alike", "unlike"])
@pytest.mark.parametrize("selection", ["independent", "shared", "permuted"])
def test_unbiased_with_the_papers_variance(selection, alike):
    g = gradients(alike)
    ranks = Simulated(method(selection), N)
    estimates = torch.stack([ranks.step(g, number)[0] for number in range(DRAWS)])
    errors = estimates - g.mean(0)
    expected = variance(selection, g)
    # The mean's error has expectation sqrt(variance / draws); five times that would be a bias.
    assert errors.mean(0).norm() < 5 * (expected / DRAWS) ** 0.5 + 1e-12
    assert (errors**2).sum(1).mean() == pytest.approx(expected.item(), rel=0.1)


@pytest.mark.parametrize("selection", ["independent", "shared", "permuted"])
def test_control_variate_is_unbiased_whatever_it_holds(selection):
    g = gradients(alike=False)
    total = torch.zeros(D, dtype=torch.float64)
    for number in range(800):
        ranks = Simulated(method(selection, memory="control_variate"), N)
        ranks.step(2 * g.roll(1, dims=1), 10**6 + number)  # fills h with something else
        total += ranks.step(g, number)[0]
    assert (total / 800 - g.mean(0)).abs().max() < 0.5


def test_independent_masks_overlap_by_tau_and_no_more():
    ranks, overlaps = Simulated(method("independent"), N), []
    for number in range(500):
        _, chosen = ranks.step(gradients(alike=True), number)
        a, b = (set(c.tolist()) for c in chosen[:2])
        overlaps.append(len(a & b) / len(a))
    assert sum(overlaps) / len(overlaps) == pytest.approx(TAU, abs=0.04)


def test_permuted_masks_are_disjoint_and_cover_all():
    _, chosen = Simulated(method("permuted"), N).step(gradients(alike=True), 3)
    assert sorted(torch.cat(chosen).tolist()) == list(range(D // BLOCK))


def test_shared_masks_are_the_same():
    _, chosen = Simulated(method("shared"), N).step(gradients(alike=True), 3)
    assert all(torch.equal(chosen[0], other) for other in chosen[1:])


@pytest.mark.parametrize("selection", ["independent", "shared", "permuted"])
def test_draws_change_with_step_seed_and_parameter(selection):
    g = gradients(alike=True)
    base = Simulated(method(selection), N).step(g, 0)[1][0]
    for other in (
        Simulated(method(selection), N).step(g, 1),
        Simulated(method(selection, seed=1), N).step(g, 0),
        Simulated(method(selection), N, name="bias").step(g, 0),
    ):
        assert not torch.equal(base, other[1][0])
    assert torch.equal(base, Simulated(method(selection), N).step(g, 0)[1][0])


def test_global_random_state_is_never_touched():
    before = torch.get_rng_state()
    Simulated(method("independent"), N).step(gradients(alike=True), 0)
    assert torch.equal(before, torch.get_rng_state())
