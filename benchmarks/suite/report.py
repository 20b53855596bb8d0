"""Tables of the benchmark suite: in the terminal, and in README.md."""
from pathlib import Path

import record

from suite import pictures, plan
from suite.ledger import Ledger
from suite.methods import CONTESTANTS
from suite.outcomes import SHARES, Outcomes, Span, is_peer
from suite.tasks import TASKS

RATES = sorted(plan.ALL_RATES, key=lambda rate: rate or float("inf"))
EQUAL = 0.05  # below it two times are called the same whatever their spread


def show(ledger: Ledger, out: Path, readme: bool = False) -> None:
    """Print all tables, draw all pictures, and put the main ones into README.md."""
    outcomes = Outcomes(ledger)
    print(f"{len(ledger.rows)} runs with code {ledger.code} on {ledger.machine['cores']} cores "
          f"({ledger.machine['cpu']}); {ledger.others} of other machines or code left out")  # fmt: skip
    for task in outcomes.tasks:
        if outcomes.methods(task):
            record.print_table(HEADS, [row for _, row in quality_rows(outcomes, task)], _title(outcomes, task))
        for ranks in plan.ALL_RANKS:
            rows = rate_rows(outcomes, task, ranks)
            if rows:
                record.print_table(RATE_HEADS, rows, f"{TASKS[task].label}: ms a step, {ranks} ranks, by link rate")
    direct = direct_rows(outcomes)
    if direct:
        record.print_table(DIRECT_HEADS, direct, "time to quality put together, against measured directly")
    pictures.draw(outcomes, out)
    if readme:
        _write_readme(outcomes)


# ---- time to quality ----

HEADS = ("method", "ms a step", "MB a step", "held-out loss", "s to DDP's half-way", "s to DDP's end", "against DDP",
         "against the best peer")  # fmt: skip


def quality_rows(outcomes: Outcomes, task: str, ranks: int = plan.RANKS, mbit: float = plan.RATE) -> list:
    """(method, cells) of one task, the first to reach plain DDP's half-way loss first."""
    half, end = (outcomes.target(task, share) for share in SHARES)
    times = {m: outcomes.time_to(task, m, half, ranks, mbit) for m in outcomes.methods(task)} if half else {}
    peers = [span for method, span in times.items() if span and is_peer(method)]
    peer = min(peers, key=lambda span: span.middle, default=None)
    found = []
    for method in sorted(times, key=lambda m: times[m].middle if times[m] else float("inf")):
        row, span = outcomes.step(task, method, ranks, mbit), times[method]
        found.append((method, (
            CONTESTANTS[method].label,
            _spread(outcomes.step_time(task, method, ranks, mbit), 1e3),
            f"{row['sent_bytes'] / 1e6:.3g}" if row and row["sent_bytes"] else "-",
            _spread(outcomes.loss(task, method), 1, 3),
            _spread(span, 1),
            _spread(outcomes.time_to(task, method, end, ranks, mbit), 1),
            _against(span, times.get("dense")),
            _against(span, peer),
        )))  # fmt: skip
    return found


def _against(ours: Span | None, theirs: Span | None) -> str:
    if ours is None or theirs is None:
        return "-" if theirs is None else "does not get there"
    ratio = theirs.middle / ours.middle
    if ours == theirs:
        return "1"
    if ours.overlaps(theirs) or abs(ratio - 1) < EQUAL:
        return f"tie ({ratio:.2f} x)"
    return f"{ratio:.2f} x"


def _spread(span, scale, digits=None):
    if span is None:
        return "-"
    if span.middle == float("inf"):
        return "diverged"
    low, middle, high = (scale * value for value in (span.low, span.middle, span.high))
    digits = digits if digits is not None else (0 if middle >= 100 else 1)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _title(outcomes, task):
    half, end = (outcomes.target(task, share) for share in SHARES)
    reached = f": {half:.3f} half-way, {end:.3f} at the end" if half else ""
    return f"{TASKS[task].label}, {plan.RANKS} ranks, {plan.RATE:g} Mbit/s; plain DDP's losses{reached}"


