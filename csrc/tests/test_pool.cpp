// The pool's promises (each worker once, in order, from any number of submitters, across forks), its barrier, and the
// borrowed OpenMP team.

#include <dlfcn.h>
#include <doctest/doctest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <thread>
#include <vector>

#include "cpu/cpu_info.h"
#include "cpu/pool.h"

#if defined(__linux__)
#include <sched.h>
#include <sys/prctl.h>
#endif

namespace moe_fx::cpu {
namespace {

using std::chrono::milliseconds;

constexpr int kMostWorkers = 16;

// Two made-up nodes, of two threads and one, on the machine's CPUs; more threads than most laptops' tests can pin.
Topology two_nodes() {
  const std::vector<int> cpus = read_cpu_info().allowed_cpus;
  return {{{-1, {cpus.front(), cpus.back()}}, {-1, {cpus.front()}}}, true};
}

// Counts the calls of each worker and keeps what they were told.
struct Counts {
  std::array<std::atomic<int>, kMostWorkers> calls{};
  std::array<Worker, kMostWorkers> workers;

  static void task(void* context, const Worker& worker) noexcept {
    Counts& counts = *static_cast<Counts*>(context);
    const auto index = static_cast<std::size_t>(worker.index);
    counts.calls[index].fetch_add(1);
    counts.workers[index] = worker;
  }

  int total() const {
    int sum = 0;
    for (const auto& calls_of_one : calls) {
      sum += calls_of_one;
    }
    return sum;
  }
};

// Holds every worker until it is opened.
struct Gate {
  std::atomic<bool> open{false};
  std::atomic<int> passed{0};

