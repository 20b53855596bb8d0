"""Methods in turns: what a figure of one compares itself with."""
import pytest
from common.record import read_rows
from common.turns import in_turns, mean_of, pairs, quartiles, ratios, steps_of
from overhead import run as overhead
from steps import run as steps
from wires import run as wires


def turn(method, *ms, **also):
    return {"method": method, "ms": list(ms), **also}


def test_every_method_has_turns_between_the_baselines_and_comes_first_as_often_as_last():
    assert list(in_turns(["a", "b"], "x", 2)) == [(cycle, name) for cycle, names in enumerate(("xaxbx", "xbxax"))
                                                  for name in names]  # fmt: skip


def test_a_turn_is_compared_with_the_turns_of_the_baseline_next_to_it():
    rows = [turn("x", 1), turn("a", 4, 6, 100), turn("x", 3), turn("a", 20), turn("b", 0), turn("a", 7)]
    assert pairs(rows, "a", "x") == [(6, 2), (20, 3), (7, 3)]
    assert ratios(rows, "a", "x") == [3, 20 / 3, 7 / 3]
    assert ratios(rows, "a", "x", sum) == [110 / 2, 20 / 3, 7 / 3]
    assert pairs(rows, "b", "a") == [(0, 13.5)]
    assert pairs(rows, "a", "nobody") == pairs(rows, "nobody", "a") == []
    assert steps_of(rows, "x") == [1, 3]


def test_quartiles_are_of_what_was_measured():
    assert quartiles([3.0]) == (3, 3, 3)
    assert quartiles([5, 1, 4, 2, 3]) == (2, 3, 4)


def test_counts_are_means_over_turns_where_they_were_counted():
    rows = [turn("a", 1, stats={"bytes_sent": 2.0}), turn("a", 1, stats={"bytes_sent": 4.0}), turn("x", 1)]
    assert mean_of(rows, "a", "stats", "bytes_sent") == 3
    assert mean_of(rows, "a", "stats", "waited_s") is None
    assert mean_of(rows, "x", "stats", "bytes_sent") is None


def test_limits_are_of_the_median_ratio():
    name = "nominated 4 %, int4"
    rows = [turn(steps.NOOP, 100), turn(name, 116), turn(steps.NOOP, 100), turn(name, 112), turn(steps.NOOP, 100)]
    assert [row[3] for row in steps.limits_table(rows)[1]] == ["1.15"]
    assert [row[3] for row in steps.limits_table([*rows, turn(name, 130)])[1]] == ["1.15, missed"]


def test_an_overhead_is_in_milliseconds_of_the_small_model_and_in_yardsticks_of_the_large_one():
    rows = [turn(name, ms, model=model) for model in (overhead.SMALL, overhead.LARGE)
            for name, ms in ((overhead.NOOP, 10), ("hook", 12), (overhead.YARDSTICK, 2))]  # fmt: skip
    found = {row[:2]: row[3:] for row in overhead.table(rows)[1]}
    assert found[overhead.SMALL, "hook"] == ("2.00 (2.00 to 2.00)", "-", "1.5 ms, missed")
    assert found[overhead.LARGE, "hook"] == ("2.00 (2.00 to 2.00)", "1.00 (1.00 to 1.00)", "1.3")


@pytest.mark.parametrize("losses, found", [
    ((1.5, 1.5), ("-0.050", "yes")), ((1.7, 1.6), ("-0.200", "no")),
    ((1.3, 1.3), ("+0.150", "below")), ((1.5, None), ("diverged", "no")),
])  # fmt: skip
def test_few_bits_are_compared_with_the_seeds_of_32(losses, found):
    assert wires.verdict(dict(enumerate(losses)), {0: 1.4, 1: 1.5}) == found


def test_runs_go_on_where_they_were(tmp_path, monkeypatch):
    wanted = wires.runs(["dense", "nominated 4 %"], [wires.SGD], wires.WIRES, [1, 2], 10)
    assert len(wanted) == 10 and ("dense", "int2") not in {(run["method"], run["wire"]) for run in wanted}
    asked = []

    def train(ranks, script, options):
        runs = wires.json.loads(options[0])
        asked.append(len(runs))
        for run in runs[:4]:
            yield run | {"loss": 1.0, "compression": 2.0, "seconds": 3.0}
        if len(runs) > 4:
            raise SystemExit

    monkeypatch.setattr(wires, "rows_as_they_come", train)
    path = tmp_path / "wires.jsonl"
    for _ in range(2):
        with pytest.raises(SystemExit):
            wires.measure(wanted, path, again=False)
    with path.open("a") as file:
        file.write('{"method": "cut o')
    rows = wires.measure(wanted, path, again=False)
    assert asked == [10, 6, 2] and len(read_rows(path)) == 10
    assert list(map(wires.key, rows)) == list(map(wires.key, wanted))
    assert [row[-1] for row in wires.table(rows)[1]] == ["-", "yes", "-", "yes", "yes"]
