// Tiling of the dense product of a few tokens with int4 weights: how the host computes what the kernel reads.

#pragma once

#include <cstdint>

#include "tiling/gemv_w4a16_tiling.h"

namespace moe_fx::ascendc {

// x [tokens, rows] times int4 [rows, columns].
struct GemvW4A16Shape {
  uint32_t tokens;
  uint32_t rows;
  uint32_t columns;
  uint32_t group;
  bool hasOffset;
};

struct GemvW4A16Plan {
  GemvW4A16Tiling tiling;
  uint64_t workspaceBytes;
  uint32_t unifiedBufferBytes;  // that the kernel uses
};

// Throws std::invalid_argument, saying what does not fit, for a shape that the kernel cannot take.
GemvW4A16Plan plan_gemv_w4a16(const GemvW4A16Shape& shape, uint32_t cores,
                              uint32_t unifiedBufferBytes = kUnifiedBufferBytes);

}  // namespace moe_fx::ascendc
