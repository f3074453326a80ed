// The engine's pool of pinned threads, the process's one instance of it, and the way into OpenMP; see pool.h.

#include "cpu/pool.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu/cpu_info.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moe_fx::cpu {

namespace {

constexpr std::size_t kCacheLine = 64;

// Tells the processor that this is a spin loop. On AArch64 `yield` does nothing on most cores; `isb` takes the tens of
// cycles that are meant.
void relax() noexcept {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb" ::: "memory");
#endif
}

// How to wait before sleeping: for how long, and whether the CPU is offered to others meanwhile.
struct Spin {
  std::chrono::microseconds time{0};
  bool yields = false;
};

template <typename Ready>
bool spin_until(const Ready& ready, const Spin& spin) noexcept {
  if (ready()) return true;
  if (spin.time.count() == 0) return false;
  // Reading the clock costs about as much as a few pauses, so it is read now and then.
  constexpr int kPausesPerReading = 32;
  const auto deadline = std::chrono::steady_clock::now() + spin.time;
  do {
    for (int i = 0; i < kPausesPerReading; ++i) {
      if (ready()) return true;
      relax();
    }
    if (spin.yields) sched_yield();
  } while (std::chrono::steady_clock::now() < deadline);
  return ready();
}

// Lets threads sleep until a condition holds that others bring about and then signal. A signal costs one load while
// nobody sleeps. Conditions must be read, and brought about, with sequentially consistent operations: either the
// sleeper sees the condition or the signaller sees the sleeper.
class Event {
 public:
  template <typename Ready>
  void wait(const Ready& ready, const Spin& spin) noexcept {
    if (spin_until(ready, spin)) return;
    sleepers_.fetch_add(1);
    while (true) {
      const std::uint32_t seen = signals_.load();
      if (ready()) break;
      signals_.wait(seen);
    }
    sleepers_.fetch_sub(1);
  }

  void signal() noexcept {
    if (sleepers_.load() == 0) return;
    signals_.fetch_add(1);
    signals_.notify_all();
  }

 private:
  // 32 bits: what a futex waits on directly.
  alignas(kCacheLine) std::atomic<std::uint32_t> signals_{0};
  std::atomic<int> sleepers_{0};
};

// One place of the ring of tasks. What the submitter writes, what the workers count down, and what waiters watch lie on
// lines of their own.
struct Slot {
  alignas(kCacheLine) std::atomic<std::uint64_t> published{0};  // the ticket whose task this is
  Task task = nullptr;                                          // null: the worker's last
  void* context = nullptr;
  alignas(kCacheLine) std::atomic<int> remaining{0};           // workers that have not done their part
  alignas(kCacheLine) std::atomic<std::uint64_t> finished{0};  // the last ticket that all workers have done
};

// Leaves the thread where it is when the system refuses, as it does for a CPU outside the process's allowed ones.
void pin(std::thread& thread, int cpu) {
#if defined(__linux__)
  const std::size_t count = static_cast<std::size_t>(cpu) + 1;
  cpu_set_t* const set = CPU_ALLOC(count);
  if (set == nullptr) return;
  const std::size_t bytes = CPU_ALLOC_SIZE(count);
  CPU_ZERO_S(bytes, set);
  CPU_SET_S(static_cast<std::size_t>(cpu), bytes, set);
  pthread_setaffinity_np(thread.native_handle(), bytes, set);
  CPU_FREE(set);
#else
  static_cast<void>(thread);
  static_cast<void>(cpu);
#endif
}

// Blocks all signals on the calling thread, and thus on threads that it makes, while it lives: an application's signals
// go to its own threads.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

}  // namespace

void Barrier::reset(int count) noexcept {
  count_ = count;
  arrived_.store(0, std::memory_order_relaxed);
}

void Barrier::wait() noexcept {
  // The generation cannot change between these two lines: it takes this thread's arrival.
  const std::uint32_t generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  constexpr int kSpins = 2000;
  for (int spins = 0; generation_.load(std::memory_order_acquire) == generation;) {
    if (spins < kSpins) {
      ++spins;
      relax();
    } else {
      sched_yield();
    }
  }
}

