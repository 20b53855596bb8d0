"""``density="auto"``: the smallest density that keeps the measured inconsistency under a limit."""

import math

AIM = 0.8  # of the limit: room for noise
NEAR = (0.85, 1.15)  # of the aim: near enough to leave the density alone
GAIN = 0.25


class DensityController:
    """An integral controller of the logarithm of the density, whose rate follows what it controls.

    What waits in a residual follows a change of the density d within about 1 / d steps, and in the end is
    proportional to 1 / d where gradients agree from step to step, to 1 / sqrt(d) where they are noise. So with
    ``every`` steps between measurements, log d moves by GAIN * min(1, every * d) * log(measured / aim): the closed
    loop then has a damping of 1 / (2 sqrt(GAIN)) = 1 or more, which does not oscillate. It starts at the largest
    density, where nothing waits, and comes down. Where the limit is exceeded and the measurement still rises, d grows
    by measured / aim, at most twofold, at once.
    """

    def __init__(self, limit: float, least: float, most: float, every: int):
        self._aim, self._limit = AIM * limit, limit
        self._least, self._most, self._every = least, most, every
        self.density = most
        self._before = 0.0

    def update(self, measured: float) -> None:
        """Take in a measurement of the inconsistency, in the units of the limit. One that is not finite is left out."""
        if not math.isfinite(measured):
            return
        ratio = measured / self._aim
        factor = 1.0
        if measured > self._limit and measured >= self._before:
            factor = min(2.0, ratio)
        elif not NEAR[0] <= ratio <= NEAR[1]:
            factor = math.exp(GAIN * min(1.0, self._every * self.density) * math.log(min(max(ratio, 0.25), 4.0)))
        self._before = measured
        self.density = min(self._most, max(self._least, self.density * factor))

    def state_dict(self) -> dict[str, float]:
        return {"density": self.density, "before": self._before}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.density = min(self._most, max(self._least, state["density"]))
        self._before = state["before"]
