"""The algorithms of "99% of Distributed Optimization is a Waste of Time" (1901.09437), their steps and their rates.

n workers send a share tau of their blocks each. An algorithm holds its iterate ``x`` [S, d], for S seeds side by
side, and ``step(t)`` moves it. Blocks are single coordinates, and all are drawn by thinwire's own selections; nothing
uses the global random state. L and mu: each f_i is L-smooth, f is mu-strongly convex.

    Alg. 1 IBCD          BlockDescent                        Alg. 5 ISAGA, distributed   DistributedISAGA
    Alg. 2 ISEGA         ISEGA                               Alg. 6 ISGD                 BlockDescent(OwnSamples)
    Alg. 3 IBGD          BlockDescent(WholeOrNothing)        Alg. 7 accelerated ISGD     Accelerated
    Alg. 4 ISAGA, shared SharedISAGA                         Alg. 8 asynchronous ISGD    Asynchronous

Baselines are the same with other draws: GD, SGD, SAGA and accelerated SGD with one worker or tau = 1; coordinate
descent (CD) with the same blocks on every worker; PermK with disjoint ones. CD with importance sampling: ImportanceCD.
"""

import math

import torch
from thinwire.core.blocks import Layout
from thinwire.core.selection import BY_NAME, Question


class Masks:
    """Which coordinates each worker sends at a step: ``masks(t)`` [S, n, d] of 0 and 1; [S, 1, d] where all the same.

    selection: a name of thinwire's. A seed is a parameter of the layout: thinwire draws each on its own.
    """

    def __init__(self, problem, tau, seeds, selection="independent"):
        count = round(tau * problem.dim)
        if not 0 < count <= problem.dim or abs(count - tau * problem.dim) > 1e-9:
            raise ValueError(f"tau={tau} is not a whole number of {problem.dim} blocks")
        layout = Layout(tuple(f"seed {seed}" for seed in seeds), (problem.dim,) * len(seeds), 1)
        self._slots = layout.slots((count,) * len(seeds))
        self._selection = BY_NAME[selection]()
        self._shape, self._workers = (len(seeds), -1, problem.dim), problem.workers
        self.tau = count / problem.dim

    def __call__(self, t):
        seeds, _, dim = self._shape
        question = Question(self._slots, t, 0, self._workers, 0, torch.device("cpu"))
        chosen = self._selection.choose(question).rows(None)  # [n, S * count]
        chosen = chosen.view(len(chosen), seeds, -1).transpose(0, 1)
        return torch.zeros(seeds, chosen.shape[1], dim, dtype=torch.float64).scatter_(2, chosen, 1.0)


class WholeOrNothing(Masks):
    """IBGD's: a worker sends its whole gradient with probability tau, which is how often its first block is drawn."""

    def __call__(self, t):
        return super().__call__(t)[:, :, :1]


class OwnSamples:
    """Stochastic gradients: each worker's of one of its own samples, drawn anew in every step."""

    def __init__(self, problem, seeds):
        self._problem, self._random = problem, Random(seeds)
        self._each = problem.samples // problem.workers

    def draw(self):
        """Sample numbers [S, n], a worker's among its own."""
        first = torch.arange(self._problem.workers) * self._each
        return first + self._random.integers(self._each, (self._problem.workers,))

    def __call__(self, x):
        return self._problem.sample_gradients(x, self.draw())


class Random:
    """Random numbers for seeds side by side, each with a generator of its own."""

    def __init__(self, seeds):
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def integers(self, end, shape):
        return torch.stack([torch.randint(end, shape, generator=one) for one in self._generators])

    def uniform(self, shape):
        return torch.stack([torch.rand(shape, generator=one, dtype=torch.float64) for one in self._generators])

    def distinct(self, end, count):
        """[S, count] different integers below end, in random order."""
        return torch.stack([torch.randperm(end, generator=one)[:count] for one in self._generators])


