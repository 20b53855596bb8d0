"""Elastic scheduling measured: a step's time over beta and link rates, and the loss after equal steps and equal time.

    python benchmarks/elastic/speed.py                  2 ranks on a thin network, about 10 minutes
    python benchmarks/elastic/speed.py --docs           docs/tables/elastic_speed.md and elastic_loss.md

Methods take turns of 7 steps with plain SGD, of which 2 are not counted, between barriers. Communication alone is what
the synchronous method (beta 1) exchanges in a step with nothing else to do; computation alone is DDP with PyTorch's
noop_hook. Late buckets are agreed upon, so the loss of a beta after so many steps does not depend on the network: each
beta is trained once with AdamW, unshaped, at each learning rate of one grid, and the loss after a time is read off its
curve at the number of steps that the step's time allows.
"""
import argparse
import sys
from pathlib import Path

from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common.ranks import rows_of
from common.record import RESULTS, load, origin, print_table, save, write_table
from thinnet import ThinNet

from elastic.speed_rank import BETAS, METHODS

SCRIPT = Path(__file__).resolve().with_name("speed_rank.py")
RANKS = 2
RATES = (100, 200, 500, 1000)
LRS = (1e-3, 3e-3)
STEPS = 100
SECONDS = 30  # the equal time
NAME = "elastic_speed"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="Mbit/s")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--docs", action="store_true", help="only write docs/tables from what is committed")
    args = parser.parse_args()
    if args.docs:
        record = load(NAME)
        write_table("elastic_speed", *speed_table(record["rows"]), origin(record))
        return write_table("elastic_loss", *loss_table(record["rows"]), origin(record))
    rows = measure(args.rates, args.turns, args.seed)
    record = save(NAME, "python benchmarks/elastic/speed.py", rows, args.out, ranks=RANKS, seed=args.seed)
    print_table(*speed_table(rows), title="A step, ms (and against perfect overlap)")
    print_table(*loss_table(rows), title="Held-out loss")
    draw(record, args.out / f"{NAME}.png")


def measure(rates, turns, seed):
    rows = []
    for rate in track(rates, "step times"):
        with ThinNet(ranks=RANKS, mbit=rate) as net:
            if not net.shaped:
                raise SystemExit(f"the network cannot be shaped here: {net.why}")
            rows += [{"mbit": rate} | said for said in rows_of(net, SCRIPT, ["speed", "--turns", turns])]
    with ThinNet(ranks=RANKS, mbit=0) as net:
        for beta, lr in track([(beta, lr) for beta in BETAS for lr in LRS], "losses"):
            options = ["loss", "--method", f"beta {beta:g}", "--lr", lr, "--steps", STEPS, "--every", 5, "--seed", seed]
            rows += rows_of(net, SCRIPT, options)
    return rows


def step_times(rows):
    """{Mbit/s: {method: median ms}}."""
    times = {}
    for row in rows:
        if "mbit" in row:
            times.setdefault(row["mbit"], {})[row["method"]] = row["median_ms"]
    return times


def speed_table(rows):
    """A row a link rate; in brackets, against the larger of computation and communication alone."""
    shown = [name for name in METHODS if name != "noop"]
    heads = ("network", "computation alone", "communication alone", *shown)
    cells = []
    for rate, times in step_times(rows).items():
        limit = max(times["noop"], times["communication alone"])
        cells.append((f"{rate:g} Mbit/s", f"{times['noop']:.0f}", f"{times['communication alone']:.0f}",
                      *(f"{times[name]:.0f} ({times[name] / limit:.2f})" for name in shown)))  # fmt: skip
    return heads, cells


def best_curves(rows):
    """{method: (learning rate, [(step, loss)])}, the rate with the lowest loss at the end."""
    best = {}
    for row in rows:
        if "curve" in row:
            was = best.get(row["method"])
            if was is None or row["curve"][-1][1] < was[1][-1][1]:
                best[row["method"]] = row["lr"], row["curve"]
    return best


def loss_table(rows):
    """A row a beta: the loss after all steps, and after equal time on each network."""
    times = step_times(rows)
    heads = ("method", "learning rate", f"after {STEPS} steps", *(f"{rate:g} Mbit/s, {SECONDS} s" for rate in times))
    cells = []
    for method, (lr, curve) in best_curves(rows).items():
        after = [_loss_at(curve, 1000 * SECONDS / of_rate[method]) for of_rate in times.values()]
        cells.append((method, f"{lr:g}", f"{curve[-1][1]:.3f}", *(text for text in after)))
    return heads, cells


def _loss_at(curve, steps):
    """The loss at the last measurement that was reached, and how many steps that is."""
    reached = [(step, loss) for step, loss in curve if step <= steps]
    return f"{reached[-1][1]:.3f} ({reached[-1][0]} steps)" if reached else "-"


def draw(record, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    times = step_times(record["rows"])
    for name in ("communication alone", *METHODS):
        style = "--" if name in ("noop", "communication alone") else "-o"
        label = "computation alone" if name == "noop" else name
        left.plot(list(times), [of_rate[name] for of_rate in times.values()], style, label=label)
    left.set(xscale="log", yscale="log", xlabel="Mbit/s", ylabel="ms a step")
    left.legend(fontsize=7)
    for name, (lr, curve) in best_curves(record["rows"]).items():
        right.plot(*zip(*curve), label=f"{name} (lr {lr:g})")
    right.set(xlabel="steps", ylabel="held-out loss")
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
