"""Elastic scheduling on real process groups: nothing lost or applied twice, and replicas equal where they must be."""

import contextlib
import datetime
import itertools
import random
import threading
import weakref

import pytest
import torch
import torch.distributed as dist
from models import attach, data, equal_on_all_ranks, flat, local_gradient, logged, mlp, sgd, step, wrap
from thinwire import BlockSparse, Dense, Elastic
from thinwire.core.channel import Channel
from thinwire.ddp import elastic
from thinwire.elastic import scheduling
from thinwire.elastic.lateness import Late, Ledger, heaviest
from thinwire.elastic.scheduling import Agreed, Arrival, Rule
from thinwire.replicas.groups import timeout_of
from torch.nn.parallel import DistributedDataParallel

SPARSE = BlockSparse("nominated", density=0.1, block_size=16, dense_below=20)
EVERY_RULE = [
    Elastic(Dense(), beta=0.5),
    Elastic(Dense(), beta=0.0, max_delay=3),
    Elastic(Dense(), beta=0.5, speculate=True),
    Elastic(Dense(), beta=0.5, decide="arrival"),
    Elastic(Dense(), beta=0.3, max_delay=2, speculate=True, decide="arrival"),
    Elastic(SPARSE, beta=0.5),
    Elastic(SPARSE, beta=0.5, decide="arrival"),
    Elastic(BlockSparse(block_size=16), beta=0.3),
]


def label(method):
    kind = method.method.selection if isinstance(method.method, BlockSparse) else "dense"
    extra = "-speculate" if method.speculate else ""
    return f"{method.decide}-{kind}-beta{method.beta}-delay{method.max_delay}{extra}"


def opens(rank, rule, bucket):
    """By how many steps later than its own a step must end before this average may arrive; -1 is at once."""
    choices = [-1, 0]
    if isinstance(rule, Agreed):
        choices = [-1, 0] if bucket.late is None else [0, 1]
    elif rule.method.max_delay > 1 and "0.weight" in bucket.names and len(bucket.names) < 5:  # enough is there without
        choices = [-1, 0, 1]
    return random.Random(f"{rank} {bucket.step} {bucket.names}").choice(choices)


@contextlib.contextmanager
def gates(rank):
    """Averages wait at gates, which open before the end of their step, after it or after that of the next one, as is
    drawn for each, otherwise on every rank: so is what is late."""
    average, land_all = Rule._average, Rule.land_all
    ends = {kind: kind.end for kind in (Agreed, Arrival)}
    lock, waiting, last_end, all_open = threading.RLock(), [], -1, 0

    def gated_average(self, lane, bucket, flat, done):
        until = bucket.step + opens(rank, self, bucket)

        def arrive():
            with lock:
                if not all_open and until > last_end:
                    return waiting.append((until, go_on))
            done()

        def go_on():
            try:
                done()
            except BaseException as error:
                lane.courier.fail(error)

        average(self, lane, bucket, flat, arrive)

    def open_gates():
        with lock:
            may = [one for one in waiting if all_open or one[0] <= last_end]
            waiting[:] = [one for one in waiting if one not in may]
        for _, go_on in may:
            go_on()

    def end(self, step):
        nonlocal last_end
        if isinstance(self, Arrival):
            for bucket in itertools.takewhile(lambda one: opens(rank, self, one) < 0, list(self.buckets)):
                bucket.late.landed.wait()
        ends[type(self)](self, step)
        with lock:
            last_end = step
        open_gates()

    def land(self):
        nonlocal all_open
        all_open += 1
        open_gates()
        try:
            land_all(self)
        finally:
            all_open -= 1

    Rule._average, Rule.land_all, Agreed.end, Arrival.end = gated_average, land, end, end
    try:
        yield
    finally:
        Rule._average, Rule.land_all, Agreed.end, Arrival.end = average, land_all, *ends.values()
        with lock:
            all_open += 1
        open_gates()


