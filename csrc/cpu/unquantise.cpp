// unquantise_blocks and add_quantised: codes times scales, written or added up.
#include "rows.h"

namespace thinwire {
namespace {

constexpr int64_t STRETCH = 1024;  // elements at a time, whose codes are whole bytes
constexpr int64_t BATCH = 64;      // blocks at a time

enum class Into { WRITE, FIRST, ADD };  // FIRST: added to 0, so that a -0 becomes 0

template <int BITS>
THINWIRE_HOT void unpack_loop(const uint8_t* codes, int64_t count, int8_t* to) {
    constexpr int PER_BYTE = 8 / BITS;
    const int64_t whole = count / PER_BYTE;
    for (int64_t i = 0; i < whole; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < PER_BYTE; ++j) {
            const int8_t at_the_top = static_cast<int8_t>(codes[i] << (8 - BITS - j * BITS));
            to[i * PER_BYTE + j] = static_cast<int8_t>(at_the_top >> (8 - BITS));
        }
    }
    for (int64_t i = whole * PER_BYTE; i < count; ++i) to[i] = static_cast<int8_t>(read_code(codes, i, BITS));
}

template <Into INTO, typename Wide>
THINWIRE_HOT void value_loop(const int8_t* codes, int64_t count, Wide scale, Wide* out) {
#pragma omp simd  // or GCC unrolls 16 before it looks for vectors
    for (int64_t i = 0; i < count; ++i) {
        const Wide value = static_cast<Wide>(codes[i]) * scale;
        out[i] = INTO == Into::WRITE ? value : INTO == Into::FIRST ? Wide(0) + value : out[i] + value;
    }
}

// Some blocks, all of one width and side by side in out: as many as are a stretch together, or one.
struct Batch {
    SlotAt<const uint8_t> slots[BATCH];
    int64_t count = 0;
    bool side_by_side = true;  // in the row too

    static int64_t most(int64_t width) { return std::clamp<int64_t>(STRETCH / width, 1, BATCH); }

    void clear() { count = 0, side_by_side = true; }

    void push(SlotAt<const uint8_t> slot, int64_t code_bytes) {
        side_by_side &= count == 0 || slot.codes == slots[count - 1].codes + code_bytes;
        slots[count++] = slot;
    }
};

// FIXED is the width or 0 for any.
template <int BITS, Into INTO, int FIXED, typename Wide>
THINWIRE_HOT void decode_loop(const Batch& batch, int64_t any_width, Wide* out) {
    const int64_t width = FIXED ? FIXED : any_width;
    const bool at_once = batch.side_by_side && width * BITS % 8 == 0;
    int8_t codes[STRETCH];
    for (int64_t i = 0; i < width; i += STRETCH) {
        const int64_t count = FIXED ? FIXED : std::min(STRETCH, width - i);
        for (int64_t b = 0; b < (at_once ? 1 : batch.count); ++b) {
            unpack_loop<BITS>(batch.slots[b].codes + i * BITS / 8, at_once ? batch.count * count : count,
                              codes + b * count);
        }
        for (int64_t b = 0; b < batch.count; ++b) {
            const Wide scale = widen_scale<Wide>(read_scale(batch.slots[b].scale));
            value_loop<INTO>(codes + b * count, count, scale, out + b * width + i);
        }
    }
}

template <Into INTO, int FIXED, typename Wide>
THINWIRE_HOT void decode_bits(const Batch& batch, int64_t width, int bits, Wide* out) {
    if (bits == 8) decode_loop<8, INTO, FIXED>(batch, width, out);
    else if (bits == 4) decode_loop<4, INTO, FIXED>(batch, width, out);
    else decode_loop<2, INTO, FIXED>(batch, width, out);
}

template <Into INTO, typename Wide>
THINWIRE_HOT void decode_width(const Batch& batch, int64_t width, int bits, Wide* out) {
    if (width == 16) decode_bits<INTO, 16>(batch, width, bits, out);
    else if (width == 64) decode_bits<INTO, 64>(batch, width, bits, out);
    else decode_bits<INTO, 0>(batch, width, bits, out);
}

}  // namespace

