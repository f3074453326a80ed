// The inner loops, one table per instruction set, and the forms of activations that they read.
//
// Everything above (engine.h) is the same on every machine; a table of kernels is what differs. Tables are compiled in
// one file per instruction set, with that set's compiler flags, and chosen at run time.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "cpu/format.h"
#include "cpu/isa.h"

namespace moe_fx::cpu {

// How an activation row is laid out for a kernel, padded with zeros to a multiple of 64 inputs (Kp):
//   f32   Kp fp32
//   bf16  Kp bf16; then, per scale group of int4 weights, the fp32 sum of the group's values
//   s8    Kp int8 (in kInt4ByteOrder within 8 inputs for int4 weights); per group the fp32 scale; per group the fp32
//   sum
//         of the int8 values. int8 weights have one group: the row. A row with a value that is not finite has the scale
//         NaN, so that its results are.
enum class ActivationForm : std::uint8_t { f32, bf16, s8 };
inline constexpr std::size_t kActivationForms = 3;

std::string_view form_name(ActivationForm form);

// A row of activations for one matrix: its form and sizes.
struct RowShape {
  ActivationForm form = ActivationForm::f32;
  std::int64_t inputs = 0;
  std::int64_t groups = 1;  // scale groups of the weights; inputs must be a multiple
  bool int4_order = false;  // s8 only

  std::int64_t padded() const { return round_up(inputs, 64); }
  std::size_t value_bytes() const {
    return static_cast<std::size_t>(padded()) * (form == ActivationForm::f32    ? 4
                                                 : form == ActivationForm::bf16 ? 2
                                                                                : 1);
  }
  std::size_t scales_offset() const { return value_bytes(); }
  std::size_t sums_offset() const {
    return scales_offset() + (form == ActivationForm::s8 ? static_cast<std::size_t>(groups) * 4 : 0);
  }
  // Bytes of a row, a multiple of a cache line.
  std::size_t bytes() const {
    const std::size_t sums = form == ActivationForm::f32 ? 0 : static_cast<std::size_t>(groups) * 4;
    return static_cast<std::size_t>(round_up(static_cast<std::int64_t>(sums_offset() + sums), kLine));
  }
};

// One product: out[i][r] = sum over k of x[i][k] * w[r][k], for m activation rows and up to 16 weight rows.
struct Tile {
  const std::uint8_t* weights = nullptr;   // dense: the first row; packed: the block
  std::size_t weight_stride = 0;           // dense: bytes between rows
  int rows = 0;                            // dense: rows of the tile, 1 to 16; packed: ignored, always 16
  std::int64_t inputs = 0;                 // K
  std::int64_t groups = 1;                 // scale groups of packed weights
  bool zero_points = false;                // int4
  const std::uint8_t* const* x = nullptr;  // m pointers to rows of the kernel's activation form
  RowShape shape;                          // of those rows
  int m = 0;
  float* out = nullptr;                // [m][16], 64-byte aligned; packed weights' scales are applied
  const std::uint8_t* next = nullptr;  // what will be read after these weights, for prefetching; may be null
};

using TileKernel = void (*)(const Tile& tile);

enum class Activation : std::uint8_t {
  silu,
  gelu,
  gelu_tanh,
  relu,
  relu2,
  sigmoid,
  identity,
  swiglu_oai,
  silu_then_clamp
};

// The activation between the projections; see activate() in moe_fx/lowering/ops/activation.py, whose names these are.
struct ActivationSpec {
  Activation kind = Activation::silu;
  bool gated = true;
  float alpha = 1.702F;  // swiglu_oai
  bool limited = false;
  float limit = 0.0F;
};

struct Kernels {
  std::string_view name;  // as MOE_FX_ISA spells it
  // The product for a weight format and a form of activations; null where this set has none.
  TileKernel tile[kWeightFormats][kActivationForms];
  // The form in which activations of a dtype stay exact: bf16 only where x is bf16 and the set multiplies bf16.
  ActivationForm (*exact_form)(WeightFormat weights, DType x);

  // Widens n values to fp32.
  void (*widen)(DType dtype, const void* values, std::int64_t n, float* out);
  // Rounds n fp32 values to a dtype (to nearest, ties to even).
  void (*narrow)(DType dtype, const float* values, std::int64_t n, void* out);
  // Writes one activation row from fp32 values.
  void (*write_row)(const RowShape& shape, const float* values, std::uint8_t* row);
  // h[i] = activation(gate[i] + gate_bias, up[i] + up_bias) for m rows of 16; biases may be null. gate and h may be the
  // same.
  void (*activate)(const ActivationSpec& spec, int m, const float* gate, const float* up, const float* gate_bias,
                   const float* up_bias, float* h);
  // sums[i][0..16) += weights[i] * (values[i] + bias) for m rows of 16; rows of `sums` are given by pointers.
  void (*accumulate)(int m, const float* values, const float* bias, const float* weights, float* const* sums);
  // The sum of 64-bit words, `bytes` a multiple of 256: for measuring how fast memory is read.
  std::uint64_t (*sum_words)(const std::uint8_t* from, std::size_t bytes);
};

// The tables that were compiled in and that this machine can run, the best first; the last is "scalar".
const std::vector<const Kernels*>& available_kernels();

// The table that MOE_FX_ISA names, or the best. Throws std::invalid_argument when it names none of them.
const Kernels& chosen_kernels();

// The table of that name among available_kernels(), or null.
const Kernels* find_kernels(std::string_view name);

// One per instruction set, in kernels/<name>.cpp.
extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;      // F, BW, VL, DQ, VNNI
extern const Kernels kAvx512Bf16Kernels;  // and BF16
extern const Kernels kAmxKernels;         // and AMX int8, bf16
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;  // and dotprod
extern const Kernels kI8mmKernels;  // and i8mm
#endif

}  // namespace moe_fx::cpu
