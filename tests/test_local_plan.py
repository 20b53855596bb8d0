"""The evidence for local steps: what is tried next, when a search is over, and what its tables say."""

import itertools
import json
import math

import pytest
from local import plan as plans
from local import run, tables, ways
from local.plan import SEEDS, TUNING_SEED, Plan, Stage, key

TASK = "bytes-adamw"


def row(run, loss, **also):
    """What came of a run, with a curve that falls to its loss in the last step."""
    curve = [] if loss is None else [[run["steps"] // 2, loss + 1], [run["steps"], loss]]
    return run | {"loss": loss, "curve": curve, "compression": 16.0, "text": "t", "seconds": 1.0} | also


def measured(loss_of, stages, rows=(), most=500):
    """All rows that a plan asks for, one after another."""
    rows = list(rows)
    while wanted := next(Plan(rows).wanted(stages), None):
        assert key(wanted) not in {key(row) for row in rows}
        rows.append(row(wanted, loss_of(wanted)))
        assert len(rows) < most
    return rows


def bowl(lr, momentum, outer, least=1.0):
    """A loss that is least at these settings."""

    def loss(run):
        far = abs(math.log2(run["lr"] / lr)) + abs(run["momentum"] - momentum)
        return least + 0.1 * (far + abs((run["outer_momentum"] or 0) - (outer or 0)))

    return loss


@pytest.mark.parametrize("lr, momentum, outer", [(6e-3, 0.5, 0.7), (4.8e-2, 0.0, 0.9), (7.5e-4, 0.9, 0.3)])
def test_a_search_ends_where_no_neighbour_is_better_and_then_come_the_seeds(lr, momentum, outer):
    rows = measured(bowl(lr, momentum, outer), [Stage(TASK, (ways.LOCAL,))])
    assert Plan(rows).settled(TASK, ways.LOCAL) == (lr, momentum, outer)
    rates = {row["lr"] for row in rows if (row["momentum"], row["outer_momentum"]) == (momentum, outer)}
    assert {lr / 2, lr, 2 * lr} <= rates
    assert [row["seed"] for row in rows[-3:]] == list(SEEDS)
    assert {row["seed"] for row in rows[:-3]} == {TUNING_SEED}
    assert {row["steps"] for row in rows} == {1500}


def test_what_diverges_is_worse_than_all_that_does_not():
    rows = measured(lambda run: None if run["lr"] > 4e-3 else 2.0, [Stage(TASK, (ways.DDP,))])
    assert Plan(rows).settled(TASK, ways.DDP)[0] == 3e-3


def test_a_variant_starts_where_the_search_for_local_steps_has_ended():
    stage = [Stage(TASK, (ways.LOCAL_64,))]
    assert not list(Plan([]).wanted(stage))
    rows = measured(bowl(1.2e-2, 0.5, 0.7), [Stage(TASK, (ways.LOCAL,))])
    assert next(Plan(rows).wanted(stage))["lr"] == 1.2e-2


def test_runs_get_longer_until_all_seeds_together_are_as_low_as_plain_ddp():
    lengths = (1500, *plans.LONGER)

    def loss(run):
        if run["method"] == ways.DDP:
            return bowl(6e-3, 0.5, None)(run)
        late = lengths.index(run["steps"])
        return bowl(6e-3, 0.5, 0.7, least=1.2 - 0.1 * late + 0.05 * (run["seed"] == 3))(run)

    stages = [Stage(TASK, (ways.DDP, ways.LOCAL)), Stage(TASK, (ways.LOCAL,), longer=True)]
    rows = measured(loss, stages)
    longer = [(row["steps"], row["seed"]) for row in rows if row["steps"] > 1500]
    assert longer == [(2000, 1), *((steps, seed) for steps in (2500, 3000) for seed in SEEDS)]
    assert not list(Plan(rows, steps=100).wanted([Stage(TASK, (ways.LOCAL,), longer=True)]))


def test_every_method_of_every_stage_comes_to_an_end():
    rows = measured(lambda run: 2.0, plans.STAGES)
    of_stages = {(stage.task, method) for stage in plans.STAGES for method in stage.methods}
    assert {(row["task"], row["method"]) for row in rows} == of_stages
    assert set(ways.LABELS) == {method for _, method in of_stages}
    heads, cells = tables.losses(rows)
    assert len(cells) == len(of_stages) and all(len(cell) == len(heads) for cell in cells)


def test_seconds_are_those_to_the_mean_of_plain_ddps_last_losses():
    stages = [Stage(TASK, (ways.DDP, ways.LOCAL)), Stage(TASK, (ways.LOCAL,), longer=True)]
    losses = {1500: 2.1, 2000: 2.05, 2500: 1.9}
    rows = measured(lambda run: 2.0 if run["method"] == ways.DDP else losses[run["steps"]], stages)
    small = {ways.DDP: [400], ways.LOCAL: [30, 50]}
    steps = [{"model": "small", "method": method, "ms": ms} for method, ms in small.items()]
    heads, cells = tables.seconds(rows, steps)
    assert [cell[3:] for cell in cells] == [("1500", "400.0", "600", "1.00"), ("2500", "40.0", "100", "6.00")]


def test_a_curve_may_be_as_low_before_its_end():
    runs = [{"curve": [[50, 3.0], [100, low], [150, 2.2]]} for low in (1.9, 2.1)]
    assert tables.first_reached(runs, 2.0) == 100
    assert tables.first_reached(runs, 1.5) is None


def test_of_equal_runs_the_last_counts_and_other_texts_do_not():
    one = next(Plan([]).wanted())
    rows = [row(one, 3.0), row(one | {"seed": 7}, 1.0, text="other"), row(one, 2.0)]
    assert [found["loss"] for found in tables.newest(rows)] == [2.0]


def test_what_was_measured_is_written_at_once_and_not_measured_again(tmp_path, monkeypatch):
    asked = []

    class Team:
        def __init__(self, *given):
            pass

        def ask(self, wanted):
            asked.append(wanted)
            failed = len(asked) == 2
            return None if failed else row(wanted, 2.0)

        def close(self):
            pass

    monkeypatch.setattr(run, "Team", Team)
    monkeypatch.setattr(run, "digest", lambda *texts: "t")
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    arguments = ["run.py", "--out", str(tmp_path / "new"), "--tasks", TASK, "--methods", ways.DDP]
    monkeypatch.setattr("sys.argv", [*arguments, "--jobs", "3"])
    run.main()
    lines = (tmp_path / "new" / "local.jsonl").read_text().splitlines()
    assert len(asked) == 5 and len(lines) == 4, "a search's five runs, of which one has failed, and no seed"
    assert {"code", "machine", "versions", "date"} <= set(json.loads(lines[0]))
    monkeypatch.setattr("sys.argv", arguments)
    run.main()
    assert len(asked) == 9, "what has failed, and three seeds"
    assert len({key(one) for one in itertools.islice(asked, 5)}) == 5


def test_methods_are_compared_on_the_seeds_that_both_have():
    rows = measured(lambda run: 2.0 + 0.1 * run["seed"], [Stage(TASK, (ways.DDP, ways.POWERSGD))])
    rows = [row | {"loss": 2.0} if row["method"] == ways.POWERSGD and row["seed"] == 1 else row for row in rows]
    rows = [row for row in rows if row["method"] == ways.DDP or row["seed"] < 2]
    _, cells = tables.losses(rows)
    assert [cell[4:8] for cell in cells] == [
        ("2.200", "2.100, 2.200, 2.300", "-", "+0.100"), ("2.000", "2.000", "-0.100", "-")
    ]  # fmt: skip
