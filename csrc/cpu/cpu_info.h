// What the host offers an expert engine: its processor, caches, memory nodes and page policy.
//
// Everything here is a reading of the running machine, taken when asked. On Linux it comes from cpuid or the auxiliary
// vector, sched_getaffinity, /proc and /sys; on other systems fields that cannot be read stay empty.

#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/isa.h"

namespace moe_fx::cpu {

struct NumaNode {
  int node = 0;
  std::vector<int> cpus;  // empty for a node that is memory only
  std::uint64_t memory_bytes = 0;
};

struct CpuInfo {
  std::string architecture;
  std::string vendor;
  std::string brand;
  IsaSet isa;
  std::vector<int> allowed_cpus;  // the logical CPUs that this process may run on
  int physical_cores = 0;         // the distinct cores behind them
  std::optional<std::uint64_t> l2_bytes;
  std::optional<std::uint64_t> l3_bytes;
  std::string transparent_huge_pages;  // "always", "madvise" or "never"
  std::vector<NumaNode> numa_nodes;    // never empty
};

// Parses the kernel's CPU list format, for example "0-3,8,10-11", into ascending, distinct CPU numbers. Surrounding
// white space is ignored and an empty list is valid. Throws std::invalid_argument that says what is wrong and where.
std::vector<int> parse_cpu_list(std::string_view text);

// Reads the memory nodes under `root` (laid out like /sys/devices/system/node), in ascending order; empty when the
// kernel does not tell.
std::vector<NumaNode> read_numa_nodes(const std::filesystem::path& root);

CpuInfo read_cpu_info();

}  // namespace moe_fx::cpu
