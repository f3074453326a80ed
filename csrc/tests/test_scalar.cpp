// The portable kernels and the conversions behind them, against arithmetic in double that shares no code with them.

#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/float_bits.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "cpu/pack.h"

using namespace moe_fx::cpu;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<float> normal_values(std::size_t n, unsigned seed, float deviation = 1.0F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, deviation);
  std::vector<float> values(n);
  for (float& value : values)
    value = normal(random);
  return values;
}

// The value of 16 bits of a binary format with `mantissa` bits of mantissa, from its definition.
double value_of_bits(unsigned bits, int mantissa) {
  const int exponent_bits = 15 - mantissa;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double sign = bits & 0x8000U ? -1.0 : 1.0;
  const int exponent = static_cast<int>((bits & 0x7fffU) >> mantissa);
  const int fraction = static_cast<int>(bits & ((1U << mantissa) - 1));
  if (exponent == (1 << exponent_bits) - 1) return fraction ? kNan : sign * kInf;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - mantissa);
  return sign * std::ldexp((1 << mantissa) + fraction, exponent - bias - mantissa);
}

// Activation rows of one form, written by the kernels under test.
struct Rows {
  Rows(RowShape shape, int m, unsigned seed) : shape(shape), values(static_cast<std::size_t>(m * shape.inputs)) {
    values = normal_values(values.size(), seed);
    for (float& value : values)
      value = float_from_bf16(bf16_from_float(value));
    write(m);
  }
  void write(int m) {
    memory = HugeBuffer(shape.bytes() * static_cast<std::size_t>(m));
    pointers.clear();
    for (int i = 0; i < m; ++i) {
      std::uint8_t* const row = memory.data() + shape.bytes() * static_cast<std::size_t>(i);
      kScalarKernels.write_row(shape, values.data() + i * shape.inputs, row);
      pointers.push_back(row);
    }
  }

  RowShape shape;
  std::vector<float> values;
  HugeBuffer memory{0};
  std::vector<const std::uint8_t*> pointers;
};

// The values that an s8 row stands for.
std::vector<double> meant_by_s8(const std::vector<float>& values, std::int64_t inputs, std::int64_t groups) {
  const std::int64_t size = inputs / groups;
  std::vector<double> meant(values.size());
  for (std::size_t begin = 0; begin < values.size(); begin += static_cast<std::size_t>(size)) {
    float largest = 0.0F;
    for (std::int64_t k = 0; k < size; ++k)
      largest = std::max(largest, std::fabs(values[begin + static_cast<std::size_t>(k)]));
    const float scale = largest / 127.0F;
    for (std::int64_t k = 0; k < size; ++k) {
      const std::size_t at = begin + static_cast<std::size_t>(k);
      meant[at] = scale == 0.0F ? 0.0 : static_cast<double>(scale) * std::rint(values[at] / scale);
    }
  }
  return meant;
}

// Checks out[m][16] against products in double; errors are held against the sum of the products' magnitudes.
void check_products(const std::vector<double>& x, const std::vector<double>& w, int m, int rows, std::int64_t inputs,
                    const float* out) {
  for (int i = 0; i < m; ++i) {
    for (int r = 0; r < rows; ++r) {
      double sum = 0.0, magnitude = 0.0;
      for (std::int64_t k = 0; k < inputs; ++k) {
        const double product =
            x[static_cast<std::size_t>(i * inputs + k)] * w[static_cast<std::size_t>(r * inputs + k)];
        sum += product;
        magnitude += std::fabs(product);
      }
      CHECK(std::fabs(out[i * 16 + r] - sum) <= 2e-6 * magnitude + 1e-30);
    }
  }
}

std::vector<double> doubles(const std::vector<float>& values) { return {values.begin(), values.end()}; }

struct alignas(64) Out {
  float values[5 * 16];
};

}  // namespace

TEST_CASE("16-bit numbers widen to their values and come back") {
  for (unsigned bits = 0; bits < 0x10000U; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const float f16 = float_from_f16(half), bf16 = float_from_bf16(half);
    const double meant_f16 = value_of_bits(bits, 10), meant_bf16 = value_of_bits(bits, 7);
    if (std::isnan(meant_f16)) {
      CHECK(std::isnan(f16));
      CHECK(std::isnan(float_from_f16(f16_from_float(f16))));
    } else {
      CHECK(f16 == meant_f16);
      CHECK(f16_from_float(f16) == half);
    }
    if (std::isnan(meant_bf16)) {
      CHECK(std::isnan(bf16));
      CHECK(std::isnan(float_from_bf16(bf16_from_float(bf16))));
    } else {
      CHECK(bf16 == meant_bf16);
      CHECK(bf16_from_float(bf16) == half);
    }
  }
}

