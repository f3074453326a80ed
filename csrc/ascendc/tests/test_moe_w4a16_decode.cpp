// moe_w4a16_decode on the host model against experts in double: shapes of published models, routings, extremes,
// traffic; and that mistakes a kernel could make are larger than the bounds it is held to.

#include <doctest/doctest.h>

#include <set>
#include <stdexcept>
#include <string>
#include <tuple>

#include "kernels/moe_w4a16_decode.h"
#include "model/launch.h"
#include "tests/w4a16_support.h"
#include "tiling/moe_w4a16_decode.h"

namespace moe_fx::ascendc::test {
namespace {

// Which experts the tokens choose.
enum class Choice { random, distinct, shared };

// T: of activations, scales and results; W: of routing weights.
template <typename T, typename W = float>
struct Experts {
  MoeW4A16DecodeShape shape;
  std::vector<T> x;
  std::vector<W> weights;
  std::vector<int32_t> ids;
  Int4Matrices<T> w13, w2;

  explicit Experts(const MoeW4A16DecodeShape& given, Choice choice = Choice::random,
                   const std::vector<float>& factors = {}, float spread = 0.5F, unsigned seed = 1)
      : shape(given) {
    Random random(seed);
    x = random_rows<T>(random, shape.tokens, shape.hidden, factors);
    w13 = random_matrices<T>(random, shape.experts, shape.hidden, 2 * shape.intermediate, shape.group, shape.hasOffset,
                             spread);
    w2 = random_matrices<T>(random, shape.experts, shape.intermediate, shape.hidden, shape.group, shape.hasOffset,
                            spread);
    std::vector<int32_t> order(shape.experts);
    for (uint32_t e = 0; e < shape.experts; ++e) {
      order[e] = static_cast<int32_t>(e);
    }
    for (uint32_t t = 0; t < shape.tokens; ++t) {
      if (choice == Choice::random) std::shuffle(order.begin(), order.end(), random);
      for (uint32_t k = 0; k < shape.topK; ++k) {
        ids.push_back(order[(choice == Choice::distinct ? t * shape.topK + k : k) % shape.experts]);
        weights.push_back(W(uniform(random, 0.05F, 1.0F)));
      }
    }
  }

  std::set<int32_t> used() const {
    std::set<int32_t> result(ids.begin(), ids.end());
    result.erase(-1);
    return result;
  }

