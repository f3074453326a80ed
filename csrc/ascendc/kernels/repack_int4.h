// Int4 weights of checkpoints, in the layouts of tiling/repack_int4_tiling.h, to that of the expert kernels: int32
// [E, K, N/8], eight signed nibbles a word, low first, value = nibble - 8. Losslessly: no value changes, only its
// place.
//
//   RepackAwq            words stay; within each, nibbles 0 2 4 6 1 3 5 7 become 0 1 2 3 4 5 6 7 in two swaps
//   RepackTransposed     GPTQ, compressed-tensors: nibbles -> halves -> 16 x 16 transposes -> even and odd outputs,
//   which
//                        meet in a byte as even + 16 odd
//   ZeroPointsToOffsets  zero points to the offsets that the kernels add: 8 - zero
//
// Each core takes an equal run of tiles; nothing is read or written twice. `firstColumn` places gate and up side by
// side.

#pragma once

#include "kernels/core_share.h"
#include "kernels/local_buffer.h"
#include "tiling/repack_int4_tiling.h"

namespace moe_fx::ascendc {

// A tile of a launch: where it starts, and how much of it there is.
struct Int4Tile {
  uint32_t expert;
  uint32_t row;
  uint32_t column;
  uint32_t rows;
  uint32_t columns;
};

__aicore__ inline Int4Tile TileOf(const RepackInt4Tiling& t, uint32_t index) {
  const uint32_t across = (t.columns + t.tileColumns - 1) / t.tileColumns;
  const uint32_t down = (t.rows + t.tileRows - 1) / t.tileRows;
  const uint32_t column = index % across * t.tileColumns;
  const uint32_t row = index / across % down * t.tileRows;
  const uint32_t rows = t.rows - row;
  const uint32_t columns = t.columns - column;
  return {index / (across * down), row, column, rows < t.tileRows ? rows : t.tileRows,
          columns < t.tileColumns ? columns : t.tileColumns};
}

__aicore__ inline uint32_t TilesOf(const RepackInt4Tiling& t) {
  return t.experts * ((t.columns + t.tileColumns - 1) / t.tileColumns) * ((t.rows + t.tileRows - 1) / t.tileRows);
}

// Bit operations on words of eight nibbles. The unit has And, Or and Not for 16-bit lanes and shifts for 32-bit ones.
class NibbleWords {
 public:
  __aicore__ inline void Init(AscendC::TPipe* pipe, uint32_t words) {
    low_ = Allot<uint32_t>(pipe, lowBuffer_, words);
    high_ = Allot<uint32_t>(pipe, highBuffer_, words);
    constants_ = Allot<uint32_t>(pipe, constantsBuffer_, kConstants * kWordsOfBlock);
    SetConstant(kOuterBytes, 0xFF0000FFU);
    SetConstant(kInnerByte, 0x0000FF00U);
    SetConstant(kOuterNibbles, 0xF00FF00FU);
    SetConstant(kInnerNibble, 0x00F000F0U);
    SetConstant(kLowBits, 0x77777777U);
    SetConstant(kHighBits, 0x88888888U);
  }

  // AWQ's order of nibbles to the sequential one: [0 2 4 6 1 3 5 7] -> [0 2 1 3 4 6 5 7] -> [0 1 2 3 4 5 6 7].
  // `words` is a multiple of 8.
  __aicore__ inline void FromAwq(const AscendC::LocalTensor<uint32_t>& x, uint32_t words) {
    const int32_t count = static_cast<int32_t>(words);
    const int32_t shorts = 2 * count;
    // The two inner bytes of each word change places...
    Keep(low_, x, kInnerByte, words);
    AscendC::ShiftLeft(low_, low_, 8U, count);
    AscendC::ShiftRight(high_, x, 8U, count);
    Keep(high_, high_, kInnerByte, words);
    Keep(x, x, kOuterBytes, words);
    Or(x, low_, high_, shorts);
    // ... and then the two inner nibbles of each half word.
    Keep(low_, x, kInnerNibble, words);
    AscendC::ShiftLeft(low_, low_, 4U, count);
    AscendC::ShiftRight(high_, x, 4U, count);
    Keep(high_, high_, kInnerNibble, words);
    Keep(x, x, kOuterNibbles, words);
    Or(x, low_, high_, shorts);
  }

