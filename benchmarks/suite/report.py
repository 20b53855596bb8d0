"""Tables of the benchmark suite: in the terminal, all of them in train.md, the main ones in docs/tables."""
import math
from pathlib import Path

from common import record

from suite import pictures, plan
from suite.ledger import Ledger
from suite.methods import CONTESTANTS
from suite.outcomes import END, HALF, Outcomes, Span
from suite.tasks import TASKS

RATES = sorted(plan.ALL_RATES, key=lambda rate: rate or math.inf)
AT_RATES = tuple(f"{rate:g} Mbit/s" if rate else "unshaped" for rate in RATES)


def show(ledger: Ledger, out: Path, docs: bool = False) -> None:
    """Print all tables, write them into out/train.md, draw all pictures, and write the main ones into docs/tables."""
    outcomes = Outcomes(ledger)
    shown = len(_shown(ledger))
    others = ledger.others + len(ledger.rows) - shown
    print(f"{shown} rows of code {ledger.code} on {ledger.machine['cores']} cores "
          f"({ledger.machine['cpu']}); {others} of other machines, versions, code, data or tasks left out")  # fmt: skip
    print(_busy(ledger))
    tables = list(_tables(outcomes))
    for title, heads, rows in tables:
        record.print_table(heads, rows, title)
    written = "\n\n".join(f"## {title}\n\n{record.markdown(heads, rows)}" for title, heads, rows in tables)
    out.mkdir(parents=True, exist_ok=True)
    about = f"{ABOUT} {_coverage(outcomes)} {_busy(ledger)} {_origin(outcomes)}"
    (out / "train.md").write_text(f"# The benchmark suite\n\n{about}\n\n{written}\n")
    pictures.draw(outcomes, out)
    if docs:
        _write_docs(outcomes)


ABOUT = (
    "In brackets is the range over seeds and turns; what is within it is called a tie. Targets are plain DDP's losses "
    "half-way and at the end of its own training, seed by seed. Horovod's methods take turns among themselves."
)


def _coverage(outcomes):
    """How much of the full set there is, in words."""
    trained = [method for method, contestant in CONTESTANTS.items() if contestant.trains]
    told = []
    for task in outcomes.tasks:
        steps = {row["method"] for row in outcomes.ledger.find(kind="speed", task=task)} & set(trained)
        told.append(f"{TASKS[task].label}: {len(outcomes.methods(task))} and {len(steps)}")
    return f"Of {len(trained)} methods, the losses and the step times that are measured: {'; '.join(told)}."


def _shown(ledger):
    """Its rows of the suite's tasks."""
    return [row for row in ledger.rows if row["task"] in TASKS]


def _busy(ledger):
    busy = max((row.get("busy_before") or 0 for row in _shown(ledger)), default=0)
    return f"Other work took at most {busy:.0%} of the processors before a step was timed."


def _tables(outcomes):
    """(title, heads, rows) of each."""
    overall = overall_rows(outcomes)
    if overall:
        yield f"The first of ours and of the peers, {plan.RANKS} ranks", OVERALL_HEADS, overall
    for task in outcomes.tasks:
        label = TASKS[task].label
        if outcomes.methods(task):
            where = f"{label}, {plan.RANKS} ranks"
            yield f"{where}, {plan.RATE:g} Mbit/s", HEADS, quality_rows(outcomes, task)
            yield (f"{where}: s to DDP's half-way, and times the speed of the best peer", BY_RATE_HEADS,
                   by_rate_rows(outcomes, task))  # fmt: skip
        for ranks in plan.ALL_RANKS:
            rows = step_rows(outcomes, task, ranks)
            if rows:
                yield f"{label}: ms a step, {ranks} ranks, by link rate", STEP_HEADS, rows
    direct = direct_rows(outcomes)
    if direct:
        yield "Time to quality put together, against measured directly", DIRECT_HEADS, direct


# ---- time to quality ----

HEADS = ("method", "ms a step", "MB a step", "loss above DDP's", "s to DDP's half-way", "s to DDP's end",
         "times DDP's speed, half-way / end", "times the best peer's, half-way / end")  # fmt: skip


