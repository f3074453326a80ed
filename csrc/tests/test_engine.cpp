// Whole calls of the engine against a reference in double: every format on every table of kernels that this machine can
// run, layouts, activations, routings, numbers of tokens; and that results depend neither on threads nor on nodes.
//
// MOE_FX_ISA, when set, leaves one table to test. MOE_FX_TEST_SAMPLE=n runs every n-th of the many cases, for
// emulators.

#include <dlfcn.h>
#include <doctest/doctest.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/cpu_info.h"
#include "cpu/engine.h"
#include "cpu/float_bits.h"
#include "cpu/memory.h"
#include "cpu/pack.h"

namespace moe_fx::cpu {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

std::size_t index(std::int64_t value) { return static_cast<std::size_t>(value); }

// --- Cases -----------------------------------------------------------------------------------------------------------

// How dense gate and up rows lie beside each other.
enum class GateUp { concatenated, up_first, interleaved, split };

// Which experts the tokens choose.
enum class Routing { distinct, all_on_one, repeated, some_elsewhere };

struct Case {
  std::string name = {};
  WeightFormat format = WeightFormat::bf16;
  bool int8_activations = false;
  std::int64_t group = 0;
  bool zero_points = false;
  int segments = 1;
  std::int64_t experts = 5, hidden = 70, intermediate = 37;
  ActivationSpec activation = {};
  bool biases = false;
  bool weight_on_input = false;
  GateUp gate_up = GateUp::concatenated;
  std::int64_t tokens = 9, top_k = 2;
  Routing routing = Routing::distinct;
  bool expert_map = false;
  IdType ids = IdType::i32;
  DType x = DType::bf16, weights = DType::f32, y = DType::bf16;
  float bad_input = 0.0F;  // when not zero: what stands in one token's row

  ActivationForm form(const Kernels& kernels) const {
    return int8_activations ? ActivationForm::s8 : kernels.exact_form(format, x);
  }
};

std::vector<float> normal_values(std::size_t n, unsigned seed, float deviation) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, deviation);
  std::vector<float> values(n);
  for (float& value : values)
    value = normal(random);
  return values;
}

// Values of a dtype as it stores them.
std::vector<std::uint8_t> stored(DType dtype, const std::vector<float>& values) {
  std::vector<std::uint8_t> bytes(values.size() * dtype_bytes(dtype));
  kScalarKernels.narrow(dtype, values.data(), static_cast<std::int64_t>(values.size()), bytes.data());
  return bytes;
}
std::vector<float> restored(DType dtype, const std::vector<std::uint8_t>& bytes) {
  std::vector<float> values(bytes.size() / dtype_bytes(dtype));
  kScalarKernels.widen(dtype, bytes.data(), static_cast<std::int64_t>(values.size()), values.data());
  return values;
}
std::vector<float> rounded(DType dtype, const std::vector<float>& values) {
  return restored(dtype, stored(dtype, values));
}

// A layer of a case: its weights as the engine takes them, and in fp32 as the reference does.
class TestLayer {
 public:
  explicit TestLayer(const Case& test) : test_(test) {
    layer_.format = test.format;
    layer_.experts = test.experts;
    layer_.hidden = test.hidden;
    layer_.intermediate = test.intermediate;
    layer_.activation = test.activation;
    layer_.weight_on_input = test.weight_on_input;
    layer_.int8_activations = test.int8_activations;
    for (int part = 0; part < 3; ++part) {
      if (part == 1 && !test.activation.gated) continue;
      const std::int64_t rows = part == 2 ? test.hidden : test.intermediate;
      const auto seed = static_cast<unsigned>(part);
      weights_[part] = normal_values(index(test.experts * test.hidden * test.intermediate), 100 + seed,
                                     1.0F / std::sqrt(static_cast<float>(part == 2 ? test.intermediate : test.hidden)));
      if (test.biases) biases_[part] = normal_values(index(test.experts * rows), 200 + seed, 0.5F);
    }
    is_packed(test.format) ? pack() : lay_out();
  }
  TestLayer(const TestLayer&) = delete;
  TestLayer& operator=(const TestLayer&) = delete;

  const Layer& layer() const { return layer_; }

  // Part 0 is the gate, 1 the up, 2 the down projection; null without biases.
  const float* weight_row(int part, std::int64_t expert, std::int64_t row) const {
    const std::int64_t rows = part == 2 ? test_.hidden : test_.intermediate;
    const std::int64_t inputs = part == 2 ? test_.intermediate : test_.hidden;
    return weights_[part].data() + (expert * rows + row) * inputs;
  }
  double bias(int part, std::int64_t expert, std::int64_t row) const {
    if (!test_.biases) return 0.0;
    return biases_[part][index(expert * (part == 2 ? test_.hidden : test_.intermediate) + row)];
  }

  // The shape of the rows that a matrix is multiplied with.
  RowShape shape(ActivationForm form, Matrix matrix) const {
    const bool packed = is_packed(test_.format);
    return {.form = form,
            .inputs = matrix == Matrix::w13 ? test_.hidden : test_.intermediate,
            .groups = packed ? layer_.layout->groups(matrix) : 1,
            .int4_order = form == ActivationForm::s8 && test_.format == WeightFormat::int4};
  }