#define THINWIRE_DECODE(Wide)                                                                        \
    THINWIRE_CLONES void decode_batch(const Batch& batch, int64_t width, int bits, Into into, Wide* out) { \
        if (into == Into::WRITE) decode_width<Into::WRITE>(batch, width, bits, out);                 \
        else if (into == Into::FIRST) decode_width<Into::FIRST>(batch, width, bits, out);            \
        else decode_width<Into::ADD>(batch, width, bits, out);                                       \
    }
THINWIRE_DECODE(float)
THINWIRE_DECODE(double)

namespace {

void unquantise_blocks(const at::Tensor& rows, int64_t bits, const std::optional<at::Tensor>& places,
                       const at::Tensor& table, int64_t block_size, const at::Tensor& payloads) {
    const Totals totals = check_cpu_table(table, block_size);
    const RowShape shape = check_rows(rows, ANY, block_size, bits);
    const int64_t* lie_at =
        check_places(places, totals.slots, places ? rows.size(0) * shape.slots : shape.slots);
    check(payloads, "payloads", WIDE, {places ? 1 : rows.size(0), totals.payload}, at::kCPU, true);
    const RowsAt<const uint8_t> from{rows.const_data_ptr<uint8_t>(), rows.stride(0), shape};
    const int64_t most = Batch::most(block_size);
    AT_DISPATCH_FLOATING_TYPES(payloads.scalar_type(), "unquantise_blocks", [&] {
        for (int64_t r = 0; r < payloads.size(0); ++r) {
            scalar_t* out = payloads.mutable_data_ptr<scalar_t>() + r * payloads.stride(0);
            const auto work = [&](int64_t, const Segment& segment, int64_t low, int64_t high) {
                Batch batch;
                for (int64_t j = low; j < high; j += batch.count) {
                    // Of a parameter that travels whole, slot j holds block j, and the last may be narrower.
                    const int64_t width = segment.slot_width(j);
                    batch.clear();
                    for (int64_t i = j; i < std::min(high, j + most) && segment.slot_width(i) == width; ++i) {
                        const int64_t k = segment.first_slot + i;
                        batch.push(from.slot(lie_at ? lie_at[k] : r * shape.slots + k), shape.code_bytes);
                    }
                    decode_batch(batch, width, static_cast<int>(bits), Into::WRITE,
                                 out + segment.offset + j * block_size);
                }
            };
            at::parallel_for(0, totals.slots, block_grain(block_size), [&](int64_t begin, int64_t end) {
                for_segments(table, block_size, FIRST_SLOT, begin, end, work);
            });
        }
    });
}

void add_quantised(const at::Tensor& rows, int64_t bits, int64_t block_size, const at::Tensor& total) {
    const RowShape shape = check_rows(rows, ANY, block_size, bits);
    check(total, "total", WIDE, {shape.slots * block_size}, at::kCPU);
    const RowsAt<const uint8_t> from{rows.const_data_ptr<uint8_t>(), rows.stride(0), shape};
    const int64_t most = Batch::most(block_size);
    AT_DISPATCH_FLOATING_TYPES(total.scalar_type(), "add_quantised", [&] {
        scalar_t* out = total.mutable_data_ptr<scalar_t>();
        if (rows.size(0) == 0) std::fill_n(out, total.numel(), scalar_t(0));
        at::parallel_for(0, shape.slots, block_grain(block_size), [&](int64_t begin, int64_t end) {
            Batch batch;
            for (int64_t slot = begin; slot < end; slot += most) {
                for (int64_t r = 0; r < rows.size(0); ++r) {
                    batch.clear();
                    for (int64_t q = slot; q < std::min(end, slot + most); ++q) {
                        batch.push(from.slot(r * shape.slots + q), shape.code_bytes);
                    }
                    decode_batch(batch, block_size, static_cast<int>(bits), r ? Into::ADD : Into::FIRST,
                                 out + slot * block_size);
                }
            }
        });
    });
}

TORCH_LIBRARY_IMPL(thinwire, CPU, m) {
    m.impl("unquantise_blocks", unquantise_blocks);
    m.impl("add_quantised", add_quantised);
}

}  // namespace
}  // namespace thinwire
