"""A training step of one rank with a hook and without: what the hook itself takes, on a GPU with its own stream.

    THINWIRE_EXCHANGE_ALONE=1 python benchmarks/operators/gpu_step.py --out results/gpu_step.json

One rank alone has nothing to send, and hooks leave it out; THINWIRE_EXCHANGE_ALONE=1 lets it go all the way over NCCL.
Methods and plain DDP take turns, ten steps each; the median step counts, between CUDA events. Without a GPU a small
model over Gloo shows that all of this runs.
"""
import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import thinwire
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

WIDTH, LAYERS, HEADS, TOKENS, WORDS = 768, 12, 12, 256, 32_000  # 134 M parameters, of which 25 M are the embedding
SMALL = 64, 2, 2, 16, 256
BATCH, TURN, TURNS = 8, 10, 4
METHODS = {
    "nominated 4 % in 4 bits": lambda: thinwire.BlockSparse("nominated", density=0.04, wire_dtype="int4"),
    "nominated 4 % in 32 bits": lambda: thinwire.BlockSparse("nominated", density=0.04),
    "Dense in 4 bits": lambda: thinwire.Dense(wire_dtype="int4", memory="error_feedback"),
    "Dense": lambda: thinwire.Dense(),
}


class Transformer(torch.nn.Module):
    """Predicts the next word."""

    def __init__(self, width, layers, heads, tokens, words):
        super().__init__()
        self.words, self.tokens = torch.nn.Embedding(words, width), torch.nn.Embedding(tokens, width)
        layer = torch.nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True,
                                                 norm_first=True)  # fmt: skip
        self.body = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = torch.nn.Linear(width, words)

    def forward(self, text):
        position = torch.arange(text.shape[1], device=text.device)
        logits = self.head(self.body(self.words(text) + self.tokens(position)))
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())


class Contestant:
    """A model under one method, or under none, with what its steps took in milliseconds."""

    def __init__(self, name, device, sizes):
        torch.manual_seed(0)
        model = Transformer(*sizes).to(device)
        self.ddp = DistributedDataParallel(model)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.handle = thinwire.attach(self.ddp, METHODS[name](), optimizer=self.optimizer) if name else None
        self.milliseconds = []

    def step(self, text):
        self.optimizer.zero_grad(set_to_none=False)
        with torch.autocast(text.device.type, torch.bfloat16):
            loss = self.ddp(text)
        loss.backward()
        self.optimizer.step()

    def turn(self, text, count):
        """Makes the steps; the first is not counted."""
        self.step(text)
        for _ in range(count):
            self.milliseconds.append(timed(lambda: self.step(text), text.device))


def timed(function, device):
    if device.type != "cuda":
        begin = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - begin)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def compete(names, device, sizes, turns, count):
    """Each method in turns with plain DDP, two models at a time: all together may not fit."""
    batch = BATCH if device.type == "cuda" else 2
    text = torch.randint(sizes[-1], (batch, sizes[3]), device=device)
    rows = []
    for name in names:
        row = {"method": name}
        try:
            pair = [Contestant(None, device, sizes), Contestant(name, device, sizes)]
        except (TypeError, ValueError) as error:  # a method that this version does not know
            rows.append(row | {"error": str(error)})
            continue
        for one in pair:
            for _ in range(4):  # rebuilt buckets, first allocations
                one.step(text)
        for _ in range(turns):
            for one in pair:
                one.turn(text, count)
        plain, ours = (statistics.median(one.milliseconds) for one in pair)
        row |= {"parameters": pair[1].parameters, "plain_ms": plain, "ours_ms": ours, "hook_ms": ours - plain}
        rows.append(row)
        pair[1].handle.finalize()
        del pair
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        backend, store = "nccl" if on_gpu else "gloo", f"file://{folder}/store"
        dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
        sizes = (WIDTH, LAYERS, HEADS, TOKENS, WORDS) if on_gpu else SMALL
        rows = compete(args.methods, device, sizes, TURNS if on_gpu else 1, TURN if on_gpu else 2)
        dist.destroy_process_group()
    for row in rows:
        print(row.get("error") or "{method}: {ours_ms:.3g} ms, plain DDP {plain_ms:.3g} ms, the hook alone "
              "{hook_ms:.3g} ms, {parameters:,} parameters".format(**row))  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
