"""What is trained: a model of bytes and its optimizer."""
import functools
from collections.abc import Callable
from dataclasses import dataclass

from common.task import ByteTransformer
from suite.texts import Gpt2
from torch import nn

ADAMW, SGD = "AdamW", "SGD"
BATCH = 8  # windows a rank. With 4, plain DDP is far from its end after so few steps: 1.77 in the place of 1.50


@dataclass(frozen=True)
class Task:
    """label: as the tables call it. steps: of a run. AdamW's second beta is 0.95."""

    label: str
    model: Callable[[], nn.Module]
    optimizer: str
    steps: int = 1500


SMALL = functools.partial(ByteTransformer, width=104, layers=3)  # 0.45 million parameters
TASKS = {
    "bytes-adamw": Task("byte-level transformer, AdamW", SMALL, ADAMW),
    "bytes-sgd": Task("byte-level transformer, SGD", SMALL, SGD),
    "gpt2-adamw": Task("GPT-2 by transformers, AdamW", Gpt2, ADAMW),
}
