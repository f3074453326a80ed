// Reductions: of a repeat, of its blocks, of pairs of lanes, and of a whole tensor.
//
// Sums add neighbours, then neighbours of those, rounding each time to the type, as the NPU's adder tree does.

#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <vector>

#include "model/elementwise.h"

namespace ascendc_model {

enum class Reduction { kSum, kMax, kMin };

template <typename T>
float rounded(float value) {
  if constexpr (std::is_same_v<T, half>) return half_value(half_bits(value));
  return value;
}

template <typename T>
float tree_sum(std::vector<float> values) {
  if (values.empty()) return 0.0f;
  while (values.size() > 1) {
    for (std::size_t i = 0; i < values.size() / 2; ++i) {
      values[i] = rounded<T>(values[2 * i] + values[2 * i + 1]);
    }
    const bool odd = values.size() % 2;
    if (odd) values[values.size() / 2] = values.back();
    values.resize(values.size() / 2 + odd);
  }
  return values[0];
}

// The place of the largest or smallest value; of equals, the first.
inline std::size_t extreme(const std::vector<float>& values, Reduction reduction) {
  std::size_t best = 0;
  for (std::size_t i = 1; i < values.size(); ++i) {
    if (reduction == Reduction::kMax ? values[i] > values[best] : values[i] < values[best]) best = i;
  }
  return best;
}

// The lanes at work in a repeat of the source, and which they are.
template <typename T>
struct Lanes {
  std::vector<float> values;
  std::vector<uint32_t> lane;
};

template <typename T>
bool read_repeat(const VectorOp& op, const AscendC::LocalTensor<T>& src, const Mask& mask, int repeat, int blk, int rep,
                 uint32_t from, uint32_t to, Lanes<T>& lanes) {
  lanes.values.clear();
  lanes.lane.clear();
  constexpr uint32_t kPerBlock = 32 / sizeof(T);
  for (uint32_t block = from / kPerBlock; block < to / kPerBlock; ++block) {
    uint32_t first = block * kPerBlock;
    uint32_t last = first + kPerBlock;
    while (first < last && !mask.has(first))
      ++first;
    while (last > first && !mask.has(last - 1))
      --last;
    if (first == last) continue;
    const uint64_t address = src.place().address + (uint64_t(repeat) * rep + uint64_t(block) * blk) * 32 +
                             (first - block * kPerBlock) * sizeof(T);
    const uint8_t* at = op.read(src.place(), address, (last - first) * sizeof(T));
    if (!at) return false;
    float values[kPerBlock];
    load<T>(at, values, last - first);
    for (uint32_t lane = first; lane < last; ++lane) {
      if (!mask.has(lane)) continue;
      lanes.values.push_back(values[lane - first]);
      lanes.lane.push_back(lane);
    }
  }
  return true;
}

template <typename T>
bool put(const VectorOp& op, const AscendC::LocalTensor<T>& dst, uint64_t element, float value) {
  uint8_t* at = op.write(dst.place(), dst.place().address + element * sizeof(T), sizeof(T));
  if (at) encode<T>(value, at);
  return at != nullptr;
}

// An index is stored with the bits of an integer as wide as the type.
template <typename T>
bool put_index(const VectorOp& op, const AscendC::LocalTensor<T>& dst, uint64_t element, uint32_t index) {
  uint8_t* at = op.write(dst.place(), dst.place().address + element * sizeof(T), sizeof(T));
  if (at) std::memcpy(at, &index, sizeof(T));
  return at != nullptr;
}

template <typename T>
uint64_t bits_of(float value) {
  if constexpr (std::is_same_v<T, half>) return half_bits(value);
  return std::bit_cast<uint32_t>(value);
}

// One result for each repeat, or a value and its index.
template <typename T>
void whole_reduce(const char* name, Reduction reduction, const AscendC::LocalTensor<T>& dst,
                  const AscendC::LocalTensor<T>& src, const Mask& mask, int repeats, int dst_rep, int blk, int rep,
                  AscendC::ReduceOrder order) {
  const VectorOp op(name);
  constexpr uint32_t kLanes = 256 / sizeof(T);
  if (!op.check_aligned(operand(src), "the source") || !op.check_mask(mask, kLanes)) return;
  core().count_vector(name, 1, static_cast<uint64_t>(repeats));
  Lanes<T> lanes;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    if (!read_repeat(op, src, mask, repeat, blk, rep, 0, kLanes, lanes)) return;
    if (reduction == Reduction::kSum) {
      if (!put(op, dst, uint64_t(repeat) * dst_rep, tree_sum<T>(lanes.values))) return;
      continue;
    }
    const std::size_t best = extreme(lanes.values, reduction);
    const uint32_t index = lanes.lane[best];
    core().reduced_value = bits_of<T>(lanes.values[best]);
    core().reduced_index = index;
    switch (order) {
      case AscendC::ReduceOrder::ORDER_VALUE_INDEX:
        put(op, dst, uint64_t(repeat) * dst_rep * 2, lanes.values[best]);
        put_index(op, dst, uint64_t(repeat) * dst_rep * 2 + 1, index);
        break;
      case AscendC::ReduceOrder::ORDER_INDEX_VALUE:
        put_index(op, dst, uint64_t(repeat) * dst_rep * 2, index);
        put(op, dst, uint64_t(repeat) * dst_rep * 2 + 1, lanes.values[best]);
        break;
      case AscendC::ReduceOrder::ORDER_ONLY_VALUE: put(op, dst, uint64_t(repeat) * dst_rep, lanes.values[best]); break;
      case AscendC::ReduceOrder::ORDER_ONLY_INDEX: {
        uint8_t* at = op.write(dst.place(), dst.place().address + uint64_t(repeat) * dst_rep * 4, 4);
        if (at) std::memcpy(at, &index, 4);
        break;
      }
    }
  }
}

