// Whole calls of the engine on a layer of Qwen3-30B-A3B's shape with cold weights, beside streaming reads of the same
// run.
//
// Usage: expert_calls FORMAT THREADS TOKENS...
//   FORMAT   bf16, int8 or int4 (int8 activations), int8x or int4x (exact activations, bf16)
//   THREADS  of the OpenMP runtime that the environment variable OPENMP names (a libgomp.so.1), if it can be loaded;
//            with MOE_FX_THREADS, the engine's own
// Prints medians. A round is a streaming read, some calls and another read; the fraction is of the two reads beside.

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cpu/bandwidth.h"
#include "cpu/engine.h"
#include "cpu/memory.h"
#include "cpu/pack.h"

using namespace moe_fx::cpu;

namespace {

constexpr std::int64_t kExperts = 128, kHidden = 2048, kIntermediate = 768, kTopK = 8, kGroup = 128;
constexpr int kLayers = 4;     // hold many times the last-level cache
constexpr int kRoutings = 16;  // random ones, in turn
constexpr double kSeconds = 3.0;

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

// Random bf16 numbers of magnitude 1/64 to 1/32 and either sign.
void fill(std::uint16_t* values, std::size_t count, std::mt19937& random) {
  for (std::size_t i = 0; i < count; ++i)
    values[i] = static_cast<std::uint16_t>((random() & 0x807fU) | 0x3c80U);
}

struct Weights {
  HugeBuffer memory;
  Layer layer;
};

Weights dense_weights(std::mt19937& random) {
  constexpr std::size_t kRow = kHidden * 2, kProjection = kIntermediate * kRow;
  Weights weights{HugeBuffer(kExperts * 3 * kProjection), {}};
  std::uint8_t* const data = weights.memory.data();
  fill(reinterpret_cast<std::uint16_t*>(data), weights.memory.size() / 2, random);
  weights.layer.format = WeightFormat::bf16;
  weights.layer.gate = {data, 2 * kProjection, kRow};
  weights.layer.up = {data + kProjection, 2 * kProjection, kRow};
  weights.layer.down = {data + kExperts * 2 * kProjection, kProjection, kIntermediate * 2};
  return weights;
}

Weights packed_weights(WeightFormat format, std::mt19937& random) {
  PackedSpec spec;
  spec.format = format;
  spec.experts = kExperts;
  spec.hidden = kHidden;
  spec.intermediate = kIntermediate;
  spec.group = format == WeightFormat::int4 ? kGroup : 0;
  spec.segments = static_cast<int>(current_topology().nodes.size());
  auto layout = std::make_shared<const PackedLayout>(spec);
  Weights weights{HugeBuffer(layout->bytes()), {}};
  begin_packing(weights.memory.data(), *layout, current_topology());
  std::vector<std::uint16_t> source(static_cast<std::size_t>(kIntermediate * kHidden));
  for (std::int64_t expert = 0; expert < kExperts; ++expert) {
    for (const Projection projection : {Projection::gate, Projection::up, Projection::down}) {
      fill(source.data(), source.size(), random);
      const std::int64_t inputs = projection == Projection::down ? kIntermediate : kHidden;
      pack_float(weights.memory.data(), *layout, expert, projection,
                 {DType::bf16, source.data(), static_cast<std::size_t>(inputs) * 2}, 2);
    }
  }
  weights.layer.format = format;
  weights.layer.packed = weights.memory.data();
  weights.layer.layout = std::move(layout);
  return weights;
}

// Bytes of one expert's weights, scales included.
double expert_bytes(const Layer& layer) {
  if (!is_packed(layer.format)) return 3.0 * kIntermediate * kHidden * 2;
  const PackedLayout& layout = *layer.layout;
  return static_cast<double>(layout.blocks(Matrix::w13) * 2) * static_cast<double>(layout.block_bytes(Matrix::w13)) +
         static_cast<double>(layout.blocks(Matrix::w2)) * static_cast<double>(layout.block_bytes(Matrix::w2));
}

// Distinct random experts for each token; how many different ones there are in all is added to `hit`.
std::vector<std::int32_t> routing(std::int64_t tokens, std::mt19937& random, double& hit) {
  std::vector<std::int32_t> experts(kExperts), ids;
  std::iota(experts.begin(), experts.end(), 0);
  for (std::int64_t token = 0; token < tokens; ++token) {
    std::shuffle(experts.begin(), experts.end(), random);
    ids.insert(ids.end(), experts.begin(), experts.begin() + kTopK);
  }
  std::vector<std::int32_t> distinct = ids;
  std::sort(distinct.begin(), distinct.end());
  hit += static_cast<double>(std::unique(distinct.begin(), distinct.end()) - distinct.begin());
  return ids;
}

void measure(const std::vector<Weights>& layers, std::int64_t tokens, int threads, const HugeBuffer& stream) {
  std::mt19937 random(static_cast<unsigned>(tokens));
  std::vector<std::uint16_t> x(static_cast<std::size_t>(tokens * kHidden)), y(x.size());
  fill(x.data(), x.size(), random);
  const std::vector<float> weights(static_cast<std::size_t>(tokens * kTopK), 1.0F / kTopK);
  double hit = 0;
  std::vector<std::vector<std::int32_t>> routings;
  for (int i = 0; i < kRoutings; ++i)
    routings.push_back(routing(tokens, random, hit));
  const double bytes = hit / kRoutings * expert_bytes(layers[0].layer);

  std::size_t done = 0;
  const auto run = [&] {
    Call call;
    call.x = x.data();
    call.tokens = tokens;
    call.top_k = kTopK;
    call.weights = weights.data();
    call.ids = routings[done % kRoutings].data();
    call.y = y.data();
    run_experts(layers[done % layers.size()].layer, call, threads);
    ++done;
  };
  const auto stream_rate = [&] {
    return static_cast<double>(stream.size()) / streaming_read_seconds(stream.data(), stream.size(), threads) / 1e9;
  };
  run();
  std::vector<double> times, rates, fractions;
  const auto start = Clock::now();
  while (seconds_since(start) < kSeconds || times.size() < 8) {
    const double before = stream_rate();
    std::vector<double> round;
    for (int i = 0; i < std::max(1, static_cast<int>(16 / tokens)); ++i) {
      const auto begin = Clock::now();
      run();
      round.push_back(seconds_since(begin));
    }
    const double beside = (before + stream_rate()) / 2;
    times.insert(times.end(), round.begin(), round.end());
    rates.push_back(beside);
    fractions.push_back(bytes / median(round) / 1e9 / beside);
  }
  const double time = median(times);
  const double products = static_cast<double>(tokens * kTopK * 3 * kHidden * kIntermediate);
  std::printf("%6lld %12.1f %14.2f %14.2f %10.3f %10.1f\n", static_cast<long long>(tokens), time * 1e6,
              bytes / time / 1e9, median(rates), median(fractions), products / time / 1e9);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: %s bf16|int8|int4|int8x|int4x THREADS TOKENS...\n", argv[0]);
    return 2;
  }
  const std::string format = argv[1];
  const int threads = std::atoi(argv[2]);
  if (const char* const library = std::getenv("OPENMP")) {
    if (dlopen(library, RTLD_NOW | RTLD_GLOBAL) == nullptr || !use_openmp(library)) {
      std::fprintf(stderr, "%s cannot be loaded; the engine's own threads run\n", library);
    }
  }
  std::mt19937 random(0);
  std::vector<Weights> layers;
  for (int i = 0; i < kLayers; ++i) {
    layers.push_back(
        format == "bf16"
            ? dense_weights(random)
            : packed_weights(format.rfind("int8", 0) == 0 ? WeightFormat::int8 : WeightFormat::int4, random));
    Layer& layer = layers.back().layer;
    layer.experts = kExperts;
    layer.hidden = kHidden;
    layer.intermediate = kIntermediate;
    layer.int8_activations = format == "int8" || format == "int4";
  }
  const HugeBuffer stream(std::size_t{256} << 20);
  std::memset(stream.data(), 1, stream.size());
  std::printf("%s, %s, %d threads\n", format.c_str(), std::string(chosen_kernels().name).c_str(), threads);
  std::printf("%6s %12s %14s %14s %10s %10s\n", "tokens", "us", "weights GB/s", "stream GB/s", "fraction", "GMAC/s");
  for (int i = 3; i < argc; ++i)
    measure(layers, std::atoll(argv[i]), threads, stream);
  return 0;
}
