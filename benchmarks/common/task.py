"""One real task, small enough for two cores: a byte-level transformer on the text of Python's standard library."""
import functools
import os
import random
import sys
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

CONTEXT = 64  # tokens that the model sees
BATCH = 4  # windows a rank in a step


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, time, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ByteTransformer(nn.Module):
    """GPT in small, over bytes; called with windows [B, T + 1] it returns the mean loss of predicting each next byte.

    With the defaults, 3.2 million parameters.
    """

    def __init__(self, width: int = 256, layers: int = 4, heads: int = 4):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        inputs, targets = windows[:, :-1], windows[:, 1:]
        x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@functools.cache
def standard_library(seed: int = 0, held_out: float = 0.1,
                     root: Path | None = None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Text to train on and text held out, each uint8 [bytes]. Whole files are held out, so that none is in both.

    root: the folder of another Python's library.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = [path for path in sorted(root.rglob("*.py")) if skipped.isdisjoint(path.relative_to(root).parts)]
    random.Random(seed).shuffle(files)
    cut = int(len(files) * held_out)
    return _bytes_of(files[cut:]), _bytes_of(files[:cut])


def batches(text: torch.Tensor, rank: int, world_size: int, seed: int = 0, batch: int = BATCH):
    """Endless batches of windows, int64 [batch, CONTEXT + 1], from this rank's share of the text."""
    shard = text.tensor_split(world_size)[rank]
    generator = torch.Generator().manual_seed(seed * 1000 + rank)
    while True:
        yield _windows(shard, batch, generator)


class HeldOut:
    """The held-out loss, on a fixed set of windows, of which each rank evaluates its share."""

    def __init__(self, text: torch.Tensor, rank: int = 0, world_size: int = 1, windows: int = 128, seed: int = 0):
        chosen = _windows(text, windows, torch.Generator().manual_seed(seed))
        self.share = chosen.tensor_split(world_size)[rank]
        self.windows = windows

    @torch.no_grad()
    def part(self, model: nn.Module) -> torch.Tensor:
        """This rank's part of the loss: added over the ranks, it is the mean over all windows."""
        model.eval()
        total = sum(model(part) * len(part) for part in self.share.split(8)) / self.windows
        model.train()
        return torch.as_tensor(total)


def leave() -> None:
    """End this rank's process at once, successfully, when all ranks are done.

    Not destroy_process_group: on Gloo its destructor waits, holding Python's lock, for a thread that may just be
    waiting for that lock to drop a communication hook's callback. PowerSGD's hook was seen to hang so.
    """
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def _bytes_of(files):
    return torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in files)), dtype=torch.uint8)


def _windows(text, count, generator):
    starts = torch.randint(len(text) - CONTEXT, (count, 1), generator=generator)
    return text[starts + torch.arange(CONTEXT + 1)].long()
