"""thinwire.advise: it leaves no trace, all ranks get the same, what it rehearses is what is sent; the command line."""
import copy
import io
import math
import multiprocessing
import os
import random
import re
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy
import pytest
import thinwire
import torch
import torch.distributed as dist
from advice import predictions as benchmark
from models import equal_on_all_ranks, mlp, sgd, step, wrap
from thinwire import BlockSparse, Dense, DivideAndShuffle, Elastic, LocalSteps
from thinwire.advice import candidates, link, own_step, rounds, trial
from thinwire.advice import verdict as advice
from thinwire.advice.candidates import Candidate
from thinwire.advice.command import AVERAGED, Watch
from thinwire.advice.cost import Collective, Compute, Link, Local, Start, Wait
from thinwire.advice.rehearsal import Bucket, Echo, Refused, rehearse
from thinwire.advice.rounds import Round
from thinwire.advice.saves import Saves
from thinwire.core.exchange import gather_objects
from torch import nn

forkserver = multiprocessing.get_context("forkserver")  # which ranks.py has import torch
METHODS = ["fp16", "powersgd-1", BlockSparse("nominated", density=0.1), DivideAndShuffle(2), LocalSteps(every="auto")]
OPTIONS = [{}, {"static_graph": True}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}]


class Noisy(nn.Module):
    """All that a forward pass may change: BatchNorm's buffers, buffers that it makes anew or gives a value first,
    and the generators of PyTorch, Python, NumPy."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(40, 64), nn.Linear(64, 40)
        self.norm, self.drop = nn.BatchNorm1d(64), nn.Dropout(0.2)
        self.register_buffer("moving", torch.zeros(40))
        self.register_buffer("newest", None)

    def forward(self, x):
        self.moving = 0.9 * self.moving + 0.1 * x.mean(0)
        self.newest = x.mean(0)
        x = self.drop(torch.relu(self.norm(self.first(x))))
        return self.last(x * (1 + 0.01 * random.random() + 0.01 * numpy.random.rand()))  # noqa: NPY002


def batches(rank):
    generator = torch.Generator().manual_seed(rank)
    while True:
        x = torch.randn(8, 40, generator=generator)
        yield x, x.roll(1, dims=1)


def loss_fn(ddp, batch):
    return ((ddp(batch[0]) - batch[1]) ** 2).mean()


def seed(rank):
    torch.manual_seed(rank)
    random.seed(rank)
    numpy.random.seed(rank)  # noqa: NPY002


def everything(ddp, optimizer):
    """All that must be as it was, copied."""
    return copy.deepcopy({
        "parameters": list(ddp.parameters()), "buffers": dict(ddp.named_buffers()), "optimizer": optimizer.state_dict(),
        "tensors": [id(buffer) for buffer in ddp.buffers()],
        "gradients": [p.grad for p in ddp.parameters()], "hooks": len(ddp._comm_hooks),
        "torch": torch.get_rng_state(), "python": random.getstate(),
        "numpy": numpy.random.get_state()[1],  # noqa: NPY002
        "sync": (ddp.require_backward_grad_sync, ddp.require_forward_param_sync),
        "tensor hooks": [bool(p._backward_hooks) for p in ddp.parameters()], "training": ddp.training,
    })  # fmt: skip


def alike(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return numpy.array_equal(a, b) if isinstance(a, numpy.ndarray) else a == b


def train(rank, ask_after, options):
    """Seven steps, of which the last four with a method; advise, or nothing, after so many. Parameters and buffers."""
    seed(rank)
    model = Noisy()
    ddp = wrap(model, **options)
    optimizer, data, other = torch.optim.AdamW(model.parameters(), lr=0.01), batches(rank), batches(rank + 100)
    for done in range(4):
        if done == ask_after:
            before = everything(ddp, optimizer)
            thinwire.advise(ddp, lambda: next(other), loss_fn, optimizer=optimizer, methods=METHODS, steps=2)
            after = everything(ddp, optimizer)
            for name in before:
                assert alike(before[name], after[name]), name
        if done < 3:
            step(ddp, optimizer, next(data))
    plain = copy.deepcopy([*model.parameters(), *model.buffers()])
    ddp = wrap(model, **options)
    thinwire.attach(ddp, BlockSparse("topk", density=0.2))
    for _ in range(4):
        step(ddp, optimizer, next(data))
    return [*plain, *model.parameters(), *model.buffers()]


def leaves_no_trace(rank, n, ask_after, options):
    unasked, asked = train(rank, None, options), train(rank, ask_after, options)
    assert all(map(torch.equal, unasked, asked))
    assert equal_on_all_ranks(asked[:4])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_asking_leaves_no_trace(ranks, options):
    for ask_after in (0, 1, 3):
        ranks(2).run(leaves_no_trace, ask_after, options, seconds=60)


def attaches_afterwards(rank, n):
    """To the very model that was asked about."""

    def trained(ask):
        model = mlp()
        ddp, optimizer, data = wrap(model), sgd(model), batches(rank)
        if ask:
            thinwire.advise(ddp, lambda: next(batches(rank)), loss_fn, optimizer=optimizer, methods=METHODS, steps=1)
        thinwire.attach(ddp, BlockSparse("nominated", density=0.2))
        for _ in range(4):
            step(ddp, optimizer, next(data))
        return list(model.parameters())

    assert all(map(torch.equal, trained(False), trained(True)))


def test_a_method_attached_after_asking_does_what_it_would_have_done(ranks):
    ranks(2).run(attaches_afterwards, seconds=60)


def asks_by_default(rank, n):
    model = mlp()
    ddp = wrap(model)
    return thinwire.advise(ddp, lambda: next(batches(rank)), loss_fn, optimizer=sgd(model), steps=2)


def test_all_ranks_get_the_same_advice(ranks):
    first, *others = ranks(4).run(asks_by_default, seconds=60)
    assert all(other == first for other in others)
    assert first.ranks == 4 and first.compute_s > 0 and first.link.bytes_per_s > 0
    assert first.rows[0].label == "plain DDP" and first.rows[0].speedup == 1
    asked = [candidates.candidate(what, gloo=True).label for what in candidates.by_default(4, gloo=True)]
    labels = [row.label for row in first.rows]
    (local,) = (row for row in first.rows if isinstance(row.what, LocalSteps))
    asked[asked.index("LocalSteps(every='auto')")] = local.label
    assert local.label == f"LocalSteps(every={local.what.every})" and local.what.every in (1, 2, 4, 8, 16, 32, 64)
    assert set(asked) < set(labels) and len(labels) == len(asked) + 1 + advice.HALVED
    assert sum("bfloat16" in label for label in labels) == 1 + advice.HALVED and not first.left_out
    assert "DivideAndShuffle(2)" in labels and "PyTorch's PowerSGD, rank 4" in labels
    steps = [row.step_s for row in first.rows[1:]]
    assert steps == sorted(steps) and min(steps) > 0
    text = str(first)
    assert all(label in text for label in labels) and text.endswith(f"{first.conclusion}\n{advice.OF_LOCAL_STEPS}")
    assert "optimizer=" in advice.OF_LOCAL_STEPS and "handle.evaluating()" in advice.OF_LOCAL_STEPS
    assert max(map(len, text.splitlines())) < 200


SENT = [Dense(), Dense(exact=True), Dense("int4", "error_feedback"), BlockSparse(block_size=16),
        BlockSparse("topk", density=0.1, block_size=16, wire_dtype="int8"),
        BlockSparse("permuted", block_size=16, wire_dtype=torch.float16),
        BlockSparse("shared", density=0.3, block_size=16), BlockSparse("topk", density=0.1, block_size=16),
        BlockSparse("nominated", density=0.1, block_size=16), BlockSparse(memory="control_variate", block_size=16),
        BlockSparse("topk", density=0.1, block_size=16, warmup_steps=2, ramp_steps=2)]  # fmt: skip


def rehearses(rank, n, method):
    """Bytes of a step as predicted, and as sent."""
    model = mlp()
    ddp = wrap(model)
    row = thinwire.advise(ddp, lambda: next(batches(rank)), loss_fn, methods=[method], steps=1).rows[1]
    handle, optimizer, data, sent = thinwire.attach(ddp, method), sgd(model), batches(rank), []
    for _ in range(6):
        step(ddp, optimizer, next(data))
        sent.append(handle.stats()["bytes_sent"])
    return row.bytes_sent, sent[-1] - sent[-2]


@pytest.mark.parametrize("method", SENT, ids=candidates.label)
def test_what_is_rehearsed_is_what_is_sent(ranks, method):
    for predicted, sent in ranks(3).run(rehearses, method, seconds=60):
        # Of nominations the union counts, which is another one in every step. And the backend's ring is counted in
        # whole bytes, a bucket at a time.
        union = getattr(method, "selection", "") == "nominated"
        assert predicted == pytest.approx(sent, rel=0.25 if union else 0, abs=6 if method.of_backend else 0)


ROUNDS = [LocalSteps(every=4), LocalSteps(every=4, average_buffers=False), LocalSteps(every=2, method=Dense()),
          LocalSteps(every=2, method=BlockSparse("topk", density=0.1, block_size=16)), LocalSteps(group_size=2),
          LocalSteps(every=8, group_size=2, overlap=0), LocalSteps(every=7, fragments=2)]  # fmt: skip


def predicts_rounds(rank, n, method):
    """Bytes of a step as predicted, and as estimated."""
    model = Noisy()
    ddp = wrap(model)
    found = thinwire.advise(ddp, lambda: next(batches(rank)), loss_fn, optimizer=sgd(model), methods=[method], steps=1)
    assert found.rows[1].step_s > 0
    return found.rows[1].bytes_sent, thinwire.estimate(method, model, n)["bytes_sent"]


@pytest.mark.parametrize("method", ROUNDS, ids=candidates.label)
def test_a_step_of_a_round_sends_what_is_estimated(ranks, method):
    for predicted, estimated in ranks(4).run(predicts_rounds, method, seconds=60):
        assert predicted == pytest.approx(estimated)


@pytest.mark.parametrize(("exchange_s", "overlap", "every"), [
    (0.05, 0, 1), (0.1, 0, 2), (0.2, 0, 4), (1.0, 0, 32), (5.0, 0, 64),
    (0.5, 1, 1), (1.0, 1, 1), (1.04, 1, 1), (1.8, 1, 16), (9.0, 1, 64), (4.0, 4, 4), (4.5, 4, 16), (0.5, 80, 80),
    (0.5, "auto", 1), (3.5, "auto", 4), (200.0, "auto", 64),
])  # fmt: skip
def test_the_shortest_round_that_costs_a_twentieth_or_is_hidden_is_proposed(exchange_s, overlap, every):
    """Of steps of 1 s."""
    one = Round(exchange_s, held_up_s=0.01, sent=8e6)
    found = one.settled(LocalSteps(every="auto", overlap=overlap), step_s=1.0)
    assert found.every == every and found.overlap == (min(math.ceil(exchange_s), 64) if overlap == "auto" else overlap)
    waited = max(0.0, exchange_s - found.overlap)
    assert one.step_s(found, 1.0) == pytest.approx(1 + (0.01 + waited) / every)
    assert every == 64 or waited <= 0.05 * every * (1 + 1e-9)


def test_what_is_given_stays_and_is_shared_out_over_the_round():
    one = Round(exchange_s=2.5, held_up_s=0.1, sent=8e6)
    assert one.settled(LocalSteps(every=8), 1.0) == LocalSteps(every=8)
    assert one.step_s(LocalSteps(every=8), 1.0) == pytest.approx(1 + (0.1 + 1.5) / 8)
    assert one.step_s(LocalSteps(every=8, overlap=0), 1.0) == pytest.approx(1 + (0.1 + 2.5) / 8)
    assert one.step_s(LocalSteps(every=8, overlap=4), 1.0) == pytest.approx(1 + 0.1 / 8)
    # A round begins as soon as the one before is there.
    assert one.settled(LocalSteps(every=8, overlap="auto"), 1.0) == LocalSteps(every=3, overlap=3)
    assert one.settled(LocalSteps(every=2, overlap="auto"), 1.0) == LocalSteps(every=2, overlap=2)


def test_fragments_take_turns():
    """Each takes 1.5 s, of steps of 1 s, and is sent once in a round."""
    one = Round(exchange_s=1.5, held_up_s=0.1, sent=8e6)
    method = LocalSteps(every=9, fragments=2)
    assert one.settled(method, 1.0) == method
    assert one.step_s(method, 1.0) == pytest.approx(1 + 0.1 / 8 + 0.5 / 4) and one.sent_a_step(method) == 1e6
    assert one.settled(LocalSteps(every="auto", fragments=2), 1.0) == LocalSteps(every=2 * 16, fragments=2)
    longest = LocalSteps(every="auto", fragments=5, overlap=0)
    assert one.settled(longest, 1.0) == LocalSteps(every=5 * 12, fragments=5, overlap=0)
    found = one.settled(LocalSteps(every=8, fragments=2, overlap="auto"), 1.0)
    assert found == LocalSteps(every=4, fragments=2, overlap=2) and one.step_s(found, 1.0) == pytest.approx(1.025)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_what_holds_up_the_steps_of_a_round_is_measured_on_copies(dtype, momentum):
    named = {"weight": torch.ones(40, 30, dtype=dtype), "bias": torch.ones(30, dtype=dtype)}
    assert rounds.held_up_s(named, LocalSteps(outer_momentum=momentum), 2) > 0
    assert all(bool((tensor == 1).all()) for tensor in named.values())


def rehearses_power_sgd(rank, n):
    hook = candidates.candidate("powersgd-1", gloo=True)
    echo = Echo(rank, n, dist.group.WORLD, torch.device("cpu"))
    gradient = torch.randn(30 * 20 + 20)
    bucket = Bucket(("w", "b"), [torch.Size([30, 20]), torch.Size([20])], 0, True, gradient.clone())
    return rehearse(hook.make(echo), [bucket], [gradient], echo, 1, hook.skipped)[0][0]


def test_a_chain_of_collectives_is_rehearsed_in_order(ranks):
    """PowerSGD: what stays whole in the hook's body; left factors, then right ones, in its callbacks."""
    script = ranks(2).run(rehearses_power_sgd)[0]
    sizes = [[event.collective.nbytes for event in part if isinstance(event, Start)]
             for part in (script.body, script.after)]  # fmt: skip
    assert sizes == [[4 * 20], [4 * 30, 4 * 20]]
    assert [type(event) for event in script.after] == [Local, Start, Wait] * 2 + [Local]
    assert not any(isinstance(event, Wait) for event in script.body)


