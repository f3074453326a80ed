// The AMX kernels. What surrounds their instructions is tested on every x86 machine, over a model of the instructions
// in plain C++; where the processor has AMX, the kernels themselves are, and must agree with the model bit for bit.

#if defined(__x86_64__)

#include <doctest/doctest.h>
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cpu/float_bits.h"
#include "cpu/kernels.h"

namespace moe_fx::cpu {
namespace {

#include "cpu/kernels/amx.inl"
#include "cpu/kernels/amx_transpose.inl"

// --- The model -------------------------------------------------------------------------------------------------------

// Every arithmetic instruction of AMX takes subnormal inputs and results for zero.
float flushed(float value) { return std::fabs(value) < 0x1p-126F ? std::copysign(0.0F, value) : value; }

// A tile register and its share of the configuration.
struct Register {
  int rows = 0, row_bytes = 0;
  std::uint8_t data[16][64] = {};
};

// The tile instructions as Intel's manual defines them; what raises #UD there throws here.
struct Model {
  static void configure(const TileConfig& config) {
    require(config.palette == 1 && config.start_row == 0, "the palette is not 1");
    for (int i = 0; i < 16; ++i) {
      require(config.rows[i] <= 16 && config.row_bytes[i] <= 64, "a tile is too large");
      require((config.rows[i] == 0) == (config.row_bytes[i] == 0), "a tile has rows or row bytes only");
      require(i < 8 || config.rows[i] == 0, "there are 8 tiles");
      require(i >= 14 || config.reserved[i] == 0, "a reserved byte is set");
      if (i < 8) tiles[i] = Register{config.rows[i], config.row_bytes[i]};
    }
    configured = true;
  }
  static void release() {
    std::fill_n(tiles, 8, Register());
    configured = false;
  }
  template <int kTile>
  static void zero() {
    std::memset(valid<kTile>().data, 0, sizeof tiles[kTile].data);
  }
  template <int kTile>
  static void load(const void* from, std::size_t stride) {
    zero<kTile>();
    for (int r = 0; r < tiles[kTile].rows; ++r) {
      std::memcpy(tiles[kTile].data[r], static_cast<const std::uint8_t*>(from) + static_cast<std::size_t>(r) * stride,
                  static_cast<std::size_t>(tiles[kTile].row_bytes));
    }
  }
  template <int kTile>
  static void store(void* to, std::size_t stride) {
    const Register& tile = valid<kTile>();
    for (int r = 0; r < tile.rows; ++r) {
      std::memcpy(static_cast<std::uint8_t*>(to) + static_cast<std::size_t>(r) * stride, tile.data[r],
                  static_cast<std::size_t>(tile.row_bytes));
    }
  }
  // TDPBSSD
  template <int C, int A, int B>
  static void dot_int8() {
    dot<C, A, B, std::int32_t, std::int8_t>([](auto& sums, int rows, int depth, int columns, auto a, auto b) {
      for (int m = 0; m < rows; ++m) {
        for (int k = 0; k < depth; ++k) {
          for (int n = 0; n < columns; ++n) {
            for (int i = 0; i < 4; ++i)
              sums[m][n] += a(m, 4 * k + i) * b(k, 4 * n + i);
          }
        }
      }
    });
  }
  // TDPBF16PS
  template <int C, int A, int B>
  static void dot_bf16() {
    dot<C, A, B, float, std::uint16_t>([](auto& sums, int rows, int depth, int columns, auto a, auto b) {
      const auto value = [](std::uint16_t half) { return flushed(float_from_bf16(half)); };
      for (int m = 0; m < rows; ++m) {
        for (int n = 0; n < columns; ++n) {
          float even = 0.0F, odd = 0.0F;
          for (int k = 0; k < depth; ++k) {
            even = flushed(std::fmaf(value(a(m, 2 * k)), value(b(k, 2 * n)), even));
            odd = flushed(std::fmaf(value(a(m, 2 * k + 1)), value(b(k, 2 * n + 1)), odd));
          }
          sums[m][n] = flushed(flushed(sums[m][n]) + flushed(even + odd));
        }
      }
    });
  }

