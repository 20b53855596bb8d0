// quantise_blocks_: some blocks at a time are read for their scales and again, from the cache, for their codes.
#include <limits>

#include "rows.h"

namespace thinwire {
namespace {

constexpr int64_t STRETCH = 1024;  // elements at a time, whose codes are whole bytes
constexpr int64_t BATCH = 64;      // blocks at a time

template <typename Wide>
using Bits = std::conditional_t<sizeof(Wide) == 8, int64_t, int32_t>;

// Some blocks, all of one width: as many as are a stretch together, or one.
template <typename Wide>
struct Batch {
    Wide* from[BATCH];
    uint8_t* codes[BATCH];
    uint16_t scales[BATCH];  // written
    int64_t count = 0;

    static int64_t most(int64_t width) { return std::clamp<int64_t>(STRETCH / width, 1, BATCH); }
};

// "omp simd" below is for blocks of 16: GCC would unroll a loop that short before it looks for vectors.

// As numbers without sign, magnitudes are ordered like their bits, and NaN comes last: the order of reading is free.
template <typename Wide>
THINWIRE_HOT Wide largest_magnitude(const Wide* values, int64_t count) {
    Bits<Wide> largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < count; ++i) {
        Bits<Wide> bits;
        std::memcpy(&bits, values + i, sizeof(bits));
        largest = std::max<Bits<Wide>>(largest, bits & std::numeric_limits<Bits<Wide>>::max());
    }
    Wide value;
    std::memcpy(&value, &largest, sizeof(value));
    return value;
}

// Codes plus ROUNDER. With KEEP, values become what the codes leave of them.
template <bool KEEP, typename Wide>
THINWIRE_HOT void round_loop(Wide* values, int64_t count, uint16_t scale_bits, Wide* to) {
    if (!has_codes(scale_bits)) {
        std::fill_n(to, count, ROUNDER<Wide>);
        return;
    }
    const Wide scale = widen_scale<Wide>(scale_bits);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = rounded(values[i], scale);
    if constexpr (KEEP) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) values[i] -= (to[i] - ROUNDER<Wide>) * scale;
    }
}

// The codes' bits, a byte each. Some GCCs warn that sums may be uninitialized, for a batch of no blocks as it seems:
// quantise_loop has written every one that it counts, and reads none of no blocks.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
template <typename Wide>
THINWIRE_HOT void byte_loop(const Wide* sums, int64_t count, uint8_t* codes) {
    for (int64_t i = 0; i < count; ++i) {
        Bits<Wide> bits;
        std::memcpy(&bits, sums + i, sizeof(bits));
        codes[i] = static_cast<uint8_t>(bits);
    }
}
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

template <int BITS>
THINWIRE_HOT void pack_loop(const uint8_t* codes, int64_t count, uint8_t* to) {
    constexpr int PER_BYTE = 8 / BITS, MASK = (1 << BITS) - 1;
    const int64_t whole = count / PER_BYTE;
    for (int64_t i = 0; i < whole; ++i) {
        int byte = 0;
#pragma GCC unroll 4
        for (int j = 0; j < PER_BYTE; ++j) byte |= (codes[i * PER_BYTE + j] & MASK) << (j * BITS);
        to[i] = static_cast<uint8_t>(byte);
    }
    if (whole * PER_BYTE < count) {
        to[whole] = 0;
        for (int64_t i = whole * PER_BYTE; i < count; ++i) to[whole] |= place_code(codes[i], i, BITS);
    }
}

// FIXED is the width or 0 for any.
template <int BITS, bool KEEP, int FIXED, typename Wide>
THINWIRE_HOT void quantise_loop(Batch<Wide>& batch, int64_t any_width) {
    const int64_t width = FIXED ? FIXED : any_width;
    Wide largest[BATCH], sums[STRETCH];
    uint8_t codes[STRETCH];
    for (int64_t b = 0; b < batch.count; ++b) largest[b] = largest_magnitude(batch.from[b], width);
    for (int64_t b = 0; b < batch.count; ++b) batch.scales[b] = scale_of(largest[b], BITS);
    for (int64_t i = 0; i < width; i += STRETCH) {
        const int64_t count = FIXED ? FIXED : std::min(STRETCH, width - i);
        for (int64_t b = 0; b < batch.count; ++b) {
            round_loop<KEEP>(batch.from[b] + i, count, batch.scales[b], sums + b * count);
        }
        byte_loop(sums, batch.count * count, codes);
        for (int64_t b = 0; b < batch.count; ++b) {
            pack_loop<BITS>(codes + b * count, count, batch.codes[b] + i * BITS / 8);
        }
    }
}

template <bool KEEP, int FIXED, typename Wide>
THINWIRE_HOT void quantise_bits(Batch<Wide>& batch, int64_t width, int bits) {
    if (bits == 8) quantise_loop<8, KEEP, FIXED>(batch, width);
    else if (bits == 4) quantise_loop<4, KEEP, FIXED>(batch, width);
    else quantise_loop<2, KEEP, FIXED>(batch, width);
}

