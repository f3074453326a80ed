// The NEON trait that neon.cpp and i8mm.cpp build their kernels from. For those two files only: everything lies in an
// anonymous namespace, since each is compiled with flags of its own.

#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <utility>

#include "cpu/kernels.h"

namespace moe_fx::cpu {
namespace {

struct Neon {
  using Int = int32x4_t;
  using Float = float32x4_t;
  static constexpr int kLanes = 4;
  static constexpr int kVectors = 4;
  static constexpr int kMaxM = 4;  // 4 x 4 sums, 4 raw and 4 converted weights and the activations of 32 registers
  static constexpr std::int32_t kInt8Bias = 0;  // both operands of a dot product are signed

  static Int zero_int() { return vdupq_n_s32(0); }
  static Int set_int(std::int32_t value) { return vdupq_n_s32(value); }
  static Int load_int(const void* from) {
    return vreinterpretq_s32_u8(vld1q_u8(static_cast<const std::uint8_t*>(from)));
  }
  static Int load_bytes(const void* from) {
    std::uint32_t bytes;
    __builtin_memcpy(&bytes, from, sizeof bytes);
    const uint8x8_t narrow = vreinterpret_u8_u32(vdup_n_u32(bytes));
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(narrow))));
  }
  static Int broadcast_int(const std::uint8_t* from) {
    return vld1q_dup_s32(reinterpret_cast<const std::int32_t*>(from));
  }
  static Int add_int(Int a, Int b) { return vaddq_s32(a, b); }
  static Int subtract_int(Int a, Int b) { return vsubq_s32(a, b); }
  static Int int8_operand(Int raw) { return raw; }
  static Int dot_int8(Int sum, Int weights, Int values) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(weights), vreinterpretq_s8_s32(values));
  }
  static Int dot_nibbles(Int sum, Int weights, Int values) { return dot_int8(sum, weights, values); }
  static Int low_nibbles(Int raw) { return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(raw), vdupq_n_u8(15))); }
  static Int high_nibbles(Int raw) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(raw), 4)); }
  static Int low_bits(Int raw) { return vandq_s32(raw, vdupq_n_s32(15)); }
  template <int kBits>
  static Int shift_left(Int raw) {
    return vshlq_n_s32(raw, kBits);
  }
  template <int kBits>
  static Int shift_right(Int raw) {
    if constexpr (kBits == 0) {
      return raw;  // no instruction shifts right by nothing
    } else {
      return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(raw), kBits));
    }
  }
  template <int kBits>
  static Int shift_right_signed(Int raw) {
    return vshrq_n_s32(raw, kBits);
  }

  static Float zero_float() { return vdupq_n_f32(0.0F); }
  static Float to_float(Int value) { return vcvtq_f32_s32(value); }
  static Float load_float(const float* from) { return vld1q_f32(from); }
  static Float load_half(const void* from) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(static_cast<const std::uint16_t*>(from))));
  }
  static void store_float(float* to, Float value) { vst1q_f32(to, value); }
  static Float broadcast_float(float value) { return vdupq_n_f32(value); }
  static Float add_float(Float a, Float b) { return vaddq_f32(a, b); }
  static Float multiply(Float a, Float b) { return vmulq_f32(a, b); }
  static Float multiply_add(Float sum, Float a, Float b) { return vfmaq_f32(sum, a, b); }
  static Float subtract_product(Float from, Float a, Float b) { return vfmsq_f32(from, a, b); }
};

// Dense weights widened to fp32, times fp32 activations.
template <WeightFormat kFormat>
struct NeonDense {
  using Vector = float32x4_t;
  using Weights = float32x4_t;
  static constexpr std::int64_t kStep = 4;
  static constexpr int kMaxM = 4;  // 4 x 4 sums, 4 weights and 4 rows of activations: more is spilled by GCC 12
  static constexpr int kMaxStreamed = 1;

  static Vector zero() { return vdupq_n_f32(0.0F); }
  static Vector add(Vector a, Vector b) { return vaddq_f32(a, b); }
  static float sum(Vector v) { return vaddvq_f32(v); }
  static void sum4(Vector a, Vector b, Vector c, Vector d, float* out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
  }
  static Weights widen_lanes(uint16x4_t raw) {
    if constexpr (kFormat == WeightFormat::f16) {
      return vcvt_f32_f16(vreinterpret_f16_u16(raw));
    } else {
      return vreinterpretq_f32_u32(vshll_n_u16(raw, 16));
    }
  }
  static Weights load_weights(const std::uint8_t* from) {
    return widen_lanes(vld1_u16(reinterpret_cast<const std::uint16_t*>(from)));
  }
  static Weights load_weights_tail(const std::uint8_t* from, int count) {
    std::uint16_t padded[4] = {};
    __builtin_memcpy(padded, from, static_cast<std::size_t>(count) * 2);
    return widen_lanes(vld1_u16(padded));
  }
  static float32x4_t load_x(const std::uint8_t* row, std::int64_t k) {
    return vld1q_f32(reinterpret_cast<const float*>(row) + k);
  }
  static Vector multiply_add(Vector sum, Weights w, float32x4_t x) { return vfmaq_f32(sum, w, x); }
};

// fp16 to fp32 and back; a last vector that is not full goes through padded copies.
inline void widen_halves(const std::uint16_t* values, std::int64_t n, float* out) {
  std::int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    vst1q_f32(out + i, Neon::load_half(values + i));
  if (i == n) return;
  std::uint16_t padded[4] = {};
  float wide[4];
  __builtin_memcpy(padded, values + i, static_cast<std::size_t>(n - i) * 2);
  vst1q_f32(wide, Neon::load_half(padded));
  __builtin_memcpy(out + i, wide, static_cast<std::size_t>(n - i) * 4);
}

inline void narrow_to_halves(const float* values, std::int64_t n, std::uint16_t* out) {
  const auto narrow = [](const float* from) { return vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from))); };
  std::int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    vst1_u16(out + i, narrow(values + i));
  if (i == n) return;
  float padded[4] = {};
  std::uint16_t halves[4];
  __builtin_memcpy(padded, values + i, static_cast<std::size_t>(n - i) * 4);
  vst1_u16(halves, narrow(padded));
  __builtin_memcpy(out + i, halves, static_cast<std::size_t>(n - i) * 2);
}

#include "cpu/kernels/dense.inl"
#include "cpu/kernels/elementwise.inl"
#include "cpu/kernels/packed.inl"

void widen(DType dtype, const void* values, std::int64_t n, float* out) {
  const auto* const halves = static_cast<const std::uint16_t*>(values);
  switch (dtype) {
    case DType::f32: __builtin_memcpy(out, values, static_cast<std::size_t>(n) * 4); return;
    case DType::f16: return widen_halves(halves, n, out);
    case DType::bf16:
      for (std::int64_t i = 0; i < n; ++i)
        out[i] = from_bf16(halves[i]);
  }
}

void narrow(DType dtype, const float* values, std::int64_t n, void* out) {
  auto* const halves = static_cast<std::uint16_t*>(out);
  switch (dtype) {
    case DType::f32: __builtin_memcpy(out, values, static_cast<std::size_t>(n) * 4); return;
    case DType::f16: return narrow_to_halves(values, n, halves);
    case DType::bf16:
      for (std::int64_t i = 0; i < n; ++i)
        halves[i] = to_bf16(values[i]);
  }
}

ActivationForm exact_form(WeightFormat, DType) { return ActivationForm::f32; }

}  // namespace
}  // namespace moe_fx::cpu
