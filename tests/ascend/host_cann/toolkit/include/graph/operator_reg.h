// In place of CANN's header of the same name, as far as the project's GE operators need it: prototypes, which go to the
// stand-in's registry.

#pragma once

#include <initializer_list>
#include <string>

#include "../../../host_cann.h"

namespace ge {

enum DataType : int { DT_FLOAT = 0, DT_FLOAT16 = 1, DT_INT32 = 3, DT_BF16 = 27 };

struct TensorType {
  TensorType(std::initializer_list<DataType>) {}
};

class Prototype {
 public:
  explicit Prototype(const char* name) : name_(name) {}
  Prototype& put(const char* what, const char* name, const char* kind) {
    text_ += std::string(what) + " " + name + " " + kind + "\n";
    return *this;
  }
  int done() {
    host_cann_register_ir(name_.c_str(), text_.c_str());
    return 0;
  }

 private:
  std::string name_, text_;
};

}  // namespace ge

#define REG_OP(name) [[maybe_unused]] static const int registered_##name = ::ge::Prototype(#name)
#define INPUT(name, type) put("in", #name, "required")
#define OPTIONAL_INPUT(name, type) put("in", #name, "optional")
#define OUTPUT(name, type) put("out", #name, "required")
#define OP_END_FACTORY_REG(name) done()
