// What `kernel<<<blocks, nullptr, stream>>>(arguments)` is on the stand-in: a run of the kernel on the host model.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "host_cann.h"
#include "model/launch.h"

// How a kernel says on which cores it runs; the host model has vector cores only.
#define KERNEL_TASK_TYPE_DEFAULT(type) static_assert(true)

namespace host_cann {

class Launch {
 public:
  Launch(const char* name, uint32_t blocks, void* stream) : name_(name), blocks_(blocks) { (void)stream; }

  // Runs the kernel, or makes it part of the graph that is being captured.
  //
  // Throws std::runtime_error with the model's faults, if there are any.
  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), Arguments... arguments) {
    (attach(arguments), ...);
    run_ = [kernel, given = std::tuple<Parameters...>(arguments...)] { std::apply(kernel, given); };
    // A graph may be replayed as long as the process runs.
    auto* captured = new Launch(std::move(*this));
    if (host_cann_capture_launch([](void* launch) { return static_cast<Launch*>(launch)->faults(); }, captured)) return;
    const char* faults = captured->faults();
    const std::string message = faults ? faults : "";
    delete captured;
    if (message.empty()) return;
    host_cann_set_error(message.c_str());
    throw std::runtime_error(message);
  }

 private:
  // The allocation that a pointer lies in; scalars and tiling take no memory of the device.
  template <typename Argument>
  void attach(const Argument& argument) {
    if constexpr (std::is_pointer_v<Argument>) {
      void* base = nullptr;
      uint64_t bytes = 0;
      if (argument) host_cann_allocation(argument, &base, &bytes);
      if (base && attached_.insert(base).second) {
        const std::string name = "allocation " + std::to_string(attached_.size());
        device_.attach(name, base, bytes, ascendc_model::Access::kInOut);
      }
    }
  }

  const char* faults() {
    const ascendc_model::Report report = device_.launch(static_cast<int>(blocks_), run_);
    if (report.faults.empty()) return nullptr;
    std::ostringstream text;
    text << "the host model found faults in " << name_ << ":";
    for (const auto& fault : report.faults) {
      text << "\n  " << fault;
    }
    faults_ = text.str();
    return faults_.c_str();
  }

  std::string name_;
  uint32_t blocks_;
  ascendc_model::Device device_{static_cast<int>(host_cann_vector_cores())};
  std::set<void*> attached_;
  std::function<void()> run_;
  std::string faults_;
};

}  // namespace host_cann
