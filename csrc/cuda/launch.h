// What the CUDA files offer to ops.cpp: pointers, sizes and a stream; no torch header, so nvcc compiles them fast.
// S parameters, N elements, M blocks, K slots, R ranks or rows, as in hooks/thinwire/ops/block_ops.py. Nothing here waits for
// the device: the table's contents are read there.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace thinwire {

enum class Dtype { F32, F64, BF16, F16 };

// A tensor's memory and what it holds; read-only arguments use it too.
struct Array {
    void* data;  // null where the argument is None
    Dtype dtype;
};

struct Table {
    const int64_t* rows;
    int64_t segments, block_size;
};

void launch_examine(Array grad, Table table, int32_t* status, int64_t N, cudaStream_t stream);

void launch_accumulate(Array residual, Array residual_before, Array velocity, Array velocity_before, Array grad,
                       double momentum, Table table, Array norms, int32_t* status, int64_t N, int64_t M,
                       cudaStream_t stream);

// streams and deals are in the host's memory.
void launch_draw(Table table, const int64_t* units, int64_t seed, int64_t step, const int64_t* streams,
                 const int64_t* deals, int64_t R, int64_t K, int64_t* chosen, cudaStream_t stream);

void launch_select(Array norms, Table table, int64_t* chosen, cudaStream_t stream);

void launch_gather(Array source, const int64_t* chosen, Table table, const int32_t* status, const float* scale,
                   Array payload, int64_t K, bool take, cudaStream_t stream);

void launch_scatter(Array payloads, int64_t row_stride, const float* inverses, const int64_t* chosen, Table table,
                    const void* factors, bool accumulate, Array out, int64_t N, int64_t K, int64_t R,
                    cudaStream_t stream);

void launch_settle(Array residual, Array velocity, Array grad, double momentum, Array payload, const float* inverse,
                   const int64_t* chosen, Table table, const int32_t* status, const int32_t* bad, int64_t N,
                   int64_t K, cudaStream_t stream);

}  // namespace thinwire
