// moe_fx_ascend::gemv_w4a16 on NPU tensors; its schema and what it means are in lowering/ascend/w4a16.py.

#include "tiling/gemv_w4a16.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "launch/launch.h"
#include "torch/checks.h"
#include "torch/operands.h"
#include "torch/queue.h"

namespace moe_fx::ascendc {
namespace {

constexpr const char* kName = "gemv_w4a16";
constexpr int64_t kPerWord = 8;  // int4 values of an int32

at::Tensor gemv_w4a16(const at::Tensor& given_x, const at::Tensor& weight, const at::Tensor& scale,
                      const std::optional<at::Tensor>& offset) {
  const at::Tensor x = given_x.contiguous();
  const Checks check(kName, x);
  const at::ScalarType dtype = x.scalar_type();
  check.tensor("x", x, {kAnySize, kAnySize}, {at::kHalf, at::kBFloat16});
  const int64_t tokens = x.size(0), rows = x.size(1);
  check.tensor("scale", scale, {kAnySize, kAnySize}, dtype);
  const int64_t columns = scale.size(1);
  check.tensor("weight", weight, {rows, columns / kPerWord}, at::kInt);
  const int64_t group = check.group("scale", rows, scale.size(0));
  if (offset) check.tensor("offset", *offset, scale.sizes(), dtype);

  at::Tensor y = at::empty({tokens, columns}, x.options());
  if (tokens == 0) return y;
  const uint32_t cores = vector_cores();
  const GemvW4A16Plan plan = check.plan([&] {
    return plan_gemv_w4a16({.tokens = size(tokens),
                            .rows = size(rows),
                            .columns = size(columns),
                            .group = size(group),
                            .hasOffset = offset.has_value()},
                           cores, unified_buffer_bytes());
  });
  at::Tensor workspace = at::empty({static_cast<int64_t>(plan.workspaceBytes)}, x.options().dtype(at::kByte));
  const GemvW4A16Operands operands{.dtype = dtype_of(x),
                                   .x = x.data_ptr(),
                                   .weight = weight.data_ptr(),
                                   .scale = scale.data_ptr(),
                                   .offset = data_of(offset),
                                   .y = y.data_ptr(),
                                   .workspace = workspace.data_ptr()};
  enqueue(kName, {x, weight, scale, tensor_of(offset), y, workspace},
          [=](void* stream) { launch(stream, cores, operands, plan.tiling); });
  return y;
}

TORCH_LIBRARY_IMPL(moe_fx_ascend, PrivateUse1, library) { library.impl(kName, gemv_w4a16); }

}  // namespace
}  // namespace moe_fx::ascendc
