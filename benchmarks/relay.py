"""Builds, starts and speaks to relay.cpp, the switch of thinnet.py where the kernel has no netem."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ["-std=c++17", "-O2"]


class Counts(NamedTuple):
    """What a relay has used and dropped since it started."""

    cpu_s: float
    dropped: list[int]  # of each rank: frames for which its link's queues had no room
    lost: list[int]  # of each rank: frames it sent that were lost because a loss was asked for


class Relay:
    """A running relay. It ends with `close`, and when this process does, however it does.

    Args:
        enter: what takes a command to where the namespaces are.
        interface: name of the device that each namespace gets.
        namespaces: their files' paths.
        delay_ms, jitter_ms, loss: of every path, one way.

    Raises OSError without a compiler, where the relay does not compile, and where it may not make
    its devices.
    """

    def __init__(
        self,
        enter: Sequence[str],
        interface: str,
        namespaces: Sequence[str],
        delay_ms: float,
        jitter_ms: float,
        loss: float,
    ):
        path = [f"{delay_ms * 1e6:.0f}", f"{jitter_ms * 1e6:.0f}", repr(loss)]
        self._process = subprocess.Popen(
            [*enter, str(_built()), interface, *path, *namespaces],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # it outlives a Ctrl-C, until we have ended the ranks
        )
        answer = self._answer()
        if answer != "ready":
            self.close()
            raise OSError(f"relay: {answer}")
        self.pidfd = os.pidfd_open(self._process.pid)

    def set_rate(self, rank: int, mbit: float, queue_bytes: int) -> None:
        """Gives one rank's link a rate each way, 0 for none. Raises OSError if the relay refuses."""
        answer = self._ask(f"rate {rank} {mbit * 1e6!r} {queue_bytes}")
        if answer != "ok":
            raise OSError(f"relay: {answer}")

    def counts(self) -> Counts:
        """Raises OSError if the relay is gone."""
        cpu_s, *frames = self._ask("count").split()
        return Counts(float(cpu_s), [int(n) for n in frames[::2]], [int(n) for n in frames[1::2]])

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # at which it ends
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        if hasattr(self, "pidfd"):
            os.close(self.pidfd)

    def _ask(self, command: str) -> str:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{command}\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        answer = self._process.stdout.readline().strip()
        if not answer:
            raise OSError(f"relay: ended with status {self._process.wait()}")
        return answer


def compiler() -> list[str] | None:
    """The command of a C++ compiler: $CXX, or what there is."""
    for command in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        argv = shlex.split(command)
        if argv and shutil.which(argv[0]):
            return argv
    return None


def _built() -> Path:
    """The program, compiled now if this source never was by this compiler."""
    command = compiler()
    if command is None:
        raise OSError("no C++ compiler for relay.cpp, which makes delays where the kernel has no netem: set CXX")
    digest = hashlib.sha256("\0".join([SOURCE.read_text(), *command, *FLAGS]).encode())
    folder = _folder()
    program = folder / f"relay-{digest.hexdigest()[:16]}"
    if not program.exists():
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:  # others may compile it now, too
            fresh = Path(unfinished) / "relay"
            done = subprocess.run(
                [*command, *FLAGS, str(SOURCE), "-o", str(fresh)],
                check=False,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
                raise OSError(f"{shlex.join(command)} could not compile {SOURCE.name}: {(said or ['?'])[0].strip()}")
            fresh.replace(program)
    return program


def _folder() -> Path:
    """build/ of the repository; where it may not be written, a folder for as long as we run."""
    build = SOURCE.parents[1] / "build"
    with contextlib.suppress(OSError):
        build.mkdir(exist_ok=True)
        if os.access(build, os.W_OK):
            return build
    global _temporary
    if _temporary is None:
        _temporary = Path(tempfile.mkdtemp(prefix="thinwire-"))
        atexit.register(shutil.rmtree, _temporary, ignore_errors=True)
    return _temporary


_temporary: Path | None = None
