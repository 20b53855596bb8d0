"""Turns the record of ``make bench`` into a table of ratios against their targets.

    make bench                                                    runs the benchmarks and prints the table
    python benchmarks/bench_table.py results/bench_raw.json --readme     keeps it in benchmarks/results and README.md
"""
import argparse
import json
import re
from pathlib import Path

import torch
from demo import README, machine
from rich.console import Console
from rich.table import Table

KEPT = Path(__file__).resolve().parent / "results" / "bench.json"
HEADS = ("what", "ours", "against", "ratio", "target")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument("--readme", action="store_true", help="keep the figures and put the table into README.md")
    args = parser.parse_args()
    raw = json.loads(args.raw.read_text())
    record = {
        "command": "make bench", "date": raw["datetime"][:10], "machine": machine(), "torch": torch.__version__,
        "figures": {one["name"]: one["extra_info"] for one in raw["benchmarks"]},
    }  # fmt: skip
    cells = rows(record)
    table = Table(*HEADS)
    for row in cells:
        table.add_row(*row)
    Console(width=130).print(table)
    if args.readme:
        KEPT.write_text(json.dumps(record, indent=1) + "\n")
        lines = ["| " + " | ".join(HEADS) + " |", "|---|---:|---|---:|---:|"]
        lines += ["| " + " | ".join(row) + " |" for row in cells]
        lines += ["", f"`{record['command']}`, {record['date']}, {record['machine']['cores']} cores "
                  f"({record['machine']['cpu']}), PyTorch {record['torch']}."]  # fmt: skip
        block = re.compile(r"(<!-- bench -->\n).*?(<!-- /bench -->)", re.DOTALL)
        README.write_text(block.sub(lambda m: m[1] + "\n".join(lines) + "\n" + m[2], README.read_text()))


def rows(record):
    found = []
    for figures in record["figures"].values():
        for one in figures["comparisons"]:
            missed = "" if one["ratio"] <= one["target"] else ", missed"
            found.append((one["what"], _amount(one["ours"], one["unit"]), f"{one['against']}, "
                          f"{_amount(one['theirs'], one['unit'])}", f"{one['ratio']:.2f}",
                          f"{one['target']:g}{missed}"))  # fmt: skip
    return found


def _amount(value, unit):
    return f"{value:.3g} {unit}"


if __name__ == "__main__":
    main()