  static void prefetch(const std::uint8_t* from) { prefetched.insert(from); }
  static void copy_line(const std::uint8_t* from, std::uint8_t* to) { std::memcpy(to, from, 64); }
  static void transpose(const std::uint8_t* from, std::size_t stride, std::uint8_t* to) {
    for (std::size_t n = 0; n < 16; ++n) {
      for (std::size_t k = 0; k < 16; ++k)
        std::memcpy(to + k * 64 + n * 4, from + n * stride + k * 4, 4);
    }
  }

  static inline bool configured = false;
  static inline Register tiles[8];
  static inline std::set<const std::uint8_t*> prefetched;

 private:
  static void require(bool condition, const char* message) {
    if (!condition) throw std::logic_error(message);
  }
  template <int kTile>
  static Register& valid() {
    require(configured && tiles[kTile].rows > 0, "a tile is used that is not configured");
    return tiles[kTile];
  }
  template <int C, int A, int B, class Sum, class Value, class Products>
  static void dot(Products products) {
    static_assert(C != A && C != B && A != B);
    Register& c = valid<C>();
    const Register &a = valid<A>(), &b = valid<B>();
    require(c.rows == a.rows && c.row_bytes == b.row_bytes && a.row_bytes == 4 * b.rows, "sizes of tiles do not fit");
    Sum sums[16][16];
    std::memcpy(sums, c.data, sizeof sums);
    const auto reader = [](const Register& tile) {
      return [&tile](int row, int index) {
        Value value;
        std::memcpy(&value, tile.data[row] + static_cast<std::size_t>(index) * sizeof value, sizeof value);
        return value;
      };
    };
    products(sums, c.rows, a.row_bytes / 4, c.row_bytes / 4, reader(a), reader(b));
    std::memcpy(c.data, sums, sizeof sums);
  }
};

const TileKernel kModelInt8 = tile_product<Model, Int8Tiles<Model>>;
const TileKernel kModelBf16 = tile_product<Model, Bf16Tiles<Model>>;

// --- Operands --------------------------------------------------------------------------------------------------------

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int kRows[] = {1, 3, 4, 12, 15, 16, 17, 18, 31, 32, 33, 47, 48, 49, 63, 64, 65, 130};

std::vector<float> normal_values(std::size_t n, unsigned seed, float deviation = 1.0F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, deviation);
  std::vector<float> values(n);
  for (float& value : values)
    value = normal(random);
  return values;
}

// Memory on the border of a cache line, of exactly its size, so that the address sanitizer sees what is beyond.
class Bytes {
 public:
  explicit Bytes(std::size_t n) : data_(static_cast<std::uint8_t*>(::operator new(n, std::align_val_t{64}))) {}
  ~Bytes() { ::operator delete(data_, std::align_val_t{64}); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;

  std::uint8_t* data() const { return data_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  std::uint8_t* data_;
};

// m activation rows, each in memory of its own.
struct Rows {
  Rows(const RowShape& shape, int m, const std::vector<float>& values) : shape(shape) {
    for (int i = 0; i < m; ++i) {
      memory.push_back(std::make_unique<Bytes>(shape.bytes()));
      kScalarKernels.write_row(shape, values.data() + i * shape.inputs, memory.back()->data());
      pointers.push_back(memory.back()->data());
    }
  }

  RowShape shape;
  std::vector<std::unique_ptr<Bytes>> memory;
  std::vector<const std::uint8_t*> pointers;
};

// The results of a kernel, behind which nothing was written.
std::vector<float> results(TileKernel kernel, Tile tile, const Rows& x) {
  const auto n = x.pointers.size() * 16;
  const Bytes out((n + 16) * sizeof(float));
  std::fill_n(out.as<float>(), n + 16, -77.0F);
  tile.x = x.pointers.data();
  tile.shape = x.shape;
  tile.m = static_cast<int>(x.pointers.size());
  tile.out = out.as<float>();
  kernel(tile);
  for (std::size_t i = 0; i < 16; ++i)
    CHECK(out.as<float>()[n + i] == -77.0F);
  CHECK_FALSE(Model::configured);
  return {out.as<float>(), out.as<float>() + n};
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](float one, float other) {
           return std::bit_cast<std::uint32_t>(one) == std::bit_cast<std::uint32_t>(other) ||
                  (std::isnan(one) && std::isnan(other));
         });
}

// A packed int8 block of random values, all of the range; what is padding is zero.
struct Int8Block {
  explicit Int8Block(std::int64_t inputs, unsigned seed = 5)
      : inputs(inputs), steps(round_up(inputs, 64) / 64), memory(kLine + static_cast<std::size_t>(steps) * 1024) {
    std::memset(memory.data(), 0, kLine + static_cast<std::size_t>(steps) * 1024);
    const auto scales = normal_values(16, seed);
    std::copy(scales.begin(), scales.end(), memory.as<float>());
    std::mt19937 random(seed);
    for (std::int64_t k = 0; k < inputs; ++k) {
      for (int r = 0; r < 16; ++r)
        at(k, r) = static_cast<std::int8_t>(static_cast<int>(random() % 255) - 127);
    }
  }

