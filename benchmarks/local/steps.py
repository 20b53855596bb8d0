"""What a step of local steps takes on a thin network, rounds included: against no exchange and what competes.

    python benchmarks/local/steps.py                   4 ranks at 100 Mbit/s, two models, about 20 minutes
    python benchmarks/local/steps.py --cycles 2 --models small --methods ddp local-16 --out results
    python benchmarks/local/steps.py --docs            docs/tables/local_step*.md from what is committed

Methods take turns of 32 steps, two rounds or more, in which every step is counted; those whose steps are long and all
alike, of 4. Between any two turns is one without exchange. A step's time is the mean over a turn, and over the ranks; a
ratio is that over the mean of the turns of the baseline next to it. Ranks that exchange nothing drift apart, and a
round waits for the last of them: so there is also the ratio of the step of the rank that is the last to be done.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common.ranks import import_paths
from common.record import RESULTS, load, origin, print_table, save, write_table
from common.turns import in_turns, mean_of, ratios, shown
from rich.progress import Progress
from thinnet import ThinNet

from local import ways
from local.steps_rank import METHODS, MODELS, NOOP
from local.tables import STEPS as NAME
from local.tables import mean_ms

SCRIPT = Path(__file__).resolve().with_name("steps_rank.py")
RANKS, MBIT = 4, 100
LABELS = ways.LABELS | {NOOP: "no exchange"}
SIZES = {"small": "0.45 M", "large": "3.24 M"}
# (ours, against, the most that the ratio may be)
LIMITS = ((ways.LOCAL, NOOP, 1.05), (ways.LATE, NOOP, 1.05), (ways.FRAGMENTS, NOOP, 1.05),
          (ways.LOCAL_WAITS, NOOP, 1.25))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--cycles", type=int, default=5, help="turns of every method")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD",
                        help=f"of {', '.join(METHODS)}")  # fmt: skip
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--docs", action="store_true", help="only write docs/tables from what is committed")
    args = parser.parse_args()
    if args.docs:
        return write_tables(load(NAME))
    rows = measure(args)
    record = save(NAME, "python benchmarks/local/steps.py", rows, args.out, ranks=RANKS, mbit=MBIT, cycles=args.cycles)
    print_table(*table(record["rows"]), title=f"A step: {RANKS} ranks, {MBIT} Mbit/s", left=2)
    print_table(*limits_table(record["rows"]), left=2)


def write_tables(record):
    write_table("local_step", *table(record["rows"]), origin(record), left=2)
    write_table("local_step_targets", *limits_table(record["rows"]), origin(record), left=2)


def measure(args):
    """A row a turn, in the order of time. A run that fails keeps what it has reported."""
    rows = []
    with ThinNet(ranks=RANKS, mbit=MBIT) as net, Progress() as progress:
        if not net.shaped:
            raise SystemExit(f"the network cannot be shaped here: {net.why}")
        turns = len(list(in_turns(args.methods, NOOP, args.cycles)))
        bar = progress.add_task("turns", total=turns * len(args.models))

        def take(rank, line, stream):
            if rank == 0 and line.startswith("{"):
                rows.append(json.loads(line))
                progress.advance(bar)
            elif stream == "stderr" and "hostname of the client" not in line:  # a namespace's address has no name
                progress.console.print(f"[{rank}] {line}", highlight=False, markup=False)

        command = [sys.executable, str(SCRIPT), "--cycles", str(args.cycles), "--methods", *args.methods, "--models",
                   *args.models]  # fmt: skip
        if net.run(command, env=import_paths(), on_line=take) != 0:
            print("the run failed: the turns before that count", file=sys.stderr)
    if not rows:
        raise SystemExit("nothing was measured")
    return rows


def table(rows):
    """A row a model and method: its mean step, the ratios to two others, and what it sent a step."""
    heads = ("parameters", "method", "step, ms", "over no exchange", "the last rank's", "over plain DDP",
             "kB sent a step")  # fmt: skip
    cells = []
    for model, of_model in _models(rows):
        for name in dict.fromkeys(row["method"] for row in of_model):
            sent = mean_of(of_model, name, "sent")
            cells.append((
                SIZES[model], LABELS[name], f"{mean_ms(of_model, name):.1f}", _ratio(of_model, name, NOOP),
                _ratio(of_model, name, NOOP, "last_ms"), _ratio(of_model, name, ways.DDP),
                "-" if sent is None else f"{sent / 1e3:.1f}",
            ))  # fmt: skip
    return heads, cells


def limits_table(rows):
    """A row a model and limit of which both sides were measured."""
    heads = ("parameters", "what", "against", "ratio", "at most")
    cells = []
    for model, of_model in _models(rows):
        for ours, against, most in LIMITS:
            if found := ratios(of_model, ours, against, statistics.mean):
                missed = "" if statistics.mean(found) <= most else ", missed"
                mean = f"{statistics.mean(found):.3f}"
                cells.append((SIZES[model], LABELS[ours], LABELS[against], mean, f"{most:.2f}{missed}"))
    return heads, cells


def _models(rows):
    for model in dict.fromkeys(row["model"] for row in rows):
        yield model, [row for row in rows if row["model"] == model]


def _ratio(rows, name, base, of="ms"):
    """of: "ms", the mean over the ranks, or "last_ms"."""
    if name == base or not all(of in row for row in rows):
        return "-"
    if of == "last_ms":  # one figure a turn
        rows = [row | {"ms": [row[of]]} for row in rows]
    found = ratios(rows, name, base, statistics.mean)
    return shown(found) if found else "-"


if __name__ == "__main__":
    main()
