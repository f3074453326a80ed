// Memory of the unified buffer that a kernel computes in and keeps for its whole run, and the order between pipes that
// share memory without a queue.

#pragma once

#include <cstdint>

#include "kernel_operator.h"

namespace moe_fx::ascendc {

constexpr uint32_t kBlockBytes = 32;

using LocalBuffer = AscendC::TBuf<AscendC::TPosition::VECCALC>;

__aicore__ inline uint32_t RoundUp(uint32_t value, uint32_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

template <typename T>
__aicore__ inline AscendC::LocalTensor<T> Allot(AscendC::TPipe* pipe, LocalBuffer& buffer, uint32_t count) {
  pipe->InitBuffer(buffer, RoundUp(count * sizeof(T), kBlockBytes));
  return buffer.template Get<T>();
}

// What the event's second pipe does from here on waits for all that its first pipe was given so far.
template <AscendC::HardEvent event>
__aicore__ inline void Order(AscendC::TPipe* pipe) {
  const auto id = pipe->FetchEventID(event);
  AscendC::SetFlag<event>(id);
  AscendC::WaitFlag<event>(id);
}

}  // namespace moe_fx::ascendc
