"""The comparisons of "99% of Distributed Optimization is a Waste of Time" (1901.09437), figure by figure.

    python benchmarks/independent_blocks/reproduce.py                     every figure, about seven minutes of one core
    python benchmarks/independent_blocks/reproduce.py --figures 3 stall   some of them
    python benchmarks/independent_blocks/reproduce.py --docs              docs/tables from the committed result

Workers are simulated and iterations counted, as in the paper; the blocks are drawn by thinwire's own selections. On
the paper's quadratics (its equation 17) and on logistic regression over two data sets that come with scikit-learn, in
the place of the paper's. Every line is run with several seeds; beside it stands what its theorem promises. The paper
shows curves and no numbers, so that there are none of it to compare with. Theorem 6's promise for logistic regression
is an estimate, as its sigma^2 is taken at two points only.

Left in the output folder: independent_blocks.json, independent_blocks.png (a choice of them) and
independent_blocks_all.png. Exits with 1 if the mean over seeds of any line is later than its theorem promises.
"""
import argparse
import math
import statistics
import sys
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common.record import RESULTS, load, origin, print_table, save, write_table

from independent_blocks.figures import (
    CLOSE,
    FIGURES,
    NEAR,
    PAPERS_L2,
    ROUGH,
    SEEDS,
    SWEPT,
    logistic,
    quadratics,
    workers_of,
)
from independent_blocks.pictures import draw, draw_all

NAME = "independent_blocks"
POINTS = 24  # of a curve that is kept
LOST = 1e6  # an error that no more steps will mend


def measure(run, seeds) -> dict:
    """A run's row of the record; with a grid, that of the value whose slowest seed was the fastest."""
    if not run.grid:
        return _measure(run, run.make(seeds), run.steps)
    best, steps = None, run.steps
    for value in run.grid:
        row = _measure(run, run.make(seeds, value), steps) | {"growth": value}
        if best is None or _order(row) < _order(best):
            best = row
        if best["most"] is not None:
            steps = best["most"]  # what takes longer is no better
    return best


def _order(row):
    unreached = lambda value: math.inf if value is None else value
    return unreached(row["most"]), unreached(row["iterations"]), row["final"]


