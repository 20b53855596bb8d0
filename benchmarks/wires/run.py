"""The loss against the wire: a byte-level transformer trained with values of few bits, and with values of 32.

    python benchmarks/wires/run.py                     48 runs on 4 ranks, about an hour; it goes on where it was
    python benchmarks/wires/run.py --only "nominated 4 %" --optimizers AdamW --wires float32 int4
    python benchmarks/wires/run.py --tune              learning rates, with values of 32 bits and one seed
    python benchmarks/wires/run.py --docs              docs/tables/wires.md from what is committed

Every run is a line of results/wires.jsonl, with what it was measured with. All ranks are on this machine and nothing is
shaped, since a loss does not depend on the network. A learning rate rises for 50 steps and then falls to 0. AdamW's
beta2 is 0.95. A method has one learning rate, of SETTINGS, on all wires; they were looked for with values of 32 bits
and one seed, and not in all of LRS. What is compared: whether the mean loss over the seeds is at most that of the worst
seed with values of 32 bits.
"""
import argparse
import datetime
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common.loopback import rows_as_they_come
from common.provenance import about
from common.record import RESULTS, origin, print_table, read_rows, write_table
from rich.progress import Progress

SCRIPT = Path(__file__).resolve().with_name("rank.py")
RANKS, STEPS, SEEDS = 4, 500, (1, 2, 3)
NAME, TUNING = "wires", "wires_tuning"
DENSITIES = {"dense": None, "nominated 4 %": 0.04, "nominated 16 %": 0.16}
WIRES = ("float32", "int4", "int2")
ADAMW, SGD = "AdamW", "SGD"
# (learning rate, momentum or first beta)
SETTINGS = {
    ("dense", ADAMW): (6e-3, 0.5),
    ("nominated 16 %", ADAMW): (3e-3, 0.0),
    ("nominated 4 %", ADAMW): (3e-3, 0.0),
    ("dense", SGD): (0.1, 0.9),
    ("nominated 16 %", SGD): (0.25, 0.0),
    ("nominated 4 %", SGD): (0.5, 0.0),
}
# What --tune tries. With error feedback the delay acts as momentum, so the optimizer has none, and a larger rate.
LRS = {
    ("dense", ADAMW): (1.5e-3, 3e-3, 6e-3),
    ("nominated 16 %", ADAMW): (1.5e-3, 3e-3, 6e-3, 1.2e-2),
    ("nominated 4 %", ADAMW): (1.5e-3, 3e-3, 6e-3, 2.4e-2),
    ("dense", SGD): (0.05, 0.1, 0.2),
    ("nominated 16 %", SGD): (0.25, 0.5, 1.0),
    ("nominated 4 %", SGD): (0.25, 0.5, 1.0),
}
KEY = ("method", "density", "wire", "optimizer", "lr", "momentum", "seed", "steps")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="+", choices=DENSITIES, default=list(DENSITIES), metavar="METHOD",
                        help=f"of {', '.join(map(repr, DENSITIES))}".replace("%", "%%"))  # fmt: skip
    parser.add_argument("--optimizers", nargs="+", choices=[ADAMW, SGD], default=[ADAMW, SGD])
    parser.add_argument("--wires", nargs="+", default=WIRES)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--tune", action="store_true", help="only find SGD's learning rates")
    parser.add_argument("--again", action="store_true", help="measure again what other code has measured")
    parser.add_argument("--docs", action="store_true", help="only write docs/tables from what is committed")
    args = parser.parse_args()
    if args.docs:
        rows = newest(read_rows(RESULTS / f"{NAME}.jsonl"))
        return write_table(NAME, *table(rows), origin(rows[-1]), left=3)
    if args.tune:
        wanted = [run | {"lr": lr} for run in runs(args.only, args.optimizers, ["float32"], args.seeds[:1], args.steps)
                  for lr in LRS[run["method"], run["optimizer"]]]  # fmt: skip
        rows = measure(wanted, args.out / f"{TUNING}.jsonl", args.again)
        heads = ("method", "optimizer", "learning rate", "loss")
        cells = [(row["method"], row["optimizer"], f"{row['lr']:g}", _loss(row["loss"])) for row in rows]
        return print_table(heads, cells, left=2)
    wanted = runs(args.only, args.optimizers, args.wires, args.seeds, args.steps)
    rows = measure(wanted, args.out / f"{NAME}.jsonl", args.again)
    print_table(*table(rows), title=f"Held-out loss after {args.steps} steps", left=3)


