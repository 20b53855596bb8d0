"""What rank 0 of a script reports, a line of JSON a row."""
import json
import sys
from pathlib import Path

from thinnet import ThinNet


def rows_of(net: ThinNet, script: Path, options: list) -> list[dict]:
    """Run a Python script on every rank of the network. Raises SystemExit where it fails."""
    found = []

    def take(rank, line, stream):
        if rank == 0 and line.startswith("{"):
            found.append(json.loads(line))
        elif "Error" in line:
            print(line, file=sys.stderr)

    command = [sys.executable, str(script), *map(str, options)]
    if net.run(command, on_line=take) != 0:
        raise SystemExit(f"{' '.join(command)} failed")
    return found
