// Kernels for AMX with int8 and bf16 (Sapphire Rapids and later): tiles for many activation rows of int8 and bf16
// weights, and for everything else the kernels of avx512_bf16.cpp. TDPBF16PS takes subnormal inputs and results for
// zero, as VDPBF16PS does.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "cpu/kernels.h"

namespace moe_fx::cpu {
namespace {

#include "cpu/kernels/amx.inl"
#include "cpu/kernels/amx_transpose.inl"

// Written in assembler, since GCC's intrinsics do not take a template argument for a tile, and since those of GCC 11 to
// 13 do not say that they read memory: what was written to it just before could come too late. "memory" keeps all
// accesses in their order; a compiler that allocates no tiles needs to be told of none.
struct Amx {
  static void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }
  static void release() { asm volatile("tilerelease"); }
  template <int kTile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  template <int kTile>
  static void load(const void* from, std::size_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  static void store(void* to, std::size_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
  }
  template <int C, int A, int B>
  static void dot_int8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
  template <int C, int A, int B>
  static void dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }

  // In assembler too: GCC takes functions that do nothing but prefetch for ones without effects, and leaves them out.
  static void prefetch(const std::uint8_t* from) { asm volatile("prefetcht1 %0" : : "m"(*from)); }
  static void copy_line(const std::uint8_t* from, std::uint8_t* to) {
    _mm512_store_si512(to, _mm512_loadu_si512(from));
  }
  static void transpose(const std::uint8_t* from, std::size_t stride, std::uint8_t* to) {
    transpose_words(from, stride, to);
  }
};

// The kernels of avx512_bf16.cpp, called through its table: a copy of the table could only be made when the program
// starts, by code of this file, on machines that cannot run it.
template <auto kMember>
struct Avx512;
template <class Result, class... Arguments, Result (*Kernels::*kMember)(Arguments...)>
struct Avx512<kMember> {
  static Result call(Arguments... arguments) { return (kAvx512Bf16Kernels.*kMember)(arguments...); }
};

template <WeightFormat kFormat, ActivationForm kForm>
void avx512_tile(const Tile& tile) {
  kAvx512Bf16Kernels.tile[static_cast<std::size_t>(kFormat)][static_cast<std::size_t>(kForm)](tile);
}

// Below this, AVX-512 keeps up with memory, and a tile would be mostly empty.
constexpr int kFewestRows = 12;

template <WeightFormat kFormat, ActivationForm kForm, template <class> class Weights>
void amx_tile(const Tile& tile) {
  if (tile.m < kFewestRows) return avx512_tile<kFormat, kForm>(tile);
  tile_product<Amx, Weights<Amx>>(tile);
}

using W = WeightFormat;
using X = ActivationForm;

}  // namespace

constinit const Kernels kAmxKernels = {
    .name = "amx",
    .tile = {{avx512_tile<W::bf16, X::f32>, amx_tile<W::bf16, X::bf16, Bf16Tiles>, nullptr},
             {avx512_tile<W::f16, X::f32>, nullptr, nullptr},
             {avx512_tile<W::int8, X::f32>, nullptr, amx_tile<W::int8, X::s8, Int8Tiles>},
             {avx512_tile<W::int4, X::f32>, avx512_tile<W::int4, X::bf16>, avx512_tile<W::int4, X::s8>}},
    .exact_form = Avx512<&Kernels::exact_form>::call,
    .widen = Avx512<&Kernels::widen>::call,
    .narrow = Avx512<&Kernels::narrow>::call,
    .write_row = Avx512<&Kernels::write_row>::call,
    .activate = Avx512<&Kernels::activate>::call,
    .accumulate = Avx512<&Kernels::accumulate>::call,
    .sum_words = Avx512<&Kernels::sum_words>::call,
};

}  // namespace moe_fx::cpu
