"""What the workers of an asynchronous run have in shared memory: the parameters, and figures of the run.

No locks: every figure has one writer, and the parameters are written by all.
"""

from dataclasses import dataclass, fields

import torch

from thinwire.core.memory import wide

BINS = 4096  # of the histogram of delays; the last one holds all longer delays
POINTS = 512  # of a worker's loss curve

# Rows of ``counts``. An update has begun before its first element is written, and has ended after its last.
BEGUN, ENDED, DROPPED, LONGEST, SAMPLES = range(5)
# Rows of ``figures``. STEP and WRITTEN are the largest norms, in units of the learning rate, of what an optimizer's
# step was and of what went to the shared parameters; FARTHEST and DISTANCES the largest inconsistency and the sum.
STEP, WRITTEN, FARTHEST, DISTANCES = range(4)


@dataclass
class Shared:
    """Tensors in shared memory. W workers, N elements.

    parameters: [N], float32 or float64; written by all. residuals: [W, N], what error feedback keeps back, or [W, 0].
    counts int64 [5, W] and figures float64 [4, W]: see above. delays: int64 [W, BINS], updates by their delay.
    curve: float64 [W, POINTS, 2], the number of an update and the mean loss since the point before; NaN is unused.
    """

    parameters: torch.Tensor
    residuals: torch.Tensor
    counts: torch.Tensor
    figures: torch.Tensor
    delays: torch.Tensor
    curve: torch.Tensor

    @classmethod
    def around(cls, flat: torch.Tensor, workers: int, with_residuals: bool) -> "Shared":
        """Move flat [N], the parameters at the start, to shared memory, with everything else at zero."""
        shared = cls(
            parameters=flat,
            residuals=torch.zeros(workers, flat.numel() if with_residuals else 0, dtype=wide(flat.dtype), device="cpu"),
            counts=torch.zeros(5, workers, dtype=torch.int64, device="cpu"),
            figures=torch.zeros(4, workers, dtype=torch.float64, device="cpu"),
            delays=torch.zeros(workers, BINS, dtype=torch.int64, device="cpu"),
            curve=torch.full((workers, POINTS, 2), float("nan"), dtype=torch.float64, device="cpu"),
        )
        for field in fields(cls):
            getattr(shared, field.name).share_memory_()
        return shared

    @property
    def ended(self) -> int:
        """Updates that are in the parameters."""
        return int(self.counts[ENDED].sum())

    def histogram(self) -> dict[int, int]:
        """How many updates had which delay."""
        total = self.delays.sum(0)
        return {int(delay): int(total[delay]) for delay in total.nonzero().flatten()}

    def losses(self) -> tuple[tuple[int, float], ...]:
        """All workers' loss curves as one, in the order of the updates' numbers."""
        points = self.curve.flatten(0, 1)
        points = points[~points[:, 0].isnan()]
        return tuple((int(number), float(loss)) for number, loss in points[points[:, 0].argsort()])


class Tally:
    """One worker's own entries in the figures of the run."""

    def __init__(self, shared: Shared, worker: int):
        self._counts = shared.counts[:, worker].unbind()
        self._figures = shared.figures[:, worker].unbind()
        self._delays = shared.delays[worker]
        self._curve = shared.curve[worker]
        self._filled, self._stride = 0, 1
        self._recent: list[float] = []

    def begin(self) -> None:
        self._counts[BEGUN].add_(1)

    def end(self, number: int, delay: int, loss: float, step: float, written: float) -> None:
        """An update is in the parameters. number: its ticket; step, written: norms in units of the learning rate."""
        self._counts[ENDED].add_(1)
        self._delays[min(delay, BINS - 1)] += 1
        self._counts[LONGEST].clamp_(min=delay)
        self._figures[STEP].clamp_(min=step)
        self._figures[WRITTEN].clamp_(min=written)
        self._recent.append(loss)
        if len(self._recent) >= self._stride:
            self._add_point(number)

    def drop(self) -> None:
        self._counts[DROPPED].add_(1)

    def sample(self, inconsistency: float) -> None:
        self._counts[SAMPLES].add_(1)
        self._figures[FARTHEST].clamp_(min=inconsistency)
        self._figures[DISTANCES].add_(inconsistency)

    def _add_point(self, number):
        if self._filled == POINTS:  # every two points become one, and the next ones cover twice as many updates
            pairs = self._curve.view(POINTS // 2, 2, 2)
            merged = torch.stack([pairs[:, 1, 0], pairs[:, :, 1].mean(1)], dim=1)
            self._curve.fill_(float("nan"))
            self._curve[: POINTS // 2] = merged
            self._filled, self._stride = POINTS // 2, 2 * self._stride
            if len(self._recent) < self._stride:
                return
        point = torch.tensor([number, sum(self._recent) / len(self._recent)], dtype=torch.float64, device="cpu")
        self._curve[self._filled] = point
        self._filled += 1
        self._recent.clear()
