// Cast between types, with the rounding modes that each pair has on arch 2201.

#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>

#include "model/elementwise.h"

namespace ascendc_model {

using AscendC::int4b_t;
using AscendC::RoundMode;

// A value to a whole number. CAST_NONE rounds like CAST_RINT where something is lost.
inline double round_whole(double value, RoundMode mode) {
  switch (mode) {
    case RoundMode::CAST_FLOOR: return std::floor(value);
    case RoundMode::CAST_CEIL: return std::ceil(value);
    case RoundMode::CAST_ROUND: return std::round(value);
    case RoundMode::CAST_TRUNC: return std::trunc(value);
    default: return std::nearbyint(value);
  }
}

// A value to a floating type of `digits` significant bits and least exponent `least`, by a mode other than to nearest
// even.
inline float round_digits(float value, int digits, int least, RoundMode mode) {
  if (!std::isfinite(value) || value == 0.0f) return value;
  int exponent;
  std::frexp(value, &exponent);
  const int ulp = std::max(exponent - digits, least);
  const double scaled = std::ldexp(static_cast<double>(value), -ulp);
  if (mode == RoundMode::CAST_ODD) {
    // An inexact value goes to the neighbour with an odd mantissa, so that a second rounding cannot err.
    const double cut = std::trunc(scaled);
    const bool odd = std::fmod(std::fabs(cut), 2.0) == 1.0;
    const double kept = cut == scaled || odd ? cut : cut + (scaled < 0 ? -1.0 : 1.0);
    return static_cast<float>(std::ldexp(kept, ulp));
  }
  return static_cast<float>(std::ldexp(round_whole(scaled, mode), ulp));
}

template <typename T>
inline constexpr bool kIsFloating = kOneOf<T, float, half, bfloat16_t>;

// The values that an integer type saturates at.
template <typename T>
constexpr double lowest_of() {
  if constexpr (std::is_same_v<T, int4b_t>) {
    return -8;
  } else {
    return static_cast<double>(std::numeric_limits<T>::min());
  }
}
template <typename T>
constexpr double highest_of() {
  if constexpr (std::is_same_v<T, int4b_t>) {
    return 7;
  } else {
    return static_cast<double>(std::numeric_limits<T>::max());
  }
}

// The pairs that the vector unit converts between, and their rounding modes as bits.
constexpr unsigned kNone = 1u << static_cast<int>(RoundMode::CAST_NONE);
constexpr unsigned kOdd = 1u << static_cast<int>(RoundMode::CAST_ODD);
constexpr unsigned kRounding = 0b111110;  // RINT, FLOOR, CEIL, ROUND, TRUNC

template <typename To, typename From>
constexpr unsigned cast_modes() {
  if constexpr (std::is_same_v<From, half>) {
    if constexpr (std::is_same_v<To, float>) return kNone;
    if constexpr (kOneOf<To, int32_t, int16_t>) return kRounding;
    if constexpr (kOneOf<To, int8_t, uint8_t, int4b_t>) return kNone | kRounding;
  } else if constexpr (std::is_same_v<From, float>) {
    if constexpr (kOneOf<To, float, int64_t, int32_t, int16_t, bfloat16_t>) return kRounding;
    if constexpr (std::is_same_v<To, half>) return kNone | kRounding | kOdd;
  } else if constexpr (std::is_same_v<From, bfloat16_t>) {
    if constexpr (std::is_same_v<To, float>) return kNone;
    if constexpr (std::is_same_v<To, int32_t>) return kRounding;
  } else if constexpr (kOneOf<From, int4b_t, uint8_t, int8_t>) {
    if constexpr (std::is_same_v<To, half>) return kNone;
  } else if constexpr (std::is_same_v<From, int16_t>) {
    if constexpr (std::is_same_v<To, half>) return kNone | kRounding;
    if constexpr (std::is_same_v<To, float>) return kNone;
  } else if constexpr (std::is_same_v<From, int32_t>) {
    if constexpr (std::is_same_v<To, float>) return kNone | kRounding;
    if constexpr (std::is_same_v<To, half>)
      return kNone | kRounding | kOdd;  // by the scale of SetDeqScale, whatever the mode
    if constexpr (kOneOf<To, int64_t, int16_t>) return kNone;
  } else if constexpr (std::is_same_v<From, int64_t>) {
    if constexpr (std::is_same_v<To, float>) return kRounding;
    if constexpr (std::is_same_v<To, int32_t>) return kNone;
  }
  return 0;
}

// Both halves of each byte as halves: the low nibble first.
inline const std::array<uint32_t, 256>& nibble_table() {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> pairs{};
    for (int byte = 0; byte < 256; ++byte) {
      const int low = (byte & 15) >= 8 ? (byte & 15) - 16 : byte & 15;
      const int high = byte >> 4 >= 8 ? (byte >> 4) - 16 : byte >> 4;
      pairs[byte] = half_bits(static_cast<float>(low)) | static_cast<uint32_t>(half_bits(static_cast<float>(high)))
                                                             << 16;
    }
    return pairs;
  }();
  return table;
}