def rehearses_waves(rank, n, what):
    hook = candidates.candidate(what, gloo=True)
    echo = Echo(rank, n, dist.group.WORLD, torch.device("cpu"))
    gradients = [torch.randn(30 * 20), torch.randn(30 * 20)]
    buckets = [Bucket((name,), [torch.Size([30, 20])], i, i == 1, gradient.clone(), of=1200)
               for i, (name, gradient) in enumerate(zip("wv", gradients))]  # fmt: skip
    return rehearse(hook.make(echo), buckets, gradients, echo, 1, hook.skipped)[0]


@pytest.mark.parametrize("what, in_turn", [(thinwire.BlockSparse("nominated", density=0.1), True), ("fp16", False)],
                         ids=str)  # fmt: skip
def test_waves_travel_one_after_the_other_and_pytorchs_buckets_do_not(ranks, what, in_turn):
    scripts = ranks(2).run(rehearses_waves, what)[0]
    assert [script.in_turn for script in scripts] == [in_turn] * 2 and all(script.sent for script in scripts)


def rehearses_waiting(rank, n):
    echo = Echo(rank, n, dist.group.WORLD, torch.device("cpu"))

    def hook(bucket):
        gathered = torch.empty(n, 8)
        dist.all_to_all_single(torch.empty(n, 4), torch.ones(n, 4), group=echo)
        work = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(
            gathered.view(-1), bucket.buffer(), group=echo, async_op=True)  # fmt: skip
        return work.get_future().then(lambda _: gathered.sum(0))

    bucket = Bucket(("w",), [torch.Size([8])], 0, True, torch.ones(8))
    return rehearse(hook, [bucket], [torch.ones(8)], echo, 1, 0)[0][0]


