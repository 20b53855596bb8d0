// unite_blocks: what ranks named is sorted, each block once, and every place of the union looks up its block.
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_select.cuh>

#include "scan.cuh"

namespace thinwire {
namespace {

// Names as keys; those of no block come last, as one.
template <typename Name, typename Key>
__global__ void collect(const Name* __restrict__ named, int64_t count, Table table, Key* __restrict__ keys) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * THREADS;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; i < count; i += stride) {
        const int64_t block = named[i];
        bool exists = false;
        if (block >= 0 && table.segments > 0) {
            const Segment last = segment_of(table, table.segments - 1);
            exists = block < last.first_block + last.blocks;
        }
        keys[i] = exists ? static_cast<Key>(block) : ~Key(0);
    }
}

// First of the ascending keys that is not below the bound.
template <typename Key>
__device__ int64_t first_key(const Key* keys, int64_t count, int64_t bound) {
    int64_t low = 0, high = count;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (keys[middle] < static_cast<Key>(bound)) low = middle + 1;
        else high = middle;
    }
    return low;
}

// By one thread block: the table of the union, and where each parameter's keys begin.
template <typename Key>
__global__ void write_table(const Key* __restrict__ keys, const int64_t* __restrict__ count, Table table,
                            int64_t* __restrict__ united, int64_t* __restrict__ begins) {
    int64_t slots_before = 0, payload_before = 0;
    for (int64_t from = 0; from < table.segments; from += THREADS) {
        const int64_t s = from + threadIdx.x;
        int64_t slots = 0, payload = 0, all_slots, all_payload;
        if (s < table.segments) {
            Segment segment = segment_of(table, s);
            if (segment.whole()) {
                begins[s] = -1;
            } else {
                begins[s] = first_key(keys, *count, segment.first_block);
                segment.slots = first_key(keys, *count, segment.first_block + segment.blocks) - begins[s];
            }
            slots = segment.slots, payload = segment.payload();
        }
        const int64_t first_slot = slots_before + sum_before(slots, all_slots);
        const int64_t offset = payload_before + sum_before(payload, all_payload);
        slots_before += all_slots, payload_before += all_payload;
        if (s >= table.segments) continue;
        const int64_t* const row = table.rows + s * COLUMNS;
        int64_t* const to = united + s * COLUMNS;
        to[START] = row[START], to[NUMEL] = row[NUMEL], to[FIRST_BLOCK] = row[FIRST_BLOCK];
        to[SLOTS] = slots, to[FIRST_SLOT] = first_slot, to[OFFSET] = offset;
    }
}

template <typename Key>
__global__ void write_blocks(const Key* __restrict__ keys, Table united, const int64_t* __restrict__ begins,
                             int64_t* __restrict__ chosen, int64_t C) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * THREADS;
    for (int64_t k = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; k < C; k += stride) {
        int64_t block = INT64_MAX;
        if (united.segments > 0) {
            const int64_t s = find_segment(united.rows, united.segments, FIRST_SLOT, k);
            const Segment segment = segment_of(united, s);
            const int64_t slot = k - segment.first_slot;
            if (slot < segment.slots) {
                block = begins[s] < 0 ? slot : static_cast<int64_t>(keys[begins[s] + slot]) - segment.first_block;
            }
        }
        chosen[k] = block;
    }
}

template <typename Key>
struct UniteScratch {
    Key *keys, *sorted, *distinct;
    int64_t *count, *begins;
    size_t sort_bytes = 0, distinct_bytes = 0;
    void* temporary;
    cudaError_t error;
    int64_t bytes;

    UniteScratch(void* memory, int64_t named, int64_t S) {
        error = cub::DeviceRadixSort::SortKeys(nullptr, sort_bytes, static_cast<const Key*>(nullptr),
                                               static_cast<Key*>(nullptr), static_cast<int>(named));
        if (error == cudaSuccess) {
            error = cub::DeviceSelect::Unique(nullptr, distinct_bytes, static_cast<const Key*>(nullptr),
                                              static_cast<Key*>(nullptr), static_cast<int64_t*>(nullptr),
                                              static_cast<int>(named));
        }
        Cutter cutter(memory);
        keys = cutter.take<Key>(named), sorted = cutter.take<Key>(named), distinct = cutter.take<Key>(named);
        count = cutter.take<int64_t>(1), begins = cutter.take<int64_t>(S);
        temporary = cutter.take<char>(sort_bytes > distinct_bytes ? sort_bytes : distinct_bytes);
        bytes = cutter.bytes();
    }
};

template <typename Name, typename Key>
cudaError_t unite(const void* named, int64_t count, Table table, int64_t* chosen, int64_t C, int64_t* united,
                  void* memory, cudaStream_t stream) {
    Queue queue(stream);
    UniteScratch<Key> scratch(memory, count, table.segments);
    queue.add(scratch.error);
    queue.clear(scratch.count, sizeof(int64_t));
    if (count > 0) {
        queue.launch(collect<Name, Key>, grid_for(count, THREADS), static_cast<const Name*>(named), count, table,
                     scratch.keys);
        if (queue.error() != cudaSuccess) return queue.error();
        queue.add(cub::DeviceRadixSort::SortKeys(scratch.temporary, scratch.sort_bytes,
                                                 static_cast<const Key*>(scratch.keys), scratch.sorted,
                                                 static_cast<int>(count), 0, 8 * sizeof(Key), stream));
        queue.add(cub::DeviceSelect::Unique(scratch.temporary, scratch.distinct_bytes,
                                            static_cast<const Key*>(scratch.sorted), scratch.distinct, scratch.count,
                                            static_cast<int>(count), stream));
    }
    const Key* const keys = scratch.distinct;
    queue.launch(write_table<Key>, 1, keys, scratch.count, table, united, scratch.begins);
    const Table of_union{united, table.segments, table.block_size, table.by_block_size};
    queue.launch(write_blocks<Key>, grid_for(C, THREADS), keys, of_union, scratch.begins, chosen, C);
    return queue.error();
}

}  // namespace

int64_t unite_scratch(int64_t named, bool wide, int64_t S) {
    return wide ? UniteScratch<uint64_t>(nullptr, named, S).bytes : UniteScratch<uint32_t>(nullptr, named, S).bytes;
}

cudaError_t launch_unite(const void* named, bool wide, int64_t count, Table table, int64_t* chosen, int64_t C,
                         int64_t* united, void* scratch, cudaStream_t stream) {
    return wide ? unite<int64_t, uint64_t>(named, count, table, chosen, C, united, scratch, stream)
                : unite<int32_t, uint32_t>(named, count, table, chosen, C, united, scratch, stream);
}

}  // namespace thinwire
