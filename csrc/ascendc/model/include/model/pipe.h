// TPipe, which hands out the unified buffer and events, and the queues and buffers that kernels get from it.

#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "model/sync.h"

namespace AscendC {

class TPipe;

namespace detail {

constexpr HardEvent event_between(ascendc_model::Pipe source, ascendc_model::Pipe target) {
  for (int event = 0; event < static_cast<int>(HardEvent::MAX); ++event) {
    const auto pipes = ascendc_model::pipes_of(static_cast<HardEvent>(event));
    if (pipes.source == source && pipes.target == target) return static_cast<HardEvent>(event);
  }
  return HardEvent::MAX;
}

// Who fills a queue's buffers and who empties them: MTE2 brings in, MTE3 takes out, V does the rest.
constexpr ascendc_model::Pipe producer(TPosition source) {
  return source == TPosition::GM || source == TPosition::VECIN ? ascendc_model::kMte2 : ascendc_model::kV;
}
constexpr ascendc_model::Pipe consumer(TPosition target) {
  return target == TPosition::GM || target == TPosition::VECOUT ? ascendc_model::kMte3 : ascendc_model::kV;
}

// A TQue's position stands for a pair of them: VECIN is filled from global memory, VECOUT emptied into it.
constexpr TPosition queue_source(TPosition pos) { return pos == TPosition::VECIN ? TPosition::GM : pos; }
constexpr TPosition queue_target(TPosition pos) { return pos == TPosition::VECOUT ? TPosition::GM : pos; }

// Waits for what FreeTensor set, if it did.
inline void settle_free(ascendc_model::Buffer& buffer, const char* op) {
  if (buffer.free_event < 0) return;
  const auto kind = static_cast<HardEvent>(buffer.free_kind);
  ascendc_model::wait_flag(kind, buffer.free_event, ascendc_model::kEventIds, op);
  ascendc_model::release_event(kind, buffer.free_event);
  buffer.free_event = -1;
}

}  // namespace detail

// A queue of buffers from a source position to a target position. EnQue and DeQue order the producer before the
// consumer, FreeTensor and AllocTensor the consumer before the next producer, with events that the pipe allocates.
template <TPosition src, TPosition dst, int32_t depth, auto mask = 0>
class TQueBind {
 public:
  __aicore__ inline TQueBind() {}

  template <typename T>
  __aicore__ inline LocalTensor<T> AllocTensor() {
    using namespace ascendc_model;
    // The buffers are taken in turn, so that double buffering alternates.
    for (std::size_t tried = 0; tried < slots_.size(); ++tried) {
      Slot& slot = slots_[next_];
      Buffer& buffer = core().buffers[slot.buffer];
      next_ = (next_ + 1) % slots_.size();
      if (buffer.state != BufferState::kFree) continue;
      detail::settle_free(buffer, "AllocTensor");
      buffer.state = BufferState::kOccupied;
      ++buffer.generation;
      core().ub.mark_unwritten(buffer.begin, buffer.bytes);
      return tensor<T>(slot);
    }
    core().fault(FaultKind::kDoubleAlloc, "AllocTensor",
                 "all " + std::to_string(slots_.size()) + " buffers of the queue are in use: FreeTensor is missing");
    if (slots_.empty()) return LocalTensor<T>();
    // Goes on as if FreeTensor had been there, so that one mistake is one fault.
    Slot& slot = slots_[next_];
    next_ = (next_ + 1) % slots_.size();
    core().clocks.wait(kProducer, core().clocks.flag(kConsumer));
    core().buffers[slot.buffer].state = BufferState::kOccupied;
    ++core().buffers[slot.buffer].generation;
    return tensor<T>(slot);
  }
  template <typename T>
  __aicore__ inline void AllocTensor(LocalTensor<T>& tensor) {
    tensor = AllocTensor<T>();
  }

