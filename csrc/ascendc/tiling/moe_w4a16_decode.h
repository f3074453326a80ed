// Tiling of a layer's int4 experts for a few tokens: how the host computes what the kernel reads.

#pragma once

#include <cstdint>

#include "tiling/moe_w4a16_decode_tiling.h"

namespace moe_fx::ascendc {

struct MoeW4A16DecodeShape {
  uint32_t tokens;
  uint32_t topK;
  uint32_t experts;
  uint32_t hidden;
  uint32_t intermediate;
  uint32_t group;
  bool hasOffset;
};

struct MoeW4A16DecodePlan {
  MoeW4A16DecodeTiling tiling;
  uint64_t workspaceBytes;
  uint32_t unifiedBufferBytes;  // that the kernel uses
};

// Throws std::invalid_argument, saying what does not fit, for a shape that the kernel cannot take.
MoeW4A16DecodePlan plan_moe_w4a16_decode(const MoeW4A16DecodeShape& shape, uint32_t cores,
                                         uint32_t unifiedBufferBytes = kUnifiedBufferBytes);

}  // namespace moe_fx::ascendc
