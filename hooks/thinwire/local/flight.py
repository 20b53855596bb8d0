"""A round's average on its way: what ranks send of parameters and buffers, and what it does when it lands."""

from collections.abc import Iterable, Mapping

import torch

from thinwire.core.behind import Behind, Job
from thinwire.core.channel import Channel
from thinwire.core.reducer import Encoded, Reducer
from thinwire.core.stats import Stats
from thinwire.core.wire import all_finite
from thinwire.local.anchor import Anchor, Piece, in_pieces
from thinwire.methods import BlockSparse, Dense
from thinwire.replicas.means import Named

MEETING = 24  # bytes in which the ranks first tell each other which round it is; they are counted nowhere
Tensors = dict[str, torch.Tensor]
Landed = list[tuple["Part", torch.Tensor]]  # parts, each with whether it has landed, 0-d bool


class Part:
    """One piece of the parameters, or of the buffers, in a flight.

    origin: the values that it was sent from [N], None where nothing happens to them meanwhile. mean: the ranks' mean
    pseudo-gradient, or of buffers their mean value [N], once it is there. left: what stays in this rank's own
    parameters, because it was not sent, and sent: where all ranks have sent; None where everything was.
    """

    def __init__(self, piece: Piece, origin: torch.Tensor | None, mean: torch.Tensor,
                 left: torch.Tensor | None = None, sent: torch.Tensor | None = None):  # fmt: skip
        self.piece, self.origin, self.mean, self.left, self.sent = piece, origin, mean, left, sent

    def move(self, after: torch.Tensor, good: torch.Tensor, known: bool | None) -> None:
        """Put this rank's own values where they belong, ``after`` [N] being what all ranks agree on. good: whether the
        round is, 0-d; known: the same, where the host knows it."""
        if known and self.origin is None:
            self.piece.write(after)
            return
        by = None if self.origin is None else after - self.origin
        if by is not None and self.left is not None:
            by -= self.left
        if known and by is not None:
            self.piece.move(by)
            return
        own = self.piece.read()
        stays = _finite(own, after)
        moved = after if by is None else own + by
        self.piece.write(stays if known is False else torch.where(good, moved, stays))


class Flight:
    """A round under way, or there. parameters and buffers: its parts. launched: the step after which it was sent.

    told: what every rank has said beside it, float64 [n, L], once it is there.
    """

    def __init__(self, launched: int, parameters: list[Part], buffers: list[Part]):
        self.launched, self.parameters, self.buffers = launched, parameters, buffers
        self.told: torch.Tensor | None = None
        self.anchors: list[torch.Tensor] = []  # as they were sent from; kept until it has landed
        self.job: Job | None = None

    @property
    def failed(self) -> bool:
        """Whether it will never be there."""
        return self.job is not None and self.job.failed

    def wait(self) -> None:
        """Until it is there. Raises RuntimeError where that has failed."""
        if self.job is not None:
            self.job.wait()

    def land(self, anchor: Anchor, buffers: Tensors, momentum: bool = True,
             together: bool = False) -> Landed:  # fmt: skip
        """Step the anchor, and move the parameters from what was sent to it.

        buffers: the anchor's, which are changed. momentum: whether the outer optimizer's acts. Returns the parts, each
        with whether that was done, 0-d bool. Where something is inf or NaN on some rank, the part and its anchor stay
        as they were, and no memory has kept any of it; a rank whose own is goes back to the anchor. together: then all
        ranks do, so that they are equal whatever happens.
        """
        found = []
        for part in (*self.parameters, *self.buffers):
            good = all_finite(part.mean)
            found.append((part, good))
            known = _known(good)
            if part in self.parameters:
                sent = part.sent
                if known is None:
                    sent = good if sent is None else sent & good
                if known is not False:
                    anchor.step(part.piece, part.mean, part.origin, sent, momentum)
                after = anchor.values(part.piece)
            else:
                before = part.piece.flat(buffers) if buffers.keys() >= set(part.piece.names) else part.piece.read()
                after = torch.where(good, part.mean, before)
                buffers.update({name: one.clone() for name, one in part.piece.by_name(after).items()})
            if together:
                part.piece.write(after)
            else:
                part.move(after, good, known)
        return found

    def state_dict(self) -> dict[str, Tensors]:
        """What has arrived, by kind and name; see ``flight_of``."""
        self.wait()
        found: dict[str, Tensors] = {}
        for prefix, parts in (("", self.parameters), ("buffer ", self.buffers)):
            for part in parts:
                for kind in KINDS:
                    if (flat := getattr(part, kind)) is not None:
                        kept = found.setdefault(prefix + kind, {})
                        kept |= {name: one.clone() for name, one in part.piece.by_name(flat).items()}
        return found


KINDS = "mean", "origin", "left", "sent"