TEST_CASE("narrowing goes to the nearest, and on a tie to the even one") {
  // Between every two neighbours: the tie, and what lies just beside it.
  for (unsigned bits = 0; bits < 0x7f80U; ++bits) {
    for (const bool f16 : {true, false}) {
      if (f16 && bits >= 0x7c00U) continue;
      const int mantissa = f16 ? 10 : 7;
      const double low = value_of_bits(bits, mantissa);
      // What follows the largest number is where the next would be: from the tie on, an infinity.
      const double high =
          bits == (f16 ? 0x7bffU : 0x7f7fU) ? std::ldexp(1.0, f16 ? 16 : 128) : value_of_bits(bits + 1, mantissa);
      const auto tie = static_cast<float>((low + high) / 2);
      const auto narrowed = [&](float value) {
        return static_cast<unsigned>(f16 ? f16_from_float(value) : bf16_from_float(value));
      };
      CHECK(narrowed(tie) == bits + (bits & 1U));
      CHECK(narrowed(std::nextafter(tie, 0.0F)) == bits);
      CHECK(narrowed(std::nextafter(tie, kInf)) == bits + 1);
      CHECK(narrowed(-tie) == (0x8000U | (bits + (bits & 1U))));
    }
  }
  for (const float large : {65520.0F, 7e4F, 1.3e5F, 1e30F})
    CHECK(f16_from_float(large) == 0x7c00);
  CHECK(f16_from_float(-kInf) == 0xfc00);
  CHECK(f16_from_float(1e-40F) == 0);
  // A NaN whose mantissa lies in the bits that are cut off.
  const float low_nan = std::bit_cast<float>(0x7f800001U);
  CHECK(std::isnan(float_from_bf16(bf16_from_float(low_nan))));
  CHECK(std::isnan(float_from_f16(f16_from_float(low_nan))));
  CHECK(std::isnan(float_from_bf16(bf16_from_float(std::bit_cast<float>(0x7fffffffU)))));
}

TEST_CASE("widen and narrow do every dtype") {
  const std::vector<float> values = normal_values(33, 1);
  std::vector<float> back(values.size());
  std::vector<std::uint16_t> halves(values.size());
  const auto n = static_cast<std::int64_t>(values.size());
  kScalarKernels.narrow(DType::f32, values.data(), n, back.data());
  CHECK(back == values);
  kScalarKernels.widen(DType::f32, values.data(), n, back.data());
  CHECK(back == values);
  kScalarKernels.narrow(DType::bf16, values.data(), n, halves.data());
  kScalarKernels.widen(DType::bf16, halves.data(), n, back.data());
  for (std::size_t i = 0; i < values.size(); ++i)
    CHECK(back[i] == float_from_bf16(bf16_from_float(values[i])));
  kScalarKernels.narrow(DType::f16, values.data(), n, halves.data());
  kScalarKernels.widen(DType::f16, halves.data(), n, back.data());
  for (std::size_t i = 0; i < values.size(); ++i)
    CHECK(back[i] == float_from_f16(f16_from_float(values[i])));
}

TEST_CASE("activation rows hold what their form says, padded with zeros") {
  const std::vector<float> values = normal_values(96, 4);
  for (const ActivationForm form : {ActivationForm::f32, ActivationForm::bf16, ActivationForm::s8}) {
    const RowShape shape = {.form = form, .inputs = 96, .groups = 3, .int4_order = form == ActivationForm::s8};
    std::vector<std::uint8_t> row(shape.bytes(), 0xff);
    kScalarKernels.write_row(shape, values.data(), row.data());
    const std::size_t element = shape.value_bytes() / 128;
    for (std::size_t at = 96 * element; at < 128 * element; ++at)
      CHECK(row[at] == 0);
    const auto sum_at = [&](std::size_t group) {
      float sum;
      std::memcpy(&sum, row.data() + shape.sums_offset() + group * 4, 4);
      return sum;
    };
    for (std::size_t group = 0; group < 3; ++group) {
      float scale = 0.0F;
      if (form == ActivationForm::s8) {
        std::memcpy(&scale, row.data() + shape.scales_offset() + group * 4, 4);
        float largest = 0.0F;
        for (std::size_t k = 0; k < 32; ++k)
          largest = std::max(largest, std::fabs(values[group * 32 + k]));
        CHECK(scale == largest / 127.0F);
      }
      double sum = 0.0;
      for (std::size_t k = group * 32; k < (group + 1) * 32; ++k) {
        if (form == ActivationForm::f32) {
          float stored;
          std::memcpy(&stored, row.data() + k * 4, 4);
          CHECK(stored == values[k]);
        } else if (form == ActivationForm::bf16) {
          std::uint16_t stored;
          std::memcpy(&stored, row.data() + k * 2, 2);
          CHECK(stored == bf16_from_float(values[k]));
          sum += value_of_bits(stored, 7);
        } else {
          // As documented: the inputs of 8 bytes are 0, 4, 1, 5, 2, 6, 3, 7.
          const std::size_t places[] = {0, 2, 4, 6, 1, 3, 5, 7};
          const auto stored = static_cast<std::int8_t>(row[k / 8 * 8 + places[k % 8]]);
          CHECK(stored == std::rint(values[k] / scale));
          sum += stored;
        }
      }
      if (form == ActivationForm::s8) CHECK(sum_at(group) == sum);
      if (form == ActivationForm::bf16) CHECK(sum_at(group) == doctest::Approx(sum));
    }
  }
}

