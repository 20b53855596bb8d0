"""A step of the demo's model over a thin network: under every wire, without exchange, and under what competes.

    python benchmarks/steps/run.py                     4 ranks at 100 Mbit/s, about 15 minutes
    python benchmarks/steps/run.py --cycles 2 --methods "plain DDP" "Dense()" --out results
    python benchmarks/steps/run.py --docs              docs/tables/steps.md and steps_targets.md from what is committed

Methods take turns of 8 steps (3 where a step is long), before each of which one is not counted. Between any two turns
is one of 5 steps without exchange, PyTorch's noop_hook. A ratio is a turn's median step over that of the baseline's
turns next to it; what is shown is the median of the ratios and their quartiles. A step's time is the mean over the
ranks.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common.ranks import import_paths
from common.record import RESULTS, load, origin, print_table, save, write_table
from common.turns import in_turns, mean_of, quartiles, ratios, shown, steps_of
from rich.progress import Progress
from thinnet import ThinNet

from steps.rank import IN_ONE, METHODS, NOOP, OURS, PLAIN

SCRIPT = Path(__file__).resolve().with_name("rank.py")
RANKS, MBIT = 4, 100
NAME = "steps"
TIMES = ("waited_s", "encode_s", "exchange_s", "decode_s")
# (ours, against, the most that the ratio may be)
LIMITS = (
    ("nominated 4 %, int4", NOOP, 1.15),
    ("Dense()", PLAIN, 1.03),
    ("Dense, int4", PLAIN, 0.30),
    *((name, name + IN_ONE, 1.05) for name in OURS if name.startswith("nominated")),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--cycles", type=int, default=8, help="turns of every method")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD",
                        help=f"of {', '.join(map(repr, METHODS))}".replace("%", "%%"))  # fmt: skip
    parser.add_argument("--docs", action="store_true", help="only write docs/tables from what is committed")
    args = parser.parse_args()
    if args.docs:
        return write_tables(load(NAME))
    rows = measure(args.methods, args.cycles)
    record = save(NAME, "python benchmarks/steps/run.py", rows, args.out, ranks=RANKS, mbit=MBIT, cycles=args.cycles)
    print_table(*table(record["rows"]), title=f"A step: {RANKS} ranks, {MBIT} Mbit/s")
    print_table(*limits_table(record["rows"]))


def write_tables(record):
    write_table("steps", *table(record["rows"]), origin(record))
    write_table("steps_targets", *limits_table(record["rows"]), origin(record))


def measure(methods, cycles):
    """A row a turn, in the order of time. A run that fails keeps the cycles before."""
    rows = []
    with ThinNet(ranks=RANKS, mbit=MBIT) as net, Progress() as progress:
        if not net.shaped:
            raise SystemExit(f"the network cannot be shaped here: {net.why}")
        shown = progress.add_task("turns", total=len(list(in_turns(methods, NOOP, cycles))))

        def take(rank, line, stream):
            if rank == 0 and line.startswith("{"):
                rows.append(json.loads(line))
                progress.advance(shown)
            elif stream == "stderr" and "hostname of the client" not in line:  # a namespace's address has no name
                progress.console.print(f"[{rank}] {line}", highlight=False, markup=False)

        command = [sys.executable, str(SCRIPT), "--cycles", str(cycles), "--methods", *methods]
        if net.run(command, env=import_paths(), on_line=take) != 0:
            last = rows[-1]["cycle"] if rows else 0
            print(f"the run failed in cycle {last}: those before it count", file=sys.stderr)
            rows = [row for row in rows if row["cycle"] < last]
    if not rows:
        raise SystemExit("nothing was measured")
    return rows


def table(rows):
    """A row a method: a step's median, its ratios, and what it sent and waited for."""
    heads = ("method", "step, ms", "over no exchange", "over plain DDP", "kB sent a step", "by stats()",
             "waited, ms", "encode", "exchange", "decode")  # fmt: skip
    cells = []
    for name in dict.fromkeys(row["method"] for row in rows):
        counts = [mean_of(rows, name, "sent"), mean_of(rows, name, "stats", "bytes_sent")]
        times = [mean_of(rows, name, "stats", key) for key in TIMES]
        cells.append((
            name, f"{quartiles(steps_of(rows, name))[1]:.0f}", *(_ratio(rows, name, base) for base in (NOOP, PLAIN)),
            *(_amount(count, 1e-3, 1) for count in counts), *(_amount(seconds, 1e3, 1) for seconds in times),
        ))  # fmt: skip
    return heads, cells


def limits_table(rows):
    """A row a limit of which both sides were measured."""
    heads = ("what", "against", "ratio", "at most")
    cells = []
    for ours, against, most in LIMITS:
        if found := ratios(rows, ours, against):
            missed = "" if quartiles(found)[1] <= most else ", missed"
            cells.append((ours, against, shown(found, 3), f"{most:.2f}{missed}"))
    return heads, cells


def _ratio(rows, name, base):
    found = [] if name == base else ratios(rows, name, base)
    return shown(found) if found else "-"


def _amount(value, factor, digits):
    return "-" if value is None else f"{factor * value:.{digits}f}"


if __name__ == "__main__":
    main()
