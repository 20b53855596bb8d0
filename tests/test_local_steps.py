"""Local steps on DDP: ranks step alone, and every round steps the anchor that they agree on."""

import contextlib
import datetime
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import local_rank
import pytest
import thinwire
import torch
import torch.distributed as dist
from models import data, equal_on_all_ranks, flat, in_small_pieces, logged, mlp, sgd, step, wrap
from thinwire import BlockSparse, Dense, LocalSteps
from thinwire.local import flight
from thinwire.local.anchor import Anchor
from thinwire.local.flight import Flight
from thinwire.local.fragments import fragments_of
from thinwire.local.pace import Pace

PLAIN = dict(outer_lr=1.0, outer_momentum=0.0)
EXACT = Dense(exact=True)
INT4 = Dense(wire_dtype="int4", memory="error_feedback")
NOMINATED = BlockSparse("nominated", density=0.25, block_size=16, wire_dtype="int4")
WEIGHTS = BlockSparse("nominated", density=0.25, block_size=16, memory="weights", wire_dtype="int4")


def with_batchnorm(seed=0):
    model = mlp(layers=5, seed=seed)
    return torch.nn.Sequential(model[:4], torch.nn.BatchNorm1d(40), model[4:])


class WithUnused(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.unused = mlp(), mlp(layers=1, seed=1)

    def forward(self, x):
        return self.body(x)


def with_frozen():
    model = mlp()
    model[0].weight.requires_grad_(False)
    return model


class Tied(torch.nn.Module):
    """Two layers that share a weight."""

    def __init__(self):
        super().__init__()
        self.body = mlp(layers=6)
        self.body[4].weight = self.body[0].weight

    def forward(self, x):
        return self.body(x)


def start(method, optimizer="sgd", build=mlp, dtype=torch.float32, ddp_options=None, **options):
    model = build().to(dtype)
    ddp = wrap(model, **(ddp_options or {}))
    made = {
        "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05),
        "momentum": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=1e-3),
        "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2),
    }[optimizer](model.parameters())
    return model, ddp, made, thinwire.attach(ddp, method, optimizer=made, **options)


def of_every_rank(tensor):
    everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, tensor.contiguous())
    return torch.stack(everyone)


def anchor_of(handle):
    return torch.cat([one.reshape(-1) for _, one in sorted(handle.state_dict(anchor=True)["anchor"].items())])


# ---- what a round does ----


def every_step(rank, n):
    """H = 1 with nothing in its way, and plain DDP, from the same model."""
    ends = []
    for method in (LocalSteps(1, EXACT, overlap=0, **PLAIN), None):
        model = mlp()
        ddp, optimizer = wrap(model), sgd(model)
        if method is not None:
            thinwire.attach(ddp, method, optimizer=optimizer)
        batches = data(rank)
        for _ in range(10):
            step(ddp, optimizer, next(batches))
        ends.append(flat(model.parameters()))
    return float((ends[0] - ends[1]).abs().max())


@pytest.mark.parametrize("n", [2, 3])
def test_a_round_of_one_step_is_plain_ddp(ranks, n):
    assert max(ranks(n).run(every_step)) < 1e-6


def alone(rank, n, overlap):
    model, ddp, optimizer, handle = start(LocalSteps(3, EXACT, overlap=overlap, **PLAIN), "adamw")
    other = mlp()
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    for batch, _ in zip(data(rank), range(7)):
        step(ddp, optimizer, batch)
        step(other, other_optimizer, batch)
    with handle.evaluating():
        held = flat(model.parameters())
    handle.finalize()
    return torch.equal(flat(model.parameters()), flat(other.parameters())), bool(
        (held != flat(other.parameters())).any()
    )


@pytest.mark.parametrize("overlap", [0, 2])
def test_one_rank_keeps_its_own_weights_to_the_bit(ranks, overlap):
    assert ranks(1).run(alone, overlap) == [(True, True)]


def two(rank, n):
    """Parameters that are exact in few bits, so that the mean is too."""
    model = torch.nn.Linear(8, 8)
    for i, p in enumerate(model.parameters()):
        p.data = torch.arange(p.numel(), dtype=torch.float32).view(p.shape) / 4 + i
    ddp = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = thinwire.attach(ddp, LocalSteps(1, EXACT, overlap=0, **PLAIN), optimizer=optimizer)
    before = flat(model.parameters())
    ddp(torch.ones(1, 8)).sum().backward()
    for p in model.parameters():
        p.grad.fill_(0.5 + rank)  # so the ranks go to x - 0.5 and x - 1.5
    optimizer.step()
    handle.finalize()
    return torch.equal(flat(model.parameters()), before - 1.0)


def test_two_ranks_meet_exactly_in_the_middle(ranks):
    assert all(ranks(2).run(two))


