// moe_fx_ascend::gating_topk on NPU tensors; the schema and what it means are in lowering/ascend/gating.py.

#include "tiling/moe_gating_topk.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>

#include "launch/launch.h"
#include "torch/checks.h"
#include "torch/operands.h"
#include "torch/queue.h"

namespace moe_fx::ascendc {
namespace {

constexpr const char* kName = "gating_topk";

std::tuple<at::Tensor, at::Tensor> gating_topk(const at::Tensor& given_logits, const std::optional<at::Tensor>& bias,
                                               int64_t top_k, std::string_view score, std::string_view order,
                                               int64_t n_group, int64_t topk_group, std::string_view group_score,
                                               std::string_view renormalize, double eps, double scale) {
  const at::Tensor logits = given_logits.contiguous();
  const Checks check(kName, logits);
  check.tensor("logits", logits, {kAnySize, kAnySize}, {at::kHalf, at::kBFloat16, at::kFloat});
  if (bias) check.tensor("bias", *bias, {logits.size(1)}, at::kFloat);
  MoeGatingTopkProblem problem;
  problem.tokens = logits.size(0);
  problem.experts = logits.size(1);
  problem.topK = top_k;
  problem.logitBytes = logits.element_size();
  problem.score = check.choice<GatingScore>("score", score,
                                            {{"softmax", GatingScore::kSoftmax},
                                             {"sigmoid", GatingScore::kSigmoid},
                                             {"sqrtsoftplus", GatingScore::kSqrtSoftplus}});
  problem.scoreAfter = check.choice<bool>("order", order, {{"before", false}, {"after", true}});
  problem.hasBias = bias.has_value();
  problem.nGroup = n_group;
  problem.topkGroup = topk_group;
  problem.groupByTop2 = check.choice<bool>("group_score", group_score, {{"max", false}, {"top2sum", true}});
  problem.renormalize = check.choice<GatingRenormalize>(
      "renormalize", renormalize,
      {{"none", GatingRenormalize::kNone}, {"eps", GatingRenormalize::kEps}, {"clamp", GatingRenormalize::kClamp}});
  problem.eps = static_cast<float>(eps);
  problem.scale = static_cast<float>(scale);

  at::Tensor weights = at::empty({problem.tokens, top_k}, logits.options().dtype(at::kFloat));
  at::Tensor ids = at::empty({problem.tokens, top_k}, logits.options().dtype(at::kInt));
  if (problem.tokens == 0) return {weights, ids};
  const MoeGatingTopkPlan plan =
      check.plan([&] { return plan_moe_gating_topk(problem, vector_cores(), unified_buffer_bytes()); });
  const MoeGatingTopkOperands operands{.dtype = dtype_of(logits),
                                       .logits = logits.data_ptr(),
                                       .bias = data_of(bias),
                                       .weights = weights.data_ptr(),
                                       .ids = ids.data_ptr()};
  enqueue(kName, {logits, tensor_of(bias), weights, ids},
          [=](void* stream) { launch(stream, plan.cores, operands, plan.tiling); });
  return {weights, ids};
}

// What the kernel has against such a router; empty for nothing. Lowering asks before it chooses.
std::string gating_topk_refusal(int64_t experts, int64_t top_k, int64_t n_group, int64_t topk_group,
                                bool group_by_top2) {
  if (std::string reason = device_refusal(); !reason.empty()) return reason;
  try {
    MoeGatingTopkProblem problem;
    problem.tokens = 1;
    problem.experts = experts;
    problem.topK = top_k;
    problem.logitBytes = sizeof(float);
    problem.nGroup = n_group;
    problem.topkGroup = topk_group;
    problem.groupByTop2 = group_by_top2;
    plan_moe_gating_topk(problem, vector_cores(), unified_buffer_bytes());
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

TORCH_LIBRARY_FRAGMENT(moe_fx_ascend, library) { library.def("gating_topk_refusal", gating_topk_refusal); }
TORCH_LIBRARY_IMPL(moe_fx_ascend, PrivateUse1, library) { library.impl(kName, gating_topk); }

}  // namespace
}  // namespace moe_fx::ascendc
