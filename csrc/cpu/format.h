// How the experts' weights lie in memory: the two forms that the engine computes on.
//
// Dense weights (bf16, fp16) are used where the model has them: row-major [N, K] matrices, one per expert, not copied.
//
// Packed weights (int8, int4) live in one buffer per layer, written once by pack.h. Rows are taken in blocks of 16, and
// within a block the 16 rows' values of the same inputs stand side by side, so that a kernel reads one linear stream
// and one vector lane belongs to one output row:
//
//   buffer    PackedHeader, padded to kHeaderBytes; biases (fp32), padded; then one segment per memory node
//   segment   blocks of w13 [expert][block], then blocks of w2 [expert][block], of the node's share of the rows
//   w13       gated: a block of 16 gate rows is followed by the block of the same 16 up rows
//   block     int8: 16 fp32 scales; K/4 chunks of [16 rows][4 inputs] int8
//             int4: a cache line whose first fp32 multiplies every scale; K/g records of 16 fp16 scales; with zero
//                   points K/g records of 16 uint8; padded to 64; K/8 chunks of [16 rows][2 words of 16 bits]
//
// A row's word p of an int4 chunk holds inputs 2j + p, j = 0..3, in its nibbles 4j (bits 4j to 4j+3). Shifted right by
// 4j, the two words are the pair of inputs (2j, 2j + 1) that a bf16 dot product takes; as bytes, the low nibbles are
// inputs 0, 4, 1, 5 and the high nibbles 2, 6, 3, 7 (the order of int4_byte_order), as an int8 dot product takes them.
// The value of a nibble q is (q - zero) * multiplier * scale, zero being 8 without zero points.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace moe_fx::cpu {

enum class DType : std::uint8_t { f32, bf16, f16 };

// What a weight is stored as. bf16 and f16 are dense, the others packed.
enum class WeightFormat : std::uint8_t { bf16, f16, int8, int4 };
inline constexpr std::size_t kWeightFormats = 4;

std::string_view dtype_name(DType dtype);
// The dtype of that name. Throws std::invalid_argument when there is none.
DType dtype_named(std::string_view name);
std::string_view format_name(WeightFormat format);
inline constexpr std::size_t dtype_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }
inline constexpr bool is_packed(WeightFormat format) {
  return format == WeightFormat::int8 || format == WeightFormat::int4;
}

inline constexpr std::int64_t kBlockRows = 16;
inline constexpr std::size_t kLine = 64;           // bytes of a cache line; every part of the layout starts on one
inline constexpr std::size_t kHeaderBytes = 4096;  // of the buffer
inline constexpr int kInt4ByteOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};
inline constexpr int kInt4Middle = 8;

inline constexpr std::int64_t round_up(std::int64_t value, std::int64_t step) {
  return (value + step - 1) / step * step;
}

// The sizes of a layer and what decides the layout of its packed form.
struct PackedSpec {
  WeightFormat format = WeightFormat::int8;
  std::int64_t experts = 0;
  std::int64_t hidden = 0;        // H: inputs of w13, rows of w2
  std::int64_t intermediate = 0;  // I: rows of the gate, inputs of w2
  bool gated = true;              // w13 holds a gate and an up projection; else one projection
  std::int64_t group = 0;         // int4: inputs that share a scale (32, 64 or 128)
  bool zero_points = false;       // int4
  bool biases = false;            // of both projections
  int segments = 1;               // memory nodes that the rows are spread over

  // Throws std::invalid_argument that says what is wrong with the sizes and what would be right.
  void check() const;
};

// One of the two matrices of an expert.
enum class Matrix : std::uint8_t { w13, w2 };

// Where everything is in a packed buffer: offsets in bytes from its start.
class PackedLayout {
 public:
  explicit PackedLayout(const PackedSpec& spec);

  const PackedSpec& spec() const { return spec_; }
  std::size_t bytes() const { return bytes_; }

  // Inputs of a matrix: logical, and padded to whole chunks and cache lines (padding holds zeros).
  std::int64_t inputs(Matrix matrix) const { return matrix == Matrix::w13 ? spec_.hidden : spec_.intermediate; }
  std::int64_t padded_inputs(Matrix matrix) const;
  // Scale groups along the inputs; 1 for int8.
  std::int64_t groups(Matrix matrix) const;

  // Row blocks of a matrix: of I for w13 (a block stands for gate and up rows), of H for w2.
  std::int64_t blocks(Matrix matrix) const;
  // The blocks [first, second) of a matrix that lie in a segment.
  std::pair<std::int64_t, std::int64_t> segment_blocks(Matrix matrix, int segment) const;
  int segment_of(Matrix matrix, std::int64_t block) const;

  // One block of 16 rows: its size, and the offset of its values behind its scales. Gate and up have one each.
  std::size_t block_bytes(Matrix matrix) const;
  std::size_t values_offset(Matrix matrix) const;
  std::size_t scales_offset(Matrix matrix) const;  // from the block's start
  std::size_t zeros_offset(Matrix matrix) const;   // from the block's start; only with zero points

  // The gate block (part 0) or up block (part 1) of w13, or a block of w2 (part 0).
  std::size_t block_offset(Matrix matrix, std::int64_t expert, std::int64_t block, int part = 0) const;

  // fp32 biases [E][padded rows]: of the gate (part 0), the up (part 1) and the down projection.
  std::size_t bias_offset(Matrix matrix, std::int64_t expert, int part = 0) const;

  std::size_t segment_begin(int segment) const { return segments_.at(static_cast<std::size_t>(segment)); }
  std::size_t segment_end(int segment) const { return segments_.at(static_cast<std::size_t>(segment) + 1); }

 private:
  PackedSpec spec_;
  std::size_t bytes_ = 0;
  std::vector<std::size_t> segments_;  // begins, and the end of the last
};

// What a packed buffer starts with. Fixed size and plain, since buffers are saved to files and mapped from them.
struct PackedHeader {
  char magic[8];         // "MOEFXPK1": the last character counts the versions of the layout
  std::uint32_t format;  // WeightFormat
  std::uint32_t gated;
  std::int64_t experts, hidden, intermediate, group;
  std::uint32_t zero_points, biases, segments, reserved;
  std::uint64_t bytes;  // of the whole buffer
};

// Writes the header of `spec` at the start of a buffer.
void write_header(void* buffer, const PackedSpec& spec);

// Reads the header of a buffer of `bytes` bytes. Throws std::invalid_argument when it is none, is of another version,
// or is cut short.
PackedSpec read_header(const void* buffer, std::size_t bytes);

}  // namespace moe_fx::cpu
