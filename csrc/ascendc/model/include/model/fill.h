// Instructions that spread or move values: Duplicate, Brcb, Copy, CreateVecIndex, ArithProgression.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "model/elementwise.h"

namespace ascendc_model {

template <typename T>
auto duplicate_lanes(const T& value) {
  return [value](const uint8_t* const* p, uint64_t lanes) {
    for (uint64_t i = 0; i < lanes; ++i) {
      std::memcpy(writable(p[0]) + i * sizeof(T), &value, sizeof(T));
    }
  };
}

// first, first + step, ...: over the calls for one instruction, in the order of lanes that are at work.
template <typename T>
auto index_lanes(const T& first, const T& step) {
  return [first = scalar_value(first), step = scalar_value(step), next = uint64_t{0}](const uint8_t* const* p,
                                                                                      uint64_t lanes) mutable {
    for (uint64_t i = 0; i < lanes; ++i, ++next) {
      encode<T>(static_cast<Compute<T>>(first + step * static_cast<Compute<T>>(next)), writable(p[0]) + i * sizeof(T));
    }
  };
}

template <typename T>
auto copy_lanes() {
  return [](const uint8_t* const* p, uint64_t lanes) { std::memmove(writable(p[0]), p[1], lanes * sizeof(T)); };
}

}  // namespace ascendc_model

namespace AscendC {

#define ASCENDC_MODEL_WORDS (sizeof(T) == 2 || sizeof(T) == 4)
#define ASCENDC_MODEL_INDEX (ascendc_model::kOneOf<T, half, float, int16_t, int32_t>)

template <typename T, bool isSetMask = true>
__aicore__ inline void Duplicate(const LocalTensor<T>& dst, const T& scalarValue, uint64_t mask,
                                 const ascendc_model::RepeatTime repeatTime, const uint16_t dstBlockStride,
                                 const uint8_t dstRepeatStride) {
  static_assert(ASCENDC_MODEL_WORDS, "Duplicate: type");
  using namespace ascendc_model;
  const Operand operands[] = {operand(dst, dstBlockStride, dstRepeatStride)};
  for_repeats("Duplicate", operands, mask_of<isSetMask>(mask), repeatTime, false, duplicate_lanes<T>(scalarValue));
}

template <typename T, bool isSetMask = true>
__aicore__ inline void Duplicate(const LocalTensor<T>& dst, const T& scalarValue, uint64_t mask[],
                                 const ascendc_model::RepeatTime repeatTime, const uint16_t dstBlockStride,
                                 const uint8_t dstRepeatStride) {
  static_assert(ASCENDC_MODEL_WORDS, "Duplicate: type");
  using namespace ascendc_model;
  const Operand operands[] = {operand(dst, dstBlockStride, dstRepeatStride)};
  for_repeats("Duplicate", operands, mask_of<isSetMask>(static_cast<const uint64_t*>(mask)), repeatTime, false,
              duplicate_lanes<T>(scalarValue));
}

template <typename T>
__aicore__ inline void Duplicate(const LocalTensor<T>& dst, const T& scalarValue, const int32_t& count) {
  static_assert(ASCENDC_MODEL_WORDS, "Duplicate: type");
  using namespace ascendc_model;
  const Operand operands[] = {operand(dst)};
  for_count("Duplicate", operands, count, false, duplicate_lanes<T>(scalarValue));
}

// Each of eight elements to a block of its own, in every repeat.
template <typename T>
__aicore__ inline void Brcb(const LocalTensor<T>& dst, const LocalTensor<T>& src0,
                            const ascendc_model::RepeatTime repeatTime, const BrcbRepeatParams& repeatParams) {
  static_assert(ASCENDC_MODEL_WORDS, "Brcb: type");
  using namespace ascendc_model;
  const VectorOp op("Brcb");
  op.check_aligned(operand(dst), "the destination");
  op.check_aligned(operand(src0), "the source");
  core().count_vector(op.name(), 1, static_cast<uint64_t>(repeatTime));
  for (int repeat = 0; repeat < repeatTime; ++repeat) {
    const uint8_t* from = op.read(src0.place(), src0.place().address + uint64_t{8} * sizeof(T) * repeat, 8 * sizeof(T));
    if (!from) return;
    for (int block = 0; block < 8; ++block) {
      const uint64_t block_index =
          uint64_t{repeatParams.dstRepStride} * repeat + uint64_t{repeatParams.dstBlkStride} * block;
      uint8_t* to = op.write(dst.place(), dst.place().address + block_index * 32, 32);
      if (!to) return;
      for (std::size_t i = 0; i < 32; i += sizeof(T)) {
        std::memcpy(to + i, from + block * sizeof(T), sizeof(T));
      }
    }
  }
}

template <typename T, bool isSetMask = true>
__aicore__ inline void Copy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const uint64_t mask[],
                            const ascendc_model::RepeatTime repeatTime, const CopyRepeatParams& repeatParams) {
  static_assert(ASCENDC_MODEL_WORDS, "Copy: type");
  using namespace ascendc_model;
  const Operand operands[] = {operand(dst, repeatParams.dstStride, repeatParams.dstRepeatSize),
                              operand(src, repeatParams.srcStride, repeatParams.srcRepeatSize)};
  for_repeats("Copy", operands, mask_of<isSetMask>(mask), repeatTime, false, copy_lanes<T>());
}

