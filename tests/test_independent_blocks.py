"""The reproduction of 1901.09437: what its algorithms are equal to, what their theorems say, and the benchmark."""

import json
import math
import statistics
import sys

import pytest
import torch
from common import record
from independent_blocks import algorithms, figures, reproduce
from independent_blocks.algorithms import (
    ISEGA,
    Accelerated,
    Asynchronous,
    BlockDescent,
    DistributedISAGA,
    ImportanceCD,
    Masks,
    OwnSamples,
    Random,
    SharedISAGA,
    WholeOrNothing,
)
from independent_blocks.problems import Logistic, Quadratics

SEEDS = (0, 1, 2, 3, 4)
MANY = tuple(range(400))


pytestmark = pytest.mark.usefixtures("one_thread")


def distances(problem, algorithm, steps):
    """||x - x*||^2 after each step [steps + 1, S]."""
    found = [(algorithm.x - problem.solution).square().sum(1)]
    for t in range(steps):
        algorithm.step(t)
        found.append((algorithm.x - problem.solution).square().sum(1))
    return torch.stack(found)


def run(algorithm, steps):
    for t in range(steps):
        algorithm.step(t)
    return algorithm.x


# --- the problems


@pytest.mark.parametrize(
    "problem",
    [Quadratics(4), Quadratics(4, heterogeneous=True, parts=3), Logistic("breast cancer", 5),
     Logistic("digits", 4, by_label=True)],
)  # fmt: skip
def test_a_problem_is_what_it_says(problem):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, problem.dim, generator=generator, dtype=torch.float64)
    point = x.clone().requires_grad_()
    problem.gap(point).sum().backward()
    torch.testing.assert_close(problem.gradients(x).mean(1), point.grad, msg="f is the mean of the f_i")
    alone = problem.gradients(x[:, None].repeat(1, problem.workers, 1))
    torch.testing.assert_close(alone, problem.gradients(x), msg="each worker at its own point")
    each = problem.samples // problem.workers
    own = torch.arange(problem.samples).view(problem.workers, each)
    mean = sum(problem.sample_gradients(x, own[:, j].expand(3, -1)) for j in range(each)) / each
    torch.testing.assert_close(mean, problem.gradients(x), msg="f_i is the mean of its samples")
    assert problem.gradients(problem.solution[None]).mean(1).norm() < 1e-12
    assert problem.gap(problem.solution[None]).abs() < 1e-14 and problem.gap(x).min() > 0
    y = torch.randn(3, problem.dim, generator=generator, dtype=torch.float64)
    change, apart = problem.gradients(x) - problem.gradients(y), (x - y)[:, None]
    assert (change.norm(dim=2) <= problem.L * apart.norm(dim=2) * (1 + 1e-12)).all()
    assert ((change.mean(1) * apart[:, 0]).sum(1) >= problem.mu * apart[:, 0].square().sum(1)).all()


def test_quadratics_are_those_of_equation_17():
    problem = Quadratics(8)
    top = torch.linalg.eigvalsh(problem.matrices)
    assert torch.allclose(top[:, -1], torch.ones(8, dtype=torch.float64)), "v is an eigenvector of eigenvalue 1"
    assert top.min() > 0 and problem.gradients(problem.solution[None]).norm() == 0
    squares = Quadratics(8, heterogeneous=True).gradients(problem.solution[None]).square().sum(2).mean()
    assert squares == pytest.approx(64 * 7 / 8, rel=0.1)
    directions = problem.start(SEEDS) / problem.start(SEEDS).norm(dim=1, keepdim=True)
    assert (directions @ problem.mean @ directions.mT).diagonal().max() < 0.7, "no start is along v"


# --- the draws


