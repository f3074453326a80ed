// The Python face of packed weights: memory for them, writing and reading them. Addresses are integers, since the bytes
// belong to tensors and buffers that Python holds; moe_fx/_C.pyi says what each must point to.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "bindings.h"
#include "cpu/format.h"
#include "cpu/memory.h"
#include "cpu/pack.h"
#include "cpu/topology.h"

namespace py = pybind11;
using namespace py::literals;

namespace moe_fx::cpu {
namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

WeightFormat format_named(std::string_view name) {
  for (const WeightFormat format : {WeightFormat::bf16, WeightFormat::f16, WeightFormat::int8, WeightFormat::int4}) {
    if (format_name(format) == name) return format;
  }
  throw std::invalid_argument("format is '" + std::string(name) + "'; packed weights are 'int8' or 'int4'");
}

Projection projection_named(std::string_view name) {
  if (name == "gate") return Projection::gate;
  if (name == "up") return Projection::up;
  if (name == "down") return Projection::down;
  throw std::invalid_argument("projection is '" + std::string(name) + "'; it must be 'gate', 'up' or 'down'");
}

py::dict dict_of(const PackedSpec& spec) {
  return py::dict("format"_a = format_name(spec.format), "experts"_a = spec.experts, "hidden"_a = spec.hidden,
                  "intermediate"_a = spec.intermediate, "gated"_a = spec.gated, "group"_a = spec.group,
                  "zero_points"_a = spec.zero_points, "biases"_a = spec.biases, "segments"_a = spec.segments);
}

PackedSpec spec_of(const py::dict& dict) {
  const py::dict known = dict_of(PackedSpec{});
  std::string names;
  for (const auto& [key, value] : known)
    names += (names.empty() ? "" : ", ") + std::string(py::str(key));
  for (const auto& [key, value] : known) {
    if (!dict.contains(key)) {
      throw std::invalid_argument("the spec lacks '" + std::string(py::str(key)) + "'; it needs " + names);
    }
  }
  for (const auto& [key, value] : dict) {
    if (!known.contains(key)) {
      throw std::invalid_argument("the spec has an unknown '" + std::string(py::str(key)) + "'; it needs " + names);
    }
  }
  PackedSpec spec;
  spec.format = format_named(dict["format"].cast<std::string>());
  spec.experts = dict["experts"].cast<std::int64_t>();
  spec.hidden = dict["hidden"].cast<std::int64_t>();
  spec.intermediate = dict["intermediate"].cast<std::int64_t>();
  spec.gated = dict["gated"].cast<bool>();
  spec.group = dict["group"].cast<std::int64_t>();
  spec.zero_points = dict["zero_points"].cast<bool>();
  spec.biases = dict["biases"].cast<bool>();
  spec.segments = dict["segments"].cast<int>();
  return spec;
}

// A packed buffer that Python names by address and size.
std::uint8_t* buffer_at(std::uintptr_t address) {
  if (address == 0 || address % kLine != 0) {
    throw std::invalid_argument("a packed buffer must start on a multiple of " + std::to_string(kLine) +
                                " bytes; allocate it as HugeBuffer");
  }
  return pointer<std::uint8_t>(address);
}

struct PackedBuffer {
  PackedBuffer(std::uintptr_t address, std::size_t bytes)
      : data(buffer_at(address)), layout(read_header(data, bytes)) {}

