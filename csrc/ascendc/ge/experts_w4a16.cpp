// The GE operator MoeFxExpertsW4A16: moe_fx_ascend::experts_w4a16 in graphs that torchair converts to GE, with the
// operands of that operator by name. GE runs it by a call of Execute, which launches the same kernel.
//
// CANN has had such operators since its 9th release; CMakeLists.txt leaves this file out where it has none.

#include <acl/acl_rt.h>
#include <graph/custom_op.h>
#include <graph/operator_reg.h>
#include <register/op_impl_registry.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>

#include "launch/launch.h"
#include "tiling/moe_w4a16_decode.h"

namespace ge {

REG_OP(MoeFxExpertsW4A16)
    .INPUT(x, TensorType({DT_FLOAT16, DT_BF16}))
    .INPUT(weights, TensorType({DT_FLOAT16, DT_BF16, DT_FLOAT}))
    .INPUT(ids, TensorType({DT_INT32}))
    .INPUT(w13, TensorType({DT_INT32}))
    .INPUT(w13_scale, TensorType({DT_FLOAT16, DT_BF16}))
    .OPTIONAL_INPUT(w13_offset, TensorType({DT_FLOAT16, DT_BF16}))
    .INPUT(w2, TensorType({DT_INT32}))
    .INPUT(w2_scale, TensorType({DT_FLOAT16, DT_BF16}))
    .OPTIONAL_INPUT(w2_offset, TensorType({DT_FLOAT16, DT_BF16}))
    .OUTPUT(y, TensorType({DT_FLOAT16, DT_BF16}))
    .OP_END_FACTORY_REG(MoeFxExpertsW4A16);

}  // namespace ge

namespace moe_fx::ascendc {
namespace {

enum Input { kX, kWeights, kIds, kW13, kW13Scale, kW13Offset, kW2, kW2Scale, kW2Offset };

ge::graphStatus infer_shape(gert::InferShapeContext* context) {
  const gert::Shape* x = context->GetInputShape(kX);
  gert::Shape* y = context->GetOutputShape(0);
  if (x == nullptr || y == nullptr) return ge::GRAPH_FAILED;
  *y = *x;
  return ge::GRAPH_SUCCESS;
}

ge::graphStatus infer_data_type(gert::InferDataTypeContext* context) {
  return context->SetOutputDataType(0, context->GetInputDataType(kX));
}

IMPL_OP(MoeFxExpertsW4A16).InferShape(infer_shape).InferDataType(infer_data_type);

uint32_t size(const gert::Tensor& tensor, size_t axis) {
  return static_cast<uint32_t>(tensor.GetShape().GetStorageShape().GetDim(axis));
}

void* data(const gert::Tensor* tensor) { return tensor == nullptr ? nullptr : const_cast<void*>(tensor->GetAddr()); }

Dtype dtype_of(const gert::Tensor& tensor) {
  switch (tensor.GetDataType()) {
    case ge::DT_FLOAT16: return Dtype::kHalf;
    case ge::DT_BF16: return Dtype::kBfloat16;
    case ge::DT_FLOAT: return Dtype::kFloat;
    default: throw std::invalid_argument("activations and routing weights are float16, bfloat16 or float32");
  }
}

class MoeFxExpertsW4A16 : public ge::EagerExecuteOp {
 public:
  ge::graphStatus Execute(gert::EagerOpExecutionContext* context) override {
    try {
      run(*context);
      return ge::GRAPH_SUCCESS;
    } catch (const std::exception& error) {
      std::fprintf(stderr, "MoeFxExpertsW4A16: %s\n", error.what());
      return ge::GRAPH_FAILED;
    }
  }

 private:
  static const gert::Tensor& required(const gert::EagerOpExecutionContext& context, Input input) {
    const gert::Tensor* tensor = context.GetRequiredInputTensor(input);
    if (tensor == nullptr) throw std::invalid_argument("input " + std::to_string(input) + " is missing");
    return *tensor;
  }

  static void run(gert::EagerOpExecutionContext& context) {
    const gert::Tensor &x = required(context, kX), &weights = required(context, kWeights);
    const gert::Tensor &ids = required(context, kIds), &scale = required(context, kW13Scale);
    const gert::Tensor &w13 = required(context, kW13), &w2 = required(context, kW2);
    const gert::Tensor& w2Scale = required(context, kW2Scale);
    const gert::Tensor* offset = context.GetOptionalInputTensor(kW13Offset);
    const gert::Tensor* w2Offset = context.GetOptionalInputTensor(kW2Offset);
    gert::Tensor* y = context.MallocOutputTensor(0, x.GetShape(), x.GetFormat(), x.GetDataType());
    // Without tokens there is nothing to launch, and perhaps no memory behind y.
    if (size(x, 0) == 0) return;
    void* stream = context.GetStream();
    uint32_t cores = 0;
    if (aclrtGetStreamResLimit(stream, ACL_RT_DEV_RES_VECTOR_CORE, &cores) != ACL_SUCCESS) {
      throw std::runtime_error("the number of vector cores is unknown");
    }
    const MoeW4A16DecodePlan plan = plan_moe_w4a16_decode({.tokens = size(x, 0),
                                                           .topK = size(ids, 1),
                                                           .experts = size(w2, 0),
                                                           .hidden = size(x, 1),
                                                           .intermediate = size(w2, 1),
                                                           .group = size(x, 1) / size(scale, 1),
                                                           .hasOffset = offset != nullptr},
                                                          cores);
    void* workspace = context.MallocWorkSpace(plan.workspaceBytes);
    if (y == nullptr || workspace == nullptr) throw std::runtime_error("device memory is exhausted");
    launch(stream, cores,
           {.dtype = dtype_of(x),
            .weightsDtype = dtype_of(weights),
            .x = data(&x),
            .weights = data(&weights),
            .ids = data(&ids),
            .w13 = data(&w13),
            .w13Scale = data(&scale),
            .w13Offset = data(offset),
            .w2 = data(&w2),
            .w2Scale = data(&w2Scale),
            .w2Offset = data(w2Offset),
            .y = data(y),
            .workspace = workspace},
           plan.tiling);
  }
};

REG_AUTO_MAPPING_OP(MoeFxExpertsW4A16);

}  // namespace
}  // namespace moe_fx::ascendc
