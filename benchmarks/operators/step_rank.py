"""One rank of test_step_speed.py: the demo's model under several methods in turn, ten steps of each, over and over."""
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
from thinnet import interface_bytes

TURN = 10  # steps of one method before the next has its turn; the first of them is not counted
OURS = {
    "nominated": thinwire.BlockSparse("nominated", density=0.01),
    "nominated-bf16": thinwire.BlockSparse("nominated", density=0.01, wire_dtype=torch.bfloat16),
}
PEERS = {"noop": CONTESTANTS["noop"], "powersgd": CONTESTANTS["powersgd-1"]}


class Contestant:
    """A model and its optimizer under one method, with what its steps took."""

    def __init__(self, name: str):
        torch.manual_seed(0)
        self.model = task.ByteTransformer()
        # DDP's own buckets; PowerSGD's hook hangs on Gloo with two in flight, so it has one.
        self.ddp = DistributedDataParallel(self.model, bucket_cap_mb=1000 if name == "powersgd" else None)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.handle = None
        if name in OURS:
            self.handle = thinwire.attach(self.ddp, OURS[name])
        else:
            PEERS[name].attach(self.ddp, self.optimizer)
        self.seconds, self.bytes = [], []

    def step(self, batch) -> None:
        self.optimizer.zero_grad()
        self.ddp(batch).backward()
        self.optimizer.step()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--methods", nargs="+", default=["noop", *OURS, "powersgd"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    text, _ = task.standard_library()
    batches = task.batches(text, rank, n)
    contestants = {name: Contestant(name) for name in args.methods}
    for contestant in contestants.values():
        for _ in range(4):  # rebuilt buckets, PowerSGD's dense steps
            contestant.step(next(batches))
    for _ in range(args.turns):
        for contestant in contestants.values():
            dist.barrier()
            for i in range(TURN):
                before = interface_bytes(), contestant.handle and contestant.handle.stats()["bytes_sent"]
                begin = time.perf_counter()
                contestant.step(next(batches))
                if i:
                    contestant.seconds.append(time.perf_counter() - begin)
                    if before[0] and contestant.handle:
                        sent = interface_bytes().tx - before[0].tx
                        contestant.bytes.append((sent, contestant.handle.stats()["bytes_sent"] - before[1]))
            dist.barrier()
    if rank == 0:
        for name, contestant in contestants.items():
            row = {"method": name, "median_ms": 1e3 * statistics.median(contestant.seconds),
                   "quartiles_ms": [1e3 * q for q in statistics.quantiles(contestant.seconds, n=4)]}  # fmt: skip
            if contestant.handle:
                stats = contestant.handle.stats()
                row |= {k: 1e3 * stats[k] / stats["steps"] for k in ("encode_s", "exchange_s", "decode_s")}
                row["estimate"] = thinwire.estimate(OURS[name], contestant.model, n)["bytes_sent"]
                if contestant.bytes:
                    row["interface"], row["stats"] = (statistics.mean(column) for column in zip(*contestant.bytes))
            print("RESULT " + json.dumps(row), flush=True)
    task.leave()


if __name__ == "__main__":
    main()
