"""One rank of steps.py: a model under several ways in turn. Rank 0 reports every turn in a line of JSON.

A turn of a way with rounds is one of them or more and ends between two exchanges, so that none is under way in the turn
of another; of the others it is about a second, the same number of steps on every rank, and one before that is not
counted.
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
from common import task as tasks
from common.turns import in_turns, take_turn

from suite import ways
from suite.networks import IN_ONE, MODELS, NOOP
from suite.ways import WAYS

TURN_S, FEWEST, MOST = 0.9, 2, 16  # of a turn without rounds, in seconds and steps
ROUNDS = 32  # steps of a turn of those with rounds, or one round where that is longer
UNTYPICAL = 4  # first steps: DDP rebuilds its buckets, PowerSGD still sends all
RUN = {"outer_momentum": 0.7, "dense_steps": 2}
PATIENCE = 300  # seconds for a turn, after which it is a hang


class Contestant:
    """A model and its optimizer under one way."""

    def __init__(self, name: str, model: str, data):
        torch.manual_seed(0)
        network = MODELS[model].model()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        run = RUN | {"one_bucket": name.endswith(IN_ONE)}
        name = name.removesuffix(IN_ONE)
        self._way, self._data = ways.make(name, network, optimizer, run), data
        self.handle = self._way.handle
        every = WAYS[name].every
        for _ in range(UNTYPICAL if every == 1 else every + every // 2 + RUN["dense_steps"]):
            self.step()  # a turn begins and ends half-way between two exchanges
        # After a turn without exchange TCP begins anew; whole rounds have idle links in between, and are all counted.
        self.skipped = int(every == 1)
        self.turn = self._turn() + 1 if every == 1 else max(ROUNDS, every)

    def step(self) -> None:
        self._way.step(self._data.batch())

    def close(self) -> None:
        self._way.close()

    def _turn(self):
        begin = time.perf_counter()
        self.step()
        took = torch.tensor(time.perf_counter() - begin)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        return min(MOST, max(FEWEST, round(TURN_S / float(took))))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--cycles", type=int, required=True)
    parser.add_argument("--methods", nargs="+", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = MODELS[args.model]
    data = model.data(rank, dist.get_world_size(), 0, model.batch, None)
    contestants = {}
    for name in (NOOP, *args.methods):
        contestants[name] = Contestant(name, args.model, data)
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
    for cycle, name in in_turns(list(args.methods), NOOP, args.cycles):
        one = contestants[name]
        row = take_turn(one, one.turn, one.skipped)
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        if rank == 0:
            print(json.dumps({"cycle": cycle, "method": name, **row}), flush=True)
    for contestant in contestants.values():
        contestant.close()
    tasks.leave()


if __name__ == "__main__":
    main()
