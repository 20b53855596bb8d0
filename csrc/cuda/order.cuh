// Order statistics of keys, of all parameters together: a radix select, digit by digit, in which many thread blocks
// share a large parameter, and the compaction that keeps what was selected in order.
//
// A *task* is one parameter, for one row of results; it asks for the keys at one or two positions of its ascending
// order, each a *query*. A problem says what a task's keys are and what it asks:
//     QUERIES        1 or 2 a task
//     BITS           in a key
//     DISTINCT       no two keys of a task are equal
//     COLLIDING      keys have few different digits, so that counting them one by one would make threads wait
//     keys(row, s, segment)              a function from a block of the parameter to its key
//     ask(row, s, segment, ranks)        sets its queries' position and flags
// Tasks have the index row * segments + s, a grid's y is the row.
#pragma once
#include "scan.cuh"

namespace thinwire {

constexpr int DIGIT = 8, DIGITS = 1 << DIGIT;
static_assert(DIGITS == THREADS, "each thread has one counter");

enum RankFlag : int32_t { SETTLED = 1, BEYOND = 2, OUTSIDE = 4 };

// A query: first the position that is asked for, with the leading digits known so far; when settled the key.
struct Rank {
    uint64_t key;
    int64_t position;  // among the keys that share the digits; settled, the number of equal keys before it
    int32_t flags;     // BEYOND: the position is the one after the last. OUTSIDE: keys outside the two are wanted
};

struct OrderScratch {
    Rank* ranks;                 // [queries, tasks]
    unsigned long long* counts;  // [queries, tasks, DIGITS]
    unsigned* arrived;           // [queries, tasks]
    int64_t *below, *equal;      // [rows, tiles]: wanted keys in each tile; then, in the tiles before it
    int64_t bytes;

    OrderScratch(void* memory, int64_t segments, int64_t rows, int64_t queries);
};

// A parameter's blocks are cut into tiles of equal length, which every tile of the tensor has.
struct Tiles {
    static constexpr int64_t MOST = 1024;      // and one more for each parameter
    static constexpr int64_t SHORTEST = 2048;  // blocks
    Divider length;

    __device__ explicit Tiles(const Table& table) : length(length_for(table)) {}

    __device__ static int64_t length_for(const Table& table) {
        const Segment last = segment_of(table, table.segments - 1);
        const int64_t needed = (last.first_block + last.blocks + MOST - 1) / MOST;
        return needed > SHORTEST ? needed : SHORTEST;
    }

    // The number of a parameter's first tile. Its tiles end before the next one's first.
    __device__ int64_t first(const Table& table, int64_t s) const {
        return length.quotient(table.rows[s * COLUMNS + FIRST_BLOCK]) + s;
    }

    __device__ int64_t of(const Segment& segment) const { return length.rounded_up(segment.blocks); }

    // Calls visit(tile, s, segment, part, begin, end) for every tile, with all threads of a block.
    template <typename Visit>
    __device__ void each(const Table& table, const Visit& visit) const {
        for (int64_t tile = blockIdx.x; tile < MOST + table.segments; tile += gridDim.x) {
            int64_t low = 0, high = table.segments;
            while (high - low > 1) {
                const int64_t middle = low + (high - low) / 2;
                if (first(table, middle) <= tile) low = middle;
                else high = middle;
            }
            const Segment segment = segment_of(table, low);
            const int64_t part = tile - first(table, low), begin = part * static_cast<int64_t>(length.divisor);
            const int64_t next = begin + static_cast<int64_t>(length.divisor);
            const int64_t end = next < segment.blocks ? next : segment.blocks;
            if (begin < end) visit(tile, low, segment, part, begin, end);
        }
    }
};

inline OrderScratch::OrderScratch(void* memory, int64_t segments, int64_t rows, int64_t queries) {
    const int64_t asked = queries * rows * segments, tiles = rows * (Tiles::MOST + segments);
    Cutter cutter(memory);
    ranks = cutter.take<Rank>(asked);
    counts = cutter.take<unsigned long long>(asked * DIGITS);
    arrived = cutter.take<unsigned>(asked);
    below = cutter.take<int64_t>(tiles);
    equal = cutter.take<int64_t>(tiles);
    bytes = cutter.bytes();
}

template <typename Problem>
__global__ void ask(Problem problem, Table table, OrderScratch scratch) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * THREADS;
    for (int64_t s = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; s < table.segments; s += stride) {
        const int64_t task = blockIdx.y * table.segments + s;
        problem.ask(blockIdx.y, s, segment_of(table, s), scratch.ranks + task * Problem::QUERIES);
    }
}