class BlockDescent:
    """Algorithms 1, 3 and 6: every worker moves by its own blocks of its own gradient, and the results are averaged.

    x <- x - lr / n sum of (g_i)_{U_i}, without 1 / tau: what lr stands beside is tau times the gradient. gradients:
    of x, [S, n, d]; the problem's by default, or OwnSamples. step_size: a number, or a function of t. ``mean`` is the
    mean of the iterates so far, weighed by 1 / step size: theorem 6 is about it.
    """

    def __init__(self, problem, x, step_size, masks, gradients=None):
        self.x, self._masks, self._gradients = x, masks, gradients or problem.gradients
        self._step_size = step_size if callable(step_size) else lambda t: step_size
        self.mean, self._weight = torch.zeros_like(x), 0.0

    def step(self, t):
        weight = 1 / self._step_size(t)
        self._weight += weight
        self.mean += (self.x - self.mean) * (weight / self._weight)
        self.x = self.x - self._step_size(t) * (self._masks(t) * self._gradients(self.x)).mean(1)


def ibcd_step(L, n, tau):
    """Of theorem 1 for IBCD and theorem 4 for IBGD: at tau = 1 / n about n / 3 times that of gradient descent."""
    return n / (tau * n + 2 * (1 - tau)) / (2 * L)


def ibcd_rate(mu, step_size, tau):
    """Theorems 1 and 4: E||x - x*||^2 shrinks by 1 less this in every step."""
    return mu * step_size * tau


def isgd_step(L, mu, n, tau):
    """Of theorem 6: 1 / (a + c t)."""
    a, c = _isgd_constants(L, mu, n, tau)
    return lambda t: 1 / (a + c * t)


def isgd_bound(L, mu, n, tau, noise, slopes, distance, t):
    """Theorem 6: E f - f* at the weighted mean of the iterates 0 to t.

    noise: sigma^2; slopes: mean of ||grad f_i(x*)||^2; distance: ||x0 - x*||^2.
    """
    a, c = _isgd_constants(L, mu, n, tau)
    start = a**2 * (1 - tau * mu / a) * distance / (tau * (t + 1) * a + c * tau / 2 * t * (t + 1))
    return start + (noise + (1 - tau) * 2 * slopes) / (n * (1 + 1 / t) * a + n * c / 2 * (t + 1))


def _isgd_constants(L, mu, n, tau):
    return 2 * (tau + 2 * (1 - tau) / n) * L, mu * tau / 4


class ISEGA:
    """Algorithm 2: each worker remembers the last that it sent of each block of its gradient, h_i, and sends news.

    g_i = h_i + (grad f_i - h_i)_{U_i} / tau is unbiased, and its variance vanishes as h_i comes to grad f_i(x*).
    """

    def __init__(self, problem, x, step_size, masks):
        self.x, self._lr, self._masks, self._gradients = x, step_size, masks, problem.gradients
        self.h = torch.zeros(len(x), problem.workers, problem.dim, dtype=torch.float64)

    def estimate(self, new):
        """g_i [S, n, d] from what the workers send, the blocks of grad f_i - h_i."""
        return self.h + new / self._masks.tau

    def step(self, t):
        new = self._masks(t) * (self._gradients(self.x) - self.h)
        self.x = self.x - self._lr * self.estimate(new).mean(1)
        self.h = self.h + new


def isega_step(L, mu, n, tau):
    """Of theorem 3."""
    return min(1 / (4 * L * (1 + 1 / (n * tau))), 1 / (mu / tau + 4 * L / (n * tau)))


def isega_start(problem, x, step_size, tau):
    """Theorem 3's Phi0 / ||x0 - x*||^2, largest of the seeds, where h starts at 0; the rate is mu * step size."""
    slopes = problem.gradients(problem.solution[None])[0].square().sum().item()
    distance = (x - problem.solution).square().sum(1).min().item()
    return 1 + step_size / (2 * problem.L * tau * problem.workers) * slopes / distance


