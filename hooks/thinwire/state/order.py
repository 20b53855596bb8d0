"""In which order a flat gradient holds a parameter's elements.

DDP's buckets hold what is dense in memory in the order of memory, which for channels_last is not that of a contiguous
tensor. What is saved is in the order of a contiguous one, so that it fits a run with another memory format.
"""

import torch


def shaped(flat: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """What a bucket holds of a parameter [N], in the parameter's shape: a view."""
    return flat.as_strided(p.size(), p.stride()) if _is_dense(p) else flat.view_as(p)


def to_saved(flat: torch.Tensor, p: torch.Tensor | None) -> torch.Tensor:
    """What a bucket holds of a parameter [N], in the order of a contiguous one; None: it is in that order already."""
    return flat if p is None or p.is_contiguous() else shaped(flat, p).reshape(-1)


def from_saved(saved: torch.Tensor, p: torch.Tensor | None) -> torch.Tensor:
    """The reverse of ``to_saved``."""
    if p is None or p.is_contiguous() or not _is_dense(p):
        return saved
    held = torch.empty_strided(p.size(), p.stride(), dtype=saved.dtype, device=saved.device)
    held.copy_(saved.view(p.size()))
    return held.as_strided((held.numel(),), (1,))


def _is_dense(p):
    """Whether its elements fill their memory without gaps or overlap."""
    return torch.empty_like(p, device="meta").stride() == p.stride()
