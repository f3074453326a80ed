// Packing and unpacking, block by block of 16 rows: read a block's rows, quantise them, and lay them out side by side.
//
// Inner loops run along the inputs of one row over contiguous scratch memory, so that compilers vectorise them for
// whatever the build targets; only the last step, laying out, goes across rows.

#include "cpu/pack.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/float_bits.h"
#include "cpu/memory.h"

namespace moe_fx::cpu {

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// --- What is written where -------------------------------------------------------------------------------------------

// One projection of one expert in a buffer.
struct Target {
  Target(const PackedLayout& layout, std::int64_t expert, Projection projection)
      : layout(layout),
        expert(expert),
        matrix(projection == Projection::down ? Matrix::w2 : Matrix::w13),
        part(projection == Projection::up ? 1 : 0),
        rows(matrix == Matrix::w13 ? layout.spec().intermediate : layout.spec().hidden),
        inputs(layout.inputs(matrix)),
        groups(layout.groups(matrix)),
        blocks(layout.blocks(matrix)) {
    const PackedSpec& spec = layout.spec();
    if (expert < 0 || expert >= spec.experts) {
      throw std::invalid_argument("expert " + std::to_string(expert) + " is not among the " +
                                  std::to_string(spec.experts) + " of these packed weights (0 to " +
                                  std::to_string(spec.experts - 1) + ")");
    }
    if (projection == Projection::up && !spec.gated) {
      throw std::invalid_argument(
          "these packed weights are ungated and have no up projection; pack gate and down only");
    }
  }

  std::size_t block(std::int64_t index) const { return layout.block_offset(matrix, expert, index, part); }
  int rows_of(std::int64_t index) const {
    return static_cast<int>(std::min<std::int64_t>(kBlockRows, rows - index * kBlockRows));
  }
  bool is_int4() const { return layout.spec().format == WeightFormat::int4; }

  const PackedLayout& layout;
  std::int64_t expert;
  Matrix matrix;
  int part;
  std::int64_t rows, inputs, groups, blocks;
};

void check_format(const Target& target, WeightFormat needed) {
  const WeightFormat format = target.layout.spec().format;
  if (format != needed) {
    throw std::invalid_argument("these packed weights are " + std::string(format_name(format)) + "; use pack_" +
                                std::string(format_name(format)) + " or pack_float, not pack_" +
                                std::string(format_name(needed)));
  }
}

// Pointers and strides are checked before anything is written: a wrong one reads foreign memory.
void check_source(const char* name, const void* data, std::size_t stride, std::size_t needed, std::size_t alignment,
                  const char* unit) {
  if (data == nullptr) throw std::invalid_argument(std::string("the ") + name + " are missing (a null pointer)");
  if (reinterpret_cast<std::uintptr_t>(data) % alignment != 0) {
    throw std::invalid_argument(std::string("the ") + name + " are not aligned to their " + std::to_string(alignment) +
                                " bytes; pass a contiguous copy");
  }
  if (stride < needed) {
    throw std::invalid_argument(std::string("the ") + name + " have a stride of " + std::to_string(stride) + " " +
                                unit + " where a row has " + std::to_string(needed));
  }
}

// Calls work(worker, block) for every block, blocks shared out in runs among the calling thread and helpers. `work`
// must not throw: scratch memory is made before.
template <typename Work>
void share_blocks(std::int64_t blocks, int threads, const Work& work) {
  const auto run = [&](int worker) noexcept {
    for (std::int64_t block = blocks * worker / threads; block < blocks * (worker + 1) / threads; ++block) {
      work(worker, block);
    }
  };
  std::vector<std::thread> helpers;
  helpers.reserve(static_cast<std::size_t>(threads));
  for (int worker = 1; worker < threads; ++worker) {
    try {
      helpers.emplace_back(run, worker);
    } catch (const std::exception&) {
      run(worker);  // the system gives no more threads
    }
  }
  run(0);
  for (std::thread& helper : helpers)
    helper.join();
}

int useful_threads(int threads, std::int64_t blocks) {
  if (threads < 1) {
    throw std::invalid_argument("threads is " + std::to_string(threads) + "; packing needs at least 1");
  }
  return static_cast<int>(std::min<std::int64_t>(threads, blocks));
}

// --- Rows of numbers -------------------------------------------------------------------------------------------------

void widen(DType dtype, const std::uint8_t* from, std::int64_t n, float* to) {
  const auto* const halves = reinterpret_cast<const std::uint16_t*>(from);
  switch (dtype) {
    case DType::f32: std::memcpy(to, from, static_cast<std::size_t>(n) * sizeof(float)); return;
    case DType::bf16:
      for (std::int64_t i = 0; i < n; ++i)
        to[i] = float_from_bf16(halves[i]);
      return;
    case DType::f16:
      for (std::int64_t i = 0; i < n; ++i)
        to[i] = float_from_f16(halves[i]);
      return;
  }
}

// The largest magnitude; an infinity or a NaN when there is one, since their bits compare highest.
float largest_magnitude(const float* values, std::int64_t n) {
  std::int32_t largest = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, std::bit_cast<std::int32_t>(values[i]) & 0x7fffffff);
  }
  return std::bit_cast<float>(largest);
}