def test_what_a_hook_waits_for_is_told_from_what_it_leaves_under_way(ranks):
    script = ranks(2).run(rehearses_waiting)[0]
    assert [type(event) for event in script.body if not isinstance(event, Local)] == [Start, Wait, Start]
    assert [type(event) for event in script.after] == [Local]
    assert [e.collective for e in script.body if isinstance(e, Start)] == [
        Collective("all_to_all", 32, 2), Collective("all_gather", 32, 2)]  # fmt: skip


def refuses(rank, n, who, arguments, found, trained):
    """All ranks refuse for what one or all of them passed, and the model is as good as new."""
    model = mlp()
    ddp = wrap(model)
    if trained:  # DDP is to make its buckets anew, for which it broadcasts
        step(ddp, sgd(model), next(batches(rank)))
    given = {"make_batch": lambda: next(batches(rank)), "loss_fn": loss_fn, "methods": ["fp16"], "steps": 1}
    for name, value in arguments.items():
        if rank in who:
            given[name] = BROKEN.get(value, value) if isinstance(value, str) else value
    with pytest.raises((TypeError, ValueError), match=found):
        thinwire.advise(given.pop("ddp", ddp), **given)
    assert ddp.require_forward_param_sync and ddp.require_backward_grad_sync
    step(ddp, sgd(model), next(batches(rank)))
    assert equal_on_all_ranks(model.parameters())


