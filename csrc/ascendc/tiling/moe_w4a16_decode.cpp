#include "tiling/moe_w4a16_decode.h"

#include <algorithm>

#include "tiling/checks.h"
#include "tiling/w4a16_plan.h"

namespace moe_fx::ascendc {

namespace {

// The widest tile: rows of 512 bytes. Where the buffers of all tokens do not fit beside it, narrower ones are tried.
constexpr uint32_t kMostColumns = 1024;
constexpr uint32_t kLeastColumns = 128;

// Unified buffer that Routing::Init takes.
uint32_t routing_bytes(const MoeW4A16DecodeShape& shape, uint32_t slots) {
  const auto bytes = [](uint32_t words) { return static_cast<uint32_t>(round_up(words * 4, 32)); };
  return bytes(shape.experts) + 2 * bytes(slots) + bytes(slots + 1) + bytes(slots * shape.tokens) +
         bytes(shape.tokens * shape.topK);
}

}  // namespace

MoeW4A16DecodePlan plan_moe_w4a16_decode(const MoeW4A16DecodeShape& shape, uint32_t cores,
                                         uint32_t unifiedBufferBytes) {
  require_product(shape.tokens, shape.group, cores);
  const auto require_groups = [&](uint32_t value, const char* name) {
    require(value > 0 && value % shape.group == 0, name, ": a multiple of the group size is wanted, not ", value);
  };
  require_groups(shape.hidden, "hidden");
  require_groups(shape.intermediate, "intermediate");
  require(shape.experts >= 1, "experts: there are none");
  const uint32_t pairs = shape.tokens * shape.topK;
  require(shape.topK >= 1 && uint64_t{shape.tokens} * shape.topK * 4 <= kPanelLoadBytes, "top_k: 1 to ",
          kPanelLoadBytes / 4 / shape.tokens, " experts a token are taken, not ", shape.topK);

  MoeW4A16DecodePlan plan;
  MoeW4A16DecodeTiling& tiling = plan.tiling;
  tiling.topK = shape.topK;
  tiling.experts = shape.experts;
  tiling.slots = std::min(pairs, shape.experts);
  for (uint32_t most = kMostColumns;; most -= 128) {
    require(most >= kLeastColumns, "the kernel needs ", plan.unifiedBufferBytes, " bytes of unified buffer for ",
            shape.experts, " experts and ", shape.topK, " of them a token; there are ", unifiedBufferBytes);
    tiling.up = plan_pass(shape.hidden, shape.intermediate, 2, most);
    tiling.down = plan_pass(shape.intermediate, shape.hidden, 1, most);
    const uint32_t widest = std::max(tiling.up.tileColumns, tiling.down.tileColumns);
    tiling.stream = plan_stream(shape.tokens, shape.group, shape.hasOffset, widest, cores);
    plan.unifiedBufferBytes = stream_buffer_bytes(tiling.stream) + routing_bytes(shape, tiling.slots);
    if (plan.unifiedBufferBytes <= unifiedBufferBytes) break;
  }
  require_countable(tiling.up, tiling.slots, pairs, cores);
  require_countable(tiling.down, tiling.slots, pairs, cores);
  tiling.downPartials = partial_bytes(tiling.up, tiling.slots * tiling.up.tiles, shape.tokens, cores);
  plan.workspaceBytes = tiling.downPartials + partial_bytes(tiling.down, tiling.down.tiles, shape.tokens, cores);
  return plan;
}

}  // namespace moe_fx::ascendc