 private:
  void pack() {
    const PackedSpec spec = {.format = test_.format,
                             .experts = test_.experts,
                             .hidden = test_.hidden,
                             .intermediate = test_.intermediate,
                             .gated = test_.activation.gated,
                             .group = test_.group,
                             .zero_points = test_.zero_points,
                             .biases = test_.biases,
                             .segments = test_.segments};
    auto layout = std::make_shared<PackedLayout>(spec);
    buffer_ = HugeBuffer(layout->bytes());
    Topology topology;
    topology.nodes.push_back({.memory_node = -1, .cpus = {0}});
    begin_packing(buffer_.data(), *layout, topology);
    for (int part = 0; part < 3; ++part) {
      if (weights_[part].empty()) continue;
      const auto projection = static_cast<Projection>(part);
      const std::int64_t inputs = part == 2 ? test_.intermediate : test_.hidden;
      for (std::int64_t e = 0; e < test_.experts; ++e) {
        float* const rows = weights_[part].data() + e * test_.hidden * test_.intermediate;
        pack_float(buffer_.data(), *layout, e, projection,
                   {.dtype = DType::f32, .data = rows, .row_stride = index(inputs) * 4}, 1);
        unpack(buffer_.data(), *layout, e, projection, rows);
        if (!test_.biases) continue;
        const std::int64_t count = part == 2 ? test_.hidden : test_.intermediate;
        pack_bias(buffer_.data(), *layout, e, projection, biases_[part].data() + e * count, 1);
      }
    }
    layer_.packed = buffer_.data();
    layer_.layout = std::move(layout);
  }

  void lay_out() {
    const DType dtype = test_.format == WeightFormat::f16 ? DType::f16 : DType::bf16;
    for (int part = 0; part < 3; ++part) {
      weights_[part] = rounded(dtype, weights_[part]);
      biases_[part] = rounded(dtype, biases_[part]);
    }
    const auto down_row = index(test_.intermediate) * 2;
    dense_[2] = stored(dtype, weights_[2]);
    layer_.down = {dense_[2].data(), index(test_.hidden) * down_row, down_row};
    dense_biases_[2] = stored(dtype, biases_[2]);
    layer_.down_bias = {test_.biases ? dense_biases_[2].data() : nullptr, index(test_.hidden) * 2, 2};
    place(dtype, test_.hidden, weights_, dense_, [&](int part, const std::uint8_t* at, std::size_t e, std::size_t r) {
      (part == 0 ? layer_.gate : layer_.up) = {at, e, r};
    });
    if (!test_.biases) return;
    place(dtype, 1, biases_, dense_biases_, [&](int part, const std::uint8_t* at, std::size_t e, std::size_t r) {
      (part == 0 ? layer_.gate_bias : layer_.up_bias) = {at, e, r};
    });
  }

  // Brings rows of gate and up into the case's layout and tells where each begins.
  template <class Tell>
  void place(DType dtype, std::int64_t inputs, const std::vector<float> (&from)[3], std::vector<std::uint8_t> (&to)[3],
             Tell tell) {
    const std::size_t row = index(inputs) * 2, rows = index(test_.intermediate);
    if (!test_.activation.gated || test_.gate_up == GateUp::split) {
      for (int part = 0; part < (test_.activation.gated ? 2 : 1); ++part) {
        to[part] = stored(dtype, from[part]);
        tell(part, to[part].data(), rows * row, row);
      }
      return;
    }
    const bool interleaved = test_.gate_up == GateUp::interleaved;
    const std::size_t step = interleaved ? 2 * row : row;
    to[0].resize(2 * rows * row * index(test_.experts));
    for (int part = 0; part < 2; ++part) {
      const bool first = (part == 0) != (test_.gate_up == GateUp::up_first);
      const std::size_t begin = first ? 0 : interleaved ? row : rows * row;
      const std::vector<std::uint8_t> bytes = stored(dtype, from[part]);
      for (std::size_t e = 0; e < index(test_.experts); ++e) {
        for (std::size_t r = 0; r < rows; ++r) {
          std::memcpy(to[0].data() + e * 2 * rows * row + begin + r * step, bytes.data() + (e * rows + r) * row, row);
        }
      }
      tell(part, to[0].data() + begin, 2 * rows * row, step);
    }
  }

  Case test_;
  Layer layer_;
  std::vector<float> weights_[3], biases_[3];
  std::vector<std::uint8_t> dense_[3], dense_biases_[3];
  HugeBuffer buffer_{0};
};