// The bits of values as integers that compare as the values do (-0 below 0); NaNs compare beyond the infinities.
std::int32_t ordered(float value) {
  const auto bits = std::bit_cast<std::int32_t>(value);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

struct Range {
  float low = 0.0F, high = 0.0F;  // low <= 0 <= high, where they are numbers
};

Range range_with_zero(const float* values, std::int64_t n) {
  std::int32_t low = 0, high = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    low = std::min(low, ordered(values[i]));
    high = std::max(high, ordered(values[i]));
  }
  // ordered() is its own inverse.
  return {std::bit_cast<float>(low ^ ((low >> 31) & 0x7fffffff)), std::bit_cast<float>(high)};
}

// The value divided by a scale, within +-limit, rounded to the nearest integer, ties to even: adding 1.5 * 2^23 leaves
// steps of 1, and the integer in the low bits.
std::int32_t quantised(float value, float scale, float limit) {
  const float quotient = value / scale;
  const float below = quotient > limit ? limit : quotient;
  const float within = below < -limit ? -limit : below;
  constexpr float kRound = 12582912.0F;
  return std::bit_cast<std::int32_t>(within + kRound) - std::bit_cast<std::int32_t>(kRound);
}

// --- int8 ------------------------------------------------------------------------------------------------------------

// Lays a row of int8 into a block. `values` is padded with zeros to whole chunks.
void place_int8_row(const std::int8_t* values, std::int64_t padded_inputs, int row, std::uint8_t* block_values) {
  for (std::int64_t chunk = 0; chunk < padded_inputs / 4; ++chunk) {
    std::memcpy(block_values + (chunk * kBlockRows + row) * 4, values + chunk * 4, 4);
  }
}

// Quantises a row; returns its scale.
float quantise_int8_row(const float* values, std::int64_t n, std::int8_t* out) {
  const float largest = largest_magnitude(values, n);
  const float scale = std::isfinite(largest) ? largest / 127.0F : kNan;
  if (!(scale > 0.0F)) {
    std::fill_n(out, n, std::int8_t{0});
    return scale;
  }
  for (std::int64_t i = 0; i < n; ++i)
    out[i] = static_cast<std::int8_t>(quantised(values[i], scale, 127.0F));
  return scale;
}

void write_int8_block(std::uint8_t* block, const Target& target, const float* scales, const std::int8_t* values) {
  const std::int64_t padded = target.layout.padded_inputs(target.matrix);
  std::memcpy(block, scales, kBlockRows * sizeof(float));
  std::uint8_t* const to = block + target.layout.values_offset(target.matrix);
  for (int row = 0; row < kBlockRows; ++row)
    place_int8_row(values + row * padded, padded, row, to);
}

// --- int4 ------------------------------------------------------------------------------------------------------------

// The power of two that a block's scales share, taken out so that the largest lies in [2^14, 2^15) as fp16. Scales that
// fit fp16 as they are never lose their low bits to it.
struct Multiplier {
  explicit Multiplier(float largest_scale) {
    constexpr float kLargestF16 = 65504.0F;
    if (!(largest_scale > 0.0F)) return;
    int exponent = std::ilogb(largest_scale) - 14;
    if (largest_scale <= kLargestF16) exponent = std::min(exponent, 0);
    exponent = std::max(exponent, -126);  // so that it and its inverse are normal numbers
    value = std::ldexp(1.0F, exponent);
    inverse = std::ldexp(1.0F, -exponent);
  }

