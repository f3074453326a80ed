// moe_fx_ascend::repack_int4 and int4_offsets on NPU tensors; their schemas and what they mean are in
// lowering/ascend/repack.py.

#include "tiling/repack_int4.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstdint>
#include <string_view>

#include "launch/launch.h"
#include "torch/checks.h"
#include "torch/operands.h"
#include "torch/queue.h"

namespace moe_fx::ascendc {
namespace {

constexpr int64_t kPerWord = 8;  // int4 values of an int32

at::Tensor repack_int4(at::TensorList packed, std::string_view layout_name) {
  constexpr const char* kName = "repack_int4";
  TORCH_CHECK_VALUE(!packed.empty(), kName, ": there is no weight");
  const Checks check(kName, packed[0]);
  const auto layout = check.choice<Int4Layout>(
      "layout", layout_name,
      {{"awq", Int4Layout::kAwq}, {"gptq", Int4Layout::kGptq}, {"compressed_tensors", Int4Layout::kCompressedTensors}});
  check.tensor("packed[0]", packed[0], {kAnySize, kAnySize, kAnySize}, at::kInt);
  // Which dimension counts inputs, and which outputs; the last one, or GPTQ's first one, counts words.
  const int64_t input_axis = layout == Int4Layout::kCompressedTensors ? 2 : 1;
  const int64_t output_axis = 3 - input_axis;
  const int64_t inputs = packed[0].size(input_axis) * (layout == Int4Layout::kAwq ? 1 : kPerWord);
  const auto outputs_of = [&](const at::Tensor& weight) {
    return weight.size(output_axis) * (layout == Int4Layout::kAwq ? kPerWord : 1);
  };
  int64_t merged = 0;
  for (const at::Tensor& weight : packed) {
    at::DimVector sizes(packed[0].sizes());
    sizes[output_axis] = kAnySize;
    check.tensor("each of packed", weight, sizes, at::kInt);
    merged += outputs_of(weight);
  }

  const int64_t experts = packed[0].size(0);
  at::Tensor result = at::empty({experts, inputs, merged / kPerWord}, packed[0].options());
  int64_t first = 0;
  for (const at::Tensor& weight : packed) {
    const int64_t outputs = outputs_of(weight);
    const RepackInt4Plan plan = check.plan([&] {
      return plan_repack_int4({.layout = layout,
                               .experts = experts,
                               .inputs = inputs,
                               .outputs = outputs,
                               .firstOutput = first,
                               .mergedOutputs = merged},
                              vector_cores(), unified_buffer_bytes());
    });
    const RepackInt4Operands operands{.layout = layout, .packed = weight.data_ptr(), .weight = result.data_ptr()};
    enqueue(kName, {weight, result}, [=](void* stream) { launch(stream, plan.cores, operands, plan.tiling); });
    first += outputs;
  }
  return result;
}

at::Tensor int4_offsets(at::TensorList zeros, std::string_view layout_name, at::ScalarType dtype) {
  constexpr const char* kName = "int4_offsets";
  enum class Form { kAwq, kGptq, kGptqV2 };
  TORCH_CHECK_VALUE(!zeros.empty(), kName, ": there are no zero points");
  const Checks check(kName, zeros[0]);
  const auto form = check.choice<Form>("layout", layout_name,
                                       {{"awq", Form::kAwq}, {"gptq", Form::kGptq}, {"gptq_v2", Form::kGptqV2}});
  if (dtype != at::kHalf && dtype != at::kBFloat16) check.refuse("dtype must be float16 or bfloat16");
  int64_t merged = 0;
  check.tensor("zeros[0]", zeros[0], {kAnySize, kAnySize, kAnySize}, at::kInt);
  const int64_t experts = zeros[0].size(0), groups = zeros[0].size(1);
  for (const at::Tensor& words : zeros) {
    check.tensor("each of zeros", words, {experts, groups, kAnySize}, at::kInt);
    merged += words.size(2) * kPerWord;
  }

  at::Tensor offsets = at::empty({experts, groups, merged}, zeros[0].options().dtype(dtype));
  int64_t first = 0;
  for (const at::Tensor& words : zeros) {
    const int64_t outputs = words.size(2) * kPerWord;
    const RepackInt4Plan plan = check.plan([&] {
      return plan_zero_points({.awqOrder = form == Form::kAwq,
                               .experts = experts,
                               .groups = groups,
                               .outputs = outputs,
                               .firstOutput = first,
                               .mergedOutputs = merged,
                               .less = form == Form::kGptq},
                              vector_cores(), unified_buffer_bytes());
    });
    const ZeroPointsOperands operands{.dtype = dtype_of(offsets),
                                      .awqOrder = form == Form::kAwq,
                                      .zeros = words.data_ptr(),
                                      .offsets = offsets.data_ptr()};
    enqueue(kName, {words, offsets}, [=](void* stream) { launch(stream, plan.cores, operands, plan.tiling); });
    first += outputs;
  }
  return offsets;
}

TORCH_LIBRARY_IMPL(moe_fx_ascend, PrivateUse1, library) {
  library.impl("repack_int4", repack_int4);
  library.impl("int4_offsets", int4_offsets);
}

}  // namespace
}  // namespace moe_fx::ascendc
