"""Local steps, predicted: what of a round is not behind the computation, shared out over the round's steps."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from thinwire.advice.rehearsal import clock
from thinwire.local.anchor import Anchor, in_pieces
from thinwire.local.flight import Flight, Part
from thinwire.local.pace import fewest_steps
from thinwire.methods import LocalSteps
from thinwire.methods.local_steps import AUTO

LONGEST = 64  # steps of a round that are proposed: what longer ones do to the loss was not looked at


@dataclass(frozen=True)
class Round:
    """exchange_s: from what is sent until the average is there, which is behind the computation; of a fragment, where
    there are several. held_up_s: for which the steps stand still to read the parameters, and to step the anchor and
    move them. sent: bytes of one rank."""

    exchange_s: float
    held_up_s: float
    sent: float

    def settled(self, method: LocalSteps, step_s: float) -> LocalSteps:
        """The method with numbers for what is "auto". step_s: of a step without any exchange.

        From one fragment to the next it is then a power of two, the smallest at which the exchange is hidden by
        ``overlap`` steps or what is waited for costs at most a twentieth of the computation: see LocalSteps. LONGEST
        for all together, where none is.
        """
        if AUTO not in (method.every, method.overlap):
            return method
        longest = LONGEST if isinstance(method.every, str) else method.every
        most = max(1, longest // method.fragments)
        hides = max(1, math.ceil(self.exchange_s / step_s))
        overlap = min(hides, most) if isinstance(method.overlap, str) else method.overlap
        apart = overlap  # with overlap="auto" the next one begins as soon as the one before is there
        if method.every == AUTO:
            least = math.log2(fewest_steps(self.exchange_s, step_s, overlap))
            apart = min(2 ** math.ceil(least - 1e-9), max(most, overlap))
        return replace(method, every=apart * method.fragments, overlap=overlap)

    def step_s(self, method: LocalSteps, step_s: float) -> float:
        """Seconds of a step with its share of the round. method: settled."""
        apart = _apart(method)
        return step_s + self.held_up_s / (apart * method.fragments) + self._waited(method.overlap, step_s) / apart

    def sent_a_step(self, method: LocalSteps) -> float:
        """Bytes. method: settled."""
        return self.sent / (_apart(method) * method.fragments)

    def _waited(self, overlap, step_s):
        return max(0.0, self.exchange_s - overlap * step_s)


def _apart(method):
    """Steps from one fragment to the next, of a settled method."""
    return method.every // method.fragments


def held_up_s(named: Mapping[str, torch.Tensor], method: LocalSteps, times: int) -> float:
    """Seconds that a round takes of the steps, on parameters like these: measured, on copies."""
    device, spent = next(iter(named.values())).device, []
    pieces = in_pieces((name, tensor.clone()) for name, tensor in named.items())
    anchor = Anchor(method.outer_lr, method.outer_momentum, alone=False)
    for _ in range(1 + times):
        begin = clock(device)
        sent_from = [piece.read() for piece in pieces]
        sent = clock(device)
        # What follows, and the average of it, is behind the computation.
        parts = [Part(piece, now, anchor.values(piece) - now) for piece, now in zip(pieces, sent_from)]
        there = clock(device)
        Flight(0, parts, []).land(anchor, {})
        spent.append(sent - begin + clock(device) - there)
    return statistics.median(spent[1:])