  std::uint16_t stored(float scale) const { return f16_from_float(scale * inverse); }
  float restored(std::uint16_t scale) const { return float_from_f16(scale) * value; }

  float value = 1.0F;
  float inverse = 1.0F;
};

// What a block of int4 is made of, in plain order. Its rows are always 16, since rows of one matrix are inputs of the
// other, and so a multiple of the group.
struct Int4Scratch {
  explicit Int4Scratch(const Target& target)
      : scales(static_cast<std::size_t>(kBlockRows * target.groups)),
        zeros(scales.size()),
        words(static_cast<std::size_t>(kBlockRows * target.inputs / 8)) {}

  std::vector<float> scales;         // [16][groups]
  std::vector<std::uint8_t> zeros;   // [16][groups]
  std::vector<std::uint32_t> words;  // [16][inputs / 8]: a row's two words of each chunk
};

// The two words of a chunk of 8 inputs from bytes whose low nibbles are the inputs in order.
std::uint32_t words_of_bytes(std::uint64_t bytes) {
  const auto gather = [](std::uint64_t every_other) {
    const std::uint64_t pairs = (every_other | (every_other >> 12)) & 0x000000ff000000ffULL;
    return static_cast<std::uint32_t>((pairs | (pairs >> 24)) & 0xffffU);
  };
  return gather(bytes & 0x000f000f000f000fULL) | gather((bytes >> 8) & 0x000f000f000f000fULL) << 16;
}

// The same from nibbles in order, two a byte.
std::uint32_t words_of_nibbles(std::uint32_t nibbles) {
  const auto gather = [](std::uint32_t every_other) {
    const std::uint32_t pairs = (every_other | (every_other >> 4)) & 0x00ff00ffU;
    return (pairs | (pairs >> 8)) & 0xffffU;
  };
  return gather(nibbles & 0x0f0f0f0fU) | gather((nibbles >> 4) & 0x0f0f0f0fU) << 16;
}

// The magnitude of the largest scale that is finite.
float largest_finite(const std::vector<float>& scales) {
  float largest = 0.0F;
  for (const float scale : scales) {
    if (std::isfinite(scale)) largest = std::max(largest, std::fabs(scale));
  }
  return largest;
}

void write_int4_block(std::uint8_t* block, const Target& target, const Int4Scratch& scratch,
                      const Multiplier& multiplier) {
  std::memcpy(block, &multiplier.value, sizeof(float));
  auto* const scales = reinterpret_cast<std::uint16_t*>(block + target.layout.scales_offset(target.matrix));
  std::uint8_t* const zeros = block + target.layout.zeros_offset(target.matrix);
  const bool zero_points = target.layout.spec().zero_points;
  for (std::int64_t group = 0; group < target.groups; ++group) {
    for (int row = 0; row < kBlockRows; ++row) {
      const auto from = static_cast<std::size_t>(row * target.groups + group);
      scales[group * kBlockRows + row] = multiplier.stored(scratch.scales[from]);
      if (zero_points) zeros[group * kBlockRows + row] = scratch.zeros[from];
    }
  }
  std::uint8_t* const values = block + target.layout.values_offset(target.matrix);
  const std::int64_t chunks = target.inputs / 8;
  for (int row = 0; row < kBlockRows; ++row) {
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      std::memcpy(values + (chunk * kBlockRows + row) * 4,
                  &scratch.words[static_cast<std::size_t>(row * chunks + chunk)], 4);
    }
  }
}

// The scale of a group before it is rounded as it is stored, and in `range` what its zero point is made of.
float int4_scale(const float* values, std::int64_t n, bool zero_points, Range& range) {
  if (!zero_points) {
    const float largest = largest_magnitude(values, n);
    return std::isfinite(largest) ? largest / 7.0F : kNan;
  }
  range = range_with_zero(values, n);
  if (!std::isfinite(range.low) || !std::isfinite(range.high)) return kNan;
  // In double, since the range of large numbers is beyond fp32's.
  return static_cast<float>((double{range.high} - double{range.low}) / 15.0);
}