  template <typename T>
  __aicore__ inline bool EnQue(const LocalTensor<T>& tensor) {
    using namespace ascendc_model;
    Slot* slot = slot_of(tensor, "EnQue");
    if (!slot) return false;
    Buffer& buffer = core().buffers[slot->buffer];
    if (buffer.state != BufferState::kOccupied && buffer.state != BufferState::kDequeued) {
      core().fault(FaultKind::kQueueMisuse, "EnQue", "buffer " + std::to_string(slot->buffer) + " is not in use");
      return false;
    }
    if (static_cast<int>(queue_.size()) >= (depth > 0 ? depth : 1)) {
      core().fault(FaultKind::kQueueMisuse, "EnQue",
                   "the queue of depth " + std::to_string(depth) + " is full: DeQue is missing");
    }
    if constexpr (kOrdersPipes) {
      slot->queue_event = allocate_event(kQueueEvent, "EnQue");
      set_flag(kQueueEvent, slot->queue_event, kEventIds, "EnQue");
    }
    buffer.state = BufferState::kQueued;
    queue_.push_back(static_cast<std::size_t>(slot - slots_.data()));
    return true;
  }

  template <typename T>
  __aicore__ inline LocalTensor<T> DeQue() {
    using namespace ascendc_model;
    if (queue_.empty()) {
      core().fault(FaultKind::kQueueMisuse, "DeQue", "the queue is empty: EnQue is missing");
      core().clocks.wait(kConsumer, core().clocks.flag(kProducer));
      for (Slot& slot : slots_) {
        if (core().buffers[slot.buffer].state == BufferState::kOccupied) return tensor<T>(slot);
      }
      return slots_.empty() ? LocalTensor<T>() : tensor<T>(slots_[0]);
    }
    Slot& slot = slots_[queue_.front()];
    queue_.pop_front();
    if constexpr (kOrdersPipes) {
      wait_flag(kQueueEvent, slot.queue_event, kEventIds, "DeQue");
      release_event(kQueueEvent, slot.queue_event);
    }
    core().buffers[slot.buffer].state = BufferState::kDequeued;
    return tensor<T>(slot);
  }
  template <typename T>
  __aicore__ inline void DeQue(LocalTensor<T>& tensor) {
    tensor = DeQue<T>();
  }

  template <typename T>
  __aicore__ inline void FreeTensor(LocalTensor<T>& tensor) {
    using namespace ascendc_model;
    Slot* slot = slot_of(tensor, "FreeTensor");
    if (!slot) return;
    Buffer& buffer = core().buffers[slot->buffer];
    if (buffer.state != BufferState::kOccupied && buffer.state != BufferState::kDequeued) {
      core().fault(FaultKind::kQueueMisuse, "FreeTensor", "buffer " + std::to_string(slot->buffer) + " is not in use");
      return;
    }
    if constexpr (kOrdersPipes) {
      buffer.free_kind = static_cast<int>(kFreeEvent);
      buffer.free_event = allocate_event(kFreeEvent, "FreeTensor");
      set_flag(kFreeEvent, buffer.free_event, kEventIds, "FreeTensor");
    }
    buffer.state = BufferState::kFree;
  }

  __aicore__ inline bool VacantInQue() { return static_cast<int>(queue_.size()) < (depth > 0 ? depth : 1); }
  __aicore__ inline bool HasTensorInQue() { return !queue_.empty(); }
  __aicore__ inline int32_t GetTensorCountInQue() { return static_cast<int32_t>(queue_.size()); }
  __aicore__ inline bool HasIdleBuffer() {
    for (const Slot& slot : slots_) {
      if (ascendc_model::core().buffers[slot.buffer].state == ascendc_model::BufferState::kFree) return true;
    }
    return false;
  }
  // Waits for every free buffer's event, after which the queue's events are the kernel's again.
  __aicore__ inline void FreeAllEvent() {
    for (const Slot& slot : slots_) {
      detail::settle_free(ascendc_model::core().buffers[slot.buffer], "FreeAllEvent");
    }
  }

 protected:
  friend class TPipe;

  static constexpr ascendc_model::Pipe kProducer = detail::producer(src);
  static constexpr ascendc_model::Pipe kConsumer = detail::consumer(dst);
  static constexpr bool kOrdersPipes = kProducer != kConsumer;
  static constexpr HardEvent kQueueEvent = detail::event_between(kProducer, kConsumer);
  static constexpr HardEvent kFreeEvent = detail::event_between(kConsumer, kProducer);

