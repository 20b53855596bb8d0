// gather_blocks and take_blocks_: a warp for each slot of the payload.
#include "common.cuh"

namespace thinwire {
namespace {

template <typename Source, typename Payload, bool TAKE>
__global__ void gather(Source* __restrict__ source, const int64_t* __restrict__ chosen, Table table,
                       const int32_t* __restrict__ status, const float* __restrict__ scale,
                       Payload* __restrict__ payload, int64_t K, int64_t N, int64_t P) {
    using Wide = wide_t<Source>;
    constexpr int EACH = 4;  // elements of a lane, loaded together
    const Wide factor = scale ? static_cast<Wide>(*scale) : Wide(1), inverse = Wide(1) / factor;
    const bool spoilt = status && status[table.segments] & NONFINITE;
    for_slots(table, chosen, K, N, P, [&](const Slot& slot, int lane) {
        const bool silent = status && !(status[slot.s] & TOUCHED);
        const int64_t width = spoilt || silent ? 0 : slot.segment.width(slot.block);
        const Wide filling = spoilt ? static_cast<Wide>(NAN) : Wide(0);
        Source* const from = source + slot.segment.start + slot.block * table.block_size;
        Payload* const to = payload + slot.segment.offset + slot.slot * table.block_size;
        for_pieces(slot.segment.slot_width(slot.block), [&](int64_t begin, int64_t end) {
            for (int64_t first = begin + lane; first < end; first += EACH * WARP) {
                Source values[EACH];
#pragma unroll
                for (int e = 0; e < EACH; ++e) {
                    const int64_t i = first + e * WARP;
                    if (i < end && i < width) values[e] = from[i];
                }
#pragma unroll
                for (int e = 0; e < EACH; ++e) {
                    const int64_t i = first + e * WARP;
                    if (i >= end) continue;
                    if (i >= width) {
                        to[i] = narrow<Payload>(filling);
                        continue;
                    }
                    const Wide value = widen<Wide>(values[e]);
                    const Payload sent = narrow<Payload>(value * factor);
                    to[i] = sent;
                    const Wide taken = widen<Wide>(sent) * inverse;
                    if (TAKE && taken - taken == 0) from[i] = narrow<Source>(value - taken);
                }
            }
        });
    });
}

}  // namespace

cudaError_t launch_gather(Array source, const int64_t* chosen, Table table, const int32_t* status, const float* scale,
                          Array payload, int64_t K, bool take, cudaStream_t stream) {
    Queue queue(stream);
    visit_data(source.dtype, [&](auto source_tag) {
        using Source = typename decltype(source_tag)::type;
        visit_data(payload.dtype, [&](auto tag) {
            using Payload = typename decltype(tag)::type;
            queue.launch(take ? gather<Source, Payload, true> : gather<Source, Payload, false>,
                         grid_for_pieces(K, table.block_size), static_cast<Source*>(source.data), chosen, table,
                         status, scale, static_cast<Payload*>(payload.data), K, source.size, payload.size);
        });
    });
    return queue.error();
}

}  // namespace thinwire