// Quantises a group by its stored scale to one nibble a byte; returns its zero point.
std::uint8_t quantise_int4_group(const float* values, std::int64_t n, bool zero_points, const Range& range, float scale,
                                 std::uint8_t* out) {
  if (!(scale > 0.0F)) {
    const std::uint8_t zero = zero_points ? 0 : kInt4Middle;
    std::fill_n(out, n, zero);
    return zero;
  }
  if (!zero_points) {
    for (std::int64_t i = 0; i < n; ++i) {
      out[i] = static_cast<std::uint8_t>(quantised(values[i], scale, 7.0F) + kInt4Middle);
    }
    return kInt4Middle;
  }
  const std::int32_t zero = quantised(-range.low, scale, 15.0F);
  for (std::int64_t i = 0; i < n; ++i) {
    out[i] = static_cast<std::uint8_t>(std::clamp(quantised(values[i], scale, 15.0F) + zero, 0, 15));
  }
  return static_cast<std::uint8_t>(zero);
}

// --- Packing of floating-point rows ----------------------------------------------------------------------------------

void pack_float_as_int8(std::uint8_t* buffer, const Target& target, const FloatRows& rows, int threads) {
  struct Scratch {
    std::vector<float> row;
    std::vector<std::int8_t> values;
    float scales[kBlockRows];
  };
  const auto padded = static_cast<std::size_t>(target.layout.padded_inputs(target.matrix));
  std::vector<Scratch> scratches(static_cast<std::size_t>(threads));
  for (Scratch& scratch : scratches) {
    scratch.row.resize(static_cast<std::size_t>(target.inputs));
    scratch.values.resize(kBlockRows * padded);
  }
  share_blocks(target.blocks, threads, [&](int worker, std::int64_t block) noexcept {
    Scratch& scratch = scratches[static_cast<std::size_t>(worker)];
    const int count = target.rows_of(block);
    if (count < kBlockRows) {
      std::fill(scratch.values.begin(), scratch.values.end(), std::int8_t{0});
      std::fill_n(scratch.scales, kBlockRows, 0.0F);
    }
    for (int row = 0; row < count; ++row) {
      const auto from = static_cast<std::size_t>(block * kBlockRows + row) * rows.row_stride;
      widen(rows.dtype, static_cast<const std::uint8_t*>(rows.data) + from, target.inputs, scratch.row.data());
      scratch.scales[row] = quantise_int8_row(scratch.row.data(), target.inputs,
                                              scratch.values.data() + static_cast<std::size_t>(row) * padded);
    }
    write_int8_block(buffer + target.block(block), target, scratch.scales, scratch.values.data());
  });
}

void pack_float_as_int4(std::uint8_t* buffer, const Target& target, const FloatRows& rows, int threads) {
  struct Scratch {
    explicit Scratch(const Target& target)
        : block(target),
          values(static_cast<std::size_t>(kBlockRows * target.inputs)),
          ranges(static_cast<std::size_t>(kBlockRows * target.groups)),
          nibbles(static_cast<std::size_t>(target.inputs)) {}
    Int4Scratch block;
    std::vector<float> values;          // [16][inputs]
    std::vector<Range> ranges;          // [16][groups]
    std::vector<std::uint8_t> nibbles;  // [inputs], one a byte
  };
  const bool zero_points = target.layout.spec().zero_points;
  const std::int64_t size = target.layout.spec().group;
  std::vector<Scratch> scratches(static_cast<std::size_t>(threads), Scratch(target));
  share_blocks(target.blocks, threads, [&](int worker, std::int64_t block) noexcept {
    Scratch& scratch = scratches[static_cast<std::size_t>(worker)];
    // The multiplier depends on all scales of the block, and every value on its scale as stored with that multiplier.
    for (int row = 0; row < kBlockRows; ++row) {
      const auto from = static_cast<std::size_t>(block * kBlockRows + row) * rows.row_stride;
      float* const values = scratch.values.data() + row * target.inputs;
      widen(rows.dtype, static_cast<const std::uint8_t*>(rows.data) + from, target.inputs, values);
      for (std::int64_t group = 0; group < target.groups; ++group) {
        const auto at = static_cast<std::size_t>(row * target.groups + group);
        scratch.block.scales[at] = int4_scale(values + group * size, size, zero_points, scratch.ranges[at]);
      }
    }
    const Multiplier multiplier(largest_finite(scratch.block.scales));
    for (int row = 0; row < kBlockRows; ++row) {
      const float* const values = scratch.values.data() + row * target.inputs;
      for (std::int64_t group = 0; group < target.groups; ++group) {
        const auto at = static_cast<std::size_t>(row * target.groups + group);
        const float scale = multiplier.restored(multiplier.stored(scratch.block.scales[at]));
        scratch.block.zeros[at] = quantise_int4_group(values + group * size, size, zero_points, scratch.ranges[at],
                                                      scale, scratch.nibbles.data() + group * size);
      }
      for (std::int64_t chunk = 0; chunk < target.inputs / 8; ++chunk) {
        std::uint64_t bytes;
        std::memcpy(&bytes, scratch.nibbles.data() + chunk * 8, sizeof bytes);
        scratch.block.words[static_cast<std::size_t>(row * (target.inputs / 8) + chunk)] = words_of_bytes(bytes);
      }
    }
    write_int4_block(buffer + target.block(block), target, scratch.block, multiplier);
  });
}

}  // namespace

