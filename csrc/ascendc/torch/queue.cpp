#include "torch/queue.h"

#include <acl/acl_rt.h>
#include <torch_npu/csrc/core/npu/NPUFunctions.h>
#include <torch_npu/csrc/core/npu/NPUStream.h>
#include <torch_npu/csrc/framework/OpCommand.h>

#include <utility>

#include "tiling/w4a16_tiling.h"

namespace moe_fx::ascendc {

std::string device_refusal() {
  // The products of the architecture dav-2201: Atlas A2 and A3.
  const char* known = aclrtGetSocName();
  const std::string name = known == nullptr ? "an unknown device" : known;
  const bool ours = name.starts_with("Ascend910B") || name.starts_with("Ascend910_93");
  return ours ? "" : "its kernels are for Ascend910B and Ascend910_93, and this is " + name;
}

uint32_t vector_cores() {
  constexpr int32_t kind = ACL_RT_DEV_RES_VECTOR_CORE;
  const c10_npu::NPUStream stream = c10_npu::getCurrentNPUStream();
  // Cores that synchronise must all run at once: more than a limited stream has would wait for ever.
  return c10_npu::is_core_control_enabled() ? c10_npu::GetStreamResLimit(stream, kind)
                                            : c10_npu::GetDeviceResLimit(stream.device_index(), kind);
}

uint32_t unified_buffer_bytes() { return kUnifiedBufferBytes; }

void enqueue(const char* name, std::vector<at::Tensor> tensors, std::function<void(void* stream)> launch) {
  // Without emptying the queue, as the plain stream() would.
  void* stream = c10_npu::getCurrentNPUStream().stream(/*need_empty=*/false);
  at_npu::native::OpCommand::RunOpApiV2(name,
                                        [tensors = std::move(tensors), launch = std::move(launch), stream]() -> int {
                                          launch(stream);
                                          return 0;
                                        });
}

}  // namespace moe_fx::ascendc
