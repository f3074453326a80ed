// The plan of swiglu_dynamic_quant; see the header and kernels/swiglu_dynamic_quant.h.

#include "tiling/swiglu_dynamic_quant.h"

#include <algorithm>

#include "tiling/checks.h"

namespace moe_fx::ascendc {

namespace {

constexpr int64_t kLanes = 64;
// Columns times tokens in a tile: what one reduction of 64 results of 64 lanes covers for one token.
constexpr int64_t kTilePlaces = 4096;

}  // namespace

SwigluDynamicQuantPlan plan_swiglu_dynamic_quant(const SwigluDynamicQuantProblem& p, uint32_t vectorCores,
                                                 uint32_t ubBytes) {
  require(p.tokens >= 1, "swiglu_dynamic_quant: tokens is ", p.tokens, "; there must be at least one");
  require(p.columns >= 1, "swiglu_dynamic_quant: columns is ", p.columns, "; there must be at least one");
  require(!p.hasLimit || p.limit >= 0.0F, "swiglu_dynamic_quant: limit is ", p.limit, "; it cannot be negative");

  const int64_t chunk = std::min(p.columns, kTilePlaces);
  const int64_t pitch = round_up(chunk, kLanes);
  const int64_t cores = std::min<int64_t>(vectorCores, p.tokens);
  const int64_t tileTokens = chunk < p.columns ? 1 : std::min(divide_up(p.tokens, cores), kTilePlaces / pitch);

  SwigluDynamicQuantPlan plan{};
  SwigluDynamicQuantTiling& t = plan.tiling;
  t.tokens = to_word(p.tokens, "swiglu_dynamic_quant: tokens");
  t.columns = to_word(p.columns, "swiglu_dynamic_quant: columns");
  t.chunkColumns = static_cast<uint32_t>(chunk);
  t.tileTokens = static_cast<uint32_t>(tileTokens);
  t.hasLimit = p.hasLimit;
  t.limit = p.limit;

  // As SwigluDynamicQuant::Init allots it.
  const int64_t places = tileTokens * pitch;
  const int64_t results = tileTokens * round_up(p.columns, kLanes);
  const int64_t tokenLanes = round_up(tileTokens, 8);
  int64_t bytes = 2 * 2 * places * 2 + 2 * places + 2 * tokenLanes * 4;  // the queues
  bytes += 3 * places * 4 + results * 2;                                 // gate, up, work; the rounded results
  bytes += 3 * tileTokens * kLanes * 4 + tokenLanes * 4 * (3 + 8);       // partial reductions; values per token
  if (p.hasLimit) bytes += round_up(places / 8, 32);
  const uint32_t room = p.hasLimit ? std::min(ubBytes, kSelectScratch) : ubBytes;
  require(bytes <= room, "swiglu_dynamic_quant: ", p.columns, " columns need ", bytes, " bytes of UB, ", room,
          " are there");
  plan.ubBytes = static_cast<uint32_t>(bytes);
  plan.cores = static_cast<uint32_t>(cores);
  return plan;
}

}  // namespace moe_fx::ascendc
