// What a launch of gemv_w4a16 is told: plain data, for the kernel and the host alike.

#pragma once

#include "tiling/w4a16_tiling.h"

namespace moe_fx::ascendc {

struct GemvW4A16Tiling {
  StreamTiling stream;
  PassTiling pass;
};

}  // namespace moe_fx::ascendc
