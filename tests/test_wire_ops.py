"""The operators on what travels in few bits and by owners: compiled and reference agree, and both do what they say."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_ops import DATA, DEVICES, EXAMPLES, both, cases, draws, gradient, numbers, status_of, unavailable
from thinwire import ops
from thinwire.core.blocks import Layout
from thinwire.ops import reference

WIDE, BITS = DATA[:2], [8, 4, 2]
GOOD = torch.zeros(1, dtype=torch.int32)


def of_all_sizes(size, dtype, generator):
    """Numbers of every size that there is, denormal and huge ones, zeros of both signs and runs of zeros."""
    values = torch.randn(size, generator=generator, dtype=torch.float64)
    powers = torch.tensor([0.0, -3.0, -20.0, -44.0, -45.5, 20.0, 37.9])
    kind = torch.randint(7, (-(-size // 50),), generator=generator).repeat_interleave(50)[:size]
    pick = torch.rand(size, generator=generator)
    values = (values * 10.0 ** powers[kind]).to(dtype)
    values[pick < 0.1], values[pick > 0.9] = 0.0, -0.0
    values[size // 3 : size // 2] = -0.0
    return values


def spoilt(values, generator):
    """Some numbers that no block survives."""
    for bad in (float("inf"), float("-inf"), float("nan"), -torch.finfo(values.dtype).max):
        if len(values):
            values[int(torch.randint(len(values), (), generator=generator))] = bad
    return values


def empty_rows(count, slots, block_size, bits, gap=0):
    """Rows full of what must be overwritten, at an odd address where there is a gap between them."""
    size = slots * (2 + ops.code_bytes(block_size, bits))
    return torch.full((count, size + gap), 0xA5, dtype=torch.uint8)[:, gap:]


def random_rows(count, slots, block_size, bits, generator, gap=0):
    """Any codes, with scales of every size, 0 and NaN among them."""
    rows = empty_rows(count, slots, block_size, bits, gap)
    rows.copy_(torch.randint(256, rows.shape, generator=generator))
    scales = torch.rand(count, slots, generator=generator) * 10.0 ** torch.randint(-40, 36, (count, slots),
                                                                                   generator=generator)  # fmt: skip
    scales[torch.rand(count, slots, generator=generator) < 0.1] = 0.0
    scales[torch.rand(count, slots, generator=generator) < 0.1] = float("nan")
    rows[:, : 2 * slots] = scales.bfloat16().view(torch.uint8).view(count, 2 * slots)
    return rows


def dealt(slots, ranks, spare, generator):
    """places of all slots among so many owners, and the slots in a row; the list is longer than it must be."""
    turns = torch.randint(ranks, (len(slots.counts),), generator=generator)
    row_slots = sum(-(-count // ranks) for count in slots.counts) + spare
    places = torch.full((slots.total + 2,), 7, dtype=torch.int64)
    reference.place_slots(slots.table, slots.layout.block_size, turns, ranks, row_slots, places)
    return places, row_slots


def begins_of(slots, ranks, gap, generator):
    """Where shares begin, in an order that is not the parameters', and the elements in a row."""
    begins, at = torch.zeros(len(slots.counts), dtype=torch.int64), gap
    ends = [*slots.offsets[1:], slots.numel][: len(slots.counts)]
    for s in torch.randperm(len(slots.counts), generator=generator).tolist():
        begins[s] = at
        at += -(-(ends[s] - slots.offsets[s]) // ranks) + gap
    return begins, at


def first_of_each_slot(slots, counts):
    """For every slot, the first block of its parameter."""
    long = [torch.tensor(numbers, dtype=torch.int64) for numbers in (slots.layout.first_blocks[:-1], counts)]
    return torch.repeat_interleave(*long)


def named_by(slots, ranks, dtype, generator):
    """What so many ranks name: of each parameter as many blocks as it has slots, over all blocks, and some -1."""
    chosen = draws(slots, ranks, int(torch.randint(1000, (), generator=generator)))
    named = torch.cat([chosen + first_of_each_slot(slots, slots.counts), torch.full((ranks, 2), -1)], dim=1)
    return torch.where(torch.rand(named.shape, generator=generator) < 0.5, -1, named).to(dtype)


@pytest.mark.parametrize("device", DEVICES)
class TestEqualsReference:
    @EXAMPLES
    @given(cases(), st.sampled_from(WIDE), st.sampled_from(BITS), st.booleans(), st.booleans(), st.booleans(),
           st.integers(1, 3), st.integers(0, 2))  # fmt: skip
    def test_quantise(self, device, case, wide, bits, keep, with_status, spoil, ranks, gap):
        slots, seed = case
        generator = torch.Generator().manual_seed(seed)
        block_size = slots.layout.block_size
        source = of_all_sizes(slots.layout.numel, wide, generator)
        status = status_of(slots, gradient(slots, wide, generator, spoil)) if with_status else None
        if spoil:
            spoilt(source, generator)
        chosen = draws(slots, 1, seed)[0]
        both(device, "quantise_blocks_", source, chosen, slots.table, block_size, status, None, bits, keep,
             empty_rows(1, slots.total, block_size, bits, gap))  # fmt: skip
        places, row_slots = dealt(slots, ranks, gap, generator)
        longer = torch.cat([chosen, torch.full((1,), ops.NO_SLOT)])
        both(device, "quantise_blocks_", source, longer, slots.table, block_size, status, places, bits, keep,
             empty_rows(ranks, row_slots, block_size, bits, gap))  # fmt: skip

    @EXAMPLES
    @given(cases(), st.sampled_from(WIDE), st.sampled_from(BITS), st.integers(0, 3), st.integers(0, 2))
    def test_unquantise(self, device, case, wide, bits, ranks, gap):
        slots, seed = case
        generator = torch.Generator().manual_seed(seed)
        block_size = slots.layout.block_size
        rows = random_rows(ranks, slots.total, block_size, bits, generator, gap)
        payloads = torch.full((ranks, slots.numel + gap), 7.0, dtype=wide)[:, gap:]
        both(device, "unquantise_blocks", rows, bits, None, slots.table, block_size, payloads)
        places, row_slots = dealt(slots, ranks + 1, gap, generator)
        rows = random_rows(ranks + 1, row_slots, block_size, bits, generator, gap)
        both(device, "unquantise_blocks", rows, bits, places, slots.table, block_size,
             torch.full((1, slots.numel), 7.0, dtype=wide))  # fmt: skip

    @EXAMPLES
    @given(cases(), st.sampled_from(WIDE), st.sampled_from(BITS), st.integers(0, 5), st.integers(0, 2))
    def test_add_quantised(self, device, case, wide, bits, ranks, gap):
        slots, seed = case
        block_size = slots.layout.block_size
        rows = random_rows(ranks, slots.total, block_size, bits, torch.Generator().manual_seed(seed), gap)
        both(device, "add_quantised", rows, bits, block_size, torch.full((slots.total * block_size,), 7.0, dtype=wide))

    @EXAMPLES
    @given(cases(), st.sampled_from(WIDE), st.sampled_from([1.0, -1.0]), st.integers(1, 3), st.integers(0, 1),
           st.booleans())  # fmt: skip
    def test_add_rows(self, device, case, wide, factor, ranks, bad, longer):
        slots, seed = case
        generator = torch.Generator().manual_seed(seed)
        places, row_slots = dealt(slots, ranks, 1, generator)
        places, chosen = (places if longer else places[: slots.total].clone()), draws(slots, 1, seed)[0]
        for rank in range(ranks):
            both(device, "add_rows_", numbers(row_slots * slots.layout.block_size, wide, generator), places,
                 rank * row_slots, chosen, slots.table, slots.layout.block_size, factor,
                 torch.full((1,), bad, dtype=torch.int32), numbers(slots.layout.numel, wide, generator))  # fmt: skip

    @EXAMPLES
    @given(cases(), st.sampled_from(DATA), st.integers(1, 5), st.integers(0, 2))
    def test_deal_and_undeal(self, device, case, dtype, ranks, gap):
        slots, seed = case
        generator = torch.Generator().manual_seed(seed)
        begins, part = begins_of(slots, ranks, gap, generator)
        payload = numbers(slots.numel, dtype, generator)
        rows = torch.full((ranks, part + gap), 7.0, dtype=dtype)
        args = both(device, "deal_elements", payload, slots.table, slots.layout.block_size, begins, rows)
        back = both(device, "undeal_elements", args[4][:, : max(part, 1)], slots.table, slots.layout.block_size, begins,
                    torch.full_like(payload, 7.0))  # fmt: skip
        assert torch.equal(back[4], payload)

    @EXAMPLES
    @given(cases(), st.sampled_from([torch.int32, torch.int64]), st.integers(0, 4), st.integers(0, 3))
    def test_unite(self, device, case, dtype, ranks, spare):
        slots, seed = case
        named = named_by(slots, ranks, dtype, torch.Generator().manual_seed(seed))
        both(device, "unite_blocks", named, slots.table, slots.layout.block_size,
             torch.full((sum(slots.layout.blocks) + spare,), 7), torch.full_like(slots.table, 7))  # fmt: skip

    @EXAMPLES
    @given(cases(), st.integers(1, 5), st.integers(0, 3))
    def test_place(self, device, case, ranks, spare):
        slots, seed = case
        turns = torch.randint(ranks, (len(slots.counts),), generator=torch.Generator().manual_seed(seed))
        row_slots = sum(-(-count // ranks) for count in slots.counts)
        both(device, "place_slots", slots.table, slots.layout.block_size, turns, ranks, row_slots,
             torch.full((slots.total + spare,), 7))  # fmt: skip

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("block_size", [16, 64, 1000])
    def test_large_parameters(self, device, block_size, bits):
        """Sizes at which the operators start several threads and work in batches and stretches."""
        layout = Layout(("a", "b", "c"), (300_001, 5, 100_000), block_size)
        blocks, generator = layout.blocks, torch.Generator().manual_seed(bits)
        slots = layout.slots((blocks[0], 1, blocks[2] // 3))
        chosen, ranks = draws(slots, 1, 3)[0], 3
        source = spoilt(of_all_sizes(layout.numel, torch.float32, generator), generator)
        places, row_slots = dealt(slots, ranks, 1, generator)
        rows = empty_rows(ranks, row_slots, block_size, bits)
        rows = both(device, "quantise_blocks_", source, chosen, slots.table, block_size, None, places, bits, True,
                    rows)[-1]  # fmt: skip
        both(device, "unquantise_blocks", rows, bits, places, slots.table, block_size, torch.empty(1, slots.numel))
        total = both(device, "add_quantised", rows, bits, block_size, torch.empty(row_slots * block_size))[-1]
        both(device, "add_rows_", total, places, row_slots, chosen, slots.table, block_size, -1.0, GOOD, source)
        begins, part = begins_of(slots, ranks, 1, generator)
        both(device, "deal_elements", torch.randn(slots.numel), slots.table, block_size, begins,
             torch.empty(ranks, part))  # fmt: skip
        both(device, "undeal_elements", torch.randn(ranks, part), slots.table, block_size, begins,
             torch.empty(slots.numel))  # fmt: skip
        both(device, "unite_blocks", named_by(slots, ranks, torch.int32, generator), slots.table, block_size,
             torch.empty(sum(blocks), dtype=torch.int64), torch.empty_like(slots.table))  # fmt: skip

    def test_empty(self, device):
        slots = Layout((), (), 16).slots(())
        nothing, table, none = torch.empty(0), slots.table, torch.empty(0, dtype=torch.int64)
        rows, status = torch.empty(1, 0, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
        both(device, "quantise_blocks_", nothing, none, table, 16, status, None, 4, True, rows)
        both(device, "quantise_blocks_", nothing, none, table, 16, status, none, 4, True, empty_rows(2, 3, 16, 4))
        both(device, "unquantise_blocks", rows, 4, None, table, 16, nothing.view(1, 0))
        both(device, "unquantise_blocks", empty_rows(2, 3, 16, 4), 4, none, table, 16, nothing.view(1, 0))
        both(device, "add_quantised", rows, 4, 16, nothing)
        both(device, "add_quantised", rows[:0], 4, 16, nothing)
        both(device, "add_rows_", nothing, none, 0, none, table, 16, 1.0, GOOD, nothing.clone())
        both(device, "deal_elements", nothing, table, 16, none, torch.ones(3, 2))
        both(device, "undeal_elements", torch.ones(3, 2), table, 16, none, nothing)
        both(device, "unite_blocks", none.view(2, 0), table, 16, torch.zeros(2, dtype=torch.int64), table.clone())
        both(device, "place_slots", table, 16, none, 2, 0, torch.zeros(2, dtype=torch.int64))

    def test_opcheck(self, device):
        slots = Layout(("a", "b"), (70, 33), 16).slots((2, 3))
        table, chosen, places = slots.table, draws(slots, 1, 1)[0], torch.tensor([0, 3, 4, 1, 2])
        flat, status = torch.randn(103), torch.ones(3, dtype=torch.int32)
        rows, begins = empty_rows(2, 3, 16, 4), torch.tensor([0, 16])
        calls = {
            "quantise_blocks_": (flat, chosen, table, 16, status, places, 4, True, rows),
            "unquantise_blocks": (rows, 4, places, table, 16, torch.zeros(1, slots.numel)),
            "add_quantised": (rows, 4, 16, torch.zeros(48)),
            "add_rows_": (torch.randn(48), places, 3, chosen, table, 16, 1.0, GOOD, flat),
            "deal_elements": (torch.randn(slots.numel), table, 16, begins, torch.zeros(2, 33)),
            "undeal_elements": (torch.zeros(2, 33), table, 16, begins, torch.randn(slots.numel)),
            "unite_blocks": (torch.tensor([[0, 2, -1, 5]]), table, 16, torch.zeros_like(table[0]), table.clone()),
            "place_slots": (table, 16, torch.tensor([0, 1]), 2, 3, places.clone()),
        }  # fmt: skip
        for name, args in calls.items():
            args = tuple(arg.to(device, copy=True) if isinstance(arg, torch.Tensor) else arg for arg in args)
            torch.library.opcheck(getattr(torch.ops.thinwire, name).default, args)


@EXAMPLES
@given(cases(), st.sampled_from(WIDE), st.sampled_from(BITS), st.booleans())
def test_nothing_is_lost(case, wide, bits, spoil):
    """What was sent and what is kept add up to what there was, to the bit, in numbers of every size."""
    slots, seed = case
    generator = torch.Generator().manual_seed(seed)
    block_size = slots.layout.block_size
    before = of_all_sizes(slots.layout.numel, wide, generator)
    if spoil:
        spoilt(before, generator)
    chosen, rows = draws(slots, 1, seed)[0], empty_rows(1, slots.total, block_size, bits)
    after, sent = before.clone(), torch.empty(slots.total * block_size, dtype=wide)
    ops.quantise_blocks_(after, chosen, slots.table, block_size, None, None, bits, True, rows)
    ops.add_quantised(rows, bits, block_size, sent)
    voided = torch.where(sent.isnan(), 0.0, sent)  # a block that decodes to NaN is kept as a whole
    added = after.clone()
    ops.add_rows_(voided, torch.arange(slots.total), 0, chosen, slots.table, block_size, 1.0, GOOD, added)
    same = (added == before) | (before.isnan() & added.isnan())
    assert bool(same.all())
    assert torch.equal(torch.signbit(added)[before != 0], torch.signbit(before)[before != 0])
    # A zero has code 0 and is kept with its sign.
    assert torch.equal(torch.signbit(after)[before == 0], torch.signbit(before)[before == 0])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("wide", WIDE)
def test_codes_are_the_nearest_and_the_largest_fits(wide, bits):
    """Against exact arithmetic: scales are the smallest that fit, and every element comes within half a step."""
    largest = 2 ** (bits - 1) - 1
    generator = torch.Generator().manual_seed(bits)
    values = torch.randn(4000, 16, generator=generator, dtype=torch.float64).to(wide)
    values[0] = (torch.arange(16.0) - 7.5).clamp(-largest, largest)
    values[0, 0] = largest  # so that steps are of 1 and all else lies half way
    slots = Layout(("a",), (values.numel(),), 16).slots((4000,))
    rows, sent = empty_rows(1, 4000, 16, bits), torch.empty(1, values.numel(), dtype=wide)
    ops.quantise_blocks_(values.flatten(), torch.arange(4000), slots.table, 16, None, None, bits, False, rows)
    ops.unquantise_blocks(rows, bits, None, slots.table, 16, sent)
    scale = rows[0, :8000].numpy().view("<u2").astype("u4") << 16
    scale = torch.from_numpy(scale.view("f4").astype("f8"))[:, None]
    peak = values.double().abs().amax(1, keepdim=True)
    assert bool((scale * largest >= peak * (1 - 2**-23)).all()) and bool((scale * largest < peak * (1 + 2**-7)).all())
    error = (sent.view(4000, 16).double() - values.double()).abs()
    assert bool((error <= scale / 2 * (1 + 2**-20)).all())
    codes = sent.view(4000, 16).double() / scale
    assert torch.equal(codes, codes.round()) and int(codes.abs().max()) == largest
    assert scale[0] == 1 and torch.equal(codes[0], values[0].double().round())  # half to even


def test_the_bytes_of_a_row():
    """Two blocks of 5 in 8, 4 and 2 bits, written out: scales first, then codes from the lowest bits on."""
    values = torch.tensor([-127.0, 1, 2, 0, 127, 0.5, -0.25, 0, 0, 0.0])
    slots = Layout(("a",), (10,), 5).slots((2,))
    wanted = {
        8: [0x80, 0x3F, 0x82, 0x3B, 0x81, 1, 2, 0, 0x7F, 0x7E, 0xC1, 0, 0, 0],
        4: [0x92, 0x41, 0x93, 0x3D, 0x09, 0x00, 0x07, 0xD7, 0x00, 0x00],
        2: [0xFE, 0x42, 0x00, 0x3F, 0x03, 0x01, 0x01, 0x00],
    }
    for bits, expected in wanted.items():
        rows = empty_rows(1, 2, 5, bits)
        ops.quantise_blocks_(values.clone(), torch.arange(2), slots.table, 5, None, None, bits, False, rows)
        assert rows[0].tolist() == expected, bits


def test_what_sends_nothing_and_what_spoils_all():
    slots = Layout(("a", "b"), (32, 40), 16).slots((2, 1))
    source, chosen = torch.ones(72), torch.tensor([0, 1, 2])
    for touched, overflowed, wanted in ((1, 0, [0.0] * 32 + [1.0] * 8), (1, 2, [float("nan")] * 40)):
        status = torch.tensor([0, touched | overflowed, touched | overflowed], dtype=torch.int32)
        kept, rows, sent = source.clone(), empty_rows(2, 2, 16, 8), torch.zeros(1, slots.numel)
        places = torch.tensor([3, 0, 2])
        ops.quantise_blocks_(kept, chosen, slots.table, 16, status, places, 8, True, rows)
        ops.unquantise_blocks(rows, 8, places, slots.table, 16, sent)
        assert torch.equal(sent[0, :40].isnan(), torch.tensor(wanted).isnan())
        assert torch.allclose(sent[0, :40], torch.tensor(wanted), rtol=0.01, equal_nan=True)
        assert torch.equal(kept[:64], source[:64]) and bool((kept[64:] == 1).all()) == bool(overflowed)
        used = rows.view(2, 2 * 18)
        assert not used[0, 2:4].any() and not used[0, 4 + 16 :].any()  # place 1 is no one's


@EXAMPLES
@given(cases(), st.integers(1, 5))
def test_owners_take_turns(case, ranks):
    """Owners follow one another from each parameter's turn on, and fill their places from the first on."""
    slots, seed = case
    turns = torch.randint(ranks, (len(slots.counts),), generator=torch.Generator().manual_seed(seed))
    row_slots = 1 + sum(-(-count // ranks) for count in slots.counts)
    places = torch.full((slots.total + 2,), 7)
    ops.place_slots(slots.table, slots.layout.block_size, turns, ranks, row_slots, places)
    assert places[slots.total :].tolist() == [ops.NO_SLOT] * 2
    places = places[: slots.total]
    for owner in range(ranks):
        own = places[places // row_slots == owner] - owner * row_slots
        assert own.tolist() == list(range(len(own)))
    for first, count, turn in zip(slots.first_slots, slots.counts, turns.tolist()):
        owners = (places[first : first + count] // row_slots).tolist()
        assert owners == [(turn + slot) % ranks for slot in range(count)]


@EXAMPLES
@given(cases(), st.integers(1, 4))
def test_a_union_is_what_was_named(case, ranks):
    slots, seed = case
    layout = slots.layout
    named = named_by(slots, ranks - 1, torch.int64, torch.Generator().manual_seed(seed))
    chosen, united = torch.empty(layout.first_blocks[-1], dtype=torch.int64), torch.empty_like(slots.table)
    ops.unite_blocks(named, slots.table, layout.block_size, chosen, united)
    wanted = set(named[named >= 0].tolist())
    for first, blocks, whole in zip(layout.first_blocks, layout.blocks, slots.whole):
        wanted |= set(range(first, first + blocks)) if whole else set()
    counts = united[:, 3].tolist()
    assert (chosen[: len(wanted)] + first_of_each_slot(slots, counts)).tolist() == sorted(wanted)
    assert torch.equal(united, layout.slots(tuple(counts)).table)


@pytest.mark.skipif(bool(unavailable("cpu")), reason=str(unavailable("cpu")))
class TestErrors:
    """No argument leads beyond a tensor's memory; messages repeat what was passed."""

    slots = Layout(("a",), (40,), 16).slots((2,))
    table, chosen, flat = slots.table, torch.tensor([0, 2]), torch.zeros(40)
    rows = torch.zeros(2, 20, dtype=torch.uint8)  # two slots of 8 bytes and a scale

    def refused(self, match, name, *args):
        with pytest.raises(RuntimeError, match=match):
            getattr(torch.ops.thinwire, name)(*args)

    def test_rows(self):
        for rows, bits, match in (
            (self.rows, 3, "bits is 3; allowed is 8, 4 or 2"),
            (self.rows[:, :19], 4, r"rows is \[2, 19\].*multiple of 10"),
            (self.rows.int(), 4, "rows is Int"),
            (self.rows.t()[:20], 4, r"rows is Byte \[20, 2\] with strides"),
        ):
            self.refused(match, "quantise_blocks_", self.flat, self.chosen, self.table, 16, None, self.chosen, bits,
                         True, rows)  # fmt: skip
            self.refused(match, "unquantise_blocks", rows, bits, self.chosen, self.table, 16, self.flat[:32][None])
            self.refused(match, "add_quantised", rows, bits, 16, self.flat[:32])
        self.refused("block_size is 0", "add_quantised", self.rows, 4, 0, self.flat)
        self.refused(r"total is Float \[40\]", "add_quantised", self.rows, 4, 16, self.flat)

    @pytest.mark.parametrize("places, match", [
        ([0, 4], "places has 4 at 1; allowed is from 0 to below 4"), ([-1, 0], "places has -1 at 0"),
        ([ops.NO_SLOT, 0], "places has 9223372036854775807"), ([0], r"places is \[1\]; allowed is \[2\] or more"),
    ])  # fmt: skip
    def test_places(self, places, match):
        places = torch.tensor(places)
        self.refused(match, "quantise_blocks_", self.flat, self.chosen, self.table, 16, None, places, 4, True,
                     self.rows)  # fmt: skip
        self.refused(match, "unquantise_blocks", self.rows, 4, places, self.table, 16, self.flat[:32][None])

    def test_places_that_are_taken(self):
        self.refused("places has 3 again at 1", "quantise_blocks_", self.flat, self.chosen, self.table, 16, None,
                     torch.tensor([3, 3]), 4, True, self.rows)  # fmt: skip

    def test_rows_without_places(self):
        wide, narrow = torch.zeros(1, 30, dtype=torch.uint8), torch.zeros(1, 10, dtype=torch.uint8)
        for rows, match in ((wide, "3 slots in a row; allowed is 2"), (narrow, "1 slots in a row; allowed is 2")):
            self.refused(match, "quantise_blocks_", self.flat, self.chosen, self.table, 16, None, None, 4, True, rows)
            self.refused(match, "unquantise_blocks", rows, 4, None, self.table, 16, self.flat[:32][None])
        self.refused(r"rows is Byte \[2, 20\]", "quantise_blocks_", self.flat, self.chosen, self.table, 16, None, None,
                     4, True, self.rows)  # fmt: skip
        self.refused(r"payloads is Float \[1, 32\]", "unquantise_blocks", self.rows, 4, None, self.table, 16,
                     self.flat[:32][None])  # fmt: skip

    @pytest.mark.parametrize("blocks", [[0, 3], [-1, 0], [1, 1], [2, 0]])
    def test_blocks_that_do_not_exist_or_ascend(self, blocks):
        blocks, match = torch.tensor(blocks), "chosen has block"
        self.refused(match, "quantise_blocks_", self.flat, blocks, self.table, 16, None, self.chosen, 4, True,
                     self.rows)  # fmt: skip
        self.refused(match, "add_rows_", self.flat[:32], self.chosen, 0, blocks, self.table, 16, 1.0, GOOD, self.flat)

    def test_other_sizes(self):
        self.refused(r"source is Float \[39\]", "quantise_blocks_", self.flat[:39], self.chosen, self.table, 16, None,
                     self.chosen, 4, True, self.rows)  # fmt: skip
        self.refused("source is BFloat16", "quantise_blocks_", self.flat.bfloat16(), self.chosen, self.table, 16, None,
                     self.chosen, 4, True, self.rows)  # fmt: skip
        self.refused(r"values is \[40\]; allowed are blocks of block_size 16", "add_rows_", self.flat, self.chosen, 0,
                     self.chosen, self.table, 16, 1.0, GOOD, self.flat.clone())  # fmt: skip
        self.refused("row 0 of table", "place_slots", self.table, 40, torch.tensor([0]), 2, 3, self.chosen.clone())

    @pytest.mark.parametrize("begin, part", [(-1, 20), (5, 20), (0, 15)])
    def test_begins(self, begin, part):
        rows, begins = torch.zeros(2, part), torch.tensor([begin])
        self.refused(f"begins has {begin} for parameter 0", "deal_elements", self.flat[:32], self.table, 16, begins,
                     rows)  # fmt: skip
        self.refused(f"begins has {begin} for parameter 0", "undeal_elements", rows, self.table, 16, begins,
                     self.flat[:32])  # fmt: skip

    def test_shares_that_meet(self):
        slots = Layout(("a", "b"), (32, 32), 16).slots((2, 2))
        self.refused("begins has 0 for shares of 16 elements, and 15", "deal_elements", torch.zeros(64), slots.table,
                     16, torch.tensor([15, 0]), torch.zeros(2, 40))  # fmt: skip
        self.refused(r"rows is \[0, 40\]; allowed is one row or more", "undeal_elements", torch.zeros(0, 40),
                     slots.table, 16, torch.tensor([0, 16]), torch.zeros(64))  # fmt: skip

    def test_named_and_turns(self):
        wide, table = torch.zeros(3, dtype=torch.int64), self.table
        for number in (3, -2):
            self.refused(f"named has block {number}; allowed are -1 and numbers below 3", "unite_blocks",
                         torch.tensor([[0, number]]), table, 16, wide, table.clone())  # fmt: skip
        self.refused(r"chosen is \[1\]; allowed is \[2\] or more", "unite_blocks", torch.tensor([[0, 1]]), table, 16,
                     wide[:1], table.clone())  # fmt: skip
        for turn in (2, -1):
            self.refused(f"turns has {turn} for", "place_slots", table, 16, torch.tensor([turn]), 2, 3, wide)
        self.refused("row_slots is 1; allowed is 2 or more", "place_slots", table, 16, torch.tensor([0]), 1, 1, wide)
        self.refused("ranks is 0", "place_slots", table, 16, torch.tensor([0]), 0, 1, wide)
        self.refused(r"places is \[1\]", "place_slots", table, 16, torch.tensor([0]), 1, 2, wide[:1])