def _breaks(ddp, batch):
    raise KeyError("no such label")


def _no_batch():
    raise OSError("no such file")


BROKEN = {"no DDP": nn.Linear(3, 3), "breaks": _breaks, "two losses": lambda ddp, batch: ddp(batch[0]),
          "no batch": _no_batch, "LBFGS": torch.optim.LBFGS([nn.Parameter(torch.ones(1))])}  # fmt: skip


@pytest.mark.parametrize("who, arguments, found", [
    ((0, 1), {"ddp": "no DDP"}, "got a Linear.*DistributedDataParallel.*rank 0, 1"),
    ((1,), {"ddp": "no DDP"}, r"got a Linear.*\(rank 1\)"),
    ((0, 1), {"steps": 0}, "steps=0.*at least 1"),
    ((0, 1), {"steps": 2.5}, "steps=2.5.*integer"),
    ((0, 1), {"make_batch": 3}, "make_batch=3.*function"),
    ((0, 1), {"optimizer": 3}, "optimizer=3"),
    ((0, 1), {"methods": []}, "methods=\\[\\].*at least one"),
    ((0, 1), {"methods": ["powersgd-0"]}, "'powersgd-0'.*'powersgd-1'"),
    ((0, 1), {"methods": BlockSparse()}, "must be a list"),
    ((0, 1), {"methods": ["bf16"]}, "Gloo"),
    ((0, 1), {"methods": [Elastic(BlockSparse())]}, "cannot predict Elastic.*ask about BlockSparse"),
    ((1,), {"methods": [BlockSparse()]}, "ranks differ in methods.*fp16.*rank 0.*BlockSparse.*rank 1"),
    ((1,), {"steps": 3}, "ranks differ in steps"),
    ((1,), {"loss_fn": "breaks"}, r"KeyError: 'no such label' \(rank 1\)"),
    ((1,), {"make_batch": "no batch"}, r"OSError: no such file \(rank 1\)"),
    ((0, 1), {"optimizer": "LBFGS"}, "LBFGS.*closure"),
    ((0, 1), {"methods": [DivideAndShuffle(2)]}, "pass optimizer="),
    ((0, 1), {"methods": [DivideAndShuffle(overlap="delayed")]}, "cannot predict DivideAndShuffle.*overlap"),
    ((0, 1), {"methods": [DivideAndShuffle(global_every=2)]}, "cannot predict DivideAndShuffle.*global_every"),
    ((0, 1), {"methods": [DivideAndShuffle(3)]}, "only 2 ranks"),
    ((0, 1), {"methods": [LocalSteps()]}, "LocalSteps counts the optimizer's steps: pass optimizer="),
    ((0, 1), {"methods": [LocalSteps(group_size=2)]}, "pass optimizer="),
    ((0, 1), {"methods": [LocalSteps(group_size=2, global_every=4)]}, "cannot predict LocalSteps.*global_every"),
    ((0, 1), {"methods": [LocalSteps(group_size=2, schedule="hosts")]}, "cannot predict LocalSteps.*hosts"),
    ((0, 1), {"loss_fn": "two losses"}, "shape \\[8, 40\\].*one element"),
], ids=str)  # fmt: skip
def test_what_cannot_work_is_refused_on_every_rank(ranks, who, arguments, found):
    for trained in (False, True):
        ranks(2).run(refuses, who, arguments, found, trained, seconds=30)


