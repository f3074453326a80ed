// The sizes and offsets of packed weights, and the header of their buffers; see format.h.

#include "cpu/format.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>

#include "cpu/memory.h"

namespace moe_fx::cpu {

static_assert(std::endian::native == std::endian::little, "packed weights are laid out in little-endian order");
static_assert(sizeof(PackedHeader) == 72 && sizeof(PackedHeader) <= kHeaderBytes);

namespace {

constexpr char kMagic[8] = {'M', 'O', 'E', 'F', 'X', 'P', 'K', '1'};
constexpr std::size_t kMagicFamily = 7;  // characters that every version shares

constexpr std::int64_t kMaxExperts = std::int64_t{1} << 20;
// Sums over this many products of int8 values still fit in int32.
constexpr std::int64_t kMaxSize = std::int64_t{1} << 17;
constexpr int kMaxSegments = 1024;

constexpr std::size_t kSmallPage = 4096;

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument("packed weights: " + message); }

void check_range(const char* name, std::int64_t value, std::int64_t most) {
  if (value < 1 || value > most) {
    refuse(std::string(name) + " is " + std::to_string(value) + "; it must be between 1 and " + std::to_string(most));
  }
}

std::size_t round_up_bytes(std::size_t value, std::size_t step) { return (value + step - 1) / step * step; }

}  // namespace

std::string_view dtype_name(DType dtype) {
  switch (dtype) {
    case DType::f32: return "f32";
    case DType::bf16: return "bf16";
    case DType::f16: return "f16";
  }
  return {};
}

DType dtype_named(std::string_view name) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    if (dtype_name(dtype) == name) return dtype;
  }
  throw std::invalid_argument("dtype is '" + std::string(name) + "'; it must be 'f32', 'bf16' or 'f16'");
}

std::string_view format_name(WeightFormat format) {
  switch (format) {
    case WeightFormat::bf16: return "bf16";
    case WeightFormat::f16: return "f16";
    case WeightFormat::int8: return "int8";
    case WeightFormat::int4: return "int4";
  }
  return {};
}

void PackedSpec::check() const {
  if (!is_packed(format)) {
    refuse("the format " + std::string(format_name(format)) +
           " is dense and used where the model has it; pack int8 or int4");
  }
  check_range("experts", experts, kMaxExperts);
  check_range("hidden", hidden, kMaxSize);
  check_range("intermediate", intermediate, kMaxSize);
  check_range("segments", segments, kMaxSegments);
  if (format == WeightFormat::int8) {
    if (group != 0) refuse("int8 has one scale per row; leave group at 0, not " + std::to_string(group));
    if (zero_points) refuse("int8 is symmetric; zero_points belong to int4");
    return;
  }
  if (group != 32 && group != 64 && group != 128) {
    refuse("int4 needs a group of 32, 64 or 128 inputs, not " + std::to_string(group));
  }
  for (const auto& [name, size] : {std::pair{"hidden", hidden}, std::pair{"intermediate", intermediate}}) {
    if (size % group != 0) {
      refuse(std::string(name) + " is " + std::to_string(size) + ", which is no multiple of the group of " +
             std::to_string(group) + "; choose a group that divides it, or int8");
    }
  }
}

PackedLayout::PackedLayout(const PackedSpec& spec) : spec_(spec) {
  spec_.check();
  // Page placement works on whole pages, so that a node's segment shares no huge page with another node's.
  const std::size_t alignment = spec_.segments > 1 ? kHugePage : kSmallPage;
  std::size_t end = kHeaderBytes;
  if (spec_.biases) {
    const std::int64_t parts = spec_.gated ? 2 : 1;
    const std::int64_t rows = kBlockRows * (parts * blocks(Matrix::w13) + blocks(Matrix::w2));
    end += static_cast<std::size_t>(spec_.experts * rows) * sizeof(float);
  }
  end = round_up_bytes(end, alignment);
  segments_.push_back(end);
  for (int segment = 0; segment < spec_.segments; ++segment) {
    for (const Matrix matrix : {Matrix::w13, Matrix::w2}) {
      const auto [first, last] = segment_blocks(matrix, segment);
      const std::size_t parts = matrix == Matrix::w13 && spec_.gated ? 2 : 1;
      end += static_cast<std::size_t>(spec_.experts * (last - first)) * parts * block_bytes(matrix);
    }
    end = round_up_bytes(end, alignment);
    segments_.push_back(end);
  }
  bytes_ = end;
}

std::int64_t PackedLayout::padded_inputs(Matrix matrix) const {
  // int4 inputs are a multiple of the group, and so of a chunk, already.
  return spec_.format == WeightFormat::int8 ? round_up(inputs(matrix), 64) : inputs(matrix);
}

std::int64_t PackedLayout::groups(Matrix matrix) const {
  return spec_.format == WeightFormat::int8 ? 1 : inputs(matrix) / spec_.group;
}

std::int64_t PackedLayout::blocks(Matrix matrix) const {
  const std::int64_t rows = matrix == Matrix::w13 ? spec_.intermediate : spec_.hidden;
  return round_up(rows, kBlockRows) / kBlockRows;
}

std::pair<std::int64_t, std::int64_t> PackedLayout::segment_blocks(Matrix matrix, int segment) const {
  const std::int64_t count = blocks(matrix);
  const std::int64_t segments = spec_.segments;
  // Two blocks of w2 are a cache line of a bf16 output row: nodes that split one would write to the same line.
  const std::int64_t step = matrix == Matrix::w2 && count >= 2 * segments ? 2 : 1;
  const std::int64_t steps = round_up(count, step) / step;
  const auto begin = [&](std::int64_t index) { return std::min(steps * index / segments * step, count); };
  return {begin(segment), begin(segment + 1)};
}

