"""The operators that deal a payload to its owners, in plain PyTorch: what each rank adds up for all."""

import torch

NO_SLOT = torch.iinfo(torch.int64).max


def deal_elements(payload, table, block_size, begins, rows):
    rows.zero_()
    for row, to, element in _shares(table, block_size, begins, rows):
        rows[row, to] = payload[element]


def undeal_elements(rows, table, block_size, begins, payload):
    for row, at, element in _shares(table, block_size, begins, rows):
        payload[element] = rows[row, at]


def unite_blocks(named, table, block_size, chosen, united):
    chosen.fill_(NO_SLOT)
    united.copy_(table)
    named = named[named >= 0].long().unique()
    first_slot = offset = 0
    for s, (_, numel, first_block, slots, *_) in enumerate(table.tolist()):
        blocks = -(-numel // block_size)
        if slots == blocks:
            union = torch.arange(blocks, device=chosen.device)
        else:
            union = named[(named >= first_block) & (named < first_block + blocks)] - first_block
        chosen[first_slot : first_slot + len(union)] = union
        united[s, 3:] = torch.tensor([len(union), first_slot, offset], device="cpu")
        first_slot += len(union)
        offset += numel if len(union) == blocks else len(union) * block_size


def place_slots(table, block_size, turns, ranks, row_slots, places):
    places.fill_(NO_SLOT)
    before = torch.zeros(ranks, dtype=torch.int64, device=places.device)
    for (*_, slots, first_slot, _), turn in zip(table.tolist(), turns.tolist(), strict=True):
        slot = torch.arange(slots, device=places.device)
        owner = (turn + slot) % ranks
        places[first_slot : first_slot + slots] = owner * row_slots + before[owner] + slot // ranks
        before += torch.bincount(owner, minlength=ranks)


def _shares(table, block_size, begins, rows):
    """For each parameter: the row and the place in it of each element of the payload, and the elements."""
    for (_, numel, _, slots, _, offset), begin in zip(table.tolist(), begins.tolist(), strict=True):
        size = numel if slots == -(-numel // block_size) else slots * block_size
        share = max(-(-size // max(len(rows), 1)), 1)
        element = torch.arange(size, device=rows.device)
        yield element // share, begin + element % share, offset + element