inline void widen_nibbles(const uint8_t* from, uint8_t* to, uint64_t lanes) {
  const auto& table = nibble_table();
  uint64_t byte = 0;
  for (; 2 * byte + 2 <= lanes; ++byte) {
    std::memcpy(to + 4 * byte, &table[from[byte]], 4);
  }
  if (2 * byte < lanes) std::memcpy(to + 4 * byte, &table[from[byte]], 2);
}

template <typename To, typename From>
void cast_one_by_one(const uint8_t* from, uint8_t* to, uint64_t lanes, RoundMode mode) {
  for (uint64_t i = 0; i < lanes; ++i) {
    const Compute<From> value = decode<From>(from + i * sizeof(From));
    if constexpr (kIsFloating<To>) {
      // Integers of more bits than a double's are only those of int64_t to float, which is off by one rounding then.
      float rounded = static_cast<float>(value);
      if constexpr (std::is_same_v<To, half>) {
        if (mode != RoundMode::CAST_NONE && mode != RoundMode::CAST_RINT)
          rounded = round_digits(rounded, 11, -24, mode);
      } else if constexpr (std::is_same_v<To, bfloat16_t>) {
        if (mode != RoundMode::CAST_RINT) rounded = round_digits(rounded, 8, -133, mode);
      } else if constexpr (std::is_same_v<From, float>) {
        rounded = static_cast<float>(round_whole(rounded, mode));
      } else if (mode != RoundMode::CAST_NONE && mode != RoundMode::CAST_RINT) {
        const double exact = static_cast<double>(value);
        if (exact != rounded) {
          const bool down = mode == RoundMode::CAST_FLOOR || (mode == RoundMode::CAST_TRUNC && exact > 0);
          const bool up = mode == RoundMode::CAST_CEIL || (mode == RoundMode::CAST_TRUNC && exact < 0);
          if (down && rounded > exact) rounded = std::nextafter(rounded, -std::numeric_limits<float>::infinity());
          if (up && rounded < exact) rounded = std::nextafter(rounded, std::numeric_limits<float>::infinity());
        }
      }
      encode<To>(rounded, to + i * sizeof(To));
    } else {
      double whole = static_cast<double>(value);
      if constexpr (kIsFloating<From>) whole = round_whole(whole, mode);
      if (std::isnan(whole)) whole = 0;
      const double held = std::clamp(whole, lowest_of<To>(), highest_of<To>());
      if constexpr (std::is_same_v<To, int4b_t>) {
        const auto nibble = static_cast<uint8_t>(static_cast<int>(held) & 15);
        uint8_t& byte = to[i / 2];
        byte = i % 2 ? static_cast<uint8_t>((byte & 0x0f) | nibble << 4) : static_cast<uint8_t>((byte & 0xf0) | nibble);
      } else {
        const To result = held >= highest_of<To>() ? std::numeric_limits<To>::max() : static_cast<To>(held);
        std::memcpy(to + i * sizeof(To), &result, sizeof(To));
      }
    }
  }
}

