// Kernels for AVX-512 with VNNI (Cascade Lake and later, Zen 4 and later).

#include "cpu/kernels/avx512.h"

namespace moe_fx::cpu {
namespace {

#include "cpu/kernels/dense.inl"
#include "cpu/kernels/elementwise.inl"
#include "cpu/kernels/packed.inl"

void narrow(DType dtype, const float* values, std::int64_t n, void* out) {
  for (std::int64_t i = 0; i < n; i += 16) {
    const auto mask = static_cast<__mmask16>(n - i >= 16 ? 0xffffU : (1U << (n - i)) - 1U);
    const __m512 wide = _mm512_maskz_loadu_ps(mask, values + i);
    if (dtype == DType::f32) {
      _mm512_mask_storeu_ps(static_cast<float*>(out) + i, mask, wide);
    } else if (dtype == DType::f16) {
      const __m256i half = _mm512_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm256_mask_storeu_epi16(static_cast<std::uint16_t*>(out) + i, mask, half);
    } else {
      std::uint16_t rounded[16];
      alignas(64) float lanes[16];
      _mm512_store_ps(lanes, wide);
      for (int lane = 0; lane < 16; ++lane)
        rounded[lane] = to_bf16(lanes[lane]);
      _mm256_mask_storeu_epi16(static_cast<std::uint16_t*>(out) + i, mask,
                               _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rounded)));
    }
  }
}

ActivationForm exact_form(WeightFormat, DType) { return ActivationForm::f32; }

}  // namespace

const Kernels kAvx512Kernels = {
    .name = "avx512",
    .tile = {{dense_tile<Avx512DenseF32<WeightFormat::bf16>>, nullptr, nullptr},
             {dense_tile<Avx512DenseF32<WeightFormat::f16>>, nullptr, nullptr},
             {packed_tile<Avx512, Int8F32>, nullptr, packed_tile<Avx512, Int8S8>},
             {packed_tile<Avx512, Int4F32>, nullptr, packed_tile<Avx512, Int4S8>}},
    .exact_form = exact_form,
    .widen = widen,
    .narrow = narrow,
    .write_row = write_row,
    .activate = activate,
    .accumulate = accumulate,
    .sum_words = sum_words,
};

}  // namespace moe_fx::cpu