// One result for each block of a repeat.
template <typename T>
void block_reduce(const char* name, Reduction reduction, const AscendC::LocalTensor<T>& dst,
                  const AscendC::LocalTensor<T>& src, const Mask& mask, int repeats, int dst_rep, int blk, int rep) {
  const VectorOp op(name);
  constexpr uint32_t kPerBlock = 32 / sizeof(T);
  if (!op.check_aligned(operand(src), "the source") || !op.check_mask(mask, 8 * kPerBlock)) return;
  core().count_vector(name, 1, static_cast<uint64_t>(repeats));
  Lanes<T> lanes;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    for (uint32_t block = 0; block < 8; ++block) {
      if (!read_repeat(op, src, mask, repeat, blk, rep, block * kPerBlock, (block + 1) * kPerBlock, lanes)) return;
      if (lanes.values.empty()) continue;
      const float value =
          reduction == Reduction::kSum ? tree_sum<T>(lanes.values) : lanes.values[extreme(lanes.values, reduction)];
      if (!put(op, dst, uint64_t(repeat) * dst_rep * 8 + block, value)) return;
    }
  }
}

// The sums of even lanes and their odd neighbours.
template <typename T>
void pair_reduce(const AscendC::LocalTensor<T>& dst, const AscendC::LocalTensor<T>& src, const Mask& mask, int repeats,
                 int dst_rep, int blk, int rep) {
  const VectorOp op("PairReduceSum");
  constexpr uint32_t kLanes = 256 / sizeof(T);
  if (!op.check_aligned(operand(src), "the source") || !op.check_mask(mask, kLanes)) return;
  core().count_vector(op.name(), 1, static_cast<uint64_t>(repeats));
  Lanes<T> lanes;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    if (!read_repeat(op, src, mask, repeat, blk, rep, 0, kLanes, lanes)) return;
    std::vector<float> sums(kLanes / 2, 0.0f);
    std::vector<bool> any(kLanes / 2, false);
    for (std::size_t i = 0; i < lanes.lane.size(); ++i) {
      sums[lanes.lane[i] / 2] += lanes.values[i];
      any[lanes.lane[i] / 2] = true;
    }
    for (uint32_t pair = 0; pair < kLanes / 2; ++pair) {
      if (any[pair] && !put(op, dst, uint64_t(repeat) * dst_rep * (kLanes / 2) + pair, sums[pair])) return;
    }
  }
}

