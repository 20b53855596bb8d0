"""Scale on paper: a cost model with latency in it, fitted to measured steps, checked against others, carried further.

    python benchmarks/suite/scale.py            fits, checks, draws; seconds
    python benchmarks/suite/scale.py --docs     docs/tables/scale.md from the committed result

Reads the step times that steps.py keeps (results/step_times.jsonl). A step is taken to be

    computation + (own work + exchange - what is behind the computation) / steps from one exchange to the next
    own work = seconds a byte of the gradient, each way's own
    exchange = sum over its collectives (thinwire.advice.cost) of
                   (base + trips x the link's delay) x hops + bytes x (1 / rate + cpu) + slow start, see slow_start_s

with the computation that was measured on the same network without any exchange, not predicted: what a way adds to that
is the test of the model, and its error is told beside the step's. Behind the computation is of DDP's hooks a first
bucket's bytes, as far as the backward pass goes on, and of local steps their overlap. Ranks that share cores do their
own work, ``base`` and ``cpu`` included, so much slower as there are more of them. What is fitted is Fit's first five
numbers, and one a way. There should be two trips in a hop: Gloo sends a message once its receiver has asked for it.
Bytes follow each way's law of the number of ranks, which knows how nominations and messages for all grow; its constant,
headers and padding included, is measured. It is a model: nobody has run thinwire on 256 ranks.
"""
import argparse
import functools
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from thinwire import LocalSteps
from thinwire.advice.cost import ALGORITHMS, Collective, all_reduce, exchanges, gathered
from thinwire.local.flight import MEETING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common.record import RESULTS, markdown, origin, picture, print_table, read_rows, save, write_table
from common.record import load as load_record

from suite import ways
from suite.methods import CONTESTANTS
from suite.networks import IN_ONE, MODELS, NOOP, link
from suite.tasks import MAIN
from suite.ways import WAYS

NAME = "scale"
RANKS = tuple(2**i for i in range(1, 9))
SHOWN, RATES, DELAY_MS = (8, 32, 64, 256), (100.0, 250.0), 10.0  # of what it is carried to
FIRST_BUCKET = 2**20  # bytes: what DDP exchanges while the backward pass goes on, with models as small as these
WINDOW = {"relay": 10 * 8948, "Ethernet": 10 * 1448}  # bytes that TCP sends at first, with frames of 9000 and of 1500
LATE = {ways.LATE: 4, ways.LATE_8: 4}  # steps behind which an exchange of these is; of other local steps one
# law(elements of each parameter, ranks, algorithm) gives an exchange's collectives; bytes up to a constant.
Law = Callable[[tuple[int, ...], int, str], tuple[Collective, ...]]


def law_of(way: str) -> Law | None:
    """Of a way by its name in the suite, or None where the model has none."""
    if way in (ways.DDP, ways.HALF, ways.ACCUMULATION, ways.ACCUMULATION_4, ways.POST_LOCAL):
        return lambda numels, n, algorithm: all_reduce(sum(numels), n, algorithm)
    if way == "ds-sync":  # groups of 2
        return lambda numels, n, algorithm: all_reduce(sum(numels), 2, algorithm)
    if way.startswith("powersgd-"):  # what stays whole, which is little, left factors, right factors
        one = lambda numels, n, algorithm: all_reduce(sum(numels), n, algorithm)
        return lambda numels, n, algorithm: 2 * one(numels, n, algorithm) + all_reduce(0, n, algorithm)
    if way in (ways.LOCAL, ways.LOCAL_8, ways.LOCAL_4, "local-64", *LATE):
        inner = LocalSteps().method
        return lambda numels, n, algorithm: (gathered(MEETING, n, algorithm),
                                             *exchanges(inner, numels, n, algorithm=algorithm))  # fmt: skip
    method = CONTESTANTS[way].method if way in CONTESTANTS else None
    if way.startswith(("independent", "topk", "nominated", "thinwire")) and method is not None:
        return lambda numels, n, algorithm: exchanges(method, numels, n, algorithm=algorithm)
    return None


@functools.cache
def numels_of(model: str) -> tuple[int, ...]:
    """Elements of each parameter of a model whose steps are timed."""
    return tuple(p.numel() for p in MODELS[model].model().parameters())


