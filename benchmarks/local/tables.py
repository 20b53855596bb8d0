"""What local.jsonl says, in tables: losses at equal steps, and seconds until plain DDP's loss is reached."""
import statistics

from common.record import RESULTS, load, read_rows, write_table
from common.turns import steps_of

from local import ways
from local.plan import LONGER, SEEDS, TUNING_SEED, Plan, key
from local.tasks import TASKS
from local.ways import LABELS

NAME, STEPS = "local", "local_steps"
SECONDS_TASK = "bytes-adamw"


def newest(rows):
    """Of equal runs the last counts, and none of them on another text than the last one."""
    return list({key(row): row for row in rows if row["text"] == rows[-1]["text"]}.values())


def write():
    """docs/tables from what is committed."""
    rows = newest(read_rows(RESULTS / f"{NAME}.jsonl"))
    write_table("local_loss", *losses(rows), origin(rows), left=2)
    write_table("local_seconds", *seconds(rows, load(STEPS)["rows"]), origin(rows))


def losses(rows, steps=None):
    """A row a task and method: what it sends, its mean loss over the seeds that are there, and how far above two
    others' that is, over the seeds that both have."""
    heads = ("task", "method", "learning rate, momentum, outer momentum", "bytes, dense float32 = 1", "loss",
             "of each seed", "over plain DDP's", "over PowerSGD's", "settings tried")  # fmt: skip
    plan, found, cells = Plan(rows, steps), {key(row): row for row in rows}, []
    for task in TASKS:
        for method in LABELS:
            ours = _shown(plan, found, task, method)
            if ours:
                mean = _mean(ours)
                over = ["-" if other == method else _over(ours, _shown(plan, found, task, other))
                        for other in (ways.DDP, ways.POWERSGD)]  # fmt: skip
                tried = sum(row["task"] == task and row["method"] == method and row["seed"] == TUNING_SEED
                            for row in rows)  # fmt: skip
                cells.append((
                    TASKS[task].label, LABELS[method], _settings(ours[0]), _factor(ours[0]), _loss(mean),
                    ", ".join(_loss(row["loss"]) for row in ours), *over, str(tried),
                ))  # fmt: skip
    return heads, cells


def seconds(rows, step_rows):
    """A row a method: how many steps it takes to plain DDP's final loss, and how long that is on a thin network."""
    heads = ("method", "steps of the run", "loss", "at or under plain DDP's in step", "ms a step", "seconds",
             "times fewer than plain DDP")  # fmt: skip
    plan, found = Plan(rows), {key(row): row for row in rows}
    dense = plan.mean(SECONDS_TASK, ways.DDP)
    if dense is None:
        return heads, []
    small = [row for row in step_rows if row["model"] == "small"]
    whole = None
    cells = []
    for method in LABELS:
        runs, reached = None, None
        for steps in (plan.steps(SECONDS_TASK), *LONGER):
            shown = _shown(plan, found, SECONDS_TASK, method, steps)
            if len(shown) == len(SEEDS):
                runs, reached = shown, first_reached(shown, dense)
            if reached:
                break
        if not runs:
            continue
        ms = mean_ms(small, method)
        total = ms * reached / 1e3 if ms and reached else None
        whole = total if method == ways.DDP else whole
        cells.append((
            LABELS[method], str(runs[0]["steps"]), _loss(_mean(runs)), str(reached or "not reached"),
            f"{ms:.1f}" if ms else "-", f"{total:.0f}" if total else "-",
            f"{whole / total:.2f}" if whole and total else "-",
        ))  # fmt: skip
    return heads, cells


def mean_ms(rows, method):
    """A step of all turns, None where there is none."""
    found = steps_of(rows, method)
    return statistics.mean(found) if found else None


def first_reached(runs, loss):
    """The first step in which the mean of the curves is at or under a loss; None where it never is."""
    for points in zip(*(row["curve"] for row in runs)):
        if statistics.mean(point[1] for point in points) <= loss + 1e-9:
            return points[0][0]
    return None


def origin(rows):
    """The line under a table: what it was measured with, on all machines."""
    machines = dict.fromkeys(f"{row['machine']['cores']} cores ({row['machine']['cpu']}), PyTorch "
                             f"{row['versions']['torch']}" for row in rows)  # fmt: skip
    dates = sorted({row["date"] for row in rows})
    return f"`{rows[-1]['command']}`, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, {' and '.join(machines)}."


def _shown(plan, found, task, method, steps=None):
    """The rows with the settings found, of the seeds that are there."""
    if not plan.settled(task, method):
        return []
    keys = [(task, method, *plan.settled(task, method), seed, steps or plan.steps(task)) for seed in SEEDS]
    return [found[key] for key in keys if key in found]


def _settings(row):
    outer = row["outer_momentum"]
    return f"{row['lr']:g}, {row['momentum']:g}" + (f", {outer:g}" if outer is not None else "")


def _factor(row):
    return f"1/{row['compression']:.3g}" if row["compression"] else "0"


def _mean(rows):
    losses = [row["loss"] for row in rows]
    return statistics.mean(losses) if losses and None not in losses else None


def _over(ours, theirs):
    seeds = {row["seed"] for row in ours} & {row["seed"] for row in theirs}
    means = [_mean([row for row in rows if row["seed"] in seeds]) for rows in (ours, theirs)]
    return "-" if None in means else f"{means[0] - means[1]:+.3f}"


def _loss(loss):
    return "diverged" if loss is None else f"{loss:.3f}"
