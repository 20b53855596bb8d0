"""Time to quality: trains real tasks over thin links under every method, and says which gets there first.

    python benchmarks/train.py --quick               a part of it, under 10 minutes
    python benchmarks/train.py --full                everything: a night; goes on where it was interrupted
    python benchmarks/train.py --full --tasks digits --methods dense nominated-4
    python benchmarks/train.py --report              tables and pictures of what is there
    python benchmarks/train.py --list                tasks and methods

Two things are measured and put together. How good a model is after so many steps depends on the method and the seed,
not on the network: those runs are not shaped, and have --full's three seeds. How long a step takes is measured over
shaped links, methods in turns, medians and quartiles. Time to quality is the one times the other; a few runs are made
directly over shaped links to check that. Every method has the optimizer that was best for it in its task's grid, the
same grid for all (suite/tasks.py); --quick takes the ones found before.

Results are appended to train.jsonl, a line a run, with the machine, the versions and the code they were made with;
results of another machine or code are never put into one table with them.
"""
import argparse
import collections
import importlib.util
import itertools
import json
import sys
import tempfile
from pathlib import Path

from demo import _paths
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from suite import plan
from suite.ledger import Ledger, final_loss
from suite.methods import CONTESTANTS, DDP, HOROVOD
from suite.tasks import TASKS
from thinnet import ThinNet

HERE = Path(__file__).resolve().parent
COMMITTED = HERE / "results"
OPTIONS = COMMITTED / "train_options.json"
MOST_AT_ONCE = 24  # runs in one start of the ranks
TRIES = 2  # of a run that fails


def main() -> int:
    args = _arguments()
    console = Console()
    if args.list:
        _list(console)
        return 0
    path = args.out / "train.jsonl"
    if args.quick or args.full:
        ledger = Ledger(path)
        if ledger.others:
            console.print(f"{ledger.others} rows of {path} are of another machine or code: kept, and not counted")
        with _progress(console) as progress:
            runner = Runner(ledger, progress, args.patience)
            if args.full:
                if not args.no_tuning:
                    runner.run("tuning", plan.tuning(args.tasks, args.methods))
                best = Best(ledger)
                best.save()
                runner.run("full set", plan.everything(args.tasks, args.methods, best))
            else:
                runner.run("quick set", plan.quick(args.methods, Best(ledger)))
    from suite import report

    report.show(Ledger.of_newest(path), args.out, readme=args.readme)
    return 0


class Best:
    """Called with task and method: the options of the optimizer that did best in the grid, as JSON.

    Of this ledger's runs of the grid; else as committed; else as plain DDP's; else the grid's first.
    """

    def __init__(self, ledger: Ledger):
        self._found = json.loads(OPTIONS.read_text()) if OPTIONS.exists() else {}
        for row in ledger.find(kind="train", purpose="tune"):
            self._found.setdefault(row["task"], {})
        for task, method in itertools.product(TASKS, CONTESTANTS):
            rows = ledger.find(kind="train", purpose="tune", task=task, method=method)
            if rows and min(map(final_loss, rows)) < float("inf"):
                self._found[task][method] = json.loads(min(rows, key=final_loss)["options"])

    def __call__(self, task: str, method: str) -> str:
        found = self._found.get(task, {})
        return json.dumps(found.get(method) or found.get("dense") or TASKS[task].grid[0])

    def save(self) -> None:
        lines = [f'"{task}": {{\n  ' + ",\n  ".join(f'"{m}": {json.dumps(o)}' for m, o in found.items()) + "\n}"
                 for task, found in self._found.items()]  # fmt: skip
        OPTIONS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


