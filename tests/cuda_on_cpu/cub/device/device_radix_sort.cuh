// What csrc/cuda uses of CUB, on the CPU.
#pragma once
#include <algorithm>

#include "emulate.h"

namespace cub {

struct DeviceRadixSort {
    template <typename Key>
    static cudaError_t SortKeys(void* temporary, size_t& bytes, const Key* keys, Key* sorted, int count, int = 0,
                                int = 0, cudaStream_t = nullptr) {
        if (temporary) std::sort(sorted, std::copy(keys, keys + count, sorted));
        else bytes = 1;
        return cudaSuccess;
    }
};

struct DeviceSelect {
    template <typename Key, typename Count>
    static cudaError_t Unique(void* temporary, size_t& bytes, const Key* keys, Key* distinct, Count* found, int count,
                              cudaStream_t = nullptr) {
        if (temporary) *found = std::unique_copy(keys, keys + count, distinct) - distinct;
        else bytes = 1;
        return cudaSuccess;
    }
};

}  // namespace cub
