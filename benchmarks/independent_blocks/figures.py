"""What is run for each figure of the paper: problems, algorithms, step sizes, and the theorem's bound of each.

tau = 1 / n everywhere but where it is swept. "gamma" of a row is the step size as the paper's algorithm has it, in
units of 1 / L.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

from independent_blocks.algorithms import (
    ISEGA,
    Accelerated,
    Asynchronous,
    BlockDescent,
    DistributedISAGA,
    ImportanceCD,
    Masks,
    OwnSamples,
    SharedISAGA,
    WholeOrNothing,
    asynchronous_step,
    growth,
    ibcd_rate,
    ibcd_step,
    isaga_rate,
    isaga_start,
    isaga_step,
    isega_start,
    isega_step,
    isgd_bound,
    isgd_step,
)
from independent_blocks.problems import Logistic, Quadratics

NEAR = 1e-6  # ||x - x*||^2 / ||x0 - x*||^2 that counts as there
ROUGH = {"digits": 0.1, "breast cancer": 0.02}  # (f - f*) / (f(x0) - f*): about thrice SGD's floor
CLOSE = 1e-3  # the same where one sample a step is remembered
EXACT = 1e-20  # as NEAR, to tell a floor from slow progress
SWEPT = 16  # workers where tau is swept
SEEDS = (0, 1, 2, 3, 4)
GRID = (128, 64, 32, 16, 8, 4, 2, 1)  # for the accelerated algorithm's rho
PAPERS_L2 = 2.5e-5  # of figure 10; 1e-3 everywhere else


@dataclass
class Run:
    """One line of a figure. make: seeds, and a value of grid if there is one (the best is kept), to the algorithm.

    bound: the theorem's, of the mean error after t steps, or None. gap: the error is f - f*, not the squared distance;
    both are relative to the start. averaged: of the mean of the iterates. stop: when all seeds reached the accuracy.
    """

    figure: str
    problem: str
    algorithm: str
    of: object  # the problem itself
    n: int
    tau: float
    gamma: float | None
    make: Callable
    bound: Callable[[int], float] | None = None
    steps: int = 20000
    accuracy: float = NEAR
    gap: bool = False
    averaged: bool = False
    stop: bool = True
    every: int = 1
    grid: tuple = ()
    more: dict = field(default_factory=dict)


@functools.cache
def quadratics(n, heterogeneous=False, parts=1, dim=64):
    return Quadratics(n, heterogeneous, parts, dim, columns=dim * 3 // 2)


logistic = functools.lru_cache(maxsize=None)(Logistic)


def workers_of(name, few=False):
    """n from 2 to 64 with a whole number of blocks and rows a worker; breast cancer has 30 features only."""
    return ((2, 5, 10, 15, 30) if name == "breast cancer" else (2, 4, 8, 16, 32, 64))[: 2 if few else None]


def swept(name, few=False):
    """Workers, and the values of tau around 1 / n."""
    parts = (30, 15, 10, 5, 2, 1) if name == "breast cancer" else (64, 32, 16, 8, 4, 2, 1)
    return (10 if name == "breast cancer" else SWEPT), [1 / part for part in parts[:: 3 if few else 1]]


def geometric(rate, factor=1.0):
    return lambda t: factor * (1 - rate) ** t


def descent(figure, name, algorithm, problem, gamma, tau=1.0, selection="independent", masks=Masks, bound=None, **more):
    """A run of BlockDescent with the problem's own gradients."""
    make = lambda seeds: BlockDescent(problem, problem.start(seeds), gamma, masks(problem, tau, seeds, selection))
    return Run(figure, name, algorithm, problem, problem.workers, tau, gamma * problem.L, make, bound, **more)


def gradient_descent(figure, name, problem, times, **more):
    """GD with the step size 1 / (times L); its squared distance shrinks by (1 - mu lr)^2, as for every smooth f."""
    label = "GD, 1/L" if times == 1 else f"GD, 1/({times}L)"
    lr = 1 / (times * problem.L)
    return descent(figure, name, label, problem, lr, bound=geometric(1 - (1 - lr * problem.mu) ** 2), **more)