@dataclass(frozen=True)
class Case:
    """One way on one network: its step, in seconds, and the bytes that an exchange sends. mbit: 0 for unshaped.
    window: TCP's first one, in bytes."""

    model: str
    way: str
    ranks: int
    mbit: float
    delay_s: float
    compute_s: float
    step_s: float = 0.0
    sent: float = 0.0
    window: int = WINDOW["Ethernet"]

    @property
    def gradient(self) -> int:
        """Its bytes."""
        return 4 * sum(numels_of(self.model))

    @property
    def seconds_a_byte(self) -> float:
        return 8e-6 / self.mbit if self.mbit else 0.0

    def collectives(self, algorithm: str = "ring") -> tuple[Collective, ...]:
        return law_of(self.way)(numels_of(self.model), self.ranks, algorithm)


def slow_start_s(case: Case, nbytes: float) -> float:
    """What TCP waits for once more when links were idle, with nbytes to one rank: its window begins anew and doubles
    with each round trip, until it holds the message, or as much as the link does."""
    enough = min(nbytes, 2 * case.delay_s / case.seconds_a_byte if case.mbit else math.inf)
    trips = max(0, math.ceil(math.log2(enough / case.window))) if enough > case.window else 0
    return 2 * case.delay_s * trips


@dataclass(frozen=True)
class Fit:
    """base_s: of a hop beside the delay. trips: delays in a hop. cpu_s: seconds of a rank's core a byte sent.
    all_to_all: what an all-to-all's wire takes more, as a share. hidden: the share of the computation behind which a
    first bucket can travel. own_s: by way, seconds a byte of the gradient. scale: by model and way, bytes that the
    interface counts for each one of the law's. cores: that the ranks shared."""

    base_s: float
    trips: float
    cpu_s: float
    all_to_all: float
    hidden: float
    own_s: dict[str, float]
    scale: dict[tuple[str, str], float]
    cores: int

    def step_s(self, case: Case, crowded: bool = True, algorithm: str = "ring") -> float:
        """The step of a case. crowded: all ranks on these cores."""
        crowd = max(1.0, case.ranks / self.cores) if crowded else 1.0
        every, scale = WAYS[case.way].every, self.scale[case.model, case.way]
        waits = wire = 0.0
        for one in case.collectives(algorithm):
            seconds = case.seconds_a_byte * (1 + self.all_to_all * (one.kind == "all_to_all"))
            waits += (crowd * self.base_s + self.trips * case.delay_s) * one.hops
            wire += scale * one.sent * (seconds + crowd * self.cpu_s)
        if every > 1:  # links are idle in between
            waits += slow_start_s(case, scale * max(_message(one) for one in case.collectives(algorithm)))
        added = waits + wire
        if case.way.startswith("local-"):
            added -= min(added, LATE.get(case.way, 1) * case.compute_s)
        elif _in_buckets(case):
            added -= min(wire * FIRST_BUCKET / case.gradient, self.hidden * case.compute_s)
        return case.compute_s + (added + crowd * self.own_s[case.way] * case.gradient) / every


def _message(one):
    """Bytes that go to one rank in one piece."""
    return one.nbytes if one.kind == "all_gather" else one.nbytes / one.ranks


def _in_buckets(case):
    """Whether DDP exchanges its first bucket during the backward pass."""
    in_one = case.way.startswith("powersgd-") or case.way in (ways.POST_LOCAL, "ds-sync")
    return not in_one and case.gradient > FIRST_BUCKET