void begin_packing(std::uint8_t* buffer, const PackedLayout& layout, const Topology& topology) {
  write_header(buffer, layout.spec());
  // Packed for fewer nodes than there are, weights would fill some nodes and leave the others empty.
  if (layout.spec().segments < static_cast<int>(topology.nodes.size())) return;
  for (int segment = 0; segment < layout.spec().segments; ++segment) {
    const TopologyNode& node = topology.nodes[static_cast<std::size_t>(segment) % topology.nodes.size()];
    const std::size_t begin = layout.segment_begin(segment);
    // Where the system does not place pages, they stay where they are first written.
    bind_to_node(buffer + begin, layout.segment_end(segment) - begin, node.memory_node);
  }
}

void pack_float(std::uint8_t* buffer, const PackedLayout& layout, std::int64_t expert, Projection projection,
                const FloatRows& rows, int threads) {
  const Target target(layout, expert, projection);
  const std::size_t element = dtype_bytes(rows.dtype);
  check_source("weights", rows.data, rows.row_stride, static_cast<std::size_t>(target.inputs) * element, element,
               "bytes");
  if (rows.row_stride % element != 0) {
    throw std::invalid_argument("the weights' row stride of " + std::to_string(rows.row_stride) +
                                " bytes is no multiple of their " + std::to_string(element) +
                                "-byte elements; strides are in bytes");
  }
  const int team = useful_threads(threads, target.blocks);
  if (target.is_int4()) {
    pack_float_as_int4(buffer, target, rows, team);
  } else {
    pack_float_as_int8(buffer, target, rows, team);
  }
}

void pack_int8(std::uint8_t* buffer, const PackedLayout& layout, std::int64_t expert, Projection projection,
               const Int8Rows& rows, int threads) {
  const Target target(layout, expert, projection);
  check_format(target, WeightFormat::int8);
  check_source("int8 weights", rows.data, rows.row_stride, static_cast<std::size_t>(target.inputs), 1, "bytes");
  check_source("scales", rows.scales, rows.scale_stride, 1, alignof(float), "values");
  const int team = useful_threads(threads, target.blocks);
  const auto padded = static_cast<std::size_t>(layout.padded_inputs(target.matrix));
  std::vector<std::vector<std::int8_t>> scratches(static_cast<std::size_t>(team));
  for (std::vector<std::int8_t>& scratch : scratches)
    scratch.resize(kBlockRows * padded);
  share_blocks(target.blocks, team, [&](int worker, std::int64_t block) noexcept {
    std::vector<std::int8_t>& values = scratches[static_cast<std::size_t>(worker)];
    const int count = target.rows_of(block);
    float scales[kBlockRows] = {};
    if (count < kBlockRows) std::fill(values.begin(), values.end(), std::int8_t{0});
    for (int row = 0; row < count; ++row) {
      const auto at = static_cast<std::size_t>(block * kBlockRows + row);
      std::memcpy(values.data() + static_cast<std::size_t>(row) * padded, rows.data + at * rows.row_stride,
                  static_cast<std::size_t>(target.inputs));
      scales[row] = rows.scales[at * rows.scale_stride];
    }
    write_int8_block(buffer + target.block(block), target, scales, values.data());
  });
}

