// What a launch of moe_w4a16_decode is told: plain data, for the kernel and the host alike.

#pragma once

#include <cstdint>

#include "tiling/w4a16_tiling.h"

namespace moe_fx::ascendc {

struct MoeW4A16DecodeTiling {
  StreamTiling stream;
  PassTiling up;    // x times gate and up: [hidden, 2 intermediate]
  PassTiling down;  // [intermediate, hidden]
  uint32_t topK;
  uint32_t experts;
  uint32_t slots;         // experts that a call can route to
  uint64_t downPartials;  // bytes into the workspace; the partial sums of the up pass come first
};

}  // namespace moe_fx::ascendc