def cases_of(rows: Sequence[dict]) -> tuple[list[Case], list[str]]:
    """What the rows hold for the model, and the ways that it has no law for. Of rows of the same network the newest
    counts; one without a turn of no exchange holds nothing."""
    rows = {(row["model"], row["ranks"], row["mbit"], row["delay_ms"]): row for row in rows}
    cases, unknown = [], set()
    for (model, ranks, mbit, delay_ms), row in rows.items():
        turns = {}
        for turn in row["turns"]:
            turns.setdefault(turn["method"], []).append(turn)
        if NOOP not in turns or model not in MODELS:
            continue
        mean = lambda name, key: statistics.mean(turn.get(key) or 0 for turn in turns[name])
        compute = 1e-3 * statistics.median(turn["last_ms"] for turn in turns[NOOP])
        # thinwire's gradients in one wave are what the law knows; the others as DDP has them by default.
        waves = {name for name in turns if name + IN_ONE in turns and name.startswith("nominated")}
        for turned in turns.keys() - {NOOP} - waves:
            name = turned.removesuffix(IN_ONE)
            if name != turned and not name.startswith("nominated"):
                continue
            if name not in WAYS or law_of(name) is None or not mean(turned, "sent"):
                unknown.add(name)
                continue
            window = WINDOW["relay" if row.get("delayed_by") == "relay" else "Ethernet"]
            cases.append(Case(model, name, ranks, float(mbit), 1e-3 * delay_ms, compute, 1e-3 * mean(turned, "last_ms"),
                              WAYS[name].every * mean(turned, "sent"), window))  # fmt: skip
    order = list(WAYS)
    return sorted(cases, key=lambda case: order.index(case.way)), sorted(unknown)


def bytes_scale(cases: Iterable[Case]) -> dict[tuple[str, str], float]:
    """By model and way, bytes that the interface counted for each one of the law's."""
    found = {}
    for case in cases:
        found.setdefault((case.model, case.way), []).append(case.sent / sum(one.sent for one in case.collectives()))
    return {key: statistics.median(ratios) for key, ratios in found.items()}


def fit(cases: Sequence[Case], cores: int, scale: dict[tuple[str, str], float] | None = None) -> Fit:
    """Least squares of relative errors, every number 0 or more. scale: see Fit; of these cases if not given.

    Raises ValueError where there is nothing to fit.
    """
    from scipy.optimize import least_squares

    if not cases:
        raise ValueError("no steps to fit: are there networks with these ranks, rates and delays?")
    scale, names = scale or bytes_scale(cases), list(dict.fromkeys(case.way for case in cases))
    units = np.array([1e-3, 1.0, 1e-8, 1.0, 1.0] + [1e-9] * len(names))
    made = lambda x: Fit(*(x * units)[:5].tolist(), dict(zip(names, (x * units)[5:].tolist())), scale, cores)

    def errors(x):
        now = made(x)
        return [now.step_s(case) / case.step_s - 1 for case in cases]

    highest = [np.inf, np.inf, np.inf, np.inf, 1.0] + [np.inf] * len(names)
    begin = np.array([0.5, 1.5, 0.5, 0.2, 0.3] + [1.0] * len(names))
    return made(least_squares(errors, begin, bounds=(0, highest), loss="soft_l1", f_scale=0.1).x)


def checked(cases: Sequence[Case], fitted: Fit, used: Sequence[Case]) -> list[dict]:
    """Measured and predicted, a row a case; those of ways that were not fitted are left out."""
    rows = []
    for case in cases:
        if case.way in fitted.own_s:
            predicted, added = fitted.step_s(case), case.step_s - case.compute_s
            rows.append({"model": case.model, "way": case.way, "ranks": case.ranks, "mbit": case.mbit,
                         "delay_ms": 1e3 * case.delay_s, "measured_ms": 1e3 * case.step_s,
                         "predicted_ms": 1e3 * predicted, "error": predicted / case.step_s - 1, "fitted": case in used,
                         "added_error": (predicted - case.step_s) / added if added > 0 else None})  # fmt: skip
    return rows


