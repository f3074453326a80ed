// How a product with int4 weights is cut over the vector cores: the numbers that the host computes and the kernels
// read.
//
// Plain data, for the kernels and the host alike. A pass is one product of a few activation rows with matrices of int4
// weights [rows, columns], whose columns are cut into tiles and whose rows are cut into units.

#pragma once

#include <cstdint>

namespace moe_fx::ascendc {

// Rows of a unit, the smallest piece of work that a core takes. Every group size is a multiple of it.
constexpr uint32_t kUnitRows = 32;
// Rows that are widened to half at a time.
constexpr uint32_t kBlockRows = 16;
// Columns that a repeat of the multiply-adds covers.
constexpr uint32_t kLanes = 64;
// Tokens that a kernel takes.
constexpr uint32_t kMaxTokens = 8;
// Pairs of a unit and a token whose activations are held at a time.
constexpr uint32_t kPanelPairs = 256;
// Most rows that get their power of two together: the largest number that two reductions of 64 lanes cover, at 32 rows
// each, in the first.
constexpr uint32_t kMaxPieceRows = kLanes * kUnitRows;
// Bytes of each of the two buffers that activations, partial sums and routing pass through.
constexpr uint32_t kPanelLoadBytes = 8192;
// Columns of a token that a core adds up at a time at the end.
constexpr uint32_t kReduceColumns = 64;
// Unified buffer, as CANN's tiling context reports it for this architecture.
constexpr uint32_t kUnifiedBufferBytes = 196352;

// One pass. The columns are one or two spans of equal width (gate and up are two); no tile crosses from one to the
// other.
struct PassTiling {
  uint32_t rows;
  uint32_t columns;
  uint32_t spanColumns;
  uint32_t tilesPerSpan;
  uint32_t tiles;
  uint32_t tileColumns;  // of every tile but a span's last, which may be narrower; a multiple of 64
};

// What the inner loop needs, whatever the pass.
struct StreamTiling {
  uint32_t tokens;
  uint32_t group;
  uint32_t hasOffset;
  uint32_t tileColumns;  // the widest of all passes
  uint32_t pieceRows;    // most rows that get their power of two together; a multiple of 128
  uint32_t weightBytes;  // of each of the two buffers for packed weights
};

}  // namespace moe_fx::ascendc
