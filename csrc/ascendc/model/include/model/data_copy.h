// Copies: global memory to the unified buffer on MTE2, back on MTE3, and within the unified buffer on V.

#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "model/sync.h"
#include "model/vector.h"

namespace ascendc_model {

// Bursts of equal length, with gaps between them on either side. All in bytes.
struct Bursts {
  uint64_t count;
  uint64_t bytes;
  uint64_t source_step;
  uint64_t target_step;
};

// Elements put before and after each burst in the unified buffer. What is then missing to a block is filled with
// dummies.
struct Padding {
  uint64_t left = 0;
  uint64_t right = 0;
  uint64_t element = 1;
  uint64_t value = 0;
};

template <typename T>
bool copyable(const char* op) {
  if constexpr (std::is_same_v<T, AscendC::int4b_t>) {
    core().fault(FaultKind::kInt4Copy, op,
                 "counts int4b_t, which moves twice the bytes; copy as int8_t and ReinterpretCast");
    return false;
  }
  return true;
}

inline bool aligned(const char* op, uint64_t number, const char* what) {
  if (number % UnifiedBuffer::kBlock == 0) return true;
  core().fault(FaultKind::kUnaligned, op,
               std::string(what) + " is " + std::to_string(number) + ", not a multiple of 32");
  return false;
}

template <typename T>
void copy_in(const char* op, const AscendC::LocalTensor<T>& dst, const AscendC::GlobalTensor<T>& src,
             const Bursts& bursts, const Padding& padding) {
  Core& running_core = core();
  const uint32_t time = running_core.clocks.issue(kMte2);
  aligned(op, dst.place().address, "the address in the unified buffer");
  const uint64_t content = padding.left + bursts.bytes + padding.right;
  const uint64_t dummy = (32 - content % 32) % 32;
  for (uint64_t i = 0; i < bursts.count; ++i) {
    const uint8_t* from = src.base() + i * bursts.source_step;
    const uint64_t to = dst.place().address + i * bursts.target_step;
    if (!src.within(op, from, bursts.bytes) || !running_core.read_gm(op, kMte2, time, from, bursts.bytes)) continue;
    if (!running_core.valid(op, dst.place(), to, content + dummy)) continue;
    const auto address = static_cast<uint32_t>(to);
    running_core.write_ub(op, kMte2, time, dst.place(), address, static_cast<uint32_t>(content));
    running_core.scribble_ub(op, kMte2, time, dst.place(), address + static_cast<uint32_t>(content),
                             static_cast<uint32_t>(dummy));
    uint8_t* at = running_core.ub.at(address);
    for (uint64_t byte = 0; byte < padding.left; byte += padding.element) {
      std::memcpy(at + byte, &padding.value, padding.element);
    }
    std::memcpy(at + padding.left, from, bursts.bytes);
    for (uint64_t byte = padding.left + bursts.bytes; byte < content; byte += padding.element) {
      std::memcpy(at + byte, &padding.value, padding.element);
    }
  }
  running_core.counters.mte2_bytes += bursts.count * bursts.bytes;
  running_core.counters.mte2_bursts += bursts.count;
}

// What an atomic store does to one element.
template <typename T>
void combine(uint8_t* into, const uint8_t* from, uint64_t bytes, Atomic atomic) {
  for (uint64_t byte = 0; byte + sizeof(T) <= bytes; byte += sizeof(T)) {
    const Compute<T> old = decode<T>(into + byte);
    const Compute<T> value = decode<T>(from + byte);
    switch (atomic) {
      case Atomic::kAdd: encode<T>(static_cast<Compute<T>>(old + value), into + byte); break;
      case Atomic::kMax: encode<T>(std::max(old, value), into + byte); break;
      case Atomic::kMin: encode<T>(std::min(old, value), into + byte); break;
      case Atomic::kNone: break;
    }
  }
}

template <typename T>
const char* type_name() {
  if constexpr (std::is_same_v<T, float>) return "float";
  if constexpr (std::is_same_v<T, half>) return "half";
  if constexpr (std::is_same_v<T, bfloat16_t>) return "bfloat16_t";
  if constexpr (std::is_same_v<T, int32_t>) return "int32_t";
  if constexpr (std::is_same_v<T, int16_t>) return "int16_t";
  if constexpr (std::is_same_v<T, int8_t>) return "int8_t";
  return "another type";
}

template <typename T>
void copy_out(const char* op, const AscendC::GlobalTensor<T>& dst, const AscendC::LocalTensor<T>& src,
              const Bursts& bursts) {
  Core& running_core = core();
  const uint32_t time = running_core.clocks.issue(kMte3);
  aligned(op, src.place().address, "the address in the unified buffer");
  if (running_core.atomic != Atomic::kNone && std::strcmp(running_core.atomic_type, type_name<T>()) != 0) {
    running_core.fault(
        FaultKind::kAtomicType, op,
        std::string("stores ") + type_name<T>() + " while atomic mode is set for " + running_core.atomic_type);
  }
  for (uint64_t i = 0; i < bursts.count; ++i) {
    const uint64_t from = src.place().address + i * bursts.source_step;
    uint8_t* to = dst.base() + i * bursts.target_step;
    if (!running_core.valid(op, src.place(), from, bursts.bytes)) continue;
    const auto address = static_cast<uint32_t>(from);
    running_core.read_ub(op, kMte3, time, src.place(), address, static_cast<uint32_t>(bursts.bytes));
    if (!dst.within(op, to, bursts.bytes) ||
        !running_core.write_gm(op, kMte3, time, to, bursts.bytes, running_core.atomic)) {
      continue;
    }
    if (running_core.atomic == Atomic::kNone) {
      std::memcpy(to, running_core.ub.at(address), bursts.bytes);
    } else {
      combine<T>(to, running_core.ub.at(address), bursts.bytes, running_core.atomic);
    }
  }
  running_core.counters.mte3_bytes += bursts.count * bursts.bytes;
  running_core.counters.mte3_bursts += bursts.count;
}

inline Bursts in_blocks(const AscendC::DataCopyParams& params) {
  const uint64_t bytes = uint64_t{params.blockLen} * 32;
  return {params.blockCount, bytes, bytes + uint64_t{params.srcGap} * 32, bytes + uint64_t{params.dstGap} * 32};
}

inline bool sensible(const char* op, uint64_t count, uint64_t bytes) {
  if (count >= 1 && count <= 4095 && bytes >= 1 && bytes <= 2097151) return true;
  core().fault(
      FaultKind::kBadArgument, op,
      "has " + std::to_string(count) + " bursts (1..4095) of " + std::to_string(bytes) + " bytes (1..2097151)");
  return false;
}

// A DataCopyPad into the unified buffer: bursts lie there in whole blocks.
template <typename T, typename Params, typename Pad>
void pad_in(const AscendC::LocalTensor<T>& dst, const AscendC::GlobalTensor<T>& src, const Params& params,
            const Pad& pad, uint64_t value) {
  constexpr const char* kOp = "DataCopyPad";
  if (!copyable<T>(kOp) || !sensible(kOp, params.blockCount, params.blockLen)) return;
  Padding padding;
  padding.element = sizeof(T);
  padding.value = value;
  if (pad.isPad) {
    padding.left = pad.leftPadding * sizeof(T);
    padding.right = pad.rightPadding * sizeof(T);
    if (padding.left > 32 || padding.right > 32) {
      core().fault(FaultKind::kBadArgument, kOp, "pads by more than 32 bytes");
      return;
    }
  }
  const uint64_t bytes = params.blockLen;
  const uint64_t in_buffer = (padding.left + bytes + padding.right + 31) / 32 * 32;
  copy_in(kOp, dst, src,
          {params.blockCount, bytes, bytes + uint64_t{params.srcStride}, in_buffer + uint64_t{params.dstStride} * 32},
          padding);
}

template <typename T, typename Params>
void pad_out(const AscendC::GlobalTensor<T>& dst, const AscendC::LocalTensor<T>& src, const Params& params) {
  constexpr const char* kOp = "DataCopyPad";
  if (!copyable<T>(kOp) || !sensible(kOp, params.blockCount, params.blockLen)) return;
  const uint64_t bytes = params.blockLen;
  const uint64_t in_buffer = (bytes + 31) / 32 * 32;
  copy_out(kOp, dst, src,
           {params.blockCount, bytes, in_buffer + uint64_t{params.srcStride} * 32, bytes + uint64_t{params.dstStride}});
}

}  // namespace ascendc_model

