// The limit that weights are read against: the machine's streaming-read bandwidth.

#pragma once

#include <cstddef>
#include <cstdint>

namespace moe_fx::cpu {

// Reads `bytes` bytes (in whole KiB) once, on `threads` threads of the team that experts run on; seconds taken. Each
// thread reads a contiguous share, prefetching into the second-level cache: of the patterns tried (pieces in turn or
// contiguous, no, near, far and non-temporal prefetching, 1 to 8 KiB ahead), the fastest on the development machine.
double streaming_read_seconds(const std::uint8_t* data, std::size_t bytes, int threads);

}  // namespace moe_fx::cpu
