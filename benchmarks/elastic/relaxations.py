"""Relaxed data-parallel SGD, simulated: workers whose view v of the parameters is not the ideal iterate x.

In every step each worker computes a stochastic gradient at its own view; x moves by the mean of all of them at once,
a view by what has become visible to that worker. Views are states of their own, moved by messages, and not computed
from x. Nothing is lost: what is not visible at once is due in a later step.
"""

import math
import zlib
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from thinwire import BlockSparse
from thinwire.consistency import bounds
from thinwire.core.reducer import Reducer
from thinwire.core.wire import Arrived

LR = 0.02
BATCH = 16


class Digits:
    """Cross-entropy of a perceptron with two hidden layers on the digits of scikit-learn, for many views at once.

    On the first 600 of them, so that the gradient over all data is cheap.
    """

    def __init__(self, width: int = 16):
        digits = load_digits()
        self.x = torch.tensor(digits.data[:600] / 16, dtype=torch.float64)
        self.y = torch.tensor(digits.target[:600])
        self.shapes = ((64, width), (1, width), (width, width), (1, width), (width, 10), (1, 10))
        self.numels = tuple(math.prod(shape) for shape in self.shapes)

    def start(self, seed: int) -> torch.Tensor:
        """Parameters [d]: uniform weights of Glorot's range, biases zero."""
        generator = torch.Generator().manual_seed(seed)
        parts = []
        for fan_in, fan_out in self.shapes:
            range_ = 0 if fan_in == 1 else math.sqrt(6 / (fan_in + fan_out))
            parts.append((2 * torch.rand(fan_in * fan_out, generator=generator, dtype=torch.float64) - 1) * range_)
        return torch.cat(parts)

    def gradients(self, views: torch.Tensor, samples: torch.Tensor | None = None) -> torch.Tensor:
        """The gradient [N, d] at each view [N, d], of the mean loss over its samples [N, batch], or over all data."""
        x = self.x.expand(len(views), -1, -1) if samples is None else self.x[samples]
        y = self.y.expand(len(views), -1) if samples is None else self.y[samples]
        views = views.detach().requires_grad_()
        w = [part.view(-1, *shape) for part, shape in zip(views.split(self.numels, 1), self.shapes, strict=True)]
        hidden = torch.tanh(torch.baddbmm(w[1], x, w[0]))
        hidden = torch.tanh(torch.baddbmm(w[3], hidden, w[2]))
        logits = torch.baddbmm(w[5], hidden, w[4])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / x.shape[1]
        return torch.autograd.grad(loss, views)[0]


@dataclass
class Outcome:
    """What a simulation of S seeds and W workers measured; roots of means over seeds and workers, each the largest of
    all steps.

    measured: of ||x - v||^2 / lr^2; largest: of any one worker and seed. second_moment: M, of ||g||^2. deviation:
    sigma, of ||g - grad f(v)||^2, and smoothness: L, the largest ||grad f(x) - grad f(v)|| / ||x - v|| met, or None
    where they were not asked for. x [S, d] and views [S, W, d] at the end, and owed [S, W, d]: what is still due to
    each view.
    """

    measured: float
    largest: float
    second_moment: float
    deviation: float | None
    smoothness: float | None
    x: torch.Tensor
    views: torch.Tensor
    owed: torch.Tensor


class Relaxation:
    """Base: what becomes visible when, and the bound of that."""

    max_delay: int
    needs_deviation = False

    def __call__(self, g: torch.Tensor, generator: torch.Generator, due: "Due") -> None:
        raise NotImplementedError

    def bound(self, workers: int, outcome: Outcome) -> float:
        raise NotImplementedError


class Due:
    """Updates that become visible late: a ring of steps, each holding a sum of what is due in it."""

    def __init__(self, max_delay: int):
        self._ring = [0.0] * (max_delay + 1)

    def add(self, delay: int, update: torch.Tensor) -> None:
        self._ring[delay] = self._ring[delay] + update

    def take(self) -> torch.Tensor | float:
        """What is due now; a step goes by."""
        now, *later = self._ring
        self._ring = [*later, 0.0]
        return now

    def all(self) -> torch.Tensor | float:
        return sum(self._ring)


