// The plans of repack_int4; see the header and kernels/repack_int4.h.

#include "tiling/repack_int4.h"

#include <algorithm>

#include "tiling/checks.h"

namespace moe_fx::ascendc {

namespace {

constexpr int64_t kPerWord = 8;
constexpr int64_t kBlockColumns = 64;  // in a block of 32 bytes
constexpr int64_t kConstantBytes = 6 * 32;
// Nibbles of a tile: those that are moved within their words, those that are transposed as halves, and zero points.
constexpr int64_t kWordTile = 4096 * kPerWord;
constexpr int64_t kTransposedTile = 16384;
constexpr int64_t kZeroPointsTile = 1024 * kPerWord;
// Columns of a transposed tile: GPTQ's rows are long in memory on both sides; compressed-tensors' are long across.
constexpr int64_t kGptqColumns = 1024;
constexpr int64_t kCompressedTensorsColumns = 128;

void check_shape(const char* name, int64_t experts, int64_t rows, int64_t outputs, int64_t first, int64_t merged) {
  require(experts >= 1, name, ": experts is ", experts, "; there must be at least one");
  require(rows >= 1, name, ": there are ", rows, " rows; there must be at least one");
  require(outputs >= 1 && outputs % kPerWord == 0, name, ": outputs is ", outputs, ", not a multiple of ", kPerWord);
  require(first >= 0 && first % kPerWord == 0, name, ": the first output is ", first, ", not a multiple of ", kPerWord);
  require(merged % kPerWord == 0 && first + outputs <= merged, name, ": outputs ", first, " to ", first + outputs,
          " do not fit a row of ", merged, ", a multiple of ", kPerWord);
}

// Whole rows where several fit a tile, else a part of one.
RepackInt4Plan plan(const char* name, int64_t experts, int64_t rows, int64_t outputs, int64_t first, int64_t merged,
                    int64_t tileRows, int64_t tileColumns, uint32_t vectorCores) {
  RepackInt4Plan result{};
  RepackInt4Tiling& t = result.tiling;
  t.experts = to_word(experts, name);
  t.rows = to_word(rows, name);
  t.columns = to_word(outputs, name);
  t.firstColumn = static_cast<uint32_t>(first);
  t.rowColumns = to_word(merged, name);
  t.tileRows = static_cast<uint32_t>(tileRows);
  t.tileColumns = static_cast<uint32_t>(tileColumns);
  const int64_t tiles = experts * divide_up(rows, tileRows) * divide_up(outputs, tileColumns);
  to_word(tiles, name);
  result.cores = static_cast<uint32_t>(std::min<int64_t>(vectorCores, tiles));
  return result;
}

void set_ub(RepackInt4Plan& plan, const char* name, int64_t bytes, uint32_t ubBytes) {
  require(bytes <= ubBytes, name, ": ", bytes, " bytes of UB are needed, ", ubBytes, " are there");
  plan.ubBytes = static_cast<uint32_t>(bytes);
}

}  // namespace

RepackInt4Plan plan_repack_int4(const RepackInt4Problem& p, uint32_t vectorCores, uint32_t ubBytes) {
  constexpr const char* kName = "repack_int4";
  const int64_t merged = p.mergedOutputs == 0 ? p.outputs : p.mergedOutputs;
  check_shape(kName, p.experts, p.inputs, p.outputs, p.firstOutput, merged);
  if (p.layout == Int4Layout::kAwq) {
    const int64_t columns = std::min(round_up(p.outputs, kBlockColumns), kWordTile);
    const int64_t rows = std::min(p.inputs, kWordTile / columns);
    RepackInt4Plan result =
        plan(kName, p.experts, p.inputs, p.outputs, p.firstOutput, merged, rows, columns, vectorCores);
    // As RepackAwq::Init allots it: words in and out, twice each; two words to work in; constants.
    set_ub(result, kName, 6 * rows * columns / 2 + kConstantBytes, ubBytes);
    return result;
  }
  require(p.inputs % 32 == 0 && p.outputs % 32 == 0, kName, ": ", p.inputs, " inputs and ", p.outputs,
          " outputs; GPTQ's and compressed-tensors' must be multiples of 32");
  const int64_t columns = p.layout == Int4Layout::kGptq ? kGptqColumns : kCompressedTensorsColumns;
  const int64_t rows = kTransposedTile / columns;
  RepackInt4Plan result =
      plan(kName, p.experts, p.inputs, p.outputs, p.firstOutput, merged, rows, columns, vectorCores);
  // As RepackTransposed::Init allots it: nibbles in and out, twice each; as halves, before and after.
  set_ub(result, kName, 4 * kTransposedTile / 2 + 2 * 2 * kTransposedTile, ubBytes);
  return result;
}

RepackInt4Plan plan_zero_points(const ZeroPointsProblem& p, uint32_t vectorCores, uint32_t ubBytes) {
  constexpr const char* kName = "repack_int4 zero points";
  const int64_t merged = p.mergedOutputs == 0 ? p.outputs : p.mergedOutputs;
  check_shape(kName, p.experts, p.groups, p.outputs, p.firstOutput, merged);
  require(p.less == 0 || p.less == 1, kName, ": less is ", p.less, "; it must be 0 or 1");
  const int64_t columns = std::min(round_up(p.outputs, kBlockColumns), kZeroPointsTile);
  const int64_t rows = std::min(p.groups, kZeroPointsTile / columns);
  RepackInt4Plan result =
      plan(kName, p.experts, p.groups, p.outputs, p.firstOutput, merged, rows, columns, vectorCores);
  result.tiling.less = static_cast<uint32_t>(p.less);
  // As ZeroPointsToOffsets::Init allots it: words in, offsets out, twice each; words to work in; half, float;
  // constants.
  const int64_t nibbles = rows * columns;
  set_ub(result, kName, 2 * nibbles / 2 + 2 * nibbles * 2 + 2 * nibbles / 2 + nibbles * (2 + 4) + kConstantBytes,
         ubBytes);
  return result;
}

}  // namespace moe_fx::ascendc
