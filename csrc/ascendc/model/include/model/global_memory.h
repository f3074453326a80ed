// The global memory that a launch may touch: named buffers with bounds, and a shadow that knows who wrote and read
// what.
//
// Inputs are read-only and keep no shadow, so that gigabytes of weights cost nothing. The shadow of the others is kept
// by byte; in buffers of more than 1 MiB by 4 bytes, of more than 8 MiB by 32. There, two cores that write different
// bytes of such a granule count as a race.

#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <deque>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "model/hazards.h"
#include "model/report.h"

namespace ascendc_model {

enum class Access {
  kInput,   // written by the host, read by the kernel
  kOutput,  // nobody wrote it yet
  kInOut,   // written by the host, written by the kernel
};

enum class Atomic : uint8_t { kNone, kAdd, kMax, kMin };

// Somebody's access to a granule: an instruction of a pipe of a core. Zeros are nobody's.
struct Toucher {
  uint32_t time = 0;
  uint8_t core_plus_one = 0;
  Pipe pipe = kV;

  bool somebody() const { return core_plus_one != 0; }
  int core() const { return core_plus_one - 1; }
};

struct Granule {
  Toucher writer;
  Toucher readers[2];  // the latest, and the latest of another core
  Atomic atomic = Atomic::kNone;
  bool dirty = false;   // written by the scalar unit and still in its cache
  uint32_t serial = 0;  // of the write, over all cores
};

// Pages between pages that nobody may touch, for pointers that a kernel follows without a GlobalTensor.
class GuardedPages {
 public:
  explicit GuardedPages(uint64_t bytes) {
    const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    const uint64_t payload = (bytes + page - 1) / page * page;
    mapped_ = payload + 2 * page;
    void* pages = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
    pages_ = static_cast<uint8_t*>(pages);
    if (payload && mprotect(pages_ + page, payload, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
    // The end of the data lies at the guard, as closely as the alignment of tensors lets it.
    data_ = pages_ + page + (payload - bytes) / 64 * 64;
  }
  ~GuardedPages() { munmap(pages_, mapped_); }
  GuardedPages(const GuardedPages&) = delete;
  GuardedPages& operator=(const GuardedPages&) = delete;

  uint8_t* data() const { return data_; }
  bool guards(const void* address) const {
    const auto* byte = static_cast<const uint8_t*>(address);
    return byte >= pages_ && byte < pages_ + mapped_;
  }

 private:
  uint8_t* pages_;
  uint8_t* data_;
  uint64_t mapped_;
};

class Region {
 public:
  Region(std::string name, uint8_t* base, uint64_t bytes, Access access, std::unique_ptr<GuardedPages> pages)
      : name_(std::move(name)), base_(base), bytes_(bytes), access_(access), pages_(std::move(pages)) {}

  const std::string& name() const { return name_; }
  uint8_t* base() const { return base_; }
  uint64_t bytes() const { return bytes_; }
  Access access() const { return access_; }
  const GuardedPages* pages() const { return pages_.get(); }
  bool contains(const uint8_t* address) const { return address >= base_ && address < base_ + bytes_; }
  uint32_t granule_bytes() const { return bytes_ > (8u << 20) ? 32 : bytes_ > (1u << 20) ? 4 : 1; }

  Granule* granules() {
    if (!granules_) {
      const uint64_t count = bytes_ / granule_bytes() + 1;
      granules_.reset(static_cast<Granule*>(std::calloc(count, sizeof(Granule))));
      if (!granules_) throw std::bad_alloc();
    }
    return granules_.get();
  }

  // Granules written by a launch before this one.
  bool was_written(uint64_t granule) const {
    return access_ != Access::kOutput || (granule < written_.size() && written_[granule]);
  }

  // Ends a launch: everything in it is over, only what was written stays known.
  void settle() {
    if (!granules_) return;
    if (access_ == Access::kOutput) {
      const uint64_t count = bytes_ / granule_bytes() + 1;
      written_.resize(count);
      for (uint64_t i = 0; i < count; ++i) {
        if (granules_.get()[i].writer.somebody()) written_[i] = true;
      }
    }
    granules_.reset();
  }

  Traffic traffic;  // of the present launch

 private:
  struct Free {
    void operator()(Granule* granules) const { std::free(granules); }
  };

  std::string name_;
  uint8_t* base_;
  uint64_t bytes_;
  Access access_;
  std::unique_ptr<GuardedPages> pages_;
  std::unique_ptr<Granule, Free> granules_;
  std::vector<bool> written_;
};

class GlobalMemory {
 public:
  Region& allocate(std::string name, uint64_t bytes, Access access) {
    auto pages = std::make_unique<GuardedPages>(bytes);
    uint8_t* base = pages->data();
    return regions_.emplace_back(std::move(name), base, bytes, access, std::move(pages));
  }
  // Memory of the caller's, which has to outlive the launches that use it.
  Region& attach(std::string name, void* base, uint64_t bytes, Access access) {
    return regions_.emplace_back(std::move(name), static_cast<uint8_t*>(base), bytes, access, nullptr);
  }

  Region* find(const uint8_t* address) {
    if (last_ && last_->contains(address)) return last_;
    for (Region& region : regions_) {
      if (region.contains(address)) return last_ = &region;
    }
    return nullptr;
  }
  const Region* guard_of(const void* address) const {
    for (const Region& region : regions_) {
      if (region.pages() && region.pages()->guards(address)) return &region;
    }
    return nullptr;
  }
  std::deque<Region>& regions() { return regions_; }

  uint32_t serial = 0;  // of the last store of any core

 private:
  std::deque<Region> regions_;
  Region* last_ = nullptr;
};

}  // namespace ascendc_model
