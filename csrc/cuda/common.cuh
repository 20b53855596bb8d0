// Helpers of the CUDA operators. They are compiled with -fmad=false: no multiply-add is fused.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

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

// What is started on a stream, one after another; after an error nothing more is.
class Queue {
  public:
    explicit Queue(cudaStream_t stream) : stream_(stream) {}

    template <typename... Parameters, typename... Arguments>
    void launch(void (*kernel)(Parameters...), dim3 grid, const Arguments&... arguments) {
        if (error_ != cudaSuccess) return;
        cudaLaunchConfig_t config = {};
        config.gridDim = grid, config.blockDim = dim3(THREADS), config.stream = stream_;
        error_ = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
    }

    void clear(void* memory, int64_t bytes) { clear_rows(memory, bytes, bytes, 1); }

    void clear_rows(void* memory, int64_t stride, int64_t bytes, int64_t rows) {
        if (error_ != cudaSuccess || bytes == 0 || rows == 0) return;
        error_ = stride == bytes || rows == 1 ? cudaMemsetAsync(memory, 0, bytes * rows, stream_)
                                 : cudaMemset2DAsync(memory, stride, 0, bytes, rows, stream_);
    }

    void add(cudaError_t error) {
        if (error_ == cudaSuccess) error_ = error;
    }

    cudaStream_t stream() const { return stream_; }
    cudaError_t error() const { return error_; }

  private:
    cudaStream_t stream_;
    cudaError_t error_ = cudaSuccess;
};

// Cuts a launch's scratch into arrays. Without memory it only counts the bytes.
class Cutter {
  public:
    explicit Cutter(void* scratch) : scratch_(static_cast<char*>(scratch)) {}

    template <typename T>
    T* take(int64_t count) {
        T* const taken = scratch_ ? reinterpret_cast<T*>(scratch_ + bytes_) : nullptr;
        bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
        return taken;
    }

    int64_t bytes() const { return bytes_; }

  private:
    char* scratch_;
    int64_t bytes_ = 0;
};

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

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::F64 ? 8 : dtype == Dtype::F32 ? 4 : 2; }

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
    return value <= LARGEST<Wide> && value >= -LARGEST<Wide>;
}

template <typename Wide>
__device__ Wide usable_or_zero(Wide value) {
    return is_usable(value) ? value : Wide(0);
}

// Four elements that one or two instructions load, where their address allows it.
constexpr int PACK = 4;

template <typename T>
struct alignas(sizeof(T) < 4 ? PACK * sizeof(T) : 16) Pack {
    T at[PACK];
};

template <typename T>
__device__ bool is_aligned(const T* address) {
    return reinterpret_cast<uintptr_t>(address) % alignof(Pack<T>) == 0;
}

// The elements [at, at + 4), those before end; the others are zero.
template <typename T>
__device__ Pack<T> load_pack(const T* from, int64_t at, int64_t end, bool aligned) {
    if (aligned && at + PACK <= end) return *reinterpret_cast<const Pack<T>*>(from + at);
    Pack<T> pack = {};
#pragma unroll
    for (int e = 0; e < PACK; ++e) {
        if (at + e < end) pack.at[e] = from[at + e];
    }
    return pack;
}

template <typename T>
__device__ void store_pack(T* to, const Pack<T>& pack, int64_t at, int64_t end, bool aligned) {
    if (aligned && at + PACK <= end) {
        *reinterpret_cast<Pack<T>*>(to + at) = pack;
        return;
    }
#pragma unroll
    for (int e = 0; e < PACK; ++e) {
        if (at + e < end) to[at + e] = pack.at[e];
    }
}

__device__ inline Segment segment_of(const Table& table, int64_t s) {
    return Segment(table.rows, s, table.block_size, table.by_block_size);
}

