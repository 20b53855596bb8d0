"""The benchmark suite: what it measures is kept, told apart, put together rightly, and every method can run in it."""

import itertools
import json

import pytest
import record
import torch
import train
from rich.console import Console
from suite import ledger as ledgers
from suite import plan, report
from suite.ledger import Ledger, final_loss
from suite.methods import CONTESTANTS, DDP, bf16_hook
from suite.outcomes import Outcomes, Span
from suite.tasks import TASKS
from torch.nn.parallel import DistributedDataParallel

LR = json.dumps({"lr": 0.1})


def training(method="dense", task="cancer", **fields):
    return plan.Training("quality", task, method, fields.pop("options", LR), **{"ranks": 2, "steps": 12} | fields)


def result(curve, **fields):
    step = {"median": 100.0, "q1": 90.0, "q3": 120.0}
    return {"status": "done", "curve": curve, "step_ms": step, "sent_bytes": 1e6} | fields


def line(first, last, steps=100):
    """A curve that falls from first to last in a straight line."""
    return [[step, step / 10, first + (last - first) * step / steps] for step in range(0, steps + 1, 10)]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "train.jsonl")


def add_quality(ledger, method, last, seeds=(0, 1, 2), **fields):
    for seed in seeds:
        run = training(method, task="bytes-adamw", ranks=4, seed=seed, steps=100)
        ledger.add(run.key(method), result(line(4.0, last + 0.1 * (seed - 1)), **fields))


def add_speed(ledger, method, ms, mbit=100.0, ranks=4, spread=0.1):
    run = plan.Speed("bytes-adamw", (method,), ranks, mbit)
    step = {"median": ms, "q1": ms * (1 - spread), "q3": ms * (1 + spread)}
    ledger.add(run.key(method), {"status": "done", "step_ms": step, "sent_bytes": 1e6})


# ---- the ledger ----


def test_a_row_says_all_that_it_was_measured_with(ledger):
    row = ledger.add(training().key("dense"), result(line(4, 2)))
    assert json.loads(ledger.path.read_text()) == row
    assert {"code", "commit", "machine", "versions", "date", "task", "method", "options", "seed", "ranks", "mbit",
            "label", "curve", "step_ms", "sent_bytes"} <= set(row)  # fmt: skip


def test_what_another_machine_or_code_measured_is_kept_and_not_counted(ledger, monkeypatch):
    ledger.add(training().key("dense"), result(line(4, 2)))
    monkeypatch.setattr(ledgers, "code", lambda: "another")
    other_code = Ledger(ledger.path)
    assert (other_code.rows, other_code.others) == ([], 1) and not other_code.has(training())
    other_code.add(training().key("dense"), result(line(4, 3)))
    monkeypatch.setattr(ledgers, "machine", lambda: {"cpu": "another", "cores": 1, "system": "?"})
    assert (Ledger(ledger.path).rows, Ledger(ledger.path).others) == ([], 2)
    shown = Ledger.of_newest(ledger.path)
    assert shown.code == "another" and len(shown.rows) == 1 and shown.others == 1


@pytest.mark.parametrize("name, more, same", [
    ("ops.py", b"x = 1", False), ("ops.py", b"# only a comment", True), ("info.py", b"x = 1", True),
    ("select.cpp", b"int x;", False), ("train_rank.py", b"x = 1", False), ("report.py", b"x = 1", True),
])  # fmt: skip
def test_the_code_is_what_steps_run(monkeypatch, name, more, same):
    before, read = ledgers.code(), ledgers.Path.read_bytes
    changed = lambda path: read(path) + (b"\n" + more + b"\n" if path.name == name else b"")
    monkeypatch.setattr(ledgers.Path, "read_bytes", changed)
    assert (ledgers.code() == before) == same and len(before) == 12


def test_a_line_cut_off_by_an_interruption_is_not_a_result(ledger):
    ledger.add(training().key("dense"), result(line(4, 2)))
    with ledger.path.open("a") as file:
        file.write('{"kind": "train", "task": "can')
    again = Ledger(ledger.path)
    assert len(again.rows) == 1 and again.has(training())
    again.add(training(seed=1).key("dense"), result(line(4, 2)))
    assert Ledger(ledger.path).has(training(seed=1)), "nothing may be appended to the half line"


