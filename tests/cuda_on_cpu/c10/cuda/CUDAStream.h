// What csrc/cuda/ops.cpp uses of c10/cuda, on the CPU.
#pragma once
#include <c10/core/Device.h>
#include <c10/util/Exception.h>

#include "emulate.h"

#define C10_CUDA_CHECK(call) TORCH_CHECK((call) == cudaSuccess, "emulated CUDA error")

namespace c10::cuda {
inline cudaStream_t getCurrentCUDAStream(DeviceIndex) { return nullptr; }
struct OptionalCUDAGuard {
    explicit OptionalCUDAGuard(Device) {}
};
}  // namespace c10::cuda
