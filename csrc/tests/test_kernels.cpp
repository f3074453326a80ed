// Every table of kernels that this machine can run, against arithmetic in double and the portable kernels: all weight
// formats and activation forms, odd sizes, values that are not finite. Operands stand against pages that cannot be
// read, before or behind them, so that a kernel that reads too much crashes.
//
// MOE_FX_TEST_SAMPLE=n runs every n-th of the many cases, for emulators.

#include <doctest/doctest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <random>
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
constexpr int kMaxRows = 20;  // of activations

// Memory of `bytes` bytes that ends (or begins) where a page begins (or ends) that traps.
class Guarded {
 public:
  Guarded(std::size_t bytes, bool at_end) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t inside = (bytes + page - 1) / page * page;
    size_ = inside + 2 * page;
    void* const map = mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) throw std::bad_alloc();
    map_ = static_cast<std::uint8_t*>(map);
    if (inside > 0 && mprotect(map_ + page, inside, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    data_ = map_ + page + (at_end ? inside - bytes : 0);
  }
  ~Guarded() { munmap(map_, size_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  std::uint8_t* bytes() const { return data_; }
  float* floats() const { return reinterpret_cast<float*>(data_); }

 private:
  std::uint8_t* map_;
  std::uint8_t* data_;
  std::size_t size_;
};

// Picks every n-th case, and for each a few bits that have nothing to do with its sizes.
class Cases {
 public:
  bool next() {
    static const char* const text = std::getenv("MOE_FX_TEST_SAMPLE");
    static const int every = text == nullptr ? 1 : std::max(1, std::atoi(text));
    bits_ = random_();
    return count_++ % every == 0;
  }
  bool coin(int bit) const { return (bits_ >> bit) & 1U; }

 private:
  std::mt19937 random_{7};
  std::uint32_t bits_ = 0;
  int count_ = 0;
};

std::vector<float> normal_values(std::size_t n, unsigned seed, float deviation = 1.0F, float mean = 0.0F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(mean, deviation);
  std::vector<float> values(n);
  for (float& value : values)
    value = normal(random);
  return values;
}

template <typename T>
T load(const std::uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Activation rows of one shape, each in guarded memory of its own, written by the table under test.
class Rows {
 public:
  Rows(const Kernels& kernels, const RowShape& shape, const std::vector<float>& values, bool at_end) : shape_(shape) {
    const auto inputs = static_cast<std::size_t>(shape.inputs);
    for (std::size_t i = 0; i * inputs < values.size(); ++i) {
      memory_.push_back(std::make_unique<Guarded>(shape.bytes(), at_end));
      kernels.write_row(shape, values.data() + i * inputs, memory_.back()->bytes());
      pointers_.push_back(memory_.back()->bytes());
    }
  }

  const std::uint8_t* const* pointers() const { return pointers_.data(); }

  // The value that input k of row i stands for.
  double meant(int i, std::int64_t k) const {
    const std::uint8_t* const row = pointers_[static_cast<std::size_t>(i)];
    switch (shape_.form) {
      case ActivationForm::f32: return load<float>(row + k * 4);
      case ActivationForm::bf16: return float_from_bf16(load<std::uint16_t>(row + k * 2));
      case ActivationForm::s8: break;
    }
    constexpr int kPlaces[] = {0, 2, 4, 6, 1, 3, 5, 7};  // where kInt4ByteOrder puts an input
    const std::int64_t place = shape_.int4_order ? k / 8 * 8 + kPlaces[k % 8] : k;
    const std::int64_t group = k / (shape_.inputs / shape_.groups);
    return double{load<float>(row + shape_.scales_offset() + group * 4)} * static_cast<std::int8_t>(row[place]);
  }

 private:
  RowShape shape_;
  std::vector<std::unique_ptr<Guarded>> memory_;
  std::vector<const std::uint8_t*> pointers_;
};

// Products in double of kMaxRows activation rows and 16 weight rows, and by how much fp32 sums may miss them.
struct Reference {
  // `offset`: what a kernel may add to each weight and take off again, in fp32.
  Reference(const Rows& x, const std::vector<float>& weights, std::int64_t inputs, double offset) {
    for (int i = 0; i < kMaxRows; ++i) {
      for (int r = 0; r < 16; ++r) {
        double sum = 0.0, magnitude = 0.0;
        for (std::int64_t k = 0; k < inputs; ++k) {
          const double value = x.meant(i, k), weight = weights[static_cast<std::size_t>(r * inputs + k)];
          sum += value * weight;
          magnitude += std::fabs(value) * (std::fabs(weight) + offset);
        }
        sums[i][r] = sum;
        bounds[i][r] = 2e-6 * magnitude + 1e-30;
      }
    }
  }

  // What is wrong with the first wrong one of m x rows results, or nothing.
  std::string complaint(const float* out, int m, int rows) const {
    for (int i = 0; i < m; ++i) {
      for (int r = 0; r < rows; ++r) {
        const double sum = sums[i][r];
        const float got = out[i * 16 + r];
        const bool right = std::isfinite(sum) ? std::fabs(got - sum) <= bounds[i][r]
                           : std::isnan(sum)  ? std::isnan(got)
                                              : got == static_cast<float>(sum);
        if (right) continue;
        return "[" + std::to_string(i) + "][" + std::to_string(r) + "] is " + std::to_string(got) + ", not " +
               std::to_string(sum);
      }
    }
    return {};
  }

  double sums[kMaxRows][16];
  double bounds[kMaxRows][16];
};

std::string label(const Kernels& kernels, WeightFormat format, ActivationForm form) {
  return std::string(kernels.name) + " " + std::string(format_name(format)) + " x " + std::string(form_name(form));
}

// Calls `function(kernels, format, form, tile)` for every tile kernel of every table.
template <class Function>
void for_tiles(bool packed, Function function) {
  for (const Kernels* kernels : available_kernels()) {
    for (std::size_t format = 0; format < kWeightFormats; ++format) {
      if (is_packed(static_cast<WeightFormat>(format)) != packed) continue;
      for (std::size_t form = 0; form < kActivationForms; ++form) {
        if (kernels->tile[format][form] == nullptr) continue;
        function(*kernels, static_cast<WeightFormat>(format), static_cast<ActivationForm>(form),
                 kernels->tile[format][form]);
      }
    }
  }
}

std::uint16_t half_of(WeightFormat format, float value) {
  return format == WeightFormat::bf16 ? bf16_from_float(value) : f16_from_float(value);
}
float value_of(WeightFormat format, std::uint16_t half) {
  return format == WeightFormat::bf16 ? float_from_bf16(half) : float_from_f16(half);
}

// Row-major 16-bit weights [rows, inputs] against a trap; what lies between the rows is NaN.
struct DenseWeights {
  DenseWeights(WeightFormat format, int rows, std::int64_t inputs, std::size_t gap,
               const std::vector<std::uint16_t>& halves, bool at_end)
      : stride((static_cast<std::size_t>(inputs) + gap) * 2),
        memory(stride * static_cast<std::size_t>(rows) - gap * 2, at_end) {
    const auto n = static_cast<std::size_t>(inputs);
    for (std::size_t r = 0; r < static_cast<std::size_t>(rows); ++r) {
      std::memcpy(memory.bytes() + r * stride, halves.data() + r * n, n * 2);
      if (r + 1 == static_cast<std::size_t>(rows)) continue;
      const std::uint16_t nan = half_of(format, kNan);
      for (std::size_t g = 0; g < gap; ++g)
        std::memcpy(memory.bytes() + r * stride + (n + g) * 2, &nan, 2);
    }
  }

  std::size_t stride;
  Guarded memory;
};

// One block of 16 packed rows of `inputs` inputs, and the weights [16, inputs] that it stands for.
struct PackedBlock {
  PackedBlock(WeightFormat format, std::int64_t inputs, std::int64_t group, bool zero_points, float bad = 0.0F)
      : layout({.format = format,
                .experts = 1,
                .hidden = inputs,
                .intermediate = group == 0 ? 32 : std::max<std::int64_t>(group, 32),
                .group = group,
                .zero_points = zero_points}) {
    const PackedSpec& spec = layout.spec();
    buffer = HugeBuffer(layout.bytes());
    write_header(buffer.data(), spec);
    // Not centred, so that zero points differ from the middle.
    auto source = normal_values(static_cast<std::size_t>(inputs * spec.intermediate), 21, 0.02F, 0.01F);
    if (bad != 0.0F) source[static_cast<std::size_t>((16 + kBadRow) * inputs)] = bad;
    pack_float(buffer.data(), layout, 0, Projection::gate,
               {.dtype = DType::f32, .data = source.data(), .row_stride = static_cast<std::size_t>(inputs) * 4}, 1);
    std::vector<float> all(source.size());
    unpack(buffer.data(), layout, 0, Projection::gate, all.data());
    weights.assign(all.begin() + 16 * inputs, all.begin() + 32 * inputs);
  }

  std::unique_ptr<Guarded> guarded(bool at_end) const {
    const std::size_t bytes = layout.block_bytes(Matrix::w13);
    auto copy = std::make_unique<Guarded>(bytes, at_end);
    std::memcpy(copy->bytes(), buffer.data() + layout.block_offset(Matrix::w13, 0, 1, 0), bytes);
    return copy;
  }
  RowShape shape(ActivationForm form) const {
    return {.form = form,
            .inputs = layout.spec().hidden,
            .groups = layout.groups(Matrix::w13),
            .int4_order = form == ActivationForm::s8 && layout.spec().format == WeightFormat::int4};
  }
  // What Reference calls so. bf16 products take int4 values with 128 added, and a step is a seventh of the largest.
  double offset(ActivationForm form) const {
    if (layout.spec().format != WeightFormat::int4 || form != ActivationForm::bf16) return 0.0;
    const auto [low, high] = std::minmax_element(weights.begin(), weights.end());
    return 144.0 / 7.0 * std::max(double{*high}, -double{*low});
  }

  static constexpr int kBadRow = 5;
  PackedLayout layout;
  HugeBuffer buffer{0};
  std::vector<float> weights;
};

const struct {
  WeightFormat format;
  std::int64_t inputs, group;
} kPackedSizes[] = {{WeightFormat::int8, 1, 0},     {WeightFormat::int8, 6, 0},    {WeightFormat::int8, 64, 0},
                    {WeightFormat::int8, 133, 0},   {WeightFormat::int8, 300, 0},  {WeightFormat::int4, 32, 32},
                    {WeightFormat::int4, 96, 32},   {WeightFormat::int4, 64, 64},  {WeightFormat::int4, 192, 64},
                    {WeightFormat::int4, 128, 128}, {WeightFormat::int4, 384, 128}};

// Bits of two floats are equal, or both are NaN.
bool same(float a, float b) {
  return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b) || (std::isnan(a) && std::isnan(b));
}

// Holds the integers of an s8 row against another's, which may only differ where a table that multiplies with the
// inverse of a scale and one that divides by it can round to different sides. Sums are those of the integers.
void check_integers(const RowShape& shape, const std::vector<float>& values, const std::uint8_t* row,
                    const std::uint8_t* expected) {
  const std::int64_t size = shape.inputs / shape.groups;
  int wrong = 0;
  std::vector<std::int64_t> sums(static_cast<std::size_t>(shape.groups));
  for (std::int64_t place = 0; place < shape.padded(); ++place) {
    const int got = static_cast<std::int8_t>(row[place]), wanted = static_cast<std::int8_t>(expected[place]);
    if (place < shape.inputs) sums[static_cast<std::size_t>(place / size)] += got;
    if (got == wanted) continue;
    const std::int64_t k = shape.int4_order ? place / 8 * 8 + kInt4ByteOrder[place % 8] : place;
    const auto scale = load<float>(expected + shape.scales_offset() + k / size * 4);
    const double quotient = place < shape.inputs ? double{values[static_cast<std::size_t>(k)]} / scale : 0.0;
    wrong += std::abs(got - wanted) != 1 || std::fabs(quotient - (got + wanted) / 2.0) > 2e-5;
  }
  CHECK(wrong == 0);
  for (std::int64_t g = 0; g < shape.groups; ++g) {
    CHECK(load<float>(row + shape.sums_offset() + g * 4) == sums[static_cast<std::size_t>(g)]);
  }
}

}  // namespace

TEST_CASE("every table has the kernels that the engine asks for") {
  for (const Kernels* kernels : available_kernels()) {
    MESSAGE("kernels: " << std::string(kernels->name));
    for (std::size_t format = 0; format < kWeightFormats; ++format) {
      const auto weights = static_cast<WeightFormat>(format);
      for (const DType x : {DType::f32, DType::bf16, DType::f16}) {
        const ActivationForm form = kernels->exact_form(weights, x);
        CHECK(form != ActivationForm::s8);
        CHECK((form == ActivationForm::f32 || x == DType::bf16));
        CHECK((kernels->tile[format][static_cast<std::size_t>(form)] != nullptr));
      }
      CHECK((kernels->tile[format][static_cast<std::size_t>(ActivationForm::s8)] != nullptr) == is_packed(weights));
    }
  }
}

TEST_CASE("dense products agree with double on every table") {
  for_tiles(false, [](const Kernels& kernels, WeightFormat format, ActivationForm form, TileKernel tile) {
    INFO(label(kernels, format, form));
    Cases cases;
    for (const std::int64_t inputs : {1, 7, 16, 31, 32, 33, 64, 100, 133, 256, 319}) {
      std::vector<std::uint16_t> halves;
      std::vector<float> weights;
      for (const float value : normal_values(static_cast<std::size_t>(16 * inputs), 11, 0.02F)) {
        halves.push_back(half_of(format, value));
        weights.push_back(value_of(format, halves.back()));
      }
      const RowShape shape = {.form = form, .inputs = inputs};
      const auto values = normal_values(static_cast<std::size_t>(kMaxRows * inputs), 12);
      const Rows x(kernels, shape, values, inputs % 2 == 1);
      const Reference reference(x, weights, inputs, 0.0);
      for (int rows = 1; rows <= 16; ++rows) {
        for (int m = 1; m <= kMaxRows; ++m) {
          if (!cases.next()) continue;
          const DenseWeights w(format, rows, inputs, cases.coin(0) ? 0 : 3, halves, cases.coin(1));
          const Guarded out(static_cast<std::size_t>(m) * 64, cases.coin(2));
          tile({.weights = w.memory.bytes(),
                .weight_stride = w.stride,
                .rows = rows,
                .inputs = inputs,
                .x = x.pointers(),
                .shape = shape,
                .m = m,
                .out = out.floats(),
                .next = cases.coin(3) ? w.memory.bytes() : nullptr});
          const std::string wrong = reference.complaint(out.floats(), m, rows);
          CHECK_MESSAGE(wrong.empty(), inputs << " inputs, " << rows << " rows, m " << m << ": " << wrong);
        }
      }
    }
  });
}

TEST_CASE("packed products agree with double on every table") {
  for_tiles(true, [](const Kernels& kernels, WeightFormat format, ActivationForm form, TileKernel tile) {
    INFO(label(kernels, format, form));
    Cases cases;
    for (const auto& size : kPackedSizes) {
      if (size.format != format) continue;
      for (const bool zero_points : {false, true}) {
        if (zero_points && format != WeightFormat::int4) continue;
        const PackedBlock block(format, size.inputs, size.group, zero_points);
        const RowShape shape = block.shape(form);
        const auto values = normal_values(static_cast<std::size_t>(kMaxRows * size.inputs), 22);
        const Rows x(kernels, shape, values, size.group == 32 || size.inputs % 2 == 1);
        const Reference reference(x, block.weights, size.inputs, block.offset(form));
        for (int m = 1; m <= kMaxRows; ++m) {
          for (const bool at_end : {false, true}) {
            if (!cases.next()) continue;
            const auto weights = block.guarded(at_end);
            const Guarded out(static_cast<std::size_t>(m) * 64, cases.coin(0));
            tile({.weights = weights->bytes(),
                  .inputs = size.inputs,
                  .groups = shape.groups,
                  .zero_points = zero_points,
                  .x = x.pointers(),
                  .shape = shape,
                  .m = m,
                  .out = out.floats(),
                  .next = cases.coin(1) ? weights->bytes() : nullptr});
            const std::string wrong = reference.complaint(out.floats(), m, 16);
            CHECK_MESSAGE(wrong.empty(), size.inputs << " inputs, groups of " << size.group << ", zero points "
                                                     << zero_points << ", m " << m << ": " << wrong);
          }
        }
      }
    }
  });
}

TEST_CASE("an activation that is not finite reaches its own row's results, as in IEEE arithmetic") {
  const auto check = [](const Kernels& kernels, const std::vector<float>& weights, double offset, TileKernel tile,
                        Tile operands) {
    const RowShape shape = operands.shape;
    const std::int64_t inputs = shape.inputs;
    for (const float bad : {kInf, -kInf, kNan}) {
      for (const std::int64_t k : {std::int64_t{0}, inputs / 2, inputs - 1}) {
        const int m = 7, bad_row = 4;
        auto values = normal_values(static_cast<std::size_t>(kMaxRows * inputs), 31);
        values[static_cast<std::size_t>(bad_row * inputs + k)] = bad;
        const Rows x(kernels, shape, values, true);
        const Reference reference(x, weights, inputs, offset);
        const Guarded out(m * 64, true);
        operands.x = x.pointers();
        operands.m = m;
        operands.out = out.floats();
        tile(operands);
        if (shape.form == ActivationForm::bf16 && offset != 0.0) {
          // Infinity less infinity: not the infinity that it would be, but not finite either.
          for (int r = 0; r < 16; ++r) {
            CHECK_FALSE(std::isfinite(out.floats()[bad_row * 16 + r]));
            out.floats()[bad_row * 16 + r] = static_cast<float>(reference.sums[bad_row][r]);
          }
        }
        const std::string wrong = reference.complaint(out.floats(), m, 16);
        CHECK_MESSAGE(wrong.empty(), bad << " at input " << k << " of " << inputs << ": " << wrong);
      }
    }
  };
  for_tiles(false, [&](const Kernels& kernels, WeightFormat format, ActivationForm form, TileKernel tile) {
    INFO(label(kernels, format, form));
    for (const std::int64_t inputs : {5, 133}) {
      std::vector<std::uint16_t> halves;
      std::vector<float> weights;
      for (const float value : normal_values(static_cast<std::size_t>(16 * inputs), 32, 0.02F)) {
        halves.push_back(half_of(format, value));
        weights.push_back(value_of(format, halves.back()));
      }
      const DenseWeights w(format, 16, inputs, 0, halves, true);
      check(kernels, weights, 0.0, tile,
            {.weights = w.memory.bytes(),
             .weight_stride = w.stride,
             .rows = 16,
             .inputs = inputs,
             .shape = {.form = form, .inputs = inputs}});
    }
  });
  for_tiles(true, [&](const Kernels& kernels, WeightFormat format, ActivationForm form, TileKernel tile) {
    INFO(label(kernels, format, form));
    const bool int4 = format == WeightFormat::int4;
    const PackedBlock block(format, int4 ? 96 : 133, int4 ? 96 / 3 : 0, int4);
    const RowShape shape = block.shape(form);
    const auto weights = block.guarded(true);
    check(kernels, block.weights, block.offset(form), tile,
          {.weights = weights->bytes(),
           .inputs = shape.inputs,
           .groups = shape.groups,
           .zero_points = int4,
           .shape = shape});
  });
}

TEST_CASE("a weight that is not finite reaches its own column of results only") {
  const int m = 7, bad_row = PackedBlock::kBadRow;
  const auto check = [&](const Guarded& out, const char* what) {
    int wrong = 0;
    for (int i = 0; i < m; ++i) {
      for (int r = 0; r < 16; ++r)
        wrong += std::isfinite(out.floats()[i * 16 + r]) == (r == bad_row);
    }
    CHECK_MESSAGE(wrong == 0, what);
  };
  for (const float bad : {kInf, -kInf, kNan}) {
    for_tiles(false, [&](const Kernels& kernels, WeightFormat format, ActivationForm form, TileKernel tile) {
      INFO(label(kernels, format, form));
      for (const std::int64_t k : {0, 50, 132}) {
        const std::int64_t inputs = 133;
        std::vector<std::uint16_t> halves;
        for (const float value : normal_values(static_cast<std::size_t>(16 * inputs), 42, 0.02F)) {
          halves.push_back(half_of(format, value));
        }
        halves[static_cast<std::size_t>(bad_row * inputs + k)] = half_of(format, bad);
        const DenseWeights w(format, 16, inputs, 0, halves, true);
        const RowShape shape = {.form = form, .inputs = inputs};
        const Rows x(kernels, shape, normal_values(static_cast<std::size_t>(m * inputs), 41), true);
        const Guarded out(m * 64, true);
        tile({.weights = w.memory.bytes(),
              .weight_stride = w.stride,
              .rows = 16,
              .inputs = inputs,
              .x = x.pointers(),
              .shape = shape,
              .m = m,
              .out = out.floats()});
        check(out, "dense");
      }
    });
    for_tiles(true, [&](const Kernels& kernels, WeightFormat format, ActivationForm form, TileKernel tile) {
      INFO(label(kernels, format, form));
      const bool int4 = format == WeightFormat::int4;
      const PackedBlock block(format, int4 ? 96 : 133, int4 ? 32 : 0, int4, bad);
      const RowShape shape = block.shape(form);
      const auto weights = block.guarded(true);
      const Rows x(kernels, shape, normal_values(static_cast<std::size_t>(m * shape.inputs), 43), true);
      const Guarded out(m * 64, true);
      tile({.weights = weights->bytes(),
            .inputs = shape.inputs,
            .groups = shape.groups,
            .zero_points = int4,
            .x = x.pointers(),
            .shape = shape,
            .m = m,
            .out = out.floats()});
      check(out, "packed");
    });
  }
}

TEST_CASE("every table widens and narrows like the portable one, bit for bit") {
  // Every half; every value between two halves that rounding has to decide, with both neighbours; both signs.
  std::vector<std::uint16_t> halves;
  for (unsigned bits = 0; bits < 0x10000U; ++bits)
    halves.push_back(static_cast<std::uint16_t>(bits));
  const auto n = static_cast<std::int64_t>(halves.size());
  for (const DType dtype : {DType::bf16, DType::f16}) {
    std::vector<float> values(halves.size());
    kScalarKernels.widen(dtype, halves.data(), n, values.data());
    std::vector<float> hard = values;
    for (std::size_t bits = 0; bits + 1 < values.size(); ++bits) {
      const auto tie = static_cast<float>((double{values[bits]} + double{values[bits + 1]}) / 2);
      for (const float near : {tie, std::nextafter(tie, 0.0F), std::nextafter(tie, kInf)})
        hard.push_back(near);
    }
    for (const float value :
         {65519.9F, 65520.0F, 7e4F, 3.4e38F, 1e-45F, 1e-40F, 2.9e-8F, std::bit_cast<float>(0x7f800001U)})
      hard.insert(hard.end(), {value, -value});
    std::vector<std::uint16_t> expected(hard.size()), got(hard.size());
    kScalarKernels.narrow(dtype, hard.data(), static_cast<std::int64_t>(hard.size()), expected.data());
    for (const Kernels* kernels : available_kernels()) {
      INFO(std::string(kernels->name) << " " << std::string(dtype_name(dtype)));
      std::vector<float> wide(halves.size());
      kernels->widen(dtype, halves.data(), n, wide.data());
      std::size_t wrong = 0;
      for (std::size_t i = 0; i < wide.size(); ++i)
        wrong += !same(wide[i], values[i]);
      CHECK(wrong == 0);
      kernels->narrow(dtype, hard.data(), static_cast<std::int64_t>(hard.size()), got.data());
      std::size_t first = hard.size();
      for (std::size_t i = hard.size(); i-- > 0;) {
        const WeightFormat as = dtype == DType::bf16 ? WeightFormat::bf16 : WeightFormat::f16;
        if (got[i] != expected[i] && !(std::isnan(value_of(as, got[i])) && std::isnan(value_of(as, expected[i])))) {
          first = i;
        }
      }
      CHECK_MESSAGE(first == hard.size(), "narrow(" << hard[first % hard.size()] << ") is " << got[first % hard.size()]
                                                    << ", not " << expected[first % hard.size()]);
    }
  }
}

TEST_CASE("widen and narrow touch nothing but their values") {
  for (const Kernels* kernels : available_kernels()) {
    INFO(std::string(kernels->name));
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      for (std::int64_t n = 0; n <= 40; ++n) {
        for (const bool at_end : {false, true}) {
          const auto count = static_cast<std::size_t>(n);
          const Guarded wide(count * 4, at_end), narrow(count * dtype_bytes(dtype), at_end), back(count * 4, at_end);
          const auto values = normal_values(count, 51);
          std::copy(values.begin(), values.end(), wide.floats());
          kernels->narrow(dtype, wide.floats(), n, narrow.bytes());
          kernels->widen(dtype, narrow.bytes(), n, back.floats());
          const float step = dtype == DType::f32 ? 0.0F : dtype == DType::bf16 ? 1.0F / 256 : 1.0F / 2048;
          bool right = true;
          for (std::size_t i = 0; i < count; ++i) {
            right =
                right && std::fabs(back.floats()[i] - values[i]) <= step * std::fabs(values[i]) + 1e-7F * (step > 0);
          }
          CHECK_MESSAGE(right, n << " values of " << std::string(dtype_name(dtype)));
        }
      }
    }
  }
}

