// gather_blocks and take_blocks_: each slot of the payload is filled by one thread.
#include <limits>

#include "common.h"

namespace thinwire {
namespace {

template <typename Source, typename Payload>
THINWIRE_HOT void gather_loop(const Source* source, Payload* payload, int64_t count, at::opmath_type<Source> factor) {
    using Wide = at::opmath_type<Source>;
    for (int64_t i = 0; i < count; ++i) payload[i] = c10::convert<Payload>(static_cast<Wide>(source[i]) * factor);
}

template <typename Source, typename Payload>
THINWIRE_HOT void take_loop(Source* source, Payload* payload, int64_t count, at::opmath_type<Source> factor) {
    using Wide = at::opmath_type<Source>;
    const Wide inverse = Wide(1) / factor;
    for (int64_t i = 0; i < count; ++i) {
        const Wide value = static_cast<Wide>(source[i]);
        const Payload sent = c10::convert<Payload>(value * factor);
        payload[i] = sent;
        const Wide taken = static_cast<Wide>(sent) * inverse;
        source[i] = is_finite(taken) ? c10::convert<Source>(value - taken) : source[i];
    }
}

}  // namespace

// The templates serve every pair of dtypes, these overloads the usual ones.
template <typename Source, typename Payload>
void gather_span(const Source* source, Payload* payload, int64_t count, at::opmath_type<Source> factor) {
    gather_loop(source, payload, count, factor);
}
template <typename Source, typename Payload>
void take_span(Source* source, Payload* payload, int64_t count, at::opmath_type<Source> factor) {
    take_loop(source, payload, count, factor);
}
#define THINWIRE_GATHER(Payload)                                                                         \
    THINWIRE_CLONES void gather_span(const float* source, Payload* payload, int64_t count, float factor) { \
        gather_loop(source, payload, count, factor);                                                     \
    }                                                                                                    \
    THINWIRE_CLONES void take_span(float* source, Payload* payload, int64_t count, float factor) {       \
        take_loop(source, payload, count, factor);                                                       \
    }
THINWIRE_GATHER(float)
THINWIRE_GATHER(at::BFloat16)
THINWIRE_GATHER(at::Half)

namespace {

template <bool TAKE, typename Source>
void gather(Source* source, const int64_t* chosen, const at::Tensor& table, int64_t block_size,
            const int32_t* status, at::opmath_type<Source> factor, const at::Tensor& payload, int64_t total_slots) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, payload.scalar_type(), "gather_blocks", [&] {
        scalar_t* out = payload.mutable_data_ptr<scalar_t>();
        if (status && status[table.size(0)] & NONFINITE) {
            std::fill_n(out, payload.numel(), std::numeric_limits<scalar_t>::quiet_NaN());
            return;
        }
        const auto work = [&](int64_t s, const Segment& segment, int64_t low, int64_t high) {
            const bool silent = status && !(status[s] & TOUCHED);
            for (int64_t j = low; j < high; ++j) {
                const int64_t block = chosen[segment.first_slot + j];
                const int64_t width = silent ? 0 : segment.width(block);
                Source* from = source + segment.start + block * block_size;
                scalar_t* to = out + segment.offset + j * block_size;
                if constexpr (TAKE) take_span(from, to, width, factor);
                else gather_span(from, to, width, factor);
                std::fill(to + width, to + segment.slot_width(block), scalar_t(0.0f));
            }
        };
        at::parallel_for(0, total_slots, block_grain(block_size), [&](int64_t begin, int64_t end) {
            for_segments(table, block_size, FIRST_SLOT, begin, end, work);
        });
    });
}

template <bool TAKE>
void gather_or_take(const at::Tensor& source, const at::Tensor& chosen, const at::Tensor& table, int64_t block_size,
                    const std::optional<at::Tensor>& status, const std::optional<at::Tensor>& scale,
                    const at::Tensor& payload) {
    const Totals totals = check_cpu_table(table, block_size);
    check(source, "source", DATA, {totals.elements}, at::kCPU);
    check(chosen, "chosen", LONG, {totals.slots}, at::kCPU);
    if (status) check(*status, "status", INT, {table.size(0) + 1}, at::kCPU);
    if (scale) check(*scale, "scale", FLOAT, {}, at::kCPU);
    check(payload, "payload", DATA, {totals.payload}, at::kCPU);
    check_chosen(chosen.const_data_ptr<int64_t>(), table, block_size);
    const float factor = scale ? *scale->const_data_ptr<float>() : 1.0f;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, source.scalar_type(), "gather_blocks", [&] {
        // gather_blocks only reads source: const_cast keeps one function for both.
        auto* data = TAKE ? source.mutable_data_ptr<scalar_t>()
                          : const_cast<scalar_t*>(source.const_data_ptr<scalar_t>());
        gather<TAKE>(data, chosen.const_data_ptr<int64_t>(), table, block_size,
                     status ? status->const_data_ptr<int32_t>() : nullptr, factor, payload, totals.slots);
    });
}

TORCH_LIBRARY_IMPL(thinwire, CPU, m) {
    m.impl("gather_blocks", gather_or_take<false>);
    m.impl("take_blocks_", gather_or_take<true>);
}

}  // namespace
}  // namespace thinwire
