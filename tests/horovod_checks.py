"""Checks of what there is for Horovod, each called on every rank: in test_horovod_simulated.py on ranks that take
turns in one process, in test_horovod.py on those that ``horovodrun`` starts with this file.

usage: python horovod_checks.py DIRECTORY [NAME ...]     each rank writes DIRECTORY/RANK.jsonl, a line a check
"""
import contextlib
import gc
import io
import json
import logging
import os
import random
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import models
import thinwire
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from simulated import Simulated
from thinwire import BlockSparse, Dense, DivideAndShuffle, Elastic, LocalSteps, ops
from thinwire.core.blocks import Layout
from thinwire.elastic.lateness import heaviest

try:
    import horovod.torch as hvd
except ImportError:
    hvd = None

PAIR = None  # of three ranks, the process set of two
SIMULATED = False


@dataclass
class Check:
    """A function to call on each rank. ranks: how many there may be. real: with how many ``make test`` has real Horovod
    run it, and not ``make test-full`` alone. simulated: whether ranks in one process do."""

    function: object
    ranks: tuple = ()
    real: tuple = ()
    simulated: bool = True


CHECKS: dict[str, Check] = {}

MEMORIES = {
    "independent": ("none", "error_feedback", "control_variate"),
    "permuted": ("none", "error_feedback", "control_variate"),
    "shared": ("none", "error_feedback", "control_variate"),
    "nominated": ("none", "error_feedback"),
}
DENSITIES = {"independent": None, "permuted": None, "shared": 0.3, "nominated": 0.2}


WIDTH = 24


def small(layers=3, seed=0):
    return models.mlp(WIDTH, layers, seed=seed)


def data(seed=0):
    """This rank's batches."""
    return models.data(hvd.rank(), WIDTH, seed=seed)


def method(selection, memory, wire_dtype=torch.float32, **options):
    options = {"density": DENSITIES[selection], "block_size": 16, "dense_below": 20} | options
    return BlockSparse(selection, memory=memory, wire_dtype=wire_dtype, **options)


EACH = [method(selection, memory) for selection, memories in MEMORIES.items() for memory in memories]
EACH_HALF = [method(m.selection, m.memory, torch.float16) for m in EACH]
ONE_EACH = [method(selection, memories[-1]) for selection, memories in MEMORIES.items()]
ONE_EACH_HALF = [method(m.selection, m.memory, torch.float16) for m in ONE_EACH]
WITH_FEEDBACK = [m for m in EACH if m.memory == "error_feedback"]
FEEDBACK = method("nominated", "error_feedback", density=0.3)
FEW_BITS = [method("nominated", "error_feedback", wire_dtype) for wire_dtype in ("int8", "int4", "int2")]
INT4 = FEW_BITS[1]


def label(method):
    if isinstance(method, Elastic):
        return f"{label(method.method)}-beta{method.beta}-delay{method.max_delay}"
    if isinstance(method, Dense):
        return "dense"
    if isinstance(method, DivideAndShuffle):
        return f"{method.schedule}-{method.overlap}"
    if isinstance(method, LocalSteps):
        return f"{label(method.method)}-{method.method.wire_dtype}-overlap{method.overlap}"
    options = [option for option in ("momentum", "warmup_steps") if getattr(method, option)]
    return "-".join([models.label(method), *options])


def check(*methods, ranks=(2, 3), real=None, on_real=None, simulated=True):
    """Make a function a check, or one check for each of the methods that it is to be given.

    real: with how many ranks it is one for real Horovod in ``make test`` too; the fewest, unless given. on_real: the
    methods of which that holds; the last, unless given.
    """
    real = ranks[:1] if real is None else real
    on_real = methods[-1:] if on_real is None else on_real

    def register(function):
        if not methods:
            CHECKS[function.__name__] = Check(function, ranks, real, simulated)
        for one in methods:
            found = CHECKS.setdefault(f"{function.__name__}-{label(one)}", Check(lambda one=one: function(one)))
            found.ranks += ranks
            found.real += real if one in on_real else ()
            found.simulated = simulated
        return function

    return register


class Recorder(thinwire.horovod.GradientCompressor if hvd else object):
    """The compressor, keeping the sizes of what it gives Horovod."""

    def compress(self, tensor):
        values, context = super().compress(tensor)
        self.__dict__.setdefault("sizes", {})[context.name] = values.numel()
        return values, context


def setup(model, method, lr=0.05, momentum=0.0, process_set=None, inner=None, recorder=None, known=False,
          **options):  # fmt: skip
    """Optimizer and compressor as a user makes them; method None: Horovod without a compressor. known: whether the
    compressor is given the optimizer, also where it does without."""
    sets = {} if process_set is None else {"process_set": process_set}
    optimizer = models.sgd(model, lr, momentum) if inner is None else inner
    if method is None:
        return hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), **options, **sets), None
    needed = known or isinstance(method, Elastic) or method.describe().get("momentum", "0.0") != "0.0"
    options_of_it = {"optimizer": optimizer} if needed else {}
    compressor = (recorder or thinwire.horovod.Compressor)(model.named_parameters(), method, **options_of_it, **sets)
    return hvd.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), compression=compressor, **options, **sets
    ), compressor


def loss_of(model, batch):
    x, y = batch
    return ((model(x) - y) ** 2).mean()


def train(method, steps, model=None, passes=1, seed=0, **options):
    """Returns (model, compressor) after some steps."""
    model = small() if model is None else model
    optimizer, compressor = setup(model, method, backward_passes_per_step=passes, **options)
    batches = data(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(passes):
            loss_of(model, next(batches)).backward()
        optimizer.step()
    return model, compressor


def everyone(tensor, process_set=None):
    """The tensor of every rank, stacked, by plain Horovod."""
    sets = {} if process_set is None else {"process_set": process_set}
    return hvd.allgather(tensor.detach()[None].contiguous(), name="checks.everyone", **sets)


def same_everywhere(model, process_set=None):
    flat = models.flat(model.parameters())
    assert torch.isfinite(flat).all()
    rows = everyone(flat, process_set)
    return all(torch.equal(rows[0], row) for row in rows)


def gap(one, other):
    """Largest difference between two models' parameters."""
    return float((models.flat(one.parameters()) - models.flat(other.parameters())).abs().max())


def local_gradients(model, batch):
    return dict(zip([name for name, _ in model.named_parameters()], models.local_gradient(model, batch), strict=True))


def averaged(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def residuals(compressor, model):
    """Residual of each parameter, zero where there is none yet."""
    held = compressor.state_dict()["memory"]["residual"]
    return {n: held.get(n, torch.zeros(p.numel())).view(p.shape) for n, p in model.named_parameters()}


@contextlib.contextmanager
def logged():
    """What thinwire logs on this rank."""
    messages, handler = [], logging.Handler()
    handler.addFilter(lambda record: record.thread == here)
    handler.emit, here = lambda record: messages.append(record.getMessage()), threading.get_ident()
    logging.getLogger("thinwire").addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger("thinwire").removeHandler(handler)


def lag(jitter):
    """Come later than other ranks, or earlier. Simulated ranks go on in an order that is drawn anyway."""
    longest = jitter.choice([0.0, 0.0, 0.001, 0.01])
    if not SIMULATED:
        time.sleep(longest)


def raised(kind, function, *mentions):
    """The function raises this kind of error, which mentions these things, on this rank; returns the message."""
    try:
        function()
    except kind as error:
        for mention in mentions:
            assert mention in str(error), f"{mention!r} not in {error}"
        return str(error)
    raise AssertionError(f"nothing was raised; {kind.__name__} was expected")


def close(one, other, tolerance=1e-5):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# ---- training ----


@check(*EACH, real=(2, 3), on_real=(EACH[0], EACH[-1]))
@check(*EACH_HALF, on_real=(EACH_HALF[1],))
@check(*FEW_BITS, on_real=())
@check(*[method("nominated", "error_feedback", w, momentum=0.9, warmup_steps=2, ramp_steps=4, seed=3)
         for w in (torch.float32, "int8")], on_real=())  # fmt: skip
def replicas(method):
    """The same bits on all ranks, and the loss on other data falls."""
    model, compressor = train(method, 40, lr=0.3)
    assert same_everywhere(model)
    other = data(seed=1)
    x, y = (torch.cat(tensors) for tensors in zip(*(next(other) for _ in range(50)), strict=True))
    assert loss_of(model, (x, y)) < 0.9 * loss_of(small(), (x, y))
    assert compressor.stats()["steps"] == 40


@check()
def drop_in_as_users_write_it():
    model = small(seed=hvd.rank())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=thinwire.horovod.Compressor(model.named_parameters(), BlockSparse(selection="nominated")),
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    batches = data()
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(model, next(batches)).backward()
        optimizer.step()
    assert same_everywhere(model)


@check(*[method(m.selection, m.memory, density=1.0) for m in EACH], Dense(), ranks=(2,))
def density_one_is_plain_horovod(method):
    for op in (hvd.Average, hvd.Sum):
        plain, _ = train(None, 4, op=op)
        assert gap(train(method, 4, op=op)[0], plain) < 1e-5
        assert gap(small(), plain) > 1e-3


@check(*[method(m.selection, m.memory, warmup_steps=3) for m in ONE_EACH], ranks=(2,))
def warm_up_is_plain_horovod(method):
    assert gap(train(method, 3)[0], train(None, 3)[0]) < 1e-5
    assert gap(train(method, 6)[0], train(None, 6)[0]) > 1e-4


@check(*EACH, *FEW_BITS, ranks=(2,), on_real=(EACH[-1],))
@check(*ONE_EACH_HALF)
def sum_is_n_times_average(method):
    n = hvd.size()
    average = train(method, 3, lr=0.25, op=hvd.Average)[0]
    summed = train(method, 3, lr=0.25 / n, op=hvd.Sum)[0]
    exact = n == 2 and method.wire_dtype != torch.float16
    assert gap(average, summed) <= (0.0 if exact else 1e-4 if method.wire_dtype == torch.float32 else 2e-2)


@check(*ONE_EACH, INT4, ranks=(2,), on_real=(ONE_EACH[0], ONE_EACH[-1]))
def gradient_predivide_factor(method):
    divided = train(method, 4, gradient_predivide_factor=3.0)[0]
    assert gap(train(method, 4)[0], divided) < 1e-5
    assert same_everywhere(divided)


@check(*ONE_EACH, ranks=(2,))
def backward_passes_per_step(method):
    """Two backward passes add up to one local gradient: as one pass over the sum of their losses."""
    model, _ = train(method, 4, passes=2)
    assert same_everywhere(model)
    other = small()
    optimizer, _ = setup(other, method)
    batches = data()
    for _ in range(4):
        optimizer.zero_grad()
        (loss_of(other, next(batches)) + loss_of(other, next(batches))).backward()
        optimizer.step()
    assert gap(model, other) < 1e-4


@check(*ONE_EACH, INT4, ranks=(2,), on_real=(ONE_EACH[0], ONE_EACH[-1]))
def groups(method):
    plain = train(method, 4)[0]
    for how in ("number", "lists"):
        model = small()
        parameters = list(model.parameters())
        grouped = train(method, 4, model, groups=2 if how == "number" else [parameters[:3], parameters[3:5]])[0]
        assert same_everywhere(grouped)
        assert gap(plain, grouped) == 0.0


@check(*ONE_EACH, INT4, ranks=(2,), on_real=(ONE_EACH[0], ONE_EACH[-1]))
def two_models(method):
    """Two models and optimizers, whose backward passes are interleaved, train as each does alone."""
    pair = [torch.nn.ModuleDict({name: small(2, seed)}) for seed, name in enumerate("ab")]
    optimizers = [setup(model, method)[0] for model in pair]
    streams = [data(seed) for seed in range(2)]
    for _ in range(6):
        losses = []
        for model, optimizer, batches in zip(pair, optimizers, streams, strict=True):
            optimizer.zero_grad()
            losses.append(loss_of(next(iter(model.values())), next(batches)))
        sum(losses).backward()
        for optimizer in optimizers:
            optimizer.step()
    for seed, (model, name) in enumerate(zip(pair, "ab", strict=True)):
        alone = torch.nn.ModuleDict({name: small(2, seed)})
        optimizer, _ = setup(alone, method)
        batches = data(seed)
        for _ in range(6):
            optimizer.zero_grad()
            loss_of(alone[name], next(batches)).backward()
            optimizer.step()
        assert same_everywhere(model)
        assert gap(model, alone) == 0.0


@check(*ONE_EACH, ranks=(2,))
def clipping(method):
    model = small()
    optimizer, _ = setup(model, method)
    batches = data()
    for _ in range(4):
        optimizer.zero_grad()
        (100 * loss_of(model, next(batches))).backward()
        optimizer.synchronize()
        assert float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)) > 0.5
        assert float(models.flat(p.grad for p in model.parameters()).norm()) < 0.5001
        before = models.flat(model.parameters())
        with optimizer.skip_synchronize():
            optimizer.step()
        assert abs(float((models.flat(model.parameters()) - before).norm()) - 0.05 * 0.5) < 1e-3
    assert same_everywhere(model)


