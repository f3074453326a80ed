// The Python face of the expert engine: running it, waiting for it, and what it runs on. Addresses are integers, since
// the bytes belong to tensors that Python holds; moe_fx/_C.pyi says what each must point to.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "cpu/bandwidth.h"
#include "cpu/engine.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "cpu/pool.h"
#include "cpu/topology.h"

namespace py = pybind11;
using namespace py::literals;

namespace moe_fx::cpu {
namespace {

// (address, bytes between experts, bytes between rows)
using Strided = std::tuple<std::uintptr_t, std::size_t, std::size_t>;

ActivationSpec activation_of(std::string_view name, double alpha, std::optional<double> limit, bool gated) {
  constexpr std::pair<std::string_view, Activation> names[] = {
      {"silu", Activation::silu},
      {"gelu", Activation::gelu},
      {"gelu_tanh", Activation::gelu_tanh},
      {"relu", Activation::relu},
      {"relu2", Activation::relu2},
      {"sigmoid", Activation::sigmoid},
      {"identity", Activation::identity},
      {"swiglu_oai", Activation::swiglu_oai},
      {"silu_then_clamp", Activation::silu_then_clamp},
  };
  for (const auto& [known, kind] : names) {
    if (name != known) continue;
    return {kind, gated, static_cast<float>(alpha), limit.has_value(), static_cast<float>(limit.value_or(0.0))};
  }
  throw std::invalid_argument("act is '" + std::string(name) +
                              "'; see ACTIVATIONS in moe_fx.lowering.ops.activation for the known ones");
}

template <class Matrix>
Matrix matrix_of(const std::optional<Strided>& strided) {
  if (!strided) return {};
  const auto [address, expert_stride, row_stride] = *strided;
  return {reinterpret_cast<const std::uint8_t*>(address), expert_stride, row_stride};
}

Layer dense_layer(std::string_view dtype, std::int64_t experts, std::int64_t hidden, std::int64_t intermediate,
                  const Strided& gate, const std::optional<Strided>& up, const Strided& down,
                  const std::optional<Strided>& gate_bias, const std::optional<Strided>& up_bias,
                  const std::optional<Strided>& down_bias, std::string_view act, double alpha,
                  std::optional<double> limit, bool weight_on_input) {
  Layer layer;
  const DType weights = dtype_named(dtype);
  if (weights == DType::f32) throw std::invalid_argument("dense weights must be 'bf16' or 'f16', not 'f32'");
  layer.format = weights == DType::f16 ? WeightFormat::f16 : WeightFormat::bf16;
  layer.experts = experts;
  layer.hidden = hidden;
  layer.intermediate = intermediate;
  layer.gate = matrix_of<DenseMatrix>(gate);
  layer.up = matrix_of<DenseMatrix>(up);
  layer.down = matrix_of<DenseMatrix>(down);
  layer.gate_bias = matrix_of<DenseBias>(gate_bias);
  layer.up_bias = matrix_of<DenseBias>(up_bias);
  layer.down_bias = matrix_of<DenseBias>(down_bias);
  layer.activation = activation_of(act, alpha, limit, up.has_value());
  layer.weight_on_input = weight_on_input;
  return layer;
}

Layer packed_layer(std::uintptr_t address, std::size_t bytes, std::string_view act, double alpha,
                   std::optional<double> limit, bool weight_on_input, bool int8_activations) {
  Layer layer;
  layer.packed = reinterpret_cast<const std::uint8_t*>(address);
  layer.layout = std::make_shared<const PackedLayout>(read_header(layer.packed, bytes));
  const PackedSpec& spec = layer.layout->spec();
  layer.format = spec.format;
  layer.experts = spec.experts;
  layer.hidden = spec.hidden;
  layer.intermediate = spec.intermediate;
  layer.activation = activation_of(act, alpha, limit, spec.gated);
  layer.weight_on_input = weight_on_input;
  layer.int8_activations = int8_activations;
  return layer;
}

Call call_of(std::uintptr_t x, std::string_view x_dtype, std::int64_t tokens, std::int64_t top_k,
             std::uintptr_t weights, std::string_view weights_dtype, std::uintptr_t ids, bool ids_are_int64,
             std::uintptr_t expert_map, std::int64_t map_size, std::uintptr_t y, std::string_view y_dtype) {
  Call call;
  call.x_dtype = dtype_named(x_dtype);
  call.x = reinterpret_cast<const void*>(x);
  call.tokens = tokens;
  call.top_k = top_k;
  call.weights_dtype = dtype_named(weights_dtype);
  call.weights = reinterpret_cast<const void*>(weights);
  call.id_type = ids_are_int64 ? IdType::i64 : IdType::i32;
  call.ids = reinterpret_cast<const void*>(ids);
  call.expert_map = reinterpret_cast<const std::int32_t*>(expert_map);
  call.map_size = map_size;
  call.y_dtype = dtype_named(y_dtype);
  call.y = reinterpret_cast<void*>(y);
  return call;
}

void run_dense(std::string_view dtype, std::int64_t experts, std::int64_t hidden, std::int64_t intermediate,
               const Strided& gate, const std::optional<Strided>& up, const Strided& down,
               const std::optional<Strided>& gate_bias, const std::optional<Strided>& up_bias,
               const std::optional<Strided>& down_bias, std::string_view act, double alpha, std::optional<double> limit,
               bool weight_on_input, std::uintptr_t x, std::string_view x_dtype, std::int64_t tokens,
               std::int64_t top_k, std::uintptr_t weights, std::string_view weights_dtype, std::uintptr_t ids,
               bool ids_are_int64, std::uintptr_t expert_map, std::int64_t map_size, std::uintptr_t y,
               std::string_view y_dtype, int threads) {
  const Layer layer = dense_layer(dtype, experts, hidden, intermediate, gate, up, down, gate_bias, up_bias, down_bias,
                                  act, alpha, limit, weight_on_input);
  const Call call =
      call_of(x, x_dtype, tokens, top_k, weights, weights_dtype, ids, ids_are_int64, expert_map, map_size, y, y_dtype);
  const py::gil_scoped_release release;
  run_experts(layer, call, threads);
}

void run_packed(std::uintptr_t address, std::size_t bytes, std::string_view act, double alpha,
                std::optional<double> limit, bool weight_on_input, bool int8_activations, std::uintptr_t x,
                std::string_view x_dtype, std::int64_t tokens, std::int64_t top_k, std::uintptr_t weights,
                std::string_view weights_dtype, std::uintptr_t ids, bool ids_are_int64, std::uintptr_t expert_map,
                std::int64_t map_size, std::uintptr_t y, std::string_view y_dtype, int threads) {
  const Layer layer = packed_layer(address, bytes, act, alpha, limit, weight_on_input, int8_activations);
  const Call call =
      call_of(x, x_dtype, tokens, top_k, weights, weights_dtype, ids, ids_are_int64, expert_map, map_size, y, y_dtype);
  const py::gil_scoped_release release;
  run_experts(layer, call, threads);
}

std::unique_ptr<Submission> packed_submission(std::uintptr_t address, std::size_t bytes, std::string_view act,
                                              double alpha, std::optional<double> limit, bool weight_on_input,
                                              bool int8_activations, std::uintptr_t x, std::string_view x_dtype,
                                              std::int64_t tokens, std::int64_t top_k, std::uintptr_t weights,
                                              std::string_view weights_dtype, std::uintptr_t ids, bool ids_are_int64,
                                              std::uintptr_t expert_map, std::int64_t map_size, std::uintptr_t y,
                                              std::string_view y_dtype) {
  return std::make_unique<Submission>(
      packed_layer(address, bytes, act, alpha, limit, weight_on_input, int8_activations),
      call_of(x, x_dtype, tokens, top_k, weights, weights_dtype, ids, ids_are_int64, expert_map, map_size, y, y_dtype));
}

py::dict engine_info() {
  const Topology topology = current_topology();
  py::list available, nodes;
  for (const Kernels* kernels : available_kernels())
    available.append(kernels->name);
  for (const TopologyNode& node : topology.nodes)
    nodes.append(node.cpus);
  return py::dict("isa"_a = chosen_kernels().name, "available"_a = available, "nodes"_a = nodes,
                  "made_up_nodes"_a = topology.made_up, "own_threads"_a = runs_on_own_threads());
}

}  // namespace
}  // namespace moe_fx::cpu

