// Error messages without std::ostream. A compiler may link a libstdc++ of its own into the library, as
// -static-libstdc++ does: beside torch's, its streams cut messages off at the first number. Here is no stream.
#pragma once
#include <ATen/core/Tensor.h>

#include <string>
#include <type_traits>

namespace thinwire {

inline std::string in_words(const char* words) { return words; }
inline std::string in_words(const std::string& words) { return words; }
inline std::string in_words(at::ScalarType dtype) { return c10::toString(dtype); }
inline std::string in_words(at::Device device) { return device.str(); }

template <typename Number, std::enable_if_t<std::is_integral_v<Number>, int> = 0>
std::string in_words(Number number) {
    return std::to_string(number);
}

inline std::string in_words(at::IntArrayRef numbers) {
    std::string words = "[";
    for (size_t i = 0; i < numbers.size(); ++i) words += (i ? ", " : "") + std::to_string(numbers[i]);
    return words + "]";
}

template <typename... Parts>
std::string message(const Parts&... parts) {
    std::string whole = "thinwire: ";
    ((whole += in_words(parts)), ...);
    return whole;
}

}  // namespace thinwire

#define THINWIRE_CHECK(condition, ...) TORCH_CHECK(condition, ::thinwire::message(__VA_ARGS__))
