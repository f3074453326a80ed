// repack_int4 on the host model: every layout to the expert kernels' and, on the host, back again; gate and up side by
// side; zero points; traffic of exactly one read and one write; and what its plans refuse.

#include <doctest/doctest.h>

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "kernel_operator.h"
#include "kernels/repack_int4.h"
#include "tiling/repack_int4.h"

using namespace moe_fx::ascendc;

namespace {

constexpr uint32_t kUbBytes = 196352;
constexpr int kAwqOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};

float widened(half value) { return static_cast<float>(value); }
float widened(bfloat16_t value) { return value.value(); }

// Unsigned nibbles [experts][inputs][outputs].
struct Nibbles {
  int64_t experts, inputs, outputs;
  std::vector<uint8_t> values;

  uint8_t& at(int64_t e, int64_t k, int64_t n) { return values[(e * inputs + k) * outputs + n]; }
  uint8_t at(int64_t e, int64_t k, int64_t n) const { return values[(e * inputs + k) * outputs + n]; }
};

Nibbles random(int64_t experts, int64_t inputs, int64_t outputs, std::mt19937& rng) {
  Nibbles result{experts, inputs, outputs, std::vector<uint8_t>(experts * inputs * outputs)};
  for (uint8_t& value : result.values)
    value = rng() % 16;
  return result;
}

// Which nibble of which word of a layout holds input k and output n of expert e.
struct Place {
  int64_t word;
  int shift;
};

Place place(Int4Layout layout, bool awqOrder, const Nibbles& w, int64_t e, int64_t k, int64_t n) {
  if (layout == Int4Layout::kGptq) return {(e * w.inputs / 8 + k / 8) * w.outputs + n, static_cast<int>(k % 8) * 4};
  if (layout == Int4Layout::kCompressedTensors) {
    return {(e * w.outputs + n) * w.inputs / 8 + k / 8, static_cast<int>(k % 8) * 4};
  }
  int bit = static_cast<int>(n % 8);
  if (awqOrder) {
    for (bit = 0; kAwqOrder[bit] != n % 8; ++bit) {
    }
  }
  return {((e * w.inputs + k) * w.outputs + n) / 8, 4 * bit};
}

std::vector<uint32_t> packed(Int4Layout layout, bool awqOrder, const Nibbles& w) {
  std::vector<uint32_t> words(w.values.size() / 8, 0);
  for (int64_t e = 0; e < w.experts; ++e) {
    for (int64_t k = 0; k < w.inputs; ++k) {
      for (int64_t n = 0; n < w.outputs; ++n) {
        const Place at = place(layout, awqOrder, w, e, k, n);
        words[at.word] |= static_cast<uint32_t>(w.at(e, k, n)) << at.shift;
      }
    }
  }
  return words;
}

// The inverse of the kernels: unsigned nibbles from some columns of the expert kernels' layout.
Nibbles unpacked(const std::vector<uint32_t>& weight, const RepackInt4Problem& p) {
  const int64_t merged = p.mergedOutputs == 0 ? p.outputs : p.mergedOutputs;
  Nibbles result{p.experts, p.inputs, p.outputs, std::vector<uint8_t>(p.experts * p.inputs * p.outputs)};
  for (int64_t e = 0; e < p.experts; ++e) {
    for (int64_t k = 0; k < p.inputs; ++k) {
      for (int64_t n = 0; n < p.outputs; ++n) {
        const int64_t column = p.firstOutput + n;
        const uint32_t word = weight[((e * p.inputs + k) * merged + column) / 8];
        const int nibble = static_cast<int>(word >> column % 8 * 4 & 15);
        result.at(e, k, n) = static_cast<uint8_t>((nibble < 8 ? nibble : nibble - 16) + 8);
      }
    }
  }
  return result;
}

