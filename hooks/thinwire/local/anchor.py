"""The anchor: the parameters that all ranks agreed on last, and the outer optimizer that steps them."""

import hashlib
from collections.abc import Iterable, Mapping

import torch

from thinwire.core.blocks import Layout
from thinwire.core.memory import wide
from thinwire.core.store import FlatStore
from thinwire.replicas.means import Named, pieces


class Piece:
    """Some parameters, or buffers, of one dtype and device, as one flat tensor in the dtype of sums."""

    def __init__(self, named: list[Named]):
        self.names = tuple(name for name, _ in named)
        self.tensors = [tensor.detach() for _, tensor in named]
        self.numels = tuple(tensor.numel() for tensor in self.tensors)
        self.dtype, self.device = wide(self.tensors[0].dtype), self.tensors[0].device
        self.layout = Layout(self.names, self.numels, 1)

    def read(self) -> torch.Tensor:
        """Their values as they are now [N], a copy."""
        return torch.cat([tensor.reshape(-1).to(self.dtype) for tensor in self.tensors])

    def write(self, flat: torch.Tensor) -> None:
        """Give them these values [N], in the storage that they have."""
        torch._foreach_copy_(self.tensors, self._views(flat))

    def move(self, by: torch.Tensor) -> None:
        """Add to their values [N]."""
        if self.dtype == self.tensors[0].dtype:
            torch._foreach_add_(self.tensors, self._views(by))
        else:  # rounded once
            self.write(self.read().add_(by))

    def by_name(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Parts of flat [N], each in its shape: views."""
        return dict(zip(self.names, self._views(flat)))

    def flat(self, by_name: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The reverse of ``by_name``, a copy."""
        parts = [by_name[name].reshape(-1).to(self.device, self.dtype) for name in self.names]
        return torch.cat(parts)

    def _views(self, flat):
        return [part.view(tensor.shape) for part, tensor in zip(flat.split(self.numels), self.tensors)]


def in_pieces(tensors: Iterable[Named]) -> list[Piece]:
    return [Piece(piece) for piece in pieces(tensors)]


class Anchor:
    """Values by name, and the outer optimizer's momentum: the same bits on every rank.

    lr and momentum: of the outer optimizer, torch.optim.SGD with Nesterov momentum. alone: there is one rank.
    """

    def __init__(self, lr: float, momentum: float, alone: bool):
        self._lr, self._momentum = lr, momentum
        self._is_mean = alone and lr == 1 and not momentum
        self._values, self._velocity = FlatStore(), FlatStore()

    def values(self, piece: Piece) -> torch.Tensor:
        """The anchor [N] itself; parameters that it does not know yet get in with the values that they have."""
        new = set(piece.names).difference(self._values.views())
        flat = self._values.flat(piece.layout, piece.dtype, piece.device)
        if new:
            for (name, part), tensor in zip(piece.by_name(flat).items(), piece.tensors):
                if name in new:
                    part.copy_(tensor)
        return flat

    def step(self, piece: Piece, mean: torch.Tensor, origin: torch.Tensor | None = None,
             sent: torch.Tensor | None = None, momentum: bool = True) -> None:  # fmt: skip
        """Step by the mean pseudo-gradient [N]. origin: what this rank has sent from, if it knows that still.

        sent: bool [N], where the anchor is to move; the momentum of the rest stays too. None is everywhere. momentum:
        whether it acts.
        """
        anchor = self.values(piece)
        velocity = self._velocity.flat(piece.layout, piece.dtype, piece.device) if self._momentum else None
        if self._is_mean and origin is not None:  # anchor - (anchor - x) need not be x
            anchor.copy_(origin)
            return
        both = [anchor] if velocity is None else [anchor, velocity]
        before = [] if sent is None else [one.clone() for one in both]
        acts = self._momentum if momentum else 0.0
        outer = torch.optim.SGD([anchor], lr=self._lr, momentum=acts, nesterov=bool(acts))
        if acts:
            outer.state[anchor]["momentum_buffer"] = velocity
        anchor.grad = mean
        outer.step()
        anchor.grad = None
        for now, then in zip(both, before):
            now.copy_(torch.where(sent, now, then))  # type: ignore[arg-type]

    def stores(self) -> dict[str, FlatStore]:
        return {"anchor": self._values, "momentum": self._velocity}

    def digest(self) -> str:
        """All of it, the momentum too, in twelve letters."""
        return digest_of({f"{kind} {name}": one for kind, store in self.stores().items()
                          for name, one in store.views().items()})  # fmt: skip


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """The bits of tensors, and their names, in twelve letters."""
    found = hashlib.blake2b(digest_size=6)
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
