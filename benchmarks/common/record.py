"""How measurements are kept and shown: a JSON file, a table in the terminal, a file of docs/tables."""
import contextlib
import datetime
import json
import os
import platform
import re
from pathlib import Path

import thinwire
import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"  # what is committed
OWN_RESULTS = ROOT / "results"  # what a user measures
TABLES, README = ROOT / "docs" / "tables", ROOT / "README.md"


def machine() -> dict:
    """What the figures were measured on."""
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {"cpu": found[1] if found else platform.processor(), "cores": len(os.sched_getaffinity(0)),
            "system": platform.platform()}  # fmt: skip


def today() -> str:
    """The date in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def save(name: str, command: str, rows: list[dict], out: Path = RESULTS, **about) -> dict:
    """Write out/name.json: the rows, the command that made them, when, where and with what; and return all of it."""
    record = {
        "command": command, **about, "machine": machine(), "date": today(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "thinwire": thinwire.__version__},
    }  # fmt: skip
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(f'{json.dumps(record)[:-1]},\n "rows": [\n  {lines}\n]}}\n')
    return record | {"rows": rows}


def read_rows(path: Path) -> list[dict]:
    """Rows of lines of JSON, in the order in which they were measured. What an interruption cut off is not a row."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def append(path: Path, row: dict) -> None:
    """Add a row to lines of JSON; nothing is added to a line that an interruption cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_off = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a") as file:
        file.write("\n" * cut_off + json.dumps(row) + "\n")


def load(name: str, out: Path = RESULTS) -> dict:
    """What :func:`save` wrote. Raises SystemExit where there is nothing yet."""
    path = out / f"{name}.json"
    if not path.exists():
        raise SystemExit(f"{path} is not there: run the measurement first")
    return json.loads(path.read_text())


def print_table(heads: tuple[str, ...], rows: list[tuple[str, ...]], title: str | None = None, left: int = 1,
                console: Console | None = None) -> None:  # fmt: skip
    """Print rows of text; the first columns, ``left`` of them, are left-aligned, the others right."""
    table = Table(title=title)
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i >= left else "left")
    for row in rows:
        table.add_row(*row)
    (console or Console(width=140)).print(table)


def origin(record: dict) -> str:
    """The line under a table that says where its figures come from."""
    return (f"`{record['command']}`, {record['date']}, {record['machine']['cores']} cores "
            f"({record['machine']['cpu']}), PyTorch {record['versions']['torch']}.")  # fmt: skip


def markdown(heads: tuple[str, ...], rows: list[tuple[str, ...]], left: int = 1) -> str:
    """A table; the first columns, ``left`` of them, are left-aligned, the others right."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * left + "---:|" * (len(heads) - left)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def picture(name: str, says: str) -> str:
    """A picture of the committed results, as the files of docs/tables link to it."""
    return f"![{says}](../../benchmarks/results/{name}.png)"


def write_into(path: Path, mark: str, text: str) -> None:
    """Replace what is between ``<!-- mark -->`` and ``<!-- /mark -->`` in a file. Raises SystemExit without them."""
    before, begin, rest = path.read_text().partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition(f"<!-- /{mark} -->")
    if not (begin and end):
        raise SystemExit(f"{path} has no <!-- {mark} --> and <!-- /{mark} --> to write between")
    path.write_text(before + begin + text + "\n" + end + after)


def write_table(name: str, heads: tuple[str, ...], rows: list[tuple[str, ...]], footer: str, left: int = 1) -> None:
    """Write docs/tables/name.md: a table and the text under it. The documentation includes these files."""
    TABLES.mkdir(parents=True, exist_ok=True)
    (TABLES / f"{name}.md").write_text(f"{markdown(heads, rows, left)}\n\n{footer}\n")
