"""Scale on paper: a cost model fitted to measured steps, checked against others, and drawn from 2 to 1024 ranks.

    python benchmarks/suite/scale.py            fits, checks, draws; a second
    python benchmarks/suite/scale.py --docs     docs/tables/scale.md from the committed result

Reads the step times that train.py keeps (results/train.jsonl). A step is taken to be

    computation + encoding and decoding + exchange - what of the exchange DDP hides behind the backward pass
    encoding and decoding = seconds a byte of the gradient, each method's own
    exchange = sum over its collectives (thinwire.advice.cost) of  latency x hops + bytes x (wire / rate + cpu)

with the computation of the noop row beside it, measured and not predicted: what a method adds to that is the test of
the model, and its error is told beside the step's. Ranks that share cores do their own work, ``cpu`` and latency
included, so much slower as there are more of them; otherwise a method's own work is the same on any number of ranks,
which is not true of topk's decoding. Models of under SMALLEST parameters are not fitted, and their errors are told
apart: their steps are latency and Python, of which the model knows one number. Bytes follow each method's law of the
number of ranks; its constant, headers and padding included, is measured. It is a model: nobody has run thinwire on 1024
ranks.
"""
import argparse
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from thinwire import BlockSparse, Dense
from thinwire.advice.cost import ALGORITHMS, Collective, all_reduce, exchanges

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common.record import RESULTS, load, origin, picture, print_table, save, write_table

from suite.ledger import Ledger
from suite.outcomes import side_by_side

NAME = "scale"
RANKS = tuple(2**i for i in range(1, 11))
SHOWN = (4, 32, 256, 1024)  # in the table
SMALLEST = 10_000  # parameters
FIRST_BUCKET = 2**20  # bytes: what DDP exchanges while the backward pass goes on, with models as small as these
# law(elements, ranks, algorithm) gives the collectives of a step; bytes up to a constant.
Law = Callable[[int, int, str], tuple[Collective, ...]]


@dataclass(frozen=True)
class Kind:
    """How a method exchanges. hides: DDP exchanges its first bucket during the backward pass."""

    law: Law
    hides: bool = False


def kind_of(method: str) -> Kind | None:
    """Of a method by its key in the suite, or None where the model has none."""
    if method in ("dense", "fp16", "bf16", "horovod", "horovod-fp16"):
        return Kind(all_reduce, hides=True)
    if method == "dense-one-bucket":
        return Kind(all_reduce)
    if method == "ds-sync":  # groups of 2
        return Kind(lambda elements, n, algorithm: all_reduce(elements, 2, algorithm))
    name = re.sub("-(bf16|fp16|int4|momentum|sega)$", "", method)  # which change constants, not the law
    if re.fullmatch(r"powersgd-\d+", name):
        # Left factors, right factors, and what stays whole, which is little.
        return Kind(lambda elements, n, algorithm: 2 * all_reduce(elements, n, algorithm) + all_reduce(0, n, algorithm))
    if name in ("thinwire-dense", "thinwire"):
        return _ours(Dense(exact=True))  # which is what has been measured
    found = re.fullmatch(r"(independent|permuted|shared|topk|nominated)(?:-([\d.]+))?", name)
    if found is None:
        return None
    selection, percent = found[1], found[2] or ("12.5" if found[1] == "shared" else None)
    density = float(percent) / 100 if percent else None
    if selection in ("topk", "nominated"):
        return None if density is None else _ours(BlockSparse(selection, density=density, block_size=16))
    # Owners' exchange waits for its all-to-all in the hook, so shared hides nothing.
    return _ours(BlockSparse(selection, density=density), hides=selection != "shared")


def _ours(method, hides=False):
    return Kind(lambda elements, n, algorithm: exchanges(method, (elements,), n, algorithm=algorithm), hides)


@dataclass(frozen=True)
class Case:
    """One measured step, in seconds and bytes."""

    task: str
    method: str
    label: str
    ranks: int
    mbit: float
    parameters: int
    compute_s: float
    step_s: float
    sent: float
    local_s: float | None  # encoding and decoding, where the method says

    @property
    def gradient(self) -> int:
        """Its bytes."""
        return 4 * self.parameters


