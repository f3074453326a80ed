// Vector arithmetic, lane by lane: unary, binary, with a scalar, and multiply-accumulate.
//
// Each operation comes in Huawei's three forms: a count; a mask of the first lanes with repeats; a mask of bits with
// repeats. Results are rounded once, to nearest even, from float; integers wrap. Transcendentals are the host's, which
// differ from the NPU's in the last bits.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "model/enums.h"
#include "model/tensor.h"
#include "model/types.h"
#include "model/vector.h"

namespace ascendc_model {

template <typename T, typename... Allowed>
inline constexpr bool kOneOf = (std::is_same_v<T, Allowed> || ...);

inline uint8_t* writable(const uint8_t* pointer) { return const_cast<uint8_t*>(pointer); }

// The lambdas below load pieces of the sources, apply an operation to each lane and store a piece of the destination.

template <typename T, typename Op>
auto unary_lanes(Op op) {
  return [op](const uint8_t* const* p, uint64_t lanes) {
    in_pieces(lanes, [&](uint64_t from, std::size_t count) {
      Compute<T> a[kPiece];
      load<T>(p[1] + from * sizeof(T), a, count);
      for (std::size_t i = 0; i < count; ++i) {
        a[i] = static_cast<Compute<T>>(op(a[i]));
      }
      store<T>(a, writable(p[0]) + from * sizeof(T), count);
    });
  };
}

template <typename T, typename Op>
auto binary_lanes(Op op) {
  return [op](const uint8_t* const* p, uint64_t lanes) {
    in_pieces(lanes, [&](uint64_t from, std::size_t count) {
      Compute<T> a[kPiece];
      Compute<T> b[kPiece];
      load<T>(p[1] + from * sizeof(T), a, count);
      load<T>(p[2] + from * sizeof(T), b, count);
      for (std::size_t i = 0; i < count; ++i) {
        a[i] = static_cast<Compute<T>>(op(a[i], b[i]));
      }
      store<T>(a, writable(p[0]) + from * sizeof(T), count);
    });
  };
}

// dst = op(dst, src...), the destination of type T and the sources of type U.
template <typename T, typename U, typename Op>
auto accumulate_lanes(Op op) {
  return [op](const uint8_t* const* p, uint64_t lanes) {
    in_pieces(lanes, [&](uint64_t from, std::size_t count) {
      Compute<T> d[kPiece];
      Compute<U> a[kPiece];
      load<T>(p[0] + from * sizeof(T), d, count);
      load<U>(p[1] + from * sizeof(U), a, count);
      for (std::size_t i = 0; i < count; ++i) {
        d[i] = op(d[i], a[i]);
      }
      store<T>(d, writable(p[0]) + from * sizeof(T), count);
    });
  };
}

template <typename T, typename U, typename Op>
auto accumulate_lanes2(Op op) {
  return [op](const uint8_t* const* p, uint64_t lanes) {
    in_pieces(lanes, [&](uint64_t from, std::size_t count) {
      Compute<T> d[kPiece];
      Compute<U> a[kPiece];
      Compute<U> b[kPiece];
      load<T>(p[0] + from * sizeof(T), d, count);
      load<U>(p[1] + from * sizeof(U), a, count);
      load<U>(p[2] + from * sizeof(U), b, count);
      for (std::size_t i = 0; i < count; ++i) {
        d[i] = op(d[i], a[i], b[i]);
      }
      store<T>(d, writable(p[0]) + from * sizeof(T), count);
    });
  };
}

// Integers wrap, as they do on the NPU.
template <typename C>
C plus(C a, C b) {
  if constexpr (std::is_integral_v<C>) {
    return static_cast<C>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
  } else {
    return a + b;
  }
}
template <typename C>
C minus(C a, C b) {
  if constexpr (std::is_integral_v<C>) {
    return static_cast<C>(static_cast<uint32_t>(a) - static_cast<uint32_t>(b));
  } else {
    return a - b;
  }
}
template <typename C>
C times(C a, C b) {
  if constexpr (std::is_integral_v<C>) {
    return static_cast<C>(static_cast<uint32_t>(a) * static_cast<uint32_t>(b));
  } else {
    return a * b;
  }
}

// A scalar operand as it is computed with.
template <typename T>
Compute<T> scalar_value(const T& value) {
  if constexpr (std::is_same_v<T, bfloat16_t>) {
    return value.value();
  } else {
    return static_cast<Compute<T>>(value);
  }
}

}  // namespace ascendc_model