  std::int8_t& at(std::int64_t k, int r) const {
    return reinterpret_cast<std::int8_t*>(memory.data() + kLine)[(k / 4 * 16 + r) * 4 + k % 4];
  }
  Tile tile() const { return {.weights = memory.data(), .inputs = inputs, .shape = {}}; }

  std::int64_t inputs, steps;
  Bytes memory;
};

// Row-major bf16 weights; what lies between the rows is NaN.
struct Bf16Weights {
  Bf16Weights(int rows, std::int64_t inputs, int gap)
      : rows(rows),
        inputs(inputs),
        stride(static_cast<std::size_t>(inputs + gap) * 2),
        memory(stride * static_cast<std::size_t>(rows) - static_cast<std::size_t>(gap) * 2) {
    const auto values = normal_values(static_cast<std::size_t>(rows * inputs), 6, 0.02F);
    for (int r = 0; r < rows; ++r) {
      for (std::int64_t k = 0; k < inputs; ++k)
        at(r, k) = bf16_from_float(values[static_cast<std::size_t>(r * inputs + k)]);
      for (int g = 0; g < gap && r + 1 < rows; ++g)
        at(r, inputs + g) = 0x7fc0;
    }
  }

  std::uint16_t& at(int r, std::int64_t k) const {
    return *reinterpret_cast<std::uint16_t*>(memory.data() + static_cast<std::size_t>(r) * stride + k * 2);
  }
  Tile tile() const {
    return {.weights = memory.data(), .weight_stride = stride, .rows = rows, .inputs = inputs, .shape = {}};
  }

