"""The problems: f(x) = (1/n) sum of f_i(x), worker i owning f_i, all in float64 and for several seeds side by side.

Every problem has ``workers`` n, ``dim`` d, ``L`` (each f_i is L-smooth), ``mu`` (f is mu-strongly convex),
``solution`` x* [d], ``start(seeds)`` [S, d], ``gradients(x)``: [S, n, d] at one x [S, d] for all workers, or at each
worker's own [S, n, d]; and ``gap(x)``: f(x) - f(x*) [S].

Those that are sums of samples also have ``samples`` N (worker i owns the i-th N / n of them), ``L_sample`` (each
sample's function is so smooth) and ``sample_gradients(x, which)``: [S, n, d] for samples [S, n].
"""

import functools

import torch
from sklearn import datasets


class Quadratics:
    """Equation 17 of the paper: f_ij(x) = 1/2 x' M_ij x, M = vv' + (I - vv') AA' / lmax(AA') (I - vv').

    v: one random direction for all, A: Gaussian [dim, columns]; L is 1. Each worker owns ``parts`` of them. x* is 0
    and every f_i is least there; or, where ``heterogeneous``, f_i has a slope b_i there, Gaussian, of sum 0.
    """

    def __init__(self, workers, heterogeneous=False, parts=1, dim=64, columns=96, seed=0):
        generator = torch.Generator().manual_seed(seed)
        random = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        v = random(dim)
        v /= v.norm()
        across = torch.eye(dim, dtype=torch.float64) - torch.outer(v, v)
        a = torch.stack([random(dim, columns) for _ in range(workers * parts)])
        a = a @ a.mT
        a /= torch.linalg.eigvalsh(a)[:, -1, None, None]
        self.matrices = torch.outer(v, v) + across @ a @ across  # [n * parts, d, d]
        self.of_workers = self.matrices.view(workers, parts, dim, dim).mean(1)
        self.mean = self.of_workers.mean(0)
        self.slopes = random(workers, dim) * heterogeneous
        self.slopes -= self.slopes.mean(0)
        self.workers, self.dim, self.samples = workers, dim, workers * parts
        self.L = self.L_sample = 1.0
        self.mu = torch.linalg.eigvalsh(self.mean)[0].item()
        self.solution = torch.zeros(dim, dtype=torch.float64)

    def start(self, seeds):
        """Gaussian. Not from generators that start as the problem's does: its first direction would be v itself."""
        generators = [torch.Generator().manual_seed(1000 + seed) for seed in seeds]
        return torch.stack([torch.randn(self.dim, generator=one, dtype=torch.float64) for one in generators])

    def gradients(self, x):
        if x.dim() == 2:
            return (x @ self.of_workers.view(-1, self.dim).mT).view(len(x), self.workers, -1) + self.slopes
        return torch.einsum("nij,snj->sni", self.of_workers, x) + self.slopes

    def sample_gradients(self, x, which):
        slopes = self.slopes[which // (self.samples // self.workers)]
        return torch.einsum("snij,sj->sni", self.matrices[which], x) + slopes

    def gap(self, x):
        return 0.5 * torch.einsum("si,ij,sj->s", x, self.mean, x)

    def growth(self):
        """The paper's rho~ of assumption 5: the largest that mean ||grad f_i||^2 / ||grad f||^2 can be."""
        inverse = torch.linalg.inv(self.mean)
        squares = (self.of_workers @ self.of_workers).mean(0)
        return torch.linalg.eigvalsh(inverse @ squares @ inverse)[-1].item()


class Logistic:
    """l2-regularised logistic regression: mean of log(1 + exp(-y a'x)) + strength / 2 ||x||^2 over the rows (a, y).

    breast cancer: 540 rows of 30 features; digits: 1792 of 64, odd against even. Features are standardised and rows
    then scaled to length 1, so that one L fits all samples. Rows are dealt to workers in a fixed random order, or,
    ``by_label``, in the order of their classes, so that most workers see one class (digits: one or two digits).
    """

    ROWS = {"breast cancer": (datasets.load_breast_cancer, 540), "digits": (datasets.load_digits, 1792)}

    def __init__(self, name, workers, strength=1e-3, by_label=False):
        load, count = self.ROWS[name]
        if count % workers:
            raise ValueError(f"{count} rows of {name} cannot be split evenly over {workers} workers")
        data, target = (torch.tensor(array) for array in load(return_X_y=True))
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count]
        if by_label:
            order = order[target[order].argsort(stable=True)]
        rows = data[order].double()
        rows = (rows - rows.mean(0)) / rows.std(0).clamp_min(1e-12)  # some pixels of the digits are always 0
        rows = torch.nn.functional.normalize(rows, dim=1)
        self.rows = rows * (2 * (target[order] % 2) - 1)[:, None]  # a y: the label only ever comes as a sign
        self.dim, self.workers, self.samples, self.mu = rows.shape[1], workers, count, strength
        self.dealt = self.rows.view(workers, -1, self.dim)
        per_worker = count // workers
        self.L_sample = 0.25 + strength
        self.L = torch.linalg.eigvalsh(self.dealt.mT @ self.dealt / (4 * per_worker)).max().item() + strength
        self.solution = self._newton()
        self._least = self.loss(self.solution[None])

    def start(self, seeds):
        return torch.zeros(len(seeds), self.dim, dtype=torch.float64)

    def gradients(self, x):
        x = x if x.dim() == 3 else x[:, None].expand(-1, self.workers, -1)
        margins = torch.einsum("nld,snd->nsl", self.dealt, x)
        weights = -torch.sigmoid(-margins) / self.dealt.shape[1]
        return torch.einsum("nsl,nld->snd", weights, self.dealt) + self.mu * x

    def sample_gradients(self, x, which):
        rows = self.rows[which]
        margins = torch.einsum("snd,sd->sn", rows, x)
        return -torch.sigmoid(-margins)[:, :, None] * rows + self.mu * x[:, None]

    def loss(self, x):
        return torch.nn.functional.softplus(-x @ self.rows.mT).mean(1) + self.mu / 2 * x.square().sum(1)

    def gap(self, x):
        return self.loss(x) - self._least

    def noise(self):
        """Mean squared distance of a sample's gradient from its worker's: the larger of that at 0 and that at x*.

        An estimate of the largest at any x, which theorem 6 is about and which may be more.
        """
        found = []
        for x in (torch.zeros_like(self.solution), self.solution):
            g = -torch.sigmoid(-self.dealt @ x)[..., None] * self.dealt
            found.append((g - g.mean(1, keepdim=True)).square().sum(2).mean().item())
        return max(found)

    def _newton(self):
        x = torch.zeros(self.dim, dtype=torch.float64)
        for _ in range(50):
            p = torch.sigmoid(-self.rows @ x)
            gradient = -(self.rows.mT @ p) / self.samples + self.mu * x
            if gradient.norm() < 1e-15:
                break
            curvature = (self.rows.mT * (p * (1 - p))) @ self.rows / self.samples
            x -= torch.linalg.solve(curvature + self.mu * torch.eye(self.dim, dtype=torch.float64), gradient)
        assert gradient.norm() < 1e-12, "Newton's method did not converge"
        return x
