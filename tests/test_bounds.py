"""The bounds of elastic consistency: their values, the simulations that measure against them, and the benchmark."""

import json

import pytest
import torch
from common import record
from elastic import bounds as benchmark
from elastic.relaxations import (
    Digits,
    Due,
    ElasticScheduler,
    LocalRounds,
    Messages,
    MissingMessages,
    SharedMemory,
    error_feedback,
    gamma,
    simulate,
)
from thinwire import BlockSparse
from thinwire.consistency import bounds

NUMELS = Digits().numels
SYSTEMS = benchmark.systems(NUMELS)
NOTHING_LATE = [
    Messages(0), MissingMessages(0), MissingMessages(0, own=True), SharedMemory(0), ElasticScheduler(1, NUMELS),
    ElasticScheduler(1, NUMELS, weigh_own=True), ElasticScheduler(1, NUMELS, weigh_own=True, speculate=True),
    LocalRounds(1),
]  # fmt: skip
SOMETHING_LATE = [
    Messages(3), MissingMessages(2), MissingMessages(2, own=True), SharedMemory(3), ElasticScheduler(0.5, NUMELS, 3),
    ElasticScheduler(0.5, NUMELS, 3, weigh_own=True), ElasticScheduler(0, NUMELS, 3, weigh_own=True, speculate=True),
    LocalRounds(4), LocalRounds(4, overlap=3), LocalRounds(1, overlap=1),
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def test_values():
    assert bounds.late_messages(4, 8, 3.0) == 1.5
    assert bounds.late_messages_with_own(7, 8, 1.0) == 2.625
    assert bounds.asynchronous_messages(8, 4, 2.0) == 7.0
    assert bounds.shared_memory(9, 5, 2.0) == 30.0
    found = [bounds.error_feedback(gamma, 1.0) for gamma in (0.0, 0.5, 0.9, 0.99)]
    assert found == pytest.approx([0.0, 2.449, 31.46, 999.95], rel=1e-3)
    assert bounds.error_feedback(1.0, 1.0) == float("inf")
    assert bounds.elastic_norm_bounded(0.75, 4, 3, 2.0) == 3.0
    assert bounds.elastic_norm_bounded(0.75, 4, 3, 2.0, deviation=0.25) == 3.75
    assert bounds.elastic_norm_bounded(0.0, 4, 3, 2.0) == 6.0, "never more than the whole gradients"
    assert bounds.elastic_norm_bounded(1.0, 4, 3, 2.0, deviation=1.0) == 0.0
    assert bounds.elastic_variance_bounded(2.0) == 6.0
    assert bounds.elastic_variance_bounded(2.0, max_delay=2) == 12.0
    assert bounds.local_steps(16, 2, 3.0) == 51.0
    assert bounds.local_steps(1, 0, 3.0) == 0.0, "plain DDP"
    for beta in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"beta={beta}"):
            bounds.elastic_norm_bounded(beta, 4, 1, 1.0)


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_is_measured_is_under_the_bound(system):
    rows = [benchmark.measure(system, setting, *one, seeds=(0, 1), steps=8, steps_of_memory=20, wide=32)
            for setting, one in SYSTEMS[system][1].items()]  # fmt: skip
    assert benchmark.exceeded(rows) == []
    for row in rows:
        assert row["measured"] <= row["worst"]
    assert all(row["bound"] == 0 for row in rows) or max(row["measured"] / row["M"] for row in rows) > 0.1


def workers_for(relaxation):
    return 1 if isinstance(relaxation, SharedMemory) else 4


@pytest.mark.parametrize("relaxation", NOTHING_LATE, ids=repr)
def test_views_are_the_ideal_iterate_where_nothing_is_late(relaxation):
    outcome = simulate(Digits(), relaxation, (0, 1), workers_for(relaxation), 5)
    assert outcome.measured == outcome.largest == 0.0
    assert outcome.second_moment > 0
    assert torch.equal(outcome.views, outcome.x[:, None].expand_as(outcome.views))


