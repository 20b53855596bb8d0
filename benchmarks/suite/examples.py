"""The suite's small data set, which scikit-learn ships, and the model that learns it."""
import itertools
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F


class Classifier(nn.Module):
    """Layers, called with (examples, labels), give the mean loss."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, batch):
        examples, labels = batch
        return F.cross_entropy(self.layers(examples), labels)


def digits_cnn() -> nn.Module:
    """Three convolutions with BatchNorm, 0.3 million parameters."""
    layers = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise((1, 32, 128, 192))):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, stride=1 if i == 0 else 2)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return Classifier(*layers, nn.Flatten(), nn.Linear(192 * 4, 10))


class Examples:
    """Rows of a data set that scikit-learn ships; a third of them is held out.

    shape: of one example; each entry of its first dimension, a column or an image's channel, is brought to mean 0 and
    deviation 1 over the training rows. Not each pixel: one that is never set in training has no deviation.
    """

    def __init__(self, data, shape: tuple[int, ...], rank: int, n: int, seed: int, batch: int):
        examples, labels = torch.as_tensor(data.data, dtype=torch.float32), torch.as_tensor(data.target)
        examples = examples.view(-1, *shape)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        held_out, training = order.split([len(order) // 3, len(order) - len(order) // 3])
        over = (0, *range(2, examples.dim()))
        examples = examples - examples[training].mean(over, keepdim=True)
        examples = examples / examples[training].std(over, keepdim=True)
        self._held_out = len(held_out)
        self._part = examples[held_out[rank::n]], labels[held_out[rank::n]]
        self._examples, self._labels = examples[training[rank::n]], labels[training[rank::n]]
        self._generator = torch.Generator().manual_seed(1000 * seed + rank)
        self._all, self._batch = (torch.as_tensor(data.data), torch.as_tensor(data.target)), batch

    def batch(self):
        chosen = torch.randint(len(self._labels), (self._batch,), generator=self._generator)
        return self._examples[chosen], self._labels[chosen]

    @torch.no_grad()
    def held_out_part(self, model: nn.Module) -> torch.Tensor:
        model.eval()
        loss = model(self._part) * len(self._part[1]) / self._held_out
        model.train()
        return loss

    def tensors(self) -> list[torch.Tensor]:
        """All of it, on every rank."""
        return list(self._all)


def digits(rank: int, n: int, seed: int, batch: int, root: Path | None = None) -> Examples:
    """1797 images of 8 x 8 pixels in 10 classes."""
    return Examples(load_digits(), (1, 8, 8), rank, n, seed, batch)
