// csrc/cuda/ops.cpp as it stands, for a key under which no other operators are registered: a test calls them with the
// CPU's tensors. Torch's headers come first, because they know CUDA by its name.
#include <ATen/Tensor.h>
#include <c10/cuda/CUDAStream.h>

#include "../../csrc/checks.h"

#define CUDA PrivateUse1
#include "../../csrc/cuda/ops.cpp"
