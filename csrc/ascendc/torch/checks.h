// Checks of an operator's arguments, whose errors say what was given and what is wanted.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace moe_fx::ascendc {

// A size that a check leaves open.
constexpr int64_t kAnySize = -1;

// Of one operator, whose operands lie on one device, which is the current one as long as this lives.
class Checks {
 public:
  Checks(const char* op, const at::Tensor& first);

  // `tensor` is dense and has these sizes and one of these dtypes; `name` is the argument's.
  void tensor(const char* name, const at::Tensor& tensor, at::IntArrayRef sizes,
              at::ArrayRef<at::ScalarType> dtypes) const;

  // Inputs that share a scale, where `groups` groups share `inputs` inputs.
  int64_t group(const char* scale, int64_t inputs, int64_t groups) const;

  // What an option's name stands for.
  template <typename Value>
  Value choice(const char* name, std::string_view given,
               std::initializer_list<std::pair<std::string_view, Value>> choices) const {
    std::string known;
    for (const auto& [text, value] : choices) {
      if (text == given) return value;
      known += (known.empty() ? "" : ", ") + std::string(text);
    }
    refuse(std::string(name) + " is '" + std::string(given) + "'; it must be one of " + known);
  }

  // The plan of a launch, whose refusal becomes the operator's.
  template <typename Plan>
  auto plan(Plan&& make) const {
    try {
      return make();
    } catch (const std::invalid_argument& error) {
      refuse(error.what());
    }
  }

  [[noreturn]] void refuse(const std::string& why) const;

 private:
  const char* op_;
  c10::DeviceGuard guard_;
};

}  // namespace moe_fx::ascendc
