// What the CPU and CUDA operators share: the table's geometry, the generator's keys and the order of norms.
// No torch header here, so that nvcc can read it. hooks/thinwire/ops/reference.py says what everything means.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define THINWIRE_INLINE __host__ __device__ __forceinline__
#else
#define THINWIRE_INLINE inline
#endif

namespace thinwire {

enum Column { START, NUMEL, FIRST_BLOCK, SLOTS, FIRST_SLOT, OFFSET, COLUMNS };
enum Status : int32_t { TOUCHED = 1, NONFINITE = 2 };
constexpr int LANES = 16;  // interleaved partial sums of a block's squared norm

// Gradients beyond this count as overflowed in a memory: squared norms and what a wire dtype makes of sums stay finite.
template <typename Wide>
constexpr Wide LARGEST = static_cast<Wide>(0x1p62);
template <>
constexpr double LARGEST<double> = 0x1p500;

// Divides by a number that serves many times: a multiplication, where a GPU takes a hundred instructions to divide.
struct Divider {
    uint64_t divisor, reciprocal;

    THINWIRE_INLINE explicit Divider(int64_t divisor_)
        : divisor(static_cast<uint64_t>(divisor_)), reciprocal(UINT64_MAX / divisor) {}

    // Of a number that is not negative. The product's upper half is the quotient or one less.
    THINWIRE_INLINE int64_t quotient(int64_t number) const {
        const uint64_t n = static_cast<uint64_t>(number);
#ifdef __CUDA_ARCH__
        const uint64_t low = __umul64hi(n, reciprocal);
#else
        const uint64_t low = static_cast<uint64_t>(static_cast<unsigned __int128>(n) * reciprocal >> 64);
#endif
        return static_cast<int64_t>(low + (n - low * divisor >= divisor));
    }

    THINWIRE_INLINE int64_t rounded_up(int64_t number) const {
        const int64_t down = quotient(number);
        return down + (down * static_cast<int64_t>(divisor) != number);
    }
};

// One parameter of the flat tensor: a row of the table.
struct Segment {
    int64_t start, numel, first_block, slots, first_slot, offset, block_size, blocks;

    THINWIRE_INLINE Segment(const int64_t* table, int64_t index, int64_t block_size_)
        : Segment(table + index * COLUMNS, block_size_) {
        blocks = numel / block_size + (numel % block_size != 0);
    }

    // by divides by block_size, faster than a GPU does.
    THINWIRE_INLINE Segment(const int64_t* table, int64_t index, int64_t block_size_, const Divider& by)
        : Segment(table + index * COLUMNS, block_size_) {
        blocks = by.rounded_up(numel);
    }

    // Elements in a block: fewer than block_size in the last one of a ragged parameter.
    THINWIRE_INLINE int64_t width(int64_t block) const {
        const int64_t rest = numel - block * block_size;
        return rest < block_size ? rest : block_size;
    }

    // Whether all blocks travel; then the payload holds exactly the elements, without padding.
    THINWIRE_INLINE bool whole() const { return slots == blocks; }

    // Elements of the payload that a slot fills; the difference to the block's width is padding.
    THINWIRE_INLINE int64_t slot_width(int64_t block) const { return whole() ? width(block) : block_size; }

    THINWIRE_INLINE int64_t payload() const { return whole() ? numel : slots * block_size; }

  private:
    THINWIRE_INLINE Segment(const int64_t* row, int64_t block_size_)
        : start(row[START]), numel(row[NUMEL]), first_block(row[FIRST_BLOCK]), slots(row[SLOTS]),
          first_slot(row[FIRST_SLOT]), offset(row[OFFSET]), block_size(block_size_), blocks(0) {}
};

// The parameter in which the position lies, in the numbering of column: START, FIRST_BLOCK or FIRST_SLOT.
// Empty parameters begin where the next one does, so the last row that begins at or before the position holds it.
THINWIRE_INLINE int64_t find_segment(const int64_t* table, int64_t segments, Column column, int64_t position) {
    int64_t low = 0, high = segments;
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        if (table[middle * COLUMNS + column] <= position) low = middle;
        else high = middle;
    }
    return low;
}

// First index of the ascending values that is not below the bound.
THINWIRE_INLINE int64_t lower_bound(const int64_t* values, int64_t count, int64_t bound) {
    int64_t low = 0, high = count;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (values[middle] < bound) low = middle + 1;
        else high = middle;
    }
    return low;
}

// splitmix64.
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u;

THINWIRE_INLINE uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

THINWIRE_INLINE uint64_t key_start(int64_t seed, int64_t step, int64_t unit, int64_t stream) {
    uint64_t start = 0;
    start = mix((start ^ static_cast<uint64_t>(seed)) + GOLDEN);
    start = mix((start ^ static_cast<uint64_t>(step)) + GOLDEN);
    start = mix((start ^ static_cast<uint64_t>(unit)) + GOLDEN);
    return mix((start ^ static_cast<uint64_t>(stream)) + GOLDEN);
}

// The key of a block. The reference compares keys as signed integers: flipping the top bit gives unsigned ones the
// same order. For one start the keys of all blocks differ, because every step of the hash is a bijection.
THINWIRE_INLINE uint64_t block_key(uint64_t start, int64_t block) {
    return mix(start + static_cast<uint64_t>(block + 1) * GOLDEN) ^ (uint64_t{1} << 63);
}

// The order positions that a deal takes: [first, end), and when that passes the last block, also [0, wrapped).
struct Deal {
    int64_t first, end, wrapped;

    THINWIRE_INLINE Deal(int64_t deal, int64_t slots, int64_t blocks) {
        // Reduced before the multiplication, which could overflow: deals repeat after `blocks` of them.
        const int64_t turn = (deal % blocks + blocks) % blocks;
        first = modulo_product(turn, slots, blocks);
        wrapped = first + slots > blocks ? first + slots - blocks : 0;
        end = first + slots - wrapped;
    }

    THINWIRE_INLINE static int64_t modulo_product(int64_t a, int64_t b, int64_t modulus) {
        if (modulus <= INT32_MAX) return a * b % modulus;
        int64_t product = 0;
        for (a %= modulus; b > 0; b >>= 1, a = (a + a) % modulus) {
            if (b & 1) product = (product + a) % modulus;
        }
        return product;
    }
};

// An unsigned integer that orders floating-point numbers as torch.sort does: NaN above everything, -0 equal to 0.
THINWIRE_INLINE uint32_t order_key(float value) {
    if (value != value) return UINT32_MAX;
    uint32_t bits;
    value += 0.0f;  // -0 becomes 0
    memcpy(&bits, &value, sizeof(bits));
    return bits >> 31 ? ~bits : bits | (uint32_t{1} << 31);
}

THINWIRE_INLINE uint64_t order_key(double value) {
    if (value != value) return UINT64_MAX;
    uint64_t bits;
    value += 0.0;
    memcpy(&bits, &value, sizeof(bits));
    return bits >> 63 ? ~bits : bits | (uint64_t{1} << 63);
}

}  // namespace thinwire