def projected(cases: Sequence[Case], fitted: Fit, model: str) -> list[dict]:
    """Steps on more ranks, each with a machine of its own: the computation is that of the fewest ranks."""
    mine = [case for case in cases if case.model == model]
    least = min(case.ranks for case in mine)
    compute = statistics.median(case.compute_s for case in mine if case.ranks == least)
    rows = []
    for mbit, algorithm, way in itertools.product(RATES, ALGORITHMS, fitted.own_s):
        if (model, way) in fitted.scale:
            at = lambda n: Case(model, way, n, mbit, 1e-3 * DELAY_MS, compute)
            steps = [1e3 * fitted.step_s(at(n), False, algorithm) for n in RANKS]
            rows.append({"way": way, "mbit": mbit, "algorithm": algorithm, "compute_ms": 1e3 * compute,
                         "ranks": RANKS, "step_ms": steps})  # fmt: skip
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=RESULTS / "step_times.jsonl", help="lines of JSON")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--fit-ranks", type=int, nargs="+", default=(4,), help="networks to fit; the others are checks")
    parser.add_argument("--fit-rates", type=float, nargs="+", default=(50, 1000), help="Mbit/s, of those")
    parser.add_argument("--fit-delays", type=float, nargs="+", default=(0.1, 10), help="ms one way, of those")
    parser.add_argument("--cores", type=int, default=2, help="that the ranks shared")
    parser.add_argument("--model", default=MAIN, choices=MODELS, help="to fit and to draw")
    parser.add_argument("--docs", action="store_true", help="only write docs/tables from what is committed")
    args = parser.parse_args()
    if args.docs:
        record = load_record(NAME)
        return write_table(NAME, *table(record, RATES[0]), footer(record))
    cases, unknown = cases_of(read_rows(args.rows))
    if unknown:
        print(f"no law for, or no bytes of: {', '.join(unknown)}", file=sys.stderr)
    used = [case for case in cases if case.model == args.model and case.ranks in args.fit_ranks
            and case.mbit in args.fit_rates and round(1e3 * case.delay_s, 3) in args.fit_delays]  # fmt: skip
    if not used or len(used) == len(cases):
        there = dict.fromkeys(f"{case.model}, {case.ranks} ranks, {link(case.mbit, 1e3 * case.delay_s)}"
                              for case in cases)  # fmt: skip
        raise SystemExit(f"of {len(cases)} steps in {args.rows} {len(used)} are to be fitted: choose --fit-ranks, "
                         "--fit-rates and --fit-delays such that some are and some are left to check, of: "
                         + ("; ".join(there) or "nothing"))  # fmt: skip
    fitted = fit(used, args.cores, bytes_scale(cases))
    said = asdict(fitted) | {"scale": {f"{model}, {way}": value for (model, way), value in fitted.scale.items()}}
    chosen = {f"fit_{name}": list(getattr(args, f"fit_{name}")) for name in ("ranks", "rates", "delays")}
    record = save(NAME, "python benchmarks/suite/scale.py", checked(cases, fitted, used), args.out, fit=said,
                  model=args.model, **chosen, projected=projected(cases, fitted, args.model))  # fmt: skip
    for mbit in RATES:
        print_table(*table(record, mbit), title=f"Errors of the model, and steps that it predicts at {mbit:g} Mbit/s")
    print(footer(record))
    draw(record, args.out / f"{NAME}.png")


def table(record, mbit):
    """A row a way: errors on fitted and on other networks, and steps that the model predicts."""
    heads = ("way", "fitted: median error, worst; of what is added", "others: the same", *(f"{n} ranks" for n in SHOWN))
    ring, tree = (_steps(record, mbit, algorithm) for algorithm in ALGORITHMS)
    cells = []
    for way in dict.fromkeys(row["way"] for row in record["rows"]):
        errors = [_errors([row for row in record["rows"] if row["way"] == way and row["fitted"] == fitted])
                  for fitted in (True, False)]  # fmt: skip
        steps = [f"{ring[way][n]:.0f} / {tree[way][n]:.0f}" if way in ring else "-" for n in SHOWN]
        cells.append((WAYS[way].label, *errors, *steps))
    return heads, cells


def _steps(record, mbit, algorithm):
    """By way, a step's milliseconds by the number of ranks."""
    return {row["way"]: dict(zip(row["ranks"], row["step_ms"])) for row in record["projected"]
            if row["mbit"] == mbit and row["algorithm"] == algorithm}  # fmt: skip


def fastest(record, mbit, algorithm, every_step=False) -> list[tuple[int, str]]:
    """The way with the shortest step, and the number of ranks from which on it has: (2, the first), and the changes.

    every_step: of those that exchange in every step alone.
    """
    steps, found = _steps(record, mbit, algorithm), []
    among = [way for way in steps if not every_step or WAYS[way].every == 1]
    for n in RANKS if among else ():
        best = min(among, key=lambda way: steps[way][n])
        if not found or found[-1][1] != best:
            found.append((n, best))
    return found