  std::vector<std::vector<double>> reference() const {
    std::vector<std::vector<double>> y(shape.tokens, std::vector<double>(shape.hidden, 0.0));
    for (const int32_t expert : used()) {
      std::vector<uint32_t> pairs;
      std::vector<std::vector<double>> rows;
      for (uint32_t p = 0; p < ids.size(); ++p) {
        if (ids[p] != expert) continue;
        pairs.push_back(p);
        rows.push_back(numbers(x.data() + std::size_t{p / shape.topK} * shape.hidden, shape.hidden));
      }
      std::vector<std::vector<double>> activations;
      for (const auto& both : w13.times(static_cast<uint32_t>(expert), rows)) {
        std::vector<double> row(shape.intermediate);
        for (uint32_t i = 0; i < shape.intermediate; ++i) {
          row[i] = both[i] / (1.0 + std::exp(-both[i])) * both[shape.intermediate + i];
        }
        activations.push_back(row);
      }
      const auto products = w2.times(static_cast<uint32_t>(expert), activations);
      for (std::size_t i = 0; i < pairs.size(); ++i) {
        for (uint32_t c = 0; c < shape.hidden; ++c) {
          y[pairs[i] / shape.topK][c] += number(weights[pairs[i]]) * products[i][c];
        }
      }
    }
    return y;
  }
};

template <typename T>
struct Outcome {
  ascendc_model::Report report;
  std::vector<T> y;
  MoeW4A16DecodePlan plan;
};

template <typename T, typename W>
Outcome<T> run(const Experts<T, W>& problem, int cores = 48) {
  Outcome<T> outcome;
  outcome.plan = plan_moe_w4a16_decode(problem.shape, cores);
  ascendc_model::Device device(cores);
  const auto attached = [&](const char* name, const auto& values) {
    device.attach(name, values.data(), values.size() * sizeof(values[0]), ascendc_model::Access::kInput);
    return reinterpret_cast<GM_ADDR>(const_cast<void*>(static_cast<const void*>(values.data())));
  };
  const auto x = device.input("x", problem.x);
  const auto weights = device.input("weights", problem.weights);
  const auto ids = device.input("ids", problem.ids);
  // Large: not copied.
  const GM_ADDR w13 = attached("w13", problem.w13.packed);
  const GM_ADDR w2 = attached("w2", problem.w2.packed);
  const auto w13_scale = device.input("w13_scale", problem.w13.scale);
  const auto w2_scale = device.input("w2_scale", problem.w2.scale);
  const auto w13_offset = device.input("w13_offset", problem.w13.offset);
  const auto w2_offset = device.input("w2_offset", problem.w2.offset);
  const auto y = device.output<T>("y", problem.x.size());
  const auto workspace = device.output<uint8_t>("workspace", outcome.plan.workspaceBytes);
  outcome.report = device.launch(cores, [&] {
    MoeW4A16Decode<T, W>(x.gm(), weights.gm(), ids.gm(), w13, w13_scale.gm(), w13_offset.gm(), w2, w2_scale.gm(),
                         w2_offset.gm(), y.gm(), workspace.gm(), outcome.plan.tiling);
  });
  outcome.y.assign(y.data(), y.data() + y.size());
  return outcome;
}

// Two roundings to a type with a narrow mantissa are left: of the activations between the products to half, and of y to
// T. Either is at most half a unit in the last place, of which the mean over many values is about 0.42: together 0.6 of
// half's for T = half, up to all of it where there are few values, and 0.42 of bf16's.
template <typename T>
constexpr double kBound = kRoundoff<T> / 2;
template <>
constexpr double kBound<half> = kRoundoff<half>;

template <typename T, typename W>
Outcome<T> check(const Experts<T, W>& problem, int cores = 48) {
  CAPTURE(problem.shape.tokens);
  CAPTURE(problem.shape.topK);
  CAPTURE(problem.shape.hidden);
  CAPTURE(problem.shape.intermediate);
  CAPTURE(problem.shape.group);
  CAPTURE(problem.shape.hasOffset);
  CAPTURE(cores);
  Outcome<T> outcome = run(problem, cores);
  const auto& report = outcome.report;
  CHECK_MESSAGE(report.faults.empty(), report);
  CHECK(worst_row(outcome.y.data(), problem.reference()) <= kBound<T>);
  const std::size_t used = problem.used().size();
  CHECK(report.syncs() == (used ? 2 : 0));
  CHECK(report.peak_ub == outcome.plan.unifiedBufferBytes);
  CHECK(report.peak_ub <= kUnifiedBufferBytes);
  // The weights of each expert in use are read once.
  const auto read = [&](const char* name) {
    const auto found = report.traffic.find(name);
    return found == report.traffic.end() ? 0 : found->second.read;
  };
  CHECK(read("w13") == used * problem.w13.bytes_each());
  CHECK(read("w2") == used * problem.w2.bytes_each());
  return outcome;
}

TEST_CASE("experts: shapes of published models") {
  for (const auto& [hidden, intermediate] : {std::tuple{2048u, 768u},  // Qwen3-30B-A3B
                                             {4096u, 1536u},           // Qwen3-235B-A22B
                                             {3072u, 1536u}}) {        // MiniMax-M2
    check(Experts<bfloat16_t>({1, 2, 2, hidden, intermediate, 128, false}));
    check(Experts<half>({3, 2, 3, hidden, intermediate, 32, true}), 40);
  }
  check(Experts<bfloat16_t>({1, 1, 1, 7168, 2048, 128, true}));  // DeepSeek-V3
  check(Experts<half>({8, 1, 2, 7168, 2048, 64, false}, Choice::shared), 40);
}

TEST_CASE("experts: shapes of published models at 1 to 8 tokens, in every group size with and without offsets") {
  for (const auto& [hidden, intermediate] : {std::tuple{2048u, 768u}, {4096u, 1536u}, {3072u, 1536u}, {7168u, 2048u}}) {
    for (uint32_t tokens = 1; tokens <= kMaxTokens; ++tokens) {
      const MoeW4A16DecodeShape shape{tokens, 1, 1, hidden, intermediate, 32u << tokens % 3, tokens % 2 == 0};
      if (tokens % 4 < 2) {
        check(Experts<bfloat16_t>(shape));
      } else {
        check(Experts<half>(shape), 40);
      }
    }
  }
}

TEST_CASE("experts: tokens, groups, offsets and types") {
  for (uint32_t tokens = 1; tokens <= kMaxTokens; ++tokens) {
    for (const uint32_t group : {32u, 64u, 128u}) {
      for (const bool offset : {false, true}) {
        check(Experts<bfloat16_t>({tokens, 3, 7, 256, 384, group, offset}));
      }
      check(Experts<half>({tokens, 2, 5, 384, 128, group, tokens % 2 == 1}), 40);
    }
  }
  check(Experts<bfloat16_t, bfloat16_t>({2, 3, 7, 256, 128, 128, true}));
  check(Experts<half, half>({2, 3, 7, 256, 128, 128, true}));
}

TEST_CASE("experts: odd multiples of 32, tiles that end early, few cores, more cores than work") {
  for (const auto& [hidden, intermediate, cores] : {std::tuple{32u, 32u, 48},
                                                    {96u, 160u, 40},
                                                    {2080u, 96u, 48},
                                                    {160u, 2144u, 48},
                                                    {1056u, 1120u, 7},
                                                    {96u, 32u, 1},
                                                    {1312u, 1312u, 63}}) {
    check(Experts<half>({2, 2, 3, hidden, intermediate, 32, true}), cores);
    check(Experts<bfloat16_t>({5, 3, 4, hidden, intermediate, 32, false}), cores);
  }
  check(Experts<half>({2, 2, 3, 1216, 1088, 64, true}));
}

TEST_CASE("experts: routings") {
  const MoeW4A16DecodeShape shape{8, 4, 40, 256, 256, 64, true};
  check(Experts<half>(shape, Choice::distinct));
  check(Experts<half>(shape, Choice::shared));

  // Some ids are -1; one token has no expert at all, and its y is zero.
  Experts<half> some(shape);
  for (uint32_t p = 0; p < some.ids.size(); p += 3) {
    some.ids[p] = -1;
  }
  std::fill_n(some.ids.begin() + 2 * shape.topK, shape.topK, -1);
  check(some);

  // Nobody has one: y is zero, and no core waits for another.
  for (const bool one : {true, false}) {
    Experts<bfloat16_t> none({one ? 1u : 8u, 4, 40, 2080, 256, 32, true});
    std::fill(none.ids.begin(), none.ids.end(), -1);
    check(none);
  }

  // A token that names an expert more than once, in one place or in all.
  Experts<half> twice(shape);
  for (uint32_t p = 0; p + 1 < twice.ids.size(); p += 4) {
    twice.ids[p + 1] = twice.ids[p];
  }
  std::fill_n(twice.ids.begin() + 4, 4, 7);
  check(twice);

  // More choices than experts.
  check(Experts<half>({3, 6, 2, 128, 128, 32, false}));
}

TEST_CASE("experts: activations, scales and weights of any magnitude") {
  // Tokens far apart share experts; what one of them loses must not be judged by another.
  check(Experts<bfloat16_t>({5, 2, 3, 256, 256, 64, true}, Choice::shared, {0x1p-60F, 1.0F, 0x1p40F, 0x1p-20F, 0.0F}));
  check(Experts<half>({4, 2, 3, 256, 256, 64, true}, Choice::shared, {0x1p-6F, 50.0F, 1.0F, 0.0F}));
  // Scales over 24 powers of two, group by group and column by column.
  check(Experts<bfloat16_t>({2, 2, 3, 256, 256, 32, true}, Choice::random, {}, 12.0F));
  check(Experts<half>({2, 2, 3, 256, 256, 32, false}, Choice::random, {}, 5.0F));
  // Gates far below zero, where the exponential overflows.
  Experts<bfloat16_t> closed({1, 1, 1, 256, 256, 64, false}, Choice::random, {300.0F});
  check(closed);
}

TEST_CASE("experts: the same call gives the same bits") {
  const MoeW4A16DecodeShape shape{4, 3, 6, 512, 384, 128, true};
  const Experts<bfloat16_t> problem(shape);
  const auto bits = [](const std::vector<bfloat16_t>& values) {
    std::vector<uint16_t> result;
    for (const bfloat16_t value : values) {
      result.push_back(value.bits());
    }
    return result;
  };
  CHECK(bits(run(problem).y) == bits(run(problem).y));
}

TEST_CASE("experts: Qwen3-30B-A3B moves little more than the least there can be, and shares it out evenly") {
  for (const uint32_t tokens : {1u, 2u, 4u, 8u}) {
    CAPTURE(tokens);
    const Experts<bfloat16_t> problem({tokens, 8, 128, 2048, 768, 128, false});
    const auto report = run(problem).report;
    CHECK_MESSAGE(report.faults.empty(), report);
    const std::size_t each = problem.w13.bytes_each() + problem.w13.scale_bytes_each() + problem.w2.bytes_each() +
                             problem.w2.scale_bytes_each();
    const std::size_t least = problem.used().size() * each + 2 * problem.x.size() * sizeof(bfloat16_t);
    CHECK(static_cast<double>(report.total.mte2_bytes + report.total.mte3_bytes) / static_cast<double>(least) <= 1.05);
    // Both products; tokens share some of the experts.
    for (const std::size_t phase : {0, 1}) {
      const auto& work = report.phases.at(phase);
      const double mean = static_cast<double>(work.total.vector_repeats) / report.blocks;
      CHECK(static_cast<double>(work.most.vector_repeats) / mean <= 1.08);
    }
  }
}

// What a kernel could get wrong, done to its inputs: each is far outside the bound.
TEST_CASE("experts: the bound tells mistakes from rounding") {
  const Experts<half> right({2, 2, 3, 256, 256, 64, true}, Choice::shared);
  const auto reference = right.reference();
  const auto error_of = [&](auto change) {
    Experts<half> wrong = right;
    change(wrong);
    return worst_row(run(wrong).y.data(), reference) / kBound<half>;
  };
  CHECK(error_of([](auto&) {}) <= 1.0);
  const auto swap_nibbles = [](int32_t word) {
    const auto bits = static_cast<uint32_t>(word);
    return static_cast<int32_t>((bits & 0x0f0f0f0fu) << 4 | (bits >> 4 & 0x0f0f0f0fu));
  };
  // High nibble first, in one row of one expert.
  CHECK(error_of([&](auto& e) {
          std::transform(e.w13.packed.begin(), e.w13.packed.begin() + 64, e.w13.packed.begin(), swap_nibbles);
        }) > 20.0);
  CHECK(error_of([&](auto& e) {
          std::transform(e.w2.packed.begin(), e.w2.packed.begin() + 32, e.w2.packed.begin(), swap_nibbles);
        }) > 20.0);
  // A zero point that is off by one, of one group of one expert.
  CHECK(error_of([](auto& e) {
          for (int c = 0; c < 512; ++c)
            e.w13.offset[c] = half(e.w13.offset[c] + 1.0F);
        }) > 20.0);
  CHECK(error_of([](auto& e) {
          for (int c = 0; c < 256; ++c)
            e.w2.offset[c] = half(e.w2.offset[c] - 1.0F);
        }) > 20.0);
  // A group that is left out, or scaled by its neighbour's scales.
  CHECK(error_of([](auto& e) { std::fill_n(e.w13.scale.begin(), 512, half(0.0F)); }) > 20.0);
  CHECK(error_of([](auto& e) { std::copy_n(e.w2.scale.begin() + 256, 256, e.w2.scale.begin()); }) > 20.0);
  // Gate and up exchanged; an expert mistaken for another; a routing weight for its neighbour's.
  CHECK(error_of([](auto& e) {
          for (std::size_t r = 0; r < e.w13.packed.size(); r += 64) {
            std::swap_ranges(&e.w13.packed[r], &e.w13.packed[r + 32], &e.w13.packed[r + 32]);
          }
        }) > 20.0);
  CHECK(error_of([](auto& e) { e.ids[0] = 2; }) > 20.0);
  CHECK(error_of([](auto& e) { std::swap(e.weights[0], e.weights[1]); }) > 20.0);
}

TEST_CASE("experts: plans of published models fit, with tiles as wide as they may be") {
  for (const auto& [hidden, intermediate, experts, up, down] :
       {std::tuple{2048u, 768u, 128u, 768u, 1024u},  // Qwen3-30B-A3B
        {4096u, 1536u, 128u, 768u, 1024u},           // Qwen3-235B-A22B
        {7168u, 2048u, 256u, 1024u, 1024u},          // DeepSeek-V3
        {3072u, 1536u, 256u, 768u, 1024u}}) {        // MiniMax-M2
    for (uint32_t tokens = 1; tokens <= kMaxTokens; ++tokens) {
      for (const uint32_t cores : {40u, 48u}) {
        const auto plan = plan_moe_w4a16_decode({tokens, 8, experts, hidden, intermediate, 128, true}, cores);
        CHECK(plan.unifiedBufferBytes <= kUnifiedBufferBytes);
        CHECK(plan.tiling.up.tileColumns == up);
        CHECK(plan.tiling.down.tileColumns == down);
      }
    }
  }
}

TEST_CASE("experts: plans refuse what the kernel does not take") {
  const MoeW4A16DecodeShape good{8, 8, 128, 2048, 768, 128, true};
  CHECK(plan_moe_w4a16_decode(good, 48).unifiedBufferBytes <= kUnifiedBufferBytes);
  const auto refused = [&](auto change, const char* message, uint32_t cores = 48) {
    MoeW4A16DecodeShape shape = good;
    change(shape);
    CHECK_THROWS_WITH_AS(plan_moe_w4a16_decode(shape, cores), doctest::Contains(message), std::invalid_argument);
  };
  using Shape = MoeW4A16DecodeShape;
  refused([](Shape& s) { s.tokens = 9; }, "tokens: 1 to 8 are taken, not 9");
  refused([](Shape& s) { s.group = 16; }, "group: 32, 64 and 128 are taken, not 16");
  refused([](Shape& s) { s.hidden = 2080; }, "hidden: a multiple of the group size is wanted, not 2080");
  refused([](Shape& s) { s.intermediate = 0; }, "intermediate: a multiple of the group size is wanted, not 0");
  refused([](Shape& s) { s.topK = 0; }, "top_k: 1 to 256");
  refused([](Shape& s) { s.experts = 0; }, "experts: there are none");
  refused([](Shape& s) { s.experts = 60000; }, "bytes of unified buffer for 60000 experts");
  refused([](Shape& s) { s.hidden = 1u << 20, s.intermediate = 1u << 16; }, "too large");
  refused([](Shape&) {}, "cores: 1 to 63", 0);
  // Where tiles of 1024 columns do not fit, narrower ones do.
  MoeW4A16DecodeShape many = good;
  many.experts = 8192;
  const MoeW4A16DecodePlan plan = plan_moe_w4a16_decode(many, 48);
  CHECK(plan.unifiedBufferBytes <= kUnifiedBufferBytes);
  CHECK(plan.tiling.down.tileColumns < 1024);
}

}  // namespace
}  // namespace moe_fx::ascendc::test