template <bool KEEP, typename Wide>
THINWIRE_HOT void quantise_width(Batch<Wide>& batch, int64_t width, int bits) {
    if (width == 16) quantise_bits<KEEP, 16>(batch, width, bits);
    else if (width == 64) quantise_bits<KEEP, 64>(batch, width, bits);
    else quantise_bits<KEEP, 0>(batch, width, bits);
}

}  // namespace

#define THINWIRE_QUANTISE(Wide)                                                                       \
    THINWIRE_CLONES void quantise_batch(Batch<Wide>& batch, int64_t width, int bits, bool keep) {     \
        if (keep) quantise_width<true>(batch, width, bits);                                           \
        else quantise_width<false>(batch, width, bits);                                               \
    }
THINWIRE_QUANTISE(float)
THINWIRE_QUANTISE(double)

namespace {

template <typename Wide>
struct Quantise {
    Wide* source;
    const int64_t *chosen, *places;
    const int32_t* status;
    RowsAt<uint8_t> rows;
    int bits;
    bool keep, spoilt;

    // One thread's share of one parameter's slots.
    void operator()(int64_t s, const Segment& segment, int64_t low, int64_t high) const {
        const int64_t code_bytes = rows.shape.code_bytes;
        const bool silent = status && !(status[s] & TOUCHED);
        const int64_t most = Batch<Wide>::most(segment.block_size);
        Batch<Wide> batch;
        uint8_t* scales[BATCH];
        for (int64_t j = low; j < high; j += batch.count) {
            const int64_t k = segment.first_slot + j, width = segment.width(chosen[k]);
            for (batch.count = 0; batch.count < std::min(most, high - j); ++batch.count) {
                const int64_t b = batch.count, block = chosen[k + b];
                if (segment.width(block) != width) break;
                const SlotAt<uint8_t> slot = rows.slot(places ? places[k + b] : k + b);
                batch.from[b] = source + segment.start + block * segment.block_size;
                batch.codes[b] = slot.codes, scales[b] = slot.scale;
            }
            if (silent || spoilt) {
                std::fill_n(batch.scales, batch.count, spoilt ? NAN_SCALE : 0);
                for (int64_t b = 0; b < batch.count; ++b) std::memset(batch.codes[b], 0, code_bytes);
            } else {
                quantise_batch(batch, width, bits, keep);
            }
            const int64_t used = silent || spoilt ? code_bytes : RowShape::code_bytes_of(width, bits);
            for (int64_t b = 0; b < batch.count; ++b) {
                write_scale(scales[b], batch.scales[b]);
                if (used < code_bytes) std::memset(batch.codes[b] + used, 0, code_bytes - used);
            }
        }
    }
};

void quantise_blocks_(const at::Tensor& source, const at::Tensor& chosen, const at::Tensor& table, int64_t block_size,
                      const std::optional<at::Tensor>& status, const std::optional<at::Tensor>& places, int64_t bits,
                      bool keep, const at::Tensor& rows) {
    const Totals totals = check_cpu_table(table, block_size);
    check(source, "source", WIDE, {totals.elements}, at::kCPU);
    const int64_t* blocks = check_chosen_list(chosen, table, block_size, totals.slots);
    if (status) check(*status, "status", INT, {table.size(0) + 1}, at::kCPU);
    const RowShape shape = check_rows(rows, places ? ANY : 1, block_size, bits);
    const int64_t available = rows.size(0) * shape.slots;
    const int64_t* lie_at = check_places(places, totals.slots, available);
    check_distinct(lie_at, totals.slots, available);
    const int32_t* flags = status ? status->const_data_ptr<int32_t>() : nullptr;
    uint8_t* bytes = rows.mutable_data_ptr<uint8_t>();
    if (totals.slots < available) {
        for (int64_t r = 0; r < rows.size(0); ++r) std::memset(bytes + r * rows.stride(0), 0, rows.size(1));
    }
    AT_DISPATCH_FLOATING_TYPES(source.scalar_type(), "quantise_blocks_", [&] {
        const Quantise<scalar_t> quantise{
            source.mutable_data_ptr<scalar_t>(), blocks, lie_at, flags, {bytes, rows.stride(0), shape},
            static_cast<int>(bits), keep, flags && flags[table.size(0)] & NONFINITE};
        at::parallel_for(0, totals.slots, block_grain(block_size), [&](int64_t begin, int64_t end) {
            for_segments(table, block_size, FIRST_SLOT, begin, end, quantise);
        });
    });
}

TORCH_LIBRARY_IMPL(thinwire, CPU, m) { m.impl("quantise_blocks_", quantise_blocks_); }

}  // namespace
}  // namespace thinwire
