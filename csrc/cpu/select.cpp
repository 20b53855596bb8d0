// select_blocks: one radix digit of the norms' order, then nth_element among the few that share the digit.
#include "common.h"

namespace thinwire {
namespace {

template <typename Norm>
using Key = decltype(order_key(Norm()));

// The key of the slots-th largest norm, and how many blocks of just that key are wanted.
template <typename Norm>
Key<Norm> last_key(const Norm* norms, int64_t blocks, int64_t slots, int64_t& wanted) {
    constexpr int BITS = 14, SHIFT = 8 * sizeof(Norm) - BITS;
    constexpr int64_t FEW = 2048;  // below this, the digit costs more than it saves
    std::vector<Key<Norm>> kept;
    wanted = slots;
    if (blocks <= FEW) {
        for (int64_t i = 0; i < blocks; ++i) kept.push_back(order_key(norms[i]));
    } else {
        std::vector<int64_t> counts(int64_t{1} << BITS);
        for (int64_t i = 0; i < blocks; ++i) ++counts[order_key(norms[i]) >> SHIFT];
        int64_t digit = (int64_t{1} << BITS) - 1;
        for (; counts[digit] < wanted; --digit) wanted -= counts[digit];
        kept.reserve(counts[digit]);
        for (int64_t i = 0; i < blocks; ++i) {
            const Key<Norm> key = order_key(norms[i]);
            if (static_cast<int64_t>(key >> SHIFT) == digit) kept.push_back(key);
        }
    }
    const auto last = kept.begin() + wanted - 1;
    std::nth_element(kept.begin(), last, kept.end(), std::greater<Key<Norm>>());
    wanted -= std::count_if(kept.begin(), last, [&](Key<Norm> key) { return key > *last; });
    return *last;
}

template <typename Norm>
void select(const Norm* norms, const Segment& segment, int64_t* chosen) {
    if (segment.slots == 0) return;
    int64_t ties;
    const Key<Norm> last = last_key(norms, segment.blocks, segment.slots, ties);
    for (int64_t i = 0, written = 0; written < segment.slots; ++i) {
        const Key<Norm> key = order_key(norms[i]);
        if (key > last || (key == last && ties-- > 0)) chosen[written++] = i;
    }
}

void select_blocks(const at::Tensor& norms, const at::Tensor& table, int64_t block_size, const at::Tensor& chosen) {
    const Totals totals = check_cpu_table(table, block_size);
    check(norms, "norms", WIDE, {totals.blocks}, at::kCPU);
    check(chosen, "chosen", LONG, {totals.slots}, at::kCPU);
    const int64_t* rows = table.const_data_ptr<int64_t>();
    int64_t* out = chosen.mutable_data_ptr<int64_t>();
    AT_DISPATCH_FLOATING_TYPES(norms.scalar_type(), "select_blocks", [&] {
        const scalar_t* squares = norms.const_data_ptr<scalar_t>();
        for_tasks(table.size(0), totals.blocks > GRAIN / 4, [&](int64_t s) {
            const Segment segment(rows, s, block_size);
            select(squares + segment.first_block, segment, out + segment.first_slot);
        });
    });
}

TORCH_LIBRARY_IMPL(thinwire, CPU, m) { m.impl("select_blocks", select_blocks); }

}  // namespace
}  // namespace thinwire
