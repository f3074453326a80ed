// Plans a launch of repack_int4: what it takes, and in which tiles.

#pragma once

#include <cstdint>

#include "tiling/repack_int4_tiling.h"

namespace moe_fx::ascendc {

struct RepackInt4Problem {
  Int4Layout layout = Int4Layout::kAwq;
  int64_t experts = 0;
  int64_t inputs = 0;
  int64_t outputs = 0;
  // Where the outputs go among those of a merged result; 0 outputs in all means that the result is not merged.
  int64_t firstOutput = 0;
  int64_t mergedOutputs = 0;
};

// Zero points, int32 [experts, groups, outputs / 8], in AWQ's order or (the other layouts) low nibble first.
struct ZeroPointsProblem {
  bool awqOrder = true;
  int64_t experts = 0;
  int64_t groups = 0;
  int64_t outputs = 0;
  int64_t firstOutput = 0;
  int64_t mergedOutputs = 0;
  int64_t less = 0;  // by how much the stored ones are too small: 1 in GPTQ's first version, 0 elsewhere
};

struct RepackInt4Plan {
  RepackInt4Tiling tiling;
  uint32_t cores;
  uint32_t ubBytes;
};

// Throw std::invalid_argument, saying which limit is passed, where the kernels do not take the problem.
RepackInt4Plan plan_repack_int4(const RepackInt4Problem& problem, uint32_t vectorCores, uint32_t ubBytes);
RepackInt4Plan plan_zero_points(const ZeroPointsProblem& problem, uint32_t vectorCores, uint32_t ubBytes);

}  // namespace moe_fx::ascendc
