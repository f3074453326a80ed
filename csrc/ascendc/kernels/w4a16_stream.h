// The inner loop that all products with int4 weights share: weights stream from global memory past a few activation
// rows.
//
//   packed int4 --MTE2--> two buffers --Cast--> half --Axpy, once a token--> fp32 sums of a group
//   (sums + offset * sum of activations) * inverse power of two * scale --> fp32 totals of a segment --MTE3-->
//   workspace
//
// A Cast is shared by all tokens of a matrix, a group's scale is applied once to its sums, and products are summed in
// fp32 throughout. Activations and their powers of two: w4a16_panel.h, which also says what a Source is.

#pragma once

#include <cstdint>

#include "kernel_operator.h"
#include "kernels/local_buffer.h"
#include "kernels/w4a16_panel.h"
#include "kernels/w4a16_partials.h"
#include "kernels/w4a16_partition.h"
#include "tiling/w4a16_tiling.h"

namespace moe_fx::ascendc {

// T: half or bfloat16_t, of scales, offsets and results.
template <typename T>
class W4A16Stream {
 public:
  __aicore__ inline void Init(AscendC::TPipe* pipe, const StreamTiling& tiling) {
    tiling_ = tiling;
    core_ = static_cast<uint32_t>(AscendC::GetBlockIdx());
    panel_.Init(pipe, tiling);
    pipe->InitBuffer(weightQueue_, 2, tiling.weightBytes);
    pipe->InitBuffer(totalQueue_, 1, tiling.tokens * tiling.tileColumns * sizeof(float));
    block_ = Allot<half>(pipe, blockBuffer_, kBlockRows * tiling.tileColumns);
    sums_ = Allot<float>(pipe, sumBuffer_, (tiling.tokens < 2 ? 2 : tiling.tokens) * tiling.tileColumns);
    scale_ = Allot<float>(pipe, scaleBuffer_, 2 * tiling.tileColumns);
    offset_ = scale_[tiling.tileColumns];
    // The last half repeat of an odd tile is computed with the rest, though no scale is loaded for it and nobody stores
    // it.
    AscendC::Duplicate(scale_, 0.0f, static_cast<int32_t>(2 * tiling.tileColumns));
  }

  __aicore__ inline LoadQueue& Loads() { return panel_.Loads(); }

