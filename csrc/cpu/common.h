// Helpers of the CPU operators.
#pragma once
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <c10/util/TypeCast.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "../checks.h"

// One compiled function for each instruction set, chosen when the library is loaded: wheels run on any x86-64.
// It cannot mark templates, so a hot loop is an inlined template that plain functions with this mark call.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define THINWIRE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define THINWIRE_CLONES
#endif
#if defined(__GNUC__)
#define THINWIRE_HOT inline __attribute__((always_inline))
#define THINWIRE_HOT_LAMBDA __attribute__((always_inline))
#else
#define THINWIRE_HOT inline
#define THINWIRE_HOT_LAMBDA
#endif

namespace thinwire {

constexpr int64_t GRAIN = 32768;  // elements worth a thread

inline int64_t block_grain(int64_t block_size) { return std::max<int64_t>(1, GRAIN / block_size); }

struct Totals {
    int64_t elements = 0, blocks = 0, slots = 0, payload = 0;
};

// Checks a table in the CPU's memory: parameters, blocks, slots and payload must follow one another without gaps.
inline Totals check_cpu_table(const at::Tensor& table, int64_t block_size) {
    check_table(table, block_size, at::kCPU);
    const int64_t* rows = table.const_data_ptr<int64_t>();
    Totals totals;
    for (int64_t s = 0; s < table.size(0); ++s) {
        const Segment segment(rows, s, block_size);
        THINWIRE_CHECK(segment.start == totals.elements && segment.first_block == totals.blocks &&
                           segment.first_slot == totals.slots && segment.offset == totals.payload &&
                           segment.numel >= 0 && segment.slots >= 0 && segment.slots <= segment.blocks,
                       "row ", s, " of table is ", at::IntArrayRef(rows + s * COLUMNS, COLUMNS),
                       " for block_size ", block_size, "; expected start ", totals.elements, ", first block ", totals.blocks, ", slots from 0 to ",
                       segment.blocks, ", first slot ", totals.slots, ", offset ", totals.payload);
        totals.elements += segment.numel;
        totals.blocks += segment.blocks;
        totals.slots += segment.slots;
        totals.payload += segment.payload();
    }
    return totals;
}

// examine has no blocks: of the table it reads where parameters start.
inline int64_t check_cpu_starts(const at::Tensor& table) {
    check(table, "table", LONG, {ANY, COLUMNS}, at::kCPU);
    const int64_t* rows = table.const_data_ptr<int64_t>();
    int64_t elements = 0;
    for (int64_t s = 0; s < table.size(0); ++s) {
        const Segment segment(rows, s, 1);
        THINWIRE_CHECK(segment.start == elements && segment.numel >= 0, "row ", s, " of table is ",
                       at::IntArrayRef(rows + s * COLUMNS, COLUMNS), "; expected start ", elements);
        elements += segment.numel;
    }
    return elements;
}

// Checks that the chosen blocks exist and ascend: everything after relies on it not to write out of bounds.
inline void check_chosen(const int64_t* chosen, const at::Tensor& table, int64_t block_size) {
    const int64_t* rows = table.const_data_ptr<int64_t>();
    for (int64_t s = 0; s < table.size(0); ++s) {
        const Segment segment(rows, s, block_size);
        int64_t last = -1;
        for (int64_t j = 0; j < segment.slots; ++j) {
            const int64_t block = chosen[segment.first_slot + j];
            THINWIRE_CHECK(block > last && block < segment.blocks, "chosen has block ", block, " after ", last,
                           " in parameter ", s, "; allowed are ascending numbers below ", segment.blocks);
            last = block;
        }
    }
}

// Calls visit(s, segment, low, high) for each parameter that meets [begin, end) of the column's numbering, where
// low and high count from the parameter's own beginning.
template <typename Visit>
inline void for_segments(const at::Tensor& table, int64_t block_size, Column column, int64_t begin, int64_t end,
                         const Visit& visit) {
    const int64_t* rows = table.const_data_ptr<int64_t>();
    const int64_t segments = table.size(0);
    if (begin >= end || segments == 0) return;
    for (int64_t s = find_segment(rows, segments, column, begin); s < segments; ++s) {
        const Segment segment(rows, s, block_size);
        const int64_t first = rows[s * COLUMNS + column];
        const int64_t size = column == START ? segment.numel : column == FIRST_BLOCK ? segment.blocks : segment.slots;
        if (first >= end) break;
        const int64_t low = std::max<int64_t>(begin - first, 0), high = std::min(end - first, size);
        if (low < high) visit(s, segment, low, high);
    }
}

// Runs work(task) for every task, each thread taking the next when it is done with one: tasks differ in size.
template <typename Work>
inline void for_tasks(int64_t tasks, bool parallel, const Work& work) {
    if (!parallel) {
        for (int64_t task = 0; task < tasks; ++task) work(task);
        return;
    }
    std::atomic<int64_t> next{0};
    at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t worker = begin; worker < end; ++worker) {
            for (int64_t task = next++; task < tasks; task = next++) work(task);
        }
    });
}

template <typename T>
THINWIRE_HOT bool is_finite(T value) {
    return value - value == T(0);
}

// False for NaN too.
template <typename T>
THINWIRE_HOT bool is_usable(T value) {
    return std::abs(value) <= LARGEST<T>;
}

}  // namespace thinwire
