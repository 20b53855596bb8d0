"""One rank of run.py: trains the task under one method for a given time. Rank 0 reports in lines of JSON."""
import argparse
import contextlib
import dataclasses
import datetime
import faulthandler
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import thinwire
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common import task
from suite import methods
from thinnet import interface_bytes

EVALUATIONS = 10  # in a run, at equal distances in training time
STARTING = 120  # seconds that a busy machine may take until the first step
UNTYPICAL = 5  # first steps, in which DDP rebuilds its buckets and PowerSGD still sends all


def _ours(method):
    return lambda ddp, optimizer: thinwire.attach(ddp, method, optimizer=optimizer)


def _adamw(lr, beta1):
    return {"lr": lr, "betas": (beta1, 0.95)}


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A method of averaging gradients, with the optimizer that suits it.

    attach: makes a DDP model use it; returns thinwire's handle or None. optimizer, options: of torch.optim.
    one_bucket: all gradients in one bucket of DDP's instead of its default. trains: False for an instrument, whose
    replicas drift apart, so that only its speed means anything. fixed_seconds: overrides the time of the run. family:
    of those that differ in one knob the demo shows one. method: thinwire's configuration.
    """

    label: str
    attach: Callable
    optimizer: str
    options: dict
    one_bucket: bool = False
    trains: bool = True
    fixed_seconds: float | None = None
    family: str = ""
    method: thinwire.Method | None = None


def _powersgd(rank, options):
    # On Gloo PowerSGD hangs as soon as two buckets are in flight, so it gets one, and a watchdog.
    hook = methods.CONTESTANTS[f"powersgd-{rank}"].attach
    return Contestant(f"PowerSGD, rank {rank}", hook, "AdamW", options, one_bucket=True, family="powersgd")


def _nominated(density, options):
    method = thinwire.BlockSparse("nominated", density=density, block_size=16, wire_dtype="int4", warmup_steps=2)
    return Contestant(f"nominated {100 * density:g} %, int4", _ours(method), "AdamW", options, family="nominated",
                      method=method)  # fmt: skip


def _local(every, options):
    method = thinwire.LocalSteps(every=every)
    return Contestant(f"LocalSteps, every {every}", _ours(method), "AdamW", options, family="local", method=method)


# The options are the best of results/tuning.json, and of a family SHOWN has the best; tests/test_demo.py checks both.
# Of those that are not in it, where tune.py begins.
CONTESTANTS = {
    "noop": Contestant("no exchange", methods.CONTESTANTS["noop"].attach, "AdamW", {"lr": 0.0}, trains=False,
                       fixed_seconds=6),
    "dense": Contestant("plain DDP", lambda *_: None, "AdamW", _adamw(3e-3, 0.5)),
    "fp16": Contestant("PyTorch's fp16 hook", methods.CONTESTANTS["fp16"].attach, "AdamW", _adamw(5e-4, 0.5)),
    "powersgd-1": _powersgd(1, _adamw(2.5e-4, 0.0)),
    "powersgd-4": _powersgd(4, _adamw(1e-3, 0.5)),
    "paper": Contestant("BlockSparse(), paper", _ours(thinwire.BlockSparse()), "AdamW", _adamw(1e-3, 0.5),
                        method=thinwire.BlockSparse()),
    "nominated-4": _nominated(0.04, _adamw(1e-3, 0.0)),
    "nominated-16": _nominated(0.16, _adamw(1e-3, 0.5)),
    "local-8": _local(8, _adamw(1.25e-4, 0.5)),
    "local-16": _local(16, _adamw(1e-3, 0.5)),
}  # fmt: skip
SHOWN = ("noop", "dense", "fp16", "powersgd-1", "paper", "nominated-4", "local-8")


class Clock:
    """The training time, on which all ranks agree at next to no cost.

    Before every step rank 0 decides what comes after it, and sends that in a broadcast of 8 bytes, in a group of its
    own; it travels while the step computes, so nobody waits for it. Evaluation is not training time.
    """

    GO_ON, EVALUATE, STOP = range(3)

    def __init__(self, seconds: float, evaluations: int, most_steps: float = float("inf")):
        self.group = dist.new_group()
        self.most_steps = most_steps
        self.seconds, self.every = seconds, seconds / evaluations
        self.elapsed, self.evaluated, self.steps = 0.0, 0.0, []

    def begin_step(self) -> None:
        self._began = time.perf_counter()
        step = statistics.median(self.steps[-10:]) if self.steps else 0.0
        verdict = self.GO_ON
        # After this step, one more would not fit, or is not wanted.
        if self.elapsed + 2 * step > self.seconds or len(self.steps) + 1 >= self.most_steps:
            verdict = self.STOP
        elif self.elapsed + step - self.evaluated >= self.every:
            verdict = self.EVALUATE
        self._verdict = torch.tensor([verdict])
        self._work = dist.broadcast(self._verdict, 0, group=self.group, async_op=True)

    def end_step(self) -> int:
        """Rank 0's verdict."""
        self._work.wait()
        self.steps.append(time.perf_counter() - self._began)
        self.elapsed += self.steps[-1]
        verdict = int(self._verdict)
        if verdict != self.GO_ON:
            self.evaluated = self.elapsed
        return verdict