  // dst = x with the high bit of every nibble flipped: unsigned n becomes the signed n - 8. x is used up.
  __aicore__ inline void Flip(const AscendC::LocalTensor<uint32_t>& dst, const AscendC::LocalTensor<uint32_t>& x,
                              uint32_t words) {
    const int32_t shorts = 2 * static_cast<int32_t>(words);
    const AscendC::LocalTensor<uint16_t> flipped = low_.ReinterpretCast<uint16_t>();
    const AscendC::LocalTensor<uint16_t> kept = x.ReinterpretCast<uint16_t>();
    AscendC::Not(flipped, kept, shorts);
    Keep(low_, low_, kHighBits, words);
    Keep(x, x, kLowBits, words);
    AscendC::Or(dst.ReinterpretCast<uint16_t>(), kept, flipped, shorts);
  }

 private:
  static constexpr uint32_t kWordsOfBlock = kBlockBytes / sizeof(uint32_t);
  static constexpr uint32_t kShortLanes = 128;  // that a repeat computes
  static constexpr uint32_t kOuterBytes = 0;
  static constexpr uint32_t kInnerByte = 1;
  static constexpr uint32_t kOuterNibbles = 2;
  static constexpr uint32_t kInnerNibble = 3;
  static constexpr uint32_t kLowBits = 4;
  static constexpr uint32_t kHighBits = 5;
  static constexpr uint32_t kConstants = 6;

  __aicore__ inline void SetConstant(uint32_t constant, uint32_t value) {
    AscendC::Duplicate(constants_[constant * kWordsOfBlock], value, static_cast<int32_t>(kWordsOfBlock));
  }

  // dst = x & constant.
  __aicore__ inline void Keep(const AscendC::LocalTensor<uint32_t>& dst, const AscendC::LocalTensor<uint32_t>& x,
                              uint32_t constant, uint32_t words) {
    const AscendC::LocalTensor<uint16_t> to = dst.ReinterpretCast<uint16_t>();
    const AscendC::LocalTensor<uint16_t> from = x.ReinterpretCast<uint16_t>();
    const AscendC::LocalTensor<uint16_t> bits = constants_[constant * kWordsOfBlock].ReinterpretCast<uint16_t>();
    const uint32_t repeats = 2 * words / kShortLanes;
    const uint32_t rest = 2 * words % kShortLanes;
    const AscendC::BinaryRepeatParams params{1, 1, 0, 8, 8, 0};
    if (repeats > 0) {
      AscendC::And(to, from, bits, static_cast<uint64_t>(kShortLanes), static_cast<uint8_t>(repeats), params);
    }
    if (rest > 0) {
      AscendC::And(to[repeats * kShortLanes], from[repeats * kShortLanes], bits, static_cast<uint64_t>(rest), 1,
                   params);
    }
  }

  // x |= a | b, in 16-bit lanes.
  __aicore__ inline void Or(const AscendC::LocalTensor<uint32_t>& x, const AscendC::LocalTensor<uint32_t>& a,
                            const AscendC::LocalTensor<uint32_t>& b, int32_t shorts) {
    const AscendC::LocalTensor<uint16_t> to = x.ReinterpretCast<uint16_t>();
    AscendC::Or(to, to, a.ReinterpretCast<uint16_t>(), shorts);
    AscendC::Or(to, to, b.ReinterpretCast<uint16_t>(), shorts);
  }

