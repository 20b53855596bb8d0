"""The ways to train that are compared: thinwire's methods, DDP's own means, and what needs no hook at all.

A way is made of a model, its optimizer and the run that it is for. ``step(windows)`` is one pass, ``evaluating()`` a
context in which the model is what the way would give its user, ``finish()`` its end, and ``bytes_sent()`` what a rank
has sent so far: of an all-reduce what a ring sends, in all of them.
"""
import contextlib
import dataclasses
import functools
from collections.abc import Callable

import thinwire
import torch
import torch.distributed as dist
from thinwire import BlockSparse, Dense
from thinwire.core.stats import ring_all_reduce_bytes
from torch.distributed.algorithms.ddp_comm_hooks import debugging_hooks, default_hooks, powerSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel

from suite.methods import CONTESTANTS, ONE_BUCKET

EVERY = 16  # steps of a round, of those that have one and say nothing else


class Ddp:
    """Plain DDP. The others say in what they differ."""

    bucket_cap_mb = None
    handle = None

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, run: dict):
        self.model, self.optimizer, self.run = model, optimizer, run
        if run.get("one_bucket"):
            self.bucket_cap_mb = ONE_BUCKET
        self.parameters = list(model.parameters())
        self.ddp = DistributedDataParallel(model, init_sync=False, bucket_cap_mb=self.bucket_cap_mb)
        self.steps = 0
        self.exchanges = 0  # whole gradients, or models, in float32

    def step(self, batch) -> None:
        self.optimizer.zero_grad()
        self.ddp(batch).backward()
        self.optimizer.step()
        self.steps += 1
        self.exchanges += 1

    def evaluating(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def finish(self) -> None:
        pass

    def bytes_sent(self) -> int:
        return self.exchanges * dense_bytes(self.model)

    def close(self) -> None:
        if self.handle:
            self.handle.close()


class Half(Ddp):
    """PyTorch's fp16_compress_hook."""

    def __init__(self, model, optimizer, run):
        super().__init__(model, optimizer, run)
        self.ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)

    def bytes_sent(self):
        return super().bytes_sent() // 2


class Accumulation(Ddp):
    """The batch so many times as large, at the same number of passes."""

    def __init__(self, model, optimizer, run, every: int = EVERY):
        super().__init__(model, optimizer, run)
        self.every = every

    def step(self, batch):
        self.steps += 1
        last = self.steps % self.every == 0
        with contextlib.nullcontext() if last else self.ddp.no_sync():
            (self.ddp(batch) / self.every).backward()
        if last:
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.exchanges += 1


class OuterDdp(Ddp):
    """DDP in every step, and around it the outer optimizer that local steps have. It sends nothing more."""

    def __init__(self, model, optimizer, run):
        super().__init__(model, optimizer, run)
        self.anchor = [p.detach().clone() for p in self.parameters]
        self.outer = torch.optim.SGD(self.anchor, lr=1.0, momentum=run["outer_momentum"], nesterov=True)

    def step(self, batch):
        super().step(batch)
        if self.steps % EVERY == 0:
            self.finish()

    @torch.no_grad()
    def finish(self):
        for anchor, parameter in zip(self.anchor, self.parameters):
            anchor.grad = anchor - parameter
        self.outer.step()
        self._set(self.anchor)

    @contextlib.contextmanager
    def evaluating(self):
        own = [p.detach().clone() for p in self.parameters]
        self._set(self.anchor)
        yield
        self._set(own)

    @torch.no_grad()
    def _set(self, values):
        for parameter, value in zip(self.parameters, values):
            parameter.copy_(value)