  int rows;
  std::int64_t inputs;
  std::size_t stride;
  Bytes memory;
};

RowShape int8_shape(std::int64_t inputs) { return {.form = ActivationForm::s8, .inputs = inputs}; }
RowShape bf16_shape(std::int64_t inputs) { return {.form = ActivationForm::bf16, .inputs = inputs}; }

// --- What any kernel for these operands has to do
// ----------------------------------------------------------------------

void check_int8(TileKernel kernel) {
  for (const std::int64_t inputs : {1, 6, 64, 65, 133, 300, 960}) {
    const Int8Block block(inputs), next(inputs);
    for (const int m : kRows) {
      CAPTURE(inputs);
      CAPTURE(m);
      const Rows x(int8_shape(inputs), m, normal_values(static_cast<std::size_t>(m * inputs), 7));
      Tile tile = block.tile();
      tile.next = m % 2 == 0 ? next.memory.data() : nullptr;
      const auto got = results(kernel, tile, x);
      const auto portable = results(kScalarKernels.tile[2][2], tile, x);
      int wrong = 0, far = 0;
      for (int i = 0; i < m; ++i) {
        const auto* const values = reinterpret_cast<const std::int8_t*>(x.pointers[static_cast<std::size_t>(i)]);
        float scale;
        std::memcpy(&scale, values + x.shape.scales_offset(), sizeof scale);
        for (int r = 0; r < 16; ++r) {
          const auto at = static_cast<std::size_t>(i * 16 + r);
          std::int64_t sum = 0;
          for (std::int64_t k = 0; k < inputs; ++k)
            sum += values[k] * block.at(k, r);
          wrong += got[at] != static_cast<float>(sum) * scale * block.memory.as<float>()[r];
          const double exact = static_cast<double>(sum) * scale * block.memory.as<float>()[r];
          far += std::fabs(got[at] - exact) > 2e-7 * std::fabs(exact) ||
                 std::fabs(got[at] - portable[at]) > 4e-7 * std::fabs(exact);
        }
      }
      CHECK(wrong == 0);
      CHECK(far == 0);
    }
  }
}

void check_bf16(TileKernel kernel) {
  for (const std::int64_t inputs : {1, 7, 31, 32, 33, 64, 100, 133, 256, 480}) {
    for (const int rows : {16, 15, 5, 1}) {
      const Bf16Weights weights(rows, inputs, rows % 2 == 0 ? 0 : 3), next(rows, inputs, rows % 2 == 0 ? 0 : 3);
      for (const int m : kRows) {
        if (rows < 16 && m % 16 != 1) continue;
        CAPTURE(inputs);
        CAPTURE(rows);
        CAPTURE(m);
        auto values = normal_values(static_cast<std::size_t>(m * inputs), 8);
        for (float& value : values)
          value = float_from_bf16(bf16_from_float(value));
        const Rows x(bf16_shape(inputs), m, values), wide({.inputs = inputs}, m, values);
        Tile tile = weights.tile();
        tile.next = m % 2 == 0 ? next.memory.data() : nullptr;
        const auto got = results(kernel, tile, x);
        const auto portable = results(kScalarKernels.tile[0][0], tile, wide);
        int wrong = 0;
        for (int i = 0; i < m; ++i) {
          for (int r = 0; r < rows; ++r) {
            double sum = 0.0, magnitude = 0.0;
            for (std::int64_t k = 0; k < inputs; ++k) {
              const double product =
                  double{values[static_cast<std::size_t>(i * inputs + k)]} * float_from_bf16(weights.at(r, k));
              sum += product;
              magnitude += std::fabs(product);
            }
            const auto at = static_cast<std::size_t>(i * 16 + r);
            const double bound = 2e-6 * magnitude + 1e-30;
            wrong += !(std::fabs(got[at] - sum) <= bound && std::fabs(got[at] - portable[at]) <= 2 * bound);
          }
        }
        CHECK(wrong == 0);
      }
    }
  }
}

// Exactly the results of one row (or one column, with row = -1) are not finite.
void check_only(const std::vector<float>& got, int row, int column) {
  int wrong = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const bool expected = row >= 0 ? static_cast<int>(i / 16) == row : static_cast<int>(i % 16) == column;
    wrong += std::isfinite(got[i]) == expected;
  }
  CHECK(wrong == 0);
}

void check_not_finite(TileKernel int8, TileKernel bf16) {
  const std::int64_t inputs = 133;
  for (const float bad : {kInf, -kInf, std::nanf("")}) {
    for (const int m : {17, 40}) {
      const auto plain = normal_values(static_cast<std::size_t>(m * inputs), 9);
      for (const std::int64_t k : {0, 70, 132}) {
        auto values = plain;
        const int row = 16;
        values[static_cast<std::size_t>(row * inputs + k)] = bad;
        check_only(results(int8, Int8Block(inputs).tile(), {int8_shape(inputs), m, values}), row, -1);
        const Bf16Weights weights(16, inputs, 0);
        check_only(results(bf16, weights.tile(), {bf16_shape(inputs), m, values}), row, -1);
        weights.at(5, k) = bf16_from_float(bad);
        check_only(results(bf16, weights.tile(), {bf16_shape(inputs), m, plain}), -1, 5);
      }
    }
  }
}

// The table of this machine, or null with a message.
const Kernels* amx() {
  const Kernels* const kernels = find_kernels("amx");
  if (kernels == nullptr) MESSAGE("no AMX here: only the model of its instructions was tested");
  return kernels;
}

