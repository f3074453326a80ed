// An emulated vector core: its pipes' clocks, its unified buffer, its flags and counters, and every check of an access.

#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "model/fault.h"
#include "model/global_memory.h"
#include "model/hazards.h"
#include "model/narrow.h"
#include "model/report.h"

namespace ascendc_model {

inline constexpr int kUserEvents = 6;  // ids that a kernel may name
inline constexpr int kEventIds = 8;    // ids that queues may draw on
inline constexpr int kMaxCores = 128;
inline constexpr uint64_t kCacheLine = 64;  // bytes, of the scalar unit's data cache
inline constexpr int kEventKinds = 13;

enum class BufferState : uint8_t { kFixed, kFree, kOccupied, kQueued, kDequeued };

// A piece of the unified buffer that InitBuffer handed out.
struct Buffer {
  uint32_t begin;
  uint32_t bytes;
  BufferState state;
  uint32_t generation = 0;  // counts AllocTensor, so that a tensor of before FreeTensor is known as stale
  int free_event = -1;      // that FreeTensor set and AllocTensor waits for
  int free_kind = 0;        // its HardEvent
};

// Where a tensor lies, with what is needed to tell whether it still may be used.
struct Place {
  uint32_t address = 0;  // in bytes
  uint32_t begin = 0;    // the buffer's bounds
  uint32_t end = 0;
  int32_t buffer = -1;
  uint32_t generation = 0;
};

// What a core knows of all cores, by pipe: their work up to these times is over.
using Knowledge = std::vector<Clock>;

class Launch;

class Core {
 public:
  Core(Launch& launch, GlobalMemory& memory, int index, int blocks)
      : launch(launch), memory(memory), index(index), blocks(blocks), known(blocks) {}

  void fault(FaultKind kind, const std::string& op, const std::string& detail);

  // --- unified buffer
  // -------------------------------------------------------------------------------------------------

  // Whether the bytes may be touched at all; otherwise they must not be.
  bool valid(const char* op, const Place& place, uint64_t address, uint64_t bytes) {
    if (place.buffer >= 0) {
      const Buffer& buffer = buffers[place.buffer];
      if (buffer.state == BufferState::kFree || buffer.generation != place.generation) {
        fault(FaultKind::kStaleBuffer, op, "uses buffer " + describe(place) + " after FreeTensor");
      }
    }
    if (address < place.begin || address + bytes > place.end) {
      fault(FaultKind::kOutOfBounds, op,
            "touches " + std::to_string(bytes) + " bytes at " + std::to_string(address) + ", outside buffer " +
                describe(place));
      return address + bytes <= UnifiedBuffer::kBytes;
    }
    return true;
  }

  void read_ub(const char* op, Pipe pipe, uint32_t time, const Place& place, uint32_t address, uint32_t bytes) {
    if (bytes == 0) return;
    const uint32_t written = ub.first_unwritten(address, bytes);
    if (written != bytes) {
      fault(FaultKind::kUnwrittenRead, op,
            "reads byte " + std::to_string(address + written - place.begin) + " of buffer " + describe(place) +
                ", which nobody wrote");
    }
    if (pipe == kScalar) return;  // the compiler orders the scalar unit
    const int other = ub.unordered_write(address, bytes, pipe, clocks.of(pipe));
    if (other >= 0) missing_wait(op, pipe, other, "reads", "writes", place);
    ub.note_read(address, bytes, pipe, time);
  }

  void write_ub(const char* op, Pipe pipe, uint32_t time, const Place& place, uint32_t address, uint32_t bytes) {
    if (bytes == 0) return;
    ub.mark_written(address, bytes);
    if (pipe == kScalar) return;
    order_write(op, pipe, time, place, address, bytes);
  }

  // A write whose bytes mean nothing: the dummy padding of DataCopyPad.
  void scribble_ub(const char* op, Pipe pipe, uint32_t time, const Place& place, uint32_t address, uint32_t bytes) {
    if (bytes == 0) return;
    ub.mark_unwritten(address, bytes);
    order_write(op, pipe, time, place, address, bytes);
  }

  // --- global memory
  // --------------------------------------------------------------------------------------------------

  // The region of an access, or nullptr when it is out of bounds.
  Region* region(const char* op, const uint8_t* address, uint64_t bytes) {
    Region* region = memory.find(address);
    if (!region) {
      fault(FaultKind::kOutOfBounds, op, "global address lies in no buffer of the launch");
      return nullptr;
    }
    const auto offset = static_cast<uint64_t>(address - region->base());
    if (offset + bytes > region->bytes()) {
      fault(FaultKind::kOutOfBounds, op,
            "touches bytes " + std::to_string(offset) + ".." + std::to_string(offset + bytes) + " of " +
                region->name() + ", which has " + std::to_string(region->bytes()));
      return nullptr;
    }
    return region;
  }