def main():
    args = _arguments()
    contestant = _overridden(CONTESTANTS[args.method], args)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    # A rank that stands still ends with a traceback. Gloo's own timeout is longer, to leave that to us.
    faulthandler.dump_traceback_later(args.patience + STARTING, exit=True)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=2 * (args.patience + STARTING)))
    report = _reporter(rank)

    torch.manual_seed(args.seed)
    model = task.ByteTransformer()
    training_text, held_out_text = task.standard_library(args.seed)
    batches = task.batches(training_text, rank, world_size, args.seed)
    held_out = task.HeldOut(held_out_text, rank, world_size, seed=args.seed)
    # The seed makes the replicas equal, so nothing has to be broadcast at the start.
    ddp = DistributedDataParallel(model, init_sync=False, bucket_cap_mb=1000 if contestant.one_bucket else None)
    optimizer = getattr(torch.optim, contestant.optimizer)(model.parameters(), **contestant.options)
    handle = contestant.attach(ddp, optimizer)
    clock = Clock(contestant.fixed_seconds or args.seconds, EVALUATIONS, args.steps or float("inf"))

    def evaluate():
        if contestant.trains:
            # What a user would keep: of local steps the anchor, which is up to a round and a step old.
            with handle.evaluating() if handle else contextlib.nullcontext():
                loss = held_out.part(model)
            dist.all_reduce(loss, group=clock.group)
            report("loss", step=len(clock.steps), seconds=clock.elapsed, loss=float(loss))

    evaluate()
    dist.barrier()
    sent, fed = [_sent()], time.monotonic()  # before the first step, and after each
    faulthandler.dump_traceback_later(args.patience, exit=True)
    verdict = Clock.GO_ON
    while verdict != Clock.STOP:
        clock.begin_step()
        ddp(next(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
        verdict = clock.end_step()
        sent.append(_sent())
        if time.monotonic() - fed > 0.5:
            fed = time.monotonic()
            faulthandler.dump_traceback_later(args.patience, exit=True)
            recent = statistics.median(clock.steps[-20:])
            report("step", step=len(clock.steps), seconds=clock.elapsed, step_ms=1e3 * recent)
        if verdict != Clock.GO_ON:
            evaluate()

    mine = {"sent": sent[-1] - sent[0], "stats": handle.stats() if handle else None}
    everyone = [None] * world_size
    dist.all_gather_object(everyone, mine)
    # Means, not medians: of eight steps of a round one waits, and one or two send.
    first = min(UNTYPICAL, len(clock.steps) // 2)
    report(
        "result", steps=len(clock.steps), seconds=clock.elapsed, step_ms=1e3 * statistics.mean(clock.steps[first:]),
        all_step_ms=[round(1e3 * s, 1) for s in clock.steps],
        step_bytes=(sent[-1] - sent[first]) / (len(clock.steps) - first) if interface_bytes() else None,
        bytes=statistics.mean(one["sent"] for one in everyone) if interface_bytes() else None,
        stats=everyone[0]["stats"],
        stats_bytes=statistics.mean(one["stats"]["bytes_sent"] for one in everyone) if handle else None,
        parameters=sum(p.numel() for p in model.parameters()),
    )  # fmt: skip
    if handle:
        handle.close()  # a round may be under way
    task.leave()


def _sent():
    counters = interface_bytes()
    return counters.tx if counters else 0


def _reporter(rank):
    def report(event, **fields):
        if rank == 0:
            print(json.dumps({"event": event} | fields), flush=True)

    return report


def _overridden(contestant, args):
    """The contestant with the options that the command line gives instead of its own."""
    return dataclasses.replace(contestant, options=contestant.options | json.loads(args.options))


def _arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=CONTESTANTS, required=True)
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="end after so many steps, if the time does not end before")
    parser.add_argument("--options", default="{}", help="JSON: options of the optimizer instead of the contestant's")
    parser.add_argument("--patience", type=float, default=30, help="seconds without a step that make a hang")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
