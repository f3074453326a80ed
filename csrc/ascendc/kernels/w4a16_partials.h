// Partial sums: what cores leave in the workspace when each has a part of a segment's rows, and others add up.
//
// A part's slot holds a row of a tile's columns for each token. Parts of a segment lie in neighbouring slots
// (w4a16_partition.h), so that one strided copy brings the same stretch of all of them; they are added up in an order
// that depends on nothing but their number, so that equal calls give equal bits.

#pragma once

#include <cstdint>

#include "kernel_operator.h"
#include "kernels/w4a16_partition.h"
#include "tiling/w4a16_tiling.h"

namespace moe_fx::ascendc {

// Adds `rows` rows of `columns` values up into the first.
__aicore__ inline void AddRows(const AscendC::LocalTensor<float>& values, uint32_t rows, uint32_t columns) {
  while (rows > 1) {
    const uint32_t half = rows / 2;
    AscendC::Add(values, values, values[(rows - half) * columns], static_cast<int32_t>(half * columns));
    rows -= half;
  }
}

class PartialSums {
 public:
  // The parts of a segment: slots that follow each other.
  struct Parts {
    uint32_t slot;
    uint32_t count;
  };

  __aicore__ inline void Init(GM_ADDR workspace, const PassTiling& pass, const Partition& partition, uint32_t tokens) {
    values_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace));
    partition_ = partition;
    tileColumns_ = pass.tileColumns;
    slotValues_ = tokens * pass.tileColumns;
  }

  __aicore__ inline Parts Of(uint32_t segment) const {
    const uint32_t first = partition_.FirstCore(segment);
    return {segment + first, partition_.LastCore(segment) - first + 1};
  }

  // Brings `width` columns from `column` on of one row of all parts.
  __aicore__ inline void Load(const AscendC::LocalTensor<float>& values, const Parts& parts, uint32_t row,
                              uint32_t column, uint32_t width) const {
    const uint64_t from = static_cast<uint64_t>(parts.slot) * slotValues_ + row * tileColumns_ + column;
    const AscendC::DataCopyExtParams shape(static_cast<uint16_t>(parts.count), width * sizeof(float),
                                           (slotValues_ - width) * sizeof(float), 0, 0);
    AscendC::DataCopyPad(values, values_[from], shape, AscendC::DataCopyPadExtParams<float>(false, 0, 0, 0.0f));
  }

  // Leaves `rows` rows, which lie a tile's columns apart, as a core's part of a segment.
  __aicore__ inline void Store(const AscendC::LocalTensor<float>& values, uint32_t segment, uint32_t core,
                               uint32_t rows, uint32_t width) const {
    const uint32_t gap = (tileColumns_ - width) * sizeof(float);
    AscendC::DataCopyPad(
        values_[static_cast<uint64_t>(segment + core) * slotValues_], values,
        AscendC::DataCopyExtParams(static_cast<uint16_t>(rows), width * sizeof(float), gap / 32, gap, 0));
  }

 private:
  AscendC::GlobalTensor<float> values_;
  Partition partition_;
  uint32_t tileColumns_, slotValues_;
};

// The end of a kernel: from the partial sums of a pass whose segments are its tiles, y [tokens, columns]. Cores take
// turns at stretches of a few columns of a token.
template <typename T, typename InQueue, typename OutQueue>
class Reduction {
 public:
  __aicore__ inline Reduction(const PassTiling& pass, uint32_t tokens, GM_ADDR y, InQueue& in, OutQueue& out)
      : in_(in), out_(out) {
    columns_ = pass.columns;
    tileColumns_ = pass.tileColumns;
    stretches_ = (pass.columns + kReduceColumns - 1) / kReduceColumns;
    end_ = tokens * stretches_;
    y_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(y));
  }

  __aicore__ inline void Run(const PartialSums& partials) {
    const uint32_t cores = static_cast<uint32_t>(AscendC::GetBlockNum());
    const uint32_t first = static_cast<uint32_t>(AscendC::GetBlockIdx());
    Load(partials, first);
    for (uint32_t index = first; index < end_; index += cores) {
      Load(partials, index + cores);
      const Stretch at = At(index);
      AscendC::LocalTensor<float> parts = in_.template DeQue<float>();
      AddRows(parts, partials.Of(at.column / tileColumns_).count, at.width);
      AscendC::LocalTensor<T> result = out_.template AllocTensor<T>();
      AscendC::Cast(result, parts, AscendC::RoundMode::CAST_RINT, at.width);
      in_.FreeTensor(parts);
      Store(result, at);
    }
  }

  // Where there was nothing to multiply.
  __aicore__ inline void Clear() {
    const uint32_t cores = static_cast<uint32_t>(AscendC::GetBlockNum());
    for (uint32_t index = static_cast<uint32_t>(AscendC::GetBlockIdx()); index < end_; index += cores) {
      const Stretch at = At(index);
      AscendC::LocalTensor<T> result = out_.template AllocTensor<T>();
      // Zero has the same bits in every type.
      AscendC::Duplicate(result.template ReinterpretCast<int16_t>(), static_cast<int16_t>(0),
                         static_cast<int32_t>(at.width));
      Store(result, at);
    }
  }

 private:
  struct Stretch {
    uint32_t token, column, width;
  };

  __aicore__ inline Stretch At(uint32_t index) const {
    const uint32_t token = index / stretches_;
    const uint32_t column = (index - token * stretches_) * kReduceColumns;
    return {token, column, Smaller(kReduceColumns, columns_ - column)};
  }

  __aicore__ inline void Load(const PartialSums& partials, uint32_t index) {
    if (index >= end_) return;
    const Stretch at = At(index);
    const uint32_t segment = at.column / tileColumns_;
    AscendC::LocalTensor<float> parts = in_.template AllocTensor<float>();
    partials.Load(parts, partials.Of(segment), at.token, at.column - segment * tileColumns_, at.width);
    in_.EnQue(parts);
  }

  __aicore__ inline void Store(AscendC::LocalTensor<T>& result, const Stretch& at) {
    out_.EnQue(result);
    result = out_.template DeQue<T>();
    AscendC::DataCopy(y_[at.token * columns_ + at.column], result, at.width);
    out_.FreeTensor(result);
  }

  InQueue& in_;
  OutQueue& out_;
  AscendC::GlobalTensor<T> y_;
  uint32_t columns_, tileColumns_, stretches_, end_;
};

}  // namespace moe_fx::ascendc