def _errors(rows):
    errors = [abs(row["error"]) for row in rows]
    return f"{statistics.median(errors):.0%}, {max(errors):.0%} of {len(errors)}; {_added(rows)}" if errors else "-"


def _added(rows):
    errors = [abs(row["added_error"]) for row in rows if row["added_error"] is not None]
    return f"{statistics.median(errors):.0%}" if errors else "-"


def _who(changes):
    return ", ".join(WAYS[way].label + (f" from {n} ranks on" if n > RANKS[0] else "") for n, way in changes)


def footer(record):
    unseen = [row for row in record["rows"] if not row["fitted"]]
    errors, fitted = [abs(row["error"]) for row in unseen], record["fit"]
    ranks, rates, delays = (", ".join(f"{x:g}" for x in record[f"fit_{name}"]) for name in ("ranks", "rates", "delays"))
    compute = record["projected"][0]["compute_ms"]
    who = "".join(f"- {mbit:g} Mbit/s, {algorithm}: {_who(fastest(record, mbit, algorithm))}; of those that exchange "
                  f"in every step {_who(fastest(record, mbit, algorithm, True))}\n"
                  for mbit in RATES for algorithm in ALGORITHMS)  # fmt: skip
    heads, cells = table(record, RATES[1])
    return (
        f"**A model, not a measurement**: milliseconds a step at {RATES[0]:g} Mbit/s and {DELAY_MS:g} ms one way, "
        f"ring / tree, each rank on a machine of its own. A step without any exchange takes {compute:.0f} ms. The same "
        f"at {RATES[1]:g} Mbit/s:\n\n" + markdown((heads[0], *heads[3:]), [(row[0], *row[3:]) for row in cells])
        + f"\n\nThe shortest step, from 2 to {RANKS[-1]} ranks by powers of two (a step, not the way to a loss):\n\n"
        f"{who}\nFitted to the networks with {ranks} ranks at {rates} Mbit/s and {delays} ms. The other networks it "
        f"had not seen: of their {len(errors)} steps {sum(e <= 0.2 for e in errors)} are within 20 %, the median error "
        f"is {statistics.median(errors):.0%}, and {_added(unseen)} of what a way adds to the computation, which is not "
        "predicted but the step that was measured there without any exchange. A way's own work is taken not to grow "
        f"with the ranks; topk's decoding does. Fitted: {1e3 * fitted['base_s']:.2f} ms a hop and "
        f"{fitted['trips']:.1f} delays of the link (Gloo sends a message once its receiver has asked for it), "
        f"{1e9 * fitted['cpu_s']:.1f} ns of a core a byte sent, {fitted['all_to_all']:.0%} more on the wire in an "
        f"all-to-all, {fitted['hidden']:.0%} of the computation to hide a first bucket behind, and each way's own work "
        f"a byte. {origin(record)}\n\n" + picture(NAME, "Step time against the number of ranks, by the model")
    )  # fmt: skip


def draw(record, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(ALGORITHMS), len(RATES), figsize=(11, 7.5), squeeze=False, sharex=True, sharey=True)
    colours, shown = plt.get_cmap("tab20"), list(dict.fromkeys(row["way"] for row in record["projected"]))
    for (down, algorithm), (across, mbit) in itertools.product(enumerate(ALGORITHMS), enumerate(RATES)):
        axis = axes[down][across]
        for way, steps in _steps(record, mbit, algorithm).items():
            axis.plot(*zip(*steps.items()), color=colours(shown.index(way) % 20), label=WAYS[way].label)
        axis.axhline(record["projected"][0]["compute_ms"], color="grey", linestyle=":", label="computation alone")
        axis.set(yscale="log", title=f"{algorithm}, {mbit:g} Mbit/s, {DELAY_MS:g} ms")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("ranks" if down else "")
        axis.set_ylabel("" if across else "ms a step (model)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", fontsize=7)
    figure.suptitle("A model fitted to runs on few ranks, not a measurement")
    figure.tight_layout(rect=(0, 0, 0.8, 1))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