@dataclass(frozen=True)
class Fit:
    """latency_s: of a hop. wire: bytes on the wire for each byte that the interface counts, about 1. cpu_s: seconds of
    a rank's core a byte sent. all_to_all: what an all-to-all's wire takes more, as a share. hidden: the share of the
    computation behind which a first bucket can travel. local_s: by method, seconds a byte of the gradient. scale:
    by task and method, bytes that the interface counts for each one of the law's. cores: that the ranks shared."""

    latency_s: float
    wire: float
    cpu_s: float
    all_to_all: float
    hidden: float
    local_s: dict[str, float]
    scale: dict[tuple[str, str], float]
    cores: int

    def step_s(self, case: Case, ranks: int, crowded: bool = True, algorithm: str = "ring") -> float:
        """The step of a case's task and method on another number of ranks. crowded: all on these cores."""
        crowd = max(1.0, ranks / self.cores) if crowded else 1.0
        kind = kind_of(case.method)
        rate = 1e6 * case.mbit / 8
        exchange = 0.0
        for one in kind.law(case.parameters, ranks, algorithm):
            wire = self.wire * (1 + self.all_to_all * (one.kind == "all_to_all")) / rate
            exchange += crowd * self.latency_s * one.hops
            exchange += self.scale[case.task, case.method] * one.sent * (wire + crowd * self.cpu_s)
        first = min(1.0, FIRST_BUCKET / case.gradient) if kind.hides and case.gradient > FIRST_BUCKET else 0.0
        hidden = min(first * exchange, self.hidden * case.compute_s)
        return case.compute_s + crowd * self.local_s[case.method] * case.gradient + exchange - hidden


def cases_of(rows: Sequence[dict]) -> tuple[list[Case], list[str]]:
    """What the rows hold for the model, and the methods that it has no law for. Of rows of the same method and network
    those of the newest turns with the most methods count."""
    where = lambda row: (row["task"], row["ranks"], row["mbit"])
    alike = {}
    for row in rows:
        if row.get("kind") == "speed" and row.get("mbit") and row.get("step_ms"):
            alike.setdefault((where(row), row["method"]), []).append(row)
    rows = [side_by_side(found) for found in alike.values()]
    compute = {where(row): row["step_ms"]["median"] / 1e3 for row in rows if row["method"] == "noop"}
    cases, unknown = [], set()
    for row in rows:
        if row["method"] == "noop":
            continue
        if kind_of(row["method"]) is None or where(row) not in compute or not row.get("sent_bytes"):
            unknown.add(row["method"])
            continue
        said = [row[name] for name in ("encode_ms", "decode_ms") if row.get(name) is not None]
        cases.append(Case(row["task"], row["method"], row.get("label") or row["method"], row["ranks"], row["mbit"],
                          row["parameters"], compute[where(row)], row["step_ms"]["median"] / 1e3, row["sent_bytes"],
                          sum(said) / 1e3 if said else None))  # fmt: skip
    return cases, sorted(unknown)


def bytes_scale(cases: Sequence[Case]) -> dict[tuple[str, str], float]:
    """By task and method, bytes that the interface counted for each one of the law's."""
    found = {}
    for case in cases:
        law = sum(one.sent for one in kind_of(case.method).law(case.parameters, case.ranks, "ring"))
        found.setdefault((case.task, case.method), []).append(case.sent / law)
    return {key: statistics.median(ratios) for key, ratios in found.items()}


def fit(cases: Sequence[Case], cores: int) -> Fit:
    """Least squares of relative errors, every parameter 0 or more. Raises ValueError where there is nothing to fit."""
    from scipy.optimize import least_squares

    if not cases:
        raise ValueError("no rows to fit: are there speed rows with these ranks and rates?")
    scale, told, free = bytes_scale(cases), {}, []
    for case in cases:
        if case.local_s is None:
            free += [] if case.method in free else [case.method]
        else:
            crowd = max(1.0, case.ranks / cores)
            told.setdefault(case.method, []).append(case.local_s / (crowd * case.gradient))
    told = {method: statistics.median(found) for method, found in told.items()}
    units = np.array([1e-3, 1.0, 1e-8, 1.0, 1.0] + [1e-9] * len(free))
    made = lambda x: Fit(*(x * units)[:5].tolist(), told | dict(zip(free, (x * units)[5:].tolist())), scale, cores)

    def errors(x):
        now = made(x)
        return [now.step_s(case, case.ranks) / case.step_s - 1 for case in cases]

    highest = [np.inf, np.inf, np.inf, np.inf, 1.0] + [np.inf] * len(free)
    begin = np.array([0.5, 1.0, 0.5, 0.2, 0.3] + [1.0] * len(free))
    return made(least_squares(errors, begin, bounds=(0, highest), loss="soft_l1", f_scale=0.1).x)


