"""The suite's text: windows of bytes of the standard library, and the models that learn them."""
from pathlib import Path

import torch
from common import task as text
from torch import nn
from torch.nn import functional as F

VOCABULARY = 256  # bytes


def small_transformer() -> nn.Module:
    """0.45 million parameters."""
    return text.ByteTransformer(width=104, layers=3)


def transformer() -> nn.Module:
    """3.24 million parameters."""
    return text.ByteTransformer()


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


class Windows:
    """Windows of the standard library's text; whole files are held out, the same in all runs.

    root: the folder of another Python's library. windows: how many are held out.
    """

    def __init__(self, rank: int, n: int, seed: int, batch: int, root: Path | None = None, windows: int = 512):
        self._training, held_out = text.standard_library(root=root)
        self._text = held_out
        self._batches = text.batches(self._training, rank, n, seed, batch)
        self._held_out = text.HeldOut(held_out, rank, n, windows=windows)

    def batch(self):
        return next(self._batches)

    def held_out_part(self, model: nn.Module) -> torch.Tensor:
        """This rank's part of the held-out loss, 0-d: added over the ranks, it is the mean."""
        return self._held_out.part(model)

    def tensors(self) -> list[torch.Tensor]:
        """All of it, on every rank."""
        return [self._training, self._text]