@check(*ONE_EACH, *FEW_BITS, ranks=(3,), on_real=(ONE_EACH[-1],))
def process_set_of_two(method):
    pair = PAIR
    if not pair.included():
        model = small()
        optimizer, compressor = setup(model, method, process_set=pair)
        raised(RuntimeError, compressor.state_dict, "not in")
        return
    model, compressor = train(method, 5, process_set=pair)
    assert same_everywhere(model, pair)
    plain = train(None, 5, process_set=pair)[0]
    assert 1e-4 < gap(plain, model) < 1.0
    dense = train(Dense(), 5, process_set=pair)[0]
    assert gap(plain, dense) < 1e-5
    assert compressor.state_dict()["world_size"] == 2


@check(ranks=(3,))
def process_set_given_to_one_of_them():
    """A compressor that would wait for ranks outside the optimizer's process set says so."""
    for groups in (None, 1):
        _process_set_given_to_one_of_them(groups)


def _process_set_given_to_one_of_them(groups):
    model = small(2)
    compressor = thinwire.horovod.Compressor(model.named_parameters(), BlockSparse())
    optimizer = hvd.DistributedOptimizer(
        models.sgd(model), model.named_parameters(), compression=compressor, process_set=PAIR, groups=groups
    )
    if PAIR.included():
        raised(ValueError, loss_of(model, next(data())).backward, "process_set", "both the same")
    del optimizer


# ---- what is averaged ----


@check(*[method(s, m, wire_dtype=w) for s in ("independent", "permuted") for m in ("none", "error_feedback")
         for w in (torch.float32, torch.float16)])  # fmt: skip
def union_by_hand(method):
    """Horovod is given the union's blocks, and the result is the ranks' own blocks added up and scaled."""
    n, model = hvd.size(), models.mlp(37, 3)
    optimizer, compressor = setup(model, method, lr=0.0, recorder=Recorder)
    batches = models.data(hvd.rank(), 37)
    waiting = {name: torch.zeros(n, p.numel()) for name, p in model.named_parameters()}
    some_gap = False
    for step in range(3):
        batch = next(batches)
        mine = local_gradients(model, batch)
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.synchronize()
        for name, parameter in model.named_parameters():
            blocks, masks, share = drawn(name, parameter.numel(), method, step, n)
            gradients = everyone(mine[name].reshape(-1))
            if method.memory == "error_feedback":
                share, gradients = 1.0, gradients + waiting[name]
                waiting[name] = gradients * ~masks
            expected = (gradients * masks / share).sum(0) / n
            close(parameter.grad.reshape(-1), expected, 1e-6 if method.wire_dtype == torch.float32 else 2e-3)
            union = blocks.unique().numel()
            total = -(-parameter.numel() // method.block_size)
            some_gap |= union < total
            assert compressor.sizes[name] == (parameter.numel() if union == total else union * method.block_size)
        with optimizer.skip_synchronize():
            optimizer.step()
    assert some_gap or method.selection == "permuted"


def drawn(name, numel, method, step, n):
    """Blocks [n, K] that the ranks draw of one parameter, their elements as masks [n, N], and their share."""
    layout = Layout((name,), (numel,), method.block_size)
    slots = layout.slots(method.counts_at(step, n, (numel,)))
    blocks = slots.every_block.repeat(n, 1)
    if not slots.whole[0]:
        blocks = torch.empty(n, slots.total, dtype=torch.int64)
        streams, deals = (range(1, n + 1), [0] * n) if method.selection == "independent" else ([0] * n, range(n))
        ops.draw_blocks(slots.table, layout.units, method.block_size, method.seed, step, streams, deals, blocks)
    masks = torch.zeros(n, layout.blocks[0], dtype=torch.bool).scatter(1, blocks, True)
    return blocks, masks.repeat_interleave(method.block_size, dim=1)[:, :numel], slots.shares[0]


@check(*WITH_FEEDBACK, *FEW_BITS, *[method(m.selection, m.memory, torch.float16) for m in WITH_FEEDBACK])
def feedback_conserves(method):
    """What was sent and what remains is the gradient and what remained before, over all ranks."""
    n, model = hvd.size(), models.mlp(37, 3)
    optimizer, compressor = setup(model, method, lr=0.0)
    batches = models.data(hvd.rank(), 37)
    before = residuals(compressor, model)
    for _ in range(4):
        batch = next(batches)
        mine = local_gradients(model, batch)
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        after, sent = residuals(compressor, model), averaged(model)
        for name in mine:
            given = everyone(mine[name] + before[name]).sum(0)
            found = n * sent[name] + everyone(after[name]).sum(0)
            close(found, given, 1e-3 if method.wire_dtype == torch.float16 else 1e-6)
        before = after
    assert any(bool(residual.any()) for residual in before.values())


@check(*FEW_BITS, on_real=(INT4,))
def few_bits_conserve_to_the_bit(method):
    """Of whole numbers on two ranks every sum is exact. The bits of an average are those of DDP."""
    for op in (hvd.Average, hvd.Sum):
        _few_bits(method, op)


def _few_bits(method, op):
    n, model = hvd.size(), models.mlp(37, 2)
    optimizer, compressor = setup(model, method, lr=0.0, known=True, op=op)
    generator, before = torch.Generator().manual_seed(hvd.rank()), residuals(compressor, model)
    ddps = {name: Simulated(method, n, name) for name, _ in model.named_parameters()}
    for step in range(4):
        gradients = {name: torch.randint(-99, 100, p.shape, generator=generator).float()
                     for name, p in model.named_parameters()}  # fmt: skip
        optimizer.zero_grad()
        sum((p * gradients[name]).sum() for name, p in model.named_parameters()).backward()
        optimizer.step()
        after, sent = residuals(compressor, model), averaged(model)
        for name, gradient in gradients.items():
            rows = everyone(gradient)
            expected, _ = ddps[name].step([row.reshape(-1) for row in rows], step)
            if op == hvd.Average:
                assert torch.equal(sent[name].reshape(-1), expected), (name, step)
            else:
                close(sent[name].reshape(-1), n * expected, 1e-6)
            if n == 2:
                given = (rows.double() + everyone(before[name]).double()).sum(0)
                found = (1 if op == hvd.Sum else n) * sent[name].double() + everyone(after[name]).double().sum(0)
                assert torch.equal(found, given), (name, step)
        before = after
    assert any(bool(residual.any()) for residual in before.values())


@check(method("shared", "control_variate"), method("independent", "control_variate"))
def control_variate_is_each_ranks_own(method):
    """On gradients that stand still, own becomes this rank's gradient and mean the ranks' mean."""
    model = small(2)
    optimizer, compressor = setup(model, method, lr=0.0)
    batch = next(data())
    mine = local_gradients(model, batch)
    for _ in range(40):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    memory, sent = compressor.state_dict()["memory"], averaged(model)
    for name, gradient in mine.items():
        mean = everyone(gradient).mean(0)
        close(memory["own"][name].view(gradient.shape), gradient, 1e-6)
        close(memory["mean"][name].view(gradient.shape), mean, 1e-6)
        close(sent[name], mean, 1e-6)


# ---- parameters without a gradient ----


class Heads(torch.nn.Module):
    """A trunk and some heads, of which a forward pass uses those it is told to."""

    def __init__(self, heads=4, width=WIDTH):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.trunk = torch.nn.Linear(width, width)
            self.heads = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(heads))

    def forward(self, x, used):
        x = torch.tanh(self.trunk(x))
        return sum(self.heads[head](x) for head in used)


