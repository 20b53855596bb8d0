"""How bytes reach the other ranks of a process set by Horovod's own collectives; see thinwire.core.exchange.Links."""

import time
from typing import Any

import torch

from thinwire.horovod.stock import hvd

_PAUSE = 5e-4  # seconds; Horovod itself looks for new work every millisecond


class HorovodLinks:
    """Links over a process set. Call its verbs in the same order on every rank; each is waited for at once.

    label: of its collectives, the same on all ranks. Horovod tells them apart by name, so what may be under way at the
    same time needs another one.
    """

    def __init__(self, process_set: Any, label: str = "thinwire"):
        self._set, self._label = process_set, label
        self.rank, self.size = process_set.rank(), process_set.size()

    def ask(self, mine: torch.Tensor) -> torch.Tensor:
        return self._all_gathered(mine, f"{self._label}.nominations")

    def gather(self, mine: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return self._all_gathered(mine, f"{self._label}.sums"), None

    def swap(self, rows: torch.Tensor) -> torch.Tensor:
        return hvd.alltoall(rows, name=f"{self._label}.payload", process_set=self._set)

    def _all_gathered(self, mine, name):
        return hvd.allgather(mine[None], name=name, process_set=self._set)


class PatientLinks(HorovodLinks):
    """For a thread beside the computation: Horovod's own way to wait never sleeps, and takes a processor from it."""

    def swap(self, rows: torch.Tensor) -> torch.Tensor:
        received, _ = _awaited(hvd.alltoall_async(rows, name=f"{self._label}.payload", process_set=self._set))
        return received

    def _all_gathered(self, mine, name):
        return _awaited(hvd.allgather_async(mine[None], name=name, process_set=self._set))


def _awaited(handle):
    while not hvd.poll(handle):
        time.sleep(_PAUSE)
    return hvd.synchronize(handle)
