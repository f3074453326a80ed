// Kernels for AVX-512 with VNNI (Cascade Lake and later, Zen 4 and later).

#include "cpu/kernels/avx512.h"

namespace moe_fx::cpu {
namespace {

#include "cpu/kernels/dense.inl"
#include "cpu/kernels/elementwise.inl"
#include "cpu/kernels/packed.inl"

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
