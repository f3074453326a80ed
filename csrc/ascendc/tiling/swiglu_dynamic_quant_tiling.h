// What the host tells swiglu_dynamic_quant: plain words that the kernel reads as they are.

#pragma once

#include <cstdint>

namespace moe_fx::ascendc {

struct SwigluDynamicQuantTiling {
  uint32_t tokens;
  uint32_t columns;       // I: of gate, of up and of the result
  uint32_t chunkColumns;  // of a token that are computed at a time: all of them, or else one token at a time
  uint32_t tileTokens;    // tokens computed at a time
  uint32_t hasLimit;
  float limit;
};

}  // namespace moe_fx::ascendc