// A call's operands. `experts` is what the ids come to: the local expert of each pair, -1 for none.
class TestCall {
 public:
  explicit TestCall(const Case& test, unsigned seed = 1) : test_(test) {
    auto x = normal_values(index(test.tokens * test.hidden), seed, 1.0F);
    if (test.bad_input != 0.0F) x[index(kBadToken * test.hidden + test.hidden / 2)] = test.bad_input;
    x_ = stored(test.x, x);
    const std::int64_t pairs = test.tokens * test.top_k;
    auto weights = normal_values(index(pairs), seed + 1, 0.5F);
    weights_ = stored(test.weights, weights);
    choose(seed);
    y_.assign(index(test.tokens * test.hidden) * dtype_bytes(test.y) + kCanary, 0xa5);
    call_ = {.x_dtype = test.x,
             .x = x_.data(),
             .tokens = test.tokens,
             .top_k = test.top_k,
             .weights_dtype = test.weights,
             .weights = weights_.data(),
             .id_type = test.ids,
             .ids = test.ids == IdType::i32 ? static_cast<const void*>(ids32_.data()) : ids64_.data(),
             .expert_map = test.expert_map ? map_.data() : nullptr,
             .map_size = static_cast<std::int64_t>(map_.size()),
             .y_dtype = test.y,
             .y = y_.data()};
  }
  TestCall(const TestCall&) = delete;
  TestCall& operator=(const TestCall&) = delete;

  const Call& call() const { return call_; }
  std::int64_t expert(std::int64_t pair) const { return experts_[index(pair)]; }
  std::vector<float> x() const { return restored(test_.x, x_); }
  std::vector<float> weights() const { return restored(test_.weights, weights_); }
  std::vector<float> y() const {
    return restored(test_.y, {y_.begin(), y_.end() - static_cast<std::ptrdiff_t>(kCanary)});
  }
  // The bytes of the result; those behind it are untouched.
  const std::vector<std::uint8_t>& y_bytes() const { return y_; }
  bool kept_within() const {
    return std::all_of(y_.end() - static_cast<std::ptrdiff_t>(kCanary), y_.end(), [](auto b) { return b == 0xa5; });
  }
  void clear() { std::fill(y_.begin(), y_.end(), std::uint8_t{0xa5}); }

  static constexpr std::int64_t kBadToken = 3;

 private:
  void choose(unsigned seed) {
    std::mt19937 random(seed + 2);
    std::vector<std::int64_t> order(index(test_.experts));
    std::iota(order.begin(), order.end(), 0);
    for (std::int64_t token = 0; token < test_.tokens; ++token) {
      std::shuffle(order.begin(), order.end(), random);
      for (std::int64_t k = 0; k < test_.top_k; ++k) {
        std::int64_t expert = order[index(k % test_.experts)];
        if (test_.routing == Routing::all_on_one) expert = test_.experts - 1;
        if (test_.routing == Routing::repeated) expert = order[0];
        if (test_.routing == Routing::some_elsewhere && random() % 3 == 0) {
          // Beyond the experts, also where the low 32 bits of a 64-bit id would be an expert.
          const std::int64_t outside[] = {-1, -7, test_.experts, 1 << 30, std::int64_t{1} << 32};
          expert = outside[random() % (test_.ids == IdType::i64 ? 5 : 4)];
        }
        experts_.push_back(expert >= 0 && expert < test_.experts ? expert : -1);
        // With a map, global id 2e + 1 is local expert e; even ids are not here.
        if (test_.expert_map && experts_.back() >= 0) expert = 2 * expert + 1;
        if (test_.expert_map && experts_.back() < 0) expert = expert == test_.experts ? 2 * expert : expert + 1;
        ids64_.push_back(expert);
        ids32_.push_back(static_cast<std::int32_t>(expert));
      }
    }
    if (!test_.expert_map) return;
    for (std::int64_t id = 0; id < 2 * test_.experts; ++id) {
      map_.push_back(id % 2 == 1 ? static_cast<std::int32_t>(id / 2) : -1);
    }
  }

  static constexpr std::size_t kCanary = 64;
  Case test_;
  std::vector<std::uint8_t> x_, weights_, y_;
  std::vector<std::int32_t> ids32_, map_;
  std::vector<std::int64_t> ids64_, experts_;
  Call call_;
};

// --- Reference -------------------------------------------------------------------------------------------------------

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

// activation.py in double.
double activated(const ActivationSpec& spec, double gate, double up) {
  const auto below = [&](double x) { return spec.limited && x > spec.limit ? double{spec.limit} : x; };
  if (spec.gated) {
    if (spec.kind != Activation::silu_then_clamp) gate = below(gate);
    up = below(up);
    if (spec.limited && up < -spec.limit) up = -spec.limit;
  } else {
    up = 1.0;
  }
  switch (spec.kind) {
    case Activation::silu: return gate * sigmoid(gate) * up;
    case Activation::gelu: return gate * 0.5 * std::erfc(-gate / std::sqrt(2.0)) * up;
    case Activation::gelu_tanh: {
      const double inner = std::sqrt(8.0 / std::acos(-1.0)) * (gate + 0.044715 * gate * gate * gate);
      return gate * sigmoid(inner) * up;
    }
    case Activation::relu: return (gate > 0.0 ? gate : 0.0) * up;
    case Activation::relu2: return (gate > 0.0 ? gate * gate : 0.0) * up;
    case Activation::sigmoid: return sigmoid(gate) * up;
    case Activation::identity: return gate * up;
    case Activation::swiglu_oai: return gate * sigmoid(double{spec.alpha} * gate) * (up + 1.0);
    case Activation::silu_then_clamp: return below(gate * sigmoid(gate)) * up;
  }
  return kNan;
}

