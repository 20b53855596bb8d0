# No "from __future__ import annotations" here: DDP inspects the hook's annotations and refuses strings.
"""``python -m thinwire advise train.py ...``: would thinwire help this script? Measured on the script as it is.

    torchrun --nproc-per-node 4 -m thinwire advise --steps 20 train.py --batch 32
"""

import argparse
import os
import runpy
import statistics
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from thinwire.advice import candidates, own_step, trial
from thinwire.advice import verdict as advice
from thinwire.advice.cost import Compute
from thinwire.advice.rehearsal import clock
from thinwire.advice.saves import Saves
from thinwire.core.exchange import gather_objects
from thinwire.state import agree
from thinwire.state.names import parameter_names

AVERAGED = 3  # first steps, in which DDP is left to average gradients, for it then makes its buckets anew
UNEVEN = "the ranks made different numbers of steps, so there is no step of all to time: give all as many batches"
_ABOUT = """Run a training script until a few dozen steps are done, say what thinwire and PyTorch's hooks would make of
its step, and leave it there."""
_HOW = f"""The script is run as it is, on every rank; put its own arguments after it. Start the ranks with torchrun: a
script that starts them itself, with torch.multiprocessing.spawn, is refused. When it wraps its first model in
DistributedDataParallel, the first {AVERAGED} steps of that model average gradients as they would; then, for --steps
steps and two more, it exchanges nothing, BatchNorm's buffers included, and whole steps are timed, from one forward pass
to the next, data loading and optimizer included, and what other models exchange in them. The replicas drift apart
meanwhile, so from then on torch.save and safetensors' save_file replace no file that is there, the files that they make
are removed when the script is left, and torch.distributed.checkpoint.save writes nothing; what the script writes by
other means, and into files that it has opened itself, is not held back. Once the link and each method's own work have
been measured too, the script is left for good: SystemExit is raised in its next forward pass, and again in every one
after that, on every rank. Elastic is not among the methods, for what is late depends on the gradients."""


class Advised(SystemExit):
    """Leaves the script when all is said."""


def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's communication hook while a script is watched."""
    return state.reduce(bucket)


class Watch:
    """The steps of one DDP model in a script that knows nothing of it; leaves the script when it has seen enough."""

    def __init__(self, ddp: DistributedDataParallel, steps: int):
        self.ddp, self.steps = ddp, steps
        self.others = 0  # DDP models of the script beside this one
        self.left: Advised | None = None  # what left the script
        self.done = -1  # steps, of which the first began with the first forward pass
        self._over = False
        self._names = self._device = None
        self._complete = True  # the last bucket of the step has been ready
        self._ready: list[float] = []
        self._seconds: list[float] = []
        self._arrivals: list[list[float]] = []
        self._cut: list[tuple[str, ...]] = []
        self._gradients: dict[str, torch.Tensor] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        ddp.register_forward_pre_hook(self._forward)
        register_optimizer_step_pre_hook(self._stepping)

    @property
    def drifting(self) -> bool:
        """Whether replicas differ."""
        return self.done >= AVERAGED

    @property
    def made(self) -> int:
        """Steps of which all gradients were exchanged, or would have been."""
        return self.done + self._complete

    @property
    def needed(self) -> int:
        """Steps that the script has to make, and one forward pass more: one is not timed, and the last keeps its
        gradients."""
        return AVERAGED + 1 + self.steps + 1

    def over(self) -> None:
        """The script makes no more steps on this rank: ranks that are still at it must not wait for them."""
        if self._over or self.left is not None or not dist.is_initialized():
            return
        self._over = True
        if any(said is not None for said in gather_objects(None, self.ddp.process_group)):
            self._leave(UNEVEN, 1)

    def _forward(self, module, args):
        if self.left is not None:  # and the script went on
            raise self.left
        if torch.is_grad_enabled():  # or it is an evaluation, maybe on one rank
            if self._names is None:
                self._begin()
            if self._complete:  # or it is another forward pass of the same step, as in gradient accumulation
                self._next_step()
        if self.drifting:
            module.require_forward_param_sync = False  # buffers; DDP sets it again after every forward pass

    def _next_step(self):
        now = clock(self._device)
        if AVERAGED + 1 <= self.done < self.needed - 1:
            self._seconds.append(now - self._began)
            self._arrivals.append(self._ready)
        self.done += 1
        if self.done == self.needed:
            self._finish()
        self._complete, self._ready, self._began = False, [], clock(self._device)

    def _begin(self):
        if self.ddp._comm_hooks:
            found = ", ".join(getattr(other, "__qualname__", str(other)) for other, _ in self.ddp._comm_hooks)
            self._leave(f"the script registers a communication hook of its own ({found}), and DDP allows one: take it "
                        "out, thinwire.attach included, and ask again", 2)  # fmt: skip
        self._names = parameter_names(self.ddp.module, self.ddp.parameters_to_ignore)
        self._device = next(iter(self._names)).device
        self.ddp.register_comm_hook(self, hook)

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """The body of the hook."""
        self._complete = self._complete or bucket.is_last()
        if not self.drifting:
            return allreduce_hook(self.ddp.process_group, bucket)
        self._ready.append(clock(self._device) - self._began)
        if self.done == self.needed - 1:
            names = tuple(self._names[p] for p in bucket.parameters())
            self._cut.append(names)
            self._gradients.update(zip(names, (gradient.clone() for gradient in bucket.gradients())))
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    def _finish(self):
        """Predict, print and leave."""
        group = self.ddp.process_group
        gather = lambda thing: gather_objects(thing, group)
        everyone = gather((self._seconds, self._arrivals))
        if None in everyone:
            self._leave(UNEVEN, 1)
        compute_s = statistics.median(max(times) for times in zip(*(seconds for seconds, _ in everyone)))
        if group.size() == 1:
            self._leave(advice.alone(compute_s), 0)
        numels = {name: p.numel() for p, name in self._names.items()}
        agree.check_together(gather, lambda: {"model": agree.digest(numels), "buckets": str(len(self._cut))})
        arrivals = [statistics.mean(column) for column in zip(*(step for _, steps in everyone for step in steps))]
        compute = Compute(trial.rising(arrivals), max(compute_s, *arrivals))
        optimizer = self._optimizer
        gloo = candidates.over_gloo(group, self._device)
        asked = candidates.named(None, group.size(), gloo, self.ddp.module, optimizer, self._names)
        with own_step.generators_kept(), torch.no_grad():
            tried = trial.Trial(group, self._device, self._cut, self._gradients, compute,
                                lambda method: trial.replica_bytes(self.ddp, optimizer, method),
                                copies_in=False, copies_out=False)  # fmt: skip
            found = advice.conclude(tried, asked, by_default=True)
        dist.barrier(group=group)  # on Gloo, a rank that leaves much earlier than another may make PyTorch abort
        more = f"\nThe script's other DistributedDataParallel models ({self.others}) exchanged as ever in every step."
        self._leave(str(found) + more * (self.others > 0), 0)

    def _leave(self, what, status):
        """Say it once and leave the script, for good."""
        self.left = Advised(say(what, status))
        raise self.left

    def _stepping(self, optimizer, args, kwargs):
        """An optimizer of the script makes a step: the one that has the first parameter is this model's."""
        if self._optimizer is None and self._names is not None:
            first = next(iter(self._names))
            if any(p is first for group in optimizer.param_groups for p in group["params"]):
                self._optimizer = optimizer


