"""How measurements are kept and shown: a JSON file, a table in the terminal, a block in README.md."""
import datetime
import json
import platform
import re
from pathlib import Path

import thinwire
import torch
from demo import COMMITTED as RESULTS
from demo import README, machine
from rich.console import Console
from rich.table import Table


def save(name: str, command: str, rows: list[dict], out: Path = RESULTS, **about) -> dict:
    """Write out/name.json: the rows, the command that made them, when, where and with what; and return all of it."""
    record = {
        "command": command, **about, "machine": machine(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "thinwire": thinwire.__version__},
    }  # fmt: skip
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(f'{json.dumps(record)[:-1]},\n "rows": [\n  {lines}\n]}}\n')
    return record | {"rows": rows}


def load(name: str, out: Path = RESULTS) -> dict:
    """What :func:`save` wrote. Raises SystemExit where there is nothing yet."""
    path = out / f"{name}.json"
    if not path.exists():
        raise SystemExit(f"{path} is not there: run the measurement first")
    return json.loads(path.read_text())


def print_table(heads: tuple[str, ...], rows: list[tuple[str, ...]], title: str | None = None) -> None:
    """Print rows of text; the first column is left-aligned, the others right."""
    table = Table(title=title)
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)


def origin(record: dict) -> str:
    """The line under a table that says where its figures come from."""
    return (f"`{record['command']}`, {record['date']}, {record['machine']['cores']} cores "
            f"({record['machine']['cpu']}), PyTorch {record['versions']['torch']}.")  # fmt: skip


def markdown(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table; the first column is left-aligned, the others right."""
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def write_readme_block(name: str, heads: tuple[str, ...], rows: list[tuple[str, ...]], footer: str) -> None:
    """Put a table, and lines under it, between README.md's marks ``<!-- name -->`` and ``<!-- /name -->``.

    Raises SystemExit where README.md has no such marks.
    """
    text = README.read_text()
    block = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    if not block.search(text):
        raise SystemExit(f"README.md has no block <!-- {name} --> ... <!-- /{name} -->")
    README.write_text(block.sub(lambda m: f"{m[1]}{markdown(heads, rows)}\n\n{footer}\n{m[2]}", text))
