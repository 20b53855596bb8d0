"""n reducers in one process, their payloads handed over by hand: for statistics that need thousands of steps."""

import torch
from thinwire.core.memory import wide
from thinwire.core.reducer import Reducer
from thinwire.core.wire import Arrived
from thinwire.methods import block_sparse


class Simulated:
    """What n ranks would compute for one flat parameter."""

    def __init__(self, method, n, name="weight"):
        self.reducers = [Reducer(block_sparse(method), rank, n) for rank in range(n)]
        self.name = name

    def step(self, gradients, number):
        """The averaged gradient [d] from each rank's gradient [d], and the blocks that each rank chose."""
        flats = [g.clone() for g in gradients]
        encoded = [
            r.encode(f, (self.name,), (f.numel(),), number, None) for r, f in zip(self.reducers, flats, strict=True)
        ]
        values = torch.stack([e.payload.values for e in encoded])
        indices = None if encoded[0].payload.indices is None else torch.stack([e.payload.indices for e in encoded])
        if encoded[0].choice.common:
            total = torch.zeros_like(values[0], dtype=wide(flats[0].dtype))
            for row in values:
                total += row
            values = total[None]
        for reducer, one in zip(self.reducers, encoded, strict=True):
            reducer.decode(one, Arrived(values, None, indices))
        return flats[0], [e.choice.own for e in encoded]
