// Rows of coded blocks in the CPU's memory.
#pragma once
#include "../block_code.h"
#include "common.h"

namespace thinwire {

inline const Dtypes BYTE{at::kByte};

// The shape of rows, which hold slots of block_size codes and nothing else.
inline RowShape check_rows(const at::Tensor& rows, int64_t count, int64_t block_size, int64_t bits) {
    THINWIRE_CHECK(bits == 8 || bits == 4 || bits == 2, "bits is ", bits, "; allowed is 8, 4 or 2");
    check_block_size(block_size);
    check(rows, "rows", BYTE, {count, ANY}, at::kCPU, true);
    const RowShape shape(rows.size(1), block_size, bits);
    THINWIRE_CHECK(shape.bytes() == rows.size(1), "rows is ", rows.sizes(), " for block_size ", block_size,
                   " and ", bits, " bits; allowed are rows of a multiple of ", 2 + shape.code_bytes, " bytes");
    return shape;
}

// Checks that a list says something of every slot; what follows is not read.
inline const int64_t* check_list(const at::Tensor& list, const char* name, int64_t slots) {
    check(list, name, LONG, {ANY}, at::kCPU);
    THINWIRE_CHECK(list.numel() >= slots, name, " is ", list.sizes(), "; allowed is [", slots, "] or more");
    return list.const_data_ptr<int64_t>();
}

inline const int64_t* check_chosen_list(const at::Tensor& chosen, const at::Tensor& table, int64_t block_size,
                                        int64_t slots) {
    const int64_t* blocks = check_list(chosen, "chosen", slots);
    check_chosen(blocks, table, block_size);
    return blocks;
}

// The places of so many slots, each one of `available`; null where slot k lies at k.
inline const int64_t* check_places(const std::optional<at::Tensor>& places, int64_t slots, int64_t available) {
    if (!places) {
        THINWIRE_CHECK(slots == available, "without places there are ", available,
                       " slots in a row; allowed is ", slots, ", the table's");
        return nullptr;
    }
    const int64_t* list = check_list(*places, "places", slots);
    for (int64_t k = 0; k < slots; ++k) {
        THINWIRE_CHECK(list[k] >= 0 && list[k] < available, "places has ", list[k], " at ", k,
                       "; allowed is from 0 to below ", available);
    }
    return list;
}

// Checks that no two slots are written to one place.
inline void check_distinct(const int64_t* places, int64_t slots, int64_t available) {
    if (!places) return;
    std::vector<bool> taken(available);
    for (int64_t k = 0; k < slots; ++k) {
        THINWIRE_CHECK(!taken[places[k]], "places has ", places[k], " again at ", k,
                       "; allowed are distinct places");
        taken[places[k]] = true;
    }
}

// Where a slot's scale and codes lie.
template <typename Byte>
struct SlotAt {
    Byte *scale, *codes;
};

// Rows in memory. Byte is uint8_t, const where they are read.
template <typename Byte>
struct RowsAt {
    Byte* start;
    int64_t stride;
    RowShape shape;

    SlotAt<Byte> slot(int64_t place) const {
        const int64_t row = place < shape.slots ? 0 : place / shape.slots;  // most often there is one, and no division
        const int64_t slot = place - row * shape.slots;
        Byte* at = start + row * stride;
        return {at + shape.scale_at(slot), at + shape.codes_at(slot)};
    }
};

}  // namespace thinwire
