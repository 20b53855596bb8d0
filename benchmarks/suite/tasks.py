"""The tasks of the benchmark suite: a model, its data and its optimizer."""
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from suite.clicks import ClickModel, Clicks
from suite.examples import Examples, digits, digits_cnn
from suite.texts import Gpt2, Windows, small_transformer, transformer

ADAMW, SGD = "AdamW", "SGD"
MAIN = "bytes-adamw"


@dataclass(frozen=True)
class Task:
    """What is trained.

    label: as the tables call it. data(rank, ranks, seed, batch, root): a rank's share; root is another Python's
    library, for those that learn its text. batch: examples a rank in a step. start: plain DDP's learning rate and
    momentum, SGD's or Adam's first beta, from which its search begins; AdamW's second beta is 0.95. steps: of a run,
    in the first warm_up of which the learning rate rises; after them it falls to 0. every: steps between two
    evaluations.
    """

    label: str
    model: Callable[[], nn.Module]
    data: Callable[[int, int, int, int, Path | None], Windows | Examples | Clicks]
    optimizer: str
    batch: int
    start: tuple[float, float]
    steps: int = 1500
    warm_up: int = 50
    every: int = 50


TASKS = {
    # With 4 windows a rank, plain DDP is far from its end after so few steps: 1.77 in the place of 1.50.
    MAIN: Task("byte-level transformer, AdamW", small_transformer, Windows, ADAMW, batch=8, start=(6e-3, 0.5)),
    "bytes-sgd": Task("byte-level transformer, SGD", small_transformer, Windows, SGD, batch=8, start=(0.1, 0.9)),
    "gpt2-adamw": Task("GPT-2 by transformers, AdamW", Gpt2, Windows, ADAMW, batch=8, start=(6e-3, 0.5)),
    "digits": Task("CNN with BatchNorm on digits, SGD", digits_cnn, digits, SGD, batch=16, start=(0.05, 0.5),
                   steps=200, warm_up=20, every=10),
    "clicks": Task("click model with embeddings, AdamW", ClickModel, Clicks, ADAMW, batch=64, start=(3e-3, 0.5)),
}  # fmt: skip
# Models whose step is timed, beside those of the tasks: 3.24 million parameters, as the demo trains them.
LARGE = Task("byte-level transformer of 3.2 M", transformer, Windows, SGD, batch=4, start=(0.01, 0.0))
