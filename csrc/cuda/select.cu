// select_blocks: one thread block for each parameter.
#include "order.cuh"

namespace thinwire {
namespace {

template <typename Norm>
__global__ void select(const Norm* norms, Table table, int64_t* chosen) {
    for (int64_t s = blockIdx.x; s < table.segments; s += gridDim.x) {
        const Segment segment(table.rows, s, table.block_size);
        if (segment.slots == 0) continue;
        const Norm* squares = norms + segment.first_block;
        // Complements, so that the largest norm comes first.
        const auto keys = [squares](int64_t block) { return static_cast<decltype(order_key(Norm()))>(~order_key(squares[block])); };
        const Selected last = key_at<8 * sizeof(Norm), false>(keys, segment.blocks, segment.slots - 1);
        const auto sign = [&](int64_t block) {
            const uint64_t key = keys(block);
            return key < last.key ? -1 : key == last.key ? 0 : 1;
        };
        compact(segment.blocks, last.equal_before + 1, sign, segment.slots, chosen + segment.first_slot);
    }
}

}  // namespace

void launch_select(Array norms, Table table, int64_t* chosen, cudaStream_t stream) {
    visit_wide(norms.dtype, [&](auto tag) {
        using Norm = typename decltype(tag)::type;
        select<<<grid_for(table.segments, 1), THREADS, 0, stream>>>(static_cast<const Norm*>(norms.data), table,
                                                                    chosen);
    });
}

}  // namespace thinwire
