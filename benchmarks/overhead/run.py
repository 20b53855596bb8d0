"""What a hook costs where the network costs nothing: 2 ranks on the loopback, one tiny batch.

    python benchmarks/overhead/run.py                     about 3 minutes
    python benchmarks/overhead/run.py --cycles 3 --methods "Dense()" --out results
    python benchmarks/overhead/run.py --profile --models "148 of 400" --methods "nominated 4 %, int4"
    python benchmarks/overhead/run.py --docs              docs/tables/overhead.md from what is committed

Two models: 148 parameters of 400 elements, where the work a parameter shows, and one parameter of 6.5 million elements,
where the work an element does. Methods take turns, between any two of which is one without exchange, PyTorch's
noop_hook. The overhead of a turn is its median step less that of the turns of noop_hook next to it; what is shown is
the median over the turns and the quartiles. Nothing is subtracted for what crosses the loopback. For the large model
the yardstick is torch.add and a copy of as many elements, on both ranks at once, as all else here.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common.loopback import rows_as_they_come
from common.record import RESULTS, load, origin, print_table, save, write_table
from common.turns import in_turns, pairs, quartiles, shown, steps_of
from rich.progress import track

from overhead.rank import METHODS, MODELS, NOOP, OURS, YARDSTICK

SCRIPT = Path(__file__).resolve().with_name("rank.py")
RANKS = 2
NAME = "overhead"
MOST_MS, MOST_TIMES = 1.5, 1.3  # the limits: of the small model, and in yardsticks of the large one
SMALL, LARGE = MODELS


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--cycles", type=int, default=15, help="turns of every method")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=[NOOP, *OURS], default=METHODS)
    parser.add_argument("--profile", action="store_true", help="only print where the time of rank 0 goes")
    parser.add_argument("--steps", type=int, default=50, help="steps that are profiled")
    parser.add_argument("--docs", action="store_true", help="only write docs/tables from what is committed")
    args = parser.parse_args()
    if args.docs:
        record = load(NAME)
        return write_table(NAME, *table(record["rows"]), origin(record), left=2)
    options = ["--models", *args.models, "--methods", *args.methods]
    if args.profile:
        return list(rows_as_they_come(RANKS, SCRIPT, [*options, "--profile", "--steps", args.steps])) and None
    turns = len(args.models) * len(list(in_turns([*args.methods, YARDSTICK], NOOP, args.cycles)))
    rows = list(track(rows_as_they_come(RANKS, SCRIPT, [*options, "--cycles", args.cycles]), "turns", turns))
    save(NAME, "python benchmarks/overhead/run.py", rows, args.out, ranks=RANKS, cycles=args.cycles)
    print_table(*table(rows), left=2)


def table(rows):
    """A row a model and method."""
    heads = ("parameters", "method", "step, ms", "over no exchange, ms", f"of {YARDSTICK}", "at most")
    cells = []
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        for name in dict.fromkeys(row["method"] for row in of_model):
            step = f"{quartiles(steps_of(of_model, name))[1]:.2f}"
            if name in (NOOP, YARDSTICK):
                cells.append((model, name, step, "-", "-", "-"))
                continue
            extra = [ours - noop for ours, noop in pairs(of_model, name, NOOP)]
            times = [one / yard for one, (_, yard) in zip(extra, pairs(of_model, name, YARDSTICK))]
            figure, most, unit = (extra, MOST_MS, " ms") if model == SMALL else (times, MOST_TIMES, "")
            missed = "" if quartiles(figure)[1] <= most else ", missed"
            cells.append((model, name, step, shown(extra), shown(times) if model == LARGE else "-",
                          f"{most:g}{unit}{missed}"))  # fmt: skip
    return heads, cells


if __name__ == "__main__":
    sys.exit(main())
