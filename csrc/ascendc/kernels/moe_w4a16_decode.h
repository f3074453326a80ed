// A layer's int4 experts for at most 8 tokens, in one launch on the vector cores: gate and up, SwiGLU, down, combine.
//
//   up      x · w13 of each expert in use      -> partial sums in the workspace
//   all cores meet: an activation needs all of its column, whose rows several cores have
//   down    silu(gate) up weight · w2          -> partial sums in the workspace, all experts of a token together
//   SyncAll: a result needs all experts and rows
//   reduce  -> y
//
// Both products go through the shared inner loop. SwiGLU is computed where the down pass takes its rows, from the
// partial sums; the routing weight is multiplied in there too, so that the sum over experts is a sum over rows like any
// other. Each expert's weights are read once, for all its tokens. The weights with which the down pass begins are under
// way while cores wait for each other the first time.

#pragma once

#include "kernel_operator.h"
#include "kernels/moe_w4a16_routing.h"
#include "kernels/w4a16_stream.h"
#include "tiling/moe_w4a16_decode_tiling.h"

namespace moe_fx::ascendc {

// Rows of x, for the tokens of each expert; a segment's totals are those of its expert's tokens.
template <typename T>
class UpSource {
 public:
  __aicore__ inline void Init(const Routing* routing, GM_ADDR x, uint32_t hidden) {
    routing_ = routing;
    x_.Init(x, hidden);
  }
  __aicore__ inline uint32_t Matrix(uint32_t slot) const { return routing_->Matrix(slot); }
  __aicore__ inline uint32_t Tokens(uint32_t slot) const { return routing_->Tokens(slot); }
  __aicore__ inline uint32_t Sums(uint32_t slot) const { return routing_->Tokens(slot); }
  __aicore__ inline uint32_t SumOf(uint32_t, uint32_t i) const { return i; }
  __aicore__ inline uint32_t MostRows(const Unit&) const { return kMaxPieceRows; }
  __aicore__ inline uint32_t BeginPiece(const Unit&) { return ActivationRows<T>::kLoadRows; }
  __aicore__ inline void Load(uint32_t slot, uint32_t i, uint32_t row, uint32_t rows, LoadQueue& queue) const {
    x_.Load(routing_->Token(slot, i), row, rows, queue);
  }
  __aicore__ inline void Take(uint32_t, uint32_t, uint32_t rows, LoadQueue& queue,
                              const AscendC::LocalTensor<float>& values) const {
    x_.Take(rows, queue, values);
  }

 private:
  const Routing* routing_;
  ActivationRows<T> x_;
};

// Activations from the partial sums of gate and up; a segment's totals are those of all tokens.
class DownSource {
 public:
  __aicore__ inline void Init(const Routing* routing, const PartialSums& partials, const PassTiling& up,
                              uint32_t tokens) {
    routing_ = routing;
    partials_ = partials;
    up_ = up;
    tokens_ = tokens;
  }
  __aicore__ inline uint32_t Matrix(uint32_t slot) const { return routing_->Matrix(slot); }
  __aicore__ inline uint32_t Tokens(uint32_t slot) const { return routing_->Tokens(slot); }
  __aicore__ inline uint32_t Sums(uint32_t) const { return tokens_; }
  __aicore__ inline uint32_t SumOf(uint32_t slot, uint32_t i) const { return routing_->Token(slot, i); }
  // To the end of the up pass's tile, whose parts are found together.
  __aicore__ inline uint32_t MostRows(const Unit& at) const { return up_.tileColumns - at.row % up_.tileColumns; }

  // A buffer takes the parts of gate and those of up.
  __aicore__ inline uint32_t BeginPiece(const Unit& at) {
    const uint32_t segment = at.slot * up_.tiles + at.row / up_.tileColumns;
    gateParts_ = partials_.Of(segment);
    upParts_ = partials_.Of(segment + up_.tilesPerSpan);
    return kPanelLoadBytes / sizeof(float) / (gateParts_.count + upParts_.count) / kUnitRows * kUnitRows;
  }

