// The Python face of the native code: builds moe_fx._C. Each part of csrc/ has one bind function here, and
// moe_fx/_C.pyi states the same signatures for type checkers.

#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <string_view>
#include <vector>

#include "cpu/cpu_info.h"

namespace py = pybind11;

namespace {

py::object text_or_none(const std::string& text) {
  return text.empty() ? py::object(py::none()) : py::object(py::str(text));
}

py::list to_python(const std::vector<moe_fx::cpu::NumaNode>& nodes) {
  using namespace py::literals;
  py::list result;
  for (const auto& node : nodes) {
    result.append(py::dict("node"_a = node.node, "cpus"_a = node.cpus, "memory_bytes"_a = node.memory_bytes));
  }
  return result;
}

py::dict to_python(const moe_fx::cpu::CpuInfo& info) {
  using namespace py::literals;
  std::vector<std::string_view> isa;
  for (std::size_t i = 0; i < moe_fx::cpu::kIsaCount; ++i) {
    const auto candidate = static_cast<moe_fx::cpu::Isa>(i);
    if (info.isa.has(candidate)) isa.push_back(moe_fx::cpu::isa_name(candidate));
  }
  return py::dict("architecture"_a = info.architecture, "vendor"_a = text_or_none(info.vendor),
                  "brand"_a = text_or_none(info.brand), "isa"_a = isa, "allowed_cpus"_a = info.allowed_cpus,
                  "logical_cpus"_a = info.allowed_cpus.size(), "physical_cores"_a = info.physical_cores,
                  "l2_bytes"_a = info.l2_bytes, "l3_bytes"_a = info.l3_bytes,
                  "transparent_huge_pages"_a = text_or_none(info.transparent_huge_pages),
                  "numa_nodes"_a = to_python(info.numa_nodes));
}

void bind_cpu_info(py::module_& module) {
  module.def(
      "cpu_info", [] { return to_python(moe_fx::cpu::read_cpu_info()); },
      "What this machine offers an expert engine: instruction sets, allowed CPUs, caches, page policy, memory nodes.");
  module.def("parse_cpu_list", &moe_fx::cpu::parse_cpu_list, py::arg("text"), py::pos_only(),
             "The CPU numbers of a list in the kernel's format, such as '0-3,8,10-11'; ValueError on anything else.");
  module.def(
      "read_numa_nodes", [](const std::string& root) { return to_python(moe_fx::cpu::read_numa_nodes(root)); },
      py::arg("root") = "/sys/devices/system/node", "The memory nodes that a folder in the layout of sysfs describes.");
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native code of moe-fx.";
  bind_cpu_info(module);
  bind_engine(module);
  bind_packing(module);
}