def average_over_ranks(tensors):
    total = flat(tensors)
    dist.all_reduce(total)
    return total / dist.get_world_size()


# ---- what is waited for ----


def test_heaviest_are_the_fewest_that_make_up_beta():
    assert heaviest([1.0, 4.0, 2.0, 3.0], 0.5) == {1, 3}
    assert heaviest([1.0, 4.0, 2.0, 3.0], 0.4) == {1}
    assert heaviest([1.0, 4.0, 2.0, 3.0], 0.0) == set()
    assert heaviest([1.0, 4.0, 2.0, 0.0], 1.0) == {0, 1, 2, 3}
    assert heaviest([2.0, 2.0, 2.0], 0.5) == {0, 1}
    assert heaviest([1.0, float("nan")], 0.1) == {0, 1}
    assert heaviest([], 0.5) == set()


def test_ledger_applies_each_part_once_also_in_other_buckets():
    ledger = Ledger()
    late = Late(0, ("a", "b", "c"), (2, 1, 3), torch.arange(6.0), (0.1, 0.1, 0.2))
    ledger.restore(late)
    late.land()

    class Bucket:
        names, numels, flat = ("c", "a"), (3, 2), torch.zeros(5)

    ledger.deliver(ledger.lates, Bucket, lambda name, lr: 2.0)
    assert Bucket.flat.tolist() == [6.0, 8.0, 10.0, 0.0, 2.0]
    ledger.deliver(ledger.lates, Bucket, lambda name, lr: 2.0)
    assert Bucket.flat.tolist() == [6.0, 8.0, 10.0, 0.0, 2.0]
    assert set(ledger.pending()) == {"a", "b", "c"}  # until the step that was given a and c is made
    ledger.keep(late.names)
    assert set(ledger.pending()) == {"b"}
    Bucket.names, Bucket.numels, Bucket.flat = ("b",), (1,), torch.zeros(1)
    ledger.deliver(ledger.lates, Bucket, lambda name, lr: None)
    assert Bucket.flat.tolist() == [0.0] and set(ledger.pending()) == {"b"}
    ledger.deliver(ledger.lates, Bucket, lambda name, lr: 1.0)
    assert Bucket.flat.tolist() == [2.0] and not ledger.lates


# ---- beta = 1 ----


def trained(rank, method, steps=6, **options):
    model = mlp()
    ddp, optimizer = wrap(model), sgd(model)
    handle = attach(ddp, method, optimizer, **options)
    batches = data(rank)
    for _ in range(steps):
        step(ddp, optimizer, next(batches))
    return model, handle


def beta_one(rank, n, inner):
    ours, handle = trained(rank, Elastic(inner, beta=1.0))
    plain, _ = trained(rank, inner)
    handle.finalize()
    return torch.equal(flat(ours.parameters()), flat(plain.parameters())), handle.stats()["late_buckets"]


@pytest.mark.parametrize("inner", [Dense(), SPARSE, BlockSparse(block_size=16)], ids=lambda m: repr(m)[:30])
def test_beta_one_is_the_method_itself(ranks, inner):
    assert ranks(3).run(beta_one, inner) == [(True, 0)] * 3


def one_rank(rank, n):
    ours, handle = trained(rank, Elastic(Dense(), beta=0.0))
    handle.finalize()
    plain, _ = trained(rank, Dense())
    return torch.equal(flat(ours.parameters()), flat(plain.parameters()))


def test_one_rank_is_plain_ddp(ranks):
    assert ranks(1).run(one_rank) == [True]


# ---- conservation ----


