// Integers that say when they are given what they cannot hold. The NPU's instruction words truncate in silence.

#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>

namespace ascendc_model {

// Reports a fault of the running core; nothing outside a launch. Defined with the cores.
void report_range(const std::string& message);

template <typename Field>
class Narrow {
 public:
  Narrow() = default;
  template <typename Integer, typename = std::enable_if_t<std::is_integral_v<Integer>>>
  Narrow(Integer value) : value_(static_cast<Field>(value)) {
    if constexpr (sizeof(Integer) > sizeof(Field) || std::is_signed_v<Integer>) {
      if (static_cast<uint64_t>(value) > std::numeric_limits<Field>::max()) {
        report_range("a parameter of " + std::to_string(8 * sizeof(Field)) + " bits is given " + std::to_string(value));
      }
    }
  }
  operator Field() const { return value_; }

 private:
  Field value_;
};

// The repeatTime parameters, const uint8_t in Huawei's signatures.
class RepeatTime {
 public:
  template <typename Integer, typename = std::enable_if_t<std::is_integral_v<Integer>>>
  RepeatTime(Integer value) : value_(static_cast<int64_t>(value)) {
    if (value_ < 0 || value_ > 255) {
      report_range("repeatTime is " + std::to_string(value_) + "; an instruction repeats at most 255 times");
      value_ = value_ < 0 ? 0 : 255;
    }
  }
  operator int() const { return static_cast<int>(value_); }

 private:
  int64_t value_;
};

}  // namespace ascendc_model
