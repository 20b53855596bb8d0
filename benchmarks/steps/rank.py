"""One rank of run.py: the demo's model under several methods in turn. Rank 0 reports every turn in a line of JSON."""
import argparse
import faulthandler
import json
import statistics
import sys
import time
from pathlib import Path

import thinwire
import torch
import torch.distributed as dist
from thinwire import BlockSparse, Dense
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common import task
from common.turns import SKIPPED, in_turns, take_turn
from suite.methods import CONTESTANTS, ONE_BUCKET

NOOP, PLAIN, POWERSGD = "no exchange", "plain DDP", "PowerSGD rank 1"
MEETING = "4 bytes, all-reduced"  # what it costs that ranks wait for the slowest of them in every step
WIRES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": "int8", "int4": "int4", "int2": "int2"}
PEERS = {NOOP: "noop", PLAIN: "dense", POWERSGD: "powersgd-1"}


def _nominated(wire):
    return lambda: BlockSparse("nominated", density=0.04, block_size=16, wire_dtype=wire)


# Made when their turn comes, so that --methods can leave out what a thinwire cannot do.
OURS = {
    "Dense()": Dense,
    "Dense(exact=True)": lambda: Dense(exact=True),
    "Dense, int4": lambda: Dense(wire_dtype="int4", memory="error_feedback"),
    **{f"nominated 4 %, {name}": _nominated(wire) for name, wire in WIRES.items()},
    "independent 1/n": BlockSparse,
}
IN_ONE = ", one bucket"  # at the end of a contestant's name; without it, DDP's default
# With two buckets in flight PowerSGD's hook hangs on Gloo.
METHODS = [name + buckets for name in (PLAIN, *OURS) for buckets in ("", IN_ONE)] + [POWERSGD + IN_ONE]
METHODS.remove("Dense(exact=True)" + IN_ONE)  # long, and of no question
METHODS.insert(0, MEETING)
UNTYPICAL = 4  # first steps: DDP rebuilds its buckets, PowerSGD still sends all
LONG = 0.4  # seconds that make a step a long one
TURN, LONG_TURN, NOOP_TURN = 8, 3, 5  # steps that are counted in a turn
PATIENCE = 180  # seconds for a turn, after which it is a hang


def meet(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """A hook that averages nothing. With a step's last bucket the ranks wait for each other."""
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    if not bucket.is_last():
        return future
    return dist.all_reduce(torch.zeros(1), async_op=True).get_future().then(lambda _: bucket.buffer())


class Contestant:
    """A model and its optimizer under one method."""

    def __init__(self, name: str, batches):
        method = name.removesuffix(IN_ONE)
        torch.manual_seed(0)
        self._model, self._batches = task.ByteTransformer(), batches
        self._ddp = DistributedDataParallel(self._model, init_sync=False,
                                            bucket_cap_mb=ONE_BUCKET if name.endswith(IN_ONE) else None)  # fmt: skip
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.01)
        self._turn = NOOP_TURN if method == NOOP else TURN
        self.handle = None
        if method in OURS:
            self.handle = thinwire.attach(self._ddp, OURS[method](), optimizer=self._optimizer)
        elif method == MEETING:
            self._ddp.register_comm_hook(None, meet)
        else:
            CONTESTANTS[PEERS[method]].attach(self._ddp, self._optimizer)

    def step(self) -> None:
        self._optimizer.zero_grad()
        self._ddp(next(self._batches)).backward()
        self._optimizer.step()

    def warm_up(self) -> int:
        """How many steps its turn has, the same on every rank."""
        for _ in range(UNTYPICAL):
            self.step()
        seconds = []
        for _ in range(2):
            begin = time.perf_counter()
            self.step()
            seconds.append(time.perf_counter() - begin)
        slowest = torch.tensor(statistics.mean(seconds))
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return SKIPPED + (LONG_TURN if float(slowest) > LONG else self._turn)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=8)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    dist.init_process_group("gloo")
    rank, n = dist.get_rank(), dist.get_world_size()
    batches = task.batches(task.standard_library()[0], rank, n)
    contestants, steps = {}, {}
    for name in (NOOP, *args.methods):
        contestants[name] = Contestant(name, batches)
        steps[name] = contestants[name].warm_up()
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
    for cycle, name in in_turns(args.methods, NOOP, args.cycles):
        row = take_turn(contestants[name], steps[name])
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        if rank == 0:
            print(json.dumps({"cycle": cycle, "method": name, **row}), flush=True)
    task.leave()


if __name__ == "__main__":
    main()
