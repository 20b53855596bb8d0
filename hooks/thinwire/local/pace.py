"""How long rounds are and how late they land: as given, or from what exchanges and steps took, alike on all ranks."""

import math

import torch

from thinwire.methods import LocalSteps
from thinwire.methods.local_steps import AUTO

FIRST = 8  # steps of a round before anything is measured
MOST = 4096
WAIT = 0.05  # of a round's computation may be waited for, where its length is chosen
_DRIFT = 1.2  # times, by which a measurement must have changed to count


class Pace:
    """every: steps of a round, in which each fragment is sent once. overlap: how many steps later one lands."""

    def __init__(self, method: LocalSteps):
        self._method, self._fragments = method, method.fragments
        self.overlap: int = 1 if method.overlap == AUTO else int(method.overlap)
        self.every: int = max(FIRST, self.overlap) * self._fragments if method.every == AUTO else int(method.every)
        self._chosen_at: tuple[float, float] | None = None

    @property
    def measures(self) -> bool:
        return AUTO in (self._method.every, self._method.overlap)

    @property
    def spacing(self) -> int:
        """Steps from one fragment to the next."""
        return self.every // self._fragments

    @property
    def first(self) -> int:
        """Steps until the first is sent: before anything is measured, no more than a few where that decides."""
        return min(self.spacing, FIRST) if self.follows else self.spacing

    @property
    def follows(self) -> bool:
        """Whether a round begins as soon as the one before has landed."""
        return self._method.overlap == AUTO

    def hear(self, told: torch.Tensor) -> None:
        """Choose anew where that is called for. told: of all ranks [n, 2], the seconds of a fragment's exchange, in
        which ranks wait for each other, and of a step; 0 where they are not known."""
        exchange, step = float(told[:, 0].min()), float(told[:, 1].max())
        if not (exchange > 0 and step > 0):
            return
        if self._chosen_at is not None and all(_alike(*pair) for pair in zip(self._chosen_at, (exchange, step))):
            return
        self._chosen_at = exchange, step
        hides = math.ceil(exchange / step)
        if self._method.overlap == AUTO:
            most = MOST if self._method.every == AUTO else self.spacing
            self.overlap = max(1, min(hides, most))
            if self._method.every == AUTO:
                self.every = self.overlap * self._fragments
        else:
            self.every = min(math.ceil(fewest_steps(exchange, step, self.overlap)), MOST) * self._fragments

    def state_dict(self) -> dict[str, float]:
        exchange, step = self._chosen_at or (0.0, 0.0)
        return {"every": self.every, "overlap": self.overlap, "exchange_s": exchange, "step_s": step}

    def load_state_dict(self, state: dict) -> None:
        """What is given as a number stays as given."""
        if self._method.every == AUTO:
            self.every = state["every"]
        if self._method.overlap == AUTO:
            self.overlap = state["overlap"]
        if self.measures and state["exchange_s"]:
            self._chosen_at = state["exchange_s"], state["step_s"]


def fewest_steps(exchange_s: float, step_s: float, overlap: int) -> float:
    """From one exchange to the next, so that it is hidden by ``overlap`` steps or what is waited for costs little."""
    return max(1, overlap, (exchange_s - overlap * step_s) / (WAIT * step_s))


def _alike(one, other):
    return max(one, other) <= _DRIFT * min(one, other)