def test_methods_in_turns_are_all_there_or_to_be_measured_again(ledger):
    run = plan.Speed("digits", ("noop", "dense"), 2, 0.0)
    ledger.add(run.key("noop"), result([]))
    assert not ledger.has(run)
    ledger.add(run.key("dense"), result([]))
    assert ledger.has(run) and not ledger.has(plan.Speed("digits", ("noop", "dense"), 4, 0.0))


def test_training_that_failed_or_diverged_never_wins_the_grid(ledger):
    good = result(line(4, 2)) | {"steps": 100}
    assert final_loss(good) == pytest.approx(2.1)
    assert final_loss(good | {"status": "hung"}) == final_loss(good | {"steps": 200}) == float("inf")
    for lr, curve in ((0.1, line(4, 3)), (0.2, line(4, 2)), (0.3, line(4, 0.1)[:5])):
        options = json.dumps({"lr": lr})
        run = plan.Training("tune", "digits", "dense", options, steps=100)
        ledger.add(run.key("dense"), result(curve))
    best = train.Best(ledger)
    assert json.loads(best("digits", "dense")) == {"lr": 0.2}


# ---- the plan ----


def test_every_method_has_the_same_grid_and_one_with_momentum_of_its_own_the_part_without():
    runs = list(plan.tuning(list(TASKS), list(CONTESTANTS)))
    assert len(runs) == len(set(runs))
    for task in TASKS:
        grids = {m: [r.options for r in runs if (r.task, r.method) == (task, m)] for m in CONTESTANTS}
        assert grids["dense"] == grids["powersgd-1"] == grids["nominated-4"] == grids["horovod"]
        assert set(grids["nominated-4-momentum"]) < set(grids["dense"]) and not grids["noop"]
        for options in map(json.loads, grids["nominated-4-momentum"]):
            assert options.get("momentum", options.get("betas", [1])[0]) == 0


def test_the_full_set_has_what_it_promises():
    runs = list(plan.everything(list(TASKS), list(CONTESTANTS), lambda task, method: LR))
    speeds = [run for run in runs if run.kind == "speed"]
    assert {(run.ranks, run.mbit) for run in speeds if run.task == plan.MAIN_TASK} == set(
        itertools.product(plan.ALL_RANKS, plan.ALL_RATES)
    )
    for run in speeds:
        assert len({CONTESTANTS[method].door for method in run.methods}) == 1, "Horovod's thread slows down the others"
        assert all(CONTESTANTS[method].least_ranks <= run.ranks for method in run.methods)
        assert "noop" in run.methods or CONTESTANTS[run.methods[0]].door != DDP
    seeds = {(run.task, run.method, run.seed) for run in runs if run.kind == "train" and run.purpose == "quality"}
    trained = [method for method, contestant in CONTESTANTS.items() if contestant.trains]
    assert seeds == set(itertools.product(TASKS, trained, plan.SEEDS))
    assert set(plan.HEADLINE + plan.QUICK) <= set(CONTESTANTS)


# ---- outcomes ----


def test_time_to_quality_is_steps_times_step_time(ledger):
    add_quality(ledger, "dense", 2.0)
    add_quality(ledger, "nominated-4", 2.0)
    add_speed(ledger, "dense", 1000.0)
    add_speed(ledger, "nominated-4", 100.0)
    outcomes = Outcomes(ledger)
    half = outcomes.target("bytes-adamw", 0.5)
    assert half == pytest.approx(3.1)  # the mean of two evaluations, after 40 and 50 of 100 steps
    span = outcomes.time_to("bytes-adamw", "dense", half, 4, 100.0)
    steps = [100 * 0.9 / drop for drop in (2.1, 2.0, 1.9)]
    assert outcomes.steps_to("bytes-adamw", "dense", half) == pytest.approx(steps)
    assert span.middle == pytest.approx(sum(steps) / 3)
    assert (span.low, span.high) == pytest.approx((min(steps) * 0.9, max(steps) * 1.1))
    ours = outcomes.time_to("bytes-adamw", "nominated-4", half, 4, 100.0)
    assert ours.middle == pytest.approx(span.middle / 10)
    assert outcomes.time_to("bytes-adamw", "dense", half, 4, 50.0) is None
    assert outcomes.steps_to("bytes-adamw", "dense", 1.95) is None, "one of the seeds does not get there"


