// x [T, 2I] (gate, up) to silu(gate) * up in int8, [T, I], and each token's scale, fp32 [T]: what a W8A8 projection
// reads.
//
//   gate, up --MTE2--> fp32 --> silu(gate) * up --> rounded to x's dtype, kept in UB --> |.| --> largest of each token
//   int8 <--MTE3-- half <-- rounded to integers, half to even <-- kept / scale <-- scale = max(largest, 1e-12) / 127
//
// x is read once however long a token is: the activation of a whole token waits in UB for its scale. Short tokens are
// computed several at a time, long ones in chunks of columns. As in lowering/triton/swiglu.py the activation is rounded
// once, to x's dtype, before its largest is taken, and divided by the scale, not multiplied by its inverse, lest halves
// go astray. |result / scale| is at most 127 and a rounding, which rounds to 127: there is nothing to clamp.
//
// A token with NaN, or with an infinite activation, gets the scale NaN, whatever the unit's maximum makes of NaN: 0
// times the sum of the quotients is added, and that is NaN only then.

#pragma once

#include "kernels/core_share.h"
#include "kernels/local_buffer.h"
#include "kernels/vector_math.h"
#include "tiling/swiglu_dynamic_quant_tiling.h"

namespace moe_fx::ascendc {

template <typename T>
class SwigluDynamicQuant {
 public:
  __aicore__ inline void Init(GM_ADDR x, GM_ADDR y, GM_ADDR scales, const SwigluDynamicQuantTiling& tiling,
                              AscendC::TPipe* pipe) {
    t_ = tiling;
    pipe_ = pipe;
    share_ = ShareOf(t_.tokens);
    pitch_ = RoundUp(t_.chunkColumns, kFloatLanes);

    x_.SetGlobalBuffer((__gm__ Raw*)x);
    y_.SetGlobalBuffer((__gm__ int8_t*)y);
    scalesOut_.SetGlobalBuffer((__gm__ float*)scales);

    const uint32_t places = t_.tileTokens * pitch_;
    const uint32_t tokenLanes = RoundUp(t_.tileTokens, 8);
    pipe->InitBuffer(inputQueue_, 2, 2 * places * sizeof(T));
    pipe->InitBuffer(resultQueue_, 2, places);
    pipe->InitBuffer(scaleQueue_, 2, tokenLanes * sizeof(float));
    gate_ = Allot<float>(pipe, gateBuffer_, places);
    up_ = Allot<float>(pipe, upBuffer_, places);
    work_ = Allot<float>(pipe, workBuffer_, places);
    activation_ = Allot<T>(pipe, activationBuffer_, t_.tileTokens * RoundUp(t_.columns, kFloatLanes));
    largest_ = Allot<float>(pipe, largestBuffer_, t_.tileTokens * kFloatLanes);
    sums_ = Allot<float>(pipe, sumsBuffer_, t_.tileTokens * kFloatLanes);
    partial_ = Allot<float>(pipe, partialBuffer_, t_.tileTokens * kFloatLanes);
    scale_ = Allot<float>(pipe, scaleBuffer_, tokenLanes);
    sum_ = Allot<float>(pipe, sumBuffer_, tokenLanes);
    most_ = Allot<float>(pipe, mostBuffer_, tokenLanes);
    scaleBlocks_ = Allot<float>(pipe, scaleBlocksBuffer_, tokenLanes * 8);
    if (t_.hasLimit != 0) beyond_ = Allot<uint8_t>(pipe, beyondBuffer_, places / 8);

    AscendC::Duplicate(most_, 127.0F, static_cast<int32_t>(tokenLanes));
    AscendC::Duplicate(scale_, 1.0F, static_cast<int32_t>(tokenLanes));
  }

  __aicore__ inline void Process() {
    for (uint32_t done = 0; done < share_.count; done += t_.tileTokens) {
      const uint32_t left = share_.count - done;
      rows_ = left < t_.tileTokens ? left : t_.tileTokens;
      const uint32_t token = share_.first + done;
      for (uint32_t column = 0; column < t_.columns; column += t_.chunkColumns) {
        CopyIn(token, column);
        Activate(column);
      }
      MakeScale();
      for (uint32_t column = 0; column < t_.columns; column += t_.chunkColumns) {
        Quantise(column);
        CopyOut(token, column);
      }
      CopyScalesOut(token);
    }
  }

 private:
  using Floats = AscendC::LocalTensor<float>;
  using Raw = typename Bits<T>::Type;

  __aicore__ inline uint32_t Columns(uint32_t from) const {
    const uint32_t left = t_.columns - from;
    return left < t_.chunkColumns ? left : t_.chunkColumns;
  }

  // Of the tile, at this column: chunks are computed for one token at a time, so a short one takes no more than it
  // needs.
  __aicore__ inline uint32_t Places(uint32_t column) const { return rows_ * RoundUp(Columns(column), kFloatLanes); }

