"""How long a step takes on thin networks, rounds included: every way in turns with no exchange at all.

    python benchmarks/suite/steps.py                   every network; it goes on where it was
    python benchmarks/suite/steps.py --minutes 20      no network begun after so many: the most important ones are first
    python benchmarks/suite/steps.py --left            which are left
    python benchmarks/suite/steps.py --quick --out results     one network, few ways: a minute

A line of step_times.jsonl for each network, appended when it is done. Ways take turns: of those with rounds whole
rounds, in which every step is counted, of the others about a second. Between any two turns is one without exchange.
The time of a step is that of the rank that is the last to be done, a turn's mean. Where links have a delay and the
kernel has no means for it, frames go through a relay whose share of the processors is told with the figures. Have
nothing else run on the machine.
"""
import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path
from common.provenance import about
from common.ranks import import_paths
from common.record import RESULTS, append, print_table, read_rows, today
from common.turns import in_turns
from rich.progress import Progress
from thinnet import ThinNet

from suite import report
from suite.networks import NOOP, QUICK, everywhere
from suite.outcomes import STEPS

SCRIPT = Path(__file__).resolve().with_name("steps_rank.py")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where new rows go; those committed count, too, if "
                        "they were measured on such a machine")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no network after so many")
    parser.add_argument("--quick", action="store_true", help="a part of it, measured anew")
    parser.add_argument("--left", action="store_true", help="measure nothing, say what is left")
    args = parser.parse_args()
    path = args.out / f"{STEPS}.jsonl"
    machine = about()["machine"]
    rows = [] if args.quick else [row for row in there(args.out) if row["machine"] == machine]
    wanted = [net for net in (QUICK if args.quick else everywhere()) if not _is_there(net, rows)]
    print(f"{len(wanted)} networks are left: about {sum(map(_seconds, wanted)) / 60:.0f} minutes", flush=True)
    if args.left:
        return print("\n".join(map(str, wanted)))
    end = time.monotonic() + 60 * args.minutes
    for net in wanted:
        if time.monotonic() > end:
            break
        rows.append(measure(net) | {"command": "python benchmarks/suite/steps.py", "date": today(), **about()})
        append(path, rows[-1])
        print_table(*report.turns(rows[-1]), title=str(net))


def there(out):
    """What is committed, and what was measured since."""
    places = dict.fromkeys([RESULTS.resolve(), out.resolve()])
    return [row for place in places for row in read_rows(place / f"{STEPS}.jsonl")]


def measure(network) -> dict:
    """Its row: what it is, its turns in the order of time, and the relay's share of one processor.

    Raises SystemExit where links cannot be shaped, or a rank fails.
    """
    turns, complaints = [], []
    with ThinNet(network.ranks, network.mbit, delay_ms=network.delay_ms) as net, Progress(transient=True) as progress:
        if not net.isolated or (network.mbit and not net.shaped):
            raise SystemExit(f"the network cannot be shaped here: {net.why}")
        total = len(list(in_turns(network.methods, NOOP, network.cycles)))
        bar = progress.add_task(str(network), total=total)

        def take(rank, line, stream):
            if rank == 0 and line.startswith("{"):
                turns.append(json.loads(line))
                progress.advance(bar)
            else:
                complaints.append(f"[{rank}] {line}")

        command = [sys.executable, str(SCRIPT), "--model", network.model, "--cycles", str(network.cycles), "--methods",
                   *network.methods]  # fmt: skip
        begin = time.monotonic()
        if net.run(command, env=import_paths(), on_line=take) != 0:
            raise SystemExit("\n".join(["the ranks failed", *complaints[-20:]]))
        used, by, seconds = net.relay_cpu_s(), net.delayed_by, time.monotonic() - begin
    share = None if used is None else round(used / seconds, 3)
    return network.key() | {"delayed_by": by, "relay": share, "turns": turns}


def _is_there(net, rows):
    return any(net.key() == {name: row.get(name) for name in net.key()} for row in rows)


def _seconds(net):
    """Roughly, from runs on two cores."""
    return 20 + (4 + 2.5 * net.cycles) * len(net.methods) * net.ranks / 4


if __name__ == "__main__":
    sys.exit(main())
