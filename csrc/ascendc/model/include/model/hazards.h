// Order between the pipes of a core, as vector clocks, and the unified buffer with the shadow that is checked by them.
//
// Each pipe counts the instructions issued to it. clock[p][q] is the last instruction of q that is known to be over
// before the next one of p starts. A flag carries the clock of its source pipe; waiting for it joins that clock into
// the waiting pipe's. The scalar unit issues everything, so what it waited for explicitly holds for all that it issues
// afterwards.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

namespace ascendc_model {

enum Pipe : uint8_t { kV, kMte2, kMte3, kScalar };
inline constexpr int kPipes = 4;
// The pipes that the kernel itself has to order; the compiler orders the scalar unit and all of them.
inline constexpr int kManualPipes = 3;

inline const char* pipe_name(int pipe) {
  static constexpr const char* kNames[] = {"V", "MTE2", "MTE3", "S"};
  return kNames[pipe];
}

using Clock = std::array<uint32_t, kPipes>;

inline void join(Clock& into, const Clock& other) {
  for (int q = 0; q < kPipes; ++q) {
    into[q] = std::max(into[q], other[q]);
  }
}

class Clocks {
 public:
  // The time of a new instruction of this pipe.
  uint32_t issue(Pipe pipe) {
    join(clocks_[pipe], clocks_[kScalar]);
    return ++clocks_[pipe][pipe];
  }
  const Clock& of(Pipe pipe) const { return clocks_[pipe]; }
  uint32_t now(Pipe pipe) const { return clocks_[pipe][pipe]; }
  // What is over once all that was issued to the pipe is.
  Clock flag(Pipe source) const {
    Clock clock = clocks_[source];
    join(clock, clocks_[kScalar]);
    return clock;
  }
  void wait(Pipe pipe, const Clock& flag) { join(clocks_[pipe], flag); }
  void barrier() {
    Clock all{};
    for (const Clock& clock : clocks_) {
      join(all, clock);
    }
    clocks_.fill(all);
  }

 private:
  std::array<Clock, kPipes> clocks_{};
};

// The unified buffer of a core. Order is kept by block of 32 bytes, written or not by byte.
class UnifiedBuffer {
 public:
  static constexpr uint32_t kBytes = 192 * 1024;
  static constexpr uint32_t kBlock = 32;
  static constexpr uint32_t kBlocks = kBytes / kBlock;

  UnifiedBuffer() : data_(kBytes + 64), written_(kBytes) {
    const auto address = reinterpret_cast<uintptr_t>(data_.data());
    base_ = data_.data() + (64 - address % 64) % 64;
    for (auto* shadow : {&writes_, &reads_}) {
      for (auto& times : *shadow) {
        times.assign(kBlocks, 0);
      }
    }
  }

  uint8_t* at(uint32_t address) { return base_ + address; }

  // The first byte in a range that nobody wrote, or its size.
  uint32_t first_unwritten(uint32_t address, uint32_t bytes) const {
    const void* found = std::memchr(written_.data() + address, 0, bytes);
    return found ? static_cast<uint32_t>(static_cast<const uint8_t*>(found) - written_.data()) - address : bytes;
  }
  void mark_written(uint32_t address, uint32_t bytes) { std::memset(written_.data() + address, 1, bytes); }
  // Bytes whose content is nobody's: of a fresh buffer, or padding that no value was named for. They are filled with a
  // pattern that is NaN in every floating type, so that a use shows in the numbers too.
  void mark_unwritten(uint32_t address, uint32_t bytes) {
    std::memset(written_.data() + address, 0, bytes);
    std::memset(base_ + address, 0xff, bytes);
  }

  // Another pipe's access that this one is not ordered after: the pipe, or -1.
  int unordered_write(uint32_t address, uint32_t bytes, Pipe pipe, const Clock& clock) const {
    return unordered(writes_, address, bytes, pipe, clock);
  }
  int unordered_read(uint32_t address, uint32_t bytes, Pipe pipe, const Clock& clock) const {
    return unordered(reads_, address, bytes, pipe, clock);
  }
  void note_read(uint32_t address, uint32_t bytes, Pipe pipe, uint32_t time) {
    note(reads_[pipe], address, bytes, time);
  }
  void note_write(uint32_t address, uint32_t bytes, Pipe pipe, uint32_t time) {
    note(writes_[pipe], address, bytes, time);
  }

 private:
  using Times = std::array<std::vector<uint32_t>, kManualPipes>;

  static int unordered(const Times& times, uint32_t address, uint32_t bytes, Pipe pipe, const Clock& clock) {
    const uint32_t from = address / kBlock;
    const uint32_t to = (address + bytes + kBlock - 1) / kBlock;
    for (int q = 0; q < kManualPipes; ++q) {
      if (q == pipe) continue;
      const uint32_t* time = times[q].data();
      uint32_t latest = 0;
      for (uint32_t block = from; block < to; ++block) {
        latest = std::max(latest, time[block]);
      }
      if (latest > clock[q]) return q;
    }
    return -1;
  }
  static void note(std::vector<uint32_t>& times, uint32_t address, uint32_t bytes, uint32_t time) {
    const uint32_t from = address / kBlock;
    const uint32_t to = (address + bytes + kBlock - 1) / kBlock;
    std::fill(times.begin() + from, times.begin() + to, time);
  }

  std::vector<uint8_t> data_;
  std::vector<uint8_t> written_;
  uint8_t* base_;
  Times writes_;
  Times reads_;
};

}  // namespace ascendc_model
