"""What a user gets: the wheel, in an environment that has torch and nothing of this checkout."""
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ONE_OPERATOR = """
import torch
from thinwire import ops
from thinwire.core.blocks import Layout
slots = Layout(("a",), (40,), 16).slots((3,))
payload = torch.zeros(40)
ops.gather_blocks(torch.ones(40), torch.arange(3), slots.table, 16, None, None, payload)
assert payload.eq(1).all()
"""


def run(*command, cwd, **environment):
    outer = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # which may name the checkout
    result = subprocess.run(command, cwd=cwd, env={**outer, **environment}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build_wheel(tmp_path, **environment):
    """Build from a copy, so that the checkout's own build stays as it is."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("*.so", "_build.json", "*.egg-info", "__pycache__")
    for name in ("csrc", "hooks"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.py", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    wheels = tmp_path / "wheels"
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", wheels, source,
        cwd=tmp_path, **environment)  # fmt: skip
    (wheel,) = wheels.glob("*.whl")
    return wheel


def clean_python(tmp_path, wheel):
    """A new environment with the wheel, which finds torch in the outer one but not the outer one's editable thinwire:
    a .pth file adds the folder to the path, and .pth files inside that folder are not read."""
    home = tmp_path / "env"
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=tmp_path)
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    inner = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", inner, wheel, cwd=tmp_path)
    (inner / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python, inner


def test_pure_wheel(tmp_path):
    wheel = build_wheel(tmp_path, USE_CPP="0")
    assert wheel.name.endswith("-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith((".so", ".pyd", "_build.json"))]
    python, _ = clean_python(tmp_path, wheel)
    run(python, "-c", ONE_OPERATOR, cwd=tmp_path)


def hasty(compiler, tmp_path):
    """The compiler without optimisation and debugging symbols, whatever it is asked for: in half the time."""
    found = tmp_path / Path(compiler).name
    found.write_text(f'#!/bin/sh\nexec {shutil.which(compiler)} "$@" -O0 -g0\n')
    found.chmod(0o755)
    return str(found)


COMPILER = os.environ.get("CXX", "c++")


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler")
def test_compiled_wheel(tmp_path):
    wheel = build_wheel(tmp_path, USE_CPP="1", USE_CUDA="0", CXX=hasty(COMPILER, tmp_path))
    names = zipfile.ZipFile(wheel).namelist()
    assert "thinwire/_build.json" in names
    packaged = {path.relative_to(ROOT / "hooks").as_posix() for path in (ROOT / "hooks/thinwire").rglob("*.py")}
    assert packaged <= set(names)
    python, inner = clean_python(tmp_path, wheel)
    check = 'import thinwire\nassert ops.native("cpu"), ops.why_not_native()\nprint(thinwire.__file__)'
    found = run(python, "-c", ONE_OPERATOR + check, cwd=tmp_path).strip()
    assert Path(found).is_relative_to(inner)
    run(python, "-m", "thinwire", "info", cwd=tmp_path)


def test_a_compiler_that_fails_leaves_a_pure_package(tmp_path):
    wheel = build_wheel(tmp_path, CXX="false", CC="false", USE_CUDA="0")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("thinwire/__init__.py") for name in names)
    assert not [name for name in names if name.endswith((".so", ".pyd"))]