template <typename T, bool isSetMask = true>
__aicore__ inline void Copy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const uint64_t mask,
                            const ascendc_model::RepeatTime repeatTime, const CopyRepeatParams& repeatParams) {
  static_assert(ASCENDC_MODEL_WORDS, "Copy: type");
  using namespace ascendc_model;
  const Operand operands[] = {operand(dst, repeatParams.dstStride, repeatParams.dstRepeatSize),
                              operand(src, repeatParams.srcStride, repeatParams.srcRepeatSize)};
  for_repeats("Copy", operands, mask_of<isSetMask>(mask), repeatTime, false, copy_lanes<T>());
}

template <typename T>
__aicore__ inline void CreateVecIndex(LocalTensor<T>& dst, const T& firstValue, uint64_t mask,
                                      ascendc_model::RepeatTime repeatTime, uint16_t dstBlkStride,
                                      uint8_t dstRepStride) {
  static_assert(ASCENDC_MODEL_INDEX, "CreateVecIndex: type");
  using namespace ascendc_model;
  const Operand operands[] = {operand(dst, dstBlkStride, dstRepStride)};
  for_repeats("CreateVecIndex", operands, first_lanes(mask), repeatTime, false, index_lanes<T>(firstValue, T(1)));
}

template <typename T>
__aicore__ inline void CreateVecIndex(LocalTensor<T> dst, const T& firstValue, uint32_t count) {
  static_assert(ASCENDC_MODEL_INDEX, "CreateVecIndex: type");
  using namespace ascendc_model;
  const Operand operands[] = {operand(dst)};
  for_count("CreateVecIndex", operands, count, false, index_lanes<T>(firstValue, T(1)));
  // On arch 2201 a block of scalar stores, Adds from it for the rest of the first repeat, and Adds for each repeat
  // more.
  const uint64_t repeats = (uint64_t{count} * sizeof(T) + 255) / 256;
  core().counters.scalar_accesses += 32 / sizeof(T);
  core().count_vector("CreateVecIndex", 5 + repeats, 6);
}

template <typename T>
__aicore__ inline void ArithProgression(const LocalTensor<T>& dstLocal, const T firstValue, const T diffValue,
                                        const int32_t count) {
  static_assert(ASCENDC_MODEL_INDEX, "ArithProgression: type");
  using namespace ascendc_model;
  const Operand operands[] = {operand(dstLocal)};
  for_count("ArithProgression", operands, count, false, index_lanes<T>(firstValue, diffValue));
}

#undef ASCENDC_MODEL_INDEX

}  // namespace AscendC
