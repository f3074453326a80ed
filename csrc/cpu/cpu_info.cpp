// Reads what the operating system tells about the host; see cpu_info.h.

#include "cpu/cpu_info.h"

#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstring>
#include <fstream>
#include <iterator>
#include <numeric>
#include <set>
#include <stdexcept>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace moe_fx::cpu {

namespace fs = std::filesystem;

namespace {

// Far above any machine; it keeps a mistyped range from filling memory.
constexpr int kMaxCpu = 65535;

std::string_view trimmed(std::string_view text) {
  constexpr std::string_view blanks = " \t\r\n";
  const std::size_t first = text.find_first_not_of(blanks);
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(blanks) - first + 1);
}

// The whole file, trimmed; empty when it cannot be read.
std::string read_text(const fs::path& path) {
  std::ifstream file(path);
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  return std::string(trimmed(text));
}

// The number that `text` starts with, and where the rest begins; no value when it starts with none.
struct LeadingNumber {
  std::optional<std::uint64_t> value;
  std::string_view rest;
};

LeadingNumber leading_number(std::string_view text) {
  std::uint64_t value = 0;
  const char* const last = text.data() + text.size();
  const auto [end, error] = std::from_chars(text.data(), last, value);
  if (error != std::errc{}) return {std::nullopt, text};
  return {value, text.substr(static_cast<std::size_t>(end - text.data()))};
}

// The value of a "key : value" line, as in /proc/cpuinfo and a node's meminfo. `key` matches the end of the left side,
// since meminfo puts "Node 0 " before it.
std::string_view field(std::string_view text, std::string_view key) {
  while (!text.empty()) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    const std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    const std::size_t colon = line.find(':');
    if (colon == std::string_view::npos) continue;
    if (trimmed(line.substr(0, colon)).ends_with(key)) return trimmed(line.substr(colon + 1));
  }
  return {};
}

// The number of an entry such as "node12" or "index3"; no value for any other name.
std::optional<int> numbered(const fs::path& entry, std::string_view prefix) {
  const std::string name = entry.filename().string();
  if (!name.starts_with(prefix)) return std::nullopt;
  const auto [value, rest] = leading_number(std::string_view(name).substr(prefix.size()));
  if (!value || !rest.empty()) return std::nullopt;
  return static_cast<int>(*value);
}

std::vector<fs::path> entries(const fs::path& folder) {
  std::error_code error;
  const fs::directory_iterator listing(folder, error);
  if (error) return {};
  return {begin(listing), end(listing)};
}

std::string machine_architecture() {
  utsname name{};
  return uname(&name) == 0 ? name.machine : "";
}

std::vector<int> allowed_cpus() {
#if defined(__linux__)
  cpu_set_t* const set = CPU_ALLOC(kMaxCpu + 1);
  const std::size_t bytes = CPU_ALLOC_SIZE(kMaxCpu + 1);
  std::vector<int> cpus;
  if (set != nullptr && sched_getaffinity(0, bytes, set) == 0) {
    for (int cpu = 0; cpu <= kMaxCpu; ++cpu) {
      if (CPU_ISSET_S(cpu, bytes, set)) cpus.push_back(cpu);
    }
  }
  CPU_FREE(set);
  if (!cpus.empty()) return cpus;
#endif
  std::vector<int> all(std::max(1U, std::thread::hardware_concurrency()));
  std::iota(all.begin(), all.end(), 0);
  return all;
}

fs::path cpu_folder(int cpu) { return "/sys/devices/system/cpu/cpu" + std::to_string(cpu); }

// Logical CPUs that name the same siblings share a core; one that names none is taken for a core of its own.
int count_physical_cores(const std::vector<int>& cpus) {
  std::set<std::string> cores;
  for (const int cpu : cpus) {
    const std::string siblings = read_text(cpu_folder(cpu) / "topology" / "thread_siblings_list");
    cores.insert(siblings.empty() ? std::to_string(cpu) : siblings);
  }
  return static_cast<int>(cores.size());
}

// The size of the data or unified cache at `level` as `cpu` sees it. The kernel writes it as "1024K".
std::optional<std::uint64_t> cache_bytes(int cpu, std::string_view level) {
  for (const fs::path& index : entries(cpu_folder(cpu) / "cache")) {
    if (!numbered(index, "index") || read_text(index / "level") != level) continue;
    if (read_text(index / "type") == "Instruction") continue;
    const std::string size = read_text(index / "size");
    const auto [value, unit] = leading_number(size);
    if (value && unit == "K") return *value << 10;
    if (value && unit == "M") return *value << 20;
  }
  return std::nullopt;
}

// The kernel marks the mode in force: "always [madvise] never".
std::string transparent_huge_page_mode() {
  const std::string modes = read_text("/sys/kernel/mm/transparent_hugepage/enabled");
  const std::size_t open = modes.find('[');
  const std::size_t close = modes.find(']');
  if (open == std::string::npos || close == std::string::npos) return {};
  return modes.substr(open + 1, close - open - 1);
}

