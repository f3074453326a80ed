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
// A kernel of a library that launches on the stand-in's streams; returns what went wrong, or null. While a graph is
// captured nothing may run: the launch becomes part of the graph, whose replays call the kernel with the same
// arguments. Returns whether it did; if not, the caller runs the kernel.
typedef const char* (*host_cann_kernel)(void* arguments);
int host_cann_capture_launch(host_cann_kernel kernel, void* arguments);
// The allocation that an address lies in, as exactly as it was asked for; null where there is none.
void host_cann_allocation(const void* address, void** base, uint64_t* bytes);
// What went wrong, for aclGetRecentErrMsg.
void host_cann_set_error(const char* message);
// What operators take and give: lines "in x required", "in b optional", "out y required", "attr k VT_INT".
void host_cann_register_ir(const char* op, const char* spec);
// Operators that GE runs by calling them. `execute` fills `made`, with memory from `allocate`, and returns 0 for success.
typedef void* (*host_cann_allocate)(uint64_t bytes);
typedef int (*host_cann_execute)(const char* op, int n, const HostTensor* inputs, HostTensor* made,
                                 host_cann_allocate allocate);
int host_cann_register_custom_op(const char* op, host_cann_execute execute);
// The same for the operator of that name; -1 where there is none.
int host_cann_run_custom_op(const char* op, int n, const HostTensor* inputs, HostTensor* made,
                            host_cann_allocate allocate);
// Vector cores of the device.
int64_t host_cann_vector_cores();
}
