"""How bytes reach the other ranks of a process set by Horovod's own collectives; see thinwire.core.exchange.Links."""

from typing import Any

import torch

from thinwire.horovod.stock import hvd


class HorovodLinks:
    """Links over a process set. Call its verbs in the same order on every rank; each is waited for at once."""

    def __init__(self, process_set: Any):
        self._set = process_set
        self.rank, self.size = process_set.rank(), process_set.size()

    def ask(self, mine: torch.Tensor) -> torch.Tensor:
        return hvd.allgather(mine[None], name="thinwire.nominations", process_set=self._set)

    def gather(self, mine: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return hvd.allgather(mine[None], name="thinwire.sums", process_set=self._set), None

    def swap(self, rows: torch.Tensor) -> torch.Tensor:
        return hvd.alltoall(rows, name="thinwire.payload", process_set=self._set)
