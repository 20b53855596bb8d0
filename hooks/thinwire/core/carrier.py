"""Who carries what runs beside the backward pass, where collectives hold up the thread that starts them: Gloo's."""

import weakref
from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist

from thinwire.core.courier import Courier
from thinwire.core.ends import is_there, keep
from thinwire.core.exchange import gather_objects


class User(Protocol):
    """What a carrier works for."""

    def fail(self, error: BaseException) -> None:
        """An exchange has failed, this one's or another's: nothing more will come."""


class Carrier:
    """A thread, and a group that it alone uses, for all that is averaged over one process group.

    Gloo tells collectives apart by the order in which they are started, so no other thread may use the group; and each
    group has threads of its own, so there is one for however many models.
    """

    _of: dict[tuple[dist.ProcessGroup, torch.device], "Carrier"] = {}

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        keep(group)
        self.group = group
        self._users: weakref.WeakSet[User] = weakref.WeakSet()
        weak = weakref.ref(self)
        self.courier = Courier("thinwire", device, lambda error: _fail(weak, error))

    @classmethod
    def over(cls, group: dist.ProcessGroup, device: torch.device,
             make_group: Callable[[dist.ProcessGroup], dist.ProcessGroup]) -> "Carrier":  # fmt: skip
        """The one over this group: call it on every rank. make_group: for its own."""
        for other in [key for key in cls._of if not is_there(key[0])]:
            del cls._of[other]
        there = cls._of.get((group, device))
        usable = there is not None and there.courier.error is None and is_there(there.group)
        everywhere = all(gather_objects(usable, group))  # it has not failed on some rank, say
        if there is None or not everywhere:
            there = cls._of[group, device] = Carrier(make_group(group), device)
        return there

    def enter(self, user: User) -> None:
        self._users.add(user)

    def leave(self, user: User) -> dist.ProcessGroup | None:
        """Returns the group where nobody uses it any more; then the thread ends."""
        self._users.discard(user)
        if self._users:
            return None
        self.courier.close(seconds=1.0)  # else it might ask for Python's lock when the interpreter ends
        for key in [key for key, one in self._of.items() if one is self]:
            del self._of[key]
        return self.group

    def fail(self, error: BaseException) -> None:
        for user in list(self._users):
            user.fail(error)


def _fail(weak, error):
    if (carrier := weak()) is not None:
        carrier.fail(error)
