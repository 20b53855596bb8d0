// scatter_blocks_: out is cleared, then a warp goes from slot to slot. Where several ranks sent a block, the lowest of
// them has the slot that writes it, and adds all of theirs in rank order.
#include "common.cuh"

namespace thinwire {
namespace {

// The slot in which a list has the block; -1 where it has not. Ranks that agree have it where this one does.
__device__ int64_t find_slot(const int64_t* list, int64_t slots, int64_t block, int64_t guess) {
    if (list[guess] == block) return guess;
    const int64_t slot = lower_bound(list, slots, block);
    return slot < slots && list[slot] == block ? slot : -1;
}

template <typename Payload>
struct Senders {
    const Payload* payloads;
    const float* inverses;
    const int64_t* chosen;
    int64_t P, row_stride, K, R;
};

// A team of lanes, one for each rank and a power of two of them, looks up one slot; a warp has 32 / team of them.
// Beyond 32 ranks the warp looks up 32 at a time, and again for each stretch of a long block.
template <typename Out, typename Payload>
__global__ void scatter(Senders<Payload> from, Table table, const wide_t<Out>* __restrict__ factors, bool accumulate,
                        Out* __restrict__ out, int64_t N, int team, Divider by_K) {
    using Wide = wide_t<Out>;
    constexpr int EACH = 4;  // elements of a lane: usual blocks need one stretch
    const int lane = threadIdx.x % WARP, teams = WARP / team;
    const unsigned whole_team = team == WARP ? ~0u : (1u << team) - 1;
    const int64_t total = from.R * from.K, stride = static_cast<int64_t>(gridDim.x) * WARPS * teams;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP;
    for (int64_t first = warp * teams; first < total; first += stride) {
        // What this lane's team looks up: slot k of rank r.
        const int64_t item = first + lane / team < total ? first + lane / team : total - 1;
        const int64_t r = by_K.quotient(item), k = item - r * from.K;
        const int64_t s = find_segment(table.rows, table.segments, FIRST_SLOT, k);
        const Segment mine = segment_of(table, s);
        const int64_t slot = k - mine.first_slot, listed = from.chosen[item];
        const bool exists = slot < mine.slots && mine.first_slot + mine.slots <= from.K && listed >= 0 &&
                            listed < mine.blocks && mine.offset + mine.payload() <= from.P &&
                            mine.start + mine.numel <= N;
        const long long block_of_team = exists ? listed : -1;
        const auto look_up = [&](const Segment& segment, int64_t block, int64_t rank, int64_t guess) -> long long {
            if (rank >= from.R || block < 0) return -1;
            return find_slot(from.chosen + rank * from.K + segment.first_slot, segment.slots, block, guess);
        };
        const long long found_at_first = look_up(mine, block_of_team, lane % team, exists ? slot : 0);

        for (int t = 0; t < teams && first + t < total; ++t) {
            const int64_t block = __shfl_sync(~0u, block_of_team, t * team);
            if (block < 0) continue;
            const int64_t its_s = __shfl_sync(~0u, static_cast<long long>(s), t * team);
            const int64_t its_rank = __shfl_sync(~0u, static_cast<long long>(r), t * team);
            const int64_t its_slot = __shfl_sync(~0u, static_cast<long long>(slot), t * team);
            const Segment segment = segment_of(table, its_s);
            // Of the ranks from `ranks` on: which have the block, as bits, and in `found` this lane's slot.
            const auto senders = [&](int64_t ranks, long long& found) {
                if (ranks == 0) {
                    found = __shfl_sync(~0u, found_at_first, t * team + lane % team);
                } else {
                    found = look_up(segment, block, ranks + lane, its_slot);
                }
                return __ballot_sync(~0u, found >= 0) & whole_team;
            };
            bool written_by_lower = false;
            for (int64_t ranks = 0; ranks <= its_rank && !written_by_lower; ranks += WARP) {
                long long found;
                const unsigned have = senders(ranks, found);
                written_by_lower = its_rank - ranks < WARP ? have & ((1u << (its_rank - ranks)) - 1) : have != 0;
            }
            if (written_by_lower) continue;

            const int64_t width = segment.width(block);
            Out* const to = out + segment.start + block * table.block_size;
            for (int64_t stretch = 0; stretch < width; stretch += EACH * WARP) {
                Wide sums[EACH] = {};
                for (int64_t ranks = 0; ranks < from.R; ranks += WARP) {
                    long long found;
                    for (unsigned have = senders(ranks, found); have; have &= have - 1) {
                        const int one = __ffs(have) - 1;
                        const int64_t place = segment.offset + __shfl_sync(~0u, found, one) * table.block_size;
                        const Payload* const row = from.payloads + (ranks + one) * from.row_stride + place;
                        const Wide inverse = from.inverses ? static_cast<Wide>(from.inverses[ranks + one]) : Wide(1);
#pragma unroll
                        for (int e = 0; e < EACH; ++e) {
                            const int64_t i = stretch + e * WARP + lane;
                            if (i < width) sums[e] = sums[e] + widen<Wide>(row[i]) * inverse;
                        }
                    }
                }
#pragma unroll
                for (int e = 0; e < EACH; ++e) {
                    const int64_t i = stretch + e * WARP + lane;
                    if (i >= width) continue;
                    const Wide sum = sums[e] * factors[its_s];
                    to[i] = narrow<Out>(accumulate ? widen<Wide>(to[i]) + sum : sum);
                }
            }
        }
    }
}

}  // namespace

cudaError_t launch_scatter(Array payloads, int64_t P, int64_t row_stride, const float* inverses, const int64_t* chosen,
                           Table table, const void* factors, bool accumulate, Array out, int64_t K, int64_t R,
                           cudaStream_t stream) {
    Queue queue(stream);
    if (!accumulate) queue.clear(out.data, out.size * size_of(out.dtype));
    if (K == 0 || R == 0 || table.segments == 0) return queue.error();
    int team = 1;  // or more lanes than it needs, where slots are so few that each can have a warp
    while (team < WARP && (team < R || K * R * team < BUSY * WARP)) team *= 2;
    visit_data(payloads.dtype, [&](auto payload_tag) {
        using Payload = typename decltype(payload_tag)::type;
        const Senders<Payload> from{static_cast<const Payload*>(payloads.data), inverses, chosen, P, row_stride, K, R};
        visit_data(out.dtype, [&](auto tag) {
            using Out = typename decltype(tag)::type;
            queue.launch(scatter<Out, Payload>, grid_for(K * R, WARPS * WARP / team), from, table,
                         static_cast<const wide_t<Out>*>(factors), accumulate, static_cast<Out*>(out.data), out.size,
                         team, Divider(K));
        });
    });
    return queue.error();
}

}  // namespace thinwire
