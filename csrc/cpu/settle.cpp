// settle_: clears velocity where blocks were sent, or undoes a step in which some rank's gradient was not finite.
#include "common.h"

namespace thinwire {
namespace {

template <typename Wide>
void clear_velocity(Wide* velocity, const int64_t* chosen, const at::Tensor& table, int64_t block_size,
                    const int32_t* status, int64_t slots) {
    at::parallel_for(0, slots, block_grain(block_size), [&](int64_t begin, int64_t end) {
        for_segments(table, block_size, FIRST_SLOT, begin, end,
                     [&](int64_t s, const Segment& segment, int64_t low, int64_t high) {
                         if (!(status[s] & TOUCHED) || segment.whole()) return;
                         for (int64_t j = low; j < high; ++j) {
                             const int64_t block = chosen[segment.first_slot + j];
                             std::fill_n(velocity + segment.start + block * block_size, segment.width(block), Wide(0));
                         }
                     });
    });
}

template <typename Wide, typename Payload>
void give_back(Wide* residual, const Payload* payload, Wide inverse, const int64_t* chosen, const at::Tensor& table,
               int64_t block_size, const int32_t* status, int64_t slots) {
    at::parallel_for(0, slots, block_grain(block_size), [&](int64_t begin, int64_t end) {
        for_segments(table, block_size, FIRST_SLOT, begin, end,
                     [&](int64_t s, const Segment& segment, int64_t low, int64_t high) {
                         if (!(status[s] & TOUCHED)) return;
                         for (int64_t j = low; j < high; ++j) {
                             const int64_t block = chosen[segment.first_slot + j];
                             Wide* to = residual + segment.start + block * block_size;
                             const Payload* from = payload + segment.offset + j * block_size;
                             const int64_t width = segment.width(block);
                             for (int64_t i = 0; i < width; ++i) {
                                 const Wide taken = static_cast<Wide>(from[i]) * inverse;
                                 if (is_finite(taken)) to[i] += taken;  // else take_blocks_ took nothing
                             }
                         }
                     });
    });
}

template <typename Wide, typename Grad>
void undo(Wide* residual, Wide* velocity, const Grad* grad, Wide momentum, const at::Tensor& table,
          const int32_t* status, int64_t elements) {
    at::parallel_for(0, elements, GRAIN, [&](int64_t begin, int64_t end) {
        for_segments(table, 1, START, begin, end, [&](int64_t s, const Segment& segment, int64_t low, int64_t high) {
            if (!(status[s] & TOUCHED)) return;
            for (int64_t i = segment.start + low; i < segment.start + high; ++i) {
                Wide step = static_cast<Wide>(grad[i]);
                if (!is_usable(step)) step = 0;
                residual[i] -= velocity ? velocity[i] : step;
                if (velocity) velocity[i] = (velocity[i] - step) / momentum;
            }
        });
    });
}

void settle_(const at::Tensor& residual, const std::optional<at::Tensor>& velocity, const at::Tensor& grad,
             double momentum, const at::Tensor& payload, const std::optional<at::Tensor>& inverse,
             const at::Tensor& chosen, const at::Tensor& table, int64_t block_size, const at::Tensor& status,
             const at::Tensor& bad) {
    const Totals totals = check_cpu_table(table, block_size);
    check(residual, "residual", WIDE, {totals.elements}, at::kCPU);
    if (velocity) check(*velocity, "velocity", {residual.scalar_type()}, {totals.elements}, at::kCPU);
    check(grad, "grad", DATA, {totals.elements}, at::kCPU);
    check(payload, "payload", DATA, {totals.payload}, at::kCPU);
    if (inverse) check(*inverse, "inverse", FLOAT, {}, at::kCPU);
    check(chosen, "chosen", LONG, {totals.slots}, at::kCPU);
    check(status, "status", INT, {table.size(0) + 1}, at::kCPU);
    check(bad, "bad", INT, {1}, at::kCPU);
    const int64_t* blocks = chosen.const_data_ptr<int64_t>();
    check_chosen(blocks, table, block_size);
    const int32_t* flags = status.const_data_ptr<int32_t>();
    AT_DISPATCH_FLOATING_TYPES(residual.scalar_type(), "settle_", [&] {
        using wide_t = scalar_t;
        wide_t* sum = residual.mutable_data_ptr<wide_t>();
        wide_t* speed = velocity ? velocity->mutable_data_ptr<wide_t>() : nullptr;
        if (*bad.const_data_ptr<int32_t>() == 0) {
            if (speed) clear_velocity(speed, blocks, table, block_size, flags, totals.slots);
            return;
        }
        if (!(flags[table.size(0)] & NONFINITE)) {
            const wide_t factor = inverse ? *inverse->const_data_ptr<float>() : 1.0f;
            AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, payload.scalar_type(), "settle_", [&] {
                give_back(sum, payload.const_data_ptr<scalar_t>(), factor, blocks, table, block_size, flags,
                          totals.slots);
            });
        }
        AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "settle_", [&] {
            undo(sum, speed, grad.const_data_ptr<scalar_t>(), static_cast<wide_t>(momentum), table, flags,
                 totals.elements);
        });
    });
}

TORCH_LIBRARY_IMPL(thinwire, CPU, m) { m.impl("settle_", settle_); }

}  // namespace
}  // namespace thinwire