@check(*EACH, INT4, ranks=(2,), on_real=(EACH[0], EACH[-1]))
@check(*ONE_EACH, INT4, ranks=(3,), real=())
def unused_parameters(method):
    """Some heads unused on all ranks, some on one: no hang, equal replicas, and the unused keep their residual. In few
    bits the owner of a sum keeps what rounding that has lost, though it may not have used the head itself."""
    model, rank = Heads(), hvd.rank()
    optimizer, compressor = setup(model, method)
    batches = data()
    turns = [lambda r: {0, 1, 2, 3}, lambda r: {0}, lambda r: {r % 2}, lambda r: {1, 2, 3} if r else {0},
             lambda r: set(range(4)) - {r}, lambda r: {0, 1, 2, 3}]  # fmt: skip
    for used_by in turns:
        x, y = next(batches)
        used = used_by(rank)
        touched = set().union(*map(used_by, range(hvd.size()))) if isinstance(method.wire_dtype, str) else used
        before = residuals(compressor, model) if method.memory == "error_feedback" else {}
        optimizer.zero_grad()
        ((model(x, used) - y) ** 2).mean().backward()
        optimizer.step()
        after = residuals(compressor, model) if before else {}
        for head in set(range(4)) - touched:
            for name in (f"heads.{head}.weight", f"heads.{head}.bias"):
                assert not before or torch.equal(before[name], after[name]), name
        assert same_everywhere(model)
    assert not before or any(bool(r.any()) for r in after.values())


@check(*ONE_EACH, ranks=(2,))
def never_used(method):
    model = Heads()
    optimizer, _ = setup(model, method)
    batches = data()
    start = model.heads[3].weight.detach().clone()
    for _ in range(4):
        x, y = next(batches)
        optimizer.zero_grad()
        ((model(x, {0, 1}) - y) ** 2).mean().backward()
        optimizer.step()
    assert torch.equal(model.heads[3].weight, start)
    assert same_everywhere(model)


# ---- inf and NaN ----


@check(
    *EACH,
    *ONE_EACH_HALF,
    *FEW_BITS,
    method("shared", "error_feedback", warmup_steps=9),
    method("shared", "control_variate", warmup_steps=9),
    method("nominated", "error_feedback", momentum=0.9),
    ranks=(2,),
)
def not_finite_on_one_rank(method):
    """Every rank learns of it, nobody's memory keeps anything of that step, and the next one is as ever."""
    model, rank = small(), hvd.rank()
    optimizer, compressor = setup(model, method, lr=0.0)
    batches = data()
    for step in range(5):
        before = compressor.state_dict()["memory"]
        factor = {2: float("inf"), 3: float("nan")}.get(step, 1.0) if rank == 0 else 1.0
        optimizer.zero_grad()
        (factor * loss_of(model, next(batches))).backward()
        optimizer.synchronize()
        for name, parameter in model.named_parameters():
            assert bool(torch.isfinite(parameter.grad).all()) == (step not in (2, 3)), (name, step)
        optimizer.zero_grad()
        with optimizer.skip_synchronize():
            optimizer.step()
        after = compressor.state_dict()["memory"]
        for store, tensors in after.items():
            for name, tensor in tensors.items():
                assert torch.isfinite(tensor).all(), (store, name)
                if step in (2, 3):
                    close(tensor, before[store][name], 1e-6)


@check(*WITH_FEEDBACK, INT4, ranks=(2,), on_real=(WITH_FEEDBACK[-1],))
def grad_scaler(method):
    """As Horovod's users scale gradients: an overflow on one rank skips the step on all."""
    model, rank = small(), hvd.rank()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = models.sgd(model)
    compressor = thinwire.horovod.Compressor(model.named_parameters(), method, grad_scaler=scaler)
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=compressor)
    batches = data()
    for step in range(5):
        before = models.flat(model.parameters())
        optimizer.zero_grad()
        scaler.scale(loss_of(model, next(batches)) * (float("inf") if step == 2 and rank == 1 else 1.0)).backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        held = max(float(r.abs().max()) for r in residuals(compressor, model).values())
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, models.flat(model.parameters())) == (step == 2)
        assert scaler.get_scale() == 2.0 ** (9 if step >= 2 else 10)
        assert 0 < held / 2.0 ** (9 if step > 2 else 10) < 0.1, (step, held)
    assert same_everywhere(model)


# ---- which passes belong to a step ----


def _averaged_pass(model, optimizer, batch):
    """A backward pass whose gradients are averaged before anyone knows whether there will be a step."""
    loss_of(model, batch).backward()
    optimizer.synchronize()


def _step(optimizer):
    with optimizer.skip_synchronize():
        optimizer.step()
    optimizer.zero_grad()


@check(*WITH_FEEDBACK, INT4, method("shared", "control_variate"), Elastic(Dense(), 0.0), Elastic(FEEDBACK, 0.5),
       ranks=(2,), on_real=(WITH_FEEDBACK[0], Elastic(FEEDBACK, 0.5)))  # fmt: skip
def steps_that_are_left_out(method):
    """What is cleared, or said to be skipped, leaves what is kept bit for bit as it was; training goes on."""
    model, batches = small(), data()
    optimizer, compressor = setup(model, method, known=True)
    for said in (False, True, False):
        for _ in range(2):
            _averaged_pass(model, optimizer, next(batches))
            _step(optimizer)
        before = compressor.state_dict()
        for _ in range(2):  # which are of one step
            _averaged_pass(model, optimizer, next(batches))
        if said:
            compressor.skip_step()
        optimizer.zero_grad()
        after = compressor.state_dict()
        for kind, tensors in before["memory"].items():
            assert all(torch.equal(tensor, after["memory"][kind][name]) for name, tensor in tensors.items())
        one, other = (state.get("late", []) for state in (before, after))
        assert [late["step"] for late in one] == [late["step"] for late in other]
        assert all(torch.equal(a["tensors"][name], b["tensors"][name]) for a, b in zip(one, other) for name in a["lr"])
    compressor.finalize()
    assert same_everywhere(model)


@check(*[method(selection, "error_feedback", density=1.0, momentum=0.9) for selection in ("shared", "nominated")],
       ranks=(2,))  # fmt: skip
def passes_that_add_up(method):
    """A gradient of 1 in each of two averaged passes: momentum decays once a step."""
    model = torch.nn.Linear(8, 1, bias=False)
    optimizer, compressor = setup(model, method, lr=1.0)
    seen = []
    for _ in range(3):
        for _ in range(2):
            model(torch.ones(1, 8)).sum().backward()
            optimizer.synchronize()
        seen.append(float(model.weight.grad[0, 0]))
        _step(optimizer)
    close(torch.tensor(seen), torch.tensor([2.0, 3.8, 5.42]))


# ---- disagreement ----


def _disagree(mention, make):
    """make(odd) gives model and compressor; odd on the last rank. All ranks are told, soon."""
    begin = time.monotonic()
    model, compressor = make(hvd.rank() == hvd.size() - 1)
    optimizer = hvd.DistributedOptimizer(models.sgd(model), model.named_parameters(), compression=compressor)
    raised(ValueError, loss_of(model, next(data())).backward, "ranks differ", mention,
           f"on rank {hvd.size() - 1}")  # fmt: skip
    assert time.monotonic() - begin < 5.0
    del optimizer


@check()
def different_methods():
    def make(odd):
        model = small(2)
        chosen = BlockSparse("nominated") if odd else BlockSparse("shared", memory="error_feedback")
        return model, thinwire.horovod.Compressor(model.named_parameters(), chosen)

    _disagree("selection: shared on rank 0", make)


@check()
def different_seeds():
    def make(odd):
        model = small(2)
        return model, thinwire.horovod.Compressor(model.named_parameters(), BlockSparse(seed=7 if odd else 0))

    _disagree("seed: 0 on rank 0", make)


@check()
def different_models():
    def make(odd):
        model = small(3 if odd else 2)
        return model, thinwire.horovod.Compressor(model.named_parameters(), BlockSparse())

    _disagree("model: 4 parameters", make)


@check()
def different_names_given():
    """One rank names some of the parameters only: the others do not wait for it."""

    def make(odd):
        model = small(2)
        named = list(model.named_parameters())
        return model, thinwire.horovod.Compressor(named[:2] if odd else named, BlockSparse())

    _disagree("model: 4 parameters", make)


@check()
def different_steps():
    def make(odd):
        model = small(2)
        compressor = thinwire.horovod.Compressor(model.named_parameters(), BlockSparse())
        if odd:
            compressor.load_state_dict(compressor.state_dict() | {"step": 5})
        return model, compressor

    _disagree("step: 0 on rank 0", make)


@check()
def training_goes_on_after_a_disagreement():
    different_seeds()
    model, _ = train(BlockSparse(), 4)
    assert same_everywhere(model)


# ---- checkpoints ----