def simulate(problem, relaxation, seeds, workers: int, steps: int, lr: float = LR) -> Outcome:
    """Run SGD for the seeds side by side.

    relaxation: called with gradients [S, W, d], a random generator and a Due, it adds to Due what each view [S, W, d]
    is to see and when. Sigma and L are measured where its bound needs them: that takes the gradient over all data at
    every view.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(repr(tuple(seeds)).encode()))
    x = torch.stack([problem.start(seed) for seed in seeds])
    views = x[:, None].repeat(1, workers, 1)
    due = Due(relaxation.max_delay)
    record = _Record()
    for _ in range(steps):
        flat = views.flatten(0, 1)
        samples = torch.randint(len(problem.x), (len(flat), BATCH), generator=generator)
        g = problem.gradients(flat, samples).view(views.shape)
        record.gradients(g)
        if relaxation.needs_deviation:
            record.full_gradients(g, problem.gradients(flat).view(views.shape), problem.gradients(x), x, views)
        relaxation(g, generator, due)
        x = x - lr * g.mean(1)
        views = views - lr * due.take()
        record.inconsistency((x[:, None] - views) / lr)
    return record.outcome(x, views, -lr * due.all() + torch.zeros_like(views))


@dataclass
class Messages(Relaxation):
    """Gradients as messages: each comes to each other worker 0 to max_delay steps late, a worker's own at once."""

    max_delay: int

    def __call__(self, g, generator, due):
        seeds, workers, _ = g.shape
        late = torch.randint(self.max_delay + 1, (seeds, workers, workers), generator=generator)
        late.diagonal(dim1=1, dim2=2).zero_()
        for delay in range(self.max_delay + 1):
            due.add(delay, (late == delay).to(g.dtype) @ g / workers)

    def bound(self, workers, outcome):
        return bounds.asynchronous_messages(workers, self.max_delay, outcome.second_moment)


@dataclass
class MissingMessages(Relaxation):
    """Each worker misses ``missing`` messages a round, which come one round later; each message is missed as often.

    own: a worker uses its own gradient in the place of a missing one, until that comes.
    """

    missing: int
    own: bool = False
    max_delay: int = 1

    @property
    def needs_deviation(self):
        return self.own

    def __call__(self, g, generator, due):
        missed = torch.stack([self._missed(g.shape[1], generator) for _ in range(len(g))]).to(g.dtype)
        late = missed @ g / g.shape[1]
        if self.own:
            late = late - self.missing * g / g.shape[1]
        due.add(0, g.mean(1, keepdim=True) - late)
        due.add(1, late)

    def _missed(self, workers, generator):
        """bool [W, W]: the messages that each worker misses; the workers stand in a random circle, and each misses
        those of others at the same random distances."""
        place = torch.randperm(workers, generator=generator)
        distances = 1 + torch.randperm(workers - 1, generator=generator)[: self.missing]
        apart = (place[:, None] - place[None]) % workers
        return torch.isin(apart, distances)

    def bound(self, workers, outcome):
        if self.own:
            return bounds.late_messages_with_own(self.missing, workers, outcome.deviation)
        return bounds.late_messages(self.missing, workers, outcome.second_moment)


@dataclass
class LocalRounds(Relaxation):
    """A worker sees its own gradients at once, and after every so many steps the mean of all workers' in their place,
    ``overlap`` steps late."""

    every: int
    overlap: int = 0

    def __post_init__(self):
        self.max_delay = self.every - 1 + self.overlap
        self._done = 0

    def __call__(self, g, generator, due):
        self._done += 1
        mean = g.mean(1, keepdim=True).expand_as(g)
        delay = -self._done % self.every + self.overlap  # until the round ends, and until its average is there
        due.add(0, g if delay else mean)
        if delay:
            due.add(delay, mean - g)

    def bound(self, workers, outcome):
        return bounds.local_steps(self.every, self.overlap, outcome.second_moment)


@dataclass
class SharedMemory(Relaxation):
    """One update at a time, each of whose elements becomes visible 0 to max_delay updates late, on its own."""

    max_delay: int

    def __call__(self, g, generator, due):
        late = torch.randint(self.max_delay + 1, g.shape, generator=generator)
        for delay in range(self.max_delay + 1):
            due.add(delay, torch.where(late == delay, g, 0.0))

    def bound(self, workers, outcome):
        return bounds.shared_memory(outcome.x.shape[1], self.max_delay, outcome.second_moment)


@dataclass
class ElasticScheduler(Relaxation):
    """Averages of a step's tensors arrive at each worker in a random order; it goes on when a share beta of the norm
    is there, and what is not comes 1 to max_delay steps late.

    numels: of the tensors. weigh_own: the norms are those of the worker's own gradient, or else of the average.
    speculate: use the own gradient in the place of what is late, until it comes.
    """

    beta: float
    numels: tuple[int, ...]
    max_delay: int = 1
    weigh_own: bool = False
    speculate: bool = False

    @property
    def needs_deviation(self):
        return self.weigh_own or self.speculate

    def __call__(self, g, generator, due):
        mean = g.mean(1, keepdim=True).expand_as(g)
        weighed = g if self.weigh_own else mean
        norms = torch.stack([part.norm(dim=2) for part in weighed.split(self.numels, 2)], 2)
        order = torch.rand(norms.shape, generator=generator).argsort(2)
        late = self._late(norms.gather(2, order)).gather(2, order.argsort(2))
        delays = late * torch.randint(1, self.max_delay + 1, late.shape, generator=generator)
        delays = delays.repeat_interleave(torch.tensor(self.numels), 2)
        due.add(0, torch.where(delays == 0, mean, g if self.speculate else 0.0))
        for delay in range(1, self.max_delay + 1):
            due.add(delay, torch.where(delays == delay, mean - g if self.speculate else mean, 0.0))

    def _late(self, norms):
        """Which tensors, in the order in which they arrive, come when a share beta is already there."""
        if self.beta == 1:
            return torch.zeros_like(norms, dtype=torch.int64)
        before = norms.cumsum(2) - norms
        return (before >= self.beta * norms.sum(2, keepdim=True)).to(torch.int64)

    def bound(self, workers, outcome):
        if self.speculate:
            return bounds.elastic_variance_bounded(outcome.deviation, self.max_delay)
        deviation = outcome.deviation if self.weigh_own else 0.0
        moment, tensors = outcome.second_moment, len(self.numels)
        return bounds.elastic_norm_bounded(self.beta, tensors, self.max_delay, moment, deviation)