template <typename To, typename From>
auto cast_lanes(RoundMode mode) {
  return [mode, scale = core().dequant_scale](const uint8_t* const* p, uint64_t lanes) {
    uint8_t* to = writable(p[0]);
    const uint8_t* from = p[1];
    (void)mode;
    (void)scale;
    if constexpr (std::is_same_v<From, int4b_t>) {
      widen_nibbles(from, to, lanes);
    } else if constexpr (std::is_same_v<From, int32_t> && std::is_same_v<To, half>) {
      for (uint64_t i = 0; i < lanes; ++i) {
        encode<half>(static_cast<float>(decode<int32_t>(from + 4 * i)) * scale, to + 2 * i);
      }
    } else {
      constexpr bool kByFloats = kIsFloating<To> && (kIsFloating<From> || kOneOf<From, int8_t, uint8_t, int16_t>);
      const bool nearest = mode == RoundMode::CAST_NONE || mode == RoundMode::CAST_RINT;
      if constexpr (kByFloats && !(std::is_same_v<To, float> && std::is_same_v<From, float>)) {
        if (nearest) {
          in_pieces(lanes, [&](uint64_t at, std::size_t count) {
            Compute<From> values[kPiece];
            float floats[kPiece] = {};
            load<From>(from + at * sizeof(From), values, count);
            for (std::size_t i = 0; i < count; ++i) {
              floats[i] = static_cast<float>(values[i]);
            }
            store<To>(floats, to + at * sizeof(To), count);
          });
          return;
        }
      }
      cast_one_by_one<To, From>(from, to, lanes, mode);
    }
  };
}

template <typename To, typename From>
bool check_cast(RoundMode mode, uint64_t lanes) {
  constexpr unsigned modes = cast_modes<To, From>();
  if (!(modes >> static_cast<int>(mode) & 1)) {
    core().fault(FaultKind::kRoundMode, "Cast",
                 "rounding mode " + std::to_string(static_cast<int>(mode)) + " does not exist between these types");
    return false;
  }
  if ((std::is_same_v<To, int4b_t> || std::is_same_v<From, int4b_t>) && lanes % 2 != 0) {
    core().fault(FaultKind::kBadArgument, "Cast", "casts an odd number of int4b_t");
    return false;
  }
  return true;
}

}  // namespace ascendc_model

namespace AscendC {

template <typename T, typename U, bool isSetMask = true>
__aicore__ inline void Cast(const LocalTensor<T>& dst, const LocalTensor<U>& src, const RoundMode& roundMode,
                            const uint64_t mask[], const ascendc_model::RepeatTime repeatTime,
                            const UnaryRepeatParams& repeatParams) {
  using namespace ascendc_model;
  static_assert(cast_modes<T, U>() != 0, "Cast: the vector unit does not convert between these types");
  if (!check_cast<T, U>(roundMode, 0)) return;
  const Operand operands[] = {operand(dst, repeatParams.dstBlkStride, repeatParams.dstRepStride),
                              operand(src, repeatParams.srcBlkStride, repeatParams.srcRepStride)};
  for_repeats("Cast", operands, mask_of<isSetMask>(mask), repeatTime, false, cast_lanes<T, U>(roundMode));
}

template <typename T, typename U, bool isSetMask = true>
__aicore__ inline void Cast(const LocalTensor<T>& dst, const LocalTensor<U>& src, const RoundMode& roundMode,
                            const uint64_t mask, const ascendc_model::RepeatTime repeatTime,
                            const UnaryRepeatParams& repeatParams) {
  using namespace ascendc_model;
  static_assert(cast_modes<T, U>() != 0, "Cast: the vector unit does not convert between these types");
  if (!check_cast<T, U>(roundMode, isSetMask ? mask : 0)) return;
  const Operand operands[] = {operand(dst, repeatParams.dstBlkStride, repeatParams.dstRepStride),
                              operand(src, repeatParams.srcBlkStride, repeatParams.srcRepStride)};
  for_repeats("Cast", operands, mask_of<isSetMask>(mask), repeatTime, false, cast_lanes<T, U>(roundMode));
}

template <typename T, typename U>
__aicore__ inline void Cast(const LocalTensor<T>& dst, const LocalTensor<U>& src, const RoundMode& roundMode,
                            const uint32_t count) {
  using namespace ascendc_model;
  static_assert(cast_modes<T, U>() != 0, "Cast: the vector unit does not convert between these types");
  if (!check_cast<T, U>(roundMode, count)) return;
  const Operand operands[] = {operand(dst), operand(src)};
  for_count("Cast", operands, count, false, cast_lanes<T, U>(roundMode));
}

// What a Cast of int32_t to half multiplies by.
__aicore__ inline void SetDeqScale(half scale) { ascendc_model::core().dequant_scale = scale; }

}  // namespace AscendC
