// In place of CANN's header of the same name: operators that GE runs by calling them. The stand-in's GE interpreter calls
// them through host_cann_run_custom_op.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "graph/operator_reg.h"
#include "../../../host_cann.h"

namespace ge {
using graphStatus = uint32_t;
constexpr graphStatus GRAPH_SUCCESS = 0, GRAPH_FAILED = 0xFFFFFFFF;
}  // namespace ge

namespace gert {

struct Shape {
  std::vector<int64_t> sizes;
  int64_t GetDim(size_t axis) const { return sizes.at(axis); }
};

struct StorageShape {
  Shape shape;
  const Shape& GetStorageShape() const { return shape; }
};

struct StorageFormat {};

class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(const HostTensor& tensor) : dtype_(ge::DataType(tensor.dtype)), data_(tensor.data) {
    shape_.shape.sizes.assign(tensor.dims, tensor.dims + tensor.ndim);
  }
  Tensor(StorageShape shape, ge::DataType dtype, void* data) : shape_(std::move(shape)), dtype_(dtype), data_(data) {}
  const StorageShape& GetShape() const { return shape_; }
  StorageFormat GetFormat() const { return {}; }
  ge::DataType GetDataType() const { return dtype_; }
  const void* GetAddr() const { return data_; }

 private:
  StorageShape shape_;
  ge::DataType dtype_{};
  void* data_ = nullptr;
};

// Of an operator with one output. An absent input is a tensor without data and dimensions; an empty one has the latter.
class EagerOpExecutionContext {
 public:
  EagerOpExecutionContext(const std::vector<Tensor>& inputs, host_cann_allocate allocate)
      : inputs_(inputs), allocate_(allocate) {}
  const Tensor* GetRequiredInputTensor(size_t index) const { return GetOptionalInputTensor(index); }
  const Tensor* GetOptionalInputTensor(size_t index) const {
    if (index >= inputs_.size()) return nullptr;
    const Tensor& input = inputs_[index];
    return input.GetAddr() || !input.GetShape().GetStorageShape().sizes.empty() ? &input : nullptr;
  }
  void* GetStream() const { return nullptr; }
  Tensor* MallocOutputTensor(size_t, const StorageShape& shape, const StorageFormat&, ge::DataType dtype) {
    uint64_t bytes = dtype == ge::DT_FLOAT || dtype == ge::DT_INT32 ? 4 : 2;
    for (const int64_t size : shape.shape.sizes) {
      bytes *= size;
    }
    output_ = Tensor(shape, dtype, allocate_(bytes));
    return &output_;
  }
  void* MallocWorkSpace(size_t bytes) { return allocate_(bytes); }
  const Tensor& output() const { return output_; }

 private:
  const std::vector<Tensor>& inputs_;
  host_cann_allocate allocate_;
  Tensor output_;
};

}  // namespace gert

namespace ge {

class BaseCustomOp {
 public:
  virtual ~BaseCustomOp() = default;
};

class EagerExecuteOp : virtual public BaseCustomOp {
 public:
  virtual graphStatus Execute(gert::EagerOpExecutionContext* context) = 0;
};

}  // namespace ge

namespace host_cann {

// Whether an output is what an operator's inference says.
using Check = std::function<bool(const std::vector<gert::Tensor>& inputs, const gert::Tensor& made)>;

inline std::vector<Check>& checks(const std::string& name) {
  static std::map<std::string, std::vector<Check>> all;
  return all[name];
}

template <typename Operator>
int execute(const char* name, int n, const HostTensor* given, HostTensor* made, host_cann_allocate allocate) {
  const std::vector<gert::Tensor> inputs(given, given + n);
  gert::EagerOpExecutionContext context(inputs, allocate);
  if (Operator().Execute(&context) != ge::GRAPH_SUCCESS) return 1;
  const gert::Tensor& output = context.output();
  for (const Check& check : checks(name)) {
    if (!check(inputs, output)) return 2;
  }
  const std::vector<int64_t>& sizes = output.GetShape().GetStorageShape().sizes;
  made->dtype = output.GetDataType();
  made->ndim = static_cast<int32_t>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), made->dims);
  made->data = const_cast<void*>(output.GetAddr());
  return 0;
}

}  // namespace host_cann

#define REG_AUTO_MAPPING_OP(name) \
  [[maybe_unused]] static const int mapped_##name = host_cann_register_custom_op(#name, ::host_cann::execute<name>)