def say(what: object, status: int) -> int:
    """Print on the first rank: advice to stdout, complaints to stderr. Returns this rank's exit status, which is 0 on
    the others: a launcher ends all ranks as soon as one fails, and that must not be before the first has spoken."""
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))
    if rank != 0:
        return 0
    print(what if status == 0 else f"thinwire advise: {what}", file=sys.stderr if status else None, flush=True)
    return status


def watch_first(steps: int) -> tuple[list[Watch], Saves]:
    """From now on, the first DistributedDataParallel that is made is watched; it is then in the list."""
    watches: list[Watch] = []
    saves = Saves(lambda: bool(watches) and watches[0].drifting)
    make, destroy = DistributedDataParallel.__init__, dist.destroy_process_group

    def make_and_watch(self, *args, **kwargs):
        make(self, *args, **kwargs)
        if watches:
            watches[0].others += 1
        else:
            watches.append(Watch(self, steps))

    def destroy_when_over(group=None):
        if watches and group in (None, dist.group.WORLD, watches[0].ddp.process_group):
            watches[0].over()
        destroy(group)

    def refuse(*args, **kwargs):
        raise Advised(say("the script starts processes with torch.multiprocessing, which are not watched: let torchrun "
                          "start the ranks, a process each, and call the function for one rank", 2))  # fmt: skip

    DistributedDataParallel.__init__, dist.destroy_process_group = make_and_watch, destroy_when_over
    torch.multiprocessing.spawn = torch.multiprocessing.start_processes = refuse
    torch.save = saves.guarded(torch.save, "f")
    os.replace, os.rename = saves.moving(os.replace), saves.moving(os.rename)
    dcp.save = saves.held(dcp.save)
    try:
        import safetensors.torch
    except ImportError:
        pass
    else:
        safetensors.torch.save_file = saves.guarded(safetensors.torch.save_file, "filename")
    return watches, saves


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``run`` needs."""
    parser.description, parser.epilog = _ABOUT, _HOW
    parser.add_argument("--steps", type=int, default=20, help="how many steps to time, 20 if not given")
    parser.add_argument("script", help="the training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
    parser.set_defaults(run=lambda args: run(args, parser))


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the script and leave it when all is said; the exit status."""
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: must be at least 1")
    if not Path(args.script).is_file():
        parser.error(f"{args.script}: no such script")
    watches, saves = watch_first(args.steps)
    sys.argv = [args.script, *args.arguments]
    sys.path[0] = str(Path(args.script).resolve().parent)  # as for python train.py
    try:
        return _status(args, watches)
    finally:
        saves.remove()


def _status(args, watches):
    """Run the script; the exit status."""
    status = 0
    try:
        runpy.run_path(args.script, run_name="__main__")
    except Advised as left:
        return left.code
    except SystemExit as left:
        status = left.code
    if not watches:
        return status or say("the script ended without making a DistributedDataParallel: there is no step to time", 1)
    try:
        if not status:
            watches[0].over()
    except Advised:
        pass
    if watches[0].left is not None:  # maybe long ago, and the script caught it
        return watches[0].left.code
    needed = watches[0].needed + 1
    return status or say(
        f"the script ended after {watches[0].made} steps; {needed} are needed to time {args.steps} of them: let it run "
        "for longer, or pass a smaller --steps before the script's name", 1,
    )  # fmt: skip