TEST_CASE("activation rows are the portable ones, but for int8 values on the edge of rounding") {
  const std::int64_t sizes[][2] = {{1, 1}, {6, 1}, {64, 1}, {133, 1}, {96, 3}, {192, 3}, {384, 3}, {2048, 16}};
  for (const Kernels* kernels : available_kernels()) {
    for (const ActivationForm form : {ActivationForm::f32, ActivationForm::bf16, ActivationForm::s8}) {
      for (const auto& [inputs, groups] : sizes) {
        for (const bool int4_order : {false, true}) {
          if (int4_order && (form != ActivationForm::s8 || inputs % 8 != 0)) continue;
          const RowShape shape = {.form = form, .inputs = inputs, .groups = groups, .int4_order = int4_order};
          INFO(std::string(kernels->name) << " " << std::string(form_name(form)) << " " << inputs << " in " << groups
                                          << " groups, int4 order " << int4_order);
          for (unsigned seed = 0; seed < 20; ++seed) {
            auto values = normal_values(static_cast<std::size_t>(inputs), seed);
            // Ties of int8 rounding, a group of zeros, and one that is not finite, in some.
            if (seed % 4 == 1) {
              for (std::size_t k = 0; k < values.size(); ++k)
                values[k] = static_cast<float>(k % 250) / 2.0F - 62.0F;
              values[0] = 127.0F;
            }
            if (seed % 4 == 2) std::fill_n(values.end() - inputs / groups, inputs / groups, 0.0F);
            if (seed % 4 == 3) values[values.size() / 2] = seed % 8 == 3 ? kNan : -kInf;
            const Guarded source(static_cast<std::size_t>(inputs) * 4, seed % 2 == 0),
                row(shape.bytes(), seed % 2 == 1);
            std::memcpy(source.bytes(), values.data(), values.size() * 4);
            std::memset(row.bytes(), 0xff, shape.bytes());
            std::vector<std::uint8_t> expected(shape.bytes());
            kScalarKernels.write_row(shape, values.data(), expected.data());
            kernels->write_row(shape, source.floats(), row.bytes());
            if (form == ActivationForm::bf16 && seed % 4 == 3) {  // NaN has many patterns
              for (std::size_t k = 0; k < values.size(); ++k) {
                const float got = float_from_bf16(load<std::uint16_t>(row.bytes() + k * 2));
                CHECK(same(got, float_from_bf16(load<std::uint16_t>(expected.data() + k * 2))));
              }
            } else if (form == ActivationForm::s8) {
              check_integers(shape, values, row.bytes(), expected.data());
            } else {
              CHECK(std::memcmp(row.bytes(), expected.data(), shape.value_bytes()) == 0);
            }
            const std::size_t records = form == ActivationForm::f32    ? 0
                                        : form == ActivationForm::bf16 ? static_cast<std::size_t>(groups)
                                                                       : static_cast<std::size_t>(2 * groups);
            for (std::size_t at = 0; at < records; ++at) {
              const auto got = load<float>(row.bytes() + shape.scales_offset() + at * 4);
              const auto wanted = load<float>(expected.data() + shape.scales_offset() + at * 4);
              if (form == ActivationForm::s8 && at >= static_cast<std::size_t>(groups))
                continue;  // done with the values
              if (form == ActivationForm::bf16 && std::isfinite(wanted)) {
                CHECK(std::fabs(got - wanted) <= 1e-3);  // the order of the sum is open
              } else {
                CHECK(same(got, wanted));
              }
            }
          }
        }
      }
    }
  }
}