def conservation(rank, n, method, steps, accumulate=1, schedule=False, resume_at=None):
    """x_0 - the sum of lr_t times the average gradient that step t issued, against x after finalize().

    With a memory, what remains in the residuals was not sent, and is added back at the last learning rate, which must
    therefore be constant.
    """
    with gates(rank):
        model = mlp()
        ddp, optimizer = wrap(model), sgd(model)
        handle = attach(ddp, method, optimizer)
        batches, lrs = data(rank), random.Random(7)
        expected, pending_seen = flat(model.parameters()), 0
        for t in range(steps):
            lr = lrs.choice([0.01, 0.02, 0.05]) if schedule else 0.02
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            issued = 0
            for i in range(accumulate):
                batch = next(batches)
                issued = issued + flat(local_gradient(model, batch))
                with ddp.no_sync() if i < accumulate - 1 else contextlib.nullcontext():
                    ((ddp(batch[0]) - batch[1]) ** 2).mean().backward()
            optimizer.step()
            expected -= lr * average_over_ranks([issued])
            pending_seen += bool(handle._ledger.lates)
            if t == resume_at:
                state = handle.state_dict()
                weights = {name: p.detach().clone() for name, p in model.named_parameters()}
                model = mlp(seed=5)
                ddp, optimizer = wrap(model), sgd(model)
                with torch.no_grad():
                    for name, p in model.named_parameters():
                        p.copy_(weights[name])
                handle = attach(ddp, method, optimizer)
                handle.load_state_dict(state)
        handle.finalize()
        held = handle._reducer.memory.waiting()
        residual = flat([held[name] for name, _ in model.named_parameters()]) if held else torch.zeros(1)
        dist.all_reduce(residual)
        off = flat(model.parameters()) - lr * residual / n - expected
        return (off.norm() / expected.norm()).item(), pending_seen, equal_on_all_ranks(list(model.parameters()))


def check_conserved(found, steps):
    for off, _, equal in found:
        assert off < 2e-6
        assert equal
    assert max(seen for _, seen, _ in found) > steps // 10  # it was elastic at all


EXACT = [method for method in EVERY_RULE if not (isinstance(method.method, BlockSparse) and method.method.unbiased)]


@pytest.mark.parametrize("method", EXACT, ids=label)
def test_no_gradient_is_lost_or_applied_twice(ranks, method):
    check_conserved(ranks(3).run(conservation, method, 60), 60)


@pytest.mark.parametrize("method", EXACT[:5], ids=label)
def test_the_learning_rate_that_issued_counts(ranks, method):
    check_conserved(ranks(2).run(conservation, method, 40, 1, True), 40)


@pytest.mark.parametrize("method", EXACT, ids=label)
def test_conservation_with_no_sync(ranks, method):
    check_conserved(ranks(2).run(conservation, method, 30, 3), 30)


@pytest.mark.parametrize("method", EXACT, ids=label)
def test_conservation_across_save_and_resume(ranks, method):
    check_conserved(ranks(2).run(conservation, method, 30, 1, False, 14), 30)


# ---- replicas ----


