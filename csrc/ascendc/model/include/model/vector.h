// What all vector instructions share: operands with their strides, masks and repeats, the rules for them, and the walk
// over the lanes.
//
// A repeat works on 256 bytes of the widest operand, in 8 blocks of 32 bytes; the others have as many lanes. Blocks of
// a repeat lie blk blocks apart, repeats rep blocks.

#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <string>
#include <utility>

#include "model/sync.h"

namespace ascendc_model {

inline constexpr uint32_t kRepeatBits = 2048;

struct Operand {
  Place place;
  uint32_t bits;  // of an element
  uint32_t blk = 1;
  uint32_t rep = 8;
};

template <typename T>
Operand operand(const AscendC::LocalTensor<T>& tensor, uint32_t blk = 1, uint32_t rep = 8) {
  return {tensor.place(), kBits<T>, blk, rep};
}

// The lanes of each repeat that work.
struct Mask {
  bool prefix;  // the first `count`
  uint32_t count = 0;
  uint64_t bits[2] = {0, 0};

  bool has(uint32_t lane) const { return prefix ? lane < count : bits[lane / 64] >> (lane % 64) & 1; }
};

inline Mask first_lanes(uint64_t count) { return {true, static_cast<uint32_t>(std::min<uint64_t>(count, 1u << 20))}; }
inline Mask lane_bits(const uint64_t mask[]) { return {false, 0, {mask[0], mask[1]}}; }

// The mask that SetVectorMask left, for instructions that are told not to set their own.
inline Mask kept_mask() {
  const Core& running_core = core();
  if (running_core.mask_counts) return {true, static_cast<uint32_t>(running_core.vector_mask[0])};
  return {false, 0, {running_core.vector_mask[0], running_core.vector_mask[1]}};
}

// An instruction of the vector unit: its name, its time, and the checks of what it touches.
class VectorOp {
 public:
  explicit VectorOp(const char* name) : name_(name), time_(core().clocks.issue(kV)) {}

  const char* name() const { return name_; }

  bool check_aligned(const Operand& operand, const char* what) const {
    if (operand.place.address % UnifiedBuffer::kBlock == 0) return true;
    core().fault(
        FaultKind::kUnaligned, name_,
        std::string(what) + " starts at byte " + std::to_string(operand.place.address) + ", not at a multiple of 32");
    return false;
  }

  bool check_mask(const Mask& mask, uint32_t lanes) const {
    const bool good = mask.prefix ? mask.count >= 1 && mask.count <= lanes
                                  : (mask.bits[0] | mask.bits[1]) != 0 && (lanes > 64 || mask.bits[1] == 0);
    if (good) return true;
    core().fault(FaultKind::kMaskRange, name_,
                 mask.prefix
                     ? "the mask has " + std::to_string(mask.count) + " lanes, a repeat has 1.." + std::to_string(lanes)
                     : "the mask has no lane, or lanes past " + std::to_string(lanes));
    return false;
  }

  // The bytes of an access, after its checks; nullptr when they must not be touched.
  const uint8_t* read(const Place& place, uint64_t address, uint64_t bytes) const {
    Core& running_core = core();
    if (!running_core.valid(name_, place, address, bytes)) return nullptr;
    running_core.read_ub(name_, kV, time_, place, static_cast<uint32_t>(address), static_cast<uint32_t>(bytes));
    return running_core.ub.at(static_cast<uint32_t>(address));
  }
  uint8_t* write(const Place& place, uint64_t address, uint64_t bytes) const {
    Core& running_core = core();
    if (!running_core.valid(name_, place, address, bytes)) return nullptr;
    running_core.write_ub(name_, kV, time_, place, static_cast<uint32_t>(address), static_cast<uint32_t>(bytes));
    return running_core.ub.at(static_cast<uint32_t>(address));
  }

