// One MoE layer's experts on the host: gate and up, activation, down and weighted combine, in one call.
//
// A call goes through three phases, with a barrier between them:
//   1. rows of activations are brought into the kernels' form, pairs of token and expert are grouped by expert;
//   2. units of 16 intermediate rows of one expert: gate and up products of all the expert's tokens, and the
//   activation;
//   3. units of output rows over all experts: the down products, weighted and summed per token in a fixed order.
// Every weight is read once per call. Units are handed out one by one within a memory node; a unit's weights lie on
// that node. Results do not depend on the number of threads.
//
// Numerical contract. Sums are taken in fp32 (int8 activations: in int32 within a scale group, then fp32). Dense
// weights: products of activations and weights in their own dtype, exact in fp32; the activation function in fp32; its
// result rounded to x's dtype before the down projection where the kernel multiplies bf16 (bf16 x), else kept in fp32;
// the weighted sum over experts in fp32, rounded once. Packed weights with exact activations: the same on the
// dequantised weights. With int8 activations: each row (int8) or each group of a row (int4) is rounded to max|.|/127
// steps first. Values that are not finite come out as in PyTorch: an infinity or NaN in a token's row or in a weight
// reaches every result that depends on it; with int8 activations such a row gives NaN.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "cpu/format.h"
#include "cpu/kernels.h"
#include "cpu/pool.h"

namespace moe_fx::cpu {

// Row-major weights where the model has them. Rows of the gate, the up and the down projection, each found as
// base + expert * expert_stride + row * row_stride (bytes); inputs are contiguous.
struct DenseMatrix {
  const std::uint8_t* data = nullptr;
  std::size_t expert_stride = 0;
  std::size_t row_stride = 0;
};

// A bias [E, N] of a dtype, found as DenseMatrix but with one value per row.
struct DenseBias {
  const std::uint8_t* data = nullptr;  // null: none
  std::size_t expert_stride = 0;
  std::size_t row_stride = 0;
};

// The weights and all that is fixed about a layer.
struct Layer {
  WeightFormat format = WeightFormat::bf16;
  std::int64_t experts = 0, hidden = 0, intermediate = 0;
  ActivationSpec activation;
  bool weight_on_input = false;   // routing weights multiply the input of gate/up instead of the result
  bool int8_activations = false;  // packed weights only

  // Dense.
  DenseMatrix gate, up, down;  // up: only when activation.gated
  DenseBias gate_bias, up_bias, down_bias;

  // Packed: a buffer of pack.h, and its layout.
  const std::uint8_t* packed = nullptr;
  std::shared_ptr<const PackedLayout> layout;
};

// Memory nodes that rows may be spread over; a machine with more shares these segments among all its threads.
inline constexpr int kMaxSegments = 16;

enum class IdType : std::uint8_t { i32, i64 };

// One call's operands. All contiguous.
struct Call {
  DType x_dtype = DType::bf16;
  const void* x = nullptr;  // [T, H]
  std::int64_t tokens = 0;
  std::int64_t top_k = 0;
  DType weights_dtype = DType::f32;
  const void* weights = nullptr;  // [T, k]
  IdType id_type = IdType::i32;
  const void* ids = nullptr;  // [T, k]; outside [0, E): costs nothing
  // Optional [map_size] int32: the local expert of a global id, negative for one that is not here.
  const std::int32_t* expert_map = nullptr;
  std::int64_t map_size = 0;
  DType y_dtype = DType::bf16;
  void* y = nullptr;  // [T, H], overwritten
};

// Runs a call on PyTorch's OpenMP threads where that is right (see pool.h), else on the process's pool; returns when it
// is done. `threads` is what the caller's framework uses. Throws std::invalid_argument on operands that do not fit.
void run_experts(const Layer& layer, const Call& call, int threads);

// Whether synchronous calls run on the engine's own pinned threads instead of PyTorch's: where there are several memory
// nodes, or MOE_FX_NUMA or MOE_FX_THREADS is set.
bool runs_on_own_threads();

// Runs a task on the team that run_experts would use, and returns when it is done.
void run_on_team(int threads, Task task, void* context);

// A call that is prepared once and then started and awaited again and again by whoever must neither allocate nor throw
// nor hold Python's lock: a device stream's host callback, say. It runs on the process's pool. Each submission has
// scratch memory of its own, so several (of several layers) can be in flight. It belongs to the process that made it: a
// forked child makes its own.
class Submission {
 public:
  // `call.tokens` is the most tokens that a run may have. All memory that layer and call point to must outlive this.
  // Throws std::invalid_argument on operands that do not fit.
  Submission(Layer layer, const Call& call);
  ~Submission();  // waits
  Submission(const Submission&) = delete;
  Submission& operator=(const Submission&) = delete;

  // Starts a run of the first `tokens` tokens and returns at once; waits only for this object's own previous run.
  void submit(std::int64_t tokens) noexcept;
  // Returns when the latest run that was started before this call is done: what starts runs on a stream must be waited
  // for behind it on that stream.
  void wait() noexcept;
  bool done() const noexcept;

  // The same for interfaces that take a function and a pointer (cudaLaunchHostFunc, aclrtLaunchHostFunc,
  // aclrtLaunchCallback): start a run of all tokens, and wait for it.
  static void submit_callback(void* submission) noexcept;
  static void wait_callback(void* submission) noexcept;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace moe_fx::cpu
