// draw_blocks: the two ends of what a deal takes of the order of hashed keys, which are hashed again in every pass.
#include "order.cuh"

namespace thinwire {
namespace {

constexpr int ROWS = 16;  // of one launch: their numbers travel as its arguments

struct Drawn {
    static constexpr int QUERIES = 2, BITS = 64;
    static constexpr bool DISTINCT = true, COLLIDING = false;
    const int64_t* units;
    int64_t seed, step;
    int64_t streams[ROWS], deals[ROWS];

    __device__ auto keys(int64_t row, int64_t s, const Segment&) const {
        const uint64_t start = key_start(seed, step, units[s], streams[row]);
        return [start](int64_t block) { return block_key(start, block); };
    }

    // Taken are the keys in [low, high) or, where the deal wraps, those outside.
    __device__ void ask(int64_t row, int64_t, const Segment& segment, Rank* ranks) const {
        ranks[0].flags = ranks[1].flags = SETTLED;
        if (segment.slots == 0) return;
        const Deal deal(deals[row], segment.slots, segment.blocks);
        const bool wraps = deal.wrapped > 0;
        ranks[0].position = wraps ? deal.wrapped : deal.first;
        ranks[1].position = wraps ? deal.first : deal.end;
        ranks[0].flags = ranks[0].position == 0 ? SETTLED : 0;
        ranks[1].flags = (ranks[1].position == segment.blocks ? SETTLED | BEYOND : 0) | (wraps ? OUTSIDE : 0);
    }
};

int64_t rows_at_once(int64_t R) { return R < ROWS ? R : ROWS; }

}  // namespace

int64_t draw_scratch(Table table, int64_t R) {
    return OrderScratch(nullptr, table.segments, rows_at_once(R), Drawn::QUERIES).bytes;
}

cudaError_t launch_draw(Table table, const int64_t* units, int64_t seed, int64_t step, const int64_t* streams,
                        const int64_t* deals, int64_t R, int64_t K, int64_t* chosen, void* scratch,
                        cudaStream_t stream) {
    Queue queue(stream);
    if (table.segments == 0) return queue.error();
    for (int64_t first = 0; first < R; first += ROWS) {
        Drawn drawn{units, seed, step, {}, {}};
        const int64_t rows = rows_at_once(R - first);
        for (int64_t r = 0; r < rows; ++r) drawn.streams[r] = streams[first + r], drawn.deals[r] = deals[first + r];
        find_in_order(queue, drawn, table, OrderScratch(scratch, table.segments, rows, Drawn::QUERIES), rows,
                      Drawn::BITS / DIGIT, chosen + first * K, K);
    }
    return queue.error();
}

}  // namespace thinwire
