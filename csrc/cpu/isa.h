// The instruction sets that kernels choose between at run time.
//
// A set counts as present when both the processor implements it and the operating system saves its registers, so that
// executing it is safe. (AMX has one step more on Linux: a process asks the kernel for the tile registers first.)

#pragma once

#include <bitset>
#include <cstddef>
#include <string_view>

namespace moe_fx::cpu {

enum class Isa : std::size_t {
  // x86-64
  avx2,
  fma,
  f16c,
  avx512f,
  avx512bw,
  avx512vl,
  avx512_vnni,
  avx512_bf16,
  avx_vnni,
  amx_tile,
  amx_int8,
  amx_bf16,
  // AArch64
  neon,
  asimddp,
  i8mm,
  bf16,
  sve,
};

inline constexpr std::size_t kIsaCount = static_cast<std::size_t>(Isa::sve) + 1;

// The instruction sets of one machine.
class IsaSet {
 public:
  bool has(Isa isa) const { return bits_.test(static_cast<std::size_t>(isa)); }
  void set(Isa isa, bool present) { bits_.set(static_cast<std::size_t>(isa), present); }

 private:
  std::bitset<kIsaCount> bits_;
};

// The name of an instruction set as users read it, for example "avx512_vnni".
std::string_view isa_name(Isa isa);

// Asks the processor and the operating system; callers that ask often keep the answer.
IsaSet detect_isa();

}  // namespace moe_fx::cpu
