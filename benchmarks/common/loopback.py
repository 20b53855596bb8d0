"""Scripts that are run on every rank of this machine, with nothing between the ranks but the loopback."""
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
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(script),
               *map(str, options)]  # fmt: skip
    env = os.environ | import_paths() | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as run:
        try:
            for line in run.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
                else:
                    print(line, end="", flush=True)
        except BaseException:  # or nobody wants to hear the rest
            run.terminate()
            raise
    if run.returncode:
        raise SystemExit(f"{script} failed")
