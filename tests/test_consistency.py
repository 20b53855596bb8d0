"""The measured inconsistency, and the density that follows it."""

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
from models import attach, data, equal_on_all_ranks, flat, logged, mlp, sgd, step, wrap
from thinwire import BlockSparse, Dense, DivideAndShuffle, Elastic, LocalSteps
from thinwire.consistency import bounds
from thinwire.consistency import measure as consistency
from thinwire.consistency.controller import AIM, DensityController
from torch.nn.parallel import DistributedDataParallel

TOPK = BlockSparse("topk", density=0.1, block_size=16, dense_below=20)


def test_sketch_keeps_norms_and_sums():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 30_000, generator=generator) * torch.tensor([[1.0], [0.01]])).unbind()
    column = torch.zeros(30_000).view(-1, 8)
    column[:, 3] = 1.0
    for vector in (a, b, a + b, a * (torch.arange(30_000) < 40), column.view(-1)):
        found = consistency.sketch([("w", vector[:20_000]), ("v", vector[20_000:])]).norm()
        assert found == pytest.approx(vector.norm().item(), rel=0.1)
    stride = torch.zeros(40, 2048)
    stride[:, 7] = 1.0
    assert consistency.sketch([("w", stride.view(-1))]).norm() == pytest.approx(40**0.5, rel=0.15)
    scalars = [(f"scale{i}", torch.ones(1)) for i in range(400)]
    assert consistency.sketch(scalars).norm() == pytest.approx(20.0, rel=0.15)
    parts = [consistency.sketch([("w", one)]) for one in (a, b, a + b)]
    assert torch.allclose(parts[0] + parts[1], parts[2], atol=1e-4)
    assert not torch.allclose(consistency.sketch([("w", a)]), consistency.sketch([("v", a)]))


def test_sketch_leaves_global_randomness_alone():
    before = torch.random.get_rng_state()
    consistency.sketch([("w", torch.ones(10))])
    assert torch.equal(before, torch.random.get_rng_state())


def mean_residual(rank, n, method):
    model = mlp()
    ddp, optimizer = wrap(model), sgd(model, lr=0.02)
    handle = attach(ddp, method, optimizer, consistency_every=4)
    batches = data(rank)
    for _ in range(20):
        step(ddp, optimizer, next(batches))
    found = handle.consistency()
    held = handle._reducer.memory.waiting()
    residual = flat([held[name] for name, _ in model.named_parameters()]) if held else torch.zeros(1).double()
    dist.all_reduce(residual)
    late = 0.0
    if isinstance(method, Elastic):
        late = torch.zeros_like(flat(model.parameters()))
        starts, at = {}, 0
        for name, p in model.named_parameters():
            starts[name], at = at, at + p.numel()
        for name, parts in handle._ledger.pending().items():
            for part, _ in parts:
                late[starts[name] : starts[name] + part.numel()] += part
        handle.finalize()
    exact = (residual / n + late).norm().item()
    exacts = [None] * n
    dist.all_gather_object(exacts, exact)
    return found, exacts, list(handle.consistency_log)


@pytest.mark.parametrize("method", [
    TOPK, BlockSparse("shared", density=0.2, memory="error_feedback", block_size=16),
    Elastic(TOPK, 0.3), Elastic(Dense(), 0.0, max_delay=2), Elastic(Dense(), 0.5, decide="arrival"),
    Elastic(Dense(), 0.3, speculate=True),
], ids=lambda m: f"{type(m).__name__}-{getattr(m, 'decide', m)}"[:50])  # fmt: skip
def test_it_is_the_norm_of_what_has_not_been_applied(ranks, method):
    everyone = ranks(3).run(mean_residual, method)
    for found, exacts, log in everyone:
        assert found == everyone[0][0]
        assert found["inconsistency_max"] == pytest.approx(max(exacts), rel=0.1)
        assert found["inconsistency_mean"] == pytest.approx(sum(exacts) / 3, rel=0.1)
        assert found["step"] == 20 and 0 < found["inconsistency_max"] < found["bound"]
        assert [one["step"] for one in log] == [4, 8, 12, 16]
        assert log == everyone[0][2]


@pytest.mark.parametrize("method", [
    Dense(), BlockSparse(block_size=16), BlockSparse("shared", density=0.3, memory="control_variate", block_size=16),
    Elastic(Dense(), beta=1.0),
], ids=lambda m: repr(m)[:40])  # fmt: skip
def test_without_anything_that_waits_it_is_zero(ranks, method):
    for found, _, _ in ranks(2).run(mean_residual, method):
        assert found["inconsistency_max"] == found["inconsistency_mean"] == found["bound"] == 0.0
        assert found["gradient_norm"] > 0


