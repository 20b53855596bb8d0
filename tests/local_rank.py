"""One rank of a job that test_local_steps.py ends: trains with local steps, and goes on from its last checkpoint."""

import argparse
import datetime
import os
from pathlib import Path

import thinwire
import torch
import torch.distributed as dist
from models import data, mlp, step, wrap


def train(rank: int, n: int, folder: Path | None = None, dies_after: int = 0) -> dict[str, torch.Tensor]:
    """The model at the end. folder: where this rank's checkpoint is. dies_after: steps, on rank 1; 0 is never."""
    model = mlp(seed=0)
    ddp = wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    handle = thinwire.attach(ddp, thinwire.LocalSteps(4, overlap=2), optimizer=optimizer)
    batches, begin = data(rank), 0
    checkpoint = folder and folder / f"{rank}.pt"
    if checkpoint and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        begin = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        handle.load_state_dict(saved["handle"])
        for _ in range(begin):
            next(batches)
    for number in range(begin, 20):
        if checkpoint and number == 9:  # a round is under way
            torch.save({"step": number, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                        "handle": handle.state_dict()}, checkpoint)  # fmt: skip
        step(ddp, optimizer, next(batches))
        if rank == 1 and number + 1 == dies_after:
            os._exit(7)
    handle.finalize()
    handle.close()
    return {name: one.clone() for name, one in model.state_dict().items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dies-after", type=int, default=0)
    args = parser.parse_args()
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=5))
    end = train(dist.get_rank(), dist.get_world_size(), args.folder, args.dies_after)
    torch.save(end, args.folder / f"end-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
