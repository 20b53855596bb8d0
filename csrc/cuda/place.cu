// place_slots: how many slots each rank owns before each parameter, and then every slot's place by itself.
#include "scan.cuh"

namespace thinwire {
namespace {

// A thread block for each rank: before[s * ranks + rank].
__global__ void count_before(Table table, const int64_t* __restrict__ turns, Divider by_ranks,
                             int64_t* __restrict__ before) {
    const int64_t ranks = static_cast<int64_t>(by_ranks.divisor);
    for (int64_t rank = blockIdx.x; rank < ranks; rank += gridDim.x) {
        int64_t earlier = 0;
        for (int64_t from = 0; from < table.segments; from += THREADS) {
            const int64_t s = from + threadIdx.x;
            int64_t owned = 0, all;
            if (s < table.segments) {
                const int64_t slots = table.rows[s * COLUMNS + SLOTS], turn = turns[s];
                const int64_t each = by_ranks.quotient(slots), rest = slots - each * ranks;
                const int64_t nth = rank >= turn ? rank - turn : rank - turn + ranks;  // of the parameter's owners
                owned = each + (nth < rest);
            }
            const int64_t sum = earlier + sum_before(owned, all);
            earlier += all;
            if (s < table.segments) before[s * ranks + rank] = sum;
        }
    }
}

__global__ void place(Table table, const int64_t* __restrict__ turns, Divider by_ranks, int64_t row_slots,
                      const int64_t* __restrict__ before, int64_t* __restrict__ places, int64_t C) {
    const int64_t ranks = static_cast<int64_t>(by_ranks.divisor);
    const int64_t stride = static_cast<int64_t>(gridDim.x) * THREADS;
    for (int64_t k = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; k < C; k += stride) {
        int64_t place = INT64_MAX;
        if (table.segments > 0) {
            const int64_t s = find_segment(table.rows, table.segments, FIRST_SLOT, k);
            const int64_t slot = k - table.rows[s * COLUMNS + FIRST_SLOT], turn = turns[s];
            if (slot < table.rows[s * COLUMNS + SLOTS] && turn >= 0 && turn < ranks) {
                const int64_t round = by_ranks.quotient(slot);
                int64_t owner = turn + slot - round * ranks;
                if (owner >= ranks) owner -= ranks;
                const int64_t column = before[s * ranks + owner] + round;
                if (column < row_slots) place = owner * row_slots + column;
            }
        }
        places[k] = place;
    }
}

}  // namespace

int64_t place_scratch(int64_t S, int64_t ranks) {
    Cutter cutter(nullptr);
    cutter.take<int64_t>(S * ranks);
    return cutter.bytes();
}

cudaError_t launch_place(Table table, const int64_t* turns, int64_t ranks, int64_t row_slots, int64_t* places,
                         int64_t C, void* scratch, cudaStream_t stream) {
    Queue queue(stream);
    int64_t* const before = Cutter(scratch).take<int64_t>(table.segments * ranks);
    const Divider by_ranks(ranks);
    queue.launch(count_before, grid_for(ranks - 1, 1), table, turns, by_ranks, before);
    queue.launch(place, grid_for(C, THREADS), table, turns, by_ranks, row_slots, before, places, C);
    return queue.error();
}

}  // namespace thinwire
