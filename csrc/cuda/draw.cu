// draw_blocks: one thread block for each row and parameter; keys are hashed again in every pass.
#include "order.cuh"

namespace thinwire {
namespace {

constexpr int ROWS = 64;  // rows of one launch: their numbers travel as its arguments

struct Rows {
    int64_t streams[ROWS], deals[ROWS];
    int64_t count;
};

__global__ void draw(Table table, const int64_t* units, int64_t seed, int64_t step, Rows rows, int64_t K,
                     int64_t* chosen) {
    for (int64_t task = blockIdx.x; task < rows.count * table.segments; task += gridDim.x) {
        const int64_t r = task / table.segments, s = task % table.segments;
        const Segment segment(table.rows, s, table.block_size);
        const int64_t blocks = segment.blocks, slots = segment.slots;
        if (slots == 0) continue;
        const uint64_t start = key_start(seed, step, units[s], rows.streams[r]);
        const auto keys = [start](int64_t block) { return block_key(start, block); };
        const Deal deal(rows.deals[r], slots, blocks);
        // Taken are keys in [low, high) or, where the deal wraps, outside it.
        const bool wraps = deal.wrapped > 0;
        const int64_t first = wraps ? deal.wrapped : deal.first, end = wraps ? deal.first : deal.end;
        const uint64_t low = first == 0 ? 0 : key_at<64, true>(keys, blocks, first).key;
        const bool to_the_last = end == blocks;
        const uint64_t high = to_the_last ? 0 : key_at<64, true>(keys, blocks, end).key;
        const auto sign = [&](int64_t block) {
            const uint64_t key = keys(block);
            const bool inside = key >= low && (to_the_last || key < high);
            return inside != wraps ? -1 : 1;
        };
        compact(blocks, 0, sign, slots, chosen + r * K + segment.first_slot);
    }
}

}  // namespace

void launch_draw(Table table, const int64_t* units, int64_t seed, int64_t step, const int64_t* streams,
                 const int64_t* deals, int64_t R, int64_t K, int64_t* chosen, cudaStream_t stream) {
    for (int64_t first = 0; first < R; first += ROWS) {
        Rows rows;
        rows.count = R - first < ROWS ? R - first : ROWS;
        for (int64_t r = 0; r < rows.count; ++r) {
            rows.streams[r] = streams[first + r];
            rows.deals[r] = deals[first + r];
        }
        draw<<<grid_for(rows.count * table.segments, 1), THREADS, 0, stream>>>(table, units, seed, step, rows, K,
                                                                             chosen + first * K);
    }
}

}  // namespace thinwire
