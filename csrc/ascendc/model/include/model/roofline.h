// An estimate of a launch's time on an NPU, from what the model counted. It is no measurement: every number that it
// stands on and that was not counted is an assumption, and is printed with it.

#pragma once

#include <algorithm>
#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "model/report.h"

namespace ascendc_model {

// What an NPU is taken to do. The defaults are public figures of the 910B family, on their cautious side, or guesses.
struct Npu {
  std::string name = "910B1/B2";
  double memory_bytes_per_s = 1.6e12;  // HBM
  double memory_efficiency = 0.8;      // of that, for long reads by all cores
  double clock_hz = 1.8e9;
  double core_bytes_per_cycle = 64;    // that a core's MTE2 or MTE3 moves at best
  double cycles_per_repeat = 1;        // of 256 bytes, in the middle of an instruction
  double cycles_per_instruction = 16;  // until an instruction's first repeat is done
  double cycles_per_burst = 8;         // of a copy, beyond its bytes
  double cycles_per_scalar_access = 20;
  double sync_us = 3;    // a SyncAll, once the last core arrives
  double launch_us = 5;  // from the queue to the first instruction, and back
};

struct PhaseEstimate {
  double memory_us;  // by bandwidth of all cores, or of the busiest core's copies
  double vector_us;  // of the busiest core
  double scalar_us;  // of the busiest core

  // Copies run behind the vector unit when buffers are doubled; what the scalar unit reads is waited for.
  double us() const { return std::max(memory_us, vector_us) + scalar_us; }
};

struct Estimate {
  Npu npu;
  std::vector<PhaseEstimate> phases;
  double fixed_us;
  double us;
  uint64_t bytes;
};

inline Estimate estimate(const Report& report, const Npu& npu = {}) {
  Estimate result{npu, {}, npu.launch_us + npu.sync_us * static_cast<double>(report.syncs()), 0, 0};
  result.us = result.fixed_us;
  const double cycle_us = 1e6 / npu.clock_hz;
  for (const Phase& phase : report.phases) {
    const auto bytes = static_cast<double>(phase.total.mte2_bytes + phase.total.mte3_bytes);
    const auto copy_cycles = [&](uint64_t moved, uint64_t bursts) {
      return static_cast<double>(moved) / npu.core_bytes_per_cycle + npu.cycles_per_burst * static_cast<double>(bursts);
    };
    const double busiest = std::max(copy_cycles(phase.most.mte2_bytes, phase.most.mte2_bursts),
                                    copy_cycles(phase.most.mte3_bytes, phase.most.mte3_bursts));
    PhaseEstimate of_phase;
    of_phase.memory_us = std::max(bytes / (npu.memory_bytes_per_s * npu.memory_efficiency) * 1e6, busiest * cycle_us);
    of_phase.vector_us = (npu.cycles_per_repeat * static_cast<double>(phase.most.vector_repeats) +
                          npu.cycles_per_instruction * static_cast<double>(phase.most.vector_instructions)) *
                         cycle_us;
    of_phase.scalar_us = npu.cycles_per_scalar_access * static_cast<double>(phase.most.scalar_accesses) * cycle_us;
    result.us += of_phase.us();
    result.bytes += phase.total.mte2_bytes + phase.total.mte3_bytes;
    result.phases.push_back(of_phase);
  }
  return result;
}

inline std::ostream& operator<<(std::ostream& out, const Estimate& estimate) {
  const Npu& npu = estimate.npu;
  out << "ESTIMATE for " << npu.name << ", not a measurement: " << estimate.us << " us, of which " << estimate.fixed_us
      << " us fixed; " << estimate.bytes << " bytes\n";
  for (const PhaseEstimate& phase : estimate.phases) {
    out << "  phase: memory " << phase.memory_us << " us, vector " << phase.vector_us << " us, scalar "
        << phase.scalar_us << " us\n";
  }
  return out << "  assumes: memory " << npu.memory_bytes_per_s / 1e12 << " TB/s at " << npu.memory_efficiency * 100
             << " %, no reuse in L2; " << npu.clock_hz / 1e9 << " GHz; a core copies " << npu.core_bytes_per_cycle
             << " bytes a cycle and " << npu.cycles_per_burst << " cycles a burst;\n  " << npu.cycles_per_repeat
             << " cycles a repeat, " << npu.cycles_per_instruction << " an instruction, "
             << npu.cycles_per_scalar_access << " a scalar access; copies and vector work overlap in a phase; "
             << npu.sync_us << " us a SyncAll, " << npu.launch_us << " us a launch\n";
}

}  // namespace ascendc_model
