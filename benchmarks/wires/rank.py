"""One rank of run.py: trains one model after another, each to its end. Rank 0 reports each in a line of JSON."""
import argparse
import faulthandler
import json
import math
import sys
import time
from pathlib import Path

import thinwire
import torch
import torch.distributed as dist
from thinwire import BlockSparse, Dense
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common import task

task.BATCH = 8  # windows a rank
WARM_UP = 50  # steps in which the learning rate rises; after them it falls to 0, linearly
WINDOWS = 512  # of held-out text, the same for all seeds
WIRES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # else by its name
PATIENCE = 120  # seconds for 50 steps, after which it is a hang


def averaging(run: dict):
    """The method of a run, None for plain DDP."""
    wire = WIRES.get(run["wire"], run["wire"])
    if run["density"] is not None:
        return BlockSparse("nominated", density=run["density"], block_size=16, wire_dtype=wire)
    return None if run["wire"] == "float32" else Dense(wire_dtype=wire, memory="error_feedback")


def optimizer_of(run: dict, parameters) -> torch.optim.Optimizer:
    """momentum: of SGD, or Adam's first beta."""
    if run["optimizer"] == "AdamW":
        return torch.optim.AdamW(parameters, lr=run["lr"], betas=(run["momentum"], 0.95))
    return torch.optim.SGD(parameters, lr=run["lr"], momentum=run["momentum"])


def rate(step: int, steps: int) -> float:
    """The share of the learning rate in a step, from 0."""
    return min((step + 1) / WARM_UP, (steps - step) / max(1, steps - WARM_UP))


def train(run: dict, rank: int, n: int) -> dict:
    """The run, with the held-out loss at its end and what was sent."""
    torch.manual_seed(run["seed"])
    model = task.ByteTransformer(width=104, layers=3)  # 0.45 million parameters
    training, held_out = task.standard_library()
    batches = task.batches(training, rank, n, run["seed"])
    ddp = DistributedDataParallel(model, init_sync=False)
    optimizer = optimizer_of(run, model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, run["steps"]))
    method = averaging(run)
    handle = thinwire.attach(ddp, method, optimizer=optimizer) if method else None
    begin = time.perf_counter()
    for step in range(run["steps"]):
        if step % 50 == 0:
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
        optimizer.zero_grad()
        ddp(next(batches)).backward()
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - begin
    loss = task.HeldOut(held_out, rank, n, windows=WINDOWS).part(model)
    dist.all_reduce(loss)
    compression = 1.0
    if handle:
        compression = handle.stats()["compression"]
        handle.close()
    return run | {"loss": float(loss) if math.isfinite(loss) else None, "compression": compression,
                  "seconds": round(seconds, 1)}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=json.loads, help="JSON: what to train")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for run in args.runs:
        result = train(run, dist.get_rank(), dist.get_world_size())
        if dist.get_rank() == 0:
            print(json.dumps(result), flush=True)
    task.leave()


if __name__ == "__main__":
    main()