TEST_CASE("int8 activation rows of tiny values are zeros or within half a step") {
  for (const Kernels* kernels : available_kernels()) {
    INFO(std::string(kernels->name));
    const RowShape shape = {.form = ActivationForm::s8, .inputs = 64};
    for (const float largest : {1e-45F, 1e-40F, 1e-38F, 1.2e-36F, 1.6e-36F, 1e-30F}) {
      std::vector<float> values = normal_values(64, 61);
      const float scale = std::fabs(*std::max_element(values.begin(), values.end(),
                                                      [](float a, float b) { return std::fabs(a) < std::fabs(b); }));
      for (float& value : values)
        value *= largest / scale;
      const Guarded row(shape.bytes(), true);
      kernels->write_row(shape, values.data(), row.bytes());
      const auto step = load<float>(row.bytes() + shape.scales_offset());
      double sum = 0.0;
      for (std::size_t k = 0; k < values.size(); ++k) {
        const auto q = static_cast<std::int8_t>(row.bytes()[k]);
        sum += q;
        // A step of 2^-149 is the least there is, and a subnormal one is rounded to whole multiples of that.
        const double bound = largest < 1.5e-36F ? 1.6e-36 : 0.5001 * step;
        CHECK(std::fabs(double{step} * q - values[k]) <= bound);
      }
      CHECK(load<float>(row.bytes() + shape.sums_offset()) == sum);
    }
  }
}

