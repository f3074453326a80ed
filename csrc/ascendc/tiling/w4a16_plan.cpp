#include "tiling/w4a16_plan.h"

#include <algorithm>

#include "tiling/checks.h"

namespace moe_fx::ascendc {

PassTiling plan_pass(uint32_t rows, uint32_t spanColumns, uint32_t spans, uint32_t mostColumns) {
  // Where there are several tiles, their edges are multiples of every group size: rows of the next pass are cut there
  // too.
  const int64_t wanted = divide_up(spanColumns, mostColumns);
  const int64_t quantum = wanted == 1 ? kLanes : 128;
  const uint32_t tileColumns = static_cast<uint32_t>(round_up(divide_up(spanColumns, wanted), quantum));
  const uint32_t tilesPerSpan = static_cast<uint32_t>(divide_up(spanColumns, tileColumns));
  return {.rows = rows,
          .columns = spans * spanColumns,
          .spanColumns = spanColumns,
          .tilesPerSpan = tilesPerSpan,
          .tiles = spans * tilesPerSpan,
          .tileColumns = tileColumns};
}

StreamTiling plan_stream(uint32_t tokens, uint32_t group, bool hasOffset, uint32_t tileColumns, uint32_t cores) {
  // A unit's weights with a row of scales and one of offsets; at the end, the partial sums that cores left of a
  // stretch.
  const uint32_t weights = kUnitRows * tileColumns / 2 + 2 * tileColumns * 2;
  const uint32_t partials = cores * kReduceColumns * 4;
  // Pieces are prepared in the buffer of the block: fp32 values, and as many again.
  const uint32_t blockBytes = kBlockRows * tileColumns * 2;
  const uint32_t pieceRows = std::min(kMaxPieceRows, blockBytes / 8 / 128 * 128);
  return {.tokens = tokens,
          .group = group,
          .hasOffset = hasOffset,
          .tileColumns = tileColumns,
          .pieceRows = pieceRows,
          .weightBytes = std::max(weights, partials)};
}

uint32_t stream_buffer_bytes(const StreamTiling& stream) {
  const uint32_t wide = stream.tileColumns * 4;
  const uint32_t totals = stream.tokens * wide;
  const uint32_t sums = std::max(stream.tokens, 2u) * wide;
  const uint32_t block = kBlockRows * stream.tileColumns * 2;
  const uint32_t scales = 2 * wide;
  const uint32_t panel = kPanelPairs * (kUnitRows * 2 + 4 + 4);
  const uint32_t peaks = 2 * kLanes * 4;
  return 2 * stream.weightBytes + 2 * kPanelLoadBytes + totals + sums + block + scales + panel + peaks;
}

uint64_t partial_bytes(const PassTiling& pass, uint32_t segments, uint32_t tokens, uint32_t cores) {
  // Cache lines of 512 bytes keep what follows apart.
  return static_cast<uint64_t>(round_up(int64_t{segments + cores} * tokens * pass.tileColumns * 4, 512));
}

void require_product(uint32_t tokens, uint32_t group, uint32_t cores) {
  require(tokens >= 1 && tokens <= kMaxTokens, "tokens: 1 to ", kMaxTokens, " are taken, not ", tokens);
  require(group == 32 || group == 64 || group == 128, "group: 32, 64 and 128 are taken, not ", group);
  // Each of the load buffers holds one unit's rows of every core's partial sums, and of one core's twice.
  const uint32_t mostCores = kPanelLoadBytes / 4 / kUnitRows - 1;
  require(cores >= 1 && cores <= mostCores, "cores: 1 to ", mostCores, " vector cores are taken, not ", cores);
}

void require_countable(const PassTiling& pass, uint32_t matrices, uint32_t pairs, uint32_t cores) {
  const uint64_t cost = uint64_t{pass.tiles} * (pass.rows / kUnitRows) * (matrices + 2 * uint64_t{pairs});
  require(cost * cores < uint64_t{1} << 32, "the shape is too large: ", matrices, " matrices of ", pass.rows, " x ",
          pass.columns, " weights");
}

}  // namespace moe_fx::ascendc
