// Packing and unpacking: rounding to nearest, re-laying quantised weights without loss, and what is refused.
// tests/csrc/test_packing.py holds the bytes against an independent reading of the layout.

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/float_bits.h"
#include "cpu/memory.h"
#include "cpu/pack.h"

using namespace moe_fx::cpu;

namespace {

// Packed weights in memory of their own.
struct Packed {
  explicit Packed(const PackedSpec& spec) : layout(spec), buffer(layout.bytes()) {
    Topology topology;
    topology.nodes.push_back({.memory_node = -1, .cpus = {0}});
    begin_packing(buffer.data(), layout, topology);
  }
  std::uint8_t* data() { return buffer.data(); }

  PackedLayout layout;
  HugeBuffer buffer;
};

std::vector<float> normal_values(std::size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, 0.02F);
  std::vector<float> values(n);
  for (float& value : values)
    value = normal(random);
  return values;
}

FloatRows rows_of(const std::vector<float>& values, std::int64_t inputs) {
  return {.dtype = DType::f32, .data = values.data(), .row_stride = static_cast<std::size_t>(inputs) * 4};
}

std::vector<float> unpacked(Packed& packed, std::int64_t expert, Projection projection) {
  const PackedSpec& spec = packed.layout.spec();
  std::vector<float> out(static_cast<std::size_t>(spec.hidden * spec.intermediate));
  unpack(packed.data(), packed.layout, expert, projection, out.data());
  return out;
}

