// The host's side of the model: a device with global memory, and launches of a kernel on its emulated vector cores.
//
//   Device device{48};
//   auto x = device.input("x", values);            // read-only; x.gm() is what the kernel is given
//   auto y = device.output<float>("y", count);     // unwritten until the kernel writes it
//   const Report report = device.launch(48, [&] { Kernel kernel; kernel.Init(x.gm(), y.gm()); kernel.Process(); });
//   CHECK_MESSAGE(report.faults.empty(), report);
//
// Cores are fibers of the calling thread: each runs until it ends or waits for the others, in the order of their
// indices. That is deterministic, and races are found whichever core comes first, because they are judged by what is
// ordered.

#pragma once

#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "model/core.h"

namespace ascendc_model {

// Typed memory of a device that a test fills and reads.
template <typename T>
class GlobalBuffer {
 public:
  explicit GlobalBuffer(Region& region) : region_(&region) {}

  uint8_t* gm() const { return region_->base(); }
  T* data() const { return reinterpret_cast<T*>(region_->base()); }
  std::size_t size() const { return region_->bytes() / sizeof(T); }
  T& operator[](std::size_t index) const { return data()[index]; }
  std::span<T> span() const { return {data(), size()}; }

 private:
  Region* region_;
};

// One execution of a kernel by all blocks. Cores reach it for faults and to wait for each other.
class Launch {
 public:
  Launch(GlobalMemory& memory, int vector_cores, int blocks, const std::function<void()>& kernel)
      : memory_(memory), vector_cores_(vector_cores), kernel_(kernel) {
    if (blocks < 1 || blocks > kMaxCores)
      throw std::invalid_argument("blocks have to be 1.." + std::to_string(kMaxCores));
    for (int index = 0; index < blocks; ++index) {
      fibers_.push_back(std::make_unique<Fiber>(*this, memory, index, blocks));
    }
  }

  Report run() {
    for (Region& region : memory_.regions()) {
      region.traffic = {};
    }
    const GuardHandler handler;
    Launch* outer_launch = std::exchange(running_launch, this);
    Core* outer_core = running;
    for (;;) {
      bool progress = false;
      bool waiting = false;
      for (auto& fiber : fibers_) {
        if (fiber->done || !(fiber->ready() || abandoned_)) {
          waiting |= !fiber->done;
          continue;
        }
        resume(*fiber);
        progress = true;
      }
      if (!progress && !waiting) break;
      if (!progress) {
        for (auto& fiber : fibers_) {
          if (!fiber->done) {
            fiber->core.fault(FaultKind::kSyncMismatch, fiber->waits_in, "waits for cores that never come here");
          }
        }
        abandoned_ = true;
      }
    }
    running = outer_core;
    running_launch = outer_launch;
    for (const auto& fiber : fibers_) {
      if (fiber->error) std::rethrow_exception(fiber->error);
    }
    return finish();
  }

  // --- for cores
  // ------------------------------------------------------------------------------------------------------

  void add_fault(FaultKind kind, Core& core, const std::string& op, const std::string& detail) {
    ++report_.fault_count;
    if (!core.reported.insert(std::string(name(kind)) + op).second) return;
    if (report_.faults.size() < Report::kMostFaults) report_.faults.push_back({kind, core.index, op + ": " + detail});
  }

  // Says that what this clock covers of the core's work is over, to whoever waits for this flag.
  void arrive(Core& core, int flag, const Clock& clock) {
    auto& arrivals = arrivals_[flag];
    arrivals.resize(fibers_.size());
    arrivals[core.index].push_back(clock);
  }

  // Waits until the first `cores` cores have arrived at a flag as often as this one has waited for it.
  void wait(Core& core, int flag, int cores, const char* op) {
    if (cores > vector_cores_) {
      core.fault(
          FaultKind::kTooManyCores, op,
          std::to_string(cores) + " blocks wait for each other on " + std::to_string(vector_cores_) + " vector cores");
    }
    Fiber& fiber = *fibers_[core.index];
    const std::size_t round = fiber.rounds[flag]++;
    arrivals_[flag].resize(fibers_.size());
    fiber.ready = [this, flag, cores, round] {
      for (int other = 0; other < cores; ++other) {
        if (arrivals_[flag][other].size() <= round) return false;
      }
      return true;
    };
    fiber.waits_in = op;
    if (!fiber.ready() && !abandoned_) swapcontext(&fiber.context, &scheduler_);
    for (int other = 0; other < cores; ++other) {
      if (arrivals_[flag][other].size() > round) join(core.known[other], arrivals_[flag][other][round]);
    }
    // The scalar unit waits, so what the core itself did before it arrived is over for all that it issues from here on.
    const auto& own = arrivals_[flag][core.index];
    if (own.size() > round) core.clocks.wait(kScalar, own[round]);
    fiber.ready = [] { return true; };
    core.phases.push_back(core.counters);
    core.counters = {};
  }

 private:
  struct Fiber {
    Fiber(Launch& launch, GlobalMemory& memory, int index, int blocks)
        : core(launch, memory, index, blocks), stack(kStackBytes) {}

    static constexpr std::size_t kStackBytes = 1024 * 1024;

    Core core;
    GuardedPages stack;
    ucontext_t context{};
    sigjmp_buf escape;
    bool started = false;
    bool done = false;
    std::exception_ptr error;  // what the kernel threw, as a test that fails in it does
    std::function<bool()> ready = [] { return true; };
    const char* waits_in = "";
    std::map<int, std::size_t> rounds;  // waits so far, by flag
  };

  void resume(Fiber& fiber) {
    running = &fiber.core;
    current_ = &fiber;
    if (!fiber.started) {
      fiber.started = true;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = Fiber::kStackBytes;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Launch::enter, 0);
    }
    swapcontext(&scheduler_, &fiber.context);
    running = nullptr;
  }