// Adds one to the counter of each thread's digit; with COLLIDING, once for all threads of a warp that have the same.
template <bool COLLIDING>
__device__ void count_digit(unsigned* counts, int digit, bool counted) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 700
    if constexpr (COLLIDING) {
        const unsigned same = __match_any_sync(~0u, counted ? digit : -1);
        if (counted && (same & ((1u << threadIdx.x % WARP) - 1)) == 0) atomicAdd(counts + digit, __popc(same));
        return;
    }
#endif
    if (counted) atomicAdd(counts + digit, 1u);
}

// One more digit of every query that is not settled. A parameter of one tile gets all of them at once.
template <typename Problem>
__global__ void narrow_ranks(Problem problem, Table table, OrderScratch scratch, int first_shift) {
    __shared__ unsigned counts[DIGITS];
    const int64_t row = blockIdx.y / Problem::QUERIES, which = blockIdx.y % Problem::QUERIES;
    const Tiles tiles(table);
    tiles.each(table, [&](int64_t, int64_t s, const Segment& segment, int64_t, int64_t begin, int64_t end) {
        const int64_t query = (row * table.segments + s) * Problem::QUERIES + which, parts = tiles.of(segment);
        const auto keys = problem.keys(row, s, segment);
        unsigned long long* const totals = scratch.counts + query * DIGITS;
        volatile Rank* const asked = scratch.ranks + query;
        for (int shift = first_shift; shift >= 0; shift -= DIGIT) {
            if (asked->flags & SETTLED) break;
            const uint64_t prefix = asked->key;
            counts[threadIdx.x] = 0;
            __syncthreads();
            for (int64_t first = begin; first < end; first += THREADS) {
                const int64_t i = first + threadIdx.x;
                const uint64_t key = i < end ? keys(i) : 0;
                // Two shifts: one by 64 would be undefined.
                count_digit<Problem::COLLIDING>(counts, static_cast<int>((key >> shift) % DIGITS),
                                                i < end && (key >> shift >> DIGIT) == prefix);
            }
            __syncthreads();
            const unsigned long long mine = counts[threadIdx.x];
            if (mine) atomicAdd(totals + threadIdx.x, mine);
            if (!comes_last(scratch.arrived + query, parts)) break;
            // Each thread has a digit; one of them has the position.
            int64_t all;
            const int64_t count = atomicExch(totals + threadIdx.x, 0ull), position = asked->position;
            const int64_t before = sum_before(count, all);  // after which all have read the position
            if (before <= position && position < before + count) {
                const uint64_t key = prefix << DIGIT | threadIdx.x;
                const bool settled = shift == 0 || (Problem::DISTINCT && position == before);
                asked->key = settled ? key << shift : key;
                asked->position = position - before;
                if (settled) asked->flags = asked->flags | SETTLED;
            }
            __syncthreads();
            if (parts > 1) break;
        }
    });
}

// Which keys a task wants: those in [low, high) or outside, and the first `ties` of those that equal high.
struct Wanted {
    uint64_t low, high;
    int64_t ties;
    bool to_the_last, outside;

    // 2 for a key that is wanted, 1 for one that ties, 0 for others.
    __device__ int operator()(uint64_t key) const {
        const bool inside = key >= low && (to_the_last || key < high);
        return inside != outside ? 2 : ties > 0 && key == high ? 1 : 0;
    }
};

template <typename Problem>
__device__ Wanted wanted(const Rank* ranks) {
    const Rank& last = ranks[Problem::QUERIES - 1];
    const bool to_the_last = last.flags & BEYOND;
    if (Problem::QUERIES == 1) return {0, last.key, to_the_last ? 0 : last.position + 1, to_the_last, false};
    return {ranks[0].key, last.key, 0, to_the_last, (last.flags & OUTSIDE) != 0};
}

