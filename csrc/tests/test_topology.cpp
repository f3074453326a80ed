// The language of MOE_FX_NUMA and MOE_FX_THREADS, and the topology of the machine that runs the tests.

#include <doctest/doctest.h>
#include <stdlib.h>

#include <algorithm>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>

#include "cpu/cpu_info.h"
#include "cpu/topology.h"

namespace moe_fx::cpu {
namespace {

// Sets a variable of the environment while it lives; no value unsets it.
class ScopedEnv {
 public:
  ScopedEnv(const char* name, const std::optional<std::string>& value) : name_(name) {
    if (const char* const before = getenv(name)) before_ = before;
    set(value);
  }
  ~ScopedEnv() { set(before_); }
  ScopedEnv(const ScopedEnv&) = delete;
  ScopedEnv& operator=(const ScopedEnv&) = delete;

 private:
  void set(const std::optional<std::string>& value) {
    if (value) {
      setenv(name_, value->c_str(), 1);
    } else {
      unsetenv(name_);
    }
  }

  const char* name_;
  std::optional<std::string> before_;
};

using Cpus = std::vector<int>;

const Cpus kEight{0, 1, 2, 3, 4, 5, 6, 7};

std::vector<Cpus> cpus_of(const Topology& topology) {
  std::vector<Cpus> lists;
  for (const TopologyNode& node : topology.nodes) {
    lists.push_back(node.cpus);
  }
  return lists;
}

std::string complaint(const std::string& text, const Cpus& allowed) {
  try {
    parse_topology(text, allowed);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return {};
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

TEST_CASE("parse_topology reads one node per list, bound to no memory") {
  const Topology topology = parse_topology("0-2; 5,4 ;7", kEight);
  CHECK(topology.made_up);
  CHECK(cpus_of(topology) == std::vector<Cpus>{{0, 1, 2}, {4, 5}, {7}});
  for (const TopologyNode& node : topology.nodes) {
    CHECK(node.memory_node == -1);
  }
}

TEST_CASE("parse_topology reads a single list and off") {
  CHECK(cpus_of(parse_topology("3", kEight)) == std::vector<Cpus>{{3}});

  const Cpus allowed = read_cpu_info().allowed_cpus;
  const Topology off = parse_topology("off", allowed);
  CHECK(off.made_up);
  REQUIRE(off.nodes.size() == 1);
  CHECK(off.nodes[0].memory_node == -1);
  CHECK(static_cast<int>(off.nodes[0].cpus.size()) == read_cpu_info().physical_cores);
  CHECK(std::includes(allowed.begin(), allowed.end(), off.nodes[0].cpus.begin(), off.nodes[0].cpus.end()));
}

TEST_CASE("parse_topology says what is wrong and what is right") {
  const struct {
    const char* text;
    const char* reason;
  } cases[] = {
      {"", "list 1 is empty"},
      {"0;", "list 2 is empty"},
      {"0-1;;2", "list 2 is empty"},
      {"0-1;x", "in list 2, cannot read the CPU list 'x'"},
      {"on", "'on' is neither a number nor a range"},
      {"0-3;3-4", "CPU 3 is in more than one node"},
      {"0-9", "this process may not run on CPU 8, only on 0-7"},
  };
  for (const auto& [text, reason] : cases) {
    CAPTURE(text);
    const std::string message = complaint(text, kEight);
    CHECK_MESSAGE(contains(message, reason), message);
    CHECK(contains(message, "MOE_FX_NUMA='" + std::string(text) + "'"));
    CHECK(contains(message, "for example 0-3;4-7, or off"));
  }
  CHECK(contains(complaint("4", {0, 1, 2, 5, 7, 8}), "only on 0-2,5,7-8"));
}

TEST_CASE("limited takes CPUs from the nodes in turn") {
  const Topology two{{{0, {0, 1, 2, 3}}, {1, {4, 5, 6, 7}}}, false};
  CHECK(cpus_of(limited(two, 4)) == std::vector<Cpus>{{0, 1}, {4, 5}});
  CHECK(cpus_of(limited(two, 5)) == std::vector<Cpus>{{0, 1, 2}, {4, 5}});
  CHECK(cpus_of(limited(two, 8)) == cpus_of(two));
  CHECK(cpus_of(limited(two, 1000)) == cpus_of(two));
  CHECK(limited(two, 4).nodes[1].memory_node == 1);

  CHECK(cpus_of(limited(two, 1)) == std::vector<Cpus>{{0}});

  const Topology uneven{{{0, {0}}, {1, {1, 2, 3}}}, true};
  CHECK(cpus_of(limited(uneven, 3)) == std::vector<Cpus>{{0}, {1, 2}});
  CHECK(limited(uneven, 3).made_up);
}

TEST_CASE("the machine's topology has one allowed CPU per physical core") {
  const ScopedEnv numa("MOE_FX_NUMA", std::nullopt);
  const ScopedEnv threads("MOE_FX_THREADS", std::nullopt);
  const CpuInfo info = read_cpu_info();
  const Topology topology = current_topology();
  CHECK_FALSE(topology.made_up);
  REQUIRE_FALSE(topology.nodes.empty());
  std::set<int> cpus;
  for (const TopologyNode& node : topology.nodes) {
    CHECK_FALSE(node.cpus.empty());
    for (const int cpu : node.cpus) {
      CHECK(cpus.insert(cpu).second);
      CHECK(std::binary_search(info.allowed_cpus.begin(), info.allowed_cpus.end(), cpu));
    }
  }
  CHECK(static_cast<int>(cpus.size()) == info.physical_cores);
}

TEST_CASE("the environment overrides the machine's topology") {
  const std::string cpu = std::to_string(read_cpu_info().allowed_cpus.front());
  const ScopedEnv numa("MOE_FX_NUMA", cpu);
  const ScopedEnv no_threads("MOE_FX_THREADS", std::nullopt);
  const Topology topology = current_topology();
  CHECK(topology.made_up);
  CHECK(cpus_of(topology) == std::vector<Cpus>{{std::stoi(cpu)}});
  {
    const ScopedEnv empty("MOE_FX_NUMA", "");
    CHECK_FALSE(current_topology().made_up);
    const ScopedEnv one("MOE_FX_THREADS", "1");
    const Topology single = current_topology();
    REQUIRE(single.nodes.size() == 1);
    CHECK(single.nodes[0].cpus.size() == 1);
  }
  for (const char* const wrong : {"0", "-1", "two", "4x", "99999999999"}) {
    CAPTURE(wrong);
    const ScopedEnv threads("MOE_FX_THREADS", wrong);
    try {
      current_topology();
      FAIL("not refused");
    } catch (const std::invalid_argument& error) {
      CHECK(contains(error.what(), "MOE_FX_THREADS='" + std::string(wrong) + "'"));
      CHECK(contains(error.what(), "1 or more"));
    }
  }
}

}  // namespace
}  // namespace moe_fx::cpu
