// The portable kernels: plain loops that read the layouts as they are documented. They are what every other table is
// tested against, and what runs where no other table does.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/float_bits.h"
#include "cpu/kernels.h"

namespace moe_fx::cpu {

namespace {

constexpr int kRows = static_cast<int>(kBlockRows);

template <typename T>
T load(const std::uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

const float* f32_values(const std::uint8_t* row) { return reinterpret_cast<const float*>(row); }

// --- Products --------------------------------------------------------------------------------------------------------

template <float (*ToFloat)(std::uint16_t)>
void dense_tile(const Tile& tile) {
  for (int i = 0; i < tile.m; ++i) {
    const float* const x = f32_values(tile.x[i]);
    float* const out = tile.out + i * kRows;
    std::fill_n(out, kRows, 0.0F);
    for (int r = 0; r < tile.rows; ++r) {
      const auto* const w = reinterpret_cast<const std::uint16_t*>(tile.weights + r * tile.weight_stride);
      float sum = 0.0F;
      for (std::int64_t k = 0; k < tile.inputs; ++k)
        sum += x[k] * ToFloat(w[k]);
      out[r] = sum;
    }
  }
}

// The parts of a packed block, found from what a tile says.
struct Int8Block {
  explicit Int8Block(const Tile& tile)
      : scales(reinterpret_cast<const float*>(tile.weights)),
        values(reinterpret_cast<const std::int8_t*>(tile.weights + kRows * sizeof(float))) {}

  int value(std::int64_t k, int r) const { return values[(k / 4 * kRows + r) * 4 + k % 4]; }

  const float* scales;
  const std::int8_t* values;
};

struct Int4Block {
  explicit Int4Block(const Tile& tile)
      : multiplier(load<float>(tile.weights)),
        scales(reinterpret_cast<const std::uint16_t*>(tile.weights + kLine)),
        zeros(tile.zero_points ? tile.weights + kLine + tile.groups * kRows * 2 : nullptr) {
    const std::int64_t record = tile.zero_points ? 3 : 2;
    values = tile.weights + kLine + round_up(tile.groups * kRows * record, kLine);
  }

  float scale(std::int64_t group, int r) const { return multiplier * float_from_f16(scales[group * kRows + r]); }
  int zero(std::int64_t group, int r) const { return zeros == nullptr ? kInt4Middle : zeros[group * kRows + r]; }
  int value(std::int64_t k, int r) const {
    const auto word = load<std::uint16_t>(values + ((k / 8 * kRows + r) * 2 + k % 2) * 2);
    return (word >> (k % 8 / 2 * 4)) & 15;
  }

  float multiplier;
  const std::uint16_t* scales;
  const std::uint8_t* zeros;
  const std::uint8_t* values;
};

void int8_tile_f32(const Tile& tile) {
  const Int8Block block(tile);
  for (int i = 0; i < tile.m; ++i) {
    const float* const x = f32_values(tile.x[i]);
    float sums[kRows] = {};
    for (std::int64_t k = 0; k < tile.inputs; ++k) {
      for (int r = 0; r < kRows; ++r)
        sums[r] += x[k] * static_cast<float>(block.value(k, r));
    }
    for (int r = 0; r < kRows; ++r)
      tile.out[i * kRows + r] = block.scales[r] * sums[r];
  }
}

void int8_tile_s8(const Tile& tile) {
  const Int8Block block(tile);
  for (int i = 0; i < tile.m; ++i) {
    const auto* const x = reinterpret_cast<const std::int8_t*>(tile.x[i]);
    const float x_scale = load<float>(tile.x[i] + tile.shape.scales_offset());
    std::int32_t sums[kRows] = {};
    for (std::int64_t k = 0; k < tile.inputs; ++k) {
      for (int r = 0; r < kRows; ++r)
        sums[r] += x[k] * block.value(k, r);
    }
    for (int r = 0; r < kRows; ++r)
      tile.out[i * kRows + r] = block.scales[r] * x_scale * static_cast<float>(sums[r]);
  }
}

void int4_tile_f32(const Tile& tile) {
  const Int4Block block(tile);
  const std::int64_t size = tile.inputs / tile.groups;
  for (int i = 0; i < tile.m; ++i) {
    const float* const x = f32_values(tile.x[i]);
    float sums[kRows] = {};
    for (std::int64_t g = 0; g < tile.groups; ++g) {
      float scales[kRows];
      for (int r = 0; r < kRows; ++r)
        scales[r] = block.scale(g, r);
      for (std::int64_t k = g * size; k < (g + 1) * size; ++k) {
        // 5 bits times a scale of 11 bits: the dequantised weight is exact.
        for (int r = 0; r < kRows; ++r) {
          sums[r] += x[k] * (static_cast<float>(block.value(k, r) - block.zero(g, r)) * scales[r]);
        }
      }
    }
    std::copy_n(sums, kRows, tile.out + i * kRows);
  }
}

void int4_tile_s8(const Tile& tile) {
  const Int4Block block(tile);
  const std::int64_t size = tile.inputs / tile.groups;
  for (int i = 0; i < tile.m; ++i) {
    const auto* const x = reinterpret_cast<const std::int8_t*>(tile.x[i]);
    const std::uint8_t* const x_scales = tile.x[i] + tile.shape.scales_offset();
    const std::uint8_t* const x_sums = tile.x[i] + tile.shape.sums_offset();
    float* const out = tile.out + i * kRows;
    std::fill_n(out, kRows, 0.0F);
    for (std::int64_t g = 0; g < tile.groups; ++g) {
      const auto x_scale = load<float>(x_scales + g * 4);
      const auto x_sum = static_cast<std::int32_t>(load<float>(x_sums + g * 4));
      std::int32_t sums[kRows] = {};
      for (std::int64_t k = g * size; k < (g + 1) * size; k += 8) {
        for (int p = 0; p < 8; ++p) {
          for (int r = 0; r < kRows; ++r)
            sums[r] += x[k + p] * block.value(k + kInt4ByteOrder[p], r);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        out[r] += block.scale(g, r) * x_scale * static_cast<float>(sums[r] - block.zero(g, r) * x_sum);
      }
    }
  }
}

ActivationForm exact_form(WeightFormat, DType) { return ActivationForm::f32; }

// --- Rows ------------------------------------------------------------------------------------------------------------

void widen(DType dtype, const void* values, std::int64_t n, float* out) {
  const auto* const halves = static_cast<const std::uint16_t*>(values);
  switch (dtype) {
    case DType::f32: std::copy_n(static_cast<const float*>(values), n, out); return;
    case DType::bf16: std::transform(halves, halves + n, out, float_from_bf16); return;
    case DType::f16: std::transform(halves, halves + n, out, float_from_f16); return;
  }
}

void narrow(DType dtype, const float* values, std::int64_t n, void* out) {
  auto* const halves = static_cast<std::uint16_t*>(out);
  switch (dtype) {
    case DType::f32: std::copy_n(values, n, static_cast<float*>(out)); return;
    case DType::bf16: std::transform(values, values + n, halves, bf16_from_float); return;
    case DType::f16: std::transform(values, values + n, halves, f16_from_float); return;
  }
}

void write_bf16_row(const RowShape& shape, const float* values, std::uint8_t* row) {
  auto* const halves = reinterpret_cast<std::uint16_t*>(row);
  auto* const sums = reinterpret_cast<float*>(row + shape.sums_offset());
  const std::int64_t size = shape.inputs / shape.groups;
  for (std::int64_t g = 0; g < shape.groups; ++g) {
    float sum = 0.0F;
    for (std::int64_t k = g * size; k < (g + 1) * size; ++k) {
      halves[k] = bf16_from_float(values[k]);
      sum += float_from_bf16(halves[k]);
    }
    sums[g] = sum;
  }
}

void write_s8_row(const RowShape& shape, const float* values, std::uint8_t* row) {
  auto* const bytes = reinterpret_cast<std::int8_t*>(row);
  auto* const scales = reinterpret_cast<float*>(row + shape.scales_offset());
  auto* const sums = reinterpret_cast<float*>(row + shape.sums_offset());
  const std::int64_t size = shape.inputs / shape.groups;
  for (std::int64_t g = 0; g < shape.groups; ++g) {
    const float* const group = values + g * size;
    float largest = 0.0F;
    bool finite = true;
    for (std::int64_t k = 0; k < size; ++k) {
      finite = finite && std::isfinite(group[k]);
      largest = std::max(largest, std::fabs(group[k]));
    }
    scales[g] = finite ? largest / 127.0F : std::numeric_limits<float>::quiet_NaN();
    sums[g] = 0.0F;
    if (!(scales[g] > 0.0F)) continue;  // zeros, or not finite: the values are zeros already
    std::int32_t sum = 0;
    for (std::int64_t place = g * size; place < (g + 1) * size; ++place) {
      const std::int64_t input = shape.int4_order ? place / 8 * 8 + kInt4ByteOrder[place % 8] : place;
      // Only a scale that is subnormal, and so rounded far, lets a quotient pass 127.
      const float quotient = std::clamp(values[input] / scales[g], -127.0F, 127.0F);
      bytes[place] = static_cast<std::int8_t>(std::nearbyint(quotient));
      sum += bytes[place];
    }
    sums[g] = static_cast<float>(sum);
  }
}

void write_row(const RowShape& shape, const float* values, std::uint8_t* row) {
  std::memset(row, 0, shape.bytes());
  switch (shape.form) {
    case ActivationForm::f32: std::memcpy(row, values, static_cast<std::size_t>(shape.inputs) * sizeof(float)); return;
    case ActivationForm::bf16: write_bf16_row(shape, values, row); return;
    case ActivationForm::s8: write_s8_row(shape, values, row); return;
  }
}

// --- Activation and combination --------------------------------------------------------------------------------------

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

// PyTorch's formulas, in double; what is not finite comes out as there.
double unary(Activation kind, double x) {
  switch (kind) {
    case Activation::silu:
    case Activation::silu_then_clamp:
    case Activation::swiglu_oai: return x / (1.0 + std::exp(-x));
    case Activation::gelu: return 0.5 * x * (1.0 + std::erf(x * std::sqrt(0.5)));
    case Activation::gelu_tanh: {
      constexpr double kSqrt2OverPi = 0.79788456080286535588;
      return 0.5 * x * (1.0 + std::tanh(kSqrt2OverPi * (x + 0.044715 * x * x * x)));
    }
    case Activation::relu: return x < 0.0 ? 0.0 : x;
    case Activation::relu2: return x < 0.0 ? 0.0 : x * x;
    case Activation::sigmoid: return sigmoid(x);
    case Activation::identity: return x;
  }
  return x;
}

// Comparisons are such that a NaN stays one.
double at_most(double x, double limit) { return x > limit ? limit : x; }
double within(double x, double limit) { return x < -limit ? -limit : at_most(x, limit); }

double gated(const ActivationSpec& spec, double gate, double up) {
  const double limit = spec.limit;
  if (spec.limited) {
    up = within(up, limit);
    if (spec.kind != Activation::silu_then_clamp) gate = at_most(gate, limit);
  }
  if (spec.kind == Activation::swiglu_oai) return (up + 1.0) * (gate * sigmoid(gate * double{spec.alpha}));
  const double activated = unary(spec.kind, gate);
  return (spec.kind == Activation::silu_then_clamp ? at_most(activated, limit) : activated) * up;
}

void activate(const ActivationSpec& spec, int m, const float* gate, const float* up, const float* gate_bias,
              const float* up_bias, float* h) {
  for (int i = 0; i < m * kRows; ++i) {
    const float g = gate_bias == nullptr ? gate[i] : gate[i] + gate_bias[i % kRows];
    if (!spec.gated) {
      h[i] = static_cast<float>(unary(spec.kind, g));
      continue;
    }
    const float u = up_bias == nullptr ? up[i] : up[i] + up_bias[i % kRows];
    h[i] = static_cast<float>(gated(spec, g, u));
  }
}

void accumulate(int m, const float* values, const float* bias, const float* weights, float* const* sums) {
  for (int i = 0; i < m; ++i) {
    for (int r = 0; r < kRows; ++r) {
      const float value = values[i * kRows + r];
      sums[i][r] += weights[i] * (bias == nullptr ? value : value + bias[r]);
    }
  }
}

std::uint64_t sum_words(const std::uint8_t* from, std::size_t bytes) {
  std::uint64_t sum = 0;
  for (std::size_t at = 0; at < bytes; at += sizeof(std::uint64_t)) {
    std::uint64_t word;
    std::memcpy(&word, from + at, sizeof(word));
    sum += word;
  }
  return sum;
}

}  // namespace

const Kernels kScalarKernels = {
    .name = "scalar",
    .tile =
        {
            // f32, bf16, s8
            {dense_tile<float_from_bf16>, nullptr, nullptr},  // bf16
            {dense_tile<float_from_f16>, nullptr, nullptr},   // f16
            {int8_tile_f32, nullptr, int8_tile_s8},           // int8
            {int4_tile_f32, nullptr, int4_tile_s8},           // int4
        },
    .exact_form = exact_form,
    .widen = widen,
    .narrow = narrow,
    .write_row = write_row,
    .activate = activate,
    .accumulate = accumulate,
    .sum_words = sum_words,
};

}  // namespace moe_fx::cpu
