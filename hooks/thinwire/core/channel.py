"""One process group's way from a flat gradient to the averaged one, with figures of its own."""

import time

import torch
import torch.distributed as dist

from thinwire.core.ends import Callback, keep
from thinwire.core.exchange import AllGather, OwnerExchange, gather_now
from thinwire.core.memory import UNKNOWN, Pass, wide
from thinwire.core.reducer import Reducer
from thinwire.core.stats import Stats, ring_all_reduce_bytes


class Channel:
    """Averages flat gradients over a group, one after the other and in the same order on every rank."""

    def __init__(self, group: dist.ProcessGroup, reducer: Reducer, stats: Stats):
        self._stats = stats
        self._group = group
        self._reducer = reducer
        self._all_gather, self._owners = AllGather(group), OwnerExchange(group)
        self._alive: list = []
        keep(group)

    def forget(self) -> None:
        """What was kept alive for the device's sake may go: it has done all the work so far."""
        self._alive.clear()

    def keep(self, tensors: object) -> None:
        """Keep what a callback reads alive, until ``forget``."""
        self._alive.append(tensors)

    def average(self, flat: torch.Tensor, names: tuple[str, ...], numels: tuple[int, ...], step: int,
                density: float | None = None, of: Pass = UNKNOWN) -> torch.futures.Future[torch.Tensor]:  # fmt: skip
        """Start averaging flat [N] in place; the future's value is flat. See Reducer.encode."""
        begin = time.perf_counter()
        stats = self._stats
        encoded = self._reducer.encode(flat, names, numels, step, self._gather_now, density, of)
        sending = time.perf_counter()
        exchange = self._owners if encoded.choice.common else self._all_gather
        flight = exchange.start(encoded.payload, encoded.wire, encoded.choice.slots, wide(flat.dtype))
        encoded.prepare()
        if flat.is_cuda:
            # The callback's work is queued on a stream of its own and reads tensors made on this one: they must not
            # be freed before that work is done, which it is when the optimizer has stepped.
            self._alive.append((encoded, flight))
        stats.count_bytes(flight.bytes_sent)
        dense = ring_all_reduce_bytes(flat.numel() * flat.element_size(), self._group.size())
        stats.add(encode_s=sending - begin, dense_bytes=dense)

        def decode(future):
            future.value()  # raises if the collective failed; what it holds differs between backends
            arriving = time.perf_counter()
            self._reducer.decode(encoded, exchange.collect(flight, encoded.wire), flight.lost)
            stats.add(exchange_s=arriving - sending, decode_s=time.perf_counter() - arriving)
            return flat

        return flight.future.then(Callback(self._group, decode))

    def _gather_now(self, values):
        self._stats.count_bytes((self._group.size() - 1) * values.numel() * values.element_size())
        return gather_now(values, self._group)
