// Equal work, dealt out evenly: which of a launch's items are this core's.

#pragma once

#include <cstdint>

#include "kernel_operator.h"

namespace moe_fx::ascendc {

struct CoreShare {
  uint32_t first;
  uint32_t count;
};

__aicore__ inline CoreShare ShareOf(uint32_t items) {
  const uint32_t cores = static_cast<uint32_t>(AscendC::GetBlockNum());
  const uint32_t core = static_cast<uint32_t>(AscendC::GetBlockIdx());
  const uint32_t each = items / cores;
  const uint32_t more = items % cores;
  return {core * each + (core < more ? core : more), each + (core < more ? 1 : 0)};
}

}  // namespace moe_fx::ascendc