// The whole tensor, in the steps that the NPU takes: repeats to values in the temporary buffer, those to the result.
// The temporary buffer has to hold a value (and an index) for each repeat, to whole blocks.
template <typename T>
void reduce_all(const char* name, Reduction reduction, const AscendC::LocalTensor<T>& dst,
                const AscendC::LocalTensor<T>& src, const AscendC::LocalTensor<T>& temporary, const Mask& mask,
                int repeats, int rep, uint32_t tail, bool index) {
  const VectorOp op(name);
  constexpr uint32_t kLanes = 256 / sizeof(T);
  if (!op.check_aligned(operand(src), "the source") || !op.check_mask(mask, kLanes)) return;
  const int all = repeats + (tail ? 1 : 0);
  uint64_t work = 0;
  for (int left = all; left > 1; left = (left + static_cast<int>(kLanes) - 1) / static_cast<int>(kLanes)) {
    work += static_cast<uint64_t>(left) * (index ? 2 : 1);
  }
  const uint64_t bytes = (std::max<uint64_t>(work, 1) * sizeof(T) + 31) / 32 * 32;
  if (!op.write(temporary.place(), temporary.place().address, bytes)) return;
  core().count_vector(name, all > 1 ? 2 : 1, static_cast<uint64_t>(all) + (all > 1 ? 1 : 0));
  Lanes<T> lanes;
  std::vector<float> partial;
  std::vector<uint32_t> places;
  for (int repeat = 0; repeat < all; ++repeat) {
    const Mask here = repeat < repeats ? mask : first_lanes(tail);
    if (!read_repeat(op, src, here, repeat, 1, rep, 0, kLanes, lanes)) return;
    if (reduction == Reduction::kSum) {
      partial.push_back(tree_sum<T>(lanes.values));
    } else {
      const std::size_t best = extreme(lanes.values, reduction);
      partial.push_back(lanes.values[best]);
      places.push_back(static_cast<uint32_t>(repeat) * kLanes + lanes.lane[best]);
    }
  }
  if (partial.empty()) return;
  if (reduction == Reduction::kSum) {
    const float sum = tree_sum<T>(partial);
    core().reduced_value = bits_of<T>(sum);
    put(op, dst, 0, sum);
    return;
  }
  const std::size_t best = extreme(partial, reduction);
  core().reduced_value = bits_of<T>(partial[best]);
  core().reduced_index = places[best];
  put(op, dst, 0, partial[best]);
  if (index) put_index(op, dst, 1, places[best]);
}

template <typename T>
void reduce_count(const char* name, Reduction reduction, const AscendC::LocalTensor<T>& dst,
                  const AscendC::LocalTensor<T>& src, const AscendC::LocalTensor<T>& temporary, int32_t count,
                  bool index) {
  constexpr int kLanes = 256 / sizeof(T);
  if (count <= 0) {
    core().fault(FaultKind::kBadArgument, name, "has a count of " + std::to_string(count));
    return;
  }
  reduce_all(name, reduction, dst, src, temporary, first_lanes(kLanes), count / kLanes, 8,
             static_cast<uint32_t>(count % kLanes), index);
}

}  // namespace ascendc_model

