"""n reducers in one process, their messages handed over by hand: for statistics that need thousands of steps."""

import torch
from thinwire.core.exchange import AllGather, OwnerExchange
from thinwire.core.levels import wire_of
from thinwire.core.reducer import Reducer
from thinwire.methods import block_sparse


class Simulated:
    """What n ranks would compute for one flat parameter: AllGather's and OwnerExchange's bits without collectives."""

    def __init__(self, method, n, name="weight"):
        self.reducers = [Reducer(block_sparse(method), rank, n, wire_of(method.wire_dtype)) for rank in range(n)]
        self.name = name

    def step(self, gradients, number):
        """The averaged gradient [d] from each rank's gradient [d], and the blocks that each rank chose."""
        flats = [g.clone() for g in gradients]
        encoded = [r.take_in(f, (self.name,), (f.numel(),), number) for r, f in zip(self.reducers, flats, strict=True)]
        answers = None if encoded[0].asked is None else torch.stack([one.asked for one in encoded])
        for reducer, one in zip(self.reducers, encoded, strict=True):
            reducer.pack(one, answers, to_owners=True)
        if encoded[0].choice.common:
            rows, lost = [one.wire.rows(one.payload) for one in encoded], []
            for owner, one in enumerate(encoded):
                mine = torch.stack([row[owner] for row in rows])
                lost.append(one.wire.add_up(mine, one.payload, one.choice.slots, one.wide, one.keeps_lost))
            messages, exchange = torch.stack([message for message, _ in lost]), OwnerExchange
            lost = [one for _, one in lost]
        else:
            messages = torch.stack([one.wire.message(one.payload) for one in encoded])
            exchange, lost = AllGather, [None] * len(encoded)
        for reducer, one, rest in zip(self.reducers, encoded, lost, strict=True):
            reducer.decode(one, exchange.collect(one, messages), rest)
        return flats[0], [e.choice.own for e in encoded]