def replicas(rank, n, method, optimizer_name):
    with gates(rank):
        model = mlp()
        ddp = wrap(model)
        optimizer = {
            "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.01),
            "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=1e-3),
        }[optimizer_name]()
        handle = attach(ddp, method, optimizer)
        batches, equal = data(rank), []
        for _ in range(40):
            step(ddp, optimizer, next(batches))
            equal.append(equal_on_all_ranks(list(model.parameters())))
        handle.finalize()
        equal.append(equal_on_all_ranks(list(model.parameters())))
        return all(equal), handle.stats()["late_buckets"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", [m for m in EVERY_RULE if not m.replicas_differ], ids=label)
def test_agreed_keeps_replicas_bitwise_equal_with_any_optimizer(ranks, method, optimizer):
    for equal, late in ranks(3).run(replicas, method, optimizer):
        assert equal and late > 40


def timed(rank, n, method, slow):
    """What is late alternates; with ``slow``, averages arrive when they like."""
    steps = itertools.count()

    def every_other(norms, beta):
        step_ = next(steps)
        return {i for i in range(len(norms)) if (i + step_) % 2}

    scheduling.heaviest = every_other
    try:
        with gates(rank) if slow else contextlib.nullcontext():
            return flat(trained(rank, method, steps=24)[0].parameters())
    finally:
        scheduling.heaviest = heaviest


def differing(rank, n, method):
    with gates(rank):
        model = mlp()
        ddp, optimizer = wrap(model), sgd(model, lr=0.02)
        handle = attach(ddp, method, optimizer)
        batches, equal = data(rank), []
        for _ in range(30):
            step(ddp, optimizer, next(batches))
            equal.append(equal_on_all_ranks(list(model.parameters())))
        before = flat(model.parameters())
        with handle.evaluating() as final:
            inside = equal_on_all_ranks(list(final.parameters()))
            seen = flat(final.parameters())
        restored = torch.equal(before, flat(model.parameters()))
        handle.finalize()
        return all(equal), inside, restored, torch.equal(seen, flat(model.parameters())), bool(handle._ledger.lates)


WITH_MEMORIES = [
    Elastic(Dense(), 0.5),
    Elastic(BlockSparse("shared", density=0.3, memory="control_variate", block_size=16), 0.5),
    Elastic(BlockSparse("topk", density=0.1, block_size=16, momentum=0.9, wire_dtype=torch.bfloat16), 0.5, max_delay=2),
]


@pytest.mark.parametrize("method", WITH_MEMORIES, ids=label)
def test_agreed_does_not_depend_on_what_arrives_when(ranks, method):
    quick, slow = (ranks(2).run(timed, method, slow) for slow in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(quick, slow))


@pytest.mark.parametrize("method", [m for m in EVERY_RULE if m.replicas_differ], ids=label)
def test_replicas_differ_until_finalized(ranks, method):
    found = ranks(3).run(differing, method)
    assert [rest for _, *rest in found] == [[True, True, True, False]] * 3
    assert not found[0][0]


def evaluating_with_adam(rank, n):
    model = mlp()
    ddp, optimizer = wrap(model), torch.optim.AdamW(model.parameters(), lr=1e-3)
    handle = attach(ddp, Elastic(Dense(), beta=0.3), optimizer)
    batches = data(rank)
    for i in range(12):
        step(ddp, optimizer, next(batches))
        if i == 6:
            gradients = [p.grad.clone() for p in model.parameters()]
            rates = [group["lr"] for group in optimizer.param_groups]
            try:
                with handle.evaluating():
                    raise KeyError("in the body")
            except KeyError:
                pass
            assert rates == [group["lr"] for group in optimizer.param_groups]
            assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients))
    other = mlp()
    ddp, optimizer = wrap(other), torch.optim.AdamW(other.parameters(), lr=1e-3)
    attach(ddp, Elastic(Dense(), beta=0.3), optimizer)
    batches = data(rank)
    for _ in range(12):
        step(ddp, optimizer, next(batches))
    return torch.equal(flat(model.parameters()), flat(other.parameters()))


def test_evaluating_leaves_no_trace_in_model_or_optimizer(ranks):
    assert ranks(2).run(evaluating_with_adam) == [True] * 2


def backward_in_evaluating(rank, n):
    model = mlp()
    ddp, optimizer = wrap(model), sgd(model)
    handle = attach(ddp, Elastic(Dense(), beta=0.3), optimizer)
    batches = data(rank)
    for _ in range(3):
        step(ddp, optimizer, next(batches))
    with pytest.raises(RuntimeError, match="evaluating"), handle.evaluating():
        step(ddp, optimizer, next(batches))
    return True


def other_calls_in_evaluating(rank, n):
    _, handle = trained(rank, Elastic(Dense(), beta=0.3))
    with handle.evaluating():
        for call in (handle.finalize, handle.state_dict, handle.close, handle.evaluating().__enter__):
            with pytest.raises(RuntimeError, match=r"inside evaluating\(\)"):
                call()
    return bool(handle._ledger.lates)


