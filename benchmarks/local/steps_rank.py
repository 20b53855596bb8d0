"""One rank of steps.py: two models under several ways in turn. Rank 0 reports every turn in a line of JSON.

A turn of a way with rounds is two of them or more and ends between two exchanges, so that none is under way in the turn
of another; of the others it is as many steps, or a few where they are long.
"""
import argparse
import faulthandler
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common import task
from common.turns import in_turns, take_turn

from local import ways
from local.tasks import BATCH, SMALL

# What makes a model, and a rank's batch.
MODELS = {
    "small": (SMALL, BATCH),  # 0.45 million parameters, as run.py trains it
    "large": (task.ByteTransformer, 4),  # 3.24 million, as the other step times have it
}
NOOP = ways.ALONE
# How many steps there are from one exchange to the next, for those that do not exchange in every step.
EVERY = {ways.LOCAL: 16, ways.LATE: 16, ways.FRAGMENTS: 4, ways.LOCAL_WAITS: 16, ways.LOCAL_8: 8, ways.ACCUMULATION: 16,
         ways.POST_LOCAL: 16}  # fmt: skip
METHODS = (ways.DDP, ways.POWERSGD, ways.NOMINATED, *EVERY)
TURN, FEW, LONG = 32, 4, 0.5  # steps of a turn; where a step takes so many seconds
UNTYPICAL = 4  # first steps: DDP rebuilds its buckets, PowerSGD still sends all
RUN = {"outer_momentum": 0.7, "dense_steps": 2}
PATIENCE = 300  # seconds for a turn, after which it is a hang


class Contestant:
    """A model and its optimizer under one way."""

    def __init__(self, name: str, make, batches):
        torch.manual_seed(0)
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        self._way, self._batches = ways.make(name, model, optimizer, RUN), batches
        self.handle = self._way.handle
        every = EVERY.get(name)
        for _ in range(ways.EVERY + every // 2 if every else UNTYPICAL):  # a turn begins and ends between exchanges
            self.step()
        self.turn = TURN if every else self._turn()

    def step(self) -> None:
        self._way.step(next(self._batches))

    def close(self) -> None:
        self._way.close()

    def _turn(self):
        begin = time.perf_counter()
        self.step()
        took = torch.tensor(time.perf_counter() - begin)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        return FEW if float(took) > LONG else TURN


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    dist.init_process_group("gloo")
    rank, n = dist.get_rank(), dist.get_world_size()
    batches = task.batches(task.standard_library()[0], rank, n)
    for model in args.models:
        make, task.BATCH = MODELS[model]
        contestants = {}
        for name in (NOOP, *args.methods):
            contestants[name] = Contestant(name, make, batches)
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
        for cycle, name in in_turns(list(args.methods), NOOP, args.cycles):
            row = take_turn(contestants[name], contestants[name].turn, skipped=0)
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            if rank == 0:
                print(json.dumps({"model": model, "cycle": cycle, "method": name, **row}), flush=True)
        for contestant in contestants.values():
            contestant.close()
    task.leave()


if __name__ == "__main__":
    main()