def test_bounds_of_methods():
    b = lambda method: consistency.bound(method, [0.1, 1.0], 2.0)
    assert b(TOPK) == bounds.error_feedback(0.9, 2.0)
    assert b(BlockSparse("topk", density=0.1, momentum=0.5)) == bounds.error_feedback(0.9, 4.0)
    assert b(BlockSparse("nominated", density=0.1)) is None and b(Elastic(BlockSparse("nominated"), 0.5)) is None
    assert b(Elastic(Dense(), 0.9, max_delay=2)) == 4.0
    assert b(Elastic(Dense(), 0.9, decide="arrival")) == 2.0 and b(Elastic(Dense(), 1.0)) == 0.0
    assert b(Elastic(Dense(), 0.9, speculate=True)) == 4.0
    assert b(Elastic(TOPK, 0.5)) == b(TOPK) + 2.0
    assert b(DivideAndShuffle()) is None


PARTIAL = BlockSparse("nominated", density=0.25, memory="weights", max_age=10)


@pytest.mark.parametrize(("settings", "expected"), [
    ({}, (16 - 1 + 1) * 2.0),
    ({"every": 1, "overlap": 0}, 0.0),
    ({"every": 8, "overlap": 3}, (8 - 1 + 3) * 2.0),
    ({"every": 8, "overlap": "auto"}, (8 - 1 + 8) * 2.0),
    ({"every": 4, "overlap": 0, "method": TOPK}, 3 * 2.0 + bounds.error_feedback(0.9, 4 * 2.0)),
    ({"every": "auto"}, None),
    ({"outer_momentum": 0.5}, None),
    ({"outer_lr": 0.9}, None),
    ({"method": Dense(wire_dtype="int4", memory="error_feedback")}, None),
    ({"method": BlockSparse("nominated", density=0.1)}, None),
    ({"method": BlockSparse("topk", density=0.1, momentum=0.5)}, None),
    ({"method": BlockSparse(memory="control_variate")}, None),
    ({"every": 4, "method": PARTIAL}, (10 * 4 - 1 + 1) * 2.0),
    ({"method": dataclasses.replace(PARTIAL, wire_dtype="int4")}, None),
    ({"method": None, "group_size": 2}, None),
], ids=str)  # fmt: skip
def test_the_bound_of_local_steps_is_that_of_averaging_alone(settings, expected):
    method = LocalSteps(**{"method": Dense(), "outer_momentum": 0.0} | settings)
    found = consistency.bound(method, [0.1, 1.0], 2.0)
    assert found == expected if expected is None else found == pytest.approx(expected)


def test_the_bound_of_local_steps_is_for_steps_that_are_gradients():
    parameters = [torch.nn.Parameter(torch.ones(2))]
    method = LocalSteps(method=Dense(), outer_momentum=0.0)
    found = lambda optimizer, one=method: consistency.bound(one, [1.0], 2.0, optimizer)
    assert found(torch.optim.SGD(parameters, lr=0.1)) == 32.0
    for other in (torch.optim.SGD(parameters, lr=0.1, momentum=0.9), torch.optim.Adam(parameters),
                  torch.optim.SGD(parameters, lr=0.1, weight_decay=0.1)):  # fmt: skip
        assert found(other) is None and found(other, TOPK) == bounds.error_feedback(0.0, 2.0)


def with_log(rank, n, log_kind):
    class Writer:
        seen = []

        def add_scalar(self, tag, value, step):
            self.seen.append((tag, value, step))

    model = mlp()
    ddp, optimizer = wrap(model), sgd(model)
    seen = []
    handle = attach(ddp, TOPK, optimizer, consistency_every=2, log=Writer() if log_kind == "writer" else seen.append)
    batches = data(rank)
    for _ in range(5):
        step(ddp, optimizer, next(batches))
    return seen or Writer.seen, list(handle.consistency_log)


def test_log_takes_dictionaries_or_a_summary_writer(ranks):
    for seen, log in ranks(2).run(with_log, "dictionaries"):
        assert seen == log and [one["step"] for one in log] == [2, 4]
    for seen, log in ranks(2).run(with_log, "writer"):
        assert ("thinwire/inconsistency_max", log[0]["inconsistency_max"], 2) in seen
        assert ("thinwire/bound", log[1]["bound"], 4) in seen


def off_costs_nothing(rank, n):
    model = mlp()
    ddp, optimizer = wrap(model), sgd(model)
    handle = attach(ddp, TOPK, optimizer)
    batches, sketch = data(rank), consistency.sketch
    consistency.sketch = None  # anything that measured would raise
    try:
        for _ in range(3):
            step(ddp, optimizer, next(batches))
    finally:
        consistency.sketch = sketch
    return handle._squares, len(handle.consistency_log)


