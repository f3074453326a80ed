// Plans a launch of moe_gating_topk: which routers it takes, how tokens lie in UB, how many cores work.

#pragma once

#include <cstdint>

#include "tiling/moe_gating_topk_tiling.h"

namespace moe_fx::ascendc {

// A router, as lowering/ops/route.py describes it, scores in fp32, and the other arguments' names are the same.
struct MoeGatingTopkProblem {
  int64_t tokens = 0;
  int64_t experts = 0;
  int64_t topK = 0;
  int64_t logitBytes = 2;  // of one: 2 for bf16 and fp16, 4 for fp32
  GatingScore score = GatingScore::kSoftmax;
  bool scoreAfter = false;
  bool hasBias = false;
  int64_t nGroup = 1;
  int64_t topkGroup = 1;
  bool groupByTop2 = false;
  GatingRenormalize renormalize = GatingRenormalize::kNone;
  float eps = 0.0F;
  float scale = 1.0F;
};

struct MoeGatingTopkPlan {
  MoeGatingTopkTiling tiling;
  uint32_t cores;
  uint32_t ubBytes;
};

// Throws std::invalid_argument, saying which limit is passed, where the kernel does not take the problem.
MoeGatingTopkPlan plan_moe_gating_topk(const MoeGatingTopkProblem& problem, uint32_t vectorCores, uint32_t ubBytes);

}  // namespace moe_fx::ascendc
