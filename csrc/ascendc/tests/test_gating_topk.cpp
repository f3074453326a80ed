// moe_gating_topk on the host model: expert sets and weights against a reference in double, over the routers of real
// models and odd ones; ties, infinities and NaN; faults, memory and traffic; and what its plan refuses.

#include <doctest/doctest.h>

#include <limits>
#include <map>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "kernel_operator.h"
#include "kernels/moe_gating_topk.h"
#include "routing_reference.h"
#include "tiling/moe_gating_topk.h"

using namespace moe_fx::ascendc;
using namespace moe_fx::ascendc::test;

namespace {

constexpr uint32_t kUbBytes = 196352;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

template <typename T>
double widened(T value) {
  return static_cast<double>(static_cast<float>(value));
}
template <>
double widened(bfloat16_t value) {
  return value.value();
}

struct Result {
  std::vector<float> weights;
  std::vector<int32_t> ids;
  ascendc_model::Report report;
  MoeGatingTopkPlan plan;
};

template <typename T>
Result run(MoeGatingTopkProblem p, const std::vector<T>& logits, const std::vector<float>& bias, uint32_t cores) {
  p.logitBytes = sizeof(T);
  Result result;
  result.plan = plan_moe_gating_topk(p, cores, kUbBytes);
  ascendc_model::Device device(static_cast<int>(cores));
  const auto in = device.input("logits", logits);
  const auto correction = device.input("bias", bias);
  const std::size_t count = p.tokens * p.topK;
  const auto weights = device.output<float>("weights", count);
  const auto ids = device.output<int32_t>("ids", count);
  result.report = device.launch(static_cast<int>(result.plan.cores), [&] {
    MoeGatingTopkBody<T>(in.gm(), p.hasBias ? correction.gm() : nullptr, weights.gm(), ids.gm(), result.plan.tiling);
  });
  result.weights.assign(weights.data(), weights.data() + count);
  result.ids.assign(ids.data(), ids.data() + count);
  return result;
}

bool close(double got, double wanted) {
  if (std::isnan(wanted)) return std::isnan(got);
  return std::abs(got - wanted) <= 1e-6 + 1e-5 * std::abs(wanted);
}

// Runs a router and compares every token; then the report.
template <typename T>
Result check(const MoeGatingTopkProblem& p, const std::vector<T>& logits, const std::vector<float>& bias,
             uint32_t cores = 48) {
  Result got = run(p, logits, bias, cores);
  INFO("tokens ", p.tokens, ", experts ", p.experts, ", k ", p.topK, ", cores ", cores);
  CHECK_MESSAGE(got.report.faults.empty(), got.report);
  CHECK(got.report.peak_ub == got.plan.ubBytes);
  CHECK(got.report.syncs() == 0);
  const uint64_t results = static_cast<uint64_t>(p.tokens) * p.topK * 4;
  CHECK(got.report.traffic["logits"].read == logits.size() * sizeof(T));
  CHECK(got.report.traffic["bias"].read == (p.hasBias ? got.plan.cores * bias.size() * 4 : 0));
  CHECK(got.report.traffic["weights"].written == results);
  CHECK(got.report.traffic["ids"].written == results);

  int64_t unclear = 0;
  for (int64_t token = 0; token < p.tokens; ++token) {
    std::vector<double> values;
    for (int64_t e = 0; e < p.experts; ++e)
      values.push_back(widened(logits[token * p.experts + e]));
    const Routed wanted = route(p, values, bias);
    const std::vector<int32_t> ids(got.ids.begin() + token * p.topK, got.ids.begin() + (token + 1) * p.topK);
    std::map<int32_t, double> weight;
    for (int64_t j = 0; j < p.topK; ++j)
      weight[ids[j]] = got.weights[token * p.topK + j];
    REQUIRE(weight.size() == static_cast<std::size_t>(p.topK));
    // In fp32 two scores may change places that differ by less than their rounding; logits are compared exactly.
    if (got.plan.tiling.selectOnScores == 0) {
      REQUIRE(ids == wanted.ids);
    } else if (wanted.margin < 1e-6) {
      ++unclear;
      continue;
    }
    for (int64_t j = 0; j < p.topK; ++j) {
      INFO("token ", token, ", expert ", wanted.ids[j]);
      REQUIRE(weight.count(wanted.ids[j]) == 1);
      REQUIRE(close(weight[wanted.ids[j]], wanted.weights[j]));
    }
  }
  CHECK(unclear <= 1 + p.tokens / 50);
  return got;
}

template <typename T>
std::vector<T> random(std::size_t count, std::mt19937& rng, float spread = 2.0F) {
  std::normal_distribution<float> normal(0.0F, spread);
  std::vector<T> values;
  for (std::size_t i = 0; i < count; ++i)
    values.push_back(static_cast<T>(normal(rng)));
  return values;
}

std::vector<float> random_bias(const MoeGatingTopkProblem& p, std::mt19937& rng) {
  return random<float>(p.hasBias ? p.experts : 1, rng, 0.1F);
}

MoeGatingTopkProblem qwen3() { return {.experts = 128, .topK = 8, .renormalize = GatingRenormalize::kEps}; }
MoeGatingTopkProblem deepseek_v3() {
  return {.experts = 256,
          .topK = 8,
          .score = GatingScore::kSigmoid,
          .hasBias = true,
          .nGroup = 8,
          .topkGroup = 4,
          .groupByTop2 = true,
          .renormalize = GatingRenormalize::kEps,
          .eps = 1e-20F,
          .scale = 2.5F};
}
MoeGatingTopkProblem minimax_m2() {
  return {.experts = 256,
          .topK = 8,
          .score = GatingScore::kSigmoid,
          .hasBias = true,
          .renormalize = GatingRenormalize::kEps};
}
MoeGatingTopkProblem gpt_oss() { return {.experts = 32, .topK = 4, .scoreAfter = true}; }
MoeGatingTopkProblem deepseek_v2() { return {.experts = 160, .topK = 6, .nGroup = 8, .topkGroup = 3, .scale = 16.0F}; }
MoeGatingTopkProblem deepseek_v4() {
  return {.experts = 256,
          .topK = 6,
          .score = GatingScore::kSqrtSoftplus,
          .hasBias = true,
          .renormalize = GatingRenormalize::kEps,
          .eps = 1e-20F,
          .scale = 1.5F};
}
MoeGatingTopkProblem ernie() {
  return {.experts = 64, .topK = 6, .hasBias = true, .renormalize = GatingRenormalize::kClamp, .eps = 1e-12F};
}
MoeGatingTopkProblem kimi_k2() {
  return {.experts = 384,
          .topK = 8,
          .score = GatingScore::kSigmoid,
          .hasBias = true,
          .renormalize = GatingRenormalize::kEps,
          .eps = 1e-20F,
          .scale = 2.827F};
}

std::string complaint(MoeGatingTopkProblem p) {
  p.tokens = p.tokens == 0 ? 1 : p.tokens;
  try {
    plan_moe_gating_topk(p, 48, kUbBytes);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "none";
}

}  // namespace

TEST_CASE("moe_gating_topk: routers of real models, in every dtype") {
  std::mt19937 rng(1);
  for (MoeGatingTopkProblem p :
       {qwen3(), deepseek_v3(), minimax_m2(), gpt_oss(), deepseek_v2(), deepseek_v4(), ernie(), kimi_k2()}) {
    for (int64_t tokens : {1, 7, 300}) {
      p.tokens = tokens;
      const std::vector<float> bias = random_bias(p, rng);
      check(p, random<bfloat16_t>(tokens * p.experts, rng), bias);
      check(p, random<half>(tokens * p.experts, rng), bias, 40);
      check(p, random<float>(tokens * p.experts, rng), bias, tokens == 300 ? 3 : 48);
    }
  }
}

TEST_CASE("moe_gating_topk: any number of experts and k, any group") {
  std::mt19937 rng(2);
  for (int64_t experts : {1, 5, 31, 60, 72, 129, 160, 257, 384, 511, 512}) {
    for (int64_t k : {int64_t{1}, int64_t{6}, int64_t{9}, int64_t{32}}) {
      if (k > experts) continue;
      MoeGatingTopkProblem p{.tokens = 33, .experts = experts, .topK = k};
      p.score = k == 6 ? GatingScore::kSigmoid : GatingScore::kSoftmax;
      check(p, random<bfloat16_t>(33 * experts, rng), {0.0F}, 5);
      p.hasBias = true;
      check(p, random<half>(33 * experts, rng), random_bias(p, rng), 5);
    }
  }
  struct Groups {
    int64_t experts, count, kept;
  };
  for (const Groups& g : {Groups{64, 8, 3},
                          {12, 3, 2},
                          {192, 2, 1},
                          {320, 5, 3},
                          {512, 8, 4},
                          {512, 16, 1},
                          {100, 4, 4},
                          {60, 10, 7},
                          {256, 2, 1}}) {
    for (bool top2 : {false, true}) {
      for (bool biased : {false, true}) {
        MoeGatingTopkProblem p{.tokens = 29,
                               .experts = g.experts,
                               .topK = 4,
                               .score = GatingScore::kSigmoid,
                               .hasBias = biased,
                               .nGroup = g.count,
                               .topkGroup = g.kept,
                               .groupByTop2 = top2};
        check(p, random<float>(29 * g.experts, rng), random_bias(p, rng), 4);
        p.scoreAfter = !top2;
        check(p, random<float>(29 * g.experts, rng), random_bias(p, rng), 4);
      }
    }
  }
}

TEST_CASE("moe_gating_topk: equal choices go to the lowest ids, zeros of either sign alike") {
  for (int64_t experts : {32, 60, 128, 256, 512}) {
    MoeGatingTopkProblem p{.tokens = 9, .experts = experts, .topK = 8};
    std::vector<bfloat16_t> logits;
    for (int64_t i = 0; i < 9 * experts; ++i)
      logits.push_back(static_cast<bfloat16_t>(i % 3 == 0 ? -0.0F : 0.0F));
    const Result all = check(p, logits, {0.0F});
    CHECK(std::vector<int32_t>(all.ids.begin(), all.ids.begin() + 8) == std::vector<int32_t>{0, 1, 2, 3, 4, 5, 6, 7});
    // A few values only, so that ties cross every run of the sorts.
    std::mt19937 rng(3);
    for (bfloat16_t& logit : logits)
      logit = static_cast<bfloat16_t>(static_cast<float>(rng() % 3));
    check(p, logits, {0.0F});
    p.hasBias = true;
    p.score = GatingScore::kSigmoid;
    check(p, logits, std::vector<float>(experts, 0.25F));
    p.nGroup = 4;
    p.topkGroup = 2;
    for (bool top2 : {false, true}) {
      p.groupByTop2 = top2;
      check(p, logits, std::vector<float>(experts, 0.25F));
    }
  }
}

TEST_CASE("moe_gating_topk: infinities and NaN") {
  // One expert out of the ordinary, then half of them, then all.
  for (MoeGatingTopkProblem p : {qwen3(), deepseek_v3(), gpt_oss(), deepseek_v2(), ernie(), deepseek_v4()}) {
    for (float odd : {kInf, -kInf, kNan}) {
      std::mt19937 rng(4);
      p.tokens = 3;
      std::vector<float> logits = random<float>(3 * p.experts, rng);
      logits[p.experts / 2] = odd;
      for (int64_t e = 0; e < p.experts; e += 2)
        logits[p.experts + e] = odd;
      for (int64_t e = 0; e < p.experts; ++e)
        logits[2 * p.experts + e] = odd;
      check(p, logits, random_bias(p, rng));
    }
  }
  // Experts at minus infinity are still experts: ids stay distinct and within range, also where places lie between.
  MoeGatingTopkProblem p{.tokens = 1, .experts = 12, .topK = 8, .nGroup = 3, .topkGroup = 2};
  std::vector<float> logits(12, -kInf);
  logits[5] = 1.0F;
  const Result got = check(p, logits, {0.0F});
  CHECK(got.ids == std::vector<int32_t>{5, 0, 1, 2, 3, 4, 6, 7});
}

TEST_CASE("moe_gating_topk: every number of tokens") {
  std::mt19937 rng(5);
  for (MoeGatingTopkProblem p : {qwen3(), deepseek_v3()}) {
    const std::vector<float> bias = random_bias(p, rng);
    for (int64_t tokens = 1; tokens <= 300; tokens += tokens < 100 ? 1 : 23) {
      p.tokens = tokens;
      check(p, random<bfloat16_t>(tokens * p.experts, rng), bias, tokens % 2 == 0 ? 48 : 40);
    }
  }
}

TEST_CASE("moe_gating_topk: what the plan refuses") {
  CHECK(complaint(qwen3()) == "none");
  CHECK(complaint({.experts = 513, .topK = 8}) == "moe_gating_topk: experts is 513; it must be between 1 and 512");
  CHECK(complaint({.experts = 128, .topK = 33}) ==
        "moe_gating_topk: top_k is 33; it must be between 1 and 32 for 128 experts");
  CHECK(complaint({.experts = 4, .topK = 5}) ==
        "moe_gating_topk: top_k is 5; it must be between 1 and 4 for 4 experts");
  CHECK(complaint({.tokens = -1, .experts = 4, .topK = 2}) ==
        "moe_gating_topk: tokens is -1; there must be at least one");
  CHECK(complaint({.experts = 100, .topK = 2, .nGroup = 8}) ==
        "moe_gating_topk: n_group is 8, which does not divide 100 experts");
  CHECK(complaint({.experts = 64, .topK = 2, .nGroup = 8, .topkGroup = 9}) ==
        "moe_gating_topk: topk_group is 9; it must be between 1 and n_group, 8");
  CHECK(complaint({.experts = 64, .topK = 9, .nGroup = 8, .topkGroup = 1}) ==
        "moe_gating_topk: top_k is 9, but 1 groups of 8 hold fewer experts");
  CHECK(complaint({.experts = 8, .topK = 1, .nGroup = 8, .topkGroup = 1, .groupByTop2 = true}) ==
        "moe_gating_topk: groups of 1 expert have no two best");
  CHECK(complaint({.experts = 64, .topK = 2, .nGroup = 32, .topkGroup = 2}) ==
        "moe_gating_topk: 32 groups of 2 experts take 1024 places, a multiple of 32 each; at most 512 fit");
  MoeGatingTopkProblem small = qwen3();
  small.tokens = 4096;
  CHECK_THROWS_WITH_AS(plan_moe_gating_topk(small, 48, 65536), doctest::Contains("bytes of UB are needed, 65536"),
                       std::invalid_argument);
}
