"""One rank of train.py: trains a list of runs one after the other, or times steps of several methods in turns.

Rank 0 reports in lines of JSON: {"begin": i} before the i-th run and {"end": i, ...} with what came of it.
"""
import argparse
import contextlib
import faulthandler
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from thinnet import interface_bytes

from suite.methods import CONTESTANTS, DDP
from suite.tasks import TASKS
from suite.worlds import Gloo, Horovod

STARTING = 180  # seconds that a busy machine may take until the first step
UNTYPICAL = 5  # first steps of a run, in which DDP rebuilds its buckets and some methods still send all
TURN = 6  # steps of one method before the next has its turn; the first of them is not counted
SECONDS = ("encode_s", "exchange_s", "decode_s")


class Trainee:
    """A model, its data and its optimizer under one method, with what its steps took and sent."""

    def __init__(self, method: str, task: str, options: dict, seed: int, rank: int, n: int):
        self.contestant, task = CONTESTANTS[method], TASKS[task]
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # the replicas are equal without a broadcast
            self.model = task.model()
        self.data = task.data(rank, n, seed)
        self.optimizer = getattr(torch.optim, task.optimizer)(self.model.parameters(), **task.options | options)
        self.handle = None
        if self.contestant.door == DDP:
            cap = self.contestant.bucket_cap_mb
            self.called = DistributedDataParallel(self.model, init_sync=False, bucket_cap_mb=cap)
            self.handle = self.contestant.attach(self.called, self.optimizer)
        else:
            import horovod.torch as hvd

            compression = self.contestant.compression(list(self.model.named_parameters()))
            self.handle = compression if hasattr(compression, "stats") else None
            self.called = self.model
            self.optimizer = hvd.DistributedOptimizer(
                self.optimizer, named_parameters=self.model.named_parameters(), compression=compression
            )
        self.seconds, self.sent, self.received = [], [], []
        self._counted_from, self._before = 0, self._stats()

    def step(self) -> None:
        before, begin = interface_bytes(), time.perf_counter()
        self.optimizer.zero_grad()
        self.called(self.data.batch()).backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - begin)
        if before:
            after = interface_bytes()
            self.sent.append(after.tx - before.tx)
            self.received.append(after.rx - before.rx)

    def count_from_here(self) -> None:
        """The steps so far were not typical."""
        self._counted_from, self._before = len(self.seconds), self._stats()

    def settle(self) -> None:
        """All that is under way lands: it is not the next method's to carry."""
        with self._whole():
            pass

    def held_out_loss(self, world) -> float:
        """Of the mean of the replicas where they differ, and with nothing late; a collective."""
        with self._whole():
            return float(world.sum(self.data.held_out_part(self.model)))

    def result(self, world, uncounted: int = 0) -> dict:
        """Of the steps counted: times in ms and bytes a step, means over the ranks.

        uncounted: so many of them are not in the figures, the first of each turn. stats_bytes is rank 0's, of all.
        """
        counted = slice(self._counted_from, None)
        everyone = world.gather([figures[counted] for figures in (self.seconds, self.sent, self.received)])
        seconds, sent, received = ([statistics.mean(step) for step in zip(*column)] for column in zip(*everyone))
        if uncounted:
            keep = lambda figures: [f for i, f in enumerate(figures) if i % (len(figures) // uncounted)]
            seconds, sent, received = keep(seconds), keep(sent), keep(received)
        low, median, high = statistics.quantiles(seconds, n=4)
        found = {
            "step_ms": {"mean": 1e3 * statistics.mean(seconds), "median": 1e3 * median, "q1": 1e3 * low,
                        "q3": 1e3 * high}, "counted_steps": len(seconds),
            "sent_bytes": statistics.mean(sent) if sent else None,
            "received_bytes": statistics.mean(received) if received else None,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }  # fmt: skip
        if uncounted:
            turn = len(seconds) // uncounted
            each = [round(1e3 * s, 2) for s in seconds]
            found["turns_ms"] = [each[i : i + turn] for i in range(0, len(each), turn)]
        now = self._stats()
        steps = len(self.seconds) - self._counted_from
        if now:
            found["stats_bytes"] = (now["bytes_sent"] - self._before["bytes_sent"]) / steps
        return found | {name.replace("_s", "_ms"): 1e3 * (now[name] - self._before[name]) / steps
                        for name in SECONDS if name in now}  # fmt: skip

    def _stats(self):
        return dict(self.handle.stats()) if self.handle is not None else {}

    def _whole(self):
        return contextlib.nullcontext() if self.handle is None else self.handle.evaluating()


class Watch:
    """Ends this rank with a traceback where nothing has happened for so many seconds."""

    def __init__(self, patience: float):
        self.patience = patience
        self._fed = 0.0
        self.feed(STARTING)

    def feed(self, more: float = 0.0) -> None:
        if more or time.monotonic() - self._fed > 1:
            self._fed = time.monotonic()
            faulthandler.dump_traceback_later(self.patience + more, exit=True)


def train(run, world, watch):
    task = TASKS[run["task"]]
    trainee = Trainee(run["method"], run["task"], run["options"], run["seed"], world.rank, world.n)
    curve = [(0, 0.0, trainee.held_out_loss(world))]
    world.barrier()
    for step in range(1, run["steps"] + 1):
        trainee.step()
        watch.feed()
        if step == min(UNTYPICAL, run["steps"] // 2):
            trainee.count_from_here()
        if step % task.every == 0 or step == run["steps"]:
            loss = trainee.held_out_loss(world)
            curve.append((step, round(sum(trainee.seconds), 4), round(loss, 5)))
            if not loss < 1e4:  # also NaN: the same on all ranks
                break
    return trainee.result(world) | {"curve": curve}


def speed(run, world, watch):
    """A line for each method of the run, their steps interleaved; "turn" says whose turn it is."""
    say = lambda **said: world.rank or print(json.dumps(said), flush=True)
    trainees = {}
    for method in run["methods"]:
        say(turn=method)
        options = TASKS[run["task"]].without_momentum[0]  # which suits all: some bring their own
        trainees[method] = Trainee(method, run["task"], options, run["seed"], world.rank, world.n)
        for _ in range(4):  # rebuilt buckets, dense first steps
            trainees[method].step()
            watch.feed()
        trainees[method].count_from_here()
    for _ in range(run["turns"]):
        for method, trainee in trainees.items():
            say(turn=method)
            world.barrier()
            for _ in range(TURN):
                trainee.step()
                watch.feed()
            trainee.settle()
            world.barrier()
    for method, trainee in trainees.items():
        found = trainee.result(world, uncounted=run["turns"])
        say(method=method, **found)
    return {}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", help="a file: a JSON list of runs, as plan.py describes them")
    parser.add_argument("--patience", type=float, default=60, help="seconds without a step that make a hang")
    args = parser.parse_args()
    with open(args.runs) as file:
        runs = json.load(file)
    torch.set_num_threads(1)
    watch = Watch(args.patience)
    world = (Gloo if runs[0]["door"] == DDP else Horovod)(2 * (args.patience + STARTING))
    for i, run in enumerate(runs):
        watch.feed(STARTING)
        if world.rank == 0:
            print(json.dumps({"begin": i}), flush=True)
        found = {"train": train, "speed": speed}[run["kind"]](run, world, watch)
        if world.rank == 0:
            print(json.dumps({"end": i} | found), flush=True)
        world.barrier()
    # Not the destructors: see leave() in common/task.py.
    world.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