def checked(cases: Sequence[Case], fitted: Fit, used: Sequence[Case]) -> list[dict]:
    """Measured and predicted, a row a case; those of methods that were not fitted are left out."""
    rows = []
    for case in cases:
        if (case.task, case.method) in fitted.scale and case.method in fitted.local_s:
            predicted = fitted.step_s(case, case.ranks)
            added = case.step_s - case.compute_s
            rows.append({"task": case.task, "method": case.method, "label": case.label, "ranks": case.ranks,
                         "mbit": case.mbit, "parameters": case.parameters,
                         "measured_ms": 1e3 * case.step_s, "predicted_ms": 1e3 * predicted,
                         "error": predicted / case.step_s - 1, "fitted": case in used,
                         "added_error": (predicted - case.step_s) / added if added > 0 else None})  # fmt: skip
    return rows


def projected(cases: Sequence[Case], fitted: Fit, task: str) -> list[dict]:
    """Steps from 2 to 1024 ranks, each with a machine of its own: the computation is that of the fewest ranks."""
    mine = [case for case in cases if case.task == task and (task, case.method) in fitted.scale]
    least = min(case.ranks for case in mine)
    compute = statistics.median(case.compute_s for case in mine if case.ranks == least)
    rows = []
    for mbit in sorted({case.mbit for case in mine}):
        for method, one in {case.method: case for case in mine}.items():
            case = Case(task, method, one.label, 0, mbit, one.parameters, compute, 0.0, 0.0, None)
            for algorithm in ALGORITHMS:
                steps = [1e3 * fitted.step_s(case, n, False, algorithm) for n in RANKS]
                rows.append({"task": task, "method": method, "label": one.label, "mbit": mbit, "algorithm": algorithm,
                             "compute_ms": 1e3 * compute, "ranks": RANKS, "step_ms": steps})  # fmt: skip
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=RESULTS / "train.jsonl", help="lines of JSON")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--fit-ranks", type=int, nargs="+", default=(2, 4), help="runs to fit; the others are checks")
    parser.add_argument("--fit-rates", type=float, nargs="+", default=(50, 1000), help="Mbit/s, of those")
    parser.add_argument("--cores", type=int, default=2, help="that the ranks shared")
    parser.add_argument("--task", help="to draw; that with the most rows if not given")
    parser.add_argument("--docs", action="store_true", help="only write docs/tables from what is committed")
    args = parser.parse_args()
    if args.docs:
        record = load(NAME)
        return write_table(NAME, *table(record), footer(record))
    cases, unknown = cases_of(Ledger.of_newest(args.rows).rows)
    if unknown:
        print(f"no law for, or no noop row or bytes beside: {', '.join(unknown)}", file=sys.stderr)
    at_fit = [case for case in cases if case.ranks in args.fit_ranks and case.mbit in args.fit_rates]
    used = [case for case in at_fit if case.parameters >= SMALLEST]
    if not used or len(used) == len(cases):
        raise SystemExit(f"of {len(cases)} rows {len(used)} are to be fitted: choose --fit-ranks and --fit-rates such "
                         "that some are and some are left to check")  # fmt: skip
    fitted = fit(used, args.cores)
    fitted = replace(fitted, scale=bytes_scale(at_fit))
    rows = checked(cases, fitted, used)
    task = args.task or statistics.mode(case.task for case in cases)
    said = asdict(fitted) | {"scale": {f"{t}, {m}": value for (t, m), value in fitted.scale.items()}}
    record = save(NAME, "python benchmarks/suite/scale.py", rows, args.out, fit=said, fit_ranks=list(args.fit_ranks),
                  fit_rates=list(args.fit_rates), projected=projected(cases, fitted, task))  # fmt: skip
    print_table(*table(record), title="Errors of the model, and steps that it predicts")
    print(footer(record))
    draw(record, args.out / f"{NAME}.png")