def test_what_is_within_the_spread_is_called_a_tie(ledger):
    for method, last, ms in (("dense", 2.0, 1000.0), ("powersgd-1", 2.0, 105.0), ("nominated-4", 2.0, 100.0),
                             ("nominated-1", 2.0, 10.0), ("shared", 3.5, 10.0)):  # fmt: skip
        add_quality(ledger, method, last)
        add_speed(ledger, method, ms)
    rows = dict(report.quality_rows(Outcomes(ledger), "bytes-adamw"))
    assert list(rows)[:3] == ["nominated-1", "nominated-4", "powersgd-1"] and list(rows)[-1] == "shared"
    against_dense, against_peer = ({method: row[i] for method, row in rows.items()} for i in (-2, -1))
    assert against_peer["nominated-4"].startswith("tie (1.05") and against_peer["nominated-1"] == "10.50 x"
    assert against_dense["nominated-4"] == "10.00 x" and against_dense["dense"] == against_peer["powersgd-1"] == "1"
    assert against_peer["shared"] == "does not get there"
    assert not Span(1, 2, 3).overlaps(Span(3.5, 4, 5)) and Span(1, 2, 3).overlaps(Span(3, 4, 5))


def test_where_a_method_stops_helping(ledger):
    measured = ((50.0, 1000.0, 200.0), (100.0, 500.0, 200.0), (1000.0, 150.0, 190.0), (0.0, 120.0, 190.0))
    for mbit, dense, ours in measured:
        add_speed(ledger, "dense", dense, mbit)
        add_speed(ledger, "nominated-4", ours, mbit)
        add_speed(ledger, "fp16", ours - 100, mbit)
        add_speed(ledger, "ds-sync", dense + 1, mbit)
    ends = {m: Outcomes(ledger).breaks_even("bytes-adamw", m, 4, [0.0, 1000.0, 100.0, 50.0]) for m in
            ("nominated-4", "fp16", "ds-sync", "powersgd-1")}  # fmt: skip
    # 1 / rate is 0.01 where it gains 300 ms and 0.001 where it loses 40 ms
    assert ends["nominated-4"] == pytest.approx(1 / (0.01 - 0.009 * 300 / 340))
    assert ends["fp16"] is None and ends["ds-sync"] == 0.0 and ends["powersgd-1"] is None


def test_the_report_prints_draws_and_rewrites_the_readme(ledger, tmp_path, monkeypatch, capsys):
    for method, last, ms in (("dense", 2.0, 1000.0), ("powersgd-1", 2.1, 105.0), ("nominated-4", 2.1, 100.0)):
        add_quality(ledger, method, last)
        for ranks, mbit in itertools.product((2, 4), plan.ALL_RATES):
            add_speed(ledger, method, ms, mbit, ranks)
    run = plan.Training("direct", "bytes-adamw", "dense", LR, mbit=100.0, steps=100)
    ledger.add(run.key("dense"), result([(s, 11 * t, loss) for s, t, loss in line(4.0, 1.9)]))
    readme = tmp_path / "README.md"
    marks = [f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in ("train", "train rates", "train direct")]
    readme.write_text("before\n" + "".join(marks) + "after\n")
    monkeypatch.setattr(record, "README", readme)
    report.show(Ledger.of_newest(ledger.path), tmp_path, readme=True)
    text = readme.read_text()
    assert "old" not in text and text.startswith("before") and text.endswith("after\n")
    assert "nominated 4 %" in text and "9.52 x" not in text and "| plain DDP | 100.0 | 110.0 | 1.10 | equal |" in text
    assert "PowerSGD rank 1" in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("*.png")} == {"train_time.png", "train_pareto.png", "train_rates.png"}


# ---- real runs ----


def run_all(ledger, runs):
    with train._progress(Console(quiet=True)) as progress:
        train.Runner(ledger, progress, patience=60).run("test", runs)


def test_runs_are_done_once_kept_and_a_failing_one_does_not_stop_the_others(ledger):
    runs = [
        training("dense"), training("dense", options=json.dumps({"lr": -1})), training("nominated-4"),
        plan.Speed("cancer", ("noop", "dense", "powersgd-1"), 2, 0.0, turns=1),
    ]  # fmt: skip
    run_all(ledger, runs)
    status = {(row["method"], row["options"]): row["status"] for row in ledger.find(kind="train")}
    assert status == {("dense", LR): "done", ("nominated-4", LR): "done", ("dense", '{"lr": -1}'): "failed"}
    failed = ledger.find(status="failed")[0]
    assert any("Invalid learning rate: -1" in complaint for complaint in failed["complaints"])
    for row in ledger.find(kind="speed"):
        assert row["counted_steps"] == 5 and row["step_ms"]["q1"] <= row["step_ms"]["median"] <= row["step_ms"]["q3"]
    assert len(ledger.find(kind="speed")) == 3
    before = ledger.path.read_text()
    run_all(Ledger(ledger.path), runs)
    assert ledger.path.read_text() == before


