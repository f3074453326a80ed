// swiglu_dynamic_quant on the host model: against the same arithmetic in float, to the bit, and against double, within
// a rounding; short, odd and very long tokens; limits, zeros, infinities and NaN; memory and traffic; what its plan
// refuses.

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernel_operator.h"
#include "kernels/swiglu_dynamic_quant.h"
#include "tiling/swiglu_dynamic_quant.h"

using namespace moe_fx::ascendc;

namespace {

constexpr uint32_t kUbBytes = 196352;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

float widened(half value) { return static_cast<float>(value); }
float widened(bfloat16_t value) { return value.value(); }

// Half a unit in the last place, relative.
double roundoff(half) { return 0x1p-11; }
double roundoff(bfloat16_t) { return 0x1p-8; }

struct Result {
  std::vector<int8_t> y;
  std::vector<float> scales;
  ascendc_model::Report report;
  SwigluDynamicQuantPlan plan;
};

template <typename T>
Result run(const SwigluDynamicQuantProblem& p, const std::vector<T>& x, uint32_t cores) {
  Result result;
  result.plan = plan_swiglu_dynamic_quant(p, cores, kUbBytes);
  ascendc_model::Device device(static_cast<int>(cores));
  const auto in = device.input("x", x);
  const auto y = device.output<int8_t>("y", p.tokens * p.columns);
  const auto scales = device.output<float>("scales", p.tokens);
  result.report = device.launch(static_cast<int>(result.plan.cores),
                                [&] { SwigluDynamicQuantBody<T>(in.gm(), y.gm(), scales.gm(), result.plan.tiling); });
  result.y.assign(y.data(), y.data() + y.size());
  result.scales.assign(scales.data(), scales.data() + scales.size());
  return result;
}

float clamped(float x, float low, float high) { return x > high ? high : x < low ? low : x; }

// Runs the kernel and compares every token whose activations are finite; the others' scale must be NaN.
template <typename T>
Result check(const SwigluDynamicQuantProblem& p, const std::vector<T>& x, uint32_t cores = 48) {
  Result got = run(p, x, cores);
  INFO("tokens ", p.tokens, ", columns ", p.columns, ", cores ", cores);
  CHECK_MESSAGE(got.report.faults.empty(), got.report);
  CHECK(got.report.peak_ub == got.plan.ubBytes);
  CHECK(got.report.syncs() == 0);
  CHECK(got.report.traffic["x"].read == x.size() * sizeof(T));
  CHECK(got.report.traffic["y"].written == static_cast<uint64_t>(p.tokens * p.columns));
  CHECK(got.report.traffic["scales"].written == static_cast<uint64_t>(p.tokens) * 4);

  for (int64_t token = 0; token < p.tokens; ++token) {
    std::vector<float> y;
    std::vector<double> exact;
    float largest = 0;
    bool finite = true;
    for (int64_t column = 0; column < p.columns; ++column) {
      float gate = widened(x[2 * token * p.columns + column]);
      float up = widened(x[(2 * token + 1) * p.columns + column]);
      if (p.hasLimit) {
        gate = clamped(gate, -kInf, p.limit);
        up = clamped(up, -p.limit, p.limit);
      }
      y.push_back(widened(static_cast<T>(gate / (1.0F + std::exp(-gate)) * up)));
      exact.push_back(static_cast<double>(gate) / (1.0 + std::exp(-static_cast<double>(gate))) * up);
      finite &= std::isfinite(y.back());
      largest = std::max(largest, std::abs(y.back()));
    }
    INFO("token ", token);
    const float scale = got.scales[token];
    if (!finite) {
      REQUIRE(std::isnan(scale));
      continue;
    }
    REQUIRE(scale == std::max(largest, 1e-12F) / 127.0F);
    for (int64_t column = 0; column < p.columns; ++column) {
      const int quantised = got.y[token * p.columns + column];
      REQUIRE(quantised == static_cast<int>(std::nearbyint(y[column] / scale)));
      // Half a step, a rounding to T, and those of fp32.
      const double bound = 0.5001 * scale + 1.01 * roundoff(T()) * std::abs(exact[column]) + 1e-7;
      REQUIRE(std::abs(static_cast<double>(quantised) * scale - exact[column]) <= bound);
    }
  }
  return got;
}

template <typename T>
std::vector<T> random(const SwigluDynamicQuantProblem& p, std::mt19937& rng, float spread = 2.0F) {
  std::normal_distribution<float> normal(0.0F, spread);
  std::vector<T> x;
  for (int64_t i = 0; i < 2 * p.tokens * p.columns; ++i)
    x.push_back(static_cast<T>(normal(rng)));
  return x;
}

std::string complaint(const SwigluDynamicQuantProblem& p) {
  try {
    plan_swiglu_dynamic_quant(p, 48, kUbBytes);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "none";
}

}  // namespace

TEST_CASE("swiglu_dynamic_quant: experts of real models, in both dtypes") {
  std::mt19937 rng(1);
  // Qwen3-30B-A3B, Qwen3-235B and MiniMax-M2, DeepSeek-V3; a dense layer of the latter, which is computed in chunks.
  for (int64_t columns : {768, 1536, 2048, 18432}) {
    for (int64_t tokens : {1, 8, 64, 150}) {
      if (columns > 4096 && tokens > 8) continue;
      SwigluDynamicQuantProblem p{.tokens = tokens, .columns = columns};
      check(p, random<bfloat16_t>(p, rng));
      p.hasLimit = true;
      p.limit = 1.5F;
      check(p, random<half>(p, rng), 40);
    }
  }
}

TEST_CASE("swiglu_dynamic_quant: any number of columns and tokens") {
  std::mt19937 rng(2);
  for (int64_t columns : {1, 15, 16, 33, 63, 64, 65, 100, 1000, 4000, 4095, 4096, 4097, 4160, 8191, 12289}) {
    for (int64_t tokens : {1, 13}) {
      const SwigluDynamicQuantProblem p{.tokens = tokens, .columns = columns};
      // The model looks for races by words of four bytes: where tokens share one, a single core writes them.
      check(p, random<half>(p, rng), columns % 4 == 0 ? 3 : 1);
      check(p, random<bfloat16_t>(p, rng, 20.0F), columns % 4 == 0 ? 5 : 1);
    }
  }
  for (int64_t tokens = 1; tokens <= 300; tokens += tokens < 60 ? 1 : 48) {
    const SwigluDynamicQuantProblem p{.tokens = tokens, .columns = 192};
    check(p, random<bfloat16_t>(p, rng), tokens % 2 == 0 ? 48 : 40);
  }
}

TEST_CASE("swiglu_dynamic_quant: halves go to the even integer") {
  // silu(64) is 64 in fp32, so y is 64 up: every half from -126.5 to 126.5, and 127 for a scale of exactly 1.
  SwigluDynamicQuantProblem p{.tokens = 1, .columns = 255};
  std::vector<half> x(2 * p.columns, static_cast<half>(64.0F));
  for (int i = 0; i < 254; ++i)
    x[p.columns + i] = static_cast<half>((static_cast<float>(i) - 126.5F) / 64.0F);
  x[2 * p.columns - 1] = static_cast<half>(127.0F / 64.0F);
  const Result got = check(p, x);
  CHECK(got.scales[0] == 1.0F);
  CHECK(got.y[126] == 0);    // -0.5
  CHECK(got.y[127] == 0);    // 0.5
  CHECK(got.y[128] == 2);    // 1.5
  CHECK(got.y[129] == 2);    // 2.5
  CHECK(got.y[253] == 126);  // 126.5
}

TEST_CASE("swiglu_dynamic_quant: zeros, tiny, huge and other odd numbers") {
  for (int64_t columns : {48, 768, 5000}) {
    SwigluDynamicQuantProblem p{.tokens = 9, .columns = columns};
    std::mt19937 rng(3);
    std::vector<bfloat16_t> x = random<bfloat16_t>(p, rng);
    const auto at = [&](int64_t token, int64_t column, float gate, float up) {
      x[2 * token * columns + column] = static_cast<bfloat16_t>(gate);
      x[(2 * token + 1) * columns + column] = static_cast<bfloat16_t>(up);
    };
    for (int64_t column = 0; column < columns; ++column) {
      at(0, column, 0.0F, 0.0F);
      at(1, column, 1e-20F, 1e-10F);
      at(2, column, -100.0F, 3.0F);
      at(3, column, 30.0F, static_cast<float>(column % 2 == 0 ? 1e37 : -1e37));
    }
    at(4, columns / 2, kNan, 1.0F);
    at(5, columns - 1, 1.0F, kNan);
    at(6, 0, kInf, 1.0F);
    at(7, columns - 1, 1.0F, -kInf);
    at(8, 1, -kInf, 1.0F);
    const Result got = check(p, x, 2);
    CHECK(got.scales[0] == 1e-12F / 127.0F);
    CHECK(std::all_of(got.y.begin(), got.y.begin() + columns, [](int8_t y) { return y == 0; }));
    // A limit makes infinities finite, and leaves NaN.
    p.hasLimit = true;
    p.limit = 7.0F;
    check(p, x, 2);
  }
}

TEST_CASE("swiglu_dynamic_quant: what the plan refuses") {
  CHECK(complaint({.tokens = 8, .columns = 768}) == "none");
  CHECK(complaint({.tokens = 8, .columns = 40000}) == "none");
  CHECK(complaint({.tokens = 0, .columns = 768}) == "swiglu_dynamic_quant: tokens is 0; there must be at least one");
  CHECK(complaint({.tokens = 8, .columns = 0}) == "swiglu_dynamic_quant: columns is 0; there must be at least one");
  CHECK(complaint({.tokens = 8, .columns = 768, .hasLimit = true, .limit = -1.0F}) ==
        "swiglu_dynamic_quant: limit is -1; it cannot be negative");
  CHECK(complaint({.tokens = 8, .columns = 65536}).find("65536 columns need") != std::string::npos);
}
