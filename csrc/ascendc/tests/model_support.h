// Helpers of the model's own tests: small kernels written as lambdas, and faults with their repaired twins.

#pragma once

#include <doctest/doctest.h>

#include <cstdint>
#include <functional>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "kernel_operator.h"

namespace ascendc_model {

inline doctest::String toString(const Report& report) {
  std::ostringstream text;
  text << report;
  return text.str().c_str();
}

// Runs a kernel that is broken or repaired: the broken one has exactly this kind of fault, the repaired one none.
inline void check_seeded(FaultKind kind, const std::function<Report(bool broken)>& run) {
  const Report broken = run(true);
  CHECK_MESSAGE(broken.only(kind), "expected ", std::string(name(kind)), ", got:\n", toString(broken));
  const Report repaired = run(false);
  CHECK_MESSAGE(repaired.faults.empty(), "the repaired twin:\n", toString(repaired));
}

// For kernels that need nothing in global memory.
inline void check_seeded_alone(FaultKind kind, const std::function<void(bool broken)>& kernel, int blocks = 1) {
  check_seeded(kind, [&](bool broken) {
    Device device;
    return device.launch(blocks, [&] { kernel(broken); });
  });
}

template <typename T>
std::vector<T> counting(std::size_t count) {
  std::vector<T> values;
  for (std::size_t i = 0; i < count; ++i) {
    values.push_back(T(static_cast<float>(i)));
  }
  return values;
}

template <typename T>
AscendC::GlobalTensor<T> global(uint8_t* address, uint64_t count) {
  AscendC::GlobalTensor<T> tensor;
  tensor.SetGlobalBuffer(reinterpret_cast<T*>(address), count);
  return tensor;
}

// A buffer of the unified buffer, for kernels that order everything themselves.
template <typename T>
AscendC::LocalTensor<T> local(AscendC::TPipe& pipe, uint32_t count) {
  AscendC::TBuf<> buffer;
  pipe.InitBuffer(buffer, static_cast<uint32_t>(bytes_of<T>(count)));
  return buffer.Get<T>();
}

}  // namespace ascendc_model
