"""Elastic consistency measured: how far workers' parameters are from the ideal iterate, against the bound B.

    python benchmarks/elastic/bounds.py             every system of the table, about two minutes
    python benchmarks/elastic/bounds.py --docs      docs/tables/elastic_bounds.md from the committed result

The systems of Nadiradze et al. (2001.05918), and local steps, simulated (relaxations.py) as they train a small network
on the digits of scikit-learn, and error feedback with thinwire's own operators. Measured is the root of the mean of
||x - v||^2 over workers and seeds, over lr, and M and sigma are roots of such means too, of ||g||^2 and of
||g - grad f(v)||^2; each is the largest of all steps. The bounds follow from triangle inequalities, which hold for such
means exactly as for expectations; that of random blocks holds in expectation only, and those with sigma for
lr <= 1 / (6 L). "worst" is the one worker and seed that was farthest from x in any step: the bound is not on that.

Left in the output folder: elastic_bounds.json and elastic_bounds.png. Exits with 1 if anything exceeds its bound.
"""
import argparse
import sys
from pathlib import Path

import torch
from rich.progress import track
from thinwire import BlockSparse
from thinwire.consistency import bounds as bound_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common.record import RESULTS, load, origin, print_table, save, write_table

from elastic.relaxations import (
    LR,
    Digits,
    ElasticScheduler,
    LocalRounds,
    Messages,
    MissingMessages,
    SharedMemory,
    error_feedback,
    gamma,
    simulate,
)

STEPS = 150
STEPS_OF_MEMORY = 400  # a residual grows for about as many steps as there are blocks to a block sent
WIDE = 64  # hidden units where blocks are sent: tensors must have many
SLACK = 1 + 1e-9  # rounding: with one message missing the bound is attained
COMPRESSION = "√((2 - γ) γ / (1 - γ)³) M"
DENSITIES = (0.5, 0.1, 0.01)


def systems(numels: tuple[int, ...]) -> dict[str, tuple[str, dict]]:
    """Each system's bound as a formula and its settings: label to workers and relaxation, or workers and method."""
    elastic = lambda beta, late, **options: (8, ElasticScheduler(beta, numels, late, **options))
    blocks = lambda name, density, size: (
        8, BlockSparse(name, density=density, block_size=size, memory="error_feedback", dense_below=0)
    )  # fmt: skip
    return {
        "synchronous": ("0", {"p=8": (8, MissingMessages(0))}),
        "messages one round late": (
            "f M / p",
            {f"p={p} f={f}": (p, MissingMessages(f)) for p, f in ((8, 1), (8, 4), (8, 7), (32, 4), (32, 31))},
        ),
        "messages one round late, own gradient instead": (
            "3 f σ / p",
            {f"p={p} f={f}": (p, MissingMessages(f, own=True)) for p, f in ((8, 1), (8, 4), (8, 7), (32, 4))},
        ),
        "messages up to τ steps late": (
            "(p - 1) τ M / p",
            {f"p={p} τ={late}": (p, Messages(late)) for p, late in ((8, 1), (8, 4), (8, 16), (32, 4))},
        ),
        "shared memory, elements up to τ updates late": (
            "√d τ M",
            {f"τ={late}": (1, SharedMemory(late)) for late in (1, 4, 16)},
        ),
        "error feedback, heaviest blocks": (
            COMPRESSION,
            {f"{density:g} in blocks of {n}": blocks("topk", density, n) for n in (1, 16) for density in DENSITIES},
        ),
        "error feedback, independent random blocks": (
            COMPRESSION,
            {f"{density:g} in blocks of 16": blocks("independent", density, 16) for density in DENSITIES},
        ),
        "error feedback, shared random blocks": (
            COMPRESSION,
            {f"{density:g} in blocks of 16": blocks("shared", density, 16) for density in DENSITIES},
        ),
        "elastic scheduler, norm of the average": (
            "D min(1, (1 - β) √P) M",
            {f"β={beta:g} D={late}": elastic(beta, late)
             for beta, late in ((1, 1), (0.95, 1), (0.8, 1), (0.5, 1), (0, 1), (0.8, 4))},
        ),
        "elastic scheduler, norm of the own gradient": (
            "D min(M, (1 - β) √P M + σ)",
            {f"β={beta:g} D={late}": elastic(beta, late, weigh_own=True)
             for beta, late in ((0.95, 1), (0.8, 1), (0.8, 4))},
        ),
        "elastic scheduler, own gradient instead": (
            "3 D σ",
            {f"β={beta:g} D={late}": elastic(beta, late, weigh_own=True, speculate=True)
             for beta, late in ((0.95, 1), (0.8, 1), (0, 1))},
        ),
        "local steps, averaged every H and k steps late": (
            "(H - 1 + k) M",
            {f"H={every} k={late}": (8, LocalRounds(every, late))
             for every, late in ((1, 0), (4, 0), (16, 0), (16, 4))},
        ),
    }  # fmt: skip


