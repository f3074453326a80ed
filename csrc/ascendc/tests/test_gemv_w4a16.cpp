// gemv_w4a16 on the host model against products in double: dense projections of decode batches.

#include <doctest/doctest.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "kernels/gemv_w4a16.h"
#include "model/launch.h"
#include "tests/w4a16_support.h"
#include "tiling/gemv_w4a16.h"

namespace moe_fx::ascendc::test {
namespace {

template <typename T>
struct Gemv {
  GemvW4A16Shape shape;
  Int4Matrices<T> weights;
  std::vector<T> x;

  explicit Gemv(const GemvW4A16Shape& given, const std::vector<float>& factors = {}, unsigned seed = 1) : shape(given) {
    Random random(seed);
    weights = random_matrices<T>(random, 1, shape.rows, shape.columns, shape.group, shape.hasOffset);
    x = random_rows<T>(random, shape.tokens, shape.rows, factors);
  }

  std::vector<std::vector<double>> reference() const {
    std::vector<std::vector<double>> rows;
    for (uint32_t t = 0; t < shape.tokens; ++t) {
      rows.push_back(numbers(x.data() + std::size_t{t} * shape.rows, shape.rows));
    }
    return weights.times(0, rows);
  }
};

struct Outcome {
  ascendc_model::Report report;
  double error;
  uint32_t planned_ub;
};

template <typename T>
Outcome run(const Gemv<T>& problem, int cores = 48) {
  const GemvW4A16Plan plan = plan_gemv_w4a16(problem.shape, cores);
  ascendc_model::Device device(cores);
  const auto x = device.input("x", problem.x);
  const auto weights = device.input("weights", problem.weights.packed);
  const auto scales = device.input("scales", problem.weights.scale);
  const auto offsets = device.input("offsets", problem.weights.offset);
  const auto y = device.output<T>("y", std::size_t{problem.shape.tokens} * problem.shape.columns);
  const auto workspace = device.output<uint8_t>("workspace", plan.workspaceBytes);
  Outcome outcome;
  outcome.planned_ub = plan.unifiedBufferBytes;
  outcome.report = device.launch(cores, [&] {
    GemvW4A16<T>(x.gm(), weights.gm(), scales.gm(), offsets.gm(), y.gm(), workspace.gm(), plan.tiling);
  });
  outcome.error = worst_row(y.data(), problem.reference());
  return outcome;
}

// Products are exact in fp32 but for its own rounding, so what is left is the rounding of y: at most half a unit, of
// which a mean over many values leaves about 0.42.
template <typename T>
constexpr double kBound = kRoundoff<T> / 2;

template <typename T>
void check(const Gemv<T>& problem, int cores = 48) {
  CAPTURE(problem.shape.tokens);
  CAPTURE(problem.shape.rows);
  CAPTURE(problem.shape.columns);
  CAPTURE(problem.shape.group);
  CAPTURE(problem.shape.hasOffset);
  CAPTURE(cores);
  const Outcome outcome = run(problem, cores);
  CHECK_MESSAGE(outcome.report.faults.empty(), outcome.report);
  CHECK(outcome.error <= kBound<T>);
  CHECK(outcome.report.syncs() == 1);
  CHECK(outcome.report.peak_ub == outcome.planned_ub);
  CHECK(outcome.report.traffic.at("weights").read == problem.weights.bytes_each());
}

TEST_CASE("gemv: tokens, groups, offsets and types") {
  for (uint32_t tokens = 1; tokens <= kMaxTokens; ++tokens) {
    for (const uint32_t group : {32u, 64u, 128u}) {
      for (const bool offset : {false, true}) {
        check(Gemv<bfloat16_t>({tokens, 256, 1152, group, offset}));
      }
      check(Gemv<half>({tokens, 384, 320, group, tokens % 2 == 0}), 40);
    }
  }
}

TEST_CASE("gemv: columns in odd multiples of 32, few cores, more cores than work") {
  for (const auto& [rows, columns, cores] :
       {std::tuple{32u, 32u, 48}, {96u, 544u, 40}, {2080u, 1056u, 48}, {64u, 1568u, 1}, {160u, 96u, 7}}) {
    check(Gemv<half>({3, rows, columns, 32, true}), cores);
    check(Gemv<bfloat16_t>({1, rows, columns, 32, false}), cores);
  }
}

TEST_CASE("gemv: a projection of Qwen3-30B-A3B, its traffic at one token") {
  const Gemv<bfloat16_t> problem({1, 2048, 5120, 128, false});
  check(problem);
  const auto& total = run(problem).report.total;
  const double least = problem.weights.bytes_each() + problem.weights.scale_bytes_each() + (2048 + 5120) * 2;
  // Partial sums are 4.3 % of so few weights.
  CHECK((total.mte2_bytes + total.mte3_bytes) / least <= 1.06);
}

TEST_CASE("gemv: activations of any magnitude") {
  // Rows far apart, each as exact as if it were alone; the least and the greatest are subnormal or near overflow.
  check(Gemv<bfloat16_t>({4, 256, 256, 64, true}, {0x1p-100F, 1.0F, 0x1p100F, 0x1p-40F}));
  check(Gemv<half>({3, 256, 256, 64, true}, {0x1p-12F, 8000.0F, 1.0F}));
  // Zeros, and a row whose first group is 2^-30 of its second.
  Gemv<bfloat16_t> mixed({2, 128, 64, 64, true}, {0.0F, 1.0F});
  for (uint32_t k = 0; k < 64; ++k) {
    mixed.x[128 + k] = bfloat16_t(mixed.x[128 + k].value() * 0x1p-30F);
  }
  check(mixed);
  // A lone core's panel is full after 85 units of three tokens, inside a group; what follows has another power of two.
  Gemv<half> longer({3, 3072, 256, 128, false});
  for (uint32_t k = 0; k < 3 * 3072; ++k) {
    if (k % 3072 >= 85 * kUnitRows) longer.x[k] *= half(8.0F);
  }
  check(longer, 1);
}

TEST_CASE("gemv: plans refuse what the kernel does not take") {
  const GemvW4A16Shape good{1, 256, 256, 128, false};
  CHECK_NOTHROW(plan_gemv_w4a16(good, 48));
  const auto refused = [&](auto change, const char* message, uint32_t cores = 48,
                           uint32_t buffer = kUnifiedBufferBytes) {
    GemvW4A16Shape shape = good;
    change(shape);
    CHECK_THROWS_WITH_AS(plan_gemv_w4a16(shape, cores, buffer), doctest::Contains(message), std::invalid_argument);
  };
  using Shape = GemvW4A16Shape;
  refused([](Shape& s) { s.tokens = 9; }, "tokens: 1 to 8 are taken, not 9");
  refused([](Shape& s) { s.tokens = 0; }, "tokens");
  refused([](Shape& s) { s.group = 48; }, "group: 32, 64 and 128 are taken, not 48");
  refused([](Shape& s) { s.rows = 192; }, "rows: a multiple of the group size is wanted, not 192");
  refused([](Shape& s) { s.columns = 40; }, "columns: a multiple of 32 is wanted, not 40");
  refused([](Shape&) {}, "cores: 1 to 63", 64);
  refused([](Shape&) {}, "bytes of unified buffer", 48, 32768);
  refused([](Shape& s) { s.rows = 1u << 26, s.columns = 1u << 16; }, "too large");
}

}  // namespace
}  // namespace moe_fx::ascendc::test
