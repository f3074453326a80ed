// GlobalTensor and LocalTensor, and the scalar unit's access to single elements.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "model/core.h"
#include "model/enums.h"
#include "model/macros.h"
#include "model/types.h"

namespace AscendC {

template <typename T>
class LocalTensor {
 public:
  using PrimType = T;

  __aicore__ inline LocalTensor() {}
  // At an address of the kernel's choice, without a TPipe. tileSize is in elements.
  __aicore__ inline LocalTensor(TPosition pos, uint32_t addr, uint32_t tileSize) : size_(tileSize), position_(pos) {
    const auto bytes = static_cast<uint32_t>(ascendc_model::bytes_of<T>(tileSize));
    ascendc_model::Core& core = ascendc_model::core();
    if (uint64_t{addr} + bytes > ascendc_model::UnifiedBuffer::kBytes) {
      core.fault(ascendc_model::FaultKind::kUbOverflow, "LocalTensor", "lies past the end of the unified buffer");
    }
    place_ = {addr, addr, addr + bytes, -1, 0};
    core.ub_peak = std::max(core.ub_peak, addr + bytes);
  }
  // The model's own: a tensor over a whole buffer, or a part of one.
  __aicore__ inline LocalTensor(const ascendc_model::Place& place, uint32_t size, TPosition position)
      : place_(place), size_(size), position_(position) {}

  __aicore__ inline LocalTensor operator[](const uint32_t offset) const {
    LocalTensor part = *this;
    part.place_.address += static_cast<uint32_t>(ascendc_model::bytes_of<T>(offset));
    part.size_ = offset < size_ ? size_ - offset : 0;
    return part;
  }

  template <typename U>
  __aicore__ inline LocalTensor<U> ReinterpretCast() const {
    const uint64_t size = uint64_t{size_} * ascendc_model::kBits<T> / ascendc_model::kBits<U>;
    return LocalTensor<U>(place_, static_cast<uint32_t>(size), position_);
  }

  __aicore__ inline PrimType GetValue(const uint32_t index) const {
    static_assert(!std::is_same_v<T, int4b_t>, "int4b_t has no scalar access");
    PrimType value{};
    if (const uint8_t* at = scalar("GetValue", index, false)) std::memcpy(&value, at, sizeof(T));
    return value;
  }
  template <typename S>
  __aicore__ inline void SetValue(const uint32_t index, const S value) const {
    static_assert(!std::is_same_v<T, int4b_t>, "int4b_t has no scalar access");
    const PrimType converted = static_cast<PrimType>(value);
    if (uint8_t* at = scalar("SetValue", index, true)) std::memcpy(at, &converted, sizeof(T));
  }

  __aicore__ inline uint64_t GetPhyAddr() const { return place_.address; }
  __aicore__ inline uint64_t GetPhyAddr(const uint32_t offset) const {
    return place_.address + ascendc_model::bytes_of<T>(offset);
  }
  __aicore__ inline int32_t GetPosition() const { return static_cast<int32_t>(position_); }
  __aicore__ inline void SetSize(const uint32_t size) { size_ = size; }
  __aicore__ inline uint32_t GetSize() const { return size_; }

  const ascendc_model::Place& place() const { return place_; }

 private:
  uint8_t* scalar(const char* op, uint32_t index, bool write) const {
    ascendc_model::Core& core = ascendc_model::core();
    const uint64_t address = place_.address + ascendc_model::bytes_of<T>(index);
    if (!core.valid(op, place_, address, sizeof(T))) return nullptr;
    const auto at = static_cast<uint32_t>(address);
    const uint32_t time = core.clocks.issue(ascendc_model::kScalar);
    ++core.counters.scalar_accesses;
    if (write) {
      core.write_ub(op, ascendc_model::kScalar, time, place_, at, sizeof(T));
    } else {
      core.read_ub(op, ascendc_model::kScalar, time, place_, at, sizeof(T));
    }
    return core.ub.at(at);
  }

  ascendc_model::Place place_;
  uint32_t size_ = 0;
  TPosition position_ = TPosition::VECCALC;
};

template <typename T>
class GlobalTensor {
 public:
  using PrimType = T;

  __aicore__ inline GlobalTensor() {}
  __aicore__ inline void SetGlobalBuffer(__gm__ PrimType* buffer, uint64_t bufferSize) {
    base_ = begin_ = reinterpret_cast<uint8_t*>(buffer);
    end_ = begin_ + ascendc_model::bytes_of<T>(bufferSize);
    size_ = bufferSize;
  }
  __aicore__ inline void SetGlobalBuffer(__gm__ PrimType* buffer) {
    base_ = begin_ = reinterpret_cast<uint8_t*>(buffer);
    end_ = nullptr;
    size_ = 0;
  }
  __aicore__ inline const __gm__ PrimType* GetPhyAddr() const { return reinterpret_cast<PrimType*>(base_); }
  __aicore__ inline __gm__ PrimType* GetPhyAddr(const uint64_t offset) const {
    return reinterpret_cast<PrimType*>(base_ + ascendc_model::bytes_of<T>(offset));
  }
  __aicore__ inline GlobalTensor operator[](const uint64_t offset) const {
    GlobalTensor part = *this;
    part.base_ += ascendc_model::bytes_of<T>(offset);
    part.size_ = offset < size_ ? size_ - offset : 0;
    return part;
  }

  __aicore__ inline PrimType GetValue(const uint64_t offset) const {
    PrimType value{};
    ascendc_model::Core& core = ascendc_model::core();
    const uint8_t* at = base_ + ascendc_model::bytes_of<T>(offset);
    const uint32_t time = core.clocks.issue(ascendc_model::kScalar);
    ++core.counters.scalar_accesses;
    if (within("GetValue", at, sizeof(T)) && core.read_gm("GetValue", ascendc_model::kScalar, time, at, sizeof(T))) {
      std::memcpy(&value, at, sizeof(T));
    }
    return value;
  }
  __aicore__ inline void SetValue(const uint64_t offset, PrimType value) {
    ascendc_model::Core& core = ascendc_model::core();
    uint8_t* at = base_ + ascendc_model::bytes_of<T>(offset);
    const uint32_t time = core.clocks.issue(ascendc_model::kScalar);
    ++core.counters.scalar_accesses;
    if (within("SetValue", at, sizeof(T)) &&
        core.write_gm("SetValue", ascendc_model::kScalar, time, at, sizeof(T), ascendc_model::Atomic::kNone)) {
      std::memcpy(at, &value, sizeof(T));
    }
  }
  __aicore__ inline uint64_t GetSize() const { return size_; }
  template <CacheRwMode rwMode = CacheRwMode::RW>
  __aicore__ inline void SetL2CacheHint(CacheMode) {}

  uint8_t* base() const { return base_; }
  // Whether an access stays in what SetGlobalBuffer named; the launch's buffers are checked apart.
  bool within(const char* op, const uint8_t* at, uint64_t bytes) const {
    if (at >= begin_ && (!end_ || at + bytes <= end_)) return true;
    ascendc_model::core().fault(ascendc_model::FaultKind::kOutOfBounds, op,
                                "touches global memory outside of what SetGlobalBuffer named");
    return false;
  }

 private:
  uint8_t* base_ = nullptr;
  uint8_t* begin_ = nullptr;
  uint8_t* end_ = nullptr;
  uint64_t size_ = 0;
};

}  // namespace AscendC
