// In place of CANN's header of the same name: what an operator says about shapes and dtypes, which is called and checked
// when it runs.

#pragma once

#include "graph/custom_op.h"

namespace gert {

class InferShapeContext {
 public:
  explicit InferShapeContext(const std::vector<Tensor>& inputs) : inputs_(inputs) {}
  const Shape* GetInputShape(size_t index) const { return &inputs_.at(index).GetShape().GetStorageShape(); }
  Shape* GetOutputShape(size_t) { return &output_; }

 private:
  const std::vector<Tensor>& inputs_;
  Shape output_;
};

class InferDataTypeContext {
 public:
  explicit InferDataTypeContext(const std::vector<Tensor>& inputs) : inputs_(inputs) {}
  ge::DataType GetInputDataType(size_t index) const { return inputs_.at(index).GetDataType(); }
  ge::graphStatus SetOutputDataType(size_t, ge::DataType dtype) {
    output_ = dtype;
    return ge::GRAPH_SUCCESS;
  }
  ge::DataType output() const { return output_; }

 private:
  const std::vector<Tensor>& inputs_;
  ge::DataType output_{};
};

}  // namespace gert

namespace host_cann {

class Inference {
 public:
  explicit Inference(const char* name) : name_(name) {}
  Inference InferShape(ge::graphStatus (*infer)(gert::InferShapeContext*)) const {
    checks(name_).push_back([infer](const std::vector<gert::Tensor>& inputs, const gert::Tensor& made) {
      gert::InferShapeContext context(inputs);
      const bool inferred = infer(&context) == ge::GRAPH_SUCCESS;
      return inferred && context.GetOutputShape(0)->sizes == made.GetShape().GetStorageShape().sizes;
    });
    return *this;
  }
  Inference InferDataType(ge::graphStatus (*infer)(gert::InferDataTypeContext*)) const {
    checks(name_).push_back([infer](const std::vector<gert::Tensor>& inputs, const gert::Tensor& made) {
      gert::InferDataTypeContext context(inputs);
      return infer(&context) == ge::GRAPH_SUCCESS && context.output() == made.GetDataType();
    });
    return *this;
  }

 private:
  std::string name_;
};

}  // namespace host_cann

#define IMPL_OP(name) [[maybe_unused]] static const ::host_cann::Inference inference_##name = ::host_cann::Inference(#name)