def ibcd(figure, name, problem, tau, label="IBCD", **more):
    """IBCD, or IBGD with other masks, with the step size of theorem 1."""
    gamma = ibcd_step(problem.L, problem.workers, tau)
    bound = more.pop("bound", geometric(ibcd_rate(problem.mu, gamma, tau)))
    return descent(figure, name, label, problem, gamma, tau, bound=bound, **more)


def isega(figure, name, problem, tau, theorems=False, **more):
    """ISEGA with the step size of the figures, or that of theorem 3 and its bound."""
    n = problem.workers
    if theorems:
        label, gamma = "ISEGA, theorem 3", isega_step(problem.L, problem.mu, n, tau)
        start = isega_start(problem, problem.start(SEEDS), gamma, tau)
        more["bound"] = geometric(problem.mu * gamma, start)
    else:
        label, gamma = "ISEGA", 1 / (problem.L * (1 + 1 / (n * tau)))
    make = lambda seeds: ISEGA(problem, problem.start(seeds), gamma, Masks(problem, tau, seeds))
    return Run(figure, name, label, problem, n, tau, gamma * problem.L, make, **more)


def isaga(figure, name, problem, tau, slack=3, kind=SharedISAGA, label="ISAGA", **more):
    """ISAGA with the step size of the figures (slack 3), or that of corollary 2 (4) and the bound of theorem 2 or 5.

    The theorems are about the squared distance; where the error is the gap, theirs times L / 2 is taken for it.
    """
    n, L = problem.workers, problem.L_sample
    gamma = isaga_step(L, n, tau, slack)
    if slack == 4:
        label = f"{label}, corollary 2" if kind is SharedISAGA else f"{label}, theorem 5"
        x = problem.start(SEEDS)
        start = isaga_start(problem, x, gamma, tau)
        if more.get("gap"):
            start *= problem.L / 2 * ((x - problem.solution).square().sum(1) / problem.gap(x)).max().item()
        more["bound"] = geometric(isaga_rate(L, problem.mu, n, tau, problem.samples, gamma), start)
    make = lambda seeds: kind(problem, problem.start(seeds), gamma, Masks(problem, tau, seeds), seeds)
    return Run(figure, name, label, problem, n, tau, gamma * L, make, **more)


def isgd(figure, name, problem, tau, gamma, label, **more):
    """ISGD of one sample a worker, with a constant step size."""
    make = lambda seeds: BlockDescent(
        problem, problem.start(seeds), gamma, Masks(problem, tau, seeds), OwnSamples(problem, seeds)
    )  # fmt: skip
    more = {"steps": 2000, "accuracy": ROUGH[name], "gap": True, "stop": False, "every": 10} | more
    return Run(figure, name, label, problem, problem.workers, tau, gamma * problem.L_sample, make, **more)


def falling_isgd(figure, name, problem, tau, stochastic=True, **more):
    """ISGD with the step sizes of theorem 6, and its bound of f - f* at the weighted mean of the iterates.

    Of logistic regression the bound is an estimate: the theorem wants a sigma^2 for every x, noise() looks at two.
    """
    n, L, mu = problem.workers, problem.L_sample if stochastic else problem.L, problem.mu
    at_start = problem.start((0,))
    slopes = problem.gradients(problem.solution[None])[0].square().sum(1).mean().item()
    distance = (at_start - problem.solution).square().sum().item()
    noise, scale = problem.noise() if stochastic else 0.0, problem.gap(at_start).item()
    bound = lambda t: isgd_bound(L, mu, n, tau, noise, slopes, distance, max(t, 1)) / scale
    make = lambda seeds: BlockDescent(
        problem, problem.start(seeds), isgd_step(L, mu, n, tau), Masks(problem, tau, seeds),
        OwnSamples(problem, seeds) if stochastic else None,
    )  # fmt: skip
    more = {"steps": 2000, "accuracy": ROUGH.get(name), "stop": False, "every": 10} | more
    label = "ISGD, theorem 6" + ", σ² estimated" * stochastic
    return Run(figure, name, label, problem, n, tau, None, make, bound, gap=True, averaged=True, **more)


