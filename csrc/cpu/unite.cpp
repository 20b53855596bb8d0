// unite_blocks and place_slots: which blocks are added up this step, and by whom.
#include <numeric>

#include "common.h"

namespace thinwire {
namespace {

constexpr int64_t NO_SLOT = INT64_MAX;

// A mark for each block that someone named, or whose parameter travels whole.
template <typename Number>
std::vector<uint8_t> mark_blocks(const at::Tensor& named, const at::Tensor& table, int64_t block_size,
                                 int64_t blocks) {
    std::vector<uint8_t> marks(blocks);
    for (int64_t s = 0; s < table.size(0); ++s) {
        const Segment segment(table.const_data_ptr<int64_t>(), s, block_size);
        if (segment.whole()) std::fill_n(marks.begin() + segment.first_block, segment.blocks, 1);
    }
    const Number* numbers = named.const_data_ptr<Number>();
    for (int64_t i = 0; i < named.numel(); ++i) {
        THINWIRE_CHECK(numbers[i] >= -1 && numbers[i] < blocks, "named has block ", numbers[i],
                       "; allowed are -1 and numbers below ", blocks);
        if (numbers[i] >= 0) marks[numbers[i]] = 1;
    }
    return marks;
}

void unite_blocks(const at::Tensor& named, const at::Tensor& table, int64_t block_size, const at::Tensor& chosen,
                  const at::Tensor& united) {
    const Totals totals = check_cpu_table(table, block_size);
    check(named, "named", {at::kInt, at::kLong}, {ANY, ANY}, at::kCPU);
    check(chosen, "chosen", LONG, {ANY}, at::kCPU);
    check(united, "united", LONG, {table.size(0), COLUMNS}, at::kCPU);
    const std::vector<uint8_t> marks =
        named.scalar_type() == at::kInt ? mark_blocks<int32_t>(named, table, block_size, totals.blocks)
                                        : mark_blocks<int64_t>(named, table, block_size, totals.blocks);
    const int64_t union_size = std::accumulate(marks.begin(), marks.end(), int64_t{0});
    THINWIRE_CHECK(chosen.numel() >= union_size, "chosen is ", chosen.sizes(), "; allowed is [", union_size,
                   "] or more, the union's size");
    int64_t* out = chosen.mutable_data_ptr<int64_t>();
    int64_t* rows = united.mutable_data_ptr<int64_t>();
    std::copy_n(table.const_data_ptr<int64_t>(), table.numel(), rows);
    int64_t slots = 0, payload = 0;
    for (int64_t s = 0; s < table.size(0); ++s) {
        Segment segment(rows, s, block_size);
        const uint8_t* mark = marks.data() + segment.first_block;
        segment.slots = std::accumulate(mark, mark + segment.blocks, int64_t{0});
        for (int64_t block = 0, written = 0; written < segment.slots; ++block) {
            out[slots + written] = block;
            written += mark[block];
        }
        rows[s * COLUMNS + SLOTS] = segment.slots;
        rows[s * COLUMNS + FIRST_SLOT] = slots;
        rows[s * COLUMNS + OFFSET] = payload;
        slots += segment.slots;
        payload += segment.payload();
    }
    std::fill(out + slots, out + chosen.numel(), NO_SLOT);
}

void place_slots(const at::Tensor& table, int64_t block_size, const at::Tensor& turns, int64_t ranks,
                 int64_t row_slots, const at::Tensor& places) {
    const Totals totals = check_cpu_table(table, block_size);
    check(turns, "turns", LONG, {table.size(0)}, at::kCPU);
    THINWIRE_CHECK(ranks >= 1, "ranks is ", ranks, "; allowed is 1 or more");
    check(places, "places", LONG, {ANY}, at::kCPU);
    THINWIRE_CHECK(places.numel() >= totals.slots, "places is ", places.sizes(), "; allowed is [",
                   totals.slots, "] or more");
    const int64_t* turn = turns.const_data_ptr<int64_t>();
    int64_t* out = places.mutable_data_ptr<int64_t>();
    std::vector<int64_t> next(ranks);  // of each owner's row
    for (int64_t s = 0; s < table.size(0); ++s) {
        THINWIRE_CHECK(turn[s] >= 0 && turn[s] < ranks, "turns has ", turn[s], " for parameter ", s,
                       "; allowed is from 0 to below ", ranks);
        const Segment segment(table.const_data_ptr<int64_t>(), s, block_size);
        int64_t owner = turn[s];
        for (int64_t j = 0; j < segment.slots; ++j) {
            out[segment.first_slot + j] = owner * row_slots + next[owner]++;
            if (++owner == ranks) owner = 0;
        }
    }
    const int64_t most = *std::max_element(next.begin(), next.end());
    THINWIRE_CHECK(most <= row_slots, "row_slots is ", row_slots, "; allowed is ", most,
                   " or more, for an owner has so many slots");
    std::fill(out + totals.slots, out + places.numel(), NO_SLOT);
}

TORCH_LIBRARY_IMPL(thinwire, CPU, m) {
    m.impl("unite_blocks", unite_blocks);
    m.impl("place_slots", place_slots);
}

}  // namespace
}  // namespace thinwire