def runs(methods, optimizers, wires, seeds, steps):
    """A seed after another, so that what is there early is whole."""
    return [{"method": method, "density": DENSITIES[method], "wire": wire, "optimizer": optimizer,
             "lr": SETTINGS[method, optimizer][0], "momentum": SETTINGS[method, optimizer][1], "seed": seed,
             "steps": steps}
            for seed in seeds for optimizer in optimizers for method in methods for wire in wires
            if (method, wire) != ("dense", "int2")]  # fmt: skip


def measure(wanted, path, again):
    """The rows of what is wanted; those that are not there yet are measured and appended, one at a time."""
    measured_with = about()
    there = newest(row for row in read_rows(path) if not again or row["code"] == measured_with["code"])
    missing = [run for run in wanted if key(run) not in {key(row) for row in there}]
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_off = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with Progress() as progress:
        shown = progress.add_task("runs", total=len(wanted), completed=len(wanted) - len(missing))
        for row in rows_as_they_come(RANKS, SCRIPT, [json.dumps(missing)]) if missing else ():
            today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
            there.append(row | {"command": "python benchmarks/wires/run.py", "date": today, **measured_with})
            with path.open("a") as file:
                file.write("\n" * cut_off + json.dumps(there[-1]) + "\n")
            cut_off = False
            progress.advance(shown)
            progress.console.print(
                f"{row['method']}, {row['wire']}, {row['optimizer']} {row['lr']:g}, seed {row['seed']}: "
                f"{_loss(row['loss'])} in {row['seconds']:.0f} s", highlight=False,
            )  # fmt: skip
    of = {key(row): row for row in there}
    return [of[key(run)] for run in wanted]


def newest(rows):
    """Of equal runs the last counts."""
    return list({key(row): row for row in rows}.values())


def key(row):
    return tuple(row[name] for name in KEY)


def table(rows):
    """A row a method, optimizer and wire: the mean loss, every seed's, and whether few bits cost anything."""
    heads = ("method", "optimizer", "wire", "learning rate, momentum", "bytes, dense float32 = 1", "loss",
             "of each seed", "less than 32 bits' loss", "within its seeds")  # fmt: skip
    groups = {}
    for row in rows:
        groups.setdefault((row["method"], row["optimizer"], row["wire"]), {})[row["seed"]] = row
    cells = []
    for (method, optimizer, wire), seeds in groups.items():
        row = next(iter(seeds.values()))
        losses = {seed: row["loss"] for seed, row in sorted(seeds.items())}
        exact = {seed: row["loss"] for seed, row in groups.get((method, optimizer, "float32"), {}).items()}
        cells.append((
            method, optimizer, wire, f"{row['lr']:g}, {row['momentum']:g}", f"1/{row['compression']:.3g}",
            _loss(_mean(losses.values())), ", ".join(map(_loss, losses.values())),
            *(("-", "-") if wire == "float32" or not exact else verdict(losses, exact)),
        ))  # fmt: skip
    return heads, cells


def verdict(losses, exact):
    """What few bits gain, seed by seed in the mean, and whether their mean is among the seeds of 32 bits, or below."""
    if None in losses.values() or None in exact.values():
        return "diverged", "no"
    gains = [exact[seed] - losses[seed] for seed in losses if seed in exact]
    mean, low, high = _mean(losses.values()), min(exact.values()), max(exact.values())
    within = "below" if mean < low else "yes" if mean <= high else "no"
    return f"{statistics.mean(gains):+.3f}" if gains else "-", within


def _mean(losses):
    return None if None in losses else statistics.mean(losses)


def _loss(loss):
    return "diverged" if loss is None else f"{loss:.3f}"


if __name__ == "__main__":
    sys.exit(main())
