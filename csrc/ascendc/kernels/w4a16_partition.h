// Which units of a pass a core takes, and which cores took the units of a segment: the same arithmetic on every core.
//
// The units of a pass lie in a row: `outer` times over all matrices with `inner` units of each. Cutting that row into
// equal stretches, wherever the cuts fall, keeps every core busy when the matrices do not divide among the cores. A
// unit costs one pass of Cast and two of Axpy a token, so stretches are equal in 1 + 2 n, n being a matrix's tokens.
//
// A segment is a run of units whose products add up to the same columns: a tile of one matrix (up), or a tile of all of
// them (down). A core that took a part of segment g leaves partial sums in slot g + core of the workspace. Along the
// row, each step to a new part raises g, the core or both, so no two parts share a slot, and those of a segment are
// neighbours.

#pragma once

#include <cstdint>

#include "kernel_operator.h"
#include "tiling/w4a16_tiling.h"

namespace moe_fx::ascendc {

__aicore__ inline uint32_t Smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

// Where a unit lies.
struct Unit {
  uint32_t slot;  // of its matrix, in the list of those in use
  uint32_t tile;
  uint32_t row;
};

class Partition {
 public:
  // `before` holds, for each matrix and one past the last, the sum of 1 + 2 n over the matrices before it.
  __aicore__ inline void Init(const AscendC::LocalTensor<uint32_t>& before, uint32_t matrices, uint32_t dearest,
                              uint32_t outer, uint32_t inner, uint32_t unitsPerTile, uint32_t segmentUnits) {
    before_ = before;
    matrices_ = matrices;
    inner_ = inner;
    unitsPerTile_ = unitsPerTile;
    segmentUnits_ = segmentUnits;
    units_ = outer * matrices * inner;
    weight_ = before.GetValue(matrices);
    cost_ = outer * inner * weight_;
    // Each core in use gets at least one unit, so that every core between a segment's first and last took part in it.
    const uint32_t cores = static_cast<uint32_t>(AscendC::GetBlockNum());
    const uint32_t most = cost_ / dearest;
    cores_ = Smaller(cores, most);
  }

  __aicore__ inline uint32_t Begin(uint32_t core) const {
    if (core >= cores_) return units_;
    // The first unit that starts at or after this core's share of the cost.
    const uint32_t start = (cost_ * core + cores_ - 1) / cores_;
    const uint32_t outer = start / (weight_ * inner_);
    const uint32_t rest = start - outer * weight_ * inner_;
    uint32_t slot = 0;
    while (before_.GetValue(slot + 1) * inner_ <= rest)
      ++slot;
    const uint32_t each = before_.GetValue(slot + 1) - before_.GetValue(slot);
    const uint32_t into = rest - before_.GetValue(slot) * inner_;
    return (outer * matrices_ + slot) * inner_ + (into + each - 1) / each;
  }

  __aicore__ inline Unit At(uint32_t unit) const {
    const uint32_t run = unit / inner_;
    const uint32_t within = unit - run * inner_;
    const uint32_t outer = run / matrices_;
    const uint32_t tile = within / unitsPerTile_;
    return {run - outer * matrices_, outer + tile, (within - tile * unitsPerTile_) * kUnitRows};
  }

  __aicore__ inline uint32_t SegmentOf(uint32_t unit) const { return unit / segmentUnits_; }
  __aicore__ inline bool StartsSegment(uint32_t unit) const { return unit % segmentUnits_ == 0; }
  // Units of the same matrix and tile from this one on, itself included.
  __aicore__ inline uint32_t UnitsLeft(uint32_t unit) const { return unitsPerTile_ - unit % unitsPerTile_; }

  __aicore__ inline uint32_t FirstCore(uint32_t segment) const { return Owner(segment * segmentUnits_); }
  __aicore__ inline uint32_t LastCore(uint32_t segment) const { return Owner((segment + 1) * segmentUnits_ - 1); }

 private:
  // The last core whose share starts at or before the unit does.
  __aicore__ inline uint32_t Owner(uint32_t unit) const {
    const uint32_t run = unit / inner_;
    const uint32_t outer = run / matrices_;
    const uint32_t slot = run - outer * matrices_;
    const uint32_t before = before_.GetValue(slot);
    const uint32_t each = before_.GetValue(slot + 1) - before;
    const uint32_t start = (outer * weight_ + before) * inner_ + (unit - run * inner_) * each;
    return start * cores_ / cost_;
  }

  AscendC::LocalTensor<uint32_t> before_;
  uint32_t matrices_, inner_, unitsPerTile_, segmentUnits_, units_, weight_, cost_, cores_;
};

}  // namespace moe_fx::ascendc