def quality_rows(outcomes: Outcomes, task: str, ranks: int = plan.RANKS, mbit: float = plan.RATE) -> list[tuple]:
    """The first at plain DDP's half-way loss first; those that do not get there last."""
    shares = (HALF, END)
    peers = [outcomes.best_peer(task, share, ranks, mbit) for share in shares]
    speeds = lambda method, others: " / ".join(
        _against(outcomes, task, method, other, share, ranks, mbit) for other, share in zip(others, shares)
    )
    times = {m: [outcomes.time_to(task, m, share, ranks, mbit) for share in shares] for m in outcomes.methods(task)}
    rows = []
    for method in sorted(times, key=lambda m: times[m][0].middle if times[m][0] else math.inf):
        row = outcomes.step(task, method, ranks, mbit)
        rows.append((
            _label(outcomes, task, method),
            _spread(outcomes.step_time(task, method, ranks, mbit), 1e3),
            f"{row['sent_bytes'] / 1e6:.3g}" if row and row["sent_bytes"] else "-",
            "-" if method == "dense" else _spread(outcomes.loss_more(task, method), 1, 3),
            *(_spread(span, 1) if span else _how_many(outcomes, task, method, share)
              for span, share in zip(times[method], shares)),
            speeds(method, ("dense", "dense")),
            speeds(method, peers),
        ))  # fmt: skip
    return rows


def _label(outcomes, task, method):
    rows = outcomes.quality(task, method).values()
    failed = sum(row["status"] != "done" for row in rows)
    tuned = {row["tuned_as"] for row in rows} - {method}
    return (CONTESTANTS[method].label + (f" ({failed} of {len(rows)} failed)" if failed else "")
            + (f" (optimizer of {', '.join(sorted(tuned))})" if tuned else ""))  # fmt: skip


def _how_many(outcomes, task, method, share):
    there = outcomes.steps_to(task, method, share)
    return "-" if outcomes.gets_there(task, method, share) else (
        f"{len(there)} of {len(outcomes.quality(task, 'dense'))} seeds get there")  # fmt: skip


def _against(outcomes, task, method, other, share, ranks, mbit):
    if other is None or method == other:
        return "-" if other is None else "1"
    span = outcomes.speedup(task, method, other, share, ranks, mbit)
    if span is None:
        return "-"
    return f"{span.middle:.2f}" + (", a tie" if 1.0 in span else "")


def _spread(span: Span | None, scale, digits=None):
    if span is None:
        return "-"
    if not math.isfinite(span.middle):
        return "not to the end"
    low, middle, high = (scale * value for value in (span.low, span.middle, span.high))
    digits = digits if digits is not None else (0 if middle >= 100 else 1)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


# ---- time to quality at every rate ----

BY_RATE_HEADS = ("method", *AT_RATES)


def by_rate_rows(outcomes: Outcomes, task: str) -> list[tuple]:
    """Seconds to plain DDP's half-way, and in brackets how many times the speed of the best peer at that rate."""
    rows, peers = [], [outcomes.best_peer(task, HALF, plan.RANKS, mbit) for mbit in RATES]
    for method in outcomes.methods(task):
        cells = []
        for mbit, peer in zip(RATES, peers):
            span = outcomes.time_to(task, method, HALF, plan.RANKS, mbit)
            times = _against(outcomes, task, method, peer, HALF, plan.RANKS, mbit)
            cells.append(f"{span.middle:.1f} ({'the best peer' if method == peer else times})" if span else "-")
        if set(cells) != {"-"}:
            rows.append((_label(outcomes, task, method), *cells))
    return rows


# ---- everywhere, in short ----

OVERALL_HEADS = ("task", *AT_RATES, f"to DDP's end, {plan.RATE:g} Mbit/s")


def overall_rows(outcomes: Outcomes) -> list[tuple]:
    """A row a task: which of ours and which peer is first at DDP's half-way, and how many times the peer's speed."""
    return [
        (TASKS[task].label, *(_race(outcomes, task, HALF, mbit) for mbit in RATES),
         _race(outcomes, task, END, plan.RATE))
        for task in outcomes.tasks if outcomes.methods(task)
    ]  # fmt: skip


def _race(outcomes, task, share, mbit):
    where = share, plan.RANKS, mbit
    ours, peer = outcomes.best_of_ours(task, *where), outcomes.best_peer(task, *where)
    told = [f"{CONTESTANTS[m].label} {outcomes.time_to(task, m, *where).middle:.1f} s" if m else "-"
            for m in (ours, peer)]  # fmt: skip
    return " / ".join(told) + (f": {_against(outcomes, task, ours, peer, *where)}" if ours and peer else "")