def accelerated(figure, name, problem, tau, label="IASGD", **more):
    """Accelerated ISGD of one sample a worker, rho by grid search."""
    make = lambda seeds, rho: Accelerated(
        problem, problem.start(seeds), rho, Masks(problem, tau, seeds), OwnSamples(problem, seeds), problem.L_sample
    )  # fmt: skip
    more |= {"steps": 2000, "accuracy": ROUGH[name], "gap": True, "every": 5, "grid": GRID}
    return Run(figure, name, label, problem, problem.workers, tau, None, make, **more)


def figure_3(few):
    for n in workers_of("quadratics", few):
        problem, tau, name = quadratics(n), 1 / n, "quadratics"
        yield gradient_descent("3", name, problem, 1)
        yield gradient_descent("3", name, problem, 2)
        yield ibcd("3", name, problem, tau)
        yield ibcd("3", name, problem, tau, "IBGD", masks=WholeOrNothing)
        yield descent("3", name, "CD, same blocks", problem, 1.0, tau, "shared")
        make = lambda seeds, problem=problem, tau=tau: ImportanceCD(problem, problem.start(seeds), tau, seeds)
        yield Run("3", name, "CD, importance", problem, n, tau, None, make)
        yield descent("3", name, "PermK", problem, n / 2, tau, "permuted")


def figure_4(few):
    n, taus = swept("quadratics", few)
    for tau in taus:
        yield ibcd("4", "quadratics", quadratics(n), tau)


def figure_5(few):
    for name in ("digits", "breast cancer"):
        one = logistic(name, 1)
        yield isgd("5", name, one, 1.0, 1 / (5 * one.L_sample), "SGD, n=1")
        for n in workers_of(name, few):
            problem, L = logistic(name, n), one.L_sample
            yield isgd("5", name, problem, 1 / n, n / (5 * L), "ISGD, γτ = 1/(5L)")
            if n == swept(name)[0]:
                yield isgd("5", name, problem, 1 / n, 1 / (5 * L), "ISGD, γ = 1/(5L)", steps=5000)
            yield falling_isgd("5", name, problem, 1 / n)


def figure_6(few):
    for name in ("digits", "breast cancer"):
        n, taus = swept(name, few)
        problem = logistic(name, n)
        for tau in taus:
            yield isgd("6", name, problem, tau, 1 / (3 * problem.L_sample * tau), "ISGD, γτ = 1/(3L)")
            yield isgd("6", name, problem, tau, 1 / (3 * problem.L_sample), "ISGD, γ = 1/(3L)")


def figure_7(few):
    for n in workers_of("quadratics", few):
        problem = quadratics(n)
        rho = growth(n, 1 / n, problem.growth())
        make = lambda seeds, problem=problem, rho=rho, n=n: Accelerated(
            problem, problem.start(seeds), rho, Masks(problem, 1 / n, seeds)
        )  # fmt: skip
        s = problem.mu**0.5 / rho
        start = problem.start(range(5))
        factor = 1 + problem.mu / 2 * (start.square().sum(1) / problem.gap(start)).max().item()
        yield Run("7", "quadratics", "IASGD, whole gradients, lemma 1's ρ", problem, n, 1 / n, None, make,
                  geometric(s, factor), gap=True, more={"growth": rho})  # fmt: skip
    for name in ("digits", "breast cancer"):
        yield accelerated("7", name, logistic(name, 1), 1.0, "ASGD, n=1")
        for n in workers_of(name, few):
            yield accelerated("7", name, logistic(name, n), 1 / n)


def figure_8(few):
    for name in ("digits", "breast cancer"):
        n, taus = swept(name, few)
        for tau in taus:
            yield accelerated("8", name, logistic(name, n), tau)


