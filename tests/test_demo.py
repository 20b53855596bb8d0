"""The demo: its table and its display in 80 columns, and that its methods are tuned by one rule on another seed."""
import io

import pytest
import thinwire
from common import record as records
from demo import run as demo
from demo import tune
from demo.rank import CONTESTANTS, SHOWN
from rich.console import Console


@pytest.fixture(scope="module")
def tuning():
    return records.load("tuning")["runs"]


RECORD = {
    "ranks": 4, "mbit": 100.0, "shaped": True, "seconds": 40.0, "seed": 1, "date": "2026-01-01",
    "machine": {"cpu": "a processor", "cores": 2}, "versions": {"torch": "2"},
    "contestants": {
        "dense": {"label": "plain DDP", "optimizer": "AdamW", "options": {"lr": 3e-3, "betas": [0.5, 0.95]},
                  "method": None},
        "local-8": {"label": "LocalSteps, every 8", "optimizer": "AdamW", "options": {"lr": 1e-3, "betas": [0.5, 0.95]},
                    "method": "LocalSteps(every=8)"},
    },
    "methods": {
        "noop": {"status": "done", "steps": 30, "step_ms": 130.0, "step_bytes": 100, "curve": []},
        "dense": {"status": "done", "steps": 20, "step_ms": 1800.0, "step_bytes": 20e6, "curve": [[36.0, 20, 2.9]]},
        "powersgd-1": {"status": "hung", "steps": 7, "curve": [[0.0, 0, 5.7], [4.0, 7, 3.1]]},
        "local-8": {"status": "done", "steps": 240, "step_ms": 160.0, "step_bytes": 1e5, "bytes": 3e7,
                    "curve": [[39.0, 240, 2.4]]},
    },
}  # fmt: skip


