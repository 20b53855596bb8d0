"""Tables and pictures of the benchmark suite, from what was measured: docs/tables/results_*.md, results_*.png.

    python benchmarks/suite/report.py           prints the tables; --out results: with what was measured there
    python benchmarks/suite/report.py --docs    writes docs/tables, and README's
    python benchmarks/suite/report.py --draw    draws the pictures of benchmarks/results, too
"""
import argparse
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common import record

from suite import pictures, ways
from suite.networks import DELAYS, IN_ONE, MODELS, MORE, RATES, TIMED, link
from suite.outcomes import END, HALF, RANKS, Outcomes, Span, found, over
from suite.plan import SEEDS
from suite.tasks import MAIN, TASKS
from suite.ways import WAYS

MBIT, DELAY = 100.0, 10.0  # of the main comparison
METHODS = tuple(dict.fromkeys(name.removesuffix(IN_ONE) for name in (ways.ALONE, *TIMED, *MORE)))
FEWER_BYTES = 50
TEN = 10  # rows of the short table
PICTURES = "\n\n".join(record.picture(f"results_{name}", says) for name, says in (
    ("time", "Held-out loss against training time"), ("pareto", "Loss against bytes")))  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="where rows are, beside those committed")
    parser.add_argument("--docs", action="store_true", help="write docs/tables")
    parser.add_argument("--draw", action="store_true", help="draw the pictures there")
    args = parser.parse_args()
    outcomes = found(args.out.resolve())
    for name, (heads, rows, footer, left) in tables(outcomes).items():
        if args.docs:
            record.write_table(name, heads, rows, footer, left)
        else:
            record.print_table(heads, rows, name, left)
    if args.docs:
        heads, rows, footer, left = tables(outcomes)["results_short"]
        said = footer.split("\n\n")[0]
        record.write_into(record.README, "results", f"{record.markdown(heads, rows, left)}\n\n{said}")
    if args.draw:
        pictures.draw(outcomes, args.out)


def tables(outcomes: Outcomes) -> dict[str, tuple]:
    """By name: heads, rows, the text below, and how many columns are words."""
    trained, timed = _trained(outcomes), _timed(outcomes)
    both = f"{trained} {timed}"
    all_of_them = {
        "results_short": (*short(outcomes), f"{_said_short(outcomes)} {both}\n\n{PICTURES}", 1),
        "results_goals": (*goals(outcomes), both, 1),
        "results_losses": (*losses(outcomes), f"{_said_losses()} {trained}", 2),
        "results_links": (*links(outcomes), f"{_said_links()} {both}", 1),
        "results_ranking": (*ranking(outcomes), f"{SAID_RANKING} {both}", 1),
        "results_steps": (*steps(outcomes), f"{_said_steps(outcomes)} {timed}", 2),
    }
    if any((row["model"], row["ranks"]) != (MAIN, RANKS) for row in outcomes.networks):
        all_of_them["results_ranks"] = (*ranks(outcomes), timed, 1)
    return all_of_them


# ---- the short one ----


def short(outcomes: Outcomes, task: str = MAIN) -> tuple:
    """The ten that come to plain DDP's last loss in the least time, and then nearest to it, over the links of the main
    comparison."""
    heads = ("method", "loss", "step, ms", "kB a step, on the interface", "s to half-way", "s to DDP's loss",
             "times DDP's speed")  # fmt: skip
    where = (MBIT, DELAY)
    ordered = outcomes.ranking(task, END, *where)
    rest = [method for method in outcomes.of_all_seeds(task) if method not in ordered
            and outcomes.step_time(method, task, RANKS, *where)]  # fmt: skip
    rest.sort(key=lambda method: outcomes.loss(task, method).middle)
    rows = []
    for method in (ordered + rest)[:TEN]:
        step, end = outcomes.step_time(method, task, RANKS, *where), outcomes.time_to(task, method, END, *where)
        sent = outcomes.sent(method, task, RANKS, *where)
        rows.append((
            WAYS[method].label, _loss(outcomes.loss(task, method)), f"{1e3 * step.middle:.0f}",
            f"{sent / 1e3:.0f}" if sent else "-", _seconds(outcomes.time_to(task, method, HALF, *where)),
            _seconds(end), _speed(outcomes, task, method, ways.DDP, END, *where),
        ))  # fmt: skip
    return heads, rows


