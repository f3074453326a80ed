// The memory nodes that threads and packed weights are spread over: the machine's own, or made-up ones.

#pragma once

#include <string_view>
#include <vector>

namespace moe_fx::cpu {

struct TopologyNode {
  int memory_node = -1;   // the operating system's number of the node that memory is bound to; -1 binds nothing
  std::vector<int> cpus;  // CPUs that threads are pinned to, one thread each; one per physical core
};

struct Topology {
  std::vector<TopologyNode> nodes;  // never empty, each with at least one CPU
  bool made_up = false;             // from MOE_FX_NUMA
};

// Reads MOE_FX_NUMA's language: CPU lists separated by semicolons ("0-3;4-7"), a node each, made up and thus bound to
// no memory, of exactly these CPUs; or "off" for one such node of all allowed CPUs, one per physical core. Throws
// std::invalid_argument that says what is wrong and what is right.
Topology parse_topology(std::string_view text, const std::vector<int>& allowed_cpus);

// Takes CPUs from the nodes in turn until `threads` are left or all are taken. Nodes left without one are gone.
Topology limited(const Topology& topology, int threads);

// MOE_FX_NUMA if set and not empty, else the machine's nodes that hold CPUs which this process may run on, with one CPU
// per physical core; MOE_FX_THREADS limits the number of threads, taken evenly from the nodes. Throws
// std::invalid_argument when one of the two cannot be read.
Topology current_topology();

}  // namespace moe_fx::cpu
