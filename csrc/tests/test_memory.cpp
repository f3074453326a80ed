// Huge, aligned, zeroed buffers, and the placement of their pages where the kernel lets a test see it.

#include <doctest/doctest.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <new>
#include <random>
#include <utility>
#include <vector>

#include "cpu/cpu_info.h"
#include "cpu/memory.h"

namespace moe_fx::cpu {
namespace {

constexpr std::size_t kPage = 4096;

bool all_zero(const HugeBuffer& buffer) {
  return std::all_of(buffer.data(), buffer.data() + buffer.size(), [](std::uint8_t byte) { return byte == 0; });
}

TEST_CASE("HugeBuffer is aligned, zeroed and writable to its end") {
  for (const std::size_t bytes : {std::size_t{1}, kPage + 1, kHugePage, 3 * kHugePage - 5}) {
    CAPTURE(bytes);
    HugeBuffer buffer(bytes);
    CHECK(buffer.size() == bytes);
    CHECK(reinterpret_cast<std::uintptr_t>(buffer.data()) % kHugePage == 0);
    CHECK(all_zero(buffer));
    std::memset(buffer.data(), 0x5a, bytes);
    CHECK(buffer.data()[bytes - 1] == 0x5a);
  }
}

TEST_CASE("HugeBuffer of no bytes holds nothing, and too many bytes are refused") {
  CHECK(HugeBuffer(0).size() == 0);
  CHECK_THROWS_AS(HugeBuffer(std::numeric_limits<std::size_t>::max()), std::bad_alloc);
  CHECK_THROWS_AS(HugeBuffer(std::numeric_limits<std::size_t>::max() / 4), std::bad_alloc);
}

TEST_CASE("HugeBuffer moves without copying") {
  HugeBuffer first(kHugePage);
  std::uint8_t* const data = first.data();
  data[7] = 42;
  HugeBuffer second(std::move(first));
  CHECK(second.data() == data);
  HugeBuffer third(kPage);
  third = std::move(second);
  CHECK(third.data() == data);
  CHECK(third.size() == kHugePage);
  CHECK(third.data()[7] == 42);
  HugeBuffer& same = third;
  third = std::move(same);
  CHECK(third.data() == data);
}

#if defined(__linux__)
// The address space that this process has mapped.
std::size_t mapped_bytes() {
  std::ifstream file("/proc/self/statm");
  std::size_t pages = 0;
  file >> pages;
  return pages * static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
}

TEST_CASE("HugeBuffer maps no more than it needs, and gives it back") {
  constexpr std::size_t kBuffers = 256;
  constexpr std::size_t kSlack = 32 * kHugePage;  // what malloc may take meanwhile
  const std::size_t before = mapped_bytes();
  {
    std::vector<HugeBuffer> buffers;
    for (std::size_t i = 0; i < kBuffers; ++i) {
      buffers.emplace_back(1);
    }
    CHECK(mapped_bytes() - before >= kBuffers * kHugePage);
    CHECK(mapped_bytes() - before <= kBuffers * kHugePage + kSlack);
  }
  CHECK(mapped_bytes() <= before + kSlack);
}
#endif

TEST_CASE("make_huge keeps the contents") {
  std::vector<std::uint8_t> small(4 * kHugePage);
  std::mt19937 random(1);
  for (std::size_t i = 0; i < small.size(); i += 8) {
    const std::uint64_t value = random();
    std::memcpy(small.data() + i, &value, sizeof(value));
  }
  const std::vector<std::uint8_t> before = small;
  if (!make_huge(small.data() + 1, small.size() - 1)) MESSAGE("the kernel makes no huge pages of small ones here");
  CHECK(small == before);
}

TEST_CASE("make_huge leaves a range without a whole huge page alone") {
  HugeBuffer buffer(2 * kHugePage);
  CHECK_FALSE(make_huge(buffer.data() + 1, 2 * kHugePage - 2));
  CHECK_FALSE(make_huge(buffer.data(), kPage));
}

TEST_CASE("pages lie on the node that they are bound to") {
  HugeBuffer buffer(2 * kHugePage);
  std::memset(buffer.data(), 1, kHugePage);
  const int node = read_cpu_info().numa_nodes.front().node;
  if (!bind_to_node(buffer.data(), buffer.size(), node)) {
    const int error = errno;
    MESSAGE("skipped: the kernel does not let this process bind memory (containers need CAP_SYS_NICE for it)");
    CHECK((error == EPERM || error == ENOSYS));
    return;
  }
  std::memset(buffer.data() + kHugePage, 1, kHugePage);
  const std::vector<int> nodes = nodes_of_pages(buffer.data(), buffer.size(), kPage);
  if (nodes.empty()) {
    MESSAGE("skipped: the kernel does not tell where pages lie");
    return;
  }
  CHECK(nodes.size() == 2 * kHugePage / kPage);
  CHECK(std::count(nodes.begin(), nodes.end(), node) == static_cast<std::ptrdiff_t>(nodes.size()));
}

TEST_CASE("pages move when they are bound to another node") {
  const std::vector<NumaNode> nodes = read_cpu_info().numa_nodes;
  if (nodes.size() < 2 || nodes[1].memory_bytes == 0) {
    MESSAGE("skipped: one memory node");
    return;
  }
  HugeBuffer buffer(kHugePage);
  std::memset(buffer.data(), 1, buffer.size());
  for (const NumaNode& node : {nodes[1], nodes[0]}) {
    if (!bind_to_node(buffer.data(), buffer.size(), node.node)) {
      MESSAGE("skipped: the kernel does not let this process bind memory (containers need CAP_SYS_NICE for it)");
      return;
    }
    for (const int found : nodes_of_pages(buffer.data(), buffer.size(), kPage)) {
      CHECK(found == node.node);
    }
  }
}

TEST_CASE("untouched pages are on no node, and nodes that cannot be are refused") {
  HugeBuffer buffer(2 * kHugePage);
  buffer.data()[0] = 1;
  const std::vector<int> nodes = nodes_of_pages(buffer.data(), buffer.size(), kHugePage);
  if (!nodes.empty()) {
    REQUIRE(nodes.size() == 2);
    CHECK(nodes[0] >= 0);
    CHECK(nodes[1] == -1);
  }
  CHECK_FALSE(bind_to_node(buffer.data(), buffer.size(), -1));
  CHECK_FALSE(bind_to_node(buffer.data(), buffer.size(), 1000));
  CHECK_FALSE(bind_to_node(buffer.data(), buffer.size(), 1 << 20));
}

}  // namespace
}  // namespace moe_fx::cpu
