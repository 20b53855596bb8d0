"""The suite's text: windows of bytes of the standard library, and the models that learn them."""
import torch
from common import task as text
from torch import nn
from torch.nn import functional as F

VOCABULARY = 256  # bytes


def byte_transformer() -> nn.Module:
    """1.0 million parameters."""
    return text.ByteTransformer(width=160, layers=3)


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
