"""Is thinwire.advise right? What it predicts on thin networks, against what the steps then take.

    python benchmarks/advice/predictions.py             4 ranks, 3 link rates, 2 delays, 6 methods, about 8 minutes
    python benchmarks/advice/predictions.py --resume    the networks that are left of one that was interrupted
    python benchmarks/advice/predictions.py --docs      docs/tables/advise.md from the committed result

On each network advise is asked about the demo's model, then each method trains it for a few steps of which the first is
not counted, and so on in turns. A step's time is the slowest rank's. Figures are medians: over what was predicted, and
over the steps. Of local steps whole rounds are counted, all of their steps, and it is their mean. Exits with 1 where a
prediction is further off than TARGET says.
"""
import argparse
import itertools
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
RATES, DELAYS = (100, 250, 1000), (0, 10)  # Mbit/s, ms one way
TARGET = 0.15  # of the measured step
NAME = "advise"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="Mbit/s")
    parser.add_argument("--delays", type=float, nargs="+", default=DELAYS, help="ms one way")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="keep the networks that the result in --out has")
    parser.add_argument("--docs", action="store_true", help="only write docs/tables from what is committed")
    args = parser.parse_args()
    if args.docs:
        record = load(NAME)
        return write_table(NAME, *table(record["rows"]), f"{summary(record['rows'])} {origin(record)}")
    rows = load(NAME, args.out)["rows"] if args.resume else []
    networks = [net for net in itertools.product(args.rates, args.delays) if net not in map(network, rows)]
    for mbit, delay in track(networks, "networks"):
        with ThinNet(ranks=RANKS, mbit=mbit, delay_ms=delay) as net:
            if not net.shaped:
                raise SystemExit(f"the network cannot be shaped here: {net.why}")
            said = rows_of(net, SCRIPT, ["--turns", args.turns])
            rows += [{"mbit": mbit, "delay_ms": delay, "delayed_by": net.delayed_by} | row for row in said]
        rows.sort(key=network)
        save(NAME, "python benchmarks/advice/predictions.py", rows, args.out, ranks=RANKS)
    print_table(*table(rows), title="A step: predicted, measured, error")
    print(summary(rows))
    for miss in misses(rows):
        print(miss, file=sys.stderr)
    return 1 if misses(rows) else 0


def network(row):
    """Mbit/s, and ms one way."""
    return row["mbit"], row["delay_ms"]


def error(row):
    """Of the measured step, signed."""
    return row["predicted_ms"] / row["measured_ms"] - 1


def table(rows):
    """A row a method: on each network predicted and measured milliseconds, and the error."""
    networks = list(dict.fromkeys(map(network, rows)))
    heads = ("method", *map(_said, networks))
    cells = []
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {network(row): row for row in rows if row["method"] == method}
        cells.append((method, *(f"{found[net]['predicted_ms']:.0f} / {found[net]['measured_ms']:.0f} ms, "
                                f"{error(found[net]):+.0%}" for net in networks)))  # fmt: skip
    return heads, cells


def _said(net):
    mbit, delay_ms = net
    return f"{mbit:g} Mbit/s" + (f", {delay_ms:g} ms" if delay_ms else "")


def misses(rows):
    """The predictions that are further off than TARGET, a line each."""
    return [f"missed: {row['method']} at {_said(network(row))}, {error(row):+.0%}, target {TARGET:.0%}"
            for row in rows if row["method"] != ALONE and abs(error(row)) > TARGET]  # fmt: skip


def summary(rows):
    errors = [abs(error(row)) for row in rows if row["method"] != ALONE]
    within = len(errors) - len(misses(rows))
    return (f"Predicted / measured, and the error. {within} of {len(errors)} predictions are within {TARGET:.0%}, the "
            f"worst is off by {max(errors):.0%}. Delays are one way. Asking took at most "
            f"{max(row['advise_s'] for row in rows):.0f} s.")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
