"""Does error feedback help asynchronous sparsified SGD? The experiment of elastic consistency's second version, anew.

    python benchmarks/elastic/error_feedback.py             about seven minutes on two cores
    python benchmarks/elastic/error_feedback.py --docs      docs/tables/elastic_error_feedback.md from what is committed

A small CNN on scikit-learn's digits, trained by thinwire.hogwild: 1 to 8 workers on the cores that there are, all
blocks, the heaviest 10 % or the heaviest 1 % in an update, with and without error feedback. Every run makes the same
number of updates in all. For each method and number of workers the learning rate is the one of the lowest training
loss, mean over seeds; accuracy is of held-out digits at that rate. A seed decides the split of the data, the model's
start and the batches; the order of the workers' updates is the operating system's, so figures differ between runs.

Results go to benchmarks/results/elastic_error_feedback.json, and the picture beside it.
"""
import argparse
import functools
import math
import statistics
import sys
import time
from pathlib import Path

import thinwire.hogwild
import torch
from rich.progress import track
from sklearn.datasets import load_digits
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common.record import RESULTS, load, markdown, origin, picture, print_table, save, write_table

NAME = "elastic_error_feedback"
COMMAND = "python benchmarks/elastic/error_feedback.py"
# At density 1 nothing is left for a memory, so dense with error feedback is the same as dense.
METHODS = {
    "dense": {"density": 1.0, "memory": "none"},
    "10 %": {"density": 0.1, "memory": "none"},
    "10 %, error feedback": {"density": 0.1, "memory": "error_feedback"},
    "1 %": {"density": 0.01, "memory": "none"},
    "1 %, error feedback": {"density": 0.01, "memory": "error_feedback"},
}
BLOCK_SIZE = 4  # the model is small: with larger blocks, one in each parameter would be more than 1 %
BATCH = 16


# ---- one run ----


@functools.lru_cache(maxsize=8)
def digits(seed):
    """Images and labels: (1200 to train on, 597 held out), another split for every seed."""
    pixels, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images, labels = pixels[order].float().view(-1, 1, 8, 8) / 16, labels[order]
    return (images[:1200], labels[:1200]), (images[1200:], labels[1200:])


def make_batches(worker, workers, seed):
    (images, labels), _ = digits(seed)
    generator = torch.Generator().manual_seed(1000 * seed + worker)
    while True:
        batch = torch.randint(len(labels), (BATCH,), generator=generator)
        yield images[batch], labels[batch]


def loss_fn(model, batch):
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


