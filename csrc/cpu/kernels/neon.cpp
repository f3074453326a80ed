// Kernels for Arm NEON with the dot products of int8 (Kunpeng 920, Neoverse N1, Apple M1 and later).

#include "cpu/kernels/neon.h"

namespace moe_fx::cpu {

const Kernels kNeonKernels = {
    .name = "neon",
    .tile = {{dense_tile<NeonDense<WeightFormat::bf16>>, nullptr, nullptr},
             {dense_tile<NeonDense<WeightFormat::f16>>, nullptr, nullptr},
             {packed_tile<Neon, Int8F32>, nullptr, packed_tile<Neon, Int8S8>},
             {packed_tile<Neon, Int4F32>, nullptr, packed_tile<Neon, Int4S8>}},
    .exact_form = exact_form,
    .widen = widen,
    .narrow = narrow,
    .write_row = write_row,
    .activate = activate,
    .accumulate = accumulate,
    .sum_words = sum_words,
};

}  // namespace moe_fx::cpu
