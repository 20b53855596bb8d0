"""Finds each method's optimizer for run.py, over one grid for all, and the knobs of our own best method.

    python benchmarks/demo/tune.py                      the grid, about 40 minutes; goes on where it was stopped
    python benchmarks/demo/tune.py --methods dense      a part of it

Every method is trained at the demo's own size for as many steps as the demo's time allows it on its network
(STEPS), on an unshaped one, where a step takes no longer than it computes. The winner is the lowest held-out loss at
the end. The lowest rate was run for PowerSGD only, whose best was at the grid's edge without it. Results go to
results/tuning.json, one line a run; choosing from them is done by hand, in rank.py.
"""
import argparse
import itertools
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common import record
from common.ranks import import_paths
from thinnet import ThinNet

RANK = Path(__file__).resolve().with_name("rank.py")
# What 34 s over 100 Mbit/s links allow, from results/demo.json.
STEPS = {"dense": 19, "fp16": 34, "paper": 34, "powersgd": 180, "best": 180}
RATES, BETAS1 = (1e-3, 3e-3, 1e-2, 5e-4, 2.5e-4, 1.25e-4), (0.0, 0.5, 0.9)
GRID = [{"lr": lr, "betas": [beta1, 0.95]} for lr, beta1 in itertools.product(RATES, BETAS1)]
KNOBS = [{"density": density, "block_size": size} for density, size in itertools.product((0.01, 0.02, 0.04), (16, 64))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--out", type=Path, default=record.RESULTS / "tuning.json")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    console = Console()
    runs = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    with ThinNet(ranks=4, mbit=0) as net:
        for method in args.methods:
            for options in GRID:
                _run(net, args, runs, method, options, {}, console)
        if "best" in args.methods:
            options = _best(runs, "best", knobs={})["options"]
            for knobs in KNOBS:
                _run(net, args, runs, "best", options, knobs, console)
    console.print(_table(runs))


def _run(net, args, runs, method, options, knobs, console):
    setting = {"method": method, "options": options, "knobs": knobs, "steps": STEPS[method], "seed": args.seed}
    if any({key: run[key] for key in setting} == setting for run in runs):
        return
    losses = []

    def on_line(rank, line, stream):
        if rank == 0 and line.startswith('{"event": "loss"'):
            losses.append(json.loads(line)["loss"])

    command = [sys.executable, str(RANK), "--method", method, "--seconds", "1000", "--steps",
               str(STEPS[method]), "--options", json.dumps(options), "--knobs", json.dumps(knobs) if knobs else "{}",
               "--seed", str(args.seed)]  # fmt: skip
    status = net.run(command, env=import_paths(), on_line=on_line)
    runs.append(setting | {"loss": losses[-1] if status == 0 else None})
    console.print(runs[-1], highlight=False)
    about = {"command": "python benchmarks/demo/tune.py", "machine": record.machine(), "date": record.today()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(run) for run in runs)
    args.out.write_text(f'{{"about": {json.dumps(about)},\n "runs": [\n  {lines}\n]}}\n')


def _best(runs, method, **also):
    wanted = {"method": method} | also
    done = [run for run in runs if run["loss"] is not None and all(run[key] == value for key, value in wanted.items())]
    return min(done, key=lambda run: run["loss"])


def _table(runs):
    table = Table(title="Held-out loss at the end, by method; the best of each first")
    for column in ("method", "options", "knobs", "steps", "loss"):
        table.add_column(column)
    ordered = sorted(runs, key=lambda run: (run["method"], run["loss"] is None, run["loss"]))
    for run in ordered:
        table.add_row(run["method"], str(run["options"]), str(run["knobs"]), str(run["steps"]), str(run["loss"]))
    return table


if __name__ == "__main__":
    main()