TEST_CASE("int8 activation rows: ties to even, zeros, subnormals, and what is not finite") {
  const RowShape shape = {.form = ActivationForm::s8, .inputs = 6, .groups = 1};
  std::vector<std::uint8_t> row(shape.bytes());
  const auto write = [&](std::vector<float> values) {
    kScalarKernels.write_row(shape, values.data(), row.data());
    float scale;
    std::memcpy(&scale, row.data() + shape.scales_offset(), 4);
    return scale;
  };
  const auto value = [&](int k) {
    return static_cast<int>(static_cast<std::int8_t>(row[static_cast<std::size_t>(k)]));
  };
  CHECK(write({127.0F, 0.5F, 1.5F, -2.5F, -127.0F, 3.5F}) == 1.0F);
  const int expected[] = {127, 0, 2, -2, -127, 4};
  for (int k = 0; k < 6; ++k)
    CHECK(value(k) == expected[k]);
  CHECK(write({0, 0, -0.0F, 0, 0, 0}) == 0.0F);
  for (int k = 0; k < 6; ++k)
    CHECK(value(k) == 0);
  for (const float bad : {kInf, -kInf, kNan}) {
    CHECK(std::isnan(write({1.0F, bad, 2.0F, 3.0F, 4.0F, 5.0F})));
    for (int k = 0; k < 6; ++k)
      CHECK(value(k) == 0);
  }
  // The scale rounds to a subnormal that is far from a 127th: the value stays within its range.
  write({std::ldexp(190.0F, -149), 0, 0, 0, 0, 0});
  CHECK(value(0) == 127);
  // The scale vanishes.
  CHECK(write({std::ldexp(1.0F, -149), 0, 0, 0, 0, 0}) == 0.0F);
  CHECK(value(0) == 0);
}

TEST_CASE("dense products agree with double") {
  for (const WeightFormat format : {WeightFormat::bf16, WeightFormat::f16}) {
    for (const std::int64_t inputs : {1, 64, 133}) {
      for (const int rows : {1, 7, 16}) {
        const int m = 3;
        const Rows x({.form = ActivationForm::f32, .inputs = inputs}, m, 11);
        const auto stride = static_cast<std::size_t>(inputs) + 3;
        std::vector<std::uint16_t> weights(stride * static_cast<std::size_t>(rows));
        std::vector<double> meant(static_cast<std::size_t>(rows * inputs));
        const std::vector<float> source = normal_values(meant.size(), 12);
        for (std::size_t r = 0; r < static_cast<std::size_t>(rows); ++r) {
          for (std::size_t k = 0; k < static_cast<std::size_t>(inputs); ++k) {
            const std::size_t at = r * static_cast<std::size_t>(inputs) + k;
            const bool bf16 = format == WeightFormat::bf16;
            weights[r * stride + k] = bf16 ? bf16_from_float(source[at]) : f16_from_float(source[at]);
            meant[at] = value_of_bits(weights[r * stride + k], bf16 ? 7 : 10);
          }
        }
        Out out;
        kScalarKernels.tile[static_cast<int>(format)][static_cast<int>(ActivationForm::f32)](
            {.weights = reinterpret_cast<const std::uint8_t*>(weights.data()),
             .weight_stride = stride * 2,
             .rows = rows,
             .inputs = inputs,
             .x = x.pointers.data(),
             .shape = x.shape,
             .m = m,
             .out = out.values});
        check_products(doubles(x.values), meant, m, rows, inputs, out.values);
      }
    }
  }
}

