// Maps, binds and examines pages with the kernel's own calls, so that no NUMA library is needed; see memory.h.

#include "cpu/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <limits>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/syscall.h>
#endif

namespace moe_fx::cpu {

namespace {

std::uintptr_t address(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

std::uintptr_t up(std::uintptr_t value, std::size_t step) { return (value + step - 1) / step * step; }

#if defined(__linux__)

// From the kernel's linux/mempolicy.h and asm-generic/mman-common.h; older headers of the C library lack them.
constexpr unsigned long kBind = 2;  // MPOL_BIND
constexpr unsigned kMove = 1 << 1;  // MPOL_MF_MOVE
constexpr int kCollapse = 25;       // MADV_COLLAPSE, since Linux 6.1

// The whole units of `step` bytes inside a range; empty when there is none.
struct Inside {
  void* begin = nullptr;
  std::size_t bytes = 0;
};

Inside inside(void* begin, std::size_t bytes, std::size_t step) {
  const std::uintptr_t first = up(address(begin), step);
  const std::uintptr_t last = (address(begin) + bytes) / step * step;
  if (first >= last) return {};
  return {reinterpret_cast<void*>(first), last - first};
}

#endif

}  // namespace

HugeBuffer::HugeBuffer(std::size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  if (bytes > std::numeric_limits<std::size_t>::max() - 2 * kHugePage) throw std::bad_alloc();
  // One huge page more than needed holds an aligned range somewhere; what lies around it is given back.
  const std::size_t kept = up(bytes, kHugePage);
  const std::size_t mapped = kept + kHugePage;
  void* const mapping = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  const std::uintptr_t begin = up(address(mapping), kHugePage);
  const std::size_t before = begin - address(mapping);
  const std::size_t after = mapped - before - kept;
  if (before > 0) munmap(mapping, before);
  if (after > 0) munmap(reinterpret_cast<void*>(begin + kept), after);
  data_ = reinterpret_cast<std::uint8_t*>(begin);
#if defined(__linux__)
  madvise(data_, kept, MADV_HUGEPAGE);  // a wish: small pages work too
#endif
}

HugeBuffer::~HugeBuffer() {
  if (data_ != nullptr) munmap(data_, up(size_, kHugePage));
}

HugeBuffer::HugeBuffer(HugeBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

HugeBuffer& HugeBuffer::operator=(HugeBuffer&& other) noexcept {
  HugeBuffer taken(std::move(other));
  std::swap(data_, taken.data_);
  std::swap(size_, taken.size_);
  return *this;
}

#if defined(__linux__)

bool bind_to_node(void* begin, std::size_t bytes, int node) {
  constexpr int kNodes = 1024;  // the most that a kernel is built for
  constexpr int kBits = std::numeric_limits<unsigned long>::digits;
  if (node < 0 || node >= kNodes) return false;
  const Inside pages = inside(begin, bytes, static_cast<std::size_t>(sysconf(_SC_PAGESIZE)));
  if (pages.bytes == 0) return true;
  std::array<unsigned long, kNodes / kBits> mask{};
  mask[static_cast<std::size_t>(node / kBits)] = 1UL << (node % kBits);
  // The kernel looks at one bit less than it is told.
  return syscall(SYS_mbind, pages.begin, pages.bytes, kBind, mask.data(), kNodes + 1UL, kMove) == 0;
}

bool make_huge(void* begin, std::size_t bytes) {
  const Inside pages = inside(begin, bytes, kHugePage);
  if (pages.bytes == 0 || madvise(pages.begin, pages.bytes, MADV_HUGEPAGE) != 0) return false;
  // The kernel gives up for a moment when a page is in use elsewhere; what is huge already costs nothing the next time.
  constexpr int kAttempts = 3;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    if (madvise(pages.begin, pages.bytes, kCollapse) == 0) return true;
    if (errno != EAGAIN) return false;
  }
  return false;
}

std::vector<int> nodes_of_pages(const void* begin, std::size_t bytes, std::size_t step) {
  std::vector<const void*> pages;
  for (std::size_t offset = 0; offset < bytes; offset += step) {
    pages.push_back(static_cast<const std::uint8_t*>(begin) + offset);
  }
  std::vector<int> nodes(pages.size(), -1);
  if (syscall(SYS_move_pages, 0, pages.size(), pages.data(), nullptr, nodes.data(), 0) != 0) return {};
  for (int& node : nodes) {
    if (node < 0) node = -1;
  }
  return nodes;
}

#else

bool bind_to_node(void*, std::size_t, int) { return false; }

bool make_huge(void*, std::size_t) { return false; }

std::vector<int> nodes_of_pages(const void*, std::size_t, std::size_t) { return {}; }

#endif

}  // namespace moe_fx::cpu