@check(*EACH, INT4, method("nominated", "error_feedback", torch.float16, momentum=0.9, ramp_steps=6), ranks=(2,))
def resume(method):
    """Stopped after 4 steps of 8 and loaded into new objects, training is what it would have been."""
    whole = train(method, 8)[0]
    model, compressor = train(method, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "thinwire": compressor.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    _assert_plain(saved["thinwire"])

    model = small(seed=9)
    model.load_state_dict(saved["model"])
    optimizer, compressor = setup(model, method)
    compressor.load_state_dict(saved["thinwire"])
    batches = data()
    for step, batch in enumerate(batches):
        if step == 8:
            break
        if step >= 4:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
    assert gap(whole, model) == 0.0
    assert compressor.state_dict()["step"] == 8
    assert compressor.stats()["steps"] == 4


def _assert_plain(state):
    for key, value in state.items():
        assert type(key) is str
        if isinstance(value, dict):
            _assert_plain(value)
        else:
            assert type(value) in (torch.Tensor, int, float, str), (key, type(value))


@check(ranks=(2,))
def state_of_another_method():
    model = small(2)
    state = thinwire.horovod.Compressor(model.named_parameters(), BlockSparse()).state_dict()
    other = thinwire.horovod.Compressor(model.named_parameters(), BlockSparse("nominated"))
    raised(ValueError, lambda: other.load_state_dict(state), "memory=none", "memory=error_feedback")


# ---- dtypes ----


class Slope(torch.nn.Module):
    """Its gradient is what it is given."""

    def __init__(self, numel=100, dtype=torch.float32):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(numel, dtype=dtype))

    def forward(self, slope):
        return (self.weight * slope.to(self.weight.dtype)).sum()


@check(*[method(m.selection, m.memory, torch.float16, density=1.0) for m in EACH if m.memory != "control_variate"])
def large_values_in_float16(method):
    """1e6 is beyond float16: it is cut off with a warning, or waits in the residual until it has been sent."""
    n, model = hvd.size(), Slope()
    optimizer, compressor = setup(model, method, lr=0.0)
    with logged() as warnings:
        for step in range(2):
            optimizer.zero_grad()
            model(torch.full((100,), 1e6 if step == 0 else 1.0)).backward()
            optimizer.synchronize()
            grad = model.weight.grad.clone()
            assert torch.isfinite(grad).all()
            if step == 0 or method.memory == "error_feedback":
                close(grad, torch.full((100,), 32768.0), 1e-3)
            if method.memory == "error_feedback":
                left = everyone(residuals(compressor, model)["weight"]).sum(0)
                close(left, torch.full((100,), n * (1e6 + step - (step + 1) * 32768.0)), 1e-4)
            with optimizer.skip_synchronize():
                optimizer.step()
    assert len(warnings) == (method.memory == "none"), warnings
    assert all("weight exceed 32768" in warning and "error_feedback" in warning for warning in warnings)


@check(*EACH, ranks=(2,))
def half_precision_models(method):
    """float16 and bfloat16 gradients, very different in size on different ranks; Horovod cannot add bfloat16."""
    rank = hvd.rank()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        for wire_dtype in (torch.float32, torch.float16):
            model = Slope(dtype=dtype)
            one = BlockSparse(method.selection, density=1.0, memory=method.memory, wire_dtype=wire_dtype)
            optimizer, _ = setup(model, one, lr=0.0)
            slope = torch.linspace(-1.0, 1.0, 100) * 64.0**rank
            for _ in range(2):
                optimizer.zero_grad()
                model(slope).backward()
                optimizer.step()
                mean = everyone(slope.to(dtype).to(torch.float64)).mean(0)
                close(model.weight.grad.to(torch.float64), mean, 1e-2)
            assert model.weight.grad.dtype == dtype


@check(*ONE_EACH, INT4, ranks=(2,), on_real=(ONE_EACH[-1],))
def several_dtypes_in_one_model(method):
    model = torch.nn.ModuleDict({str(d)[6:]: Slope(dtype=d) for d in (torch.float64, torch.float16, torch.float32)})
    optimizer, _ = setup(model, method)
    generator = torch.Generator().manual_seed(hvd.rank())
    for _ in range(5):
        optimizer.zero_grad()
        sum(part(torch.randn(100, generator=generator)).double() for part in model.values()).backward()
        optimizer.step()
    assert same_everywhere(model)


@check(*ONE_EACH, ranks=(2,))
def odd_shapes(method):
    """Gradients that are not contiguous, one element, and scalars."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 16, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-0.1, 0.11, parameter.numel()).view(parameter.shape))
    model = model.to(memory_format=torch.channels_last)
    model.register_parameter("scalar", torch.nn.Parameter(torch.tensor(1.0)))
    optimizer, _ = setup(model, method, lr=0.01)
    generator = torch.Generator().manual_seed(hvd.rank())
    start = model.scalar.item()
    for _ in range(4):
        optimizer.zero_grad()
        x = torch.randn(4, 3, 6, 6, generator=generator).to(memory_format=torch.channels_last)
        (model.scalar * model(x)).square().mean().backward()
        optimizer.step()
    assert same_everywhere(model)
    assert model.scalar.item() != start


@check(ranks=(2,))
def channels_last_by_hand():
    """An averaged gradient that came in another memory order has its elements in the right places."""
    model = torch.nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    with torch.no_grad():
        model.weight.copy_(torch.linspace(-0.1, 0.1, model.weight.numel()).view(model.weight.shape))
        model.bias.zero_()
    optimizer, _ = setup(model, Dense(), lr=0.0)
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(hvd.rank()))
    mine = torch.autograd.grad(model(x).square().mean(), model.weight)[0]
    model(x).square().mean().backward()
    optimizer.step()
    close(model.weight.grad, everyone(mine).mean(0), 1e-6)


# ---- what is refused ----


@check(ranks=(2,))
def refused_when_made():
    model = small(2)
    make = thinwire.horovod.Compressor

    def named():
        return model.named_parameters()

    raised(ValueError, lambda: make(named(), BlockSparse("topk")), "topk", "nominated")
    raised(ValueError, lambda: make(named(), BlockSparse(wire_dtype=torch.bfloat16)), "BlockSparse", "bfloat16")
    raised(ValueError, lambda: make(named(), Dense(wire_dtype=torch.bfloat16)), "Dense", "bfloat16")
    raised(ValueError, lambda: make(named(), Dense(exact=True)), "Dense(exact=True)", "leave exact out")
    raised(TypeError, lambda: make(named(), "nominated"), "must be a thinwire method")
    raised(TypeError, lambda: make(named(), BlockSparse), "call it")
    raised(TypeError, lambda: make(model.parameters(), BlockSparse()), "named_parameters")
    raised(ValueError, lambda: make([], BlockSparse()), "no trainable parameter")
    spectrum = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    raised(TypeError, lambda: make([("spectrum", spectrum)], BlockSparse()), "spectrum", "complex64")
    corrected = BlockSparse("nominated", momentum=0.9)
    raised(ValueError, lambda: make(named(), corrected), "optimizer=")
    raised(ValueError, lambda: make(named(), corrected, optimizer=models.sgd(model, momentum=0.9)), "0.9", "set the")
    make(named(), corrected, optimizer=models.sgd(model))


@check(ranks=(2,))
def few_bits_that_horovod_would_have_to_add():
    """Refused, with the reason and what works, wherever the sum is Horovod's."""
    model = small(2)

    def make(method, **options):
        return thinwire.horovod.Compressor(model.named_parameters(), method, **options)

    optimizer = {"optimizer": models.sgd(model)}
    for wire_dtype in ("int8", "int4", "int2"):
        reason = f"(wire_dtype='{wire_dtype}') with Horovod", "a scale for each block", "selection='nominated'"
        for memory in ("error_feedback", "control_variate"):
            for selection in ("independent", "permuted", "shared"):
                one = method(selection, memory, wire_dtype)
                raised(ValueError, lambda: make(one), "BlockSparse" + reason[0], *reason[1:])
                raised(ValueError, lambda: make(Elastic(one, 0.5), **optimizer), "BlockSparse" + reason[0], *reason[1:])
        dense = Dense(wire_dtype, memory="error_feedback")
        raised(ValueError, lambda: make(dense), "Dense" + reason[0], *reason[1:])
        elastic = Elastic(method("nominated", "error_feedback", wire_dtype), 0.5)
        raised(ValueError, lambda: make(elastic, **optimizer), "BlockSparse" + reason[0], "without Elastic")
        raised(ValueError, lambda: make(method("nominated", "none", wire_dtype)), "needs a memory")
        make(method("nominated", "error_feedback", wire_dtype))


@check(ranks=(2,))
def gradients_of_others():
    """A tensor that is no named parameter's gradient."""
    model = small(2)
    compressor = thinwire.horovod.Compressor(list(model.named_parameters())[:2], BlockSparse())
    optimizer = hvd.DistributedOptimizer(models.sgd(model), model.named_parameters(), compression=compressor)
    backward = loss_of(model, next(data())).backward
    raised(ValueError, backward, "(24,)", "no named parameter's gradient")
    del optimizer


@check(ranks=(2,), simulated=False)
def sparse_gradients():
    for as_dense in (False, True):
        model = torch.nn.Embedding(10, 20, sparse=True)
        compressor = thinwire.horovod.Compressor(model.named_parameters(), BlockSparse())
        optimizer = hvd.DistributedOptimizer(
            models.sgd(model), model.named_parameters(), compression=compressor, sparse_as_dense=as_dense
        )

        def step():
            model(torch.tensor([1, 2, 3])).sum().backward()  # noqa: B023
            optimizer.step()  # noqa: B023

        raised(*(ValueError, step, "sparse_as_dense") if as_dense else (TypeError, step, "sparse=False"))


# ---- figures ----


