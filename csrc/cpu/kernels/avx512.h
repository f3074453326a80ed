// The AVX-512 trait that avx512.cpp and avx512_bf16.cpp build their kernels from. For those two files only: everything
// lies in an anonymous namespace, since each is compiled with flags of its own.

#pragma once

#include <immintrin.h>

#include <array>
#include <cstdint>
#include <utility>

#include "cpu/kernels.h"

namespace moe_fx::cpu {
namespace {

struct Avx512 {
  using Int = __m512i;
  using Float = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kVectors = 1;
  static constexpr int kMaxM = 8;
  // VNNI multiplies unsigned by signed bytes: int8 weights get 128 added by flipping their sign bit.
  static constexpr std::int32_t kInt8Bias = 128;

  static Int zero_int() { return _mm512_setzero_si512(); }
  static Int set_int(std::int32_t value) { return _mm512_set1_epi32(value); }
  static Int load_int(const void* from) { return _mm512_loadu_si512(from); }
  static Int load_bytes(const void* from) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
  }
  static Int broadcast_int(const std::uint8_t* from) {
    return _mm512_set1_epi32(*reinterpret_cast<const std::int32_t*>(from));
  }
  static Int add_int(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static Int subtract_int(Int a, Int b) { return _mm512_sub_epi32(a, b); }
  static Int int8_operand(Int raw) { return _mm512_xor_si512(raw, _mm512_set1_epi8(static_cast<char>(0x80))); }
  static Int dot_int8(Int sum, Int weights, Int values) { return _mm512_dpbusd_epi32(sum, weights, values); }
  static Int dot_nibbles(Int sum, Int weights, Int values) { return _mm512_dpbusd_epi32(sum, weights, values); }
  static Int low_nibbles(Int raw) { return _mm512_and_si512(raw, _mm512_set1_epi8(15)); }
  static Int high_nibbles(Int raw) { return low_nibbles(_mm512_srli_epi16(raw, 4)); }
  static Int low_bits(Int raw) { return _mm512_and_si512(raw, _mm512_set1_epi32(15)); }
  template <int kBits>
  static Int shift_left(Int raw) {
    return _mm512_slli_epi32(raw, kBits);
  }
  template <int kBits>
  static Int shift_right(Int raw) {
    return _mm512_srli_epi32(raw, kBits);
  }
  template <int kBits>
  static Int shift_right_signed(Int raw) {
    return _mm512_srai_epi32(raw, kBits);
  }

  static Float zero_float() { return _mm512_setzero_ps(); }
  static Float to_float(Int value) { return _mm512_cvtepi32_ps(value); }
  static Float load_float(const float* from) { return _mm512_loadu_ps(from); }
  static Float load_half(const void* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
  }
  static void store_float(float* to, Float value) { _mm512_storeu_ps(to, value); }
  static Float broadcast_float(float value) { return _mm512_set1_ps(value); }
  static Float add_float(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float multiply_add(Float sum, Float a, Float b) { return _mm512_fmadd_ps(a, b, sum); }
  static Float subtract_product(Float from, Float a, Float b) { return _mm512_fnmadd_ps(a, b, from); }
};

// What both kinds of dense weights share.
struct Avx512Dense {
  using Vector = __m512;
  static constexpr int kMaxM = 6;  // 4 x 6 sums, 4 weights and a row of activations fill the registers
  static constexpr int kMaxStreamed = 4;

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static float sum(Vector v) { return _mm512_reduce_add_ps(v); }
  static void sum4(Vector a, Vector b, Vector c, Vector d, float* out) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                                      _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
};

// Weights widened to fp32, times fp32 activations.
template <WeightFormat kFormat>
struct Avx512DenseF32 : Avx512Dense {
  using Weights = __m512;
  static constexpr std::int64_t kStep = 16;

  static Weights widen(__m256i raw) {
    if constexpr (kFormat == WeightFormat::f16) return _mm512_cvtph_ps(raw);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }
  static Weights load_weights(const std::uint8_t* from) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Weights load_weights_tail(const std::uint8_t* from, int count) {
    return widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1U << count) - 1U), from));
  }
  static __m512 load_x(const std::uint8_t* row, std::int64_t k) {
    return _mm512_loadu_ps(reinterpret_cast<const float*>(row) + k);
  }
  static Vector multiply_add(Vector sum, Weights w, __m512 x) { return _mm512_fmadd_ps(w, x, sum); }
};

inline void widen(DType dtype, const void* values, std::int64_t n, float* out) {
  const auto* const halves = static_cast<const std::uint16_t*>(values);
  for (std::int64_t i = 0; i < n; i += 16) {
    const auto mask = static_cast<__mmask16>(n - i >= 16 ? 0xffffU : (1U << (n - i)) - 1U);
    __m512 wide;
    if (dtype == DType::f32) {
      wide = _mm512_maskz_loadu_ps(mask, static_cast<const float*>(values) + i);
    } else if (dtype == DType::f16) {
      wide = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, halves + i));
    } else {
      wide =
          _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, halves + i)), 16));
    }
    _mm512_mask_storeu_ps(out + i, mask, wide);
  }
}

// bf16 by integer arithmetic: VCVTNEPS2BF16 would flush subnormals.
inline __m256i bf16_of(__m512 wide) {
  const __m512i bits = _mm512_castps_si512(wide);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(wide, wide, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}

inline void narrow(DType dtype, const float* values, std::int64_t n, void* out) {
  for (std::int64_t i = 0; i < n; i += 16) {
    const auto mask = static_cast<__mmask16>(n - i >= 16 ? 0xffffU : (1U << (n - i)) - 1U);
    const __m512 wide = _mm512_maskz_loadu_ps(mask, values + i);
    if (dtype == DType::f32) {
      _mm512_mask_storeu_ps(static_cast<float*>(out) + i, mask, wide);
    } else {
      const __m256i half =
          dtype == DType::f16 ? _mm512_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC) : bf16_of(wide);
      _mm256_mask_storeu_epi16(static_cast<std::uint16_t*>(out) + i, mask, half);
    }
  }
}

}  // namespace
}  // namespace moe_fx::cpu