def test_what_would_lose_gradients_inside_evaluating_is_refused(ranks):
    assert ranks(2).run(other_calls_in_evaluating) == [True] * 2


def test_training_inside_evaluating_is_refused(ranks):
    assert ranks(2).run(backward_in_evaluating) == [True] * 2
    ranks(2).stop()


# ---- steps that are skipped ----


class Scaler:
    """The parts of a GradScaler that matter here, on the CPU: skips a step with inf or NaN, halves its scale then."""

    def __init__(self):
        self.scale, self.skipped = 1024.0, []

    def is_enabled(self):
        return True

    def get_scale(self):
        return self.scale

    def step(self, optimizer, t):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not all(bool(torch.isfinite(g).all()) for g in gradients):
            self.skipped.append(t)
            self.scale /= 2
            return
        for g in gradients:
            g /= self.scale
        optimizer.step()


def with_scaler(rank, n, method, bad_layers):
    with gates(rank):
        model = mlp()
        ddp, optimizer, scaler = wrap(model), sgd(model, lr=0.02), Scaler()
        handle = attach(ddp, method, optimizer, grad_scaler=scaler)
        batches, expected = data(rank), flat(model.parameters())
        for t in range(60):
            x, y = next(batches)
            optimizer.zero_grad()
            issued = average_over_ranks(local_gradient(model, (x, y)))
            spoilt = model[bad_layers[t]].weight if t in bad_layers and rank == n - 1 else None
            handles = [] if spoilt is None else [spoilt.register_hook(lambda g: g * float("inf"))]
            (scaler.scale * ((ddp(x) - y) ** 2).mean()).backward()
            for one in handles:
                one.remove()
            scaler.step(optimizer, t)
            if t not in bad_layers:
                expected -= 0.02 * issued
        handle.finalize()
        off = (flat(model.parameters()) - expected).norm() / expected.norm()
        return scaler.skipped, off.item(), equal_on_all_ranks(list(model.parameters())), handle.stats()["late_buckets"]


@pytest.mark.parametrize("beta, delay", [(0.5, 1), (0.0, 1), (0.3, 2)])
def test_skipped_steps_drop_what_they_issued_and_nothing_else(ranks, beta, delay):
    bad = {10: 0, 11: 4, 25: 10, 40: 6}
    for skipped, off, equal, late in ranks(3).run(with_scaler, Elastic(Dense(), beta, max_delay=delay), bad):
        assert skipped == sorted(bad)
        assert equal and off < 2e-6 and late > 50


# ---- options of DDP, parameters that are not used, learning rates of zero, uneven inputs ----


def with_options(rank, n, method, options):
    model = mlp()
    ddp, optimizer = wrap(model, **options), sgd(model, lr=0.02)
    handle = attach(ddp, method, optimizer)
    batches, expected = data(rank), flat(model.parameters())
    for _ in range(15):
        batch = next(batches)
        expected -= 0.02 * average_over_ranks(local_gradient(model, batch))
        step(ddp, optimizer, batch)
    handle.finalize()
    off = (flat(model.parameters()) - expected).norm() / expected.norm()
    return off.item(), handle.stats()["late_buckets"], equal_on_all_ranks(list(model.parameters()))


@pytest.mark.parametrize("options", [{"static_graph": True}, {"gradient_as_bucket_view": True}], ids=lambda o: [*o][0])
@pytest.mark.parametrize("method", EVERY_RULE[:4], ids=label)
def test_options_of_ddp(ranks, method, options):
    for off, late, equal in ranks(2).run(with_options, method, options):
        assert off < 2e-6 and late > 15 and equal


