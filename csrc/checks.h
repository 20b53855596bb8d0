// Checks of arguments; every message repeats what was passed and what is allowed.
#pragma once
// Not ATen/ATen.h, which declares every operator that there is and takes longer to read than all else.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "block_ops.h"
#include "message.h"

namespace thinwire {

using Dtypes = std::vector<at::ScalarType>;
constexpr int64_t ANY = -1;  // a size that may be anything

inline const Dtypes DATA{at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};
inline const Dtypes WIDE{at::kFloat, at::kDouble};
inline const Dtypes LONG{at::kLong};
inline const Dtypes INT{at::kInt};
inline const Dtypes FLOAT{at::kFloat};

// The dtype in which values of this dtype are added.
inline at::ScalarType wide(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

inline void check(const at::Tensor& tensor, const char* name, const Dtypes& dtypes, at::IntArrayRef sizes,
                  at::Device device, bool rows_only = false) {
    bool fits = tensor.dim() == static_cast<int64_t>(sizes.size()) && tensor.device() == device;
    for (size_t i = 0; fits && i < sizes.size(); ++i) fits = sizes[i] == ANY || tensor.size(i) == sizes[i];
    bool dtype_fits = false;
    for (auto dtype : dtypes) dtype_fits |= tensor.scalar_type() == dtype;
    // rows_only: rows may be apart, but each is contiguous
    const bool dense = tensor.numel() == 0 || tensor.is_contiguous() ||
                       (rows_only && tensor.dim() == 2 && (tensor.size(1) == 1 || tensor.stride(1) == 1) &&
                        tensor.stride(0) >= tensor.size(1));
    if (fits && dtype_fits && dense) return;

    std::string allowed;
    for (size_t i = 0; i < dtypes.size(); ++i) allowed += (i ? " or " : "") + in_words(dtypes[i]);
    allowed += " [";
    for (size_t i = 0; i < sizes.size(); ++i) {
        allowed += (i ? ", " : "") + (sizes[i] == ANY ? std::string("any") : in_words(sizes[i]));
    }
    allowed += rows_only ? "], contiguous rows" : "], contiguous";
    THINWIRE_CHECK(false, name, " is ", tensor.scalar_type(), " ", tensor.sizes(), " with strides ", tensor.strides(),
                   " on ", tensor.device(), "; allowed is ", allowed, ", on ", device);
}

inline void check_block_size(int64_t block_size) {
    THINWIRE_CHECK(block_size >= 1, "block_size is ", block_size, "; allowed is 1 or more");
}

inline void check_table(const at::Tensor& table, int64_t block_size, at::Device device) {
    check_block_size(block_size);
    check(table, "table", LONG, {ANY, COLUMNS}, device);
}

}  // namespace thinwire