struct Pool::State {
  std::array<Slot, kMaxInFlight> slots;
  alignas(kCacheLine) std::atomic<std::uint64_t> tickets{0};  // the last one given out
  Event published;
  Event finished;
  Spin worker_spin;
  Spin waiter_spin;
  int groups = 0;
  int size = 0;
  std::vector<std::thread> threads;

  Slot& slot_of(std::uint64_t ticket) { return slots[ticket % kMaxInFlight]; }

  std::uint64_t submit(Task task, void* context) noexcept {
    const std::uint64_t ticket = tickets.fetch_add(1) + 1;
    Slot& slot = slot_of(ticket);
    const std::uint64_t previous = ticket > kMaxInFlight ? ticket - kMaxInFlight : 0;
    finished.wait([&] { return slot.finished.load() == previous; }, waiter_spin);
    slot.task = task;
    slot.context = context;
    slot.remaining.store(size, std::memory_order_relaxed);
    slot.published.store(ticket);
    published.signal();
    return ticket;
  }

  void work(const Worker& worker) noexcept {
    for (std::uint64_t ticket = 1;; ++ticket) {
      Slot& slot = slot_of(ticket);
      published.wait([&] { return slot.published.load() == ticket; }, worker_spin);
      const bool last = slot.task == nullptr;
      if (!last) slot.task(slot.context, worker);
      if (slot.remaining.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        slot.finished.store(ticket);
        finished.signal();
      }
      if (last) return;
    }
  }

  void start(const Topology& topology) {
    const SignalsBlocked blocked;
    Worker worker;
    worker.count = size;
    worker.groups = groups;
    for (const TopologyNode& node : topology.nodes) {
      worker.group_size = static_cast<int>(node.cpus.size());
      worker.index_in_group = 0;
      for (const int cpu : node.cpus) {
        // Pinned from here, so that a worker allocates nothing, ever: another thread may fork at any time.
        pin(threads.emplace_back([this, worker] { work(worker); }), cpu);
        ++worker.index;
        ++worker.index_in_group;
      }
      ++worker.group;
    }
  }

  void stop() noexcept {
    submit(nullptr, nullptr);
    for (std::thread& thread : threads) {
      thread.join();
    }
  }
};

Pool::Pool(const Topology& topology) : state_(std::make_unique<State>()) {
  state_->groups = static_cast<int>(topology.nodes.size());
  for (const TopologyNode& node : topology.nodes) {
    state_->size += static_cast<int>(node.cpus.size());
  }
  // A pool on every CPU of the process shares one of them with whoever submits and waits. Spinning there takes the
  // partner's CPU for as long as the system lets it: the waiter sleeps at once, and idle workers give way as they spin.
  using std::chrono::microseconds;
  const bool takes_every_cpu = state_->size >= static_cast<int>(read_cpu_info().allowed_cpus.size());
  state_->worker_spin = takes_every_cpu ? Spin{microseconds(20), true} : Spin{microseconds(50), false};
  state_->waiter_spin = takes_every_cpu ? Spin{} : Spin{microseconds(50), false};

  state_->threads.reserve(static_cast<std::size_t>(state_->size));
  try {
    state_->start(topology);
  } catch (const std::system_error& error) {
    const std::string made = std::to_string(state_->threads.size());
    state_->stop();
    throw std::system_error(error.code(), "the expert engine got " + made + " of " + std::to_string(state_->size) +
                                              " threads; raise the limit (ulimit -u, or the container's limit on " +
                                              "processes) or set MOE_FX_THREADS to a smaller number");
  }
}

Pool::~Pool() { state_->stop(); }

int Pool::size() const noexcept { return state_->size; }

int Pool::groups() const noexcept { return state_->groups; }

void Pool::run(Task task, void* context) noexcept { wait(submit(task, context)); }

std::uint64_t Pool::submit(Task task, void* context) noexcept { return state_->submit(task, context); }

void Pool::wait(std::uint64_t ticket) noexcept {
  state_->finished.wait([&] { return done(ticket); }, state_->waiter_spin);
}

