"""Turns the record of ``make bench`` into tables: ratios against their targets, and every operator's speed.

    make bench                                                            runs the benchmarks and prints the tables
    python benchmarks/operators/table.py results/bench_raw.json --keep    as benchmarks/results/bench.json, too
    python benchmarks/operators/table.py --add results/bench_gpu.json     beside what is kept, as make gpu made it
    python benchmarks/operators/table.py --docs                           docs/tables from what is kept

Several records become one; of equal names the last counts.
"""
import argparse
import json
import platform
import sys
from pathlib import Path

import thinwire
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common import record

TARGETS = ("what", "ours", "against", "ratio", "target")
OPERATORS = ("operator", "on", "gradient", "GB/s", "of a copy's", "times the reference's", "times PyTorch's own")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, nargs="*", help="what pytest --benchmark-json wrote")
    parser.add_argument("--keep", action="store_true", help="write the figures into benchmarks/results/bench.json")
    parser.add_argument("--add", type=Path, metavar="RAW", help="what make gpu wrote: beside the figures that are kept")
    parser.add_argument("--docs", action="store_true", help="only write docs/tables from what is committed")
    args = parser.parse_args()
    if args.docs:
        return write_tables(record.load("bench"))
    if args.add:
        kept, added = record.load("bench"), json.loads(args.add.read_text())
        kept["figures"] |= figures_of(added, command="make gpu")
        return keep(kept)
    if not args.raw:
        parser.error("no record: expected what pytest --benchmark-json wrote, or --docs")
    raws = [json.loads(path.read_text()) for path in args.raw]
    kept = {
        "command": "make bench", "date": raws[0]["datetime"][:10], "machine": record.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "thinwire": thinwire.__version__},
        "figures": {name: one for raw in raws for name, one in figures_of(raw).items()},
    }  # fmt: skip
    record.print_table(TARGETS, target_rows(kept))
    record.print_table(OPERATORS, operator_rows(kept))
    if args.keep:
        keep(kept)


def figures_of(raw, **about):
    """What one record of pytest-benchmark holds, by name."""
    return {one["name"]: one["extra_info"] | {"date": raw["datetime"][:10], **about} for one in raw["benchmarks"]}


def write_tables(kept):
    record.write_table("bench", TARGETS, target_rows(kept), record.origin(kept))
    record.write_table("operators", OPERATORS, operator_rows(kept), operators_origin(kept))


def target_rows(kept):
    found = []
    for figures in kept["figures"].values():
        for one in figures.get("comparisons", ()):
            missed = "" if one["ratio"] <= one["target"] else ", missed"
            found.append((one["what"], _amount(one["ours"], one["unit"]), f"{one['against']}, "
                          f"{_amount(one['theirs'], one['unit'])}", f"{one['ratio']:.2f}",
                          f"{one['target']:g}{missed}"))  # fmt: skip
    return found


def operator_rows(kept):
    """The last three columns are speeds too: the operator's, divided by another's."""
    found = [figures["operator"] for figures in kept["figures"].values() if "operator" in figures]
    return [(one["name"], one["device"], _size(one["megabytes"]), f"{one['gb_per_second']:.3g}",
             f"{one['of_copy']:.2f}", _times(one["over_reference"]),
             f"{one['over_torch']:.3g}, {one['torch_operator']}") for one in found]  # fmt: skip


def operators_origin(kept):
    """The line under the operators' table: every device that was measured, with what and when."""
    devices = set()
    for figures in kept["figures"].values():
        if one := figures.get("operator"):
            name = f"{kept['machine']['cpu']}, {one['on']}" if one["device"] == "cpu" else one["on"]
            command = figures.get("command", kept["command"])
            devices.add(f"{one['device']}: `{command}`, {name}, PyTorch {one['torch']}, {figures['date']}")
    return f"{'; '.join(sorted(devices))}."


def keep(kept):
    """One line a figure."""
    lines = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(one)}" for name, one in kept["figures"].items())
    about = json.dumps({key: value for key, value in kept.items() if key != "figures"})
    (record.RESULTS / "bench.json").write_text(f'{about[:-1]},\n "figures": {{\n  {lines}\n}}}}\n')


def _size(megabytes):
    return f"{megabytes} MB" if megabytes < 1000 else f"{megabytes // 1000} GB"


def _times(value):
    """How many times, where that was measured."""
    return "-" if value is None else f"{value:.3g}"


def _amount(value, unit):
    return f"{value:.3g} {unit}"


if __name__ == "__main__":
    main()
