// accumulate_ and examine. accumulate_ must know which parameters have a gradient before it changes any of them: it
// looks at a parameter's first elements, at the others only where those are zero, and then reads the gradient once.
#include "common.cuh"

namespace thinwire {
namespace {

constexpr int64_t HEAD = 8 * WARP;  // elements that nearly always tell

template <typename Grad>
__global__ void examine(const Grad* __restrict__ grad, Table table, int32_t* __restrict__ status, int64_t N) {
    using Wide = wide_t<Grad>;
    const bool aligned = is_aligned(grad);
    for_tiles<START>(table, N, [&](int64_t s, const Segment& segment, int64_t begin, int64_t end) {
        bool nonzero = false, nonfinite = false;
        const int64_t first = segment.start + begin, last = segment.start + end;
        // Packs begin where addresses allow it, which may be before `first`.
        for (int64_t i = first / PACK * PACK + PACK * threadIdx.x; i < last; i += PACK * THREADS) {
            const Pack<Grad> pack = load_pack(grad, i, last, aligned);
#pragma unroll
            for (int e = 0; e < PACK; ++e) {
                const Wide value = widen<Wide>(pack.at[e]);
                if (i + e < first) continue;
                nonzero |= value != 0;
                nonfinite |= !(value - value == 0);
            }
        }
        const int found = (__syncthreads_or(nonzero) ? TOUCHED : 0) | (__syncthreads_or(nonfinite) ? NONFINITE : 0);
        if (threadIdx.x == 0 && found) {
            atomicOr(status + s, found);
            atomicOr(status + table.segments, found);
        }
    });
}

// A warp for each parameter; writes all of status.
template <typename Grad>
__global__ void look_at_heads(const Grad* __restrict__ grad, Table table, int32_t* __restrict__ status, int64_t N) {
    const int lane = threadIdx.x % WARP;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * WARPS;
    if (blockIdx.x == 0 && threadIdx.x == 0) status[table.segments] = 0;
    for (int64_t s = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP; s < table.segments; s += warps) {
        const Segment segment = segment_of(table, s);
        bool nonzero = false;
        for (int64_t i = lane; i < HEAD && i < segment.numel && segment.start + i < N; i += WARP) {
            nonzero |= widen<wide_t<Grad>>(grad[segment.start + i]) != 0;
        }
        nonzero = __any_sync(~0u, nonzero);
        if (lane == 0) status[s] = nonzero ? TOUCHED : 0;
    }
}

template <typename Grad>
__global__ void look_further(const Grad* __restrict__ grad, Table table, int32_t* status, int64_t N) {
    for_tiles<START>(table, N, [&](int64_t s, const Segment& segment, int64_t begin, int64_t end) {
        // Not all threads may see what another block has just found: then they look once more, together.
        if (!__syncthreads_or(!(status[s] & TOUCHED))) return;
        bool nonzero = false;
        for (int64_t i = begin + threadIdx.x; i < end; i += THREADS) {
            nonzero |= widen<wide_t<Grad>>(grad[segment.start + i]) != 0;
        }
        if (__syncthreads_or(nonzero) && threadIdx.x == 0) atomicOr(status + s, TOUCHED);
    });
}

// The order in which the reference adds squares: lane l of 16 takes the elements l, l + 16, ... of a block. Four
// threads share a block, each with four neighbouring lanes, so that they can load packs.
constexpr int TEAM = LANES / PACK;

template <typename Wide, typename Grad>
__global__ void accumulate(Wide* residual, const Wide* residual_before, Wide* velocity, const Wide* velocity_before,
                           const Grad* __restrict__ grad, Wide momentum, Table table, Wide* __restrict__ norms,
                           int32_t* status, int64_t N, int64_t M) {
    constexpr int ROWS = 2;  // of 16 elements, loaded together
    const int member = threadIdx.x % TEAM;
    const unsigned team = ((1u << TEAM) - 1) << (threadIdx.x % WARP / TEAM * TEAM);
    const int64_t teams = static_cast<int64_t>(gridDim.x) * (THREADS / TEAM);
    for (int64_t b = static_cast<int64_t>(blockIdx.x) * (THREADS / TEAM) + threadIdx.x / TEAM; b < M; b += teams) {
        const int64_t s = find_segment(table.rows, table.segments, FIRST_BLOCK, b);
        const Segment segment = segment_of(table, s);
        const int64_t block = b - segment.first_block;
        const int64_t begin = segment.start + block * table.block_size, width = segment.width(block);
        if (block >= segment.blocks || begin + width > N) continue;
        const bool touched = status[s] & TOUCHED;
        Wide* const to = residual + begin;
        Wide* const speed_to = velocity + begin;
        const Wide* const from = residual_before + begin;
        const Wide* const speed_from = velocity_before + begin;
        const Grad* const steps = grad + begin;
        const bool aligned = is_aligned(to) && is_aligned(from) && is_aligned(steps) &&
                             (!velocity || (is_aligned(speed_to) && is_aligned(speed_from)));
        Wide sums[PACK] = {};
        bool usable = true;
        for (int64_t first = member * PACK; first < width; first += ROWS * LANES) {
            Pack<Wide> values[ROWS], speeds[ROWS];
            Pack<Grad> gradients[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const int64_t i = first + r * LANES;
                values[r] = load_pack(from, i, width, aligned);
                if (touched) gradients[r] = load_pack(steps, i, width, aligned);
                if (velocity) speeds[r] = load_pack(speed_from, i, width, aligned);
            }
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const int64_t i = first + r * LANES;
#pragma unroll
                for (int e = 0; e < PACK; ++e) {
                    if (touched) {
                        const Wide gradient = widen<Wide>(gradients[r].at[e]);
                        usable &= is_usable(gradient);
                        Wide step = usable_or_zero(gradient);
                        if (velocity) speeds[r].at[e] = step = speeds[r].at[e] * momentum + step;
                        values[r].at[e] = values[r].at[e] + step;
                    }
                    sums[e] += values[r].at[e] * values[r].at[e];
                }
                if (touched || to != from) store_pack(to, values[r], i, width, aligned);
                if (velocity && (touched || speed_to != speed_from)) {
                    store_pack(speed_to, speeds[r], i, width, aligned);
                }
            }
        }
        // Folded in halves: by eight and four lanes between threads, by two and one within the first.
        for (int half = TEAM / 2; half > 0; half /= 2) {
#pragma unroll
            for (int e = 0; e < PACK; ++e) sums[e] += __shfl_down_sync(team, sums[e], half, TEAM);
        }
        const Wide sum = (sums[0] + sums[2]) + (sums[1] + sums[3]);
        usable = __all_sync(team, usable);
        if (member != 0) continue;
        norms[b] = sum;
        const int found = (touched && block == 0 ? TOUCHED : 0) | (usable && sum - sum == 0 ? 0 : NONFINITE);
        if (found & NONFINITE) atomicOr(status + s, NONFINITE);
        if (found) atomicOr(status + table.segments, found);
    }
}

}  // namespace

