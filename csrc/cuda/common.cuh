// Helpers of the CUDA operators. They are compiled with -fmad=false: no multiply-add is fused.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../block_ops.h"
#include "launch.h"

namespace thinwire {

constexpr int THREADS = 256;
constexpr int WARP = 32;
constexpr int WARPS = THREADS / WARP;
constexpr int64_t TILE = 16 * THREADS;  // elements that a thread block handles at a time

// Thread blocks for so many items; loops stride over the grid, so its size is only a matter of speed.
inline unsigned grid_for(int64_t items, int64_t items_a_block) {
    constexpr int64_t MOST = 1 << 15;
    const int64_t wanted = items / items_a_block + 1;
    return static_cast<unsigned>(wanted < MOST ? wanted : MOST);
}

template <typename T>
struct Tag {
    using type = T;
};

template <typename Visit>
void visit_wide(Dtype dtype, const Visit& visit) {
    if (dtype == Dtype::F64) visit(Tag<double>());
    else visit(Tag<float>());
}

template <typename Visit>
void visit_data(Dtype dtype, const Visit& visit) {
    switch (dtype) {
        case Dtype::F32: return visit(Tag<float>());
        case Dtype::F64: return visit(Tag<double>());
        case Dtype::BF16: return visit(Tag<__nv_bfloat16>());
        case Dtype::F16: return visit(Tag<__half>());
    }
}

// The type in which values are added.
template <typename T>
struct WideOf {
    using type = float;
};
template <>
struct WideOf<double> {
    using type = double;
};
template <typename T>
using wide_t = typename WideOf<T>::type;

// By intrinsics: PyTorch's builds forbid the implicit conversions of 16-bit types.
__device__ inline float widen_16(__half value) { return __half2float(value); }
__device__ inline float widen_16(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename Wide, typename T>
__device__ Wide widen(T value) {
    if constexpr (sizeof(T) >= 4) return static_cast<Wide>(value);
    else return static_cast<Wide>(widen_16(value));
}

// double goes to 16 bits by way of float, as in torch.
template <typename T, typename Wide>
__device__ T narrow(Wide value) {
    return static_cast<T>(value);
}
template <>
__device__ inline __half narrow<__half, float>(float value) { return __float2half_rn(value); }
template <>
__device__ inline __half narrow<__half, double>(double value) { return __float2half_rn(static_cast<float>(value)); }
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16, float>(float value) { return __float2bfloat16_rn(value); }
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16, double>(double value) {
    return __float2bfloat16_rn(static_cast<float>(value));
}

// False for NaN too.
template <typename Wide>
__device__ bool is_usable(Wide value) {
    return abs(value) <= LARGEST<Wide>;
}

template <typename Wide>
__device__ Wide usable_or_zero(Wide value) {
    return is_usable(value) ? value : Wide(0);
}

// Calls visit(s, segment, begin, end) for the elements [begin, end) of each parameter that meets a tile, with all
// threads of the block together; begin and end count from the start of the flat tensor.
template <typename Visit>
__device__ void for_tiles(Table table, int64_t N, const Visit& visit) {
    for (int64_t tile = blockIdx.x * TILE; tile < N; tile += gridDim.x * TILE) {
        const int64_t end = tile + TILE < N ? tile + TILE : N;
        for (int64_t s = find_segment(table.rows, table.segments, START, tile); s < table.segments; ++s) {
            const Segment segment(table.rows, s, table.block_size);
            if (segment.start >= end) break;
            const int64_t from = segment.start > tile ? segment.start : tile;
            const int64_t last = segment.start + segment.numel;
            const int64_t to = last < end ? last : end;
            if (from < to) visit(s, segment, from, to);
        }
    }
}

// Calls visit(s, segment, slot, block, lane) for every slot, a warp for each; blocks that do not exist are skipped.
template <typename Visit>
__device__ void for_slots(Table table, const int64_t* chosen, int64_t K, const Visit& visit) {
    const int64_t warps = static_cast<int64_t>(gridDim.x) * WARPS;
    for (int64_t k = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP; k < K; k += warps) {
        const int64_t s = find_segment(table.rows, table.segments, FIRST_SLOT, k);
        const Segment segment(table.rows, s, table.block_size);
        const int64_t block = chosen[k];
        if (block >= 0 && block < segment.blocks) visit(s, segment, k - segment.first_slot, block, threadIdx.x % WARP);
    }
}

}  // namespace thinwire
