"""Where a process spends its time: a profile of every thread that runs Python, of Gloo's with our callbacks, too."""
import contextlib
import cProfile
import threading

from thinwire.core import ends

MOST = 30  # lines a thread


class Profiles:
    """A context manager: threads that are begun in it, and the one that enters it, are profiled from ``begin`` on.

    Waiting counts as time: a thread that is idle shows it in ``acquire`` or ``wait``.
    """

    def __init__(self):
        # By the system's number of a thread: threads that are not Python's own are new to it with every call.
        self._of: dict[int, cProfile.Profile] = {}
        self._names: dict[int, str] = {}
        self._running: set[int] = set()
        self._before: dict[int, dict] = {}

    def __enter__(self):
        self._run, self._call = threading.Thread.run, ends.Callback.__call__
        threading.Thread.run = lambda thread: self._profiled(self._run, thread)
        ends.Callback.__call__ = lambda callback, future: self._profiled(self._call, callback, future)
        self._enable()
        return self

    def __exit__(self, *_):
        self._disable()
        threading.Thread.run, ends.Callback.__call__ = self._run, self._call

    def begin(self) -> None:
        """Count from here on."""
        self._before = {thread: _counts(profile) for thread, profile in self._of.copy().items()}

    def show(self, steps: int) -> None:
        """Print what took longest in each thread, by its own time."""
        for thread, profile in self._of.copy().items():
            before = self._before.get(thread, {})
            found = []
            for what, (calls, total, own) in _counts(profile).items():
                was = before.get(what, (0, 0.0, 0.0))
                found.append((own - was[2], total - was[1], calls - was[0], what))
            found = [one for one in sorted(found, reverse=True) if one[2] or one[0]]
            print(f"\nthread {self._names[thread]}: {1e3 * sum(one[0] for one in found) / steps:.2f} ms\n"
                  f"{'own':>8} {'total':>8} {'calls':>7}")  # fmt: skip
            for own, total, calls, what in found[:MOST]:
                print(f"{1e3 * own / steps:8.3f} {1e3 * total / steps:8.3f} {calls / steps:7.1f}  {what}")

    def _profiled(self, function, *arguments):
        if threading.get_ident() in self._running:
            return function(*arguments)
        self._enable()
        try:
            return function(*arguments)
        finally:
            self._disable()

    def _enable(self):
        thread = threading.get_ident()
        self._running.add(thread)
        self._names.setdefault(thread, threading.current_thread().name)
        self._of.setdefault(thread, cProfile.Profile()).enable()

    def _disable(self):
        thread = threading.get_ident()
        self._of[thread].disable()
        self._running.discard(thread)


def _counts(profile):
    """{function: (calls, seconds, seconds of its own)}; those of other threads while they run, too."""
    found = {}
    with contextlib.suppress(RuntimeError):
        for entry in profile.getstats():
            name = _name(entry.code)
            calls, total, own = found.get(name, (0, 0.0, 0.0))
            found[name] = calls + entry.callcount, total + entry.totaltime, own + entry.inlinetime
    return found


def _name(code):
    if isinstance(code, str):
        return code
    return f"{'/'.join(code.co_filename.split('/')[-3:])}:{code.co_firstlineno} {code.co_name}"
