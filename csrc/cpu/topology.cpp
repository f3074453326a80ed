// Reads the nodes of the machine, or of MOE_FX_NUMA; see topology.h.

#include "cpu/topology.h"

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdlib>
#include <fstream>
#include <set>
#include <stdexcept>
#include <string>

#include "cpu/cpu_info.h"

namespace moe_fx::cpu {

namespace {

// The lowest CPU of the core that `cpu` belongs to; `cpu` itself where the kernel does not tell.
int core_of(int cpu) {
  std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
  std::string siblings;
  std::getline(file, siblings);
  const std::vector<int> cpus = parse_cpu_list(siblings);
  return cpus.empty() ? cpu : cpus.front();
}

// Of CPUs that share a core the first one: the engine waits for memory, which a second thread of a core adds none of.
std::vector<int> one_per_core(const std::vector<int>& cpus) {
  std::set<int> seen;
  std::vector<int> chosen;
  for (const int cpu : cpus) {
    if (seen.insert(core_of(cpu)).second) chosen.push_back(cpu);
  }
  return chosen;
}

// Ascending CPUs as the kernel writes them: "0-3,8".
std::string cpu_list_text(const std::vector<int>& cpus) {
  std::string text;
  for (std::size_t first = 0; first < cpus.size();) {
    std::size_t last = first;
    while (last + 1 < cpus.size() && cpus[last + 1] == cpus[last] + 1)
      ++last;
    if (!text.empty()) text += ',';
    text += std::to_string(cpus[first]);
    if (last > first) text += '-' + std::to_string(cpus[last]);
    first = last + 1;
  }
  return text;
}

std::string_view environment(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? std::string_view{} : value;
}

int parse_threads(std::string_view text) {
  int threads = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), threads);
  if (error != std::errc{} || end != text.data() + text.size() || threads < 1) {
    throw std::invalid_argument("cannot read MOE_FX_THREADS='" + std::string(text) +
                                "': write the most threads that the expert engine may have, 1 or more, for example 8; "
                                "or unset it for one thread per physical core");
  }
  return threads;
}

Topology machine_topology() {
  const CpuInfo info = read_cpu_info();
  Topology topology;
  for (const NumaNode& node : info.numa_nodes) {
    std::vector<int> cpus;
    std::set_intersection(node.cpus.begin(), node.cpus.end(), info.allowed_cpus.begin(), info.allowed_cpus.end(),
                          std::back_inserter(cpus));
    if (!cpus.empty()) topology.nodes.push_back({node.node, one_per_core(cpus)});
  }
  // Emulated and sandboxed systems may list nodes that do not fit the CPUs that they let a process run on.
  if (topology.nodes.empty()) topology.nodes.push_back({-1, one_per_core(info.allowed_cpus)});
  return topology;
}

}  // namespace

Topology parse_topology(std::string_view text, const std::vector<int>& allowed_cpus) {
  Topology topology;
  topology.made_up = true;
  if (text == "off") {
    topology.nodes.push_back({-1, one_per_core(allowed_cpus)});
    return topology;
  }

  const auto fail = [text](const std::string& reason) {
    throw std::invalid_argument("cannot read MOE_FX_NUMA='" + std::string(text) + "': " + reason +
                                "; write one CPU list per memory node, separated by semicolons, for example 0-3;4-7, "
                                "or off for a single node of all CPUs");
  };
  const std::set<int> allowed(allowed_cpus.begin(), allowed_cpus.end());
  std::set<int> taken;
  for (std::string_view left = text;;) {
    const std::size_t end = left.find(';');
    const std::string number = std::to_string(topology.nodes.size() + 1);
    std::vector<int> cpus;
    try {
      cpus = parse_cpu_list(left.substr(0, end));
    } catch (const std::invalid_argument& error) {
      fail("in list " + number + ", " + error.what());
    }
    if (cpus.empty()) fail("list " + number + " is empty, and a node needs a CPU");
    for (const int cpu : cpus) {
      if (!allowed.contains(cpu)) {
        fail("this process may not run on CPU " + std::to_string(cpu) + ", only on " + cpu_list_text(allowed_cpus));
      }
      if (!taken.insert(cpu).second) fail("CPU " + std::to_string(cpu) + " is in more than one node");
    }
    topology.nodes.push_back({-1, std::move(cpus)});
    if (end == std::string_view::npos) return topology;
    left.remove_prefix(end + 1);
  }
}

Topology limited(const Topology& topology, int threads) {
  Topology result;
  result.made_up = topology.made_up;
  for (const TopologyNode& node : topology.nodes) {
    result.nodes.push_back({node.memory_node, {}});
  }
  bool any_left = true;
  for (std::size_t turn = 0; any_left && threads > 0; ++turn) {
    any_left = false;
    for (std::size_t node = 0; node < topology.nodes.size() && threads > 0; ++node) {
      const std::vector<int>& cpus = topology.nodes[node].cpus;
      if (turn >= cpus.size()) continue;
      result.nodes[node].cpus.push_back(cpus[turn]);
      any_left = true;
      --threads;
    }
  }
  std::erase_if(result.nodes, [](const TopologyNode& node) { return node.cpus.empty(); });
  return result;
}

Topology current_topology() {
  const std::string_view numa = environment("MOE_FX_NUMA");
  const std::string_view threads = environment("MOE_FX_THREADS");
  Topology topology = numa.empty() ? machine_topology() : parse_topology(numa, read_cpu_info().allowed_cpus);
  return threads.empty() ? topology : limited(topology, parse_threads(threads));
}

}  // namespace moe_fx::cpu
