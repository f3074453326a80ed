// The launches of all kernels, as host code calls them: into a stream, with addresses in global memory. Nothing is
// waited for, and tiling travels by value, so that a captured launch needs nothing of the host's any more.

#pragma once

#include <cstdint>

#include "tiling/gemv_w4a16.h"
#include "tiling/moe_gating_topk_tiling.h"
#include "tiling/moe_w4a16_decode.h"
#include "tiling/repack_int4_tiling.h"
#include "tiling/swiglu_dynamic_quant_tiling.h"

namespace moe_fx::ascendc {

// Of activations and routing weights; each kernel says which it takes.
enum class Dtype { kHalf, kBfloat16, kFloat };

struct MoeW4A16DecodeOperands {
  Dtype dtype;         // of x, scales, offsets and y: half or bfloat16
  Dtype weightsDtype;  // the same, or float
  void *x, *weights, *ids;
  void *w13, *w13Scale, *w13Offset;
  void *w2, *w2Scale, *w2Offset;
  void *y, *workspace;
};

struct GemvW4A16Operands {
  Dtype dtype;  // half or bfloat16
  void *x, *weight, *scale, *offset;
  void *y, *workspace;
};

struct MoeGatingTopkOperands {
  Dtype dtype;  // of logits
  void *logits, *bias;
  void *weights, *ids;
};

struct SwigluDynamicQuantOperands {
  Dtype dtype;  // of x: half or bfloat16
  void* x;
  void *y, *scale;
};

struct RepackInt4Operands {
  Int4Layout layout;
  void *packed, *weight;
};

struct ZeroPointsOperands {
  Dtype dtype;  // of offsets: half or bfloat16
  bool awqOrder;
  void *zeros, *offsets;
};

void launch(void* stream, uint32_t cores, const MoeW4A16DecodeOperands& operands, const MoeW4A16DecodeTiling& tiling);
void launch(void* stream, uint32_t cores, const GemvW4A16Operands& operands, const GemvW4A16Tiling& tiling);
void launch(void* stream, uint32_t cores, const MoeGatingTopkOperands& operands, const MoeGatingTopkTiling& tiling);
void launch(void* stream, uint32_t cores, const SwigluDynamicQuantOperands& operands,
            const SwigluDynamicQuantTiling& tiling);
void launch(void* stream, uint32_t cores, const RepackInt4Operands& operands, const RepackInt4Tiling& tiling);
void launch(void* stream, uint32_t cores, const ZeroPointsOperands& operands, const RepackInt4Tiling& tiling);

}  // namespace moe_fx::ascendc