@check()
def stats_by_arithmetic():
    n, model = hvd.size(), small(4)
    chosen = method("shared", "none", density=0.25)
    optimizer, compressor = setup(model, chosen, recorder=Recorder)
    batches = data()
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model, next(batches)).backward()
        optimizer.step()
    stats = compressor.stats()
    assert compressor.sizes == {f"{i}.weight": 144 for i in (0, 2, 4, 6)} | {f"{i}.bias": 16 for i in (0, 2, 4, 6)}
    assert abs(stats["bytes_sent"] - 5 * 4 * 160 * 4 * 2 * (n - 1) / n) <= 5 * 8
    assert stats["bytes_sent"] == stats["bytes_received"]
    assert abs(stats["dense_bytes"] - 5 * 4 * 600 * 4 * 2 * (n - 1) / n) <= 5 * 8
    assert abs(stats["compression"] - 600 / 160) < 0.01
    assert stats["steps"] == 5
    assert all(0 < stats[name] < 60 for name in ("encode_s", "exchange_s", "decode_s"))


@check(*FEW_BITS, on_real=(INT4,))
def few_bits_by_arithmetic(method):
    """What DDP would send, less blocks that were named twice; and an element a parameter, in Horovod's all-reduce."""
    n, steps, model = hvd.size(), 5, small(4)
    _, compressor = train(method, steps, model)
    foretold, sent = thinwire.estimate(method, model, n)["bytes_sent"], compressor.stats()["bytes_sent"] / steps
    ones = len(list(model.parameters())) * (2 * (n - 1) * 4 // n)
    assert 0.7 * foretold < sent - ones <= foretold, (sent, ones, foretold)
    assert compressor.stats()["dense_bytes"] > 0 and compressor.stats()["compression"] > 4


@check()
def stats_of_nominated():
    """Its bytes do not grow with the ranks, named blocks and the elements that carry nothing included."""
    _, compressor = train(method("nominated", "error_feedback", density=0.05), 5)
    stats = compressor.stats()
    assert 4 < stats["compression"] < 20, stats
    half = train(method("nominated", "error_feedback", torch.float16, density=0.05), 5)[1].stats()
    assert 0.5 < half["bytes_sent"] / stats["bytes_sent"] < 0.8, half


# ---- Elastic ----

ELASTIC = [Elastic(Dense(), 0.5), Elastic(Dense(), 0.0), Elastic(FEEDBACK, 0.5), Elastic(FEEDBACK, 0.0)]
DELAYED = [Elastic(Dense(), 0.3, max_delay=3), Elastic(FEEDBACK, 0.3, max_delay=3)]
OTHERS = [Elastic(method("permuted", "none"), 0.5), Elastic(method("shared", "control_variate"), 0.5),
          Elastic(method("independent", "error_feedback", torch.float16), 0.3)]  # fmt: skip


def step_of(model, optimizer, batch, jitter=None):
    """One step of training, some ranks slower than others."""
    if jitter is not None:
        lag(jitter)
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step()


@check()
def density_follows_the_measured_inconsistency():
    model = small()
    auto = BlockSparse("nominated", density="auto", max_inconsistency=1.0, min_density=0.05, block_size=16,
                       dense_below=20)  # fmt: skip
    compressor = thinwire.horovod.Compressor(model.named_parameters(), auto, consistency_every=4)
    optimizer = hvd.DistributedOptimizer(models.sgd(model, 0.02), named_parameters=model.named_parameters(),
                                         compression=compressor)  # fmt: skip
    batches = data()
    for _ in range(42):
        models.step(model, optimizer, next(batches))
    log = list(compressor.consistency_log)
    assert [one["step"] for one in log] == list(range(4, 41, 4))
    assert all(theirs == log for theirs in hvd.allgather_object(log, name="logs"))
    densities = [one["density"] for one in log]
    assert densities[-1] < 0.7 and all(b <= 1.3 * a for a, b in zip(densities, densities[1:]))
    assert 0 < max(one["residual"] for one in log) < 1.0
    held = compressor._reducer.memory.waiting()
    mean = hvd.allreduce(models.flat([held[name] for name, _ in model.named_parameters()]), name="mean residual")
    found = compressor.consistency()
    assert abs(found["inconsistency_max"] / mean.norm() - 1) < 0.1
    assert found["gradient_norm"] > 0 and found["bound"] is None  # nominated has none


@check(*(Elastic(m, 1.0) for m in (Dense(), FEEDBACK, method("independent", "none"))), ranks=(2,))
def elastic_with_beta_one_is_the_method(method):
    """On two ranks: with more, Horovod's own sums depend on what it happened to fuse."""
    ours, compressor = train(method, 6)
    compressor.finalize()
    plain, plain_compressor = train(method.method, 6)
    assert gap(ours, plain) == 0.0
    stats, plain_stats = compressor.stats(), plain_compressor.stats()
    assert stats["buckets"] == stats["late_buckets"] == 0
    assert stats["bytes_sent"] == plain_stats["bytes_sent"]


@check(*ELASTIC)
@check(*DELAYED, *OTHERS, ranks=(2,))
def elastic_replicas(method):
    """The same bits on all ranks after every step, whatever the optimizer."""
    for make in (
        lambda ps: torch.optim.SGD(ps, lr=0.02, momentum=0.9, weight_decay=0.01),
        lambda ps: torch.optim.AdamW(ps, lr=1e-3),
    ):
        model, jitter = small(), random.Random(hvd.rank())
        optimizer, compressor = setup(model, method, inner=make(model.parameters()))
        batches = data()
        for _ in range(8):
            step_of(model, optimizer, next(batches), jitter)
            assert same_everywhere(model)
        before = models.flat(model.parameters())
        compressor.finalize()
        assert same_everywhere(model)
        assert not torch.equal(before, models.flat(model.parameters()))
        stats = compressor.stats()
        assert stats["buckets"] == 8 * 6 and 8 < stats["late_buckets"] < 8 * 6, stats


@check(Elastic(Dense(), 0.5), Elastic(Dense(), 0.0, max_delay=3), Elastic(Dense(), 0.3, max_delay=2))
def elastic_by_hand(method):
    """Which parameters are late, and what each step's gradient is, against the rule written out."""
    model = small()
    optimizer, compressor = setup(model, method)
    names = sorted(name for name, _ in model.named_parameters())
    batches, late, issued = data(), set(), []
    for step in range(8):
        batch = next(batches)
        mine = {name: everyone(g) for name, g in local_gradients(model, batch).items()}
        issued.append({name: mine[name].mean(0) for name in late})
        step_of(model, optimizer, batch)
        found = averaged(model)
        for name in names:
            expected = torch.zeros_like(found[name]) if name in late else mine[name].mean(0)
            if step >= method.max_delay:
                expected = expected + issued[step - method.max_delay].get(name, 0.0)
            close(found[name], expected, 1e-6)
        assert len(compressor._under_way) == sum(map(len, issued[-method.max_delay :]))
        norms = [float(sum(row.double().norm() for row in mine[name])) for name in names]
        waited = heaviest(norms, method.beta)
        late = {name for i, name in enumerate(names) if i not in waited}
    assert compressor.stats()["late_buckets"] == sum(map(len, issued))
    compressor.finalize()


def off_balance(model, compressor, expected, lr):
    """How far a model is from what all gradients make of it, relative; what is in residuals at a rate of lr."""
    compressor.finalize()
    if compressor.state_dict()["memory"].get("residual"):
        held = residuals(compressor, model)
        expected = expected + lr * everyone(models.flat(held[name] for name, _ in model.named_parameters())).mean(0)
    return float((models.flat(model.parameters()) - expected).norm() / expected.norm())


@check(ELASTIC[0], ELASTIC[2])
@check(ELASTIC[1], ELASTIC[3], *DELAYED, OTHERS[2], ranks=(2,))
def elastic_conserves(method):
    """Nothing is lost or applied twice: many steps, learning rates that change, saved and resumed; passes, and Sum.

    What waits in residuals has no learning rate, so with them that is constant.
    """
    n, changes = hvd.size(), isinstance(method.method, Dense)
    tolerance = 2e-6 if method.method.wire_dtype == torch.float32 else 2e-4
    for op, passes, steps in ((hvd.Average, 1, 60 if SIMULATED else 20), (hvd.Sum, 2, 10)):
        model, jitter, rates = small(), random.Random(hvd.rank()), random.Random(7)
        optimizer, compressor = setup(model, method, op=op, backward_passes_per_step=passes)
        batches, expected = data(), models.flat(model.parameters())
        for step in range(steps):
            lr = rates.choice([0.01, 0.02, 0.05] if changes else [0.02])
            if changes and step in (0, 4, 5):
                lr = 0.0
            optimizer.param_groups[0]["lr"] = lr / (n if op == hvd.Sum else 1)
            optimizer.zero_grad()
            lag(jitter)
            for batch in (next(batches) for _ in range(passes)):
                expected -= lr * everyone(models.flat(models.local_gradient(model, batch))).mean(0)
                loss_of(model, batch).backward()
            optimizer.step()
            if not changes:  # what was sent earlier has landed in memory, however late it is applied
                assert {one.late.step for one in compressor._under_way} <= {compressor._step - 1}
            if step == steps // 2:
                state, weights = compressor.state_dict(), model.state_dict()
                assert state["late"] and compressor._ledger.lates
                model = small(seed=5)
                model.load_state_dict(weights)
                optimizer, compressor = setup(model, method, op=op, backward_passes_per_step=passes)
                compressor.load_state_dict(state)
        off = off_balance(model, compressor, expected, lr)
        assert off < tolerance, (op, off)
        assert same_everywhere(model)


@check(Elastic(Dense(), 0.2), Elastic(FEEDBACK, 0.2))
def elastic_with_parameters_left_out(method):
    model, rank = Heads(), hvd.rank()
    optimizer, compressor = setup(model, method, lr=0.02)
    batches, expected = data(), models.flat(model.parameters())
    for step in range(30 if SIMULATED else 12):
        used = ({0, 1, 2, 3}, {0}, {rank % 2}, {1, 2})[step % 4]
        x, y = next(batches)
        gradients = torch.autograd.grad(((model(x, used) - y) ** 2).mean(), list(model.parameters()), allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), gradients)]
        expected -= 0.02 * everyone(models.flat(gradients)).mean(0)
        optimizer.zero_grad()
        ((model(x, used) - y) ** 2).mean().backward()
        optimizer.step()
        assert same_everywhere(model)
    assert off_balance(model, compressor, expected, 0.02) < 2e-6


