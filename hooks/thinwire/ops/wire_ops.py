"""The operators on what travels in few bits and by owners; shapes and words as in :mod:`thinwire.ops.block_ops`.

A *row* is uint8: Q slots, each a bfloat16 scale and ``bits`` (8, 4 or 2) a code, ``code_bytes(block_size, bits)`` bytes
of them. All Q scales come first. Rows may begin at any address. ``places`` int64 [K] says where a slot lies: slot k in
row ``places[k] // Q``, there ``places[k] % Q``; None stands for one row that holds slot k at k.

``chosen`` and ``places`` may be longer than the table's K slots; the rest, INT64_MAX from the operators that write it,
is not read.
"""

from torch import Tensor

from thinwire.ops.dispatch import call
from thinwire.ops.reference_owners import NO_SLOT
from thinwire.ops.reference_wire import code_bytes

__all__ = [
    "NO_SLOT", "add_quantised", "add_rows_", "code_bytes", "deal_elements", "place_slots", "quantise_blocks_",
    "undeal_elements", "unite_blocks", "unquantise_blocks",
]  # fmt: skip


def quantise_blocks_(source: Tensor, chosen: Tensor, table: Tensor, block_size: int, status: Tensor | None,
                     places: Tensor | None, bits: int, keep: bool, rows: Tensor) -> None:  # fmt: skip
    """Write the chosen blocks of source [N] (float32 or float64) to rows uint8 [n, Q * (2 + code_bytes)].

    A block's scale is its largest magnitude over 2^(bits-1) - 1, rounded up to bfloat16, and a code the nearest whole
    number to element over scale, half to even. All of rows is written: zero where no slot lies. places must be
    distinct.

    With keep, source keeps what the codes leave of it: source's new value plus what was sent is its old value exactly.
    Blocks whose scale is not finite send NaN, and with a status parameters that are not TOUCHED send zeros and if any
    is NONFINITE all blocks send NaN; all of these keep all.
    """
    call("quantise_blocks_", source.device, source, chosen, table, block_size, status, places, bits, keep, rows)


def unquantise_blocks(rows: Tensor, bits: int, places: Tensor | None, table: Tensor, block_size: int,
                      payloads: Tensor) -> None:  # fmt: skip
    """Write payloads [R, P] (float32 or float64) from rows uint8 [n, Q * (2 + code_bytes)], each code times its scale.

    With places R is 1. Without, there is a payload for each row, R = n and Q = K. Padding is decoded as all else.
    """
    call("unquantise_blocks", payloads.device, rows, bits, places, table, block_size, payloads)


def add_quantised(rows: Tensor, bits: int, block_size: int, total: Tensor) -> None:
    """Write to total [Q * block_size] (float32 or float64) the sum of what the rows hold, added to 0 in their order."""
    call("add_quantised", total.device, rows, bits, block_size, total)


def add_rows_(values: Tensor, places: Tensor, first: int, chosen: Tensor, table: Tensor, block_size: int,
              factor: float, bad: Tensor, out: Tensor) -> None:  # fmt: skip
    """Add factor times the owner's values [Q * block_size] to the blocks of out [N], where bad, int32 [1], is 0.

    The owner's are the slots whose places are from ``first`` on and below ``first + Q``; others are left as they are.
    """
    call("add_rows_", out.device, values, places, first, chosen, table, block_size, factor, bad, out)


def deal_elements(payload: Tensor, table: Tensor, block_size: int, begins: Tensor, rows: Tensor) -> None:
    """Cut each parameter's part of payload [P] into equal shares, one for each of rows [n, part].

    A share of a parameter with E elements in the payload is ceil(E / n) of them; row r has the r-th from element
    ``begins[s]`` on (int64 [S]). All of rows is written: zero where nothing lies.
    """
    call("deal_elements", rows.device, payload, table, block_size, begins, rows)


def undeal_elements(rows: Tensor, table: Tensor, block_size: int, begins: Tensor, payload: Tensor) -> None:
    """The inverse of :func:`deal_elements`: write payload [P] from rows [n, part]."""
    call("undeal_elements", payload.device, rows, table, block_size, begins, payload)


def unite_blocks(named: Tensor, table: Tensor, block_size: int, chosen: Tensor, united: Tensor) -> None:
    """Unite what several ranks named: every block in named, and every block of a parameter whose slots are all.

    named: int32 or int64 [n, l], block numbers counted over the whole flat tensor, and -1 for none. united int64
    [S, 6] is written: table with the union's slots. chosen int64 [C] is written: the union's blocks counted within each
    parameter, ascending; then ``NO_SLOT``. C is the union's size at least.
    """
    call("unite_blocks", chosen.device, named, table, block_size, chosen, united)


def place_slots(table: Tensor, block_size: int, turns: Tensor, ranks: int, row_slots: int, places: Tensor) -> None:
    """Deal the slots to owners in turn: slot j of parameter s to rank ``(turns[s] + j) % ranks``.

    places int64 [C] is written: the owner times row_slots, plus the number of slots before it that the owner has; then
    ``NO_SLOT``. turns int64 [S], from 0 to ranks - 1. C is K at least.
    """
    call("place_slots", places.device, table, block_size, turns, ranks, row_slots, places)
