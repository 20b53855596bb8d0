// add_rows_: a warp for each slot adds the owner's values to the block; each block has one writer.
#include "common.cuh"

namespace thinwire {
namespace {

template <typename Wide>
__global__ void add_rows(const Wide* __restrict__ values, const int64_t* __restrict__ places, int64_t first,
                         const int64_t* __restrict__ chosen, Table table, Wide factor,
                         const int32_t* __restrict__ bad, Wide* __restrict__ out, int64_t Q, int64_t K, int64_t N) {
    if (*bad != 0) return;
    for_slots(table, chosen, K, N, UNBOUNDED, [&](const Slot& slot, int lane) {
        const int64_t place = places[slot.k];
        if (place < first || place - first >= Q) return;
        const Wide* const from = values + (place - first) * table.block_size;
        Wide* const to = out + slot.segment.start + slot.block * table.block_size;
        for_pieces(slot.segment.width(slot.block), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin + lane; i < end; i += WARP) to[i] += factor * from[i];
        });
    });
}

}  // namespace

cudaError_t launch_add_rows(Array values, const int64_t* places, int64_t first, const int64_t* chosen, Table table,
                            double factor, const int32_t* bad, Array out, int64_t K, cudaStream_t stream) {
    Queue queue(stream);
    visit_wide(out.dtype, [&](auto tag) {
        using Wide = typename decltype(tag)::type;
        queue.launch(add_rows<Wide>, grid_for_pieces(K, table.block_size), static_cast<const Wide*>(values.data),
                     places, first, chosen, table, factor, bad, static_cast<Wide*>(out.data),
                     values.size / table.block_size, K, out.size);
    });
    return queue.error();
}

}  // namespace thinwire