@pytest.mark.parametrize("n", [2, 16])
def test_masks_are_thinwires_draws_and_those_of_workers_seeds_and_steps_are_independent(n):
    problem, steps = Quadratics(n), 300
    masks = Masks(problem, 1 / 4, (0, 1))
    drawn = torch.stack([masks(t) for t in range(steps)])  # [T, S, n, d]
    assert set(drawn.unique().tolist()) == {0.0, 1.0} and (drawn.sum(3) == 16).all()
    assert torch.equal(drawn[7], Masks(problem, 1 / 4, (0, 1))(7))
    assert torch.equal(drawn[7, 1:], Masks(problem, 1 / 4, (1,))(7)), "a seed's do not depend on the others"
    overlaps = [drawn[:, :, 0] * drawn[:, :, 1], drawn[:, 0] * drawn[:, 1], drawn[1:] * drawn[:-1]]
    assert all(overlap.mean().item() == pytest.approx(1 / 16, abs=0.004) for overlap in overlaps)
    shared = Masks(problem, 1 / 4, (0, 1), "shared")(0)
    assert shared.shape == (2, 1, 64) and (shared.sum(2) == 16).all()
    disjoint = Masks(problem, 1 / n, (0, 1), "permuted")(0)
    assert torch.equal(disjoint.sum(1), torch.ones(2, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match="not a whole number of 64 blocks"):
        Masks(problem, 1 / 3, (0,))


def test_ibgd_sends_whole_gradients_with_probability_tau():
    masks = WholeOrNothing(Quadratics(8), 1 / 8, SEEDS)
    drawn = torch.stack([masks(t) for t in range(400)])
    assert drawn.shape == (400, 5, 8, 1) and drawn.mean().item() == pytest.approx(1 / 8, abs=0.01)
    assert (drawn[:, :, 0] * drawn[:, :, 1]).mean().item() == pytest.approx(1 / 64, abs=0.008)


def test_samples_are_a_workers_own_or_different_ones_of_all():
    problem = Logistic("breast cancer", 5)
    source = OwnSamples(problem, SEEDS)
    own = torch.stack([source.draw() for _ in range(200)])
    assert torch.equal(own // 108, torch.arange(5).expand(200, 5, 5)) and len(own.unique()) > 400
    distinct = Random(SEEDS).distinct(6, 5)
    assert all(len(set(row)) == 5 for row in distinct.tolist()) and not torch.equal(distinct[0], distinct[1])


# --- what the algorithms are equal to


def test_with_tau_1_block_descent_is_gradient_descent():
    problem = Logistic("breast cancer", 5)
    x = problem.start(SEEDS)
    for masks in (Masks(problem, 1.0, SEEDS), WholeOrNothing(problem, 1.0, SEEDS)):
        y = x
        for _ in range(20):
            y = y - 0.5 / problem.L * problem.gradients(y).mean(1)
        torch.testing.assert_close(run(BlockDescent(problem, x, 0.5 / problem.L, masks), 20), y, rtol=0, atol=1e-13)
    assert algorithms.ibcd_step(2.0, 5, 1.0) == 0.25
    sega = ISEGA(problem, x, 0.5 / problem.L, Masks(problem, 1.0, SEEDS))
    torch.testing.assert_close(run(sega, 20), y, rtol=0, atol=1e-13)


def test_one_worker_with_tau_1_is_sgd():
    problem = Logistic("breast cancer", 1)
    which, same = OwnSamples(problem, SEEDS), OwnSamples(problem, SEEDS)
    step = algorithms.isgd_step(problem.L_sample, problem.mu, 1, 1.0)
    algorithm = BlockDescent(problem, problem.start(SEEDS), step, Masks(problem, 1.0, SEEDS), same)
    x, seen, weights = problem.start(SEEDS), [], []
    for t in range(20):
        weights.append(2 * problem.L_sample + problem.mu / 4 * t)
        seen.append(x * weights[-1])
        x = x - problem.sample_gradients(x, which.draw())[:, 0] / weights[-1]
    torch.testing.assert_close(run(algorithm, 20), x, rtol=0, atol=1e-13)
    torch.testing.assert_close(algorithm.mean, sum(seen) / sum(weights), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", [SharedISAGA, DistributedISAGA])
def test_one_worker_with_tau_1_is_saga(kind):
    problem = Logistic("breast cancer", 1)
    algorithm = kind(problem, problem.start(SEEDS), 1 / (4 * problem.L_sample), Masks(problem, 1.0, SEEDS), SEEDS)
    draw = kind(problem, problem.start(SEEDS), 1.0, Masks(problem, 1.0, SEEDS), SEEDS).draw
    x, table = problem.start(SEEDS), torch.zeros(5, 540, 30, dtype=torch.float64)
    for _ in range(100):
        j = draw()[:, 0]
        new = problem.sample_gradients(x, j[:, None])[:, 0]
        x = x - (new - table[range(5), j] + table.mean(1)) / (4 * problem.L_sample)
        table[range(5), j] = new
    torch.testing.assert_close(run(algorithm, 100), x, rtol=0, atol=1e-12)
    assert algorithms.isaga_step(problem.L_sample, 1, 1.0) == 1 / (4 * problem.L_sample)


def test_isagas_mean_is_that_of_its_table_and_only_sent_blocks_are_refreshed():
    problem = Logistic("breast cancer", 10)
    for kind, rows in ((SharedISAGA, (1, 540)), (DistributedISAGA, (10, 54))):
        step, masks = algorithms.isaga_step(problem.L_sample, 10, 0.1), Masks(problem, 0.1, SEEDS)
        algorithm = kind(problem, problem.start(SEEDS), step, masks, SEEDS)
        for t in range(200):
            before, algorithm.table = algorithm.table, algorithm.table.clone()
            algorithm.step(t)
            changed = (algorithm.table != before).sum((1, 2))
            assert changed.max() <= 10 * 3 and changed.min() > 10
            mean = algorithm.table.view(5, *rows, 30).mean(2)
            torch.testing.assert_close(algorithm.mean, mean, rtol=0, atol=1e-14)


def test_asynchronous_without_delays_is_ibcd_and_else_answers_to_points_up_to_m_steps_old():
    problem, masks = Quadratics(4), lambda: Masks(Quadratics(4), 1 / 4, SEEDS)
    x, gamma = problem.start(SEEDS), algorithms.asynchronous_step(1.0, 4, 1 / 4)
    prompt = Asynchronous(problem, x, gamma, masks(), 1, SEEDS)
    torch.testing.assert_close(run(prompt, 30), run(BlockDescent(problem, x, gamma, masks()), 30))
    late = Asynchronous(problem, x, gamma, masks(), 4, SEEDS)
    answered = torch.zeros(5, 4, dtype=torch.int64)
    waits = set()
    for t in range(200):
        before = late.last
        late.step(t)
        awake = (late.last != before).any(2)
        waits |= set((t + 1 - answered)[awake].tolist())
        answered = torch.where(awake, t + 1, answered)
        torch.testing.assert_close(late.x, late.last.mean(1))
        assert torch.equal(late.read[awake], late.x[:, None].expand(-1, 4, -1)[awake])
    assert waits == {1, 2, 3, 4}


# --- what the theorems say


@pytest.mark.parametrize("masks", [Masks, WholeOrNothing])
@pytest.mark.parametrize("n", [2, 8])
def test_block_descent_contracts_as_theorems_1_and_4_say(n, masks):
    problem = Quadratics(n)
    gamma = algorithms.ibcd_step(1.0, n, 1 / n)
    x = problem.start((0,)).expand(len(MANY), -1)
    found = distances(problem, BlockDescent(problem, x, gamma, masks(problem, 1 / n, MANY)), 60)
    rate = algorithms.ibcd_rate(problem.mu, gamma, 1 / n)
    assert rate == pytest.approx(problem.mu / (2 * (3 - 2 / n)))
    mean, t = found.mean(1) / found[0, 0], torch.arange(61)
    error = found.std(1) / len(MANY) ** 0.5 / found[0, 0]
    assert (mean <= (1 - rate) ** t + 3 * error + 1e-12).all()
    assert mean[60] > (1 - 8 * rate) ** 60, "and not faster by far"


@pytest.mark.parametrize("n,gd,half,ibcd,same,permuted", [
    (2, 65, 135, 280, 115, 140), (4, 45, 90, 220, 195, 80), (8, 30, 60, 170, 255, 65), (16, 25, 55, 165, 415, 55),
])  # fmt: skip
def test_iterations_to_a_millionth_on_equation_17(n, gd, half, ibcd, same, permuted):
    """Against figures of another implementation, each of one run with matrices of its own."""
    problem, tau = Quadratics(n), 1 / n
    whole = Masks(problem, 1.0, SEEDS)
    for expected, gamma, masks in (
        (gd, 1.0, whole), (half, 0.5, whole),
        (ibcd, algorithms.ibcd_step(1.0, n, tau), Masks(problem, tau, SEEDS)),
        (same, 1.0, Masks(problem, tau, SEEDS, "shared")), (permuted, n / 2, Masks(problem, tau, SEEDS, "permuted")),
    ):  # fmt: skip
        found = distances(problem, BlockDescent(problem, problem.start(SEEDS), gamma, masks), 2 * expected)
        times = ((found > 1e-6 * found[0]).sum(0)).tolist()
        assert statistics.median(times) == pytest.approx(expected, rel=0.3, abs=5), (expected, times)


def test_ibcd_takes_three_times_the_iterations_of_gradient_descent_however_many_workers():
    ratios = []
    for n in (2, 4, 8, 16):
        problem = Quadratics(n)
        make = lambda gamma, tau: BlockDescent(problem, problem.start(SEEDS), gamma, Masks(problem, tau, SEEDS))
        times = [(lambda found: (found > 1e-6 * found[0]).sum(0).double().mean().item())(distances(problem, one, 500))
                 for one in (make(0.5, 1.0), make(algorithms.ibcd_step(1.0, n, 1 / n), 1 / n))]  # fmt: skip
        ratios.append(times[1] / times[0])
        assert times[1] / times[0] == pytest.approx(3 - 2 / n, rel=0.15)
    assert max(ratios) < 3.3


def test_isegas_estimate_is_unbiased():
    problem = Quadratics(4, heterogeneous=True)
    masks = Masks(problem, 1 / 4, MANY)
    algorithm = ISEGA(problem, problem.start((0,)).expand(len(MANY), -1), 0.1, masks)
    h = 3 * torch.randn(4, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    algorithm.h = h.repeat(400, 1, 1)
    gradients = problem.gradients(algorithm.x)
    found = torch.stack([algorithm.estimate(masks(t) * (gradients - algorithm.h)) for t in range(20)])
    torch.testing.assert_close(found.mean((0, 1)), gradients[0], rtol=0, atol=5 * found.std().item() / 8000**0.5)
    h, kept = algorithm.h, masks(0)
    algorithm.step(0)
    torch.testing.assert_close(algorithm.h, torch.where(kept > 0, gradients, h), msg="blocks sent are overwritten")


def test_isega_arrives_where_ibcd_stalls():
    n = 16
    problem = Quadratics(n, heterogeneous=True)
    x, masks = problem.start(SEEDS), lambda tau: Masks(problem, tau, SEEDS)
    floors = {}
    for tau in (1 / 16, 1 / 4, 1.0):
        found = distances(problem, BlockDescent(problem, x, algorithms.ibcd_step(1.0, n, tau), masks(tau)), 600)
        floors[tau] = found[300:].mean().item()
        found = distances(problem, ISEGA(problem, x, 1 / (1 + 1 / (n * tau)), masks(tau)), 600)
        assert found[-1].max() < 1e-12 * found[0].min()
    assert floors[1 / 16] == pytest.approx(17.7, rel=0.3) and floors[1 / 4] == pytest.approx(7.1, rel=0.3)
    assert floors[1.0] < 1e-12


def test_isega_is_as_fast_as_theorem_3_says():
    problem, tau = Quadratics(8, heterogeneous=True), 1 / 8
    gamma = algorithms.isega_step(1.0, problem.mu, 8, tau)
    x = problem.start((0,)).expand(len(MANY), -1)
    found = distances(problem, ISEGA(problem, x, gamma, Masks(problem, tau, MANY)), 200)
    slopes = problem.gradients(problem.solution[None])[0].square().sum().item()
    start = found[0, 0].item() + gamma / (2 * tau * 8) * slopes
    assert algorithms.isega_start(problem, x, gamma, tau) * found[0, 0].item() == pytest.approx(start)
    assert (found.mean(1) <= (1 - gamma * problem.mu) ** torch.arange(201) * start).all()


@pytest.mark.parametrize("n", [1, 8])
def test_accelerated_is_as_fast_as_its_theorem_says(n):
    problem, steps = Quadratics(n), 80
    rho = algorithms.growth(n, 1 / n, problem.growth())
    x, masks = problem.start((0,)).expand(len(MANY), -1), Masks(problem, 1 / n, MANY)
    g = problem.gradients(x)
    squares = torch.stack([(n * masks(t) * g).mean(1).square().sum(1) for t in range(20)]).mean()
    assert squares <= rho * g[0].mean(0).square().sum() * 1.02, "rho bounds the growth"
    algorithm = Accelerated(problem, x, rho, masks)
    start = problem.gap(x)[0] + problem.mu / 2 * x[0].square().sum()
    gaps = []
    for t in range(steps):
        algorithm.step(t)
        gaps.append(problem.gap(algorithm.x).mean())
    s = math.sqrt(problem.mu) / rho
    assert (torch.stack(gaps) <= start * (1 - s) ** torch.arange(1, steps + 1)).all()


def test_accelerated_with_rho_1_is_nesterovs_method_and_else_has_the_sequences_it_states():
    problem = Logistic("digits", 1)
    algorithm = Accelerated(problem, problem.start((0,)), 1.0, Masks(problem, 1.0, (0,)))
    y = x = problem.start((0,))
    momentum = (1 - math.sqrt(problem.mu / problem.L)) / (1 + math.sqrt(problem.mu / problem.L))
    for _ in range(60):
        before, y = y, x - problem.gradients(x).mean(1) / problem.L
        x = y + momentum * (y - before)
    torch.testing.assert_close(run(algorithm, 60), y, rtol=0, atol=1e-10)
    algorithm = Accelerated(problem, x, 5.0, Masks(problem, 1.0, (0,)))
    s = math.sqrt(problem.mu / problem.L) / 5
    a, b = s / (1 + s), 1 - s
    assert (algorithm.lr, algorithm.rate) == pytest.approx((1 / (5 * problem.L), s))
    assert algorithm._weight == pytest.approx((1 + b * (1 - a) / a) / 5)
    assert b == pytest.approx(1 - algorithm._weight * problem.mu * algorithm.lr)


def test_decreasing_steps_stay_under_theorem_6():
    problem, n = Logistic("breast cancer", 10), 10
    made = figures.falling_isgd("5", "breast cancer", problem, 1 / n)
    algorithm, start = made.make(SEEDS), problem.gap(problem.start((0,))).item()
    for t in range(400):
        algorithm.step(t)
        if t in (5, 50, 399):
            assert problem.gap(algorithm.mean).mean().item() / start <= made.bound(t)
    assert made.bound(10**9) < 1e-5, "and it vanishes"


def test_the_tables_rate_is_corollary_2s_and_nothing_at_the_figures_step():
    for n, samples, L, mu in ((8, 540, 0.25, 1e-3), (4, 16, 1.0, 0.01)):
        rate = lambda slack: algorithms.isaga_rate(
            L, mu, n, 1 / n, samples, algorithms.isaga_step(L, n, 1 / n, slack)
        )  # fmt: skip
        assert rate(4) == pytest.approx(min(mu / (5 * L), 1 / (3 * samples)))
        assert rate(3) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("kind,problem", [(SharedISAGA, Logistic("breast cancer", 10)),
                                          (DistributedISAGA, Quadratics(8, parts=4))])  # fmt: skip
@pytest.mark.parametrize("times", [1 / 3, 1, 5])
def test_isagas_distance_and_table_error_shrink_as_theorems_2_and_5_say(kind, problem, times):
    """From a table of zeros, of noise, and of the opposite of what would help."""
    n, L, N, solution = problem.workers, problem.L_sample, problem.samples, problem.solution
    seeds = MANY[:100]
    tau = round(times / n * problem.dim) / problem.dim
    gamma = algorithms.isaga_step(L, n, tau, 4)
    c = algorithms._isaga_constant(L, n, tau, gamma)
    assert times < 1 or c == pytest.approx((1 / (gamma * L) - 1 / n - tau) / n), "the paper's"
    left = 1 - algorithms.isaga_rate(L, problem.mu, n, tau, N, gamma)
    assert left < 1
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(problem.dim, generator=generator, dtype=torch.float64)
    at = lambda point: problem.sample_gradients(point[None], torch.arange(N)[None])[0]
    noise = torch.randn(N, problem.dim, generator=generator, dtype=torch.float64) * at(x).std()
    for table in (torch.zeros(N, problem.dim, dtype=torch.float64), at(solution) + noise, 2 * at(solution) - at(x)):
        algorithm = kind(problem, x.expand(len(seeds), -1), gamma, Masks(problem, tau, seeds), seeds)
        algorithm.table = table.repeat(len(seeds), 1, 1)
        algorithm.mean = table.view(algorithm.mean.shape[1], -1, problem.dim).mean(1).repeat(len(seeds), 1, 1)
        phi = lambda one=algorithm: (one.x - solution).square().sum(1) + c * gamma**2 * (
            one.table - at(solution)
        ).square().sum((1, 2))  # fmt: skip
        start = phi()[0]
        for t in range(10):
            algorithm.step(t)
            now = phi()
            assert now.mean() <= start * left ** (t + 1) + 3 * now.std() / len(seeds) ** 0.5


def test_isagas_bound_starts_with_the_tables_error_and_covers_the_gap():
    problem, n = Logistic("breast cancer", 10), 10
    made = figures.isaga("10", "breast cancer", problem, 1 / n, slack=4, gap=True)
    gamma, x = n / (5 * problem.L_sample), problem.start((0,))
    weights = torch.sigmoid(-problem.rows @ problem.solution)[:, None]
    at_solution = problem.mu * problem.solution - weights * problem.rows
    error = problem.solution.square().sum() + 3 / n**2 * gamma**2 * at_solution.square().sum()
    assert made.bound(0) == pytest.approx((problem.L / 2 * error / problem.gap(x)[0]).item())
    assert made.bound(0) > 1 and made.bound(7) == pytest.approx(made.bound(0) * (1 - 1 / (3 * 540)) ** 7)
    algorithm = made.make(SEEDS)
    for t in range(200):
        algorithm.step(t)
        assert problem.gap(algorithm.x).mean() / problem.gap(x)[0] <= made.bound(t + 1)
    distributed = figures.isaga("1 = 9", "quadratics", Quadratics(4, parts=4), 1 / 4, 4, DistributedISAGA)
    assert distributed.bound(0) == 1, "all gradients of its samples are 0 at x*, as the table is"


def test_importance_sampling_draws_a_share_tau_and_descends():
    problem = Quadratics(4)
    algorithm = ImportanceCD(problem, problem.start(MANY), 1 / 4, MANY)
    p, own = algorithm.p, problem.mean.diagonal()
    assert p.sum().item() == pytest.approx(16) and torch.allclose(p / own, (p / own)[0])
    expected = torch.outer(p, p) * problem.mean + torch.diag(p * (1 - p) * own)  # of E M over the coordinates drawn
    spare = torch.linalg.eigvalsh(torch.diag(p / algorithm._steps) - expected)
    assert -1e-12 < spare[0] < 0.05, "step sizes are as large as they may be"
    gaps = [problem.gap(algorithm.x).mean()]
    for t in range(40):
        algorithm.step(t)
        gaps.append(problem.gap(algorithm.x).mean())
    rate = problem.mu * (algorithm.p * algorithm._steps).min()
    assert (torch.stack(gaps) <= gaps[0] * (1 - rate) ** torch.arange(41)).all() and gaps[-1] < 0.1 * gaps[0]


# --- the benchmark


def test_promised_is_the_first_step_at_which_the_bound_is_at_the_accuracy():
    made = lambda bound: figures.Run("3", "p", "a", None, 2, 0.5, 1.0, None, bound, accuracy=1e-3)
    assert reproduce.promised(made(lambda t: 0.5**t)) == 10
    assert reproduce.promised(made(lambda t: 1e-4)) == 1
    assert reproduce.promised(made(lambda t: 1.0)) is None and reproduce.promised(made(None)) is None


def test_iterations_what_was_not_reached_and_what_was_late():
    problem = Quadratics(2)
    settings = dict(problem=problem, gamma=0.5, stop=True)
    descent = lambda **more: reproduce.measure(figures.descent("3", "q", "a", **settings | more), SEEDS)
    row = descent()
    x = distances(problem, BlockDescent(problem, problem.start(SEEDS), 0.5, Masks(problem, 1.0, SEEDS)), 500)
    times = (x > 1e-6 * x[0]).sum(0).tolist()
    assert (row["fewest"], row["iterations"], row["most"]) == (min(times), statistics.median(times), max(times))
    assert row["steps"] == max(times) and not row["late"] and row["curve"][-1][0] == max(times)
    assert descent(bound=lambda t: 0.8**t)["late"] and not descent(bound=lambda t: 0.99**t)["late"]
    short = descent(steps=20, bound=lambda t: 0.3**t)
    assert short["iterations"] is short["most"] is None and short["late"]
    assert reproduce.iterations(short) == "> 20" and "took more" in reproduce.late([short])[0]
    assert descent(gamma=3.0)["steps"] < 100, "what diverges is given up"


def test_of_a_grid_the_fastest_is_kept():
    problem = Quadratics(2)
    make = lambda seeds, lr: BlockDescent(problem, problem.start(seeds), lr, Masks(problem, 1.0, seeds))
    measure = lambda make, **more: reproduce.measure(
        figures.Run("7", "q", "a", problem, 2, 1.0, None, make, steps=500, **more), SEEDS
    )  # fmt: skip
    row, alone = measure(make, grid=(0.1, 1.0, 0.5)), measure(lambda seeds: make(seeds, 1.0))
    assert row["growth"] == 1.0 and row["iterations"] == alone["iterations"]


def test_the_benchmark_runs_and_leaves_record_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--quick", "--out", str(tmp_path)])
    assert reproduce.main() is None
    kept = json.loads((tmp_path / "independent_blocks.json").read_text())
    assert {row["figure"] for row in kept["rows"]} == {*figures.FIGURES} - {"9", "11"} | {"1 = 9", "2 = 11"}
    assert (tmp_path / "independent_blocks_all.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--quick"])
    with pytest.raises(SystemExit):
        reproduce.main()


def test_the_committed_result_is_as_fast_as_promised_and_whole():
    kept = record.load("independent_blocks")
    assert reproduce.late(kept["rows"]) == [], "every line was as fast as its theorem promises"
    table = (record.TABLES / "independent_blocks.md").read_text()
    assert table.count("\n| ") == len(reproduce.LINES) and "None" not in table and kept["command"] in table
