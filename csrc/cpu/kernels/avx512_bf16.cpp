// Kernels for AVX-512 with VNNI and BF16 (Cooper Lake, Sapphire Rapids, Zen 4 and later): bf16 activations are
// multiplied as they are, two at a time. VDPBF16PS takes subnormal inputs and results for zero.

#include "cpu/kernels/avx512.h"

namespace moe_fx::cpu {
namespace {

#include "cpu/kernels/dense.inl"
#include "cpu/kernels/elementwise.inl"
#include "cpu/kernels/packed.inl"

inline __m512 dot_bf16(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, __builtin_bit_cast(__m512bh, a), __builtin_bit_cast(__m512bh, b));
}

struct DenseBf16 : Avx512Dense {
  using Weights = __m512i;
  static constexpr std::int64_t kStep = 32;

  static Weights load_weights(const std::uint8_t* from) { return _mm512_loadu_si512(from); }
  static Weights load_weights_tail(const std::uint8_t* from, int count) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ULL << count) - 1ULL), from);
  }
  static __m512i load_x(const std::uint8_t* row, std::int64_t k) { return _mm512_load_si512(row + k * 2); }
  static Vector multiply_add(Vector sum, Weights w, __m512i x) { return dot_bf16(sum, w, x); }
};

// int4 weights, bf16 activations. A nibble q under the bits of 128.0 is the bf16 number 128 + q, exactly.
constexpr float kNibbleOffset = 128.0F;

template <class A, int M>
struct Int4Bf16 {
  static void run(const Tile& tile, const Pass& pass) {
    const std::uint8_t* const* const x = tile.x + pass.first;
    const __m512i mask = _mm512_set1_epi16(0x000f);
    const __m512i offset = _mm512_set1_epi16(0x4300);
    int4_group<A, M, FarAhead>(
        tile, pass, kNibbleOffset,
        [&](const std::uint8_t* w, std::int64_t g, std::int64_t size, auto& ahead, __m512(&out)[M][1]) MOE_FX_INLINE {
          constexpr int kSplit = split_for<A, M>(6);
          __m512 sums[kSplit][M][1];
          fill(sums, _mm512_setzero_ps());
          const auto take = [&]<int kPair>(std::int64_t k, __m512i raw) MOE_FX_INLINE {
            // (shifted & mask) | offset
            const __m512i pairs = _mm512_ternarylogic_epi32(_mm512_srli_epi16(raw, 4 * kPair), mask, offset, 0xea);
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i) {
              auto& sum = sums[kPair % kSplit][i][0];
              sum = dot_bf16(sum, pairs, A::broadcast_int(x[i] + 2 * (k + 2 * kPair)));
            }
          };
          for (std::int64_t k = g * size; k < (g + 1) * size; k += 8, w += 64) {
            ahead.template advance<M>();
            const __m512i raw = _mm512_loadu_si512(w);
            take.template operator()<0>(k, raw);
            take.template operator()<1>(k, raw);
            take.template operator()<2>(k, raw);
            take.template operator()<3>(k, raw);
          }
          join(sums, A::add_float);
#pragma GCC unroll 16
          for (int i = 0; i < M; ++i)
            out[i][0] = sums[0][i][0];
        });
  }
};

ActivationForm exact_form(WeightFormat weights, DType x) {
  const bool multiplies_bf16 = weights == WeightFormat::bf16 || weights == WeightFormat::int4;
  return x == DType::bf16 && multiplies_bf16 ? ActivationForm::bf16 : ActivationForm::f32;
}

}  // namespace

const Kernels kAvx512Bf16Kernels = {
    .name = "avx512_bf16",
    .tile = {{dense_tile<Avx512DenseF32<WeightFormat::bf16>>, dense_tile<DenseBf16>, nullptr},
             {dense_tile<Avx512DenseF32<WeightFormat::f16>>, nullptr, nullptr},
             {packed_tile<Avx512, Int8F32>, nullptr, packed_tile<Avx512, Int8S8>},
             {packed_tile<Avx512, Int4F32>, packed_tile<Avx512, Int4Bf16>, packed_tile<Avx512, Int4S8>}},
    .exact_form = exact_form,
    .widen = widen,
    .narrow = narrow,
    .write_row = write_row,
    .activate = activate,
    .accumulate = accumulate,
    .sum_words = sum_words,
};

}  // namespace moe_fx::cpu
