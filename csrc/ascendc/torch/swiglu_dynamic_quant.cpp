// moe_fx_ascend::swiglu_dynamic_quant on NPU tensors; its schema and what it means are in
// lowering/ascend/swiglu_quant.py.

#include "tiling/swiglu_dynamic_quant.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "launch/launch.h"
#include "torch/checks.h"
#include "torch/operands.h"
#include "torch/queue.h"

namespace moe_fx::ascendc {
namespace {

constexpr const char* kName = "swiglu_dynamic_quant";

std::tuple<at::Tensor, at::Tensor> swiglu_dynamic_quant(const at::Tensor& given_x, std::optional<double> limit) {
  const at::Tensor x = given_x.contiguous();
  const Checks check(kName, x);
  check.tensor("x", x, {kAnySize, kAnySize}, {at::kHalf, at::kBFloat16});
  const int64_t tokens = x.size(0), columns = x.size(1) / 2;
  if (x.size(1) % 2) check.refuse("x has " + std::to_string(x.size(1)) + " columns, which gate and up cannot share");

  at::Tensor y = at::empty({tokens, columns}, x.options().dtype(at::kChar));
  at::Tensor scale = at::empty({tokens}, x.options().dtype(at::kFloat));
  if (tokens == 0) return {y, scale};
  const SwigluDynamicQuantPlan plan = check.plan([&] {
    return plan_swiglu_dynamic_quant({.tokens = tokens,
                                      .columns = columns,
                                      .hasLimit = limit.has_value(),
                                      .limit = static_cast<float>(limit.value_or(0.0))},
                                     vector_cores(), unified_buffer_bytes());
  });
  const SwigluDynamicQuantOperands operands{
      .dtype = dtype_of(x), .x = x.data_ptr(), .y = y.data_ptr(), .scale = scale.data_ptr()};
  enqueue(kName, {x, y, scale}, [=](void* stream) { launch(stream, plan.cores, operands, plan.tiling); });
  return {y, scale};
}

TORCH_LIBRARY_IMPL(moe_fx_ascend, PrivateUse1, library) { library.impl(kName, swiglu_dynamic_quant); }

}  // namespace
}  // namespace moe_fx::ascendc