TileKernel kernel_of(const Kernels& kernels, WeightFormat format, ActivationForm form) {
  return kernels.tile[static_cast<std::size_t>(format)][static_cast<std::size_t>(form)];
}
TileKernel int8_of(const Kernels& kernels) { return kernel_of(kernels, WeightFormat::int8, ActivationForm::s8); }
TileKernel bf16_of(const Kernels& kernels) { return kernel_of(kernels, WeightFormat::bf16, ActivationForm::bf16); }

// --- Tests -----------------------------------------------------------------------------------------------------------

TEST_CASE("the model multiplies tiles as the manual's definitions do by hand") {
  TileConfig config;
  config.set(0, 2);
  config.set(1, 2);
  config.set(2, 16);
  std::int8_t a[2][64] = {}, b[16][64] = {};
  a[1][4] = -128, a[1][7] = 3;  // the second row: inputs 4 and 7
  b[1][4 * 9] = 127, b[1][4 * 9 + 3] = -5;
  std::int32_t c[2][16];
  Model::configure(config);
  Model::load<1>(a, 64);
  Model::load<2>(b, 64);
  Model::dot_int8<0, 1, 2>();
  Model::dot_int8<0, 1, 2>();
  Model::store<0>(c, 64);
  for (int m = 0; m < 2; ++m) {
    for (int n = 0; n < 16; ++n)
      CHECK(c[m][n] == (m == 1 && n == 9 ? 2 * (-128 * 127 - 15) : 0));
  }
  std::uint16_t x[2][32] = {}, y[16][32] = {};
  x[0][6] = bf16_from_float(1.5F), x[0][7] = bf16_from_float(-2.0F), x[0][8] = 0x0001;  // the last is subnormal
  y[3][2 * 11] = bf16_from_float(4.0F), y[3][2 * 11 + 1] = bf16_from_float(0.25F),
           y[4][2 * 11] = bf16_from_float(0x1p127F);
  float sums[2][16];
  Model::zero<0>();
  Model::load<1>(x, 64);
  Model::load<2>(y, 64);
  Model::dot_bf16<0, 1, 2>();
  Model::store<0>(sums, 64);
  for (int m = 0; m < 2; ++m) {
    for (int n = 0; n < 16; ++n)
      CHECK(sums[m][n] == (m == 0 && n == 11 ? 5.5F : 0.0F));
  }
  CHECK_THROWS_AS(Model::zero<3>(), std::logic_error);              // not configured
  CHECK_THROWS_AS((Model::dot_int8<2, 1, 0>()), std::logic_error);  // sizes
  Model::release();
  CHECK_THROWS_AS(Model::zero<0>(), std::logic_error);
}

TEST_CASE("int8 products in modelled tiles are exact") { check_int8(kModelInt8); }

TEST_CASE("bf16 products in modelled tiles agree with double and the portable kernels") { check_bf16(kModelBf16); }

TEST_CASE("modelled tiles keep what is not finite in its row or column") { check_not_finite(kModelInt8, kModelBf16); }

TEST_CASE("modelled tiles prefetch what is left of the weights and the beginning of the next") {
  const std::int64_t inputs = 64 * 20;
  const std::size_t ahead = 12 * 1024;
  const Int8Block block(inputs), next(inputs);
  const Rows x(int8_shape(inputs), 16, normal_values(static_cast<std::size_t>(16 * inputs), 10));
  Tile tile = block.tile();
  const auto lines = [](const Int8Block& of, std::size_t begin, std::size_t end) {
    std::set<const std::uint8_t*> result;
    for (; begin < end; begin += 64)
      result.insert(of.memory.data() + begin);
    return result;
  };
  Model::prefetched.clear();
  results(kModelInt8, tile, x);
  auto expected = lines(block, ahead, 20 * 1024);
  CHECK(Model::prefetched == expected);
  tile.next = next.memory.data();
  results(kModelInt8, tile, x);
  expected.merge(lines(next, 0, ahead));
  CHECK(Model::prefetched == expected);

  const Bf16Weights weights(7, 32 * 20, 1), later(7, 32 * 20, 1);
  const Rows y(bf16_shape(32 * 20), 16, normal_values(16 * 32 * 20, 10));
  tile = weights.tile();
  tile.next = later.memory.data();
  Model::prefetched.clear();
  results(kModelBf16, tile, y);
  expected.clear();
  for (std::size_t row = 0; row < 7; ++row) {
    for (std::size_t step = 0; step < 20; ++step) {
      expected.insert((step < 12 ? later : weights).memory.data() + row * weights.stride + step * 64);
    }
  }
  CHECK(Model::prefetched == expected);
}

