"""Local steps against what they compete with: byte-level transformers trained on 4 ranks, and the controls.

    python benchmarks/local/run.py                     all trainings, a night on two cores; it goes on where it was
    python benchmarks/local/run.py --jobs 4 --minutes 8    4 at a time, none begun after 8 minutes
    python benchmarks/local/run.py --tasks bytes-sgd --methods ddp local-16
    python benchmarks/local/run.py --docs              docs/tables/local_loss.md and local_seconds.md from what is there

Every training is a line of results/local.jsonl, appended when it is done, with what it was measured with. All ranks are
on this machine and nothing is shaped, since a loss does not depend on the network; how long a step takes is measured by
steps.py. A learning rate rises for 50 steps and then falls to 0. Settings are searched for each method by one rule, on
a seed of its own: see plan.py.
"""
import argparse
import datetime
import json
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common import task
from common.loopback import Team
from common.record import RESULTS, print_table, read_rows
from suite.ledger import about

from local import tables
from local.plan import STAGES, Plan, Stage
from local.rank import digest
from local.tables import NAME
from local.tasks import TASKS
from local.ways import LABELS

SCRIPT = Path(__file__).resolve().with_name("rank.py")
RANKS = 4


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where new rows go; those committed count, too")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK",
                        help=f"of {', '.join(TASKS)}")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=LABELS, default=list(LABELS), metavar="METHOD",
                        help=f"of {', '.join(LABELS)}")  # fmt: skip
    parser.add_argument("--steps", type=int, help="of every run, in the place of its task's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of 4 ranks with a thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--text", type=Path, help="the folder of another Python's standard library, to train on")
    parser.add_argument("--docs", action="store_true", help="only write docs/tables from what is committed")
    args = parser.parse_args()
    if args.docs:
        return tables.write()
    stages = [Stage(stage.task, tuple(m for m in stage.methods if m in args.methods), stage.longer)
              for stage in STAGES if stage.task in args.tasks]  # fmt: skip
    Measurement(args, stages).run()
    rows = tables.newest(there(args))
    print_table(*tables.losses(rows, args.steps), left=2)


def there(args):
    """What is committed, and what was measured since."""
    places = dict.fromkeys([RESULTS.resolve(), args.out.resolve()])
    return [row for place in places for row in read_rows(place / f"{NAME}.jsonl")]


class Measurement:
    """Several teams of ranks, each of which takes the most important run that nobody has begun."""

    def __init__(self, args, stages):
        self._args, self._stages = args, stages
        self._path = args.out / f"{NAME}.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._text = digest(*task.standard_library(root=args.text))
        self._about = about()
        self._rows = [row for row in there(args) if row["text"] == self._text]
        self._taken = []  # and not there: under way, or its ranks have failed
        self._at_work = 0
        self._changed = threading.Condition()
        self._end = time.monotonic() + 60 * args.minutes

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
            team = team or Team(RANKS, SCRIPT, options)
            row = team.ask(run)
            if row is None:
                team.close()
                team = None
            self._done(run, row)
        if team:
            team.close()

    def _next(self):
        with self._changed:
            while time.monotonic() < self._end:
                plan = Plan(self._rows, self._args.steps)
                if run := next((run for run in plan.wanted(self._stages) if run not in self._taken), None):
                    self._taken.append(run)
                    self._at_work += 1
                    return run
                if not self._at_work:
                    break
                self._changed.wait()  # what comes of the others may ask for more
            return None

    def _done(self, run, row):
        with self._changed:
            self._at_work -= 1
            if row:
                self._taken.remove(run)
                self._append(row)
            said = "its ranks have failed" if row is None else f"{row['loss']} in {row['seconds']:.0f} s"
            named = ", ".join(f"{name} {value}" for name, value in run.items())
            print(f"{named}: {said}", flush=True)
            self._changed.notify_all()

    def _append(self, row):
        today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        self._rows.append(row | {"command": "python benchmarks/local/run.py", "date": today, **self._about})
        cut_off = self._path.exists() and self._path.read_bytes()[-1:] not in (b"", b"\n")
        with self._path.open("a") as file:
            file.write("\n" * cut_off + json.dumps(self._rows[-1]) + "\n")


if __name__ == "__main__":
    sys.exit(main())