  static void task(void* context, const Worker&) noexcept {
    Gate& gate = *static_cast<Gate*>(context);
    while (!gate.open.load()) {
      std::this_thread::sleep_for(milliseconds(1));
    }
    gate.passed.fetch_add(1);
  }
};

void nothing(void*, const Worker&) noexcept {}

TEST_CASE("every worker runs a task once and knows its place") {
  Pool pool(two_nodes());
  CHECK(pool.size() == 3);
  CHECK(pool.groups() == 2);
  Counts counts;
  pool.run(Counts::task, &counts);
  CHECK(counts.total() == 3);

  const Worker expected[] = {{0, 3, 0, 2, 0, 2}, {1, 3, 0, 2, 1, 2}, {2, 3, 1, 2, 0, 1}};
  for (int i = 0; i < 3; ++i) {
    CAPTURE(i);
    CHECK(counts.calls[static_cast<std::size_t>(i)] == 1);
    const Worker& worker = counts.workers[static_cast<std::size_t>(i)];
    CHECK(worker.index == expected[i].index);
    CHECK(worker.count == expected[i].count);
    CHECK(worker.group == expected[i].group);
    CHECK(worker.groups == expected[i].groups);
    CHECK(worker.index_in_group == expected[i].index_in_group);
    CHECK(worker.group_size == expected[i].group_size);
  }
}

TEST_CASE("every worker runs every task in the order of the tickets") {
  Pool pool(two_nodes());
  // Each entry is written by one worker at a time; the pool's own order must make that visible to the next.
  struct Step {
    std::array<int, kMostWorkers>* last;
    int number;
    std::atomic<int>* wrong;
  };
  std::array<int, kMostWorkers> last{};
  std::atomic<int> wrong{0};
  std::vector<Step> steps;
  constexpr int kSteps = 1000;
  for (int i = 1; i <= kSteps; ++i) {
    steps.push_back({&last, i, &wrong});
  }
  std::uint64_t ticket = 0;
  for (Step& step : steps) {
    const std::uint64_t next = pool.submit(
        [](void* context, const Worker& worker) noexcept {
          const Step& step = *static_cast<Step*>(context);
          int& before = (*step.last)[static_cast<std::size_t>(worker.index)];
          if (before != step.number - 1) step.wrong->fetch_add(1);
          before = step.number;
        },
        &step);
    CHECK(next > ticket);
    ticket = next;
  }
  pool.wait(ticket);
  CHECK(wrong == 0);
  for (int i = 0; i < pool.size(); ++i) {
    CHECK(last[static_cast<std::size_t>(i)] == kSteps);
  }
}

TEST_CASE("many threads submit at once") {
  Pool pool(two_nodes());
  constexpr int kSubmitters = 4;
  constexpr int kRounds = 2000;
  std::array<Counts, kSubmitters> counts;
  std::array<std::atomic<int>, kSubmitters> early{};
  std::vector<std::thread> submitters;
  for (std::size_t s = 0; s < kSubmitters; ++s) {
    submitters.emplace_back([&, s] {
      std::uint64_t tickets[3] = {};
      for (int round = 0; round < kRounds; ++round) {
        for (std::uint64_t& ticket : tickets) {
          ticket = pool.submit(Counts::task, &counts[s]);
        }
        // Waiting for the last is waiting for all that this thread submitted.
        pool.wait(tickets[2]);
        for (const std::uint64_t ticket : tickets) {
          if (!pool.done(ticket)) early[s].fetch_add(1);
        }
        if (counts[s].total() != (round + 1) * 3 * pool.size()) early[s].fetch_add(1);
        if (round % 512 == 0) std::this_thread::sleep_for(milliseconds(1));  // lets the workers fall asleep
      }
    });
  }
  for (std::thread& submitter : submitters) {
    submitter.join();
  }
  for (std::size_t s = 0; s < kSubmitters; ++s) {
    CHECK(early[s] == 0);
    for (std::size_t worker = 0; worker < 3; ++worker) {
      CHECK(counts[s].calls[worker] == 3 * kRounds);
    }
  }
}

TEST_CASE("a ticket is done only when every worker has finished, and may be waited for by many, often and late") {
  Pool pool(two_nodes());
  Gate gate;
  const std::uint64_t held = pool.submit(Gate::task, &gate);
  const std::uint64_t behind = pool.submit(nothing, nullptr);
  std::vector<std::thread> waiters;
  std::atomic<int> before_the_end{0};
  for (int i = 0; i < 3; ++i) {
    waiters.emplace_back([&] {
      pool.wait(held);
      if (gate.passed != 3) before_the_end.fetch_add(1);
    });
  }
  std::this_thread::sleep_for(milliseconds(20));  // lets the waiters fall asleep
  CHECK_FALSE(pool.done(held));
  CHECK_FALSE(pool.done(behind));
  gate.open = true;
  for (std::thread& waiter : waiters) {
    waiter.join();
  }
  CHECK(before_the_end == 0);
  CHECK(pool.done(held));
  pool.wait(behind);
  for (int i = 0; i < 3 * Pool::kMaxInFlight; ++i) {
    pool.run(nothing, nullptr);
  }
  pool.wait(held);
  CHECK(pool.done(held));
}

TEST_CASE("a full ring makes submitters wait, and loses nothing") {
  Pool pool(two_nodes());
  Gate gate;
  pool.submit(Gate::task, &gate);
  Counts counts;
  constexpr int kTasks = 3 * Pool::kMaxInFlight;
  std::atomic<int> submitted{0};
  std::thread submitter([&] {
    for (int i = 0; i < kTasks; ++i) {
      pool.submit(Counts::task, &counts);
      submitted.fetch_add(1);
    }
  });
  while (submitted < Pool::kMaxInFlight - 1) {
    std::this_thread::sleep_for(milliseconds(1));
  }
  std::this_thread::sleep_for(milliseconds(20));
  CHECK(submitted == Pool::kMaxInFlight - 1);
  CHECK(counts.total() == 0);
  gate.open = true;
  submitter.join();
  pool.run(nothing, nullptr);
  CHECK(counts.total() == kTasks * pool.size());
}

TEST_CASE("destruction finishes what was submitted") {
  Counts counts;
  {
    Pool pool(two_nodes());
    for (int i = 0; i < Pool::kMaxInFlight; ++i) {
      pool.submit(Counts::task, &counts);
    }
  }
  CHECK(counts.total() == Pool::kMaxInFlight * 3);
}

// Workers write a value each, meet, and add up what all wrote, many times over.
struct Meeting {
  Barrier barrier;
  std::array<int, kMostWorkers> values{};
  std::atomic<int> wrong{0};
  int rounds = 0;

