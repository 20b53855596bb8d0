"""The pictures of the figures: medians over seeds with their ranges, and dashed what the theorems promise."""

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from independent_blocks.figures import SWEPT

CURVES = ("5", "6", "7", "8", "stall")  # error against iterations; the others: iterations against n, n tau or M
SHOWN = (("3", "quadratics"), ("4", "quadratics"), ("1 = 9", "digits"), ("2 = 11", "digits"), ("12", "digits"),
         ("stall", "quadratics"))  # fmt: skip


def draw(rows, path):
    """A choice of panels, which the documentation shows."""
    _grid(rows, SHOWN, 3, path, dpi=110)


def draw_all(rows, path):
    """A panel for every figure and problem."""
    _grid(rows, list(dict.fromkeys((row["figure"], row["problem"]) for row in rows)), 4, path, dpi=60)


def _grid(rows, panels, wide, path, dpi):
    high = -(-len(panels) // wide)
    figure, axes = pyplot.subplots(high, wide, figsize=(4.6 * wide, 3.6 * high), layout="constrained", squeeze=False)
    for ax, (name, problem) in zip(axes.flat, panels):
        mine = [row for row in rows if (row["figure"], row["problem"]) == (name, problem)]
        (_curves if name in CURVES else _counts)(ax, mine)
        title = {"stall": "∇f_i(x*) ≠ 0", "delays": "asynchronous"}.get(name, f"figure {name}")
        ax.set_title(f"{title}: {problem}", fontsize=10)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=6, framealpha=0.6)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    figure.suptitle("Dashed: what the theorems promise. Bars: range over seeds. Open triangles: some seed needs more.",
                    fontsize=9)  # fmt: skip
    figure.savefig(path, dpi=dpi)
    pyplot.close(figure)


def _counts(ax, rows):
    """Iterations to the accuracy; an open triangle where some seed needs more."""
    over, label = _sweep(rows)
    for i, algorithm in enumerate(dict.fromkeys(row["algorithm"] for row in rows)):
        mine = [row for row in rows if row["algorithm"] == algorithm]
        done = [row for row in mine if row["most"] is not None]
        style = {"color": f"C{i % 10}", "marker": "os^vDPX*"[i % 8], "markersize": 4, "linewidth": 1.2}
        middle = [row["iterations"] for row in done]
        below = [row["iterations"] - row["fewest"] for row in done]
        above = [row["most"] - row["iterations"] for row in done]
        if len(mine) == 1 and len(rows) > 1 and done:
            ax.axhline(middle[0], color=f"C{i % 10}", linewidth=1.2, label=algorithm)
            continue
        ax.errorbar([over(row) for row in done], middle, [below, above], capsize=2, label=algorithm, **style)
        over_budget = [row for row in mine if row["most"] is None]
        ax.plot([over(row) for row in over_budget], [row["budget"] for row in over_budget], "^", color=f"C{i % 10}",
                markerfacecolor="none")  # fmt: skip
        promised = [row for row in mine if row["promised"]]
        ax.plot([over(row) for row in promised], [row["promised"] for row in promised], "--", color=f"C{i % 10}",
                linewidth=1)  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel=label, ylabel=f"iterations to {rows[0]['accuracy']:g}")
    low, high = ax.get_ylim()
    if high < 10 * low:  # a decade at least, or noise looks like a trend and there are no ticks
        middle = (low * high) ** 0.5
        ax.set_ylim(middle / 10**0.5, middle * 10**0.5)
    ticks = sorted({over(row) for row in rows})
    ax.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks], fontsize=8)
    ax.minorticks_off()


def _sweep(rows):
    if "max_delay" in rows[0]:
        return lambda row: row["max_delay"], "delays of up to M steps"
    if len({row["n"] for row in rows}) > 1:
        return lambda row: row["n"], "workers n, τ = 1/n"
    return lambda row: row["n"] * row["tau"], f"nτ, n = {rows[0]['n']}"


def _curves(ax, rows):
    """Mean error over seeds against iterations: a colour an algorithm, darker with more workers or a larger tau."""
    if rows[0]["figure"] == "stall":
        rows = [row for row in rows if row["n"] == SWEPT] or rows
    algorithms = list(dict.fromkeys(row["algorithm"] for row in rows))
    maps = ("Blues", "Oranges", "Greens", "Purples", "Reds")
    for i, algorithm in enumerate(algorithms):
        mine = [row for row in rows if row["algorithm"] == algorithm]
        few = [mine[j] for j in sorted({0, len(mine) // 2, len(mine) - 1})]
        for j, row in enumerate(few):
            color = pyplot.get_cmap(maps[i % len(maps)])(0.45 + 0.5 * (j + 1) / len(few))
            t, errors, bounds = zip(*row["curve"][1:])
            other = f", {row['of']}" if row["of"] != rows[0]["of"] else ""
            label = f"{algorithm}, n={row['n']} nτ={row['n'] * row['tau']:.3g}{other}"
            ax.plot(t, errors, color=color, linewidth=1.2, label=label)
            if bounds[0] is not None and j == len(few) - 1:
                ax.plot(t, bounds, "--", color=color, linewidth=1)
    ax.set(xscale="log", yscale="log", xlabel="iterations", ylabel=f"({rows[0]['of']}) / start" if "f" in rows[0]["of"]
           else "‖x - x*‖² / start")  # fmt: skip
    ax.set_ylim(bottom=max(1e-22, ax.get_ylim()[0]), top=min(10, ax.get_ylim()[1]))