  // Gate in the first half of the buffer, up in the second.
  __aicore__ inline void CopyIn(uint32_t token, uint32_t column) {
    AscendC::LocalTensor<Raw> input = inputQueue_.template AllocTensor<Raw>();
    const uint32_t columns = Columns(column);
    if (columns % kFloatLanes != 0) {
      // The copies leave what lies beyond a token's last columns alone. It is computed with, and comes to 0.
      AscendC::Duplicate(input, static_cast<Raw>(0), static_cast<int32_t>(2 * t_.tileTokens * pitch_));
      Order<AscendC::HardEvent::V_MTE2>(pipe_);
    }
    const uint32_t bytes = columns * sizeof(T);
    const uint32_t blocks = RoundUp(bytes, kBlockBytes);
    const uint32_t skipped = (2 * t_.columns - columns) * sizeof(T);
    const uint32_t gap = (pitch_ * sizeof(T) - blocks) / kBlockBytes;
    const AscendC::DataCopyExtParams params{static_cast<uint16_t>(rows_), bytes, skipped, gap, 0};
    const AscendC::DataCopyPadExtParams<Raw> padding{true, 0, static_cast<uint8_t>((blocks - bytes) / sizeof(T)), 0};
    const uint64_t at = 2 * static_cast<uint64_t>(token) * t_.columns + column;
    AscendC::DataCopyPad(input, x_[at], params, padding);
    AscendC::DataCopyPad(input[t_.tileTokens * pitch_], x_[at + t_.columns], params, padding);
    inputQueue_.EnQue(input);
  }

  // activation_ at `column`, gate_ the same in fp32, and largest_ with this chunk's magnitudes.
  __aicore__ inline void Activate(uint32_t column) {
    const uint32_t places = Places(column);
    const int32_t count = static_cast<int32_t>(places);
    AscendC::LocalTensor<Raw> input = inputQueue_.template DeQue<Raw>();
    AscendC::Cast(gate_, input.template ReinterpretCast<T>(), AscendC::RoundMode::CAST_NONE, places);
    AscendC::Cast(up_, input[t_.tileTokens * pitch_].template ReinterpretCast<T>(), AscendC::RoundMode::CAST_NONE,
                  places);
    inputQueue_.FreeTensor(input);
    if (t_.hasLimit != 0) {
      Clamp(gate_, t_.limit, AscendC::CMPMODE::GT, places);
      Clamp(up_, t_.limit, AscendC::CMPMODE::GT, places);
      Clamp(up_, -t_.limit, AscendC::CMPMODE::LT, places);
    }
    AscendC::Muls(work_, gate_, -1.0F, count);
    AscendC::Exp(work_, work_, count);
    AscendC::Adds(work_, work_, 1.0F, count);
    AscendC::Div(gate_, gate_, work_, count);
    AscendC::Mul(gate_, gate_, up_, count);
    const AscendC::LocalTensor<T> activation = activation_[column];
    AscendC::Cast(activation, gate_, AscendC::RoundMode::CAST_RINT, places);
    AscendC::Cast(gate_, activation, AscendC::RoundMode::CAST_NONE, places);
    AscendC::Abs(work_, gate_, count);
    Reduce<Op::kMax>(largest_, work_, column);
  }

  // Puts `limit` where x lies beyond it, and leaves NaN, which compares to nothing, as torch's clamp does.
  __aicore__ inline void Clamp(const Floats& x, float limit, AscendC::CMPMODE beyond, uint32_t places) {
    AscendC::Duplicate(work_, limit, static_cast<int32_t>(places));
    AscendC::CompareScalar(beyond_, x, limit, beyond, places);
    AscendC::Select(x, beyond_, work_, x, AscendC::SELMODE::VSEL_TENSOR_TENSOR_MODE, places);
  }

  // Lanes of each token: the largest or the sum of every 64 of this chunk's columns, with those of earlier chunks.
  template <Op op>
  __aicore__ inline void Reduce(const Floats& lanes, const Floats& x, uint32_t column) {
    const uint32_t columns = Columns(column);
    const uint32_t repeats = columns / kFloatLanes;
    const uint32_t rest = columns % kFloatLanes;
    const Floats to = column == 0 ? lanes : partial_;
    for (uint32_t row = 0; row < rows_; ++row) {
      if (repeats > 0) ReduceRepeats<op>(to[row * kFloatLanes], x[row * pitch_], kFloatLanes, repeats);
      if (rest > 0) {
        // Reductions write to any multiple of their element.
        ReduceRepeats<op>(to[row * kFloatLanes + repeats], x[row * pitch_ + repeats * kFloatLanes], rest, 1);
      }
    }
    if (column == 0) return;
    const int32_t count = static_cast<int32_t>(repeats + (rest > 0 ? 1 : 0));
    if constexpr (op == Op::kMax) {
      AscendC::Max(lanes, lanes, partial_, count);
    } else {
      AscendC::Add(lanes, lanes, partial_, count);
    }
  }

  template <Op op>
  __aicore__ inline void ReduceRepeats(const Floats& dst, const Floats& x, uint32_t mask, uint32_t repeats) {
    const int32_t lanes = static_cast<int32_t>(mask);
    const int32_t times = static_cast<int32_t>(repeats);
    if constexpr (op == Op::kMax) {
      AscendC::WholeReduceMax(dst, x, lanes, times, 1, 1, 8, AscendC::ReduceOrder::ORDER_ONLY_VALUE);
    } else {
      AscendC::WholeReduceSum(dst, x, lanes, times, 1, 1, 8);
    }
  }

