"""What there is for Horovod on real Horovod: one ``horovodrun`` a number of ranks, and its checks one by one.

One check of each kind here, and all of them with ``make test-full``; test_horovod_simulated.py has every combination.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import horovod_checks
import pytest
import thinwire

SECONDS = float(os.environ.get("THINWIRE_TEST_SECONDS", "1200"))  # then a launch is taken for hung


class Launch:
    """One horovodrun of horovod_checks.py; results[rank][check] is its error, empty where it passed."""

    def __init__(self, n, directory, names):
        here = Path(__file__).parent
        env = os.environ | {
            "OMP_NUM_THREADS": "1", "HOROVOD_DYNAMIC_PROCESS_SETS": "1",
            "HOROVOD_STALL_CHECK_TIME_SECONDS": "20", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "60",
            "PYTHONPATH": os.pathsep.join(filter(None, [_import_root(), os.environ.get("PYTHONPATH")])),
        }  # fmt: skip
        command = [sys.executable, "-m", "horovod.runner.launch", "-np", str(n), "--gloo", sys.executable,
                   str(here / "horovod_checks.py"), str(directory), *names]  # fmt: skip
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, cwd=here)
            try:
                process.wait(SECONDS)
                self.end = f"horovodrun ended with status {process.returncode}"
            except subprocess.TimeoutExpired:
                self.end = f"horovodrun was stopped after {SECONDS:g} s"
            finally:
                _stop(process)
            output.seek(0)
            self.output = output.read()[-6000:]
        self.results = [_lines(directory / f"{rank}.jsonl") for rank in range(n)]

    def verdict(self, name):
        """Raise AssertionError with every rank's error, if any."""
        errors = []
        for rank, results in enumerate(self.results):
            if name not in results:
                last = next(reversed(results), "the start")
                errors.append(f"rank {rank} did not finish it; its last was {last}; {self.end}:\n{self.output}")
            elif results[name]:
                errors.append(f"rank {rank}:\n{results[name]}")
        assert not errors, "\n".join(errors)


def _import_root():
    return str(Path(thinwire.__file__).parents[1])


def _lines(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["check"]: line["error"] for line in lines}


def _stop(process):
    """End horovodrun and every process it started: it puts its workers in sessions of their own."""
    import psutil

    family = []
    if process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
    for one in family:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            pass
    if family:
        process.kill()
    process.wait()


CASES = [
    pytest.param(n, name, marks=() if n in check.real else pytest.mark.full)
    for n in (2, 3) for name, check in horovod_checks.CHECKS.items() if n in check.ranks
]  # fmt: skip


@pytest.fixture(scope="module")
def launch(request, tmp_path_factory):
    """launch(n): the results on n ranks of the checks that this session collected."""
    if horovod_checks.hvd is None:
        pytest.skip("Horovod is not installed: 'make horovod' builds it")
    wanted = {}
    for item in request.session.items:
        if item.fspath == request.fspath and hasattr(item, "callspec") and "check" in item.callspec.params:
            wanted.setdefault(item.callspec.params["n"], []).append(item.callspec.params["check"])
    launches = {}

    def of(n):
        if n not in launches:
            launches[n] = Launch(n, tmp_path_factory.mktemp(f"ranks{n}"), wanted[n])
        return launches[n]

    return of


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize(("n", "check"), CASES)
def test_on_ranks(launch, n, check):
    launch(n).verdict(check)


def test_without_horovod_the_compressor_says_so_and_the_rest_works():
    program = """
import sys
sys.modules["horovod"] = None  # what Python does for a module that cannot be imported
import thinwire
try:
    thinwire.horovod.Compressor([], thinwire.BlockSparse())
except ImportError as error:
    print(error)
"""
    env = os.environ | {"PYTHONPATH": _import_root()}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "thinwire.horovod needs horovod.torch" in done.stdout
