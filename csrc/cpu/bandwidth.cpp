// Measures streaming reads; see bandwidth.h.

#include "cpu/bandwidth.h"

#include <atomic>
#include <chrono>
#include <cstdint>

#include "cpu/engine.h"

namespace moe_fx::cpu {

namespace {

constexpr std::size_t kStep = 256;  // sum_words takes whole steps

struct Reading {
  const std::uint8_t* data;
  std::size_t bytes;
  const Kernels& kernels;
  std::atomic<std::uint64_t> sum{0};  // keeps the loads from being optimised away

  static void on_worker(void* reading, const Worker& worker) noexcept {
    auto& self = *static_cast<Reading*>(reading);
    const auto begin_of = [&](int part) {
      return self.bytes / kStep * static_cast<std::size_t>(part) / static_cast<std::size_t>(worker.count) * kStep;
    };
    const std::size_t begin = begin_of(worker.index);
    self.sum += self.kernels.sum_words(self.data + begin, begin_of(worker.index + 1) - begin);
  }
};

}  // namespace

double streaming_read_seconds(const std::uint8_t* data, std::size_t bytes, int threads) {
  Reading reading{.data = data, .bytes = bytes, .kernels = chosen_kernels()};
  const auto start = std::chrono::steady_clock::now();
  run_on_team(threads, &Reading::on_worker, &reading);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace moe_fx::cpu
