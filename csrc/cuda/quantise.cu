// quantise_blocks_: a warp for each slot finds the largest magnitude, and then writes codes, byte by byte.
#include "../block_code.h"
#include "common.cuh"

namespace thinwire {
namespace {

// NaN where one of the values is.
template <typename Wide>
__device__ Wide larger(Wide a, Wide b) {
    return a > b || a != a ? a : b;
}

template <int BITS, typename Wide>
__global__ void quantise(Wide* __restrict__ source, const int64_t* __restrict__ chosen, Table table,
                         const int32_t* __restrict__ status, const int64_t* __restrict__ places, bool keep, Rows rows,
                         RowShape shape, Divider by_slots, int64_t K, int64_t N) {
    constexpr int PER_BYTE = 8 / BITS;
    const bool spoilt = status && status[table.segments] & NONFINITE;
    for_slots(table, chosen, K, N, UNBOUNDED, [&](const Slot& slot, int lane) {
        const int64_t place = places ? places[slot.k] : slot.k;
        if (place < 0 || place >= rows.count * shape.slots) return;
        const int64_t row = by_slots.quotient(place), column = place - row * shape.slots;
        uint8_t* const to = rows.data + row * rows.stride;
        if (spoilt && lane == 0) write_scale(to + shape.scale_at(column), NAN_SCALE);
        if (spoilt || (status && !(status[slot.s] & TOUCHED))) return;  // codes are zero already

        Wide* const from = source + slot.segment.start + slot.block * table.block_size;
        const int64_t width = slot.segment.width(slot.block);
        Wide largest = 0;
        for (int64_t i = lane; i < width; i += WARP) largest = larger(largest, from[i] < 0 ? -from[i] : from[i]);
        for (int half = WARP / 2; half > 0; half /= 2) largest = larger(largest, __shfl_xor_sync(~0u, largest, half));
        const uint16_t scale = scale_of(largest, BITS);
        if (lane == 0) write_scale(to + shape.scale_at(column), scale);
        if (!has_codes(scale)) return;

        const Wide step = widen_scale<Wide>(scale);
        uint8_t* const codes = to + shape.codes_at(column);
        for (int64_t byte = lane; byte * PER_BYTE < width; byte += WARP) {
            uint8_t whole = 0;
#pragma unroll
            for (int e = 0; e < PER_BYTE; ++e) {
                const int64_t i = byte * PER_BYTE + e;
                if (i >= width) break;
                const Wide value = from[i], code = code_of(value, step);
                whole |= place_code(static_cast<int>(code), e, BITS);
                if (keep) from[i] = value - code * step;
            }
            codes[byte] = whole;
        }
    });
}

}  // namespace

cudaError_t launch_quantise(Array source, const int64_t* chosen, Table table, const int32_t* status,
                            const int64_t* places, int bits, bool keep, Rows rows, int64_t K, cudaStream_t stream) {
    Queue queue(stream);
    queue.clear_rows(rows.data, rows.stride, rows.bytes, rows.count);
    const RowShape shape(rows.bytes, table.block_size, bits);
    if (shape.slots == 0 || rows.count == 0) return queue.error();
    visit_wide(source.dtype, [&](auto tag) {
        using Wide = typename decltype(tag)::type;
        queue.launch(bits == 8 ? quantise<8, Wide> : bits == 4 ? quantise<4, Wide> : quantise<2, Wide>,
                     grid_for_slots(K), static_cast<Wide*>(source.data), chosen, table, status, places, keep, rows,
                     shape, Divider(shape.slots), K, source.size);
    });
    return queue.error();
}

}  // namespace thinwire
