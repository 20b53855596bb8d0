"""One rank of train.py: trains what it is asked for, one after another. Rank 0 reports each in a line of JSON.

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
from common import task as tasks

from suite.tasks import ADAMW, TASKS, Task
from suite.ways import dense_bytes, make

HOPELESS = 20.0  # a loss that ends a run; guessing a byte has 5.5
PATIENCE = 300  # seconds between two evaluations, after which it is a hang


def optimizer_of(task: Task, run: dict, parameters) -> torch.optim.Optimizer:
    """momentum: of SGD, or Adam's first beta."""
    if task.optimizer == ADAMW:
        return torch.optim.AdamW(parameters, lr=run["lr"], betas=(run["momentum"], 0.95), fused=True)
    return torch.optim.SGD(parameters, lr=run["lr"], momentum=run["momentum"])


def rate(step: int, steps: int, warm_up: int) -> float:
    """The share of the learning rate in a step, from 0: it rises, and falls to 0 in a straight line."""
    return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


def train(run: dict, root: Path | None) -> dict:
    """The run, with the held-out loss at its end and on the way there, and what was sent."""
    task, rank, n = TASKS[run["task"]], dist.get_rank(), dist.get_world_size()
    data = task.data(rank, n, run["seed"], task.batch, root)
    torch.manual_seed(run["seed"])
    model = task.model()
    optimizer = optimizer_of(task, run, model.parameters())
    way = make(run["method"], model, optimizer, run | {"dense_steps": task.warm_up})
    curve, loss, begin = [], math.inf, time.perf_counter()
    for step in range(1, run["steps"] + 1):
        for group in optimizer.param_groups:  # a scheduler warns where steps are left out, to accumulate
            group["lr"] = run["lr"] * rate(step - 1, run["steps"], task.warm_up)
        way.step(data.batch())
        if step % task.every == 0 and step < run["steps"]:
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            curve.append((step, held_out_loss(way, data)))
            if not curve[-1][1] < HOPELESS:  # also NaN: the same on all ranks
                break
    else:
        sent = way.bytes_sent()
        way.finish()
        loss = held_out_loss(way, data)
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
        "data": digest(data.tensors()),
        "ranks": n,
        "batch": task.batch,
    }
    way.close()
    return run | found


def held_out_loss(way, data) -> float:
    """Of what a way would give its user, over all ranks."""
    with way.evaluating():
        loss = data.held_out_part(way.model)
    dist.all_reduce(loss)
    return round(float(loss), 5)


def digest(tensors: list[torch.Tensor]) -> str:
    """12 digits that differ where the data do, as the text of another Python's library does."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().numpy())
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
    tasks.leave()


if __name__ == "__main__":
    main()
