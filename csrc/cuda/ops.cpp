// The CUDA operators as torch sees them: checks, the device and the stream. Sizes come from shapes alone; what the
// tables hold is not checked, because reading it would wait for the device.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../checks.h"
#include "launch.h"

namespace thinwire {
namespace {

using Optional = std::optional<at::Tensor>;

Array array(const at::Tensor& tensor) {
    const auto dtype = tensor.scalar_type();
    return {tensor.data_ptr(), dtype == at::kDouble     ? Dtype::F64
                               : dtype == at::kBFloat16 ? Dtype::BF16
                               : dtype == at::kHalf     ? Dtype::F16
                                                        : Dtype::F32};
}

Array array(const Optional& tensor) { return tensor ? array(*tensor) : Array{nullptr, Dtype::F32}; }

template <typename T>
const T* pointer(const Optional& tensor) {
    return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

Table table_of(const at::Tensor& table, int64_t block_size) {
    return {table.const_data_ptr<int64_t>(), table.size(0), block_size};
}

cudaStream_t current(at::Device device) { return c10::cuda::getCurrentCUDAStream(device.index()); }

void accumulate_(const at::Tensor& residual, const Optional& velocity, const at::Tensor& grad, double momentum,
                 const at::Tensor& table, int64_t block_size, const at::Tensor& norms, const at::Tensor& status,
                 const Optional& residual_before, const Optional& velocity_before) {
    const at::Device device = residual.device();
    const int64_t N = residual.numel();
    check_table(table, block_size, device);
    check(residual, "residual", WIDE, {N}, device);
    if (velocity) check(*velocity, "velocity", {residual.scalar_type()}, {N}, device);
    if (residual_before) check(*residual_before, "residual_before", {residual.scalar_type()}, {N}, device);
    if (velocity_before) check(*velocity_before, "velocity_before", {residual.scalar_type()}, {N}, device);
    check(grad, "grad", DATA, {N}, device);
    check(norms, "norms", {residual.scalar_type()}, {ANY}, device);
    check(status, "status", INT, {table.size(0) + 1}, device);
    const c10::cuda::OptionalCUDAGuard guard(device);
    launch_accumulate(array(residual), residual_before ? array(residual_before) : array(residual), array(velocity),
                      velocity_before ? array(velocity_before) : array(velocity), array(grad), momentum,
                      table_of(table, block_size), array(norms), status.mutable_data_ptr<int32_t>(), N, norms.numel(),
                      current(device));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void examine(const at::Tensor& grad, const at::Tensor& table, const at::Tensor& status) {
    const at::Device device = grad.device();
    check_table(table, 1, device);
    check(grad, "grad", DATA, {ANY}, device);
    check(status, "status", INT, {table.size(0) + 1}, device);
    const c10::cuda::OptionalCUDAGuard guard(device);
    launch_examine(array(grad), table_of(table, 1), status.mutable_data_ptr<int32_t>(), grad.numel(),
                   current(device));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void draw_blocks(const at::Tensor& table, const at::Tensor& units, int64_t block_size, int64_t seed, int64_t step,
                 at::IntArrayRef streams, at::IntArrayRef deals, const at::Tensor& chosen) {
    const at::Device device = chosen.device();
    const int64_t rows = streams.size();
    TORCH_CHECK(streams.size() == deals.size(), "thinwire: there are ", streams.size(), " streams ", streams, " and ",
                deals.size(), " deals ", deals, "; allowed is one of each for every row");
    check_table(table, block_size, device);
    check(units, "units", LONG, {table.size(0)}, device);
    check(chosen, "chosen", LONG, {rows, ANY}, device);
    const c10::cuda::OptionalCUDAGuard guard(device);
    launch_draw(table_of(table, block_size), units.const_data_ptr<int64_t>(), seed, step, streams.data(),
                deals.data(), rows, chosen.size(1), chosen.mutable_data_ptr<int64_t>(), current(device));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void select_blocks(const at::Tensor& norms, const at::Tensor& table, int64_t block_size, const at::Tensor& chosen) {
    const at::Device device = norms.device();
    check_table(table, block_size, device);
    check(norms, "norms", WIDE, {ANY}, device);
    check(chosen, "chosen", LONG, {ANY}, device);
    const c10::cuda::OptionalCUDAGuard guard(device);
    launch_select(array(norms), table_of(table, block_size), chosen.mutable_data_ptr<int64_t>(), current(device));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <bool TAKE>
void gather_or_take(const at::Tensor& source, const at::Tensor& chosen, const at::Tensor& table, int64_t block_size,
                    const Optional& status, const Optional& scale, const at::Tensor& payload) {
    const at::Device device = source.device();
    check_table(table, block_size, device);
    check(source, "source", DATA, {ANY}, device);
    check(chosen, "chosen", LONG, {ANY}, device);
    if (status) check(*status, "status", INT, {table.size(0) + 1}, device);
    if (scale) check(*scale, "scale", FLOAT, {}, device);
    check(payload, "payload", DATA, {ANY}, device);
    const c10::cuda::OptionalCUDAGuard guard(device);
    launch_gather(array(source), chosen.const_data_ptr<int64_t>(), table_of(table, block_size),
                  pointer<int32_t>(status), pointer<float>(scale), array(payload), chosen.numel(), TAKE,
                  current(device));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void scatter_blocks_(const at::Tensor& payloads, const Optional& inverses, const at::Tensor& chosen,
                     const at::Tensor& table, int64_t block_size, const at::Tensor& factors, bool accumulate,
                     const at::Tensor& out) {
    const at::Device device = out.device();
    check_table(table, block_size, device);
    check(payloads, "payloads", DATA, {ANY, ANY}, device, true);
    const int64_t ranks = payloads.size(0);
    if (inverses) check(*inverses, "inverses", FLOAT, {ranks}, device);
    check(chosen, "chosen", LONG, {ranks, ANY}, device);
    check(factors, "factors", {wide(out.scalar_type())}, {table.size(0)}, device);
    check(out, "out", DATA, {ANY}, device);
    const c10::cuda::OptionalCUDAGuard guard(device);
    launch_scatter(array(payloads), payloads.stride(0), pointer<float>(inverses), chosen.const_data_ptr<int64_t>(),
                   table_of(table, block_size), factors.const_data_ptr(), accumulate, array(out), out.numel(),
                   chosen.size(1), ranks, current(device));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void settle_(const at::Tensor& residual, const Optional& velocity, const at::Tensor& grad, double momentum,
             const at::Tensor& payload, const Optional& inverse, const at::Tensor& chosen, const at::Tensor& table,
             int64_t block_size, const at::Tensor& status, const at::Tensor& bad) {
    const at::Device device = residual.device();
    const int64_t N = residual.numel();
    check_table(table, block_size, device);
    check(residual, "residual", WIDE, {N}, device);
    if (velocity) check(*velocity, "velocity", {residual.scalar_type()}, {N}, device);
    check(grad, "grad", DATA, {N}, device);
    check(payload, "payload", DATA, {ANY}, device);
    if (inverse) check(*inverse, "inverse", FLOAT, {}, device);
    check(chosen, "chosen", LONG, {ANY}, device);
    check(status, "status", INT, {table.size(0) + 1}, device);
    check(bad, "bad", INT, {1}, device);
    const c10::cuda::OptionalCUDAGuard guard(device);
    launch_settle(array(residual), array(velocity), array(grad), momentum, array(payload), pointer<float>(inverse),
                  chosen.const_data_ptr<int64_t>(), table_of(table, block_size), status.const_data_ptr<int32_t>(),
                  bad.const_data_ptr<int32_t>(), N, chosen.numel(), current(device));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
}

TORCH_LIBRARY_IMPL(thinwire, CUDA, m) {
    m.impl("accumulate_", accumulate_);
    m.impl("examine", examine);
    m.impl("draw_blocks", draw_blocks);
    m.impl("select_blocks", select_blocks);
    m.impl("gather_blocks", gather_or_take<false>);
    m.impl("take_blocks_", gather_or_take<true>);
    m.impl("scatter_blocks_", scatter_blocks_);
    m.impl("settle_", settle_);
}

}  // namespace
}  // namespace thinwire