namespace AscendC {

// The three forms of dst = expression(a).
#define ASCENDC_MODEL_UNARY(NAME, ALLOWED, EXPRESSION)                                                             \
  template <typename T, bool isSetMask = true>                                                                     \
  __aicore__ inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint64_t mask[],               \
                              const ascendc_model::RepeatTime repeatTime, const UnaryRepeatParams& repeatParams) { \
    static_assert(ALLOWED, #NAME ": type");                                                                        \
    using namespace ascendc_model;                                                                                 \
    const Operand operands[] = {operand(dst, repeatParams.dstBlkStride, repeatParams.dstRepStride),                \
                                operand(src, repeatParams.srcBlkStride, repeatParams.srcRepStride)};               \
    for_repeats(#NAME, operands, mask_of<isSetMask>(static_cast<const uint64_t*>(mask)), repeatTime, false,        \
                unary_lanes<T>([](Compute<T> a) { return EXPRESSION; }));                                          \
  }                                                                                                                \
  template <typename T, bool isSetMask = true>                                                                     \
  __aicore__ inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint64_t mask,                 \
                              const ascendc_model::RepeatTime repeatTime, const UnaryRepeatParams& repeatParams) { \
    static_assert(ALLOWED, #NAME ": type");                                                                        \
    using namespace ascendc_model;                                                                                 \
    const Operand operands[] = {operand(dst, repeatParams.dstBlkStride, repeatParams.dstRepStride),                \
                                operand(src, repeatParams.srcBlkStride, repeatParams.srcRepStride)};               \
    for_repeats(#NAME, operands, mask_of<isSetMask>(mask), repeatTime, false,                                      \
                unary_lanes<T>([](Compute<T> a) { return EXPRESSION; }));                                          \
  }                                                                                                                \
  template <typename T>                                                                                            \
  __aicore__ inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t& count) {        \
    static_assert(ALLOWED, #NAME ": type");                                                                        \
    using namespace ascendc_model;                                                                                 \
    const Operand operands[] = {operand(dst), operand(src)};                                                       \
    for_count(#NAME, operands, count, false, unary_lanes<T>([](Compute<T> a) { return EXPRESSION; }));             \
  }

// The three forms of dst = expression(a, b).
#define ASCENDC_MODEL_BINARY(NAME, ALLOWED, EXPRESSION)                                                               \
  template <typename T, bool isSetMask = true>                                                                        \
  __aicore__ inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,      \
                              uint64_t mask[], const ascendc_model::RepeatTime repeatTime,                            \
                              const BinaryRepeatParams& repeatParams) {                                               \
    static_assert(ALLOWED, #NAME ": type");                                                                           \
    using namespace ascendc_model;                                                                                    \
    const Operand operands[] = {operand(dst, repeatParams.dstBlkStride, repeatParams.dstRepStride),                   \
                                operand(src0, repeatParams.src0BlkStride, repeatParams.src0RepStride),                \
                                operand(src1, repeatParams.src1BlkStride, repeatParams.src1RepStride)};               \
    for_repeats(#NAME, operands, mask_of<isSetMask>(static_cast<const uint64_t*>(mask)), repeatTime, false,           \
                binary_lanes<T>([](Compute<T> a, Compute<T> b) { return EXPRESSION; }));                              \
  }                                                                                                                   \
  template <typename T, bool isSetMask = true>                                                                        \
  __aicore__ inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,      \
                              uint64_t mask, const ascendc_model::RepeatTime repeatTime,                              \
                              const BinaryRepeatParams& repeatParams) {                                               \
    static_assert(ALLOWED, #NAME ": type");                                                                           \
    using namespace ascendc_model;                                                                                    \
    const Operand operands[] = {operand(dst, repeatParams.dstBlkStride, repeatParams.dstRepStride),                   \
                                operand(src0, repeatParams.src0BlkStride, repeatParams.src0RepStride),                \
                                operand(src1, repeatParams.src1BlkStride, repeatParams.src1RepStride)};               \
    for_repeats(#NAME, operands, mask_of<isSetMask>(mask), repeatTime, false,                                         \
                binary_lanes<T>([](Compute<T> a, Compute<T> b) { return EXPRESSION; }));                              \
  }                                                                                                                   \
  template <typename T>                                                                                               \
  __aicore__ inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,      \
                              const int32_t& count) {                                                                 \
    static_assert(ALLOWED, #NAME ": type");                                                                           \
    using namespace ascendc_model;                                                                                    \
    const Operand operands[] = {operand(dst), operand(src0), operand(src1)};                                          \
    for_count(#NAME, operands, count, false, binary_lanes<T>([](Compute<T> a, Compute<T> b) { return EXPRESSION; })); \
  }

// The three forms of dst = expression(a, s) with a scalar s of the tensors' type.
#define ASCENDC_MODEL_SCALAR(NAME, ALLOWED, EXPRESSION)                                                     \
  template <typename T, bool isSetMask = true>                                                              \
  __aicore__ inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalarValue,   \
                              uint64_t mask[], const ascendc_model::RepeatTime repeatTime,                  \
                              const UnaryRepeatParams& repeatParams) {                                      \
    static_assert(ALLOWED, #NAME ": type");                                                                 \
    using namespace ascendc_model;                                                                          \
    const Operand operands[] = {operand(dst, repeatParams.dstBlkStride, repeatParams.dstRepStride),         \
                                operand(src, repeatParams.srcBlkStride, repeatParams.srcRepStride)};        \
    for_repeats(#NAME, operands, mask_of<isSetMask>(static_cast<const uint64_t*>(mask)), repeatTime, false, \
                unary_lanes<T>([s = scalar_value(scalarValue)](Compute<T> a) { return EXPRESSION; }));      \
  }                                                                                                         \
  template <typename T, bool isSetMask = true>                                                              \
  __aicore__ inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalarValue,   \
                              uint64_t mask, const ascendc_model::RepeatTime repeatTime,                    \
                              const UnaryRepeatParams& repeatParams) {                                      \
    static_assert(ALLOWED, #NAME ": type");                                                                 \
    using namespace ascendc_model;                                                                          \
    const Operand operands[] = {operand(dst, repeatParams.dstBlkStride, repeatParams.dstRepStride),         \
                                operand(src, repeatParams.srcBlkStride, repeatParams.srcRepStride)};        \
    for_repeats(#NAME, operands, mask_of<isSetMask>(mask), repeatTime, false,                               \
                unary_lanes<T>([s = scalar_value(scalarValue)](Compute<T> a) { return EXPRESSION; }));      \
  }                                                                                                         \
  template <typename T, bool isSetMask = true>                                                              \
  __aicore__ inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalarValue,   \
                              const int32_t& count) {                                                       \
    static_assert(ALLOWED, #NAME ": type");                                                                 \
    using namespace ascendc_model;                                                                          \
    const Operand operands[] = {operand(dst), operand(src)};                                                \
    for_count(#NAME, operands, count, false,                                                                \
              unary_lanes<T>([s = scalar_value(scalarValue)](Compute<T> a) { return EXPRESSION; }));        \
  }

// The three forms of dst = expression(d, a, b), where d is dst; sources may be narrower than it.
#define ASCENDC_MODEL_MULTIPLY_ACCUMULATE(NAME, ALLOWED, EXPRESSION)                                             \
  template <typename T, typename U, bool isSetMask = true>                                                       \
  __aicore__ inline void NAME(const LocalTensor<T>& dst, const LocalTensor<U>& src0, const LocalTensor<U>& src1, \
                              const uint64_t mask[], const ascendc_model::RepeatTime repeatTime,                 \
                              const BinaryRepeatParams& repeatParams) {                                          \
    static_assert(ALLOWED, #NAME ": types");                                                                     \
    using namespace ascendc_model;                                                                               \
    const Operand operands[] = {operand(dst, repeatParams.dstBlkStride, repeatParams.dstRepStride),              \
                                operand(src0, repeatParams.src0BlkStride, repeatParams.src0RepStride),           \
                                operand(src1, repeatParams.src1BlkStride, repeatParams.src1RepStride)};          \
    for_repeats(#NAME, operands, mask_of<isSetMask>(mask), repeatTime, true,                                     \
                accumulate_lanes2<T, U>([](float d, float a, float b) { return EXPRESSION; }));                  \
  }                                                                                                              \
  template <typename T, typename U, bool isSetMask = true>                                                       \
  __aicore__ inline void NAME(const LocalTensor<T>& dst, const LocalTensor<U>& src0, const LocalTensor<U>& src1, \
                              uint64_t mask, const ascendc_model::RepeatTime repeatTime,                         \
                              const BinaryRepeatParams& repeatParams) {                                          \
    static_assert(ALLOWED, #NAME ": types");                                                                     \
    using namespace ascendc_model;                                                                               \
    const Operand operands[] = {operand(dst, repeatParams.dstBlkStride, repeatParams.dstRepStride),              \
                                operand(src0, repeatParams.src0BlkStride, repeatParams.src0RepStride),           \
                                operand(src1, repeatParams.src1BlkStride, repeatParams.src1RepStride)};          \
    for_repeats(#NAME, operands, mask_of<isSetMask>(mask), repeatTime, true,                                     \
                accumulate_lanes2<T, U>([](float d, float a, float b) { return EXPRESSION; }));                  \
  }                                                                                                              \
  template <typename T, typename U>                                                                              \
  __aicore__ inline void NAME(const LocalTensor<T>& dst, const LocalTensor<U>& src0, const LocalTensor<U>& src1, \
                              const int32_t& count) {                                                            \
    static_assert(ALLOWED, #NAME ": types");                                                                     \
    using namespace ascendc_model;                                                                               \
    const Operand operands[] = {operand(dst), operand(src0), operand(src1)};                                     \
    for_count(#NAME, operands, count, true,                                                                      \
              accumulate_lanes2<T, U>([](float d, float a, float b) { return EXPRESSION; }));                    \
  }

#define ASCENDC_MODEL_FLOATING (ascendc_model::kOneOf<T, half, float>)
#define ASCENDC_MODEL_ARITHMETIC (ascendc_model::kOneOf<T, half, float, int16_t, int32_t>)
#define ASCENDC_MODEL_BITS (ascendc_model::kOneOf<T, int16_t, uint16_t>)
#define ASCENDC_MODEL_SHIFTED (ascendc_model::kOneOf<T, int16_t, uint16_t, int32_t, uint32_t>)
#define ASCENDC_MODEL_PRODUCT                                         \
  ((ascendc_model::kOneOf<T, half, float> && std::is_same_v<T, U>) || \
   (std::is_same_v<T, float> && std::is_same_v<U, half>))

ASCENDC_MODEL_UNARY(Exp, ASCENDC_MODEL_FLOATING, std::exp(a))
ASCENDC_MODEL_UNARY(Ln, ASCENDC_MODEL_FLOATING, std::log(a))
ASCENDC_MODEL_UNARY(Sqrt, ASCENDC_MODEL_FLOATING, std::sqrt(a))
ASCENDC_MODEL_UNARY(Rsqrt, ASCENDC_MODEL_FLOATING, 1.0f / std::sqrt(a))
ASCENDC_MODEL_UNARY(Reciprocal, ASCENDC_MODEL_FLOATING, 1.0f / a)
ASCENDC_MODEL_UNARY(Abs, ASCENDC_MODEL_FLOATING, std::fabs(a))
ASCENDC_MODEL_UNARY(Relu, (ascendc_model::kOneOf<T, half, float, int32_t>), a > 0 ? a : 0)
ASCENDC_MODEL_UNARY(Not, ASCENDC_MODEL_BITS, ~a)

ASCENDC_MODEL_BINARY(Add, ASCENDC_MODEL_ARITHMETIC, ascendc_model::plus(a, b))
ASCENDC_MODEL_BINARY(Sub, ASCENDC_MODEL_ARITHMETIC, ascendc_model::minus(a, b))
ASCENDC_MODEL_BINARY(Mul, ASCENDC_MODEL_ARITHMETIC, ascendc_model::times(a, b))
ASCENDC_MODEL_BINARY(Div, ASCENDC_MODEL_FLOATING, a / b)
ASCENDC_MODEL_BINARY(Max, ASCENDC_MODEL_ARITHMETIC, a > b ? a : b)
ASCENDC_MODEL_BINARY(Min, ASCENDC_MODEL_ARITHMETIC, a < b ? a : b)
ASCENDC_MODEL_BINARY(And, ASCENDC_MODEL_BITS, a& b)
ASCENDC_MODEL_BINARY(Or, ASCENDC_MODEL_BITS, a | b)

ASCENDC_MODEL_SCALAR(Adds, ASCENDC_MODEL_ARITHMETIC, ascendc_model::plus(a, s))
ASCENDC_MODEL_SCALAR(Muls, ASCENDC_MODEL_ARITHMETIC, ascendc_model::times(a, s))
ASCENDC_MODEL_SCALAR(Maxs, ASCENDC_MODEL_ARITHMETIC, a > s ? a : s)
ASCENDC_MODEL_SCALAR(Mins, ASCENDC_MODEL_ARITHMETIC, a < s ? a : s)
ASCENDC_MODEL_SCALAR(LeakyRelu, ASCENDC_MODEL_FLOATING, a < 0 ? a * s : a)
ASCENDC_MODEL_SCALAR(ShiftLeft, ASCENDC_MODEL_SHIFTED, static_cast<std::make_unsigned_t<T>>(a) << s)
ASCENDC_MODEL_SCALAR(ShiftRight, ASCENDC_MODEL_SHIFTED, a >> s)

ASCENDC_MODEL_MULTIPLY_ACCUMULATE(MulAddDst, ASCENDC_MODEL_PRODUCT, a* b + d)

#undef ASCENDC_MODEL_UNARY
#undef ASCENDC_MODEL_BINARY
#undef ASCENDC_MODEL_SCALAR
#undef ASCENDC_MODEL_MULTIPLY_ACCUMULATE

// dst = dst * src0 + src1.
template <typename T>
__aicore__ inline void FusedMulAdd(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,
                                   const int32_t& count) {
  static_assert(ASCENDC_MODEL_FLOATING, "FusedMulAdd: type");
  using namespace ascendc_model;
  const Operand operands[] = {operand(dst), operand(src0), operand(src1)};
  for_count("FusedMulAdd", operands, count, true,
            accumulate_lanes2<T, T>([](float d, float a, float b) { return d * a + b; }));
}

// dst = src * scalar + dst. With T float and U half the product is exact and the sum in float.
template <typename T, typename U, bool isSetMask = true>
__aicore__ inline void Axpy(const LocalTensor<T>& dst, const LocalTensor<U>& src, const U& scalarValue, uint64_t mask,
                            const ascendc_model::RepeatTime repeatTime, const UnaryRepeatParams& repeatParams) {
  static_assert(ASCENDC_MODEL_PRODUCT, "Axpy: types");
  using namespace ascendc_model;
  const Operand operands[] = {operand(dst, repeatParams.dstBlkStride, repeatParams.dstRepStride),
                              operand(src, repeatParams.srcBlkStride, repeatParams.srcRepStride)};
  for_repeats("Axpy", operands, mask_of<isSetMask>(mask), repeatTime, true,
              accumulate_lanes<T, U>([s = scalar_value(scalarValue)](float d, float a) { return a * s + d; }));
}

template <typename T, typename U, bool isSetMask = true>
__aicore__ inline void Axpy(const LocalTensor<T>& dst, const LocalTensor<U>& src, const U& scalarValue, uint64_t mask[],
                            const ascendc_model::RepeatTime repeatTime, const UnaryRepeatParams& repeatParams) {
  static_assert(ASCENDC_MODEL_PRODUCT, "Axpy: types");
  using namespace ascendc_model;
  const Operand operands[] = {operand(dst, repeatParams.dstBlkStride, repeatParams.dstRepStride),
                              operand(src, repeatParams.srcBlkStride, repeatParams.srcRepStride)};
  for_repeats("Axpy", operands, mask_of<isSetMask>(static_cast<const uint64_t*>(mask)), repeatTime, true,
              accumulate_lanes<T, U>([s = scalar_value(scalarValue)](float d, float a) { return a * s + d; }));
}

template <typename T, typename U>
__aicore__ inline void Axpy(const LocalTensor<T>& dst, const LocalTensor<U>& src, const U& scalarValue,
                            const int32_t& count) {
  static_assert(ASCENDC_MODEL_PRODUCT, "Axpy: types");
  using namespace ascendc_model;
  const Operand operands[] = {operand(dst), operand(src)};
  for_count("Axpy", operands, count, true,
            accumulate_lanes<T, U>([s = scalar_value(scalarValue)](float d, float a) { return a * s + d; }));
}

}  // namespace AscendC