def refuses_models(rank, n):
    """What is said of models that attach refuses, and of others whose steps cannot be measured by themselves."""

    def said(ddp):
        with pytest.raises((TypeError, ValueError)) as refusal:
            thinwire.advise(ddp, lambda: next(batches(rank)), loss_fn, methods=["fp16"])
        return str(refusal.value)

    mixed, synced, joined = wrap(mlp()), wrap(mlp()), wrap(mlp())
    mixed.mixed_precision = object()
    synced.module.add_module("norm", nn.SyncBatchNorm(40))
    with joined.join():
        inside = said(joined)
    return {"mixed": said(mixed), "synced": said(synced), "joined": inside,
            "sparse": said(wrap(nn.Sequential(nn.Embedding(9, 4, sparse=True)))),
            "complex": said(wrap(nn.Linear(4, 4, dtype=torch.complex64)))}  # fmt: skip


def test_models_that_cannot_be_measured_are_refused(ranks):
    for said in ranks(2).run(refuses_models, seconds=30):
        for what, found in (("mixed", "mixed_precision"), ("synced", "times each rank.*SyncBatchNorm"),
                            ("joined", "inside join"), ("sparse", "sparse=False"), ("complex", "complex64")):
            assert re.search(found, said[what])


def fails_alone(rank, n):
    """Rank 1 fails in a hook, before it gathers what the others do; and for want of memory for the link."""

    def make(echo):
        def hook(bucket):
            if rank == 1:
                raise RuntimeError("no room")
            gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
            gather(torch.empty(4 * n, dtype=torch.int32), torch.arange(4, dtype=torch.int32), group=echo)

        return hook

    gradients = {"w": torch.ones(64)}
    compute, cpu = Compute((0.1,), 0.2), torch.device("cpu")
    tried = trial.Trial(dist.group.WORLD, cpu, [("w",)], gradients, compute, None, True, True)
    with pytest.raises(Refused, match=r"RuntimeError: no room \(rank 1\)"):
        tried.predict(Candidate("?", "?", make))
    sizes, zeros = [], torch.zeros

    def counted(shape, **options):
        sizes.append(4 * int(numpy.prod(shape)))
        if rank == 1 and sizes[-1] > 2**18:
            raise RuntimeError("out of memory")
        return zeros(shape, **options)

    torch.zeros, slow, most = counted, link.LONG_ENOUGH, link.MOST
    link.LONG_ENOUGH = 1e9
    try:
        with pytest.raises(Refused, match=r"out of memory \(rank 1\)"):
            link.measure(dist.group.WORLD, cpu, 2**40)
        link.MOST = 2**17
        link.measure(dist.group.WORLD, cpu, 2**40)
    finally:
        torch.zeros, link.LONG_ENOUGH, link.MOST = zeros, slow, most
    assert sizes[-1] <= 2 * 2**17
    assert gather_objects(rank, dist.group.WORLD) == list(range(n))  # and nobody waits for anything


def test_what_fails_on_one_rank_is_raised_on_all(ranks):
    ranks(2).run(fails_alone, seconds=30)


def cuts(rank, n, options):
    """Parameters in DDP's buckets, and in those that are predicted."""
    model, found = mlp(), []
    ddp = wrap(model, **options)
    names = {parameter: name for name, parameter in model.named_parameters()}

    def hook(state, bucket):
        found.append(tuple(names[p] for p in bucket.parameters()))
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    ddp.register_comm_hook(None, hook)
    for _ in range(3):
        found.clear()
        step(ddp, sgd(model), next(batches(rank)))
    mine = own_step.measure(ddp, lambda: next(batches(rank)), loss_fn, None, names, 1, torch.device("cpu"))
    order = sorted(mine.ready, key=mine.ready.get)
    return found, trial.buckets(ddp, order, {name: parameter for parameter, name in names.items()})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_buckets_are_those_of_ddp(ranks, options):
    found, predicted = ranks(2).run(cuts, options)[0]
    assert [sorted(bucket) for bucket in predicted] == [sorted(bucket) for bucket in found] and len(found) > 2


def test_a_round_sends_what_the_optimizer_keeps():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.BatchNorm1d(10))
    ddp = SimpleNamespace(module=model, parameters_to_ignore=(), process_group=SimpleNamespace(size=lambda: 4))
    plain, adam = sgd(model), torch.optim.AdamW(model.parameters())
    amsgrad = torch.optim.Adam(model.parameters(), amsgrad=True)
    half = BlockSparse("shared", density=0.5, memory="none")
    for optimizer, method, copies, buffers in (
        (plain, DivideAndShuffle(2), 1, True), (adam, DivideAndShuffle(2), 3, True),
        (amsgrad, DivideAndShuffle(2), 4, True), (adam, DivideAndShuffle(2, average_buffers=False), 3, False),
        (adam, DivideAndShuffle(2, average_optimizer_state=False), 1, True),
        (adam, DivideAndShuffle(2, average_optimizer_state=4), 1.5, True),
        (adam, DivideAndShuffle(2, blocks=half), 2.5, True),
    ):  # fmt: skip
        assert trial.replica_bytes(ddp, optimizer, method) == copies * 480 + 80 * buffers
    assert trial.replica_bytes(ddp, adam, LocalSteps()) == 80, "its parameters go the way of gradients"
    assert trial.replica_bytes(ddp, adam, LocalSteps(average_buffers=False)) == 0
    assert trial.replica_bytes(ddp, adam, LocalSteps(group_size=2).in_groups()) == 480 + 80
    names = {p: name for name, p in model.named_parameters()}
    asked = lambda optimizer: [one.label for one in candidates.named(None, 4, True, model, optimizer, names)]
    for follows in ("DivideAndShuffle(2)", "LocalSteps(every='auto')"):
        assert follows in asked(adam) and follows not in asked(None)
    of_others = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    assert "LocalSteps(every='auto')" not in asked(of_others)
    model.append(nn.SyncBatchNorm(10, affine=False))
    assert "LocalSteps(every='auto')" not in asked(adam) and "DivideAndShuffle(2)" in asked(adam)