def test_off_by_default(ranks):
    assert ranks(2).run(off_costs_nothing) == [([], 0)] * 2


def refusals(rank, n):
    for options, error, match in [
        ({"consistency_every": -1}, ValueError, "consistency_every=-1"),
        ({"consistency_every": 2.5}, TypeError, "consistency_every=2.5"),
        ({"log": 3, "consistency_every": 1}, TypeError, "SummaryWriter"),
        ({"log": print}, ValueError, "consistency_every is 0"),
    ]:
        for method in (TOPK, Elastic(TOPK), DivideAndShuffle(group_size=2)):
            model = mlp()
            with pytest.raises((error, ValueError), match=match):
                attach(wrap(model), method, sgd(model), **options)
    return True


def test_wrong_options_are_refused(ranks):
    assert ranks(2).run(refusals) == [True] * 2


def different(rank, n):
    model = mlp()
    ddp, optimizer = wrap(model), sgd(model)
    attach(ddp, TOPK, optimizer, consistency_every=2 + rank)
    with pytest.raises(ValueError, match="consistency_every: 2 on rank 0, 3 on rank 1"):
        step(ddp, optimizer, next(data(rank)))
    return True


def test_ranks_that_measure_at_different_steps_are_told(ranks):
    assert ranks(2).run(different, seconds=30) == [True] * 2
    ranks(2).stop()


# ---- Divide-and-Shuffle ----


def of_replicas(rank, n, overlap):
    model = mlp()
    ddp, optimizer = DistributedDataParallel(model), torch.optim.SGD(model.parameters(), lr=0.05)
    handle = attach(ddp, DivideAndShuffle(group_size=2, overlap=overlap), optimizer, consistency_every=5)
    batches = data(rank)
    for _ in range(15):
        step(ddp, optimizer, next(batches))
    found = handle.consistency()
    mine = flat(model.parameters())
    mean = mine.clone()
    dist.all_reduce(mean)
    exact = ((mine - mean / n).norm() / 0.05).item()
    exacts = [None] * n
    dist.all_gather_object(exacts, exact)
    return found, exacts, list(handle.consistency_log)


@pytest.mark.parametrize("overlap", ["none", "bucket", "delayed"])
def test_of_replicas_it_is_the_distance_to_their_mean(ranks, overlap):
    for found, exacts, log in ranks(4).run(of_replicas, overlap):
        assert found["inconsistency_max"] == pytest.approx(max(exacts), rel=0.1)
        assert found["inconsistency_mean"] == pytest.approx(sum(exacts) / 4, rel=0.1)
        assert found["bound"] is None and found["inconsistency_max"] > 0
        assert [one["step"] for one in log] == [5, 10, 15]


# ---- density="auto" ----


def simulated(heaviest, every, steps=3000, numel=2000, limit=20.0):
    """Error feedback on gradients of a part that agrees and a part that is noise, whose norm falls a hundredfold
    between steps 500 and 2000."""
    generator = torch.Generator().manual_seed(0)
    drift = torch.randn(numel, generator=generator)
    residual, controller, found = torch.zeros(numel), DensityController(limit, 0.001, 1.0, every), []
    for t in range(steps):
        norm = 10 * 10 ** (-2 * min(1.0, max(0.0, (t - 500) / 1500)))
        noise = torch.randn(numel, generator=generator)
        residual += norm * (0.3 * drift / drift.norm() + noise / noise.norm())
        count = max(1, round(controller.density * numel))
        rank = residual.abs() if heaviest else torch.rand(numel, generator=generator)
        residual[rank.topk(count).indices] = 0
        if (t + 1) % every == 0:
            controller.update(residual.norm().item())
            found.append((t, residual.norm().item(), controller.density))
    return found


@pytest.mark.parametrize("every", [1, 10, 25])
@pytest.mark.parametrize("heaviest", [True, False])
def test_controller_does_not_oscillate_while_gradients_fall_a_hundredfold(heaviest, every):
    found = simulated(heaviest, every)
    measured, densities = [m for _, m, _ in found], [math.log(d) for _, _, d in found]
    assert max(measured) < 20.0
    assert max(m for t, m, _ in found if 300 < t < 500) > 0.6 * AIM * 20.0  # and it is no larger than it must be
    moves = sum(abs(b - a) for a, b in zip(densities, densities[1:]))
    assert moves < 1.1 * abs(densities[-1] - densities[0])  # hardly a step back
    assert densities[-1] < densities[0] - 3


