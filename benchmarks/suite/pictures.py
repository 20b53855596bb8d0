"""Pictures of the benchmark suite: loss against time, loss against bytes, step time against the link's rate."""
import math
from pathlib import Path

from suite import plan
from suite.methods import CONTESTANTS
from suite.outcomes import END, Outcomes, is_peer, over
from suite.tasks import TASKS

UNSHAPED_AT = 10_000  # Mbit/s: where a picture shows links that are not shaped


def draw(outcomes: Outcomes, out: Path) -> None:
    """Write train_time.png, train_pareto.png and train_rates.png, those of them that there are figures for."""
    import matplotlib

    matplotlib.use("Agg")
    with_quality = [task for task in outcomes.tasks if outcomes.methods(task)]
    with_steps = [n for n in plan.ALL_RANKS if _rates(outcomes, "dense", n)]
    for name, panels, one in (("train_time", with_quality, _loss_against_time),
                              ("train_pareto", with_quality, _loss_against_bytes),
                              ("train_rates", with_steps, _step_against_rate)):  # fmt: skip
        if panels:
            _panels(outcomes, panels, one, out / f"{name}.png")


def _panels(outcomes, panels, draw_one, path):
    from matplotlib import pyplot

    rows = -(-len(panels) // 2)
    figure, axes = pyplot.subplots(
        rows, min(2, len(panels)), figsize=(7.5 * min(2, len(panels)), 5 * rows), layout="constrained", squeeze=False
    )
    for ax, panel in zip(axes.flat, panels):
        draw_one(outcomes, panel, ax)
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _loss_against_time(outcomes, task, ax):
    """Means over the seeds of the loss above plain DDP's at its end; to where the first of them ended."""
    ends = {seed: outcomes.target(task, END, seed) for seed in outcomes.quality(task, "dense")}
    dense = {seed: loss for seed, loss in ends.items() if loss is not None}
    if not dense:
        return
    for i, method in enumerate(outcomes.methods(task)):
        step = outcomes.step_time(task, method, plan.RANKS, plan.RATE)
        seeds = [seed for seed in outcomes.quality(task, method) if seed in dense]
        if step is None or not seeds:
            continue
        by_step = list(zip(*(outcomes.curve(task, method, seed) for seed in seeds)))
        begin = outcomes.at_first(task, method, plan.RANKS, plan.RATE)
        seconds = [points[0][0] * step.middle + begin for points in by_step]
        above = [over([loss - dense[seed] for (_, loss), seed in zip(points, seeds)]) for points in by_step]
        color = f"C{i % 10}"
        ax.plot(seconds, [span.middle for span in above], "--" if is_peer(method) else "-", color=color,
                label=CONTESTANTS[method].label)  # fmt: skip
        ax.fill_between(seconds, [span.low for span in above], [span.high for span in above], color=color, alpha=0.12)
    highest = max(outcomes.target(task, 0.1, seed) - dense[seed] for seed in dense)
    ax.set(xscale="log", ylim=(-0.25 * highest, 1.3 * highest), xlabel="training time, s",
           title=f"{TASKS[task].label}\n{plan.RANKS} ranks, {plan.RATE:g} Mbit/s; dashed: peers",
           ylabel="held-out loss above plain DDP's end")  # fmt: skip


def _loss_against_bytes(outcomes, task, ax):
    families = {}
    for method in outcomes.methods(task):
        step, more = outcomes.step(task, method, plan.RANKS, plan.RATE), outcomes.loss_more(task, method)
        if step and step["sent_bytes"] and more and math.isfinite(more.middle):
            contestant = CONTESTANTS[method]
            name = contestant.family or contestant.label
            families.setdefault(name, []).append((step["sent_bytes"], more, contestant.label, is_peer(method)))
    for i, (name, points) in enumerate(families.items()):
        points.sort(key=lambda point: point[0])
        xs, spans = [p[0] for p in points], [p[1] for p in points]
        errors = [[s.middle - s.low for s in spans], [s.high - s.middle for s in spans]]
        ax.errorbar(xs, [s.middle for s in spans], errors, fmt="--s" if points[0][3] else "-o", color=f"C{i % 10}",
                    markersize=5, capsize=2, label=name if len(points) > 1 else points[0][2])  # fmt: skip
    ax.set(xscale="log", xlabel="bytes a rank sends a step", ylabel="held-out loss above plain DDP's",
           title=f"{TASKS[task].label}\nafter equally many steps; lower and further left is better")  # fmt: skip


def _step_against_rate(outcomes, ranks, ax):
    shown = [m for m in CONTESTANTS if m in ("noop", *plan.HEADLINE) and _rates(outcomes, m, ranks)]
    for i, method in enumerate(shown):
        points = _rates(outcomes, method, ranks)
        xs = [mbit or UNSHAPED_AT for mbit, _ in points]
        style = ":" if method == "noop" else "--" if is_peer(method) else "-"
        ax.plot(xs, [1e3 * span.middle for _, span in points], style, marker="o", markersize=3,
                color="black" if method == "noop" else f"C{i % 10}", label=CONTESTANTS[method].label)  # fmt: skip
        ends = outcomes.step_ends(plan.MAIN_TASK, method, ranks)
        if method not in ("noop", "dense") and ends and points[0][0] < ends < UNSHAPED_AT:
            ax.axvline(ends, color=f"C{i % 10}", linewidth=0.5)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set(title=f"{TASKS[plan.MAIN_TASK].label}, {ranks} ranks\nthin lines: where plain DDP's step is as short",
           xlabel=f"Mbit/s of each link ({UNSHAPED_AT}: not shaped)", ylabel="ms a step")  # fmt: skip


def _rates(outcomes, method, ranks):
    rates = sorted(plan.ALL_RATES, key=lambda rate: rate or float("inf"))
    spans = [(mbit, outcomes.step_time(plan.MAIN_TASK, method, ranks, mbit)) for mbit in rates]
    return [(mbit, span) for mbit, span in spans if span]
