"""The ways to train that are compared: thinwire's local steps, DDP's own means, and controls.

A way is made of a model, its optimizer and the run that it is for. ``step(windows)`` is one pass, ``evaluating()`` a
context in which the model is what the way would give its user, ``finish()`` its end, and ``bytes_sent()`` what a rank
has sent so far: of an all-reduce what a ring sends, in all of them.
"""
import contextlib
import functools

import thinwire
import torch
import torch.distributed as dist
from suite.methods import ONE_BUCKET
from thinwire import BlockSparse, Dense
from thinwire.core.stats import ring_all_reduce_bytes
from torch.distributed.algorithms.ddp_comm_hooks import debugging_hooks, powerSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel

EVERY = 16  # steps of a round, of those that have one and say nothing else
WARM_UP = 50  # steps in which the learning rate rises


class Ddp:
    """Plain DDP. The others say in what they differ."""

    bucket_cap_mb = None
    handle = None

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, run: dict):
        self.model, self.optimizer, self.run = model, optimizer, run
        self.parameters = list(model.parameters())
        self.ddp = DistributedDataParallel(model, init_sync=False, bucket_cap_mb=self.bucket_cap_mb)
        self.steps = 0
        self.exchanges = 0  # whole gradients, or models, in float32

    def step(self, windows: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        self.ddp(windows).backward()
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


class Accumulation(Ddp):
    """The batch so many times as large, at the same number of passes."""

    def step(self, windows):
        self.steps += 1
        last = self.steps % EVERY == 0
        with contextlib.nullcontext() if last else self.ddp.no_sync():
            (self.ddp(windows) / EVERY).backward()
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

    def step(self, windows):
        super().step(windows)
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
        self.dense = run.get("dense_steps", WARM_UP)
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
    """PyTorch's PowerSGD of rank 4. On Gloo its hook hangs as soon as two buckets are in flight."""

    bucket_cap_mb = ONE_BUCKET
    DENSE = 2  # steps at the beginning, the fewest that it allows

    def __init__(self, model, optimizer, run):
        super().__init__(model, optimizer, run)
        self.state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=self.DENSE)
        self.ddp.register_comm_hook(self.state, powerSGD_hook.powerSGD_hook)

    def bytes_sent(self):
        _, _, values = self.state.compression_stats()  # of the steps after the dense ones
        dense = min(self.steps, self.DENSE) * dense_bytes(self.model)
        return dense + ring_all_reduce_bytes(4 * values, dist.get_world_size())


class Ours(Ddp):
    """A method of thinwire, made from the run."""

    def __init__(self, method, model, optimizer, run):
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


def _ours(method):
    return functools.partial(Ours, method)


def _local(every=EVERY, **options):
    return _ours(lambda run: thinwire.LocalSteps(every=every, outer_momentum=run["outer_momentum"], **options))


def _partial(memory):
    return _local(method=BlockSparse("nominated", density=0.25, block_size=16, wire_dtype="int4", memory=memory))


# A name, what it is called in the tables, and how it is made.
DDP, POWERSGD, ACCUMULATION, ALONE = "ddp", "powersgd-4", "accumulation", "alone"
LOCAL, LOCAL_8, LOCAL_WAITS, LATE = "local-16", "local-8", "local-16-waits", "local-16-late"
POST_LOCAL, OUTER_DDP, NOMINATED = "post-local-sgd", "ddp-outer", "nominated-16-int4"
LOCAL_EXACT, LOCAL_64, FRAGMENTS = "local-16-float32", "local-64", "local-16-fragments"
PARTIAL_WEIGHTS, PARTIAL_ERROR = "local-16-partial-weights", "local-16-partial-error"
LABELS = {
    DDP: "plain DDP",
    POWERSGD: "PowerSGD rank 4",
    LOCAL_8: "LocalSteps(every=8)",
    LOCAL: "LocalSteps(every=16)",
    ACCUMULATION: "DDP, gradients of 16 passes accumulated",
    OUTER_DDP: "DDP with the outer optimizer",
    POST_LOCAL: "PostLocalSGD, a round every 16",
    ALONE: "one rank alone",
    NOMINATED: "nominated 16 %, int4",
    LOCAL_WAITS: "LocalSteps(every=16, overlap=0)",
    LATE: "LocalSteps(every=16, overlap=4)",
    LOCAL_EXACT: "LocalSteps(every=16), float32",
    LOCAL_64: "LocalSteps(every=64)",
    FRAGMENTS: "LocalSteps(every=16, fragments=4)",
    PARTIAL_WEIGHTS: 'LocalSteps(every=16), nominated 25 %, int4, "weights"',
    PARTIAL_ERROR: 'LocalSteps(every=16), nominated 25 %, int4, "error_feedback"',
}


def make(name: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer, run: dict) -> Ddp:
    """A way to train. What a thinwire cannot do yet fails here, not before."""
    return {
        DDP: Ddp,
        POWERSGD: PowerSgd,
        LOCAL_8: _local(8),
        LOCAL: _local(),
        ACCUMULATION: Accumulation,
        OUTER_DDP: OuterDdp,
        POST_LOCAL: PostLocalSgd,
        ALONE: Alone,
        NOMINATED: _ours(lambda run: BlockSparse("nominated", density=0.16, block_size=16, wire_dtype="int4")),
        LOCAL_WAITS: _local(overlap=0),
        LATE: _local(overlap=4),
        LOCAL_EXACT: _local(method=Dense()),
        LOCAL_64: _local(64),
        FRAGMENTS: _local(fragments=4),
        PARTIAL_WEIGHTS: lambda *given: _partial("weights")(*given),
        PARTIAL_ERROR: lambda *given: _partial("error_feedback")(*given),
    }[name](model, optimizer, run)
