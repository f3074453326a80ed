// What bounds the expert kernels: the time that each takes for a cache line of weights, once with the weights in the
// cache (its instructions alone) and once with the weights streamed from memory on two threads, beside the time in
// which the same threads read memory and do nothing else. A kernel at the limit of memory takes max(instructions,
// memory); what it takes beyond that is loads that its own instructions kept from being started in time.
//
// Usage: kernel_streams [inputs of a row, default 2048]. MOE_FX_ISA chooses the kernels.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "cpu/format.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"

using namespace moe_fx::cpu;

namespace {

constexpr int kThreads = 2;
constexpr int kMaxM = 6;
constexpr std::size_t kStreamed = std::size_t{512} << 20;

struct Product {
  const char* name;
  WeightFormat weights;
  ActivationForm activations;
};

constexpr Product kProducts[] = {
    {"bf16 x bf16", WeightFormat::bf16, ActivationForm::bf16},
    {"bf16 x f32", WeightFormat::bf16, ActivationForm::f32},
    {"int8 x int8", WeightFormat::int8, ActivationForm::s8},
    {"int8 x f32", WeightFormat::int8, ActivationForm::f32},
    {"int4 x int8", WeightFormat::int4, ActivationForm::s8},
    {"int4 x bf16", WeightFormat::int4, ActivationForm::bf16},
    {"int4 x f32", WeightFormat::int4, ActivationForm::f32},
};

double seconds(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// The median of a few runs.
double median_seconds(const std::function<void()>& work) {
  std::vector<double> times;
  for (int i = 0; i < 7; ++i)
    times.push_back(seconds(work));
  std::nth_element(times.begin(), times.begin() + 3, times.end());
  return times[3];
}

void on_threads(const std::function<void(int)>& work) {
  std::thread other(work, 1);
  work(0);
  other.join();
}

// 16 rows of weights as one tile reads them.
struct Block {
  Block(const Product& product, std::int64_t inputs) : dense(!is_packed(product.weights)) {
    PackedSpec spec;
    spec.format = dense ? WeightFormat::int8 : product.weights;
    spec.experts = 1;
    spec.hidden = inputs;
    spec.intermediate = 128;
    spec.group = product.weights == WeightFormat::int4 ? 128 : 0;
    const PackedLayout layout(spec);
    bytes = dense ? static_cast<std::size_t>(kBlockRows * inputs) * 2 : layout.block_bytes(Matrix::w13);
    groups = dense ? 1 : layout.groups(Matrix::w13);
  }
  bool dense;
  std::size_t bytes;
  std::int64_t groups;
};

void measure(const Kernels& kernels, const Product& product, std::int64_t inputs, const HugeBuffer& memory) {
  const TileKernel kernel =
      kernels.tile[static_cast<std::size_t>(product.weights)][static_cast<std::size_t>(product.activations)];
  if (kernel == nullptr) return;
  const Block block(product, inputs);
  const RowShape shape{product.activations, inputs, block.groups, product.weights == WeightFormat::int4};
  const HugeBuffer rows(shape.bytes() * kMaxM);
  const std::vector<float> values(static_cast<std::size_t>(inputs), 0.5F);
  const std::uint8_t* x[kMaxM];
  for (int i = 0; i < kMaxM; ++i) {
    std::uint8_t* const row = rows.data() + static_cast<std::size_t>(i) * shape.bytes();
    kernels.write_row(shape, values.data(), row);
    x[i] = row;
  }
  const std::size_t blocks = memory.size() / block.bytes;
  const auto tile_at = [&](std::size_t index, int m, float* out) {
    Tile tile;
    tile.weights = memory.data() + index * block.bytes;
    tile.weight_stride = static_cast<std::size_t>(inputs) * 2;
    tile.rows = kBlockRows;
    tile.inputs = inputs;
    tile.groups = block.groups;
    tile.x = x;
    tile.shape = shape;
    tile.m = m;
    tile.out = out;
    if (index + 1 < blocks) tile.next = tile.weights + block.bytes;
    return tile;
  };
  const double lines = static_cast<double>(block.bytes) / kLine;
  for (const int m : {1, 2, 4, kMaxM}) {
    const double read = median_seconds([&] {
      on_threads([&](int thread) {
        const std::size_t share = memory.size() / kThreads / 256 * 256;
        static volatile std::uint64_t sink;
        sink = kernels.sum_words(memory.data() + static_cast<std::size_t>(thread) * share, share);
      });
    });
    alignas(64) float out[kMaxM * kBlockRows];
    const Tile cached = tile_at(0, m, out);
    constexpr int kRepeats = 64;
    double best = 1.0;
    for (int i = 0; i < 100; ++i) {
      best = std::min(best, seconds([&] {
                        for (int repeat = 0; repeat < kRepeats; ++repeat)
                          kernel(cached);
                      }));
    }
    const double streamed = median_seconds([&] {
      on_threads([&](int thread) {
        alignas(64) float result[kMaxM * kBlockRows];
        const std::size_t end = blocks * static_cast<std::size_t>(thread + 1) / kThreads;
        for (std::size_t b = blocks * static_cast<std::size_t>(thread) / kThreads; b < end; ++b) {
          kernel(tile_at(b, m, result));
        }
      });
    });
    const double all_lines = static_cast<double>(memory.size()) / kLine / kThreads;
    const double per_line_read = read * 1e9 / all_lines;
    const double per_line_cached = best * 1e9 / kRepeats / lines;
    const double per_line = streamed * 1e9 / (static_cast<double>(blocks) * lines / kThreads);
    std::printf("%-12s %3d %10.2f %8.2f %10.2f %14.2f %10.1f\n", product.name, m, per_line_cached, per_line_read,
                per_line, per_line_read / per_line, kThreads * kLine / per_line);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::int64_t inputs = argc > 1 ? std::atoll(argv[1]) : 2048;
  const Kernels& kernels = chosen_kernels();
  const HugeBuffer memory(kStreamed);
  std::memset(memory.data(), 0x11, memory.size());
  std::printf("%s, rows of %lld inputs, %d threads; nanoseconds per cache line of weights and thread\n",
              std::string(kernels.name).c_str(), static_cast<long long>(inputs), kThreads);
  std::printf("%-12s %3s %10s %8s %10s %14s %10s\n", "weights x", "m", "in cache", "reading", "streamed",
              "of streaming", "GB/s");
  for (const Product& product : kProducts)
    measure(kernels, product, inputs, memory);
  return 0;
}