def measure(system, setting, workers, what, seeds, steps=STEPS, steps_of_memory=STEPS_OF_MEMORY, wide=WIDE) -> dict:
    """Run one setting: its row of the record. what: a relaxation, or a BlockSparse with error feedback."""
    if isinstance(what, BlockSparse):
        problem, steps = Digits(wide), steps_of_memory
        outcome = error_feedback(problem, what, seeds, workers, steps)
        left = gamma(what, problem.numels, workers)
        bound, about = bound_of.error_feedback(left, outcome.second_moment), {"gamma": left}
    else:
        problem = Digits()
        outcome = simulate(problem, what, seeds, workers, steps)
        bound, about = what.bound(workers, outcome), {"max_delay": what.max_delay}
    return {"system": system, "setting": setting, "measured": outcome.measured, "bound": bound,
            "worst": outcome.largest, "M": outcome.second_moment, "sigma": outcome.deviation, "L": outcome.smoothness,
            "workers": workers, "steps": steps, "elements": sum(problem.numels)} | about  # fmt: skip


def measure_all(seeds, **smaller) -> list[dict]:
    """A row for every system and setting. smaller: see :func:`measure`."""
    settings = [(system, setting, *one) for system, (_, its) in systems(Digits().numels).items()
                for setting, one in its.items()]  # fmt: skip
    return [measure(*one, seeds, **smaller) for one in track(settings, "systems")]


def exceeded(rows: list[dict]) -> list[str]:
    """What is wrong with the rows, a line each: values above their bounds, and learning rates above what those need."""
    wrong = [f"{row['system']}, {row['setting']}: measured {row['measured']:.6g} is above the bound {row['bound']:.6g}"
             for row in rows if not row["measured"] <= row["bound"] * SLACK]  # fmt: skip
    for row in rows:
        if row["L"] is not None and 6 * row["L"] * row.get("max_delay", 1) * LR > 1:
            wrong.append(f"{row['system']}, {row['setting']}: lr {LR} is above 1 / (6 L max_delay), L = {row['L']:.3g}")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default 0 1 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default benchmarks/results)")
    parser.add_argument("--docs", action="store_true", help="only write docs/tables from what is committed")
    args = parser.parse_args()
    if args.docs:
        return write_docs(load("elastic_bounds"))
    torch.set_num_threads(1)  # the same sums whatever the machine; and for such small products no slower
    rows = measure_all(args.seeds)
    command = "python benchmarks/elastic/bounds.py"
    if args.seeds != parser.get_default("seeds"):
        command += " --seeds " + " ".join(map(str, args.seeds))
    record = save("elastic_bounds", command, rows, args.out, seeds=args.seeds, lr=LR)
    heads = ("system", "setting", "measured", "worst", "bound", "measured / bound")
    print_table(heads, [(row["system"], row["setting"], *(f"{row[key]:.3g}" for key in ("measured", "worst", "bound")),
                         f"{row['measured'] / row['bound']:.3f}" if row["bound"] else "-") for row in rows],
                title="||x - v|| / lr, root of the mean over workers and seeds, largest of all steps")  # fmt: skip
    draw(record, args.out / "elastic_bounds.png")
    return "\n".join(exceeded(rows)) or None


def write_docs(record):
    """A row a system, its settings side by side."""
    lines = []
    for system, (formula, _) in systems(Digits().numels).items():
        mine = [row for row in record["rows"] if row["system"] == system]
        cells = [f"{row['setting']}: {row['measured']:.3g} / {row['bound']:.3g}" for row in mine]
        lines.append((system, formula, "<br>".join(cells)))
    write_table("elastic_bounds", ("what is late or kept back", "B", "measured / bound"), lines, origin(record))


def draw(record: dict, path: Path) -> None:
    """Every measured value against its bound."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    shown = [row for row in record["rows"] if row["bound"] and row["measured"]]
    for i, system in enumerate(dict.fromkeys(row["system"] for row in record["rows"])):
        mine = [row for row in shown if row["system"] == system]
        if mine:
            axes.scatter([row["bound"] for row in mine], [row["measured"] for row in mine], label=system, s=40,
                         color=f"C{i % 10}", marker="os^vDPX"[i % 7])  # fmt: skip
    ends = [min(row["measured"] for row in shown) / 2, max(row["bound"] for row in shown) * 2]
    axes.plot(ends, ends, color="black", linewidth=1, label="measured = bound")
    axes.set(xscale="log", yscale="log", xlabel="bound B", ylabel="measured ‖x - v‖ / lr",
             title="Elastic consistency: workers' views against the ideal iterate")  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
