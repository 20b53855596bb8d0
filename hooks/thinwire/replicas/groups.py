"""The process groups of a cycle of partitions: made once, by all ranks in the same order, and counted.

A Gloo group costs about three threads and an NCCL group hundreds of megabytes, so groups that several partitions share
are made once, groups of one rank never, and the group of all ranks is the one that is there.
"""

import datetime
from typing import Any

import torch
import torch.distributed as dist

from thinwire.methods.schedules import Group, Partition


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
        backend = backend_of(group)
        try:
            for members in needed(partitions, self.size):
                ranks = [dist.get_global_rank(group, rank) for rank in members]
                made = dist.new_group(ranks, backend=backend)
                if self.rank in members:
                    self._groups[members] = made
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
                dist.destroy_process_group(group)
        self._groups = {self._everyone: self._groups[self._everyone]}


def backend_of(group: dist.ProcessGroup) -> str:
    """What to give ``new_group`` for a group of the same kind."""
    backend: str = dist.get_backend(group)
    if backend == dist.Backend.UNDEFINED:  # one for each type of device
        backend = dist.get_backend_config(group)
    return backend


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> datetime.timedelta | None:
    """How long a group waits for its ranks, for one that is to wait as long; None where PyTorch does not say."""
    try:
        return group._get_backend(device).options._timeout
    except (AttributeError, RuntimeError):
        return None


def needed(partitions: tuple[Partition, ...], size: int) -> list[Group]:
    """The groups that a cycle needs beside the one of all ranks, without repetition, in the order to make them."""
    return sorted({group for partition in partitions for group in partition if 1 < len(group) < size})
