"""Divide-and-Shuffle measured: its speed on thin networks, also with a slow rank or link, and its quality.

    python benchmarks/shuffle.py speed                  8 ranks at 100 Mbit/s and 1 Gbit/s, about 25 minutes
    python benchmarks/shuffle.py quality                4 ranks, 3 seeds, some minutes
    python benchmarks/shuffle.py readme                 puts the tables of the committed results into README.md

Results go to results/shuffle_speed.json and results/shuffle_quality.json. In a slowed condition, "felt" is how much
longer the other ranks' steps became, as a share of how much longer plain DDP's became. All methods make the same
number of steps between two barriers. A rank that is always slow ends up setting the pace of all, whatever the groups,
because its group waits for it, and then theirs: where less is felt, that is the start of the turn.
"""
import argparse
import datetime
import json
import platform
import re
import statistics
import sys
from pathlib import Path

import thinwire
import torch
from demo import README, machine
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rows import rows_of
from shuffle_rank import QUALITY, SPEED, TASKS
from thinnet import ThinNet

HERE = Path(__file__).resolve().parent
SCRIPT, RESULTS = HERE / "shuffle_rank.py", HERE / "results"
RANKS, SLOW_RANK = 8, 3
RATES = (100, 1000)
SEEDS = (0, 1, 2)
CONDITIONS = {
    "nothing slowed": [],
    "one rank sleeps 0.5 s in every step": ["--straggler", SLOW_RANK, "--sleep", 0.5],
    "another rank sleeps 0.5 s in each step": ["--straggler", "random", "--sleep", 0.5],
    "one link at a tenth": [],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "quality", "readme"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="Mbit/s (default 100 1000)")
    parser.add_argument("--steps", type=int, default=16, help="steps between two barriers (default 16)")
    args = parser.parse_args()
    if args.what == "readme":
        return write_readme()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = measure_speed(args.rates, args.steps) if args.what == "speed" else measure_quality()
    record = {
        "steps": args.steps, "command": f"python benchmarks/shuffle.py {args.what}", "machine": machine(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "thinwire": thinwire.__version__},
        "rows": rows,
    }  # fmt: skip
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    head = json.dumps({key: value for key, value in record.items() if key != "rows"})[:-1]
    (args.out / f"shuffle_{args.what}.json").write_text(f'{head},\n "rows": [\n  {lines}\n]}}\n')
    heads, cells = speed_table(rows) if args.what == "speed" else quality_table(rows)
    table = Table()
    for i, one in enumerate(heads):
        table.add_column(one, justify="right" if i > 1 else "left")
    for row in cells:
        table.add_row(*row)
    Console(width=140).print(table)


def measure_speed(rates, steps):
    rows = []
    for rate, (condition, options) in track([(r, c) for r in rates for c in CONDITIONS.items()], "conditions"):
        with ThinNet(ranks=RANKS, mbit=rate) as net:
            if not net.shaped:
                raise SystemExit(f"the network cannot be shaped here: {net.why}")
            if condition == "one link at a tenth":
                net.shape(rank=SLOW_RANK, mbit=rate / 10)
            for said in rows_of(net, SCRIPT, ["speed", "--steps", steps, *options]):
                rows.append({"mbit": rate, "condition": condition} | said)
    return rows


def measure_quality():
    rows = []
    runs = [(task, seed, method) for task in TASKS for seed in SEEDS for method in QUALITY]
    with ThinNet(ranks=4, mbit=0) as net:
        for task, seed, method in track(runs, "runs"):
            rows += rows_of(net, SCRIPT, ["quality", "--task", task, "--seed", seed, "--method", method])
    return rows


def speed_table(rows):
    heads = ("network", "what is slowed", *(name for name in SPEED if name != "noop"))
    cells = []
    for rate in sorted({row["mbit"] for row in rows}):
        at_rate = {(row["condition"], row["method"]): row for row in rows if row["mbit"] == rate}
        sent = [at_rate["nothing slowed", name]["sent"] for name in heads[2:]]
        for condition in CONDITIONS:
            if (condition, "noop") not in at_rate:
                continue
            steps = [at_rate[condition, name]["step_ms"] for name in heads[2:]]
            base = [at_rate["nothing slowed", name]["step_ms"] for name in heads[2:]]
            text = [f"{step:.0f} ms" for step in steps]
            if condition != "nothing slowed":
                felt = [(step - was) / (steps[0] - base[0]) for step, was in zip(steps, base)]
                text = [f"{one}, felt {share:.2f}" for one, share in zip(text, felt)]
            else:
                text = [f"{one}, {byte / 1e6:.3g} MB" for one, byte in zip(text, sent)]
            cells.append((f"{rate:g} Mbit/s", condition, *text))
    return heads, cells


def quality_table(rows):
    heads = ("task", "method", "single replica", "average of all")
    cells = []
    for name, task in TASKS.items():
        for method in QUALITY:
            mine = [row for row in rows if (row["task"], row["method"]) == (name, method)]
            cells.append((task.label, method, *(_spread([row.get(key) for row in mine])
                                                 for key in ("single replica", "average"))))  # fmt: skip
    return heads, cells


def _spread(values):
    if None in values:
        return "-"
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def write_readme():
    text = README.read_text()
    for what, table in (("speed", speed_table), ("quality", quality_table)):
        record = json.loads((RESULTS / f"shuffle_{what}.json").read_text())
        heads, cells = table(record["rows"])
        lines = ["| " + " | ".join(heads) + " |", "|---|---" + "|---:" * (len(heads) - 2) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in cells]
        lines += ["", f"`{record['command']}`, {record['date']}, {record['machine']['cores']} cores "
                  f"({record['machine']['cpu']}), PyTorch {record['versions']['torch']}."]  # fmt: skip
        block = re.compile(rf"(<!-- shuffle {what} -->\n).*?(<!-- /shuffle {what} -->)", re.DOTALL)
        if not block.search(text):
            raise SystemExit(f"README.md has no block <!-- shuffle {what} --> ... <!-- /shuffle {what} -->")
        text = block.sub(lambda m, lines=lines: m[1] + "\n".join(lines) + "\n" + m[2], text)
    README.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