// What a row of a form holds of fp32 values, as the table under test writes it, and how far a value that lies on the
// edge of rounding may move.
struct Held {
  Held(const Kernels& kernels, const RowShape& shape, const std::vector<float>& values)
      : values(values.begin(), values.end()), steps(values.size()) {
    if (shape.form == ActivationForm::f32) return;
    if (shape.form == ActivationForm::bf16) {
      for (std::size_t k = 0; k < values.size(); ++k) {
        this->values[k] = float_from_bf16(bf16_from_float(values[k]));
        steps[k] = std::fabs(this->values[k]) / 128.0;
      }
      return;
    }
    std::vector<std::uint8_t> row(shape.bytes());
    kernels.write_row(shape, values.data(), row.data());
    const std::int64_t size = shape.inputs / shape.groups;
    for (std::int64_t place = 0; place < shape.inputs; ++place) {
      const std::int64_t k = shape.int4_order ? place / 8 * 8 + kInt4ByteOrder[place % 8] : place;
      float scale;
      std::memcpy(&scale, row.data() + shape.scales_offset() + k / size * 4, 4);
      this->values[index(k)] = double{scale} * static_cast<std::int8_t>(row[index(place)]);
      steps[index(k)] = scale;
    }
  }

  std::vector<double> values, steps;
};

struct Product {
  double sum = 0.0, magnitude = 0.0, flip = 0.0;  // flip: what one value on the edge of rounding may change
};

Product dot(const Held& x, const float* weights) {
  Product product;
  for (std::size_t k = 0; k < x.values.size(); ++k) {
    const double term = x.values[k] * weights[k];
    product.sum += term;
    product.magnitude += std::fabs(term);
    product.flip = std::max(product.flip, x.steps[k] * std::fabs(weights[k]));
  }
  return product;
}

// The result of a call in double, and by how much the engine may miss it.
struct Expected {
  Expected(const Kernels& kernels, const Case& test, const TestLayer& layer, const TestCall& call)
      : y(index(test.tokens * test.hidden)), bounds(y.size()) {
    const ActivationForm form = test.form(kernels);
    const std::vector<float> x = call.x(), weights = call.weights();
    // int4 values are multiplied with 128 added where the products are bf16: fp32 sums lose that much more.
    const bool offset = test.format == WeightFormat::int4 && form == ActivationForm::bf16;
    const double precision = offset ? 1e-4 : 4e-6;
    for (std::int64_t pair = 0; pair < test.tokens * test.top_k; ++pair) {
      const std::int64_t token = pair / test.top_k, expert = call.expert(pair);
      if (expert < 0) continue;
      std::vector<float> row(x.begin() + token * test.hidden, x.begin() + (token + 1) * test.hidden);
      if (test.weight_on_input) {
        for (float& value : row)
          value *= weights[index(pair)];
        row = rounded(test.x, row);
      }
      const Held held(kernels, layer.shape(form, Matrix::w13), row);
      std::vector<float> h(index(test.intermediate));
      double h_error = 0.0;
      for (std::int64_t i = 0; i < test.intermediate; ++i) {
        const Product gate = dot(held, layer.weight_row(0, expert, i));
        const double gate_value = gate.sum + layer.bias(0, expert, i);
        const Product up = test.activation.gated ? dot(held, layer.weight_row(1, expert, i)) : Product{};
        const double up_value = test.activation.gated ? up.sum + layer.bias(1, expert, i) : 0.0;
        h[index(i)] = static_cast<float>(activated(test.activation, gate_value, up_value));
        const double slope = 2.0 * std::max(1.0, std::fabs(gate_value)) * std::max(1.0, std::fabs(up_value) + 1.0);
        h_error = std::max(h_error, precision * slope * (1.0 + gate.magnitude + up.magnitude));
      }
      const Held held_h(kernels, layer.shape(form, Matrix::w2), h);
      const double weight = test.weight_on_input ? 1.0 : weights[index(pair)];
      for (std::int64_t i = 0; i < test.hidden; ++i) {
        const float* const row_weights = layer.weight_row(2, expert, i);
        const Product down = dot(held_h, row_weights);
        const double bias = layer.bias(2, expert, i);
        double spread = 0.0;
        for (std::int64_t k = 0; k < test.intermediate; ++k)
          spread += row_weights[k] * row_weights[k];
        y[index(token * test.hidden + i)] += weight * (down.sum + bias);
        bounds[index(token * test.hidden + i)] +=
            std::fabs(weight) *
            (precision * (down.magnitude + std::fabs(bias)) + 2.0 * down.flip + 3.0 * h_error * std::sqrt(spread));
      }
    }
    const double step = test.y == DType::f32 ? 1e-6 : test.y == DType::bf16 ? 1.0 / 256 : 1.0 / 2048;
    for (std::size_t i = 0; i < y.size(); ++i)
      bounds[i] += 1.01 * step * (std::fabs(y[i]) + bounds[i]) + 1e-7;
  }