TEST_CASE("activations agree with the portable ones on every table, infinities and NaN included") {
  std::vector<float> special = {0.0F,   -0.0F,   1e-40F, -1e-40F, 1e-6F, -1e-6F, 0.5F,  -0.5F,  2.0F,  -2.0F,
                                7.0F,   -7.0F,   20.0F,  -20.0F,  60.0F, -60.0F, 87.0F, -87.0F, 89.0F, -89.0F,
                                104.0F, -104.0F, 1e10F,  -1e10F,  3e38F, -3e38F, kInf,  -kInf,  kNan};
  std::vector<float> gates, ups;
  for (const float gate : special) {
    for (const float up : special) {
      // Where fp32 takes the activation for zero and double does not, an infinity makes a NaN of one and not the other.
      if (std::isinf(up) && (gate < -5.0F || (gate != 0.0F && std::fabs(gate) < 1e-30F))) continue;
      if (std::fabs(up) < 1.0F && std::fabs(gate) > 1e9F) continue;  // nor where fp32 takes it for an infinity
      gates.push_back(gate);
      ups.push_back(up);
    }
  }
  for (const float value : normal_values(8000, 71, 4.0F))
    gates.push_back(value);
  for (const float value : normal_values(8000, 72, 4.0F))
    ups.push_back(value);
  while (gates.size() % 16 != 0) {
    gates.push_back(1.0F);
    ups.push_back(1.0F);
  }
  const int m = static_cast<int>(gates.size() / 16);
  const auto gate_bias = normal_values(16, 73), up_bias = normal_values(16, 74);
  for (const Kernels* kernels : available_kernels()) {
    for (int kind = 0; kind <= static_cast<int>(Activation::silu_then_clamp); ++kind) {
      for (const bool gated : {true, false}) {
        for (const bool limited : {true, false}) {
          for (const bool biased : {true, false}) {
            const ActivationSpec spec = {
                .kind = static_cast<Activation>(kind), .gated = gated, .limited = limited, .limit = 3.0F};
            if (!gated && kind >= static_cast<int>(Activation::swiglu_oai)) continue;
            if (!limited && spec.kind == Activation::silu_then_clamp) continue;
            const Guarded gate(gates.size() * 4, true), up(gates.size() * 4, true);
            std::memcpy(gate.bytes(), gates.data(), gates.size() * 4);
            std::memcpy(up.bytes(), ups.data(), ups.size() * 4);
            std::vector<float> expected(gates.size());
            const float* const bg = biased ? gate_bias.data() : nullptr;
            const float* const bu = biased && gated ? up_bias.data() : nullptr;
            kScalarKernels.activate(spec, m, gates.data(), gated ? ups.data() : nullptr, bg, bu, expected.data());
            kernels->activate(spec, m, gate.floats(), gated ? up.floats() : nullptr, bg, bu, gate.floats());
            std::size_t wrong = 0, first = 0;
            for (std::size_t i = expected.size(); i-- > 0;) {
              const float got = gate.floats()[i], want = expected[i];
              bool right = same(got, want) || got == want;
              if (std::isfinite(got) && std::isfinite(want)) {
                // erf and tanh are good to 1.5e-7 of one, which the gate and up projections multiply.
                const double g = std::fabs(gates[i]) + (biased ? std::fabs(gate_bias[i % 16]) : 0.0);
                double u = gated ? std::fabs(ups[i]) + (biased ? std::fabs(up_bias[i % 16]) : 0.0) : 0.0;
                u = 1.0 + (limited ? std::min(u, double{spec.limit}) : u);
                const bool absolute = spec.kind == Activation::gelu || spec.kind == Activation::gelu_tanh;
                const double room = absolute ? 2e-7 * g * u : 1e-36 * u;
                right = std::fabs(got - want) <= 3e-6 * std::fabs(want) + room + 1e-37;
              }
              if (!right) {
                ++wrong;
                first = i;
              }
            }
            CHECK_MESSAGE(wrong == 0, std::string(kernels->name)
                                          << ", kind " << kind << ", gated " << gated << ", limited " << limited
                                          << ", biased " << biased << ": " << wrong << " wrong, the first at gate "
                                          << gates[first] << ", up " << ups[first] << ": " << gate.floats()[first]
                                          << ", not " << expected[first]);
          }
        }
      }
    }
  }
}

