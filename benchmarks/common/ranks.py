"""Scripts that are run on every rank of a thin network."""
import json
import os
import sys
from pathlib import Path

import thinwire
from thinnet import ThinNet


def import_paths() -> dict[str, str]:
    """The environment in which ranks import the thinwire that this process imported."""
    package = str(Path(thinwire.__file__).resolve().parent.parent)
    return {"PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))}


def rows_of(net: ThinNet, script: Path, options: list) -> list[dict]:
    """Run a Python script on every rank; what rank 0 reports in lines of JSON. Raises SystemExit where it fails."""
    found = []

    def take(rank, line, stream):
        if rank == 0 and line.startswith("{"):
            found.append(json.loads(line))
        elif "Error" in line:
            print(line, file=sys.stderr)

    command = [sys.executable, str(script), *map(str, options)]
    if net.run(command, env=import_paths(), on_line=take) != 0:
        raise SystemExit(f"{' '.join(command)} failed")
    return found
