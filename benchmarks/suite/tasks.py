"""The tasks of the benchmark suite: a model, its data, its optimizer and the grid that every method is tuned over."""
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from suite.examples import Examples, digits, digits_cnn
from suite.texts import Gpt2, Windows, byte_transformer


@dataclass(frozen=True)
class Task:
    """What is trained. steps: of a run; every: steps between two evaluations; tuning_steps: of a run of the grid.

    grid: the options that every method is tried with, on top of ``options``; ``without_momentum`` is the part of it
    for methods that bring a momentum of their own.
    """

    label: str
    model: Callable[[], nn.Module]
    data: Callable[[int, int, int], Windows | Examples]
    optimizer: str
    options: dict
    grid: tuple[dict, ...]
    without_momentum: tuple[dict, ...]
    steps: int
    every: int
    tuning_steps: int


def _adamw(rates):
    grid = tuple({"lr": lr, "betas": [beta1, 0.95]} for beta1 in (0.0, 0.9) for lr in rates)
    return {"optimizer": "AdamW", "options": {}, "grid": grid, "without_momentum": grid[: len(rates)]}


def _sgd(rates):
    grid = tuple({"lr": lr, "momentum": momentum} for momentum in (0.0, 0.9) for lr in rates)
    return {"optimizer": "SGD", "options": {}, "grid": grid, "without_momentum": grid[: len(rates)]}


TASKS = {
    "bytes-adamw": Task("byte-level transformer, AdamW", byte_transformer, Windows,
                        **_adamw((2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)), steps=400, every=10, tuning_steps=120),
    "bytes-sgd": Task("byte-level transformer, SGD", byte_transformer, Windows, **_sgd((0.03, 0.1, 0.3, 1.0)),
                      steps=400, every=10, tuning_steps=120),
    "gpt2": Task("GPT-2 by transformers, AdamW", Gpt2, Windows,
                 **_adamw((2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)), steps=400, every=10, tuning_steps=120),
    "digits": Task("CNN with BatchNorm on digits, SGD", digits_cnn, digits, **_sgd((0.01, 0.03, 0.1, 0.3)),
                   steps=120, every=5, tuning_steps=60),
}  # fmt: skip
