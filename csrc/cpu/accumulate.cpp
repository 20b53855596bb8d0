// accumulate_ and examine: one pass over the gradient, after a look for the parameters that it does not touch.
#include "common.h"

#if defined(__has_builtin) && !defined(THINWIRE_SHUFFLES)
#if __has_builtin(__builtin_shufflevector)  // Clang, and GCC from 12 on
#define THINWIRE_SHUFFLES 1
#endif
#endif

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

// Folds the lanes of four blocks, each in halves: the sums of the reference, without a scalar chain for each block.
template <typename Wide>
THINWIRE_HOT void fold_four(const Wide* lanes, Wide* norms) {
#if THINWIRE_SHUFFLES
    typedef Wide Four __attribute__((vector_size(4 * sizeof(Wide))));
    Four quarters[4];
    for (int block = 0; block < 4; ++block) {
        Four part[4];
        std::memcpy(part, lanes + block * LANES, sizeof(part));
        quarters[block] = (part[0] + part[2]) + (part[1] + part[3]);
    }
    const auto [a, b, c, d] = quarters;
    const Four ab = __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
    const Four cd = __builtin_shufflevector(c, d, 0, 1, 4, 5) + __builtin_shufflevector(c, d, 2, 3, 6, 7);
    const Four sums = __builtin_shufflevector(ab, cd, 0, 2, 4, 6) + __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
    std::memcpy(norms, &sums, sizeof(sums));
#else
    for (int block = 0; block < 4; ++block, lanes += LANES) {
        Wide sums[LANES / 2];
        for (int i = 0; i < 8; ++i) sums[i] = lanes[i] + lanes[i + 8];
        for (int half = 4; half > 0; half /= 2) {
            for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
        }
        norms[block] = sums[0];
    }
#endif
}

// Writes the norm of each block in count elements. value(i, lane) gives the element i, once and in order.
template <typename Wide, typename Value>
THINWIRE_HOT void norms_loop(int64_t count, int64_t block_size, Wide* norms, const Value& value) {
    constexpr int64_t BATCH = 4, GROUPS = 4;
    int64_t begin = 0;
    if (block_size == LANES) {  // one element a lane: nothing to add up before the fold
        for (; begin + BATCH * LANES <= count; begin += BATCH * LANES, norms += BATCH) {
            Wide squares[BATCH * LANES];
#pragma GCC unroll 4
            for (int block = 0; block < BATCH; ++block) {
#pragma omp simd
                for (int lane = 0; lane < LANES; ++lane) {
                    const Wide one = value(begin + block * LANES + lane, lane);
                    squares[block * LANES + lane] = one * one;
                }
            }
            fold_four(squares, norms);
        }
    }
    while (begin < count) {
        Wide lanes[BATCH * LANES] = {}, folded[BATCH];
        int64_t blocks = 0;
        for (; blocks < BATCH && begin < count; ++blocks) {
            const int64_t end = std::min(begin + block_size, count);
            Wide* sums = lanes + blocks * LANES;
            int64_t i = begin;
            for (; i + GROUPS * LANES <= end; i += GROUPS * LANES) {  // sums stay in registers for four groups
#pragma omp simd
                for (int lane = 0; lane < LANES; ++lane) {
                    Wide sum = sums[lane];
#pragma GCC unroll 4
                    for (int group = 0; group < GROUPS; ++group) {
                        const Wide one = value(i + group * LANES + lane, lane);
                        sum += one * one;
                    }
                    sums[lane] = sum;
                }
            }
            for (; i + LANES <= end; i += LANES) {
#pragma omp simd
                for (int lane = 0; lane < LANES; ++lane) {
                    const Wide one = value(i + lane, lane);
                    sums[lane] += one * one;
                }
            }
            for (int lane = 0; i < end; ++i, ++lane) {
                const Wide one = value(i, lane);
                sums[lane] += one * one;
            }
            begin = end;
        }
        if (blocks == BATCH) {
            fold_four(lanes, norms);
        } else {
            fold_four(lanes, folded);
            std::copy_n(folded, blocks, norms);
        }
        norms += blocks;
    }
}

// Where a state is read and where it is written, which may be the same place.
template <typename Wide>
struct State {
    const Wide* from;
    Wide* to;

    State operator+(int64_t offset) const { return to ? State{from + offset, to + offset} : *this; }
};