template <typename Body>
void launch(ascendc_model::Device& device, const RepackInt4Plan& plan, uint64_t bytes, uint64_t written, Body body) {
  const ascendc_model::Report report = device.launch(static_cast<int>(plan.cores), body);
  CHECK_MESSAGE(report.faults.empty(), report);
  CHECK(report.peak_ub == plan.ubBytes);
  CHECK(report.syncs() == 0);
  CHECK(report.traffic.at("packed").read == bytes);
  CHECK(report.traffic.at("result").written == written);
}

// Repacks into `weight`, which the caller made large enough, and says what came out.
void repack(const RepackInt4Problem& p, const std::vector<uint32_t>& words, std::vector<uint32_t>& weight,
            uint32_t cores) {
  const RepackInt4Plan plan = plan_repack_int4(p, cores, kUbBytes);
  ascendc_model::Device device(static_cast<int>(cores));
  const auto in = device.input("packed", words);
  const auto out = device.inout("result", weight);
  const uint64_t bytes = words.size() * 4;
  launch(device, plan, bytes, bytes, [&] {
    switch (p.layout) {
      case Int4Layout::kAwq: RepackInt4Body<RepackAwq>(in.gm(), out.gm(), plan.tiling); break;
      case Int4Layout::kGptq:
        RepackInt4Body<RepackTransposed<Int4Layout::kGptq>>(in.gm(), out.gm(), plan.tiling);
        break;
      case Int4Layout::kCompressedTensors:
        RepackInt4Body<RepackTransposed<Int4Layout::kCompressedTensors>>(in.gm(), out.gm(), plan.tiling);
        break;
    }
  });
  weight.assign(out.data(), out.data() + weight.size());
}

void check(const RepackInt4Problem& p, std::mt19937& rng, uint32_t cores = 48) {
  INFO("layout ", static_cast<uint32_t>(p.layout), ", experts ", p.experts, ", inputs ", p.inputs, ", outputs ",
       p.outputs, ", cores ", cores);
  const Nibbles w = random(p.experts, p.inputs, p.outputs, rng);
  const std::vector<uint32_t> words = packed(p.layout, true, w);
  std::vector<uint32_t> weight(words.size());
  repack(p, words, weight, cores);
  const Nibbles back = unpacked(weight, p);
  REQUIRE(back.values == w.values);
  REQUIRE(packed(p.layout, true, back) == words);
}

template <typename T, bool awqOrder>
void check_zero_points(const ZeroPointsProblem& p, std::mt19937& rng, uint32_t cores) {
  INFO("experts ", p.experts, ", groups ", p.groups, ", outputs ", p.outputs);
  const Nibbles zeros = random(p.experts, p.groups, p.outputs, rng);
  const std::vector<uint32_t> words = packed(Int4Layout::kAwq, awqOrder, zeros);
  const RepackInt4Plan plan = plan_zero_points(p, cores, kUbBytes);
  ascendc_model::Device device(static_cast<int>(cores));
  const int64_t merged = p.mergedOutputs == 0 ? p.outputs : p.mergedOutputs;
  const auto in = device.input("packed", words);
  const auto out = device.inout("result", std::vector<T>(p.experts * p.groups * merged, static_cast<T>(99.0F)));
  launch(device, plan, words.size() * 4, zeros.values.size() * 2,
         [&] { RepackInt4Body<ZeroPointsToOffsets<T, awqOrder>>(in.gm(), out.gm(), plan.tiling); });
  for (int64_t e = 0; e < p.experts; ++e) {
    for (int64_t g = 0; g < p.groups; ++g) {
      for (int64_t n = 0; n < merged; ++n) {
        const int64_t column = n - p.firstOutput;
        const bool ours = column >= 0 && column < p.outputs;
        const float wanted = ours ? 8.0F - static_cast<float>(zeros.at(e, g, column) + p.less) : 99.0F;
        REQUIRE(widened(out.data()[(e * p.groups + g) * merged + n]) == wanted);
      }
    }
  }
}