  // What is wrong with the worst wrong one of the results, or nothing.
  std::string complaint(const Case& test, const std::vector<float>& got) const {
    double worst = 1.0;
    std::string message;
    for (std::size_t i = 0; i < y.size(); ++i) {
      const double ratio = std::fabs(got[i] - y[i]) / bounds[i];
      if (ratio <= worst) continue;  // NaN is worse than everything
      worst = std::isnan(ratio) ? kInf : ratio;
      const std::size_t hidden = index(test.hidden);
      message = "y[" + std::to_string(i / hidden) + "][" + std::to_string(i % hidden) + "] is " +
                std::to_string(got[i]) + ", not " + std::to_string(y[i]) + " +- " + std::to_string(bounds[i]);
      if (std::isnan(ratio)) return message;
    }
    return message;
  }

  std::vector<double> y, bounds;
};

// --- The cases -------------------------------------------------------------------------------------------------------

// One of every way to store weights and to hold activations.
std::vector<Case> format_cases() {
  std::vector<Case> cases;
  cases.push_back({.name = "bf16"});
  cases.push_back({.name = "f16", .format = WeightFormat::f16, .x = DType::f16, .y = DType::f16});
  for (const bool int8_activations : {false, true}) {
    const std::string suffix = int8_activations ? " x int8" : "";
    const auto add = [&](const std::string& name, Case test) {
      test.name = name + suffix;
      test.int8_activations = int8_activations;
      cases.push_back(test);
    };
    add("int8", {.format = WeightFormat::int8});
    add("int8 of f32", {.format = WeightFormat::int8, .x = DType::f32, .y = DType::f32});
    for (const bool zero_points : {false, true}) {
      add(zero_points ? "int4, zero points" : "int4",
          {.format = WeightFormat::int4, .group = 32, .zero_points = zero_points, .hidden = 96, .intermediate = 64});
    }
    add("int4 by 64 of f16", {.format = WeightFormat::int4,
                              .group = 64,
                              .zero_points = true,
                              .hidden = 128,
                              .intermediate = 64,
                              .x = DType::f16,
                              .y = DType::f16});
    add("int4 by 128", {.format = WeightFormat::int4, .group = 128, .hidden = 256, .intermediate = 128});
  }
  return cases;
}

// Changes to a case, each by itself.
struct Variation {
  std::string name;
  std::function<void(Case&)> apply;
};

std::vector<Variation> variations() {
  std::vector<Variation> all;
  all.push_back({"as it is", [](Case&) {}});
  for (const std::int64_t tokens : {1, 2, 3, 17, 65, 130, 300}) {
    all.push_back({std::to_string(tokens) + " tokens", [=](Case& test) { test.tokens = tokens; }});
  }
  all.push_back({"biases", [](Case& test) { test.biases = true; }});
  all.push_back({"biases, 67 tokens", [](Case& test) { test.biases = true, test.tokens = 67; }});
  all.push_back({"weights on the input", [](Case& test) { test.weight_on_input = true; }});
  all.push_back({"weights on the input, biases", [](Case& test) { test.weight_on_input = test.biases = true; }});
  all.push_back({"top 0", [](Case& test) { test.top_k = 0; }});
  all.push_back({"top 1", [](Case& test) { test.top_k = 1; }});
  all.push_back({"all experts", [](Case& test) { test.top_k = test.experts; }});
  all.push_back({"one expert", [](Case& test) { test.experts = test.top_k = 1; }});
  all.push_back({"most experts empty", [](Case& test) { test.experts = 40, test.tokens = 3; }});
  all.push_back({"all on one expert", [](Case& test) {
                   test.routing = Routing::all_on_one;
                   test.top_k = 1;
                   test.tokens = 150;
                 }});
  all.push_back({"an expert twice", [](Case& test) { test.routing = Routing::repeated; }});
  all.push_back({"experts elsewhere", [](Case& test) { test.routing = Routing::some_elsewhere; }});
  all.push_back({"experts elsewhere, 64-bit ids", [](Case& test) {
                   test.routing = Routing::some_elsewhere;
                   test.ids = IdType::i64;
                   test.weight_on_input = true;
                 }});
  for (const IdType ids : {IdType::i32, IdType::i64}) {
    all.push_back({ids == IdType::i32 ? "a map" : "a map, 64-bit ids", [=](Case& test) {
                     test.routing = Routing::some_elsewhere;
                     test.expert_map = true;
                     test.ids = ids;
                   }});
  }
  all.push_back({"bf16 weights, f32 result", [](Case& test) { test.weights = DType::bf16, test.y = DType::f32; }});
  all.push_back({"f16 weights", [](Case& test) { test.weights = DType::f16; }});
  for (const GateUp gate_up : {GateUp::up_first, GateUp::interleaved, GateUp::split}) {
    all.push_back({"layout " + std::to_string(static_cast<int>(gate_up)), [=](Case& test) {
                     test.gate_up = gate_up;
                     test.biases = true;
                   }});
  }
  for (int kind = 0; kind <= static_cast<int>(Activation::silu_then_clamp); ++kind) {
    for (const bool limited : {false, true}) {
      for (const bool gated : {true, false}) {
        const ActivationSpec spec = {
            .kind = static_cast<Activation>(kind), .gated = gated, .limited = limited, .limit = 0.75F};
        if (!gated && (limited || kind >= static_cast<int>(Activation::swiglu_oai))) continue;
        if (!limited && spec.kind == Activation::silu_then_clamp) continue;
        all.push_back({"activation " + std::to_string(kind) + (limited ? ", limited" : "") + (gated ? "" : ", ungated"),
                       [=](Case& test) { test.activation = spec, test.biases = !gated; }});
      }
    }
  }
  for (const int segments : {2, 3}) {
    all.push_back({std::to_string(segments) + " segments", [=](Case& test) {
                     test.segments = segments;
                     test.biases = true;
                   }});
  }
  const auto size = [&](std::int64_t hidden, std::int64_t intermediate) {
    all.push_back({std::to_string(hidden) + " x " + std::to_string(intermediate), [=](Case& test) {
                     const std::int64_t step = std::max<std::int64_t>(test.group, 1);
                     test.hidden = round_up(hidden, step);
                     test.intermediate = round_up(intermediate, step);
                   }});
  };
  size(1, 1);
  size(16, 16);
  size(17, 31);
  size(64, 160);
  size(333, 48);
  return all;
}

