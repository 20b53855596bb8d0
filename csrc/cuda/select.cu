// select_blocks: the complements of the norms' order, so that the largest comes first and ties go to the lower number.
#include "order.cuh"

namespace thinwire {
namespace {

template <typename Norm>
struct Largest {
    static constexpr int QUERIES = 1, BITS = 8 * sizeof(Norm);
    static constexpr bool DISTINCT = false, COLLIDING = true;
    const Norm* norms;
    int64_t M;

    __device__ auto keys(int64_t, int64_t, const Segment& segment) const {
        const Norm* const squares = norms + segment.first_block;
        const int64_t count = M - segment.first_block;
        return [squares, count](int64_t block) -> uint64_t {
            using Key = decltype(order_key(Norm()));
            return block < count ? static_cast<Key>(~order_key(squares[block])) : ~Key(0);
        };
    }

    __device__ void ask(int64_t, int64_t, const Segment& segment, Rank* rank) const {
        rank->position = segment.slots - 1;
        if (segment.slots == 0 || segment.whole()) rank->flags = SETTLED | BEYOND;
    }
};

}  // namespace

// Of float64 norms no more is needed.
int64_t select_scratch(Table table) { return OrderScratch(nullptr, table.segments, 1, 1).bytes; }

cudaError_t launch_select(Array norms, Table table, int64_t* chosen, int64_t K, void* scratch, cudaStream_t stream) {
    Queue queue(stream);
    if (table.segments == 0) return queue.error();
    visit_wide(norms.dtype, [&](auto tag) {
        using Norm = typename decltype(tag)::type;
        const Largest<Norm> largest{static_cast<const Norm*>(norms.data), norms.size};
        const int passes = norms.size <= Tiles::SHORTEST ? 1 : Largest<Norm>::BITS / DIGIT;
        find_in_order(queue, largest, table, OrderScratch(scratch, table.segments, 1, 1), 1, passes, chosen, K);
    });
    return queue.error();
}

}  // namespace thinwire
