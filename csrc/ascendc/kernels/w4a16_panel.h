// The activations that a core multiplies weights with, as halves, for as many units ahead as there is room for.
//
// They are halves because Axpy takes its scalar in the type of the weights. Every piece of a row is first multiplied by
// the power of two that brings its largest magnitude into [2^14, 2^15); its sums of products are multiplied by the
// inverse. So bf16 and fp16 pass exactly down to 2^-31 (bf16) or 2^-28 (fp16) of a piece's largest value, where a half
// begins to lose its last bits, and with an error of at most 2^-39 of the largest below; fp32 (activations between two
// products) is rounded to the 11 bits of a half. That takes fewer instructions than a second Cast of all weights, to
// fp32.
//
// What there is to bring is the business of a Source, which also tells what a pass multiplies:
//   Matrix(slot), Tokens(slot)        index of a matrix, number of activation rows it is multiplied with
//   Sums(slot), SumOf(slot, i)        rows of a segment's totals, and the one that the matrix's i-th row adds to
//   MostRows(at)                      rows that a piece starting there may have
//   BeginPiece(at)                    gives the rows of one load
//   Load(slot, i, row, rows, queue)   starts to bring a stretch of the i-th activation row
//   Take(slot, i, rows, queue, values)   finishes it: fp32 values

#pragma once

#include <cstdint>

#include "kernel_operator.h"
#include "kernels/local_buffer.h"
#include "kernels/w4a16_partition.h"
#include "tiling/w4a16_tiling.h"

namespace moe_fx::ascendc {

// What activations, partial sums and routing come in through.
using LoadQueue = AscendC::TQue<AscendC::TPosition::VECIN, 2>;

// Rows of activations as they lie in global memory, for a Source.
template <typename T>
class ActivationRows {
 public:
  // Of one load: a whole piece, for which a buffer has room.
  static constexpr uint32_t kLoadRows = kMaxPieceRows;

  __aicore__ inline void Init(GM_ADDR x, uint32_t length) {
    x_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(x));
    length_ = length;
  }
  __aicore__ inline void Load(uint32_t token, uint32_t row, uint32_t rows, LoadQueue& queue) const {
    AscendC::LocalTensor<T> raw = queue.AllocTensor<T>();
    AscendC::DataCopy(raw, x_[token * length_ + row], rows);
    queue.EnQue(raw);
  }
  __aicore__ inline void Take(uint32_t rows, LoadQueue& queue, const AscendC::LocalTensor<float>& values) const {
    AscendC::LocalTensor<T> raw = queue.DeQue<T>();
    AscendC::Cast(values, raw, AscendC::RoundMode::CAST_NONE, rows);
    queue.FreeTensor(raw);
  }

 private:
  AscendC::GlobalTensor<T> x_;
  uint32_t length_;
};

// Pairs of a unit and a token, a unit's tokens beside each other, in the order in which units are multiplied.
class ActivationPanel {
 public:
  __aicore__ inline void Init(AscendC::TPipe* pipe, const StreamTiling& tiling) {
    pipe_ = pipe;
    group_ = tiling.group;
    pieceRows_ = tiling.pieceRows;
    hasOffset_ = tiling.hasOffset;
    pipe->InitBuffer(loadQueue_, 2, kPanelLoadBytes);
    panel_ = Allot<half>(pipe, panelBuffer_, kPanelPairs * kUnitRows);
    rowSums_ = Allot<float>(pipe, rowSumBuffer_, kPanelPairs);
    factors_ = Allot<float>(pipe, factorBuffer_, kPanelPairs);
    peaks_ = Allot<float>(pipe, peakBuffer_, 2 * kLanes);
  }

  __aicore__ inline LoadQueue& Loads() { return loadQueue_; }

  // Four activations of a pair, from row 4 * word of the unit on.
  __aicore__ inline uint64_t Word(uint32_t pair, uint32_t word) const {
    return panel_.ReinterpretCast<uint64_t>().GetValue(pair * (kUnitRows / 4) + word);
  }
  // The sum of a pair's activations (where there are offsets), and the inverse of its power of two.
  __aicore__ inline float RowSum(uint32_t pair) const { return rowSums_.GetValue(pair); }
  __aicore__ inline float Factor(uint32_t pair) const { return factors_.GetValue(pair); }

  // Brings the activations of units from `unit` on, to `end` or as far as there is room; gives the first that is left.
  // `scratch` has room for twice the rows of a piece.
  template <typename Source>
  __aicore__ inline uint32_t Fill(Source& source, const Partition& partition, uint32_t unit, uint32_t end,
                                  const AscendC::LocalTensor<float>& scratch) {
    uint32_t pair = 0;
    while (unit < end) {
      const Unit at = partition.At(unit);
      const uint32_t tokens = source.Tokens(at.slot);
      const uint32_t left = Smaller(end - unit, partition.UnitsLeft(unit));
      const uint32_t room =
          Smaller((kPanelPairs - pair) / tokens, Smaller(pieceRows_, source.MostRows(at)) / kUnitRows);
      const uint32_t rows = PieceRows(at, left, room);
      if (rows == 0) break;
      FillPiece(source, at, rows, tokens, pair, scratch);
      pair += rows / kUnitRows * tokens;
      unit += rows / kUnitRows;
    }
    Order<AscendC::HardEvent::V_S>(pipe_);
    return unit;
  }