def _measure(run, algorithm, steps):
    """Run to the accuracy or for so many steps. Errors are relative to the start, and looked at every so many steps."""
    error = run.of.gap if run.gap else lambda x: (x - run.of.solution).square().sum(1)
    start = error(algorithm.x)
    reached = torch.full(start.shape, math.inf, dtype=torch.float64)
    errors, times, on_average = [torch.ones_like(start)], [0], math.inf
    for t in range(1, steps + 1):
        algorithm.step(t - 1)
        if t % run.every and t < steps:
            continue
        errors.append(error(algorithm.mean if run.averaged else algorithm.x) / start)
        times.append(t)
        reached = torch.where(errors[-1] <= run.accuracy, reached.clamp(max=t), reached)
        mean = errors[-1].mean().item()
        on_average = min(on_average, t if mean <= run.accuracy else math.inf)
        if run.stop and reached.isfinite().all() and on_average <= t or not mean < LOST:
            break
    promise = promised(run)
    overdue = promise is not None and promise + run.every <= min(on_average, times[-1])
    final = torch.stack(errors[-max(1, len(errors) // 10) :]).mean(0)
    whole = lambda value: int(value) if math.isfinite(value) else None
    kept = sorted({0, *(round((len(errors) - 1) ** (i / (POINTS - 1))) for i in range(POINTS))})
    return {
        "figure": run.figure, "problem": run.problem, "algorithm": run.algorithm, "n": run.n, "tau": run.tau,
        "gamma_L": run.gamma, "of": "f - f*" if run.gap else "||x - x*||^2", "accuracy": run.accuracy,
        "iterations": whole(statistics.median(reached.tolist())), "fewest": whole(reached.min().item()),
        "most": whole(reached.max().item()), "promised": promise, "late": overdue,
        "final": _short(final.median().item()), "steps": times[-1], "budget": steps, **run.more,
        "curve": [[times[i], _short(errors[i].mean().item()), run.bound and _short(run.bound(times[i]))] for i in kept],
    }  # fmt: skip


def _short(value):
    return float(f"{value:.3g}")


def promised(run) -> int | None:
    """The first step at which the theorem's bound is at the accuracy, None if there is no theorem or no such step."""
    low, high = 0, 1
    if run.bound is None:
        return None
    while run.bound(high) > run.accuracy:
        low, high = high, 2 * high
        if high > 1e12:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if run.bound(middle) > run.accuracy else (low, middle)
    return high


def measure_all(figures, few, seeds) -> list[dict]:
    columns = TextColumn("figure {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns) as progress:
        task = progress.add_task("", total=None)
        runs = [run for figure in figures for run in FIGURES[figure](few)]
        progress.update(task, total=len(runs))
        rows = []
        for run in runs:
            progress.update(task, description=f"{run.figure}, {run.algorithm}, n={run.n}")
            if few:
                run.steps = min(run.steps, 40)
            rows.append(measure(run, seeds))
            progress.advance(task)
    return rows


def late(rows) -> list[str]:
    """The rows whose mean over seeds came to the accuracy later than their theorem promises, a line each."""
    return [f"figure {row['figure']}, {row['problem']}: {row['algorithm']}, n={row['n']}, tau={row['tau']:.3g} took "
            f"more than the {row['promised']} iterations promised" for row in rows if row["late"]]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=list(FIGURES), metavar="FIGURE",
                        help=f"of {' '.join(FIGURES)} (default all)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="few workers, seeds and steps: only to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default benchmarks/results)")
    parser.add_argument("--docs", action="store_true", help="only write docs/tables from what is committed")
    args = parser.parse_args()
    if args.docs:
        return write_docs(load(NAME))
    complete = not args.quick and args.figures == list(FIGURES)
    if args.out == RESULTS and not complete:
        parser.error("a part of the figures would overwrite the committed result: name a folder with --out")
    torch.set_num_threads(1)  # the same sums whatever the machine; and for such small products no slower
    seeds = SEEDS[:2] if args.quick else SEEDS
    rows = measure_all(args.figures, args.quick, seeds)
    command = "python benchmarks/independent_blocks/reproduce.py" + " --quick" * args.quick
    if args.figures != list(FIGURES):
        command += " --figures " + " ".join(args.figures)
    save(NAME, command, rows, args.out, seeds=seeds)
    show(rows)
    draw_all(rows, args.out / f"{NAME}_all.png")
    if complete:
        draw(rows, args.out / f"{NAME}.png")
    return "\n".join(late(rows)) or None


def iterations(row) -> str:
    """Median and range over seeds, or the number of steps that were not enough for most of them."""
    if row["iterations"] is None:
        return f"> {row['budget']}"
    if row["fewest"] == row["most"]:
        return str(row["iterations"])
    return f"{row['iterations']} ({row['fewest']} - {row['most'] or 'never'})"


def show(rows):
    for figure in dict.fromkeys(row["figure"] for row in rows):
        print_table(
            ("problem", "algorithm", "n", "n tau", "gamma L", "accuracy", "iterations", "promised", "error at the end"),
            [(row["problem"], row["algorithm"] + _extra(row), str(row["n"]), f"{row['n'] * row['tau']:.3g}",
              "" if row["gamma_L"] is None else f"{row['gamma_L']:.3g}", f"{row['accuracy']:g}", iterations(row),
              str(row["promised"] or ""), f"{row['final']:.2g}") for row in rows if row["figure"] == figure],
            title=f"figure {figure}",
        )  # fmt: skip


def _extra(row):
    names = {"growth": "ρ", "max_delay": "M"}
    return "".join(f", {name}={row[key]:.3g}" for key, name in names.items() if key in row)


# The documentation's table: what a line says, its figure, problem and algorithm, and which of the row's values
LINES = (
    ("quadratics: GD, step size 1/(2L)", "3", "quadratics", "GD, 1/(2L)", "iterations"),
    ("quadratics: IBCD", "3", "quadratics", "IBCD", "iterations"),
    ("as theorem 1 promises", "3", "quadratics", "IBCD", "promised"),
    ("quadratics: the same blocks on all workers (CD)", "3", "quadratics", "CD, same blocks", "iterations"),
    ("quadratics: disjoint blocks (PermK)", "3", "quadratics", "PermK", "iterations"),
    ("quadratics, ∇f_i(x*) ≠ 0: ISEGA", "2 = 11", "quadratics", "ISEGA", "iterations"),
    ("digits: GD, step size 1/(2L)", "2 = 11", "digits", "GD, 1/(2L)", "iterations"),
    ("digits: ISEGA", "2 = 11", "digits", "ISEGA", "iterations"),
    ("as theorem 3 promises, for its smaller steps", "2 = 11", "digits", "ISEGA, theorem 3", "promised"),
    ("digits: ISAGA", "1 = 9", "digits", "ISAGA", "iterations"),
    ("digits: ISGD", "5", "digits", "ISGD, γτ = 1/(5L)", "iterations"),
    ("digits: accelerated ISGD", "7", "digits", "IASGD", "iterations"),
    ("quadratics, ∇f_i(x*) ≠ 0: error that IBCD stalls at", "stall", "quadratics", "IBCD", "final"),
    ("the same: ISEGA's error after 2000 iterations", "stall", "quadratics", "ISEGA", "final"),
)


def write_docs(record):
    """A column for every n."""
    columns, lines, rows = workers_of("digits"), [], record["rows"]
    for label, figure, problem, algorithm, key in LINES:
        mine = {row["n"]: row for row in _of(rows, figure, problem, algorithm) if row["tau"] in (1 / row["n"], 1.0)
                and (figure != "stall" or row["tau"] < 1)}  # fmt: skip
        cell = {"iterations": iterations, "promised": lambda row: str(row["promised"]),
                "final": lambda row: f"{row['final']:.1e}"}[key]  # fmt: skip
        lines.append((label, *(cell(mine[n]) for n in columns)))
    write_table(NAME, ("iterations, τ = 1/n; n =", *map(str, columns)), lines, footer(record))


def footer(record) -> str:
    """What the numbers are of, and where they are not as the paper's figures are."""
    rows = record["rows"]
    median = lambda *which: iterations(_of(rows, *which)[0]).split(" (")[0]
    sweep = lambda *which: [median(*which, tau) for tau in (1 / SWEPT, 1.0)]
    saga, sgd, asgd = (median(figure, "digits", f"{name}, n=1")
                       for figure, name in (("1 = 9", "SAGA"), ("5", "SGD"), ("7", "ASGD")))  # fmt: skip
    ibcd, isaga, iasgd = sweep("4", "quadratics", "IBCD"), sweep("10", "digits", "ISAGA"), sweep("8", "digits", "IASGD")
    quarter = median("4", "quadratics", "IBCD", 1 / (4 * SWEPT))
    conditions = [f"{problem.L / problem.mu:.0f}" for problem in (logistic("digits", 2), logistic("digits", 64),
                  quadratics(2, heterogeneous=True), quadratics(64, heterogeneous=True))]  # fmt: skip
    ill = [median("10", f"digits, ℓ2 = {PAPERS_L2:g}", "ISAGA", tau) for tau in (1 / SWEPT, 1.0)]
    samples = [f"{problem.L_sample / problem.mu:.0f}" for problem in (logistic("digits", 2),
               logistic("digits", SWEPT, PAPERS_L2))]  # fmt: skip
    hundred = median("2 = 11", "quadratics", "ISEGA", 1 / 100)
    noise = [_of(rows, "6", "digits", "ISGD, γτ = 1/(3L)", tau)[0]["final"] for tau in (1 / SWEPT, 4 / SWEPT, 1.0)]
    return (
        f"Medians (and ranges) of {len(record['seeds'])} seeds. Iterations until ‖x - x*‖² is {NEAR:g} of what it was, "
        f"for ISAGA until f - f* is {CLOSE:g} of it, and {ROUGH['digits']:g} for ISGD and accelerated ISGD, which have "
        "one sample a worker and step. With one worker and τ = 1 those are SAGA, SGD and accelerated SGD: "
        f"{saga}, {sgd} and {asgd}. Errors too are relative to the start.\n\n"
        "Not as in the paper, or to be read with care:\n"
        "- The data are scikit-learn's digits and breast cancer, in place of a1a, mushrooms, phishing and w1a, with "
        f"rows scaled to length 1. ℓ2 is 1e-3 (L/μ of the samples {samples[0]}), where the paper's figure 10 "
        f"has {PAPERS_L2:g} ({samples[1]}). With that, ISAGA on digits (n = {SWEPT}) takes {ill[0]} iterations for "
        f"τ = 1/n and {ill[1]} for τ = 1.\n"
        "- Independent of n means up to a constant: IBCD's steps are worth a third of those of GD.\n"
        f"- ISEGA needs L/μ ≥ n (corollary 3). That is {conditions[0]} to {conditions[1]} on digits, but "
        f"{conditions[2]} falling to {conditions[3]} on the quadratics, where its iterations grow with n, to {hundred} "
        "for n = 100.\n"
        f"- A larger τ than 1/n does help. With n = {SWEPT}, τ = 1 in the place of 1/n: IBCD {ibcd[0]} -> {ibcd[1]}, "
        f"ISAGA {isaga[0]} -> {isaga[1]}, accelerated ISGD {iasgd[0]} -> {iasgd[1]}. A smaller one hurts: IBCD "
        f"{quarter} at 1/(4n).\n"
        "- Where gradients are stochastic, n workers with τ = 1/n are as good as one and not as n: ISGD's error comes "
        f"to rest at {noise[0]:.2g} for τ = 1/n, {noise[1]:.2g} for 4/n, {noise[2]:.2g} for 1 (n = {SWEPT}).\n"
        "- The step size 1/(5L) of figure 5 is taken as that of an unbiased estimate, which is γτ of algorithm 6. As "
        f"its γ, iterations grow with n: {median('5', 'digits', 'ISGD, γ = 1/(5L)')} for n = {SWEPT}.\n"
        "- At the step size of figures 9 and 10 theorem 2's rate is 0, and that of figures 11 and 12 is about four "
        "times theorem 3's: they work, but are promised nothing.\n"
        "- What theorem 6 promises for logistic regression is an estimate: its σ² is that of every x, and here the "
        "larger of those at x0 and x*. Theorem 2 bounds ‖x - x*‖² plus the table's error: its promise for f - f* is "
        "L/2 times that.\n\n" + origin(record)
    )


def _of(rows, figure, problem, algorithm, tau=None):
    return [row for row in rows if (row["figure"], row["problem"], row["algorithm"]) == (figure, problem, algorithm)
            and (tau is None or math.isclose(row["tau"], tau))]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