TEST_CASE("packed products agree with double on the unpacked weights") {
  struct Case {
    WeightFormat format;
    std::int64_t inputs, group;
    bool zero_points;
  };
  for (const Case& test : {Case{WeightFormat::int8, 64, 0, false}, Case{WeightFormat::int8, 133, 0, false},
                           Case{WeightFormat::int4, 128, 32, false}, Case{WeightFormat::int4, 192, 64, true},
                           Case{WeightFormat::int4, 128, 128, true}, Case{WeightFormat::int4, 96, 32, true}}) {
    const PackedSpec spec = {.format = test.format,
                             .experts = 1,
                             .hidden = test.inputs,
                             .intermediate = test.group == 0 ? 19 : test.group,  // int8: one block whole, one of 3 rows
                             .group = test.group,
                             .zero_points = test.zero_points};
    const PackedLayout layout(spec);
    HugeBuffer buffer(layout.bytes());
    write_header(buffer.data(), spec);
    auto source = normal_values(static_cast<std::size_t>(spec.hidden * spec.intermediate), 21, 0.02F);
    for (float& value : source)
      value += 0.01F;  // not centred, so that zero points differ from the middle
    pack_float(buffer.data(), layout, 0, Projection::gate,
               {.dtype = DType::f32, .data = source.data(), .row_stride = static_cast<std::size_t>(spec.hidden) * 4},
               1);
    std::vector<float> weights(source.size());
    unpack(buffer.data(), layout, 0, Projection::gate, weights.data());
    for (const ActivationForm form : {ActivationForm::f32, ActivationForm::s8}) {
      const int m = 5;
      const std::int64_t groups = layout.groups(Matrix::w13);
      const bool s8 = form == ActivationForm::s8;
      const Rows x({.form = form,
                    .inputs = spec.hidden,
                    .groups = groups,
                    .int4_order = s8 && test.format == WeightFormat::int4},
                   m, 22);
      const std::vector<double> meant = s8 ? meant_by_s8(x.values, spec.hidden, groups) : doubles(x.values);
      for (std::int64_t block = 0; block < layout.blocks(Matrix::w13); ++block) {
        const int rows = static_cast<int>(std::min<std::int64_t>(16, spec.intermediate - block * 16));
        Out out;
        kScalarKernels.tile[static_cast<int>(test.format)][static_cast<int>(form)](
            {.weights = buffer.data() + layout.block_offset(Matrix::w13, 0, block, 0),
             .inputs = spec.hidden,
             .groups = groups,
             .zero_points = test.zero_points,
             .x = x.pointers.data(),
             .shape = x.shape,
             .m = m,
             .out = out.values});
        const std::vector<double> of_block(weights.begin() + block * 16 * spec.hidden,
                                           weights.begin() + (block * 16 + rows) * spec.hidden);
        check_products(meant, of_block, m, rows, spec.hidden, out.values);
        for (int i = 0; i < m; ++i) {
          for (int r = rows; r < 16; ++r)
            CHECK(out.values[i * 16 + r] == 0.0F);  // padding rows
        }
      }
    }
  }
}

TEST_CASE("activations are those of activation.py") {
  const auto sigmoid = [](double x) { return 1.0 / (1.0 + std::exp(-x)); };
  const auto clamp = [](double x, double limit) { return std::fmin(std::fmax(x, -limit), limit); };
  const std::vector<float> gate = normal_values(32, 31, 4.0F), up = normal_values(32, 32, 4.0F);
  const std::vector<float> gate_bias = normal_values(16, 33), up_bias = normal_values(16, 34);
  for (int kind = 0; kind <= static_cast<int>(Activation::silu_then_clamp); ++kind) {
    for (const bool gated : {true, false}) {
      for (const bool limited : {true, false}) {
        for (const bool biased : {true, false}) {
          const ActivationSpec spec = {
              .kind = static_cast<Activation>(kind), .gated = gated, .limited = limited, .limit = 2.0F};
          if (!gated && kind >= static_cast<int>(Activation::swiglu_oai)) continue;
          if (!limited && spec.kind == Activation::silu_then_clamp) continue;
          float h[32];
          kScalarKernels.activate(spec, 2, gate.data(), gated ? up.data() : nullptr,
                                  biased ? gate_bias.data() : nullptr, biased && gated ? up_bias.data() : nullptr, h);
          for (std::size_t i = 0; i < 32; ++i) {
            double g = biased ? gate[i] + gate_bias[i % 16] : gate[i];
            double u = biased ? up[i] + up_bias[i % 16] : up[i];
            if (gated && limited) {
              u = clamp(u, 2.0);
              if (spec.kind != Activation::silu_then_clamp) g = std::fmin(g, 2.0);
            }
            double expected = 0.0;
            switch (spec.kind) {
              case Activation::silu: expected = g * sigmoid(g); break;
              case Activation::gelu: expected = g * 0.5 * std::erfc(-g / std::sqrt(2.0)); break;
              case Activation::gelu_tanh:
                expected = g * sigmoid(2.0 * std::sqrt(2.0 / std::acos(-1.0)) * (g + 0.044715 * g * g * g));
                break;
              case Activation::relu: expected = std::fmax(g, 0.0); break;
              case Activation::relu2: expected = std::pow(std::fmax(g, 0.0), 2.0); break;
              case Activation::sigmoid: expected = sigmoid(g); break;
              case Activation::identity: expected = g; break;
              case Activation::swiglu_oai: expected = g * sigmoid(1.702F * g) * (u + 1.0); break;
              case Activation::silu_then_clamp: expected = std::fmin(g * sigmoid(g), 2.0) * u; break;
            }
            if (gated && spec.kind < Activation::swiglu_oai) expected *= u;
            CHECK(h[i] == doctest::Approx(expected).epsilon(1e-6));
          }
        }
      }
    }
  }
}

