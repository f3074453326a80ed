// The enumerations and parameter structures of the API, with Huawei's names, values and defaults.

#pragma once

#include <cstdint>

#include "model/narrow.h"

enum pipe_t { PIPE_S = 0, PIPE_V = 1, PIPE_M = 2, PIPE_MTE1 = 3, PIPE_MTE2 = 4, PIPE_MTE3 = 5, PIPE_ALL = 6 };

enum event_t { EVENT_ID0 = 0, EVENT_ID1, EVENT_ID2, EVENT_ID3, EVENT_ID4, EVENT_ID5, EVENT_ID6, EVENT_ID7 };

namespace AscendC {

using TEventID = int8_t;
constexpr TEventID INVALID_TEVENTID = -1;

enum class TPosition : uint8_t { GM, A1, A2, B1, B2, C1, C2, CO1, CO2, VECIN, VECOUT, VECCALC, LCM = VECCALC, MAX };
using QuePosition = TPosition;

// Those that order the vector core's pipes; the cube core's are not modelled.
enum class HardEvent : uint8_t {
  MTE2_V,
  V_MTE2,
  MTE3_V,
  V_MTE3,
  MTE2_MTE3,
  MTE3_MTE2,
  S_V,
  V_S,
  S_MTE2,
  MTE2_S,
  S_MTE3,
  MTE3_S,
  V_V,
  MAX
};

enum class RoundMode { CAST_NONE = 0, CAST_RINT, CAST_FLOOR, CAST_CEIL, CAST_ROUND, CAST_TRUNC, CAST_ODD };
enum class CMPMODE { LT = 0, GT, EQ, LE, GE, NE };
enum class SELMODE { VSEL_CMPMASK_SPR = 0, VSEL_TENSOR_SCALAR_MODE, VSEL_TENSOR_TENSOR_MODE };
enum class ReduceOrder { ORDER_VALUE_INDEX = 0, ORDER_INDEX_VALUE, ORDER_ONLY_VALUE, ORDER_ONLY_INDEX };
enum class MaskMode : uint8_t { NORMAL = 0, COUNTER };
enum class MemDsbT { ALL = 0, DDR, UB, SEQ };
enum class CacheLine { SINGLE_CACHE_LINE = 0, ENTIRE_DATA_CACHE };
enum class DcciDst { CACHELINE_ALL = 0, CACHELINE_UB, CACHELINE_OUT, CACHELINE_ATOMIC };
enum class CacheMode { CACHE_MODE_DISABLE = 0, CACHE_MODE_NORMAL = 1 };
enum class CacheRwMode { READ = 1, WRITE = 2, RW = 3 };
enum class GatherMaskMode : uint8_t { VERSION_V1 = 0, VERSION_V2 = 1 };
constexpr GatherMaskMode defaultGatherMaskMode = GatherMaskMode::VERSION_V2;

constexpr int32_t ONE_BLK_SIZE = 32;
constexpr int32_t ONE_REPEAT_BYTE_SIZE = 256;
constexpr uint8_t DEFAULT_BLK_STRIDE = 1;
constexpr uint8_t DEFAULT_REPEAT_STRIDE = 8;
constexpr int32_t MAX_REPEAT_TIMES = 255;
constexpr int32_t MASK_PLACEHOLDER = 0;

using ascendc_model::Narrow;

// Strides are in blocks of 32 bytes: between the blocks of a repeat, and between repeats.
struct UnaryRepeatParams {
  UnaryRepeatParams() = default;
  UnaryRepeatParams(uint16_t dstBlkStrideIn, uint16_t srcBlkStrideIn, uint8_t dstRepStrideIn, uint8_t srcRepStrideIn)
      : dstBlkStride(dstBlkStrideIn),
        srcBlkStride(srcBlkStrideIn),
        dstRepStride(dstRepStrideIn),
        srcRepStride(srcRepStrideIn) {}

  Narrow<uint16_t> dstBlkStride = DEFAULT_BLK_STRIDE;
  Narrow<uint16_t> srcBlkStride = DEFAULT_BLK_STRIDE;
  Narrow<uint8_t> dstRepStride = DEFAULT_REPEAT_STRIDE;
  Narrow<uint8_t> srcRepStride = DEFAULT_REPEAT_STRIDE;
};

struct BinaryRepeatParams {
  BinaryRepeatParams() = default;
  BinaryRepeatParams(uint8_t dstBlkStrideIn, uint8_t src0BlkStrideIn, uint8_t src1BlkStrideIn, uint8_t dstRepStrideIn,
                     uint8_t src0RepStrideIn, uint8_t src1RepStrideIn)
      : dstBlkStride(dstBlkStrideIn),
        src0BlkStride(src0BlkStrideIn),
        src1BlkStride(src1BlkStrideIn),
        dstRepStride(dstRepStrideIn),
        src0RepStride(src0RepStrideIn),
        src1RepStride(src1RepStrideIn) {}

