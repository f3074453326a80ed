// The element-wise kernels (widening, rounding, quantising, activations, the weighted sum) as plain loops that the
// compiler vectorises. Each instruction set's file includes this text inside its own anonymous namespace, so that the
// linker never hands one set's code to another. Only trivial helpers of the standard library may be used for the same
// reason. Include the needed headers before.

constexpr float kLog2E = 1.44269504088896341F;
constexpr float kLn2High = 0.693145751953125F;
constexpr float kLn2Low = 1.42860682030941723212e-6F;

inline float from_bits(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline std::uint32_t to_bits(float value) { return __builtin_bit_cast(std::uint32_t, value); }

// Comparisons are written so that NaN passes through the first argument.
inline float at_most(float x, float bound) { return x > bound ? bound : x; }
inline float at_least(float x, float bound) { return x < bound ? bound : x; }

// e^x to about 2 ulp; infinity above 88.7, 0 far below, NaN for NaN. Cody-Waite reduction and a polynomial of degree 6
// for 2^r (Taylor coefficients of e^x on |r| <= ln2/2).
inline float exponential(float x) {
  constexpr float kRounder = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer
  const float bounded = at_least(at_most(x, 89.5F), -104.0F);
  const float shifted = bounded * kLog2E + kRounder;
  const float n = shifted - kRounder;
  const std::int32_t exponent = static_cast<std::int32_t>(to_bits(shifted) - to_bits(kRounder));
  float r = bounded - n * kLn2High;
  r -= n * kLn2Low;
  float p = 1.3888889e-3F;
  p = p * r + 8.3333338e-3F;
  p = p * r + 4.1666668e-2F;
  p = p * r + 1.6666667e-1F;
  p = p * r + 0.5F;
  p = p * r + 1.0F;
  p = p * r + 1.0F;
  // In two steps, since 2^128 and the subnormal powers are no float of their own.
  const std::int32_t half = exponent >> 1;
  const float first = from_bits(static_cast<std::uint32_t>(half + 127) << 23);
  const float second = from_bits(static_cast<std::uint32_t>(exponent - half + 127) << 23);
  return p * first * second;
}

inline float sigmoid(float x) { return 1.0F / (1.0F + exponential(-x)); }
inline float silu(float x) { return x / (1.0F + exponential(-x)); }
inline float hyperbolic_tangent(float x) { return 1.0F - 2.0F / (1.0F + exponential(2.0F * x)); }

// Abramowitz and Stegun 7.1.26: within 1.5e-7.
inline float error_function(float x) {
  const float magnitude = __builtin_fabsf(x);
  const float t = 1.0F / (1.0F + 0.3275911F * magnitude);
  float p = 1.061405429F;
  p = p * t - 1.453152027F;
  p = p * t + 1.421413741F;
  p = p * t - 0.284496736F;
  p = p * t + 0.254829592F;
  return __builtin_copysignf(1.0F - p * t * exponential(-x * x), x);
}

inline float gelu(float x) { return 0.5F * x * (1.0F + error_function(x * 0.70710678118654752F)); }
inline float gelu_tanh(float x) {
  return 0.5F * x * (1.0F + hyperbolic_tangent(0.79788456080286536F * (x + 0.044715F * x * x * x)));
}
// Like torch.relu, NaN stays NaN.
inline float relu(float x) { return at_least(x, 0.0F); }

inline std::uint16_t to_bf16(float value) {
  const std::uint32_t bits = to_bits(value);
  const std::uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
  const std::uint32_t quiet = (bits >> 16) | 0x40U;
  return static_cast<std::uint16_t>((bits & 0x7fffffffU) > 0x7f800000U ? quiet : rounded);
}

inline float from_bf16(std::uint16_t value) { return from_bits(static_cast<std::uint32_t>(value) << 16); }

template <class Apply>
inline void apply_rows(int m, const float* gate, const float* up, const float* gate_bias, const float* up_bias,
                       float* h, Apply apply) {
  alignas(64) float zeros[kBlockRows] = {};
  const float* const bg = gate_bias != nullptr ? gate_bias : zeros;
  const float* const bu = up_bias != nullptr ? up_bias : zeros;
  for (int i = 0; i < m; ++i) {
    for (int r = 0; r < kBlockRows; ++r) {
      const float g = gate[i * kBlockRows + r] + bg[r];
      const float u = up != nullptr ? up[i * kBlockRows + r] + bu[r] : 1.0F;
      h[i * kBlockRows + r] = apply(g, u);
    }
  }
}

void activate(const ActivationSpec& spec, int m, const float* gate, const float* up, const float* gate_bias,
              const float* up_bias, float* h) {
  const auto rows = [&](auto apply) { apply_rows(m, gate, spec.gated ? up : nullptr, gate_bias, up_bias, h, apply); };
  // An unlimited activation clamps to infinities, which changes nothing (not even NaN).
  const float limit = spec.limited && spec.gated ? spec.limit : __builtin_inff();
  const auto gated = [&](auto unary) {
    rows([=](float g, float u) { return unary(at_most(g, limit)) * at_least(at_most(u, limit), -limit); });
  };
  switch (spec.kind) {
    case Activation::silu: return gated([](float g) { return silu(g); });
    case Activation::gelu: return gated([](float g) { return gelu(g); });
    case Activation::gelu_tanh: return gated([](float g) { return gelu_tanh(g); });
    case Activation::relu: return gated([](float g) { return relu(g); });
    case Activation::relu2: return gated([](float g) { return relu(g) * relu(g); });
    case Activation::sigmoid: return gated([](float g) { return sigmoid(g); });
    case Activation::identity: return gated([](float g) { return g; });
    case Activation::swiglu_oai: {
      const float alpha = spec.alpha;
      return rows([=](float g, float u) {
        const float clamped = at_most(g, limit);
        return (at_least(at_most(u, limit), -limit) + 1.0F) * (clamped * sigmoid(alpha * clamped));
      });
    }
    case Activation::silu_then_clamp:
      return rows([=](float g, float u) { return at_most(silu(g), limit) * at_least(at_most(u, limit), -limit); });
  }
}

void accumulate(int m, const float* values, const float* bias, const float* weights, float* const* sums) {
  alignas(64) float zeros[kBlockRows] = {};
  const float* const b = bias != nullptr ? bias : zeros;
  for (int i = 0; i < m; ++i) {
    const float weight = weights[i];
    float* const sum = sums[i];
    for (int r = 0; r < kBlockRows; ++r)
      sum[r] += weight * (values[i * kBlockRows + r] + b[r]);
  }
}

// Quantises one group to int8; the scale is NaN, and the values are 0, when one of them is not finite.
struct QuantisedGroup {
  float scale, sum;
};

inline QuantisedGroup quantise_group(const float* values, std::int64_t n, std::int8_t* out) {
  // As bits, magnitudes of floats compare like integers, and everything that is not finite is at the top.
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::uint32_t magnitude = to_bits(values[i]) & 0x7fffffffU;
    largest = magnitude > largest ? magnitude : largest;
  }
  const bool finite = largest < 0x7f800000U;
  const float scale = from_bits(largest) / 127.0F;
  // A scale that is subnormal has no reciprocal: such a row counts as zeros.
  const float inverse = finite && scale > 1.2e-38F ? 1.0F / scale : 0.0F;
  constexpr float kRounder = 12582912.0F;
  std::int32_t sum = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const float bounded = finite ? at_least(at_most(values[i] * inverse, 127.0F), -127.0F) : 0.0F;
    const std::int32_t q = static_cast<std::int32_t>(to_bits(bounded + kRounder) - to_bits(kRounder));
    out[i] = static_cast<std::int8_t>(q);
    sum += q;
  }
  return {finite ? (inverse == 0.0F ? 0.0F : scale) : __builtin_nanf(""), static_cast<float>(sum)};
}

