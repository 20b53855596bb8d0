"""One group of ranks' way from flat gradients to the averaged ones, with figures of its own."""

import time
from collections.abc import Sequence

import torch

from thinwire.core.exchange import AllGather, Links, OwnerExchange
from thinwire.core.memory import UNKNOWN, Pass
from thinwire.core.reducer import Encoded, Reducer
from thinwire.core.stats import Stats, ring_all_reduce_bytes
from thinwire.core.wire import seen_as


class Channel:
    """Averages flat gradients, some at a time, in the same order on every rank.

    However many there are at a time, the messages of all go together: one that asks, where the selection talks, and
    one of an all-gather, or two of an owner exchange. So a step costs network latencies by its waves, not its buckets.
    """

    def __init__(self, links: Links, reducer: Reducer, stats: Stats):
        self.stats = stats
        self._links = links
        self._reducer = reducer

    def encode(self, flat: torch.Tensor, names: tuple[str, ...], numels: tuple[int, ...], step: int,
               density: float | None = None, of: Pass = UNKNOWN) -> Encoded:  # fmt: skip
        """Begin with flat [N], without the other ranks. See Reducer.take_in."""
        begin = time.perf_counter()
        encoded = self._reducer.take_in(flat, names, numels, step, density, of)
        dense = ring_all_reduce_bytes(flat.numel() * flat.element_size(), self._links.size)
        self.stats.add(encode_s=time.perf_counter() - begin, dense_bytes=dense)
        return encoded

    def carry(self, encoded: Sequence[Encoded], divide_by: float | None = None) -> None:
        """Average these, each in its flat, and wait for the other ranks; on a GPU only its current stream waits.

        divide_by: see Reducer.decode.
        """
        begin = time.perf_counter()
        for one, answers in zip(encoded, self._answers(encoded)):
            self._reducer.pack(one, answers, to_owners=True)
        sending = time.perf_counter()
        some = [one for one in encoded if one.choice.slots.numel]  # of nothing, nothing is sent
        flights = []
        for exchange, common in ((OwnerExchange, True), (AllGather, False)):
            mine = [one for one in some if one.choice.common == common]
            if mine:
                flight = exchange.start(mine, self._links)
                self.stats.count_bytes(flight.bytes_sent)
                flights.append((exchange, flight))
        for one in some:
            one.prepare()
        self.stats.add(encode_s=sending - begin, exchange_s=time.perf_counter() - sending)
        for exchange, flight in flights:
            waiting = time.perf_counter()
            flight.wait()
            arriving = time.perf_counter()
            for one, messages, lost in zip(flight.encoded, flight.messages.split(flight.widths, 1), flight.lost):
                self._reducer.decode(one, exchange.collect(one, messages), lost, divide_by=divide_by)
            self.stats.add(exchange_s=arriving - waiting, decode_s=time.perf_counter() - arriving)

    def average(self, flat: torch.Tensor, names: tuple[str, ...], numels: tuple[int, ...], step: int,
                density: float | None = None, of: Pass = UNKNOWN) -> None:  # fmt: skip
        """Average flat [N] in place: both at once, of one."""
        self.carry([self.encode(flat, names, numels, step, density, of)])

    def _answers(self, encoded):
        """What all ranks ask, of each of these, [size, L]; None where nothing is asked."""
        asked = [one.asked for one in encoded]
        mine = [one for one in asked if one is not None and one.numel()]
        if not mine:
            return [None if one is None else one.new_empty(self._links.size, 0) for one in asked]
        parts = [one.view(torch.uint8) for one in mine]
        everyone = self._links.ask(torch.cat(parts) if len(parts) > 1 else parts[0])
        self.stats.count_bytes((self._links.size - 1) * everyone.shape[1])
        answers = iter(everyone.split([len(part) for part in parts], 1))
        return [
            None if one is None else one.new_empty(self._links.size, 0) if not one.numel()
            else seen_as(next(answers), one.dtype)
            for one in asked
        ]  # fmt: skip