TEST_CASE("AVX-512 transposes words") {
  if (!detect_isa().has(Isa::avx512f)) {
    MESSAGE("no AVX-512 here: not tested");
    return;
  }
  for (const std::size_t stride : {64, 66, 200}) {
    const Bytes from(15 * stride + 64);
    const Bytes got(1024), expected(1024);
    for (std::size_t i = 0; i < 15 * stride + 64; ++i)
      from.data()[i] = static_cast<std::uint8_t>(i * 37 >> 3);
    transpose_words(from.data(), stride, got.data());
    Model::transpose(from.data(), stride, expected.data());
    CHECK(std::memcmp(got.data(), expected.data(), 1024) == 0);
  }
}

TEST_CASE("int8 products in this processor's tiles are exact") {
  if (const Kernels* const kernels = amx()) check_int8(int8_of(*kernels));
}

TEST_CASE("bf16 products in this processor's tiles agree with double and the portable kernels") {
  if (const Kernels* const kernels = amx()) check_bf16(bf16_of(*kernels));
}

TEST_CASE("this processor's tiles keep what is not finite in its row or column") {
  if (const Kernels* const kernels = amx()) check_not_finite(int8_of(*kernels), bf16_of(*kernels));
}

TEST_CASE("this processor's tiles agree with the model, subnormal numbers included, and few rows with AVX-512") {
  const Kernels* const kernels = amx();
  if (kernels == nullptr) return;
  for (const std::int64_t inputs : {64, 300, 960}) {
    const Int8Block block(inputs);
    const Bf16Weights weights(16, inputs, 0);
    for (const int m : kRows) {
      CAPTURE(inputs);
      CAPTURE(m);
      auto values = normal_values(static_cast<std::size_t>(m * inputs), 11);
      for (std::size_t i = 0; i < values.size(); i += 3)
        values[i] *= i % 2 == 0 ? 0x1p-127F : 0x1p-121F;
      const Rows s8(int8_shape(inputs), m, values), bf16(bf16_shape(inputs), m, values);
      const auto int8_got = results(int8_of(*kernels), block.tile(), s8);
      const auto bf16_got = results(bf16_of(*kernels), weights.tile(), bf16);
      if (m < 12) {
        CHECK(same_bits(int8_got, results(int8_of(kAvx512Bf16Kernels), block.tile(), s8)));
        CHECK(same_bits(bf16_got, results(bf16_of(kAvx512Bf16Kernels), weights.tile(), bf16)));
      } else {
        CHECK(same_bits(int8_got, results(kModelInt8, block.tile(), s8)));
        CHECK(same_bits(bf16_got, results(kModelBf16, weights.tile(), bf16)));
      }
    }
  }
}

TEST_CASE("the AMX table is AVX-512's but for its own products") {
  const Kernels* const kernels = amx();
  if (kernels == nullptr) return;
  for (std::size_t format = 0; format < kWeightFormats; ++format) {
    for (std::size_t form = 0; form < kActivationForms; ++form) {
      CHECK((kernels->tile[format][form] == nullptr) == (kAvx512Bf16Kernels.tile[format][form] == nullptr));
    }
    for (const DType x : {DType::f32, DType::bf16, DType::f16}) {
      const auto weights = static_cast<WeightFormat>(format);
      CHECK(kernels->exact_form(weights, x) == kAvx512Bf16Kernels.exact_form(weights, x));
    }
  }
}

}  // namespace
}  // namespace moe_fx::cpu

#endif
