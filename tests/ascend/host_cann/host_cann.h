// What the two halves of the stand-in share: the acl runtime (acl.cpp) and the graph engine (ge.cpp).

#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>

// HOST_CANN_DEBUG=1 prints every call that matters.
bool host_cann_debug();
#define LOG(...)                                   \
  do {                                             \
    if (host_cann_debug()) {                       \
      fprintf(stderr, "[host_cann] " __VA_ARGS__); \
      fputc('\n', stderr);                         \
    }                                              \
  } while (0)

extern "C" {
// A tensor as Python's interpreter sees it; `data` is host memory.
struct HostTensor {
  int32_t dtype;
  int32_t ndim;
  int64_t dims[16];
  void* data;
  uint64_t nbytes;
  int32_t on_device;
};
// "Device" memory, aligned as the real allocator aligns it.
void* host_cann_alloc(uint64_t bytes);
}
