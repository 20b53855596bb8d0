// deal_elements and undeal_elements: a payload cut into shares, and put together again, by copies of bytes.
#include "common.h"

namespace thinwire {
namespace {

// Where the shares of one parameter begin in every row, how many elements each has, and the part of the payload.
struct Dealt {
    int64_t begin, share, size, offset;

    int64_t first(int64_t row) const { return std::min(row * share, size); }
    int64_t count(int64_t row) const { return std::min(share, size - first(row)); }
};

// What is dealt, ordered by where it begins; each lies apart from the rest.
std::vector<Dealt> check_dealt(const at::Tensor& table, int64_t block_size, const at::Tensor& begins,
                               const at::Tensor& payload, const at::Tensor& rows) {
    const Totals totals = check_cpu_table(table, block_size);
    check(payload, "payload", DATA, {totals.payload}, at::kCPU);
    check(rows, "rows", {payload.scalar_type()}, {ANY, ANY}, at::kCPU, true);
    check(begins, "begins", LONG, {table.size(0)}, at::kCPU);
    const int64_t ranks = rows.size(0), part = rows.size(1);
    THINWIRE_CHECK(ranks >= 1, "rows is ", rows.sizes(), "; allowed is one row or more");
    std::vector<Dealt> all;
    for (int64_t s = 0; s < table.size(0); ++s) {
        const Segment segment(table.const_data_ptr<int64_t>(), s, block_size);
        const int64_t size = segment.payload(), share = (size + ranks - 1) / ranks;
        const int64_t begin = begins.const_data_ptr<int64_t>()[s];
        THINWIRE_CHECK(begin >= 0 && begin <= part - share, "begins has ", begin, " for parameter ", s,
                       ", whose shares are of ", share, " elements; allowed is from 0 to ", part - share,
                       ", for rows are ", rows.sizes());
        if (size > 0) all.push_back({begin, share, size, segment.offset});
    }
    std::sort(all.begin(), all.end(), [](const Dealt& a, const Dealt& b) { return a.begin < b.begin; });
    for (size_t i = 1; i < all.size(); ++i) {
        THINWIRE_CHECK(all[i - 1].begin + all[i - 1].share <= all[i].begin, "begins has ", all[i - 1].begin,
                       " for shares of ", all[i - 1].share, " elements, and ", all[i].begin,
                       "; allowed are shares that lie apart");
    }
    return all;
}

void deal_elements(const at::Tensor& payload, const at::Tensor& table, int64_t block_size, const at::Tensor& begins,
                   const at::Tensor& rows) {
    std::vector<Dealt> all = check_dealt(table, block_size, begins, payload, rows);
    all.push_back({rows.size(1), 0, 0, 0});  // what follows the last share is zeroed before this one
    const int64_t each = payload.element_size(), pieces = all.size();
    const char* from = static_cast<const char*>(payload.const_data_ptr());
    char* to = static_cast<char*>(rows.mutable_data_ptr());
    for_tasks(rows.size(0) * pieces, payload.numel() > GRAIN, [&](int64_t task) {
        const int64_t row = task / pieces, piece = task % pieces;
        const Dealt& one = all[piece];
        char* start = to + row * rows.stride(0) * each;
        const int64_t gap = piece ? all[piece - 1].begin + all[piece - 1].share : 0, count = one.count(row);
        std::memset(start + gap * each, 0, (one.begin - gap) * each);
        if (count > 0) std::memcpy(start + one.begin * each, from + (one.offset + one.first(row)) * each, count * each);
        std::memset(start + (one.begin + count) * each, 0, (one.share - count) * each);
    });
}

void undeal_elements(const at::Tensor& rows, const at::Tensor& table, int64_t block_size, const at::Tensor& begins,
                     const at::Tensor& payload) {
    const std::vector<Dealt> all = check_dealt(table, block_size, begins, payload, rows);
    const int64_t each = payload.element_size(), pieces = all.size();
    const char* from = static_cast<const char*>(rows.const_data_ptr());
    char* to = static_cast<char*>(payload.mutable_data_ptr());
    for_tasks(rows.size(0) * pieces, payload.numel() > GRAIN, [&](int64_t task) {
        const int64_t row = task / pieces;
        const Dealt& one = all[task % pieces];
        std::memcpy(to + (one.offset + one.first(row)) * each, from + (row * rows.stride(0) + one.begin) * each,
                    one.count(row) * each);
    });
}

TORCH_LIBRARY_IMPL(thinwire, CPU, m) {
    m.impl("deal_elements", deal_elements);
    m.impl("undeal_elements", undeal_elements);
}

}  // namespace
}  // namespace thinwire
