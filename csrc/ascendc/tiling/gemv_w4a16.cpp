#include "tiling/gemv_w4a16.h"

#include "tiling/checks.h"
#include "tiling/w4a16_plan.h"

namespace moe_fx::ascendc {

namespace {

// One matrix is little to read, and every core leaves partial sums of all tokens and the columns of a tile. Half the
// columns that the experts' kernel has, rows of 256 bytes, keep these near 4 % of the weights of a 2048 x 5120
// projection at one token; narrower rows cost more in short bursts than they save.
constexpr uint32_t kMostColumns = 512;

// Costs of the matrix before the first and one past it.
constexpr uint32_t kPartitionBytes = 32;

}  // namespace

GemvW4A16Plan plan_gemv_w4a16(const GemvW4A16Shape& shape, uint32_t cores, uint32_t unifiedBufferBytes) {
  require_product(shape.tokens, shape.group, cores);
  require(shape.rows > 0 && shape.rows % shape.group == 0, "rows: a multiple of the group size is wanted, not ",
          shape.rows);
  require(shape.columns > 0 && shape.columns % 32 == 0, "columns: a multiple of 32 is wanted, not ", shape.columns);
  GemvW4A16Plan plan;
  plan.tiling.pass = plan_pass(shape.rows, shape.columns, 1, kMostColumns);
  const PassTiling& pass = plan.tiling.pass;
  plan.tiling.stream = plan_stream(shape.tokens, shape.group, shape.hasOffset, pass.tileColumns, cores);
  plan.unifiedBufferBytes = stream_buffer_bytes(plan.tiling.stream) + kPartitionBytes;
  plan.workspaceBytes = partial_bytes(pass, pass.tiles, shape.tokens, cores);
  require(plan.unifiedBufferBytes <= unifiedBufferBytes, "the kernel needs ", plan.unifiedBufferBytes,
          " bytes of unified buffer, there are ", unifiedBufferBytes);
  require_countable(pass, 1, shape.tokens, cores);
  return plan;
}

}  // namespace moe_fx::ascendc