template <typename Function>
std::string complaint(const Function& function) {
  try {
    function();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "none";
}

bool mentions(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

const PackedSpec kInt8 = {.format = WeightFormat::int8, .experts = 2, .hidden = 70, .intermediate = 37};
const PackedSpec kInt4 = {.format = WeightFormat::int4, .experts = 2, .hidden = 64, .intermediate = 96, .group = 32};

}  // namespace

TEST_CASE("rounding to nearest is within half a step, in every projection of every expert, on any number of threads") {
  for (const int segments : {1, 3}) {
    for (const bool zero_points : {false, true}) {
      for (PackedSpec spec : {kInt8, kInt4}) {
        const bool int4 = spec.format == WeightFormat::int4;
        if (zero_points && !int4) continue;
        spec.zero_points = zero_points;
        spec.segments = segments;
        Packed one(spec), three(spec);
        unsigned seed = 0;
        for (std::int64_t expert = 0; expert < spec.experts; ++expert) {
          for (const Projection projection : {Projection::gate, Projection::up, Projection::down}) {
            const std::int64_t inputs = projection == Projection::down ? spec.intermediate : spec.hidden;
            const auto values = normal_values(static_cast<std::size_t>(spec.hidden * spec.intermediate), ++seed);
            pack_float(one.data(), one.layout, expert, projection, rows_of(values, inputs), 1);
            pack_float(three.data(), three.layout, expert, projection, rows_of(values, inputs), 3);
          }
        }
        CHECK(std::memcmp(one.data(), three.data(), one.layout.bytes()) == 0);
        seed = 0;
        for (std::int64_t expert = 0; expert < spec.experts; ++expert) {
          for (const Projection projection : {Projection::gate, Projection::up, Projection::down}) {
            const std::int64_t inputs = projection == Projection::down ? spec.intermediate : spec.hidden;
            const auto values = normal_values(static_cast<std::size_t>(spec.hidden * spec.intermediate), ++seed);
            const auto restored = unpacked(one, expert, projection);
            const std::int64_t size = int4 ? spec.group : inputs;
            for (std::size_t begin = 0; begin < values.size(); begin += static_cast<std::size_t>(size)) {
              const auto [low, high] = std::minmax_element(values.begin() + begin, values.begin() + begin + size);
              const float largest = std::max(-*low, *high);
              const float step = !int4 ? largest / 127 : zero_points ? (*high - *low) / 15 : largest / 7;
              // With zero points the zero is rounded too. A scale's rounding to fp16 moves the ends a little further.
              const float bound = (zero_points ? 1.0F : 0.5F) * step * 1.01F;
              for (std::int64_t k = 0; k < size; ++k) {
                const std::size_t at = begin + static_cast<std::size_t>(k);
                CHECK(std::fabs(values[at] - restored[at]) <= bound);
              }
            }
          }
        }
      }
    }
  }
}

TEST_CASE("zeros stay zeros, and what is not finite shows in its row or group only") {
  for (const PackedSpec& spec : {kInt8, kInt4}) {
    for (const bool zero_points : {false, true}) {
      PackedSpec one = spec;
      if (spec.format == WeightFormat::int8 && zero_points) continue;
      one.zero_points = zero_points;
      Packed packed(one);
      std::vector<float> values(static_cast<std::size_t>(spec.hidden * spec.intermediate), 0.0F);
      const std::int64_t size = spec.format == WeightFormat::int4 ? spec.group : spec.hidden;
      values[3] = std::numeric_limits<float>::infinity();
      values[static_cast<std::size_t>(spec.hidden * 17)] = std::numeric_limits<float>::quiet_NaN();
      values[static_cast<std::size_t>(spec.hidden * 18)] = -std::numeric_limits<float>::infinity();
      pack_float(packed.data(), packed.layout, 0, Projection::gate, rows_of(values, spec.hidden), 1);
      const auto restored = unpacked(packed, 0, Projection::gate);
      for (std::int64_t at = 0; at < spec.hidden * spec.intermediate; ++at) {
        const std::int64_t row = at / spec.hidden, k = at % spec.hidden;
        const bool bad = (row == 0 || row == 17 || row == 18) && k < size;
        CHECK(std::isnan(restored[static_cast<std::size_t>(at)]) == bad);
        if (!bad) CHECK(restored[static_cast<std::size_t>(at)] == 0.0F);
      }
    }
  }
}

TEST_CASE("huge and tiny weights survive") {
  for (const float magnitude : {3.0e38F, 1.0e-30F, 1.0e-40F}) {
    for (const PackedSpec& spec : {kInt8, kInt4}) {
      for (const bool zero_points : {false, true}) {
        PackedSpec one = spec;
        if (spec.format == WeightFormat::int8 && zero_points) continue;
        one.zero_points = zero_points;
        Packed packed(one);
        std::vector<float> values(static_cast<std::size_t>(spec.hidden * spec.intermediate));
        for (std::size_t i = 0; i < values.size(); ++i)
          values[i] = i % 2 == 0 ? magnitude : -magnitude;
        pack_float(packed.data(), packed.layout, 0, Projection::up, rows_of(values, spec.hidden), 1);
        const auto restored = unpacked(packed, 0, Projection::up);
        for (std::size_t i = 0; i < values.size(); ++i) {
          CHECK(std::isfinite(restored[i]));
          CHECK(std::fabs(restored[i] - values[i]) <= 0.15F * magnitude);
        }
      }
    }
  }
}

TEST_CASE("int8 weights are taken over as they are") {
  Packed packed(kInt8);
  std::mt19937 random(1);
  const std::size_t stride = 80;
  std::vector<std::int8_t> values(static_cast<std::size_t>(kInt8.intermediate) * stride);
  for (auto& value : values)
    value = static_cast<std::int8_t>(random());
  std::vector<float> scales = normal_values(static_cast<std::size_t>(kInt8.intermediate) * 2, 7);
  pack_int8(packed.data(), packed.layout, 1, Projection::up,
            {.data = values.data(), .row_stride = stride, .scales = scales.data(), .scale_stride = 2}, 2);
  const auto restored = unpacked(packed, 1, Projection::up);
  for (std::int64_t row = 0; row < kInt8.intermediate; ++row) {
    for (std::int64_t k = 0; k < kInt8.hidden; ++k) {
      const auto r = static_cast<std::size_t>(row), c = static_cast<std::size_t>(k);
      CHECK(restored[r * static_cast<std::size_t>(kInt8.hidden) + c] ==
            scales[r * 2] * static_cast<float>(values[r * stride + c]));
    }
  }
}

TEST_CASE("int4 weights are taken over as they are, whatever 16-bit dtype their scales had") {
  // The fp16 scales reach from the smallest to the largest number; the bf16 ones over 2^29.
  for (const DType dtype : {DType::f16, DType::bf16}) {
    for (const bool zero_points : {false, true}) {
      PackedSpec spec = kInt4;
      spec.zero_points = zero_points;
      Packed packed(spec);
      std::mt19937 random(2);
      const auto rows = static_cast<std::size_t>(spec.hidden), inputs = static_cast<std::size_t>(spec.intermediate);
      const std::size_t groups = inputs / 32;
      std::vector<std::uint8_t> values(rows * inputs / 2), zeros(rows * groups);
      std::vector<float> scales(rows * groups);
      for (auto& value : values)
        value = static_cast<std::uint8_t>(random());
      for (auto& zero : zeros)
        zero = static_cast<std::uint8_t>(random() % 17);
      for (auto& scale : scales) {
        scale = dtype == DType::f16
                    ? float_from_f16(static_cast<std::uint16_t>(random() % 0x7c00))
                    : float_from_bf16(bf16_from_float(std::ldexp(1.0F + static_cast<float>(random() % 128) / 128.0F,
                                                                 static_cast<int>(random() % 29) - 60)));
      }
      pack_int4(packed.data(), packed.layout, 1, Projection::down,
                {.data = values.data(),
                 .row_stride = inputs / 2,
                 .scales = scales.data(),
                 .scale_stride = groups,
                 .zeros = zero_points ? zeros.data() : nullptr,
                 .zero_stride = zero_points ? groups : 0},
                2);
      const auto restored = unpacked(packed, 1, Projection::down);
      for (std::size_t row = 0; row < rows; ++row) {
        for (std::size_t k = 0; k < inputs; ++k) {
          const int nibble = (values[(row * inputs + k) / 2] >> (k % 2 * 4)) & 15;
          const std::size_t group = row * groups + k / 32;
          const int zero = zero_points ? zeros[group] : kInt4Middle;
          CHECK(restored[row * inputs + k] == static_cast<float>(nibble - zero) * scales[group]);
        }
      }
    }
  }
}

TEST_CASE("biases lie where the layout says") {
  PackedSpec spec = kInt8;
  spec.biases = true;
  Packed packed(spec);
  const auto values = normal_values(200, 3);
  pack_bias(packed.data(), packed.layout, 1, Projection::up, values.data(), 2);
  pack_bias(packed.data(), packed.layout, 0, Projection::down, values.data(), 1);
  const auto* up = reinterpret_cast<const float*>(packed.data() + packed.layout.bias_offset(Matrix::w13, 1, 1));
  const auto* down = reinterpret_cast<const float*>(packed.data() + packed.layout.bias_offset(Matrix::w2, 0));
  for (std::int64_t row = 0; row < spec.intermediate; ++row)
    CHECK(up[row] == values[static_cast<std::size_t>(row) * 2]);
  for (std::int64_t row = spec.intermediate; row < 48; ++row)
    CHECK(up[row] == 0.0F);
  for (std::int64_t row = 0; row < spec.hidden; ++row)
    CHECK(down[row] == values[static_cast<std::size_t>(row)]);
}

TEST_CASE("wrong arguments are named") {
  Packed packed(kInt8), nibbles(kInt4);
  const std::vector<float> values(static_cast<std::size_t>(kInt8.hidden * kInt8.intermediate));
  const FloatRows rows = rows_of(values, kInt8.hidden);
  const auto pack = [&](std::int64_t expert, Projection projection, const FloatRows& from, int threads) {
    return complaint([&] { pack_float(packed.data(), packed.layout, expert, projection, from, threads); });
  };
  CHECK(pack(0, Projection::gate, rows, 1) == "none");
  CHECK(mentions(pack(2, Projection::gate, rows, 1), "expert 2 is not among the 2"));
  CHECK(mentions(pack(-1, Projection::gate, rows, 1), "expert -1"));
  CHECK(mentions(pack(0, Projection::gate, rows, 0), "threads is 0"));
  FloatRows wrong = rows;
  wrong.data = nullptr;
  CHECK(mentions(pack(0, Projection::gate, wrong, 1), "null pointer"));
  wrong = rows;
  wrong.row_stride = 276;
  CHECK(mentions(pack(0, Projection::gate, wrong, 1), "stride of 276 bytes where a row has 280"));
  wrong.row_stride = 281;
  CHECK(mentions(pack(0, Projection::gate, wrong, 1), "no multiple of their 4-byte elements"));
  wrong = rows;
  wrong.data = reinterpret_cast<const char*>(values.data()) + 1;
  CHECK(mentions(pack(0, Projection::gate, wrong, 1), "not aligned"));

  PackedSpec ungated = kInt8;
  ungated.gated = false;
  Packed single(ungated);
  CHECK(mentions(complaint([&] { pack_float(single.data(), single.layout, 0, Projection::up, rows, 1); }),
                 "no up projection"));

  std::vector<std::uint8_t> bytes(4096);
  const Int8Rows int8 = {
      .data = reinterpret_cast<const std::int8_t*>(bytes.data()), .row_stride = 64, .scales = values.data()};
  CHECK(mentions(complaint([&] { pack_int8(nibbles.data(), nibbles.layout, 0, Projection::gate, int8, 1); }),
                 "are int4; use pack_int4 or pack_float, not pack_int8"));
  Int4Rows int4 = {.data = bytes.data(), .row_stride = 32, .scales = values.data(), .scale_stride = 2};
  CHECK(
      mentions(complaint([&] { pack_int4(packed.data(), packed.layout, 0, Projection::gate, int4, 1); }), "are int8"));
  int4.zeros = bytes.data();
  CHECK(mentions(complaint([&] { pack_int4(nibbles.data(), nibbles.layout, 0, Projection::gate, int4, 1); }),
                 "are symmetric"));
  int4.zeros = nullptr;
  int4.scale_stride = 1;
  CHECK(mentions(complaint([&] { pack_int4(nibbles.data(), nibbles.layout, 0, Projection::gate, int4, 1); }),
                 "scales have a stride of 1 values where a row has 2"));
  CHECK(mentions(complaint([&] { pack_bias(packed.data(), packed.layout, 0, Projection::gate, values.data(), 1); }),
                 "no room for biases"));
}