  std::uint8_t* data;
  PackedLayout layout;
};

void begin_packed(std::uintptr_t address, std::size_t bytes, const py::dict& spec) {
  std::uint8_t* const buffer = buffer_at(address);
  const PackedLayout layout(spec_of(spec));
  if (bytes < layout.bytes()) {
    throw std::invalid_argument("the buffer has " + std::to_string(bytes) + " bytes and these weights need " +
                                std::to_string(layout.bytes()) + "; allocate packed_bytes(spec)");
  }
  begin_packing(buffer, layout, current_topology());
}

void pack_float_at(std::uintptr_t address, std::size_t bytes, std::int64_t expert, const std::string& projection,
                   std::uintptr_t data, std::size_t row_stride, const std::string& dtype, int threads) {
  const PackedBuffer packed(address, bytes);
  pack_float(packed.data, packed.layout, expert, projection_named(projection),
             {.dtype = dtype_named(dtype), .data = pointer<const void>(data), .row_stride = row_stride}, threads);
}

void pack_int8_at(std::uintptr_t address, std::size_t bytes, std::int64_t expert, const std::string& projection,
                  std::uintptr_t data, std::size_t row_stride, std::uintptr_t scales, std::size_t scale_stride,
                  int threads) {
  const PackedBuffer packed(address, bytes);
  pack_int8(packed.data, packed.layout, expert, projection_named(projection),
            {.data = pointer<const std::int8_t>(data),
             .row_stride = row_stride,
             .scales = pointer<const float>(scales),
             .scale_stride = scale_stride},
            threads);
}

void pack_int4_at(std::uintptr_t address, std::size_t bytes, std::int64_t expert, const std::string& projection,
                  std::uintptr_t data, std::size_t row_stride, std::uintptr_t scales, std::size_t scale_stride,
                  std::uintptr_t zeros, std::size_t zero_stride, int threads) {
  const PackedBuffer packed(address, bytes);
  pack_int4(packed.data, packed.layout, expert, projection_named(projection),
            {.data = pointer<const std::uint8_t>(data),
             .row_stride = row_stride,
             .scales = pointer<const float>(scales),
             .scale_stride = scale_stride,
             .zeros = pointer<const std::uint8_t>(zeros),
             .zero_stride = zero_stride},
            threads);
}

void pack_bias_at(std::uintptr_t address, std::size_t bytes, std::int64_t expert, const std::string& projection,
                  std::uintptr_t bias, std::size_t stride) {
  const PackedBuffer packed(address, bytes);
  pack_bias(packed.data, packed.layout, expert, projection_named(projection), pointer<const float>(bias), stride);
}

void unpack_at(std::uintptr_t address, std::size_t bytes, std::int64_t expert, const std::string& projection,
               std::uintptr_t out) {
  const PackedBuffer packed(address, bytes);
  unpack(packed.data, packed.layout, expert, projection_named(projection), pointer<float>(out));
}

std::vector<int> page_nodes(std::uintptr_t address, std::size_t bytes, std::size_t step) {
  if (step == 0) throw std::invalid_argument("step is 0; give the size of a page, or a multiple");
  return nodes_of_pages(pointer<const void>(address), bytes, step);
}

}  // namespace
}  // namespace moe_fx::cpu

void bind_packing(py::module_& module) {
  using namespace moe_fx::cpu;
  using ReleaseGil = py::call_guard<py::gil_scoped_release>;

  py::class_<HugeBuffer>(module, "HugeBuffer", py::buffer_protocol(),
                         "Zeroed memory of huge pages; a writable buffer of bytes, released with its last user.")
      .def(py::init<std::size_t>(), "nbytes"_a)
      .def_property_readonly(
          "address", [](const HugeBuffer& buffer) { return reinterpret_cast<std::uintptr_t>(buffer.data()); },
          "Where the memory starts.")
      .def_buffer(
          [](HugeBuffer& buffer) { return py::buffer_info(buffer.data(), static_cast<py::ssize_t>(buffer.size())); });

  module.def(
      "packed_bytes", [](const py::dict& spec) { return PackedLayout(spec_of(spec)).bytes(); }, "spec"_a,
      "The size of a packed buffer; ValueError says what is wrong with the sizes.");
  module.def("begin_packed", &begin_packed, "address"_a, "nbytes"_a, "spec"_a,
             "Writes the header of a zeroed buffer and places its segments on the memory nodes.");
  module.def(
      "packed_spec",
      [](std::uintptr_t address, std::size_t bytes) { return dict_of(read_header(buffer_at(address), bytes)); },
      "address"_a, "nbytes"_a,
      "The spec in a buffer's header; ValueError when it is not whole, or not of this version.");
  module.def("pack_float", &pack_float_at, "address"_a, "nbytes"_a, "expert"_a, "projection"_a, "data"_a,
             "row_stride"_a, "dtype"_a, "threads"_a, ReleaseGil(),
             "Quantises one projection [N, K] by rounding to nearest; row_stride in bytes.");
  module.def(
      "pack_int8", &pack_int8_at, "address"_a, "nbytes"_a, "expert"_a, "projection"_a, "data"_a, "row_stride"_a,
      "scales"_a, "scale_stride"_a, "threads"_a, ReleaseGil(),
      "Takes over one int8 projection [N, K] with fp32 scales [N]; row_stride in bytes, scale_stride in values.");
  module.def(
      "pack_int4", &pack_int4_at, "address"_a, "nbytes"_a, "expert"_a, "projection"_a, "data"_a, "row_stride"_a,
      "scales"_a, "scale_stride"_a, "zeros"_a, "zero_stride"_a, "threads"_a, ReleaseGil(),
      "Takes over one int4 projection [N, K / 2] (lower input in the low nibble) with fp32 scales and, when zeros "
      "is not 0, uint8 zero points [N, K / group]; row_stride in bytes, the others in values.");
  module.def("pack_bias", &pack_bias_at, "address"_a, "nbytes"_a, "expert"_a, "projection"_a, "bias"_a, "stride"_a,
             "Writes one projection's fp32 bias [N]; stride in values.");
  module.def("unpack", &unpack_at, "address"_a, "nbytes"_a, "expert"_a, "projection"_a, "out"_a, ReleaseGil(),
             "Writes one projection's dequantised weights to fp32 memory [N, K].");
  module.def("page_nodes", &page_nodes, "address"_a, "nbytes"_a, "step"_a,
             "The memory node of every step of a range (-1: not in memory); empty where the system does not tell.");
}
