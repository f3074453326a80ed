// Order between pipes and between cores: flags, barriers, SyncAll, cross-core flags, and which core this is.

#pragma once

#include <cstdint>
#include <string>

#include "model/launch.h"
#include "model/tensor.h"

namespace ascendc_model {

struct EventPipes {
  Pipe source;
  Pipe target;
};

constexpr EventPipes pipes_of(AscendC::HardEvent event) {
  using AscendC::HardEvent;
  switch (event) {
    case HardEvent::MTE2_V: return {kMte2, kV};
    case HardEvent::V_MTE2: return {kV, kMte2};
    case HardEvent::MTE3_V: return {kMte3, kV};
    case HardEvent::V_MTE3: return {kV, kMte3};
    case HardEvent::MTE2_MTE3: return {kMte2, kMte3};
    case HardEvent::MTE3_MTE2: return {kMte3, kMte2};
    case HardEvent::S_V: return {kScalar, kV};
    case HardEvent::V_S: return {kV, kScalar};
    case HardEvent::S_MTE2: return {kScalar, kMte2};
    case HardEvent::MTE2_S: return {kMte2, kScalar};
    case HardEvent::S_MTE3: return {kScalar, kMte3};
    case HardEvent::MTE3_S: return {kMte3, kScalar};
    default: return {kV, kV};
  }
}

inline std::string event_name(AscendC::HardEvent event) {
  const EventPipes pipes = pipes_of(event);
  return std::string(pipe_name(pipes.source)) + "_" + pipe_name(pipes.target);
}

constexpr Pipe pipe_of(pipe_t pipe) {
  switch (pipe) {
    case PIPE_V: return kV;
    case PIPE_MTE2: return kMte2;
    case PIPE_MTE3: return kMte3;
    default: return kScalar;
  }
}

// The same flags serve queues, which may take any of the ids that exist, and kernels, which may name the first six.
inline void set_flag(AscendC::HardEvent event, int id, int ids, const char* op) {
  Core& running_core = core();
  if (id < 0 || id >= ids) {
    running_core.fault(FaultKind::kEventRange, op,
                       "event id " + std::to_string(id) + " is not in 0.." + std::to_string(ids - 1));
    return;
  }
  Core::Flag& flag = running_core.flags[static_cast<int>(event)][id];
  if (flag.set) {
    running_core.fault(FaultKind::kUnbalancedFlag, op,
                       event_name(event) + " " + std::to_string(id) + " is set again before anyone waited for it");
  }
  flag.set = true;
  flag.clock = running_core.clocks.flag(pipes_of(event).source);
}

inline void wait_flag(AscendC::HardEvent event, int id, int ids, const char* op) {
  Core& running_core = core();
  if (id < 0 || id >= ids) {
    running_core.fault(FaultKind::kEventRange, op,
                       "event id " + std::to_string(id) + " is not in 0.." + std::to_string(ids - 1));
    return;
  }
  Core::Flag& flag = running_core.flags[static_cast<int>(event)][id];
  if (!flag.set) {
    running_core.fault(FaultKind::kUnbalancedFlag, op,
                       "waits for " + event_name(event) + " " + std::to_string(id) + ", which nobody set");
    return;
  }
  flag.set = false;
  running_core.clocks.wait(pipes_of(event).target, flag.clock);
}

// A free id of an event, or -1.
inline int free_event(AscendC::HardEvent event) {
  const uint8_t taken = core().allocated_events[static_cast<int>(event)];
  for (int id = 0; id < kEventIds; ++id) {
    if (!(taken >> id & 1)) return id;
  }
  return -1;
}

inline int allocate_event(AscendC::HardEvent event, const char* op) {
  const int id = free_event(event);
  if (id < 0) {
    core().fault(FaultKind::kEventRange, op,
                 "all " + std::to_string(kEventIds) + " events of " + event_name(event) + " are in use");
    return 0;
  }
  core().allocated_events[static_cast<int>(event)] |= static_cast<uint8_t>(1 << id);
  return id;
}

inline void release_event(AscendC::HardEvent event, int id) {
  core().allocated_events[static_cast<int>(event)] &= static_cast<uint8_t>(~(1 << id));
}

// Cross-core flags 0..10 are the kernel's, the rest of the sixteen CANN's own. Here SyncAll has one for each number of
// cores.
inline constexpr int kUserCoreFlags = 11;
inline constexpr int kSyncAllFlag = 1000;

inline bool check_core_flag(const char* op, int flag) {
  if (flag < kUserCoreFlags) return true;
  core().fault(FaultKind::kEventRange, op,
               "cross-core flag " + std::to_string(flag) + " is not in 0.." + std::to_string(kUserCoreFlags - 1));
  return false;
}

inline void sync_cores(int cores, const char* op) {
  Core& running_core = core();
  running_core.clocks.barrier();
  const int flag = kSyncAllFlag + cores;
  running_core.launch.arrive(running_core, flag, running_core.clocks.of(kScalar));
  running_core.launch.wait(running_core, flag, cores, op);
}

}  // namespace ascendc_model