void write_row(const RowShape& shape, const float* values, std::uint8_t* row) {
  const std::int64_t n = shape.inputs;
  const std::int64_t padded = shape.padded();
  const std::int64_t group = n / shape.groups;
  auto* const scales = reinterpret_cast<float*>(row + shape.scales_offset());
  auto* const sums = reinterpret_cast<float*>(row + shape.sums_offset());
  switch (shape.form) {
    case ActivationForm::f32: {
      auto* const out = reinterpret_cast<float*>(row);
      for (std::int64_t i = 0; i < n; ++i)
        out[i] = values[i];
      for (std::int64_t i = n; i < padded; ++i)
        out[i] = 0.0F;
      return;
    }
    case ActivationForm::bf16: {
      auto* const out = reinterpret_cast<std::uint16_t*>(row);
      for (std::int64_t i = 0; i < n; ++i)
        out[i] = to_bf16(values[i]);
      for (std::int64_t i = n; i < padded; ++i)
        out[i] = 0;
      for (std::int64_t g = 0; g < shape.groups; ++g) {
        float lanes[16] = {};
        std::int64_t i = 0;
        for (; i + 16 <= group; i += 16) {
          for (int lane = 0; lane < 16; ++lane)
            lanes[lane] += from_bf16(out[g * group + i + lane]);
        }
        float sum = 0.0F;
        for (; i < group; ++i)
          sum += from_bf16(out[g * group + i]);
        for (const float lane : lanes)
          sum += lane;
        sums[g] = sum;
      }
      return;
    }
    case ActivationForm::s8: {
      auto* const out = reinterpret_cast<std::int8_t*>(row);
      for (std::int64_t g = 0; g < shape.groups; ++g) {
        const QuantisedGroup quantised = quantise_group(values + g * group, group, out + g * group);
        scales[g] = quantised.scale;
        sums[g] = quantised.sum;
      }
      for (std::int64_t i = n; i < padded; ++i)
        out[i] = 0;
      if (shape.int4_order) {
        for (std::int64_t i = 0; i < padded; i += 8) {
          std::int8_t ordered[8];
          for (int j = 0; j < 8; ++j)
            ordered[j] = out[i + kInt4ByteOrder[j]];
          for (int j = 0; j < 8; ++j)
            out[i + j] = ordered[j];
        }
      }
      return;
    }
  }
}

// The sum of a range of 64-bit words, whose size is a multiple of 256 bytes: nothing but loads, prefetched as the
// products prefetch weights.
std::uint64_t sum_words(const std::uint8_t* from, std::size_t bytes) {
  constexpr std::size_t kAhead = 2048;
  std::uint64_t sums[32] = {};
  for (std::size_t at = 0; at < bytes; at += 256) {
    for (std::size_t line = 0; line < 256; line += 64)
      __builtin_prefetch(from + at + kAhead + line, 0, 2);
    const auto* const words = reinterpret_cast<const std::uint64_t*>(from + at);
    for (int i = 0; i < 32; ++i)
      sums[i] += words[i];
  }
  std::uint64_t total = 0;
  for (const std::uint64_t sum : sums)
    total += sum;
  return total;
}