class Sometimes(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.always, self.sometimes = mlp(layers=3), mlp(layers=3, seed=1)

    def forward(self, x, both):
        x = self.always(x)
        return self.sometimes(x) if both else x


def unused(rank, n):
    model = Sometimes()
    ddp = wrap(model, find_unused_parameters=True)
    optimizer = sgd(model, lr=0.02)
    handle = attach(ddp, Elastic(Dense(), beta=0.2), optimizer)
    batches, expected = data(rank), flat(model.parameters())
    for t in range(40):
        x, y = next(batches)
        both = t % 3 == 0
        loss = ((model(x, both) - y) ** 2).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        issued = [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), gradients)]
        expected -= 0.02 * average_over_ranks(issued)
        optimizer.zero_grad()
        ((ddp(x, both) - y) ** 2).mean().backward()
        optimizer.step()
    handle.finalize()
    return ((flat(model.parameters()) - expected).norm() / expected.norm()).item(), handle.stats()["late_buckets"]


def test_what_is_late_of_an_unused_parameter_waits_for_its_use(ranks):
    for off, late in ranks(2).run(unused):
        assert off < 2e-6 and late > 20


def zero_rate(rank, n, ends_at_zero):
    model = mlp()
    ddp, optimizer = wrap(model), sgd(model, lr=0.02)
    handle = attach(ddp, Elastic(Dense(), beta=0.2), optimizer)
    batches, expected = data(rank), flat(model.parameters())
    for t in range(20):
        lr = 0.0 if t in (0, 7, 8) else 0.02
        optimizer.param_groups[0]["lr"] = lr
        batch = next(batches)
        expected -= lr * average_over_ranks(local_gradient(model, batch))
        step(ddp, optimizer, batch)
    if ends_at_zero:
        optimizer.param_groups[0]["lr"] = 0.0
    handle.finalize()
    return ((flat(model.parameters()) - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("ends_at_zero", [False, True])
def test_a_learning_rate_of_zero_loses_nothing(ranks, ends_at_zero):
    assert max(ranks(2).run(zero_rate, ends_at_zero)) < 2e-6


def uneven(rank, n):
    model = mlp()
    ddp, optimizer = wrap(model), sgd(model)
    handle = attach(ddp, Elastic(Dense(), beta=0.3), optimizer)
    with pytest.raises(RuntimeError, match="join"), ddp.join():
        step(ddp, optimizer, next(data(rank)))
    return bool(handle)


def test_join_is_refused(ranks):
    assert ranks(2).run(uneven, seconds=60) == [True] * 2
    ranks(2).stop()


def never_used(rank, n):
    model = Sometimes()
    ddp = wrap(model, find_unused_parameters=True)
    optimizer = sgd(model, lr=0.02)
    handle = attach(ddp, Elastic(Dense(), beta=0.0), optimizer)
    batches = data(rank)
    for _ in range(20):
        x, y = next(batches)
        optimizer.zero_grad()
        ((ddp(x, False) - y) ** 2).mean().backward()
        optimizer.step()
    return len(handle._ledger.lates), len(list(model.parameters()))


def test_what_is_never_used_does_not_pile_up(ranks):
    for held, parameters in ranks(2).run(never_used):
        assert 0 < held <= parameters


def channels_last(rank, n):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Tanh(), torch.nn.Conv2d(8, 4, 3))
    model = model.to(memory_format=torch.channels_last)
    ddp, optimizer = DistributedDataParallel(model, bucket_cap_mb=0.0005), sgd(model, lr=0.1)
    handle = attach(ddp, Elastic(Dense(), beta=0.0), optimizer)
    generator, expected = torch.Generator().manual_seed(rank), flat(model.parameters())
    for _ in range(6):
        x = torch.randn(4, 3, 8, 8, generator=generator).to(memory_format=torch.channels_last)
        issued = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
        expected -= 0.1 * average_over_ranks(issued)
        optimizer.zero_grad()
        ddp(x).square().mean().backward()
        optimizer.step()
    handle.finalize()
    return ((flat(model.parameters()) - expected).norm() / expected.norm()).item(), handle.stats()["late_buckets"]


def test_finalize_knows_the_memory_format(ranks):
    for off, late in ranks(2).run(channels_last):
        assert off < 2e-6 and late > 4


def restarted(rank, n):
    """A learning rate that falls far and is restarted, with momentum: nothing of the small rate's ratio may stay."""
    model = mlp()
    ddp, optimizer = wrap(model), sgd(model, momentum=0.9)
    attach(ddp, Elastic(Dense(), beta=0.0), optimizer)
    batches = data(rank)
    for t in range(30):
        optimizer.param_groups[0]["lr"] = 1e-5 if 10 <= t < 20 else 0.05
        before = flat(model.parameters())
        step(ddp, optimizer, next(batches))
    return (flat(model.parameters()) - before).norm().item()


def test_a_restarted_learning_rate_with_momentum_does_not_blow_up(ranks):
    assert max(ranks(2).run(restarted)) < 1.0


# ---- failures and refusals ----


def broken(rank, n, method):
    model = mlp()
    ddp, optimizer = wrap(model), sgd(model)
    handle = attach(ddp, method, optimizer)
    batches, average = data(rank), Channel.average
    for _ in range(4):
        step(ddp, optimizer, next(batches))
    handle.consistency()  # everything has landed on both ranks before it breaks

    def fails(self, *args):
        raise ConnectionError("the wire was cut")

    Channel.average = fails
    try:
        with pytest.raises(RuntimeError, match="the wire was cut"):
            for _ in range(4):
                step(ddp, optimizer, next(batches))
    finally:
        Channel.average = average
    return True


@pytest.mark.parametrize("method", [Elastic(Dense(), 0.5), Elastic(Dense(), 0.5, decide="arrival")], ids=label)
def test_a_failure_in_the_background_is_raised_on_the_rank_that_trains(ranks, method):
    assert ranks(2).run(broken, method, seconds=60) == [True] * 2
    ranks(2).stop()


def refused(rank, n, method, make_optimizer, match, options, ddp_options):
    model = mlp()
    ddp = DistributedDataParallel(model, **ddp_options)
    with pytest.raises(ValueError, match=match):
        attach(ddp, method, make_optimizer(model) if rank == n - 1 else sgd(model), **options)
    return True


def momentum_sgd(model):
    return sgd(model, momentum=0.9)


def decaying_sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)


