"""One rank of predictions.py: what thinwire.advise predicts for the demo's model, and then what its steps take."""
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
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common import task
from suite.methods import CONTESTANTS

TURN, SKIPPED = 5, 1  # steps of a method before the next has its turn, and how many of them are not counted
WARM_UP = 4  # steps at the beginning: rebuilt buckets, PowerSGD's dense steps
# Label, and what thinwire.advise calls it; None is plain DDP, which it always predicts.
METHODS = {
    "plain DDP": None,
    "fp16 hook": "fp16",
    "PowerSGD, rank 1": "powersgd-1",
    "BlockSparse()": thinwire.BlockSparse(),
    "nominated 1 %": thinwire.BlockSparse("nominated", density=0.01),
}
ALONE = "no exchange"


class Contestant:
    """A model and its optimizer under one method, with what its steps took."""

    def __init__(self, label):
        torch.manual_seed(0)
        self.model = task.ByteTransformer()
        what = None if label == ALONE else METHODS[label]
        # With two buckets in flight, PowerSGD's hook hangs on Gloo.
        self.ddp = DistributedDataParallel(self.model, bucket_cap_mb=1000 if what == "powersgd-1" else None)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.seconds = []
        if label == ALONE or isinstance(what, str):
            CONTESTANTS["noop" if label == ALONE else what].attach(self.ddp, self.optimizer)
        elif what is not None:
            thinwire.attach(self.ddp, what, optimizer=self.optimizer)

    def step(self, batches):
        self.optimizer.zero_grad()
        self.ddp(next(batches)).backward()
        self.optimizer.step()

    def turn(self, batches, steps, counted=True):
        dist.barrier()
        for i in range(steps):
            begin = time.perf_counter()
            self.step(batches)
            if counted and i >= SKIPPED:
                self.seconds.append(time.perf_counter() - begin)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    batches = task.batches(task.standard_library()[0], rank, n)

    asked, asked_for = Contestant("plain DDP"), [what for what in METHODS.values() if what is not None]
    contestants = {label: Contestant(label) for label in (ALONE, *METHODS)}
    for contestant in contestants.values():
        contestant.turn(batches, WARM_UP, counted=False)
    advices, took = [], []
    for _ in range(args.turns):
        begin = time.perf_counter()
        advices.append(thinwire.advise(asked.ddp, lambda: next(batches), lambda ddp, batch: ddp(batch),
                                       methods=asked_for, optimizer=asked.optimizer))  # fmt: skip
        took.append(time.perf_counter() - begin)
        if rank == 0:
            print(advices[-1], file=sys.stderr, flush=True)
        for contestant in contestants.values():
            contestant.turn(batches, TURN)
    for label, contestant in contestants.items():
        everyone = [None] * n
        dist.all_gather_object(everyone, contestant.seconds)
        steps = [1e3 * max(step) for step in zip(*everyone)]  # the slowest rank's
        if label == ALONE:
            predicted = [(advice.compute_s, 0) for advice in advices]
        else:
            what = METHODS[label] or "plain DDP"
            predicted = [(row.step_s, row.bytes_sent) for advice in advices for row in advice.rows if row.what == what]
        said, sent = (statistics.median(column) for column in zip(*predicted))
        links = {"mbit": [8e-6 * advice.link.bytes_per_s for advice in advices],
                 "latency_ms": [1e3 * advice.link.latency_s for advice in advices],
                 "all_to_all": [advice.link.all_to_all for advice in advices]}  # fmt: skip
        if rank == 0:
            print(json.dumps({"method": label, "predicted_ms": 1e3 * said, "measured_ms": statistics.median(steps),
                              "predictions_ms": [1e3 * step for step, _ in predicted],
                              "steps_ms": [round(step, 1) for step in steps], "predicted_bytes": sent,
                              "link": links, "advise_s": max(took)}), flush=True)  # fmt: skip
    task.leave()


if __name__ == "__main__":
    main()