TEST_CASE("every table accumulates like the portable one") {
  for (const Kernels* kernels : available_kernels()) {
    for (const int m : {1, 2, 7}) {
      for (const bool biased : {true, false}) {
        const auto values = normal_values(static_cast<std::size_t>(m * 16), 81), bias = normal_values(16, 82);
        const auto weights = normal_values(static_cast<std::size_t>(m), 83);
        const auto start = normal_values(static_cast<std::size_t>(m * 16), 84);
        auto expected = start;
        const Guarded sums(start.size() * 4, true), guarded_values(start.size() * 4, true);
        std::memcpy(sums.bytes(), start.data(), start.size() * 4);
        std::memcpy(guarded_values.bytes(), values.data(), values.size() * 4);
        std::vector<float*> theirs, ours;
        for (int i = 0; i < m; ++i) {  // rows in another order than values
          theirs.push_back(expected.data() + (m - 1 - i) * 16);
          ours.push_back(sums.floats() + (m - 1 - i) * 16);
        }
        const float* const b = biased ? bias.data() : nullptr;
        kScalarKernels.accumulate(m, values.data(), b, weights.data(), theirs.data());
        kernels->accumulate(m, guarded_values.floats(), b, weights.data(), ours.data());
        bool right = true;
        for (std::size_t i = 0; i < expected.size(); ++i) {
          right = right && std::fabs(sums.floats()[i] - expected[i]) <= 1e-6F * (std::fabs(expected[i]) + 4.0F);
        }
        CHECK_MESSAGE(right, std::string(kernels->name) << ", m " << m << ", biased " << biased);
      }
    }
  }
}

TEST_CASE("every table sums words and reads nothing beyond them") {
  for (const Kernels* kernels : available_kernels()) {
    for (const std::size_t bytes : {std::size_t{0}, std::size_t{256}, std::size_t{5 * 256}}) {
      const Guarded words(bytes, true);
      std::uint64_t expected = 0;
      for (std::size_t i = 0; i < bytes / 8; ++i) {
        const std::uint64_t word = (i + 1) * 0x9e3779b97f4a7c15ULL;
        std::memcpy(words.bytes() + i * 8, &word, 8);
        expected += word;
      }
      CHECK_MESSAGE(kernels->sum_words(words.bytes(), bytes) == expected, std::string(kernels->name));
    }
  }
}