namespace AscendC {

__aicore__ inline int64_t GetBlockIdx() { return ascendc_model::core().index; }
__aicore__ inline int64_t GetBlockNum() { return ascendc_model::core().blocks; }
__aicore__ inline int64_t GetSubBlockIdx() { return 0; }
__aicore__ inline int64_t GetTaskRatio() { return 1; }

template <HardEvent event>
__aicore__ inline void SetFlag(int32_t eventID) {
  ascendc_model::set_flag(event, eventID, ascendc_model::kUserEvents, "SetFlag");
}

template <HardEvent event>
__aicore__ inline void WaitFlag(int32_t eventID) {
  ascendc_model::wait_flag(event, eventID, ascendc_model::kUserEvents, "WaitFlag");
}

// A barrier of one pipe orders what the model takes to be in order anyway.
template <pipe_t pipe>
__aicore__ inline void PipeBarrier() {
  if constexpr (pipe == PIPE_ALL) ascendc_model::core().clocks.barrier();
}

template <MemDsbT arg0>
__aicore__ inline void DataSyncBarrier() {}

template <bool isAIVOnly = true>
__aicore__ inline void SyncAll() {
  ascendc_model::sync_cores(ascendc_model::core().blocks, "SyncAll");
}

// The soft form counts arrivals in global memory, which has to be zero before the kernel, and needs 32 bytes there and
// in the unified buffer for each core.
template <bool isAIVOnly = true>
__aicore__ inline void SyncAll(const GlobalTensor<int32_t>& gmWorkspace, const LocalTensor<int32_t>& ubWorkspace,
                               const int32_t usedCores = 0) {
  using namespace ascendc_model;
  Core& running_core = core();
  const int cores = usedCores ? usedCores : running_core.blocks;
  const uint64_t bytes = uint64_t{32} * static_cast<uint64_t>(cores);
  const Place& place = ubWorkspace.place();
  if (running_core.valid("SyncAll", place, place.address, bytes)) {
    const uint32_t time = running_core.clocks.issue(kV);
    running_core.clocks.barrier();
    running_core.write_ub("SyncAll", kV, time, place, place.address, static_cast<uint32_t>(bytes));
  }
  Region* region = running_core.region("SyncAll", gmWorkspace.base(), bytes);
  if (region && region->access() != Access::kInOut) {
    running_core.fault(FaultKind::kUnwrittenRead, "SyncAll", "its workspace " + region->name() + " has to be zeroed");
  } else if (region && running_core.phases.empty()) {
    for (uint64_t i = 0; i < bytes; ++i) {
      if (gmWorkspace.base()[i] != 0) {
        running_core.fault(FaultKind::kBadArgument, "SyncAll", "its workspace " + region->name() + " is not zero");
        break;
      }
    }
  }
  sync_cores(cores, "SyncAll");
}

// Mode 0, which is all vector cores among themselves. What the pipe did before the flag is over once a wait returns.
template <uint8_t modeId, pipe_t pipe>
__aicore__ inline void CrossCoreSetFlag(uint16_t flagId) {
  static_assert(modeId == 0, "cores of this project meet in mode 0");
  static_assert(pipe == PIPE_V || pipe == PIPE_MTE2 || pipe == PIPE_MTE3, "a pipe of the vector core sets the flag");
  using namespace ascendc_model;
  if (!check_core_flag("CrossCoreSetFlag", flagId)) return;
  core().launch.arrive(core(), flagId, core().clocks.flag(pipe_of(pipe)));
}

template <uint8_t modeId = 0, pipe_t pipe = PIPE_S>
__aicore__ inline void CrossCoreWaitFlag(uint16_t flagId) {
  static_assert(modeId == 0, "cores of this project meet in mode 0");
  using namespace ascendc_model;
  if (!check_core_flag("CrossCoreWaitFlag", flagId)) return;
  core().launch.wait(core(), flagId, core().blocks, "CrossCoreWaitFlag");
}

template <pipe_t src, pipe_t dst>
class TQueSync {
 public:
  __aicore__ inline void SetFlag(TEventID id) { AscendC::SetFlag<kEvent>(id); }
  __aicore__ inline void WaitFlag(TEventID id) { AscendC::WaitFlag<kEvent>(id); }

 private:
  static constexpr HardEvent find() {
    for (int event = 0; event < static_cast<int>(HardEvent::MAX); ++event) {
      const auto pipes = ascendc_model::pipes_of(static_cast<HardEvent>(event));
      if (pipes.source == ascendc_model::pipe_of(src) && pipes.target == ascendc_model::pipe_of(dst)) {
        return static_cast<HardEvent>(event);
      }
    }
    return HardEvent::MAX;
  }
  static constexpr HardEvent kEvent = find();
  static_assert(kEvent != HardEvent::MAX, "no event orders these pipes");
};

template <typename T, CacheLine entireType, DcciDst dcciDst>
__aicore__ inline void DataCacheCleanAndInvalid(const GlobalTensor<T>& dst) {
  ascendc_model::core().clean_cache(dst.base(), entireType == CacheLine::ENTIRE_DATA_CACHE);
}

template <typename T, CacheLine entireType>
__aicore__ inline void DataCacheCleanAndInvalid(const GlobalTensor<T>& dst) {
  ascendc_model::core().clean_cache(dst.base(), entireType == CacheLine::ENTIRE_DATA_CACHE);
}

}  // namespace AscendC
