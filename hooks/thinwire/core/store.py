"""Tensors of state, one a parameter, kept in flat buffers that follow the gradient's own layout, and can be put back.

A layout's state is one flat buffer, so that one operator serves a whole bucket. When parameters come in another layout
(DDP rebuilds its buckets; a checkpoint comes from other buckets) their state moves with them.

What a step of the optimizer changes is known to last only when that step has been made. So a store can keep what was
there before the step: in a second buffer, from the step's first change until it is made or put back.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch

from thinwire.core.blocks import Layout


@dataclass
class _Flat:
    """Some parameters' state, one after the other.

    before: what it was before ``step`` changed it; with step None it is only memory to use again. whole: a layout has
    asked for it; else it is a parameter's, on its own until one does.
    """

    names: tuple[str, ...]
    numels: tuple[int, ...]
    now: torch.Tensor
    before: torch.Tensor | None = None
    step: int | None = None
    whole: bool = True

    def views(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        return zip(self.names, flat.split(self.numels), strict=True)

    def apart(self) -> "Iterator[_Flat]":
        """Each parameter's, on its own."""
        befores = [None] * len(self.names) if self.before is None else self.before.split(self.numels)
        for name, numel, now, before in zip(self.names, self.numels, self.now.split(self.numels), befores):
            yield _Flat((name,), (numel,), now, before, self.step, whole=False)


class FlatStore:
    """State of the gradient's size, keyed by parameter name."""

    def __init__(self) -> None:
        self._flats: dict[tuple[str, ...], _Flat] = {}

    def flat(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The state [N] of the layout's parameters; zero where there was none."""
        return self._of(layout, dtype, device).now

    def change(self, layout: Layout, dtype: torch.dtype, device: torch.device,
               step: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """The same, to be changed by a step of the optimizer: where to write it, and where to read it if that is
        another place, and then every element is to be written.

        step: its number, so that ``put_back`` can undo all that it changes; None where it will not be asked to.
        """
        one = self._of(layout, dtype, device)
        if step is None or one.step == step:
            return one.now, None
        room = torch.empty_like(one.now) if one.before is None else one.before
        one.now, one.before, one.step = room, one.now, step
        return one.now, one.before

    def put_back(self, names: Collection[str], step: int) -> None:
        """Give these parameters what they had before this step."""
        for one, some in self._changed(names, step):
            if some is None:
                assert one.before is not None  # it was changed
                one.now, one.before, one.step = one.before, one.now, None
            else:
                _copy(one, some, one.before, one.now)

    def keep(self, names: Collection[str], step: int) -> None:
        """What this step has changed of these parameters is to stay."""
        for one, some in self._changed(names, step):
            if some is None:
                one.step = None
                if one.now.is_cuda:  # where memory is short in the next forward pass, and quickly had
                    one.before = None
            else:
                _copy(one, some, one.now, one.before)

    def scale(self, factor: float) -> None:
        """Multiply all by a factor."""
        for one in self._flats.values():
            one.now.mul_(factor)
            if one.step is not None and one.before is not None:
                one.before.mul_(factor)

    def clear(self) -> None:
        """Forget all."""
        self._flats.clear()

    def views(self) -> dict[str, torch.Tensor]:
        """Each parameter's state itself, 1-D."""
        return {name: view for one in self._flats.values() for name, view in one.views(one.now)}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A copy of each parameter's state, 1-D."""
        return {name: view.clone() for name, view in self.views().items()}

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        self._flats = {
            (name,): _Flat((name,), (tensor.numel(),), tensor.detach().clone().reshape(-1), whole=False)
            for name, tensor in tensors.items()
        }  # fmt: skip

    def _of(self, layout, dtype, device):
        one = self._flats.get(layout.names)
        if one is None or not one.whole:
            wanted = set(layout.names)
            for other in [other for other in list(self._flats.values()) if not wanted.isdisjoint(other.names)]:
                self._flats.pop(other.names, None)
                self._flats.update({part.names: part for part in other.apart()})
            parts = [self._flats.pop((name,)) for name in layout.names if (name,) in self._flats]
            one = _Flat(layout.names, layout.numels, torch.zeros(layout.numel, dtype=dtype, device=device))
            _fill(one, one.now, {part.names[0]: part.now for part in parts})
            steps = [part.step for part in parts if part.step is not None]
            if steps:
                one.step, one.before = max(steps), one.now.clone()
                _fill(one, one.before, {part.names[0]: part.before for part in parts if part.step == one.step})
            self._flats[layout.names] = one
        return one

    def _changed(self, names, step):
        """What a step has changed of these parameters: the flats, each with its names, or None for all of them."""
        names = frozenset(names)
        for one in list(self._flats.values()):
            some = names.intersection(one.names) if one.step == step else ()
            if some:
                yield one, None if len(some) == len(one.names) else some


def _fill(one, flat, held):
    for name, view in one.views(flat):
        if name in held:
            view.copy_(held[name])


def _copy(one, names, source, target):
    for (name, view), (_, into) in zip(one.views(source), one.views(target)):
        if name in names:
            into.copy_(view)