  bool read_gm(const char* op, Pipe pipe, uint32_t time, const uint8_t* address, uint64_t bytes) {
    if (bytes == 0) return true;
    Region* found = region(op, address, bytes);
    if (!found) return false;
    found->traffic.read += bytes;
    if (found->access() == Access::kInput) return true;
    const auto offset = static_cast<uint64_t>(address - found->base());
    const uint32_t size = found->granule_bytes();
    Granule* granules = found->granules();
    for (uint64_t g = offset / size; g <= (offset + bytes - 1) / size; ++g) {
      Granule& granule = granules[g];
      if (granule.writer.somebody()) {
        check_order(op, pipe, granule.writer, "reads", "writes", *found, g * size);
        if (granule.dirty && !(pipe == kScalar && granule.writer.core() == index)) report_dirty(op, *found, granule);
        if (pipe == kScalar) check_fresh(op, *found, address, granule);
      } else if (!found->was_written(g)) {
        fault(FaultKind::kUnwrittenRead, op,
              "reads byte " + std::to_string(g * size) + " of " + found->name() + ", which nobody wrote");
      }
      note_reader(granule, {time, static_cast<uint8_t>(index + 1), pipe});
    }
    if (pipe == kScalar) cached_lines.emplace(reinterpret_cast<uintptr_t>(address) / kCacheLine, memory.serial);
    return true;
  }

  bool write_gm(const char* op, Pipe pipe, uint32_t time, const uint8_t* address, uint64_t bytes, Atomic atomic) {
    if (bytes == 0) return true;
    Region* found = region(op, address, bytes);
    if (!found) return false;
    found->traffic.written += bytes;
    if (found->access() == Access::kInput) {
      fault(FaultKind::kReadOnlyWrite, op, "writes the input " + found->name());
      return false;
    }
    const auto offset = static_cast<uint64_t>(address - found->base());
    const uint32_t size = found->granule_bytes();
    Granule* granules = found->granules();
    const uint32_t serial = ++memory.serial;
    for (uint64_t g = offset / size; g <= (offset + bytes - 1) / size; ++g) {
      Granule& granule = granules[g];
      if (granule.writer.somebody()) {
        // Atomic updates of one kind commute.
        if (atomic == Atomic::kNone || granule.atomic != atomic) {
          check_order(op, pipe, granule.writer, "writes", "writes", *found, g * size);
        }
        if (granule.dirty && granule.writer.core() != index) report_dirty(op, *found, granule);
      } else if (atomic != Atomic::kNone && !found->was_written(g)) {
        fault(FaultKind::kUnwrittenRead, op,
              "updates byte " + std::to_string(g * size) + " of " + found->name() + ", which nobody wrote");
      }
      for (const Toucher& reader : granule.readers) {
        if (reader.somebody()) check_order(op, pipe, reader, "writes", "reads", *found, g * size);
      }
      granule.writer = {time, static_cast<uint8_t>(index + 1), pipe};
      granule.atomic = atomic;
      granule.dirty = pipe == kScalar;
      granule.serial = serial;
    }
    return true;
  }

  // DataCacheCleanAndInvalid: writes the scalar unit's dirty lines of this core back, and forgets what it had read.
  void clean_cache(const uint8_t* address, bool all) {
    for (Region& region : memory.regions()) {
      if (region.access() == Access::kInput) continue;
      const uint64_t size = region.granule_bytes();
      uint64_t from = 0;
      uint64_t to = region.bytes();
      if (!all) {
        if (!region.contains(address)) continue;
        const auto line = reinterpret_cast<uintptr_t>(address) / kCacheLine * kCacheLine;
        const auto base = reinterpret_cast<uintptr_t>(region.base());
        from = line > base ? line - base : 0;
        to = std::min<uint64_t>(region.bytes(), line + kCacheLine - base);
      }
      Granule* granules = region.granules();
      for (uint64_t g = from / size; g * size < to; ++g) {
        if (granules[g].writer.core() == index) granules[g].dirty = false;
      }
    }
    if (all) {
      cached_lines.clear();
    } else {
      cached_lines.erase(reinterpret_cast<uintptr_t>(address) / kCacheLine);
    }
  }

  // --- vector unit
  // ----------------------------------------------------------------------------------------------------

  void count_vector(const char* op, uint64_t instructions, uint64_t repeats) {
    counters.vector_instructions += instructions;
    counters.vector_repeats += repeats;
    OpCount& count = ops[op];
    count.instructions += instructions;
    count.repeats += repeats;
  }

  std::string describe(const Place& place) const {
    const std::string bounds = "[" + std::to_string(place.begin) + ", " + std::to_string(place.end) + ")";
    return place.buffer < 0 ? bounds : std::to_string(place.buffer) + " " + bounds;
  }

  Launch& launch;
  GlobalMemory& memory;
  const int index;
  const int blocks;

  Clocks clocks;
  UnifiedBuffer ub;
  Knowledge known;  // by core, of the others' work