TEST_CASE("activations treat what is not finite as PyTorch does") {
  const auto activated = [](Activation kind, float value, bool limited = false) {
    float gate[16], ones[16], h[16];
    std::fill_n(gate, 16, value);
    std::fill_n(ones, 16, 1.0F);
    kScalarKernels.activate({.kind = kind, .limited = limited, .limit = 2.0F}, 1, gate, ones, nullptr, nullptr, h);
    return h[15];
  };
  for (int kind = 0; kind <= static_cast<int>(Activation::silu_then_clamp); ++kind) {
    CHECK(std::isnan(activated(static_cast<Activation>(kind), kNan, true)));
  }
  CHECK(std::isnan(activated(Activation::silu, -kInf)));
  CHECK(activated(Activation::silu, kInf) == kInf);
  CHECK(activated(Activation::silu, kInf, true) == doctest::Approx(2.0 / (1.0 + std::exp(-2.0))));
  CHECK(activated(Activation::relu, -kInf) == 0.0F);
  CHECK(activated(Activation::sigmoid, -kInf) == 0.0F);
}

TEST_CASE("accumulate weighs values and their bias into the sums it is given") {
  const std::vector<float> values = normal_values(32, 41), bias = normal_values(16, 42);
  const float weights[] = {0.25F, -2.0F};
  float first[16], second[16];
  for (const bool biased : {true, false}) {
    std::fill_n(first, 16, 1.0F);
    std::fill_n(second, 16, 3.0F);
    float* const sums[] = {second, first};
    kScalarKernels.accumulate(2, values.data(), biased ? bias.data() : nullptr, weights, sums);
    for (std::size_t r = 0; r < 16; ++r) {
      const double b = biased ? bias[r] : 0.0;
      CHECK(second[r] == doctest::Approx(3.0 + 0.25 * (values[r] + b)));
      CHECK(first[r] == doctest::Approx(1.0 - 2.0 * (values[16 + r] + b)));
    }
  }
}

TEST_CASE("a table is chosen by name, and a wrong name lists the right ones") {
  CHECK(available_kernels().back() == &kScalarKernels);
  CHECK(find_kernels("scalar") == &kScalarKernels);
  CHECK(find_kernels("sse9") == nullptr);
  const char* const before = std::getenv("MOE_FX_ISA");
  const std::string saved = before == nullptr ? "" : before;
  setenv("MOE_FX_ISA", "scalar", 1);
  CHECK(&chosen_kernels() == &kScalarKernels);
  setenv("MOE_FX_ISA", "sse9", 1);
  std::string message;
  try {
    chosen_kernels();
  } catch (const std::invalid_argument& error) {
    message = error.what();
  }
  CHECK(message.find("MOE_FX_ISA=sse9") != std::string::npos);
  CHECK(message.find("scalar") != std::string::npos);
  setenv("MOE_FX_ISA", "", 1);
  CHECK(&chosen_kernels() == available_kernels().front());
  if (before == nullptr) {
    unsetenv("MOE_FX_ISA");
  } else {
    setenv("MOE_FX_ISA", saved.c_str(), 1);
  }
}

TEST_CASE("forms have names") {
  CHECK(form_name(ActivationForm::f32) == "f32");
  CHECK(form_name(ActivationForm::bf16) == "bf16");
  CHECK(form_name(ActivationForm::s8) == "s8");
}
