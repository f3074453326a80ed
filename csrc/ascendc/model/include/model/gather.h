// Gather by byte offsets, and GatherMask by patterns or bits.

#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "model/elementwise.h"

namespace ascendc_model {

// dst[lane] = the element at srcBaseAddr + offset[lane] bytes of src.
template <typename T>
void gather_run(const VectorOp& op, const AscendC::LocalTensor<T>& src, uint32_t base, const uint8_t* offsets,
                uint8_t* to, uint64_t lanes) {
  for (uint64_t i = 0; i < lanes; ++i) {
    uint32_t offset;
    std::memcpy(&offset, offsets + 4 * i, 4);
    if ((base + offset) % sizeof(T) != 0) {
      core().fault(FaultKind::kUnaligned, op.name(), "offset " + std::to_string(offset) + " is not that of an element");
      return;
    }
    const uint8_t* from = op.read(src.place(), uint64_t{src.place().address} + base + offset, sizeof(T));
    if (!from) return;
    std::memcpy(to + i * sizeof(T), from, sizeof(T));
  }
}

template <typename T>
void gather(const AscendC::LocalTensor<T>& dst, const AscendC::LocalTensor<T>& src,
            const AscendC::LocalTensor<uint32_t>& offsets, uint32_t base, uint64_t lanes, int repeats, uint32_t rep) {
  const VectorOp op("Gather");
  op.check_aligned(operand(dst), "the destination");
  op.check_aligned(operand(offsets), "the offsets");
  for (int repeat = 0; repeat < repeats; ++repeat) {
    const uint64_t each = 256 / sizeof(T);
    const uint8_t* from = op.read(offsets.place(), offsets.place().address + repeat * each * 4, lanes * 4);
    uint8_t* to = op.write(dst.place(), dst.place().address + uint64_t(repeat) * rep * 32, lanes * sizeof(T));
    if (!from || !to) return;
    gather_run(op, src, base, from, to, lanes);
  }
}

// The elements of each repeat that `keep` names, one after the other.
template <typename T, typename Keep>
uint64_t gather_mask(const VectorOp& op, const AscendC::LocalTensor<T>& dst, const AscendC::LocalTensor<T>& src,
                     uint32_t lanes, const AscendC::GatherMaskParams& params, Keep keep) {
  op.check_aligned(operand(dst), "the destination");
  op.check_aligned(operand(src), "the source");
  constexpr uint32_t kPerBlock = 32 / sizeof(T);
  uint64_t kept = 0;
  core().count_vector(op.name(), 1, uint64_t{params.repeatTimes} * ((lanes * sizeof(T) + 255) / 256));
  for (uint32_t repeat = 0; repeat < params.repeatTimes; ++repeat) {
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      const int chosen = keep(repeat, lane);
      if (chosen < 0) return kept;
      if (!chosen) continue;
      const uint64_t block =
          uint64_t{params.src0RepeatStride} * repeat + uint64_t{params.src0BlockStride} * (lane / kPerBlock);
      const uint8_t* from =
          op.read(src.place(), src.place().address + block * 32 + lane % kPerBlock * sizeof(T), sizeof(T));
      uint8_t* to = op.write(dst.place(), dst.place().address + kept * sizeof(T), sizeof(T));
      if (!from || !to) return kept;
      std::memcpy(to, from, sizeof(T));
      ++kept;
    }
  }
  return kept;
}

template <typename T>
uint32_t gather_lanes(bool counted, uint32_t mask) {
  if (counted && mask == 0) core().fault(FaultKind::kMaskRange, "GatherMask", "the mask has no lane");
  return counted ? mask : 256 / sizeof(T);
}

}  // namespace ascendc_model

namespace AscendC {

template <typename T>
__aicore__ inline void Gather(const LocalTensor<T>& dst, const LocalTensor<T>& src,
                              const LocalTensor<uint32_t>& srcOffset, const uint32_t srcBaseAddr, const uint64_t mask,
                              const ascendc_model::RepeatTime repeatTime, const uint16_t dstRepStride) {
  static_assert(ASCENDC_MODEL_WORDS, "Gather: type");
  using namespace ascendc_model;
  if (!VectorOp("Gather").check_mask(first_lanes(mask), 256 / sizeof(T))) return;
  core().count_vector("Gather", 1, static_cast<uint64_t>(repeatTime));
  gather(dst, src, srcOffset, srcBaseAddr, mask, repeatTime, dstRepStride);
}

template <typename T>
__aicore__ inline void Gather(const LocalTensor<T>& dst, const LocalTensor<T>& src,
                              const LocalTensor<uint32_t>& srcOffset, const uint32_t srcBaseAddr,
                              const uint32_t count) {
  static_assert(ASCENDC_MODEL_WORDS, "Gather: type");
  using namespace ascendc_model;
  const uint64_t repeats = (uint64_t{count} * sizeof(T) + 255) / 256;
  core().count_vector("Gather", (repeats + 254) / 255, repeats);
  gather(dst, src, srcOffset, srcBaseAddr, count, 1, 0);
}

// Patterns 1..7: even lanes, odd lanes, the first to the fourth of every four, all.
template <typename T, GatherMaskMode mode = defaultGatherMaskMode>
__aicore__ inline void GatherMask(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const uint8_t src1Pattern,
                                  const bool reduceMode, const uint32_t mask, const GatherMaskParams& gatherMaskParams,
                                  uint64_t& rsvdCnt) {
  static_assert(ASCENDC_MODEL_WORDS, "GatherMask: type");
  using namespace ascendc_model;
  const VectorOp op("GatherMask");
  if (src1Pattern < 1 || src1Pattern > 7) {
    core().fault(FaultKind::kBadArgument, op.name(), "there is no pattern " + std::to_string(src1Pattern));
    return;
  }
  rsvdCnt = gather_mask(op, dst, src0, gather_lanes<T>(reduceMode, mask), gatherMaskParams,
                        [src1Pattern](uint32_t, uint32_t lane) -> int {
                          if (src1Pattern <= 2) return lane % 2 == src1Pattern - 1u;
                          return src1Pattern == 7 || lane % 4 == src1Pattern - 3u;
                        });
}

template <typename T, typename U, GatherMaskMode mode = defaultGatherMaskMode>
__aicore__ inline void GatherMask(const LocalTensor<T>& dst, const LocalTensor<T>& src0,
                                  const LocalTensor<U>& src1Pattern, const bool reduceMode, const uint32_t mask,
                                  const GatherMaskParams& gatherMaskParams, uint64_t& rsvdCnt) {
  static_assert(ASCENDC_MODEL_WORDS && std::is_unsigned_v<U> && sizeof(T) == sizeof(U), "GatherMask: types");
  using namespace ascendc_model;
  const VectorOp op("GatherMask");
  op.check_aligned(operand(src1Pattern), "the pattern");
  const uint32_t lanes = gather_lanes<T>(reduceMode, mask);
  const uint64_t step = uint64_t{gatherMaskParams.src1RepeatStride} * 32;
  rsvdCnt = gather_mask(op, dst, src0, lanes, gatherMaskParams, [&](uint32_t repeat, uint32_t lane) -> int {
    const uint8_t* bits = op.read(src1Pattern.place(), src1Pattern.place().address + repeat * step + lane / 8, 1);
    return bits ? *bits >> (lane % 8) & 1 : -1;
  });
}

}  // namespace AscendC