class SharedISAGA:
    """Algorithm 4: all workers see all N samples and one table of their last gradients, of which blocks are refreshed.

    In a step the workers' samples differ, so no two refresh the same row. SAGA: one worker, tau = 1.
    """

    def __init__(self, problem, x, step_size, masks, seeds):
        self.x, self._lr, self._masks, self._problem, self._random = x, step_size, masks, problem, Random(seeds)
        self.table = torch.zeros(len(x), problem.samples, problem.dim, dtype=torch.float64)
        self.mean = torch.zeros(len(x), 1, problem.dim, dtype=torch.float64)  # of the table's rows

    def draw(self):
        return self._random.distinct(self._problem.samples, self._problem.workers)

    def step(self, t):
        which, masks = self.draw(), self._masks(t)
        seeds = torch.arange(len(self.x))[:, None]
        new = self._problem.sample_gradients(self.x, which) - self.table[seeds, which]
        self.x = self.x - self._lr * (masks * (new + self.mean)).mean(1)
        self.table[seeds, which] += masks * new
        self._refresh(masks * new)

    def _refresh(self, added):
        self.mean = self.mean + added.sum(1, keepdim=True) / self._problem.samples


class DistributedISAGA(SharedISAGA):
    """Algorithm 5: each worker draws from its own N / n samples, and ``mean`` [S, n, d] is of its own rows."""

    def __init__(self, problem, x, step_size, masks, seeds):
        super().__init__(problem, x, step_size, masks, seeds)
        self.mean = self.mean.repeat(1, problem.workers, 1)
        self.draw = OwnSamples(problem, seeds).draw

    def _refresh(self, added):
        self.mean = self.mean + added * (self._problem.workers / self._problem.samples)


def isaga_step(L, n, tau, slack=3):
    """Of the figures, and the most that theorems 2 and 5 allow; corollary 2 has slack 4, and a rate above 0."""
    return 1 / (L * (slack / n + tau))


def isaga_rate(L, mu, n, tau, samples, step_size):
    """Theorems 2 and 5, with N = n l samples: 0 at the step size of the figures.

    By 1 less this ||x - x*||^2 + c step_size^2 sum of ||A_j||^2 shrinks in every step on average, A_j the j-th row of
    the table less grad psi_j(x*). With D_j = grad psi_j(x) - grad psi_j(x*), means over j, and d = D - A + mean A:

        E||d||^2 <= 2 E||D||^2 + 2 E||A||^2 - ||grad f||^2,  2 <grad f, x - x*> >= mu ||x - x*||^2 + E||D||^2 / L,
        E||mean of the d_{U_i}||^2 <= tau / n E||d||^2 + tau^2 (1 - 1 / n) ||grad f||^2
                                   <= tau (max(1 / n + tau, 2 / n) E||D||^2 + 2 / n E||A||^2),

    and a step leaves 1 - tau n / N of sum ||A_j||^2 and adds tau n E||D||^2. (Theorem 5: grad f_i in the place of
    grad f, and their mean square.) The paper's c has 1 / n + tau; where tau < 1 / n, this proof needs 2 / n.
    """
    c = _isaga_constant(L, n, tau, step_size)
    return tau * min(step_size * mu, n / samples - 2 / (n * samples * c))


def isaga_start(problem, x, step_size, tau):
    """What shrinks by isaga_rate / ||x - x*||^2 at the start, largest of the seeds, where the table starts at 0."""
    c = _isaga_constant(problem.L_sample, problem.workers, tau, step_size)
    slopes = problem.sample_gradients(problem.solution[None], torch.arange(problem.samples)[None]).square().sum().item()
    distance = (x - problem.solution).square().sum(1).min().item()
    return 1 + c * step_size**2 * slopes / distance


def _isaga_constant(L, n, tau, step_size):
    return (1 / (step_size * L) - max(1 / n + tau, 2 / n)) / n