  // Buffers are never taken from the list while a tensor may name them.
  std::vector<Buffer> buffers;
  uint32_t ub_used = 0;
  uint32_t ub_peak = 0;
  void* pipe = nullptr;  // the TPipe that GetTPipePtr gives

  struct Flag {
    bool set = false;
    Clock clock{};
  };
  std::array<std::array<Flag, kEventIds>, kEventKinds> flags;
  std::array<uint8_t, kEventKinds> allocated_events{};  // bits

  Atomic atomic = Atomic::kNone;
  const char* atomic_type = nullptr;

  uint64_t vector_mask[2] = {~0ull, ~0ull};
  bool mask_counts = false;
  uint64_t compare_mask[2] = {0, 0};
  float dequant_scale = 1.0f;
  uint64_t reduced_value = 0;  // what GetReduceMaxMinCount and GetAccVal read, as bits
  uint64_t reduced_index = 0;
  std::array<uint16_t, 4> merged{};  // what GetMrgSortResult reads

  std::unordered_map<uint64_t, uint32_t> cached_lines;  // that the scalar unit read, and the last store before

  Counters counters;             // since the last synchronisation
  std::vector<Counters> phases;  // before it
  std::map<const char*, OpCount> ops;
  std::set<std::string> reported;

 private:
  void order_write(const char* op, Pipe pipe, uint32_t time, const Place& place, uint32_t address, uint32_t bytes) {
    const int writer = ub.unordered_write(address, bytes, pipe, clocks.of(pipe));
    if (writer >= 0) missing_wait(op, pipe, writer, "writes", "writes", place);
    const int reader = ub.unordered_read(address, bytes, pipe, clocks.of(pipe));
    if (reader >= 0) missing_wait(op, pipe, reader, "writes", "reads", place);
    ub.note_write(address, bytes, pipe, time);
  }

  // Reports it, and goes on as if the wait had been there, so that one mistake is one fault.
  void missing_wait(const char* op, Pipe pipe, int other, const char* now, const char* before, const Place& place) {
    fault(FaultKind::kMissingWait, op,
          std::string("pipe ") + pipe_name(pipe) + " " + now + " buffer " + describe(place) + " that " +
              pipe_name(other) + " " + before + "; no " + pipe_name(other) + "_" + pipe_name(pipe) +
              " wait lies between");
    clocks.wait(pipe, clocks.flag(static_cast<Pipe>(other)));
  }

  void check_order(const char* op, Pipe pipe, const Toucher& toucher, const char* now, const char* before,
                   const Region& region, uint64_t byte) {
    const int other = toucher.core();
    if (other == index) {
      if (pipe == toucher.pipe || pipe == kScalar || toucher.pipe == kScalar) return;
      if (toucher.time <= clocks.of(pipe)[toucher.pipe]) return;
      fault(FaultKind::kMissingWait, op,
            std::string("pipe ") + pipe_name(pipe) + " " + now + " byte " + std::to_string(byte) + " of " +
                region.name() + " that " + pipe_name(toucher.pipe) + " " + before + "; no " + pipe_name(toucher.pipe) +
                "_" + pipe_name(pipe) + " wait lies between");
      clocks.wait(pipe, clocks.flag(toucher.pipe));
    } else if (toucher.time > known[other][toucher.pipe]) {
      fault(FaultKind::kCoreRace, op,
            std::string(now) + " byte " + std::to_string(byte) + " of " + region.name() + " that core " +
                std::to_string(other) + " " + before + " with no synchronisation between");
    }
  }

  void report_dirty(const char* op, const Region& region, const Granule& granule) {
    fault(FaultKind::kDirtyCache, op,
          "touches bytes of " + region.name() + " that are still in the data cache of core " +
              std::to_string(granule.writer.core()) + "; DataCacheCleanAndInvalid is missing");
  }

  // A line that the scalar unit read before another pipe or core wrote it stays in its cache.
  void check_fresh(const char* op, const Region& region, const uint8_t* address, const Granule& granule) {
    const auto cached = cached_lines.find(reinterpret_cast<uintptr_t>(address) / kCacheLine);
    if (cached == cached_lines.end() || granule.serial <= cached->second) return;
    if (granule.writer.core() == index && granule.writer.pipe == kScalar) return;
    fault(FaultKind::kDirtyCache, op,
          "reads " + region.name() +
              " from the data cache, where it lay before it was written; DataCacheCleanAndInvalid is missing");
  }

  static void note_reader(Granule& granule, const Toucher& reader) {
    if (granule.readers[0].core_plus_one != reader.core_plus_one) granule.readers[1] = granule.readers[0];
    granule.readers[0] = reader;
  }
};

inline thread_local Core* running = nullptr;

inline Core& core() { return *running; }

inline void report_range(const std::string& message) {
  if (running) running->fault(FaultKind::kRepeatRange, "parameter", message);
}

}  // namespace ascendc_model