def error_feedback(problem, method: BlockSparse, seeds, workers: int, steps: int, lr: float = LR) -> Outcome:
    """As :func:`simulate`, with thinwire's own reducers of one method on every worker, their payloads handed over.

    All workers have the same view; what is owed to it is -lr times the mean of the residuals.
    """
    names = tuple(f"tensor{i}" for i in range(len(problem.numels)))
    record = _Record()
    xs = torch.stack([problem.start(seed) for seed in seeds])
    views = xs.clone()
    reducers = [[Reducer(_seeded(method, seed), rank, workers) for rank in range(workers)] for seed in seeds]
    generators = [torch.Generator().manual_seed(1000 + seed) for seed in seeds]
    for step in range(steps):
        samples = torch.stack([torch.randint(len(problem.x), (workers, BATCH), generator=one) for one in generators])
        g = problem.gradients(views.repeat_interleave(workers, 0), samples.flatten(0, 1))
        g = g.view(len(seeds), workers, -1)
        record.gradients(g)
        means = torch.stack([_average(*one, names, problem.numels, step) for one in zip(reducers, g)])
        xs = xs - lr * g.mean(1)
        views = views - lr * means
        record.inconsistency(((xs - views) / lr)[:, None])
    waiting = [torch.stack([_residual(one, names) for one in of_seed]).mean(0) for of_seed in reducers]
    return record.outcome(xs, views[:, None], -lr * torch.stack(waiting)[:, None])


def gamma(method: BlockSparse, numels: tuple[int, ...], workers: int) -> float:
    """Of ``bounds.error_feedback``: 1 less the smallest share of any tensor, as rounded to blocks."""
    counts = method.counts_at(0, workers, numels)
    return 1 - min(count / -(-numel // method.block_size) for count, numel in zip(counts, numels, strict=True))


def _seeded(method, seed):
    return BlockSparse(method.selection, density=method.density, block_size=method.block_size, memory=method.memory,
                       dense_below=method.dense_below, seed=seed)  # fmt: skip


def _average(reducers, gradients, names, numels, step):
    flats = [g.clone() for g in gradients]
    encoded = [one.encode(flat, names, numels, step, None) for one, flat in zip(reducers, flats, strict=True)]
    values = torch.stack([e.payload.values for e in encoded]).to(flats[0].dtype)
    indices = None if encoded[0].payload.indices is None else torch.stack([e.payload.indices for e in encoded])
    if encoded[0].choice.common:
        values = values.sum(0, keepdim=True)
    for one, e in zip(reducers, encoded, strict=True):
        one.decode(e, Arrived(values, None, indices))
    return flats[0]


def _residual(reducer, names):
    stored = reducer.memory.residual.state_dict()
    return torch.cat([stored[name] for name in names])


class _Record:
    """Largest means of all steps."""

    def __init__(self):
        self._moments, self._noises, self._smoothness, self._apart, self._largest = [], [], [], [], []

    def gradients(self, g):
        self._moments.append(_mean_square(g))

    def full_gradients(self, g, at_views, at_x, x, views):
        self._noises.append(_mean_square(g - at_views))
        apart = (x[:, None] - views).norm(dim=2)
        changes = (at_x[:, None] - at_views).norm(dim=2)
        self._smoothness.append(torch.where(apart > 1e-9, changes / apart, 0.0).max().item())

    def inconsistency(self, apart):
        self._apart.append(_mean_square(apart))
        self._largest.append(apart.norm(dim=2).max().item())

    def outcome(self, x, views, owed):
        deviation = math.sqrt(max(self._noises)) if self._noises else None
        return Outcome(math.sqrt(max(self._apart)), max(self._largest), math.sqrt(max(self._moments)), deviation,
                       max(self._smoothness, default=None), x, views, owed)  # fmt: skip


def _mean_square(vectors):
    return vectors.square().sum(2).mean().item()
