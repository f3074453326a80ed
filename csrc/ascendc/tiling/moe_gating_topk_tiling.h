// What the host tells moe_gating_topk: plain words that the kernel reads as they are.

#pragma once

#include <cstdint>

namespace moe_fx::ascendc {

enum class GatingScore : uint32_t { kSoftmax, kSigmoid, kSqrtSoftplus };
enum class GatingRenormalize : uint32_t { kNone, kEps, kClamp };

struct MoeGatingTopkTiling {
  uint32_t tokens;
  uint32_t topK;
  uint32_t topKPitch;  // places kept for a token's k: the power of two, 8 or more, that holds them
  uint32_t topKShift;  // its logarithm

  // A token's experts lie in UB as `groups` groups of `groupSize` experts, each at `groupPitch` places (a multiple of
  // 32, what one sort takes); places up to `width` (a multiple of 128, what one merge takes) hold minus infinity.
  uint32_t groups;
  uint32_t groupSize;
  uint32_t groupPitch;
  uint32_t width;
  uint32_t keptGroups;

  uint32_t tileTokens;  // tokens computed at a time

  GatingScore score;
  GatingRenormalize renormalize;
  uint32_t hasBias;
  uint32_t selectOnScores;  // else on logits, which every score function leaves in order
  uint32_t scoreAfter;      // select on logits, then score the selected alone
  uint32_t groupByTop2;     // groups rank by the sum of their two best choices, else by the best one
  float eps;
  float scale;
};

}  // namespace moe_fx::ascendc