# ---- step time against the link's rate ----

RATE_HEADS = ("method", *(f"{rate:g} Mbit/s" if rate else "unshaped" for rate in RATES), "shorter than DDP's up to")


def rate_rows(outcomes: Outcomes, task: str, ranks: int) -> list:
    rows = []
    for method in CONTESTANTS:
        times = [outcomes.step_time(task, method, ranks, mbit) for mbit in RATES]
        if any(times):
            rows.append((CONTESTANTS[method].label, *(_spread(span, 1e3, 0) for span in times),
                         _up_to(outcomes, task, method, ranks)))  # fmt: skip
    return rows


def _up_to(outcomes, task, method, ranks):
    if method in ("noop", "dense"):
        return "-"
    rate = outcomes.breaks_even(task, method, ranks, RATES)
    if rate is None:
        return "all measured"
    return f"{rate:.0f} Mbit/s" if 0 < rate < float("inf") else "at none" if rate == 0 else "the unshaped one"


# ---- the check ----

DIRECT_HEADS = ("method", "s in all, put together", "measured directly", "ratio", "losses")


def direct_rows(outcomes: Outcomes) -> list:
    """Training over shaped links against unshaped training and the step times of methods in turns."""
    rows = []
    for row in outcomes.ledger.find(kind="train", purpose="direct", status="done"):
        same = {k: row[k] for k in ("task", "method", "seed", "steps", "options")}
        quality = outcomes.ledger.find(kind="train", purpose="quality", status="done", **same)
        step = outcomes.step_time(row["task"], row["method"], row["ranks"], row["mbit"])
        if quality and step:
            together, measured = row["steps"] * step.middle, row["curve"][-1][1]
            losses = [[loss for _, _, loss in one["curve"]] for one in (row, quality[-1])]
            apart = max(abs(a - b) for a, b in zip(*losses))
            rows.append((row["label"], f"{together:.1f}", f"{measured:.1f}", f"{measured / together:.2f}",
                         "equal" if apart == 0 else f"within {apart:.3f}"))  # fmt: skip
    return rows


# ---- README.md ----


def _write_readme(outcomes):
    rows = []
    for task in outcomes.tasks:
        for _, row in quality_rows(outcomes, task):
            rows.append((TASKS[task].label, *row))
    seeds = sorted({row["seed"] for row in outcomes.ledger.find(kind="train", purpose="quality")})
    targets = "; ".join(
        f"{TASKS[task].label} {outcomes.target(task, SHARES[0]):.3f} and {outcomes.target(task, SHARES[1]):.3f}"
        for task in outcomes.tasks if outcomes.target(task, SHARES[0])
    )  # fmt: skip
    where = f"{plan.RANKS} ranks, {plan.RATE:g} Mbit/s, seeds {seeds[0]} to {seeds[-1]}. "
    origin = _origin(outcomes)
    record.write_readme_block(
        "train", ("task", *HEADS), rows,
        where + f"Plain DDP's losses half-way and at the end: {targets}. {origin}\n\n"
        "![Held-out loss against training time](benchmarks/results/train_time.png)\n\n"
        "![Loss against bytes](benchmarks/results/train_pareto.png)",
    )  # fmt: skip
    task = plan.MAIN_TASK
    record.write_readme_block(
        "train rates", ("ranks", *RATE_HEADS),
        [(str(ranks), *row) for ranks in plan.ALL_RANKS for row in rate_rows(outcomes, task, ranks)],
        f"{TASKS[task].label}: ms a step, medians and quartiles. {origin}\n\n"
        "![Step time against link rate](benchmarks/results/train_rates.png)",
    )  # fmt: skip
    record.write_readme_block("train direct", DIRECT_HEADS, direct_rows(outcomes), f"Seed 0. {origin}")


def _origin(outcomes):
    row = outcomes.ledger.rows[-1]
    return record.origin({"command": "python benchmarks/train.py --full", "date": row["date"][:10],
                          "machine": row["machine"], "versions": row["versions"]})  # fmt: skip