// Calls visit(s, segment, begin, end) for what each parameter has of a tile of the column's numbering: START or
// OFFSET. All threads of a block come together; begin and end count from the parameter's own beginning.
template <Column COLUMN, typename Visit>
__device__ void for_tiles(const Table& table, int64_t total, const Visit& visit) {
    static_assert(COLUMN == START || COLUMN == OFFSET, "elements have these numberings");
    for (int64_t tile = blockIdx.x * TILE; tile < total; tile += gridDim.x * TILE) {
        const int64_t end = tile + TILE < total ? tile + TILE : total;
        for (int64_t s = find_segment(table.rows, table.segments, COLUMN, tile); s < table.segments; ++s) {
            const Segment segment = segment_of(table, s);
            const int64_t first = COLUMN == START ? segment.start : segment.offset;
            const int64_t size = COLUMN == START ? segment.numel : segment.payload();
            if (first >= end) break;
            const int64_t from = first > tile ? 0 : tile - first;
            const int64_t to = end - first < size ? end - first : size;
            if (from < to) visit(s, segment, from, to);
        }
    }
}

// A slot as a warp finds it: the k-th of all, the parameter's slot-th.
struct Slot {
    int64_t k, s, slot, block;
    Segment segment;
};

constexpr int64_t BUSY = 4096;  // warps that keep a GPU busy

// Slots that a warp looks up at a time, a lane for each, so that none waits for another; where they are few, more warps
// are better.
THINWIRE_INLINE int looked_up(int64_t K) { return K >= 8 * BUSY ? 8 : K >= 2 * BUSY ? 2 : 1; }

inline unsigned grid_for_slots(int64_t K) { return grid_for(K, WARPS * looked_up(K)); }

// Calls visit(slot, lane) for every slot, with a warp for each. Slots whose block does not exist are skipped, and so
// are those that would not lie within N elements of a flat tensor or P of a payload. Without chosen, blocks are slots.
template <typename Visit>
__device__ void for_slots(const Table& table, const int64_t* chosen, int64_t K, int64_t N, int64_t P,
                          const Visit& visit) {
    if (table.segments == 0) return;  // K may be more than the table's slots, and there is no row to look into
    const int lane = threadIdx.x % WARP, at_a_time = looked_up(K);
    const int64_t warps = static_cast<int64_t>(gridDim.x) * WARPS;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP;
    for (int64_t first = warp * at_a_time; first < K; first += warps * at_a_time) {
        const int64_t mine = first + lane;
        long long its_s = 0, its_block = 0;
        if (lane < at_a_time && mine < K) {
            its_s = find_segment(table.rows, table.segments, FIRST_SLOT, mine);
            if (chosen) its_block = chosen[mine];
        }
        for (int i = 0; i < at_a_time && first + i < K; ++i) {
            const int64_t s = __shfl_sync(~0u, its_s, i), listed = __shfl_sync(~0u, its_block, i);
            const Segment segment = segment_of(table, s);
            const int64_t slot = first + i - segment.first_slot, block = chosen ? listed : slot;
            if (slot >= segment.slots || block < 0 || block >= segment.blocks) continue;
            if (segment.start + block * table.block_size + segment.width(block) > N) continue;
            if (segment.offset + slot * table.block_size + segment.slot_width(block) > P) continue;
            visit(Slot{first + i, s, slot, block, segment}, lane);
        }
    }
}

constexpr int64_t UNBOUNDED = INT64_MAX;

// A warp's way through a slot: visit(i) for its lane's elements of [0, width), several at a time, which wait for memory
// together. Where blocks are long, rows of the grid (its y) share one.
constexpr int64_t PIECE = 4096;

inline dim3 grid_for_pieces(int64_t K, int64_t block_size) {
    return dim3(grid_for_slots(K), grid_for(block_size - 1, PIECE));
}

template <typename Visit>
__device__ void for_pieces(int64_t width, const Visit& visit) {
    for (int64_t from = blockIdx.y * PIECE; from < width; from += gridDim.y * PIECE) {
        visit(from, from + PIECE < width ? from + PIECE : width);
    }
}

}  // namespace thinwire
