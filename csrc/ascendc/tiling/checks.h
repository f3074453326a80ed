// What every plan needs: rounding, a limit that CANN does not report, and errors that name the number that is wrong.

#pragma once

#include <cstdint>
#include <limits>
#include <sstream>
#include <stdexcept>

namespace moe_fx::ascendc {

template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// Select keeps what it compares with in UB from here on: a kernel that uses it ends before.
constexpr uint32_t kSelectScratch = 184 * 1024;

inline int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
inline int64_t round_up(int64_t value, int64_t multiple) { return divide_up(value, multiple) * multiple; }

// For the tiling structures, whose words have 32 bits.
inline uint32_t to_word(int64_t value, const char* name) {
  require(value >= 0 && value <= std::numeric_limits<int32_t>::max(), name, " is ", value, "; it must fit 31 bits");
  return static_cast<uint32_t>(value);
}

}  // namespace moe_fx::ascendc