bool Pool::done(std::uint64_t ticket) const noexcept { return state_->slot_of(ticket).finished.load() >= ticket; }

namespace {

// What a process has one of. A forked child has no thread but the one that forked: its parent's pool and OpenMP team
// are there in memory and will never run again.
class ProcessState {
 public:
  ~ProcessState() { delete current_.exchange(nullptr); }

  Pool& pool() {
    if (Generation* const made = current_.load(std::memory_order_acquire)) return made->pool;
    const std::lock_guard<std::mutex> lock(making_);
    Generation* made = current_.load(std::memory_order_relaxed);
    if (made == nullptr) {
      made = new Generation{Pool(current_topology()), parents_};
      current_.store(made, std::memory_order_release);
    }
    return made->pool;
  }

  bool forked() const noexcept { return forked_; }

  // Held across a fork, so that the child does not find a pool half made, or a lock whose owner is gone.
  void before_fork() { making_.lock(); }
  void after_fork_in_parent() { making_.unlock(); }
  void after_fork_in_child() {
    if (Generation* const parents = current_.exchange(nullptr)) parents_ = parents;
    forked_ = true;
    making_.unlock();
  }

 private:
  struct Generation {
    Pool pool;
    Generation* parents;
  };

  std::mutex making_;
  std::atomic<Generation*> current_{nullptr};
  Generation* parents_ = nullptr;  // never destroyed, since there is nothing to join; kept for leak checkers to find
  bool forked_ = false;
};

ProcessState process_state;

// Registered when the library is loaded: a process may use OpenMP, and fork, before it uses the engine.
[[maybe_unused]] const int fork_handlers =
    pthread_atfork([] { process_state.before_fork(); }, [] { process_state.after_fork_in_parent(); },
                   [] { process_state.after_fork_in_child(); });

// The entry points of an OpenMP runtime, as GCC's compiled code calls them. libgomp and LLVM's libomp both have them.
struct OpenMp {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
  int (*num_threads)();
  int (*thread_num)();
  int (*in_parallel)();
};

std::atomic<const OpenMp*> openmp{nullptr};

template <typename Function>
bool resolve(void* handle, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(handle, name));
  return function != nullptr;
}

}  // namespace

Pool& process_pool() { return process_state.pool(); }

bool run_on_openmp(int threads, Task task, void* context) noexcept {
  const OpenMp* const runtime = openmp.load(std::memory_order_acquire);
  if (runtime == nullptr || process_state.forked() || runtime->in_parallel() != 0) return false;
  struct Work {
    const OpenMp* runtime;
    Task task;
    void* context;
  } work{runtime, task, context};
  const auto body = [](void* data) {
    const Work& work = *static_cast<const Work*>(data);
    Worker worker;
    worker.index = worker.index_in_group = work.runtime->thread_num();
    worker.count = worker.group_size = work.runtime->num_threads();
    work.task(work.context, worker);
  };
  runtime->parallel(body, &work, static_cast<unsigned>(std::max(threads, 1)), 0);
  return true;
}

bool use_openmp(const std::string& library) {
  // RTLD_NOLOAD: a second runtime, loaded by us, would be a second pool of threads. The handle is kept for good.
  void* const handle = dlopen(library.empty() ? nullptr : library.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (handle == nullptr) return false;
  OpenMp found{};
  if (!resolve(handle, "GOMP_parallel", found.parallel) || !resolve(handle, "omp_get_num_threads", found.num_threads) ||
      !resolve(handle, "omp_get_thread_num", found.thread_num) ||
      !resolve(handle, "omp_in_parallel", found.in_parallel)) {
    dlclose(handle);
    return false;
  }
  // Every table told stays, since a thread may be using it.
  static std::mutex telling;
  static std::vector<std::unique_ptr<const OpenMp>> told;
  const std::lock_guard<std::mutex> lock(telling);
  told.push_back(std::make_unique<const OpenMp>(found));
  openmp.store(told.back().get(), std::memory_order_release);
  return true;
}

}  // namespace moe_fx::cpu