  struct Slot {
    int32_t buffer;
    int queue_event = -1;
  };

  template <typename T>
  LocalTensor<T> tensor(const Slot& slot) const {
    const ascendc_model::Buffer& buffer = ascendc_model::core().buffers[slot.buffer];
    const ascendc_model::Place place{buffer.begin, buffer.begin, buffer.begin + buffer.bytes, slot.buffer,
                                     buffer.generation};
    return LocalTensor<T>(place, static_cast<uint32_t>(uint64_t{buffer.bytes} * 8 / ascendc_model::kBits<T>),
                          src == TPosition::GM ? TPosition::VECIN : TPosition::VECOUT);
  }

  template <typename T>
  Slot* slot_of(const LocalTensor<T>& tensor, const char* op) {
    using namespace ascendc_model;
    for (Slot& slot : slots_) {
      if (slot.buffer != tensor.place().buffer) continue;
      const Buffer& buffer = core().buffers[slot.buffer];
      if (buffer.generation != tensor.place().generation) {
        core().fault(FaultKind::kStaleBuffer, op, "is given a tensor of before FreeTensor");
        return nullptr;
      }
      return &slot;
    }
    core().fault(FaultKind::kQueueMisuse, op, "is given a tensor of another queue");
    return nullptr;
  }

  std::vector<Slot> slots_;
  std::deque<std::size_t> queue_;
  std::size_t next_ = 0;
};

template <TPosition pos, int32_t depth, auto mask = 0>
class TQue : public TQueBind<detail::queue_source(pos), detail::queue_target(pos), depth, mask> {
 public:
  __aicore__ inline TQue() = default;
};

// A buffer without events: whoever uses it orders the pipes himself.
template <TPosition pos = TPosition::LCM>
class TBuf {
 public:
  __aicore__ inline TBuf() = default;
  template <typename T>
  __aicore__ inline LocalTensor<T> Get() {
    return GetWithOffset<T>(static_cast<uint32_t>(uint64_t{bytes()} * 8 / ascendc_model::kBits<T>), 0);
  }
  template <typename T>
  __aicore__ inline LocalTensor<T> Get(uint32_t len) {
    return GetWithOffset<T>(len, 0);
  }
  // size in elements, bufOffset in bytes.
  template <typename T>
  __aicore__ inline LocalTensor<T> GetWithOffset(uint32_t size, uint32_t bufOffset) {
    using namespace ascendc_model;
    if (buffer_ < 0) {
      core().fault(FaultKind::kBadArgument, "TBuf::Get", "InitBuffer is missing");
      return LocalTensor<T>();
    }
    const Buffer& buffer = core().buffers[buffer_];
    const uint64_t end = bufOffset + bytes_of<T>(size);
    if (end > buffer.bytes) {
      core().fault(FaultKind::kOutOfBounds, "TBuf::Get",
                   "asks for " + std::to_string(end) + " bytes of " + std::to_string(buffer.bytes));
    }
    const Place place{buffer.begin + bufOffset, buffer.begin, buffer.begin + buffer.bytes, buffer_, buffer.generation};
    return LocalTensor<T>(place, size, pos);
  }

 private:
  friend class TPipe;

  uint32_t bytes() const { return buffer_ < 0 ? 0 : ascendc_model::core().buffers[buffer_].bytes; }

  int32_t buffer_ = -1;
};

class TPipe {
 public:
  __aicore__ inline TPipe() { Init(); }
  // Kernels that end early, or pipes that follow each other: what the queues wait for is over when the pipe goes.
  __aicore__ inline ~TPipe() { Destroy(); }
  __aicore__ inline void Init() { ascendc_model::core().pipe = this; }
  __aicore__ inline void Destroy() {
    if (alive_) Reset();
    alive_ = false;
  }
  __aicore__ inline void Reset() {
    ascendc_model::Core& core = ascendc_model::core();
    for (ascendc_model::Buffer& buffer : core.buffers) {
      detail::settle_free(buffer, "TPipe::Reset");
      ++buffer.generation;
    }
    core.clocks.barrier();
    core.ub_used = 0;
    count_ = 0;
  }

