"""Pictures of the benchmark suite: loss against time, and the Pareto front of loss and bytes."""
import statistics
from pathlib import Path

from suite import ways
from suite.networks import DELAYS, link
from suite.outcomes import RANKS, Outcomes
from suite.tasks import MAIN, TASKS
from suite.ways import WAYS

SHOWN = (ways.DDP, ways.HALF, ways.ACCUMULATION_4, ways.POST_LOCAL, "powersgd-1", ways.POWERSGD, ways.NOMINATED,
         "nominated-4-int4", ways.INT4, "independent", ways.LOCAL_8, ways.LOCAL)  # fmt: skip
LINKS = ((100.0, 10.0), (1000.0, DELAYS[0]))  # of the first picture


def draw(outcomes: Outcomes, out: Path) -> None:
    """Write results_time.png and results_pareto.png, those that there are figures for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    links = [one for one in LINKS if outcomes.network(MAIN, RANKS, *one)]
    tasks = [task for task in TASKS if len(outcomes.methods(task)) > 1]
    for name, panels, one in (("results_time", links, _loss_against_time),
                              ("results_pareto", tasks, _loss_against_bytes)):  # fmt: skip
        if panels:
            figure, axes = pyplot.subplots(1, len(panels), figsize=(6.5 * len(panels), 5), layout="constrained",
                                           squeeze=False)  # fmt: skip
            for ax, panel in zip(axes.flat, panels):
                one(outcomes, panel, ax)
                ax.grid(alpha=0.3)
                ax.legend(fontsize=7)
            figure.savefig(out / f"{name}.png", dpi=80)
            pyplot.close(figure)


def _loss_against_time(outcomes, where, ax):
    """Means over the seeds; the run that is drawn is that of the task's own number of steps."""
    dense = outcomes.loss(MAIN, ways.DDP)
    for method in SHOWN:
        step, runs = outcomes.step_time(method, MAIN, RANKS, *where), outcomes.runs(MAIN, method)
        if step and runs and outcomes.loss(MAIN, method):
            points = list(zip(*(row["curve"] for row in runs.values())))
            seconds = [point[0][0] * step.middle for point in points]
            losses = [statistics.mean(loss for _, loss in point) for point in points]
            ax.plot(seconds, losses, "-" if WAYS[method].ours else "--", color=_colour(method),
                    label=WAYS[method].label)  # fmt: skip
    ax.axhline(dense.middle, color="grey", linewidth=0.8)
    ax.set(xscale="log", xlabel="training time, s", ylabel="held-out loss", ylim=(dense.low - 0.05, 2.6),
           title=f"{TASKS[MAIN].label}\n{RANKS} ranks, {link(*where)}; dashed: peers; "
                 "grey: plain DDP's end")  # fmt: skip


def _loss_against_bytes(outcomes, task, ax):
    dense, points = outcomes.loss(task, ways.DDP), []
    for method in outcomes.of_all_seeds(task):
        loss, compression = outcomes.loss(task, method), outcomes.compression(task, method)
        if compression:
            points.append((1 / compression, loss, method))
    for share, loss, method in points:
        ax.errorbar([share], [loss.middle], [[loss.middle - loss.low], [loss.high - loss.middle]], capsize=2,
                    fmt="o" if WAYS[method].ours else "s", markersize=5, color=_colour(method),
                    label=WAYS[method].label)  # fmt: skip
    front, least = [], float("inf")
    for share, loss, _ in sorted(points, key=lambda point: point[0]):
        if loss.middle < least:
            front.append((share, loss.middle))
            least = loss.middle
    ax.plot(*zip(*front), color="grey", linewidth=0.8, zorder=0)
    if dense:
        ax.axhline(dense.middle, color="grey", linewidth=0.5, linestyle=":")
    ax.set(xscale="log", xlabel="bytes, plain DDP = 1", ylabel="held-out loss",
           title=f"{TASKS[task].label}\nafter equally many steps; grey: the Pareto front; squares: peers")  # fmt: skip


def _colour(method):
    from matplotlib import colormaps

    return colormaps["tab20"](list(WAYS).index(method) % 20)
