"""Is thinwire.advise right? What it predicts on thin networks, against what the steps then take.

    python benchmarks/advice/predictions.py             4 ranks, 3 link rates, 5 methods, about 5 minutes
    python benchmarks/advice/predictions.py --docs      docs/tables/advise.md from the committed result

On each network advise is asked about the demo's model, then each method trains it for 5 steps of which the first is not
counted, and so on in turns. A step's time is the slowest rank's. Figures are medians: over what was predicted, and
over the steps. Exits with 1 where a prediction is further off than TARGET says.
"""
import argparse
import sys
from pathlib import Path

from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common.ranks import rows_of
from common.record import RESULTS, load, origin, print_table, save, write_table
from thinnet import ThinNet

from advice.rank import ALONE

SCRIPT = Path(__file__).resolve().with_name("rank.py")
RANKS = 4
RATES = (50, 100, 1000)
TARGET = 0.2  # of the measured step
NAME = "advise"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="Mbit/s")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--docs", action="store_true", help="only write docs/tables from what is committed")
    args = parser.parse_args()
    if args.docs:
        record = load(NAME)
        return write_table(NAME, *table(record["rows"]), f"{summary(record['rows'])} {origin(record)}")
    rows = []
    for rate in track(args.rates, "networks"):
        with ThinNet(ranks=RANKS, mbit=rate) as net:
            if not net.shaped:
                raise SystemExit(f"the network cannot be shaped here: {net.why}")
            rows += [{"mbit": rate} | said for said in rows_of(net, SCRIPT, ["--turns", args.turns])]
    save(NAME, "python benchmarks/advice/predictions.py", rows, args.out, ranks=RANKS)
    print_table(*table(rows), title="A step: predicted, measured, error")
    print(summary(rows))
    for miss in misses(rows):
        print(miss, file=sys.stderr)
    return 1 if misses(rows) else 0


def error(row):
    """Of the measured step, signed."""
    return row["predicted_ms"] / row["measured_ms"] - 1


def table(rows):
    """A row a method: on each network predicted and measured milliseconds, and the error."""
    rates = list(dict.fromkeys(row["mbit"] for row in rows))
    heads = ("method", *(f"{rate:g} Mbit/s" for rate in rates))
    cells = []
    for method in dict.fromkeys(row["method"] for row in rows):
        of_rate = {row["mbit"]: row for row in rows if row["method"] == method}
        cells.append((method, *(f"{of_rate[rate]['predicted_ms']:.0f} / {of_rate[rate]['measured_ms']:.0f} ms, "
                                f"{error(of_rate[rate]):+.0%}" for rate in rates)))  # fmt: skip
    return heads, cells


def misses(rows):
    """The predictions that are further off than TARGET, a line each."""
    return [f"missed: {row['method']} at {row['mbit']:g} Mbit/s, {error(row):+.0%}, target {TARGET:.0%}"
            for row in rows if row["method"] != ALONE and abs(error(row)) > TARGET]  # fmt: skip


def summary(rows):
    errors = [abs(error(row)) for row in rows if row["method"] != ALONE]
    within = len(errors) - len(misses(rows))
    return (f"Predicted / measured, and the error. {within} of {len(errors)} predictions are within {TARGET:.0%}, the "
            f"worst is off by {max(errors):.0%}. Asking took at most {max(row['advise_s'] for row in rows):.0f} s.")


if __name__ == "__main__":
    sys.exit(main())
