// TransDataTo5HD for 16-bit elements: sixteen blocks of sixteen to their transpose, for blocks anywhere in UB.

#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "model/vector.h"

namespace AscendC {

constexpr int32_t NCHW_CONV_ADDR_LIST_SIZE = 16;

struct TransDataTo5HDParams {
  constexpr TransDataTo5HDParams() = default;
  constexpr TransDataTo5HDParams(bool dstHighHalfIn, bool srcHighHalfIn, uint8_t repeatTimesIn, uint16_t dstRepStrideIn,
                                 uint16_t srcRepStrideIn)
      : dstHighHalf(dstHighHalfIn),
        srcHighHalf(srcHighHalfIn),
        repeatTimes(repeatTimesIn),
        dstRepStride(dstRepStrideIn),
        srcRepStride(srcRepStrideIn) {}

  bool dstHighHalf = false;
  bool srcHighHalf = false;
  uint8_t repeatTimes = 1;
  uint16_t dstRepStride = 0;
  uint16_t srcRepStride = 0;
};

// Element j of block i goes to element i of block j; each repeat moves all blocks on by its stride.
template <typename T>
__aicore__ inline void TransDataTo5HD(const LocalTensor<T> (&dstList)[NCHW_CONV_ADDR_LIST_SIZE],
                                      const LocalTensor<T> (&srcList)[NCHW_CONV_ADDR_LIST_SIZE],
                                      const TransDataTo5HDParams& nchwconvParams) {
  static_assert(sizeof(T) == 2, "TransDataTo5HD: only 16-bit elements are modelled");
  using namespace ascendc_model;
  constexpr uint32_t kSide = NCHW_CONV_ADDR_LIST_SIZE;
  const VectorOp op("TransDataTo5HD");
  const TransDataTo5HDParams& p = nchwconvParams;
  if (p.repeatTimes == 0 || (p.repeatTimes == 1 && (p.dstRepStride != 0 || p.srcRepStride != 0))) {
    core().fault(
        FaultKind::kBadArgument, op.name(),
        "repeats " + std::to_string(p.repeatTimes) + " times; it must at least once, and once without strides");
    return;
  }
  core().count_vector(op.name(), 1, p.repeatTimes);
  for (uint32_t repeat = 0; repeat < p.repeatTimes; ++repeat) {
    uint8_t block[kSide][kSide * sizeof(T)];
    for (uint32_t i = 0; i < kSide; ++i) {
      op.check_aligned(operand(srcList[i]), "a source");
      const Place& place = srcList[i].place();
      const uint8_t* from = op.read(place, place.address + uint64_t{repeat} * p.srcRepStride * 32, sizeof(block[i]));
      if (!from) return;
      std::memcpy(block[i], from, sizeof(block[i]));
    }
    for (uint32_t j = 0; j < kSide; ++j) {
      op.check_aligned(operand(dstList[j]), "a destination");
      const Place& place = dstList[j].place();
      uint8_t* to = op.write(place, place.address + uint64_t{repeat} * p.dstRepStride * 32, sizeof(block[j]));
      if (!to) return;
      for (uint32_t i = 0; i < kSide; ++i) {
        std::memcpy(to + i * sizeof(T), block[i] + j * sizeof(T), sizeof(T));
      }
    }
  }
}

}  // namespace AscendC
