"""One way for the data: a flat gradient in, the averaged gradient in its place, whoever carries the payload.

``encode`` runs memory.add, selection.choose and memory.pack and gives what this rank sends; the front door's exchange
carries it; ``decode`` runs memory.settle. The reducer holds all state of a method, keyed by parameter name.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from thinwire.core import memory, selection
from thinwire.core.blocks import Layout, Slots
from thinwire.core.memory import UNKNOWN, Pass, Reading, Sum
from thinwire.core.selection import Choice, Question
from thinwire.core.wire import Arrived, Payload, Wire
from thinwire.methods import BlockSparse

NAMES_KEPT = 100_000  # in layouts: Elastic with Horovod has another set of parameters in every step
_Gather = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Encoded:
    """One flat gradient between encode and decode."""

    reading: Reading
    choice: Choice
    payload: Payload
    wire: Wire
    rows: torch.Tensor | None = None

    def prepare(self) -> None:
        """Compute the other ranks' blocks if nothing has to arrive for that: while the payload is under way."""
        if self.payload.indices is None:
            self.rows = self.choice.rows(None)


class Reducer:
    """Runs a BlockSparse on flat gradients of one rank."""

    def __init__(self, method: BlockSparse, rank: int, world_size: int, wire: Wire | None = None):
        self.method = method
        self.rank = rank
        self.world_size = world_size
        self.memory = memory.of(method.memory, method.momentum)
        self._selection = selection.BY_NAME[method.selection]()
        self._wire = Wire(method.wire_dtype) if wire is None else wire
        self._slots: dict[tuple[str, ...], Slots] = {}

    def encode(self, flat: torch.Tensor, names: tuple[str, ...], numels: tuple[int, ...], step: int,
               all_gather: _Gather | None, density: float | None = None, of: Pass = UNKNOWN) -> Encoded:  # fmt: skip
        """Choose and pack what this rank sends of flat [N]; memory takes in the rest.

        names and numels: the parameters in flat, in order. all_gather: see selection.Question. density: of this step,
        where the method does not know it. of: see memory.Pass.
        """
        slots = self._slots_for(names, numels, step, density)
        selection_: selection.Selection = selection.Whole() if all(slots.whole) else self._selection
        reading = self.memory.add(flat, slots, selection_.ranks, of)
        choice = selection_.choose(
            Question(slots, step, self.rank, self.world_size, self.method.seed, flat.device, reading.norms, all_gather)
        )
        wire = self.memory.wire_for(self._wire, flat.dtype)
        payload = self.memory.pack(reading, choice, wire)
        payload.indices = choice.indices
        return Encoded(reading, choice, payload, wire)

    def decode(self, encoded: Encoded, arrived: Arrived, lost: tuple[torch.Tensor, torch.Tensor] | None = None,
               over: tuple[Slots, torch.Tensor] | None = None, divide_by: float | None = None) -> None:  # fmt: skip
        """Write the averaged gradient over the flat one, and settle the memory.

        lost: see memory.Sum. over: shape and rows [R, K] of the payloads that arrived, where an exchange changed
        them. divide_by: what makes a mean of their sum, world_size by default.
        """
        choice, reading = encoded.choice, encoded.reading
        if over is None:
            over = choice.slots, choice.rows(arrived.indices) if encoded.rows is None else encoded.rows
        n = self.world_size if divide_by is None else divide_by
        shares = choice.slots.shares if self.method.unbiased else [1.0] * len(choice.slots.counts)
        factors = torch.tensor([[1 / n] * len(shares), [1 / (n * share) for share in shares]], dtype=torch.float64,
                               device="cpu")  # fmt: skip
        to_mean, to_estimate = factors.to(reading.grad.device, memory.wide(reading.grad.dtype))
        total = Sum(arrived, *over, to_mean, to_estimate, lost)
        self.memory.settle(reading, choice, encoded.payload, encoded.wire, total)

    def _slots_for(self, names, numels, step, density):
        counts = self.method.counts_at(step, self.world_size, numels, density)
        slots = self._slots.get(names)
        if slots is None or slots.counts != counts:
            if slots is None and sum(map(len, self._slots)) > NAMES_KEPT:
                self._slots.clear()
            layout = Layout(names, numels, self.method.block_size) if slots is None else slots.layout
            self._slots[names] = slots = layout.slots(counts)
        return slots
