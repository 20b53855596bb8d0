// accumulate_ and examine: one pass over the gradient, after a look for the parameters that it does not touch.
#include "common.h"

namespace thinwire {
namespace {

using Flags = std::vector<std::atomic<int32_t>>;

template <typename T>
THINWIRE_HOT bool has_nonzero(const T* values, int64_t count) {
    constexpr int64_t STRETCH = 256;  // the look ends soon after the first nonzero
    for (int64_t i = 0; i < count; i += STRETCH) {
        const int64_t end = std::min(i + STRETCH, count);
        int any = 0;
        for (int64_t j = i; j < end; ++j) any |= static_cast<float>(values[j]) != 0.0f;
        if (any) return true;
    }
    return false;
}

// double loses tiny values on the way to float
template <>
THINWIRE_HOT bool has_nonzero(const double* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        if (values[i] != 0.0) return true;
    }
    return false;
}

template <typename Wide, typename Grad>
THINWIRE_HOT int has_nonfinite(const Grad* grad, int64_t count) {
    int any = 0;
    for (int64_t i = 0; i < count; ++i) any |= !is_finite(static_cast<Wide>(grad[i]));
    return any;
}

template <typename Wide, typename Grad, bool WITH_VELOCITY>
THINWIRE_HOT int step_loop(Wide* residual, Wide* velocity, const Grad* grad, Wide momentum, int64_t count) {
    int bad = 0;
    for (int64_t i = 0; i < count; ++i) {
        Wide step = static_cast<Wide>(grad[i]);
        const bool finite = is_finite(step);
        bad |= !finite;
        step = finite ? step : Wide(0);
        if (WITH_VELOCITY) velocity[i] = step = velocity[i] * momentum + step;
        residual[i] = residual[i] + step;
    }
    return bad;
}

// Blocks go in batches that stay in the nearest cache. In a batch the additions of different blocks are independent,
// so a processor overlaps them, where the 4 foldings of one small block would each wait for the last.
constexpr int64_t BATCH = 64, NEAR = 2048;

// Adds the squares of `count` elements of each block, beginning at the element `at` of it, to the block's lanes.
template <typename Wide>
THINWIRE_HOT void square_loop(const Wide* residual, int64_t blocks, int64_t block_size, int64_t at, int64_t count,
                              Wide* lanes) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        for (int64_t block = 0; block < blocks; ++block) {
            const Wide* values = residual + block * block_size + at + i;
#pragma omp simd
            for (int lane = 0; lane < LANES; ++lane) lanes[block * LANES + lane] += values[lane] * values[lane];
        }
    }
    for (int64_t block = 0; i < count && block < blocks; ++block) {
        const Wide* values = residual + block * block_size + at + i;
        for (int lane = 0; lane < count - i; ++lane) lanes[block * LANES + lane] += values[lane] * values[lane];
    }
}

// Folds the lanes of every block in halves; each level is packed, so that the next one's loads are dense.
template <int HALF, typename Wide>
THINWIRE_HOT void fold_loop(Wide* lanes, int64_t blocks) {
    for (int64_t block = 0; block < blocks; ++block) {
#pragma omp simd
        for (int lane = 0; lane < HALF; ++lane) {
            lanes[block * HALF + lane] = lanes[block * 2 * HALF + lane] + lanes[block * 2 * HALF + HALF + lane];
        }
    }
}

// Calls step(begin, count) on count elements in order, stretch by stretch, and writes the norms of the blocks in them.
template <typename Wide, typename Step>
THINWIRE_HOT void for_batches(const Wide* residual, int64_t count, int64_t block_size, Wide* norms,
                              const Step& step) {
    const int64_t batch = std::clamp<int64_t>(NEAR / block_size, 1, BATCH);
    Wide lanes[BATCH * LANES];
    for (int64_t begin = 0; begin < count;) {
        const int64_t blocks = std::clamp<int64_t>((count - begin) / block_size, 1, batch);
        const int64_t width = std::min(block_size, count - begin);
        std::fill_n(lanes, blocks * LANES, Wide(0));
        for (int64_t at = 0; at < width; at += NEAR) {  // only a block alone can be wider than NEAR
            const int64_t some = std::min(NEAR, width - at);
            step(begin + at, blocks == 1 ? some : blocks * width);
            square_loop(residual + begin, blocks, block_size, at, some, lanes);
        }
        fold_loop<8>(lanes, blocks);
        fold_loop<4>(lanes, blocks);
        fold_loop<2>(lanes, blocks);
        fold_loop<1>(lanes, blocks);
        norms = std::copy_n(lanes, blocks, norms);
        begin += blocks == 1 ? width : blocks * width;
    }
}

// Adds grad to count elements of residual, and writes the norms of the blocks in them.
template <typename Wide, typename Grad, bool WITH_VELOCITY>
THINWIRE_HOT int accumulate_loop(Wide* residual, Wide* velocity, const Grad* grad, Wide momentum, int64_t count,
                                 int64_t block_size, Wide* norms) {
    int bad = 0;
    for_batches(residual, count, block_size, norms, [&](int64_t begin, int64_t some) THINWIRE_HOT_LAMBDA {
        bad |= step_loop<Wide, Grad, WITH_VELOCITY>(residual + begin, WITH_VELOCITY ? velocity + begin : nullptr,
                                                    grad + begin, momentum, some);
    });
    return bad;
}

}  // namespace

#define THINWIRE_ACCUMULATE(Wide, Grad)                                                                             \
    THINWIRE_CLONES int accumulate_span(Wide* residual, Wide* velocity, const Grad* grad, Wide momentum,            \
                                        int64_t count, int64_t block_size, Wide* norms) {                           \
        if (velocity == nullptr) {                                                                                  \
            return accumulate_loop<Wide, Grad, false>(residual, velocity, grad, momentum, count, block_size, norms); \
        }                                                                                                           \
        return accumulate_loop<Wide, Grad, true>(residual, velocity, grad, momentum, count, block_size, norms);     \
    }