def _said_short(outcomes):
    row = outcomes.network(MAIN, RANKS, MBIT, DELAY)
    alone = outcomes.step_time(ways.ALONE, MAIN, RANKS, MBIT, DELAY)
    dense = outcomes.step_time(ways.DDP, MAIN, RANKS, MBIT, DELAY)
    if not row or not alone or not dense:
        return ""
    return (f"{TASKS[MAIN].label}, {_size(outcomes, MAIN)}, {RANKS} ranks, {link(MBIT, DELAY)} one way. A step without "
            f"exchange takes {1e3 * alone.middle:.0f} ms, {alone.middle / dense.middle:.0%} of plain DDP's. Losses are "
            f"those after {TASKS[MAIN].steps} steps. Seconds are to plain DDP's loss after half of these and at their "
            "end, and of the length of run, these or more, that gets there first; \"-\": none that was run "
            "does.")  # fmt: skip


# ---- the goals ----


def goals(outcomes: Outcomes, task: str = MAIN) -> tuple:
    """What was aimed at, and what came out, whatever it is."""
    where = (MBIT, DELAY)
    heads, rows = ("aimed at", "best of ours", "figure", "at least / at most"), []
    best = outcomes.first(task, END, *where, ours=True)
    peer = outcomes.first(task, END, *where, ours=False)
    for what, other, least in (("to plain DDP's final loss, times plain DDP's speed", ways.DDP, 6.0),
                               ("the same, times the best peer's", peer, 1.5)):  # fmt: skip
        span = outcomes.speedup(task, best, other, END, *where) if best and other else None
        said = f" ({WAYS[other].label})" if other not in (None, ways.DDP) else ""
        rows.append((what + said, WAYS[best].label if best else "none gets there",
                     _ratio(span),
                     _verdict(span and span.middle, least, at_least=True)))  # fmt: skip
    thin = {}
    for method in outcomes.of_all_seeds(task):
        compression = outcomes.compression(task, method)
        if WAYS[method].ours and compression and compression >= FEWER_BYTES:
            ratios = [outcomes.runs(task, method)[seed]["loss"] / outcomes.runs(task, ways.DDP)[seed]["loss"]
                      for seed in SEEDS]  # fmt: skip
            thin[method] = over(ratios)
    if thin:
        method = min(thin, key=lambda one: thin[one].middle)
        rows.append((f"loss at equal steps over plain DDP's, at {FEWER_BYTES} times fewer bytes", WAYS[method].label,
                     f"{thin[method].middle:.3f} ({thin[method].low:.3f} to {thin[method].high:.3f})",
                     _verdict(thin[method].middle, 1.01, at_least=False)))  # fmt: skip
    steps = {method: ratio for method in METHODS if WAYS[method].ours and outcomes.loss(task, method)
             and (ratio := outcomes.over_no_exchange(method, task, RANKS, *where))}  # fmt: skip
    if steps:
        for words, method in (("the one that is first at the loss", best), ("the shortest", min(steps, key=steps.get))):
            if method in steps:
                rows.append((f"a step over no exchange: {words}", WAYS[method].label, f"{steps[method]:.2f}",
                             _verdict(steps[method], 1.1, at_least=False)))  # fmt: skip
    for mbit in (rate for rate in RATES if not rate or rate >= 250):
        for delay in DELAYS:
            for share, words in ((HALF, "half-way"), (END, "final")):
                ours, theirs = (outcomes.first(task, share, mbit, delay, who) for who in (True, False))
                span = outcomes.speedup(task, ours, theirs, share, mbit, delay) if ours and theirs else None
                if span or theirs:
                    rows.append((
                        f"{link(mbit, delay)}: to plain DDP's {words} loss, times the best peer's "
                        f"({WAYS[theirs].label})", WAYS[ours].label if ours else "none gets there",
                        _ratio(span),
                        "a tie" if span and 1.0 in span else "ahead" if span and span.middle > 1 else "**missed**",
                    ))  # fmt: skip
    return heads, rows


def _verdict(value, limit, at_least):
    if value is None:
        return f"{limit:g}, **missed**"
    return f"{limit:g}" + ("" if (value >= limit) == at_least or value == limit else ", **missed**")


# ---- losses ----


def losses(outcomes: Outcomes) -> tuple:
    """A row a task and method: its settings, what it sends, its loss and how far that is from plain DDP's."""
    heads = ("task", "method", "learning rate, β1 or momentum, outer", "settings tried", "bytes, plain DDP = 1", "loss",
             "of each seed", "over plain DDP's")  # fmt: skip
    rows = []
    for task in TASKS:
        for method in outcomes.methods(task):
            of = outcomes.runs(task, method)
            row = next(iter(of.values()))
            more = outcomes.loss_over(task, method, ways.DDP)
            rows.append((
                TASKS[task].label, WAYS[method].label, _settings(row), _tried(outcomes, task, method),
                _factor(outcomes.compression(task, method)),
                _loss(outcomes.loss(task, method)) + ("" if len(of) == len(SEEDS) else f" ({len(of)} seeds)"),
                ", ".join("diverged" if one["loss"] is None else f"{one['loss']:.3f}" for one in of.values()),
                "-" if method == ways.DDP or more is None else f"{more.middle:+.3f}",
            ))  # fmt: skip
    return heads, rows


