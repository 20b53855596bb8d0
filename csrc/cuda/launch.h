// What the CUDA files offer to ops.cpp: pointers, sizes and a stream; no torch header, so nvcc compiles them fast.
// S parameters, N elements, M blocks, K slots, P elements of a payload, R ranks or rows, as in
// hooks/thinwire/ops/block_ops.py. Nothing here waits for the device: the table's contents are read there. Each launch
// returns the first error of what it started. What *_scratch() says is memory of the device that a launch needs for
// itself, aligned to 256 bytes.
#pragma once
#include <cuda_runtime_api.h>

#include "../block_ops.h"

namespace thinwire {

enum class Dtype { F32, F64, BF16, F16 };

// A tensor's memory and what it holds; read-only arguments use it too.
struct Array {
    void* data;  // null where the argument is None
    Dtype dtype;
    int64_t size;
};

struct Table {
    const int64_t* rows;
    int64_t segments, block_size;
    Divider by_block_size;
};

// uint8 [count, bytes]; a row begins `stride` bytes after the one before.
struct Rows {
    uint8_t* data;
    int64_t count, bytes, stride;
};

cudaError_t launch_examine(Array grad, Table table, int32_t* status, cudaStream_t stream);

cudaError_t launch_accumulate(Array residual, Array residual_before, Array velocity, Array velocity_before, Array grad,
                              double momentum, Table table, Array norms, int32_t* status, cudaStream_t stream);

// streams and deals are in the host's memory.
int64_t draw_scratch(Table table, int64_t R);
cudaError_t launch_draw(Table table, const int64_t* units, int64_t seed, int64_t step, const int64_t* streams,
                        const int64_t* deals, int64_t R, int64_t K, int64_t* chosen, void* scratch,
                        cudaStream_t stream);

int64_t select_scratch(Table table);
cudaError_t launch_select(Array norms, Table table, int64_t* chosen, int64_t K, void* scratch, cudaStream_t stream);

cudaError_t launch_gather(Array source, const int64_t* chosen, Table table, const int32_t* status, const float* scale,
                          Array payload, int64_t K, bool take, cudaStream_t stream);

// payloads: R rows of P elements, row_stride apart.
cudaError_t launch_scatter(Array payloads, int64_t P, int64_t row_stride, const float* inverses, const int64_t* chosen,
                           Table table, const void* factors, bool accumulate, Array out, int64_t K, int64_t R,
                           cudaStream_t stream);

cudaError_t launch_settle(Array residual, Array velocity, Array grad, double momentum, Array payload,
                          const float* inverse, const int64_t* chosen, Table table, const int32_t* status,
                          const int32_t* bad, int64_t K, cudaStream_t stream);

cudaError_t launch_quantise(Array source, const int64_t* chosen, Table table, const int32_t* status,
                            const int64_t* places, int bits, bool keep, Rows rows, int64_t K, cudaStream_t stream);

// payloads: R rows of P elements, row_stride apart. K: entries of places, or a row's slots where that is null.
cudaError_t launch_unquantise(Rows rows, int bits, const int64_t* places, Table table, Array payloads, int64_t R,
                              int64_t P, int64_t row_stride, int64_t K, cudaStream_t stream);

cudaError_t launch_add_quantised(Rows rows, int bits, int64_t block_size, Array total, cudaStream_t stream);

cudaError_t launch_add_rows(Array values, const int64_t* places, int64_t first, const int64_t* chosen, Table table,
                            double factor, const int32_t* bad, Array out, int64_t K, cudaStream_t stream);

// rows: n of them, of `part` elements, row_stride elements apart. undeal: from rows to payload.
cudaError_t launch_deal(Array payload, Table table, const int64_t* begins, void* rows, int64_t n, int64_t part,
                        int64_t row_stride, bool undeal, cudaStream_t stream);

int64_t unite_scratch(int64_t named, bool wide, int64_t S);
cudaError_t launch_unite(const void* named, bool wide, int64_t count, Table table, int64_t* chosen, int64_t C,
                         int64_t* united, void* scratch, cudaStream_t stream);

int64_t place_scratch(int64_t S, int64_t ranks);
cudaError_t launch_place(Table table, const int64_t* turns, int64_t ranks, int64_t row_slots, int64_t* places,
                         int64_t C, void* scratch, cudaStream_t stream);

}  // namespace thinwire