  Narrow<uint8_t> dstBlkStride = DEFAULT_BLK_STRIDE;
  Narrow<uint8_t> src0BlkStride = DEFAULT_BLK_STRIDE;
  Narrow<uint8_t> src1BlkStride = DEFAULT_BLK_STRIDE;
  Narrow<uint8_t> dstRepStride = DEFAULT_REPEAT_STRIDE;
  Narrow<uint8_t> src0RepStride = DEFAULT_REPEAT_STRIDE;
  Narrow<uint8_t> src1RepStride = DEFAULT_REPEAT_STRIDE;
};

struct CopyRepeatParams {
  CopyRepeatParams() = default;
  CopyRepeatParams(uint16_t dstStrideIn, uint16_t srcStrideIn, uint16_t dstRepeatSizeIn, uint16_t srcRepeatSizeIn)
      : dstStride(dstStrideIn),
        srcStride(srcStrideIn),
        dstRepeatSize(dstRepeatSizeIn),
        srcRepeatSize(srcRepeatSizeIn) {}

  Narrow<uint16_t> dstStride = DEFAULT_BLK_STRIDE;
  Narrow<uint16_t> srcStride = DEFAULT_BLK_STRIDE;
  Narrow<uint16_t> dstRepeatSize = DEFAULT_REPEAT_STRIDE;
  Narrow<uint16_t> srcRepeatSize = DEFAULT_REPEAT_STRIDE;
};

struct BrcbRepeatParams {
  BrcbRepeatParams() = default;
  BrcbRepeatParams(uint16_t dstBlkStrideIn, uint16_t dstRepStrideIn)
      : dstBlkStride(dstBlkStrideIn), dstRepStride(dstRepStrideIn) {}

  Narrow<uint16_t> dstBlkStride = DEFAULT_BLK_STRIDE;
  Narrow<uint16_t> dstRepStride = DEFAULT_REPEAT_STRIDE;
};

struct GatherMaskParams {
  GatherMaskParams() = default;
  GatherMaskParams(uint8_t src0BlockStrideIn, uint16_t repeatTimesIn, uint16_t src0RepeatStrideIn,
                   uint8_t src1RepeatStrideIn)
      : src0BlockStride(src0BlockStrideIn),
        repeatTimes(repeatTimesIn),
        src0RepeatStride(src0RepeatStrideIn),
        src1RepeatStride(src1RepeatStrideIn) {}

  Narrow<uint8_t> src0BlockStride = DEFAULT_BLK_STRIDE;
  Narrow<uint16_t> repeatTimes = 0;
  Narrow<uint16_t> src0RepeatStride = DEFAULT_REPEAT_STRIDE;
  Narrow<uint8_t> src1RepeatStride = DEFAULT_REPEAT_STRIDE;
};

// DataCopy's: everything in blocks of 32 bytes. For DataCopyPad, blockLen and the gap on the global side are in bytes.
struct DataCopyParams {
  DataCopyParams() = default;
  DataCopyParams(uint16_t count, uint16_t len, uint16_t srcStrideIn, uint16_t dstStrideIn)
      : blockCount(count), blockLen(len), srcStride(srcStrideIn), dstStride(dstStrideIn) {}

  Narrow<uint16_t> blockCount = 1;
  Narrow<uint16_t> blockLen = 0;
  union {
    Narrow<uint16_t> srcGap = 0;
    Narrow<uint16_t> srcStride;
  };
  union {
    Narrow<uint16_t> dstGap = 0;
    Narrow<uint16_t> dstStride;
  };
};

struct DataCopyExtParams {
  DataCopyExtParams() = default;
  DataCopyExtParams(uint16_t count, uint32_t len, uint32_t srcStrideIn, uint32_t dstStrideIn, uint32_t rsvIn)
      : blockCount(count), blockLen(len), srcStride(srcStrideIn), dstStride(dstStrideIn), rsv(rsvIn) {}

  Narrow<uint16_t> blockCount = 1;
  Narrow<uint32_t> blockLen = 0;
  Narrow<uint32_t> srcStride = 0;
  Narrow<uint32_t> dstStride = 0;
  uint32_t rsv = 0;
};

struct DataCopyPadParams {
  DataCopyPadParams() = default;
  DataCopyPadParams(bool isPadValue, uint8_t leftPadValue, uint8_t rightPadValue, uint64_t padValue)
      : isPad(isPadValue), leftPadding(leftPadValue), rightPadding(rightPadValue), paddingValue(padValue) {}

  bool isPad = false;
  Narrow<uint8_t> leftPadding = 0;
  Narrow<uint8_t> rightPadding = 0;
  uint64_t paddingValue = 0;
};

template <typename T>
struct DataCopyPadExtParams {
  DataCopyPadExtParams() = default;
  DataCopyPadExtParams(bool isPadValue, uint8_t leftPadValue, uint8_t rightPadValue, T padValue)
      : isPad(isPadValue), leftPadding(leftPadValue), rightPadding(rightPadValue), paddingValue(padValue) {}

  bool isPad = false;
  Narrow<uint8_t> leftPadding = 0;
  Narrow<uint8_t> rightPadding = 0;
  T paddingValue = T(0);
};

struct MrgSort4Info {
  MrgSort4Info() = default;
  MrgSort4Info(const uint16_t elementLengthsIn[4], bool ifExhaustedSuspensionIn, uint16_t validBitIn,
               uint16_t repeatTimesIn)
      : ifExhaustedSuspension(ifExhaustedSuspensionIn), validBit(validBitIn), repeatTimes(repeatTimesIn) {
    for (int i = 0; i < 4; ++i) {
      elementLengths[i] = elementLengthsIn[i];
    }
  }

  uint16_t elementLengths[4] = {0, 0, 0, 0};
  bool ifExhaustedSuspension = false;
  uint16_t validBit = 0;
  Narrow<uint8_t> repeatTimes = 1;
};

}  // namespace AscendC