  __aicore__ inline uint32_t ReducedLanes() const { return pitch_ / kFloatLanes; }

  __aicore__ inline void MakeScale() {
    const int32_t count = static_cast<int32_t>(rows_);
    ReduceRepeats<Op::kMax>(scale_, largest_, ReducedLanes(), rows_);
    AscendC::Maxs(scale_, scale_, 1e-12F, count);
    AscendC::Div(scale_, scale_, most_, count);
    AscendC::Brcb(scaleBlocks_, scale_, static_cast<uint8_t>(RoundUp(rows_, 8) / 8), {1, 8});
  }

  __aicore__ inline void Quantise(uint32_t column) {
    const uint32_t places = Places(column);
    if (t_.chunkColumns < t_.columns) {
      AscendC::Cast(gate_, activation_[column], AscendC::RoundMode::CAST_NONE, places);
    }
    for (uint32_t row = 0; row < rows_; ++row) {
      const Floats of = gate_[row * pitch_];
      Apply<Op::kDiv>(of, of, scaleBlocks_[row * 8], kFloatLanes, places / rows_ / kFloatLanes, {1, 1, 0, 8, 8, 0});
    }
    Reduce<Op::kAdd>(sums_, gate_, column);
    // To an integer while still in fp32: half has too few bits to round only once.
    AscendC::LocalTensor<half> narrow = work_.template ReinterpretCast<half>();
    AscendC::LocalTensor<int8_t> result = resultQueue_.template AllocTensor<int8_t>();
    AscendC::Cast(up_, gate_, AscendC::RoundMode::CAST_RINT, places);
    AscendC::Cast(narrow, up_, AscendC::RoundMode::CAST_NONE, places);
    AscendC::Cast(result, narrow, AscendC::RoundMode::CAST_NONE, places);
    resultQueue_.EnQue(result);
  }

  __aicore__ inline void CopyOut(uint32_t token, uint32_t column) {
    AscendC::LocalTensor<int8_t> result = resultQueue_.template DeQue<int8_t>();
    const uint32_t columns = Columns(column);
    const uint32_t gap = (pitch_ - RoundUp(columns, kBlockBytes)) / kBlockBytes;
    const AscendC::DataCopyExtParams params{static_cast<uint16_t>(rows_), columns, gap, t_.columns - columns, 0};
    AscendC::DataCopyPad(y_[static_cast<uint64_t>(token) * t_.columns + column], result, params);
    resultQueue_.FreeTensor(result);
  }

  __aicore__ inline void CopyScalesOut(uint32_t token) {
    const int32_t count = static_cast<int32_t>(rows_);
    ReduceRepeats<Op::kAdd>(sum_, sums_, ReducedLanes(), rows_);
    AscendC::Muls(sum_, sum_, 0.0F, count);
    Floats scale = scaleQueue_.template AllocTensor<float>();
    AscendC::Add(scale, scale_, sum_, count);
    scaleQueue_.EnQue(scale);
    scale = scaleQueue_.template DeQue<float>();
    AscendC::DataCopyPad(scalesOut_[token], scale, {1, static_cast<uint32_t>(rows_ * sizeof(float)), 0, 0, 0});
    scaleQueue_.FreeTensor(scale);
  }

  SwigluDynamicQuantTiling t_;
  AscendC::TPipe* pipe_ = nullptr;
  CoreShare share_{};
  uint32_t pitch_ = 0;  // places of a token's chunk
  uint32_t rows_ = 0;   // tokens of this tile

  AscendC::GlobalTensor<Raw> x_;
  AscendC::GlobalTensor<int8_t> y_;
  AscendC::GlobalTensor<float> scalesOut_;

  AscendC::TQue<AscendC::TPosition::VECIN, 1> inputQueue_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> resultQueue_, scaleQueue_;
  LocalBuffer gateBuffer_, upBuffer_, workBuffer_, activationBuffer_, largestBuffer_, sumsBuffer_, partialBuffer_;
  LocalBuffer scaleBuffer_, sumBuffer_, mostBuffer_, scaleBlocksBuffer_, beyondBuffer_;

  Floats gate_, up_, work_;             // [tokens, pitch]
  AscendC::LocalTensor<T> activation_;  // the same of every chunk
  Floats largest_, sums_, partial_;     // [tokens, 64]: a lane for every 64 columns of a chunk
  Floats scale_, sum_, most_, scaleBlocks_;
  AscendC::LocalTensor<uint8_t> beyond_;  // a bit per place: beyond the limit
};

// What a launch runs on each core.
template <typename T>
__aicore__ inline void SwigluDynamicQuantBody(GM_ADDR x, GM_ADDR y, GM_ADDR scales,
                                              const SwigluDynamicQuantTiling& tiling) {
  AscendC::TPipe pipe;
  SwigluDynamicQuant<T> kernel;
  kernel.Init(x, y, scales, tiling, &pipe);
  kernel.Process();
}

}  // namespace moe_fx::ascendc
