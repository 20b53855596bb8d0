// scatter_blocks_: every thread owns a range of out's blocks and merges the ranks' ascending lists into it.
#include "common.h"

namespace thinwire {
namespace {

// The sum starts at zero, so that the first rank's -0 becomes 0; factors of 1 change no bit.
template <typename Wide, typename Payload>
THINWIRE_HOT void add_loop(Wide* sum, const Payload* row, int64_t count, Wide inverse, Wide factor, bool first) {
    if (first) {
        for (int64_t i = 0; i < count; ++i) sum[i] = (Wide(0) + static_cast<Wide>(row[i]) * inverse) * factor;
    } else {
        for (int64_t i = 0; i < count; ++i) sum[i] = (sum[i] + static_cast<Wide>(row[i]) * inverse) * factor;
    }
}

}  // namespace

// One rank's blocks, of which the last may be ragged.
template <typename Wide, typename Payload>
THINWIRE_HOT void put_loop(Wide* out, const Payload* row, const int64_t* list, int64_t count, int64_t block_size,
                           int64_t numel, Wide inverse, Wide factor) {
    for (int64_t j = 0; j < count; ++j, row += block_size) {
        const int64_t begin = list[j] * block_size;
        add_loop(out + begin, row, std::min(block_size, numel - begin), inverse, factor, true);
    }
}

#define THINWIRE_ADD(Wide, Payload)                                                                              \
    THINWIRE_CLONES void put_blocks(Wide* out, const Payload* row, const int64_t* list, int64_t count,           \
                                    int64_t block_size, int64_t numel, Wide inverse, Wide factor) {              \
        put_loop(out, row, list, count, block_size, numel, inverse, factor);                                     \
    }                                                                                                            \
    THINWIRE_CLONES void add_row(Wide* sum, const Payload* row, int64_t count, Wide inverse, Wide factor, bool first) { \
        add_loop(sum, row, count, inverse, factor, first);                                                       \
    }
THINWIRE_ADD(float, float)
THINWIRE_ADD(float, double)
THINWIRE_ADD(float, at::BFloat16)
THINWIRE_ADD(float, at::Half)
THINWIRE_ADD(double, float)
THINWIRE_ADD(double, double)
THINWIRE_ADD(double, at::BFloat16)
THINWIRE_ADD(double, at::Half)

namespace {

template <typename Out, typename Payload>
struct Scatter {
    using Wide = at::opmath_type<Out>;
    const Payload* payloads;
    const float* inverses;
    const int64_t* chosen;
    const Wide* factors;
    Out* out;
    int64_t ranks, row_stride, slots;
    bool accumulate;

    struct Cursor {
        const int64_t *next, *end;
        const Payload* row;
        int64_t rank;
    };

    // Few blocks of one rank: it is quicker to clear everything than all that is between them.
    static constexpr int64_t FEW = 4;

    void put_few(int64_t s, const Segment& segment, int64_t low, int64_t high, const Cursor& sender) const {
        const int64_t begin = low * segment.block_size, end = std::min(high * segment.block_size, segment.numel);
        std::memset(static_cast<void*>(out + segment.start + begin), 0, (end - begin) * sizeof(Out));
        put_blocks(out + segment.start, sender.row, sender.next, sender.end - sender.next, segment.block_size,
                   segment.numel, inverses ? static_cast<Wide>(inverses[sender.rank]) : Wide(1), factors[s]);
    }

