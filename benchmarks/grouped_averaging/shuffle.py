"""Divide-and-Shuffle measured: its speed on thin networks, also with a slow rank or link, and its quality.

    python benchmarks/grouped_averaging/shuffle.py speed       8 ranks at 100 Mbit/s and 1 Gbit/s, about 25 minutes
    python benchmarks/grouped_averaging/shuffle.py quality     4 ranks, 3 seeds, some minutes
    python benchmarks/grouped_averaging/shuffle.py --docs      docs/tables from the committed results

Results go to results/shuffle_speed.json and results/shuffle_quality.json. In a slowed condition, "felt" is how much
longer the other ranks' steps became, as a share of how much longer plain DDP's became. All methods make the same
number of steps between two barriers. A rank that is always slow ends up setting the pace of all, whatever the groups,
because its group waits for it, and then theirs: where less is felt, that is the start of the turn.
"""
import argparse
import statistics
import sys
from pathlib import Path

from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common.ranks import rows_of
from common.record import RESULTS, load, origin, print_table, save, write_table
from thinnet import ThinNet

from grouped_averaging.shuffle_rank import QUALITY, SPEED, TASKS

SCRIPT = Path(__file__).resolve().with_name("shuffle_rank.py")
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
    parser.add_argument("what", nargs="?", choices=["speed", "quality"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="Mbit/s (default 100 1000)")
    parser.add_argument("--steps", type=int, default=16, help="steps between two barriers (default 16)")
    parser.add_argument("--docs", action="store_true", help="only write docs/tables from what is committed")
    args = parser.parse_args()
    if args.docs:
        return write_tables()
    if args.what is None:
        parser.error("expected speed, quality or --docs")
    rows = measure_speed(args.rates, args.steps) if args.what == "speed" else measure_quality()
    save(f"shuffle_{args.what}", f"python benchmarks/grouped_averaging/shuffle.py {args.what}", rows, args.out,
         steps=args.steps)  # fmt: skip
    print_table(*WHAT[args.what](rows), left=2)


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


WHAT = {"speed": speed_table, "quality": quality_table}


def write_tables():
    for what, table in WHAT.items():
        record = load(f"shuffle_{what}")
        write_table(f"shuffle_{what}", *table(record["rows"]), origin(record), left=2)


if __name__ == "__main__":
    sys.exit(main())
