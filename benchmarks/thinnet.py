"""A thin network on one machine: each rank in its own network namespace, behind a shaped link.

    python benchmarks/thinnet.py --ranks 4 --mbit 100 -- python train.py --steps 50

starts four copies of the command. Each is a machine of its own to torch.distributed: one rank,
an interface eth0, and a link to a common switch of 100 Mbit/s each way. Lines that the ranks
print come out with the rank before them. Everything made here is removed again, also after an
error, SIGINT, SIGTERM or SIGHUP.

    with ThinNet(ranks=4, mbit=100) as net:
        status = net.run([sys.executable, "train.py"])
        net.shape(rank=2, mbit=10)                      # one slow link
        status = net.run([sys.executable, "train.py"])

A script inside a rank reads its interface's own counters with `interface_bytes()`.

    python benchmarks/thinnet.py --ranks 4 --mbit 100 --delay 10 --jitter 1 --loss 0.1 -- ...

adds 10 ms one way between any two ranks, give or take 1 ms, and loses 0.1 % of the packets. The
kernel's netem does it where there is one. Else a userspace switch does, relay.cpp, which needs a
C++ compiler, once. Over the switch

- frames are of up to 9000 bytes, to keep it cheap: headers are 0.7 % of the rate in place of
  4.4 %, and a loss takes a larger frame.
- its own CPU time is not the ranks'. Cores that it shares with them it slows: `relay_cpu_s()`
  and a line on stderr say how much it used.
- jitter never changes the order of frames, so on a busy path the delay comes near its largest
  value. (netem's does change the order.)

TCP is as on a host with long paths: cubic, windows of up to 32 MB, and the kernel's slow start
after a pause (tcp_slow_start_after_idle) left on. A path that was idle for longer than a
retransmission timeout finds its rate anew, as on a real network.

Linux only. Needs `ip` and `tc` (package iproute2), and root or unprivileged user namespaces.
Without them the ranks share the loopback and one line on stderr says that timings mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import math
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from relay import Counts, Relay

INTERFACE = "eth0"
SUBNET = "10.77.0"  # seen only inside our namespaces, so it cannot clash with the host's networks
MAX_RANKS = 250  # one /24
FRAME = 1514  # bytes: MTU of 1500 and the Ethernet header
RELAY_MTU = 9000

OnLine = Callable[[int, str, str], None]  # rank, line, "stdout" or "stderr"

_SBIN = "/usr/sbin:/sbin"  # where ip and tc are, and where a user's PATH often does not look
_serial = itertools.count()


@dataclass(frozen=True)
class LinkShape:
    """The rate of one link, each way, and what a packet meets between two links.

    Raises ValueError for a rate that is negative, not finite or under 0.01; a delay or jitter that
    is negative or not finite; more jitter than delay; a loss outside of [0, 1).
    """

    # 10^6 bits a second; 0 leaves the link unshaped. Headers count: of the rate, 95.6 % is left
    # for what TCP carries.
    mbit: float = 0.0
    delay_ms: float = 0.0  # one way, between any two ranks
    jitter_ms: float = 0.0  # each packet's delay is delay_ms ± at most this
    loss: float = 0.0  # share of the packets that never arrive

    def __post_init__(self):
        if not (math.isfinite(self.mbit) and (self.mbit == 0 or self.mbit >= 0.01)):
            raise ValueError(f"mbit={self.mbit!r}: expected 0 (unshaped), or at least 0.01 (Mbit/s each way)")
        if not (math.isfinite(self.delay_ms) and self.delay_ms >= 0):
            raise ValueError(f"delay_ms={self.delay_ms!r}: expected 0 or more (ms one way)")
        if not 0 <= self.jitter_ms <= self.delay_ms:
            raise ValueError(f"jitter_ms={self.jitter_ms!r}: expected 0 to delay_ms={self.delay_ms!r}")
        if not 0 <= self.loss < 1:
            raise ValueError(f"loss={self.loss!r}: expected a share from 0 to under 1")

    @property
    def is_delayed(self) -> bool:
        """Whether packets meet more than a rate."""
        return bool(self.delay_ms or self.loss)

    @property
    def queue_bytes(self) -> int:
        """The queue of one direction.

        As in a switch's port: 50 ms and a round trip, or 128 kB, take the first windows of several
        senders to one rank. A shorter queue drops their tails, and TCP sits out 200 ms; a longer
        one only adds delay. (A fast rank that sends to a slow link still overruns it while TCP
        finds the rate, and sends up to a quarter twice, as on a real network.)
        """
        return max(128_000, int(self.mbit * 1e6 / 8 * (50e-3 + 2e-3 * self.delay_ms)))

    def tbf(self) -> list[str]:
        """The arguments of `tc qdisc ... tbf`."""
        bytes_per_s = self.mbit * 1e6 / 8
        # burst passes unshaped after a pause. Large, it would give small messages away for free,
        # and small messages are what we measure; but over it, a timer that fires late loses rate
        # for good. Half a millisecond is enough to fill a link of 1 Gbit/s from two cores; three
        # frames keep slow links full.
        burst = max(3 * FRAME, int(bytes_per_s * 0.5e-3))
        rate = f"{self.mbit * 1e6:.0f}bit"
        return ["rate", rate, "burst", f"{burst}b", "limit", f"{self.queue_bytes}b"]

    def netem(self) -> list[str]:
        """The arguments of `tc qdisc ... netem`."""
        # limit counts packets under way: as many as there may be, or netem drops what it delays.
        delay = ["delay", f"{self.delay_ms * 1e3:.0f}us", f"{self.jitter_ms * 1e3:.0f}us"]
        return [*delay, "loss", f"{self.loss * 100:g}%", "limit", "1000000"]


class InterfaceBytes(NamedTuple):
    """Bytes that crossed an interface since it was made, Ethernet, IP and TCP headers included."""

    tx: int
    rx: int


def interface_bytes() -> InterfaceBytes | None:
    """This rank's interface counters, or None where the caller is not on a thin network.

    What TCP carries takes 4.6 % more than its own size here, or less: the kernel passes several
    packets on as one, with one header, where they fit the shaper's burst or the link is unshaped.
    Over the relay, with its larger frames, it takes 0.7 % more. Resent packets count again.
    """
    name = os.environ.get("THINNET_INTERFACE")
    if name is None:
        return None
    with open("/proc/net/dev") as counters:  # always of the reader's own namespace, unlike /sys
        for line in counters:
            device, _, fields = line.partition(":")
            if device.strip() == name:
                numbers = fields.split()
                return InterfaceBytes(tx=int(numbers[8]), rx=int(numbers[0]))
    return None


class ThinNet:
    """Ranks in network namespaces, joined by a switch, each link shaped both ways.

    A context manager: namespaces are made on entry and removed on exit, with all that runs in
    them. Between, SIGINT raises KeyboardInterrupt, SIGTERM and SIGHUP raise SystemExit(128 +
    signal), so that the `with` unwinds; used outside the main thread, signals are left alone.

    Args:
        ranks: number of ranks, 1 to 250.
        mbit: rate of every link each way in Mbit/s; 0 for unshaped links.
        delay_ms: milliseconds one way between any two ranks, beside what the rates take.
        jitter_ms: how much a packet's delay may differ from it, uniformly; at most `delay_ms`.
        loss: share of the packets that are lost, 0 to under 1.

    Raises ValueError for other arguments. Where namespaces are impossible it does not raise: the
    ranks then share the loopback, `isolated` and `shaped` are False, `why` gives the reason, and
    stderr got it in one line.
    """

    def __init__(
        self, ranks: int, mbit: float = 0.0, delay_ms: float = 0.0, jitter_ms: float = 0.0, loss: float = 0.0
    ):
        if not 1 <= ranks <= MAX_RANKS:
            raise ValueError(f"ranks={ranks!r}: expected 1 to {MAX_RANKS}")
        self.ranks = ranks
        self.shapes = [LinkShape(mbit, delay_ms, jitter_ms, loss)] * ranks
        self.isolated = False  # whether each rank has its own namespace and interface
        self.failed_rank: int | None = None  # of the last run: the first rank that failed
        self._open = False
        self._no_namespaces: str | None = None  # why not
        self._namespaces: _Namespaces | None = None
        self._running: list[_Rank] = []
        self._runs = 0
        self._signals = _Signals()

    @property
    def shaped(self) -> bool:
        """Whether a link has a rate or a delay, so that timings mean something."""
        return self.isolated and any(shape.mbit or shape.is_delayed for shape in self.shapes)

    @property
    def why(self) -> str | None:
        """Why the net is not shaped; None if it is."""
        return None if self.shaped else self._no_namespaces or "no rate was asked for (mbit=0)"

    @property
    def delayed_by(self) -> str | None:
        """What makes delay, jitter and loss: "netem" or "relay"; None where nothing does."""
        return self._namespaces.delayed_by if self._namespaces else None

    def relay_counts(self) -> Counts | None:
        """What the userspace switch used and dropped since it started; None where there is none.

        Raises OSError if it is gone.
        """
        relay = self._namespaces and self._namespaces.relay
        return relay.counts() if relay else None

    def relay_cpu_s(self) -> float | None:
        """CPU seconds that the userspace switch has used so far; None where there is none.

        They hold what the kernel does in its name: the receivers' TCP, among others.
        """
        counts = self.relay_counts()
        return counts.cpu_s if counts else None

    def __enter__(self):
        self._signals.install()
        try:
            with self._signals.held():
                self._make()
                self._open = True
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        try:
            with self._signals.held():
                self._open = False
                self._end_ranks()
                if self._namespaces:
                    self._namespaces.remove()
                    self._namespaces = None
        finally:
            self._signals.restore()

    def _make(self) -> None:
        self.isolated, self._no_namespaces = False, None  # a net may be entered again
        missing = [tool for tool in ("ip", "tc") if _which(tool) is None]
        if missing:
            self._no_namespaces = f"{' and '.join(missing)} not found: install the package iproute2"
        else:
            reasons = []
            for rootless in (False, True):
                namespaces = _Namespaces(self.ranks, rootless, self.shapes[0])
                try:
                    namespaces.make()
                    for rank, shape in enumerate(self.shapes):
                        namespaces.shape(rank, shape)
                except OSError as error:
                    namespaces.remove()
                    reasons.append(str(error))
                else:
                    self._namespaces, self.isolated = namespaces, True
                    return
            self._no_namespaces = f"{reasons[0]}; in a user namespace: {reasons[1]}"
        because = self._no_namespaces
        _say(f"NOT SHAPED, timings mean nothing: all ranks share the loopback, as {because}")

    def shape(self, rank: int, mbit: float) -> None:
        """Gives one rank's link another rate each way, in Mbit/s; 0 for none. Keeps the delay.

        Does nothing on the loopback, where `shaped` is False. Raises ValueError for a rank or a
        rate that is not allowed, OSError where `tc` or the relay fails.
        """
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank={rank!r}: expected 0 to {self.ranks - 1}")
        shape = replace(self.shapes[rank], mbit=mbit)
        if self._namespaces:
            self._namespaces.shape(rank, shape)
            self.shapes[rank] = shape

    def run(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        on_line: OnLine | None = None,
        grace_s: float = 5.0,
    ) -> int:
        """Runs `command` once in every rank and waits; may be called again on the same net.

        When one rank fails, the others have `grace_s` seconds to end by themselves; then they
        are ended, and stderr says which rank failed. Nothing a rank started outlives the call.

        Args:
            command: program and arguments, the same for every rank.
            env: variables to add to this process's own. RANK, LOCAL_RANK, WORLD_SIZE,
                LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT and GLOO_SOCKET_IFNAME are always ours.
            on_line: called as on_line(rank, line, "stdout" or "stderr") in this thread. By
                default lines are printed as "[rank] line".
            grace_s: seconds.

        Returns:
            The exit status of the first rank that failed, 128 + signal if a signal ended it, or
            0. `failed_rank` names the rank.

        Raises RuntimeError outside the `with`, ValueError for an empty command or a negative
        `grace_s`, FileNotFoundError for a program that is not there, OSError if the relay ends.
        """
        if not self._open:
            raise RuntimeError("run() outside of the context: use `with ThinNet(...) as net:`")
        if not command:
            raise ValueError(f"command={command!r}: expected a program and its arguments")
        shared = self._environment(env or {})
        if not grace_s >= 0:
            raise ValueError(f"grace_s={grace_s!r}: expected seconds, 0 or more")
        if shutil.which(command[0], path=shared.get("PATH")) is None:
            raise FileNotFoundError(errno.ENOENT, "no such program", command[0])
        self.failed_rank = None
        self._signals.rearm()
        ranks = self._running
        try:
            with self._signals.held():  # no rank may start without being known
                for rank in range(self.ranks):
                    argv = self._namespaces.command(rank, command) if self._namespaces else command
                    ranks.append(_Rank(rank, argv, {**shared, "RANK": str(rank)}))
            return self._watch(on_line or _print_line, grace_s)
        finally:
            with self._signals.held():
                self._end_ranks()
                for rank in ranks:
                    rank.close()

    def _environment(self, env: Mapping[str, str]) -> dict[str, str]:
        # Output that waits in a buffer would be lost with a rank that is killed.
        environment = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **os.environ, **env}
        environment |= {
            # Each namespace plays one machine with one rank, whatever runs beside it here.
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "WORLD_SIZE": str(self.ranks),
        }
        if self._namespaces:
            self._runs += 1  # another port each time: the last one may still be in TIME_WAIT
            address, interface, port = f"{SUBNET}.1", INTERFACE, 29500 + self._runs % 1000
            environment["THINNET_INTERFACE"] = INTERFACE
        else:
            with socket.create_server(("127.0.0.1", 0)) as free:
                address, interface, port = "127.0.0.1", "lo", free.getsockname()[1]
            environment.pop("THINNET_INTERFACE", None)
        environment |= {
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": interface,
        }
        return environment

    def _watch(self, on_line: OnLine, grace_s: float) -> int:
        """Passes lines on until all ranks have ended, or one failed and the grace is over."""
        status, end_at = 0, math.inf
        with selectors.DefaultSelector() as selector:
            for rank in self._running:
                # A process descriptor tells of the end at once, hence which rank ended first.
                selector.register(rank.pidfd, selectors.EVENT_READ, (rank, None))
                for stream in ("stdout", "stderr"):
                    pipe = getattr(rank.process, stream)
                    selector.register(pipe, selectors.EVENT_READ, (rank, stream))
            if self._namespaces and self._namespaces.relay:
                selector.register(self._namespaces.relay.pidfd, selectors.EVENT_READ, (None, None))
            alive = {rank.rank for rank in self._running}
            while alive and time.monotonic() < end_at:
                timeout = None if end_at == math.inf else max(0, end_at - time.monotonic())
                for key, _ in selector.select(timeout):
                    rank, stream = key.data
                    if rank is None:
                        raise OSError("the relay ended in the middle of a run")
                    if stream:
                        if not rank.read(stream, on_line):
                            selector.unregister(key.fileobj)
                        continue
                    selector.unregister(rank.pidfd)
                    alive.discard(rank.rank)
                    if rank.status() and not status:
                        status, self.failed_rank = rank.status(), rank.rank
                        end_at = time.monotonic() + grace_s
            with self._signals.held():
                self._end_ranks()
            # The last words. Only a process that left group and namespace still holds a pipe.
            while pipes := [key for key, _ in selector.select(0.2) if key.data[1]]:
                for key in pipes:
                    rank, stream = key.data
                    if not rank.read(stream, on_line):
                        selector.unregister(key.fileobj)
        if status:
            name = signal.Signals(status - 128).name if _is_signal(status) else ""
            others = f"; still running {grace_s:g} s later and ended: {sorted(alive)}"
            _say(
                f"rank {self.failed_rank} failed with status {status}"
                + (f" ({name})" if name else "")
                + (others if alive else "")
            )
        return status

    def _end_ranks(self) -> None:
        """Ends all that runs in the net: politely, then for good. Does nothing a second time."""
        alive = [rank for rank in self._running if rank.status() is None]
        for rank in alive:
            rank.kill(signal.SIGTERM)
        give_up = time.monotonic() + 2
        while time.monotonic() < give_up and any(rank.status() is None for rank in alive):
            time.sleep(0.02)
        for rank in self._running:
            rank.kill(signal.SIGKILL)
        if self._namespaces and self._running:
            self._namespaces.kill_all()  # grandchildren that made a process group of their own
        for rank in self._running:
            rank.process.wait()
        self._running = []


class _Rank:
    """One rank's process, leader of a process group of its own."""

    def __init__(self, rank: int, argv: Sequence[str], env: Mapping[str, str]):
        self.rank = rank
        self.process = subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.pidfd = os.pidfd_open(self.process.pid)
        self._partial = {"stdout": b"", "stderr": b""}

    def status(self) -> int | None:
        """Exit status, 128 + signal, or None while it runs.

        Leaves a dead process unreaped: as long as it is, nobody else can get its number, and
        `kill` cannot hit a stranger.
        """
        end = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if end is None:
            return None
        return end.si_status if end.si_code == os.CLD_EXITED else 128 + end.si_status

    def kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def close(self) -> None:
        os.close(self.pidfd)
        self.process.stdout.close()
        self.process.stderr.close()

    def read(self, stream: str, on_line: OnLine) -> bool:
        """Passes on the lines that are there. False at the end of the stream."""
        data = os.read(getattr(self.process, stream).fileno(), 1 << 16)
        *lines, rest = (self._partial[stream] + data).split(b"\n")
        if not data and rest:
            lines, rest = [rest], b""
        self._partial[stream] = rest
        for line in lines:
            on_line(self.rank, line.decode(errors="replace"), stream)
        return bool(data)


