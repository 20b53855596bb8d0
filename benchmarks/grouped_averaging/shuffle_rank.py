"""One rank of shuffle.py: the speed of several methods in turns, or the quality of one. Rank 0 reports in JSON."""
import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

import thinwire
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common import task
from thinnet import interface_bytes

SPEED = {
    "noop": None,
    "plain DDP": None,
    "DS-Sync, groups of 2": thinwire.DivideAndShuffle(group_size=2),
    "DS-Sync, groups of 4": thinwire.DivideAndShuffle(group_size=4),
    "BlockSparse()": thinwire.BlockSparse(),
    "nominated 1 %": thinwire.BlockSparse("nominated", density=0.01),
}
QUALITY = {
    "plain DDP": None,
    "DS-Sync": thinwire.DivideAndShuffle(group_size=2),
    "gradients in shuffled groups": thinwire.DivideAndShuffle(group_size=2),
}


def attach(name, ddp, optimizer, methods):
    """Make ddp use the named method; thinwire's handle or None."""
    if name in ("noop", "gradients in shuffled groups"):
        ddp.register_comm_hook(None, noop_hook)
    elif methods[name] is not None:
        return thinwire.attach(ddp, methods[name], optimizer=optimizer)


# ---- speed ----


class Contestant:
    def __init__(self, name):
        torch.manual_seed(0)
        model = task.ByteTransformer(layers=2)
        self.ddp = DistributedDataParallel(model, init_sync=False)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self.handle = attach(name, self.ddp, self.optimizer, SPEED)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.seconds, self.sent = [], []

    def step(self, batch):
        self.optimizer.zero_grad()
        self.ddp(batch).backward()
        self.optimizer.step()


def speed(args, rank, n):
    """A turn of some steps each. The straggler sleeps in its step: one rank in all, or another in each."""
    batches = task.batches(task.standard_library()[0], rank, n)
    contestants = {name: Contestant(name) for name in SPEED}
    for contestant in contestants.values():
        for _ in range(3):
            contestant.step(next(batches))
    for _ in range(args.turns):
        for contestant in contestants.values():
            dist.barrier()
            before, begin = interface_bytes(), time.perf_counter()
            for step in range(args.steps):
                late = random.Random(step).randrange(n) if args.straggler == "random" else int(args.straggler)
                time.sleep(args.sleep if late == rank else 0.0)
                contestant.step(next(batches))
            contestant.seconds.append((time.perf_counter() - begin) / args.steps)
            if before:
                contestant.sent.append((interface_bytes().tx - before.tx) / args.steps)
            dist.barrier()
    for name, contestant in contestants.items():
        mine = {"seconds": contestant.seconds, "sent": contestant.sent}
        everyone = [None] * n
        dist.all_gather_object(everyone, mine)
        others = [one for r, one in enumerate(everyone) if str(r) != args.straggler]
        if rank == 0:
            per_turn = [statistics.mean(one["seconds"][t] for one in others) for t in range(args.turns)]
            sent = [byte for one in everyone for byte in one["sent"]]
            print(json.dumps({
                "method": name, "step_ms": 1e3 * statistics.median(per_turn),
                "parameters": contestant.parameters,
                "sent": statistics.mean(sent) if sent else None,
            }), flush=True)  # fmt: skip


# ---- quality ----


class Digits(nn.Module):
    """A small CNN with BatchNorm; called with (images, labels) it gives the mean loss."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip

    def forward(self, batch):
        images, labels = batch
        return nn.functional.cross_entropy(self.layers(images), labels)


class DigitsTask:
    """Test error in percent: the lower the better, as with losses."""

    steps, label = 150, "digits CNN with BatchNorm, SGD with momentum: test error, %"

    def __init__(self, rank, n, seed):
        images, labels = load_digits(return_X_y=True)
        images = torch.as_tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        labels = torch.as_tensor(labels)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        self.held_out = images[order[1200:]], labels[order[1200:]]
        mine = order[:1200][rank::n]
        self.images, self.labels = images[mine], labels[mine]
        self.generator = torch.Generator().manual_seed(1000 * seed + rank)

    def model(self):
        return Digits()

    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    def batch(self):
        chosen = torch.randint(len(self.labels), (16,), generator=self.generator)
        return self.images[chosen], self.labels[chosen]

    @torch.no_grad()
    def evaluate(self, model):
        model.eval()
        images, labels = self.held_out
        wrong = (model.layers(images).argmax(1) != labels).float().mean()
        model.train()
        return 100 * float(wrong)


class TextTask:
    steps, label = 300, "byte-level transformer (0.5 M), AdamW: held-out loss"

    def __init__(self, rank, n, seed):
        training, held_out = task.standard_library(seed)
        self.batches = task.batches(training, rank, n, seed)
        self.held_out = task.HeldOut(held_out, windows=64, seed=seed)

    def model(self):
        return task.ByteTransformer(width=128, layers=2)

    def optimizer(self, model):
        return torch.optim.AdamW(model.parameters(), lr=2e-3)

    def batch(self):
        return next(self.batches)

    def evaluate(self, model):
        return float(self.held_out.part(model))


TASKS = {"digits": DigitsTask, "text": TextTask}


def quality(args, rank, n):
    problem = TASKS[args.task](rank, n, args.seed)
    torch.manual_seed(args.seed)
    model = problem.model()
    ddp = DistributedDataParallel(model)
    optimizer = problem.optimizer(model)
    handle = attach(args.method, ddp, optimizer, QUALITY)
    averager = None
    if args.method == "gradients in shuffled groups":
        averager = thinwire.DivideAndShuffleAverager(QUALITY[args.method])
    for _ in range(args.steps or problem.steps):
        optimizer.zero_grad()
        ddp(problem.batch()).backward()
        if averager is not None:
            gradients = [nn.Parameter(p.grad) for p in model.parameters()]
            averager.average_parameters(gradients)
            for p, gradient in zip(model.parameters(), gradients):
                p.grad.copy_(gradient.data)
        optimizer.step()
    replicas = [None] * n
    dist.all_gather_object(replicas, problem.evaluate(model))
    found = {"single replica": statistics.mean(replicas)}
    if handle is not None:
        found["consensus_distance"] = handle.consistency()["consensus_distance"]
        with handle.evaluating():
            found["average"] = problem.evaluate(model)
    if rank == 0:
        print(json.dumps({"task": args.task, "method": args.method, "seed": args.seed} | found), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["speed", "quality"])
    parser.add_argument("--steps", type=int, default=0, help="in a turn, or in all; 0: 16, or the task's own")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--straggler", default="-1", help="the rank that sleeps, or 'random': another in each step")
    parser.add_argument("--sleep", type=float, default=0.0, help="seconds")
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--method", choices=QUALITY, default="plain DDP")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if args.what == "speed":
        args.steps = args.steps or 16
        speed(args, rank, n)
    else:
        quality(args, rank, n)
    task.leave()


if __name__ == "__main__":
    main()