def table(record):
    """A row a method: errors on fitted and on other runs, and steps that the model predicts."""
    rate = _rate_shown(record)
    errors = "median error, worst; of what is added"
    heads = ("method", f"fitted runs: {errors}", f"other runs: {errors}",
             *(f"{n} ranks" for n in SHOWN))  # fmt: skip
    ring, tree = ({row["method"]: dict(zip(row["ranks"], row["step_ms"])) for row in record["projected"]
                   if row["mbit"] == rate and row["algorithm"] == algorithm} for algorithm in ALGORITHMS)  # fmt: skip
    cells = []
    for method, label in {row["method"]: row["label"] for row in record["rows"]}.items():
        errors = [_errors([row for row in _of_size(record) if row["method"] == method and row["fitted"] == fitted])
                  for fitted in (True, False)]  # fmt: skip
        steps = [f"{ring[method][n]:.0f} / {tree[method][n]:.0f}" if method in ring else "-" for n in SHOWN]
        cells.append((label, *errors, *steps))
    return heads, cells


def _errors(rows):
    errors = [abs(row["error"]) for row in rows]
    added = _median(abs(row["added_error"]) for row in rows if row["added_error"] is not None)
    return f"{statistics.median(errors):.0%}, {max(errors):.0%} of {len(errors)}; {added}" if errors else "-"


def _median(errors):
    errors = list(errors)
    return f"{statistics.median(errors):.0%}" if errors else "-"


def _of_size(record, small=False):
    return [row for row in record["rows"] if (row["parameters"] < SMALLEST) == small]


def _rate_shown(record):
    rates = sorted({row["mbit"] for row in record["projected"]})
    return 100.0 if 100.0 in rates else rates[0]


def footer(record):
    unseen = [row for row in _of_size(record) if not row["fitted"]]
    small = [abs(row["error"]) for row in _of_size(record, small=True)]
    apart = "" if not small else (
        f"Models under {SMALLEST} parameters are not fitted and not in the table: there {sum(e <= 0.2 for e in small)} "
        f"of {len(small)} runs are within 20 %, and the median error is {_median(small)}. "
    )
    checks = [abs(row["error"]) for row in unseen]
    added = _median(abs(row["added_error"]) for row in unseen if row["added_error"] is not None)
    fitted = record["fit"]
    ranks, rates = (", ".join(f"{x:g}" for x in record[name]) for name in ("fit_ranks", "fit_rates"))
    return (
        f"**A model, not a measurement**: milliseconds a step at {_rate_shown(record):g} Mbit/s, ring / tree, each "
        f"rank on a machine of its own. It was fitted to the runs on {ranks} ranks at {rates} Mbit/s; the other runs, "
        f"with other ranks or rates, it had not seen, and {sum(e <= 0.2 for e in checks)} of those {len(checks)} are "
        f"within 20 %. The computation in each is not predicted but the step that was measured there without any "
        f"exchange; of what a method adds to that, the median error is {added}, of the whole step {_median(checks)}. "
        "A method's own work is taken not to grow with the ranks; topk's decoding does. "
        f"Steps are medians, and Horovod's are set beside DDP's computation. {apart}"
        f"Fitted: {1e3 * fitted['latency_s']:.2f} ms a hop, {1e9 * fitted['cpu_s']:.1f} ns of a core a "
        f"byte sent, {fitted['wire']:.2f} bytes on the wire for each one counted, {fitted['all_to_all']:.0%} more in "
        f"an all-to-all. {origin(record)}\n\n"
        + picture("scale", "Step time against the number of ranks, by the model")
    )


def draw(record, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rates = sorted({row["mbit"] for row in record["projected"]})
    figure, axes = plt.subplots(2, len(rates), figsize=(4.2 * len(rates) + 2, 7.5), squeeze=False, sharex=True)
    methods = list({row["method"]: None for row in record["projected"]})
    colours = plt.get_cmap("tab20")
    for across, mbit in enumerate(rates):
        for down, algorithm in enumerate(ALGORITHMS):
            axis = axes[down][across]
            for row in record["projected"]:
                if (row["mbit"], row["algorithm"]) == (mbit, algorithm):
                    axis.plot(row["ranks"], row["step_ms"], color=colours(methods.index(row["method"]) % 20),
                              label=row["label"])  # fmt: skip
                    compute = row["compute_ms"]
            axis.axhline(compute, color="grey", linestyle=":", label="computation alone")
            axis.set(xscale="log", yscale="log", title=f"{algorithm}, {mbit:g} Mbit/s")
            axis.set_xscale("log", base=2)
            axis.set_xlabel("ranks" if down else "")
            axis.set_ylabel("" if across else "ms a step (model)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", fontsize=7)
    figure.suptitle("A model fitted to runs on few ranks, not a measurement")
    figure.tight_layout(rect=(0, 0, 0.86, 1))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
