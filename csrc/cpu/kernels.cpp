// Which tables of kernels were compiled in, which of them this machine can run, and which one is used; see kernels.h.
//
// MOE_FX_HAVE_<TABLE> is defined by the build for every table that it compiles.

#include "cpu/kernels.h"

#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>

#if defined(MOE_FX_HAVE_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moe_fx::cpu {

namespace {

// The tile registers are large, so Linux gives them only to processes that ask. The answer is for the whole process,
// threads that start later included.
#if defined(MOE_FX_HAVE_AMX)
bool amx_permitted() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<const Kernels*> find_available() {
  [[maybe_unused]] const IsaSet isa = detect_isa();
  [[maybe_unused]] const auto has = [&](std::initializer_list<Isa> needed) {
    for (const Isa one : needed) {
      if (!isa.has(one)) return false;
    }
    return true;
  };
  std::vector<const Kernels*> tables;
#if defined(MOE_FX_HAVE_AVX512) || defined(MOE_FX_HAVE_AVX512_BF16) || defined(MOE_FX_HAVE_AMX)
  // Every processor with VNNI has the DQ that the tables also use.
  const bool avx512 = has({Isa::fma, Isa::f16c, Isa::avx512f, Isa::avx512bw, Isa::avx512vl, Isa::avx512_vnni});
#endif
#if defined(MOE_FX_HAVE_AMX)
  if (avx512 && has({Isa::avx512_bf16, Isa::amx_tile, Isa::amx_int8, Isa::amx_bf16}) && amx_permitted()) {
    tables.push_back(&kAmxKernels);
  }
#endif
#if defined(MOE_FX_HAVE_AVX512_BF16)
  if (avx512 && has({Isa::avx512_bf16})) tables.push_back(&kAvx512Bf16Kernels);
#endif
#if defined(MOE_FX_HAVE_AVX512)
  if (avx512) tables.push_back(&kAvx512Kernels);
#endif
#if defined(MOE_FX_HAVE_AVX2)
  if (has({Isa::avx2, Isa::fma, Isa::f16c})) tables.push_back(&kAvx2Kernels);
#endif
#if defined(MOE_FX_HAVE_I8MM)
  if (has({Isa::asimddp, Isa::i8mm})) tables.push_back(&kI8mmKernels);
#endif
#if defined(MOE_FX_HAVE_NEON)
  if (has({Isa::asimddp})) tables.push_back(&kNeonKernels);
#endif
  tables.push_back(&kScalarKernels);
  return tables;
}

}  // namespace

std::string_view form_name(ActivationForm form) {
  switch (form) {
    case ActivationForm::f32: return "f32";
    case ActivationForm::bf16: return "bf16";
    case ActivationForm::s8: return "s8";
  }
  return {};
}

const std::vector<const Kernels*>& available_kernels() {
  static const std::vector<const Kernels*> tables = find_available();
  return tables;
}

const Kernels* find_kernels(std::string_view name) {
  for (const Kernels* table : available_kernels()) {
    if (table->name == name) return table;
  }
  return nullptr;
}

const Kernels& chosen_kernels() {
  const char* const name = std::getenv("MOE_FX_ISA");
  if (name == nullptr || *name == '\0') return *available_kernels().front();
  if (const Kernels* table = find_kernels(name)) return *table;
  std::string message = "MOE_FX_ISA=" + std::string(name) + " names no kernels that this machine can run; it can be";
  const char* separator = " ";
  for (const Kernels* table : available_kernels()) {
    message += separator;
    message += table->name;
    separator = ", ";
  }
  throw std::invalid_argument(message + ", or unset for the first of these");
}

}  // namespace moe_fx::cpu
