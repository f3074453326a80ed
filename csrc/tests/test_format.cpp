// The sizes and offsets of packed weights, the checks on them, and the header of their buffers.

#include <doctest/doctest.h>

#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/format.h"

using namespace moe_fx::cpu;

namespace {

PackedSpec int8_spec() { return {.format = WeightFormat::int8, .experts = 3, .hidden = 100, .intermediate = 40}; }

PackedSpec int4_spec() {
  return {.format = WeightFormat::int4, .experts = 3, .hidden = 192, .intermediate = 96, .group = 32};
}

std::string complaint(const PackedSpec& spec) {
  try {
    spec.check();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "none";
}

bool mentions(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

std::string header_complaint(const std::vector<std::uint8_t>& buffer, std::size_t bytes) {
  try {
    read_header(buffer.data(), bytes);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "none";
}

}  // namespace

TEST_CASE("a spec says what is wrong with it") {
  CHECK(complaint(int8_spec()) == "none");
  CHECK(complaint(int4_spec()) == "none");

  PackedSpec spec = int8_spec();
  spec.format = WeightFormat::bf16;
  CHECK(mentions(complaint(spec), "bf16 is dense"));
  spec = int8_spec();
  spec.experts = 0;
  CHECK(mentions(complaint(spec), "experts is 0; it must be between 1 and"));
  spec = int8_spec();
  spec.hidden = (std::int64_t{1} << 17) + 1;
  CHECK(mentions(complaint(spec), "hidden is 131073"));
  spec = int8_spec();
  spec.intermediate = -4;
  CHECK(mentions(complaint(spec), "intermediate is -4"));
  spec = int8_spec();
  spec.segments = 0;
  CHECK(mentions(complaint(spec), "segments is 0"));
  spec = int8_spec();
  spec.group = 32;
  CHECK(mentions(complaint(spec), "leave group at 0, not 32"));
  spec = int8_spec();
  spec.zero_points = true;
  CHECK(mentions(complaint(spec), "zero_points belong to int4"));
  spec = int4_spec();
  spec.group = 48;
  CHECK(mentions(complaint(spec), "32, 64 or 128 inputs, not 48"));
  spec = int4_spec();
  spec.group = 64;
  CHECK(mentions(complaint(spec), "intermediate is 96, which is no multiple of the group of 64"));
  CHECK_THROWS_AS(PackedLayout{spec}, std::invalid_argument);
}

TEST_CASE("the parts of a block are where the documentation puts them") {
  const PackedLayout int8(int8_spec());
  CHECK(int8.padded_inputs(Matrix::w13) == 128);
  CHECK(int8.padded_inputs(Matrix::w2) == 64);
  CHECK(int8.groups(Matrix::w13) == 1);
  CHECK(int8.scales_offset(Matrix::w13) == 0);
  CHECK(int8.values_offset(Matrix::w13) == 64);
  CHECK(int8.block_bytes(Matrix::w13) == 64 + 16 * 128);
  CHECK(int8.blocks(Matrix::w13) == 3);
  CHECK(int8.blocks(Matrix::w2) == 7);

  PackedSpec spec = int4_spec();
  const PackedLayout symmetric(spec);
  CHECK(symmetric.padded_inputs(Matrix::w13) == 192);
  CHECK(symmetric.groups(Matrix::w2) == 3);
  CHECK(symmetric.scales_offset(Matrix::w2) == 64);
  CHECK(symmetric.values_offset(Matrix::w2) == 64 + 128);  // 3 records of 32 bytes, padded
  CHECK(symmetric.block_bytes(Matrix::w2) == 192 + 16 * 96 / 2);

  spec.zero_points = true;
  const PackedLayout asymmetric(spec);
  CHECK(asymmetric.zeros_offset(Matrix::w2) == 64 + 96);
  CHECK(asymmetric.values_offset(Matrix::w2) == 64 + 192);  // 3 records of 32 and 3 of 16 bytes, padded
  CHECK(asymmetric.values_offset(Matrix::w13) == 64 + 6 * 48 + 32);
}

TEST_CASE("blocks and biases fill a buffer without overlaps, in their segments, on cache lines") {
  for (const int segments : {1, 2, 3, 40}) {
    for (const bool gated : {true, false}) {
      for (PackedSpec spec : {int8_spec(), int4_spec()}) {
        spec.segments = segments;
        spec.gated = gated;
        spec.biases = true;
        const PackedLayout layout(spec);
        std::map<std::size_t, std::size_t> ranges;  // begin to end
        ranges[0] = kHeaderBytes;
        for (const Matrix matrix : {Matrix::w13, Matrix::w2}) {
          const int parts = matrix == Matrix::w13 && gated ? 2 : 1;
          for (std::int64_t expert = 0; expert < spec.experts; ++expert) {
            for (int part = 0; part < parts; ++part) {
              const std::size_t bias = layout.bias_offset(matrix, expert, part);
              CHECK(bias % kLine == 0);
              CHECK(ranges.emplace(bias, bias + layout.blocks(matrix) * kBlockRows * 4).second);
              for (std::int64_t block = 0; block < layout.blocks(matrix); ++block) {
                const std::size_t begin = layout.block_offset(matrix, expert, block, part);
                const std::size_t end = begin + layout.block_bytes(matrix);
                const int segment = layout.segment_of(matrix, block);
                CHECK(begin % kLine == 0);
                CHECK(begin >= layout.segment_begin(segment));
                CHECK(end <= layout.segment_end(segment));
                CHECK(ranges.emplace(begin, end).second);
              }
            }
          }
        }
        std::size_t last = 0;
        for (const auto& [begin, end] : ranges) {
          CHECK(begin >= last);
          last = end;
        }
        CHECK(last <= layout.bytes());
        const std::size_t alignment = segments > 1 ? std::size_t{2} << 20 : 4096;
        for (int segment = 0; segment < segments; ++segment)
          CHECK(layout.segment_begin(segment) % alignment == 0);
        CHECK(layout.segment_end(segments - 1) == layout.bytes());
      }
    }
  }
}

TEST_CASE("gate and up blocks of the same rows are neighbours") {
  const PackedLayout layout(int4_spec());
  CHECK(layout.block_offset(Matrix::w13, 1, 2, 1) ==
        layout.block_offset(Matrix::w13, 1, 2, 0) + layout.block_bytes(Matrix::w13));
  CHECK(layout.block_offset(Matrix::w13, 1, 3, 0) ==
        layout.block_offset(Matrix::w13, 1, 2, 0) + 2 * layout.block_bytes(Matrix::w13));
}

TEST_CASE("segments share rows evenly, and none splits a cache line of the output") {
  PackedSpec spec = int8_spec();
  spec.hidden = 2048;
  spec.intermediate = 768;
  for (const int segments : {1, 2, 3, 4, 5, 7, 64}) {
    spec.segments = segments;
    const PackedLayout layout(spec);
    for (const Matrix matrix : {Matrix::w13, Matrix::w2}) {
      const int step = matrix == Matrix::w2 ? 2 : 1;
      std::int64_t next = 0, least = layout.blocks(matrix), most = 0;
      for (int segment = 0; segment < segments; ++segment) {
        const auto [first, last] = layout.segment_blocks(matrix, segment);
        CHECK(first == next);
        CHECK(first % step == 0);
        for (std::int64_t block = first; block < last; ++block)
          CHECK(layout.segment_of(matrix, block) == segment);
        least = std::min(least, last - first);
        most = std::max(most, last - first);
        next = last;
      }
      CHECK(next == layout.blocks(matrix));
      CHECK(most - least <= step);
    }
  }
}

TEST_CASE("too few blocks are dealt out one by one") {
  PackedSpec spec = int8_spec();
  spec.hidden = 48;  // 3 blocks of w2
  spec.segments = 2;
  const PackedLayout layout(spec);
  CHECK(layout.segment_blocks(Matrix::w2, 0) == std::pair<std::int64_t, std::int64_t>(0, 1));
  CHECK(layout.segment_blocks(Matrix::w2, 1) == std::pair<std::int64_t, std::int64_t>(1, 3));
}

TEST_CASE("a header gives back its spec, and only a whole one of this version is read") {
  PackedSpec spec = int4_spec();
  spec.zero_points = true;
  spec.biases = true;
  spec.gated = false;
  spec.segments = 2;
  const std::size_t bytes = PackedLayout(spec).bytes();
  std::vector<std::uint8_t> buffer(kHeaderBytes);
  write_header(buffer.data(), spec);
  const PackedSpec read = read_header(buffer.data(), bytes);
  CHECK(read.format == spec.format);
  CHECK(read.experts == spec.experts);
  CHECK(read.hidden == spec.hidden);
  CHECK(read.intermediate == spec.intermediate);
  CHECK(read.gated == spec.gated);
  CHECK(read.group == spec.group);
  CHECK(read.zero_points == spec.zero_points);
  CHECK(read.biases == spec.biases);
  CHECK(read.segments == spec.segments);

  CHECK(header_complaint(buffer, bytes + 1) == "none");
  CHECK(mentions(header_complaint(buffer, bytes - 1), "it was cut short"));
  CHECK(mentions(header_complaint(buffer, 100), "shorter than the header"));

  std::vector<std::uint8_t> other = buffer;
  other[0] = 'X';
  CHECK(mentions(header_complaint(other, bytes), "not written by moe-fx"));
  other = buffer;
  other[7] = '9';
  CHECK(mentions(header_complaint(other, bytes), "layout version '9', and this moe-fx reads '1'"));
  other = buffer;
  other[offsetof(PackedHeader, gated)] = 7;
  CHECK(mentions(header_complaint(other, bytes), "the header is damaged"));
  other = buffer;
  other[offsetof(PackedHeader, experts) + 1] = 0x10;  // 4099 of them: a sound number, but a larger buffer
  CHECK(mentions(header_complaint(other, bytes), "it is damaged"));
  other = buffer;
  std::memset(other.data() + offsetof(PackedHeader, experts), 0xff, 8);
  CHECK(mentions(header_complaint(other, bytes), "experts is -1"));
}

TEST_CASE("formats and dtypes have names") {
  CHECK(format_name(WeightFormat::bf16) == "bf16");
  CHECK(format_name(WeightFormat::f16) == "f16");
  CHECK(format_name(WeightFormat::int8) == "int8");
  CHECK(format_name(WeightFormat::int4) == "int4");
  CHECK(dtype_name(DType::f32) == "f32");
  CHECK(dtype_name(DType::bf16) == "bf16");
  CHECK(dtype_name(DType::f16) == "f16");
}
