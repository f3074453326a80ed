// Launches through torch_npu's task queue: the host enqueues and goes on, a thread of torch_npu launches.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace moe_fx::ascendc {

// What the kernels have against the current device, which they may not be compiled for; empty for nothing.
std::string device_refusal();

// Vector cores that a launch on the current stream may use.
uint32_t vector_cores();

// Bytes of a vector core's unified buffer that a kernel may use.
uint32_t unified_buffer_bytes();

// Runs `launch` with the current stream after everything that was enqueued before. The queue is not drained: a call
// never waits, and can be captured into a graph.
//
// `tensors` are kept until then: what the launch reads and writes, its workspace included, whose memory goes back to
// the caching allocator, and so to later work of the same stream only, once the launch is in the stream.
void enqueue(const char* name, std::vector<at::Tensor> tensors, std::function<void(void* stream)> launch);

}  // namespace moe_fx::ascendc
