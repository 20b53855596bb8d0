"""The gradient noise scale of the suite's tasks: is their batch far from the critical one?

    python benchmarks/suite/noise.py            every task with settings, some minutes
    python benchmarks/suite/noise.py --docs     docs/tables/results_noise.md from what is committed

Each task is trained as plain DDP trains it on 4 ranks, with the settings found for it, in one process. In every step
the squared norms of the ranks' own gradients and of their mean give unbiased estimates of the true gradient's squared
norm and of the trace of an example's covariance (McCandlish et al., arXiv 1812.06162, appendix A); both are averaged
over a stretch of steps, and their ratio is the noise scale, in examples. A batch far below it gains from every example
more; far above it, larger batches are wasted, and so is averaging over ranks.
"""
import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common.record import RESULTS, load, origin, print_table, save, write_table

from suite import ways
from suite.outcomes import RANKS, found
from suite.plan import TUNING_SEED
from suite.tasks import TASKS
from suite.train_rank import optimizer_of, rate

NAME = "results_noise"
STRETCHES = 6  # of a training


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--steps", type=int, help="in the place of a task's own")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--docs", action="store_true", help="only write docs/tables from what is committed")
    args = parser.parse_args()
    if args.docs:
        record = load(NAME)
        return write_table(NAME, *table(record["rows"]), f"{SAID} {origin(record)}")
    plan = found().plan
    rows = []
    for task in args.tasks:
        if settings := plan.settled(task, ways.DDP):
            rows += measure(task, plan.run(task, ways.DDP, settings, TUNING_SEED, args.steps))
    save(NAME, "python benchmarks/suite/noise.py", rows, args.out)
    print_table(*table(rows))


def measure(name: str, run: dict) -> list[dict]:
    """A row a stretch of the training: from where to where, and the noise scale there."""
    task = TASKS[name]
    data = [task.data(rank, RANKS, run["seed"], task.batch, None) for rank in range(RANKS)]
    torch.manual_seed(run["seed"])
    model = task.model()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_of(task, run, parameters)
    rows, estimates, begin = [], [], 1
    for step in range(1, run["steps"] + 1):
        for group in optimizer.param_groups:
            group["lr"] = run["lr"] * rate(step - 1, run["steps"], task.warm_up)
        mean, own = None, []
        for one in data:
            flat = torch.cat([g.flatten() for g in torch.autograd.grad(model(one.batch()), parameters)])
            own.append(float(flat.square().sum()))
            mean = flat / RANKS if mean is None else mean.add_(flat, alpha=1 / RANKS)
        estimates.append(scales(statistics.mean(own), float(mean.square().sum()), task.batch, RANKS))
        for p, g in zip(parameters, mean.split([p.numel() for p in parameters])):
            p.grad = g.view_as(p).clone()
        optimizer.step()
        if step * STRETCHES // run["steps"] > (step - 1) * STRETCHES // run["steps"]:
            squared, trace = (statistics.mean(column) for column in zip(*estimates))
            rows.append({"task": name, "from": begin, "to": step, "examples": trace / squared if squared > 0 else None,
                         "batch": task.batch * RANKS, "lr": run["lr"], "momentum": run["momentum"]})  # fmt: skip
            estimates, begin = [], step + 1
    return rows


def scales(own: float, mean: float, batch: int, ranks: int) -> tuple[float, float]:
    """Unbiased estimates of the true gradient's squared norm, and of the trace of one example's covariance.

    own: the squared norm of a rank's gradient, the mean over the ranks; mean: that of the ranks' mean gradient; batch:
    a rank's examples. Of one step they may be negative.
    """
    squared = (ranks * mean - own) / (ranks - 1)
    trace = batch * (own - mean) / (1 - 1 / ranks)
    return squared, trace


def table(rows):
    """A row a task: its batch, and the noise scale over the training."""
    heads = ("task", "batch, all ranks", *(f"part {i + 1} of {STRETCHES}" for i in range(STRETCHES)))
    cells = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of = [row for row in rows if row["task"] == task]
        cells.append((TASKS[task].label, str(of[0]["batch"]),
                      *("-" if row["examples"] is None else f"{row['examples']:.0f}" for row in of)))  # fmt: skip
    return heads, cells


SAID = ("The gradient noise scale in examples, over the parts of a training; \"-\": the gradient is too small to be "
        "told from its noise. A batch below it gains from more examples, one far above it does not.")


if __name__ == "__main__":
    sys.exit(main())
