"""The suite's click model: large embeddings, of which a batch touches few rows, on data that are made.

Each impression has an id in every field, drawn by a power law: a few ids are in most impressions, most are rare. Ids
have a weight and a place in a small space, and the probability of a click is a sigmoid of the weights and of the
places' products, as in a factorisation machine. Nothing is downloaded, and no impression comes twice.
"""
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

FIELDS, IDS = 8, 4096  # fields of an impression, ids of a field
WIDTH = 16  # of an embedding: a row is a block of thinwire's
PLACES = 4  # dimensions of the space behind the data
POWER = 1.1  # the id of place i is drawn with a probability of 1 / i ** POWER
HELD_OUT = 16_384  # impressions


class ClickModel(nn.Module):
    """DeepFM in small: weights and products of embeddings, and layers over them; 0.58 million parameters.

    Called with (ids int64 [B, FIELDS], clicks float32 [B]) it gives the mean log loss.
    """

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(FIELDS * IDS, WIDTH)
        self.weights = nn.Embedding(FIELDS * IDS, 1)
        self.deep = nn.Sequential(nn.Linear(FIELDS * WIDTH, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(),
                                  nn.Linear(64, 1))  # fmt: skip
        nn.init.normal_(self.rows.weight, std=0.05)
        nn.init.zeros_(self.weights.weight)
        self.register_buffer("first", torch.arange(FIELDS) * IDS)

    def forward(self, batch):
        ids, clicks = batch
        at = ids + self.first
        rows = self.rows(at)  # [B, FIELDS, WIDTH]
        products = (rows.sum(1).square() - rows.square().sum(1)).sum(1) / 2
        logits = self.weights(at).sum((1, 2)) + products + self.deep(rows.flatten(1)).squeeze(1)
        return F.binary_cross_entropy_with_logits(logits, clicks)


class Clicks:
    """A rank's stream of impressions, and its share of those held out. What is behind them is the same in all runs."""

    def __init__(self, rank: int, n: int, seed: int, batch: int, root: Path | None = None):
        behind = torch.Generator().manual_seed(0)
        self._weights = torch.randn(FIELDS, IDS, generator=behind) * 0.5
        self._places = torch.randn(FIELDS, IDS, PLACES, generator=behind) * 0.35
        self._law = torch.arange(1, IDS + 1).double().pow(-POWER)
        self._whole = self._impressions(HELD_OUT, behind)
        self._part = tuple(column[rank::n] for column in self._whole)
        self._generator = torch.Generator().manual_seed(1000 * seed + rank + 1)
        self._batch = batch

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._impressions(self._batch, self._generator)

    @torch.no_grad()
    def held_out_part(self, model: nn.Module) -> torch.Tensor:
        """This rank's part of the held-out log loss, 0-d: added over the ranks, it is the mean."""
        model.eval()
        loss = model(self._part) * len(self._part[1]) / HELD_OUT
        model.train()
        return loss

    def tensors(self) -> list[torch.Tensor]:
        """What is held out, and what is behind all: the same on every rank."""
        return [self._weights, self._places, *self._whole]

    def _impressions(self, count, generator):
        ids = torch.multinomial(self._law, count * FIELDS, replacement=True, generator=generator).view(count, FIELDS)
        fields = torch.arange(FIELDS)
        places = self._places[fields, ids]
        logits = self._weights[fields, ids].sum(1) + (places.sum(1).square() - places.square().sum(1)).sum(1) / 2 - 1
        return ids, torch.bernoulli(torch.sigmoid(logits), generator=generator)
