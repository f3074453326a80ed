// moe_fx_ascend::experts_w4a16 on NPU tensors; its schema and what it means are in lowering/ascend/w4a16.py.

#include "tiling/moe_w4a16_decode.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "launch/launch.h"
#include "torch/checks.h"
#include "torch/operands.h"
#include "torch/queue.h"

namespace moe_fx::ascendc {
namespace {

constexpr const char* kName = "experts_w4a16";
constexpr int64_t kPerWord = 8;  // int4 values of an int32

at::Tensor experts_w4a16(const at::Tensor& given_x, const at::Tensor& given_weights, const at::Tensor& given_ids,
                         const at::Tensor& w13, const at::Tensor& w13_scale,
                         const std::optional<at::Tensor>& w13_offset, const at::Tensor& w2, const at::Tensor& w2_scale,
                         const std::optional<at::Tensor>& w2_offset) {
  // Activations come as views at times; weights are packed, and as large as they are.
  const at::Tensor x = given_x.contiguous(), weights = given_weights.contiguous(), ids = given_ids.contiguous();
  const Checks check(kName, x);
  const at::ScalarType dtype = x.scalar_type();
  check.tensor("x", x, {kAnySize, kAnySize}, {at::kHalf, at::kBFloat16});
  const int64_t tokens = x.size(0), hidden = x.size(1);
  check.tensor("ids", ids, {tokens, kAnySize}, at::kInt);
  check.tensor("weights", weights, {tokens, ids.size(1)}, {dtype, at::kFloat});
  check.tensor("w2", w2, {kAnySize, kAnySize, hidden / kPerWord}, at::kInt);
  const int64_t experts = w2.size(0), intermediate = w2.size(1);
  check.tensor("w13", w13, {experts, hidden, 2 * intermediate / kPerWord}, at::kInt);
  check.tensor("w13_scale", w13_scale, {experts, kAnySize, 2 * intermediate}, dtype);
  const int64_t groups = w13_scale.size(1);
  const int64_t group = check.group("w13_scale", hidden, groups);
  check.tensor("w2_scale", w2_scale, {experts, intermediate / group, hidden}, dtype);
  if (w13_offset.has_value() != w2_offset.has_value()) check.refuse("give both offsets, or none");
  if (w13_offset) {
    check.tensor("w13_offset", *w13_offset, w13_scale.sizes(), dtype);
    check.tensor("w2_offset", *w2_offset, w2_scale.sizes(), dtype);
  }

  at::Tensor y = at::empty_like(x);
  if (tokens == 0) return y;
  const uint32_t cores = vector_cores();
  const MoeW4A16DecodePlan plan = check.plan([&] {
    return plan_moe_w4a16_decode({.tokens = size(tokens),
                                  .topK = size(ids.size(1)),
                                  .experts = size(experts),
                                  .hidden = size(hidden),
                                  .intermediate = size(intermediate),
                                  .group = size(group),
                                  .hasOffset = w13_offset.has_value()},
                                 cores, unified_buffer_bytes());
  });
  at::Tensor workspace = at::empty({static_cast<int64_t>(plan.workspaceBytes)}, x.options().dtype(at::kByte));
  const MoeW4A16DecodeOperands operands{.dtype = dtype_of(x),
                                        .weightsDtype = dtype_of(weights),
                                        .x = x.data_ptr(),
                                        .weights = weights.data_ptr(),
                                        .ids = ids.data_ptr(),
                                        .w13 = w13.data_ptr(),
                                        .w13Scale = w13_scale.data_ptr(),
                                        .w13Offset = data_of(w13_offset),
                                        .w2 = w2.data_ptr(),
                                        .w2Scale = w2_scale.data_ptr(),
                                        .w2Offset = data_of(w2_offset),
                                        .y = y.data_ptr(),
                                        .workspace = workspace.data_ptr()};
  enqueue(kName,
          {x, weights, ids, w13, w13_scale, tensor_of(w13_offset), w2, w2_scale, tensor_of(w2_offset), y, workspace},
          [=](void* stream) { launch(stream, cores, operands, plan.tiling); });
  return y;
}

// What the kernel has against `tokens` tokens of such a layer; empty for nothing. Lowering asks before it chooses.
std::string experts_w4a16_refusal(int64_t tokens, int64_t hidden, int64_t intermediate, int64_t experts, int64_t top_k,
                                  int64_t groups, int64_t intermediate_groups) {
  if (std::string reason = device_refusal(); !reason.empty()) return reason;
  if (groups < 1 || hidden % groups || intermediate % (hidden / groups) ||
      intermediate / (hidden / groups) != intermediate_groups) {
    return std::to_string(groups) + " groups of " + std::to_string(hidden) + " inputs and " +
           std::to_string(intermediate_groups) + " of " + std::to_string(intermediate) + " are not of one size";
  }
  try {
    plan_moe_w4a16_decode({.tokens = size(tokens),
                           .topK = size(top_k),
                           .experts = size(experts),
                           .hidden = size(hidden),
                           .intermediate = size(intermediate),
                           .group = size(hidden / groups),
                           .hasOffset = true},
                          vector_cores(), unified_buffer_bytes());
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

// Whether the library brings the GE operator MoeFxExpertsW4A16.
bool experts_w4a16_in_ge() { return MOE_FX_GE_OPERATORS; }

TORCH_LIBRARY_FRAGMENT(moe_fx_ascend, library) {
  library.def("experts_w4a16_refusal", experts_w4a16_refusal);
  library.def("experts_w4a16_in_ge", experts_w4a16_in_ge);
}
TORCH_LIBRARY_IMPL(moe_fx_ascend, PrivateUse1, library) { library.impl(kName, experts_w4a16); }

}  // namespace
}  // namespace moe_fx::ascendc
