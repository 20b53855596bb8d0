"""Tensors of state, one a parameter, kept in flat buffers that follow the gradient's own layout."""

import torch

from thinwire.core.blocks import Layout


class FlatStore:
    """State of the gradient's size, keyed by parameter name.

    A layout's state is one flat buffer, so that one operator serves a whole bucket. When parameters come in another
    layout (DDP rebuilds its buckets; a checkpoint comes from other buckets) their state moves with them.
    """

    def __init__(self) -> None:
        self._views: dict[str, torch.Tensor] = {}
        self._flats: dict[tuple[str, ...], torch.Tensor] = {}

    def flat(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The state [N] of the layout's parameters; zero where there was none."""
        flat = self._flats.get(layout.names)
        if flat is None:
            flat = torch.zeros(layout.numel, dtype=dtype, device=device)
            for names in [names for names in self._flats if not set(names).isdisjoint(layout.names)]:
                self._flats.pop(names, None)
            for name, start, numel in zip(layout.names, layout.starts, layout.numels, strict=True):
                view = flat[start : start + numel]
                if name in self._views:
                    view.copy_(self._views[name])
                self._views[name] = view
            self._flats[layout.names] = flat
        return flat

    def scale(self, factor: float) -> None:
        """Multiply all by a factor."""
        for view in self._views.values():
            view.mul_(factor)

    def clear(self) -> None:
        """Forget all."""
        self._flats.clear()
        self._views.clear()

    def views(self) -> dict[str, torch.Tensor]:
        """Each parameter's state itself, 1-D."""
        return dict(self._views)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A copy of each parameter's state, 1-D."""
        return {name: view.clone() for name, view in self._views.items()}

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        self._flats.clear()
        self._views = {name: tensor.detach().clone().reshape(-1) for name, tensor in tensors.items()}