    // One thread's share of one parameter.
    void operator()(int64_t s, const Segment& segment, int64_t low, int64_t high) const {
        std::vector<Cursor> cursors;
        for (int64_t rank = 0; rank < ranks; ++rank) {
            const int64_t* list = chosen + rank * slots + segment.first_slot;
            const int64_t at = lower_bound(list, segment.slots, low), end = lower_bound(list, segment.slots, high);
            if (at < end) {
                cursors.push_back({list + at, list + end,
                                   payloads + rank * row_stride + segment.offset + at * segment.block_size, rank});
            }
        }
        if constexpr (IN_PLACE) {
            if (!accumulate && cursors.size() == 1 && (cursors[0].end - cursors[0].next) * FEW <= high - low) {
                return put_few(s, segment, low, high, cursors[0]);
            }
        }
        std::vector<Cursor*> senders(cursors.size());
        std::vector<Wide> scratch(IN_PLACE && !accumulate ? 0 : segment.block_size);
        int64_t block = low;
        while (block < high) {
            int64_t next = high;
            size_t sending = 0;
            for (Cursor& cursor : cursors) {
                if (cursor.next == cursor.end || *cursor.next > next) continue;
                if (*cursor.next < next) next = *cursor.next, sending = 0;
                senders[sending++] = &cursor;
            }
            Out* to = out + segment.start + block * segment.block_size;
            const int64_t gap = std::min(next * segment.block_size, segment.numel) - block * segment.block_size;
            if (!accumulate && gap > 0) std::memset(static_cast<void*>(to), 0, gap * sizeof(Out));
            if (next == high) break;
            to += gap;
            const int64_t width = segment.width(next);
            Wide* sum = scratch.data();
            if constexpr (IN_PLACE) sum = accumulate ? sum : to;
            for (size_t i = 0; i < sending; ++i) {
                Cursor& sender = *senders[i];
                add_row(sum, sender.row, width, inverses ? static_cast<Wide>(inverses[sender.rank]) : Wide(1),
                        i + 1 == sending ? factors[s] : Wide(1), i == 0);
                ++sender.next;
                sender.row += segment.block_size;
            }
            if (accumulate) {
                for (int64_t i = 0; i < width; ++i) to[i] = c10::convert<Out>(static_cast<Wide>(to[i]) + sum[i]);
            } else if constexpr (!IN_PLACE) {
                for (int64_t i = 0; i < width; ++i) to[i] = c10::convert<Out>(sum[i]);
            }
            block = next + 1;
        }
    }

    static constexpr bool IN_PLACE = std::is_same_v<Out, Wide>;  // out itself can hold the sum
};

void scatter_blocks_(const at::Tensor& payloads, const std::optional<at::Tensor>& inverses, const at::Tensor& chosen,
                     const at::Tensor& table, int64_t block_size, const at::Tensor& factors, bool accumulate,
                     const at::Tensor& out) {
    const Totals totals = check_cpu_table(table, block_size);
    check(payloads, "payloads", DATA, {ANY, totals.payload}, at::kCPU, true);
    const int64_t ranks = payloads.size(0);
    if (inverses) check(*inverses, "inverses", FLOAT, {ranks}, at::kCPU);
    check(chosen, "chosen", LONG, {ranks, totals.slots}, at::kCPU);
    check(factors, "factors", {wide(out.scalar_type())}, {table.size(0)}, at::kCPU);
    check(out, "out", DATA, {totals.elements}, at::kCPU);
    const int64_t* lists = chosen.const_data_ptr<int64_t>();
    at::parallel_for(0, ranks, totals.slots > GRAIN ? 1 : ranks, [&](int64_t begin, int64_t end) {
        for (int64_t rank = begin; rank < end; ++rank) check_chosen(lists + rank * totals.slots, table, block_size);
    });
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, payloads.scalar_type(), "scatter_blocks_", [&] {
        using payload_t = scalar_t;
        AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, out.scalar_type(), "scatter_blocks_", [&] {
            const Scatter<scalar_t, payload_t> scatter{
                payloads.const_data_ptr<payload_t>(), inverses ? inverses->const_data_ptr<float>() : nullptr, lists,
                factors.const_data_ptr<at::opmath_type<scalar_t>>(), out.mutable_data_ptr<scalar_t>(), ranks,
                payloads.stride(0), totals.slots, accumulate};
            at::parallel_for(0, totals.blocks, block_grain(block_size), [&](int64_t begin, int64_t end) {
                for_segments(table, block_size, FIRST_BLOCK, begin, end, scatter);
            });
        });
    });
}

TORCH_LIBRARY_IMPL(thinwire, CPU, m) { m.impl("scatter_blocks_", scatter_blocks_); }

}  // namespace
}  // namespace thinwire
