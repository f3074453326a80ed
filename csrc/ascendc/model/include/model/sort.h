// Sorting on the vector unit: structures of a score and an index, 8 bytes each, sorted by descending score.
//
// Of equal scores the one that came first, or lies in the earlier list, comes first; NaN is not handled.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "model/elementwise.h"

namespace AscendC {

template <typename T>
struct MrgSortSrcList {
  MrgSortSrcList() = default;
  MrgSortSrcList(const LocalTensor<T>& src1In, const LocalTensor<T>& src2In, const LocalTensor<T>& src3In,
                 const LocalTensor<T>& src4In)
      : src1(src1In), src2(src2In), src3(src3In), src4(src4In) {}

  LocalTensor<T> src1;
  LocalTensor<T> src2;
  LocalTensor<T> src3;
  LocalTensor<T> src4;
};

}  // namespace AscendC

namespace ascendc_model {

struct Scored {
  uint8_t bytes[8];

  template <typename T>
  float score() const {
    return decode<T>(bytes);
  }
};

template <typename T>
void sort32(const AscendC::LocalTensor<T>& dst, const AscendC::LocalTensor<T>& scores,
            const AscendC::LocalTensor<uint32_t>& indices, int repeats) {
  const VectorOp op("Sort32");
  op.check_aligned(operand(dst), "the destination");
  op.check_aligned(operand(scores), "the scores");
  op.check_aligned(operand(indices), "the indices");
  core().count_vector(op.name(), 1, static_cast<uint64_t>(repeats));
  for (int repeat = 0; repeat < repeats; ++repeat) {
    const uint8_t* score =
        op.read(scores.place(), scores.place().address + uint64_t(repeat) * 32 * sizeof(T), 32 * sizeof(T));
    const uint8_t* index = op.read(indices.place(), indices.place().address + uint64_t(repeat) * 128, 128);
    uint8_t* to = op.write(dst.place(), dst.place().address + uint64_t(repeat) * 256, 256);
    if (!score || !index || !to) return;
    std::array<Scored, 32> sorted{};
    for (std::size_t i = 0; i < 32; ++i) {
      std::memcpy(sorted[i].bytes, score + i * sizeof(T), sizeof(T));
      std::memcpy(sorted[i].bytes + 4, index + i * 4, 4);
    }
    std::stable_sort(sorted.begin(), sorted.end(),
                     [](const Scored& a, const Scored& b) { return a.score<T>() > b.score<T>(); });
    std::memcpy(to, sorted.data(), 256);
  }
}

// Merges up to four sorted lists. Returns how many structures were taken from each; stops at the first exhausted list
// if told to.
template <typename T>
std::array<uint16_t, 4> merge(const AscendC::LocalTensor<T>& dst, const std::array<AscendC::LocalTensor<T>, 4>& lists,
                              const uint16_t lengths[4], uint16_t valid, bool stop_at_end, int repeats) {
  const VectorOp op("MrgSort");
  std::array<uint16_t, 4> taken{};
  if (valid != 0b0011 && valid != 0b0111 && valid != 0b1111) {
    core().fault(FaultKind::kBadArgument, op.name(), "validBit " + std::to_string(valid) + " is not 3, 7 or 15");
    return taken;
  }
  op.check_aligned(operand(dst), "the destination");
  uint64_t total = 0;
  for (int list = 0; list < 4; ++list) {
    if (!(valid >> list & 1)) continue;
    op.check_aligned(operand(lists[list]), "a list");
    total += lengths[list];
  }
  core().count_vector(op.name(), 1, static_cast<uint64_t>(repeats) * ((total * 8 + 255) / 256));
  for (int repeat = 0; repeat < repeats; ++repeat) {
    std::array<std::vector<Scored>, 4> read;
    for (int list = 0; list < 4; ++list) {
      if (!(valid >> list & 1)) continue;
      // Repeats follow each other: all lists of the first, then all lists of the second.
      const uint64_t address = lists[list].place().address + uint64_t(repeat) * total * 8;
      const uint8_t* from = op.read(lists[list].place(), address, uint64_t{lengths[list]} * 8);
      if (!from) return taken;
      read[list].resize(lengths[list]);
      std::memcpy(read[list].data(), from, uint64_t{lengths[list]} * 8);
    }
    taken = {};
    std::vector<Scored> merged;
    while (merged.size() < total) {
      int best = -1;
      for (int list = 0; list < 4; ++list) {
        if (taken[list] == read[list].size()) continue;
        if (best < 0 || read[list][taken[list]].template score<T>() > read[best][taken[best]].template score<T>()) {
          best = list;
        }
      }
      if (best < 0) break;
      merged.push_back(read[best][taken[best]]);
      if (++taken[best] == read[best].size() && stop_at_end) break;
    }
    uint8_t* to = op.write(dst.place(), dst.place().address + uint64_t(repeat) * total * 8, merged.size() * 8);
    if (!to) return taken;
    std::memcpy(to, merged.data(), merged.size() * 8);
  }
  core().merged = taken;
  return taken;
}

}  // namespace ascendc_model