// How many cases stand for one that is run; more under ThreadSanitizer, which slows everything down twentyfold.
int sample() {
#if defined(__SANITIZE_THREAD__)
  constexpr int kUnlessTold = 6;
#else
  constexpr int kUnlessTold = 1;
#endif
  static const char* const text = std::getenv("MOE_FX_TEST_SAMPLE");
  static const int every = text == nullptr ? kUnlessTold : std::max(1, std::atoi(text));
  return every;
}

bool sampled() {
  static int count = 0;
  return count++ % sample() == 0;
}

// MOE_FX_ISA while it lives.
class ForcedIsa {
 public:
  explicit ForcedIsa(const Kernels& kernels) {
    if (const char* const before = std::getenv("MOE_FX_ISA")) before_ = before;
    setenv("MOE_FX_ISA", std::string(kernels.name).c_str(), 1);
  }
  ~ForcedIsa() {
    if (before_) {
      setenv("MOE_FX_ISA", before_->c_str(), 1);
    } else {
      unsetenv("MOE_FX_ISA");
    }
  }
  ForcedIsa(const ForcedIsa&) = delete;
  ForcedIsa& operator=(const ForcedIsa&) = delete;

 private:
  std::optional<std::string> before_;
};

// The tables to test: all, or the one that MOE_FX_ISA leaves.
std::vector<const Kernels*> tables() {
  const char* const isa = std::getenv("MOE_FX_ISA");
  if (isa == nullptr || *isa == '\0') return available_kernels();
  return {&chosen_kernels()};
}

constexpr int kThreads = 2;

std::vector<std::uint8_t> result_of(const Case& test, const TestLayer& layer, int threads) {
  TestCall call(test);
  run_experts(layer.layer(), call.call(), threads);
  return call.y_bytes();
}

}  // namespace

TEST_CASE("calls agree with double on every table, for every format and variation") {
  const auto formats = format_cases();
  const auto changes = variations();
  for (const Kernels* kernels : tables())
    MESSAGE("kernels: " << std::string(kernels->name));
  int runs = 0;
  for (const Case& format : formats) {
    for (const Variation& variation : changes) {
      if (!sampled()) continue;
      Case test = format;
      variation.apply(test);
      const TestLayer layer(test);
      TestCall call(test);
      std::optional<Expected> expected;
      ActivationForm form = ActivationForm::f32;
      for (const Kernels* kernels : tables()) {
        const ForcedIsa forced(*kernels);
        // Exact activations are the same for all tables of a form; int8 ones are rounded by the tables themselves.
        if (!expected || form != test.form(*kernels) || test.int8_activations) {
          expected.emplace(*kernels, test, layer, call);
        }
        form = test.form(*kernels);
        const int threads = ++runs % kThreads + 1;
        call.clear();
        run_experts(layer.layer(), call.call(), threads);
        const std::string wrong = expected->complaint(test, call.y());
        CHECK_MESSAGE(wrong.empty(), std::string(kernels->name) << ", " << test.name << ", " << variation.name << ", "
                                                                << threads << " threads: " << wrong);
        CHECK(call.kept_within());
      }
    }
  }
}

TEST_CASE("no tokens are no work") {
  for (Case test : format_cases()) {
    test.tokens = 0;
    const TestLayer layer(test);
    TestCall call(test);
    run_experts(layer.layer(), call.call(), kThreads);
    CHECK(call.kept_within());
    Submission submission(layer.layer(), call.call());
    submission.submit(0);
    submission.wait();
    CHECK(submission.done());
    CHECK(call.kept_within());
  }
}