class Runner:
    """Does the runs that are not yet in the ledger, those of one network and one front door in one start."""

    def __init__(self, ledger: Ledger, progress: Progress, patience: float):
        self.ledger, self.progress, self.patience = ledger, progress, patience
        self._tries = collections.Counter()

    def run(self, what: str, runs) -> None:
        waiting = [run for run in runs if not self.ledger.has(run)]
        bar = self.progress.add_task(what, total=len(waiting))
        for (ranks, mbit), same in itertools.groupby(waiting, key=lambda run: (run.ranks, run.mbit)):
            same = list(same)
            with ThinNet(ranks, mbit) as net:
                if mbit and not net.shaped:
                    raise SystemExit(f"links cannot be shaped here: {net.why}")
                for door in (DDP, HOROVOD):
                    behind = [run for run in same if run.for_rank()["door"] == door]
                    for batch in (behind[i : i + MOST_AT_ONCE] for i in range(0, len(behind), MOST_AT_ONCE)):
                        while batch:
                            done = self._start(net, batch, bar)
                            batch = batch[done:]

    def _start(self, net, runs, bar) -> int:
        """Start the ranks once, for some runs; how many of them are in the ledger now."""
        state = {"begun": 0, "ended": 0, "rows": []}
        complaints = []

        def on_line(rank, line, stream):
            said = _parsed(line) if rank == 0 and stream == "stdout" else None
            if said is None:
                complaints.append(f"[{rank}] {line}")
            elif "begin" in said:
                state["begun"] = said["begin"]
                run = runs[said["begin"]]
                self.progress.update(bar, description=_described(run))
            elif "end" in said:
                run = runs[said.pop("end")]
                rows = state["rows"] or [said | {"method": run.methods[0]}]
                for row in rows:
                    method = row.pop("method")
                    self.ledger.add(run.key(method), {"status": "done"} | row)
                state["rows"] = []
                state["ended"] += 1
                self.progress.advance(bar)
            else:
                state["rows"].append(said)

        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump([run.for_rank() for run in runs], file)
            file.flush()
            command = [sys.executable, str(HERE / "train_rank.py"), file.name, "--patience", str(self.patience)]
            status = net.run(command, env=_paths(), on_line=on_line)
        if status == 0 and state["ended"] == len(runs):
            return len(runs)
        broken = runs[min(state["ended"], len(runs) - 1)]
        what = "hung" if any("Timeout (" in line for line in complaints) else "failed"  # faulthandler's word for it
        self.progress.console.print(f"{_described(broken)}: {what}", *complaints[-5:], sep="\n", highlight=False)
        self._tries[broken] += 1
        if self._tries[broken] < TRIES:
            return state["ended"]
        # Written down, so that the set goes on without it.
        for method in broken.methods:
            self.ledger.add(broken.key(method), {"status": what, "complaints": complaints[-20:]})
        self.progress.advance(bar)
        return state["ended"] + 1


def _parsed(line):
    try:
        said = json.loads(line)
    except ValueError:
        return None
    return said if isinstance(said, dict) else None


def _described(run):
    rate = f"{run.mbit:g} Mbit/s" if run.mbit else "unshaped"
    what = run.methods[0] if len(run.methods) == 1 else f"{len(run.methods)} methods in turns"
    return f"{run.kind} {run.task}, {what}, {run.ranks} ranks, {rate}"


def _progress(console):
    return Progress(
        TextColumn("{task.description}", justify="left"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left:"), TimeRemainingColumn(), console=console, refresh_per_second=1,
    )  # fmt: skip


def _list(console):
    console.print("[bold]tasks[/]")
    for name, task in TASKS.items():
        console.print(f"  {name:22} {task.label}: {task.steps} steps, grid of {len(task.grid)}", highlight=False)
    console.print("[bold]methods[/]")
    for name, contestant in CONTESTANTS.items():
        console.print(f"  {name:22} {contestant.label} ({contestant.door})", highlight=False)


def _arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--quick", action="store_true", help="one task, a few methods, one seed")
    what.add_argument("--full", action="store_true", help="every task, method, rate and number of ranks")
    what.add_argument("--report", action="store_true", help="measure nothing")
    what.add_argument("--list", action="store_true")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--methods", nargs="+", choices=CONTESTANTS, metavar="METHOD", help="(default: all)")
    parser.add_argument("--no-tuning", action="store_true", help="take the options found before")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results", help="folder (default: results)")
    parser.add_argument("--readme", action="store_true", help="rewrite README.md's tables from what is shown")
    parser.add_argument("--patience", type=float, default=60, help="seconds without a step that make a hang")
    args = parser.parse_args()
    every = [name for name, contestant in CONTESTANTS.items() if contestant.trains]
    args.methods = args.methods or (list(plan.QUICK) if args.quick else every)
    if importlib.util.find_spec("horovod") is None and not args.report:
        print("Horovod is not installed (make horovod): its methods are left out", file=sys.stderr)
        args.methods = [method for method in args.methods if CONTESTANTS[method].door == DDP]
    args.out = args.out.resolve()
    return args


if __name__ == "__main__":
    sys.exit(main())
