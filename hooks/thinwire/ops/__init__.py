"""The operators on blocks, compiled where they can be, and their reference in plain PyTorch."""

from thinwire.ops.block_ops import (
    NONFINITE,
    TOUCHED,
    accumulate_,
    draw_blocks,
    examine,
    gather_blocks,
    native,
    scatter_blocks_,
    select_blocks,
    settle_,
    take_blocks_,
    why_not_native,
)

__all__ = [
    "NONFINITE", "TOUCHED", "accumulate_", "draw_blocks", "examine", "gather_blocks", "native", "scatter_blocks_",
    "select_blocks", "settle_", "take_blocks_", "why_not_native",
]  # fmt: skip