TEST_CASE("an input that is not finite reaches its own token's results only, and all of them") {
  for (const Kernels* kernels : tables()) {
    const ForcedIsa forced(*kernels);
    for (Case test : format_cases()) {
      for (const float bad : {kInf, -kInf, kNan}) {
        test.top_k = test.experts;
        test.bad_input = 0.0F;
        const TestLayer layer(test);
        TestCall good(test);
        test.bad_input = bad;
        TestCall call(test);
        run_experts(layer.layer(), good.call(), kThreads);
        run_experts(layer.layer(), call.call(), kThreads);
        const auto y = call.y(), expected = good.y();
        int wrong = 0;
        for (std::int64_t token = 0; token < test.tokens; ++token) {
          for (std::int64_t i = token * test.hidden; i < (token + 1) * test.hidden; ++i) {
            const bool reached = token == TestCall::kBadToken;
            wrong += reached ? std::isfinite(y[index(i)]) : y[index(i)] != expected[index(i)];
          }
        }
        CHECK_MESSAGE(wrong == 0, std::string(kernels->name) << ", " << test.name << ", " << bad);
      }
    }
  }
}

TEST_CASE("results are the same for any number of threads and segments, bit for bit") {
  // ThreadSanitizer cannot follow how libgomp's threads wait for each other.
#if !defined(__SANITIZE_THREAD__)
  if (dlopen("libgomp.so.1", RTLD_NOW) != nullptr) use_openmp("libgomp.so.1");
#endif
  for (Case test : format_cases()) {
    test.hidden *= 3;
    std::vector<std::unique_ptr<TestLayer>> layers;  // by segments
    for (test.segments = 1; test.segments <= (is_packed(test.format) ? 3 : 1); ++test.segments) {
      layers.push_back(std::make_unique<TestLayer>(test));
    }
    for (const std::int64_t tokens : {1, 7, 140}) {
      if (!sampled()) continue;
      test.tokens = tokens;
      for (const Kernels* kernels : tables()) {
        const ForcedIsa forced(*kernels);
        const auto expected = result_of(test, *layers.front(), 1);
        for (const int threads : {2, 3, 5}) {
          CHECK_MESSAGE(result_of(test, *layers.front(), threads) == expected,
                        std::string(kernels->name) << ", " << test.name << ", " << threads << " threads");
        }
        for (const auto& layer : layers) {
          CHECK_MESSAGE(result_of(test, *layer, 2) == expected, std::string(kernels->name)
                                                                    << ", " << test.name << ", segments spread");
        }
      }
    }
  }
}

TEST_CASE("operands that do not fit are refused with what would fit") {
  const auto complaint = [](const std::function<void(Layer&, Call&)>& spoil, Case test = {}) -> std::string {
    const TestLayer layer(test);
    TestCall call(test);
    Layer spoilt_layer = layer.layer();
    Call spoilt_call = call.call();
    spoil(spoilt_layer, spoilt_call);
    std::string first = "none", second = "none";
    try {
      run_experts(spoilt_layer, spoilt_call, 1);
    } catch (const std::invalid_argument& error) {
      first = error.what();
    }
    try {
      const Submission submission(spoilt_layer, spoilt_call);
    } catch (const std::invalid_argument& error) {
      second = error.what();
    }
    return first == second ? first : first + " / " + second;
  };
  const auto says = [](const std::string& text, const char* part) {
    CHECK_MESSAGE(text.find(part) != std::string::npos, text);
  };
  says(complaint([](Layer& layer, Call&) { layer.int8_activations = true; }), "need int8 or int4 weights");
  says(complaint([](Layer& layer, Call&) { layer.up = {}; }), "up projection");
  says(complaint([](Layer& layer, Call&) { layer.down = {}; }), "a weight is missing");
  says(complaint([](Layer&, Call& call) { call.x_dtype = DType::f32; }), "x is f32, the weights are bf16");
  says(complaint([](Layer& layer, Call&) { layer.activation.kind = Activation::silu_then_clamp; }), "needs a limit");
  says(complaint([](Layer& layer, Call&) { layer.hidden = 0; }), "must be positive");
  says(complaint([](Layer&, Call& call) { call.tokens = -1; }), "must not be negative");
  says(complaint([](Layer& layer, Call&) { layer.packed = nullptr; }, {.format = WeightFormat::int8}), "missing");
  CHECK(complaint([](Layer&, Call&) {}) == "none");
}

// A layer, the operands of a call, and the result that run_experts gives for the first `tokens` tokens.
struct Job {
  Job(const Case& test, unsigned seed) : layer(test), call(test, seed), submission(layer.layer(), call.call()) {
    for (const std::int64_t tokens : {std::int64_t{1}, test.tokens / 2, test.tokens}) {
      Call some = call.call();
      some.tokens = tokens;
      call.clear();
      run_experts(layer.layer(), some, 1);
      expected.emplace_back(tokens, call.y_bytes());
    }
    call.clear();
  }

  TestLayer layer;
  TestCall call;
  Submission submission;
  std::vector<std::pair<std::int64_t, std::vector<std::uint8_t>>> expected;
};