#define THINWIRE_GRAD(Grad)                                                                                         \
    THINWIRE_ACCUMULATE(float, Grad)                                                                                \
    THINWIRE_ACCUMULATE(double, Grad)                                                                               \
    THINWIRE_CLONES bool nonzero_span(const Grad* grad, int64_t count) { return has_nonzero(grad, count); }         \
    THINWIRE_CLONES bool nonfinite_span(const Grad* grad, int64_t count) {                                          \
        return has_nonfinite<at::opmath_type<Grad>>(grad, count);                                                   \
    }
#define THINWIRE_NORMS(Wide)                                                                                         \
    THINWIRE_CLONES void norms_span(const Wide* residual, int64_t count, int64_t block_size, Wide* norms) {         \
        for_batches(residual, count, block_size, norms, [](int64_t, int64_t) {});                                   \
    }
THINWIRE_NORMS(float)
THINWIRE_NORMS(double)
THINWIRE_GRAD(float)
THINWIRE_GRAD(double)
THINWIRE_GRAD(at::BFloat16)
THINWIRE_GRAD(at::Half)

namespace {

template <typename Grad>
void find_touched(const Grad* grad, int64_t count, const at::Tensor& table, Flags& flags) {
    at::parallel_for(0, count, GRAIN, [&](int64_t begin, int64_t end) {
        for_segments(table, 1, START, begin, end, [&](int64_t s, const Segment& segment, int64_t low, int64_t high) {
            // In stretches, to stop soon when another thread was luckier.
            for (int64_t i = low; i < high && !flags[s].load(std::memory_order_relaxed); i += GRAIN) {
                if (nonzero_span(grad + segment.start + i, std::min(GRAIN, high - i))) flags[s] |= TOUCHED;
            }
        });
    });
}

void write_status(const Flags& flags, int32_t* status) {
    int32_t all = 0;
    for (size_t s = 0; s < flags.size(); ++s) all |= status[s] = flags[s];
    status[flags.size()] = all;
}

void examine(const at::Tensor& grad, const at::Tensor& table, const at::Tensor& status) {
    const int64_t elements = check_cpu_starts(table);
    check(grad, "grad", DATA, {elements}, at::kCPU);
    check(status, "status", INT, {table.size(0) + 1}, at::kCPU);
    Flags flags(table.size(0));
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "examine", [&] {
        const scalar_t* data = grad.const_data_ptr<scalar_t>();
        find_touched(data, elements, table, flags);
        at::parallel_for(0, elements, GRAIN, [&](int64_t begin, int64_t end) {
            for_segments(table, 1, START, begin, end,
                         [&](int64_t s, const Segment& segment, int64_t low, int64_t high) {
                             if (nonfinite_span(data + segment.start + low, high - low)) flags[s] |= NONFINITE;
                         });
        });
    });
    write_status(flags, status.mutable_data_ptr<int32_t>());
}

void accumulate_(const at::Tensor& residual, const std::optional<at::Tensor>& velocity, const at::Tensor& grad,
                 double momentum, const at::Tensor& table, int64_t block_size, const at::Tensor& norms,
                 const at::Tensor& status) {
    const Totals totals = check_cpu_table(table, block_size);
    check(residual, "residual", WIDE, {totals.elements}, at::kCPU);
    if (velocity) check(*velocity, "velocity", {residual.scalar_type()}, {totals.elements}, at::kCPU);
    check(grad, "grad", DATA, {totals.elements}, at::kCPU);
    check(norms, "norms", {residual.scalar_type()}, {totals.blocks}, at::kCPU);
    check(status, "status", INT, {table.size(0) + 1}, at::kCPU);
    Flags flags(table.size(0));
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "accumulate_", [&] {
        using grad_t = scalar_t;
        const grad_t* step = grad.const_data_ptr<grad_t>();
        find_touched(step, totals.elements, table, flags);
        AT_DISPATCH_FLOATING_TYPES(residual.scalar_type(), "accumulate_", [&] {
            scalar_t* sum = residual.mutable_data_ptr<scalar_t>();
            scalar_t* speed = velocity ? velocity->mutable_data_ptr<scalar_t>() : nullptr;
            scalar_t* squares = norms.mutable_data_ptr<scalar_t>();
            const auto work = [&](int64_t s, const Segment& segment, int64_t low, int64_t high) {
                const int64_t begin = segment.start + low * block_size;
                const int64_t count = std::min(high * block_size, segment.numel) - low * block_size;
                scalar_t* block_norms = squares + segment.first_block + low;
                if (!(flags[s].load(std::memory_order_relaxed) & TOUCHED)) {
                    norms_span(sum + begin, count, block_size, block_norms);
                } else if (accumulate_span(sum + begin, speed ? speed + begin : nullptr, step + begin,
                                           static_cast<scalar_t>(momentum), count, block_size, block_norms)) {
                    flags[s] |= NONFINITE;
                }
            };
            at::parallel_for(0, totals.blocks, block_grain(block_size), [&](int64_t begin, int64_t end) {
                for_segments(table, block_size, FIRST_BLOCK, begin, end, work);
            });
        });
    });
    write_status(flags, status.mutable_data_ptr<int32_t>());
}

TORCH_LIBRARY_IMPL(thinwire, CPU, m) {
    m.impl("accumulate_", accumulate_);
    m.impl("examine", examine);
}

}  // namespace
}  // namespace thinwire
