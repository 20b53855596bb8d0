"""Time to quality: trains real tasks over thin links under every method, and says which gets there first.

    python benchmarks/suite/train.py --quick               a part of it, under 10 minutes
    python benchmarks/suite/train.py --full                everything, most of a day; goes on where it was interrupted
    python benchmarks/suite/train.py --full --tasks digits --methods dense nominated-4
    python benchmarks/suite/train.py --report              tables and pictures of what is there (in results/;
                                                           those that come with the project: --out benchmarks/results)
    python benchmarks/suite/train.py --list                tasks and methods

Two things are measured and put together. How good a model is after so many steps depends on the method and the seed,
not on the network: those runs are not shaped, and have --full's three seeds. How long a step takes is measured over
shaped links, methods in turns. Time to quality is the one times the other; a few runs are made directly over shaped
links to check that. Every method has the optimizer that was best for it in its task's grid, the same grid for all
(tasks.py), on a seed that is not shown; --quick takes the ones found before.

epfml's own PowerSGD is not among the methods: the package index has powersgd 0.0.2, and no code is in it.

Results are appended to train.jsonl, a line a run, with the machine, the versions and the code they were made with;
results of other ones are never put into one table with them. Have nothing else run on the machine.
"""
import argparse
import collections
import importlib.util
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common.ranks import import_paths
from common.record import OWN_RESULTS, RESULTS
from thinnet import ThinNet

from suite import plan
from suite.ledger import Ledger, data, final_loss
from suite.methods import CONTESTANTS, DDP, HOROVOD
from suite.tasks import TASKS

RANK = Path(__file__).resolve().with_name("train_rank.py")
OPTIONS = RESULTS / "train_options.json"
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
        try:
            _measure(args, Ledger(path), console)
        except KeyboardInterrupt:
            console.print(f"Interrupted. What is done is in {path}; the same command goes on from there.")
            return 130
    from suite import report

    report.show(Ledger.of_newest(path), args.out, docs=args.docs)
    console.print(f"All of it is in {args.out}: train.md and three pictures", highlight=False)
    return 0


def _measure(args, ledger, console):
    if ledger.others:
        console.print(f"{ledger.others} rows of {ledger.path} are of other machines, versions, code, data or tasks: "
                      "kept, and not counted")  # fmt: skip
    with _progress(console) as progress:
        runner = Runner(ledger, progress, args.patience, args.retry_failed)
        if args.full:
            if not args.no_tuning:
                runner.run("tuning", plan.tuning(args.tasks, args.methods))
            best = Best(ledger, OPTIONS, args.out / OPTIONS.name)
            best.save(args.out / OPTIONS.name)
            runner.run("full set", plan.everything(args.tasks, args.methods, best))
        else:
            runner.run("quick set", plan.quick(args.methods, Best(ledger, OPTIONS)))


class Best:
    """Called with task and method: the options of the optimizer, as JSON, and the method that they were found for.

    Those that did best in this ledger's runs of the whole grid; else those found before with the same data and model;
    else plain DDP's, where the method allows them; else the grid's first, found for none.
    """

    def __init__(self, ledger: Ledger, *before: Path):
        self._found = {}
        for path in before:
            for task, found in (json.loads(path.read_text()) if path.exists() else {}).items():
                if task in TASKS and found["data"] == data(task):
                    self._found.setdefault(task, {}).update(found["options"])
        for task, method in itertools.product(TASKS, CONTESTANTS):
            tried = {row["options"]: row for row in ledger.find(kind="train", purpose="tune", task=task, method=method)}
            wanted = {run.options for run in plan.tuning([task], [method])}
            if wanted and wanted <= set(tried) and min(map(final_loss, tried.values())) < float("inf"):
                best = min((tried[options] for options in wanted), key=final_loss)
                self._found.setdefault(task, {})[method] = json.loads(best["options"])

    def __call__(self, task: str, method: str) -> tuple[str, str]:
        found, grid = self._found.get(task, {}), plan.grid(task, method)
        for of in (method, "dense"):
            if found.get(of) in grid:
                return json.dumps(found[of]), of
        return json.dumps(grid[0]), "none"

    def save(self, path: Path) -> None:
        lines = [f'"{task}": {{"data": "{data(task)}", "options": {{\n  '
                 + ",\n  ".join(f'"{m}": {json.dumps(o)}' for m, o in found.items()) + "\n}}"
                 for task, found in self._found.items()]  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


