// Tensors as launches and plans take them.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

#include "launch/launch.h"

namespace moe_fx::ascendc {

// Of a tensor whose dtype was checked to be one of the three.
inline Dtype dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kHalf: return Dtype::kHalf;
    case at::kBFloat16: return Dtype::kBfloat16;
    default: return Dtype::kFloat;
  }
}

// Of an operand that may be absent.
inline void* data_of(const std::optional<at::Tensor>& tensor) { return tensor ? tensor->data_ptr() : nullptr; }
inline at::Tensor tensor_of(const std::optional<at::Tensor>& tensor) { return tensor.value_or(at::Tensor()); }

// A size for a plan, which counts in 32 bits; throws std::invalid_argument for what does not fit.
inline uint32_t size(int64_t value) {
  if (value < 0 || value > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("a size of " + std::to_string(value) + " does not fit 31 bits");
  }
  return static_cast<uint32_t>(value);
}

}  // namespace moe_fx::ascendc
