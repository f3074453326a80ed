// y[T, N] = x[T, K] · W[K, N] with int4 weights, for at most 8 tokens: dense projections (qkv, o) at decode.
//
// One pass of the shared inner loop over one matrix that all tokens use. Cores take stretches of rows of a column tile
// and leave partial sums; after the one SyncAll, which is there because a result needs all rows of its column, they are
// added up in a fixed order.

#pragma once

#include "kernel_operator.h"
#include "kernels/local_buffer.h"
#include "kernels/w4a16_stream.h"
#include "tiling/gemv_w4a16_tiling.h"

namespace moe_fx::ascendc {

// The one matrix, all tokens.
template <typename T>
class DenseSource {
 public:
  __aicore__ inline void Init(GM_ADDR x, uint32_t tokens, uint32_t rows) {
    x_.Init(x, rows);
    tokens_ = tokens;
  }
  __aicore__ inline uint32_t Matrix(uint32_t) const { return 0; }
  __aicore__ inline uint32_t Tokens(uint32_t) const { return tokens_; }
  __aicore__ inline uint32_t Sums(uint32_t) const { return tokens_; }
  __aicore__ inline uint32_t SumOf(uint32_t, uint32_t i) const { return i; }
  __aicore__ inline uint32_t MostRows(const Unit&) const { return kMaxPieceRows; }
  __aicore__ inline uint32_t BeginPiece(const Unit&) { return ActivationRows<T>::kLoadRows; }
  __aicore__ inline void Load(uint32_t, uint32_t i, uint32_t row, uint32_t rows, LoadQueue& queue) const {
    x_.Load(i, row, rows, queue);
  }
  __aicore__ inline void Take(uint32_t, uint32_t, uint32_t rows, LoadQueue& queue,
                              const AscendC::LocalTensor<float>& values) const {
    x_.Take(rows, queue, values);
  }

 private:
  ActivationRows<T> x_;
  uint32_t tokens_;
};

// T: half or bfloat16_t.
template <typename T>
__aicore__ inline void GemvW4A16(GM_ADDR x, GM_ADDR weights, GM_ADDR scales, GM_ADDR offsets, GM_ADDR y,
                                 GM_ADDR workspace, const GemvW4A16Tiling& tiling) {
  AscendC::TPipe pipe;
  W4A16Stream<T> stream;
  stream.Init(&pipe, tiling.stream);
  LocalBuffer beforeBuffer;
  AscendC::LocalTensor<uint32_t> before = Allot<uint32_t>(&pipe, beforeBuffer, 2);
  const uint32_t cost = 1 + 2 * tiling.stream.tokens;
  before.SetValue(0, 0);
  before.SetValue(1, cost);
  const uint32_t units = tiling.pass.rows / kUnitRows;
  Partition partition;
  partition.Init(before, 1, cost, tiling.pass.tiles, units, units, units);
  DenseSource<T> source;
  source.Init(x, tiling.stream.tokens, tiling.pass.rows);
  PartialSums partials;
  partials.Init(workspace, tiling.pass, partition, tiling.stream.tokens);
  stream.Start(tiling.pass, partition, partials, source, weights, scales, offsets);
  stream.Run(source);
  AscendC::SyncAll();
  stream.Reduce(y);
}

}  // namespace moe_fx::ascendc