  LocalBuffer lowBuffer_, highBuffer_, constantsBuffer_;
  AscendC::LocalTensor<uint32_t> low_, high_, constants_;
};

// Rows of words, dense in global memory, to rows `pitch` words apart in UB, a multiple of 8.
__aicore__ inline void CopyWordsIn(const AscendC::LocalTensor<uint32_t>& dst,
                                   const AscendC::GlobalTensor<uint32_t>& src, const RepackInt4Tiling& t,
                                   const Int4Tile& tile, uint32_t pitch) {
  const uint32_t bytes = tile.columns / 2;
  const uint32_t blocks = RoundUp(bytes, kBlockBytes);
  const uint32_t gap = (pitch * sizeof(uint32_t) - blocks) / kBlockBytes;
  const uint64_t row = static_cast<uint64_t>(tile.expert) * t.rows + tile.row;
  AscendC::DataCopyPad(
      dst, src[(row * t.columns + tile.column) / 8],
      AscendC::DataCopyExtParams{static_cast<uint16_t>(tile.rows), bytes, t.columns / 2 - bytes, gap, 0},
      AscendC::DataCopyPadExtParams<uint32_t>{true, 0, static_cast<uint8_t>((blocks - bytes) / sizeof(uint32_t)), 0});
}

class RepackAwq {
 public:
  __aicore__ inline void Init(GM_ADDR packed, GM_ADDR weight, const RepackInt4Tiling& tiling, AscendC::TPipe* pipe) {
    t_ = tiling;
    packed_.SetGlobalBuffer((__gm__ uint32_t*)packed);
    weight_.SetGlobalBuffer((__gm__ uint32_t*)weight);
    const uint32_t words = t_.tileRows * t_.tileColumns / 8;
    pipe->InitBuffer(inQueue_, 2, words * sizeof(uint32_t));
    pipe->InitBuffer(outQueue_, 2, words * sizeof(uint32_t));
    nibbles_.Init(pipe, words);
  }

  __aicore__ inline void Process() {
    const CoreShare share = ShareOf(TilesOf(t_));
    for (uint32_t index = share.first; index < share.first + share.count; ++index) {
      const Int4Tile tile = TileOf(t_, index);
      const uint32_t pitch = RoundUp(tile.columns / 8, kBlockBytes / sizeof(uint32_t));
      AscendC::LocalTensor<uint32_t> in = inQueue_.AllocTensor<uint32_t>();
      CopyWordsIn(in, packed_, t_, tile, pitch);
      inQueue_.EnQue(in);

      in = inQueue_.DeQue<uint32_t>();
      AscendC::LocalTensor<uint32_t> out = outQueue_.AllocTensor<uint32_t>();
      const uint32_t words = tile.rows * pitch;
      nibbles_.FromAwq(in, words);
      nibbles_.Flip(out, in, words);
      inQueue_.FreeTensor(in);
      outQueue_.EnQue(out);

      out = outQueue_.DeQue<uint32_t>();
      const uint32_t bytes = tile.columns / 2;
      const uint64_t row = static_cast<uint64_t>(tile.expert) * t_.rows + tile.row;
      AscendC::DataCopyPad(
          weight_[(row * t_.rowColumns + t_.firstColumn + tile.column) / 8], out,
          {static_cast<uint16_t>(tile.rows), bytes,
           (pitch * static_cast<uint32_t>(sizeof(uint32_t)) - RoundUp(bytes, kBlockBytes)) / kBlockBytes,
           t_.rowColumns / 2 - bytes, 0});
      outQueue_.FreeTensor(out);
    }
  }

 private:
  RepackInt4Tiling t_;
  AscendC::GlobalTensor<uint32_t> packed_, weight_;
  AscendC::TQue<AscendC::TPosition::VECIN, 1> inQueue_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> outQueue_;
  NibbleWords nibbles_;
};

// A cast reads a stored nibble n as signed, s: n ^ 8, the nibble of n - 8, is s + 8. So the byte of an even output and
// the odd one above it is (even + 8) + 16 (odd + 8), a sum that half holds exactly.
template <Int4Layout layout>
class RepackTransposed {
 public:
  __aicore__ inline void Init(GM_ADDR packed, GM_ADDR weight, const RepackInt4Tiling& tiling, AscendC::TPipe* pipe) {
    t_ = tiling;
    pipe_ = pipe;
    packed_.SetGlobalBuffer((__gm__ uint8_t*)packed);
    weight_.SetGlobalBuffer((__gm__ uint8_t*)weight);
    const uint32_t nibbles = t_.tileRows * t_.tileColumns;
    pipe->InitBuffer(inQueue_, 2, nibbles / 2);
    pipe->InitBuffer(outQueue_, 2, nibbles / 2);
    before_ = Allot<half>(pipe, beforeBuffer_, nibbles);
    even_ = Allot<half>(pipe, evenBuffer_, nibbles / 2);
    odd_ = Allot<half>(pipe, oddBuffer_, nibbles / 2);
    // Short tiles leave a part of these alone. It is computed with and never used.
    const half zero = static_cast<half>(0.0F);
    AscendC::Duplicate(even_, zero, static_cast<int32_t>(nibbles / 2));
    AscendC::Duplicate(odd_, zero, static_cast<int32_t>(nibbles / 2));
  }