  static void enter() {
    Launch& launch = *running_launch;
    Fiber& fiber = *launch.current_;
    if (sigsetjmp(fiber.escape, 1) == 0) {
      try {
        launch.kernel_();
      } catch (...) {
        fiber.error = std::current_exception();
      }
    }
    fiber.done = true;
    launch.close(fiber.core);
  }

  // What has to hold when a kernel ends.
  void close(Core& core) {
    for (int kind = 0; kind < kEventKinds; ++kind) {
      for (int id = 0; id < kEventIds; ++id) {
        if (core.flags[kind][id].set) {
          core.fault(FaultKind::kUnbalancedFlag, "end of kernel",
                     "event " + std::to_string(id) + " of kind " + std::to_string(kind) + " is still set");
        }
      }
    }
    if (core.atomic != Atomic::kNone) {
      core.fault(FaultKind::kAtomicLeftOn, "end of kernel", "SetAtomicNone is missing");
    }
  }

  Report finish() {
    report_.blocks = static_cast<uint32_t>(fibers_.size());
    for (auto& fiber : fibers_) {
      Core& core = fiber->core;
      core.phases.push_back(core.counters);
      if (report_.phases.size() < core.phases.size()) report_.phases.resize(core.phases.size());
      for (std::size_t i = 0; i < core.phases.size(); ++i) {
        report_.phases[i].add(core.phases[i]);
        report_.total += core.phases[i];
      }
      for (const auto& [op, count] : core.ops) {
        report_.ops[op].instructions += count.instructions;
        report_.ops[op].repeats += count.repeats;
      }
      report_.peak_ub = std::max(report_.peak_ub, core.ub_peak);
    }
    for (Region& region : memory_.regions()) {
      region.settle();
      if (region.traffic.read || region.traffic.written) {
        report_.traffic[region.name()].read += region.traffic.read;
        report_.traffic[region.name()].written += region.traffic.written;
      }
    }
    return std::move(report_);
  }

  // A raw pointer into the pages around a buffer ends the core that followed it, and is a fault like others. Launches
  // of several threads share the handler.
  class GuardHandler {
   public:
    GuardHandler() {
      const std::lock_guard lock(mutex_);
      if (users_++) return;
      struct sigaction action{};
      action.sa_sigaction = &Launch::on_segfault;
      action.sa_flags = SA_SIGINFO | SA_NODEFER;
      sigemptyset(&action.sa_mask);
      sigaction(SIGSEGV, &action, &previous_);
    }
    ~GuardHandler() {
      const std::lock_guard lock(mutex_);
      if (--users_ == 0) sigaction(SIGSEGV, &previous_, nullptr);
    }
    GuardHandler(const GuardHandler&) = delete;
    GuardHandler& operator=(const GuardHandler&) = delete;

   private:
    static inline std::mutex mutex_;
    static inline int users_ = 0;
    static inline struct sigaction previous_{};
  };

  static void on_segfault(int, siginfo_t* info, void*) {
    if (running && running_launch) {
      if (const Region* region = running->memory.guard_of(info->si_addr)) {
        running->fault(FaultKind::kOutOfBounds, "raw pointer", "touches the pages around " + region->name());
        siglongjmp(running_launch->current_->escape, 1);
      }
    }
    signal(SIGSEGV, SIG_DFL);  // a fault of the program's own: it happens again, and ends it
  }

  static inline thread_local Launch* running_launch = nullptr;

  GlobalMemory& memory_;
  const int vector_cores_;
  const std::function<void()>& kernel_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  ucontext_t scheduler_{};
  Fiber* current_ = nullptr;
  std::map<int, std::vector<std::vector<Clock>>> arrivals_;  // by flag and core
  bool abandoned_ = false;
  Report report_;
};

inline void Core::fault(FaultKind kind, const std::string& op, const std::string& detail) {
  launch.add_fault(kind, *this, op, detail);
}

class Device {
 public:
  explicit Device(int vector_cores = 48) : vector_cores_(vector_cores) {}

  template <typename T>
  GlobalBuffer<T> input(std::string name, const std::vector<T>& values) {
    return filled(std::move(name), values, Access::kInput);
  }
  template <typename T>
  GlobalBuffer<T> inout(std::string name, const std::vector<T>& values) {
    return filled(std::move(name), values, Access::kInOut);
  }
  template <typename T>
  GlobalBuffer<T> output(std::string name, std::size_t count) {
    Region& region = memory_.allocate(std::move(name), count * sizeof(T), Access::kOutput);
    std::memset(region.base(), 0xff, region.bytes());
    return GlobalBuffer<T>(region);
  }
  // Memory of the caller's, without guard pages. It has to outlive the launches.
  void attach(std::string name, const void* base, uint64_t bytes, Access access) {
    memory_.attach(std::move(name), const_cast<void*>(base), bytes, access);
  }

  // Runs the kernel once for each block. GetBlockIdx and GetBlockNum tell it which it is.
  Report launch(int blocks, const std::function<void()>& kernel) {
    return Launch(memory_, vector_cores_, blocks, kernel).run();
  }

  int vector_cores() const { return vector_cores_; }

 private:
  template <typename T>
  GlobalBuffer<T> filled(std::string name, const std::vector<T>& values, Access access) {
    Region& region = memory_.allocate(std::move(name), values.size() * sizeof(T), access);
    if (!values.empty()) std::memcpy(region.base(), values.data(), region.bytes());
    return GlobalBuffer<T>(region);
  }

  int vector_cores_;
  GlobalMemory memory_;
};

}  // namespace ascendc_model