def flight_of(launched: int, state: Mapping[str, Tensors], parameters: Iterable[Named],
              buffers: Iterable[Named]) -> Flight:  # fmt: skip
    """The flight that ``state_dict`` has saved, of these parameters and buffers, as far as it has them."""

    def parts(prefix, tensors):
        known = [(name, tensor) for name, tensor in tensors if name in state.get(prefix + "mean", {})]
        for piece in in_pieces(known):
            flats = {kind: piece.flat(state[prefix + kind]) for kind in KINDS if prefix + kind in state}
            if "sent" in flats:
                flats["sent"] = flats["sent"].bool()
            yield Part(piece, flats.get("origin"), flats["mean"], flats.get("left"), flats.get("sent"))

    return Flight(launched, list(parts("", parameters)), list(parts("buffer ", buffers)))


class Rounds:
    """Sends rounds. method: how pseudo-gradients travel. alone: there is no other rank, and nothing does."""

    def __init__(self, method: BlockSparse | Dense, behind: Behind, alone: bool, stats: Stats):
        links = behind.links
        sparse, exact = method.as_block_sparse(), Dense(exact=True).as_block_sparse()
        self.reducer = Reducer(sparse, links.rank, links.size)
        self._channel = Channel(links, self.reducer, stats)
        self._exact = Channel(links, Reducer(exact, links.rank, links.size), stats)
        self._behind, self._alone, self._on_gpu = behind, alone, behind.on_stream
        self._stays = sparse.memory == "weights"

    def send(self, number: int, launched: int, anchor: Anchor, parameters: Iterable[Named], buffers: Iterable[Named],
             meanwhile: bool, tell: list[float], exactly: bool = False) -> Flight:  # fmt: skip
        """Send a round: of parameters how far they are from the anchor, of buffers their values.

        number: of the round. meanwhile: whether steps will be made until it lands. tell: what this rank has to say to
        all. exactly: everything, in float32, with what waits in the memory, which is empty then.
        """
        keeps_origin = meanwhile or self._alone or (self._stays and not exactly)
        flight = Flight(launched, [], [])
        for piece in in_pieces(parameters):
            now = piece.read()
            flight.parameters.append(Part(piece, now if keeps_origin else None, now))  # which no job changes
        for piece in in_pieces(buffers):
            now = piece.read()
            flight.buffers.append(Part(piece, now.clone() if meanwhile else None, now))
        flight.anchors = anchors = [anchor.values(part.piece) for part in flight.parameters]
        flight.job = self._behind.start(lambda: self._carry(flight, anchors, number, tell, exactly))
        return flight

    def _carry(self, flight, anchors, number, tell, exactly):
        self._meet(number, flight.launched, exactly)
        for part, anchor in zip(flight.parameters, anchors):
            if part.origin is None:
                part.mean.neg_().add_(anchor)  # in its place: another stream would not know how long it is read
            else:
                part.mean = anchor - part.origin
        if exactly:
            self._flush(flight)
        if self._alone:
            return
        channel = self._exact if exactly else self._channel
        encoded = [_encoded(channel, part, number) for part in flight.parameters]
        channel.carry(encoded)
        if self._stays and not exactly:
            for part, one in zip(flight.parameters, encoded):
                part.left, part.sent = one.reading.source, one.sent()
        if flight.buffers:
            self._exact.carry([_encoded(self._exact, part, number) for part in flight.buffers])
        if tell:
            mine = torch.tensor(tell, dtype=torch.float64, device="cpu")
            device = flight.parameters[0].piece.device
            flight.told = self._behind.links.ask(mine.pin_memory().to(device, non_blocking=True)
                                                 if device.type == "cuda" else mine)  # fmt: skip

    def _flush(self, flight):
        """What waits in the memory goes too; see ``flushed``."""
        waiting = self.reducer.memory.waiting()
        for part in flight.parameters:
            for name, one in part.piece.by_name(part.mean).items():
                if name in waiting:
                    one += waiting[name].view_as(one)

    def flushed(self, found: Landed) -> None:
        """A round has landed that was sent exactly: what has landed waits no more."""
        names = {name for part, good in found if bool(good) for name in part.piece.names}
        for store in self.reducer.memory.stores().values():
            for name, held in store.views().items():
                if name in names:
                    held.zero_()

    def _meet(self, number, launched, exactly):
        """Raise RuntimeError, on every rank, where they are in different rounds, whose bytes would be taken for each
        other's."""
        if self._alone or self._on_gpu:  # where the host would wait
            return
        mine = torch.tensor([number, launched, exactly], dtype=torch.int64, device="cpu")
        everyone = self._behind.links.ask(mine).tolist()
        if any(one != everyone[0] for one in everyone):
            found = "; ".join(f"rank {rank}: round {number} after step {step}{', the last one' * exactly}"
                              for rank, (number, step, exactly) in enumerate(everyone))  # fmt: skip
            raise RuntimeError(f"the ranks are in different rounds ({found}): a step that only some of them leave out "
                               "must be told of, by handle.skip_step() or the GradScaler given to attach")  # fmt: skip


def _encoded(channel: Channel, part: Part, number: int) -> Encoded:
    return channel.encode(part.mean, part.piece.names, part.piece.numels, number)


def _known(good):
    """A 0-d bool, None on a GPU, for which the host does not wait."""
    return None if good.is_cuda else bool(good)


def _finite(flat, otherwise):
    return torch.where(torch.isfinite(flat), flat, otherwise)
