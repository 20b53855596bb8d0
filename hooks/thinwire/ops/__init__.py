"""The operators on blocks, compiled where they can be, and their reference in plain PyTorch."""

from thinwire.ops.block_ops import (
    NONFINITE,
    TOUCHED,
    accumulate_,
    draw_blocks,
    examine,
    gather_blocks,
    scatter_blocks_,
    select_blocks,
    settle_,
    take_blocks_,
)
from thinwire.ops.dispatch import native, why_not_native
from thinwire.ops.wire_ops import (
    NO_SLOT,
    add_quantised,
    add_rows_,
    code_bytes,
    deal_elements,
    place_slots,
    quantise_blocks_,
    undeal_elements,
    unite_blocks,
    unquantise_blocks,
)

__all__ = [
    "NONFINITE", "NO_SLOT", "TOUCHED", "accumulate_", "add_quantised", "add_rows_", "code_bytes", "deal_elements",
    "draw_blocks", "examine", "gather_blocks", "native", "place_slots", "quantise_blocks_", "scatter_blocks_",
    "select_blocks", "settle_", "take_blocks_", "undeal_elements", "unite_blocks", "unquantise_blocks",
    "why_not_native",
]  # fmt: skip
