// The keywords of the Ascend C compiler that kernels spell, emptied for a host compiler.

#pragma once

#include <cstdint>

#define __aicore__
#define __global__
#define __gm__
#define __ubuf__
#define __cbuf__
#define __kfc_workspace__
#define __BLOCK_LOCAL__

using GM_ADDR = __gm__ uint8_t*;

// Kernels of this project run on vector cores alone.
#define ASCEND_IS_AIV constexpr(true)
#define ASCEND_IS_AIC constexpr(false)