namespace AscendC {

template <typename T>
__aicore__ inline void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src,
                                const DataCopyParams& repeatParams) {
  using namespace ascendc_model;
  const Bursts bursts = in_blocks(repeatParams);
  if (copyable<T>("DataCopy") && sensible("DataCopy", bursts.count, bursts.bytes)) {
    copy_in("DataCopy", dst, src, bursts, {});
  }
}

template <typename T>
__aicore__ inline void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src,
                                const DataCopyParams& repeatParams) {
  using namespace ascendc_model;
  const Bursts bursts = in_blocks(repeatParams);
  if (copyable<T>("DataCopy") && sensible("DataCopy", bursts.count, bursts.bytes)) {
    copy_out("DataCopy", dst, src, bursts);
  }
}

template <typename T>
__aicore__ inline void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const uint32_t count) {
  using namespace ascendc_model;
  const uint64_t bytes = count * sizeof(T);
  if (copyable<T>("DataCopy") && sensible("DataCopy", 1, bytes) && aligned("DataCopy", bytes, "the size")) {
    copy_in("DataCopy", dst, src, {1, bytes, 0, 0}, {});
  }
}

template <typename T>
__aicore__ inline void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const uint32_t count) {
  using namespace ascendc_model;
  const uint64_t bytes = count * sizeof(T);
  if (copyable<T>("DataCopy") && sensible("DataCopy", 1, bytes) && aligned("DataCopy", bytes, "the size")) {
    copy_out("DataCopy", dst, src, {1, bytes, 0, 0});
  }
}

