"""The tasks of the benchmark suite: a model, its data, its optimizer and the grid that every method is tuned over."""
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import task as text
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import nn
from torch.nn import functional as F

VOCABULARY = 256  # bytes


class Gpt2(nn.Module):
    """GPT-2 as transformers makes it from a configuration, without its weights, over bytes; 1.0 million parameters."""

    def __init__(self):
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        self.model = GPT2LMHeadModel(GPT2Config(
            vocab_size=VOCABULARY, n_positions=text.CONTEXT, n_embd=160, n_layer=3, n_head=4, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
        ))  # fmt: skip

    def forward(self, windows):
        logits = self.model(input_ids=windows[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


class Classifier(nn.Module):
    """Layers, called with (examples, labels), give the mean loss."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, batch):
        examples, labels = batch
        return F.cross_entropy(self.layers(examples), labels)


def digits_cnn():
    """Three convolutions with BatchNorm, 0.3 million parameters."""
    layers = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise((1, 32, 128, 192))):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, stride=1 if i == 0 else 2)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return Classifier(*layers, nn.Flatten(), nn.Linear(192 * 4, 10))


class Windows:
    """Windows of the standard library's text, 4 a rank in a batch; whole files are held out."""

    def __init__(self, rank: int, n: int, seed: int):
        training, held_out = text.standard_library(seed)
        self._batches = text.batches(training, rank, n, seed)
        self._held_out = text.HeldOut(held_out, rank, n, windows=128, seed=seed)

    def batch(self):
        return next(self._batches)

    def held_out_part(self, model: nn.Module) -> torch.Tensor:
        """This rank's part of the held-out loss, 0-d: added over the ranks, it is the mean."""
        return self._held_out.part(model)


class Examples:
    """Rows of a data set that scikit-learn ships, 16 a rank in a batch; a third of them is held out."""

    def __init__(self, data, shape: tuple[int, ...], rank: int, n: int, seed: int):
        examples, labels = torch.as_tensor(data.data, dtype=torch.float32), torch.as_tensor(data.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        held_out, training = order.split([len(order) // 3, len(order) - len(order) // 3])
        mean, deviation = examples[training].mean(0), examples[training].std(0).clamp(min=1e-3)
        examples = ((examples - mean) / deviation).view(-1, *shape)
        self._held_out = len(held_out)
        self._part = examples[held_out[rank::n]], labels[held_out[rank::n]]
        self._examples, self._labels = examples[training[rank::n]], labels[training[rank::n]]
        self._generator = torch.Generator().manual_seed(1000 * seed + rank)

    def batch(self):
        chosen = torch.randint(len(self._labels), (16,), generator=self._generator)
        return self._examples[chosen], self._labels[chosen]

    @torch.no_grad()
    def held_out_part(self, model: nn.Module) -> torch.Tensor:
        model.eval()
        loss = model(self._part) * len(self._part[1]) / self._held_out
        model.train()
        return loss


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


def _transformer():
    return text.ByteTransformer(width=160, layers=3)


TASKS = {
    "bytes-adamw": Task("byte-level transformer, AdamW", _transformer, Windows,
                        **_adamw((2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)), steps=400, every=10, tuning_steps=120),
    "bytes-sgd": Task("byte-level transformer, SGD", _transformer, Windows, **_sgd((0.03, 0.1, 0.3, 1.0)),
                      steps=400, every=10, tuning_steps=120),
    "gpt2": Task("GPT-2 by transformers, AdamW", Gpt2, Windows,
                 **_adamw((2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)), steps=400, every=10, tuning_steps=120),
    "digits": Task("CNN with BatchNorm on digits, SGD", digits_cnn,
                   lambda *where: Examples(load_digits(), (1, 8, 8), *where), **_sgd((0.01, 0.03, 0.1, 0.3)),
                   steps=120, every=5, tuning_steps=60),
    "cancer": Task("logistic regression on breast cancer, SGD", lambda: Classifier(nn.Linear(30, 2)),
                   lambda *where: Examples(load_breast_cancer(), (30,), *where), **_sgd((0.01, 0.03, 0.1, 0.3)),
                   steps=120, every=5, tuning_steps=60),
}  # fmt: skip
