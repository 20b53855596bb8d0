"""Trains one real model over thin links, for the same time under several methods, and compares.

    python benchmarks/demo/run.py                                    the whole comparison, under six minutes
    python benchmarks/demo/run.py --seconds 10 --methods dense fp16  a part of it
    python benchmarks/demo/run.py --out benchmarks/results           what the documentation shows
    python benchmarks/demo/run.py --docs                             docs/tables/demo.md from that, without measuring

Four ranks with a link of 100 Mbit/s each train a byte-level transformer of three million parameters (common/task.py).
Every method has the same training time; evaluation is not counted. Their optimizers were tuned on another seed
(tune.py). Left in the output folder: demo.json with everything that was measured, and demo.png with the held-out loss
against time.
"""
import argparse
import dataclasses
import json
import os
import platform
import sys
from pathlib import Path

import thinwire
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common import record as records
from common.ranks import import_paths
from thinnet import ThinNet

from demo.rank import CONTESTANTS, SHOWN

RANK = Path(__file__).resolve().with_name("rank.py")
OURS = ("nominated", "local")


def main() -> int:
    args = _arguments()
    if args.docs:
        write_table(records.load("demo"))
        return 0
    console = Console()
    with ThinNet(ranks=args.ranks, mbit=args.mbit) as net:
        record = _configuration(args, net)
        if not net.shaped:
            console.print(f"[bold]The network is not shaped ({net.why}): bytes and step times show little here.[/]")
        with _progress(console) as progress:
            rows = {name: _Row(progress, name, args.seconds) for name in args.methods}
            for name, row in rows.items():
                record["methods"][name] = _run(net, args, name, row)
                console.print(row.summary(), highlight=False)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "demo.json").write_text(json.dumps(record, indent=1) + "\n")
    print_table(record, console)
    draw(record, args.out / "demo.png")
    console.print(f"{_shown(args.out / 'demo.json')} and {_shown(args.out / 'demo.png')} written")
    return 0 if any(result["status"] == "done" for result in record["methods"].values()) else 1


class _Row:
    """One method's line of the live display, fed with what its rank 0 reports."""

    def __init__(self, progress: Progress, name: str, seconds: float):
        self.contestant = CONTESTANTS[name]
        self.seconds = self.contestant.fixed_seconds or seconds
        self.progress = progress
        self.task = progress.add_task(self.contestant.label, total=self.seconds, what="waiting", start=False)
        self.result = {"status": "failed", "steps": 0, "curve": []}
        self.complaints = []

    def on_line(self, rank: int, line: str, stream: str) -> None:
        if rank == 0 and stream == "stdout" and line.startswith('{"event":'):
            self._take(json.loads(line))
        else:
            self.complaints = [*self.complaints[-199:], f"[{rank}] {line}"]

    def show(self, what: str, **update) -> None:
        self.progress.update(self.task, what=what, **update)

    def finish(self, status: int) -> dict:
        """What to keep of the run."""
        if any("Timeout (" in line for line in self.complaints):  # faulthandler's word for it
            self.result["status"] = "hung"
        elif status == 0 and "step_ms" in self.result:
            self.result["status"] = "done"
        if self.result["status"] != "done":
            self.result["complaints"] = self.complaints[-30:]
        done = self.result["status"] == "done"
        self.show(self._state() if done else f"{self.result['status']} after {self.result['steps']} steps",
                  completed=self.seconds if done else None)  # fmt: skip
        return self.result

    def summary(self) -> str:
        lines = [f"{self.contestant.label}: {self.result['status']}, {self._state()}"]
        if self.result["status"] == "failed":
            lines += self.complaints[-15:]
        return "\n".join(lines)

    def _take(self, said):
        event = said.pop("event")
        if event == "loss":
            self.result["curve"].append([round(said["seconds"], 2), said["step"], round(said["loss"], 4)])
        else:
            self.result |= {"steps": said.pop("step", 0)} | said  # the result says "steps" itself
        self.show(self._state(), completed=said["seconds"])

    def _state(self):
        state = f"step {self.result['steps']:4}"
        if "step_ms" in self.result:
            state += f"   {self.result['step_ms']:6.0f} ms"
        if self.result["curve"]:
            state += f"   loss {self.result['curve'][-1][2]:.3f}"
        return state


def _progress(console):
    # Twice a second: the display must not take the ranks' two cores. A bar of 20, for lines of 80 in all.
    return Progress(
        TextColumn("{task.description}", justify="left"), BarColumn(bar_width=20), TextColumn("{task.fields[what]}"),
        console=console, refresh_per_second=2,
    )  # fmt: skip


def _run(net, args, name, row):
    row.show("starting")
    # A step of plain DDP over a link of this rate, four times over, is no hang.
    patience = 30 + (4 * 20e6 * 8 / (args.mbit * 1e6) if args.mbit else 0)
    command = [sys.executable, str(RANK), "--method", name, "--seconds", str(args.seconds),
               "--seed", str(args.seed), "--patience", str(patience)]  # fmt: skip
    return row.finish(net.run(command, env=import_paths(), on_line=row.on_line))


def _configuration(args, net):
    contestants = {
        name: {"label": c.label, "optimizer": c.optimizer, "options": c.options,
               "method": _written(c.method) if c.method else None}
        for name, c in CONTESTANTS.items() if name in args.methods
    }  # fmt: skip
    return {
        "date": records.today(),
        "ranks": args.ranks, "mbit": args.mbit, "shaped": net.shaped, "why_not_shaped": net.why,
        "seconds": args.seconds, "seed": args.seed,
        "machine": records.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "thinwire": thinwire.__version__, "native": thinwire.ops.native("cpu")},
        "contestants": contestants,
        "methods": {},
    }  # fmt: skip


