// The CUDA operators as torch sees them: checks, the device, the stream and the kernels' own memory. Sizes are
// compared with each other; what a table holds is not, because reading it would wait for the device: kernels skip
// what a table, chosen or places would put outside of the tensors.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../block_code.h"
#include "../checks.h"
#include "launch.h"

namespace thinwire {
namespace {

using Optional = std::optional<at::Tensor>;

const Dtypes BYTE{at::kByte};

Array array(const at::Tensor& tensor) {
    const auto dtype = tensor.scalar_type();
    const Dtype known = dtype == at::kDouble     ? Dtype::F64
                        : dtype == at::kBFloat16 ? Dtype::BF16
                        : dtype == at::kHalf     ? Dtype::F16
                                                 : Dtype::F32;
    return {tensor.data_ptr(), known, tensor.numel()};
}

Array array(const Optional& tensor) { return tensor ? array(*tensor) : Array{nullptr, Dtype::F32, 0}; }

template <typename T>
const T* pointer(const Optional& tensor) {
    return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

Table table_of(const at::Tensor& table, int64_t block_size) {
    return {table.const_data_ptr<int64_t>(), table.size(0), block_size, Divider(block_size)};
}

Rows rows_of(const at::Tensor& rows) {
    return {static_cast<uint8_t*>(rows.data_ptr()), rows.size(0), rows.size(1), rows.stride(0)};
}

cudaStream_t current(at::Device device) { return c10::cuda::getCurrentCUDAStream(device.index()); }

// Memory that lasts as long as the stream needs it: torch gives it to no other stream before.
at::Tensor scratch(const at::Tensor& like, int64_t bytes) {
    return like.new_empty({bytes}, like.options().dtype(at::kByte));
}

// Each parameter has a last block that may be ragged, so a number of elements tells of how many blocks about.
void check_blocks(const at::Tensor& norms, const at::Tensor& table, int64_t block_size, int64_t N) {
    const int64_t least = N / block_size + (N % block_size != 0), most = N / block_size + table.size(0);
    THINWIRE_CHECK(norms.numel() >= least && norms.numel() <= most, "norms has ", norms.numel(),
                   " elements; allowed are ", least, " to ", most, ", as there are blocks of ", block_size, " in ", N,
                   " elements of ", table.size(0), " parameters");
}

// Of so many slots; a union's list is as long as it may become, and places may be longer still.
void check_places(const at::Tensor& places, int64_t slots, at::Device device) {
    check(places, "places", LONG, {ANY}, device);
    THINWIRE_CHECK(places.numel() >= slots, "places has ", places.numel(), " elements; allowed are ", slots,
                   " or more, as chosen has");
}

void check_bits(int64_t bits) {
    THINWIRE_CHECK(bits == 8 || bits == 4 || bits == 2, "bits is ", bits, "; allowed is 8, 4 or 2");
}

// Returns the slots in a row.
int64_t check_rows(const at::Tensor& rows, int64_t block_size, int64_t bits, at::Device device) {
    check_block_size(block_size);
    check_bits(bits);
    check(rows, "rows", BYTE, {ANY, ANY}, device, true);
    const RowShape shape(rows.size(1), block_size, static_cast<int>(bits));
    THINWIRE_CHECK(shape.bytes() == rows.size(1), "rows is ", rows.sizes(),
                   "; allowed are rows of slots of 2 + ", shape.code_bytes, " bytes each");
    return shape.slots;
}

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
    check_blocks(norms, table, block_size, N);
    const c10::cuda::OptionalCUDAGuard guard(device);
    C10_CUDA_CHECK(launch_accumulate(
        array(residual), residual_before ? array(residual_before) : array(residual), array(velocity),
        velocity_before ? array(velocity_before) : array(velocity), array(grad), momentum, table_of(table, block_size),
        array(norms), status.mutable_data_ptr<int32_t>(), current(device)));
}

void examine(const at::Tensor& grad, const at::Tensor& table, const at::Tensor& status) {
    const at::Device device = grad.device();
    check_table(table, 1, device);
    check(grad, "grad", DATA, {ANY}, device);
    check(status, "status", INT, {table.size(0) + 1}, device);
    const c10::cuda::OptionalCUDAGuard guard(device);
    C10_CUDA_CHECK(
        launch_examine(array(grad), table_of(table, 1), status.mutable_data_ptr<int32_t>(), current(device)));
}

void draw_blocks(const at::Tensor& table, const at::Tensor& units, int64_t block_size, int64_t seed, int64_t step,
                 at::IntArrayRef streams, at::IntArrayRef deals, const at::Tensor& chosen) {
    const at::Device device = chosen.device();
    const int64_t rows = streams.size();
    THINWIRE_CHECK(streams.size() == deals.size(), "there are ", streams.size(), " streams ", streams, " and ",
                   deals.size(), " deals ", deals, "; allowed is one of each for every row");
    check_table(table, block_size, device);
    check(units, "units", LONG, {table.size(0)}, device);
    check(chosen, "chosen", LONG, {rows, ANY}, device);
    const c10::cuda::OptionalCUDAGuard guard(device);
    const Table on_device = table_of(table, block_size);
    const at::Tensor memory = scratch(chosen, draw_scratch(on_device, rows));
    C10_CUDA_CHECK(launch_draw(on_device, units.const_data_ptr<int64_t>(), seed, step, streams.data(), deals.data(),
                               rows, chosen.size(1), chosen.mutable_data_ptr<int64_t>(), memory.data_ptr(),
                               current(device)));
}

void select_blocks(const at::Tensor& norms, const at::Tensor& table, int64_t block_size, const at::Tensor& chosen) {
    const at::Device device = norms.device();
    check_table(table, block_size, device);
    check(norms, "norms", WIDE, {ANY}, device);
    check(chosen, "chosen", LONG, {ANY}, device);
    const c10::cuda::OptionalCUDAGuard guard(device);
    const Table on_device = table_of(table, block_size);
    const at::Tensor memory = scratch(chosen, select_scratch(on_device));
    C10_CUDA_CHECK(launch_select(array(norms), on_device, chosen.mutable_data_ptr<int64_t>(), chosen.numel(),
                                 memory.data_ptr(), current(device)));
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
    C10_CUDA_CHECK(launch_gather(array(source), chosen.const_data_ptr<int64_t>(), table_of(table, block_size),
                                 pointer<int32_t>(status), pointer<float>(scale), array(payload), chosen.numel(), TAKE,
                                 current(device)));
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
    C10_CUDA_CHECK(launch_scatter(array(payloads), payloads.size(1), payloads.stride(0), pointer<float>(inverses),
                                  chosen.const_data_ptr<int64_t>(), table_of(table, block_size),
                                  factors.const_data_ptr(), accumulate, array(out), chosen.size(1), ranks,
                                  current(device)));
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
    C10_CUDA_CHECK(launch_settle(array(residual), array(velocity), array(grad), momentum, array(payload),
                                 pointer<float>(inverse), chosen.const_data_ptr<int64_t>(),
                                 table_of(table, block_size), status.const_data_ptr<int32_t>(),
                                 bad.const_data_ptr<int32_t>(), chosen.numel(), current(device)));
}

void quantise_blocks_(const at::Tensor& source, const at::Tensor& chosen, const at::Tensor& table, int64_t block_size,
                      const Optional& status, const Optional& places, int64_t bits, bool keep, const at::Tensor& rows) {
    const at::Device device = source.device();
    check_table(table, block_size, device);
    const int64_t slots = check_rows(rows, block_size, bits, device);
    check(source, "source", WIDE, {ANY}, device);
    check(chosen, "chosen", LONG, {ANY}, device);
    if (status) check(*status, "status", INT, {table.size(0) + 1}, device);
    if (places) check_places(*places, chosen.numel(), device);
    else check(rows, "rows", BYTE, {1, rows.size(1)}, device, true);
    THINWIRE_CHECK(places || slots == chosen.numel(), "a row has ", slots, " slots and chosen ", chosen.numel(),
                   "; allowed is as many without places");
    const c10::cuda::OptionalCUDAGuard guard(device);
    C10_CUDA_CHECK(launch_quantise(array(source), chosen.const_data_ptr<int64_t>(), table_of(table, block_size),
                                   pointer<int32_t>(status), pointer<int64_t>(places), static_cast<int>(bits), keep,
                                   rows_of(rows), chosen.numel(), current(device)));
}

void unquantise_blocks(const at::Tensor& rows, int64_t bits, const Optional& places, const at::Tensor& table,
                       int64_t block_size, const at::Tensor& payloads) {
    const at::Device device = payloads.device();
    check_table(table, block_size, device);
    const int64_t slots = check_rows(rows, block_size, bits, device);
    if (places) check(*places, "places", LONG, {ANY}, device);
    check(payloads, "payloads", WIDE, {places ? 1 : rows.size(0), ANY}, device, true);
    THINWIRE_CHECK(payloads.size(0) <= 65535, "payloads is ", payloads.sizes(), "; allowed are 65535 rows");
    const c10::cuda::OptionalCUDAGuard guard(device);
    C10_CUDA_CHECK(launch_unquantise(rows_of(rows), static_cast<int>(bits), pointer<int64_t>(places),
                                     table_of(table, block_size), array(payloads), payloads.size(0), payloads.size(1),
                                     payloads.stride(0), places ? places->numel() : slots, current(device)));
}

void add_quantised(const at::Tensor& rows, int64_t bits, int64_t block_size, const at::Tensor& total) {
    const at::Device device = total.device();
    const int64_t slots = check_rows(rows, block_size, bits, device);
    check(total, "total", WIDE, {slots * block_size}, device);
    const c10::cuda::OptionalCUDAGuard guard(device);
    C10_CUDA_CHECK(
        launch_add_quantised(rows_of(rows), static_cast<int>(bits), block_size, array(total), current(device)));
}

void add_rows_(const at::Tensor& values, const at::Tensor& places, int64_t first, const at::Tensor& chosen,
               const at::Tensor& table, int64_t block_size, double factor, const at::Tensor& bad,
               const at::Tensor& out) {
    const at::Device device = out.device();
    check_table(table, block_size, device);
    check(values, "values", {out.scalar_type()}, {ANY}, device);
    THINWIRE_CHECK(values.numel() % block_size == 0, "values has ", values.numel(),
                   " elements; allowed are whole blocks of ", block_size);
    check(chosen, "chosen", LONG, {ANY}, device);
    check_places(places, chosen.numel(), device);
    check(bad, "bad", INT, {1}, device);
    check(out, "out", WIDE, {ANY}, device);
    const c10::cuda::OptionalCUDAGuard guard(device);
    C10_CUDA_CHECK(launch_add_rows(array(values), places.const_data_ptr<int64_t>(), first,
                                   chosen.const_data_ptr<int64_t>(), table_of(table, block_size), factor,
                                   bad.const_data_ptr<int32_t>(), array(out), chosen.numel(), current(device)));
}

void deal_or_undeal(const at::Tensor& payload, const at::Tensor& table, int64_t block_size, const at::Tensor& begins,
                    const at::Tensor& rows, bool undeal) {
    const at::Device device = payload.device();
    check_table(table, block_size, device);
    check(payload, "payload", DATA, {ANY}, device);
    check(begins, "begins", LONG, {table.size(0)}, device);
    check(rows, "rows", {payload.scalar_type()}, {ANY, ANY}, device, true);
    const c10::cuda::OptionalCUDAGuard guard(device);
    C10_CUDA_CHECK(launch_deal(array(payload), table_of(table, block_size), begins.const_data_ptr<int64_t>(),
                               rows.data_ptr(), rows.size(0), rows.size(1), rows.stride(0), undeal, current(device)));
}

void deal_elements(const at::Tensor& payload, const at::Tensor& table, int64_t block_size, const at::Tensor& begins,
                   const at::Tensor& rows) {
    deal_or_undeal(payload, table, block_size, begins, rows, false);
}

void undeal_elements(const at::Tensor& rows, const at::Tensor& table, int64_t block_size, const at::Tensor& begins,
                     const at::Tensor& payload) {
    deal_or_undeal(payload, table, block_size, begins, rows, true);
}

void unite_blocks(const at::Tensor& named, const at::Tensor& table, int64_t block_size, const at::Tensor& chosen,
                  const at::Tensor& united) {
    const at::Device device = chosen.device();
    check_table(table, block_size, device);
    check(named, "named", {at::kInt, at::kLong}, {ANY, ANY}, device);
    THINWIRE_CHECK(named.numel() <= INT32_MAX, "named is ", named.sizes(), "; allowed are ", INT32_MAX,
                   " numbers");
    check(chosen, "chosen", LONG, {ANY}, device);
    check(united, "united", LONG, {table.size(0), COLUMNS}, device);
    const bool wide = named.scalar_type() == at::kLong;
    const c10::cuda::OptionalCUDAGuard guard(device);
    const at::Tensor memory = scratch(chosen, unite_scratch(named.numel(), wide, table.size(0)));
    C10_CUDA_CHECK(launch_unite(named.const_data_ptr(), wide, named.numel(), table_of(table, block_size),
                                chosen.mutable_data_ptr<int64_t>(), chosen.numel(), united.mutable_data_ptr<int64_t>(),
                                memory.data_ptr(), current(device)));
}

void place_slots(const at::Tensor& table, int64_t block_size, const at::Tensor& turns, int64_t ranks, int64_t row_slots,
                 const at::Tensor& places) {
    const at::Device device = places.device();
    check_table(table, block_size, device);
    check(turns, "turns", LONG, {table.size(0)}, device);
    check(places, "places", LONG, {ANY}, device);
    THINWIRE_CHECK(ranks >= 1, "ranks is ", ranks, "; allowed is 1 or more");
    const c10::cuda::OptionalCUDAGuard guard(device);
    const at::Tensor memory = scratch(places, place_scratch(table.size(0), ranks));
    C10_CUDA_CHECK(launch_place(table_of(table, block_size), turns.const_data_ptr<int64_t>(), ranks, row_slots,
                                places.mutable_data_ptr<int64_t>(), places.numel(), memory.data_ptr(),
                                current(device)));
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
    m.impl("quantise_blocks_", quantise_blocks_);
    m.impl("unquantise_blocks", unquantise_blocks);
    m.impl("add_quantised", add_quantised);
    m.impl("add_rows_", add_rows_);
    m.impl("deal_elements", deal_elements);
    m.impl("undeal_elements", undeal_elements);
    m.impl("unite_blocks", unite_blocks);
    m.impl("place_slots", place_slots);
}

}  // namespace
}  // namespace thinwire