@check(Elastic(Dense(), 0.5), Elastic(FEEDBACK, 0.0), Elastic(Dense(), 0.3, max_delay=2))
def elastic_skips(method):
    """inf in one parameter on one rank: all ranks skip that step, what it issued is dropped, and nothing else."""
    model = small()
    inner = models.sgd(model, lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    compressor = thinwire.horovod.Compressor(model.named_parameters(), method, optimizer=inner, grad_scaler=scaler)
    optimizer = hvd.DistributedOptimizer(inner, model.named_parameters(), compression=compressor)
    batches, expected, bad = data(), models.flat(model.parameters()), {7: 0, 8: 2, 15: 4}
    for step in range(30):
        batch, before = next(batches), models.flat(model.parameters())
        gradient = everyone(models.flat(models.local_gradient(model, batch))).mean(0)
        spoilt = model[bad[step]].weight if step in bad and hvd.rank() == hvd.size() - 1 else None
        hook = spoilt.register_hook(lambda g: g * float("inf")) if spoilt is not None else None
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        if hook is not None:
            hook.remove()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        if step in bad:
            assert all(bool(g.isnan().all()) for g in averaged(model).values()), step
            assert torch.equal(before, models.flat(model.parameters())), step
        else:
            expected -= 0.02 * gradient
    assert scaler.get_scale() == 2.0**7
    assert off_balance(model, compressor, expected, 0.02 / 2.0**7) < 2e-6
    assert same_everywhere(model)


@check(ranks=(2,))
def elastic_finalize_is_a_step_of_the_optimizer_that_trains():
    """Its momentum is the one of training, which Horovod's optimizer holds, and no gradient travels for it."""
    model = small()
    optimizer, compressor = setup(model, Elastic(Dense(), 0.0), lr=0.02, momentum=0.9)
    batches, sent = data(), None
    for _ in range(5):
        batch = next(batches)
        sent = models.flat(everyone(g).mean(0) for g in models.local_gradient(model, batch))
        step_of(model, optimizer, batch)
    before = models.flat(model.parameters())
    velocity = models.flat(optimizer.state[p]["momentum_buffer"] for p in model.parameters())
    gradients, steps = averaged(model), compressor.stats()["steps"]
    compressor.finalize()
    close(models.flat(model.parameters()), before - 0.02 * (0.9 * velocity + sent), 1e-6)
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients.values(), model.parameters(), strict=True))
    assert compressor.stats()["steps"] == steps and not compressor._ledger.lates
    before = models.flat(model.parameters())
    compressor.finalize()
    assert torch.equal(before, models.flat(model.parameters()))


@check(Elastic(Dense(), 0.3), Elastic(FEEDBACK, 0.3, max_delay=2), ranks=(2,))
def elastic_evaluating(method):
    """The model as finalize would leave it; afterwards training is what it would have been."""

    def run(looks):
        model, seen = small(), []
        optimizer, compressor = setup(model, method, inner=torch.optim.AdamW(model.parameters(), lr=1e-3))
        batches = data()
        for step in range(9):
            step_of(model, optimizer, next(batches))
            if step in looks:
                before = models.flat(model.parameters())
                try:
                    with compressor.evaluating():
                        assert same_everywhere(model)
                        seen.append(models.flat(model.parameters()))
                        raise KeyError("in the body")
                except KeyError:
                    assert torch.equal(before, models.flat(model.parameters()))
                assert not torch.equal(before, seen[-1])
        return model, compressor, seen

    looked, compressor, seen = run({1, 4, 8})
    plain, _, _ = run(())
    assert gap(looked, plain) == 0.0
    compressor.finalize()
    assert torch.equal(seen[-1], models.flat(looked.parameters()))


@check(Elastic(Dense(), 0.5), Elastic(FEEDBACK, 0.3, max_delay=2), ranks=(2,))
def elastic_resumes(method):
    """Saved and loaded into new objects, training is what it would have been; evaluating() works at once."""

    def adamw(model):
        return torch.optim.AdamW(model.parameters(), lr=1e-3)

    def run(steps, model, optimizer):
        for step, batch in zip(range(8), data()):
            if step in steps:
                step_of(model, optimizer, batch)

    whole = small()
    run(range(8), whole, setup(whole, method, inner=adamw(whole))[0])
    model = small()
    optimizer, compressor = setup(model, method, inner=adamw(model))
    run(range(4), model, optimizer)
    with compressor.evaluating():
        seen = models.flat(model.parameters())
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), compressor.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    model = small(seed=9)
    model.load_state_dict(saved[0])
    optimizer, compressor = setup(model, method, inner=adamw(model))
    optimizer.load_state_dict(saved[1])
    compressor.load_state_dict(saved[2])
    with compressor.evaluating():
        assert torch.equal(seen, models.flat(model.parameters()))
    run(range(4, 8), model, optimizer)
    assert gap(whole, model) == 0.0

    _, other = setup(small(), method.method)
    raised(ValueError, lambda: other.load_state_dict(saved[2]), "yet to apply", "finalize()")
    compressor.finalize()
    other.load_state_dict(compressor.state_dict())


@check(Elastic(Dense(), 0.0), ranks=(2,))
def elastic_consistency(method):
    """Of what is late, as the paper's constant has it; steps that measure change nothing."""
    model = small()
    inner, found = models.sgd(model), []
    compressor = thinwire.horovod.Compressor(
        model.named_parameters(), method, optimizer=inner, consistency_every=2, log=found.append
    )
    optimizer = hvd.DistributedOptimizer(inner, model.named_parameters(), compression=compressor)
    for step, batch in zip(range(5), data()):
        issued = models.flat(everyone(g).mean(0) for g in models.local_gradient(model, batch))
        norm = float(issued.norm()) if step else 0.0  # in the first step everything is waited for
        step_of(model, optimizer, batch)
        apart = compressor.consistency()["inconsistency_max"]
        assert abs(apart - norm) <= 0.1 * norm, (apart, norm)
    assert [one["step"] for one in found] == [2, 4]
    assert gap(model, train(method, 5)[0]) == 0.0
    compressor.finalize()
    assert compressor.consistency()["inconsistency_max"] == 0.0


@check(Elastic(Dense(), 0.5), Elastic(FEEDBACK, 0.5), ranks=(2,))
def elastic_with_horovods_options(method):
    """Groups and a predivide factor; two models with the same names, after a rank made one more."""
    plain = train(method, 5)[0]
    assert gap(plain, train(method, 5, groups=2)[0]) == 0.0
    assert gap(plain, train(method, 5, gradient_predivide_factor=3.0)[0]) < 1e-6
    if hvd.rank() == 1:
        setup(small(), method)
    pair = [small(seed=seed) for seed in range(2)]
    optimizers, compressors = zip(*(setup(model, method) for model in pair), strict=True)
    streams = [data(seed) for seed in range(2)]
    for _ in range(5):
        for model, optimizer, batches in zip(pair, optimizers, streams, strict=True):
            step_of(model, optimizer, next(batches))
    labels = torch.tensor([compressor._label for compressor in compressors])
    assert labels[0] != labels[1] and bool((everyone(labels) == labels).all())
    assert gap(pair[0], plain) == 0.0
    assert gap(pair[1], train(method, 5, small(seed=1), seed=1)[0]) == 0.0


@check(Elastic(Dense(), 0.5), ranks=(2,))
def elastic_with_several_dtypes(method):
    dtypes = (torch.float64, torch.float16, torch.float32)
    for one in (method, Elastic(FEEDBACK, 0.0)):
        model = torch.nn.ModuleDict({str(d)[6:]: Slope(dtype=d) for d in dtypes})
        optimizer, compressor = setup(model, one)
        generator = torch.Generator().manual_seed(hvd.rank())
        for _ in range(5):
            optimizer.zero_grad()
            sum(part(torch.randn(100, generator=generator)).double() for part in model.values()).backward()
            optimizer.step()
            assert same_everywhere(model)
        assert compressor.stats()["late_buckets"] > 0
        compressor.finalize()
        assert same_everywhere(model)


@check(Elastic(Dense(), 0.5), Elastic(FEEDBACK, 0.0), ranks=(3,))
def elastic_in_a_process_set_of_two(method):
    model, compressor = train(method, 6, process_set=PAIR)
    with compressor.evaluating():
        pass
    compressor.finalize()
    assert compressor.stats()["late_buckets"] > 0 or not PAIR.included()
    if PAIR.included():
        assert same_everywhere(model, PAIR)


@check(ranks=(2,))
def elastic_refusals():
    model = small(2)

    def make(method, optimizer=None, **options):
        return thinwire.horovod.Compressor(model.named_parameters(), method, optimizer=optimizer, **options)

    plain = models.sgd(model)
    for method, what in ((Elastic(Dense(), decide="arrival"), "decide='arrival'"),
                         (Elastic(Dense(), speculate=True), "speculate=True")):  # fmt: skip
        raised(ValueError, lambda: make(method, plain), what, "at once in step()", "decide='agreed'")  # noqa: B023
    raised(ValueError, lambda: make(Elastic(Dense())), "pass optimizer=")
    raised(TypeError, lambda: make(Elastic(Dense()), model), "Sequential")
    raised(ValueError, lambda: make(Elastic(Dense()), models.sgd(model[0])), "does not own 2 of the model's 4")
    raised(ValueError, lambda: make(Elastic(BlockSparse("topk")), plain), "topk", "nominated")
    raised(ValueError, lambda: make(Elastic(Dense(wire_dtype=torch.bfloat16)), plain), "Dense(wire_dtype")
    wrapped = hvd.DistributedOptimizer(plain, model.named_parameters())
    raised(TypeError, lambda: make(Elastic(Dense()), wrapped), "the plain one")

    model = small(2)
    optimizer, compressor = setup(model, Elastic(Dense(), 0.0))
    step_of(model, optimizer, next(data()))
    with compressor.evaluating():
        raised(RuntimeError, loss_of(model, next(data())).backward, "evaluating")
    disagrees = Elastic(Dense(), 0.25 if hvd.rank() else 0.5)
    raised(ValueError, lambda: train(disagrees, 1), "elastic.beta: 0.5 on rank 0")