def test_controller_rises_at_once_keeps_its_bounds_and_ignores_what_is_not_finite():
    controller = DensityController(1.0, 0.01, 0.5, 10)
    for _ in range(200):
        controller.update(0.0)
    assert controller.density == 0.01
    controller.update(float("nan"))
    controller.update(float("inf"))
    assert controller.density == 0.01
    for measured in (3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0):
        controller.update(measured)
    assert controller.density == 0.5
    other = DensityController(1.0, 0.01, 0.5, 10)
    other.load_state_dict(controller.state_dict())
    assert other.state_dict() == controller.state_dict()


AUTO = BlockSparse("topk", density="auto", max_inconsistency=0.5, block_size=16, dense_below=20, min_density=0.01)


def automatic(rank, n, method, resume_at=None, steps=200):
    """A run whose loss shrinks a hundredfold after 100 steps, and the gradients with it."""
    model = mlp()
    ddp, optimizer = wrap(model), sgd(model, lr=0.02)
    handle = attach(ddp, method, optimizer)
    batches = data(rank)
    for t in range(steps):
        x, y = next(batches)
        factor = 1.0 if t < 100 else 0.01
        optimizer.zero_grad()
        (factor * 5 * ((ddp(x) - y) ** 2).mean()).backward()
        optimizer.step()
        if t == resume_at:
            state, weights = handle.state_dict(), [p.detach().clone() for p in model.parameters()]
            model = mlp(seed=9)
            ddp, optimizer = wrap(model), sgd(model, lr=0.02)
            with torch.no_grad():
                for p, weight in zip(model.parameters(), weights):
                    p.copy_(weight)
            handle = attach(ddp, method, optimizer)
            handle.load_state_dict(state)
    log = [(one["step"], one["residual"], one["density"]) for one in handle.consistency_log]
    return log, equal_on_all_ranks(list(model.parameters())), flat(model.parameters()), handle.stats()["density"]


@pytest.mark.parametrize("method", [AUTO, Elastic(AUTO, beta=0.5)], ids=["topk", "elastic"])
def test_automatic_density_is_the_same_on_all_ranks_and_keeps_the_limit(ranks, method):
    everyone = ranks(3).run(automatic, method)
    for log, equal, _, density in everyone:
        assert log == everyone[0][0] and equal
        assert density == log[-1][2] < 0.03  # from 0.25 at step 100
        assert max(measured for _, measured, _ in log) < 0.5
        assert max(measured for step, measured, _ in log if step < 100) > 0.5 * AIM * 0.5
        densities = [d for _, _, d in log]
        assert all(b < 1.3 * a for a, b in zip(densities, densities[1:]))


def test_automatic_density_resumes_bit_for_bit(ranks):
    whole, resumed = (ranks(2).run(automatic, AUTO, resume_at, 140) for resume_at in (None, 57))
    for a, b in zip(whole, resumed):
        assert torch.equal(a[2], b[2])
        assert a[0][-len(b[0]):] == b[0]


@pytest.mark.parametrize("options, match", [
    ({"density": "auto"}, "max_inconsistency"),
    ({"density": "auto", "max_inconsistency": -1.0}, "positive"),
    ({"density": "auto", "max_inconsistency": 1.0, "memory": "none"}, "memory must be 'error_feedback'"),
    ({"density": "auto", "max_inconsistency": 1.0, "memory": "error_feedback", "ramp_steps": 3}, "must be 0"),
    ({"density": 0.1, "max_inconsistency": 1.0}, "density='auto' only"),
    ({"density": "auto", "max_inconsistency": 1.0, "memory": "error_feedback", "min_density": 0.5, "max_density": 0.1},
     "must not be above"),
    ({"density": "automatic"}, "'auto'"),
])  # fmt: skip
def test_wrong_automatic_densities_are_refused(options, match):
    with pytest.raises((TypeError, ValueError), match=match):
        BlockSparse(**options)


def quiet(rank, n):
    with logged() as messages:
        automatic(rank, n, AUTO, steps=120)
    return messages


def test_nothing_is_said_where_nothing_is_wrong(ranks):
    assert ranks(2).run(quiet) == [[], []]


def warming_up(rank, n):
    model = mlp()
    ddp, optimizer = wrap(model), sgd(model, lr=0.02)
    handle = attach(ddp, dataclasses.replace(AUTO, warmup_steps=100), optimizer)
    batches = data(rank)
    for _ in range(101):
        step(ddp, optimizer, next(batches))
    return [one["density"] for one in handle.consistency_log], handle.stats()["density"]


def test_automatic_density_does_not_fall_while_everything_is_sent(ranks):
    for densities, now in ranks(2).run(warming_up):
        assert densities == [1.0] * 10 and now == 1.0
