// Comparisons to bits, and selection by them. A bit of a result belongs to a lane, the lowest bit of a byte to the
// first.

#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "model/elementwise.h"

namespace ascendc_model {

template <typename C>
bool compare(C a, C b, AscendC::CMPMODE mode) {
  switch (mode) {
    case AscendC::CMPMODE::LT: return a < b;
    case AscendC::CMPMODE::GT: return a > b;
    case AscendC::CMPMODE::EQ: return a == b;
    case AscendC::CMPMODE::LE: return a <= b;
    case AscendC::CMPMODE::GE: return a >= b;
    case AscendC::CMPMODE::NE: return a != b;
  }
  return false;
}

template <typename T>
bool comparable(const char* name, AscendC::CMPMODE mode) {
  if (!std::is_same_v<T, int32_t> || mode == AscendC::CMPMODE::EQ) return true;
  core().fault(FaultKind::kBadArgument, name, "compares int32_t other than for equality");
  return false;
}

// The lanes of a repeat as far as the mask goes; others stay as they were.
template <typename T>
bool read_lanes(const VectorOp& op, const Operand& from, int repeat, const Mask& mask, Compute<T>* values) {
  constexpr uint32_t kPerBlock = 32 / sizeof(T);
  for (uint32_t block = 0; block < 8; ++block) {
    uint32_t first = block * kPerBlock;
    uint32_t last = first + kPerBlock;
    while (first < last && !mask.has(first))
      ++first;
    while (last > first && !mask.has(last - 1))
      --last;
    if (first == last) continue;
    const uint64_t address = from.place.address + (uint64_t(repeat) * from.rep + uint64_t(block) * from.blk) * 32 +
                             (first - block * kPerBlock) * sizeof(T);
    const uint8_t* at = op.read(from.place, address, (last - first) * sizeof(T));
    if (!at) return false;
    load<T>(at, values + first, last - first);
  }
  return true;
}

// Writes the bits of each repeat behind those of the one before. `second` gives the other side of the comparison.
template <typename T, typename U, typename Second>
void compare_repeats(const char* name, const AscendC::LocalTensor<U>& dst, const Operand& first, AscendC::CMPMODE mode,
                     const Mask& mask, int repeats, Second second) {
  const VectorOp op(name);
  constexpr uint32_t kLanes = 256 / sizeof(T);
  if (!comparable<T>(name, mode) || !op.check_mask(mask, kLanes)) return;
  op.check_aligned(operand(dst), "the destination");
  op.check_aligned(first, "a source");
  core().count_vector(name, 1, static_cast<uint64_t>(repeats));
  for (int repeat = 0; repeat < repeats; ++repeat) {
    Compute<T> a[kLanes] = {};
    Compute<T> b[kLanes] = {};
    if (!read_lanes<T>(op, first, repeat, mask, a) || !second(op, repeat, b)) return;
    uint8_t* to = op.write(dst.place(), dst.place().address + uint64_t(repeat) * (kLanes / 8), kLanes / 8);
    if (!to) return;
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      if (!mask.has(lane)) continue;
      const auto bit = static_cast<uint8_t>(1u << (lane % 8));
      to[lane / 8] = static_cast<uint8_t>(compare(a[lane], b[lane], mode) ? to[lane / 8] | bit : to[lane / 8] & ~bit);
    }
  }
}

// How many repeats a count makes. Compare and Select by count work on whole repeats.
template <typename T>
int whole_repeats(const char* name, uint32_t count) {
  if (count == 0 || count * sizeof(T) % 256 != 0) {
    core().fault(FaultKind::kUnaligned, name,
                 "has a count of " + std::to_string(count) + ", which is not whole repeats");
    return 0;
  }
  return static_cast<int>(count * sizeof(T) / 256);
}

template <typename T>
auto from_tensor(const AscendC::LocalTensor<T>& tensor, uint32_t blk, uint32_t rep, const Mask& mask) {
  return [from = operand(tensor, blk, rep), mask](const VectorOp& op, int repeat, Compute<T>* values) {
    op.check_aligned(from, "a source");
    return read_lanes<T>(op, from, repeat, mask, values);
  };
}