namespace AscendC {

// The scores are half or float; each becomes a structure of the score, padded to 4 bytes, and the index.
template <typename T>
__aicore__ inline void Sort32(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<uint32_t>& src1,
                              const ascendc_model::RepeatTime repeatTime) {
  static_assert(ASCENDC_MODEL_FLOATING, "Sort32: type");
  ascendc_model::sort32(dst, src0, src1, repeatTime);
}

template <typename T>
__aicore__ inline void MrgSort(const LocalTensor<T>& dst, const MrgSortSrcList<T>& src, const MrgSort4Info& params) {
  static_assert(ASCENDC_MODEL_FLOATING, "MrgSort: type");
  ascendc_model::merge<T>(dst, {src.src1, src.src2, src.src3, src.src4}, params.elementLengths, params.validBit,
                          params.ifExhaustedSuspension, params.repeatTimes);
}

template <typename T, bool isExhaustedSuspension = false>
__aicore__ inline void MrgSort(const LocalTensor<T>& dst, const MrgSortSrcList<T>& sortList,
                               const uint16_t elementCountList[4], uint32_t sortedNum[4], uint16_t validBit,
                               const int32_t repeatTime) {
  static_assert(ASCENDC_MODEL_FLOATING, "MrgSort: type");
  const auto taken = ascendc_model::merge<T>(dst, {sortList.src1, sortList.src2, sortList.src3, sortList.src4},
                                             elementCountList, validBit, isExhaustedSuspension, repeatTime);
  for (int i = 0; i < 4; ++i) {
    sortedNum[i] = taken[i];
  }
}

__aicore__ inline void GetMrgSortResult(uint16_t& mrgSortList1, uint16_t& mrgSortList2, uint16_t& mrgSortList3,
                                        uint16_t& mrgSortList4) {
  const auto& merged = ascendc_model::core().merged;
  mrgSortList1 = merged[0];
  mrgSortList2 = merged[1];
  mrgSortList3 = merged[2];
  mrgSortList4 = merged[3];
}

template <typename T>
__aicore__ inline uint32_t GetSortOffset(const uint32_t elemOffset) {
  return elemOffset * 8 / sizeof(T);
}
template <typename T>
__aicore__ inline uint32_t GetSortLen(const uint32_t elemCount) {
  return elemCount * 8 / sizeof(T);
}

// On arch 2201 the scores are sorted where they are.
template <typename T>
__aicore__ inline void Concat(LocalTensor<T>& concat, const LocalTensor<T>& src, const LocalTensor<T>&, const int32_t) {
  concat = src;
}

// Sorts repeatTime groups of 32, each on its own or, with isFullSort, all together. The temporary buffer is as large as
// the result.
template <typename T, bool isFullSort>
__aicore__ inline void Sort(const LocalTensor<T>& dst, const LocalTensor<T>& concat, const LocalTensor<uint32_t>& index,
                            LocalTensor<T>& tmp, const int32_t repeatTime) {
  static_assert(ASCENDC_MODEL_FLOATING, "Sort: type");
  using namespace ascendc_model;
  Sort32(dst, concat, index, repeatTime);
  if constexpr (isFullSort) {
    const auto bytes = static_cast<uint64_t>(repeatTime) * 256;
    const VectorOp op("Sort");
    uint8_t* sorted = op.write(dst.place(), dst.place().address, bytes);
    if (!sorted || !op.write(tmp.place(), tmp.place().address, bytes)) return;
    std::vector<Scored> all(bytes / 8);
    std::memcpy(all.data(), sorted, bytes);
    std::stable_sort(all.begin(), all.end(),
                     [](const Scored& a, const Scored& b) { return a.score<T>() > b.score<T>(); });
    std::memcpy(sorted, all.data(), bytes);
    int merges = 0;
    for (int groups = repeatTime; groups > 1; groups = (groups + 3) / 4) {
      ++merges;
    }
    core().count_vector("MrgSort", static_cast<uint64_t>(merges), static_cast<uint64_t>(merges) * repeatTime);
  }
}

// Takes repeatTime groups of 32 structures apart.
template <typename T>
__aicore__ inline void Extract(const LocalTensor<T>& dstValue, const LocalTensor<uint32_t>& dstIndex,
                               const LocalTensor<T>& sorted, const int32_t repeatTime) {
  static_assert(ASCENDC_MODEL_FLOATING, "Extract: type");
  using namespace ascendc_model;
  const VectorOp op("Extract");
  op.check_aligned(operand(dstValue), "the values");
  op.check_aligned(operand(dstIndex), "the indices");
  op.check_aligned(operand(sorted), "the source");
  const auto count = static_cast<uint64_t>(repeatTime) * 32;
  core().count_vector(op.name(), 2, static_cast<uint64_t>(repeatTime) * 2);
  const uint8_t* from = op.read(sorted.place(), sorted.place().address, count * 8);
  uint8_t* values = op.write(dstValue.place(), dstValue.place().address, count * sizeof(T));
  uint8_t* indices = op.write(dstIndex.place(), dstIndex.place().address, count * 4);
  if (!from || !values || !indices) return;
  for (uint64_t i = 0; i < count; ++i) {
    std::memcpy(values + i * sizeof(T), from + i * 8, sizeof(T));
    std::memcpy(indices + i * 4, from + i * 8 + 4, 4);
  }
}

}  // namespace AscendC
