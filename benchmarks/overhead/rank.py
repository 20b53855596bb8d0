"""One rank of run.py: a model with one tiny batch under several methods in turn, or a profile of one method.

Rank 0 reports every turn in a line of JSON.
"""
import argparse
import faulthandler
import json
import math
import sys
from pathlib import Path

import thinwire
import torch
import torch.distributed as dist
from thinwire import BlockSparse, Dense
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common import task
from common.turns import SKIPPED, in_turns, take_turn

from overhead.profiles import Profiles

NOOP, YARDSTICK = "no exchange", "torch.add and a copy"
WIRES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": "int8", "int4": "int4"}


def _nominated(wire):
    return lambda: BlockSparse("nominated", density=0.04, block_size=16, wire_dtype=wire)


# Made when they are asked for, so that --methods can leave out what a thinwire cannot do.
OURS = {
    **{f"nominated 4 %, {name}": _nominated(wire) for name, wire in WIRES.items()},
    "Dense()": Dense,
    "Dense, int4": lambda: Dense(wire_dtype="int4", memory="error_feedback"),
}
METHODS = ["nominated 4 %, float32", "nominated 4 %, int4", "Dense, int4"]
PATIENCE = 120  # seconds for a turn, after which it is a hang


def small() -> nn.Module:
    """148 parameters of 400 elements, one after another. Orthogonal, so that gradients neither vanish nor grow."""
    layers = [nn.Linear(20, 20, bias=False) for _ in range(148)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
    return nn.Sequential(*layers)


def large() -> nn.Module:
    """One parameter of 6.5 million elements."""
    return nn.Linear(2500, 2600, bias=False)


MODELS = {"148 of 400": (small, 20), "6.5 M": (large, 2500)}  # with the width of the batch
TURNS = {"148 of 400": 25, "6.5 M": 12}  # steps that are counted


class Contestant:
    """A model under one method. No optimizer steps it: that costs the same under every method."""

    def __init__(self, model: str, name: str):
        make, width = MODELS[model]
        torch.manual_seed(0)
        self._ddp = DistributedDataParallel(make(), init_sync=False)
        self._batches = torch.randn(64, 1, width, generator=torch.Generator().manual_seed(dist.get_rank()))
        self._steps = 0
        self.handle = None
        if name == NOOP:
            self._ddp.register_comm_hook(None, noop_hook)
        else:
            self.handle = thinwire.attach(self._ddp, OURS[name]())

    def step(self) -> None:
        self._steps += 1
        self._ddp.zero_grad()
        self._ddp(self._batches[self._steps % len(self._batches)]).sum().backward()


class Yardstick:
    """What the hook must at least do to a gradient: read it with what was kept, write what is kept and what is sent."""

    handle = None

    def __init__(self, model: str):
        numel = sum(math.prod(parameter.shape) for parameter in MODELS[model][0]().parameters())
        self._one, self._other, self._sum, self._copy = torch.randn(4, numel)

    def step(self) -> None:
        torch.add(self._one, self._other, out=self._sum)
        self._copy.copy_(self._sum)


def measure(model: str, methods: list[str], cycles: int) -> None:
    contestants = {name: Contestant(model, name) for name in (NOOP, *methods)} | {YARDSTICK: Yardstick(model)}
    for contestant in contestants.values():
        take_turn(contestant, 5)  # buckets are rebuilt, memory is touched
    for cycle, name in in_turns([*methods, YARDSTICK], NOOP, cycles):
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        row = take_turn(contestants[name], SKIPPED + TURNS[model])
        if dist.get_rank() == 0:
            print(json.dumps({"cycle": cycle, "model": model, "method": name, **row}), flush=True)


def profile(model: str, method: str, steps: int) -> None:
    """Print where the time of rank 0 goes. Profiled, a step takes longer, calls of Python most of all."""
    with Profiles() as profiles:
        contestant = Contestant(model, method)
        take_turn(contestant, 10)
        plain = take_turn(contestant, SKIPPED + steps)["ms"]
        dist.barrier()
        profiles.begin()
        profiled = take_turn(contestant, SKIPPED + steps)["ms"]
        if dist.get_rank() == 0:
            print(f"{method}, {model}: {sum(plain) / steps:.2f} ms a step, {sum(profiled) / steps:.2f} profiled; "
                  "ms and calls a step, of rank 0:")  # fmt: skip
            profiles.show(SKIPPED + steps)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=[NOOP, *OURS], default=METHODS)
    parser.add_argument("--cycles", type=int, default=15)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    dist.init_process_group("gloo")
    for model in args.models:
        if args.profile:
            for method in args.methods:
                profile(model, method, args.steps)
        else:
            measure(model, args.methods, args.cycles)
    task.leave()


if __name__ == "__main__":
    main()
