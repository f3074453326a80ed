// Conversions between fp32 and the 16-bit floating-point formats, by their bits: the same on every machine.
//
// Branches here are selections, so that loops over these functions vectorise. Nothing depends on how the processor
// treats subnormal numbers (PyTorch can be told to flush them).

#pragma once

#include <bit>
#include <cstdint>

namespace moe_fx::cpu {

inline float float_from_bf16(std::uint16_t half) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(half) << 16);
}

inline std::uint16_t bf16_from_float(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
  const std::uint32_t quiet_nan = (bits >> 16) | 0x40U;  // rounding could carry a NaN into an infinity or a zero
  return static_cast<std::uint16_t>((bits & 0x7fffffffU) > 0x7f800000U ? quiet_nan : rounded);
}

inline float float_from_f16(std::uint16_t half) {
  constexpr std::uint32_t kExponent = 0x7c00U << 13;
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000U) << 16;
  const std::uint32_t shifted = static_cast<std::uint32_t>(half & 0x7fffU) << 13;
  const std::uint32_t exponent = shifted & kExponent;
  const std::uint32_t normal = shifted + (112U << 23);      // from f16's exponent bias, 15, to fp32's, 127
  const std::uint32_t not_finite = shifted + (224U << 23);  // keeps all ones
  // A subnormal's mantissa counts steps of 2^-24: put below a leading one of 2^-14, which is then taken away.
  const float subnormal = std::bit_cast<float>(shifted + (113U << 23)) - std::bit_cast<float>(113U << 23);
  const std::uint32_t magnitude = exponent == kExponent ? not_finite
                                  : exponent == 0       ? std::bit_cast<std::uint32_t>(subnormal)
                                                        : normal;
  return std::bit_cast<float>(magnitude | sign);
}

inline std::uint16_t f16_from_float(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  // From 65520 on, half way beyond the largest number, the carry of rounding makes an infinity by itself.
  const std::uint32_t normal = (magnitude - (112U << 23) + 0xfffU + ((magnitude >> 13) & 1U)) >> 13;
  // Below 2^-14: adding 2^-1 leaves steps of 2^-24 in the low bits of the sum, rounded by the addition.
  constexpr std::uint32_t kHalf = 126U << 23;
  const std::uint32_t subnormal =
      std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + std::bit_cast<float>(kHalf)) - kHalf;
  const std::uint32_t large = magnitude > 0x7f800000U ? 0x7e00U : 0x7c00U;
  const std::uint32_t result = magnitude >= (143U << 23) ? large : magnitude < (113U << 23) ? subnormal : normal;
  return static_cast<std::uint16_t>(result | ((bits >> 16) & 0x8000U));
}

}  // namespace moe_fx::cpu