// Adds grad to count elements of residual, and writes the norms of the blocks in them.
template <typename Wide, typename Grad, bool WITH_VELOCITY>
THINWIRE_HOT bool accumulate_loop(State<Wide> residual, State<Wide> velocity, const Grad* grad, Wide momentum,
                                  int64_t count, int64_t block_size, Wide* norms) {
    int bad[LANES] = {};  // one for each lane: a single one would be reduced again in every block
    norms_loop(count, block_size, norms, [=, &bad](int64_t i, int lane) THINWIRE_HOT_LAMBDA {
        Wide step = static_cast<Wide>(grad[i]);
        const bool usable = is_usable(step);
        bad[lane] |= usable ? 0 : 1;
        step = usable ? step : Wide(0);
        if (WITH_VELOCITY) velocity.to[i] = step = velocity.from[i] * momentum + step;
        return residual.to[i] = residual.from[i] + step;
    });
    return std::any_of(bad, bad + LANES, [](int one) { return one != 0; });
}

}  // namespace

#define THINWIRE_ACCUMULATE(Wide, Grad)                                                                             \
    THINWIRE_CLONES bool accumulate_span(State<Wide> residual, State<Wide> velocity, const Grad* grad,              \
                                        Wide momentum, int64_t count, int64_t block_size, Wide* norms) {            \
        if (velocity.to == nullptr) {                                                                               \
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
#define THINWIRE_NORMS(Wide)                                                                                        \
    THINWIRE_CLONES void norms_span(const Wide* residual, int64_t count, int64_t block_size, Wide* norms) {         \
        norms_loop(count, block_size, norms, [=](int64_t i, int) THINWIRE_HOT_LAMBDA { return residual[i]; });      \
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
                 const at::Tensor& status, const std::optional<at::Tensor>& residual_before,
                 const std::optional<at::Tensor>& velocity_before) {
    const Totals totals = check_cpu_table(table, block_size);
    check(residual, "residual", WIDE, {totals.elements}, at::kCPU);
    if (velocity) check(*velocity, "velocity", {residual.scalar_type()}, {totals.elements}, at::kCPU);
    if (residual_before) {
        check(*residual_before, "residual_before", {residual.scalar_type()}, {totals.elements}, at::kCPU);
    }
    if (velocity_before) {
        check(*velocity_before, "velocity_before", {residual.scalar_type()}, {totals.elements}, at::kCPU);
    }
    check(grad, "grad", DATA, {totals.elements}, at::kCPU);
    check(norms, "norms", {residual.scalar_type()}, {totals.blocks}, at::kCPU);
    check(status, "status", INT, {table.size(0) + 1}, at::kCPU);
    Flags flags(table.size(0));
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "accumulate_", [&] {
        using grad_t = scalar_t;
        const grad_t* step = grad.const_data_ptr<grad_t>();
        find_touched(step, totals.elements, table, flags);
        AT_DISPATCH_FLOATING_TYPES(residual.scalar_type(), "accumulate_", [&] {
            const auto state = [](const at::Tensor& to, const std::optional<at::Tensor>& before) {
                scalar_t* data = to.mutable_data_ptr<scalar_t>();
                return State<scalar_t>{before ? before->const_data_ptr<scalar_t>() : data, data};
            };
            const State<scalar_t> sum = state(residual, residual_before);
            const State<scalar_t> speed =
                velocity ? state(*velocity, velocity_before) : State<scalar_t>{nullptr, nullptr};
            scalar_t* squares = norms.mutable_data_ptr<scalar_t>();
            const auto work = [&](int64_t s, const Segment& segment, int64_t low, int64_t high) {
                const int64_t begin = segment.start + low * block_size;
                const int64_t count = std::min(high * block_size, segment.numel) - low * block_size;
                scalar_t* block_norms = squares + segment.first_block + low;
                if (!(flags[s].load(std::memory_order_relaxed) & TOUCHED)) {
                    norms_span(sum.from + begin, count, block_size, block_norms);
                    for (const auto& one : {sum + begin, speed + begin}) {
                        if (one.from != one.to) std::copy_n(one.from, count, one.to);
                    }
                } else if (accumulate_span(sum + begin, speed + begin, step + begin, static_cast<scalar_t>(momentum),
                                           count, block_size, block_norms)) {
                    flags[s] |= NONFINITE;
                }
                if (!std::all_of(block_norms, block_norms + (high - low), is_finite<scalar_t>)) flags[s] |= NONFINITE;
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
