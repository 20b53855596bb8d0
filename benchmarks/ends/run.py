"""How programs end: a short training many times, ended in several ways, under plain DDP and under each method.

    python benchmarks/ends/run.py                     # 200 ends of every way and method on 2 ranks
    python benchmarks/ends/run.py --ends 20 --methods Elastic --ways nothing

What is counted is how each rank's process ended: by itself (its exit status, or the signal that was sent to it), in an
abort, in a segmentation fault, or not at all within half a minute. A script that has nothing left to do should end by
itself; and none may abort under thinwire that would not with plain DDP.

Importing torch takes seconds, so a server imports it once and forks every rank, which then leaves as any Python program
does, through the interpreter's own end.
"""
import argparse
import collections
import contextlib
import gc
import json
import os
import random
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own room on the path

OUTCOMES = ("by itself", "other", "abort", "segmentation fault", "hang")
PATIENCE = 30.0  # seconds until an end is called a hang


class Server:
    """The process that forks ranks. ``end`` runs one training on n ranks; statuses as of ``os.waitpid``."""

    def __init__(self, log: Path | None = None, cores: Path | None = None):
        command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                         stderr=None if log is None else log.open("w"), cwd=cores)  # fmt: skip

    def end(self, method: str, way: str, ranks: int, linger: float = 0.0) -> list[int | None]:
        """The exit statuses of the ranks, minus the signal where one ended it, None for a hang."""
        self._process.stdin.write(json.dumps([method, way, ranks, linger]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def outcome(way: str, status: int | None) -> str:
    """How an end is counted."""
    if status is None:
        return "hang"
    proper = {"Ctrl-C": {1, -signal.SIGINT}, "SIGTERM": {1, 128 + signal.SIGTERM}}
    proper = {1} if "exception" in way else proper.get(way, {0})
    if status in proper:  # 1: a rank may hear that the other one has left first
        return "by itself"
    return {-signal.SIGABRT: "abort", -signal.SIGSEGV: "segmentation fault"}.get(status, "other")


def serve() -> None:
    """Fork ranks as told on stdin, until it closes. A rank returns from here into the interpreter's end."""
    import torch._dynamo  # noqa: F401 (which making a DistributedDataParallel imports)

    from ends import rank

    host = Store()
    gc.collect()
    gc.freeze()  # else every rank's end would copy, page by page, all that torch's modules are
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    draw = random.Random(0)
    for number, line in enumerate(iter(sys.stdin.readline, "")):
        method, way, ranks, linger = json.loads(line)
        reading, writing = os.pipe()
        pids = []
        for one in range(ranks):
            if not (pid := os.fork()):
                os.close(reading)
                answers.close()
                os.close(0)
                rank.main(method, way, one, ranks, host.open(number), lambda: os.write(writing, b"."), linger)
                return
            pids.append(pid)
        os.close(writing)
        if way in rank.INTERRUPTED:
            for _ in pids:
                os.read(reading, 1)
            time.sleep(draw.uniform(0, 0.02))
            for pid in pids:
                os.kill(pid, rank.INTERRUPTED[way])
        answers.write(json.dumps(_wait(pids)) + "\n")
        os.close(reading)
        answers.flush()


class Store:
    """A store that outlives the ranks, as torchrun's does, in a process of its own."""

    def __init__(self):
        reading, writing = os.pipe()
        alive, self._alive = os.pipe()
        if not os.fork():
            import torch.distributed as dist

            os.close(self._alive)
            kept = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            os.write(writing, str(kept.port).encode())
            os.close(writing)
            with contextlib.suppress(KeyboardInterrupt):
                os.read(alive, 1)  # until the server has ended
            os._exit(0)
        os.close(writing)
        os.close(alive)
        self.port = int(os.read(reading, 16))
        os.close(reading)

    def open(self, number: int):
        import torch.distributed as dist

        os.close(self._alive)
        store = dist.TCPStore("localhost", self.port, is_master=False, wait_for_workers=False)
        return dist.PrefixStore(str(number), store)


def _wait(pids):
    """Statuses; those that do not end are killed."""
    found, last = {}, time.monotonic() + PATIENCE
    while len(found) < len(pids):
        for pid in set(pids) - found.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                found[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > last:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                found[pid] = None
        time.sleep(0.002)
    return [found[pid] for pid in pids]


def measure(methods, ways, ends, ranks, linger, server, keep):
    """The rows; keep: what is called with those so far, for it takes hours."""
    rows = []
    for way in ways:
        for method in methods:
            begin = time.monotonic()
            counts, statuses = collections.Counter(), collections.Counter()
            for _ in range(ends):
                found = server.end(method, way, ranks, linger)
                statuses.update(map(str, found))
                counts[max((outcome(way, status) for status in found), key=OUTCOMES.index)] += 1
            rows.append({"method": method, "way": way, "ends": ends, **{key: counts[key] for key in OUTCOMES},
                         "statuses": dict(statuses), "seconds": round(time.monotonic() - begin, 1)})  # fmt: skip
            keep(rows)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ends", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--linger", type=float, default=0.0, help="seconds by which each end takes longer")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--ways", nargs="+")
    parser.add_argument("--log", type=Path, help="what ranks say, instead of on the terminal")
    parser.add_argument("--cores", type=Path, help="a folder in which aborts leave core files")
    parser.add_argument("--out", type=Path, help="benchmarks/results by default")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve()
    from common.record import RESULTS, print_table, save

    from ends.rank import METHODS, WAYS

    args.out = args.out or RESULTS
    if args.cores:
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    options = []
    for name in ("ends", "ranks", "linger", "methods", "ways"):
        if given := getattr(args, name):
            options.append([f"--{name}", *map(str, given if isinstance(given, list) else [given])])
    command = shlex.join(["python", "benchmarks/ends/run.py", *sum(options, [])])
    keep = lambda rows: save("ends", command, rows, args.out, ranks=args.ranks, linger=args.linger)
    with Server(args.log, args.cores) as server:
        rows = measure(args.methods or METHODS, args.ways or WAYS, args.ends, args.ranks, args.linger, server, keep)
    heads = ("way", "method", "ends", *OUTCOMES)
    print_table(heads, [tuple(str(row[head]) for head in heads) for row in rows], left=2)


if __name__ == "__main__":
    main()
