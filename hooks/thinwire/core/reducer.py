"""One way for the data: a flat gradient in, the averaged gradient in its place, whoever carries the payload.

``take_in`` runs memory.add and selection.ask, ``pack`` runs selection.choose and memory.pack and gives what this rank
sends; the front door's exchange carries it; ``decode`` runs memory.settle. The reducer holds all state of a method,
keyed by parameter name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from thinwire import ops
from thinwire.core import memory, selection
from thinwire.core.blocks import Layout, Slots, United
from thinwire.core.levels import wire_of
from thinwire.core.memory import UNKNOWN, Pass, Reading, Sum
from thinwire.core.selection import Choice, Question
from thinwire.core.wire import Arrived, Payload, Wire
from thinwire.methods import BlockSparse

NAMES_KEPT = 100_000  # in shapes: Elastic with Horovod has another set of parameters in every step
_Gather = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Encoded:
    """One flat gradient on its way. asked: what the ranks must tell each other before blocks are chosen, or None.

    choice and payload are there when it has been packed. wide: the dtype of sums. keeps_lost: see memory.Memory.
    """

    reading: Reading
    question: Question
    selection: selection.Selection
    wire: Wire
    keeps_lost: bool
    asked: torch.Tensor | None = None
    choice: Choice = None  # type: ignore[assignment]  # until it is packed
    payload: Payload = None  # type: ignore[assignment]
    rows: torch.Tensor | None = None

    @property
    def wide(self) -> torch.dtype:
        return memory.wide(self.reading.grad.dtype)

    def sent(self) -> torch.Tensor:
        """bool [N]: which elements have travelled, where all ranks send the same blocks. Once it is packed."""
        assert self.choice.common
        slots, own, device = self.choice.slots, self.choice.own, self.reading.grad.device
        table = slots.table_on(device)
        ones, factors = torch.ones(1, slots.numel, device=device), torch.ones(len(table), device=device)
        mask = torch.empty(self.reading.layout.numel, device=device)
        ops.scatter_blocks_(ones, None, own[None], table, slots.layout.block_size, factors, False, mask)
        return mask != 0

    def tensors(self) -> list[torch.Tensor]:
        """What taking it in has made, or used."""
        reading = self.reading
        held = [reading.grad, reading.source, reading.status, reading.norms, self.asked]
        return [one for one in (*held, *reading.others, *sum(reading.restored, ())) if one is not None]

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
        self._whole = selection.Whole()
        self._wire = wire_of(method.wire_dtype) if wire is None else wire
        self._shapes: dict[tuple, Any] = {}

    def begin(self) -> None:
        """A step begins: on a GPU nothing reads what was made for an earlier one any more."""
        if sum(len(names) for names, _ in self._shapes) > NAMES_KEPT:
            self._shapes.clear()

    def take_in(self, flat: torch.Tensor, names: tuple[str, ...], numels: tuple[int, ...], step: int,
                density: float | None = None, of: Pass = UNKNOWN) -> Encoded:  # fmt: skip
        """Memory takes in flat [N]; what the ranks must tell each other is known then.

        names and numels: the parameters in flat, in order. density: of this step, where the method does not know it.
        of: see memory.Pass.
        """
        slots, whole = self._slots_for(names, numels, step, density)
        selection_ = self._whole if whole else self._selection
        reading = self.memory.add(flat, slots, selection_.ranks, of)
        question = Question(slots, step, self.rank, self.world_size, self.method.seed, flat.device, reading.norms,
                            max_age=self.method.longest_wait)  # fmt: skip
        asked = selection_.ask(question) if selection_.talks else None
        wire = self.memory.wire_for(self._wire, flat.dtype)
        return Encoded(reading, question, selection_, wire, self.memory.keeps_lost, asked)

    def pack(self, encoded: Encoded, answers: torch.Tensor | None = None, to_owners: bool = False) -> None:
        """Choose the blocks and pack them; memory takes in the rest.

        answers: what all ranks asked, [world_size, L]. to_owners: blocks that are common to all ranks are dealt to
        owners, who add them up.
        """
        encoded.question.answers = answers
        choice = encoded.choice = encoded.selection.choose(encoded.question)
        dealing = None
        if to_owners and choice.common:
            dealing = encoded.wire.dealing(choice.slots, self.world_size, encoded.reading.grad.device)
        encoded.payload = self.memory.pack(encoded.reading, choice, encoded.wire, dealing)
        encoded.payload.indices = choice.indices

    def encode(self, flat: torch.Tensor, names: tuple[str, ...], numels: tuple[int, ...], step: int,
               all_gather: _Gather | None, density: float | None = None, of: Pass = UNKNOWN) -> Encoded:  # fmt: skip
        """Both at once. all_gather: integers [L] of this rank to [world_size, L] of all, where the selection talks."""
        encoded = self.take_in(flat, names, numels, step, density, of)
        answers = None
        if encoded.asked is not None:
            assert all_gather is not None  # every front door that allows such a selection has one
            answers = all_gather(encoded.asked)
        self.pack(encoded, answers)
        return encoded

    def decode(self, encoded: Encoded, arrived: Arrived, lost: torch.Tensor | None = None,
               over: tuple[Slots | United, torch.Tensor] | None = None,
               divide_by: float | None = None) -> None:  # fmt: skip
        """Write the averaged gradient over the flat one, and settle the memory.

        lost: see memory.Sum. over: shape and rows [R, K] of the payloads that arrived, where an exchange changed
        them. divide_by: what makes a mean of their sum, world_size by default.
        """
        choice, reading = encoded.choice, encoded.reading
        if over is None:
            over = choice.slots, choice.rows(arrived.indices) if encoded.rows is None else encoded.rows
        n = self.world_size if divide_by is None else divide_by
        to_mean, to_estimate = self._factors(choice.slots, n, reading.grad.device, encoded.wide)
        total = Sum(arrived, *over, to_mean, to_estimate, lost)
        self.memory.settle(reading, choice, encoded.payload, encoded.wire, total, self.rank)

    def _factors(self, slots, n, device, dtype):
        """To the mean and to the estimate, [S] each; see memory.Sum."""
        slots = slots.within if isinstance(slots, United) else slots

        def make():
            shares = slots.shares if self.method.unbiased else [1.0] * len(slots.counts)
            factors = torch.tensor([[1 / n] * len(shares), [1 / (n * share) for share in shares]], dtype=torch.float64,
                                   device="cpu")  # fmt: skip
            return factors.to(device, dtype)

        return slots.plan(("factors", n, self.method.unbiased, device, dtype), make)

    def _slots_for(self, names, numels, step, density):
        """The payload's shape, and whether all of everything travels."""
        if density is None:
            density = self.method.density_at(step, self.world_size)
        found = self._shapes.get((names, density))
        if found is None:
            layout = Layout(names, numels, self.method.block_size)
            slots = layout.slots(self.method.counts_at(step, self.world_size, numels, density))
            found = self._shapes[names, density] = slots, all(slots.whole)
        return found
