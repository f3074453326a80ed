// Threads: a pool of the engine's own, pinned per memory node, and a team borrowed from the process's OpenMP.
//
// Work is a function that every thread of a team runs once, told who it is. The engine's own pool serves callers that
// must not block or allocate (a device stream's host callback) and machines with several memory nodes. Within a PyTorch
// process on one node the engine borrows PyTorch's own OpenMP threads instead: two pools on the same cores, each
// spinning for work, would halve both.

#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "cpu/topology.h"

namespace moe_fx::cpu {

// Who a thread is within a team. Groups are memory nodes.
struct Worker {
  int index = 0, count = 1;
  int group = 0, groups = 1;
  int index_in_group = 0, group_size = 1;
};

// Runs once on every thread of a team. Must not throw.
using Task = void (*)(void* context, const Worker& worker) noexcept;

// Meets all workers of one task, again and again. Spins, and yields when a partner is long in coming. What a worker
// wrote before it came is seen by every worker that leaves.
class Barrier {
 public:
  // Sets how many meet, at least one. Only while nobody waits.
  void reset(int count) noexcept;
  void wait() noexcept;

 private:
  // Those who wait watch the second line, so that those who still come do not fight them for the first.
  alignas(64) std::atomic<int> arrived_{0};
  int count_ = 1;
  alignas(64) std::atomic<std::uint32_t> generation_{0};
};

// Pinned threads, one per CPU of the topology's nodes, in the order of the nodes. A thread whose CPU this process may
// not run on is left unpinned.
//
// Order: each thread runs every task once, in the order of the tickets, so tasks whose workers meet at a Barrier cannot
// lock each other out. A thread goes on to the next task as soon as its own part is done: parts of two tasks on two
// threads run at the same time, and a task that needs another one's results waits for its ticket before it is
// submitted.
class Pool {
 public:
  // Throws std::system_error when the system gives no more threads.
  explicit Pool(const Topology& topology);
  ~Pool();  // finishes what was submitted, then joins the threads; nobody else may use the pool by then
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const noexcept;
  int groups() const noexcept;

  // Runs the task and returns when every thread has done its part. Not from within a task.
  void run(Task task, void* context) noexcept;

  // Queues the task behind those submitted before and returns a ticket at once: no allocation, no lock held while
  // anything runs, callable from any thread, also one that does not know Python, but not from within a task. `context`
  // must live until the ticket is done. Waits only while kMaxInFlight tasks are queued.
  std::uint64_t submit(Task task, void* context) noexcept;
  // Spins briefly, then sleeps, until the ticket is done; what the task wrote is seen then. Not from within a task.
  void wait(std::uint64_t ticket) noexcept;
  bool done(std::uint64_t ticket) const noexcept;

  static constexpr int kMaxInFlight = 64;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// The process's pool, made on first use from current_topology(), whose exceptions it passes on, and joined at exit;
// made anew in a forked child, where the parent's threads do not exist.
Pool& process_pool();

// Runs `task` on `threads` threads (fewer where the runtime gives fewer) of the OpenMP runtime that this process has
// loaded, the calling thread among them, as one group. False, having run nothing, where there is none, in a forked
// child, or inside another parallel region.
bool run_on_openmp(int threads, Task task, void* context) noexcept;
// Tells where the OpenMP runtime is: the path of a library that is loaded already, or empty for one whose symbols are
// global. True when it was found; otherwise what was told before stays.
bool use_openmp(const std::string& library);

}  // namespace moe_fx::cpu
