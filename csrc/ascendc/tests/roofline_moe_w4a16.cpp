// Prints an estimate of moe_w4a16_decode's time on a 910B beside what the reference system publishes for its kernel,
// from what the host model counts, and those counts for a router's choices. Nothing here was measured on an NPU.
//
//   cmake --build build/ascendc --target moe_fx_ascendc_roofline && build/ascendc/moe_fx_ascendc_roofline

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "kernels/moe_w4a16_decode.h"
#include "model/launch.h"
#include "model/roofline.h"
#include "tiling/moe_w4a16_decode.h"

namespace moe_fx::ascendc {
namespace {

using ascendc_model::Access;
using ascendc_model::Npu;
using ascendc_model::Report;

struct Layer {
  const char* name;
  uint32_t hidden, intermediate;
};
// All choose 8 experts a token.
constexpr Layer kLayers[] = {
    {"Qwen3-30B-A3B", 2048, 768}, {"Qwen3-235B", 4096, 1536}, {"MiniMax-M2", 3072, 1536}, {"DeepSeek-V3", 7168, 2048}};
constexpr uint32_t kTopK = 8;
// The published times are of the first. The published bandwidths are 21.2 MB a token over those times: 4.5 bits a
// weight, groups of 32, and no expert shared by two tokens.
constexpr uint32_t kGroup = 32;

struct Published {
  uint32_t batch;
  double us;
};
constexpr Published kPublished[] = {{1, 43.4}, {2, 60.5}, {4, 96.2}, {8, 174.4}};

// Bytes of a layer's share that cannot be spared: weights and scales of the experts in use, x and y.
double least_bytes(const Layer& layer, std::size_t used, uint32_t group, uint32_t batch) {
  const double weights = 3.0 * layer.hidden * layer.intermediate * static_cast<double>(used);
  return weights / 2 + weights / group * 2 + 2.0 * batch * layer.hidden * 2;
}

// Counts depend on the experts chosen alone, so all other values are zero.
Report count(const Layer& layer, const std::vector<int32_t>& chosen, uint32_t experts, uint32_t group, int cores) {
  const auto [name, hidden, intermediate] = layer;
  const auto batch = static_cast<uint32_t>(chosen.size()) / kTopK;
  const MoeW4A16DecodePlan plan =
      plan_moe_w4a16_decode({batch, kTopK, experts, hidden, intermediate, group, false}, cores);
  const std::size_t weights = std::size_t{experts} * hidden * intermediate;
  ascendc_model::Device device(cores);
  const auto x = device.input("x", std::vector<half>(batch * hidden, half(0.0F)));
  const auto routing = device.input("weights", std::vector<float>(batch * kTopK, 0.0F));
  const auto ids = device.input("ids", chosen);
  const auto w13 = device.input("w13", std::vector<int32_t>(2 * weights / 8, 0));
  const auto w2 = device.input("w2", std::vector<int32_t>(weights / 8, 0));
  const auto w13_scale = device.input("w13_scale", std::vector<half>(2 * weights / group, half(0.0F)));
  const auto w2_scale = device.input("w2_scale", std::vector<half>(weights / group, half(0.0F)));
  const auto y = device.output<half>("y", x.size());
  const auto workspace = device.output<uint8_t>("workspace", plan.workspaceBytes);
  return device.launch(cores, [&] {
    MoeW4A16Decode<half, float>(x.gm(), routing.gm(), ids.gm(), w13.gm(), w13_scale.gm(), nullptr, w2.gm(),
                                w2_scale.gm(), nullptr, y.gm(), workspace.gm(), plan.tiling);
  });
}

// Every token has experts of its own.
std::vector<int32_t> distinct(uint32_t batch) {
  std::vector<int32_t> chosen(batch * kTopK);
  std::iota(chosen.begin(), chosen.end(), 0);
  return chosen;
}

// Every token draws from all experts.
std::vector<int32_t> drawn(uint32_t batch, uint32_t experts) {
  std::mt19937 random(batch);
  std::vector<int32_t> all(experts), chosen;
  std::iota(all.begin(), all.end(), 0);
  for (uint32_t token = 0; token < batch; ++token) {
    std::shuffle(all.begin(), all.end(), random);
    chosen.insert(chosen.end(), all.begin(), all.begin() + kTopK);
  }
  return chosen;
}

// Every token has the same experts.
std::vector<int32_t> shared(uint32_t batch) {
  std::vector<int32_t> chosen;
  for (uint32_t token = 0; token < batch; ++token) {
    for (uint32_t expert = 0; expert < kTopK; ++expert)
      chosen.push_back(static_cast<int32_t>(expert));
  }
  return chosen;
}

void print_traffic(const Layer& layer, const char* choices, const std::vector<int32_t>& chosen, uint32_t experts) {
  constexpr uint32_t kLargeGroup = 128;
  constexpr int kCores = 48;
  const auto batch = static_cast<uint32_t>(chosen.size()) / kTopK;
  const std::size_t used = std::set<int32_t>(chosen.begin(), chosen.end()).size();
  const Report report = count(layer, chosen, experts, kLargeGroup, kCores);
  const double moved = static_cast<double>(report.total.mte2_bytes + report.total.mte3_bytes);
  std::printf("%-14s %5u %-8s %8zu %10.3f %14u %11zu\n", layer.name, batch, choices, used,
              moved / least_bytes(layer, used, kLargeGroup, batch), report.peak_ub, report.syncs());
}

// What instructions, scalar accesses and bursts cost beyond the data they move, wholly hidden behind it.
Npu hidden() {
  Npu npu;
  npu.cycles_per_instruction = npu.cycles_per_scalar_access = npu.cycles_per_burst = 0;
  return npu;
}

// Cycles that each vector instruction may cost beyond its repeats for the estimate to equal `us`.
double break_even(const Report& report, double us) {
  Npu npu = hidden();
  double low = 0, high = 256;
  for (int step = 0; step < 40; ++step) {
    npu.cycles_per_instruction = (low + high) / 2;
    (ascendc_model::estimate(report, npu).us < us ? low : high) = npu.cycles_per_instruction;
  }
  return low;
}

void print(int cores) {
  std::printf("%d vector cores\n", cores);
  std::printf("batch   MB moved   of least   vector us   estimate us: hidden   exposed   published   break-even\n");
  for (const auto& [batch, published] : kPublished) {
    const Report report = count(kLayers[0], distinct(batch), batch * kTopK, kGroup, cores);
    const auto best = ascendc_model::estimate(report, hidden());
    const auto worst = ascendc_model::estimate(report);
    double vector = 0;
    for (const auto& phase : best.phases) {
      vector += phase.vector_us;
    }
    const double least = least_bytes(kLayers[0], std::size_t{batch} * kTopK, kGroup, batch);
    std::printf("%5u %10.1f %10.3f %11.1f %21.1f %9.1f %11.1f %8.1f cycles\n", batch, best.bytes / 1e6,
                best.bytes / least, vector, best.us, worst.us, published, break_even(report, published));
  }
}

}  // namespace
}  // namespace moe_fx::ascendc

