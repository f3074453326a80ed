// Memory for weights: huge pages, placed on memory nodes.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace moe_fx::cpu {

inline constexpr std::size_t kHugePage = std::size_t{2} << 20;

// Anonymous memory of the operating system, aligned to 2 MiB, asked to be of huge pages, zeroed.
class HugeBuffer {
 public:
  // Throws std::bad_alloc.
  explicit HugeBuffer(std::size_t bytes);
  ~HugeBuffer();
  HugeBuffer(HugeBuffer&& other) noexcept;
  HugeBuffer& operator=(HugeBuffer&& other) noexcept;

  std::uint8_t* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  std::uint8_t* data_ = nullptr;  // null only when moved from or of no bytes
  std::size_t size_ = 0;
};

// Binds the whole pages of [begin, begin + bytes) to a memory node, and moves those that are elsewhere. False where the
// system does not do that (or node < 0).
bool bind_to_node(void* begin, std::size_t bytes, int node);

// Turns the pages of a range's inside, from the first to the last boundary of 2 MiB in it, into huge pages where they
// lie, contents unchanged. False where the system does not do that for all of them, or where there are none.
bool make_huge(void* begin, std::size_t bytes);

// The node of every page-sized step of a range (-1 for a page that is not in memory), as the system tells; empty when
// it does not. `step` is the bytes between one look and the next.
std::vector<int> nodes_of_pages(const void* begin, std::size_t bytes, std::size_t step);

}  // namespace moe_fx::cpu