template <typename T>
auto from_scalar(T value) {
  return [value](const VectorOp&, int, Compute<T>* values) {
    std::fill_n(values, 256 / sizeof(T), scalar_value(value));
    return true;
  };
}

// On arch 2201, Select with bits from a tensor that go on from repeat to repeat keeps their address in the last 8 KiB
// of the unified buffer.
inline constexpr uint32_t kSelectScratch = 184 * 1024;

inline void check_select_scratch(AscendC::SELMODE mode) {
  if (mode == AscendC::SELMODE::VSEL_CMPMASK_SPR || core().ub_used <= kSelectScratch) return;
  core().fault(
      FaultKind::kUbOverflow, "Select",
      "uses the unified buffer past " + std::to_string(kSelectScratch) + " bytes, where the kernel has buffers");
}

// dst = bit ? src0 : src1. The bits come from a tensor, or from the register that Compare left.
template <typename T, typename Second>
void select_repeats(const char* name, const Operand& dst, const uint8_t* (*bits)(const VectorOp&, const void*, int),
                    const void* source, const Operand& first, const Mask& mask, int repeats, Second second) {
  const VectorOp op(name);
  constexpr uint32_t kLanes = 256 / sizeof(T);
  if (!op.check_mask(mask, kLanes)) return;
  op.check_aligned(dst, "the destination");
  op.check_aligned(first, "a source");
  core().count_vector(name, 1, static_cast<uint64_t>(repeats));
  for (int repeat = 0; repeat < repeats; ++repeat) {
    Compute<T> a[kLanes] = {};
    Compute<T> b[kLanes] = {};
    if (!read_lanes<T>(op, first, repeat, mask, a) || !second(op, repeat, b)) return;
    const uint8_t* chosen = bits(op, source, repeat);
    if (!chosen) return;
    uint8_t copy[kLanes / 8];
    std::memcpy(copy, chosen, sizeof(copy));
    constexpr uint32_t kPerBlock = 32 / sizeof(T);
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      if (!mask.has(lane)) continue;
      const uint64_t address = dst.place.address +
                               (uint64_t(repeat) * dst.rep + uint64_t(lane / kPerBlock) * dst.blk) * 32 +
                               lane % kPerBlock * sizeof(T);
      uint8_t* to = op.write(dst.place, address, sizeof(T));
      if (!to) return;
      encode<T>(copy[lane / 8] >> (lane % 8) & 1 ? a[lane] : b[lane], to);
    }
  }
}

// Bits of a tensor: those of a repeat follow those of the one before, or all repeats share the first.
template <typename T, typename U>
const uint8_t* bits_of_tensor(const VectorOp& op, const void* source, int repeat) {
  const auto& tensor = *static_cast<const AscendC::LocalTensor<U>*>(source);
  constexpr uint32_t kBytes = 256 / sizeof(T) / 8;
  return op.read(tensor.place(), tensor.place().address + uint64_t(repeat) * kBytes, kBytes);
}
template <typename T, typename U>
const uint8_t* first_bits_of_tensor(const VectorOp& op, const void* source, int) {
  return bits_of_tensor<T, U>(op, source, 0);
}
inline const uint8_t* bits_of_register(const VectorOp&, const void*, int) {
  return reinterpret_cast<const uint8_t*>(core().compare_mask);
}

}  // namespace ascendc_model