class Runner:
    """Does the runs that are not yet in the ledger, those of one network and one front door in one start."""

    def __init__(self, ledger: Ledger, progress: Progress, patience: float, retry: bool = False):
        self.ledger, self.progress, self.patience, self.retry = ledger, progress, patience, retry
        self._tries = collections.Counter()

    def run(self, what: str, runs) -> None:
        runs = list(runs)
        waiting = [run for run in runs if not self.ledger.has(run, failed_too=not self.retry)]
        if len(waiting) < len(runs):
            self.progress.console.print(f"{what}: {len(runs) - len(waiting)} of {len(runs)} runs are there already")
        bar = self.progress.add_task(what, total=sum(run.weight for run in waiting))
        for (ranks, mbit), same in itertools.groupby(waiting, key=lambda run: (run.ranks, run.mbit)):
            same = list(same)
            with ThinNet(ranks, mbit) as net:
                if mbit and not net.shaped:
                    raise SystemExit(f"links cannot be shaped here: {net.why}")
                for door in (DDP, HOROVOD):
                    behind = [run for run in same if run.for_rank()["door"] == door]
                    while behind:
                        behind = self._start(net, behind[:MOST_AT_ONCE], bar) + behind[MOST_AT_ONCE:]

    def _start(self, net, runs, bar) -> list[plan.Run]:
        """Start the ranks once, for some runs; those of them that are still to be done."""
        said = Said(runs)
        busy = _busy() if any(run.timed for run in runs) else None
        before, kept = self.ledger.is_current(), 0

        def on_line(rank, line, stream):
            nonlocal kept
            said.take(rank, line, stream)
            self.progress.update(bar, description=_described(runs[said.at]))
            if said.ended > kept:
                if not (before and self.ledger.is_current()):
                    raise SystemExit("what the ranks run was changed while they ran it: nothing of that is kept")
                for key, result in said.rows:
                    self.ledger.add(key, {"status": "done", "busy_before": busy} | result)
                self.progress.advance(bar, runs[kept].weight)
                kept = said.ended

        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump([run.for_rank() for run in runs], file)
            file.flush()
            command = [sys.executable, str(RANK), file.name, "--patience", str(self.patience)]
            status = net.run(command, env=import_paths(), on_line=on_line)
        if kept == len(runs):
            if status:
                self.progress.console.print(f"the ranks ended with {status} after all was done", *said.complaints[-5:],
                                            sep="\n", highlight=False, markup=False)  # fmt: skip
            return []
        return self._after_a_failure(runs[kept:], said, bar)

    def _after_a_failure(self, runs, said, bar):
        """A run has another try. Then it is written down as failed, of methods in turns the one whose turn it was."""
        broken = runs[0]
        what = "hung" if any("Timeout (" in line for line in said.complaints) else "failed"  # faulthandler's word
        self.progress.console.print(
            f"{_described(broken)}: {what}", *said.complaints[-5:], sep="\n", highlight=False, markup=False
        )
        self._tries[broken] += 1
        if self._tries[broken] < TRIES:
            return runs
        method = said.turn or broken.methods[0]
        self.ledger.add(broken.key(method), {"status": what, "complaints": said.complaints[-20:]})
        rest = broken.without(method)
        self.progress.advance(bar, broken.weight - (rest.weight if rest else 0))
        return ([rest] if rest else []) + runs[1:]


class Said:
    """What the ranks of one start say. at, ended: which run is under way, and how many have ended; rows: (key, result)
    of the last one that has; turn: whose it is, where methods take turns; complaints: all else that was printed."""

    def __init__(self, runs: list[plan.Run]):
        self.runs, self.at, self.ended, self.turn = runs, 0, 0, None
        self.rows, self.complaints = [], []
        self._coming = []

    def take(self, rank: int, line: str, stream: str) -> None:
        said = _parsed(line) if rank == 0 and stream == "stdout" else None
        if said is None:
            self.complaints.append(f"[{rank}] {line}")
        elif "begin" in said:
            self.at, self.turn, self._coming = said["begin"], None, []
        elif "turn" in said:
            self.turn = said["turn"]
        elif "end" in said:
            run = self.runs[said.pop("end")]
            results = self._coming or [said | {"method": run.methods[0]}]
            self.rows = [(run.key(result.pop("method")), result) for result in results]
            self.ended, self.turn = self.ended + 1, None
        else:
            self._coming.append(said)


def _busy() -> float:
    """The share of the processors' time that goes to other work, over one second."""
    def now():
        numbers = [int(n) for n in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        return sum(numbers), numbers[3] + numbers[4]

    before = now()
    time.sleep(1)
    passed = [b - a for a, b in zip(before, now())]
    return round(1 - passed[1] / max(1, passed[0]), 3)


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
        TextColumn("{task.description}", justify="left"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
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
    parser.add_argument("--retry-failed", action="store_true", help="what failed or hung before is run again")
    parser.add_argument("--no-tuning", action="store_true", help="take the options found before")
    parser.add_argument("--out", type=Path, default=OWN_RESULTS, help="folder (default: results)")
    parser.add_argument("--docs", action="store_true", help="write docs/tables from what is shown")
    parser.add_argument("--patience", type=float, default=60, help="seconds without a step that make a hang")
    args = parser.parse_args()
    every = [name for name, contestant in CONTESTANTS.items() if contestant.trains]
    args.methods = args.methods or (list(plan.QUICK) if args.quick else every)
    of_ddp = [method for method in args.methods if CONTESTANTS[method].door == DDP]
    if (args.full or args.quick) and of_ddp != args.methods and importlib.util.find_spec("horovod") is None:
        print("Horovod is not installed (make horovod): its methods are left out", file=sys.stderr)
        args.methods = of_ddp
    args.out = args.out.resolve()
    return args


if __name__ == "__main__":
    sys.exit(main())