def adam(model):
    return torch.optim.Adam(model.parameters())


def no_optimizer(model):
    return None


def of_a_part(model):
    return torch.optim.SGD(model[0].parameters(), lr=0.1)


@pytest.mark.parametrize("method, make_optimizer, match, options, ddp_options", [
    (Elastic(Dense(), speculate=True), momentum_sgd, "without momentum", {}, {}),
    (Elastic(Dense(), decide="arrival"), decaying_sgd, "without momentum and weight decay", {}, {}),
    (Elastic(Dense(), decide="arrival"), adam, "decide='agreed'", {}, {}),
    (Elastic(Dense()), no_optimizer, "pass optimizer=", {}, {}),
    (Elastic(Dense()), of_a_part, "does not own 10 of the model's 12", {}, {}),
    (Elastic(Dense(), decide="arrival"), sgd, "grad_scaler", {"grad_scaler": Scaler()}, {}),
    (Elastic(Dense(), decide="arrival"), sgd, "find_unused", {}, {"find_unused_parameters": True}),
])  # fmt: skip
def test_what_is_not_sound_is_refused_on_every_rank(ranks, method, make_optimizer, match, options, ddp_options):
    assert ranks(2).run(refused, method, make_optimizer, match, options, ddp_options, seconds=60) == [True] * 2


