#include "torch/checks.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <sstream>

namespace moe_fx::ascendc {
namespace {

std::string shape(at::IntArrayRef sizes) {
  std::ostringstream text;
  const char* separator = "[";
  for (const int64_t size : sizes) {
    text << separator << (size == kAnySize ? "*" : std::to_string(size));
    separator = ", ";
  }
  text << "]";
  return text.str();
}

}  // namespace

Checks::Checks(const char* op, const at::Tensor& first) : op_(op), guard_(first.device()) {}

void Checks::tensor(const char* name, const at::Tensor& tensor, at::IntArrayRef sizes,
                    at::ArrayRef<at::ScalarType> dtypes) const {
  const at::IntArrayRef given = tensor.sizes();
  const bool fits = std::equal(given.begin(), given.end(), sizes.begin(), sizes.end(),
                               [](int64_t a, int64_t b) { return b == kAnySize || a == b; });
  TORCH_CHECK_VALUE(fits, op_, ": ", name, " is ", given, "; it must be ", shape(sizes));
  const bool known = std::find(dtypes.begin(), dtypes.end(), tensor.scalar_type()) != dtypes.end();
  TORCH_CHECK_VALUE(known, op_, ": ", name, " is ", tensor.scalar_type(), "; it must be one of ", dtypes);
  const at::Device device = guard_.current_device();
  TORCH_CHECK_VALUE(tensor.device() == device, op_, ": ", name, " is on ", tensor.device(), ", other operands on ",
                    device);
  TORCH_CHECK_VALUE(tensor.is_contiguous(), op_, ": ", name, " is not contiguous; give ", name, ".contiguous()");
}

int64_t Checks::group(const char* scale, int64_t inputs, int64_t groups) const {
  TORCH_CHECK_VALUE(groups > 0 && inputs > 0 && inputs % groups == 0, op_, ": ", scale, " has ", groups,
                    " groups, which cannot share ", inputs, " inputs evenly");
  return inputs / groups;
}

void Checks::refuse(const std::string& why) const { C10_THROW_ERROR(ValueError, std::string(op_) + ": " + why); }

}  // namespace moe_fx::ascendc
