// gather_blocks and take_blocks_: a warp for each slot of the payload.
#include "common.cuh"

namespace thinwire {
namespace {

template <typename Source, typename Payload>
__global__ void gather(Source* source, const int64_t* chosen, Table table, const int32_t* status, const float* scale,
                       Payload* payload, int64_t K, bool take) {
    using Wide = wide_t<Source>;
    const Wide factor = scale ? static_cast<Wide>(*scale) : Wide(1), inverse = Wide(1) / factor;
    const bool spoilt = status && status[table.segments] & NONFINITE;
    for_slots(table, chosen, K, [&](int64_t s, const Segment& segment, int64_t slot, int64_t block, int lane) {
        const bool silent = status && !(status[s] & TOUCHED);
        const int64_t width = silent ? 0 : segment.width(block), slot_width = segment.slot_width(block);
        Source* from = source + segment.start + block * table.block_size;
        Payload* to = payload + segment.offset + slot * table.block_size;
        for (int64_t i = lane; i < slot_width; i += WARP) {
            if (spoilt) {
                to[i] = narrow<Payload>(static_cast<Wide>(NAN));
            } else if (i < width) {
                const Wide value = widen<Wide>(from[i]);
                const Payload sent = narrow<Payload>(value * factor);
                to[i] = sent;
                const Wide taken = widen<Wide>(sent) * inverse;
                if (take && taken - taken == 0) from[i] = narrow<Source>(value - taken);
            } else {
                to[i] = narrow<Payload>(Wide(0));
            }
        }
    });
}

}  // namespace

void launch_gather(Array source, const int64_t* chosen, Table table, const int32_t* status, const float* scale,
                   Array payload, int64_t K, bool take, cudaStream_t stream) {
    visit_data(source.dtype, [&](auto source_tag) {
        using Source = typename decltype(source_tag)::type;
        visit_data(payload.dtype, [&](auto tag) {
            using Payload = typename decltype(tag)::type;
            gather<<<grid_for(K, WARPS), THREADS, 0, stream>>>(static_cast<Source*>(source.data), chosen, table,
                                                               status, scale, static_cast<Payload*>(payload.data), K,
                                                               take);
        });
    });
}

}  // namespace thinwire
