"""Finds each method's optimizer for run.py, by one rule for all, on a seed that the demo does not show.

    python benchmarks/demo/tune.py                      what is missing; goes on where it was stopped
    python benchmarks/demo/tune.py --methods dense      a part of it

A method is trained at the demo's own size for as many steps as the demo's time allows it on its network (STEPS), on
an unshaped one, where a step takes no longer than it computes. The winner is the lowest held-out loss at the end, and
the search ends when its neighbours in learning rate and in beta1 have been tried. Results go to results/tuning.json,
one line a run; rank.py has the best, which a test compares.
"""
import argparse
import json
import math
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common import record
from common.ranks import import_paths
from thinnet import ThinNet

RANK = Path(__file__).resolve().with_name("rank.py")
# What 34 s over 100 Mbit/s links allow, to a tenth or so: results/demo.json.
STEPS = {
    "dense": 19, "fp16": 34, "paper": 34, "powersgd-1": 180, "powersgd-4": 140, "nominated-4": 180,
    "nominated-16": 170, "local-8": 190, "local-16": 215,
}  # fmt: skip
SEED = 0
RATES, BETAS1 = (3.125e-5, 6.25e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3, 3e-3, 1e-2, 3e-2), (0.0, 0.5, 0.9)
FIRST = (1e-3, 0.5)  # where a search begins


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--out", type=Path, default=record.RESULTS / "tuning.json")
    args = parser.parse_args()
    console = Console()
    runs = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    with ThinNet(ranks=4, mbit=0) as net:
        for method in args.methods:
            while missing := untried(runs, method):
                runs.append(_run(net, method, missing[0]))
                console.print(runs[-1], highlight=False)
                _save(runs, args.out)
    console.print(_table(runs))


def best(runs: list[dict], method: str) -> dict | None:
    """The run of a method that ended at the lowest held-out loss."""
    done = [run for run in runs if run["method"] == method and run["loss"] is not None]
    return min(done, key=lambda run: run["loss"], default=None)


def untried(runs: list[dict], method: str) -> list[tuple[float, float]]:
    """Learning rates and beta1 that are to be tried before the best of a method counts as found: its neighbours.

    A best rate at the end of RATES has a neighbour that is not in it, so that no test passes before RATES is longer.
    """
    found = best(runs, method)
    if found is None:
        return [FIRST]
    rate, beta1 = point(found)
    at, above = RATES.index(rate), BETAS1.index(beta1)
    rates = [RATES[i] if 0 <= i < len(RATES) else math.nan for i in (at - 1, at + 1)]
    betas1 = [BETAS1[i] for i in (above - 1, above + 1) if 0 <= i < len(BETAS1)]
    tried = {point(run) for run in runs if run["method"] == method}
    return [one for one in [*((r, beta1) for r in rates), *((rate, b) for b in betas1)] if one not in tried]


def point(run: dict) -> tuple[float, float]:
    """A run's learning rate and beta1."""
    return run["options"]["lr"], run["options"]["betas"][0]


def _run(net, method, where):
    rate, beta1 = where
    if math.isnan(rate):
        raise SystemExit(f"{method}: its best learning rate is at the end of RATES; make them more")
    options, losses = {"lr": rate, "betas": [beta1, 0.95]}, []

    def on_line(rank, line, stream):
        if rank == 0 and line.startswith('{"event": "loss"'):
            losses.append(json.loads(line)["loss"])
        elif stream == "stderr":
            print(line, file=sys.stderr)

    command = [sys.executable, str(RANK), "--method", method, "--seconds", "10000", "--steps", str(STEPS[method]),
               "--options", json.dumps(options), "--seed", str(SEED)]  # fmt: skip
    status = net.run(command, env=import_paths(), on_line=on_line)
    loss = losses[-1] if status == 0 else None
    return {"method": method, "options": options, "steps": STEPS[method], "seed": SEED, "loss": loss}


def _save(runs, path):
    about = {"command": "python benchmarks/demo/tune.py", "machine": record.machine(), "date": record.today()}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(run) for run in runs)
    path.write_text(f'{{"about": {json.dumps(about)},\n "runs": [\n  {lines}\n]}}\n')


def _table(runs):
    table = Table(title="Held-out loss at the end, by method; the best of each first")
    for column in ("method", "learning rate", "beta1", "steps", "loss"):
        table.add_column(column)
    for run in sorted(runs, key=lambda run: (run["method"], run["loss"] is None, run["loss"])):
        rate, beta1 = point(run)
        table.add_row(run["method"], f"{rate:g}", f"{beta1:g}", str(run["steps"]), f"{run['loss']}")
    return table


if __name__ == "__main__":
    main()