def test_the_backend_is_that_of_the_device():
    both = "cpu:gloo,cuda:nccl"
    assert candidates.carrier(both, "cuda") == "nccl" and candidates.carrier(both, "cpu") == "gloo"
    assert candidates.carrier("gloo", "cpu") == "gloo"
    labels = [[candidates.candidate(what, gloo).label for what in candidates.by_default(4, gloo)]
              for gloo in (False, True)]  # fmt: skip
    assert set(labels[0]) - set(labels[1]) == {"PyTorch's bf16 hook"}
    assert "Dense(wire_dtype=torch.bfloat16)" in labels[1]


def asks_alone(rank, n):
    return thinwire.advise(wrap(mlp()), lambda: next(batches(rank)), loss_fn, steps=2)


def test_one_rank_has_nothing_to_exchange(ranks):
    found = ranks(1).run(asks_alone)[0]
    assert found.best == "plain DDP" and len(found.rows) == 1 and found.link is None
    assert "one rank" in str(found)


def test_without_a_process_group_it_says_what_to_do():
    with pytest.raises(RuntimeError, match="init_process_group"):
        thinwire.advise(nn.Linear(2, 2), lambda: None, loss_fn)


def concluded(compute_s, refused=(), **steps_s):
    """What is concluded from predictions, by what is asked: casts, and methods as "sparse" and "heaviest"."""
    methods = {"sparse": BlockSparse(), "heaviest": BlockSparse("nominated", density=0.01)}
    of_name = lambda name: candidates.candidate(methods.get(name, name), gloo=False)
    asked = [candidates.plain(), *(of_name(name) for name in (*steps_s, *refused) if name != "plain")]
    times = dict(zip([one.label for one in asked], steps_s.values()))

    def predict(one):
        if one.label not in times and one.label in [other.label for other in asked]:
            raise Refused("advise: RuntimeError: no such device (rank 1)\nand more")
        return times.get(one.label, 9.0), 1e6

    tried = SimpleNamespace(predict=predict, alone_s=compute_s, link=Link(0.001, 1e6),
                            group=SimpleNamespace(size=lambda: 4))  # fmt: skip
    return advice.conclude(tried, asked, by_default=bool(refused))


def test_what_cannot_run_here_is_left_out_and_said():
    found = concluded(0.1, ("powersgd-1", "sparse"), plain=1.0, fp16=0.5, heaviest=0.4)
    assert [row.label for row in found.rows if row.step_s < 9] == [
        "plain DDP", "BlockSparse('nominated', density=0.01)", "PyTorch's fp16 hook"]  # fmt: skip
    assert "\nPyTorch's PowerSGD, rank 1 cannot run here: RuntimeError: no such device (rank 1)\n" in str(found)


def test_the_fastest_is_taken_where_the_network_costs_much():
    found = concluded(0.1, plain=1.0, fp16=0.6, sparse=0.5, heaviest=0.2)
    assert found.best == "BlockSparse('nominated', density=0.01)"
    assert "1000 ms to 200 ms a step, 5.0 times as fast" in found.conclusion and "100 ms" in found.conclusion
    assert [row.verdict for row in found.rows] == ["what you have", "take this", "faster", "faster"]
    assert found.rows[1].speedup == 5


def test_a_cast_is_taken_where_it_is_nearly_as_fast():
    assert concluded(0.1, plain=1.0, fp16=0.51, sparse=0.5).best == "PyTorch's fp16 hook"
    assert concluded(0.1, plain=1.0, fp16=0.55, sparse=0.5).best == "BlockSparse()"
    # It has to be worth it by itself, bf16 goes before fp16, and nearly is measured from the fastest.
    assert concluded(0.1, plain=1.0, fp16=0.94, sparse=0.90).best == "BlockSparse()"
    assert concluded(0.1, plain=1.0, bf16=0.51, fp16=0.505, sparse=0.5).best == "PyTorch's bf16 hook"
    assert concluded(0.1, plain=1.0, bf16=0.52, fp16=0.54, sparse=0.5).best == "PyTorch's bf16 hook"
    assert concluded(0.1, plain=1.0, bf16=0.54, fp16=0.52, sparse=0.5).best == "PyTorch's fp16 hook"


def test_nothing_is_advised_where_the_network_costs_little():
    found = concluded(0.96, plain=1.0, sparse=0.8)
    assert found.best == "plain DDP" and "costs you 4% of a step: nothing here can save more" in str(found)


