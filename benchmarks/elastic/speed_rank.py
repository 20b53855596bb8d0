"""One rank of speed.py: a step's time under several methods in turns, or one method's loss. Rank 0 reports in JSON."""
import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import thinwire
import torch
import torch.distributed as dist
from thinwire import Dense, Elastic
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common import task

task.BATCH = 24  # windows a rank: computing takes about as long as exchanging does at some 500 Mbit/s
BETAS = (1.0, 0.8, 0.5, 0.0)
SPARSE = thinwire.BlockSparse("nominated", density=0.04, block_size=16)
METHODS = {
    "noop": None, "plain DDP": None,
    **{f"beta {beta:g}": Elastic(Dense(), beta) for beta in BETAS},
    "beta 0.5, arrival": Elastic(Dense(), 0.5, decide="arrival"),
    "nominated 4 %": SPARSE,
    "nominated 4 %, beta 0.5": Elastic(SPARSE, 0.5),
}  # fmt: skip
TURN, SKIPPED = 7, 2  # steps in a turn, and how many of them are not counted


class Contestant:
    """A model and its optimizer under one method, with what its steps took."""

    def __init__(self, name, make_optimizer):
        torch.manual_seed(0)
        self.model = task.ByteTransformer(layers=2)
        self.ddp = DistributedDataParallel(self.model, init_sync=False, bucket_cap_mb=1)
        self.optimizer = make_optimizer(self.model.parameters())
        self.handle, self.seconds = None, []
        if name == "noop":
            self.ddp.register_comm_hook(None, noop_hook)
        elif METHODS[name] is not None:
            self.handle = thinwire.attach(self.ddp, METHODS[name], optimizer=self.optimizer)

    def step(self, batch):
        self.optimizer.zero_grad()
        loss = self.ddp(batch)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def turn(self, batches):
        for i in range(TURN):
            begin = time.perf_counter()
            self.step(next(batches))
            if i >= SKIPPED:
                self.seconds.append(time.perf_counter() - begin)


class Alone:
    """Communication alone: what the synchronous method exchanges in a step, with nothing else to do."""

    def __init__(self, contestant):
        self.seconds, self._buckets = [], {}
        self._channel, self._step = contestant.handle._channel, 0
        average = self._channel.average

        def noted(flat, names, numels, *rest):
            self._buckets[names] = numels
            return average(flat, names, numels, *rest)

        self._channel.average = noted
        self._average = average

    def forget_buckets(self):
        """Those of the first step: DDP has other ones from the second on."""
        self._buckets.clear()

    def turn(self, batches):
        for i in range(TURN):
            flats = [torch.randn(sum(numels)) for numels in self._buckets.values()]
            begin = time.perf_counter()
            futures = [self._average(flat, names, numels, i) for flat, (names, numels) in
                       zip(flats, self._buckets.items())]  # fmt: skip
            for future in futures:
                future.wait()
            if i >= SKIPPED:
                self.seconds.append(time.perf_counter() - begin)


def speed(args, rank, n):
    batches = task.batches(task.standard_library()[0], rank, n)
    plain_sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.01)
    contestants = {name: Contestant(name, plain_sgd) for name in METHODS}
    alone = Alone(contestants["beta 1"])
    for contestant in contestants.values():
        contestant.step(next(batches))
    alone.forget_buckets()
    for contestant in contestants.values():
        for _ in range(2):
            contestant.step(next(batches))
    contestants["communication alone"] = alone
    for _ in range(args.turns):
        for contestant in contestants.values():
            dist.barrier()
            contestant.turn(batches)
            if getattr(contestant, "handle", None):
                contestant.handle.consistency()  # all that is under way lands: it is not the next one's to carry
            dist.barrier()
    for name, contestant in contestants.items():
        everyone = [None] * n
        dist.all_gather_object(everyone, contestant.seconds)
        if rank == 0:
            steps = [1e3 * max(step) for step in zip(*everyone)]
            low, median, high = statistics.quantiles(steps, n=4)
            late = contestant.handle.stats() if getattr(contestant, "handle", None) else {}
            share = late["late_buckets"] / late["buckets"] if late.get("buckets") else 0.0
            print(json.dumps({"method": name, "step_ms": statistics.mean(steps), "median_ms": median,
                              "quartiles_ms": [low, high], "late": share}), flush=True)  # fmt: skip


def loss(args, rank, n):
    """The held-out loss every few steps. Late buckets are agreed upon, so it does not depend on the network."""
    training, held_out = task.standard_library(args.seed)
    batches = task.batches(training, rank, n, args.seed)
    held_out = task.HeldOut(held_out, rank, n, windows=64, seed=args.seed)
    contestant = Contestant(args.method, lambda parameters: torch.optim.AdamW(parameters, lr=args.lr))
    curve, worst = [], 0.0
    for step in range(1, args.steps + 1):
        contestant.step(next(batches))
        if step % args.every == 0:
            worst = max(worst, contestant.handle.consistency()["inconsistency_max"])
            with contestant.handle.evaluating():
                part = held_out.part(contestant.model)
            dist.all_reduce(part)
            curve.append((step, float(part)))
    if rank == 0:
        print(json.dumps({"method": args.method, "lr": args.lr, "seed": args.seed, "inconsistency": worst,
                          "curve": curve}), flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["speed", "loss"])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--method", choices=METHODS, default="beta 1")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    {"speed": speed, "loss": loss}[args.what](args, rank, n)
    task.leave()


if __name__ == "__main__":
    main()