  static void task(void* context, const Worker& worker) noexcept {
    Meeting& meeting = *static_cast<Meeting*>(context);
    for (int round = 1; round <= meeting.rounds; ++round) {
      meeting.values[static_cast<std::size_t>(worker.index)] = round * (worker.index + 1);
      meeting.barrier.wait();
      int sum = 0;
      for (int i = 0; i < worker.count; ++i) {
        sum += meeting.values[static_cast<std::size_t>(i)];
      }
      if (sum != round * worker.count * (worker.count + 1) / 2) meeting.wrong.fetch_add(1);
      meeting.barrier.wait();
    }
  }
};

TEST_CASE("workers meet at a barrier, time after time, and tasks that do so cannot lock each other out") {
  Pool pool(two_nodes());
  constexpr int kSubmitters = 3;
  std::array<Meeting, kSubmitters> meetings;
  for (Meeting& meeting : meetings) {
    meeting.rounds = 20;
    meeting.barrier.reset(pool.size());
  }
  std::vector<std::thread> submitters;
  for (Meeting& meeting : meetings) {
    submitters.emplace_back([&] {
      for (int i = 0; i < 20; ++i) {
        pool.run(Meeting::task, &meeting);
      }
    });
  }
  for (std::thread& submitter : submitters) {
    submitter.join();
  }
  for (const Meeting& meeting : meetings) {
    CHECK(meeting.wrong == 0);
  }
}

TEST_CASE("a barrier can be set for another number") {
  Barrier barrier;
  for (const int count : {1, 3, 2}) {
    barrier.reset(count);
    std::vector<std::thread> threads;
    std::atomic<int> came{0};
    std::atomic<int> early{0};
    for (int i = 0; i < count; ++i) {
      threads.emplace_back([&] {
        came.fetch_add(1);
        barrier.wait();
        if (came != count) early.fetch_add(1);
      });
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
    CHECK(early == 0);
  }
}

TEST_CASE("a CPU that this process may not run on does not stop the pool") {
  Pool pool(Topology{{{-1, {65000}}, {-1, {read_cpu_info().allowed_cpus.front()}}}, true});
  Counts counts;
  pool.run(Counts::task, &counts);
  CHECK(counts.total() == 2);
}

#if defined(__linux__)
TEST_CASE("workers are pinned to their CPUs and take no signals") {
  const std::vector<int> cpus = read_cpu_info().allowed_cpus;
  struct Seen {
    std::array<int, kMostWorkers> allowed{};
    std::array<int, kMostWorkers> cpu{};
    std::array<bool, kMostWorkers> takes_signals{};
  } seen;
  Pool pool(two_nodes());
  pool.run(
      [](void* context, const Worker& worker) noexcept {
        Seen& seen = *static_cast<Seen*>(context);
        const auto index = static_cast<std::size_t>(worker.index);
        cpu_set_t set;
        CPU_ZERO(&set);
        sched_getaffinity(0, sizeof(set), &set);
        seen.allowed[index] = CPU_COUNT(&set);
        seen.cpu[index] = sched_getcpu();
        sigset_t blocked;
        pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
        seen.takes_signals[index] = sigismember(&blocked, SIGINT) == 0 || sigismember(&blocked, SIGTERM) == 0;
      },
      &seen);
  const int expected[] = {cpus.front(), cpus.back(), cpus.front()};
  for (std::size_t i = 0; i < 3; ++i) {
    CHECK(seen.allowed[i] == 1);
    CHECK(seen.cpu[i] == expected[i]);
    CHECK_FALSE(seen.takes_signals[i]);
  }
  sigset_t blocked;
  pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
  CHECK(sigismember(&blocked, SIGINT) == 0);
}
#endif

// ThreadSanitizer cannot follow threads made in a forked child, nor how libgomp's threads wait for each other.
#if !defined(__SANITIZE_THREAD__)

// Runs `body` in a forked child that leaves by exit(), as a program does; the status that it exited with, or -1 when it
// had to be killed.
template <typename Body>
int status_of_child(const Body& body) {
  std::cout.flush();
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
#if defined(__linux__)
    prctl(PR_SET_PDEATHSIG, SIGKILL);  // a child that hangs must not outlive the tests, holding their output open
#endif
    std::exit(body());
  }
  for (int i = 0; i < 6000; ++i) {
    int status = 0;
    if (waitpid(child, &status, WNOHANG) == child) return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    std::this_thread::sleep_for(milliseconds(10));
  }
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  return -1;
}

// Whether the process's pool runs a task on all its threads, however many the machine gives it.
bool process_pool_works() {
  std::atomic<int> calls{0};
  process_pool().run(
      [](void* context, const Worker&) noexcept { static_cast<std::atomic<int>*>(context)->fetch_add(1); }, &calls);
  return calls == process_pool().size();
}

TEST_CASE("a forked child makes a pool of its own, and the parent keeps its pool") {
  REQUIRE(process_pool_works());
  Pool* const parents = &process_pool();
  CHECK(status_of_child([&] { return &process_pool() != parents && process_pool_works() ? 0 : 1; }) == 0);
  CHECK(status_of_child([] { return 0; }) == 0);
  CHECK(status_of_child([] {
          if (!process_pool_works()) return 1;
          return status_of_child([] { return process_pool_works() ? 0 : 2; });
        }) == 0);
  CHECK(&process_pool() == parents);
  CHECK(process_pool_works());
}

TEST_CASE("a process may fork while another thread uses the pool") {
  CHECK(status_of_child([] {
          std::atomic<bool> stop{false};
          std::thread user([&] {
            while (!stop) {
              process_pool().run(nothing, nullptr);
            }
          });
          int worst = 0;
          for (int i = 0; i < 10; ++i) {
            worst |= status_of_child([] { return process_pool_works() ? 0 : 1; });
          }
          stop = true;
          user.join();
          return worst;
        }) == 0);
}

// AddressSanitizer's own allocator does not survive a fork while another thread allocates, as the C library's does.
#if !defined(__SANITIZE_ADDRESS__)
TEST_CASE("a process may fork while another thread makes the pool") {
  for (int i = 0; i < 20; ++i) {
    CHECK(status_of_child([] {
            std::atomic<bool> making{false};
            std::thread maker([&] {
              making = true;
              process_pool();
            });
            while (!making) {
              std::this_thread::yield();
            }
            const int status = status_of_child([] { return process_pool_works() ? 0 : 1; });
            maker.join();
            return status;
          }) == 0);
  }
}

#endif

TEST_CASE("OpenMP's threads run a task") {
  CHECK_FALSE(use_openmp("no_such_library.so"));
  if (dlopen("libgomp.so.1", RTLD_NOW) == nullptr) {
    MESSAGE("skipped: there is no libgomp.so.1 here");
    return;
  }
  REQUIRE(use_openmp("libgomp.so.1"));
  CHECK_FALSE(use_openmp("no_such_library.so"));

  for (const int threads : {1, 2, 3}) {
    CAPTURE(threads);
    Counts counts;
    REQUIRE(run_on_openmp(threads, Counts::task, &counts));
    CHECK(counts.total() == threads);
    for (int i = 0; i < threads; ++i) {
      CHECK(counts.calls[static_cast<std::size_t>(i)] == 1);
      const Worker& worker = counts.workers[static_cast<std::size_t>(i)];
      CHECK(worker.count == threads);
      CHECK(worker.groups == 1);
      CHECK(worker.index_in_group == i);
      CHECK(worker.group_size == threads);
    }
  }

  Meeting meeting;
  meeting.rounds = 20;
  meeting.barrier.reset(3);
  REQUIRE(run_on_openmp(3, Meeting::task, &meeting));
  CHECK(meeting.wrong == 0);

  // Inside another parallel region it must refuse, and in a forked child too: the team's threads are not there.
  struct Nested {
    Counts counts;
    std::atomic<int> accepted{0};
  } nested;
  REQUIRE(run_on_openmp(
      2,
      [](void* context, const Worker&) noexcept {
        Nested& nested = *static_cast<Nested*>(context);
        if (run_on_openmp(2, Counts::task, &nested.counts)) nested.accepted.fetch_add(1);
      },
      &nested));
  CHECK(nested.accepted == 0);
  CHECK(nested.counts.total() == 0);
  CHECK(status_of_child([] {
          Counts counts;
          return run_on_openmp(2, Counts::task, &counts) || counts.total() != 0 ? 1 : 0;
        }) == 0);
}

#endif

}  // namespace
}  // namespace moe_fx::cpu
