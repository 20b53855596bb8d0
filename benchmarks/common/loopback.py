"""Scripts that are run on every rank of this machine, with nothing between the ranks but the loopback."""
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from common.ranks import import_paths


def rows_as_they_come(ranks: int, script: Path, options: list) -> Iterator[dict]:
    """Run a Python script on every rank, one thread each; what rank 0 reports in lines of JSON, all else is printed.

    Raises SystemExit where it fails.
    """
    with _started(ranks, script, options) as run:
        try:
            yield from _rows(run)
        except BaseException:  # or nobody wants to hear the rest
            run.terminate()
            raise
    if run.returncode:
        raise SystemExit(f"{script} failed")


class Team:
    """Ranks that run a script and are asked for one row after another, in lines of JSON on their standard input."""

    def __init__(self, ranks: int, script: Path, options: list):
        self._run = _started(ranks, script, options, stdin=subprocess.PIPE)
        self._found = _rows(self._run)

    def ask(self, wanted: dict) -> dict | None:
        """The row that rank 0 answers, None where the ranks have failed."""
        try:
            self._run.stdin.write(json.dumps(wanted) + "\n")
            self._run.stdin.flush()
        except BrokenPipeError:
            return None
        return next(self._found, None)

    def close(self) -> None:
        """The ranks end by themselves, what they are at first."""
        with contextlib.suppress(BrokenPipeError):
            self._run.stdin.close()
        self._run.wait()


def _started(ranks, script, options, **streams):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(script),
               *map(str, options)]  # fmt: skip
    env = os.environ | import_paths() | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, **streams)


def _rows(run):
    for line in run.stdout:
        if line.startswith("{"):
            yield json.loads(line)
        else:
            print(line, end="", flush=True)