void bind_engine(py::module_& module) {
  using namespace moe_fx::cpu;
  module.def("run_dense", &run_dense,
             "Runs one layer's experts on row-major bf16 or fp16 weights where they are; returns when y is written.");
  module.def("run_packed", &run_packed, "Runs one layer's experts on a packed buffer; returns when y is written.");
  module.def("engine_info", &engine_info, "What the engine runs on: instruction set, memory nodes, whose threads.");
  module.def("use_openmp", &use_openmp, py::arg("library"),
             "Names the OpenMP runtime to run on; whether it was found.");
  module.def(
      "make_huge",
      [](std::uintptr_t address, std::size_t bytes) { return make_huge(reinterpret_cast<void*>(address), bytes); },
      "Turns the pages of a range into huge ones where they lie, contents unchanged; whether the system did.");
  module.def(
      "topology_segments", [] { return std::min(static_cast<int>(current_topology().nodes.size()), kMaxSegments); },
      "The number of memory nodes that weights packed here should be spread over.");
  module.def(
      "streaming_read_seconds",
      [](std::uintptr_t address, std::size_t bytes, int threads) {
        const py::gil_scoped_release release;
        return streaming_read_seconds(reinterpret_cast<const std::uint8_t*>(address), bytes, threads);
      },
      "Seconds that the engine's threads take to read a range once.");
  py::class_<Submission>(module, "Submission",
                         "A call on packed weights that is started and awaited without allocating or blocking.")
      .def(py::init(&packed_submission))
      .def("submit", &Submission::submit, py::arg("tokens"), py::call_guard<py::gil_scoped_release>())
      .def("wait", &Submission::wait, py::call_guard<py::gil_scoped_release>())
      .def("done", &Submission::done)
      .def_property_readonly("address", [](Submission& self) { return reinterpret_cast<std::uintptr_t>(&self); })
      .def_property_readonly_static(
          "submit_callback",
          [](const py::object&) { return reinterpret_cast<std::uintptr_t>(&Submission::submit_callback); })
      .def_property_readonly_static("wait_callback", [](const py::object&) {
        return reinterpret_cast<std::uintptr_t>(&Submission::wait_callback);
      });
}