template <typename T>
__aicore__ inline void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src,
                                const DataCopyParams& repeatParams) {
  using namespace ascendc_model;
  const Bursts bursts = in_blocks(repeatParams);
  if (copyable<T>("DataCopy") && sensible("DataCopy", bursts.count, bursts.bytes)) {
    copy_within("DataCopy", dst, src, bursts.count, bursts.bytes, bursts.source_step, bursts.target_step);
  }
}

template <typename T>
__aicore__ inline void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const uint32_t count) {
  using namespace ascendc_model;
  const uint64_t bytes = count * sizeof(T);
  if (copyable<T>("DataCopy") && sensible("DataCopy", 1, bytes) && aligned("DataCopy", bytes, "the size")) {
    copy_within("DataCopy", dst, src, 1, bytes, 0, 0);
  }
}

template <typename T>
__aicore__ inline void DataCopyPad(const LocalTensor<T>& dst, const GlobalTensor<T>& src,
                                   const DataCopyParams& dataCopyParams, const DataCopyPadParams& padParams) {
  ascendc_model::pad_in(dst, src, dataCopyParams, padParams, padParams.paddingValue);
}

template <typename T>
__aicore__ inline void DataCopyPad(const LocalTensor<T>& dst, const GlobalTensor<T>& src,
                                   const DataCopyExtParams& dataCopyParams, const DataCopyPadExtParams<T>& padParams) {
  uint64_t value = 0;
  std::memcpy(&value, &padParams.paddingValue, sizeof(T));
  ascendc_model::pad_in(dst, src, dataCopyParams, padParams, value);
}

template <typename T>
__aicore__ inline void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src,
                                   const DataCopyParams& dataCopyParams) {
  ascendc_model::pad_out(dst, src, dataCopyParams);
}

template <typename T>
__aicore__ inline void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src,
                                   const DataCopyExtParams& dataCopyParams) {
  ascendc_model::pad_out(dst, src, dataCopyParams);
}

// Makes the stores that follow, until SetAtomicNone, update global memory instead of replacing it.
template <typename T>
__aicore__ inline void SetAtomicAdd() {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, half> || std::is_same_v<T, bfloat16_t> ||
                    std::is_same_v<T, int32_t> || std::is_same_v<T, int16_t> || std::is_same_v<T, int8_t>,
                "SetAtomicAdd: type");
  ascendc_model::core().atomic = ascendc_model::Atomic::kAdd;
  ascendc_model::core().atomic_type = ascendc_model::type_name<T>();
}
template <typename T>
__aicore__ inline void SetAtomicMax() {
  ascendc_model::core().atomic = ascendc_model::Atomic::kMax;
  ascendc_model::core().atomic_type = ascendc_model::type_name<T>();
}
template <typename T>
__aicore__ inline void SetAtomicMin() {
  ascendc_model::core().atomic = ascendc_model::Atomic::kMin;
  ascendc_model::core().atomic_type = ascendc_model::type_name<T>();
}
__aicore__ inline void SetAtomicNone() { ascendc_model::core().atomic = ascendc_model::Atomic::kNone; }

}  // namespace AscendC
