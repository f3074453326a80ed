// The release of moe-fx that this library is of: operators, layouts and options may differ in another.

#include <torch/library.h>

#include <string>

namespace moe_fx::ascendc {
namespace {

std::string library_version() { return MOE_FX_VERSION; }

TORCH_LIBRARY_FRAGMENT(moe_fx_ascend, library) { library.def("library_version", library_version); }

}  // namespace
}  // namespace moe_fx::ascendc
