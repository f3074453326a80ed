// Plans a launch of swiglu_dynamic_quant: how much of how many tokens is computed at a time.

#pragma once

#include <cstdint>

#include "tiling/swiglu_dynamic_quant_tiling.h"

namespace moe_fx::ascendc {

struct SwigluDynamicQuantProblem {
  int64_t tokens = 0;
  int64_t columns = 0;  // I, half of the input's columns
  bool hasLimit = false;
  float limit = 0.0F;  // gate is clamped from above, up on both sides
};

struct SwigluDynamicQuantPlan {
  SwigluDynamicQuantTiling tiling;
  uint32_t cores;
  uint32_t ubBytes;
};

// Throws std::invalid_argument, saying which limit is passed, where the kernel does not take the problem.
SwigluDynamicQuantPlan plan_swiglu_dynamic_quant(const SwigluDynamicQuantProblem& problem, uint32_t vectorCores,
                                                 uint32_t ubBytes);

}  // namespace moe_fx::ascendc
