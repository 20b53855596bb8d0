// How a block travels in 8, 4 or 2 bits an element: its scale, its codes, and where they lie in a row of bytes.
// No torch header here, so that nvcc can read it. hooks/thinwire/ops/reference_wire.py says what everything means.
#pragma once
#include "block_ops.h"

namespace thinwire {

constexpr uint16_t NAN_SCALE = 0x7FC0;  // of bfloat16

THINWIRE_INLINE int largest_code(int bits) { return (1 << (bits - 1)) - 1; }

template <typename Wide>
THINWIRE_INLINE Wide widen_scale(uint16_t scale) {
    const uint32_t whole = static_cast<uint32_t>(scale) << 16;
    float value;
    memcpy(&value, &whole, sizeof(value));
    return static_cast<Wide>(value);
}

// The block's largest magnitude over the largest code, as the bits of the next bfloat16 that is not smaller; NAN_SCALE
// where that is not finite, or its product with the largest code is not.
template <typename Wide>
THINWIRE_INLINE uint16_t scale_of(Wide largest, int bits) {
    const Wide code = static_cast<Wide>(largest_code(bits));
    const float step = static_cast<float>(largest / code);
    uint32_t whole;
    memcpy(&whole, &step, sizeof(whole));
    const uint32_t upper = ((whole & 0x7FFFFFFF) + 0xFFFF) >> 16;  // of inf 0x7F80, of NaN more
    const Wide product = widen_scale<Wide>(static_cast<uint16_t>(upper)) * code;
    return upper < 0x7F80 && product - product == 0 ? static_cast<uint16_t>(upper) : NAN_SCALE;
}

// Whether elements are divided by the scale: one that is zero or NaN has codes 0.
THINWIRE_INLINE bool has_codes(uint16_t scale) { return scale != 0 && scale != NAN_SCALE; }

// Adding 1.5 times 2 to the number of stored bits of the significand leaves no bits for a fraction: the sum is rounded
// half to even, and its lowest bits are the whole number's two's complement. Taking it away again never gives -0.
template <typename Wide>
constexpr Wide ROUNDER = static_cast<Wide>(0x1.8p23);
template <>
constexpr double ROUNDER<double> = 0x1.8p52;

// The code of an element plus ROUNDER. No bounds: a scale of scale_of() is large enough that no code is beyond
// largest_code().
template <typename Wide>
THINWIRE_INLINE Wide rounded(Wide value, Wide scale) {
    return value / scale + ROUNDER<Wide>;
}

// The code of an element, as a number.
template <typename Wide>
THINWIRE_INLINE Wide code_of(Wide value, Wide scale) {
    return rounded(value, scale) - ROUNDER<Wide>;
}

// One row of bytes: the scales of its slots, then their codes.
struct RowShape {
    int64_t slots, code_bytes;

    THINWIRE_INLINE static int64_t code_bytes_of(int64_t block_size, int bits) {
        return block_size / 8 * bits + (block_size % 8 * bits + 7) / 8;
    }

    // For rows of so many bytes, of which 2 + code_bytes are a slot's.
    THINWIRE_INLINE RowShape(int64_t bytes, int64_t block_size, int bits)
        : slots(bytes / (2 + code_bytes_of(block_size, bits))), code_bytes(code_bytes_of(block_size, bits)) {}

    THINWIRE_INLINE int64_t bytes() const { return slots * (2 + code_bytes); }

    // Where in the row a slot's scale and codes begin.
    THINWIRE_INLINE int64_t scale_at(int64_t slot) const { return 2 * slot; }
    THINWIRE_INLINE int64_t codes_at(int64_t slot) const { return 2 * slots + slot * code_bytes; }
};

// By bytes, because a row may begin at an odd address.
THINWIRE_INLINE uint16_t read_scale(const uint8_t* from) {
    return static_cast<uint16_t>(from[0] | from[1] << 8);
}

THINWIRE_INLINE void write_scale(uint8_t* to, uint16_t scale) {
    to[0] = static_cast<uint8_t>(scale & 0xFF), to[1] = static_cast<uint8_t>(scale >> 8);
}

// The i-th code of a slot.
THINWIRE_INLINE int read_code(const uint8_t* codes, int64_t i, int bits) {
    const int per_byte = 8 / bits;
    const int unsigned_code = codes[i / per_byte] >> (i % per_byte * bits) & ((1 << bits) - 1);
    return unsigned_code - (unsigned_code >> (bits - 1) << bits);
}

// A code's bits, in their place in its byte; those of a byte's codes are put together with |.
THINWIRE_INLINE uint8_t place_code(int code, int64_t i, int bits) {
    return static_cast<uint8_t>((code & ((1 << bits) - 1)) << (i % (8 / bits) * bits));
}

}  // namespace thinwire