def _tried(outcomes, task, method):
    if like := WAYS[method].like:
        return f"as {WAYS[like].label}"
    return f"{outcomes.plan.tried(task, method)}" + (", rates" if outcomes.plan.rates_only(task, method) else "")


def _settings(row):
    outer = row["outer_momentum"]
    return f"{row['lr']:g}, {row['momentum']:g}" + (f", {outer:g}" if outer is not None else "")


def _said_losses():
    return ("After equally many steps; seeds 1, 2, 3, settings searched on seed 0. \"rates\": of the settings the "
            "learning rate alone was searched for. Bytes are those that a rank hands to its network, an all-reduce's "
            "as a ring sends them, its last exchange included. What is over plain DDP's loss is so over the same "
            "seeds.")  # fmt: skip


# ---- times ----


def links(outcomes: Outcomes, task: str = MAIN) -> tuple:
    """A row a link: who is first at plain DDP's half-way and final loss, of ours and of the peers."""
    heads = ("link, one way", "no exchange / plain DDP, ms", "half-way: best of ours / best peer",
             "times its speed", "final: best of ours / best peer", "times its speed")  # fmt: skip
    rows = []
    for delay in DELAYS:
        for mbit in RATES:
            if outcomes.network(task, RANKS, mbit, delay):
                alone, dense = (outcomes.step_time(m, task, RANKS, mbit, delay) for m in (ways.ALONE, ways.DDP))
                races = [_race(outcomes, task, share, mbit, delay) for share in (HALF, END)]
                rows.append((link(mbit, delay), f"{1e3 * alone.middle:.0f} / {1e3 * dense.middle:.0f}",
                             *races[0], *races[1]))  # fmt: skip
    return heads, rows


def _race(outcomes, task, share, mbit, delay):
    ours, peer = (outcomes.first(task, share, mbit, delay, who) for who in (True, False))
    told = [f"{WAYS[m].label} {outcomes.time_to(task, m, share, mbit, delay).middle:.0f} s" if m else "none"
            for m in (ours, peer)]  # fmt: skip
    return " / ".join(told), _speed(outcomes, task, ours, peer, share, mbit, delay) if ours and peer else "-"


def _said_links():
    return (f"{TASKS[MAIN].label}, {RANKS} ranks. Steps to plain DDP's loss half-way through its training, and at its "
            "end, all seeds together, times the step's time. A tie is where 1 is within the range over turns, and over "
            "the seeds with each left out in turn.")  # fmt: skip


def ranking(outcomes: Outcomes, task: str = MAIN) -> tuple:
    """A row a link: all that get to plain DDP's final loss, the first one first."""
    rows = []
    for delay in DELAYS:
        for mbit in RATES:
            if outcomes.network(task, RANKS, mbit, delay):
                cells = []
                for share in (HALF, END):
                    order = outcomes.ranking(task, share, mbit, delay)
                    told = (f"{WAYS[m].label} {_seconds(outcomes.time_to(task, m, share, mbit, delay))}" for m in order)
                    cells.append(", ".join(told) or "-")
                rows.append((link(mbit, delay), *cells))
    return ("link, one way", "s to half-way", "s to the final loss"), rows


SAID_RANKING = ("In brackets the range over turns, and over the seeds with each left out in turn; \"never\": without "
                "some seed the others do not get there.")


def steps(outcomes: Outcomes, task: str = MAIN) -> tuple:
    """A row a delay and method: a step's milliseconds at each rate."""
    heads = ("delay, one way", "method", *(f"{rate:g} Mbit/s" if rate else "no limit" for rate in RATES))
    rows = []
    for delay in DELAYS:
        for method in METHODS:
            times = [outcomes.step_time(method, task, RANKS, rate, delay) for rate in RATES]
            if any(times):
                label = "no exchange" if method == ways.ALONE else WAYS[method].label
                rows.append((f"{delay:g} ms", label, *map(_ms, times)))
    return heads, rows