# ---- Divide-and-Shuffle ----


def shuffled(method, optimizer=None, model=None):
    """Model, optimizer and averager as a user makes them."""
    model = small() if model is None else model
    optimizer = models.sgd(model, momentum=0.9) if optimizer is None else optimizer(model.parameters())
    sets = [PAIR] if hvd.size() == 3 else []
    return model, optimizer, thinwire.horovod.DivideAndShuffleAverager(model, optimizer, method, process_sets=sets)


def step_shuffled(model, optimizer, batch):
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step()


@check(*(DivideAndShuffle(group_size=2, schedule=s, overlap=o) for s, o in (("ring", "none"), ("random", "bucket"))),
       real=(3,), simulated=False)  # fmt: skip
def shuffled_rounds(method):
    """Against local steps and averages written out."""
    model, optimizer, averager = shuffled(method)
    alone = small()
    alone_optimizer = models.sgd(alone, momentum=0.9)
    batches, alone_batches = data(), data()
    partitions = method.partitions(hvd.size())
    for t in range(len(partitions) + 1):
        step_shuffled(model, optimizer, next(batches))
        step_shuffled(alone, alone_optimizer, next(alone_batches))
        members = next(group for group in partitions[t % len(partitions)] if hvd.rank() in group)
        with torch.no_grad():
            parameters = torch.nn.utils.parameters_to_vector(alone.parameters())
            mean = everyone(parameters)[list(members)].mean(0)
            torch.nn.utils.vector_to_parameters(mean, alone.parameters())
        assert gap(alone, model) < 1e-6
    assert averager.stats()["steps"] == len(partitions) + 1
    distance = averager.consistency()["consensus_distance"]
    rows = everyone(models.flat(model.parameters()))
    assert abs(distance - float((rows - rows.mean(0)).square().sum(1).mean())) < 1e-6 * max(distance, 1e-3)


@check(ranks=(3,), simulated=False)
def shuffled_averages():
    """What is evaluated is the same everywhere and leaves no trace; finalize makes replicas equal, Adam's state too."""
    model = torch.nn.Sequential(small(2), torch.nn.BatchNorm1d(WIDTH))
    model, optimizer, averager = shuffled(
        DivideAndShuffle(group_size=2), lambda ps: torch.optim.AdamW(ps, lr=1e-2), model
    )
    batches = data()
    for _ in range(4):
        step_shuffled(model, optimizer, next(batches))
    before = [t.clone() for t in model.state_dict().values()]
    assert not same_everywhere(model)
    with averager.evaluating():
        assert same_everywhere(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values()))
    averager.finalize()
    assert same_everywhere(model)
    rows = everyone(models.flat(optimizer.state[p]["exp_avg_sq"] for p in model.parameters()))
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
    assert averager.state_dict()["round"] == 4


@check(ranks=(2, 3), simulated=False)
def shuffled_refusals():
    model = small(2)
    wrapped = hvd.DistributedOptimizer(models.sgd(model), model.named_parameters())
    raised(TypeError, lambda: thinwire.horovod.DivideAndShuffleAverager(model, wrapped), "rank 0", "plain one")
    other = DivideAndShuffle(schedule="ring" if hvd.rank() else "random")
    raised(ValueError, lambda: shuffled(other), "schedule: random on rank 0, ring on rank 1")
    raised(ValueError, lambda: shuffled(DivideAndShuffle(group_size=4)), "there are only")


@check(ranks=(2,), simulated=False)
def shuffled_skips():
    """A GradScaler's skipped step on one rank."""
    model = small(2)
    optimizer = models.sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    averager = thinwire.horovod.DivideAndShuffleAverager(model, optimizer, grad_scaler=scaler)
    batches = data()
    for t in range(4):
        optimizer.zero_grad()
        loss = loss_of(model, next(batches))
        scaler.scale(loss * float("inf") if t == 1 and hvd.rank() == 1 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert averager.stats()["steps"] == 4 and same_everywhere(model)


# ---- local steps ----


WEIGHTS = BlockSparse("nominated", density=0.25, block_size=16, memory="weights", wire_dtype="int4")
PLAIN = dict(outer_lr=1.0, outer_momentum=0.0)


@contextlib.contextmanager
def process_group():
    """The same ranks as torch.distributed has them."""
    store = hvd.broadcast_object(tempfile.mktemp(prefix="thinwire-checks-"), 0, name="checks.store")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=hvd.rank(), world_size=hvd.size())
    try:
        yield
    finally:
        dist.destroy_process_group()


def with_statistics(seed=0):
    return torch.nn.Sequential(small(2, seed), torch.nn.BatchNorm1d(WIDTH), small(1, seed))


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def step_locally(model, optimizer, batches, steps=1):
    for _ in range(steps):
        step_shuffled(model, optimizer, next(batches))


def buffers_and_all(model):
    return models.flat([*model.parameters(), *model.buffers()])


@check(LocalSteps(3, overlap=0), LocalSteps(3, overlap=1), LocalSteps(3, WEIGHTS, overlap=2), ranks=(2,),
       on_real=(LocalSteps(3, overlap=0), LocalSteps(3, overlap=1)), simulated=False)  # fmt: skip
@check(LocalSteps(2, Dense("int2", "error_feedback"), overlap=1), ranks=(3,), real=(), simulated=False)
def local_rounds(method):
    """The bits that DDP gives for the same batches: each rank's own weights, the anchor and what waits in a memory."""
    ends = []
    for with_ddp in (False, True):
        with process_group() if with_ddp else contextlib.nullcontext(), models.in_small_pieces(4000):
            model = with_statistics()
            optimizer = adamw(model)
            if with_ddp:
                trained = torch.nn.parallel.DistributedDataParallel(model)
                handle = thinwire.attach(trained, method, optimizer=optimizer)
            else:
                trained, handle = model, thinwire.horovod.LocalSteps(model, optimizer, method)
            step_locally(trained, optimizer, data(), 10)
            own, state = models.flat(model.parameters()), handle.state_dict()
            assert not same_everywhere(model)
            with handle.evaluating():
                assert same_everywhere(model)
            handle.finalize()
            assert same_everywhere(model)
            ends.append((own, buffers_and_all(model), state, handle.stats()))
            handle.close()
    mine, theirs = ends
    assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])
    assert mine[2]["step"] == 10 and mine[2]["round"] == 10 // method.every
    for kind in ("anchor", "momentum", "buffers"):
        assert mine[2][kind].keys() == theirs[2][kind].keys()
        assert all(torch.equal(one, theirs[2][kind][name]) for name, one in mine[2][kind].items()), kind
    for kind, held in mine[2]["memory"].items():
        assert all(torch.equal(one, theirs[2]["memory"][kind][name]) for name, one in held.items())
    for figure in ("steps", "rounds", "bytes_sent", "dense_bytes"):
        assert mine[3][figure] == theirs[3][figure], figure


@check(ranks=(2,), simulated=False)
def local_models_side_by_side():
    """Rounds of two models and a Compressor's exchanges of a third are under way at once and never meet."""
    with models.in_small_pieces(4000):
        trained = []
        for seed, method in enumerate((LocalSteps(2, overlap=2), LocalSteps(3, WEIGHTS, overlap=1))):
            model = small(seed=seed)
            optimizer = adamw(model)
            trained.append((model, optimizer, data(seed), thinwire.horovod.LocalSteps(model, optimizer, method)))
        third = small(seed=5)
        optimizer, _ = setup(third, INT4)
        trained.append((third, optimizer, data(), None))
        for _ in range(12):
            for model, optimizer, batches, _ in trained:
                step_locally(model, optimizer, batches)
        assert same_everywhere(third)
        for seed, (model, _, _, handle) in enumerate(trained[:2]):
            with handle.evaluating():
                assert same_everywhere(model)
            handle.close()
            alone = small(seed=seed)
            optimizer = adamw(alone)
            again = thinwire.horovod.LocalSteps(alone, optimizer, handle.method)
            step_locally(alone, optimizer, data(seed), 12)
            again.close()
            assert gap(alone, model) == 0.0


@check(LocalSteps(4, overlap=2), LocalSteps(4, WEIGHTS, overlap=2), ranks=(2,), on_real=(LocalSteps(4, overlap=2),),
       simulated=False)  # fmt: skip
def local_resumes(method):
    """In the middle of a flight, after Horovod's own broadcast as loops have it, bit for bit."""
    model = with_statistics()
    optimizer, batches = adamw(model), data()
    handle = thinwire.horovod.LocalSteps(model, optimizer, method)
    step_locally(model, optimizer, batches, 5)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), handle.state_dict()], file)
    step_locally(model, optimizer, batches, 6)
    handle.close()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert saved[2]["flight"]
    resumed = with_statistics(seed=9)
    optimizer = adamw(resumed)
    handle = thinwire.horovod.LocalSteps(resumed, optimizer, method)
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    handle.load_state_dict(saved[2])
    batches = data()
    for _ in range(5):
        next(batches)
    step_locally(resumed, optimizer, batches, 6)
    handle.close()
    assert torch.equal(buffers_and_all(model), buffers_and_all(resumed))


