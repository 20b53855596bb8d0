// scatter_blocks_: a warp for each block of out looks it up in every rank's list and adds in rank order.
#include "common.cuh"

namespace thinwire {
namespace {

// Of the slot in which a list has the block; -1 where it has not.
__device__ int64_t find_slot(const int64_t* list, int64_t slots, int64_t block) {
    const int64_t slot = lower_bound(list, slots, block);
    return slot < slots && list[slot] == block ? slot : -1;
}

template <typename Out, typename Payload>
__global__ void scatter(const Payload* payloads, int64_t row_stride, const float* inverses, const int64_t* chosen,
                        Table table, const wide_t<Out>* factors, bool accumulate, Out* out, int64_t K, int64_t R) {
    using Wide = wide_t<Out>;
    constexpr int EACH = 4;  // elements of a lane: usual blocks need one search
    const int lane = threadIdx.x % WARP;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * WARPS;
    const Segment last(table.rows, table.segments - 1, table.block_size);
    const int64_t M = last.first_block + last.blocks;
    for (int64_t b = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP; b < M; b += warps) {
        const int64_t s = find_segment(table.rows, table.segments, FIRST_BLOCK, b);
        const Segment segment(table.rows, s, table.block_size);
        const int64_t block = b - segment.first_block, width = segment.width(block);
        Out* to = out + segment.start + block * table.block_size;
        for (int64_t first = 0; first < width; first += EACH * WARP) {
            Wide sums[EACH] = {};
            bool touched = false;
            for (int64_t ranks = 0; ranks < R; ranks += WARP) {
                // Each lane searches one rank's list; then all lanes add what was found.
                const int64_t mine = ranks + lane;
                const int64_t slot = mine < R ? find_slot(chosen + mine * K + segment.first_slot, segment.slots, block)
                                              : -1;
                for (unsigned found = __ballot_sync(~0u, slot >= 0); found; found &= found - 1) {
                    const int from = __ffs(found) - 1;
                    const int64_t rank = ranks + from;
                    const int64_t place = __shfl_sync(~0u, static_cast<long long>(slot), from) * table.block_size;
                    const Payload* row = payloads + rank * row_stride + segment.offset + place;
                    const Wide inverse = inverses ? static_cast<Wide>(inverses[rank]) : Wide(1);
                    touched = true;
#pragma unroll
                    for (int e = 0; e < EACH; ++e) {
                        const int64_t i = first + e * WARP + lane;
                        if (i < width) sums[e] = sums[e] + widen<Wide>(row[i]) * inverse;
                    }
                }
            }
            if (!touched && accumulate) continue;
#pragma unroll
            for (int e = 0; e < EACH; ++e) {
                const int64_t i = first + e * WARP + lane;
                if (i >= width) continue;
                const Wide sum = touched ? sums[e] * factors[s] : Wide(0);
                to[i] = narrow<Out>(accumulate ? widen<Wide>(to[i]) + sum : sum);
            }
        }
    }
}

}  // namespace

void launch_scatter(Array payloads, int64_t row_stride, const float* inverses, const int64_t* chosen, Table table,
                    const void* factors, bool accumulate, Array out, int64_t N, int64_t K, int64_t R,
                    cudaStream_t stream) {
    if (table.segments == 0) return;
    const int64_t most_blocks = N / table.block_size + table.segments;  // only the device knows how many there are
    visit_data(payloads.dtype, [&](auto payload_tag) {
        using Payload = typename decltype(payload_tag)::type;
        visit_data(out.dtype, [&](auto tag) {
            using Out = typename decltype(tag)::type;
            scatter<<<grid_for(most_blocks, WARPS), THREADS, 0, stream>>>(
                static_cast<const Payload*>(payloads.data), row_stride, inverses, chosen, table,
                static_cast<const wide_t<Out>*>(factors), accumulate, static_cast<Out*>(out.data), K, R);
        });
    });
}

}  // namespace thinwire