  __aicore__ inline void Process() {
    const CoreShare share = ShareOf(TilesOf(t_));
    for (uint32_t index = share.first; index < share.first + share.count; ++index) {
      const Int4Tile tile = TileOf(t_, index);
      CopyIn(tile);
      Compute(tile);
      CopyOut(tile);
    }
  }

 private:
  static constexpr bool kGptq = layout == Int4Layout::kGptq;
  static constexpr uint32_t kSide = 16;  // of a transposed block

  // Rows of the checkpoint: eight inputs of all outputs (GPTQ), or all inputs of an output.
  __aicore__ inline void CopyIn(const Int4Tile& tile) {
    AscendC::LocalTensor<uint8_t> in = inQueue_.template AllocTensor<uint8_t>();
    if (kGptq ? tile.columns < t_.tileColumns : tile.rows < t_.tileRows) {
      // The copy leaves the ends of a short tile's rows alone.
      AscendC::Duplicate(in.template ReinterpretCast<uint16_t>(), static_cast<uint16_t>(0),
                         static_cast<int32_t>(t_.tileRows * t_.tileColumns / 4));
      Order<AscendC::HardEvent::V_MTE2>(pipe_);
    }
    const uint64_t nibblesOfRow = kGptq ? 8 * static_cast<uint64_t>(t_.columns) : t_.rows;
    const uint64_t rowsOfExpert = kGptq ? t_.rows / 8 : t_.columns;
    const uint64_t row = tile.expert * rowsOfExpert + (kGptq ? tile.row / 8 : tile.column);
    const uint64_t nibble = kGptq ? 8 * static_cast<uint64_t>(tile.column) : tile.row;
    const uint32_t rows = kGptq ? tile.rows / 8 : tile.columns;
    const uint32_t bytes = (kGptq ? 8 * tile.columns : tile.rows) / 2;
    const uint32_t blocks = RoundUp(bytes, kBlockBytes);
    const uint32_t gap = ((kGptq ? 8 * t_.tileColumns : t_.tileRows) / 2 - blocks) / kBlockBytes;
    AscendC::DataCopyPad(in, packed_[(row * nibblesOfRow + nibble) / 2],
                         AscendC::DataCopyExtParams{static_cast<uint16_t>(rows), bytes,
                                                    static_cast<uint32_t>(nibblesOfRow / 2 - bytes), gap, 0},
                         AscendC::DataCopyPadExtParams<uint8_t>{true, 0, static_cast<uint8_t>(blocks - bytes), 0});
    inQueue_.EnQue(in);
  }

  __aicore__ inline void Compute(const Int4Tile& tile) {
    AscendC::LocalTensor<uint8_t> in = inQueue_.template DeQue<uint8_t>();
    const uint32_t nibbles = kGptq ? tile.rows * t_.tileColumns : t_.tileRows * tile.columns;
    AscendC::Cast(before_, in.template ReinterpretCast<AscendC::int4b_t>(), AscendC::RoundMode::CAST_NONE, nibbles);
    inQueue_.FreeTensor(in);
    if constexpr (kGptq) {
      SplitGptq(tile);
    } else {
      SplitCompressedTensors(tile);
    }
    const uint32_t bytes = tile.rows * t_.tileColumns / 2;
    const int32_t count = static_cast<int32_t>(bytes);
    AscendC::LocalTensor<uint8_t> out = outQueue_.template AllocTensor<uint8_t>();
    AscendC::Muls(odd_, odd_, static_cast<half>(16.0F), count);
    AscendC::Add(odd_, odd_, even_, count);
    AscendC::Adds(odd_, odd_, static_cast<half>(8.0F + 16.0F * 8.0F), count);
    AscendC::Cast(out, odd_, AscendC::RoundMode::CAST_NONE, bytes);
    outQueue_.EnQue(out);
  }

