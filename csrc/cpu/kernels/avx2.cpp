// Kernels for AVX2 with FMA and F16C (Haswell and later, Zen and later).

#include <immintrin.h>

#include <cstdint>
#include <utility>

#include "cpu/kernels.h"

namespace moe_fx::cpu {
namespace {

#include "cpu/kernels/dense.inl"
#include "cpu/kernels/elementwise.inl"
#include "cpu/kernels/packed.inl"

struct Avx2 {
  using Int = __m256i;
  using Float = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kVectors = 2;
  static constexpr int kMaxM = 4;
  static constexpr std::int32_t kInt8Bias = 0;

  static Int zero_int() { return _mm256_setzero_si256(); }
  static Int set_int(std::int32_t value) { return _mm256_set1_epi32(value); }
  static Int load_int(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static Int load_bytes(const void* from) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from)));
  }
  static Int broadcast_int(const std::uint8_t* from) {
    return _mm256_set1_epi32(*reinterpret_cast<const std::int32_t*>(from));
  }
  static Int add_int(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static Int subtract_int(Int a, Int b) { return _mm256_sub_epi32(a, b); }
  static Int int8_operand(Int raw) { return raw; }
  // Products of an unsigned and a signed byte are added in pairs with saturation at 16 bits, which 15 * 127 * 2 and
  // 128 * 127 * 2 do not reach.
  static Int dot_nibbles(Int sum, Int weights, Int values) {
    const Int pairs = _mm256_maddubs_epi16(weights, values);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  // |w| times the value with w's sign.
  static Int dot_int8(Int sum, Int weights, Int values) {
    return dot_nibbles(sum, _mm256_abs_epi8(weights), _mm256_sign_epi8(values, weights));
  }
  static Int low_nibbles(Int raw) { return _mm256_and_si256(raw, _mm256_set1_epi8(15)); }
  static Int high_nibbles(Int raw) { return low_nibbles(_mm256_srli_epi16(raw, 4)); }
  static Int low_bits(Int raw) { return _mm256_and_si256(raw, _mm256_set1_epi32(15)); }
  template <int kBits>
  static Int shift_left(Int raw) {
    return _mm256_slli_epi32(raw, kBits);
  }
  template <int kBits>
  static Int shift_right(Int raw) {
    return _mm256_srli_epi32(raw, kBits);
  }
  template <int kBits>
  static Int shift_right_signed(Int raw) {
    return _mm256_srai_epi32(raw, kBits);
  }

  static Float zero_float() { return _mm256_setzero_ps(); }
  static Float to_float(Int value) { return _mm256_cvtepi32_ps(value); }
  static Float load_float(const float* from) { return _mm256_loadu_ps(from); }
  static Float load_half(const void* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from)));
  }
  static void store_float(float* to, Float value) { _mm256_storeu_ps(to, value); }
  static Float broadcast_float(float value) { return _mm256_set1_ps(value); }
  static Float add_float(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float multiply_add(Float sum, Float a, Float b) { return _mm256_fmadd_ps(a, b, sum); }
  static Float subtract_product(Float from, Float a, Float b) { return _mm256_fnmadd_ps(a, b, from); }
};

// Dense weights widened to fp32, times fp32 activations.
template <WeightFormat kFormat>
struct Avx2Dense {
  using Vector = __m256;
  using Weights = __m256;
  static constexpr std::int64_t kStep = 8;
  static constexpr int kMaxM = 2;  // 4 x 2 sums, 4 weights and the activations fill the registers
  static constexpr int kMaxStreamed = 1;

  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static float sum(Vector v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static void sum4(Vector a, Vector b, Vector c, Vector d, float* out) {
    const __m256 quads = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1)));
  }
  static Weights widen_lanes(__m128i raw) {
    if constexpr (kFormat == WeightFormat::f16) return _mm256_cvtph_ps(raw);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  }
  static Weights load_weights(const std::uint8_t* from) {
    return widen_lanes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Weights load_weights_tail(const std::uint8_t* from, int count) {
    alignas(16) std::uint8_t padded[16] = {};
    __builtin_memcpy(padded, from, static_cast<std::size_t>(count) * 2);
    return widen_lanes(_mm_load_si128(reinterpret_cast<const __m128i*>(padded)));
  }
  static __m256 load_x(const std::uint8_t* row, std::int64_t k) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(row) + k);
  }
  static Vector multiply_add(Vector sum, Weights w, __m256 x) { return _mm256_fmadd_ps(w, x, sum); }
};

void widen(DType dtype, const void* values, std::int64_t n, float* out) {
  const auto* const halves = static_cast<const std::uint16_t*>(values);
  if (dtype == DType::f32) {
    __builtin_memcpy(out, values, static_cast<std::size_t>(n) * 4);
  } else if (dtype == DType::bf16) {
    for (std::int64_t i = 0; i < n; ++i)
      out[i] = from_bf16(halves[i]);
  } else {
    std::int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i))));
    }
    for (; i < n; ++i)
      out[i] = _cvtsh_ss(halves[i]);
  }
}

void narrow(DType dtype, const float* values, std::int64_t n, void* out) {
  auto* const halves = static_cast<std::uint16_t*>(out);
  if (dtype == DType::f32) {
    __builtin_memcpy(out, values, static_cast<std::size_t>(n) * 4);
  } else if (dtype == DType::bf16) {
    for (std::int64_t i = 0; i < n; ++i)
      halves[i] = to_bf16(values[i]);
  } else {
    std::int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(halves + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT));
    }
    for (; i < n; ++i)
      halves[i] = _cvtss_sh(values[i], _MM_FROUND_TO_NEAREST_INT);
  }
}

ActivationForm exact_form(WeightFormat, DType) { return ActivationForm::f32; }

}  // namespace

const Kernels kAvx2Kernels = {
    .name = "avx2",
    .tile = {{dense_tile<Avx2Dense<WeightFormat::bf16>>, nullptr, nullptr},
             {dense_tile<Avx2Dense<WeightFormat::f16>>, nullptr, nullptr},
             {packed_tile<Avx2, Int8F32>, nullptr, packed_tile<Avx2, Int8S8>},
             {packed_tile<Avx2, Int4F32>, nullptr, packed_tile<Avx2, Int4S8>}},
    .exact_form = exact_form,
    .widen = widen,
    .narrow = narrow,
    .write_row = write_row,
    .activate = activate,
    .accumulate = accumulate,
    .sum_words = sum_words,
};

}  // namespace moe_fx::cpu