class Accelerated:
    """Algorithm 7, with the sequences of Vaswani, Bach and Schmidt 2018 for strongly convex f, which are constant.

    q = 1 / (n tau) sum of (g_i)_{U_i} is unbiased; growth: rho with E||q||^2 <= rho ||grad f||^2. They ask of the
    step size lr, of a in x = a v + (1 - a) y, of b in v <- b v + (1 - b) x - e lr q, and of weights A_t and B_t:

        lr = 1 / (rho L),  b >= 1 - e mu lr,  A_{t+1} = e sqrt(lr rho) B_{t+1},  B_{t+1} <= B_t / sqrt(b),
        e = (1 + b (1 - a) / a) / rho,  a = e b lr B_{t+1}^2 / (e b lr B_{t+1}^2 + A_t^2).

    With s = sqrt(mu / L) / rho all hold as equations for b = 1 - s, e = 1 / (rho s), a = s / (1 + s), B_t^2 = mu A_t^2
    and A_t^2 = b^-t, and E f(y) - f* <= (1 - s)^t (f(x0) - f* + mu / 2 ||x0 - x*||^2). ``x`` here is the paper's y.
    """

    def __init__(self, problem, x, growth, masks, gradients=None, L=None):
        self.x, self._v, self._masks, self._gradients = x, x, masks, gradients or problem.gradients
        L = L or problem.L
        self.lr, self.rate = 1 / (growth * L), math.sqrt(problem.mu / L) / growth
        self._weight = 1 / (growth * self.rate)

    def step(self, t):
        a = self.rate / (1 + self.rate)
        x = a * self._v + (1 - a) * self.x
        move = self.lr / self._masks.tau * (self._masks(t) * self._gradients(x)).mean(1)
        self.x = x - move
        self._v = (1 - self.rate) * self._v + self.rate * x - self._weight * move


def growth(n, tau, of_workers):
    """Lemma 1 where g_i is grad f_i: rho of q, from mean ||grad f_i||^2 <= of_workers ||grad f||^2."""
    return 1 + of_workers * (1 - tau) / (n * tau)


class Asynchronous:
    """Algorithm 8 without a prox: a worker reads the mean of all workers' last points, and answers 1 to M steps later.

    What it answers is its blocks of its gradient at what it read. Answers of one step are taken in together, and then
    those workers read again; M = 1 is algorithm 1. Times are drawn from the seeds.
    """

    def __init__(self, problem, x, step_size, masks, max_delay, seeds):
        self._lr, self._masks, self._gradients, self._most = step_size, masks, problem.gradients, max_delay
        self._random, self._workers = Random(seeds), problem.workers
        self.x = x
        self.read = self.last = x[:, None].repeat(1, problem.workers, 1)
        self._wakes = self._delays() - 1

    def step(self, t):
        awake = (self._wakes <= t)[:, :, None]
        answers = self.read - self._lr * self._masks(t) * self._gradients(self.read)
        self.last = torch.where(awake, answers, self.last)
        self.x = self.last.mean(1)
        self.read = torch.where(awake, self.x[:, None], self.read)
        self._wakes = torch.where(self._wakes <= t, t + self._delays(), self._wakes)

    def _delays(self):
        return 1 + self._random.integers(self._most, (self._workers,))


def asynchronous_step(L, n, tau):
    """Of theorem 9, by which E||x - x*||^2 shrinks by 1 - mu tau step_size in every max_delay steps."""
    return 1 / (2 * L * (tau + 2 / n))


class ImportanceCD:
    """Coordinate descent on a quadratic, with each coordinate j drawn on its own with a probability p_j ~ M_jj.

    On average a share tau is drawn. Each moves by its own step size 1 / v_j, v_j = (1 - p_j) M_jj + lmax(P^½ M P^½):
    the most for which E f is sure to fall, as P M P + diag(p (1 - p) M_jj) <= diag(p v).
    """

    def __init__(self, problem, x, tau, seeds):
        self.x, self._mean, self._random = x, problem.mean, Random(seeds)
        own = problem.mean.diagonal()
        self.p = (tau * problem.dim * own / own.sum()).clamp(max=1)
        root = self.p.sqrt()
        self._steps = 1 / ((1 - self.p) * own + torch.linalg.eigvalsh(root[:, None] * problem.mean * root)[-1])

    def step(self, t):
        drawn = self._random.uniform((self.x.shape[1],)) < self.p
        self.x = self.x - drawn * self._steps * (self.x @ self._mean)
