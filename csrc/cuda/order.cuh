// Order statistics by one thread block: a radix select, and the compaction that keeps what was selected in order.
#pragma once
#include "common.cuh"

namespace thinwire {

struct Selected {
    uint64_t key;          // the key at the wanted position of the ascending order
    int64_t equal_before;  // how many equal keys precede that position
};

// keys(i) gives an unsigned key of BITS bits for i in [0, count). Distinct keys allow an early end: then key is only
// a bound, with as many keys below it as the position says.
template <int BITS, bool DISTINCT, typename Keys>
__device__ Selected key_at(const Keys& keys, int64_t count, int64_t position) {
    constexpr int DIGIT = 8, DIGITS = 1 << DIGIT;
    static_assert(DIGITS == THREADS, "each thread clears one counter");
    // Parameters of more than 2^32 blocks would overflow 32 bits.
    __shared__ unsigned long long counts[DIGITS];
    __shared__ uint64_t shared_prefix;
    __shared__ int64_t shared_position;
    uint64_t prefix = 0;
    for (int shift = BITS - DIGIT; shift >= 0; shift -= DIGIT) {
        counts[threadIdx.x] = 0;
        __syncthreads();
        for (int64_t i = threadIdx.x; i < count; i += THREADS) {
            const uint64_t key = keys(i);
            // Two shifts: one by 64 would be undefined.
            if ((key >> shift >> DIGIT) == prefix) atomicAdd(&counts[(key >> shift) % DIGITS], 1ull);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int digit = 0;
            for (; static_cast<int64_t>(counts[digit]) <= position; ++digit) position -= counts[digit];
            shared_prefix = prefix << DIGIT | digit;
            shared_position = position;
        }
        __syncthreads();
        prefix = shared_prefix;
        position = shared_position;
        if (DISTINCT && position == 0) return {prefix << shift, 0};
    }
    return {prefix, position};
}

// Writes, ascending, every i in [0, count) for which sign(i) < 0 and the first `ties` of those for which it is 0.
template <typename Sign>
__device__ void compact(int64_t count, int64_t ties, const Sign& sign, int64_t slots, int64_t* chosen) {
    __shared__ int64_t below[WARPS], equal[WARPS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int64_t below_before = 0, equal_before = 0;
    for (int64_t first = 0; first < count; first += THREADS) {
        const int64_t i = first + threadIdx.x;
        const int which = i < count ? sign(i) : 1;
        const unsigned below_mask = __ballot_sync(~0u, which < 0), equal_mask = __ballot_sync(~0u, which == 0);
        if (lane == 0) below[warp] = __popc(below_mask), equal[warp] = __popc(equal_mask);
        __syncthreads();
        int64_t my_below = below_before + __popc(below_mask & ((1u << lane) - 1));
        int64_t my_equal = equal_before + __popc(equal_mask & ((1u << lane) - 1));
        for (int w = 0; w < WARPS; ++w) {
            if (w < warp) my_below += below[w], my_equal += equal[w];
            below_before += below[w], equal_before += equal[w];
        }
        const int64_t place = my_below + (my_equal < ties ? my_equal : ties);
        if ((which < 0 || (which == 0 && my_equal < ties)) && place < slots) chosen[place] = i;
        __syncthreads();
    }
}

}  // namespace thinwire