def test_wrong_values_are_refused_where_they_are_made():
    for options, match in [
        ({"beta": 1.5}, r"Elastic\(beta=1.5\).*\[0, 1\]"), ({"beta": float("nan")}, "beta"),
        ({"max_delay": 0}, "at least 1"), ({"decide": "agreeed"}, "did you mean 'agreed'"),
        ({"speculate": 3}, "speculate"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            Elastic(Dense(), **options)
    with pytest.raises(TypeError, match="method must be a Dense or a BlockSparse"):
        Elastic(Elastic(Dense()))


def state_in_other_methods(rank, n):
    _, handle = trained(rank, Elastic(SPARSE, beta=0.2))
    state = handle.state_dict()
    assert state["late"]
    for method in (SPARSE, Elastic(SPARSE, beta=1.0)):
        _, other = trained(rank, method, steps=1)
        with pytest.raises(ValueError, match="yet to apply"):
            other.load_state_dict(state)
    handle.finalize()
    _, other = trained(rank, SPARSE, steps=1)
    other.load_state_dict(handle.state_dict())
    return True


def test_what_is_late_is_not_lost_in_another_method(ranks):
    assert ranks(2).run(state_in_other_methods) == [True] * 2


def closed(rank, n):
    _, handle = trained(rank, Elastic(Dense(), beta=0.2))
    handle.finalize()
    before = handle.stats()
    handle.close()
    return before == handle.stats() and before["late_buckets"] > 0


def test_close_keeps_the_figures(ranks):
    assert ranks(2).run(closed) == [True] * 2


def of_other_kinds(rank, n):
    _, handle = trained(rank, Elastic(Dense(), beta=0.2, speculate=True))
    state = handle.state_dict()
    _, other = trained(rank, Elastic(Dense(), beta=0.2), steps=1)
    with pytest.raises(ValueError, match="differ from rank to rank"):
        other.load_state_dict(state)
    scaled = trained(rank, Elastic(Dense(), beta=0.2), grad_scaler=Scaler())[1].state_dict()
    other.load_state_dict(scaled)
    return [scaled["late"][0]["tensors"][name].norm().item() / part.norm().item()
            for name, part in other.state_dict()["late"][0]["tensors"].items()]  # fmt: skip


def test_late_gradients_of_another_kind_or_scale(ranks):
    for ratios in ranks(2).run(of_other_kinds):
        assert ratios and all(ratio == pytest.approx(1024.0) for ratio in ratios)


def waits_as_long(rank, n):
    mine = dist.new_group(timeout=datetime.timedelta(seconds=77))
    model = mlp()
    ddp, optimizer = wrap(model, process_group=mine), sgd(model)
    handle = attach(ddp, Elastic(Dense(), 0.5), optimizer)
    return [timeout_of(lane.group, torch.device("cpu")).seconds for lane in handle._rule.lanes]


def test_new_process_groups_have_the_timeout_of_the_models(ranks):
    assert ranks(2).run(waits_as_long) == [[77, 77]] * 2


def quiet(rank, n):
    with logged() as messages:
        trained(rank, Elastic(Dense(), beta=0.2))[1].finalize()
    return messages


def warned(rank, n):
    with logged() as messages:
        model = mlp()
        ddp, optimizer = DistributedDataParallel(model), sgd(model)
        attach(ddp, Elastic(Dense(), beta=0.2), optimizer)
        batches = data(rank)
        for _ in range(5):
            step(ddp, optimizer, next(batches))
        handle = trained(rank, Elastic(Dense(), beta=0.2))[1]
        elastic._remind(weakref.ref(handle))  # at the program's end
        handle.finalize()
        elastic._remind(weakref.ref(handle))
    return messages


def test_too_few_buckets_and_a_forgotten_finalize_are_said(ranks):
    for few, forgotten in ranks(2).run(warned):
        assert "1 bucket(s)" in few and "bucket_cap_mb" in few
        assert "gradients of 1 step(s)" in forgotten and "finalize()" in forgotten


def test_nothing_is_logged_where_nothing_is_wrong(ranks):
    assert ranks(2).run(quiet) == [[], []]