class PostLocalSgd(Ddp):
    """PyTorch's PostLocalSGD: DDP while the learning rate rises, then the parameters' mean after every so many steps.

    It has no anchor: what is evaluated is the mean of the replicas, for which a user would have to exchange them.
    """

    def __init__(self, model, optimizer, run):
        self.dense = run["dense_steps"]
        averager = PeriodicModelAverager(period=EVERY, warmup_steps=self.dense)
        super().__init__(model, PostLocalSGDOptimizer(optimizer, averager), run)
        # Without a gradient's all-reduce in a subgroup: each rank would be one.
        state = PostLocalSGDState(None, None, start_localSGD_iter=self.dense, post_local_gradient_allreduce=False)
        self.ddp.register_comm_hook(state, post_localSGD_hook)

    def bytes_sent(self):
        rounds = max(0, -(-(self.steps - self.dense) // EVERY))
        return (min(self.steps, self.dense) + rounds) * dense_bytes(self.model)

    @contextlib.contextmanager
    def evaluating(self):
        own = [p.detach().clone() for p in self.parameters]
        self.finish()
        yield
        with torch.no_grad():
            for parameter, value in zip(self.parameters, own):
                parameter.copy_(value)

    @torch.no_grad()
    def finish(self):
        for parameter in self.parameters:
            dist.all_reduce(parameter.data)
            parameter.div_(dist.get_world_size())


class Alone(Ddp):
    """No exchange at all. Each rank evaluates its own model on its share of the windows: the loss is a mean of them."""

    def __init__(self, model, optimizer, run):
        super().__init__(model, optimizer, run)
        self.ddp.register_comm_hook(None, debugging_hooks.noop_hook)

    def bytes_sent(self):
        return 0


class PowerSgd(Ddp):
    """PyTorch's PowerSGD. On Gloo its hook hangs as soon as two buckets are in flight.

    half: its factors travel in float16, by PyTorch's fp16_compress_wrapper.
    """

    bucket_cap_mb = ONE_BUCKET
    DENSE = 2  # steps at the beginning, the fewest that it allows

    def __init__(self, model, optimizer, run, rank: int, half: bool = False):
        super().__init__(model, optimizer, run)
        self.state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=self.DENSE)
        hook, self._bytes = powerSGD_hook.powerSGD_hook, 2 if half else 4
        self.ddp.register_comm_hook(self.state, default_hooks.fp16_compress_wrapper(hook) if half else hook)

    def bytes_sent(self):
        _, _, values = self.state.compression_stats()  # of the steps after the dense ones
        dense = min(self.steps, self.DENSE) * dense_bytes(self.model) * self._bytes // 4
        return dense + ring_all_reduce_bytes(self._bytes * values, dist.get_world_size())


class Ours(Ddp):
    """A method of thinwire, made from the run."""

    def __init__(self, method, model, optimizer, run, bucket_cap_mb: float | None = None):
        self.bucket_cap_mb = bucket_cap_mb
        super().__init__(model, optimizer, run)
        self.handle = thinwire.attach(self.ddp, method(run), optimizer=optimizer)

    def evaluating(self):
        return self.handle.evaluating()

    def finish(self):
        self.handle.finalize()

    def bytes_sent(self):
        return self.handle.stats()["bytes_sent"]


def dense_bytes(model: torch.nn.Module) -> int:
    """What each rank sends to all-reduce a gradient, or the parameters, in float32."""
    return ring_all_reduce_bytes(4 * sum(p.numel() for p in model.parameters()), dist.get_world_size())


@dataclasses.dataclass(frozen=True)
class Way:
    """How it is called, made, and searched for.

    make(model, optimizer, run) gives its :class:`Ddp`. ours: whether it is thinwire's. control: it answers a question,
    and nobody would use it to train. every: steps from one exchange to the next. like: whose settings it has, without
    a search of its own. rate: where its search begins, in plain DDP's learning rate; its momentum is plain DDP's.
    method: thinwire's, where it is the same in every run. outer: it has an outer optimizer, whose momentum is searched
    for as well.
    """

    label: str
    make: Callable[[torch.nn.Module, torch.optim.Optimizer, dict], Ddp]
    ours: bool = False
    control: bool = False
    every: int = 1
    like: str | None = None
    rate: float = 1.0
    method: thinwire.Method | None = None
    outer: bool = False


def _ours(label, method, bucket_cap_mb=None, **also):
    """method: of thinwire, or what makes it from the run."""
    fixed = None if callable(method) else method
    of = method if callable(method) else lambda run: method
    return Way(label, functools.partial(Ours, of, bucket_cap_mb=bucket_cap_mb), ours=True, method=fixed, **also)


def _contestant(name, **also):
    """As the other rooms know it, but with no dense steps at first."""
    of = CONTESTANTS[name]
    method = dataclasses.replace(of.method, warmup_steps=0) if isinstance(of.method, BlockSparse) else of.method
    return _ours(of.label, method, of.bucket_cap_mb, **also)


def _local(every=EVERY, said="", like=None, **options):
    method = lambda run: thinwire.LocalSteps(every=every, outer_momentum=run["outer_momentum"], **options)
    label = f"LocalSteps(every={every}{said})"
    return _ours(label, method, every=every, like=like, rate=0.5, outer=True)


def _partial(memory):
    method = lambda: BlockSparse("nominated", density=0.25, block_size=16, wire_dtype="int4", memory=memory)
    return Way(f'LocalSteps(every=16), nominated 25 %, int4, "{memory}"',
               lambda *given: _local(method=method()).make(*given), ours=True, control=True, every=EVERY, like=LOCAL,
               outer=True)  # fmt: skip


DDP, HALF, POWERSGD, POST_LOCAL, ALONE = "ddp", "fp16", "powersgd-4", "post-local-sgd", "alone"
ACCUMULATION, ACCUMULATION_4, OUTER_DDP = "accumulation", "accumulation-4", "ddp-outer"
NOMINATED, INT4, LOCAL, LOCAL_8, LOCAL_4 = "nominated-16-int4", "thinwire-int4", "local-16", "local-8", "local-4"
LATE, FRAGMENTS, LOCAL_WAITS, LOCAL_EXACT = "local-16-late", "local-16-fragments", "local-16-waits", "local-16-float32"
LATE_8 = "local-8-late"
PARTIAL_WEIGHTS, PARTIAL_ERROR = "local-16-partial-weights", "local-16-partial-error"
WAYS = {
    DDP: Way("plain DDP", Ddp),
    HALF: Way("fp16 hook", Half, like=DDP),
    ACCUMULATION_4: Way("DDP, gradients of 4 passes accumulated", functools.partial(Accumulation, every=4), every=4,
                        rate=2.0),
    ACCUMULATION: Way("DDP, gradients of 16 passes accumulated", Accumulation, every=EVERY, rate=2.0),
    **{f"powersgd-{rank}": Way(f"PowerSGD rank {rank}", functools.partial(PowerSgd, rank=rank))
       for rank in (1, 2, 4)},
    "powersgd-4-fp16": Way("PowerSGD rank 4, fp16", functools.partial(PowerSgd, rank=4, half=True), like=POWERSGD),
    POST_LOCAL: Way("PostLocalSGD, a round every 16", PostLocalSgd, every=EVERY),
    **{name: _contestant(name, rate=2.0) for name in (
        "nominated-1-bf16", "nominated-4-bf16", "nominated-16-bf16", "nominated-1-int4", "nominated-4-int4", NOMINATED,
        "topk-1")},
    "nominated-12-int4": _contestant("nominated-12-int4", like=NOMINATED),  # fifty times fewer bytes than plain DDP
    INT4: _contestant(INT4),
    "independent": _contestant("independent"),
    "ds-sync": _contestant("ds-sync"),
    "elastic-nominated": _contestant("elastic-nominated", rate=2.0),
    LOCAL_4: _local(4),
    LOCAL_8: _local(8),
    LOCAL: _local(),
    "local-64": _local(64),
    LATE_8: _local(8, ", overlap=4", like=LOCAL_8, overlap=4),
    LATE: _local(said=", overlap=4", like=LOCAL, overlap=4),
    FRAGMENTS: _local(said=", fragments=4", like=LOCAL, fragments=4),
    LOCAL_WAITS: _local(said=", overlap=0", like=LOCAL, overlap=0),
    LOCAL_EXACT: _local(said=', method=Dense()', like=LOCAL, method=Dense()),
    PARTIAL_WEIGHTS: _partial("weights"),
    PARTIAL_ERROR: _partial("error_feedback"),
    OUTER_DDP: Way("DDP with the outer optimizer", OuterDdp, rate=0.5, outer=True),
    ALONE: Way("one rank alone", Alone, control=True),
}  # fmt: skip


def make(name: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer, run: dict) -> Ddp:
    """A way to train, by its name. run: its settings; dense_steps, of PostLocalSGD; one_bucket: for DDP's gradients."""
    return WAYS[name].make(model, optimizer, run)
