"""One rank of run.py: trains what it is asked for, one after another. Rank 0 reports each in a line of JSON.

Rank 0 is asked in lines of JSON on its standard input, whose end is the end.
"""
import argparse
import faulthandler
import hashlib
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common import task

from local.tasks import BATCH, TASKS
from local.ways import WARM_UP, dense_bytes, make

task.BATCH = BATCH
WINDOWS = 512  # of held-out text, the same in all runs
EVERY = 50  # steps between two evaluations
HOPELESS = 20.0  # a loss that ends a run; guessing has 5.5
PATIENCE = 300  # seconds for 50 steps, after which it is a hang


def optimizer_of(run: dict, parameters) -> torch.optim.Optimizer:
    """momentum: of SGD, or Adam's first beta."""
    if TASKS[run["task"]].optimizer == "AdamW":
        return torch.optim.AdamW(parameters, lr=run["lr"], betas=(run["momentum"], 0.95), fused=True)
    return torch.optim.SGD(parameters, lr=run["lr"], momentum=run["momentum"])


def rate(step: int, steps: int) -> float:
    """The share of the learning rate in a step, from 0: it rises, and falls to 0 in a straight line."""
    return min((step + 1) / WARM_UP, (steps - step) / max(1, steps - WARM_UP))


class Evaluation:
    """The held-out loss of what a way would give its user, over all ranks."""

    def __init__(self, text: torch.Tensor):
        self.held_out = task.HeldOut(text, dist.get_rank(), dist.get_world_size(), windows=WINDOWS)

    def __call__(self, way) -> float:
        with way.evaluating():
            loss = self.held_out.part(way.model)
        dist.all_reduce(loss)
        return round(float(loss), 5)


def train(run: dict, root: Path | None) -> dict:
    """The run, with the held-out loss at its end and on the way there, and what was sent."""
    training, held_out = task.standard_library(root=root)
    torch.manual_seed(run["seed"])
    model = TASKS[run["task"]].model()
    batches = task.batches(training, dist.get_rank(), dist.get_world_size(), run["seed"])
    optimizer = optimizer_of(run, model.parameters())
    way = make(run["method"], model, optimizer, run)
    evaluate = Evaluation(held_out)
    curve, loss, begin = [], math.inf, time.perf_counter()
    for step in range(1, run["steps"] + 1):
        for group in optimizer.param_groups:  # a scheduler warns where steps are left out, to accumulate
            group["lr"] = run["lr"] * rate(step - 1, run["steps"])
        way.step(next(batches))
        if step % EVERY == 0 and step < run["steps"]:
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            curve.append((step, evaluate(way)))
            if not curve[-1][1] < HOPELESS:  # also NaN: the same on all ranks
                break
    else:
        sent = way.bytes_sent()
        way.finish()
        loss = evaluate(way)
        curve.append((run["steps"], loss))
    dense = run["steps"] * dense_bytes(model)
    finished = math.isfinite(loss)
    found = {
        "loss": loss if finished else None,
        "curve": [(step, loss) for step, loss in curve if math.isfinite(loss)],
        "parameters": sum(p.numel() for p in model.parameters()),
        # Of the steps; and with what a way sends once, at its end.
        "compression": dense / sent if finished and sent else None,
        "compression_whole": dense / way.bytes_sent() if finished and sent else None,
        "seconds": round(time.perf_counter() - begin, 1),
        "text": digest(training, held_out),
        "ranks": dist.get_world_size(),
        "batch": BATCH,
    }
    way.close()
    return run | found


def digest(*texts: torch.Tensor) -> str:
    """12 digits that differ where the text is of another Python's library."""
    found = hashlib.sha256()
    for text in texts:
        found.update(text.numpy())
    return found.hexdigest()[:12]


def asked() -> dict | None:
    """The next run, the same on all ranks; None at the end."""
    line = sys.stdin.readline() if dist.get_rank() == 0 else ""
    run = [json.loads(line) if line else None]
    dist.broadcast_object_list(run, src=0)
    return run[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="the folder of another Python's standard library")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    while run := asked():
        result = train(run, args.text)
        faulthandler.cancel_dump_traceback_later()
        if dist.get_rank() == 0:
            print(json.dumps(result), flush=True)
    task.leave()


if __name__ == "__main__":
    main()
