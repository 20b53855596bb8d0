"""Checkpoints of a script that ``thinwire advise`` watches, while its replicas drift apart."""

import functools
import os
import sys
from collections.abc import Callable


class Saves:
    """What a script saves of replicas that drift apart: it replaces nothing, and is gone when the script is left.

    Until then the script finds what it has saved, and may move it to its place, for many do both.
    """

    def __init__(self, drifting: Callable[[], bool]):
        self._drifting = drifting
        self._made: set[str] = set()
        self._said: set[str] = set()

    def guarded(self, write: Callable, place: str) -> Callable:
        """write, a function that saves to its second argument, a path or (let through) a file; place: that's name."""

        @functools.wraps(write)
        def save(*args, **kwargs):
            path = args[1] if len(args) > 1 else kwargs.get(place)
            if self._drifting() and isinstance(path, (str, os.PathLike)):
                path = os.path.realpath(path)
                if self._there(path):
                    return self._held_back(path)
                self._made.add(path)
            return write(*args, **kwargs)

        return save

    def moving(self, move: Callable) -> Callable:
        """os.replace, or os.rename, that moves no such file over another one."""

        @functools.wraps(move)
        def moved(src, dst, **kwargs):
            if os.path.realpath(src) not in self._made:
                return move(src, dst, **kwargs)
            self._made.remove(os.path.realpath(src))
            path = os.path.realpath(dst)
            if self._there(path):
                os.remove(src)
                return self._held_back(path)
            self._made.add(path)
            return move(src, dst, **kwargs)

        return moved

    def held(self, write: Callable) -> Callable:
        """write, a function of all ranks; not while they drift."""
        return functools.wraps(write)(
            lambda *args, **kwargs: self._held_back("of all ranks") if self._drifting() else write(*args, **kwargs)
        )

    def remove(self) -> None:
        """The script is left."""
        for path in sorted(filter(os.path.isfile, self._made)):
            os.remove(path)
            print(f"thinwire advise: checkpoint {path} removed: replicas had drifted apart", file=sys.stderr)

    def _there(self, path):
        """Before this script drifted; an empty file is one of tempfile's, made to be written."""
        return path not in self._made and os.path.exists(path) and os.path.getsize(path) > 0

    def _held_back(self, what):
        if what not in self._said:
            self._said.add(what)
            print(f"thinwire advise: checkpoint {what} held back: replicas drift apart", file=sys.stderr, flush=True)