@check(ranks=(2,), simulated=False)
def local_loops():
    """A step is a step, whatever the loop is: one that a rank leaves out, or of several passes, or in a closure."""
    for loop in ("scaler", "left out", "said", "accumulated", "masked", "closure", "thawed", "checkpointed"):
        model, batches, rank = small(), data(), hvd.rank()
        optimizer, made = models.sgd(model), 0
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=loop == "scaler")
        options = {"grad_scaler": scaler} if loop == "scaler" else {}
        loss = lambda model=model, batches=batches: loss_of(model, next(batches))
        with models.in_small_pieces(4000):
            model[0].weight.requires_grad_(loop != "thawed")
            handle = thinwire.horovod.LocalSteps(model, optimizer, LocalSteps(3), **options)
            for t in range(12):
                skipped = rank == 1 and t in (2, 5, 11)
                if loop == "closure":
                    for _ in range(2):  # passes that the optimizer takes in one step

                        def closure(loss=loss, optimizer=optimizer):
                            optimizer.zero_grad()
                            found = loss()
                            found.backward()
                            return found

                    optimizer.step(closure)
                    continue
                optimizer.zero_grad(set_to_none=t % 2 == 0)
                if loop == "thawed" and t == 4:  # nothing else is trained from then on
                    for p in model.parameters():
                        p.requires_grad_(p is model[0].weight)
                if loop == "checkpointed":
                    x, y = next(batches)
                    for layer in model:
                        x = torch.utils.checkpoint.checkpoint(layer, x.requires_grad_(), use_reentrant=True)
                    ((x - y) ** 2).mean().backward()
                for i in range(3 if loop in ("accumulated", "masked") else loop != "checkpointed"):
                    factor = {"scaler": float("inf"), "masked": float(i == 2)}.get(loop, 1.0) if skipped else 1.0
                    scaler.scale(loss() * factor).backward()
                if skipped and loop == "said":
                    handle.skip_step()
                elif not (skipped and loop == "left out"):
                    scaler.step(optimizer)
                    scaler.update()
                made += 1
            handle.finalize()
        stats = handle.stats()
        handle.close()
        assert (stats["steps"], stats["rounds"]) == (12, 5), (loop, stats)
        assert same_everywhere(model), loop


@check(ranks=(2, 3), real=(2,), simulated=False)
def local_warm_up():
    """hvd.DistributedOptimizer's to rounding: passes that add up, parameters that some ranks do not use, or none does.
    One that is frozen is left alone, and then trained."""
    used_by = [lambda r: {0, 1, 2}, lambda r: {0}, lambda r: {r % 2}, lambda r: {1, 2} if r else {0}]
    ends = []
    for warm in (True, False):
        model = Heads()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        trunk = model.trunk.weight.requires_grad_(False)
        before = trunk.detach().clone()
        if warm:
            method = LocalSteps(2, overlap=0, warmup_steps=6)
            handle = thinwire.horovod.LocalSteps(model, optimizer, method)
        else:
            optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), backward_passes_per_step=2)
        batches = data()
        for t in range(6):
            optimizer.zero_grad()
            for i in range(2):
                x, y = next(batches)
                ((model(x, used_by[(t + i) % 4](hvd.rank())) - y) ** 2).mean().backward()
            optimizer.step()
            assert same_everywhere(model)
        assert torch.equal(trunk, before)
        ends.append(models.flat(model.parameters()))
        if warm:
            assert not handle.stats()["rounds"]
            trunk.requires_grad_(True)
            for _ in range(4):
                x, y = next(batches)
                optimizer.zero_grad()
                ((model(x, {0, 1, 2, 3}) - y) ** 2).mean().backward()
                optimizer.step()
            assert handle.stats()["rounds"] == 2 and same_everywhere(model) and not torch.equal(trunk, before)
            handle.close()
    close(*ends, 1e-5)


@check(ranks=(2,), simulated=False)
def local_warm_up_with_a_scaler():
    """In the warm-up an overflow on one rank skips the step on all, as with averaged gradients; later, on that one."""
    model, batches = small(), data()
    optimizer, scaler = models.sgd(model), torch.amp.GradScaler("cpu", init_scale=64.0)
    method = LocalSteps(2, overlap=0, warmup_steps=4)
    handle = thinwire.horovod.LocalSteps(model, optimizer, method, grad_scaler=scaler)
    for t in range(8):
        before = models.flat(model.parameters())
        optimizer.zero_grad()
        scaler.scale(loss_of(model, next(batches)) * (float("inf") if t in (1, 4) and hvd.rank() else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        stayed = torch.equal(before, models.flat(model.parameters()))
        assert stayed == (t == 1 or (t == 4 and hvd.rank() == 1)), t
        assert t >= 4 or same_everywhere(model)
    assert handle.stats()["steps"] == 8 and handle.stats()["rounds"] == 2 and same_everywhere(model)
    handle.close()


@check(ranks=(2,), simulated=False)
def local_steps_end():
    """close() averages what there is, leaves no thread and no hook, and says that nothing averages from then on."""
    couriers = lambda: sum(one.name == "thinwire" for one in threading.enumerate())
    model, batches = small(), data()
    optimizer = models.sgd(model)
    handle = thinwire.horovod.LocalSteps(model, optimizer, LocalSteps(3, overlap=2))
    step_locally(model, optimizer, batches, 4)
    assert couriers() == 1
    loss_of(model, next(batches)).backward()
    raised(RuntimeError, handle.close, "between backward")
    optimizer.step()
    with logged() as said:
        handle.close()
        handle.close()
    assert len(said) == 1 and "hvd.DistributedOptimizer" in said[0]
    assert same_everywhere(model)
    last = time.monotonic() + 5
    while couriers() and time.monotonic() < last:
        time.sleep(0.01)
    assert couriers() == 0
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
    step_locally(model, optimizer, batches, 2)
    assert same_everywhere(model) and handle.stats()["steps"] == 5


@check(ranks=(2,), simulated=False)
def local_steps_without_their_handle():
    """The optimizer keeps them; where that is gone too, a backward pass says so."""
    model, batches = small(), data()
    optimizer = models.sgd(model)
    thinwire.horovod.LocalSteps(model, optimizer, LocalSteps(2, overlap=0))
    gc.collect()
    step_locally(model, optimizer, batches, 4)
    assert same_everywhere(model)
    del optimizer
    gc.collect()
    raised(RuntimeError, lambda: loss_of(model, next(batches)).backward(), "is gone", "close()")


@check(ranks=(2,), simulated=False)
def local_refusals():
    model = small(2)
    plain = models.sgd(model)
    of = lambda method=None, model=model, optimizer=plain: lambda: thinwire.horovod.LocalSteps(model, optimizer, method)
    wrapped = hvd.DistributedOptimizer(models.sgd(model), model.named_parameters())
    raised(TypeError, of(optimizer=wrapped), "rank 0, 1", "plain one")
    raised(TypeError, of(INT4), "must be a thinwire.LocalSteps", "as its method=")
    raised(TypeError, of(thinwire.horovod.LocalSteps), "must be a thinwire.LocalSteps")
    raised(ValueError, of(optimizer=models.sgd(small(2))), "does not own")
    raised(ValueError, of(LocalSteps(3 + hvd.rank())), "every: 3 on rank 0, 4 on rank 1")
    other = small(2, seed=hvd.rank())
    optimizer = models.sgd(other)
    handle = of(model=other, optimizer=optimizer)()
    raised(ValueError, lambda: loss_of(other, next(data())).backward(), "hvd.broadcast_parameters")
    hvd.broadcast_parameters(other.state_dict(), root_rank=0)
    optimizer.zero_grad()
    step_locally(other, optimizer, data(), 3)
    handle.close()
    assert same_everywhere(other)


@check(LocalSteps(3, group_size=2, schedule="ring", overlap=0), ranks=(3,), simulated=False)
def local_steps_in_groups(method):
    """Against local steps and averages of every third one written out."""
    model, alone = small(), small()
    optimizer, alone_optimizer = models.sgd(model, momentum=0.9), models.sgd(alone, momentum=0.9)
    handle = thinwire.horovod.LocalSteps(model, optimizer, method, process_sets=[PAIR])
    batches, alone_batches = data(), data()
    partitions = method.in_groups().partitions(hvd.size())
    for t in range(1, 10):
        step_shuffled(model, optimizer, next(batches))
        step_shuffled(alone, alone_optimizer, next(alone_batches))
        if t % 3 == 0:
            members = next(group for group in partitions[(t // 3 - 1) % len(partitions)] if hvd.rank() in group)
            with torch.no_grad():
                mean = everyone(torch.nn.utils.parameters_to_vector(alone.parameters()))[list(members)].mean(0)
                torch.nn.utils.vector_to_parameters(mean, alone.parameters())
        assert gap(alone, model) < 1e-6
    assert handle.stats()["rounds"] == 3 and handle.stats()["steps"] == 9
    handle.finalize()
    assert same_everywhere(model)


def main(directory, names):
    rank = hvd.rank()
    with open(Path(directory) / f"{rank}.jsonl", "w") as file:
        for name in names or CHECKS:
            if hvd.size() not in CHECKS[name].ranks:
                continue
            line, begin = {"check": name, "error": ""}, time.monotonic()
            try:
                CHECKS[name].function()
            except Exception:
                line["error"] = traceback.format_exc()
            line["seconds"] = round(time.monotonic() - begin, 3)
            file.write(json.dumps(line) + "\n")
            file.flush()
            others = threading.Timer(20.0, os._exit, (3,))  # a failed check may have left them inside a collective
            if line["error"]:
                others.start()
            hvd.barrier()
            others.cancel()


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAIR = hvd.ProcessSet([0, 2])
    hvd.init(process_sets=[PAIR] if os.environ["HOROVOD_SIZE"] == "3" else None)
    main(sys.argv[1], sys.argv[2:])
