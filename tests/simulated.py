"""n reducers in one process, their payloads handed over by hand: for statistics that need thousands of steps."""

import torch
from thinwire.core.exchange import Dealt, _sum_in_rank_order
from thinwire.core.memory import wide
from thinwire.core.reducer import Reducer
from thinwire.core.wire import Arrived, Payload
from thinwire.methods import block_sparse


class Simulated:
    """What n ranks would compute for one flat parameter: AllGather's and OwnerExchange's bits without collectives."""

    def __init__(self, method, n, name="weight"):
        self.reducers = [Reducer(block_sparse(method), rank, n) for rank in range(n)]
        self.name = name

    def step(self, gradients, number):
        """The averaged gradient [d] from each rank's gradient [d], and the blocks that each rank chose."""
        flats = [g.clone() for g in gradients]
        encoded = [
            r.encode(f, (self.name,), (f.numel(),), number, None) for r, f in zip(self.reducers, flats, strict=True)
        ]
        exchange = _owner_exchange if encoded[0].choice.common else _all_gather
        arrived, lost = exchange(encoded, wide(flats[0].dtype))
        for reducer, one, rest in zip(self.reducers, encoded, lost, strict=True):
            reducer.decode(one, arrived, rest)
        return flats[0], [e.choice.own for e in encoded]


def _parsed(payloads, wire):
    return wire.parse(torch.stack([wire.message(payload) for payload in payloads]), payloads[0])


def _all_gather(encoded, wide):
    return _parsed([e.payload for e in encoded], encoded[0].wire), [None] * len(encoded)


def _owner_exchange(encoded, wide):
    n, wire = len(encoded), encoded[0].wire
    dealt = Dealt(encoded[0].choice.slots, n)
    rows = [dealt.deal(e.payload.values) for e in encoded]
    results, lost = [], []
    for owner in range(n):
        parts = [Payload(row[owner], e.payload.scale) for row, e in zip(rows, encoded, strict=True)]
        total = _sum_in_rank_order(_parsed(parts, wire), wide)
        result = wire.pack(total)
        results.append(wire.unpack(result, wide))
        rounded = wire.dtype != wide
        lost.append((dealt.positions(owner), total - results[-1]) if rounded else None)
    return Arrived(dealt.undo(torch.stack(results))[None]), lost