def test_nothing_is_advised_where_nothing_gains():
    found = concluded(0.5, plain=1.0, sparse=0.98, heaviest=1.2)
    assert found.best == "plain DDP" and "no method here is a tenth faster" in str(found)
    assert [row.verdict for row in found.rows] == ["what you have, and the best", "no gain", "slower"]


def test_labels_are_as_one_would_write_the_method():
    for text in ("BlockSparse()", "BlockSparse('nominated', density=0.01)", "DivideAndShuffle(2)", "Dense()",
                 "BlockSparse('topk', density=0.1, memory='none', wire_dtype=torch.bfloat16)",
                 "DivideAndShuffle(2, blocks=BlockSparse('shared', density=0.2))",
                 "Elastic(BlockSparse(), beta=0.5)", "LocalSteps(every=16)", "LocalSteps(every='auto', overlap='auto')",
                 "LocalSteps(every=4, method=BlockSparse('topk', density=0.1), outer_momentum=0.5)",
                 "LocalSteps(every=16, group_size=2, overlap=0, schedule='ring')",
                 "LocalSteps(every=16, fragments=4)"):  # fmt: skip
        names = {"torch": torch} | {name: getattr(thinwire, name) for name in thinwire.__all__}
        assert candidates.label(eval(text, names)) == text


SCRIPT = """
    import io, os, sys
    import torch, torch.distributed as dist
    from helper import width  # a module beside the script
    from torch.nn.parallel import DistributedDataParallel as DDP

    torch.set_num_threads(1)
    steps, kind = int(sys.argv[1]), sys.argv[2]
    if kind == "spawn":
        torch.multiprocessing.spawn(print, nprocs=2)
    dist.init_process_group("gloo")
    model = torch.nn.Sequential(torch.nn.Linear(width, 300), torch.nn.ReLU(), torch.nn.Linear(300, width))
    if kind != "no DDP":
        ddp, other = DDP(model), DDP(torch.nn.Linear(2, 2))
    if kind == "hook":
        import thinwire
        thinwire.attach(ddp, thinwire.BlockSparse())
    if kind == "uneven":
        steps -= dist.get_rank()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    done = 0

    def one_step():
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            with torch.no_grad():  # an evaluation, on one rank
                ddp(torch.randn(8, width))
        if kind == "--batch":
            dist.barrier()
        with ddp.no_sync():  # gradient accumulation
            ddp(torch.randn(8, width)).square().mean().backward()
        ddp(torch.randn(8, width)).square().mean().backward()
        optimizer.step()

    for _ in range(steps if kind != "no DDP" else 0):
        if kind == "swallows":
            try:
                one_step()
            except BaseException:
                continue
        else:
            one_step()
            if kind == "--batch":
                other(torch.randn(2, 2)).sum().backward()
        done += 1
        if dist.get_rank() == 0:
            torch.save(model.state_dict(), f"after-{done}.pt")
            torch.save(model.state_dict(), "last.tmp")
            os.replace("last.tmp", "last.pt")
            memory = io.BytesIO()
            torch.save(model.state_dict(), memory)
            torch.load(io.BytesIO(memory.getvalue()))
    print(f"THE SCRIPT WENT ON after {done}", flush=True)
    dist.destroy_process_group()
"""


def write_script(folder):
    (folder / "job").mkdir()
    (folder / "job" / "helper.py").write_text("width = 40\n")
    (folder / "job" / "train.py").write_text(textwrap.dedent(SCRIPT))


def torchrun(folder, *arguments, ranks):
    """Exit status and output of the command line on the script above."""
    write_script(folder)
    package = os.path.dirname(os.path.dirname(thinwire.__file__))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": package, "GLOO_SOCKET_IFNAME": "lo"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    ended = subprocess.run([*start, "-m", "thinwire", "advise", *arguments], cwd=folder, env=env, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)  # fmt: skip
    assert "RuntimeWarning" not in ended.stdout, ended.stdout
    return ended.returncode, ended.stdout


def command(folder, *arguments, ranks):
    """The same without torchrun, in processes that have imported torch already."""
    write_script(folder)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []
    for rank in range(ranks):
        env = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
               "TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
        one = forkserver.Process(target=run_main, args=(folder, env, ["advise", *arguments]), daemon=True)
        one.start()
        processes.append(one)
    for one in processes:
        one.join(120)
        one.kill()
        one.join()
    return max(abs(one.exitcode) for one in processes), (folder / "output").read_text()


def run_main(folder, env, arguments):
    """What python -m thinwire does in a process of its own."""
    from thinwire.__main__ import main

    os.chdir(folder)
    os.environ.update(env)
    output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    sys.exit(main(arguments))


def test_the_command_line_advises_and_leaves_the_script(tmp_path):
    status, output = torchrun(tmp_path, "--steps", "3", "job/train.py", "1000", "--batch", ranks=2)
    assert status == 0, output
    assert output.count("plain DDP  ") == 1 and "BlockSparse('nominated', density=0.01)" in output
    assert "on 2 ranks" in output and "THE SCRIPT WENT ON" not in output
    assert "LocalSteps(every=" in output and advice.OF_LOCAL_STEPS in output
    assert "other DistributedDataParallel models (1) exchanged as ever" in output
    # Checkpoints of equal replicas are the script's own, those of replicas that drift apart replace none and are gone.
    assert sorted(path.name for path in tmp_path.glob("*.*")) == [f"after-{i}.pt" for i in (1, 2, 3)] + ["last.pt"]
    after, last = torch.load(tmp_path / "after-3.pt"), torch.load(tmp_path / "last.pt")
    assert all(torch.equal(after[name], last[name]) for name in after)
    assert output.count("last.pt held back") == 1


