"""How a program ends under Gloo: its threads are at rest, and no group goes where it would wait for itself.

A Gloo group has threads of its own, which outlive what is waited for by a moment: they drop the callback and the
tensors of a collective that is done, and for that they need Python's lock. So two things can go wrong in PyTorch alone:

* A thread asks for the lock when the interpreter is ending. CPython before 3.14 ends a thread that does, from inside
  C++ destructors, and the process aborts. So at exit this waits, a few seconds at most, until nothing is under way.
* The last reference to a group goes in one of its own threads, which then waits for itself, or with the lock held, as
  DDP's reducer does it, while a thread of the group waits for the lock. So what is used here is kept until exit.
"""

import atexit
import contextlib
import ctypes
import os
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Seconds to wait at exit for what is under way. Rank 0 of a group leaves first: what it leaves unanswered, after Ctrl-C
# say, fails on the others while these still wait, so that their threads are at rest when they leave.
FIRST, OTHERS = 3.0, 5.0

# Each with the process that it is of: what was inherited by one that was forked meanwhile has no thread there.
_kept: dict[dist.ProcessGroup, int] = {}
_under_way: set["Callback"] = set()
_ending: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


class Callback:
    """A function for ``Future.then``, of a collective of a group; it holds nothing once it has been called."""

    def __init__(self, group: dist.ProcessGroup, function: Callable[[torch.futures.Future], Any]):
        self.group: dist.ProcessGroup | None = group
        self._function: Callable | None = function
        self._pid = os.getpid()
        keep(group)
        _under_way.add(self)

    def __call__(self, future: torch.futures.Future) -> Any:
        function, self._function = self._function, None
        assert function is not None  # futures call once
        try:
            return function(future)
        finally:
            self.group = None
            _under_way.discard(self)

    @property
    def here(self) -> bool:
        """Not inherited by a process that was forked meanwhile, where nothing will call it."""
        return self._pid == os.getpid()


def keep(group: dist.ProcessGroup) -> None:
    """Hold a group that is used; those that their owner has destroyed meanwhile go."""
    if group not in _kept:
        pid = os.getpid()
        for other in [one for one, of in _kept.items() if of == pid and not is_there(one) and not _busy(one)]:
            del _kept[other]
        _kept[group] = pid


def let_go(group: dist.ProcessGroup) -> None:
    """Hold a group no longer that was destroyed, unless something is under way in it. Not in a callback."""
    if _wait(lambda: not _busy(group), 1.0):
        _kept.pop(group, None)


def at_exit(thing: Any) -> None:
    """Have ``thing.finish(seconds)`` called at exit, if it is still there, before what is under way is waited for."""
    _ending[thing] = os.getpid()


@atexit.register
def _end() -> None:
    """Leave the threads at rest; never raises, and never waits for more than OTHERS seconds and a bit."""
    pid = os.getpid()
    mine = [group for group, of in _kept.items() if of == pid]
    if mine:
        last = time.monotonic() + (FIRST if all(group.rank() == 0 for group in mine) else OTHERS)
        for thing in [thing for thing, of in _ending.items() if of == pid]:
            with contextlib.suppress(Exception):
                thing.finish(max(0.0, last - time.monotonic()))
        _wait(lambda: not _busy(), max(0.0, last - time.monotonic()))
        _rest()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_kept))  # for good: see above


def _busy(group=None):
    """Whether something is under way, in a group or in any."""
    return any(callback.here and group in (None, callback.group) for callback in list(_under_way))


def is_there(group: dist.ProcessGroup) -> bool:
    """Whether it has not been destroyed."""
    try:
        dist.get_backend(group)
    except Exception:  # which one differs between versions of PyTorch
        return False
    return True


def _wait(over, seconds):
    """Whether it is over in time."""
    last = time.monotonic() + seconds
    while not over():
        if time.monotonic() > last:
            return False
        time.sleep(0.001)
    return True


def _rest(seconds: float = 1.0) -> None:
    """Wait until Gloo's threads sleep and have done so for a while: one that waits for the lock wakes all the time."""
    last = time.monotonic() + seconds
    before, same = None, 0
    while same < 3 and time.monotonic() < last:
        time.sleep(0.005)  # in which the lock is free
        now = _switches()
        same = same + 1 if now == before and now is not None else 0
        before = now


def _switches() -> dict[str, str] | None:
    """How often each of Gloo's threads has been put to sleep; None where one is awake."""
    found = {}
    for task in Path("/proc/self/task").glob("*") if sys.platform == "linux" else ():
        with contextlib.suppress(OSError):  # it has ended
            text = (task / "status").read_text()
            fields = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
            if fields["Name"] == "pt_gloo_runloop":
                if not fields["State"].startswith("S"):
                    return None
                found[task.name] = fields["voluntary_ctxt_switches"]
    return found
