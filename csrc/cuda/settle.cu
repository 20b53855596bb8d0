// settle_: the device reads whether the step was bad, so that the host need not wait.
#include "common.cuh"

namespace thinwire {
namespace {

template <typename Wide, typename Payload>
__global__ void settle_slots(Wide* __restrict__ residual, Wide* __restrict__ velocity,
                             const Payload* __restrict__ payload, const float* __restrict__ inverse,
                             const int64_t* __restrict__ chosen, Table table, const int32_t* __restrict__ status,
                             const int32_t* __restrict__ bad, int64_t K, int64_t N, int64_t P) {
    const bool undo = *bad != 0;
    if (undo ? status[table.segments] & NONFINITE : !velocity) return;  // nothing was taken or is to be cleared
    const Wide factor = inverse ? static_cast<Wide>(*inverse) : Wide(1);
    for_slots(table, chosen, K, N, P, [&](const Slot& slot, int lane) {
        if (!(status[slot.s] & TOUCHED)) return;
        const int64_t first = slot.segment.start + slot.block * table.block_size;
        const Payload* const from = payload + slot.segment.offset + slot.slot * table.block_size;
        for_pieces(slot.segment.width(slot.block), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin + lane; i < end; i += WARP) {
                if (undo) {
                    const Wide taken = widen<Wide>(from[i]) * factor;
                    if (taken - taken == 0) residual[first + i] += taken;  // else take_blocks_ took nothing
                } else if (!slot.segment.whole()) {
                    velocity[first + i] = 0;
                }
            }
        });
    });
}

template <typename Wide, typename Grad>
__global__ void undo_accumulate(Wide* __restrict__ residual, Wide* __restrict__ velocity,
                                const Grad* __restrict__ grad, Wide momentum, Table table,
                                const int32_t* __restrict__ status, const int32_t* __restrict__ bad, int64_t N) {
    if (*bad == 0) return;
    for_tiles<START>(table, N, [&](int64_t s, const Segment& segment, int64_t begin, int64_t end) {
        if (!(status[s] & TOUCHED)) return;
        for (int64_t i = segment.start + begin + threadIdx.x; i < segment.start + end; i += THREADS) {
            const Wide step = usable_or_zero(widen<Wide>(grad[i]));
            residual[i] -= velocity ? velocity[i] : step;
            if (velocity) velocity[i] = (velocity[i] - step) / momentum;
        }
    });
}

}  // namespace

cudaError_t launch_settle(Array residual, Array velocity, Array grad, double momentum, Array payload,
                          const float* inverse, const int64_t* chosen, Table table, const int32_t* status,
                          const int32_t* bad, int64_t K, cudaStream_t stream) {
    Queue queue(stream);
    visit_wide(residual.dtype, [&](auto wide_tag) {
        using Wide = typename decltype(wide_tag)::type;
        Wide* sum = static_cast<Wide*>(residual.data);
        Wide* speed = static_cast<Wide*>(velocity.data);
        visit_data(payload.dtype, [&](auto tag) {
            using Payload = typename decltype(tag)::type;
            queue.launch(settle_slots<Wide, Payload>, grid_for_pieces(K, table.block_size), sum, speed,
                         static_cast<const Payload*>(payload.data), inverse, chosen, table, status, bad, K,
                         residual.size, payload.size);
        });
        visit_data(grad.dtype, [&](auto tag) {
            using Grad = typename decltype(tag)::type;
            queue.launch(undo_accumulate<Wide, Grad>, grid_for(grad.size, TILE), sum, speed,
                         static_cast<const Grad*>(grad.data), momentum, table, status, bad, grad.size);
        });
    });
    return queue.error();
}

}  // namespace thinwire