namespace AscendC {

#define ASCENDC_MODEL_COMPARED (ascendc_model::kOneOf<T, half, float, int32_t>)

template <typename T, typename U, bool isSetMask = true>
__aicore__ inline void Compare(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,
                               CMPMODE cmpMode, const uint64_t mask[], ascendc_model::RepeatTime repeatTime,
                               const BinaryRepeatParams& repeatParams) {
  static_assert(ASCENDC_MODEL_COMPARED, "Compare: type");
  using namespace ascendc_model;
  const Mask lanes = mask_of<isSetMask>(mask);
  compare_repeats<T>("Compare", dst, operand(src0, repeatParams.src0BlkStride, repeatParams.src0RepStride), cmpMode,
                     lanes, repeatTime,
                     from_tensor(src1, repeatParams.src1BlkStride, repeatParams.src1RepStride, lanes));
}

template <typename T, typename U, bool isSetMask = true>
__aicore__ inline void Compare(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,
                               CMPMODE cmpMode, const uint64_t mask, ascendc_model::RepeatTime repeatTime,
                               const BinaryRepeatParams& repeatParams) {
  static_assert(ASCENDC_MODEL_COMPARED, "Compare: type");
  using namespace ascendc_model;
  const Mask lanes = mask_of<isSetMask>(mask);
  compare_repeats<T>("Compare", dst, operand(src0, repeatParams.src0BlkStride, repeatParams.src0RepStride), cmpMode,
                     lanes, repeatTime,
                     from_tensor(src1, repeatParams.src1BlkStride, repeatParams.src1RepStride, lanes));
}

template <typename T, typename U>
__aicore__ inline void Compare(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,
                               CMPMODE cmpMode, uint32_t count) {
  static_assert(ASCENDC_MODEL_COMPARED, "Compare: type");
  using namespace ascendc_model;
  const Mask lanes = first_lanes(256 / sizeof(T));
  if (const int repeats = whole_repeats<T>("Compare", count)) {
    compare_repeats<T>("Compare", dst, operand(src0), cmpMode, lanes, repeats, from_tensor(src1, 1, 8, lanes));
  }
}

template <typename T, typename U, bool isSetMask = true>
__aicore__ inline void CompareScalar(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const T src1Scalar,
                                     CMPMODE cmpMode, const uint64_t mask[], ascendc_model::RepeatTime repeatTime,
                                     const UnaryRepeatParams& repeatParams) {
  static_assert(ASCENDC_MODEL_COMPARED, "CompareScalar: type");
  using namespace ascendc_model;
  compare_repeats<T>("CompareScalar", dst, operand(src0, repeatParams.srcBlkStride, repeatParams.srcRepStride), cmpMode,
                     mask_of<isSetMask>(mask), repeatTime, from_scalar<T>(src1Scalar));
}

template <typename T, typename U, bool isSetMask = true>
__aicore__ inline void CompareScalar(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const T src1Scalar,
                                     CMPMODE cmpMode, const uint64_t mask, ascendc_model::RepeatTime repeatTime,
                                     const UnaryRepeatParams& repeatParams) {
  static_assert(ASCENDC_MODEL_COMPARED, "CompareScalar: type");
  using namespace ascendc_model;
  compare_repeats<T>("CompareScalar", dst, operand(src0, repeatParams.srcBlkStride, repeatParams.srcRepStride), cmpMode,
                     mask_of<isSetMask>(mask), repeatTime, from_scalar<T>(src1Scalar));
}

template <typename T, typename U>
__aicore__ inline void CompareScalar(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const T src1Scalar,
                                     CMPMODE cmpMode, uint32_t count) {
  static_assert(ASCENDC_MODEL_COMPARED, "CompareScalar: type");
  using namespace ascendc_model;
  if (const int repeats = whole_repeats<T>("CompareScalar", count)) {
    compare_repeats<T>("CompareScalar", dst, operand(src0), cmpMode, first_lanes(256 / sizeof(T)), repeats,
                       from_scalar<T>(src1Scalar));
  }
}

template <typename T, typename U, bool isSetMask = true>
__aicore__ inline void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0,
                              const LocalTensor<T>& src1, SELMODE selMode, uint64_t mask,
                              ascendc_model::RepeatTime repeatTime, const BinaryRepeatParams& repeatParams) {
  static_assert(ASCENDC_MODEL_FLOATING, "Select: type");
  using namespace ascendc_model;
  check_select_scratch(selMode);
  const Mask lanes = mask_of<isSetMask>(mask);
  const auto bits = selMode == SELMODE::VSEL_CMPMASK_SPR ? &first_bits_of_tensor<T, U> : &bits_of_tensor<T, U>;
  select_repeats<T>("Select", operand(dst, repeatParams.dstBlkStride, repeatParams.dstRepStride), bits, &selMask,
                    operand(src0, repeatParams.src0BlkStride, repeatParams.src0RepStride), lanes, repeatTime,
                    from_tensor(src1, repeatParams.src1BlkStride, repeatParams.src1RepStride, lanes));
}

