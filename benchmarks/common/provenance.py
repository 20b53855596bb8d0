"""What a measurement was made with: machine, versions, commit, and a digest of the code that a step runs.

Two commits share a digest only where nothing differs that a step of any task runs, but for words.
"""
import ast
import contextlib
import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import thinwire

from common.record import ROOT, machine

RUN_BY_RANKS = ("common/task.py", *(f"suite/{name}.py" for name in (
    "train_rank", "tasks", "texts", "clicks", "examples", "methods", "ways")))  # fmt: skip
# Rooms and files of the package that a step of DDP or Horovod does not run.
ASIDE = {"__init__.py", "__main__.py", "advice", "bounds.py", "estimate.py", "hogwild", "info.py"}


def code() -> str:
    """12 digits that change when anything changes that a measured step runs, but for words."""
    package = Path(thinwire.__file__).parent
    files = [path for path in package.rglob("*.py") if ASIDE.isdisjoint(path.relative_to(package).parts)]
    files += [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
    files += [ROOT / "benchmarks" / name for name in RUN_BY_RANKS]
    digest = hashlib.sha256()
    for path in sorted(files):
        text = path.read_bytes()
        digest.update(path.name.encode() + b"\0" + (_without_words(text) if path.suffix == ".py" else text) + b"\0")
    return digest.hexdigest()[:12]


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


def _without_words(source):
    """A module's syntax tree without docstrings; comments are not in it."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
    return ast.dump(tree).encode()
