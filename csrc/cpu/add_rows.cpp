// add_rows_: an owner's sums go to the blocks that it owns.
#include "rows.h"

namespace thinwire {

#define THINWIRE_ADD_TIMES(Wide)                                                                         \
    THINWIRE_CLONES void add_times(const Wide* values, int64_t count, Wide factor, Wide* out) {          \
        for (int64_t i = 0; i < count; ++i) out[i] += factor * values[i];                                \
    }
THINWIRE_ADD_TIMES(float)
THINWIRE_ADD_TIMES(double)

namespace {

void add_rows_(const at::Tensor& values, const at::Tensor& places, int64_t first, const at::Tensor& chosen,
               const at::Tensor& table, int64_t block_size, double factor, const at::Tensor& bad,
               const at::Tensor& out) {
    const Totals totals = check_cpu_table(table, block_size);
    check(out, "out", WIDE, {totals.elements}, at::kCPU);
    check(values, "values", {out.scalar_type()}, {ANY}, at::kCPU);
    THINWIRE_CHECK(values.numel() % block_size == 0, "values is ", values.sizes(),
                   "; allowed are blocks of block_size ", block_size);
    const int64_t owned = values.numel() / block_size;
    const int64_t* lie_at = check_list(places, "places", totals.slots);
    const int64_t* blocks = check_chosen_list(chosen, table, block_size, totals.slots);
    check(bad, "bad", INT, {1}, at::kCPU);
    if (*bad.const_data_ptr<int32_t>() != 0) return;
    AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "add_rows_", [&] {
        const scalar_t* from = values.const_data_ptr<scalar_t>();
        scalar_t* to = out.mutable_data_ptr<scalar_t>();
        const auto work = [&](int64_t, const Segment& segment, int64_t low, int64_t high) {
            for (int64_t j = low; j < high; ++j) {
                const int64_t k = segment.first_slot + j, block = blocks[k];
                if (lie_at[k] < first || lie_at[k] - first >= owned) continue;
                add_times(from + (lie_at[k] - first) * block_size, segment.width(block), static_cast<scalar_t>(factor),
                          to + segment.start + block * block_size);
            }
        };
        at::parallel_for(0, totals.slots, block_grain(block_size), [&](int64_t begin, int64_t end) {
            for_segments(table, block_size, FIRST_SLOT, begin, end, work);
        });
    });
}

TORCH_LIBRARY_IMPL(thinwire, CPU, m) { m.impl("add_rows_", add_rows_); }

}  // namespace
}  // namespace thinwire
