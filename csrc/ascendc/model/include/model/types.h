// half, bfloat16_t and int4b_t as a host holds them, and the bulk conversions that the vector operations are made of.

#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ascendc_model {

// Round to nearest, ties to even, as every vector instruction rounds its result. Overflow gives infinity: the NPU's
// default (INF/NaN mode); its saturating mode is not modelled.
inline uint16_t half_bits(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 aligns the mantissa so that the addition itself rounds.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(0.5f)));
  }
  magnitude += 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u) >> 13));
}

inline float half_value(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude < 0x400u) {
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -value : value;
  }
  return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000u));
}

inline uint16_t bfloat16_bits(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float bfloat16_value(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

}  // namespace ascendc_model

// Arithmetic on the scalar unit goes through float and rounds on the way back, which is exact for +, -, * and /.
class half {
 public:
  half() = default;
  template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
  half(T value) : bits_(ascendc_model::half_bits(static_cast<float>(value))) {}
  operator float() const { return ascendc_model::half_value(bits_); }
  half operator-() const { return from_bits(bits_ ^ 0x8000u); }
  half& operator+=(half other) { return *this = half(float(*this) + float(other)); }
  half& operator-=(half other) { return *this = half(float(*this) - float(other)); }
  half& operator*=(half other) { return *this = half(float(*this) * float(other)); }
  half& operator/=(half other) { return *this = half(float(*this) / float(other)); }

  static half from_bits(uint32_t bits) {
    half value;
    value.bits_ = static_cast<uint16_t>(bits);
    return value;
  }
  uint16_t bits() const { return bits_; }

 private:
  uint16_t bits_;
};

// Storage only: the scalar unit has no bfloat16 arithmetic; AscendC::ToFloat and ToBfloat16 convert.
class bfloat16_t {
 public:
  bfloat16_t() = default;
  explicit bfloat16_t(float value) : bits_(ascendc_model::bfloat16_bits(value)) {}

  static bfloat16_t from_bits(uint32_t bits) {
    bfloat16_t value;
    value.bits_ = static_cast<uint16_t>(bits);
    return value;
  }
  uint16_t bits() const { return bits_; }
  float value() const { return ascendc_model::bfloat16_value(bits_); }

 private:
  uint16_t bits_;
};

static_assert(sizeof(half) == 2 && sizeof(bfloat16_t) == 2);

namespace AscendC {

// Two to a byte, the low nibble first. sizeof is 1 as on the NPU, which is why copies counted in it are twice too long.
struct int4b_t {
  uint8_t pair;
};

inline float ToFloat(const bfloat16_t& value) { return value.value(); }
inline bfloat16_t ToBfloat16(const float& value) { return bfloat16_t(value); }

}  // namespace AscendC

namespace ascendc_model {

template <typename T>
inline constexpr uint32_t kBits = std::is_same_v<T, AscendC::int4b_t> ? 4 : 8 * sizeof(T);

template <typename T>
constexpr uint64_t bytes_of(uint64_t elements) {
  return elements * kBits<T> / 8;
}

#if defined(__x86_64__)
// Every processor with AVX2 has F16C, which not every compiler can ask for by name.
inline const bool kHasF16c = __builtin_cpu_supports("avx2");

__attribute__((target("avx,f16c"))) inline std::size_t widen_f16c(const uint8_t* from, float* to, std::size_t count) {
  std::size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * i))));
  }
  return i;
}

__attribute__((target("avx,f16c"))) inline std::size_t narrow_f16c(const float* from, uint8_t* to, std::size_t count) {
  std::size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * i), halves);
  }
  return i;
}
#endif

inline void widen_half(const uint8_t* from, float* to, std::size_t count) {
  std::size_t i = 0;
#if defined(__x86_64__)
  if (kHasF16c) i = widen_f16c(from, to, count);
#endif
  for (; i < count; ++i) {
    uint16_t bits;
    std::memcpy(&bits, from + 2 * i, 2);
    to[i] = half_value(bits);
  }
}

inline void narrow_half(const float* from, uint8_t* to, std::size_t count) {
  std::size_t i = 0;
#if defined(__x86_64__)
  if (kHasF16c) i = narrow_f16c(from, to, count);
#endif
  for (; i < count; ++i) {
    const uint16_t bits = half_bits(from[i]);
    std::memcpy(to + 2 * i, &bits, 2);
  }
}

// What a type is computed in: floating point in float, integers in themselves.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, half> || std::is_same_v<T, bfloat16_t>, float, T>;

template <typename T>
Compute<T> decode(const uint8_t* from) {
  if constexpr (std::is_same_v<T, half> || std::is_same_v<T, bfloat16_t>) {
    uint16_t bits;
    std::memcpy(&bits, from, 2);
    return std::is_same_v<T, half> ? half_value(bits) : bfloat16_value(bits);
  } else {
    T value;
    std::memcpy(&value, from, sizeof(T));
    return value;
  }
}

template <typename T>
void encode(Compute<T> value, uint8_t* to) {
  if constexpr (std::is_same_v<T, half> || std::is_same_v<T, bfloat16_t>) {
    const uint16_t bits = std::is_same_v<T, half> ? half_bits(value) : bfloat16_bits(value);
    std::memcpy(to, &bits, 2);
  } else {
    std::memcpy(to, &value, sizeof(T));
  }
}

template <typename T>
void load(const uint8_t* from, Compute<T>* to, std::size_t count) {
  if constexpr (std::is_same_v<T, half>) {
    widen_half(from, to, count);
  } else if constexpr (std::is_same_v<T, bfloat16_t>) {
    for (std::size_t i = 0; i < count; ++i) {
      to[i] = decode<T>(from + 2 * i);
    }
  } else {
    std::memcpy(to, from, count * sizeof(T));
  }
}

template <typename T>
void store(const Compute<T>* from, uint8_t* to, std::size_t count) {
  if constexpr (std::is_same_v<T, half>) {
    narrow_half(from, to, count);
  } else if constexpr (std::is_same_v<T, bfloat16_t>) {
    for (std::size_t i = 0; i < count; ++i) {
      encode<T>(from[i], to + 2 * i);
    }
  } else {
    std::memcpy(to, from, count * sizeof(T));
  }
}

}  // namespace ascendc_model