 private:
  // Rows that get one power of two: all that are left of the tile or of the core's work, or else to the end of a group,
  // because the sums of a group cannot mix two.
  __aicore__ inline uint32_t PieceRows(const Unit& at, uint32_t left, uint32_t room) const {
    if (room >= left) return left * kUnitRows;
    const uint32_t last = (at.row + room * kUnitRows) / group_ * group_;
    return last > at.row ? last - at.row : 0;
  }

  template <typename Source>
  __aicore__ inline void FillPiece(Source& source, const Unit& at, uint32_t rows, uint32_t tokens, uint32_t pair,
                                   const AscendC::LocalTensor<float>& scratch) {
    const uint32_t step = source.BeginPiece(at);
    const uint32_t steps = (rows + step - 1) / step;
    // One load ahead of the one that is taken.
    source.Load(at.slot, 0, at.row, Smaller(step, rows), loadQueue_);
    for (uint32_t i = 0, taken = 0; i < tokens; ++i) {
      for (uint32_t s = 0; s < steps; ++s) {
        if (++taken < tokens * steps) {
          const uint32_t next = taken / steps;
          const uint32_t from = (taken - next * steps) * step;
          source.Load(at.slot, next, at.row + from, Smaller(step, rows - from), loadQueue_);
        }
        source.Take(at.slot, i, Smaller(step, rows - s * step), loadQueue_, scratch[s * step]);
      }
      Narrow(scratch, rows, pair + i, tokens);
    }
  }

  // Scales a piece of an activation row and puts it into the panel: unit u of the piece is pair + u * tokens.
  __aicore__ inline void Narrow(const AscendC::LocalTensor<float>& values, uint32_t rows, uint32_t pair,
                                uint32_t tokens) {
    using AscendC::ReduceOrder;
    using AscendC::RoundMode;
    const int32_t count = static_cast<int32_t>(rows);
    const int32_t units = static_cast<int32_t>(rows / kUnitRows);
    const uint8_t repeats = static_cast<uint8_t>(units);
    const uint64_t mask = kUnitRows;
    const uint8_t blocks = static_cast<uint8_t>(tokens * 2);  // from a unit's halves to the next unit's
    AscendC::LocalTensor<float> magnitudes = values[pieceRows_];
    AscendC::Abs(magnitudes, values, count);
    AscendC::WholeReduceMax<float>(peaks_, magnitudes, kUnitRows, units, 1, 1, 4, ReduceOrder::ORDER_ONLY_VALUE);
    AscendC::WholeReduceMax<float>(peaks_[kLanes], peaks_, units, 1, 1, 1, 8, ReduceOrder::ORDER_ONLY_VALUE);
    Order<AscendC::HardEvent::V_S>(pipe_);
    AscendC::LocalTensor<int32_t> bits = peaks_.ReinterpretCast<int32_t>();
    // With biased exponents: the peak's is 127 + e, wanted are 2^(14 - e) and its inverse, both of them normal numbers.
    int32_t shift = 127 + 14 - ((bits.GetValue(kLanes) >> 23) & 255);
    if (shift > 126) shift = 126;
    bits.SetValue(kLanes + 1, (127 + shift) << 23);
    AscendC::Muls(values, values, peaks_.GetValue(kLanes + 1), count);
    AscendC::LocalTensor<half> halves = panel_[pair * kUnitRows];
    AscendC::Cast(halves, values, RoundMode::CAST_RINT, mask, repeats, {1, 1, blocks, 4});
    if (hasOffset_) {
      // Of what is multiplied, so of the rounded values.
      AscendC::Cast(values, halves, RoundMode::CAST_NONE, mask, repeats, {1, 1, 4, blocks});
      AscendC::WholeReduceSum<float>(rowSums_[pair], values, kUnitRows, units, static_cast<int32_t>(tokens), 1, 4);
    }
    AscendC::LocalTensor<int32_t> inverse = factors_.ReinterpretCast<int32_t>();
    for (uint32_t u = 0; u < rows / kUnitRows; ++u) {
      inverse.SetValue(pair + u * tokens, (127 - shift) << 23);
    }
  }

  AscendC::TPipe* pipe_;
  uint32_t group_, pieceRows_, hasOffset_;
  LoadQueue loadQueue_;
  LocalBuffer panelBuffer_, rowSumBuffer_, factorBuffer_, peakBuffer_;
  AscendC::LocalTensor<half> panel_;
  AscendC::LocalTensor<float> rowSums_, factors_, peaks_;
};

}  // namespace moe_fx::ascendc
