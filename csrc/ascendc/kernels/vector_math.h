// Vector instructions that several kernels spell the same way: an operation chosen by a template argument, and what has
// no instruction of its own.

#pragma once

#include <cstdint>

#include "kernel_operator.h"

namespace moe_fx::ascendc {

constexpr uint32_t kFloatLanes = 64;  // that a repeat computes
constexpr float kInfinity = __builtin_huge_valf();

// How an element travels when its bits matter more than its value, in padding and filling.
template <typename T>
struct Bits;
template <>
struct Bits<float> {
  using Type = uint32_t;
  static constexpr Type kMinusInfinity = 0xFF800000U;
};
template <>
struct Bits<half> {
  using Type = uint16_t;
  static constexpr Type kMinusInfinity = 0xFC00U;
};
template <>
struct Bits<bfloat16_t> {
  using Type = uint16_t;
  static constexpr Type kMinusInfinity = 0xFF80U;
};

enum class Op { kAdd, kSub, kMul, kDiv, kMax, kMin };

template <Op op>
__aicore__ inline void Apply(const AscendC::LocalTensor<float>& dst, const AscendC::LocalTensor<float>& a,
                             const AscendC::LocalTensor<float>& b, uint32_t mask, uint32_t repeats,
                             const AscendC::BinaryRepeatParams& params) {
  const uint64_t lanes = mask;
  const uint8_t times = static_cast<uint8_t>(repeats);
  if constexpr (op == Op::kAdd) {
    AscendC::Add(dst, a, b, lanes, times, params);
  } else if constexpr (op == Op::kSub) {
    AscendC::Sub(dst, a, b, lanes, times, params);
  } else if constexpr (op == Op::kMul) {
    AscendC::Mul(dst, a, b, lanes, times, params);
  } else if constexpr (op == Op::kDiv) {
    AscendC::Div(dst, a, b, lanes, times, params);
  } else if constexpr (op == Op::kMax) {
    AscendC::Max(dst, a, b, lanes, times, params);
  } else {
    AscendC::Min(dst, a, b, lanes, times, params);
  }
}

// x = 1 / x, divided: the instruction Reciprocal only approximates. `ones` is one block of ones.
__aicore__ inline void Invert(const AscendC::LocalTensor<float>& x, const AscendC::LocalTensor<float>& ones,
                              uint32_t count) {
  const uint32_t repeats = count / kFloatLanes;
  const uint32_t rest = count % kFloatLanes;
  const AscendC::BinaryRepeatParams params{1, 0, 1, 8, 0, 8};
  if (repeats > 0) Apply<Op::kDiv>(x, ones, x, kFloatLanes, repeats, params);
  if (rest > 0) {
    const AscendC::LocalTensor<float> tail = x[repeats * kFloatLanes];
    Apply<Op::kDiv>(tail, ones, tail, rest, 1, params);
  }
}

}  // namespace moe_fx::ascendc
