// Host pointers to global memory as the arguments of a kernel.

#pragma once

#include <cstdint>

namespace moe_fx::ascendc {

inline uint8_t* address(void* pointer) { return static_cast<uint8_t*>(pointer); }

}  // namespace moe_fx::ascendc