void pack_int4(std::uint8_t* buffer, const PackedLayout& layout, std::int64_t expert, Projection projection,
               const Int4Rows& rows, int threads) {
  const Target target(layout, expert, projection);
  check_format(target, WeightFormat::int4);
  const auto groups = static_cast<std::size_t>(target.groups);
  check_source("int4 weights", rows.data, rows.row_stride, static_cast<std::size_t>(target.inputs) / 2, 1, "bytes");
  check_source("scales", rows.scales, rows.scale_stride, groups, alignof(float), "values");
  const bool zero_points = layout.spec().zero_points;
  if (zero_points) {
    check_source("zero points", rows.zeros, rows.zero_stride, groups, 1, "values");
  } else if (rows.zeros != nullptr) {
    throw std::invalid_argument("these packed weights are symmetric; begin them with zero_points, or pass none");
  }
  const int team = useful_threads(threads, target.blocks);
  std::vector<Int4Scratch> scratches(static_cast<std::size_t>(team), Int4Scratch(target));
  share_blocks(target.blocks, team, [&](int worker, std::int64_t block) noexcept {
    Int4Scratch& scratch = scratches[static_cast<std::size_t>(worker)];
    for (int row = 0; row < kBlockRows; ++row) {
      const auto at = static_cast<std::size_t>(block * kBlockRows + row);
      const auto to = static_cast<std::size_t>(row) * groups;
      std::copy_n(rows.scales + at * rows.scale_stride, groups, scratch.scales.data() + to);
      if (zero_points) std::copy_n(rows.zeros + at * rows.zero_stride, groups, scratch.zeros.data() + to);
      for (std::int64_t chunk = 0; chunk < target.inputs / 8; ++chunk) {
        std::uint32_t nibbles;
        std::memcpy(&nibbles, rows.data + at * rows.row_stride + chunk * 4, sizeof nibbles);
        scratch.words[static_cast<std::size_t>(row * (target.inputs / 8) + chunk)] = words_of_nibbles(nibbles);
      }
    }
    write_int4_block(buffer + target.block(block), target, scratch, Multiplier(largest_finite(scratch.scales)));
  });
}

void pack_bias(std::uint8_t* buffer, const PackedLayout& layout, std::int64_t expert, Projection projection,
               const float* bias, std::size_t stride) {
  const Target target(layout, expert, projection);
  if (!layout.spec().biases) {
    throw std::invalid_argument("these packed weights have no room for biases; begin them with biases");
  }
  check_source("biases", bias, stride, 1, alignof(float), "values");
  auto* const to = reinterpret_cast<float*>(buffer + layout.bias_offset(target.matrix, expert, target.part));
  for (std::int64_t row = 0; row < target.rows; ++row)
    to[row] = bias[static_cast<std::size_t>(row) * stride];
}

void unpack(const std::uint8_t* buffer, const PackedLayout& layout, std::int64_t expert, Projection projection,
            float* out) {
  const Target target(layout, expert, projection);
  if (out == nullptr) throw std::invalid_argument("the output is missing (a null pointer)");
  const std::int64_t size = target.inputs / target.groups;
  for (std::int64_t row = 0; row < target.rows; ++row) {
    const std::uint8_t* const block = buffer + target.block(row / kBlockRows);
    const std::int64_t r = row % kBlockRows;
    const std::uint8_t* const scales = block + layout.scales_offset(target.matrix);
    const std::uint8_t* const values = block + layout.values_offset(target.matrix);
    float* const to = out + row * target.inputs;
    if (!target.is_int4()) {
      const float scale = reinterpret_cast<const float*>(scales)[r];
      for (std::int64_t k = 0; k < target.inputs; ++k) {
        to[k] = scale * static_cast<float>(static_cast<std::int8_t>(values[(k / 4 * kBlockRows + r) * 4 + k % 4]));
      }
      continue;
    }
    float multiplier;
    std::memcpy(&multiplier, block, sizeof multiplier);
    const std::uint8_t* const zeros = block + layout.zeros_offset(target.matrix);
    for (std::int64_t k = 0; k < target.inputs; ++k) {
      const std::int64_t at = k / size * kBlockRows + r;
      const float scale = multiplier * float_from_f16(reinterpret_cast<const std::uint16_t*>(scales)[at]);
      const int zero = layout.spec().zero_points ? zeros[at] : kInt4Middle;
      const auto* const words = reinterpret_cast<const std::uint16_t*>(values + (k / 8 * kBlockRows + r) * 4);
      const int nibble = (words[k % 2] >> (k % 8 / 2 * 4)) & 15;
      to[k] = static_cast<float>(nibble - zero) * scale;
    }
  }
}

}  // namespace moe_fx::cpu
