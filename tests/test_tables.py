"""The documentation's tables: each is what its script makes of the committed figures, and names what is there."""

import re

import pytest
from advice import predictions
from common import record
from demo import run as demo
from elastic import bounds, error_feedback, speed
from grouped_averaging import shuffle
from independent_blocks import reproduce
from operators import table
from overhead import run as overhead
from steps import run as steps
from suite import noise, report, scale
from wires import run as wires

COMMITTED, README = record.TABLES, record.README
TABLES = {
    demo: {"demo"}, table: {"bench", "operators"}, predictions: {"advise"}, scale: {"scale"},
    reproduce: {"independent_blocks"}, shuffle: {"shuffle_speed", "shuffle_quality"},
    speed: {"elastic_speed", "elastic_loss"}, error_feedback: {"elastic_error_feedback"}, bounds: {"elastic_bounds"},
    steps: {"steps", "steps_targets"}, overhead: {"overhead"}, wires: {"wires"},
    noise: {"results_noise"},
    report: {f"results_{name}" for name in ("short", "goals", "losses", "links", "ranking", "steps")},
}  # fmt: skip


def written(folder):
    return {path.stem: path.read_text() for path in folder.glob("*.md")}


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """The folder into which scripts write their tables; README is a copy beside it."""
    monkeypatch.setattr(record, "TABLES", tmp_path / "tables")
    monkeypatch.setattr(record, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text(README.read_text())
    return tmp_path / "tables"


@pytest.mark.parametrize("script", TABLES, ids=lambda script: script.__name__)
def test_a_script_makes_its_tables_of_what_is_committed(script, tables, monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", "--docs"])
    assert not script.main()
    assert written(tables) == {name: (COMMITTED / f"{name}.md").read_text() for name in TABLES[script]}
    assert record.README.read_text() == README.read_text()


def test_no_other_table_is_there_and_pictures_and_scripts_that_they_name_are():
    assert set(written(COMMITTED)) == set().union(*TABLES.values())
    for text in written(COMMITTED).values():
        for path in re.findall(r"!\[.*?\]\((.*?)\)", text):
            assert (COMMITTED / path).resolve().is_file(), path
        for path in re.findall(r"python ([\w/.]+)", text):
            assert (record.ROOT / path).is_file(), path
        assert "cancer" not in text or "a1a" in text, "the suite has no such task; the paper's data are another matter"


def test_a_table_has_left_and_right_columns_and_its_text_below(tables):
    record.write_table("x", ("a", "b", "c"), [("1", "2", "3")], f"Text.\n\n{record.picture('p', 'says')}", left=2)
    assert (tables / "x.md").read_text() == (
        "| a | b | c |\n|---|---|---:|\n| 1 | 2 | 3 |\n\nText.\n\n![says](../../benchmarks/results/p.png)\n"
    )


def test_a_table_is_put_between_its_marks_and_nowhere_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- /x -->\nb\n")
    record.write_into(page, "x", "new")
    assert page.read_text() == "a\n<!-- x -->\nnew\n<!-- /x -->\nb\n"
    with pytest.raises(SystemExit, match="no <!-- y -->"):
        record.write_into(page, "y", "new")


def test_what_was_not_measured_has_no_table(tables, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="nothing.json is not there"):
        record.load("nothing", tmp_path)
    for script in (shuffle, table):
        monkeypatch.setattr("sys.argv", ["script.py"])
        with pytest.raises(SystemExit):
            script.main()
        assert "--docs" in capsys.readouterr().err
    assert not tables.exists()