int main() {
  const ascendc_model::Npu npu;
  std::printf(
      "ESTIMATE of moe_w4a16_decode (Qwen3-30B-A3B layer, int4 in groups of %u, distinct experts), not a measurement.\n"
      "Assumed: %.1f TB/s at %.0f %%, nothing from L2; %.1f GHz, a repeat a cycle; %.0f us a launch, %.0f us a SyncAll "
      "(2).\n"
      "hidden: nothing else costs time. exposed: each vector instruction %.0f cycles more and each scalar access %.0f, "
      "none\n"
      "of it overlapped. break-even: what an instruction may cost beyond its repeats to equal the published time.\n\n",
      moe_fx::ascendc::kGroup, npu.memory_bytes_per_s / 1e12, npu.memory_efficiency * 100, npu.clock_hz / 1e9,
      npu.launch_us, npu.sync_us, npu.cycles_per_instruction, npu.cycles_per_scalar_access);
  moe_fx::ascendc::print(48);
  moe_fx::ascendc::print(40);
  std::printf("\nCOUNTED on the host model, groups of 128, 48 cores\n");
  std::printf("layer          batch choices   experts   of least   UB of a core   SyncAlls\n");
  using namespace moe_fx::ascendc;
  for (const uint32_t batch : {1U, 2U, 4U, 8U})
    print_traffic(kLayers[0], "drawn", drawn(batch, 128), 128);
  print_traffic(kLayers[0], "shared", shared(8), 128);
  for (const Layer& layer : {kLayers[1], kLayers[2], kLayers[3]}) {
    for (const uint32_t batch : {1U, 4U})
      print_traffic(layer, "distinct", distinct(batch), batch * kTopK);
  }
}
