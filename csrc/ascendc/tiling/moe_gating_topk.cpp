// The plan of moe_gating_topk; see the header and kernels/moe_gating_topk.h.

#include "tiling/moe_gating_topk.h"

#include <algorithm>
#include <bit>

#include "tiling/checks.h"

namespace moe_fx::ascendc {

namespace {

constexpr int64_t kMaxExperts = 512;
constexpr int64_t kMaxTopK = 32;
constexpr int64_t kSortPlaces = 32;    // sorted by one repeat of Sort32
constexpr int64_t kMergePlaces = 128;  // merged by one repeat of MrgSort: four sorted runs
constexpr int64_t kMaxWidth = 4 * kMergePlaces;
// Places in a tile. Every repeat count then fits its eight bits, and the buffers fit UB with room to spare.
constexpr int64_t kTilePlaces = 4096;

void check(const MoeGatingTopkProblem& p) {
  require(p.tokens >= 1, "moe_gating_topk: tokens is ", p.tokens, "; there must be at least one");
  require(p.experts >= 1 && p.experts <= kMaxExperts, "moe_gating_topk: experts is ", p.experts,
          "; it must be between 1 and ", kMaxExperts);
  require(p.topK >= 1 && p.topK <= std::min(kMaxTopK, p.experts), "moe_gating_topk: top_k is ", p.topK,
          "; it must be between 1 and ", std::min(kMaxTopK, p.experts), " for ", p.experts, " experts");
  require(p.logitBytes == 2 || p.logitBytes == 4, "moe_gating_topk: logits have ", p.logitBytes,
          " bytes; they must be bf16, fp16 or fp32");
  require(p.nGroup >= 1 && p.experts % p.nGroup == 0, "moe_gating_topk: n_group is ", p.nGroup,
          ", which does not divide ", p.experts, " experts");
  require(p.topkGroup >= 1 && p.topkGroup <= p.nGroup, "moe_gating_topk: topk_group is ", p.topkGroup,
          "; it must be between 1 and n_group, ", p.nGroup);
  const int64_t groupSize = p.experts / p.nGroup;
  require(p.nGroup == 1 || !p.groupByTop2 || groupSize >= 2, "moe_gating_topk: groups of ", groupSize,
          " expert have no two best");
  require(p.topK <= groupSize * p.topkGroup, "moe_gating_topk: top_k is ", p.topK, ", but ", p.topkGroup, " groups of ",
          groupSize, " hold fewer experts");
}

}  // namespace

MoeGatingTopkPlan plan_moe_gating_topk(const MoeGatingTopkProblem& p, uint32_t vectorCores, uint32_t ubBytes) {
  check(p);
  const bool grouped = p.nGroup > 1;
  const int64_t groupSize = p.experts / p.nGroup;
  const int64_t groupPitch = round_up(groupSize, grouped ? kSortPlaces : kMergePlaces);
  int64_t slots = p.nGroup;
  while (slots * groupPitch % kMergePlaces != 0)
    ++slots;
  const int64_t width = slots * groupPitch;
  require(width <= kMaxWidth, "moe_gating_topk: ", p.nGroup, " groups of ", groupSize, " experts take ", width,
          " places, a multiple of ", kSortPlaces, " each; at most ", kMaxWidth, " fit");

  const int64_t cores = std::min<int64_t>(vectorCores, p.tokens);
  const int64_t tileTokens = std::min(divide_up(p.tokens, cores), kTilePlaces / width);
  const int64_t topKPitch = std::max<int64_t>(8, std::bit_ceil(static_cast<uint64_t>(p.topK)));

  MoeGatingTopkPlan plan{};
  MoeGatingTopkTiling& t = plan.tiling;
  t.tokens = to_word(p.tokens, "moe_gating_topk: tokens");
  t.topK = static_cast<uint32_t>(p.topK);
  t.topKPitch = static_cast<uint32_t>(topKPitch);
  t.topKShift = static_cast<uint32_t>(std::countr_zero(t.topKPitch));
  t.groups = static_cast<uint32_t>(p.nGroup);
  t.groupSize = static_cast<uint32_t>(groupSize);
  t.groupPitch = static_cast<uint32_t>(groupPitch);
  t.width = static_cast<uint32_t>(width);
  t.keptGroups = static_cast<uint32_t>(p.topkGroup);
  t.tileTokens = static_cast<uint32_t>(tileTokens);
  t.score = p.score;
  t.renormalize = p.renormalize;
  t.hasBias = p.hasBias;
  // A sum of two scores is not a sum of two logits, nor is a biased score; the best of a group is the same in both.
  t.selectOnScores = !p.scoreAfter && (p.hasBias || (grouped && p.groupByTop2));
  t.scoreAfter = p.scoreAfter;
  t.groupByTop2 = p.groupByTop2;
  t.eps = p.eps;
  t.scale = p.scale;

  // As MoeGatingTopk::Init allots it.
  const int64_t places = tileTokens * width;
  const int64_t chosen = tileTokens * topKPitch;
  const int64_t tokenLanes = round_up(tileTokens, 8);
  int64_t bytes = 2 * places * p.logitBytes + 2 * 2 * chosen * 4;           // the queues
  bytes += 3 * places * 4 + 2 * places * 8 + round_up(places / 8, 32);      // values, keys, addresses; pairs; bits
  bytes += 3 * chosen * 4 + 2 * width * 4 + tokenLanes * 4 * (1 + 8) + 32;  // the chosen; tables; a value per token
  if (grouped) bytes += 4 * round_up(tileTokens, 2) * kSortPlaces * 4 + width * 4;
  plan.ubBytes = static_cast<uint32_t>(bytes);
  const uint32_t room = std::min(ubBytes, kSelectScratch);
  require(bytes <= room, "moe_gating_topk: ", bytes, " bytes of UB are needed, ", room, " are there");
  plan.cores = static_cast<uint32_t>(cores);
  return plan;
}

}  // namespace moe_fx::ascendc
