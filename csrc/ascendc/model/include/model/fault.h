// What a run can do wrong. Faults are values: they are collected in the report and the run goes on.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ascendc_model {

enum class FaultKind {
  kMissingWait,     // a pipe touches what another of V, MTE2, MTE3 touched, without being ordered after it
  kUnwrittenRead,   // bytes that nobody wrote, in the unified buffer or in global memory
  kOutOfBounds,     // outside the tensor's buffer or outside every registered global buffer
  kReadOnlyWrite,   // a store into a kernel input
  kCoreRace,        // two cores touch global memory, one of them writing, with no SyncAll between
  kDirtyCache,      // data of the scalar unit's cache that was not cleaned, or is stale
  kStaleBuffer,     // a tensor used after FreeTensor
  kDoubleAlloc,     // AllocTensor with every buffer of the queue in use
  kQueueMisuse,     // EnQue, DeQue or FreeTensor out of turn
  kUbOverflow,      // InitBuffer past 192 KiB, or more buffers than the queue table holds
  kUnaligned,       // an address or a size that is not a multiple of 32 bytes where it has to be
  kInt4Copy,        // a copy counted in int4b_t
  kRepeatRange,     // a repeat count over 255, or a parameter that its field cannot hold
  kMaskRange,       // a mask of no lane, or of more lanes than a repeat has
  kRoundMode,       // a Cast with a rounding mode its types do not have
  kOverlap,         // operands that overlap without being the same
  kEventRange,      // an event id outside 0..5, a cross-core flag outside 0..10, or more events than there are
  kUnbalancedFlag,  // SetFlag on a set flag, WaitFlag on an unset one, a flag left set at the end
  kAtomicType,      // a store under SetAtomicAdd of another type
  kAtomicLeftOn,    // atomic mode still set at the end of the kernel
  kSyncMismatch,    // a core waits for others that never come
  kTooManyCores,    // SyncAll with more blocks than the device has vector cores
  kBadArgument,     // anything else that an instruction does not take
};

struct Fault {
  FaultKind kind;
  int core;
  std::string message;
};

inline const char* name(FaultKind kind) {
  switch (kind) {
    case FaultKind::kMissingWait: return "missing wait";
    case FaultKind::kUnwrittenRead: return "unwritten read";
    case FaultKind::kOutOfBounds: return "out of bounds";
    case FaultKind::kReadOnlyWrite: return "read-only write";
    case FaultKind::kCoreRace: return "core race";
    case FaultKind::kDirtyCache: return "dirty cache";
    case FaultKind::kStaleBuffer: return "stale buffer";
    case FaultKind::kDoubleAlloc: return "double alloc";
    case FaultKind::kQueueMisuse: return "queue misuse";
    case FaultKind::kUbOverflow: return "unified buffer overflow";
    case FaultKind::kUnaligned: return "unaligned";
    case FaultKind::kInt4Copy: return "int4 copy";
    case FaultKind::kRepeatRange: return "repeat range";
    case FaultKind::kMaskRange: return "mask range";
    case FaultKind::kRoundMode: return "round mode";
    case FaultKind::kOverlap: return "overlap";
    case FaultKind::kEventRange: return "event range";
    case FaultKind::kUnbalancedFlag: return "unbalanced flag";
    case FaultKind::kAtomicType: return "atomic type";
    case FaultKind::kAtomicLeftOn: return "atomic left on";
    case FaultKind::kSyncMismatch: return "sync mismatch";
    case FaultKind::kTooManyCores: return "too many cores";
    case FaultKind::kBadArgument: return "bad argument";
  }
  return "?";
}

}  // namespace ascendc_model
