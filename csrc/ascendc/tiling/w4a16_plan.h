// What the host's planning of products with int4 weights shares: cutting columns into tiles, and counting buffers.

#pragma once

#include <cstdint>

#include "tiling/w4a16_tiling.h"

namespace moe_fx::ascendc {

// Cuts the columns of one or two spans into tiles of at most `mostColumns`, a multiple of 128, as even as they can be.
PassTiling plan_pass(uint32_t rows, uint32_t spanColumns, uint32_t spans, uint32_t mostColumns);

StreamTiling plan_stream(uint32_t tokens, uint32_t group, bool hasOffset, uint32_t tileColumns, uint32_t cores);

// Unified buffer that W4A16Stream::Init takes.
uint32_t stream_buffer_bytes(const StreamTiling& stream);

// Slots of partial sums that a pass leaves: at most one a segment and core, see w4a16_partition.h.
uint64_t partial_bytes(const PassTiling& pass, uint32_t segments, uint32_t tokens, uint32_t cores);

// The checks that all kernels share. `matrices` and `pairs` bound how many matrices a pass has and how many activation
// rows all of them together.
void require_product(uint32_t tokens, uint32_t group, uint32_t cores);
void require_countable(const PassTiling& pass, uint32_t matrices, uint32_t pairs, uint32_t cores);

}  // namespace moe_fx::ascendc
