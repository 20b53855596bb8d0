// unquantise_blocks and add_quantised: a warp for each slot; a lane reads a byte and has the elements in it.
#include "../block_code.h"
#include "common.cuh"

namespace thinwire {
namespace {

template <int BITS, typename Wide>
__global__ void unquantise(Rows rows, RowShape shape, const int64_t* __restrict__ places, Table table,
                           Wide* __restrict__ payloads, int64_t row_stride, Divider by_slots, int64_t K,
                           int64_t P) {
    constexpr int PER_BYTE = 8 / BITS;
    const int64_t rank = places ? 0 : blockIdx.y;
    Wide* const payload = payloads + rank * row_stride;
    for_slots(table, nullptr, K, UNBOUNDED, P, [&](const Slot& slot, int lane) {
        const int64_t place = places ? places[slot.k] : rank * shape.slots + slot.k;
        if (place < 0 || place >= rows.count * shape.slots) return;
        const int64_t row = by_slots.quotient(place), column = place - row * shape.slots;
        const uint8_t* const from = rows.data + row * rows.stride;
        const uint8_t* const codes = from + shape.codes_at(column);
        const Wide step = widen_scale<Wide>(read_scale(from + shape.scale_at(column)));
        Wide* const to = payload + slot.segment.offset + slot.slot * table.block_size;
        const int64_t width = slot.segment.slot_width(slot.block);
        for (int64_t byte = lane; byte * PER_BYTE < width; byte += WARP) {
#pragma unroll
            for (int e = 0; e < PER_BYTE; ++e) {
                const int64_t i = byte * PER_BYTE + e;
                if (i < width) to[i] = static_cast<Wide>(read_code(codes, i, BITS)) * step;
            }
        }
    });
}

template <int BITS, typename Wide>
__global__ void add_quantised(Rows rows, RowShape shape, int64_t block_size, Wide* __restrict__ total) {
    constexpr int PER_BYTE = 8 / BITS;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * WARPS;
    for (int64_t q = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP; q < shape.slots; q += warps) {
        Wide* const to = total + q * block_size;
        for (int64_t byte = threadIdx.x % WARP; byte < shape.code_bytes; byte += WARP) {
            Wide sums[PER_BYTE] = {};
            for (int64_t row = 0; row < rows.count; ++row) {
                const uint8_t* const from = rows.data + row * rows.stride;
                const Wide step = widen_scale<Wide>(read_scale(from + shape.scale_at(q)));
                const uint8_t* const code = from + shape.codes_at(q) + byte;
#pragma unroll
                for (int e = 0; e < PER_BYTE; ++e) sums[e] += static_cast<Wide>(read_code(code, e, BITS)) * step;
            }
#pragma unroll
            for (int e = 0; e < PER_BYTE; ++e) {
                if (byte * PER_BYTE + e < block_size) to[byte * PER_BYTE + e] = sums[e];
            }
        }
    }
}

}  // namespace

cudaError_t launch_unquantise(Rows rows, int bits, const int64_t* places, Table table, Array payloads, int64_t R,
                              int64_t P, int64_t row_stride, int64_t K, cudaStream_t stream) {
    Queue queue(stream);
    const RowShape shape(rows.bytes, table.block_size, bits);
    if (shape.slots == 0 || rows.count == 0 || R == 0) return queue.error();
    visit_wide(payloads.dtype, [&](auto tag) {
        using Wide = typename decltype(tag)::type;
        queue.launch(bits == 8 ? unquantise<8, Wide> : bits == 4 ? unquantise<4, Wide> : unquantise<2, Wide>,
                     dim3(grid_for_slots(K), static_cast<unsigned>(R)), rows, shape, places, table,
                     static_cast<Wide*>(payloads.data), row_stride, Divider(shape.slots), K, P);
    });
    return queue.error();
}

cudaError_t launch_add_quantised(Rows rows, int bits, int64_t block_size, Array total, cudaStream_t stream) {
    Queue queue(stream);
    const RowShape shape(rows.bytes, block_size, bits);
    visit_wide(total.dtype, [&](auto tag) {
        using Wide = typename decltype(tag)::type;
        queue.launch(bits == 8 ? add_quantised<8, Wide> : bits == 4 ? add_quantised<4, Wide> : add_quantised<2, Wide>,
                     grid_for(shape.slots, WARPS), rows, shape, block_size, static_cast<Wide*>(total.data));
    });
    return queue.error();
}

}  // namespace thinwire