  // A block of 16 halves is two outputs, eight inputs each: sixteen blocks transpose to the eight inputs of the sixteen
  // even outputs, and of the odd ones.
  __aicore__ inline void SplitGptq(const Int4Tile& tile) {
    AscendC::LocalTensor<half> to[kSide];
    AscendC::LocalTensor<half> from[kSide];
    for (uint32_t row = 0; row < tile.rows; row += 8) {
      for (uint32_t i = 0; i < kSide; ++i) {
        from[i] = before_[row * t_.tileColumns + i * kSide];
        to[i] = (i < 8 ? even_ : odd_)[(row + i % 8) * t_.tileColumns / 2];
      }
      Transpose(to, from, tile.columns / (2 * kSide), 1, kSide);
    }
  }

  // Rows are outputs: sixteen even ones and sixteen odd ones are transposed apart, sixteen inputs at a time.
  __aicore__ inline void SplitCompressedTensors(const Int4Tile& tile) {
    AscendC::LocalTensor<half> to[kSide];
    AscendC::LocalTensor<half> from[kSide];
    for (uint32_t column = 0; column < tile.columns; column += 2 * kSide) {
      for (uint32_t odd = 0; odd < 2; ++odd) {
        for (uint32_t i = 0; i < kSide; ++i) {
          from[i] = before_[(column + 2 * i + odd) * t_.tileRows];
          to[i] = (odd == 0 ? even_ : odd_)[i * t_.tileColumns / 2 + column / 2];
        }
        Transpose(to, from, tile.rows / kSide, t_.tileColumns / 2, 1);
      }
    }
  }

  // Strides are in blocks of 32 bytes; a single repeat has none.
  __aicore__ inline void Transpose(const AscendC::LocalTensor<half> (&to)[kSide],
                                   const AscendC::LocalTensor<half> (&from)[kSide], uint32_t repeats, uint32_t toStride,
                                   uint32_t fromStride) {
    const AscendC::TransDataTo5HDParams params{false, false, static_cast<uint8_t>(repeats),
                                               static_cast<uint16_t>(repeats > 1 ? toStride : 0),
                                               static_cast<uint16_t>(repeats > 1 ? fromStride : 0)};
    AscendC::TransDataTo5HD(to, from, params);
  }

  __aicore__ inline void CopyOut(const Int4Tile& tile) {
    AscendC::LocalTensor<uint8_t> out = outQueue_.template DeQue<uint8_t>();
    const uint32_t bytes = tile.columns / 2;
    const uint32_t gap = (t_.tileColumns / 2 - RoundUp(bytes, kBlockBytes)) / kBlockBytes;
    const uint64_t row = static_cast<uint64_t>(tile.expert) * t_.rows + tile.row;
    AscendC::DataCopyPad(weight_[(row * t_.rowColumns + t_.firstColumn + tile.column) / 2], out,
                         {static_cast<uint16_t>(tile.rows), bytes, gap, t_.rowColumns / 2 - bytes, 0});
    outQueue_.FreeTensor(out);
  }

  RepackInt4Tiling t_;
  AscendC::TPipe* pipe_ = nullptr;
  AscendC::GlobalTensor<uint8_t> packed_, weight_;
  AscendC::TQue<AscendC::TPosition::VECIN, 1> inQueue_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> outQueue_;
  LocalBuffer beforeBuffer_, evenBuffer_, oddBuffer_;
  AscendC::LocalTensor<half> before_;      // as in the checkpoint
  AscendC::LocalTensor<half> even_, odd_;  // [rows, columns / 2]: every other output
};

template <typename T, bool awqOrder>
class ZeroPointsToOffsets {
 public:
  __aicore__ inline void Init(GM_ADDR zeros, GM_ADDR offsets, const RepackInt4Tiling& tiling, AscendC::TPipe* pipe) {
    t_ = tiling;
    zeros_.SetGlobalBuffer((__gm__ uint32_t*)zeros);
    offsets_.SetGlobalBuffer((__gm__ uint16_t*)offsets);
    const uint32_t nibbles = t_.tileRows * t_.tileColumns;
    pipe->InitBuffer(inQueue_, 2, nibbles / 2);
    pipe->InitBuffer(outQueue_, 2, nibbles * sizeof(T));
    half_ = Allot<half>(pipe, halfBuffer_, nibbles);
    float_ = Allot<float>(pipe, floatBuffer_, nibbles);
    nibbles_.Init(pipe, nibbles / 8);
  }

