// draw_blocks: order statistics of hashed keys, which are computed again rather than kept.
#include <cmath>

#include "common.h"

namespace thinwire {

constexpr int64_t STRETCH = 512;  // keys computed at a time

THINWIRE_CLONES void fill_keys(uint64_t start, int64_t first, int64_t count, uint64_t* keys) {
    for (int64_t i = 0; i < count; ++i) keys[i] = block_key(start, first + i);
}

THINWIRE_CLONES int64_t count_below(const uint64_t* keys, int64_t count, uint64_t bound) {
    int64_t below = 0;
    for (int64_t i = 0; i < count; ++i) below += keys[i] < bound;
    return below;
}

namespace {

// The key at this position of the ascending order. Keys are uniform, so the position tells about where its key lies:
// only the keys in a window around it are kept. Where the window misses, all are.
uint64_t key_at(uint64_t start, int64_t blocks, int64_t position) {
    constexpr int64_t FEW = 4096;
    constexpr double DEVIATIONS = 6.0;
    uint64_t buffer[STRETCH];
    std::vector<uint64_t> kept;
    if (blocks > FEW) {
        const double share = static_cast<double>(position) / blocks;
        const double reach = DEVIATIONS * std::sqrt(share * (1 - share) / blocks) + 16.0 / blocks;
        const double low_share = std::max(share - reach, 0.0), high_share = share + reach;
        const uint64_t low = static_cast<uint64_t>(std::ldexp(low_share, 64));
        const uint64_t high = high_share < 1.0 ? static_cast<uint64_t>(std::ldexp(high_share, 64)) : UINT64_MAX;
        int64_t below = 0;
        kept.reserve(static_cast<size_t>(2.5 * reach * blocks));
        for (int64_t i = 0; i < blocks; i += STRETCH) {
            const int64_t count = std::min(STRETCH, blocks - i);
            fill_keys(start, i, count, buffer);
            below += count_below(buffer, count, low);
            if (count_below(buffer, count, high) == count_below(buffer, count, low)) continue;
            for (int64_t j = 0; j < count; ++j) {
                if (buffer[j] - low < high - low) kept.push_back(buffer[j]);
            }
        }
        position -= below;
        if (position < 0 || position >= static_cast<int64_t>(kept.size())) {
            position += below;
            kept.clear();
        }
    }
    if (kept.empty()) {
        kept.resize(blocks);
        fill_keys(start, 0, blocks, kept.data());
    }
    std::nth_element(kept.begin(), kept.begin() + position, kept.end());
    return kept[position];
}

// Writes the blocks that a deal takes, ascending.
void draw(uint64_t start, const Segment& segment, int64_t deal_number, int64_t* chosen) {
    const int64_t slots = segment.slots, blocks = segment.blocks;
    if (slots == 0) return;
    if (slots == blocks) {
        for (int64_t block = 0; block < blocks; ++block) chosen[block] = block;
        return;
    }
    const Deal deal(deal_number, slots, blocks);
    // Taken are keys in [low, high) or, where the deal wraps, outside [low, high).
    const bool wraps = deal.wrapped > 0;
    const int64_t first = wraps ? deal.wrapped : deal.first, end = wraps ? deal.first : deal.end;
    const uint64_t low = first == 0 ? 0 : key_at(start, blocks, first);
    const bool to_the_last = end == blocks;
    const uint64_t range = to_the_last ? UINT64_MAX - low : key_at(start, blocks, end) - low;
    uint64_t buffer[STRETCH];
    int64_t written = 0;
    for (int64_t i = 0; written < slots; i += STRETCH) {
        const int64_t count = std::min(STRETCH, blocks - i);
        fill_keys(start, i, count, buffer);
        for (int64_t j = 0; j < count && written < slots; ++j) {
            const uint64_t distance = buffer[j] - low;
            const bool inside = to_the_last ? buffer[j] >= low : distance < range;
            chosen[written] = i + j;
            written += inside != wraps;
        }
    }
}

void draw_blocks(const at::Tensor& table, const at::Tensor& units, int64_t block_size, int64_t seed, int64_t step,
                 at::IntArrayRef streams, at::IntArrayRef deals, const at::Tensor& chosen) {
    const Totals totals = check_cpu_table(table, block_size);
    const int64_t segments = table.size(0), rows = streams.size();
    THINWIRE_CHECK(streams.size() == deals.size(), "there are ", streams.size(), " streams ", streams, " and ",
                   deals.size(), " deals ", deals, "; allowed is one of each for every row");
    check(units, "units", LONG, {segments}, at::kCPU);
    check(chosen, "chosen", LONG, {rows, totals.slots}, at::kCPU);
    const int64_t* row = table.const_data_ptr<int64_t>();
    const int64_t* unit = units.const_data_ptr<int64_t>();
    int64_t* out = chosen.mutable_data_ptr<int64_t>();
    for_tasks(rows * segments, rows * totals.blocks > GRAIN / 4, [&](int64_t task) {
        const int64_t r = task / segments, s = task % segments;
        const Segment segment(row, s, block_size);
        draw(key_start(seed, step, unit[s], streams[r]), segment, deals[r],
             out + r * totals.slots + segment.first_slot);
    });
}

TORCH_LIBRARY_IMPL(thinwire, CPU, m) { m.impl("draw_blocks", draw_blocks); }

}  // namespace
}  // namespace thinwire