  __aicore__ inline void Load(uint32_t, uint32_t i, uint32_t row, uint32_t rows, LoadQueue& queue) const {
    AscendC::LocalTensor<float> gate = queue.AllocTensor<float>();
    const uint32_t column = row % up_.tileColumns;
    partials_.Load(gate, gateParts_, i, column, rows);
    partials_.Load(gate[gateParts_.count * rows], upParts_, i, column, rows);
    queue.EnQue(gate);
  }

  // silu(gate) * up * weight.
  __aicore__ inline void Take(uint32_t slot, uint32_t i, uint32_t rows, LoadQueue& queue,
                              const AscendC::LocalTensor<float>& values) const {
    AscendC::LocalTensor<float> gate = queue.DeQue<float>();
    AscendC::LocalTensor<float> up = gate[gateParts_.count * rows];
    AddRows(gate, gateParts_.count, rows);
    AddRows(up, upParts_.count, rows);
    const int32_t count = static_cast<int32_t>(rows);
    AscendC::Muls(values, gate, -1.0f, count);
    AscendC::Exp(values, values, count);
    AscendC::Adds(values, values, 1.0f, count);
    AscendC::Div(values, gate, values, count);
    AscendC::Mul(values, values, up, count);
    AscendC::Muls(values, values, routing_->Weight(slot, routing_->Token(slot, i)), count);
    queue.FreeTensor(gate);
  }

 private:
  const Routing* routing_;
  PartialSums partials_;
  PassTiling up_;
  uint32_t tokens_;
  PartialSums::Parts gateParts_, upParts_;  // of gate and of up, for the piece that is being brought
};

// Where all cores have stored what they leave for others. SyncAll would do too, but begins with a barrier of all pipes:
// nobody would arrive before the weights that are under way do.
__aicore__ inline void MeetWhenStored() {
  constexpr uint16_t kFlag = 0;
  AscendC::CrossCoreSetFlag<0, PIPE_MTE3>(kFlag);
  AscendC::CrossCoreWaitFlag(kFlag);
}

// T: half or bfloat16_t, of x, scales, offsets and y; W: float or T, of the routing weights. Offsets are not touched
// where the tiling says there are none.
template <typename T, typename W>
__aicore__ inline void MoeW4A16Decode(GM_ADDR x, GM_ADDR weights, GM_ADDR ids, GM_ADDR w13, GM_ADDR w13Scale,
                                      GM_ADDR w13Offset, GM_ADDR w2, GM_ADDR w2Scale, GM_ADDR w2Offset, GM_ADDR y,
                                      GM_ADDR workspace, const MoeW4A16DecodeTiling& tiling) {
  const uint32_t tokens = tiling.stream.tokens;
  AscendC::TPipe pipe;
  W4A16Stream<T> stream;
  stream.Init(&pipe, tiling.stream);
  Routing routing;
  routing.Init(&pipe, tokens, tiling.topK, tiling.experts, tiling.slots);
  routing.Build<W>(ids, weights, stream.Loads());
  const uint32_t matrices = routing.Matrices();
  if (matrices == 0) {
    stream.Clear(tiling.down, y);
    return;
  }

  // Up: expert by expert, each tile a segment. Down: tile by tile, all experts one segment.
  Partition up, down;
  const uint32_t upUnits = tiling.up.rows / kUnitRows;
  const uint32_t downUnits = tiling.down.rows / kUnitRows;
  up.Init(routing.Before(), matrices, routing.Dearest(), 1, tiling.up.tiles * upUnits, upUnits, upUnits);
  down.Init(routing.Before(), matrices, routing.Dearest(), tiling.down.tiles, downUnits, downUnits,
            matrices * downUnits);

  PartialSums upSums, downSums;
  upSums.Init(workspace, tiling.up, up, tokens);
  downSums.Init(workspace + tiling.downPartials, tiling.down, down, tokens);

  UpSource<T> upSource;
  upSource.Init(&routing, x, tiling.up.rows);
  stream.Start(tiling.up, up, upSums, upSource, w13, w13Scale, w13Offset);
  stream.Run(upSource);

  DownSource downSource;
  downSource.Init(&routing, upSums, tiling.up, tokens);
  stream.Start(tiling.down, down, downSums, downSource, w2, w2Scale, w2Offset);
  MeetWhenStored();
  stream.Run(downSource);
  AscendC::SyncAll();
  stream.Reduce(y);
}

}  // namespace moe_fx::ascendc