# ---- step time against the link's rate ----

STEP_HEADS = ("method", *AT_RATES, "as long as DDP's at about")


def step_rows(outcomes: Outcomes, task: str, ranks: int) -> list[tuple]:
    rows = []
    for method in CONTESTANTS:
        times = [outcomes.step_time(task, method, ranks, mbit) for mbit in RATES]
        if any(times):
            rows.append((CONTESTANTS[method].label, *(_spread(span, 1e3, 0) for span in times),
                         _as_long_at(outcomes, task, method, ranks)))  # fmt: skip
    return rows


def _as_long_at(outcomes, task, method, ranks):
    if method in ("noop", "dense"):
        return "-"
    rate = outcomes.step_ends(task, method, ranks)
    if rate is None:
        return "no rate, always shorter"
    lowest, highest = min(filter(None, plan.ALL_RATES)), max(plan.ALL_RATES)
    if rate == 0:
        return f"under {lowest:g} Mbit/s"
    return f"over {highest:g} Mbit/s" if rate > highest else f"{rate:.0f} Mbit/s"


# ---- the check ----

DIRECT_HEADS = ("method", "s in all, put together", "measured directly", "ratio", "losses")


def direct_rows(outcomes: Outcomes) -> list[tuple]:
    """Training over shaped links against unshaped training and the step times of methods in turns."""
    rows = []
    for row in outcomes.ledger.find(kind="train", purpose="direct", status="done"):
        same = {k: row[k] for k in ("task", "method", "seed", "steps", "options")}
        quality = outcomes.ledger.find(kind="train", purpose="quality", status="done", **same)
        step = outcomes.step_time(row["task"], row["method"], row["ranks"], row["mbit"])
        if quality and step:
            begin = outcomes.at_first(row["task"], row["method"], row["ranks"], row["mbit"])
            together, measured = row["steps"] * step.middle + begin, row["curve"][-1][1]
            losses = [[loss for _, _, loss in one["curve"]] for one in (row, quality[-1])]
            apart = max(abs(a - b) for a, b in zip(*losses))
            rows.append((row["label"], f"{together:.1f}", f"{measured:.1f}", f"{measured / together:.2f}",
                         "equal" if apart == 0 else f"within {apart:.3f}"))  # fmt: skip
    return rows


# ---- docs/tables ----


PICTURES = (("train_time", "Held-out loss against training time"), ("train_pareto", "Loss against bytes"),
            ("train_rates", "Step time against link rate"))  # fmt: skip


def _write_docs(outcomes):
    origin = _origin(outcomes)
    seeds = sorted({row["seed"] for row in outcomes.ledger.find(kind="train", purpose="quality")})
    said = f"{plan.RANKS} ranks, seeds {', '.join(map(str, seeds))}. {origin}"
    record.write_table(
        "train", HEADS, quality_rows(outcomes, plan.MAIN_TASK),
        f"{TASKS[plan.MAIN_TASK].label}, {plan.RATE:g} Mbit/s, {said}\n\n"
        + "\n\n".join(record.picture(*one) for one in PICTURES),
    )  # fmt: skip
    record.write_table(
        "train_overall", OVERALL_HEADS, overall_rows(outcomes),
        "The first of thinwire's methods / the first of the peers (plain DDP, 16-bit hooks, PowerSGD, Horovod), with "
        f"seconds to plain DDP's half-way loss, and ours in times the peer's speed. {_coverage(outcomes)} {said}",
    )  # fmt: skip
    direct = direct_rows(outcomes)
    if direct:
        record.write_table("train_direct", DIRECT_HEADS, direct, f"Seed {plan.SEEDS[0]}. {origin}")


def _origin(outcomes):
    rows = _shown(outcomes.ledger)
    first, last = (of(row["date"][:10] for row in rows) for of in (min, max))
    command = "python benchmarks/suite/train.py --report --out benchmarks/results --docs"
    return record.origin({"command": command, "date": first if first == last else f"{first} to {last}",
                          "machine": rows[-1]["machine"], "versions": rows[-1]["versions"]})  # fmt: skip