  void check_overlap(const Operand& dst, const Operand& src, uint64_t lanes) const {
    const uint64_t dst_end = dst.place.address + lanes * dst.bits / 8;
    const uint64_t src_end = src.place.address + lanes * src.bits / 8;
    if (dst.place.address >= src_end || src.place.address >= dst_end) return;
    if (dst.place.address == src.place.address && dst.bits == src.bits) return;
    core().fault(FaultKind::kOverlap, name_, "source and destination overlap without being the same");
  }

 private:
  const char* name_;
  uint32_t time_;
};

// Calls work(pointers, lanes) for runs of lanes that lie together in every operand. The first operand is written, and
// read too if accumulates; the others are read. Runs come in the order of repeats, as the NPU works.
template <std::size_t N, typename Work>
void run_lanes(const VectorOp& op, const Operand (&operands)[N], uint64_t offset, uint64_t lanes, bool accumulates,
               uint64_t repeat, Work& work) {
  const uint8_t* pointers[N];
  // Sources first: what an instruction writes does not make what it reads written.
  for (std::size_t step = 1; step <= N; ++step) {
    const std::size_t i = step % N;
    const Operand& operand = operands[i];
    const uint64_t bit = offset * operand.bits;
    const uint64_t block = repeat * operand.rep + bit / 256 * operand.blk;
    const uint64_t address = operand.place.address + block * 32 + bit % 256 / 8;
    const uint64_t bytes = (lanes * operand.bits + 7) / 8;
    if ((i != 0 || accumulates) && !op.read(operand.place, address, bytes)) return;
    if (i == 0 && !op.write(operand.place, address, bytes)) return;
    pointers[i] = core().ub.at(static_cast<uint32_t>(address));
  }
  work(pointers, lanes);
}

template <std::size_t N>
uint32_t widest(const Operand (&operands)[N]) {
  uint32_t bits = 0;
  for (const Operand& operand : operands) {
    bits = std::max(bits, operand.bits);
  }
  return bits;
}

template <std::size_t N>
void check_operands(const VectorOp& op, const Operand (&operands)[N]) {
  for (std::size_t i = 0; i < N; ++i) {
    op.check_aligned(operands[i], i == 0 ? "the destination" : "a source");
  }
}

// The form with a count: any number of elements that follow each other.
template <std::size_t N, typename Work>
void for_count(const char* name, const Operand (&operands)[N], int64_t count, bool accumulates, Work work) {
  const VectorOp op(name);
  check_operands(op, operands);
  if (count <= 0) {
    core().fault(FaultKind::kBadArgument, name, "has a count of " + std::to_string(count));
    return;
  }
  const auto lanes = static_cast<uint64_t>(count);
  for (std::size_t i = 1; i < N; ++i) {
    op.check_overlap(operands[0], operands[i], lanes);
  }
  const uint64_t repeats = (lanes * widest(operands) + kRepeatBits - 1) / kRepeatBits;
  core().count_vector(name, (repeats + 254) / 255, repeats);
  run_lanes(op, operands, 0, lanes, accumulates, 0, work);
}

// The form with a mask, repeats and strides.
template <std::size_t N, typename Work>
void for_repeats(const char* name, const Operand (&operands)[N], const Mask& mask, int repeats, bool accumulates,
                 Work work) {
  const VectorOp op(name);
  check_operands(op, operands);
  const uint32_t bits = widest(operands);
  const uint32_t lanes = kRepeatBits / bits;
  const uint32_t block_lanes = 256 / bits;
  uint64_t total = 0;  // lanes of a counter mask
  if (mask.prefix && core().mask_counts) {
    total = mask.count;
    repeats = static_cast<int>((total + lanes - 1) / lanes);
  } else if (!op.check_mask(mask, lanes)) {
    return;
  }
  core().count_vector(name, 1, static_cast<uint64_t>(repeats));

  bool dense = mask.prefix;  // whether the lanes of a repeat lie together
  bool seamless = true;      // whether repeats do too
  for (const Operand& operand : operands) {
    dense &= operand.blk == 1;
    seamless &= operand.rep * 256 == lanes * operand.bits;
  }
  if (dense && seamless && (total || mask.count == lanes)) {
    const uint64_t all = total ? total : uint64_t{lanes} * static_cast<uint64_t>(repeats);
    if (all) run_lanes(op, operands, 0, all, accumulates, 0, work);
    return;
  }
  for (int repeat = 0; repeat < repeats; ++repeat) {
    Mask here = mask;
    if (total) here.count = static_cast<uint32_t>(std::min<uint64_t>(lanes, total - uint64_t{lanes} * repeat));
    if (dense) {
      run_lanes(op, operands, 0, here.count, accumulates, repeat, work);
      continue;
    }
    for (uint32_t block = 0; block < lanes; block += block_lanes) {
      for (uint32_t lane = block; lane < block + block_lanes;) {
        if (!here.has(lane)) {
          ++lane;
          continue;
        }
        uint32_t end = lane + 1;
        while (end < block + block_lanes && here.has(end)) {
          ++end;
        }
        run_lanes(op, operands, lane, end - lane, accumulates, repeat, work);
        lane = end;
      }
    }
  }
}

// The mask of an instruction with isSetMask, from what it is given.
template <bool isSetMask>
Mask mask_of(uint64_t count) {
  if constexpr (isSetMask) return first_lanes(count);
  return kept_mask();
}
template <bool isSetMask>
Mask mask_of(const uint64_t* bits) {
  if constexpr (isSetMask) return lane_bits(bits);
  return kept_mask();
}

// Lanes are worked on in pieces that stay in the nearest cache.
inline constexpr std::size_t kPiece = 512;

template <typename Work>
void in_pieces(uint64_t lanes, Work work) {
  for (uint64_t from = 0; from < lanes; from += kPiece) {
    work(from, static_cast<std::size_t>(std::min<uint64_t>(kPiece, lanes - from)));
  }
}

template <typename T>
void copy_within(const char* name, const AscendC::LocalTensor<T>& dst, const AscendC::LocalTensor<T>& src,
                 uint64_t count, uint64_t bytes, uint64_t source_step, uint64_t target_step) {
  const VectorOp op(name);
  op.check_aligned(operand(dst), "the destination");
  op.check_aligned(operand(src), "the source");
  core().count_vector(name, 1, count * ((bytes + 255) / 256));
  for (uint64_t i = 0; i < count; ++i) {
    const uint8_t* from = op.read(src.place(), src.place().address + i * source_step, bytes);
    uint8_t* to = op.write(dst.place(), dst.place().address + i * target_step, bytes);
    if (from && to) std::memmove(to, from, bytes);
  }
}

}  // namespace ascendc_model

namespace AscendC {

template <typename T, MaskMode mode = MaskMode::NORMAL>
__aicore__ static inline void SetVectorMask(const uint64_t maskHigh, const uint64_t maskLow) {
  ascendc_model::core().vector_mask[0] = maskLow;
  ascendc_model::core().vector_mask[1] = maskHigh;
}
template <typename T, MaskMode mode = MaskMode::NORMAL>
__aicore__ static inline void SetVectorMask(int32_t len) {
  if (mode == MaskMode::COUNTER) {
    SetVectorMask<T, mode>(0, static_cast<uint64_t>(len));
  } else {
    const uint64_t low = len >= 64 ? ~0ull : (1ull << len) - 1;
    const uint64_t high = len >= 128 ? ~0ull : len > 64 ? (1ull << (len - 64)) - 1 : 0;
    SetVectorMask<T, mode>(high, low);
  }
}
__aicore__ inline void ResetMask() {
  ascendc_model::core().vector_mask[0] = ascendc_model::core().vector_mask[1] = ~0ull;
}
__aicore__ inline void SetMaskCount() { ascendc_model::core().mask_counts = true; }
__aicore__ inline void SetMaskNorm() { ascendc_model::core().mask_counts = false; }

}  // namespace AscendC