def by_hand(rank, n, overlap, momentum, optimizer, fragments, on_gpu):
    """Attached, against the same rounds written out with an all-gather."""
    with in_small_pieces(), as_on_a_gpu(on_gpu):
        method = LocalSteps(4, EXACT, outer_lr=0.9, outer_momentum=momentum, overlap=overlap, fragments=fragments)
        model, ddp, opt, handle = start(method, optimizer)
        other = mlp()
        other_opt = type(opt)(other.parameters(), **{k: opt.defaults[k] for k in ("lr", "weight_decay")} | (
            {"momentum": opt.defaults["momentum"]} if "momentum" in opt.defaults else {}))  # fmt: skip
        parts = [[p for _, p in part] for part in fragments_of(list(other.named_parameters()), fragments)]
        vector = lambda part: torch.nn.utils.parameters_to_vector(part).detach().clone()
        anchors = [torch.nn.Parameter(vector(part)) for part in parts]
        outers = [torch.optim.SGD([anchor], lr=0.9, momentum=momentum, nesterov=momentum > 0) for anchor in anchors]
        sent, gaps = {}, []
        batches, others_batches = data(rank), data(rank)
        for t in range(1, 19):
            step(ddp, opt, next(batches))
            step(other, other_opt, next(others_batches))
            for lands in (True, False) if overlap else (False, True):
                if not lands and t % (4 // fragments) == 0:
                    turn = (t // (4 // fragments) - 1) % fragments
                    now = vector(parts[turn])
                    sent[t] = turn, now, of_every_rank(anchors[turn].detach() - now)
                if lands and t - overlap in sent:
                    turn, origin, gathered = sent[t - overlap]
                    anchors[turn].grad = gathered.mean(0)
                    outers[turn].step()
                    landed = vector(parts[turn]) + (anchors[turn].detach() - origin)
                    torch.nn.utils.vector_to_parameters(landed, parts[turn])
            gaps.append(float((flat(model.parameters()) - flat(other.parameters())).abs().max()))
        for part, anchor in zip(parts, anchors):
            torch.nn.utils.vector_to_parameters(anchor.detach(), part)
        with handle.evaluating():
            gaps.append(float((flat(model.parameters()) - flat(other.parameters())).abs().max()))
        return max(gaps)


@pytest.mark.parametrize(("overlap", "momentum", "optimizer", "fragments"), [
    (0, 0.7, "adamw", 1), (1, 0.7, "momentum", 1), (3, 0.0, "sgd", 1), (1, 0.7, "adamw", 4), (2, 0.7, "sgd", 2),
])  # fmt: skip
@pytest.mark.parametrize("on_gpu", [False, True])
def test_rounds_are_what_they_say(ranks, overlap, momentum, optimizer, fragments, on_gpu):
    assert max(ranks(3).run(by_hand, overlap, momentum, optimizer, fragments, on_gpu)) < 1e-5


# ---- the same bits, and nothing lost ----


def anchors(rank, n, methods, build):
    """After every round the ranks compare digests of anchor and momentum: see in_small_pieces."""
    outcome = []
    for method in methods:
        with in_small_pieces():
            model, ddp, optimizer, handle = start(method, "adamw", build)
            batches = data(rank)
            losses = [step(ddp, optimizer, next(batches)) for _ in range(16)]
            stats = handle.stats()
            with handle.evaluating():
                agreed = equal_on_all_ranks(model.parameters())
            apart = not equal_on_all_ranks(model.parameters())
            handle.finalize()
            together = equal_on_all_ranks([*model.parameters(), *model.buffers()])
            handle.close()
            outcome.append((agreed, apart, together, stats["rounds"], losses[-1] < losses[0]))
    return outcome


WIRES = [Dense(), EXACT, INT4, Dense(torch.bfloat16, "error_feedback"), Dense("int2", "error_feedback"),
         Dense("int8", "error_feedback"), NOMINATED, WEIGHTS,
         BlockSparse("nominated", density=0.25, block_size=16, memory="weights", wire_dtype=torch.float16),
         BlockSparse("topk", density=0.1, block_size=16, wire_dtype=torch.float16),
         BlockSparse("independent"), BlockSparse("permuted", memory="error_feedback", block_size=16),
         BlockSparse("shared", density=0.3, memory="control_variate", block_size=16, wire_dtype="int4")]  # fmt: skip
METHODS = [LocalSteps(3, wire, overlap=i % 4) for i, wire in enumerate(WIRES)]
FEW = [METHODS[2], METHODS[6], METHODS[7], LocalSteps(9, INT4, fragments=3), LocalSteps(9, WEIGHTS, fragments=3)]


@pytest.mark.parametrize(("n", "methods"), [(3, METHODS), (2, FEW), (4, FEW), (5, FEW)])
def test_anchors_are_bitwise_equal_after_every_round(ranks, n, methods):
    for build in (mlp, Tied, with_batchnorm) if n == 2 else (with_batchnorm,):
        for of_rank in ranks(n).run(anchors, methods, build):
            for method, (agreed, apart, together, rounds, _) in zip(methods, of_rank, strict=True):
                assert agreed and together, method
                assert apart, "ranks that never differ show nothing"
                assert rounds == 5, method


def disturbed(rank, n):
    with in_small_pieces():
        model, ddp, optimizer, handle = start(LocalSteps(2, overlap=0))
        batches = data(rank)
        for _ in range(3):
            step(ddp, optimizer, next(batches))
        if rank == 1:
            next(iter(handle._anchor.stores()["anchor"].views().values()))[3] += 1e-6
        try:
            step(ddp, optimizer, next(batches))
        except ValueError as error:
            return str(error)


def test_debug_mode_notices_an_anchor_that_differs(ranks):
    for said in ranks(2).run(disturbed):
        assert "the ranks differ in anchor after round 2" in said


def kept(rank, n, method, steps):
    """Over the rounds: what all ranks were to send, n times what the mean of it came to, and what waits at the end."""
    totals = {"given": 0.0, "landed": 0.0}
    land = Flight.land

    def counted(self, *args, **kwargs):
        totals["landed"] = totals["landed"] + n * torch.cat([part.mean for part in self.parameters])
        return land(self, *args, **kwargs)

    with in_small_pieces():
        model, ddp, optimizer, handle = start(method, dtype=torch.float64)
        encode = handle._rounds._channel.encode
        given = []

        def counting(flat_, names, numels, number):
            given.append(flat_.clone())
            return encode(flat_, names, numels, number)

        handle._rounds._channel.encode = counting
        Flight.land = counted
        try:
            for batch, _ in zip(data(rank, dtype=torch.float64), range(steps)):
                step(ddp, optimizer, batch)
                if given and handle._flight is None:
                    totals["given"] = totals["given"] + torch.cat(given)
                    given.clear()
                elif handle._flight is not None:
                    handle._flight.wait()
                    if len(given) == len(handle._flight.parameters):
                        totals["given"] = totals["given"] + torch.cat(given)
                        given.clear()
            if handle._flight is not None:
                handle._land()
        finally:
            Flight.land = land
    names = [name for name, _ in handle._parameters()]
    waiting = handle._rounds.reducer.memory.waiting()
    residual = torch.cat([waiting[name] for name in names])
    given, residual = of_every_rank(totals["given"]).sum(0), of_every_rank(residual).sum(0)
    error = (given - totals["landed"] - residual).abs().max() / given.abs().max()
    return float(error), float(residual.abs().max() / given.abs().max()), handle._round


@pytest.mark.parametrize("method", [
    LocalSteps(2, INT4, overlap=0), LocalSteps(2, NOMINATED, overlap=1),
    LocalSteps(3, Dense(torch.bfloat16, "error_feedback"), overlap=2),
    LocalSteps(2, BlockSparse("topk", density=0.1, block_size=16)),
], ids=lambda m: f"{type(m.method).__name__}-{m.method.wire_dtype}-{m.overlap}")  # fmt: skip
@pytest.mark.parametrize("n", [2, 3])
def test_what_is_sent_and_what_waits_is_all_there_was(ranks, n, method):
    """In float64: the residual is applied once, at a learning rate of 1, whatever the outer optimizer's is."""
    for error, waits, rounds in ranks(n).run(kept, method, 20 * method.every + method.overlap):
        assert rounds == 20
        assert error < 1e-12
        assert waits > 1e-5, "what never waits shows nothing"


def partial(rank, n, overlap):
    """Partial rounds: the mean over ranks of their parameters is the anchor's, and what has come since."""
    with in_small_pieces():
        model, ddp, optimizer, handle = start(LocalSteps(2, WEIGHTS, overlap=overlap, **PLAIN), dtype=torch.float64)
        worst = 0.0
        for batch, _ in zip(data(rank, dtype=torch.float64), range(20)):
            before = flat(model.parameters())
            gradient = flat(torch.autograd.grad(((model(batch[0]) - batch[1]) ** 2).mean(), list(model.parameters())))
            step(ddp, optimizer, batch)
            mean = of_every_rank(flat(model.parameters())).mean(0)
            without = of_every_rank(before - 0.05 * gradient).mean(0)
            worst = max(worst, float((mean - without).abs().max()))
        left = of_every_rank(flat(model.parameters())).std(0).max()
        return worst, float(left), bool(handle._rounds.reducer.memory.stores())


@pytest.mark.parametrize("overlap", [0, 1])
def test_what_partial_rounds_do_not_send_stays_in_the_weights(ranks, overlap):
    for worst, left, has_memory in ranks(2).run(partial, overlap):
        assert worst < 1e-12, "a plain average moves no mean, whatever of it travels"
        assert left > 1e-4 and not has_memory


@contextlib.contextmanager
def as_on_a_gpu(yes=True):
    """Where the host does not know whether a round is finite when it lands."""
    known = flight._known
    if yes:
        flight._known = lambda good: None
    try:
        yield
    finally:
        flight._known = known


def infinite(rank, n, on_gpu, last):
    """On one rank in the middle, and where ``last`` says so in the last round too."""
    with in_small_pieces(), as_on_a_gpu(on_gpu):
        model, ddp, optimizer, handle = start(LocalSteps(2, INT4, overlap=1))
        batches = data(rank)
        with logged() as said:
            for t in range(12):
                step(ddp, optimizer, next(batches))
                if t == 4 and rank == 1:
                    with torch.no_grad():
                        next(model.parameters())[0, 0] = float("inf")
                if t == 5:
                    residual = [one.clone() for one in handle._rounds.reducer.memory.waiting().values()]
            if last and rank == 1:
                with torch.no_grad():
                    next(model.parameters())[0, 0] = float("nan")
            handle.finalize()
        finite = all(bool(torch.isfinite(t).all()) for t in (*model.parameters(), *residual))
        return finite, equal_on_all_ranks(model.parameters()), [one for one in said if "left out" in one]


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_infinite_weights_of_one_rank_spoil_nothing(ranks, on_gpu, last):
    for finite, equal, said in ranks(2).run(infinite, on_gpu, last):
        assert finite and equal
        assert len(said) == 1 + last and "inf or NaN" in said[0]


def last(rank, n):
    """The last round: exact, with what waits, without a momentum in a part of a round, and once."""
    with in_small_pieces():
        model, ddp, optimizer, handle = start(LocalSteps(4, INT4, overlap=1), "sgd", with_batchnorm, torch.float64)
        for batch, _ in zip(data(rank, dtype=torch.float64), range(6)):
            step(ddp, optimizer, batch)
        waiting = handle._rounds.reducer.memory.waiting()
        mine = torch.cat([p.detach().reshape(-1) - waiting[name] for name, p in model.named_parameters()])
        kept = max(float(one.abs().max()) for one in waiting.values())
        model[1].num_batches_tracked += rank
        handle.finalize()
        gap = float((flat(model.parameters()) - of_every_rank(mine).mean(0)).abs().max())
        once, rounds = flat(model.parameters()), handle.stats()["rounds"]
        handle.finalize()
        same = torch.equal(once, flat(model.parameters())) and handle.stats()["rounds"] == rounds == 2
        empty = not any(bool(one.any()) for one in handle._rounds.reducer.memory.waiting().values())
        return gap, kept, same, empty, int(model[1].num_batches_tracked)


def test_the_last_round_is_exact(ranks):
    for gap, kept, same, empty, batches in ranks(2).run(last):
        assert gap < 1e-9 and kept > 1e-6  # float32 travels
        assert same and empty and batches == 6


def buffers(rank, n):
    """BatchNorm's statistics keep what comes to them while their mean travels."""
    model, ddp, optimizer, handle = start(LocalSteps(2, EXACT, overlap=1, **PLAIN), "sgd", with_batchnorm)
    batches, gaps, apart = data(rank), [], 0.0
    held = lambda: flat([model[1].running_mean, model[1].running_var])
    land, before = handle._land, []
    handle._land = lambda: (before.append(held()), land())
    for t in range(1, 8):
        step(ddp, optimizer, next(batches))
        if t % 2 == 0:
            sent = held()
            mean = of_every_rank(sent).mean(0)
            apart = max(apart, float((sent - mean).abs().max()))
        elif t > 1:
            gaps.append(float((held() - (before[-1] + mean - sent)).abs().max()))
    return max(gaps), apart, len(before)


def test_buffers_keep_what_comes_meanwhile(ranks):
    for gap, apart, landed in ranks(2).run(buffers):
        assert gap < 1e-6 < 1e-3 < apart and landed == 3


def masked(rank, n):
    """Where a partial round sends nothing, the anchor and its momentum stay; elsewhere both move."""
    moved, stayed = [], []
    real = Anchor.step

    def watching(self, piece, mean, origin=None, sent=None, momentum=True):
        both = lambda: [store.flat(piece.layout, piece.dtype, piece.device).clone() for store in self.stores().values()]
        before = both()
        real(self, piece, mean, origin, sent, momentum)
        for then, now in zip(before, both()):
            stayed.append(bool((then == now)[~sent].all()))
            moved.append(bool((then != now)[sent].any()))

    Anchor.step = watching
    try:
        model, ddp, optimizer, handle = start(LocalSteps(2, WEIGHTS, overlap=0), "adamw")
        run(handle, ddp, optimizer, data(rank), 10)
    finally:
        Anchor.step = real
    return len(stayed), all(stayed), all(moved)


def test_momentum_moves_nothing_that_was_not_sent(ranks):
    for rounds, stayed, moved in ranks(2).run(masked):
        assert rounds >= 8 and stayed and moved


# ---- what counts as a step ----


def late(rank, n):
    """A left-out step that is noticed in the next backward pass ends a round: nothing moves in that pass."""
    with in_small_pieces():
        model, ddp, optimizer, handle = start(LocalSteps(3, INT4, overlap=0))
        batches, still = data(rank), True
        for t in range(9):
            optimizer.zero_grad()
            x, y = next(batches)
            loss = ((ddp(x) - y) ** 2).mean()
            before = flat(model.parameters())
            loss.backward()
            still &= torch.equal(before, flat(model.parameters()))
            if (rank, t) != (1, 2):
                optimizer.step()
        handle.finalize()
        return still, handle.stats()["rounds"], equal_on_all_ranks(model.parameters())


def test_nothing_moves_inside_a_backward_pass(ranks):
    assert ranks(2).run(late) == [(True, 4, True)] * 2


def apart_after_a_load(rank, n):
    model, ddp, optimizer, handle = start(LocalSteps(4, INT4, overlap=1))
    batches, states = data(rank), []
    for _ in range(2):
        run(handle, ddp, optimizer, batches, 1)
        states.append(handle.state_dict())
    handle.load_state_dict(states[rank])
    try:
        step(ddp, optimizer, next(batches))
    except ValueError as error:
        return str(error)


def test_states_of_different_steps_are_refused(ranks):
    for said in ranks(2).run(apart_after_a_load):
        assert "the ranks differ in" in said and "step: 1 on rank 0, 2 on rank 1" in said


def loops(rank, n, loop):
    """The handle's steps, what of the loop's steps this rank has made, and whether the anchors agree to the end."""
    with in_small_pieces():
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if "scaler" in loop else None
        options = {"grad_scaler": scaler} if loop == "scaler" else {}
        options["ddp_options"] = {"find_unused_parameters": loop == "unused"}
        build = {"unused": WithUnused, "frozen": with_frozen}.get(loop, mlp)
        model, ddp, optimizer, handle = start(LocalSteps(3, INT4), build=build, **options)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
        batches = data(rank)
        loss_of = lambda batch: ((ddp(batch[0]) - batch[1]) ** 2).mean()
        made = 0
        for t in range(12):
            skipped = rank == 1 and t in (2, 5, 11)
            if loop == "closure":

                def closure():
                    for _ in range(3):  # as one that looks for a length does
                        optimizer.zero_grad()
                        loss = loss_of(next(batches))
                        loss.backward()
                    return loss

                optimizer.step(closure)
                made += 1
            elif loop in ("scaler", "untold scaler"):
                optimizer.zero_grad()
                scaler.scale(loss_of(next(batches)) * (float("inf") if skipped else 1.0)).backward()
                scaler.step(optimizer)
                scaler.update()
                made += not skipped
            elif loop == "said without a pass" and skipped:
                next(batches)
                handle.skip_step()
            elif loop in ("left out", "said"):
                optimizer.zero_grad(set_to_none=t % 2 == 0)
                loss_of(next(batches)).backward()
                if skipped and loop == "said":
                    handle.skip_step()
                elif not skipped:
                    optimizer.step()
                made += not skipped
            elif loop in ("accumulated", "no_sync"):
                optimizer.zero_grad()
                for i in range(3):
                    with ddp.no_sync() if loop == "no_sync" and i < 2 else contextlib.nullcontext():
                        (loss_of(next(batches)) * (0.0 if skipped and i == 0 else 1.0)).backward()
                optimizer.step()
                made += 1
            else:
                optimizer.zero_grad()
                loss = loss_of(next(batches))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                made += 1
            scheduler.step()
        handle.finalize()
        stats = handle.stats()
        handle.close()
        return stats["steps"], made, stats["rounds"], equal_on_all_ranks(model.parameters())


LOOPS = (
    "scaler",
    "untold scaler",
    "left out",
    "said",
    "said without a pass",
    "accumulated",
    "no_sync",
    "closure",
    "clipped",
    "frozen",
    "unused",
)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_step_is_a_step_in_every_loop(ranks, loop):
    first, second = ranks(2).run(loops, loop)
    for steps, _, rounds, equal in (first, second):
        assert (steps, rounds) == (12, 5) and equal, "four rounds, and the last one"
    assert first[1] - second[1] == (3 if loop in LOOPS[:5] else 0)


def thawed(rank, n):
    """A parameter that is frozen at first and then again is sent while it is trained, and in the round after."""
    with in_small_pieces():
        model, ddp, optimizer, handle = start(LocalSteps(2, overlap=0), ddp_options={"find_unused_parameters": True})
        weight, sent = model[0].weight, []
        batches = data(rank)
        for t in range(10):
            if t in (0, 6):
                weight.requires_grad_(False)
                weight.grad = None
            if t == 3:
                weight.requires_grad_(True)
            before = handle.stats()["bytes_sent"]
            step(ddp, optimizer, next(batches))
            sent.append(handle.stats()["bytes_sent"] - before)
        handle.finalize()
        return [b for b in sent if b], equal_on_all_ranks(model.parameters())


def test_frozen_parameters_are_not_sent(ranks):
    for sent, equal in ranks(2).run(thawed):
        assert equal
        assert sent[0] < sent[1] == sent[2] and sent[3] == sent[4] == sent[0]


def frozen_midway(rank, n, method):
    """A parameter that is frozen in the middle of a round, and in a flight, and has moved in both."""
    with in_small_pieces():
        model, ddp, optimizer, handle = start(method, ddp_options={"find_unused_parameters": True})
        batches = data(rank)
        for t in range(12):
            if t == 5:
                model[0].weight.requires_grad_(False)
                model[0].weight.grad = None
            step(ddp, optimizer, next(batches))
        with handle.evaluating():
            agreed = equal_on_all_ranks(model.parameters())
        handle.finalize()
        return agreed, equal_on_all_ranks(model.parameters())


@pytest.mark.parametrize("method", [LocalSteps(4, INT4), LocalSteps(2, WEIGHTS, overlap=0), LocalSteps(4, fragments=2)])
def test_what_is_frozen_in_a_round_is_still_averaged(ranks, method):
    assert ranks(2).run(frozen_midway, method) == [(True, True)] * 2


def unseen(rank, n):
    model, ddp, optimizer, handle = start(LocalSteps(2))
    x, y = next(data(rank))
    ((ddp.module(x) - y) ** 2).mean().backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)


def test_passes_that_go_around_ddp_are_refused(ranks):
    for said in ranks(2).run(unseen):
        assert "no backward pass of the model was seen" in said


def left_out(rank, n):
    """One rank leaves out a whole batch, and says nothing."""
    model, ddp, optimizer, handle = start(LocalSteps(4, overlap=1))
    try:
        for t, batch in zip(range(8), data(rank)):
            if (rank, t) != (1, 2):
                step(ddp, optimizer, batch)
        handle.finalize()
    except RuntimeError as error:
        return str(error)


def test_ranks_in_different_rounds_are_told_so(ranks):
    for said in ranks(2).run(left_out):
        assert "the ranks are in different rounds" in said and "skip_step()" in said


def warm(rank, n):
    ends = []
    for method in (LocalSteps(4, overlap=0, warmup_steps=5), None):
        model = with_batchnorm()
        ddp = wrap(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        handle = None if method is None else thinwire.attach(ddp, method, optimizer=optimizer)
        batches = data(rank)
        for _ in range(5):
            step(ddp, optimizer, next(batches))
        ends.append(flat([*model.parameters(), *model.buffers()]))
        if handle is not None:
            warmed = ddp.broadcast_buffers
            for _ in range(5):
                step(ddp, optimizer, next(batches))
            rounds, off = handle.stats()["rounds"], ddp.broadcast_buffers
            handle.close()
            after = ddp.broadcast_buffers
    return torch.equal(*ends), warmed, off, after, rounds


def test_the_warm_up_is_plain_ddp(ranks):
    assert ranks(2).run(warm) == [(True, True, False, True, 1)] * 2


# ---- the anchor ----


def evaluated(rank, n, steps):
    model, ddp, optimizer, handle = start(LocalSteps(4, overlap=2), "adamw", with_batchnorm)
    batches = data(rank)
    for _ in range(steps):
        step(ddp, optimizer, next(batches))
    mine = [t.clone() for t in (*model.parameters(), *model.buffers())]
    with contextlib.suppress(KeyError), handle.evaluating() as same:
        inside = same is model, equal_on_all_ranks(t for t in (*model.parameters(), *model.buffers()))
        assert handle.state_dict(anchor=True)["anchor"]
        anchor = torch.equal(torch.cat([p.detach().reshape(-1) for _, p in sorted(model.named_parameters())]),
                             anchor_of(handle))  # fmt: skip
        refused = []
        for what in (
            optimizer.step,
            handle.finalize,
            handle.close,
            handle.state_dict,
            handle.consistency,
            handle.skip_step,
        ):
            with pytest.raises(RuntimeError, match="inside evaluating"):
                what()
            refused.append(True)
        raise KeyError
    restored = all(torch.equal(a, b) for a, b in zip(mine, (*model.parameters(), *model.buffers())))
    return *inside, anchor, len(refused), restored


def test_the_anchor_is_what_is_evaluated(ranks):
    assert ranks(2).run(evaluated, 7) == [(True, True, True, 6, True)] * 2
    assert ranks(2).run(evaluated, 1) == [(True, True, True, 6, True)] * 2, "before any round"


def measured(rank, n):
    model, ddp, optimizer, handle = start(LocalSteps(4, EXACT, overlap=0, **PLAIN), consistency_every=2)
    batches = data(rank)
    for _ in range(6):
        step(ddp, optimizer, next(batches))
    apart = float((flat([p for _, p in sorted(model.named_parameters())]) - anchor_of(handle).double()).norm())
    return apart, handle.consistency(), list(handle.consistency_log)


def test_consistency_is_the_distance_from_the_anchor(ranks):
    found = ranks(3).run(measured)
    norms = [apart for apart, _, _ in found]
    for _, last, log in found:
        assert last == found[0][1]
        assert last["inconsistency_max"] == pytest.approx(max(norms) / 0.05, rel=1e-6)
        assert last["anchor_distance"] == pytest.approx(sum(a * a for a in norms) / 3, rel=1e-6)
        assert [one["step"] for one in log] == [2, 4, 6] and log[1]["inconsistency_max"] == 0
        assert last["gradient_norm"] > 0 and last["inconsistency_max"] <= last["bound"]


# ---- how long rounds are ----


def told(*ranks):
    return torch.tensor(ranks, dtype=torch.float64)


def test_every_auto_is_the_fewest_steps_that_hide_the_exchange():
    pace = Pace(LocalSteps("auto", overlap=1))
    first = pace.every
    pace.hear(told((0.0, 0.1), (0.5, 0.1)))  # one does not know yet
    assert pace.every == first
    pace.hear(told((0.7, 0.10), (0.55, 0.08)))  # the last to come waits for nobody; the slowest counts
    assert (pace.every, pace.overlap) == (90, 1), "(0.55 - 0.1) / (0.05 * 0.1)"
    pace.hear(told((0.65, 0.10), (0.64, 0.11)))
    assert pace.every == 90, "a change of less than a fifth"
    pace.hear(told((0.10, 0.10), (0.2, 0.09)))
    assert (pace.every, pace.overlap) == (1, 1), "one step hides it all"
    other = Pace(LocalSteps("auto", overlap=1))
    other.load_state_dict(pace.state_dict())
    other.hear(told((0.11, 0.10), (0.11, 0.10)))
    assert other.state_dict() == pace.state_dict()


def test_overlap_auto_is_as_long_as_the_exchange():
    for every, exchange, expected in (
        (16, 0.35, (16, 4)), (16, 9.0, (16, 16)), ("auto", 0.35, (4, 4)), ("auto", 0.01, (1, 1)),
    ):  # fmt: skip
        pace = Pace(LocalSteps(every, overlap="auto"))
        assert pace.overlap == 1 and pace.follows
        pace.hear(told((exchange, 0.1), (exchange, 0.1)))
        assert (pace.every, pace.overlap) == expected
    pace = Pace(LocalSteps("auto", overlap=1, fragments=4))
    pace.hear(told((0.55, 0.1), (0.55, 0.1)))
    assert (pace.every, pace.spacing) == (360, 90), "each fragment as a round of its own"


def by_itself(rank, n, method):
    with in_small_pieces():
        model, ddp, optimizer, handle = start(method, "adamw")
        batches, seen = data(rank), []
        for _ in range(60):
            step(ddp, optimizer, next(batches))
            seen.append((handle._round, handle._begins_at, handle._lands_at))
        stats = handle.stats()
        handle.finalize()
        return seen, stats["rounds"], stats["every"], stats["overlap"], equal_on_all_ranks(model.parameters())


@pytest.mark.parametrize(
    "method", [LocalSteps("auto"), LocalSteps("auto", overlap="auto"), LocalSteps(8, overlap="auto")]
)
def test_ranks_choose_alike(ranks, method):
    found = ranks(3).run(by_itself, method)
    for seen, rounds, every, overlap, equal in found:
        assert equal and seen == found[0][0]
        assert rounds > 1 and 1 <= overlap <= every
        if method == LocalSteps(8, overlap="auto"):
            assert rounds >= 60 // 8 - 1, "a round begins when the one before has landed, after 8 steps at most"


# ---- in groups ----


def in_groups_by_hand(rank, n, overlap):
    with in_small_pieces():
        method = LocalSteps(3, group_size=2, overlap=overlap, global_every=4)
        model, ddp, optimizer, handle = start(method, "momentum")
        other = mlp()
        other_optimizer = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        partitions, pending, gaps = method.in_groups().partitions(n), None, []
        batches, others_batches = data(rank), data(rank)
        for t in range(1, 17):
            step(ddp, optimizer, next(batches))
            step(other, other_optimizer, next(others_batches))
            with torch.no_grad():
                now = torch.nn.utils.parameters_to_vector(other.parameters())
                if pending is not None:
                    now, pending = now + pending, None
                if t % 3 == 0:
                    done = t // 3 - 1
                    group = next(g for g in partitions[done % len(partitions)] if rank in g)
                    members = list(range(n)) if (done + 1) % 4 == 0 else list(group)
                    mean = of_every_rank(now)[members].mean(0)
                    now, pending = (mean, None) if overlap == 0 else (now, mean - now)
                torch.nn.utils.vector_to_parameters(now, other.parameters())
            gaps.append(float((flat(model.parameters()) - flat(other.parameters())).abs().max()))
        stats = handle.stats()
        handle.finalize()
        return max(gaps), stats["steps"], stats["rounds"], equal_on_all_ranks(model.parameters())


@pytest.mark.parametrize("overlap", [0, 1])
def test_groups_are_divide_and_shuffle_every_few_steps(ranks, overlap):
    for gap, steps, rounds, equal in ranks(4).run(in_groups_by_hand, overlap):
        assert gap < 1e-6
        assert (steps, rounds, equal) == (16, 5, True)


# ---- saving ----


def run(handle, ddp, optimizer, batches, steps):
    for _ in range(steps):
        step(ddp, optimizer, next(batches))


def snapshot(model, optimizer, handle):
    """A rank's checkpoint, as a loop saves it."""
    return ({k: v.clone() for k, v in model.state_dict().items()},
            torch.utils._pytree.tree_map(lambda t: t.clone() if torch.is_tensor(t) else t, optimizer.state_dict()),
            handle.state_dict())  # fmt: skip


def resumed(rank, n, method, at, tmp):
    with in_small_pieces():
        model, ddp, optimizer, handle = start(method, "adamw", with_batchnorm)
        batches = data(rank)
        run(handle, ddp, optimizer, batches, at)
        in_flight = bool(handle.state_dict().get("flight"))
        torch.save(snapshot(model, optimizer, handle), f"{tmp}/{rank}.pt")
        run(handle, ddp, optimizer, batches, 9)
        handle.finalize()
        end = flat([*model.parameters(), *model.buffers()])
        handle.close()
        model, ddp, optimizer, handle = start(method, "adamw", lambda: with_batchnorm(seed=1))
        of_model, of_optimizer, of_handle = torch.load(f"{tmp}/{rank}.pt", weights_only=True)
        model.load_state_dict(of_model)
        optimizer.load_state_dict(of_optimizer)
        handle.load_state_dict(of_handle)
        batches = itertools.islice(data(rank), at, None)
        run(handle, ddp, optimizer, batches, 9)
        handle.finalize()
        return in_flight, torch.equal(end, flat([*model.parameters(), *model.buffers()]))


@pytest.mark.parametrize("method", [
    LocalSteps(4, INT4, overlap=2), LocalSteps(4, WEIGHTS, overlap=2), LocalSteps(4, NOMINATED, overlap=2),
    LocalSteps(4, overlap=2, warmup_steps=7), LocalSteps(4, group_size=2, global_every=3),
    LocalSteps(8, NOMINATED, overlap=2, fragments=2),
], ids=["int4", "weights", "nominated", "warmup", "groups", "fragments"])  # fmt: skip
def test_a_resumed_run_is_the_uninterrupted_one(ranks, tmp_path, method):
    for at in (5, 7):  # in a flight, and between a landing and the next round
        for in_flight, same in ranks(2).run(resumed, method, at, str(tmp_path)):
            assert same
            assert method.group_size or in_flight == (at == 5 and not method.warmup_steps)


def saved_by(rank, n, tmp):
    model, ddp, optimizer, handle = start(LocalSteps(4, INT4, overlap=2), "adamw", with_batchnorm)
    run(handle, ddp, optimizer, data(rank), 9)
    torch.save(handle.state_dict(), f"{tmp}/{rank}.pt")
    torch.save(handle.state_dict(anchor=True), f"{tmp}/anchor-{rank}.pt")
    handle._land()
    return anchor_of(handle)


def loaded_on(rank, n, tmp, ranks_then):
    outcome = []
    for shards in ([torch.load(f"{tmp}/{r}.pt", weights_only=True) for r in range(ranks_then)],
                   torch.load(f"{tmp}/anchor-1.pt", weights_only=True)):  # fmt: skip
        with in_small_pieces(), logged() as said:
            model, ddp, optimizer, handle = start(LocalSteps(4, INT4, overlap=2), "adamw", lambda: with_batchnorm(1))
            handle.load_state_dict(shards)
            at = torch.cat([p.detach().reshape(-1) for _, p in sorted(model.named_parameters())])
            equal = equal_on_all_ranks([*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())])
            run(handle, ddp, optimizer, data(rank), 8)
            outcome.append((at, equal, handle.stats()["rounds"], [one for one in said if "is lost" in one]))
    return outcome


def test_another_number_of_ranks_goes_on_from_the_anchor(ranks, tmp_path):
    anchor = ranks(2).run(saved_by, str(tmp_path))[0]
    files = [(tmp_path / f"anchor-{rank}.pt").read_bytes() for rank in range(2)]
    assert len(files[0]) == len(files[1])
    for of_rank in ranks(3).run(loaded_on, str(tmp_path), 2):
        for at, equal, rounds, said in of_rank:
            assert torch.equal(at, anchor) and equal
            assert rounds == 4, "two before, and two since"
            assert len(said) == 1 and "1 steps since" in said[0]


def refusing(rank, n):
    model, ddp, optimizer, handle = start(LocalSteps(4, INT4, overlap=2))
    run(handle, ddp, optimizer, data(rank), 5)
    good, before = handle.state_dict(), flat(model.parameters())

    def but(**changes):
        return {key: dict(value) if isinstance(value, dict) else value for key, value in good.items()} | changes

    name = next(iter(good["anchor"]))
    nan = {key: torch.full_like(one, float("nan")) for key, one in good["anchor"].items()}
    bad = [{}, but(format=7), but(method={"method": "Elastic"}), but(anchor=nan), but(pace={"every": 4}),
           but(anchor={k: v for k, v in good["anchor"].items() if k != name}), but(rank=1 - rank), but(step=-1),
           but(momentum={name: torch.zeros(3)}), but(memory={}), but(flight={"origin": good["anchor"]}),
           but(flight={"mean": good["anchor"], "origin": {}}), [but(rank=0, step=5), but(rank=1, step=6)]]  # fmt: skip
    said = []
    for state in bad:
        try:
            handle.load_state_dict(state)
            said.append("")
        except ValueError as error:
            said.append(str(error))
    after = handle.state_dict()
    same = str(after) == str(good) and torch.equal(before, flat(model.parameters()))
    handle.close()
    with pytest.raises(RuntimeError, match="closed"):
        handle.load_state_dict(good)
    return said, same


def test_a_state_that_does_not_fit_changes_nothing(ranks):
    for said, same in ranks(2).run(refusing):
        assert all("load_state_dict" in one for one in said), said
        assert same


# ---- what is refused ----


@pytest.mark.parametrize(("wrong", "kind", "says"), [
    (dict(every=0), ValueError, "every must be an integer of at least 1"),
    (dict(every=2.5), TypeError, "every must be an integer"),
    (dict(every="atuo"), ValueError, "an integer of at least 1, or 'auto'"),
    (dict(every=4, overlap=5), ValueError, "every must be at least 5"),
    (dict(every=4, fragments=3, overlap=2), ValueError, "every must be at least 6"),
    (dict(outer_lr=0), ValueError, "outer_lr must be a positive number"),
    (dict(outer_momentum=1.0), ValueError, "outer_momentum must be a number in"),
    (dict(method=thinwire.DivideAndShuffle()), TypeError, "must be a thinwire.BlockSparse or thinwire.Dense"),
    (dict(method=BlockSparse("topk", density=0.1, momentum=0.5)), ValueError, "momentum would act twice"),
    (dict(method=BlockSparse("topk", density="auto", max_inconsistency=1.0)), ValueError, "density='auto'"),
    (dict(group_size=2, method=INT4), ValueError, "replicas in groups"),
    (dict(group_size=2, outer_momentum=0.5), ValueError, "no anchor"),
    (dict(group_size=2, every="auto"), ValueError, "as a number"),
    (dict(schedule="ring"), ValueError, "group_size"),
])  # fmt: skip
def test_wrong_values_are_refused_where_they_are_given(wrong, kind, says):
    with pytest.raises(kind, match=says):
        LocalSteps(**wrong)


def refused(rank, n):
    said = []
    for options in ({"synchronises": True}, {"optimizer": None}, {"foreign": True}, {"method": LocalSteps(4 + rank)}):
        model = mlp()
        ddp = wrap(model)
        if "synchronises" in options:
            model.append(torch.nn.SyncBatchNorm(40))  # on the CPU DDP itself refuses to wrap one
        optimizer = options.get("optimizer", sgd(mlp() if "foreign" in options else model))
        try:
            thinwire.attach(ddp, options.get("method", LocalSteps(4)), optimizer=optimizer)
            said.append("")
        except (TypeError, ValueError) as error:
            said.append(str(error))
        if "foreign" not in options:  # it can be attached to afterwards
            thinwire.attach(ddp, Dense())
    return said


def test_what_cannot_work_is_refused_on_every_rank(ranks):
    for said in ranks(2).run(refused):
        for one, says in zip(
            said, ("SyncBatchNorm", "pass optimizer=", "does not own", "every: 4 on rank 0, 5 on rank 1")
        ):
            assert says in one


def started_apart(rank, n):
    model, ddp, optimizer, _ = start(LocalSteps(4))
    with torch.no_grad():
        model[0].weight += rank
    try:
        step(ddp, optimizer, next(data(rank)))
    except (RuntimeError, ValueError) as error:
        return str(error)


def test_ranks_that_begin_with_other_parameters_are_refused(ranks):
    for said in ranks(2).run(started_apart):
        assert "the ranks differ in parameters" in said


def closed(rank, n):
    threads = lambda: {one for one in threading.enumerate() if one.name == "thinwire" and one.is_alive()}
    before = threads()  # other tests' handles may be there still
    model, ddp, optimizer, handle = start(LocalSteps(4, overlap=2), "sgd", with_batchnorm)
    batches = data(rank)
    run(handle, ddp, optimizer, batches, 5)
    optimizer.zero_grad()
    ddp(next(batches)[0]).sum().backward()
    with pytest.raises(RuntimeError, match="between backward"):
        handle.close()
    optimizer.step()
    handle.close()
    handle.close()
    run(handle, ddp, optimizer, batches, 3)  # plain DDP again
    again = thinwire.attach(ddp, Dense(), optimizer=optimizer)
    run(again, ddp, optimizer, batches, 2)
    equal = equal_on_all_ranks(model.parameters())
    again.close()
    for one in threads() - before:
        one.join(5.0)
    return equal, ddp.broadcast_buffers, len(threads() - before)


def test_a_closed_handle_leaves_plain_ddp(ranks):
    for equal, broadcasts, threads in ranks(2).run(closed):
        assert equal and broadcasts
        assert threads == 0


# ---- a rank that dies ----


def job(folder, *options):
    script = Path(__file__).with_name("local_rank.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python",
               sys.executable, str(script), str(folder), *options]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_a_killed_job_goes_on_where_it_was_saved(ranks, tmp_path):
    uninterrupted = ranks(2).run(local_rank.train)
    died = job(tmp_path, "--dies-after", "14")  # in the middle of a round
    assert died.returncode != 0 and not list(tmp_path.glob("end-*"))
    again = job(tmp_path)
    assert again.returncode == 0, again.stderr
    for rank, whole in enumerate(uninterrupted):
        end = torch.load(tmp_path / f"end-{rank}.pt", weights_only=True)
        assert all(torch.equal(one, end[name]) for name, one in whole.items())


def orphaned(rank, n):
    """A rank that is alone in a round says so when its group's patience ends."""
    group = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=3))
    model = mlp()
    ddp = wrap(model, process_group=group)
    optimizer = sgd(model)
    handle = thinwire.attach(ddp, LocalSteps(2, overlap=1), optimizer=optimizer)
    batches = data(rank)
    begin = time.monotonic()
    try:
        for t in range(8):
            if rank == 1 and t == 3:
                return True  # and makes no further step
            step(ddp, optimizer, next(batches))
    except RuntimeError as error:
        seconds = time.monotonic() - begin
        for what in (handle.finalize, handle.state_dict):
            with pytest.raises(RuntimeError, match="exchange in the background failed"):
                what()
        assert handle.state_dict(anchor=True)["anchor"]
        return "exchange in the background failed" in str(error) and seconds < 30


def test_the_others_end_with_an_error_in_their_groups_patience(ranks):
    assert ranks(2).run(orphaned) == [True, True]
