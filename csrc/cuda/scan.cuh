// Sums over the threads of a block, and who of the blocks that share a task ends it.
#pragma once
#include "common.cuh"

namespace thinwire {

// The sum of the values of all threads before this one; total becomes that of all.
__device__ inline int64_t sum_before(int64_t value, int64_t& total) {
    __shared__ long long sums[WARPS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    long long sum = value;
    for (int step = 1; step < WARP; step *= 2) {
        const long long other = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) sum += other;
    }
    if (lane == WARP - 1) sums[warp] = sum;
    __syncthreads();
    int64_t before = 0;
    total = 0;
    for (int w = 0; w < WARPS; ++w) {
        if (w < warp) before += sums[w];
        total += sums[w];
    }
    __syncthreads();  // the next call writes sums
    return before + sum - value;
}

// All threads of `blocks` thread blocks call this when their share of a task is done: true for those of the block that
// comes last, which sees what the others wrote. arrived begins and ends at zero.
__device__ inline bool comes_last(unsigned* arrived, int64_t blocks) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(arrived, 1u) == blocks - 1;
        if (last) *arrived = 0;
    }
    __syncthreads();
    if (last) __threadfence();
    return last;
}

}  // namespace thinwire
