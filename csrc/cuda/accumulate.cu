// accumulate_ and examine: first the status of every parameter, then a half-warp for each block.
#include "common.cuh"

namespace thinwire {
namespace {

// LIMITED: values that a memory cannot take count as not finite.
template <typename Wide, bool LIMITED, typename Grad>
__global__ void examine(const Grad* grad, Table table, int32_t* status, int64_t N) {
    for_tiles(table, N, [&](int64_t s, const Segment&, int64_t begin, int64_t end) {
        bool nonzero = false, nonfinite = false;
        for (int64_t i = begin + threadIdx.x; i < end; i += THREADS) {
            const wide_t<Grad> value = widen<wide_t<Grad>>(grad[i]);
            nonzero |= value != 0;
            nonfinite |= LIMITED ? !is_usable(static_cast<Wide>(value)) : !(value - value == 0);
        }
        const int found = (__syncthreads_or(nonzero) ? TOUCHED : 0) | (__syncthreads_or(nonfinite) ? NONFINITE : 0);
        if (threadIdx.x == 0 && found) {
            atomicOr(status + s, found);
            atomicOr(status + table.segments, found);
        }
    });
}

// Lane l of a half-warp sums the elements l, l + 16, ... of the block: the order that the reference defines.
template <typename Wide, typename Grad>
__global__ void accumulate(Wide* residual, const Wide* residual_before, Wide* velocity, const Wide* velocity_before,
                           const Grad* grad, Wide momentum, Table table, Wide* norms, int32_t* status, int64_t M) {
    const int lane = threadIdx.x % LANES;
    const unsigned half_warp = 0xFFFFu << (threadIdx.x % WARP / LANES * LANES);
    const int64_t groups = static_cast<int64_t>(gridDim.x) * (THREADS / LANES);
    for (int64_t b = static_cast<int64_t>(blockIdx.x) * (THREADS / LANES) + threadIdx.x / LANES; b < M; b += groups) {
        const int64_t s = find_segment(table.rows, table.segments, FIRST_BLOCK, b);
        const Segment segment(table.rows, s, table.block_size);
        const int64_t block = b - segment.first_block;
        const int64_t begin = segment.start + block * table.block_size, end = begin + segment.width(block);
        const bool touched = status[s] & TOUCHED;
        Wide sum = 0;
        for (int64_t i = begin + lane; i < end; i += LANES) {
            Wide value = residual_before[i];
            if (touched) {
                Wide step = usable_or_zero(widen<Wide>(grad[i]));
                if (velocity) velocity[i] = step = velocity_before[i] * momentum + step;
                residual[i] = value = value + step;
            } else {
                if (residual != residual_before) residual[i] = value;
                if (velocity != velocity_before) velocity[i] = velocity_before[i];
            }
            sum += value * value;
        }
        for (int half = LANES / 2; half > 0; half /= 2) sum += __shfl_down_sync(half_warp, sum, half, LANES);
        if (lane != 0) continue;
        norms[b] = sum;
        if (!(sum - sum == 0)) {
            atomicOr(status + s, NONFINITE);
            atomicOr(status + table.segments, NONFINITE);
        }
    }
}

template <typename Wide, bool LIMITED, typename Grad>
void write_status(const Grad* grad, Table table, int32_t* status, int64_t N, cudaStream_t stream) {
    cudaMemsetAsync(status, 0, (table.segments + 1) * sizeof(int32_t), stream);
    examine<Wide, LIMITED><<<grid_for(N, TILE), THREADS, 0, stream>>>(grad, table, status, N);
}

}  // namespace

void launch_examine(Array grad, Table table, int32_t* status, int64_t N, cudaStream_t stream) {
    visit_data(grad.dtype, [&](auto tag) {
        using Grad = typename decltype(tag)::type;
        write_status<wide_t<Grad>, false>(static_cast<const Grad*>(grad.data), table, status, N, stream);
    });
}

void launch_accumulate(Array residual, Array residual_before, Array velocity, Array velocity_before, Array grad,
                       double momentum, Table table, Array norms, int32_t* status, int64_t N, int64_t M,
                       cudaStream_t stream) {
    visit_data(grad.dtype, [&](auto grad_tag) {
        using Grad = typename decltype(grad_tag)::type;
        visit_wide(residual.dtype, [&](auto tag) {
            using Wide = typename decltype(tag)::type;
            write_status<Wide, true>(static_cast<const Grad*>(grad.data), table, status, N, stream);
            accumulate<<<grid_for(M, THREADS / LANES), THREADS, 0, stream>>>(
                static_cast<Wide*>(residual.data), static_cast<const Wide*>(residual_before.data),
                static_cast<Wide*>(velocity.data), static_cast<const Wide*>(velocity_before.data),
                static_cast<const Grad*>(grad.data), static_cast<Wide>(momentum), table,
                static_cast<Wide*>(norms.data), status, M);
        });
    });
}

}  // namespace thinwire
