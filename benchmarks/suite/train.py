"""Trains every task of the suite under every way: the losses, of which a network's speed is no part.

    python benchmarks/suite/train.py                       all of it, some days on two cores; it goes on where it was
    python benchmarks/suite/train.py --minutes 60          none begun after an hour: the most important ones are first
    python benchmarks/suite/train.py --tasks clicks --methods ddp local-16 --out results
    python benchmarks/suite/train.py --left                how much is left, and how long it will take
    python benchmarks/suite/train.py --quick --out results     a few short runs: two minutes

Every training is a line of losses.jsonl, appended when it is done, with what it was measured with. All ranks are on
this machine and nothing is shaped, since a loss does not depend on the network; how long a step takes is measured by
steps.py, and report.py puts the two together. A learning rate rises at first and then falls to 0. Settings are searched
for by one rule for all, on a seed of its own: plan.py has the rule, and the order of what is trained.
"""
import argparse
import dataclasses
import statistics
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common.loopback import Team
from common.provenance import about
from common.record import RESULTS, append, print_table, read_rows, today

from suite import report
from suite.outcomes import LOSSES, Outcomes
from suite.plan import STAGES, Plan, expected, quick
from suite.tasks import TASKS
from suite.train_rank import digest
from suite.ways import WAYS

SCRIPT = Path(__file__).resolve().with_name("train_rank.py")
RANKS = 4
STEP_S = 0.07  # of a step that was never measured here


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where new rows go; those committed count, too")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK",
                        help=f"of {', '.join(TASKS)}")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=WAYS, default=list(WAYS), metavar="METHOD",
                        help=f"of {', '.join(WAYS)}")  # fmt: skip
    parser.add_argument("--steps", type=int, help="of every run, in the place of its task's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of 4 ranks with a thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--text", type=Path, help="the folder of another Python's standard library, to train on")
    parser.add_argument("--quick", action="store_true", help="a few short runs, with the settings that were found")
    parser.add_argument("--left", action="store_true", help="measure nothing, say what is left")
    args = parser.parse_args()
    stages = [dataclasses.replace(stage, methods=tuple(m for m in stage.methods if m in args.methods))
              for stage in STAGES if stage.task in args.tasks]  # fmt: skip
    measurement = Measurement(args, stages)
    if not args.quick:
        print(measurement.left(), flush=True)
    if args.left:
        return
    measurement.run()
    if args.quick:
        print_table(*report.few(measurement.rows[-len(measurement.fixed):]))
    else:
        print_table(*report.losses(Outcomes(measurement.rows, [], stages)), left=2)


def there(out):
    """What is committed, and what was measured since."""
    places = dict.fromkeys([RESULTS.resolve(), out.resolve()])
    return [row for place in places for row in read_rows(place / f"{LOSSES}.jsonl")]


class Measurement:
    """Several teams of ranks, each of which takes the most important run that nobody has begun."""

    def __init__(self, args, stages):
        self._args, self._stages = args, stages
        self._path = args.out / f"{LOSSES}.jsonl"
        data = {stage.task: TASKS[stage.task].data(0, 1, 0, 1, args.text) for stage in stages}
        digests = {task: digest(its.tensors()) for task, its in data.items()}
        self._about = about()
        self.rows = [row for row in there(args.out) if row["data"] == digests.get(row["task"])]
        self.fixed = quick(there(args.out)) if args.quick else []  # whatever is there, with settings of any machine
        self._taken = []  # and not there: under way, or its ranks have failed
        self._at_work = 0
        self._changed = threading.Condition()
        self._end = time.monotonic() + 60 * args.minutes

    def left(self) -> str:
        """How many runs are left, and how long they will take, from those of the same number of cores."""
        runs = expected(self.rows, self._args.steps, self._stages)
        here = [row for row in self.rows if row["machine"] == self._about["machine"]]
        seconds = 0.0
        for run in runs:
            known = [row["seconds"] / row["steps"] for row in here if row["task"] == run["task"]]
            seconds += run["steps"] * (statistics.median(known) if known else STEP_S)
        return (f"{len(runs)} runs are left, or more where a search goes on: about "
                f"{seconds / 3600 / self._args.jobs:.1f} hours on this machine")  # fmt: skip

    def run(self):
        teams = [threading.Thread(target=self._work, daemon=True) for _ in range(self._args.jobs)]
        for team in teams:
            team.start()
        for team in teams:
            team.join()

    def _work(self):
        team = None
        options = ["--text", self._args.text] if self._args.text else []
        while run := self._next():
            row = None
            try:
                team = team or Team(RANKS, SCRIPT, options)
                row = team.ask(run)
                if row is None:
                    team.close()
                    team = None
            finally:  # else the other teams would wait for this one
                self._done(run, row)
        if team:
            team.close()

    def _next(self):
        with self._changed:
            while time.monotonic() < self._end:
                if run := next((run for run in self._wanted() if run not in self._taken), None):
                    self._taken.append(run)
                    self._at_work += 1
                    return run
                if not self._at_work:
                    break
                self._changed.wait()  # what comes of the others may ask for more
            return None

    def _wanted(self):
        return self.fixed or Plan(self.rows, self._args.steps, self._stages).wanted()

    def _done(self, run, row):
        with self._changed:
            self._at_work -= 1
            if row and not self.fixed:
                self._taken.remove(run)
            if row:
                self._append(row)
            said = "its ranks have failed" if row is None else f"{row['loss']} in {row['seconds']:.0f} s"
            named = ", ".join(f"{name} {value}" for name, value in run.items())
            print(f"{named}: {said}", flush=True)
            self._changed.notify_all()

    def _append(self, row):
        self.rows.append(row | {"command": "python benchmarks/suite/train.py", "date": today(), **self._about})
        append(self._path, self.rows[-1])


if __name__ == "__main__":
    sys.exit(main())