def test_a_script_that_catches_everything_does_not_train_on(tmp_path):
    status, output = command(tmp_path, "--steps", "3", "job/train.py", "20", "swallows", ranks=2)
    assert status == 0, output
    assert output.count("plain DDP  ") == 1 and output.count("THE SCRIPT WENT ON after 8") == 2


def test_ranks_that_make_different_numbers_of_steps_are_told(tmp_path):
    status, output = command(tmp_path, "--steps", "3", "job/train.py", "9", "uneven", ranks=2)
    assert status != 0 and output.count("the ranks made different numbers of steps") == 1, output


@pytest.mark.parametrize("arguments, found", [
    (("--steps", "9", "job/train.py", "4", "short"), "ended after 4 steps; 15 are needed to time 9"),
    (("job/train.py", "4", "no DDP"), "without making a DistributedDataParallel"),
    (("job/train.py", "4", "hook"), "registers a communication hook of its own (hook)"),
    (("job/train.py", "4", "spawn"), "let torchrun start the ranks"),
], ids=lambda value: value[-1] if isinstance(value, tuple) else "")  # fmt: skip
def test_the_command_line_says_what_is_missing(tmp_path, arguments, found):
    status, output = command(tmp_path, *arguments, ranks=1)
    assert status != 0
    assert any(found in line for line in output.splitlines()), output


def test_the_command_line_refuses_what_is_not_there(tmp_path, capsys):
    from thinwire.__main__ import main

    for arguments, found in ((["nothing.py"], "no such script"), (["--steps", "0", __file__], "at least 1")):
        with pytest.raises(SystemExit):
            main(["advise", *arguments])
        assert found in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["advise", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "replace no file that is there" in said and "Start the ranks with torchrun" in said


def test_what_is_saved_of_drifting_replicas_replaces_nothing_and_is_removed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    drifting = False
    saves = Saves(lambda: drifting)
    save, replace = saves.guarded(torch.save, "f"), saves.moving(os.replace)
    collective = saves.held(lambda: "saved")
    for path in ("here", "best"):
        save("equal", path)
    assert collective() == "saved"
    drifting = True
    assert collective() is None
    for _ in range(2):
        save("drifted", "here")
        save("drifted", f="new")
        (tmp_path / "empty").touch()  # as tempfile makes them
        save("drifted", "empty")
        assert torch.load("new") == "drifted"
        replace("empty", "best")
        replace("new", "moved")
    memory = io.BytesIO()
    save("drifted", memory)
    assert memory.getvalue() and torch.load("here") == torch.load("best") == "equal"
    said = capsys.readouterr().err
    assert all(said.count(f"{name} held back") == 1 for name in ("here", "best", "of all ranks"))
    saves.remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "here"]


def exchanges_no_buffers(rank, n):
    model = Noisy()
    ddp = wrap(model)
    watch, at = Watch(ddp, 100), []
    ddp._sync_buffers = lambda: at.append(watch.done)
    for _ in range(AVERAGED + 3):
        step(ddp, sgd(model), next(batches(rank)))
    with torch.no_grad():
        ddp(next(batches(rank))[0])
    return at, watch.done


def test_buffers_are_not_broadcast_in_steps_that_are_timed(ranks):
    assert ranks(2).run(exchanges_no_buffers) == [(list(range(AVERAGED)), AVERAGED + 2)] * 2


def test_the_benchmark_names_its_misses():
    row = lambda method, predicted, mbit=50, delay=0: {
        "method": method, "mbit": mbit, "delay_ms": delay, "predicted_ms": predicted, "measured_ms": 100.0,
        "advise_s": 7.4}  # fmt: skip
    rows = [row(benchmark.ALONE, 200), row("fp16 hook", 114), row("fp16 hook", 84, delay=10),
            row(benchmark.ALONE, 100, delay=10)]  # fmt: skip
    heads, cells = benchmark.table(rows)
    assert heads == ("method", "50 Mbit/s", "50 Mbit/s, 10 ms")
    assert cells[1] == ("fp16 hook", "114 / 100 ms, +14%", "84 / 100 ms, -16%")
    assert benchmark.misses(rows) == ["missed: fp16 hook at 50 Mbit/s, 10 ms, -16%, target 15%"]
    assert benchmark.misses(rows[:2]) == []
    said = benchmark.summary(rows)
    assert "1 of 2 predictions are within 15%, the worst is off by 16%" in said and "at most 7 s" in said


def counts_what_is_under_way(rank, n):
    return link.measure(dist.group.WORLD, torch.device("cpu"), 2**16).at_once


def test_a_link_knows_how_many_collectives_a_backend_has_under_way(ranks):
    """The same on all ranks, and at least one. How many depends on what else the machine does."""
    (found,) = set(ranks(2).run(counts_what_is_under_way))
    assert 1 <= found <= link.MANY