namespace AscendC {

#define ASCENDC_MODEL_BLOCK_REDUCE(NAME, REDUCTION)                                                                 \
  template <typename T, bool isSetMask = true>                                                                      \
  __aicore__ inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src,                                 \
                              const ascendc_model::RepeatTime repeatTime, const int32_t mask,                       \
                              const int32_t dstRepStride, const int32_t srcBlkStride, const int32_t srcRepStride) { \
    static_assert(ASCENDC_MODEL_FLOATING, #NAME ": type");                                                          \
    ascendc_model::block_reduce(#NAME, REDUCTION, dst, src,                                                         \
                                ascendc_model::mask_of<isSetMask>(static_cast<uint64_t>(mask)), repeatTime,         \
                                dstRepStride, srcBlkStride, srcRepStride);                                          \
  }                                                                                                                 \
  template <typename T, bool isSetMask = true>                                                                      \
  __aicore__ inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src,                                 \
                              const ascendc_model::RepeatTime repeatTime, const uint64_t mask[],                    \
                              const int32_t dstRepStride, const int32_t srcBlkStride, const int32_t srcRepStride) { \
    static_assert(ASCENDC_MODEL_FLOATING, #NAME ": type");                                                          \
    ascendc_model::block_reduce(#NAME, REDUCTION, dst, src, ascendc_model::mask_of<isSetMask>(mask), repeatTime,    \
                                dstRepStride, srcBlkStride, srcRepStride);                                          \
  }

ASCENDC_MODEL_BLOCK_REDUCE(BlockReduceSum, ascendc_model::Reduction::kSum)
ASCENDC_MODEL_BLOCK_REDUCE(BlockReduceMax, ascendc_model::Reduction::kMax)
ASCENDC_MODEL_BLOCK_REDUCE(BlockReduceMin, ascendc_model::Reduction::kMin)
#undef ASCENDC_MODEL_BLOCK_REDUCE

template <typename T, bool isSetMask = true>
__aicore__ inline void PairReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src,
                                     const ascendc_model::RepeatTime repeatTime, const int32_t mask,
                                     const int32_t dstRepStride, const int32_t srcBlkStride,
                                     const int32_t srcRepStride) {
  static_assert(ASCENDC_MODEL_FLOATING, "PairReduceSum: type");
  ascendc_model::pair_reduce(dst, src, ascendc_model::mask_of<isSetMask>(static_cast<uint64_t>(mask)), repeatTime,
                             dstRepStride, srcBlkStride, srcRepStride);
}

template <typename T, bool isSetMask = true>
__aicore__ inline void RepeatReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src,
                                       const ascendc_model::RepeatTime repeatTime, const int32_t mask,
                                       const int32_t dstBlkStride, const int32_t srcBlkStride,
                                       const int32_t dstRepStride, const int32_t srcRepStride) {
  static_assert(ASCENDC_MODEL_FLOATING, "RepeatReduceSum: type");
  (void)dstBlkStride;
  ascendc_model::whole_reduce("RepeatReduceSum", ascendc_model::Reduction::kSum, dst, src,
                              ascendc_model::mask_of<isSetMask>(static_cast<uint64_t>(mask)), repeatTime, dstRepStride,
                              srcBlkStride, srcRepStride, ReduceOrder::ORDER_ONLY_VALUE);
}

template <typename T, bool isSetMask = true>
__aicore__ inline void WholeReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t mask,
                                      const ascendc_model::RepeatTime repeatTime, const int32_t dstRepStride,
                                      const int32_t srcBlkStride, const int32_t srcRepStride) {
  static_assert(ASCENDC_MODEL_FLOATING, "WholeReduceSum: type");
  ascendc_model::whole_reduce("WholeReduceSum", ascendc_model::Reduction::kSum, dst, src,
                              ascendc_model::mask_of<isSetMask>(static_cast<uint64_t>(mask)), repeatTime, dstRepStride,
                              srcBlkStride, srcRepStride, ReduceOrder::ORDER_ONLY_VALUE);
}
template <typename T, bool isSetMask = true>
__aicore__ inline void WholeReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const uint64_t mask[],
                                      const ascendc_model::RepeatTime repeatTime, const int32_t dstRepStride,
                                      const int32_t srcBlkStride, const int32_t srcRepStride) {
  static_assert(ASCENDC_MODEL_FLOATING, "WholeReduceSum: type");
  ascendc_model::whole_reduce("WholeReduceSum", ascendc_model::Reduction::kSum, dst, src,
                              ascendc_model::mask_of<isSetMask>(mask), repeatTime, dstRepStride, srcBlkStride,
                              srcRepStride, ReduceOrder::ORDER_ONLY_VALUE);
}