cudaError_t launch_examine(Array grad, Table table, int32_t* status, cudaStream_t stream) {
    Queue queue(stream);
    queue.clear(status, (table.segments + 1) * sizeof(int32_t));
    visit_data(grad.dtype, [&](auto tag) {
        using Grad = typename decltype(tag)::type;
        queue.launch(examine<Grad>, grid_for(grad.size, TILE), static_cast<const Grad*>(grad.data), table, status,
                     grad.size);
    });
    return queue.error();
}

cudaError_t launch_accumulate(Array residual, Array residual_before, Array velocity, Array velocity_before, Array grad,
                              double momentum, Table table, Array norms, int32_t* status, cudaStream_t stream) {
    Queue queue(stream);
    visit_data(grad.dtype, [&](auto grad_tag) {
        using Grad = typename decltype(grad_tag)::type;
        const Grad* steps = static_cast<const Grad*>(grad.data);
        queue.launch(look_at_heads<Grad>, grid_for(table.segments, WARPS), steps, table, status, grad.size);
        queue.launch(look_further<Grad>, grid_for(grad.size, TILE), steps, table, status, grad.size);
        if (table.segments == 0) return;  // of no parameter are there blocks
        visit_wide(residual.dtype, [&](auto tag) {
            using Wide = typename decltype(tag)::type;
            queue.launch(accumulate<Wide, Grad>, grid_for(norms.size, THREADS / TEAM),
                         static_cast<Wide*>(residual.data), static_cast<const Wide*>(residual_before.data),
                         static_cast<Wide*>(velocity.data), static_cast<const Wide*>(velocity_before.data), steps,
                         momentum, table, static_cast<Wide*>(norms.data), status, grad.size, norms.size);
        });
    });
    return queue.error();
}

}  // namespace thinwire