def _said_steps(outcomes):
    shares = [row["relay"] for row in outcomes.networks if row.get("relay")]
    said = (f" Frames go through a relay, which took {min(shares):.0%} to {max(shares):.0%} of one core."
            if shares else "")  # fmt: skip
    return ("Milliseconds a step of the rank that is the last to be done, mean and range of the turns; in "
            "DDP's buckets or in one, whichever is shorter there. With accumulation it is a pass, not an optimizer's "
            "step." + said)  # fmt: skip


def ranks(outcomes: Outcomes, task: str = MAIN) -> tuple:
    """A row a method: its step on other numbers of ranks, other models."""
    places = [(model, n, MBIT, delay) for model in MODELS for n in (2, 4, 8) for delay in DELAYS
              if outcomes.network(model, n, MBIT, delay)]  # fmt: skip
    heads = ("method", *(f"{_name(model)}, {n} ranks, {delay:g} ms"
                         for model, n, _, delay in places))  # fmt: skip
    rows = []
    for method in METHODS:
        times = [outcomes.step_time(method, *place) for place in places]
        if sum(time is not None for time in times) > 2:
            rows.append(("no exchange" if method == ways.ALONE else WAYS[method].label, *map(_ms, times)))
    return heads, rows


def _name(model):
    return {MAIN: "0.45 M", "large": "3.24 M", "clicks": "click model"}[model]


# ---- in the terminal ----


def few(rows: list[dict]) -> tuple:
    """A row a training: of the quick ones."""
    cells = [(WAYS[row["method"]].label, f"{row['steps']}", _factor(row["compression_whole"]),
              "diverged" if row["loss"] is None else f"{row['loss']:.3f}") for row in rows]  # fmt: skip
    return ("method", "steps", "bytes, plain DDP = 1", "loss"), cells


def turns(row: dict) -> tuple:
    """Of one network: a step of every method, and over no exchange."""
    of = {}
    for turn in row["turns"]:
        of.setdefault(turn["method"], []).append(turn)
    alone = statistics.mean(turn["last_ms"] for turn in of[ways.ALONE])
    cells = []
    for method, its in of.items():
        ms = statistics.mean(turn["last_ms"] for turn in its)
        sent = [turn["sent"] / 1e3 for turn in its if "sent" in turn]
        cells.append((_label(method), f"{ms:.0f}", f"{ms / alone:.2f}",
                      f"{statistics.mean(sent):.1f}" if sent else "-"))  # fmt: skip
    return ("method", "step, ms", "over no exchange", "kB sent a step"), cells


# ---- cells ----


def _label(method):
    one = IN_ONE if method.endswith(IN_ONE) else ""
    return WAYS[method.removesuffix(IN_ONE)].label + one


def _speed(outcomes, task, method, other, share, mbit, delay):
    if method == other:
        return "1"
    span = outcomes.speedup(task, method, other, share, mbit, delay)
    return "-" if span is None else f"{span.middle:.2f}" + (", a tie" if 1.0 in span else "")


def _factor(compression):
    if compression is None or math.isinf(compression):
        return "-" if compression is None else "0"
    return "1" if compression < 1.005 else f"1/{compression:.3g}"


def _loss(span: Span | None):
    return "diverged" if span is None else f"{span.middle:.3f}"


def _seconds(span: Span | None):
    high = "never" if span and math.isinf(span.high) else f"{span.high:.0f}" if span else ""
    return "-" if span is None else f"{span.middle:.0f} ({span.low:.0f} to {high})"


def _ratio(span: Span | None):
    high = "any" if span and math.isinf(span.high) else f"{span.high:.2f}" if span else ""
    return "-" if span is None else f"{span.middle:.2f} ({span.low:.2f} to {high})"


def _ms(span: Span | None):
    return "-" if span is None else f"{1e3 * span.middle:.0f} ({1e3 * span.low:.0f} to {1e3 * span.high:.0f})"


def _size(outcomes, task):
    rows = list(outcomes.runs(task, ways.DDP).values())
    return f"{rows[0]['parameters'] / 1e6:.2f} M parameters, batches of {RANKS} x {rows[0]['batch']}" if rows else ""


def _trained(outcomes):
    rows = outcomes.losses
    return f"Losses: `python benchmarks/suite/train.py`, {_of(rows)}" if rows else ""


def _timed(outcomes):
    rows = outcomes.networks
    return f"Steps: `python benchmarks/suite/steps.py`, {_of(rows)}" if rows else ""


def _of(rows):
    machines = dict.fromkeys(f"{row['machine']['cores']} cores ({row['machine']['cpu']}), PyTorch "
                             f"{row['versions']['torch']}" for row in rows)  # fmt: skip
    dates = sorted({row["date"] for row in rows})
    return f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, {' and '.join(machines)}."


if __name__ == "__main__":
    sys.exit(main())