TEST_CASE("submissions in flight from several threads give what single calls give") {
  constexpr int kSubmitters = 3, kRounds = 12;
  std::array<int, kSubmitters> wrong{};
  std::vector<std::thread> submitters;
  for (int s = 0; s < kSubmitters; ++s) {
    submitters.emplace_back([&wrong, s] {
      std::vector<std::unique_ptr<Job>> jobs;
      for (Case test : format_cases()) {
        if (test.name.find("of f") != std::string::npos) continue;
        test.tokens = 20;
        jobs.push_back(std::make_unique<Job>(test, static_cast<unsigned>(10 * s + 1)));
      }
      for (int round = 0; round < kRounds; ++round) {
        for (const auto& job : jobs) {
          job->call.clear();
          if (round % 4 == 3) {
            Submission::submit_callback(&job->submission);
          } else {
            job->submission.submit(job->expected[index(round % 4)].first);
          }
        }
        for (const auto& job : jobs) {
          if (round % 4 == 3) {
            Submission::wait_callback(&job->submission);
          } else {
            job->submission.wait();
          }
          const auto& expected = job->expected[index(std::min(round % 4, 2))].second;
          wrong[index(s)] += !job->submission.done() || job->call.y_bytes() != expected;
        }
      }
    });
  }
  for (std::thread& submitter : submitters)
    submitter.join();
  for (const int count : wrong)
    CHECK(count == 0);
}

TEST_CASE("a submission waits for its own previous run, and its end for the last") {
  Case test = format_cases().front();
  test.tokens = 40;
  const TestLayer layer(test);
  TestCall call(test);
  run_experts(layer.layer(), call.call(), 1);
  const auto expected = call.y_bytes();
  call.clear();
  {
    Submission submission(layer.layer(), call.call());
    CHECK(submission.done());
    submission.wait();  // nothing was started
    for (int i = 0; i < 50; ++i)
      submission.submit(i % 2 == 0 ? 3 : 1000);  // at most what it was made for
  }
  CHECK(call.y_bytes() == expected);
}

// --- Made-up nodes ---------------------------------------------------------------------------------------------------

// A number made of the results of one case of each format and table.
std::string digest() {
  std::uint64_t hash = 14695981039346656037ULL;  // FNV-1a
  for (Case test : format_cases()) {
    test.segments = is_packed(test.format) ? 2 : 1;
    test.hidden *= 3;
    const TestLayer layer(test);
    for (test.tokens = 2; test.tokens < 80; test.tokens += 68) {
      for (const Kernels* kernels : tables()) {
        const ForcedIsa forced(*kernels);
        for (const std::uint8_t byte : result_of(test, layer, 1))
          hash = (hash ^ byte) * 1099511628211ULL;
      }
    }
  }
  return std::to_string(hash);
}

// Runs this program's engine tests again with two more environment variables. The status that it exited with, or -1
// where the system does not start it (an emulated program, for one).
int status_with(const std::vector<std::string>& settings) {
  std::vector<char*> environment;
  std::vector<std::string> added = settings;
  const auto name_of = [](const std::string& setting) { return setting.substr(0, setting.find('=') + 1); };
  for (std::string& setting : added)
    environment.push_back(setting.data());
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const bool replaced = std::any_of(added.begin(), added.end(),
                                      [&](const std::string& setting) { return name_of(setting) == name_of(*entry); });
    if (!replaced) environment.push_back(*entry);
  }
  environment.push_back(nullptr);
  char program[] = "/proc/self/exe", only[] = "--source-file=*test_engine.cpp", quiet[] = "--minimal";
  char* arguments[] = {program, only, quiet, nullptr};
  pid_t child = -1;
  if (posix_spawn(&child, program, nullptr, nullptr, arguments, environment.data()) != 0) return -1;
  int status = 0;
  if (waitpid(child, &status, 0) != child || !WIFEXITED(status)) return 1000;
  return WEXITSTATUS(status) == 127 ? -1 : WEXITSTATUS(status);
}

// The topology is read once in a process, so another one needs a process of its own: this test runs all others of this
// file again in it, and compares a digest of the results.
TEST_CASE("everything holds, with the same results, on made-up nodes and pinned threads") {
  const std::string found = digest();
  if (const char* const expected = std::getenv("MOE_FX_TEST_DIGEST")) {
    CHECK(found == expected);
    return;
  }
  const std::vector<int> cpus = read_cpu_info().allowed_cpus;
  const std::string first = std::to_string(cpus.front()), last = std::to_string(cpus.back());
  std::vector<std::string> changes = {"MOE_FX_THREADS=1", "MOE_FX_NUMA=" + first};
  if (cpus.size() > 1) changes.push_back("MOE_FX_NUMA=" + first + ";" + last);
  for (const std::string& change : changes) {
    const int status =
        status_with({change, "MOE_FX_TEST_DIGEST=" + found, "MOE_FX_TEST_SAMPLE=" + std::to_string(4 * sample())});
    if (status == -1) {
      MESSAGE("skipped: this system does not run the program again from within; set " << change << " outside");
      return;
    }
    CHECK_MESSAGE(status == 0, "the tests failed under " << change);
  }
}

}  // namespace moe_fx::cpu