def new_model(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def one_run(pool, method, rate, seed, updates):
    model = new_model(seed)
    report = thinwire.hogwild.train(
        model, functools.partial(make_batches, seed=seed), loss_fn, workers=pool, updates=updates, seed=seed,
        optimizer=functools.partial(torch.optim.SGD, lr=rate), block_size=BLOCK_SIZE, dense_below=0,
        consistency_every=20, **METHODS[method],
    )  # fmt: skip
    training, (images, labels) = digits(seed)
    with torch.no_grad():
        loss = float(loss_fn(model, training))
        accuracy = float((model(images).argmax(1) == labels).float().mean())
    return {
        "workers": pool.workers, "method": method, "lr": rate, "seed": seed,
        "loss": loss if math.isfinite(loss) else None, "accuracy": accuracy, "dropped": report.dropped,
        "inconsistency_mean": report.inconsistency_mean, "inconsistency_max": report.inconsistency_max,
        "bound": report.bound, "largest_step": report.largest_step, "max_delay": report.max_delay,
        "mean_delay": sum(d * n for d, n in report.delays.items()) / max(report.updates, 1),
        "share": report.share, "updates_per_second": report.updates_per_second,
    }  # fmt: skip


# ---- all runs ----


def measure(args):
    begin, rows = time.monotonic(), []
    for workers in args.workers:
        runs = [(seed, rate, method) for seed in range(args.seeds) for rate in args.rates for method in METHODS]
        with thinwire.hogwild.Workers(workers) as pool:
            for seed, rate, method in track(runs, f"{workers} worker{'s' * (workers > 1)}"):
                rows.append(one_run(pool, method, rate, seed, args.updates))
    parameters = sum(p.numel() for p in new_model(0).parameters())
    return save(NAME, COMMAND, rows, args.out, updates=args.updates, batch=BATCH, block_size=BLOCK_SIZE,
                seeds=list(range(args.seeds)), parameters=parameters,
                minutes=(time.monotonic() - begin) / 60)  # fmt: skip


def best_of(rows):
    """{(workers, method): the runs of all seeds at the learning rate of the lowest mean training loss}."""
    best = {}
    for workers, method in dict.fromkeys((row["workers"], row["method"]) for row in rows):
        by_rate = {}
        for row in rows:
            if (row["workers"], row["method"]) == (workers, method):
                by_rate.setdefault(row["lr"], []).append(row)
        best[workers, method] = min(by_rate.values(), key=_loss)
    return best


def _loss(runs):
    return statistics.mean(math.inf if row["loss"] is None else row["loss"] for row in runs)


def quality_table(rows):
    """A row a number of workers: training loss, held-out accuracy, and the learning rate that was best."""
    best = best_of(rows)
    methods = list(dict.fromkeys(method for _, method in best))
    cells = []
    for workers in dict.fromkeys(workers for workers, _ in best):
        texts = []
        for method in methods:
            runs = best[workers, method]
            accuracy, spread = _percent(runs)
            texts.append(f"{_loss(runs):.4f}, {accuracy:.1f} ± {spread:.1f} % (lr {runs[0]['lr']:g})")
        cells.append((str(workers), *texts))
    return ("workers", *methods), cells


def consistency_table(rows):
    """The same runs: mean inconsistency ||x - v|| / lr, and the longest delay."""
    best = best_of(rows)
    methods = list(dict.fromkeys(method for _, method in best))
    cells = []
    for workers in dict.fromkeys(workers for workers, _ in best):
        texts = []
        for method in methods:
            runs = best[workers, method]
            mean = statistics.mean(row["inconsistency_mean"] for row in runs)
            texts.append(f"{mean:.3g}, {max(row['max_delay'] for row in runs)}")
        cells.append((str(workers), *texts))
    return ("workers", *methods), cells


def _percent(runs):
    values = [100 * row["accuracy"] for row in runs]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def differences(rows):
    """{(density, workers): accuracy with error feedback minus without, per cent, as (mean, standard error)} by seed."""
    best, found = best_of(rows), {}
    for workers, method in best:
        with_memory = best.get((workers, f"{method}, error feedback"))
        if with_memory is None:
            continue
        without = {row["seed"]: row["accuracy"] for row in best[workers, method]}
        gains = [100 * (row["accuracy"] - without[row["seed"]]) for row in with_memory]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else math.inf
        found[method, workers] = statistics.mean(gains), error
    return found


def verdict(rows):
    """What came out, in words: where error feedback changed accuracy by more than two standard errors."""
    lines = []
    for density in dict.fromkeys(density for density, _ in differences(rows)):
        parts = []
        for (one, workers), (gain, error) in differences(rows).items():
            if one == density:
                word = "no difference" if abs(gain) <= 2 * error else "helps" if gain > 0 else "hurts"
                parts.append(f"{workers} worker{'s' * (workers > 1)} {gain:+.1f} ± {error:.1f} ({word})")
        lines.append(f"Error feedback at {density}, points of accuracy over the same seeds: {'; '.join(parts)}.")
    return lines


def edge_of_the_grid(rows):
    """Methods whose best learning rate is the grid's first or last, and might be better beyond it."""
    rates = sorted({row["lr"] for row in rows})
    return sorted(f"{method} with {workers}" for (workers, method), runs in best_of(rows).items()
                  if runs[0]["lr"] in (rates[0], rates[-1]))  # fmt: skip


def draw(record, path):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    best = best_of(record["rows"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    methods = list(dict.fromkeys(method for _, method in best))
    workers = list(dict.fromkeys(workers for workers, _ in best))
    colours = {"dense": "black", "10 %": "tab:blue", "1 %": "tab:red"}
    for i, method in enumerate(methods):
        style = {"color": colours[method.split(",")[0]], "label": method, "capsize": 3,
                 "linestyle": "--" if "feedback" in method else "-", "marker": "o"}  # fmt: skip
        places = [position + 0.04 * (i - 2) for position in range(len(workers))]
        means, spreads = zip(*(_percent(best[n, method]) for n in workers))
        left.errorbar(places, means, spreads, **style)
        inconsistencies = [[row["inconsistency_mean"] for row in best[n, method]] for n in workers]
        right.errorbar(places, [statistics.mean(one) for one in inconsistencies], **style)
    for axes, text in ((left, "held-out accuracy, %"), (right, "mean inconsistency ‖x − v‖ / lr")):
        axes.set_xticks(range(len(workers)), workers)
        axes.set_xlabel("workers")
        axes.set_ylabel(text)
    right.set_yscale("symlog", linthresh=0.1)  # one worker without a residual has none at all
    right.set_ylim(bottom=0)
    left.legend(fontsize=8)
    figure.suptitle(f"Asynchronous SGD on digits, {record['updates']} updates, {len(record['seeds'])} seeds, "
                    "best learning rate of each")  # fmt: skip
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def footer(record):
    shares = {row["method"].split(",")[0]: row["share"] for row in record["rows"]}
    rates = sorted({row["lr"] for row in record["rows"]})
    lines = [
        "Training loss, held-out accuracy (mean ± standard deviation over seeds) and the best learning rate of "
        f"{', '.join(f'{rate:g}' for rate in rates)}. The same runs' mean inconsistency ‖x − v‖ / lr, and longest "
        "delay in updates:", "",
        markdown(*consistency_table(record["rows"])), "",
        *verdict(record["rows"]), "",
        f"{record['parameters']} parameters, {record['updates']} updates of {record['batch']} digits in all, blocks of "
        f"{record['block_size']} elements; really written: "
        + ", ".join(f"{100 * share:.3g} % at {name}" for name, share in shares.items() if name != "dense")
        + f". Seeds {record['seeds'][0]} to {record['seeds'][-1]}, {record['minutes']:.0f} minutes. "
        + origin(record), "",
        picture(NAME, "Accuracy and inconsistency against workers"),
    ]  # fmt: skip
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4], help="learning rates")
    parser.add_argument("--seeds", type=int, default=5, help="how many (default 5)")
    parser.add_argument("--updates", type=int, default=600, help="of all workers together (default 600)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--docs", action="store_true", help="only write docs/tables from what is committed")
    args = parser.parse_args()
    if args.docs:
        record = load(NAME)
        return write_table(NAME, *quality_table(record["rows"]), footer(record))
    record = measure(args)
    draw(record, args.out / f"{NAME}.png")
    print_table(*quality_table(record["rows"]), title="training loss, held-out accuracy (best learning rate)")
    print_table(*consistency_table(record["rows"]), title="mean inconsistency ||x - v|| / lr, longest delay")
    print("\n".join(verdict(record["rows"])))
    if edges := edge_of_the_grid(record["rows"]):
        print(f"best at the first or last of the learning rates, and perhaps better beyond: {', '.join(edges)}")
    print(f"{record['minutes']:.1f} minutes")


if __name__ == "__main__":
    sys.exit(main())