# ---- the table, for the terminal and for the documentation ----

HEADS = ("method", "step, ms", "MB a step", "times less", "MB in all", "steps", "held-out loss")


def print_table(record: dict, console: Console) -> None:
    """The table of a record, in 80 columns."""
    title = f"{record['ranks']} ranks, {record['seconds']:g} s of training each, {_network(record)}"
    heads = tuple("\n".join(head.rsplit(" ", 1)) for head in HEADS)
    records.print_table(heads, rows_of(record), title, console=console)


def rows_of(record: dict) -> list[tuple[str, ...]]:
    """The table's cells, a row a method, from what demo.json holds."""
    dense = record["methods"].get("dense", {}).get("step_bytes")
    rows = []
    for name, result in record["methods"].items():
        contestant = CONTESTANTS[name]
        sent = result.get("step_bytes")
        trained = contestant.trains and result["curve"]
        steps = str(result["steps"]) + ("" if result["status"] == "done" else f" {result['status']}")
        rows.append((
            contestant.label,
            f"{result['step_ms']:.0f}" if "step_ms" in result else "-",
            "-" if sent is None or not contestant.trains else f"{sent / 1e6:.3g}",
            f"{dense / sent:.0f}" if dense and sent and contestant.trains else "-",
            f"{result['bytes'] / 1e6:.3g}" if result.get("bytes") and contestant.trains else "-",
            steps if contestant.trains else "-",
            f"{result['curve'][-1][2]:.3f}" if trained else "-",
        ))  # fmt: skip
    return rows


def _network(record):
    return f"{record['mbit']:g} Mbit/s links" if record["shaped"] else "NETWORK NOT SHAPED"


def write_table(record: dict) -> None:
    """Write docs/tables/demo.md: the table and the picture of a record."""
    machine, versions = record["machine"], record["versions"]
    footer = (
        f"{record['ranks']} ranks on {machine['cores']} cores ({machine['cpu']}), {_network(record)}, "
        f"{record['seconds']:g} s of training each, seed {record['seed']}, {record['date']}, "
        f"PyTorch {versions['torch']}. {'; '.join(_ours(record))}. AdamW's "
        f"learning rate and β1: {'; '.join(_optimizers(record))}; β2 0.95.\n\n"
        + records.picture("demo", "Held-out loss against training time")
    )
    records.write_table("demo", HEADS, rows_of(record), footer)


def _written(method: thinwire.Method) -> str:
    """A method as it is written in code: what differs from its default."""
    selected = [method.selection] if isinstance(method, thinwire.BlockSparse) else []
    default = type(method)(*selected)
    changed = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)
               if getattr(method, f.name) != getattr(default, f.name)}  # fmt: skip
    arguments = [*map(json.dumps, selected), *(f"{name}={json.dumps(value)}" for name, value in changed.items())]
    return f"{type(method).__name__}({', '.join(arguments)})"


def _ours(record):
    for one in record["contestants"].values():
        if one["method"]:
            yield f"{one['label']} is `{one['method']}`"


def _optimizers(record):
    for name, one in record["contestants"].items():
        if CONTESTANTS[name].trains:
            yield f"{one['label']} {one['options']['lr']:g}, {one['options']['betas'][0]:g}"


def draw(record: dict, path: Path) -> None:
    """The held-out loss of every method against its training time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, result in record["methods"].items():
        if CONTESTANTS[name].trains and result["curve"]:
            seconds, _, losses = zip(*result["curve"])
            cut = "" if result["status"] == "done" else f" ({result['status']})"
            thick = 2.5 if CONTESTANTS[name].family in OURS else 1.5
            axes.plot(seconds, losses, marker="o", markersize=3, linewidth=thick,
                      label=CONTESTANTS[name].label + cut)  # fmt: skip
    losses = [point[2] for result in record["methods"].values() for point in result["curve"][1:]]
    if losses:
        axes.set_ylim(min(losses) - 0.05, max(losses) + 0.05)
    axes.set(xlabel="training time, s", ylabel="held-out loss, nats a byte",
             title=f"{record['ranks']} ranks, {_network(record)}")  # fmt: skip
    axes.grid(alpha=0.3)
    if axes.get_lines():
        axes.legend()
    figure.savefig(path, dpi=120)


def _shown(path):
    return os.path.relpath(path)


def _arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=34, help="training time of each method (default 34)")
    parser.add_argument("--mbit", type=float, default=100, help="rate of each link, each way (default 100)")
    parser.add_argument("--ranks", type=int, default=4, help="(default 4)")
    parser.add_argument("--methods", nargs="+", choices=CONTESTANTS, default=SHOWN,
                        help=f"(default: {' '.join(SHOWN)})")  # fmt: skip
    parser.add_argument("--seed", type=int, default=1, help="of model and data (default 1; tuned on 0)")
    parser.add_argument("--out", type=Path, default=records.OWN_RESULTS, help="folder (default: results)")
    parser.add_argument("--docs", action="store_true", help="measure nothing: docs/tables from what is committed")
    args = parser.parse_args()
    args.out = args.out.resolve()
    if args.seconds <= 0:
        parser.error(f"--seconds {args.seconds}: expected a time above 0")
    return args


if __name__ == "__main__":
    sys.exit(main())