def figure_9(few):
    settings = {"accuracy": CLOSE, "gap": True, "every": 20}
    for name in ("digits", "breast cancer"):
        yield isaga("1 = 9", name, logistic(name, 1), 1.0, label="SAGA, n=1", **settings)
        for n in workers_of(name, few):
            yield isaga("1 = 9", name, logistic(name, n), 1 / n, **settings)
            if name == "breast cancer":
                yield isaga("1 = 9", name, logistic(name, n), 1 / n, slack=4, **settings)
    for n in workers_of("quadratics", few):  # algorithm 5, which the paper shows no figure of
        problem = quadratics(n, parts=4)
        for slack in (3, 4):
            yield isaga("1 = 9", "quadratics", problem, 1 / n, slack, DistributedISAGA, "ISAGA distributed")


def figure_10(few):
    settings = {"accuracy": CLOSE, "gap": True, "every": 20}
    for name in ("digits", "breast cancer"):
        n, taus = swept(name, few)
        for tau in taus:
            yield isaga("10", name, logistic(name, n), tau, **settings)
            if name == "breast cancer":
                yield isaga("10", name, logistic(name, n), tau, slack=4, **settings)
        for tau in taus:
            yield isaga("10", f"{name}, ℓ2 = {PAPERS_L2:g}", logistic(name, n, PAPERS_L2), tau, **settings)


def figure_11(few):
    for name in ("quadratics", "digits", "breast cancer"):
        for n in workers_of(name, few) + ((100,) if name == "quadratics" and not few else ()):
            if name == "quadratics":
                problem = quadratics(n, heterogeneous=True, dim=64 if n < 100 else 100)
            else:
                problem = logistic(name, n)
            yield gradient_descent("2 = 11", name, problem, 2)
            yield isega("2 = 11", name, problem, 1 / n)
            yield isega("2 = 11", name, problem, 1 / n, theorems=True)


def figure_12(few):
    for name in ("quadratics", "digits", "breast cancer"):
        n, taus = swept(name, few)
        problem = quadratics(n, heterogeneous=True) if name == "quadratics" else logistic(name, n)
        for tau in taus:
            yield isega("12", name, problem, tau)
            yield isega("12", name, problem, tau, theorems=True)


def stall(few):
    """Gradients of the workers that are not 0 at x*: assumption 2 does not hold. x* is 0 of the quadratics."""
    settings = {"steps": 2000, "accuracy": EXACT, "stop": False}
    of_tau = [(n, 1 / n) for n in workers_of("digits", few)] + [(SWEPT, 1 / 4), (SWEPT, 1.0)] * (not few)
    for name, rough in (("quadratics", 1e-3), ("digits by class", 0.1)):
        for n, tau in of_tau:
            own = name == "quadratics"
            problem = quadratics(n, heterogeneous=True) if own else logistic("digits", n, by_label=True)
            yield ibcd("stall", name, problem, tau, bound=None, **settings)
            yield isega("stall", name, problem, tau, **settings)
            if n == SWEPT and tau == 1 / n:
                yield ibcd("stall", name, problem, tau, "IBGD", bound=None, masks=WholeOrNothing, **settings)
                if name == "quadratics":
                    yield isaga("stall", name, problem, tau, 3, DistributedISAGA, "ISAGA distributed", **settings)
                yield falling_isgd("stall", name, problem, tau, stochastic=False, accuracy=rough)


def delays(few):
    """Algorithm 8, which the paper shows no figure of, with delays of up to M steps."""
    n = SWEPT
    problem = quadratics(n)
    gamma = asynchronous_step(problem.L, n, 1 / n)
    for most in (1, 2, 4, 8, 16, 32)[: 2 if few else None]:
        make = lambda seeds, most=most: Asynchronous(
            problem, problem.start(seeds), gamma, Masks(problem, 1 / n, seeds), most, seeds
        )  # fmt: skip
        bound = lambda t, most=most: (1 - gamma / n * problem.mu) ** (t // most)
        yield Run("delays", "quadratics", "asynchronous ISGD", problem, n, 1 / n, gamma * problem.L, make, bound,
                  more={"max_delay": most})  # fmt: skip


FIGURES = {
    "3": figure_3, "4": figure_4, "5": figure_5, "6": figure_6, "7": figure_7, "8": figure_8, "9": figure_9,
    "10": figure_10, "11": figure_11, "12": figure_12, "stall": stall, "delays": delays,
}  # fmt: skip