template <typename T, typename U>
__aicore__ inline void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0,
                              const LocalTensor<T>& src1, SELMODE selMode, uint32_t count) {
  static_assert(ASCENDC_MODEL_FLOATING, "Select: type");
  using namespace ascendc_model;
  check_select_scratch(selMode);
  const Mask lanes = first_lanes(256 / sizeof(T));
  const auto bits = selMode == SELMODE::VSEL_CMPMASK_SPR ? &first_bits_of_tensor<T, U> : &bits_of_tensor<T, U>;
  if (const int repeats = whole_repeats<T>("Select", count)) {
    select_repeats<T>("Select", operand(dst), bits, &selMask, operand(src0), lanes, repeats,
                      from_tensor(src1, 1, 8, lanes));
  }
}

template <typename T, typename U, bool isSetMask = true>
__aicore__ inline void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0,
                              T src1, SELMODE selMode, uint64_t mask, ascendc_model::RepeatTime repeatTime,
                              const BinaryRepeatParams& repeatParams) {
  static_assert(ASCENDC_MODEL_FLOATING, "Select: type");
  using namespace ascendc_model;
  check_select_scratch(selMode);
  if (selMode != SELMODE::VSEL_TENSOR_SCALAR_MODE) {
    core().fault(FaultKind::kBadArgument, "Select", "takes a scalar in VSEL_TENSOR_SCALAR_MODE only");
  }
  select_repeats<T>("Select", operand(dst, repeatParams.dstBlkStride, repeatParams.dstRepStride), &bits_of_tensor<T, U>,
                    &selMask, operand(src0, repeatParams.src0BlkStride, repeatParams.src0RepStride),
                    mask_of<isSetMask>(mask), repeatTime, from_scalar<T>(src1));
}

template <typename T, typename U>
__aicore__ inline void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0,
                              T src1, SELMODE selMode, uint32_t count) {
  static_assert(ASCENDC_MODEL_FLOATING, "Select: type");
  using namespace ascendc_model;
  check_select_scratch(selMode);
  if (selMode != SELMODE::VSEL_TENSOR_SCALAR_MODE) {
    core().fault(FaultKind::kBadArgument, "Select", "takes a scalar in VSEL_TENSOR_SCALAR_MODE only");
  }
  if (const int repeats = whole_repeats<T>("Select", count)) {
    select_repeats<T>("Select", operand(dst), &bits_of_tensor<T, U>, &selMask, operand(src0),
                      first_lanes(256 / sizeof(T)), repeats, from_scalar<T>(src1));
  }
}

// The register of comparisons, which Select without a mask tensor reads.
template <typename T>
__aicore__ inline void GetCmpMask(const LocalTensor<T>& dst) {
  using namespace ascendc_model;
  const VectorOp op("GetCmpMask");
  if (uint8_t* to = op.write(dst.place(), dst.place().address, 16)) std::memcpy(to, core().compare_mask, 16);
}
template <typename T>
__aicore__ inline void SetCmpMask(const LocalTensor<T>& src) {
  using namespace ascendc_model;
  const VectorOp op("SetCmpMask");
  if (const uint8_t* from = op.read(src.place(), src.place().address, 16)) std::memcpy(core().compare_mask, from, 16);
}
template <typename T, SELMODE selMode>
__aicore__ inline void Select(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,
                              ascendc_model::RepeatTime repeatTime, const BinaryRepeatParams& repeatParams) {
  static_assert(ASCENDC_MODEL_FLOATING && selMode == SELMODE::VSEL_CMPMASK_SPR, "Select: type and mode");
  using namespace ascendc_model;
  const Mask lanes = kept_mask();
  select_repeats<T>("Select", operand(dst, repeatParams.dstBlkStride, repeatParams.dstRepStride), &bits_of_register,
                    nullptr, operand(src0, repeatParams.src0BlkStride, repeatParams.src0RepStride), lanes, repeatTime,
                    from_tensor(src1, repeatParams.src1BlkStride, repeatParams.src1RepStride, lanes));
}

#undef ASCENDC_MODEL_COMPARED

}  // namespace AscendC