std::string complaint(const RepackInt4Problem& p) {
  try {
    plan_repack_int4(p, 48, kUbBytes);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "none";
}

constexpr Int4Layout kLayouts[] = {Int4Layout::kAwq, Int4Layout::kGptq, Int4Layout::kCompressedTensors};

}  // namespace

TEST_CASE("repack_int4: experts of Qwen3-30B-A3B, down and up") {
  std::mt19937 rng(1);
  for (Int4Layout layout : kLayouts) {
    check({.layout = layout, .experts = 2, .inputs = 2048, .outputs = 768}, rng);
    check({.layout = layout, .experts = 2, .inputs = 768, .outputs = 2048}, rng, 40);
  }
}

TEST_CASE("repack_int4: shapes that fill no tile") {
  std::mt19937 rng(2);
  for (Int4Layout layout : kLayouts) {
    for (int64_t inputs : {32, 96, 128, 160, 352}) {
      for (int64_t outputs : {32, 64, 96, 160, 1056}) {
        check({.layout = layout, .experts = 3, .inputs = inputs, .outputs = outputs}, rng, 7);
      }
    }
  }
  // AWQ's words are moved one by one, so it takes any.
  for (int64_t outputs : {8, 24, 40, 1000, 40000}) {
    check({.layout = Int4Layout::kAwq, .experts = 2, .inputs = 5, .outputs = outputs}, rng, 3);
  }
}

TEST_CASE("repack_int4: gate and up become the halves of each row") {
  std::mt19937 rng(3);
  for (Int4Layout layout : kLayouts) {
    RepackInt4Problem p{.layout = layout, .experts = 2, .inputs = 256, .outputs = 96, .mergedOutputs = 192};
    std::vector<uint32_t> weight(2 * 256 * 192 / 8);
    const Nibbles gate = random(2, 256, 96, rng), up = random(2, 256, 96, rng);
    repack(p, packed(layout, true, gate), weight, 5);
    p.firstOutput = 96;
    repack(p, packed(layout, true, up), weight, 5);
    CHECK(unpacked(weight, p).values == up.values);
    p.firstOutput = 0;
    CHECK(unpacked(weight, p).values == gate.values);
  }
}

TEST_CASE("repack_int4: zero points become offsets, 8 - zero") {
  std::mt19937 rng(4);
  for (int64_t outputs : {8, 96, 768, 1536, 9000}) {
    check_zero_points<bfloat16_t, true>({.experts = 3, .groups = 16, .outputs = outputs}, rng, 48);
    check_zero_points<half, false>({.awqOrder = false, .experts = 3, .groups = 6, .outputs = outputs, .less = 1}, rng,
                                   40);
    check_zero_points<half, true>(
        {.experts = 2, .groups = 3, .outputs = outputs, .firstOutput = outputs, .mergedOutputs = 2 * outputs}, rng, 4);
  }
}

TEST_CASE("repack_int4: what the plans refuse") {
  CHECK(complaint({.experts = 1, .inputs = 64, .outputs = 64}) == "none");
  CHECK(complaint({.experts = 0, .inputs = 64, .outputs = 64}) ==
        "repack_int4: experts is 0; there must be at least one");
  CHECK(complaint({.experts = 1, .inputs = 64, .outputs = 60}) == "repack_int4: outputs is 60, not a multiple of 8");
  CHECK(complaint({.layout = Int4Layout::kGptq, .experts = 1, .inputs = 64, .outputs = 40}) ==
        "repack_int4: 64 inputs and 40 outputs; GPTQ's and compressed-tensors' must be multiples of 32");
  CHECK(complaint({.experts = 1, .inputs = 64, .outputs = 64, .firstOutput = 64, .mergedOutputs = 96}) ==
        "repack_int4: outputs 64 to 128 do not fit a row of 96, a multiple of 8");
  CHECK_THROWS_WITH_AS(plan_zero_points({.experts = 1, .groups = 1, .outputs = 8, .less = 2}, 48, kUbBytes),
                       "repack_int4 zero points: less is 2; it must be 0 or 1", std::invalid_argument);
}