def test_training_is_reproducible_and_learns(ledger):
    runs = [training("dense", steps=60), training("nominated-4", steps=60)]
    run_all(ledger, runs)
    curves = [[loss for _, _, loss in row["curve"]] for row in ledger.rows]
    assert all(curve[-1] < 0.3 * curve[0] for curve in curves)
    again = Ledger(ledger.path.with_name("again.jsonl"))
    run_all(again, runs)
    assert [[loss for _, _, loss in row["curve"]] for row in again.rows] == curves


def test_every_method_of_ddp_trains(ledger):
    methods = [name for name, one in CONTESTANTS.items() if one.door == DDP and one.trains]
    gently = json.dumps({"lr": 0.01})
    run_all(ledger, [training(method, "digits", ranks=4, steps=8, options=gently) for method in methods])
    assert {row["method"]: row["status"] for row in ledger.rows} == dict.fromkeys(methods, "done")
    start = ledger.rows[0]["curve"][0]
    for row in ledger.rows:
        assert row["curve"][0] == start, "all begin alike"
        assert row["curve"][-1][2] < start[2], row["method"]
        if row["sent_bytes"]:
            assert row["sent_bytes"] > 0 and row["received_bytes"] > 0


def test_horovods_methods_train_and_equal_ddp(ledger):
    pytest.importorskip("horovod.torch")
    methods = [name for name, one in CONTESTANTS.items() if one.door != DDP]
    # No BatchNorm: DDP gives all ranks the first's statistics, Horovod leaves each its own.
    run_all(ledger, [training(method, "cancer", steps=8) for method in ("dense", *methods)])
    losses = {row["method"]: [loss for _, _, loss in row["curve"]] for row in ledger.find(status="done")}
    assert set(losses) == {"dense", *methods}
    assert losses["horovod"] == pytest.approx(losses["dense"], rel=1e-4)
    assert losses["horovod-fp16"] == pytest.approx(losses["dense"], rel=0.02)


def average_by_bf16(rank, n):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Linear(20, 5))
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.001)
    ddp.register_comm_hook(None, bf16_hook)
    x = torch.randn(4 * n, 30, generator=torch.Generator().manual_seed(1))
    ddp(x[4 * rank : 4 * rank + 4]).square().mean().backward()
    whole = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Linear(20, 5))
    whole.load_state_dict(model.state_dict())
    whole(x).square().mean().backward()
    return [(p.grad, q.grad) for p, q in zip(model.parameters(), whole.parameters())]


def test_the_bf16_hook_averages(ranks):
    everyone = ranks(3).run(average_by_bf16)
    for averaged, exact in everyone[0]:
        assert (averaged - exact).norm() < 0.01 * exact.norm()
        assert torch.equal(averaged, averaged.bfloat16().float())
    for other in everyone[1:]:
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(everyone[0], other))


@pytest.mark.parametrize("name", TASKS)
def test_every_task_learns(name):
    task = TASKS[name]
    data = task.data(0, 1, 0)
    torch.manual_seed(0)
    model = task.model()
    optimizer = getattr(torch.optim, task.optimizer)(model.parameters(), **task.options | task.grid[1])
    before = float(data.held_out_part(model))
    for _ in range(8):
        optimizer.zero_grad()
        model(data.batch()).backward()
        optimizer.step()
    assert float(data.held_out_part(model)) < 0.95 * before


def test_every_example_is_one_ranks():
    parts = [TASKS["digits"].data(rank, 3, 0) for rank in range(3)]
    rows = torch.cat([torch.cat([part._examples, part._part[0]]) for part in parts]).flatten(1)
    assert len(rows) == 1797
    model = TASKS["digits"].model()
    model.eval()
    whole = TASKS["digits"].data(0, 1, 0)
    total = sum(float(part.held_out_part(model)) for part in parts)
    assert total == pytest.approx(float(whole.held_out_part(model)), rel=1e-5)