  template <class T>
  __aicore__ inline bool InitBuffer(T& que, uint8_t num, uint32_t len) {
    if (num == 0) {
      ascendc_model::core().fault(ascendc_model::FaultKind::kBadArgument, "InitBuffer", "num is 0");
      return false;
    }
    que.slots_.clear();
    que.queue_.clear();
    que.next_ = 0;
    for (int i = 0; i < num; ++i) {
      const int32_t buffer = take(len, ascendc_model::BufferState::kFree);
      if (buffer < 0) return false;
      que.slots_.push_back({buffer});
    }
    return true;
  }
  template <TPosition pos>
  __aicore__ inline bool InitBuffer(TBuf<pos>& buf, uint32_t len) {
    buf.buffer_ = take(len, ascendc_model::BufferState::kFixed);
    return buf.buffer_ >= 0;
  }

  template <HardEvent evt>
  __aicore__ inline TEventID AllocEventID() {
    return user_event(ascendc_model::allocate_event(evt, "AllocEventID"), "AllocEventID");
  }
  template <HardEvent evt>
  __aicore__ inline void ReleaseEventID(TEventID id) {
    if (id < 0 || id >= ascendc_model::kEventIds) {
      ascendc_model::core().fault(ascendc_model::FaultKind::kEventRange, "ReleaseEventID",
                                  "event id " + std::to_string(id));
      return;
    }
    ascendc_model::release_event(evt, id);
  }
  // An id that is free now. It stays free: two fetches without a set between give the same.
  template <HardEvent evt>
  __aicore__ inline TEventID FetchEventID() {
    return FetchEventID(evt);
  }
  __aicore__ inline TEventID FetchEventID(HardEvent evt) {
    return user_event(ascendc_model::free_event(evt), "FetchEventID");
  }

 private:
  static TEventID user_event(int id, const char* op) {
    if (id < 0 || id >= ascendc_model::kUserEvents) {
      ascendc_model::core().fault(ascendc_model::FaultKind::kEventRange, op,
                                  "no event id below " + std::to_string(ascendc_model::kUserEvents) + " is free");
      return 0;
    }
    return static_cast<TEventID>(id);
  }

  int32_t take(uint32_t len, ascendc_model::BufferState state) {
    using namespace ascendc_model;
    Core& running_core = core();
    const uint64_t bytes = (uint64_t{len} + 31) / 32 * 32;
    if (bytes == 0) {
      running_core.fault(FaultKind::kBadArgument, "InitBuffer", "len is 0");
      return -1;
    }
    if (++count_ > kMostBuffers) {
      running_core.fault(FaultKind::kUbOverflow, "InitBuffer",
                         "more than " + std::to_string(kMostBuffers) + " buffers in a pipe");
      return -1;
    }
    if (running_core.ub_used + bytes > UnifiedBuffer::kBytes) {
      running_core.fault(FaultKind::kUbOverflow, "InitBuffer",
                         std::to_string(running_core.ub_used + bytes) + " bytes of " +
                             std::to_string(UnifiedBuffer::kBytes) + " in the unified buffer");
      return -1;
    }
    const uint32_t begin = running_core.ub_used;
    running_core.ub_used += static_cast<uint32_t>(bytes);
    running_core.ub_peak = std::max(running_core.ub_peak, running_core.ub_used);
    running_core.ub.mark_unwritten(begin, static_cast<uint32_t>(bytes));
    running_core.buffers.push_back({begin, static_cast<uint32_t>(bytes), state});
    return static_cast<int32_t>(running_core.buffers.size() - 1);
  }

  static constexpr int kMostBuffers = 64;

  int count_ = 0;
  bool alive_ = true;
};

}  // namespace AscendC

__aicore__ inline AscendC::TPipe* GetTPipePtr() { return static_cast<AscendC::TPipe*>(ascendc_model::core().pipe); }
