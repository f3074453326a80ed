// Kernels for Arm NEON with int8 matrix products (Neoverse V1 and N2, Kunpeng 920's successors, Apple M2 and later):
// one SMMLA multiplies two activation rows by two weight rows over 8 inputs. One activation row would leave half of it
// unused and takes the dot products of neon.h.

#include "cpu/kernels/neon.h"

namespace moe_fx::cpu {
namespace {

// What the s8 kernels share: sums of pairs of activation rows. The last row of an odd number is its own partner.
struct I8mm : Neon {
  static constexpr int kMaxM = 6;  // 3 x 8 sums and 3 pairs of activation rows leave 5 registers for weights
};

template <int M>
struct PairSums {
  static constexpr int kPairs = (M + 1) / 2;

  explicit PairSums(const std::uint8_t* const* rows) {
    for (int p = 0; p < kPairs; ++p) {
      x[p][0] = reinterpret_cast<const std::int8_t*>(rows[2 * p]);
      x[p][1] = reinterpret_cast<const std::int8_t*>(rows[2 * p + 1 < M ? 2 * p + 1 : 2 * p]);
      for (auto& sum : sums[p])
        sum = vdupq_n_s32(0);
    }
  }

  // Adds the products over 8 inputs, the first at k. `first` and `second` hold 4 inputs each of the weight rows
  // 4v..4v + 3; re-paired, each register holds 8 inputs of two rows.
  void add(int v, int32x4_t first, int32x4_t second, const int8x16_t (&values)[kPairs]) {
    const int8x16_t low = vreinterpretq_s8_s32(vzip1q_s32(first, second));
    const int8x16_t high = vreinterpretq_s8_s32(vzip2q_s32(first, second));
    for (int p = 0; p < kPairs; ++p) {
      sums[p][2 * v] = vmmlaq_s32(sums[p][2 * v], values[p], low);
      sums[p][2 * v + 1] = vmmlaq_s32(sums[p][2 * v + 1], values[p], high);
    }
  }
  void load(std::int64_t k, int8x16_t (&values)[kPairs]) const {
    for (int p = 0; p < kPairs; ++p)
      values[p] = vcombine_s8(vld1_s8(x[p][0] + k), vld1_s8(x[p][1] + k));
  }

  // The sums of activation row i and weight rows 4v..4v + 3.
  int32x4_t of(int i, int v) const {
    const int64x2_t low = vreinterpretq_s64_s32(sums[i / 2][2 * v]);
    const int64x2_t high = vreinterpretq_s64_s32(sums[i / 2][2 * v + 1]);
    return vreinterpretq_s32_s64(i % 2 == 0 ? vzip1q_s64(low, high) : vzip2q_s64(low, high));
  }

  const std::int8_t* x[kPairs][2];
  int32x4_t sums[kPairs][2 * Neon::kVectors];
};

template <class A, int M>
struct Int8Matrix {
  static void run(const Tile& tile, const Pass& pass) {
    PairSums<M> sums(tile.x + pass.first);
    FarAhead ahead(tile, tile.weights + 64, int8_block_bytes(tile), pass);
    const std::uint8_t* w = tile.weights + 64;
    const std::int64_t padded = tile.shape.padded();
    for (std::int64_t k = 0; k < padded; k += 8, w += 128) {
      ahead.template advance<M>();
      ahead.template advance<M>();
      int8x16_t values[PairSums<M>::kPairs];
      sums.load(k, values);
      for (int v = 0; v < A::kVectors; ++v)
        sums.add(v, A::load_int(w + v * 16), A::load_int(w + 64 + v * 16), values);
    }
    for (int i = 0; i < M; ++i) {
      const auto scale = A::broadcast_float(row_scales(tile, pass.first + i)[0]);
      for (int v = 0; v < A::kVectors; ++v) {
        const auto weight_scale = A::load_float(reinterpret_cast<const float*>(tile.weights) + v * A::kLanes);
        const auto product = A::multiply(A::to_float(sums.of(i, v)), scale);
        A::store_float(tile.out + (pass.first + i) * kBlockRows + v * A::kLanes, A::multiply(product, weight_scale));
      }
    }
  }
};

// The low and the high nibbles of 8 inputs are the two halves of a row's 8 bytes, in the order of the activations.
template <class A, int M>
struct Int4Matrix {
  static void run(const Tile& tile, const Pass& pass) {
    int4_group<A, M, FarAhead>(tile, pass, 0.0F,
                               [&](const std::uint8_t* w, std::int64_t g, std::int64_t size, auto& ahead,
                                   typename A::Float(&out)[M][A::kVectors]) {
                                 PairSums<M> sums(tile.x + pass.first);
                                 for (std::int64_t k = g * size; k < (g + 1) * size; k += 8, w += 64) {
                                   ahead.template advance<M>();
                                   int8x16_t values[PairSums<M>::kPairs];
                                   sums.load(k, values);
                                   for (int v = 0; v < A::kVectors; ++v) {
                                     const auto raw = A::load_int(w + v * 16);
                                     sums.add(v, A::low_nibbles(raw), A::high_nibbles(raw), values);
                                   }
                                 }
                                 for (int i = 0; i < M; ++i) {
                                   for (int v = 0; v < A::kVectors; ++v)
                                     out[i][v] = A::to_float(sums.of(i, v));
                                 }
                               });
  }
};

template <class A>
struct Int8Matrix<A, 1> : Int8S8<A, 1> {};
template <class A>
struct Int4Matrix<A, 1> : Int4S8<A, 1> {};

}  // namespace

const Kernels kI8mmKernels = {
    .name = "i8mm",
    .tile = {{dense_tile<NeonDense<WeightFormat::bf16>>, nullptr, nullptr},
             {dense_tile<NeonDense<WeightFormat::f16>>, nullptr, nullptr},
             {packed_tile<Neon, Int8F32>, nullptr, packed_tile<I8mm, Int8Matrix>},
             {packed_tile<Neon, Int4F32>, nullptr, packed_tile<I8mm, Int4Matrix>}},
    .exact_form = exact_form,
    .widen = widen,
    .narrow = narrow,
    .write_row = write_row,
    .activate = activate,
    .accumulate = accumulate,
    .sum_words = sum_words,
};

}  // namespace moe_fx::cpu