def test_the_table_is_made_of_the_record_and_a_hang_is_called_one(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "TABLES", tmp_path)
    demo.write_table(RECORD)
    once = (tmp_path / "demo.md").read_text()
    assert once.startswith("| method |") and once.endswith("(../../benchmarks/results/demo.png)\n")
    assert "| 160 | 0.1 | 200 | 30 | 240 | 2.400 |" in once
    assert "`LocalSteps(every=8)`" in once and "plain DDP 0.003, 0.5;" in once and "seed 1," in once
    assert "| 7 hung |" in once and "3.100" in once
    demo.draw(RECORD, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").stat().st_size > 1000


def test_a_rank_that_stands_still_is_reported_as_hung():
    with demo._progress(demo.Console(quiet=True)) as progress:
        row = demo._Row(progress, "powersgd-1", 3.0)
        row.on_line(0, '{"event": "loss", "step": 0, "seconds": 0.0, "loss": 5.5}', "stdout")
        row.on_line(0, '{"event": "step", "step": 2, "seconds": 1.0, "step_ms": 500.0}', "stdout")
        row.on_line(1, "Timeout (0:00:30)!", "stderr")
        result = row.finish(1)
    assert result["status"] == "hung" and result["curve"] == [[0.0, 0, 5.5]] and result["steps"] == 2


def columns(width=80):
    """A console of CI: no terminal, so many columns; and what was printed on it."""
    out = io.StringIO()
    return Console(file=out, width=width), lambda: out.getvalue().splitlines()


def everything(status="done"):
    """A record of the demo with every method in it, of figures as large as they get."""
    result = {"status": status, "steps": 199, "step_ms": 1999.9, "step_bytes": 21.2e6, "bytes": 381e6,
              "curve": [[34.0, 199, 2.4]]}  # fmt: skip
    return RECORD | {"methods": {name: result for name in CONTESTANTS}}


@pytest.mark.parametrize("record", [records.load("demo"), everything(), everything("failed")],
                         ids=("committed", "largest", "failed"))  # fmt: skip
def test_the_table_fits_80_columns_and_cuts_nothing(record):
    console, lines = columns()
    demo.print_table(record, console)
    assert max(map(len, lines())) <= 80 and "…" not in "".join(lines())
    for cells in demo.rows_of(record):
        row = next(line for line in lines() if f" {cells[0]} " in line)
        assert row.replace("┃", "│").split("│")[1:-1] and all(f" {cell} " in row for cell in cells)


def test_the_live_display_fits_80_columns_and_cuts_nothing():
    console, lines = columns()
    with demo._progress(console) as progress:
        for name in CONTESTANTS:
            row = demo._Row(progress, name, 34.0)
            row.on_line(0, '{"event": "loss", "step": 199, "seconds": 33.0, "loss": 2.4}', "stdout")
            row.on_line(0, '{"event": "step", "step": 199, "seconds": 33.0, "step_ms": 1999.9}', "stdout")
            console.print(row.summary(), highlight=False)
    assert max(map(len, lines())) <= 80
    for name in CONTESTANTS:
        shown = [line for line in lines() if line.startswith(CONTESTANTS[name].label)]
        assert all("loss 2.400" in line for line in shown) and len(shown) == 2


@pytest.mark.parametrize("name", tune.STEPS)
def test_the_optimizer_of_a_method_is_the_best_of_its_search(name, tuning):
    best = tune.best(tuning, name)
    where = tune.point(best) if best else tune.FIRST
    assert CONTESTANTS[name].options == {"lr": where[0], "betas": (where[1], 0.95)}


@pytest.mark.parametrize("name", [name for name in SHOWN if CONTESTANTS[name].trains])
def test_what_is_shown_has_been_searched_to_the_end(name, tuning):
    assert tune.best(tuning, name) and tune.untried(tuning, name) == []


@pytest.mark.parametrize("name", SHOWN)
def test_no_other_of_its_family_was_better(name, tuning):
    family = CONTESTANTS[name].family
    others = [one for one in tuning if family and CONTESTANTS[one["method"]].family == family and one["loss"]]
    assert all(run["loss"] >= tune.best(tuning, name)["loss"] for run in others)
    assert [one for one in SHOWN if family and CONTESTANTS[one].family == family] in ([name], [])


def test_it_is_tuned_on_a_seed_that_it_does_not_show_and_for_about_the_steps_that_it_makes(tuning, monkeypatch):
    monkeypatch.setattr("sys.argv", ["run.py"])
    assert {run["seed"] for run in tuning} == {tune.SEED} and demo._arguments().seed != tune.SEED
    assert {(run["method"], run["steps"]) for run in tuning} <= set(tune.STEPS.items())
    for name, result in records.load("demo")["methods"].items():
        if CONTESTANTS[name].trains:
            assert result["steps"] == pytest.approx(tune.STEPS[name], rel=0.2)


def test_a_search_goes_on_until_the_neighbours_of_the_best_are_tried():
    losses = {(3e-3, 0.5): 2.0, (1e-3, 0.5): 2.5, (1e-2, 0.5): 2.2, (3e-3, 0.0): 2.1, (3e-3, 0.9): 2.4}
    runs = []
    while missing := tune.untried(runs, "dense"):
        rate, beta1 = missing[0]
        run = {"method": "dense", "options": {"lr": rate, "betas": [beta1, 0.95]}}
        runs.append(run | {"loss": losses.get(missing[0], 3.0)})
    assert tune.point(tune.best(runs, "dense")) == (3e-3, 0.5)
    assert losses.keys() <= {tune.point(run) for run in runs}


def test_a_best_rate_at_the_end_of_the_rates_is_not_found_yet():
    for rate in (tune.RATES[0], tune.RATES[-1]):
        runs = [{"method": "dense", "options": {"lr": one, "betas": [beta1, 0.95]}, "loss": abs(one - rate)}
                for one in tune.RATES for beta1 in tune.BETAS1]  # fmt: skip
        assert len(tune.untried(runs, "dense")) == 1


def test_a_method_is_written_as_in_code_and_is_that_method():
    for one in CONTESTANTS.values():
        if one.method:
            assert eval(demo._written(one.method), vars(thinwire)) == one.method
