"""The process groups of a cycle of partitions: made once, by all ranks in the same order, and counted.

A Gloo group costs about three threads and an NCCL group hundreds of megabytes, so groups that several partitions share
are made once, groups of one rank never, and the group of all ranks is the one that is there.
"""

import contextlib
import datetime
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from thinwire.core.ends import is_there, keep, let_go
from thinwire.core.exchange import gather_objects
from thinwire.methods.schedules import Group, Partition
from thinwire.state import agree

_next_number = 0  # of a group that is named by its ranks and a number


class Groups:
    """Sums tensors over the ranks' groups, with torch.distributed. Make it on every rank.

    partitions: of the ranks of ``group``, which must be all ranks of the job: PyTorch makes groups only with all.
    """

    def __init__(self, partitions: tuple[Partition, ...], group: dist.ProcessGroup):
        if group.size() != dist.get_world_size():
            raise ValueError(
                f"DivideAndShuffle got a process group of {group.size()} of {dist.get_world_size()} ranks: it needs "
                "the default one, because all ranks of the job take part in making its groups"
            )
        self.rank, self.size = group.rank(), group.size()
        self._everyone = tuple(range(self.size))
        self._groups: dict[Group, dist.ProcessGroup] = {self._everyone: group}
        keep(group)
        like: dict[str, Any] = {"backend": backend_of(group), "timeout": timeout_of(group)}
        try:
            for members in needed(partitions, self.size):
                made = dist.new_group([dist.get_global_rank(group, rank) for rank in members], **like)
                if self.rank in members:
                    self._groups[members] = made
                    keep(made)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        """How many groups this rank had to make and is a member of."""
        return len(self._groups) - 1

    def start_sum(self, tensor: torch.Tensor, members: Group) -> Any:
        """Start adding up a contiguous tensor in place over the members, this rank among them; call ``wait`` on what
        this returns."""
        return dist.all_reduce(tensor, group=self._groups[members], async_op=True)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Rank 0's tensor on every rank, in place."""
        everyone = self._groups[self._everyone]
        dist.broadcast(tensor, dist.get_global_rank(everyone, 0), group=everyone)

    def gather_objects(self, thing: Any) -> list:
        everyone = [None] * self.size
        dist.all_gather_object(everyone, thing, group=self._groups[self._everyone])
        return everyone

    def close(self) -> None:
        """Destroy the groups that this made, on every rank alike."""
        for members, group in self._groups.items():
            if members != self._everyone:
                destroy(group)
        self._groups = {self._everyone: self._groups[self._everyone]}


def another(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A further group of the same ranks, of the same kind and as patient. Call it on all of them, on no other rank.

    What PyTorch names a group that its members alone make follows from its ranks and from how many groups this rank is
    in. Ranks in different numbers of groups would wait for each other under different names for good, and one of a
    name that was there before would read what the earlier one left. So the ranks agree on a number that none has had,
    and until the group is made, those in fewer groups make some of which they are the only member.

    Raises ValueError, on every rank, where that cannot be.
    """
    global _next_number
    ranks = dist.get_process_group_ranks(group)
    like: dict[str, Any] = {"backend": backend_of(group), "timeout": timeout_of(group)}
    everyone = gather_objects((max(_in_groups(), _next_number), c10d.get_pg_count()), group)
    if len(ranks) == dist.get_world_size() and len({count for _, count in everyone}) == 1:
        return dist.new_group(ranks, **like)  # named by that count
    number = max(number for number, _ in everyone)
    _next_number = number + 1
    with contextlib.ExitStack() as made:

        def fill():
            while _in_groups() < number:
                alone = dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)
                made.callback(dist.destroy_process_group, alone)
            return {"number of process groups": str(_in_groups())}

        agree.check_together(lambda thing: gather_objects(thing, group), fill)
        return dist.new_group(ranks, use_local_synchronization=True, **like)


def destroy(group: dist.ProcessGroup) -> None:
    """Destroy a group that was made here, unless all have been; its threads end when nothing in Python holds it any
    more."""
    if is_there(group):
        dist.destroy_process_group(group)
    let_go(group)


def _in_groups() -> int:
    """How many groups this rank is in, as PyTorch counts them for a name."""
    return len(c10d._world.pg_names)


def backend_of(group: dist.ProcessGroup) -> str:
    """What to give ``new_group`` for a group of the same kind."""
    backend: str = dist.get_backend(group)
    if backend == dist.Backend.UNDEFINED:  # one for each type of device
        backend = dist.get_backend_config(group)
    return backend


def timeout_of(group: dist.ProcessGroup, device: torch.device | None = None) -> datetime.timedelta | None:
    """How long a group waits for its ranks, for one that is to wait as long; None where PyTorch does not say.

    device: of what it carries; by default whichever it can.
    """
    for kind in ("cpu", "cuda") if device is None else (device,):
        with contextlib.suppress(AttributeError, RuntimeError):
            return group._get_backend(torch.device(kind)).options._timeout
    return None


def needed(partitions: tuple[Partition, ...], size: int) -> list[Group]:
    """The groups that a cycle needs beside the one of all ranks, without repetition, in the order to make them."""
    return sorted({group for partition in partitions for group in partition if 1 < len(group) < size})
