// What a launch did: its faults, and the counts that an estimate of its time is made of.

#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <ostream>
#include <string>
#include <vector>

#include "model/fault.h"

namespace ascendc_model {

// The work of one core between two synchronisations, or of all of them.
struct Counters {
  uint64_t mte2_bytes = 0;  // global memory -> unified buffer
  uint64_t mte2_bursts = 0;
  uint64_t mte3_bytes = 0;  // unified buffer -> global memory
  uint64_t mte3_bursts = 0;
  uint64_t vector_instructions = 0;
  uint64_t vector_repeats = 0;  // of 256 bytes of the widest operand
  uint64_t scalar_accesses = 0;

  Counters& operator+=(const Counters& other) {
    mte2_bytes += other.mte2_bytes;
    mte2_bursts += other.mte2_bursts;
    mte3_bytes += other.mte3_bytes;
    mte3_bursts += other.mte3_bursts;
    vector_instructions += other.vector_instructions;
    vector_repeats += other.vector_repeats;
    scalar_accesses += other.scalar_accesses;
    return *this;
  }
};

// A stretch between two SyncAlls: what all cores did together, and the most that any core did of each thing.
struct Phase {
  Counters total;
  Counters most;

  void add(const Counters& core) {
    total += core;
    most.mte2_bytes = std::max(most.mte2_bytes, core.mte2_bytes);
    most.mte2_bursts = std::max(most.mte2_bursts, core.mte2_bursts);
    most.mte3_bytes = std::max(most.mte3_bytes, core.mte3_bytes);
    most.mte3_bursts = std::max(most.mte3_bursts, core.mte3_bursts);
    most.vector_instructions = std::max(most.vector_instructions, core.vector_instructions);
    most.vector_repeats = std::max(most.vector_repeats, core.vector_repeats);
    most.scalar_accesses = std::max(most.scalar_accesses, core.scalar_accesses);
  }
};

struct OpCount {
  uint64_t instructions = 0;
  uint64_t repeats = 0;
};

struct Traffic {
  uint64_t read = 0;     // bytes, by MTE2 and the scalar unit
  uint64_t written = 0;  // bytes, by MTE3 and the scalar unit
};

struct Report {
  std::vector<Fault> faults;  // the first kMostFaults, each kind of mistake of a core once
  uint64_t fault_count = 0;   // all of them
  Counters total;
  std::vector<Phase> phases;
  std::map<std::string, OpCount> ops;      // vector instructions by name
  std::map<std::string, Traffic> traffic;  // global memory by buffer name
  uint32_t peak_ub = 0;                    // bytes, of the core that used most
  uint32_t blocks = 0;

  static constexpr std::size_t kMostFaults = 64;

  // SyncAlls (or matched cross-core waits) that a core went through.
  std::size_t syncs() const { return phases.empty() ? 0 : phases.size() - 1; }

  std::size_t count(FaultKind kind) const {
    return std::count_if(faults.begin(), faults.end(), [kind](const Fault& fault) { return fault.kind == kind; });
  }

  // Whether there are faults, and all of this kind.
  bool only(FaultKind kind) const { return !faults.empty() && count(kind) == faults.size(); }
};

inline std::ostream& operator<<(std::ostream& out, const Fault& fault) {
  return out << name(fault.kind) << " (core " << fault.core << "): " << fault.message;
}

inline std::ostream& operator<<(std::ostream& out, const Report& report) {
  for (const Fault& fault : report.faults) {
    out << fault << '\n';
  }
  if (report.fault_count > report.faults.size()) out << report.fault_count << " faults in all\n";
  out << report.blocks << " blocks, " << report.syncs() << " syncs, peak UB " << report.peak_ub << " bytes\n"
      << "MTE2 " << report.total.mte2_bytes << " bytes in " << report.total.mte2_bursts << " bursts, MTE3 "
      << report.total.mte3_bytes << " bytes in " << report.total.mte3_bursts << " bursts\n"
      << "vector " << report.total.vector_instructions << " instructions, " << report.total.vector_repeats
      << " repeats\n";
  for (const auto& [op, count] : report.ops) {
    out << "  " << op << ": " << count.instructions << " instructions, " << count.repeats << " repeats\n";
  }
  for (const auto& [buffer, bytes] : report.traffic) {
    out << "  " << buffer << ": " << bytes.read << " bytes read, " << bytes.written << " written\n";
  }
  return out;
}

}  // namespace ascendc_model