  __aicore__ inline void Process() {
    const CoreShare share = ShareOf(TilesOf(t_));
    for (uint32_t index = share.first; index < share.first + share.count; ++index) {
      const Int4Tile tile = TileOf(t_, index);
      const uint32_t pitch = RoundUp(tile.columns / 8, kBlockBytes / sizeof(uint32_t));
      AscendC::LocalTensor<uint32_t> in = inQueue_.template AllocTensor<uint32_t>();
      CopyWordsIn(in, zeros_, t_, tile, pitch);
      inQueue_.EnQue(in);
      Compute(tile.rows * pitch);
      CopyOut(tile, 8 * pitch);
    }
  }

 private:
  // The signed nibble is zero - 8 (and, where stored zero points are too small, less that): its negative is the offset.
  __aicore__ inline void Compute(uint32_t words) {
    AscendC::LocalTensor<uint32_t> in = inQueue_.template DeQue<uint32_t>();
    if constexpr (awqOrder) nibbles_.FromAwq(in, words);
    nibbles_.Flip(in, in, words);
    const uint32_t count = 8 * words;
    AscendC::Cast(half_, in.template ReinterpretCast<AscendC::int4b_t>(), AscendC::RoundMode::CAST_NONE, count);
    inQueue_.FreeTensor(in);
    AscendC::Cast(float_, half_, AscendC::RoundMode::CAST_NONE, count);
    AscendC::Muls(float_, float_, -1.0F, static_cast<int32_t>(count));
    AscendC::Adds(float_, float_, static_cast<float>(-static_cast<int32_t>(t_.less)), static_cast<int32_t>(count));
    AscendC::LocalTensor<T> out = outQueue_.template AllocTensor<T>();
    AscendC::Cast(out, float_, AscendC::RoundMode::CAST_RINT, count);
    outQueue_.EnQue(out);
  }

  __aicore__ inline void CopyOut(const Int4Tile& tile, uint32_t pitch) {
    AscendC::LocalTensor<uint16_t> out = outQueue_.template DeQue<uint16_t>();
    const uint32_t bytes = tile.columns * sizeof(T);
    const uint32_t gap = (pitch * sizeof(T) - RoundUp(bytes, kBlockBytes)) / kBlockBytes;
    const uint32_t skipped = (t_.rowColumns - tile.columns) * sizeof(T);
    const uint64_t row = static_cast<uint64_t>(tile.expert) * t_.rows + tile.row;
    AscendC::DataCopyPad(offsets_[row * t_.rowColumns + t_.firstColumn + tile.column], out,
                         {static_cast<uint16_t>(tile.rows), bytes, gap, skipped, 0});
    outQueue_.FreeTensor(out);
  }

  RepackInt4Tiling t_;
  AscendC::GlobalTensor<uint32_t> zeros_;
  AscendC::GlobalTensor<uint16_t> offsets_;
  AscendC::TQue<AscendC::TPosition::VECIN, 1> inQueue_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> outQueue_;
  LocalBuffer halfBuffer_, floatBuffer_;
  AscendC::LocalTensor<half> half_;
  AscendC::LocalTensor<float> float_;
  NibbleWords nibbles_;
};

// What a launch runs on each core.
template <typename Kernel>
__aicore__ inline void RepackInt4Body(GM_ADDR from, GM_ADDR to, const RepackInt4Tiling& tiling) {
  AscendC::TPipe pipe;
  Kernel kernel;
  kernel.Init(from, to, tiling, &pipe);
  kernel.Process();
}

}  // namespace moe_fx::ascendc
