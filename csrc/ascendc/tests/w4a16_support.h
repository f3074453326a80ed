// Random problems with int4 weights for the tests of the kernels that take them, and products in double to compare
// with.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "kernel_operator.h"

namespace moe_fx::ascendc::test {

inline double number(float value) { return value; }
inline double number(half value) { return static_cast<float>(value); }
inline double number(bfloat16_t value) { return value.value(); }

// Half a unit in the last place of the type, relative to the value.
template <typename T>
constexpr double kRoundoff = 0x1p-8;
template <>
constexpr double kRoundoff<half> = 0x1p-11;

// Matrices [rows, columns] of int4: eight to a word, low nibble first; weight = (int4 + offset) * scale.
template <typename T>
struct Int4Matrices {
  uint32_t matrices = 0, rows = 0, columns = 0, group = 0;
  bool has_offset = false;
  std::vector<int32_t> packed = {};
  std::vector<T> scale = {};
  std::vector<T> offset = {};

  std::size_t bytes_each() const { return std::size_t{rows} * columns / 2; }
  std::size_t scale_bytes_each() const { return std::size_t{rows} / group * columns * 2 * (has_offset ? 2 : 1); }

  // One row of weights, as numbers.
  void row(uint32_t matrix, uint32_t index, std::vector<double>& out) const {
    const std::size_t from = (std::size_t{matrix} * rows + index) * columns;
    const std::size_t group_from = (std::size_t{matrix} * (rows / group) + index / group) * columns;
    for (uint32_t c = 0; c < columns; ++c) {
      const uint32_t nibble = static_cast<uint32_t>(packed[(from + c) / 8]) >> (from + c) % 8 * 4 & 15;
      double value = nibble < 8 ? nibble : static_cast<double>(nibble) - 16;
      if (has_offset) value += number(offset[group_from + c]);
      out[c] = value * number(scale[group_from + c]);
    }
  }

  // The products of activation rows with one matrix.
  std::vector<std::vector<double>> times(uint32_t matrix, const std::vector<std::vector<double>>& activations) const {
    std::vector<std::vector<double>> out(activations.size(), std::vector<double>(columns, 0.0));
    std::vector<double> weights(columns);
    for (uint32_t r = 0; r < rows; ++r) {
      row(matrix, r, weights);
      for (std::size_t i = 0; i < activations.size(); ++i) {
        const double x = activations[i][r];
        for (uint32_t c = 0; c < columns; ++c) {
          out[i][c] += x * weights[c];
        }
      }
    }
    return out;
  }
};

using Random = std::mt19937;

inline float normal(Random& random) { return std::normal_distribution<float>()(random); }
inline float uniform(Random& random, float low, float high) {
  return std::uniform_real_distribution<float>(low, high)(random);
}
inline uint32_t below(Random& random, uint32_t end) {
  return std::uniform_int_distribution<uint32_t>(0, end - 1)(random);
}

// Products with rows of magnitude 1 have magnitude 1. `spread` widens the scales' range, in powers of two either way.
template <typename T>
Int4Matrices<T> random_matrices(Random& random, uint32_t matrices, uint32_t rows, uint32_t columns, uint32_t group,
                                bool has_offset, float spread = 0.5F) {
  Int4Matrices<T> result{
      .matrices = matrices, .rows = rows, .columns = columns, .group = group, .has_offset = has_offset};
  result.packed.resize(std::size_t{matrices} * rows * columns / 8);
  for (int32_t& word : result.packed) {
    word = static_cast<int32_t>(random());
  }
  const std::size_t scales = std::size_t{matrices} * (rows / group) * columns;
  const float unit = 1.0F / (5.0F * std::sqrt(static_cast<float>(rows)));
  result.scale.reserve(scales);
  for (std::size_t i = 0; i < scales; ++i) {
    result.scale.push_back(T(unit * std::exp2(uniform(random, -spread, spread))));
    if (has_offset) result.offset.push_back(T(static_cast<float>(below(random, 16)) - 8.0F));
  }
  return result;
}

// [count] rows of [length] normal numbers; row i is multiplied by factors[i] where there is one.
template <typename T>
std::vector<T> random_rows(Random& random, uint32_t count, uint32_t length, const std::vector<float>& factors = {}) {
  std::vector<T> result;
  result.reserve(std::size_t{count} * length);
  for (uint32_t i = 0; i < count; ++i) {
    const float factor = i < factors.size() ? factors[i] : 1.0F;
    for (uint32_t k = 0; k < length; ++k) {
      result.push_back(T(factor * normal(random)));
    }
  }
  return result;
}

template <typename T>
std::vector<double> numbers(const T* values, std::size_t count) {
  std::vector<double> result(count);
  std::transform(values, values + count, result.begin(), [](T value) { return number(value); });
  return result;
}

// The largest relative L2 distance of a row of results from the reference's; a row of zeros has to be zeros.
template <typename T>
double worst_row(const T* results, const std::vector<std::vector<double>>& reference) {
  double worst = 0.0;
  for (std::size_t i = 0; i < reference.size(); ++i) {
    double distance = 0.0, norm = 0.0;
    for (std::size_t c = 0; c < reference[i].size(); ++c) {
      const double want = reference[i][c];
      const double off = number(results[i * reference[i].size() + c]) - want;
      distance += off * off;
      norm += want * want;
    }
    const double error = norm > 0.0 ? std::sqrt(distance / norm) : (distance > 0.0 ? 1.0 : 0.0);
    worst = std::isnan(error) ? error : std::max(worst, error);
    if (std::isnan(worst)) break;
  }
  return worst;
}

}  // namespace moe_fx::ascendc::test
