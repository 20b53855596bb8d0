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

TURN, SKIPPED = 3, 1  # steps of a method before the next has its turn, and how many of them are not counted
WARM_UP = 3  # steps at the beginning: rebuilt buckets, PowerSGD's dense steps
# Label, and what thinwire.advise calls it; None is plain DDP, which it always predicts.
METHODS = {
    "plain DDP": None,
    "fp16 hook": "fp16",
    "PowerSGD, rank 1": "powersgd-1",
    "BlockSparse()": thinwire.BlockSparse(),
    "nominated 4 %, int4": thinwire.BlockSparse("nominated", density=0.04, wire_dtype="int4"),
    "LocalSteps(every=16)": thinwire.LocalSteps(every=16),
}
ALONE = "no exchange"


class Contestant:
    """A model and its optimizer under one method, with what its steps took, in seconds.

    steps: of a turn, the first ``skipped`` of which are not counted.
    """

    def __init__(self, label, batches):
        torch.manual_seed(0)
        self.model = task.ByteTransformer()
        what = None if label == ALONE else METHODS[label]
        # With two buckets in flight, PowerSGD's hook hangs on Gloo.
        self.ddp = DistributedDataParallel(self.model, bucket_cap_mb=1000 if what == "powersgd-1" else None)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.seconds, self.batches = [], batches
        self.rounds = isinstance(what, thinwire.LocalSteps)
        self.steps, self.skipped, warm_up = TURN, SKIPPED, WARM_UP
        if self.rounds:  # a turn begins and ends half-way between two exchanges
            self.steps, self.skipped, warm_up = what.every, 0, what.every + what.every // 2
        if label == ALONE or isinstance(what, str):
            CONTESTANTS["noop" if label == ALONE else what].attach(self.ddp, self.optimizer)
        elif what is not None:
            thinwire.attach(self.ddp, what, optimizer=self.optimizer)
        for _ in range(warm_up):
            self.step()

    def step(self):
        self.optimizer.zero_grad()
        self.ddp(next(self.batches)).backward()
        self.optimizer.step()

    def turn(self):
        dist.barrier()
        for i in range(self.steps):
            begin = time.perf_counter()
            self.step()
            if i >= self.skipped:
                self.seconds.append(time.perf_counter() - begin)

    def measured(self, everyone):
        """Seconds of a step, from those of every rank: the median of the slowest ones', or of rounds the mean of the
        slowest rank, as they wait for each other once a round."""
        if self.rounds:
            return max(map(statistics.mean, everyone))
        return statistics.median(max(step) for step in zip(*everyone))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    batches = task.batches(task.standard_library()[0], rank, n)

    asked_for = [what for what in METHODS.values() if what is not None]
    contestants = {label: Contestant(label, batches) for label in (ALONE, *METHODS)}
    asked, advices, took = contestants["plain DDP"], [], []
    for _ in range(args.turns):
        begin = time.perf_counter()
        advices.append(thinwire.advise(asked.ddp, lambda: next(batches), lambda ddp, batch: ddp(batch),
                                       methods=asked_for, optimizer=asked.optimizer))  # fmt: skip
        took.append(time.perf_counter() - begin)
        if rank == 0:
            print(advices[-1], file=sys.stderr, flush=True)
        for contestant in contestants.values():
            contestant.turn()
    for label, contestant in contestants.items():
        everyone = [None] * n
        dist.all_gather_object(everyone, contestant.seconds)
        steps = [1e3 * max(step) for step in zip(*everyone)]
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
            print(json.dumps({"method": label, "predicted_ms": 1e3 * said,
                              "measured_ms": 1e3 * contestant.measured(everyone),
                              "predictions_ms": [1e3 * step for step, _ in predicted],
                              "steps_ms": [round(step, 1) for step in steps], "predicted_bytes": sent,
                              "link": links, "advise_s": max(took)}), flush=True)  # fmt: skip
    task.leave()


if __name__ == "__main__":
    main()