class _Namespaces:
    """The network itself: one namespace a rank, and one for the bridge that joins them.

    With a delay and without netem, a relay joins them, and the bridge is not made.

    The bridge has its own namespace, so that no interface or route of the host is touched.
    Methods raise OSError with the failed command and what it said.
    """

    def __init__(self, ranks: int, rootless: bool, path: LinkShape):
        run = f"thinwire-{os.getpid()}-{next(_serial)}"
        self._wanted = [f"{run}-{rank}" for rank in range(ranks)]
        self._bridge = f"{run}-bridge"
        self._made: list[str] = []
        self._rootless = rootless
        self._enter: list[str] = []  # what takes a command into our user namespace
        self._holder: subprocess.Popen | None = None
        self._path = path  # what there is between two links
        self.delayed_by: str | None = None
        self.relay: Relay | None = None

    def make(self) -> None:
        if self._rootless:
            self._make_user_namespace()
        self._add(self._bridge)
        for name in self._wanted:
            self._add(name)
        if self._path.is_delayed:
            self.delayed_by = "netem" if self._has_netem() else "relay"
        if self.delayed_by == "relay":
            self._plug_into_relay()
        else:
            self._plug_into_bridge()
        for rank, name in enumerate(self._wanted):
            self._set_up(name, f"{SUBNET}.{rank + 1}")

    def _plug_into_bridge(self) -> None:
        bridge = ("-n", self._bridge)
        self._ip(*bridge, "link", "add", "br0", "type", "bridge")
        self._without_ipv6(self._bridge, "br0")
        self._ip(*bridge, "link", "set", "br0", "up")
        for rank, name in enumerate(self._wanted):
            port = f"rank{rank}"
            self._ip(*bridge, "link", "add", port, "type", "veth",
                     "peer", "name", INTERFACE, "netns", name)  # fmt: skip
            self._without_ipv6(self._bridge, port)
            self._ip(*bridge, "link", "set", port, "master", "br0", "up")

    def _plug_into_relay(self) -> None:
        from relay import Relay  # only here: without a delay this file stands alone

        files = [f"/run/netns/{name}" for name in self._wanted]
        path = (self._path.delay_ms, self._path.jitter_ms, self._path.loss)
        self.relay = Relay(self._enter, INTERFACE, files, *path)
        for name in self._wanted:
            self._ip("-n", name, "link", "set", INTERFACE, "mtu", str(RELAY_MTU))

    def _set_up(self, name: str, address: str) -> None:
        self._without_ipv6(name, INTERFACE)
        self._ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
        self._ip("-n", name, "link", "set", "lo", "up")
        self._ip("-n", name, "link", "set", INTERFACE, "up")
        # Runs a command for the first time, so a sandbox that forbids it is found out here.
        # The host's congestion control may be one that overruns short queues (BBR lost a
        # quarter of a 10 Mbit/s link here); reno is in every kernel and keeps links full.
        settings = {"tcp_congestion_control": "reno"}
        if self._path.is_delayed:
            # What 1000 Mbit/s hold over 100 ms there and back, and as much again.
            settings |= {"tcp_rmem": "4096 131072 33554432", "tcp_wmem": "4096 16384 33554432"}
        script = "; ".join(f"echo {value} > /proc/sys/net/ipv4/{key}" for key, value in settings.items())
        self._call(*self._exec(name), "sh", "-c", f"({script}) 2>/dev/null || true")
        if self._path.is_delayed:
            # reno takes a round trip for each packet to grow its window; over a long path hosts
            # have cubic. A route may name it where a namespace's default may not. May fail:
            # then the kernel has none.
            route = ["dev", INTERFACE, "proto", "kernel", "scope", "link", "src", address]
            self._ip("-n", name, "route", "change", f"{SUBNET}.0/24", *route, "congctl", "cubic", check=False)

    def _has_netem(self) -> bool:
        qdisc = [_which("tc"), "-n", self._bridge, "qdisc"]
        try:
            self._call(*qdisc, "add", "dev", "lo", "root", "netem", "delay", "1ms")
        except OSError:
            return False
        self._call(*qdisc, "delete", "dev", "lo", "root")
        return True

    def shape(self, rank: int, shape: LinkShape) -> None:
        if self.relay:
            self.relay.set_rate(rank, shape.mbit, shape.queue_bytes)
            return
        # Shaping works on what leaves an interface: rank to switch at eth0, back at the port.
        self._replace_qdisc(self._wanted[rank], INTERFACE, ["root"], shape)
        port, parent = f"rank{rank}", ["root"]
        if shape.is_delayed:
            # Only at the port, or a path would have the delay twice.
            parent = ["parent", "1:1", "handle", "10:"]
            qdisc = [_which("tc"), "-n", self._bridge, "qdisc", "replace", "dev", port]
            self._call(*qdisc, "root", "handle", "1:", "netem", *shape.netem())
        self._replace_qdisc(self._bridge, port, parent, shape)

    def _replace_qdisc(self, name: str, device: str, parent: list[str], shape: LinkShape) -> None:
        qdisc = [_which("tc"), "-n", name, "qdisc"]
        if shape.mbit:
            self._call(*qdisc, "replace", "dev", device, *parent, "tbf", *shape.tbf())
        else:
            self._call(*qdisc, "delete", "dev", device, *parent, check=False)  # may have none

    def command(self, rank: int, argv: Sequence[str]) -> list[str]:
        """`argv` as run inside the rank's namespace, in this process's working directory."""
        # Entering a mount namespace moves to its root.
        here = ["sh", "-c", 'cd "$0" && exec "$@"', os.getcwd()] if self._rootless else []
        return [*self._enter, *self._exec(self._wanted[rank]), *here, *argv]

    def kill_all(self) -> None:
        for name in self._made:
            for _ in range(10):  # again for what was forked meanwhile
                pids = self._ip("netns", "pids", name, check=False).split()
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                if not pids:
                    break
                time.sleep(0.02)

    def remove(self) -> list[str]:
        """Returns the names that could not be removed, and says why on stderr."""
        kept = []
        if self.relay:
            self.relay.close()
            self.relay = None
        while self._made:  # links and qdiscs go with their namespace
            name = self._made.pop()
            try:
                self._ip("netns", "delete", name)
            except OSError as error:
                _say(f"could not remove the namespace {name}: {error}")
                kept.append(name)
        if self._holder:
            self._holder.communicate()  # closes its stdin, at which it ends
            self._holder = None
        return kept

    def _make_user_namespace(self) -> None:
        """Keeps a process in a user namespace, where we may do what needs root.

        Its namespaces vanish with it, and it lives only as long as our end of its stdin: killed
        or not, we leave nothing behind. It outlives a Ctrl-C in a session of its own.
        """
        missing = [tool for tool in ("unshare", "nsenter") if _which(tool) is None]
        if missing:
            raise OSError(f"{' and '.join(missing)} not found: install the package util-linux")
        script = """
            { test -d /run/netns || { mount -t tmpfs tmpfs /run && mkdir /run/netns; }; } &&
            mount -t tmpfs tmpfs /run/netns && echo ready && read -r never
            for name in $(ls /run/netns); do kill -9 $("$0" netns pids $name); done 2>/dev/null
        """
        unshare = [_which("unshare"), "--user", "--map-root-user", "--net", "--mount"]
        self._holder = subprocess.Popen(
            [*unshare, "sh", "-c", script, _which("ip")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        answer = self._holder.stdout.readline().strip()
        if answer != "ready":
            raise OSError(f"unshare: {answer}")
        target = ["--target", str(self._holder.pid), "--user", "--net", "--mount"]
        self._enter = [_which("nsenter"), *target, "--preserve-credentials", "--"]

    def _add(self, name: str) -> None:
        self._ip("netns", "add", name)
        self._made.append(name)  # only now: a name that was there before is not ours to remove

    def _without_ipv6(self, name: str, device: str) -> None:
        # The packets by which IPv6 finds addresses would be counted with the ranks' bytes.
        # May fail: then the kernel has no IPv6.
        self._ip("-n", name, "link", "set", device, "addrgenmode", "none", check=False)

    def _exec(self, name: str) -> list[str]:
        return [_which("ip"), "netns", "exec", name]

    def _ip(self, *arguments: str, check: bool = True) -> str:
        return self._call(_which("ip"), *arguments, check=check)

    def _call(self, *argv: str, check: bool = True) -> str:
        done = subprocess.run(
            [*self._enter, *argv],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if check and done.returncode:
            said = " ".join(done.stderr.split()) or f"status {done.returncode}"
            raise OSError(f"`{' '.join([os.path.basename(argv[0]), *argv[1:]])}`: {said}")
        return done.stdout


class _Signals:
    """Turns signals into exceptions in the main thread, but never in the middle of our work."""

    def __init__(self):
        self._previous: dict[int, object] = {}
        self._holds = 0
        self._pending: int | None = None
        self._unwinding = False

    def install(self) -> None:
        self.rearm()
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # Ignored means nohup or a shell's background job; None, a handler not from Python.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._previous[number] = signal.signal(number, self._on_signal)

    def restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def rearm(self) -> None:
        self._unwinding = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A signal that comes within is raised at the end."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
            if self._pending and not self._holds:
                number, self._pending = self._pending, None
                self._raise(number)

    def _on_signal(self, number: int, frame) -> None:
        if self._unwinding:  # a second Ctrl-C must not cut the cleaning up short
            return
        if self._holds:
            self._pending = number
        else:
            self._raise(number)

    def _raise(self, number: int) -> None:
        self._unwinding = True
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def cleanup() -> list[str]:
    """Removes namespaces whose ThinNet was killed with SIGKILL, and what still runs in them.

    Only those named thinwire-<pid>-* whose pid is no longer alive. Without root there are none:
    they vanish with their process. Returns the names of those removed. Raises OSError where `ip`
    is missing or refuses.
    """
    if _which("ip") is None:
        raise OSError("ip not found: install the package iproute2")
    leftovers = _Namespaces(0, rootless=False, path=LinkShape())
    for line in leftovers._ip("netns", "list").splitlines():
        name = re.match(r"thinwire-(\d+)-\S+", line)
        if name and not _is_alive(int(name[1])):
            leftovers._made.append(name[0])
    names = list(leftovers._made)
    leftovers.kill_all()
    kept = leftovers.remove()
    return [name for name in names if name not in kept]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # alive, and another user's
        pass
    return True


def _is_signal(status: int) -> bool:
    return status - 128 in set(signal.Signals)


def _which(tool: str) -> str | None:
    return shutil.which(tool, path=f"{os.environ.get('PATH', os.defpath)}:{_SBIN}")


def _print_line(rank: int, line: str, stream: str) -> None:
    print(f"[{rank}] {line}", file=getattr(sys, stream), flush=True)


def _say(text: str) -> None:
    print(f"thinnet: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: the ranks', or 128 + signal."""
    parser = argparse.ArgumentParser(
        prog="thinnet.py",
        usage="%(prog)s --ranks N [--mbit RATE] [options] -- command ...",
        description="Runs a command in N ranks, each in its own network namespace behind a link "
        "of RATE Mbit/s each way.",
    )
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks (default 2)")
    parser.add_argument(
        "--mbit", type=float, default=0.0, metavar="RATE", help="Mbit/s each way; 0, the default, "
        "for unshaped links"
    )  # fmt: skip
    parser.add_argument(
        "--delay", type=float, default=0.0, metavar="MS", help="milliseconds one way between any "
        "two ranks (default 0)"
    )  # fmt: skip
    parser.add_argument(
        "--jitter", type=float, default=0.0, metavar="MS", help="how far a packet's delay may be "
        "from that, either way (default 0)"
    )  # fmt: skip
    parser.add_argument(
        "--loss", type=float, default=0.0, metavar="PERCENT", help="packets that are lost "
        "(default 0)"
    )  # fmt: skip
    parser.add_argument(
        "--grace", type=float, default=5.0, metavar="SECONDS", help="time for the other ranks to "
        "end by themselves when one has failed (default 5)"
    )  # fmt: skip
    parser.add_argument(
        "--quiet-ranks", action="store_true", help="show the lines of rank 0 only, and the last "
        "ones of a rank that failed"
    )  # fmt: skip
    parser.add_argument(
        "--cleanup", action="store_true", help="remove what runs that were killed with SIGKILL "
        "left behind (namespaces thinwire-<pid>-* whose pid is gone), and end"
    )  # fmt: skip
    arguments = list(sys.argv[1:] if argv is None else argv)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, command = parser.parse_args(arguments[:split]), arguments[split + 1 :]

    if options.cleanup:
        try:
            removed = cleanup()
        except OSError as error:
            parser.error(str(error))
        _say(f"removed {', '.join(removed) or 'nothing'}")
        return 0
    if not command:
        parser.error("no command: expected `-- command ...` after the options")
    if not options.grace >= 0:
        parser.error(f"--grace {options.grace}: expected seconds, 0 or more")
    if not 0 <= options.loss < 100:
        parser.error(f"--loss {options.loss}: expected a percentage from 0 to under 100")
    try:
        net = ThinNet(options.ranks, options.mbit, options.delay, options.jitter, options.loss / 100)
    except ValueError as error:
        parser.error(str(error))

    tails = [deque(maxlen=30) for _ in range(options.ranks)]

    def rank_0_only(rank: int, line: str, stream: str) -> None:
        if rank == 0:
            _print_line(rank, line, stream)
        else:
            tails[rank].append(line)

    on_line = rank_0_only if options.quiet_ranks else _print_line
    try:
        with net:
            status = net.run(command, on_line=on_line, grace_s=options.grace)
            if counts := net.relay_counts():
                _say(
                    f"the relay used {counts.cpu_s:.2f} s of CPU (not the ranks'); frames dropped by "
                    f"full queues {counts.dropped}, lost as asked {counts.lost}, by rank"
                )
    except FileNotFoundError as error:
        _say(str(error))
        return 127
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if net.failed_rank:
        for line in tails[net.failed_rank]:
            _print_line(net.failed_rank, line, "stderr")
    return status


if __name__ == "__main__":
    sys.exit(main())
