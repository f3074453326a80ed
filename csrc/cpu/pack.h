// Writing packed weights: quantising floating-point weights, or re-laying weights that are quantised already.
//
// Packing goes expert by expert, so that a caller holds one expert's source at a time, and its rows are shared out
// among threads. The layout is that of format.h. Buffers must be zeroed before begin_packing (HugeBuffer is).

#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/format.h"
#include "cpu/topology.h"

namespace moe_fx::cpu {

// The three projections of an expert. Ungated layers have no up.
enum class Projection : std::uint8_t { gate, up, down };

// A row-major matrix [N, K] of floating-point weights; rows row_stride bytes apart.
struct FloatRows {
  DType dtype = DType::bf16;
  const void* data = nullptr;
  std::size_t row_stride = 0;
};

// int8 rows and their fp32 scales, scale_stride values apart (one per row).
struct Int8Rows {
  const std::int8_t* data = nullptr;
  std::size_t row_stride = 0;
  const float* scales = nullptr;
  std::size_t scale_stride = 1;
};

// Rows of nibbles, two a byte, the lower input in the low nibble; per row K/g fp32 scales and, with zero points, K/g
// uint8 zeros; rows of scales and zeros are scale_stride and zero_stride values apart.
struct Int4Rows {
  const std::uint8_t* data = nullptr;
  std::size_t row_stride = 0;
  const float* scales = nullptr;
  std::size_t scale_stride = 0;
  const std::uint8_t* zeros = nullptr;
  std::size_t zero_stride = 0;
};

// Writes the header and binds each segment's pages to its node of the topology (segment i to node i modulo nodes),
// unless there are fewer segments than nodes.
void begin_packing(std::uint8_t* buffer, const PackedLayout& layout, const Topology& topology);

// Quantises and writes one projection of one expert by rounding to nearest (ties to even).
//   int8: scale = max|row| / 127, values within +-127.
//   int4: symmetric without zero points, per group: scale = max|group| / 7, values within -7..7, nibble = value + 8;
//         with zero points: the group's range, widened to hold 0, on 0..15.
// Scales are rounded as they are stored (fp16 mantissa for int4) before values are divided by them. A group or row of
// zeros has the scale 0. A value that is not finite makes its row's (group's) scale NaN, so that results show it.
void pack_float(std::uint8_t* buffer, const PackedLayout& layout, std::int64_t expert, Projection projection,
                const FloatRows& rows, int threads);

// Writes one projection that is quantised already, values unchanged. int4 scales lose what a shared power of two and
// fp16's 11 bits of mantissa cannot hold: nothing for fp16 scales, nothing for bf16 scales within 2^29 of the block's
// largest.
void pack_int8(std::uint8_t* buffer, const PackedLayout& layout, std::int64_t expert, Projection projection,
               const Int8Rows& rows, int threads);
void pack_int4(std::uint8_t* buffer, const PackedLayout& layout, std::int64_t expert, Projection projection,
               const Int4Rows& rows, int threads);

// Writes one projection's fp32 bias [N], values `stride` apart.
void pack_bias(std::uint8_t* buffer, const PackedLayout& layout, std::int64_t expert, Projection projection,
               const float* bias, std::size_t stride);

// The dequantised fp32 weights [N, K] of one projection of one expert, row-major.
void unpack(const std::uint8_t* buffer, const PackedLayout& layout, std::int64_t expert, Projection projection,
            float* out);

}  // namespace moe_fx::cpu
