// settle_: the device reads whether the step was bad, so that the host need not wait.
#include "common.cuh"

namespace thinwire {
namespace {

template <typename Wide, typename Payload>
__global__ void settle_slots(Wide* residual, Wide* velocity, const Payload* payload, const float* inverse,
                             const int64_t* chosen, Table table, const int32_t* status, const int32_t* bad,
                             int64_t K) {
    const bool undo = *bad != 0;
    if (undo && status[table.segments] & NONFINITE) return;  // nothing was taken
    const Wide factor = inverse ? static_cast<Wide>(*inverse) : Wide(1);
    for_slots(table, chosen, K, [&](int64_t s, const Segment& segment, int64_t slot, int64_t block, int lane) {
        if (!(status[s] & TOUCHED)) return;
        const int64_t first = segment.start + block * table.block_size, width = segment.width(block);
        const Payload* from = payload + segment.offset + slot * table.block_size;
        for (int64_t i = lane; i < width; i += WARP) {
            if (undo) {
                const Wide taken = widen<Wide>(from[i]) * factor;
                if (taken - taken == 0) residual[first + i] += taken;  // else take_blocks_ took nothing
            } else if (velocity && !segment.whole()) {
                velocity[first + i] = 0;
            }
        }
    });
}

template <typename Wide, typename Grad>
__global__ void undo_accumulate(Wide* residual, Wide* velocity, const Grad* grad, Wide momentum, Table table,
                                const int32_t* status, const int32_t* bad, int64_t N) {
    if (*bad == 0) return;
    for_tiles(table, N, [&](int64_t s, const Segment&, int64_t begin, int64_t end) {
        if (!(status[s] & TOUCHED)) return;
        for (int64_t i = begin + threadIdx.x; i < end; i += THREADS) {
            const Wide step = usable_or_zero(widen<Wide>(grad[i]));
            residual[i] -= velocity ? velocity[i] : step;
            if (velocity) velocity[i] = (velocity[i] - step) / momentum;
        }
    });
}

}  // namespace

void launch_settle(Array residual, Array velocity, Array grad, double momentum, Array payload, const float* inverse,
                   const int64_t* chosen, Table table, const int32_t* status, const int32_t* bad, int64_t N,
                   int64_t K, cudaStream_t stream) {
    visit_wide(residual.dtype, [&](auto wide_tag) {
        using Wide = typename decltype(wide_tag)::type;
        Wide* sum = static_cast<Wide*>(residual.data);
        Wide* speed = static_cast<Wide*>(velocity.data);
        visit_data(payload.dtype, [&](auto tag) {
            using Payload = typename decltype(tag)::type;
            settle_slots<<<grid_for(K, WARPS), THREADS, 0, stream>>>(sum, speed,
                                                                     static_cast<const Payload*>(payload.data),
                                                                     inverse, chosen, table, status, bad, K);
        });
        visit_data(grad.dtype, [&](auto tag) {
            using Grad = typename decltype(tag)::type;
            undo_accumulate<<<grid_for(N, TILE), THREADS, 0, stream>>>(sum, speed,
                                                                       static_cast<const Grad*>(grad.data),
                                                                       static_cast<Wide>(momentum), table, status,
                                                                       bad, N);
        });
    });
}

}  // namespace thinwire