#define ASCENDC_MODEL_EXTREME(WHOLE, ALL, REDUCTION)                                                                   \
  template <typename T, bool isSetMask = true>                                                                         \
  __aicore__ inline void WHOLE(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t mask,               \
                               const ascendc_model::RepeatTime repeatTime, const int32_t dstRepStride,                 \
                               const int32_t srcBlkStride, const int32_t srcRepStride,                                 \
                               ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX) {                                   \
    static_assert(ASCENDC_MODEL_FLOATING, #WHOLE ": type");                                                            \
    ascendc_model::whole_reduce(#WHOLE, REDUCTION, dst, src,                                                           \
                                ascendc_model::mask_of<isSetMask>(static_cast<uint64_t>(mask)), repeatTime,            \
                                dstRepStride, srcBlkStride, srcRepStride, order);                                      \
  }                                                                                                                    \
  template <typename T, bool isSetMask = true>                                                                         \
  __aicore__ inline void WHOLE(const LocalTensor<T>& dst, const LocalTensor<T>& src, const uint64_t mask[],            \
                               const ascendc_model::RepeatTime repeatTime, const int32_t dstRepStride,                 \
                               const int32_t srcBlkStride, const int32_t srcRepStride,                                 \
                               ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX) {                                   \
    static_assert(ASCENDC_MODEL_FLOATING, #WHOLE ": type");                                                            \
    ascendc_model::whole_reduce(#WHOLE, REDUCTION, dst, src, ascendc_model::mask_of<isSetMask>(mask), repeatTime,      \
                                dstRepStride, srcBlkStride, srcRepStride, order);                                      \
  }                                                                                                                    \
  template <typename T>                                                                                                \
  __aicore__ inline void ALL(                                                                                          \
      const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& sharedTmpBuffer, const int32_t mask, \
      const ascendc_model::RepeatTime repeatTime, const int32_t srcRepStride, bool calIndex = 0) {                     \
    static_assert(ASCENDC_MODEL_FLOATING, #ALL ": type");                                                              \
    ascendc_model::reduce_all(#ALL, REDUCTION, dst, src, sharedTmpBuffer,                                              \
                              ascendc_model::first_lanes(static_cast<uint64_t>(mask)), repeatTime, srcRepStride, 0,    \
                              calIndex);                                                                               \
  }                                                                                                                    \
  template <typename T>                                                                                                \
  __aicore__ inline void ALL(const LocalTensor<T>& dst, const LocalTensor<T>& src,                                     \
                             const LocalTensor<T>& sharedTmpBuffer, const int32_t count, bool calIndex = 0) {          \
    static_assert(ASCENDC_MODEL_FLOATING, #ALL ": type");                                                              \
    ascendc_model::reduce_count(#ALL, REDUCTION, dst, src, sharedTmpBuffer, count, calIndex);                          \
  }

ASCENDC_MODEL_EXTREME(WholeReduceMax, ReduceMax, ascendc_model::Reduction::kMax)
ASCENDC_MODEL_EXTREME(WholeReduceMin, ReduceMin, ascendc_model::Reduction::kMin)
#undef ASCENDC_MODEL_EXTREME

template <typename T>
__aicore__ inline void ReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src,
                                 const LocalTensor<T>& sharedTmpBuffer, const int32_t mask,
                                 const ascendc_model::RepeatTime repeatTime, const int32_t srcRepStride) {
  static_assert(ASCENDC_MODEL_FLOATING, "ReduceSum: type");
  ascendc_model::reduce_all("ReduceSum", ascendc_model::Reduction::kSum, dst, src, sharedTmpBuffer,
                            ascendc_model::first_lanes(static_cast<uint64_t>(mask)), repeatTime, srcRepStride, 0,
                            false);
}
template <typename T, bool isSetMask = true>
__aicore__ inline void ReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src,
                                 const LocalTensor<T>& sharedTmpBuffer, const int32_t count) {
  static_assert(ASCENDC_MODEL_FLOATING, "ReduceSum: type");
  ascendc_model::reduce_count("ReduceSum", ascendc_model::Reduction::kSum, dst, src, sharedTmpBuffer, count, false);
}

template <typename T>
__aicore__ inline void GetReduceMaxMinCount(T& maxMinValue, T& maxMinIndex) {
  std::memcpy(&maxMinValue, &ascendc_model::core().reduced_value, sizeof(T));
  std::memcpy(&maxMinIndex, &ascendc_model::core().reduced_index, sizeof(T));
}
template <typename T>
__aicore__ inline void GetReduceMaxMinCount(T& maxMinValue) {
  std::memcpy(&maxMinValue, &ascendc_model::core().reduced_value, sizeof(T));
}
template <typename T>
__aicore__ inline T GetAccVal() {
  T value;
  std::memcpy(&value, &ascendc_model::core().reduced_value, sizeof(T));
  return value;
}

}  // namespace AscendC