std::uint64_t installed_memory_bytes() {
  const long pages = sysconf(_SC_PHYS_PAGES);
  const long page_bytes = sysconf(_SC_PAGESIZE);
  return pages > 0 && page_bytes > 0 ? static_cast<std::uint64_t>(pages) * static_cast<std::uint64_t>(page_bytes) : 0;
}

struct Identity {
  std::string vendor;
  std::string brand;
};

#if defined(__x86_64__)

Identity identity() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(0, &eax, &ebx, &ecx, &edx)) return {};
  char vendor[12];
  std::memcpy(vendor, &ebx, 4);
  std::memcpy(vendor + 4, &edx, 4);
  std::memcpy(vendor + 8, &ecx, 4);

  std::string brand;
  for (unsigned leaf = 0x80000002; leaf <= 0x80000004; ++leaf) {
    unsigned words[4];
    if (!__get_cpuid(leaf, &words[0], &words[1], &words[2], &words[3])) break;
    brand.append(reinterpret_cast<const char*>(words), sizeof(words));
  }
  brand.resize(std::strlen(brand.c_str()));  // the processor pads it with zeros
  return {std::string(vendor, sizeof(vendor)), std::string(trimmed(brand))};
}

#else

// Arm cores carry numbers, not names: the implementer's is looked up, the part's is shown as it is.
Identity identity() {
  struct Implementer {
    std::string_view code, name;
  };
  static constexpr Implementer implementers[] = {
      {"0x41", "Arm"},      {"0x46", "Fujitsu"}, {"0x48", "HiSilicon"}, {"0x4e", "NVIDIA"}, {"0x50", "Ampere"},
      {"0x51", "Qualcomm"}, {"0x61", "Apple"},   {"0x70", "Phytium"},   {"0xc0", "Ampere"},
  };
  const std::string text = read_text("/proc/cpuinfo");
  std::string vendor(field(text, "CPU implementer"));
  for (const Implementer& known : implementers) {
    if (vendor == known.code) vendor = known.name;
  }
  std::string brand(field(text, "model name"));
  const std::string_view part = field(text, "CPU part");
  if (brand.empty() && !part.empty()) brand = vendor + " part " + std::string(part);
  return {vendor, brand};
}

#endif

}  // namespace

std::vector<int> parse_cpu_list(std::string_view text) {
  const auto fail = [text](std::string_view item, const std::string& reason) {
    throw std::invalid_argument("cannot read the CPU list '" + std::string(text) + "': '" + std::string(item) + "' " +
                                reason + "; write CPU numbers and ranges separated by commas, for example 0-3,8,10-11");
  };
  const auto number = [&fail](std::string_view digits, std::string_view item) {
    const auto [value, rest] = leading_number(digits);
    if (!value || !rest.empty()) fail(item, "is neither a number nor a range");
    if (*value > kMaxCpu) fail(item, "names a CPU above " + std::to_string(kMaxCpu));
    return static_cast<int>(*value);
  };

  std::string_view left = trimmed(text);
  if (left.empty()) return {};
  std::vector<int> cpus;
  while (true) {
    const std::size_t comma = left.find(',');
    const std::string_view item = left.substr(0, comma);
    const std::size_t dash = item.find('-');
    const int first = number(item.substr(0, dash), item);
    const int last = dash == std::string_view::npos ? first : number(item.substr(dash + 1), item);
    if (last < first) fail(item, "runs backwards");
    for (int cpu = first; cpu <= last; ++cpu) {
      cpus.push_back(cpu);
    }
    if (comma == std::string_view::npos) break;
    left.remove_prefix(comma + 1);
  }
  std::sort(cpus.begin(), cpus.end());
  cpus.erase(std::unique(cpus.begin(), cpus.end()), cpus.end());
  return cpus;
}

std::vector<NumaNode> read_numa_nodes(const fs::path& root) {
  std::vector<NumaNode> nodes;
  for (const fs::path& folder : entries(root)) {
    const std::optional<int> node = numbered(folder, "node");
    if (!node) continue;
    const std::string meminfo = read_text(folder / "meminfo");
    const std::uint64_t kib = leading_number(field(meminfo, "MemTotal")).value.value_or(0);
    nodes.push_back({*node, parse_cpu_list(read_text(folder / "cpulist")), kib << 10});
  }
  std::sort(nodes.begin(), nodes.end(), [](const NumaNode& a, const NumaNode& b) { return a.node < b.node; });
  return nodes;
}

CpuInfo read_cpu_info() {
  CpuInfo info;
  auto [vendor, brand] = identity();
  info.architecture = machine_architecture();
  info.vendor = std::move(vendor);
  info.brand = std::move(brand);
  info.isa = detect_isa();
  info.allowed_cpus = allowed_cpus();
  info.physical_cores = count_physical_cores(info.allowed_cpus);
  info.l2_bytes = cache_bytes(info.allowed_cpus.front(), "2");
  info.l3_bytes = cache_bytes(info.allowed_cpus.front(), "3");
  info.transparent_huge_pages = transparent_huge_page_mode();
  info.numa_nodes = read_numa_nodes("/sys/devices/system/node");
  if (info.numa_nodes.empty()) info.numa_nodes.push_back({0, info.allowed_cpus, installed_memory_bytes()});
  return info;
}

}  // namespace moe_fx::cpu
