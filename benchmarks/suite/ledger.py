"""Results, a line of JSON a run, appended as they come: an interrupted set goes on where it was.

A row carries what it was measured with: machine, versions, commit, ``code``, a digest of all that a step of any task
runs, and ``data``, one of where its own task's model and data are made. Two commits share a digest only where nothing
of that differs. Rows of another machine, other versions or other code are kept and never shown in one table with these.
``code_then`` is the digest that a row was written with, where files were divided since and nothing else was changed.
"""
import ast
import contextlib
import datetime
import functools
import hashlib
import inspect
import json
import platform
import statistics
import subprocess
from importlib import metadata
from pathlib import Path

import thinwire
from common.record import ROOT, machine

from suite.methods import CONTESTANTS
from suite.tasks import TASKS

RUN_BY_RANKS = ("common/task.py", "thinnet.py",
                *(f"suite/{name}.py" for name in ("train_rank", "tasks", "methods", "worlds")))  # fmt: skip
# Rooms and files of the package that a step of DDP or Horovod does not run.
ASIDE = {"__init__.py", "__main__.py", "advice", "bounds.py", "estimate.py", "hogwild", "info.py"}


def code() -> str:
    """12 digits that change when anything changes that a measured step runs, but for words and one task's own."""
    package = Path(thinwire.__file__).parent
    files = [path for path in package.rglob("*.py") if ASIDE.isdisjoint(path.relative_to(package).parts)]
    files += [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
    files += [ROOT / "benchmarks" / name for name in RUN_BY_RANKS]
    return _digest(files)


def data(task: str) -> str:
    """12 digits that change when anything changes in the module that makes a task's model and data, but for words."""
    return _digest([Path(inspect.getsourcefile(TASKS[task].data))])


def _digest(files):
    digest = hashlib.sha256()
    for path in sorted(files):
        text = path.read_bytes()
        digest.update(path.name.encode() + b"\0" + (_without_words(text) if path.suffix == ".py" else text) + b"\0")
    return digest.hexdigest()[:12]


@functools.cache  # it is asked after every run, for all files
def _without_words(source):
    """A module's syntax tree without docstrings; comments are not in it."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
    return ast.dump(tree).encode()


def about() -> dict:
    """What is written into every row."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = None
    with contextlib.suppress(FileNotFoundError):  # a copy may be measured where there is no git
        commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
    versions = {"python": platform.python_version(), "native": thinwire.ops.native("cpu")}
    for package in ("torch", "thinwire", "horovod", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {"code": code(), "commit": commit, "machine": machine(), "versions": versions}


def _measured_with(row):
    return row.get("machine"), row.get("versions"), row.get("code")


class Ledger:
    """The rows of one file that belong to this machine, these versions and this code; ``others`` counts the rest.

    To show, rows of a task that the suite has no more belong to it as well (scale.py reads them); no table has them.
    """

    def __init__(self, path: Path, of: dict | None = None):
        """of: a row whose machine, versions and code count, and each task's newest data, instead of the ones here."""
        self.path = path
        self._about, self._data = about(), {task: data(task) for task in TASKS}
        everything = _rows(path)
        like = _measured_with(of or self._about)
        self.machine, _, self.code = like
        alike = [row for row in everything if _measured_with(row) == like]
        counted = {row["task"]: row.get("data") for row in alike} if of else self._data
        self.rows = [row for row in alike if row["task"] in counted and row.get("data") == counted[row["task"]]]
        self.others = len(everything) - len(self.rows)

    @classmethod
    def of_newest(cls, path: Path) -> "Ledger":
        """To show: the rows measured with what the file's last row was. Raises SystemExit where there is none."""
        rows = _rows(path)
        if not rows:
            raise SystemExit(f"{path}: nothing measured yet")
        return cls(path, rows[-1])

    def is_current(self) -> bool:
        """Whether the code here is still what rows are marked with."""
        return code() == self._about["code"] and all(data(task) == was for task, was in self._data.items())

    def add(self, key: dict, result: dict) -> dict:
        contestant = CONTESTANTS[key["method"]]
        row = {k: v for k, v in key.items() if v is not None} | {
            "label": contestant.label, "family": contestant.family, "what": contestant.what, **result, **self._about,
            "data": self._data[key["task"]],
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }  # fmt: skip
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("\n" * _is_cut_off(self.path) + json.dumps(row) + "\n")
        return row

    def find(self, **key) -> list[dict]:
        """Rows with these values, the newest last."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in key.items())]

    def has(self, run, failed_too: bool = True) -> bool:
        """Whether all of a run is there. Of methods in turns: all side by side, but for those that have failed."""
        gone, side_by_side = set(), {}
        for method in run.methods:
            key = {name: value for name, value in run.key(method).items() if value is not None and name != "among"}
            for row in self.find(**key):
                if row["status"] == "done":
                    side_by_side.setdefault(frozenset(row.get("among", ())), set()).add(method)
                elif failed_too:
                    gone.add(method)
        wanted = set(run.methods)
        return wanted <= gone or any(wanted <= done | gone for among, done in side_by_side.items() if among <= wanted)


def final_loss(row: dict) -> float:
    """The mean of the last two evaluations; infinite where training failed or did not get so far."""
    curve = row.get("curve", [])
    if row["status"] != "done" or len(curve) < 3 or curve[-1][0] < row["steps"]:
        return float("inf")
    return statistics.mean(point[2] for point in curve[-2:])


def _rows(path):
    """What an interruption cut off is not a row, nor is what no suite wrote."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            found += [row] if isinstance(row, dict) and "task" in row else []
    return found


def _is_cut_off(path):
    return path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
