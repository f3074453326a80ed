// Detection of instruction sets: cpuid and xgetbv on x86-64, the auxiliary vector on AArch64 Linux.

#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>

#include <cstdint>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace moe_fx::cpu {

std::string_view isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2: return "avx2";
    case Isa::fma: return "fma";
    case Isa::f16c: return "f16c";
    case Isa::avx512f: return "avx512f";
    case Isa::avx512bw: return "avx512bw";
    case Isa::avx512vl: return "avx512vl";
    case Isa::avx512_vnni: return "avx512_vnni";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx_vnni: return "avx_vnni";
    case Isa::amx_tile: return "amx_tile";
    case Isa::amx_int8: return "amx_int8";
    case Isa::amx_bf16: return "amx_bf16";
    case Isa::neon: return "neon";
    case Isa::asimddp: return "asimddp";
    case Isa::i8mm: return "i8mm";
    case Isa::bf16: return "bf16";
    case Isa::sve: return "sve";
  }
  return {};
}

#if defined(__x86_64__)

namespace {

struct CpuidRegisters {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zero when the processor does not have the leaf.
CpuidRegisters cpuid(unsigned leaf, unsigned subleaf) {
  CpuidRegisters r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

// XCR0: the register states that the operating system saves. Only valid when cpuid reports OSXSAVE.
std::uint64_t read_xcr0() {
  std::uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

constexpr bool bit(unsigned value, unsigned index) { return (value >> index) & 1U; }

}  // namespace

IsaSet detect_isa() {
  constexpr std::uint64_t kAvxState = 0x6;                  // XMM, YMM
  constexpr std::uint64_t kAvx512State = kAvxState | 0xe0;  // opmask, upper ZMM0-15, ZMM16-31
  constexpr std::uint64_t kAmxState = 0x60000;              // TILECFG, TILEDATA

  const CpuidRegisters leaf1 = cpuid(1, 0);
  const CpuidRegisters leaf7 = cpuid(7, 0);
  const CpuidRegisters leaf7_1 = leaf7.eax >= 1 ? cpuid(7, 1) : CpuidRegisters{};

  const std::uint64_t xcr0 = bit(leaf1.ecx, 27) ? read_xcr0() : 0;
  const bool avx = (xcr0 & kAvxState) == kAvxState && bit(leaf1.ecx, 28);
  const bool avx512 = (xcr0 & kAvx512State) == kAvx512State && bit(leaf7.ebx, 16);
  const bool amx = (xcr0 & kAmxState) == kAmxState && bit(leaf7.edx, 24);

  IsaSet found;
  found.set(Isa::avx2, avx && bit(leaf7.ebx, 5));
  found.set(Isa::fma, avx && bit(leaf1.ecx, 12));
  found.set(Isa::f16c, avx && bit(leaf1.ecx, 29));
  found.set(Isa::avx512f, avx512);
  found.set(Isa::avx512bw, avx512 && bit(leaf7.ebx, 30));
  found.set(Isa::avx512vl, avx512 && bit(leaf7.ebx, 31));
  found.set(Isa::avx512_vnni, avx512 && bit(leaf7.ecx, 11));
  found.set(Isa::avx512_bf16, avx512 && bit(leaf7_1.eax, 5));
  found.set(Isa::avx_vnni, avx && bit(leaf7_1.eax, 4));
  found.set(Isa::amx_tile, amx);
  found.set(Isa::amx_int8, amx && bit(leaf7.edx, 25));
  found.set(Isa::amx_bf16, amx && bit(leaf7.edx, 22));
  return found;
}

#elif defined(__aarch64__) && defined(__linux__)

IsaSet detect_isa() {
  const unsigned long hwcap = getauxval(AT_HWCAP);
  const unsigned long hwcap2 = getauxval(AT_HWCAP2);

  IsaSet found;
  found.set(Isa::neon, hwcap & HWCAP_ASIMD);
  found.set(Isa::asimddp, hwcap & HWCAP_ASIMDDP);
  found.set(Isa::i8mm, hwcap2 & HWCAP2_I8MM);
  found.set(Isa::bf16, hwcap2 & HWCAP2_BF16);
  found.set(Isa::sve, hwcap & HWCAP_SVE);
  return found;
}

#else

// Elsewhere only the baseline of the architecture is claimed.
IsaSet detect_isa() {
  IsaSet found;
#if defined(__aarch64__)
  found.set(Isa::neon, true);
#endif
  return found;
}

#endif

}  // namespace moe_fx::cpu