@pytest.mark.parametrize("relaxation", SOMETHING_LATE, ids=repr)
def test_views_and_what_is_owed_to_them_are_the_ideal_iterate(relaxation):
    outcome = simulate(Digits(), relaxation, (0, 1), workers_for(relaxation), 6)
    assert outcome.owed.abs().max() > 1e-3
    torch.testing.assert_close(outcome.views + outcome.owed, outcome.x[:, None].expand_as(outcome.views), rtol=0,
                               atol=1e-13)  # fmt: skip


@pytest.mark.parametrize("selection", ["topk", "independent", "shared"])
def test_what_error_feedback_owes_is_the_mean_residual(selection):
    method = BlockSparse(selection, density=0.1, memory="error_feedback", block_size=16, dense_below=0)
    outcome = error_feedback(Digits(), method, (0, 1), 4, 10)
    assert outcome.owed.abs().max() > 1e-3
    torch.testing.assert_close(outcome.views + outcome.owed, outcome.x[:, None], rtol=0, atol=1e-13)
    whole = BlockSparse(selection, density=1.0, memory="error_feedback", block_size=16, dense_below=0)
    assert error_feedback(Digits(), whole, (0,), 4, 5).measured < 1e-6, "more than the wire's float32 rounds off"


def test_gamma_is_of_the_tensor_of_which_least_is_sent():
    method = BlockSparse("topk", density=0.1, block_size=16, dense_below=0)
    assert gamma(method, (16 * 37, 16 * 5, 3), workers=8) == 1 - 4 / 37


def visible(relaxation, g, seed=0):
    """What each worker sees in each step of the gradients of one step, float64 [1 + max_delay, ...]."""
    due = Due(relaxation.max_delay)
    relaxation(g, torch.Generator().manual_seed(seed), due)
    seen = [due.take() + torch.zeros_like(g) for _ in range(relaxation.max_delay + 1)]
    assert not isinstance(due.all(), torch.Tensor) or not due.all().any(), "nothing comes later than max_delay"
    return torch.stack(seen)