  // Enters a pass and lets its first weights come. They depend on no result, so this may be done ahead of a SyncAll.
  template <typename Source>
  __aicore__ inline void Start(const PassTiling& pass, const Partition& partition, const PartialSums& partials,
                               const Source& source, GM_ADDR weights, GM_ADDR scales, GM_ADDR offsets) {
    pass_ = pass;
    partition_ = partition;
    partials_ = partials;
    weights_.SetGlobalBuffer(reinterpret_cast<__gm__ int8_t*>(weights));
    scales_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(scales));
    offsets_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(offsets));
    begin_ = partition.Begin(core_);
    end_ = partition.Begin(core_ + 1);
    Load(source, begin_);
    Load(source, begin_ + 1);
  }

  // Multiplies this core's units and leaves its parts of their segments in the workspace.
  template <typename Source>
  __aicore__ inline void Run(Source& source) {
    uint32_t panelEnd = begin_;
    uint32_t pair = 0;
    for (uint32_t unit = begin_; unit < end_; ++unit) {
      const Unit at = partition_.At(unit);
      const Columns columns = ColumnsOf(at.tile);
      const uint32_t tokens = source.Tokens(at.slot);
      if (unit == panelEnd) {
        panelEnd = panel_.Fill(source, partition_, unit, end_, block_.template ReinterpretCast<float>());
        pair = 0;
      }
      if (unit == begin_ || partition_.StartsSegment(unit)) {
        totals_ = totalQueue_.template AllocTensor<float>();
        AscendC::Duplicate(totals_, 0.0f, static_cast<int32_t>(source.Sums(at.slot) * pass_.tileColumns));
      }
      Multiply(source, unit, at, columns, tokens, pair);
      if (EndsGroup(unit, at)) AddGroup(source, at, columns, tokens, pair);
      if (unit + 1 == end_ || partition_.StartsSegment(unit + 1)) Store(unit, source.Sums(at.slot), columns);
      pair += tokens;
    }
  }

  // y from the partial sums of the pass, when all cores have left theirs.
  __aicore__ inline void Reduce(GM_ADDR y) { ReductionOf(pass_, y).Run(partials_); }
  // y of a pass that has nothing to multiply.
  __aicore__ inline void Clear(const PassTiling& pass, GM_ADDR y) { ReductionOf(pass, y).Clear(); }

 private:
  using WeightQueue = AscendC::TQue<AscendC::TPosition::VECIN, 2>;
  using TotalQueue = AscendC::TQue<AscendC::TPosition::VECOUT, 1>;

  // The columns of a tile.
  struct Columns {
    uint32_t first;
    uint32_t width;
    uint32_t padded;  // to whole repeats
  };

  // The activations of all tokens for a block of rows: read four at a time, taken one by one.
  union BlockScalars {
    uint64_t words[kMaxTokens * kBlockRows / 4];
    half values[kMaxTokens * kBlockRows];
  };

  __aicore__ inline Reduction<T, WeightQueue, TotalQueue> ReductionOf(const PassTiling& pass, GM_ADDR y) {
    return Reduction<T, WeightQueue, TotalQueue>(pass, tiling_.tokens, y, weightQueue_, totalQueue_);
  }

  __aicore__ inline Columns ColumnsOf(uint32_t tile) const {
    const uint32_t span = tile / pass_.tilesPerSpan;
    const uint32_t first = (tile - span * pass_.tilesPerSpan) * pass_.tileColumns;
    const uint32_t width = Smaller(pass_.tileColumns, pass_.spanColumns - first);
    return {span * pass_.spanColumns + first, width, (width + kLanes - 1) / kLanes * kLanes};
  }

  __aicore__ inline bool StartsGroup(uint32_t unit, const Unit& at) const {
    return unit == begin_ || at.row % tiling_.group == 0;
  }
  __aicore__ inline bool EndsGroup(uint32_t unit, const Unit& at) const {
    return unit + 1 == end_ || (at.row + kUnitRows) % tiling_.group == 0;
  }

  // Weights of a unit, and behind them the scales and offsets of the group that begins with it.
  template <typename Source>
  __aicore__ inline void Load(const Source& source, uint32_t unit) {
    if (unit >= end_) return;
    const Unit at = partition_.At(unit);
    const Columns columns = ColumnsOf(at.tile);
    const uint64_t matrix = source.Matrix(at.slot);
    AscendC::LocalTensor<int8_t> packed = weightQueue_.template AllocTensor<int8_t>();
    const AscendC::DataCopyExtParams shape(kUnitRows, columns.width / 2, (pass_.columns - columns.width) / 2, 0, 0);
    // Rows start at multiples of 32 bytes; a row of an odd multiple of 16 is filled up with zeros.
    const AscendC::DataCopyPadExtParams<int8_t> pad(true, 0, static_cast<uint8_t>((columns.padded - columns.width) / 2),
                                                    0);
    AscendC::DataCopyPad(packed, weights_[(matrix * pass_.rows + at.row) * (pass_.columns / 2) + columns.first / 2],
                         shape, pad);
    if (StartsGroup(unit, at)) {
      const uint64_t group = matrix * (pass_.rows / tiling_.group) + at.row / tiling_.group;
      const uint64_t from = group * pass_.columns + columns.first;
      AscendC::LocalTensor<T> scales = ScalesOf(packed);
      AscendC::DataCopy(scales, scales_[from], columns.width);
      if (tiling_.hasOffset) AscendC::DataCopy(scales[tiling_.tileColumns], offsets_[from], columns.width);
    }
    weightQueue_.EnQue(packed);
  }

  __aicore__ inline AscendC::LocalTensor<T> ScalesOf(const AscendC::LocalTensor<int8_t>& packed) const {
    return packed[kUnitRows * tiling_.tileColumns / 2].template ReinterpretCast<T>();
  }

  // Adds a unit's products to the sums of its group.
  template <typename Source>
  __aicore__ inline void Multiply(const Source& source, uint32_t unit, const Unit& at, const Columns& columns,
                                  uint32_t tokens, uint32_t pair) {
    AscendC::LocalTensor<int8_t> packed = weightQueue_.template DeQue<int8_t>();
    if (StartsGroup(unit, at)) StartGroup(ScalesOf(packed), columns, tokens);
    if (tiling_.hasOffset) {
      for (uint32_t i = 0; i < tokens; ++i) {
        rowSums_[i] += panel_.RowSum(pair + i);
      }
    }
    const uint8_t repeats = static_cast<uint8_t>(columns.padded / kLanes);
    for (uint32_t from = 0; from < kUnitRows; from += kBlockRows) {
      AscendC::Cast(block_, packed[from * columns.padded / 2].template ReinterpretCast<AscendC::int4b_t>(),
                    AscendC::RoundMode::CAST_NONE, kBlockRows * columns.padded);
      if (from + kBlockRows == kUnitRows) {
        weightQueue_.FreeTensor(packed);
        Load(source, unit + 2);
      }
      // Scalars are read ahead of the instructions that take them.
      BlockScalars x;
      for (uint32_t i = 0; i < tokens; ++i) {
        for (uint32_t w = 0; w < kBlockRows / 4; ++w) {
          x.words[i * (kBlockRows / 4) + w] = panel_.Word(pair + i, from / 4 + w);
        }
      }
      for (uint32_t r = 0; r < kBlockRows; ++r) {
        for (uint32_t i = 0; i < tokens; ++i) {
          const uint32_t sum = tokens < 2 ? r % 2 : i;
          AscendC::Axpy(sums_[sum * pass_.tileColumns], block_[r * columns.padded], x.values[i * kBlockRows + r],
                        static_cast<uint64_t>(kLanes), repeats, {1, 1, 8, 4});
        }
      }
    }
  }

  __aicore__ inline void StartGroup(const AscendC::LocalTensor<T>& scales, const Columns& columns, uint32_t tokens) {
    AscendC::Cast(scale_, scales, AscendC::RoundMode::CAST_NONE, columns.width);
    if (tiling_.hasOffset) {
      AscendC::Cast(offset_, scales[tiling_.tileColumns], AscendC::RoundMode::CAST_NONE, columns.width);
      for (uint32_t i = 0; i < tokens; ++i) {
        rowSums_[i] = 0.0f;
      }
    }
    // A lone token has two sums that take turns, so that no Axpy waits for the one before.
    const uint32_t sums = tokens < 2 ? 2 : tokens;
    AscendC::Duplicate(sums_, 0.0f, static_cast<int32_t>(sums * pass_.tileColumns));
  }

  // Adds the sums of a group, or of this core's part of it, to the totals.
  template <typename Source>
  __aicore__ inline void AddGroup(const Source& source, const Unit& at, const Columns& columns, uint32_t tokens,
                                  uint32_t pair) {
    const int32_t count = static_cast<int32_t>(columns.padded);
    if (tokens < 2) AscendC::Add(sums_, sums_, sums_[pass_.tileColumns], count);
    for (uint32_t i = 0; i < tokens; ++i) {
      AscendC::LocalTensor<float> sum = sums_[i * pass_.tileColumns];
      if (tiling_.hasOffset) AscendC::Axpy(sum, offset_, rowSums_[i], count);
      AscendC::Muls(sum, sum, panel_.Factor(pair + i), count);
      AscendC::MulAddDst(totals_[source.SumOf(at.slot, i) * pass_.tileColumns], sum, scale_, count);
    }
  }

  __aicore__ inline void Store(uint32_t unit, uint32_t rows, const Columns& columns) {
    totalQueue_.EnQue(totals_);
    totals_ = totalQueue_.template DeQue<float>();
    partials_.Store(totals_, partition_.SegmentOf(unit), core_, rows, columns.width);
    totalQueue_.FreeTensor(totals_);
  }

  StreamTiling tiling_;
  uint32_t core_;
  ActivationPanel panel_;

  // The pass that is running.
  PassTiling pass_;
  Partition partition_;
  PartialSums partials_;
  uint32_t begin_, end_;
  AscendC::GlobalTensor<int8_t> weights_;
  AscendC::GlobalTensor<T> scales_, offsets_;

  WeightQueue weightQueue_;
  TotalQueue totalQueue_;
  LocalBuffer blockBuffer_, sumBuffer_, scaleBuffer_;
  AscendC::LocalTensor<half> block_;
  AscendC::LocalTensor<float> totals_, sums_, scale_, offset_;
  float rowSums_[kMaxTokens];  // of the group's activations, for its offsets
};

}  // namespace moe_fx::ascendc
