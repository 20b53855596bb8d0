// deal_elements and undeal_elements: between a payload and the shares that its owners have of each parameter.
#include "common.cuh"

namespace thinwire {
namespace {

template <typename Element, bool UNDEAL>
__global__ void deal(Element* __restrict__ payload, Table table, const int64_t* __restrict__ begins,
                     Element* __restrict__ rows, Divider by_n, int64_t part, int64_t row_stride, int64_t P) {
    for_tiles<OFFSET>(table, P, [&](int64_t s, const Segment& segment, int64_t begin, int64_t end) {
        const int64_t share = by_n.rounded_up(segment.payload()), first = begins[s];
        if (first < 0 || first + share > part) return;
        const Divider by_share(share);
        for (int64_t i = begin + threadIdx.x; i < end; i += THREADS) {
            const int64_t row = by_share.quotient(i);
            Element& mine = payload[segment.offset + i];
            Element& theirs = rows[row * row_stride + first + (i - row * share)];
            if (UNDEAL) mine = theirs;
            else theirs = mine;
        }
    });
}

}  // namespace

cudaError_t launch_deal(Array payload, Table table, const int64_t* begins, void* rows, int64_t n, int64_t part,
                        int64_t row_stride, bool undeal, cudaStream_t stream) {
    Queue queue(stream);
    const int64_t size = size_of(payload.dtype);
    if (!undeal) queue.clear_rows(rows, row_stride * size, part * size, n);
    if (n == 0 || payload.size == 0) return queue.error();
    const auto start = [&](auto element) {
        using Element = decltype(element);
        queue.launch(undeal ? deal<Element, true> : deal<Element, false>, grid_for(payload.size, TILE),
                     static_cast<Element*>(payload.data), table, begins, static_cast<Element*>(rows), Divider(n), part,
                     row_stride, payload.size);
    };
    if (size == 8) start(uint64_t());
    else if (size == 4) start(uint32_t());
    else start(uint16_t());
    return queue.error();
}

}  // namespace thinwire