def test_messages_come_once_and_the_own_at_once():
    eye = torch.eye(8, dtype=torch.float64).expand(50, 8, 8)  # element j of a view: what came from worker j
    seen = 8 * visible(Messages(3), eye)
    assert torch.equal(seen.sum(0), torch.ones(50, 8, 8, dtype=torch.float64))
    assert set(seen.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(seen[0].diagonal(dim1=1, dim2=2), torch.ones(50, 8, dtype=torch.float64))
    others = seen[:, ~torch.eye(8, dtype=torch.bool).expand(50, 8, 8)].mean(1)
    torch.testing.assert_close(others, torch.full((4,), 0.25, dtype=torch.float64), rtol=0, atol=0.04)


@pytest.mark.parametrize("missing", [1, 3, 7])
def test_every_worker_misses_as_many_messages_of_others_and_every_message_is_missed_as_often(missing):
    eye = torch.eye(8, dtype=torch.float64).expand(50, 8, 8)
    late = 8 * visible(MissingMessages(missing), eye)[1]
    assert set(late.round(decimals=12).unique().tolist()) == {0.0, 1.0}
    assert torch.all(late.sum(1) == missing) and torch.all(late.sum(2) == missing)
    assert not late.diagonal(dim1=1, dim2=2).any()
    assert missing == 7 or len(late.unique(dim=0)) > 5, "which ones differs"
    corrected = visible(MissingMessages(missing, own=True), eye)
    torch.testing.assert_close(8 * corrected[1], late - missing * eye)
    torch.testing.assert_close(8 * corrected.sum(0), torch.ones_like(eye))


@pytest.mark.parametrize("weigh_own", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.8])
def test_elastic_scheduler_waits_for_a_share_beta_and_no_longer(beta, weigh_own):
    g = torch.rand(200, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean = g.mean(1, keepdim=True).expand_as(g)
    seen = visible(ElasticScheduler(beta, (1,) * 6, 3, weigh_own), g)
    assert torch.allclose(seen.sum(0), mean)
    weights = g if weigh_own else mean
    arrived = (seen[0] != 0) * weights
    share = arrived.sum(2) / weights.sum(2)
    assert share.min() >= beta - 1e-12
    without_heaviest = (arrived.sum(2) - arrived.amax(2)) / weights.sum(2)
    assert without_heaviest.max() <= beta + 1e-12, "with less than beta it would have waited"
    assert without_heaviest.max() > beta - 0.1 or beta == 0
    assert all((seen[delay] != 0).any() for delay in range(1, 4))


def test_at_beta_1_a_worker_waits_for_tensors_in_which_its_own_gradient_is_zero_too():
    g = torch.eye(4, dtype=torch.float64).expand(50, 4, 4)
    assert torch.equal(visible(ElasticScheduler(1.0, (1,) * 4, 2, weigh_own=True), g)[0], torch.full_like(g, 0.25))


def test_weighed_by_the_own_gradient_what_is_missing_needs_sigma_in_its_bound():
    g = torch.eye(2, dtype=torch.float64).expand(50, 2, 2)  # each worker's norm is all in a tensor of its own
    missing = visible(ElasticScheduler(0.8, (1, 1), 1, weigh_own=True), g)[1].square().sum(2).mean().sqrt().item()
    assert missing > bounds.elastic_norm_bounded(0.8, 2, 1, 1.0)
    assert missing <= bounds.elastic_norm_bounded(0.8, 2, 1, 1.0, deviation=0.5**0.5)


@pytest.mark.parametrize(("every", "overlap"), [(1, 0), (4, 0), (4, 1), (4, 4), (1, 1)])
def test_local_steps_are_apart_for_as_long_as_their_bound_says(every, overlap):
    """Workers whose gradients add up and cancel in the mean: the bound is reached, and never passed."""
    g = torch.tensor([1.0, -1.0], dtype=torch.float64).view(1, 2, 1)
    relaxation = LocalRounds(every, overlap)
    due, views, apart = Due(relaxation.max_delay), torch.zeros_like(g), []
    for _ in range(5 * every):
        relaxation(g, torch.Generator(), due)
        views = views - due.take()
        apart.append(views.abs().max().item())
    assert max(apart) == bounds.local_steps(every, overlap, 1.0)
    assert set(apart[every - 1 + overlap :: every]) == {overlap}, "what was made meanwhile stays"


def test_a_gradient_is_that_of_its_own_view_and_samples():
    problem = Digits()
    views = torch.stack([problem.start(seed) for seed in range(3)])
    samples = torch.tensor([[0, 5, 7], [1, 2, 3], [9, 9, 4]])
    together = problem.gradients(views, samples)
    for i in range(3):
        alone = torch.stack([problem.gradients(views[i : i + 1], s.view(1, 1))[0] for s in samples[i]]).mean(0)
        torch.testing.assert_close(together[i], alone)
    everything = problem.gradients(views[:1], torch.arange(len(problem.x))[None])
    torch.testing.assert_close(problem.gradients(views)[:1], everything)


def test_what_exceeds_its_bound_is_told():
    row = {"system": "messages", "setting": "p=8", "measured": 1.0, "bound": 1.0, "L": None}
    assert benchmark.exceeded([row]) == []
    assert "messages, p=8: measured 1.001" in benchmark.exceeded([row | {"measured": 1.001}])[0]
    assert benchmark.exceeded([row | {"measured": float("nan")}])
    assert "1 / (6 L max_delay)" in benchmark.exceeded([row | {"L": 100.0}])[0]


def test_the_record_is_kept_and_makes_a_table(tmp_path, monkeypatch):
    rows = [{"system": system, "setting": "p=8", "measured": 0.5, "bound": 2.0} for system in SYSTEMS]
    kept = record.save("elastic_bounds", "python x.py", rows, tmp_path, seeds=[0])
    assert record.load("elastic_bounds", tmp_path) == kept == json.loads((tmp_path / "elastic_bounds.json").read_text())
    assert {"date", "machine", "versions", "seeds", "command", "rows"} == set(kept)
    monkeypatch.setattr(record, "TABLES", tmp_path / "tables")
    benchmark.write_docs(kept)
    text = (tmp_path / "tables" / "elastic_bounds.md").read_text()
    assert text.startswith("| what is late or kept back |") and "\n`python x.py`, " in text
    assert text.count("p=8: 0.5 / 2") == len(SYSTEMS)