// How many wanted keys and ties are in each tile, and then in all tiles of the task before it.
template <typename Problem>
__global__ void count_wanted(Problem problem, Table table, OrderScratch scratch) {
    const int64_t row = blockIdx.y, rows_before = row * (Tiles::MOST + table.segments);
    volatile int64_t* const below = scratch.below + rows_before;
    volatile int64_t* const equal = scratch.equal + rows_before;
    const Tiles tiles(table);
    tiles.each(table, [&](int64_t tile, int64_t s, const Segment& segment, int64_t part, int64_t begin, int64_t end) {
        if (segment.slots == 0) return;
        const int64_t task = row * table.segments + s, parts = tiles.of(segment), first = tile - part;
        const Wanted is_wanted = wanted<Problem>(scratch.ranks + task * Problem::QUERIES);
        const auto keys = problem.keys(row, s, segment);
        int64_t my_below = 0, my_equal = 0, all_below, all_equal;
        for (int64_t i = begin + threadIdx.x; i < end; i += THREADS) {
            const int which = is_wanted(keys(i));
            my_below += which == 2, my_equal += which == 1;
        }
        sum_before(my_below, all_below), sum_before(my_equal, all_equal);
        if (threadIdx.x == 0) below[tile] = all_below, equal[tile] = all_equal;
        if (!comes_last(scratch.arrived + task * Problem::QUERIES, parts)) return;
        int64_t below_before = 0, equal_before = 0;
        for (int64_t from = 0; from < parts; from += THREADS) {
            const int64_t i = first + from + threadIdx.x;
            const bool exists = from + threadIdx.x < parts;
            const int64_t its_below = sum_before(exists ? below[i] : 0, all_below);
            const int64_t its_equal = sum_before(exists ? equal[i] : 0, all_equal);
            if (exists) below[i] = below_before + its_below, equal[i] = equal_before + its_equal;
            below_before += all_below, equal_before += all_equal;
        }
    });
}

// Writes the blocks of wanted keys, ascending, and those of ties as long as some are wanted.
template <typename Problem>
__global__ void write_wanted(Problem problem, Table table, OrderScratch scratch, int64_t* __restrict__ chosen,
                             int64_t K) {
    __shared__ int below[WARPS], equal[WARPS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int64_t row = blockIdx.y, rows_before = row * (Tiles::MOST + table.segments);
    const Tiles tiles(table);
    tiles.each(table, [&](int64_t tile, int64_t s, const Segment& segment, int64_t, int64_t begin, int64_t end) {
        if (segment.slots == 0) return;
        const Wanted is_wanted = wanted<Problem>(scratch.ranks + (row * table.segments + s) * Problem::QUERIES);
        const auto keys = problem.keys(row, s, segment);
        int64_t below_before = scratch.below[rows_before + tile], equal_before = scratch.equal[rows_before + tile];
        for (int64_t first = begin; first < end; first += THREADS) {
            const int64_t i = first + threadIdx.x;
            const int which = i < end ? is_wanted(keys(i)) : 0;
            const unsigned below_mask = __ballot_sync(~0u, which == 2), equal_mask = __ballot_sync(~0u, which == 1);
            if (lane == 0) below[warp] = __popc(below_mask), equal[warp] = __popc(equal_mask);
            __syncthreads();
            int64_t my_below = below_before + __popc(below_mask & ((1u << lane) - 1));
            int64_t my_equal = equal_before + __popc(equal_mask & ((1u << lane) - 1));
            for (int w = 0; w < WARPS; ++w) {
                if (w < warp) my_below += below[w], my_equal += equal[w];
                below_before += below[w], equal_before += equal[w];
            }
            const int64_t place = my_below + (my_equal < is_wanted.ties ? my_equal : is_wanted.ties);
            if ((which == 2 || (which == 1 && my_equal < is_wanted.ties)) && place < segment.slots &&
                segment.first_slot + place < K) {
                chosen[row * K + segment.first_slot + place] = i;
            }
            __syncthreads();
        }
    });
}

// Everything above, in order. passes: how many digits may be needed by parameters of several tiles.
template <typename Problem>
void find_in_order(Queue& queue, const Problem& problem, Table table, OrderScratch scratch, int64_t rows, int passes,
                   int64_t* chosen, int64_t K) {
    const unsigned y = static_cast<unsigned>(rows);
    const unsigned x = grid_for(Tiles::MOST / 4 + table.segments, 1);
    queue.clear(scratch.ranks, scratch.bytes);
    queue.launch(ask<Problem>, dim3(grid_for(table.segments, THREADS), y), problem, table, scratch);
    for (int pass = 1; pass <= passes; ++pass) {
        queue.launch(narrow_ranks<Problem>, dim3(x, y * Problem::QUERIES), problem, table, scratch,
                     Problem::BITS - pass * DIGIT);
    }
    queue.launch(count_wanted<Problem>, dim3(x, y), problem, table, scratch);
    queue.launch(write_wanted<Problem>, dim3(x, y), problem, table, scratch, chosen, K);
}

}  // namespace thinwire