int PackedLayout::segment_of(Matrix matrix, std::int64_t block) const {
  int segment = 0;
  while (segment_blocks(matrix, segment).second <= block)
    ++segment;
  return segment;
}

std::size_t PackedLayout::scales_offset(Matrix) const { return spec_.format == WeightFormat::int8 ? 0 : kLine; }

std::size_t PackedLayout::zeros_offset(Matrix matrix) const {
  return scales_offset(matrix) + static_cast<std::size_t>(groups(matrix) * kBlockRows) * 2;
}

std::size_t PackedLayout::values_offset(Matrix matrix) const {
  if (spec_.format == WeightFormat::int8) return kBlockRows * sizeof(float);
  const std::size_t zeros = spec_.zero_points ? static_cast<std::size_t>(groups(matrix) * kBlockRows) : 0;
  return round_up_bytes(zeros_offset(matrix) + zeros, kLine);
}

std::size_t PackedLayout::block_bytes(Matrix matrix) const {
  const auto values = static_cast<std::size_t>(kBlockRows * padded_inputs(matrix));
  return values_offset(matrix) + (spec_.format == WeightFormat::int8 ? values : values / 2);
}

std::size_t PackedLayout::block_offset(Matrix matrix, std::int64_t expert, std::int64_t block, int part) const {
  const int segment = segment_of(matrix, block);
  const auto [first, last] = segment_blocks(matrix, segment);
  const std::int64_t parts = matrix == Matrix::w13 && spec_.gated ? 2 : 1;
  const std::int64_t index = (expert * (last - first) + block - first) * parts + part;
  std::size_t offset = segment_begin(segment) + static_cast<std::size_t>(index) * block_bytes(matrix);
  if (matrix == Matrix::w2) {
    const auto [first13, last13] = segment_blocks(Matrix::w13, segment);
    const std::int64_t before = spec_.experts * (last13 - first13) * (spec_.gated ? 2 : 1);
    offset += static_cast<std::size_t>(before) * block_bytes(Matrix::w13);
  }
  return offset;
}

std::size_t PackedLayout::bias_offset(Matrix matrix, std::int64_t expert, int part) const {
  const std::int64_t rows13 = kBlockRows * blocks(Matrix::w13);
  const std::int64_t index =
      matrix == Matrix::w13 ? (part * spec_.experts + expert) * rows13
                            : (spec_.gated ? 2 : 1) * spec_.experts * rows13 + expert * kBlockRows * blocks(Matrix::w2);
  return kHeaderBytes + static_cast<std::size_t>(index) * sizeof(float);
}

void write_header(void* buffer, const PackedSpec& spec) {
  PackedHeader header{};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.format = static_cast<std::uint32_t>(spec.format);
  header.gated = spec.gated;
  header.experts = spec.experts;
  header.hidden = spec.hidden;
  header.intermediate = spec.intermediate;
  header.group = spec.group;
  header.zero_points = spec.zero_points;
  header.biases = spec.biases;
  header.segments = static_cast<std::uint32_t>(spec.segments);
  header.bytes = PackedLayout(spec).bytes();
  std::memcpy(buffer, &header, sizeof header);
}

PackedSpec read_header(const void* buffer, std::size_t bytes) {
  const std::string again = "; pack the weights again";
  PackedHeader header;
  if (bytes < kHeaderBytes) {
    refuse("a buffer of " + std::to_string(bytes) + " bytes is shorter than the header of " +
           std::to_string(kHeaderBytes) + " bytes" + again);
  }
  std::memcpy(&header, buffer, sizeof header);
  if (std::memcmp(header.magic, kMagic, kMagicFamily) != 0) {
    refuse("the buffer does not start with \"" + std::string(kMagic, kMagicFamily) +
           "\": it was not written by moe-fx, or never begun with begin_packed");
  }
  if (header.magic[kMagicFamily] != kMagic[kMagicFamily]) {
    refuse("the buffer is of layout version '" + std::string(1, header.magic[kMagicFamily]) +
           "', and this moe-fx reads '" + std::string(1, kMagic[kMagicFamily]) + "'" + again + " with this version");
  }
  // Unsigned fields are checked before they are narrowed; check() and the comparison of sizes see to the rest.
  if (header.format >= kWeightFormats || header.gated > 1 || header.zero_points > 1 || header.biases > 1 ||
      header.segments > static_cast<std::uint32_t>(kMaxSegments)) {
    refuse("the header is damaged" + again);
  }
  PackedSpec spec;
  spec.format = static_cast<WeightFormat>(header.format);
  spec.experts = header.experts;
  spec.hidden = header.hidden;
  spec.intermediate = header.intermediate;
  spec.gated = header.gated != 0;
  spec.group = header.group;
  spec.zero_points = header.zero_points != 0;
  spec.biases = header.biases != 0;
  spec.segments = static_cast<int>(header.segments);
  const std::size_t expected = PackedLayout(spec).bytes();
  if (header.bytes != expected) {
    refuse("the header tells of " + std::to_string(header.bytes) + " bytes where its sizes need " +
           std::to_string(expected) + ": it is damaged" + again);
  }
  if (bytes < expected) {
    refuse("the buffer has " + std::to_string(bytes) + " of " + std::to_string(expected) + " bytes: it was cut short" +
           again);
  }
  return spec;
}

}  // namespace moe_fx::cpu
