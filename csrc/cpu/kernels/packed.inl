// Products with packed int8 and int4 blocks, written once over a trait `A` of the instruction set. Included like
// elementwise.inl.
//
// A vector lane belongs to one of the block's 16 rows; a block's 16 lanes are A::kVectors registers. Activations are
// broadcast: four int8 at a time to integer dot products, one fp32 or a pair of bf16 to floating-point ones. Up to
// A::kMaxM activation rows share each weight that is loaded.

// Arrays of sums become registers only where everything that touches them is inlined before the compiler looks at them:
// lambdas and helpers that take such arrays are marked.
#define MOE_FX_INLINE __attribute__((always_inline))

// Which of how many groups of activation rows passes a tile's weights, and the first of its rows.
struct Pass {
  int first;
  int index, count;
};

// Walks the cache lines that a block's kernel will read soon: this block, then what comes after it. It is moved on once
// per line of values; the lines before the values count when it is made.
//
// How far ahead, and into which cache, was measured on Zen 4: a kernel that is quick with a line runs best close behind
// the processor's own prefetcher, a slow one hides that prefetcher from what lies ahead and has to reach far itself.
//
// A tile of many activation rows passes its weights several times, a group of rows each: all groups together then read
// the next tile's weights, so that memory is not idle while later groups find theirs in the cache.
template <std::size_t kDistance, int kLocality>
class Ahead {
 public:
  Ahead(const Tile& tile, const std::uint8_t* values, std::size_t bytes, const Pass& pass) : next_(tile.next) {
    if (pass.count == 1) {
      at_ = tile.weights + (bytes > kDistance ? kDistance : bytes);
      end_ = tile.weights + bytes;
      for (const std::uint8_t* line = tile.weights; line < values; line += 64)
        advance<1>();
    } else {
      period_ = left_ = pass.count;
      at_ = next_ == nullptr
                ? tile.weights
                : next_ + bytes / 64 * static_cast<std::size_t>(pass.index) / static_cast<std::size_t>(pass.count) * 64;
    }
  }
  // M: the group's rows; few of them are always alone.
  template <int M>
  void advance() {
    if constexpr (M > 2) {
      if (period_ > 1) {
        if (--left_ > 0) return;
        left_ = period_;
      }
    }
    if (at_ == end_ && next_ != nullptr) at_ = next_;
    __builtin_prefetch(at_, 0, kLocality);
    at_ += 64;
  }

 private:
  const std::uint8_t* at_;
  const std::uint8_t* end_ = nullptr;
  const std::uint8_t* next_;
  int period_ = 1, left_ = 1;
};

constexpr int kFirstCache = 3, kSecondCache = 2;
using FarAhead = Ahead<12288, kSecondCache>;

template <int M>
struct Int8AheadOf {
  using Type = FarAhead;
};
template <>
struct Int8AheadOf<1> {
  using Type = Ahead<2048, kSecondCache>;
};
template <>
struct Int8AheadOf<2> {
  using Type = Ahead<4096, kFirstCache>;
};
template <int M>
struct Int4AheadOf {
  using Type = FarAhead;
};
template <>
struct Int4AheadOf<1> {
  using Type = Ahead<4096, kFirstCache>;
};

inline std::size_t int8_block_bytes(const Tile& tile) {
  return 64 + static_cast<std::size_t>(tile.shape.padded()) * kBlockRows;
}

// Where the parts of an int4 block are; see format.h.
struct Int4Block {
  explicit Int4Block(const Tile& tile)
      : multiplier(*reinterpret_cast<const float*>(tile.weights)),
        scales(tile.weights + 64),
        zeros(scales + static_cast<std::size_t>(tile.groups) * 32),
        values(tile.weights + round_up(64 + tile.groups * (tile.zero_points ? 48 : 32), 64)),
        bytes(static_cast<std::size_t>(values - tile.weights) + static_cast<std::size_t>(tile.inputs) * 8) {}

  float multiplier;
  const std::uint8_t* scales;  // per group 16 fp16
  const std::uint8_t* zeros;   // per group 16 uint8
  const std::uint8_t* values;
  std::size_t bytes;
};

inline const float* row_scales(const Tile& tile, int i) {
  return reinterpret_cast<const float*>(tile.x[i] + tile.shape.scales_offset());
}
inline const float* row_sums(const Tile& tile, int i) {
  return reinterpret_cast<const float*>(tile.x[i] + tile.shape.sums_offset());
}

// How many sums a product is split into, so that the multiply-adds of M activation rows do not wait for each other: at
// least `wanted` of them are under way where registers allow.
template <class A, int M>
constexpr int split_for(int wanted) {
  int split = 1;
  while (split < 4 && split * M * A::kVectors < wanted)
    split *= 2;
  return split;
}

// Adds the parts of split sums: parts[0] += parts[1..].
template <int kSplit, int M, int kVectors, class Vector, class Add>
MOE_FX_INLINE inline void join(Vector (&parts)[kSplit][M][kVectors], Add add) {
#pragma GCC unroll 16
  for (int u = 1; u < kSplit; ++u) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v)
        parts[0][i][v] = add(parts[0][i][v], parts[u][i][v]);
    }
  }
}

template <int kSplit, int M, int kVectors, class Vector>
MOE_FX_INLINE inline void fill(Vector (&parts)[kSplit][M][kVectors], Vector value) {
#pragma GCC unroll 16
  for (int u = 0; u < kSplit; ++u) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v)
        parts[u][i][v] = value;
    }
  }
}

// int8 weights, int8 activations.
template <class A, int M>
void int8_s8_group(const Tile& tile, const Pass& pass) {
  constexpr int kUnroll = split_for<A, M>(5);
  typename A::Int sums[kUnroll][M][A::kVectors];
  fill(sums, A::zero_int());
  const std::uint8_t* const* const x = tile.x + pass.first;
  typename Int8AheadOf<M>::Type ahead(tile, tile.weights + 64, int8_block_bytes(tile), pass);
  const std::uint8_t* w = tile.weights + 64;
  const std::int64_t padded = tile.shape.padded();  // a multiple of 64, hence of 4 * kUnroll
  for (std::int64_t k = 0; k < padded; k += 4 * kUnroll) {
#pragma GCC unroll 16
    for (int u = 0; u < kUnroll; ++u, w += 64) {
      ahead.template advance<M>();
      typename A::Int weights[A::kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < A::kVectors; ++v)
        weights[v] = A::int8_operand(A::load_int(w + v * A::kLanes * 4));
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const auto values = A::broadcast_int(x[i] + k + u * 4);
#pragma GCC unroll 16
        for (int v = 0; v < A::kVectors; ++v)
          sums[u][i][v] = A::dot_int8(sums[u][i][v], weights[v], values);
      }
    }
  }
  join(sums, A::add_int);
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    const int row = pass.first + i;
    const auto scale = A::broadcast_float(row_scales(tile, row)[0]);
    // What A::int8_operand added to every weight comes off again.
    const auto bias = A::set_int(A::kInt8Bias * static_cast<std::int32_t>(row_sums(tile, row)[0]));
#pragma GCC unroll 16
    for (int v = 0; v < A::kVectors; ++v) {
      const auto product = A::multiply(A::to_float(A::subtract_int(sums[0][i][v], bias)), scale);
      const auto weight_scale = A::load_float(reinterpret_cast<const float*>(tile.weights) + v * A::kLanes);
      A::store_float(tile.out + row * kBlockRows + v * A::kLanes, A::multiply(product, weight_scale));
    }
  }
}

// int8 weights, fp32 activations.
template <class A, int M>
void int8_f32_group(const Tile& tile, const Pass& pass) {
  constexpr int kSplit = split_for<A, M>(5);
  typename A::Float sums[kSplit][M][A::kVectors];
  fill(sums, A::zero_float());
  const std::uint8_t* const* const x = tile.x + pass.first;
  FarAhead ahead(tile, tile.weights + 64, int8_block_bytes(tile), pass);
  const std::uint8_t* w = tile.weights + 64;
  const auto take = [&]<int kByte>(std::int64_t k, const typename A::Int(&raw)[A::kVectors]) MOE_FX_INLINE {
    typename A::Float weights[A::kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < A::kVectors; ++v) {
      weights[v] = A::to_float(A::template shift_right_signed<24>(A::template shift_left<24 - 8 * kByte>(raw[v])));
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const auto value = A::broadcast_float(reinterpret_cast<const float*>(x[i])[k + kByte]);
#pragma GCC unroll 16
      for (int v = 0; v < A::kVectors; ++v)
        sums[kByte % kSplit][i][v] = A::multiply_add(sums[kByte % kSplit][i][v], weights[v], value);
    }
  };
  for (std::int64_t k = 0; k < tile.inputs; k += 4, w += 64) {  // beyond the inputs, values and weights are zeros
    ahead.template advance<M>();
    typename A::Int raw[A::kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < A::kVectors; ++v)
      raw[v] = A::load_int(w + v * A::kLanes * 4);
    take.template operator()<0>(k, raw);
    take.template operator()<1>(k, raw);
    take.template operator()<2>(k, raw);
    take.template operator()<3>(k, raw);
  }
  join(sums, A::add_float);
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
    for (int v = 0; v < A::kVectors; ++v) {
      const auto weight_scale = A::load_float(reinterpret_cast<const float*>(tile.weights) + v * A::kLanes);
      A::store_float(tile.out + (pass.first + i) * kBlockRows + v * A::kLanes,
                     A::multiply(sums[0][i][v], weight_scale));
    }
  }
}

// The zero points of a group as fp32, one per row.
template <class A>
inline typename A::Int zero_points_of(const Tile& tile, const Int4Block& block, std::int64_t group, int v) {
  if (!tile.zero_points) return A::set_int(kInt4Middle);
  return A::load_bytes(block.zeros + group * 16 + v * A::kLanes);
}

// int4 weights: everything but the inner products, which `Group` takes over one scale group. It returns, per row and
// vector, the fp32 sum of (nibble + offset) * value, of which (zero + offset) * sum(values) comes off.
template <class A, int M, class Lookahead, class Products>
MOE_FX_INLINE inline void int4_group(const Tile& tile, const Pass& pass, float offset, Products products) {
  const Int4Block block(tile);
  typename A::Float sums[M][A::kVectors];
  for (auto& by_vector : sums) {
    for (auto& sum : by_vector)
      sum = A::zero_float();
  }
  Lookahead ahead(tile, block.values, block.bytes, pass);
  const std::int64_t size = tile.inputs / tile.groups;
  const std::uint8_t* w = block.values;
  for (std::int64_t g = 0; g < tile.groups; ++g, w += size * 8) {
    typename A::Float group_sums[M][A::kVectors];
    products(w, g, size, ahead, group_sums);
#pragma GCC unroll 16
    for (int v = 0; v < A::kVectors; ++v) {
      const auto scale = A::load_half(block.scales + g * 32 + v * A::kLanes * 2);
      const auto zero = A::add_float(A::to_float(zero_points_of<A>(tile, block, g, v)), A::broadcast_float(offset));
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        auto product = group_sums[i][v];
        if (tile.shape.form != ActivationForm::f32) {
          product = A::subtract_product(product, zero, A::broadcast_float(row_sums(tile, pass.first + i)[g]));
        }
        auto factor = scale;
        if (tile.shape.form == ActivationForm::s8) {
          factor = A::multiply(scale, A::broadcast_float(row_scales(tile, pass.first + i)[g]));
        }
        sums[i][v] = A::multiply_add(sums[i][v], product, factor);
      }
    }
  }
  const auto multiplier = A::broadcast_float(block.multiplier);
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
    for (int v = 0; v < A::kVectors; ++v) {
      A::store_float(tile.out + (pass.first + i) * kBlockRows + v * A::kLanes, A::multiply(sums[i][v], multiplier));
    }
  }
}

// int4 weights, int8 activations.
template <class A, int M>
void int4_s8_group(const Tile& tile, const Pass& pass) {
  constexpr int kUnroll = split_for<A, M>(5);
  const std::uint8_t* const* const x = tile.x + pass.first;
  int4_group<A, M, typename Int4AheadOf<M>::Type>(
      tile, pass, 0.0F,
      [&](const std::uint8_t* w, std::int64_t g, std::int64_t size, auto& ahead,
          typename A::Float(&out)[M][A::kVectors]) MOE_FX_INLINE {
        typename A::Int sums[kUnroll][M][A::kVectors];
        fill(sums, A::zero_int());
        for (std::int64_t k = g * size; k < (g + 1) * size; k += 8 * kUnroll) {
#pragma GCC unroll 16
          for (int u = 0; u < kUnroll; ++u, w += 64) {
            ahead.template advance<M>();
#pragma GCC unroll 16
            for (int v = 0; v < A::kVectors; ++v) {
              const auto raw = A::load_int(w + v * A::kLanes * 4);
              const auto low = A::low_nibbles(raw);
              const auto high = A::high_nibbles(raw);
#pragma GCC unroll 16
              for (int i = 0; i < M; ++i) {
                const std::uint8_t* const values = x[i] + k + u * 8;
                auto& sum = sums[u][i][v];
                sum = A::dot_nibbles(sum, low, A::broadcast_int(values));
                sum = A::dot_nibbles(sum, high, A::broadcast_int(values + 4));
              }
            }
          }
        }
        join(sums, A::add_int);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
          for (int v = 0; v < A::kVectors; ++v)
            out[i][v] = A::to_float(sums[0][i][v]);
        }
      });
}

// int4 weights, fp32 activations. Zero points come off before the product.
template <class A, int M>
void int4_f32_group(const Tile& tile, const Pass& pass) {
  const std::uint8_t* const* const x = tile.x + pass.first;
  const Int4Block block(tile);
  int4_group<A, M, FarAhead>(
      tile, pass, 0.0F,
      [&](const std::uint8_t* w, std::int64_t g, std::int64_t size, auto& ahead,
          typename A::Float(&out)[M][A::kVectors]) MOE_FX_INLINE {
        constexpr int kSplit = split_for<A, M>(5);
        typename A::Float sums[kSplit][M][A::kVectors];
        fill(sums, A::zero_float());
        typename A::Int zeros[A::kVectors];
#pragma GCC unroll 16
        for (int v = 0; v < A::kVectors; ++v)
          zeros[v] = zero_points_of<A>(tile, block, g, v);
        const auto take = [&]<int kNibble>(std::int64_t k, const typename A::Int(&raw)[A::kVectors]) MOE_FX_INLINE {
          constexpr int kInput = 2 * (kNibble % 4) + kNibble / 4;
          typename A::Float weights[A::kVectors];
#pragma GCC unroll 16
          for (int v = 0; v < A::kVectors; ++v) {
            const auto nibble = A::low_bits(A::template shift_right<4 * kNibble>(raw[v]));
            weights[v] = A::to_float(A::subtract_int(nibble, zeros[v]));
          }
#pragma GCC unroll 16
          for (int i = 0; i < M; ++i) {
            const auto value = A::broadcast_float(reinterpret_cast<const float*>(x[i])[k + kInput]);
#pragma GCC unroll 16
            for (int v = 0; v < A::kVectors; ++v)
              sums[kNibble % kSplit][i][v] = A::multiply_add(sums[kNibble % kSplit][i][v], weights[v], value);
          }
        };
        for (std::int64_t k = g * size; k < (g + 1) * size; k += 8, w += 64) {
          ahead.template advance<M>();
          typename A::Int raw[A::kVectors];
#pragma GCC unroll 16
          for (int v = 0; v < A::kVectors; ++v)
            raw[v] = A::load_int(w + v * A::kLanes * 4);
          [&]<int... N>(std::integer_sequence<int, N...>)
              MOE_FX_INLINE { (take.template operator()<N>(k, raw), ...); }(std::make_integer_sequence<int, 8>{});
        }
        join(sums, A::add_float);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
          for (int v = 0; v < A::kVectors; ++v)
            out[i][v] = sums[0][i][v];
        }
      });
}

// A kernel for up to A::kMaxM activation rows, by their number.
template <class A, template <class, int> class Kernel, class M>
struct PackedGroups;
template <class A, template <class, int> class Kernel, int... M>
struct PackedGroups<A, Kernel, std::integer_sequence<int, M...>> {
  using Group = void (*)(const Tile&, const Pass&);
  static constexpr Group of_size[] = {Kernel<A, M + 1>::run...};
};

template <class A, template <class, int> class Kernel>
void packed_tile(const Tile& tile) {
  using Groups = PackedGroups<A, Kernel, std::make_integer_sequence<int, A::kMaxM>>;
  const int count = (tile.m + A::kMaxM - 1) / A::kMaxM;
  for (int g = 0, done = 0; g < count; ++g) {
    const int size = (tile.m - done + count - g - 1) / (count - g);
    Groups::of_size[size - 1](tile, {done, g, count});
    done += size;
  }
}

template <class A, int M>
struct Int8S8 {
  static void run(const Tile& tile, const Pass& pass) { int8_s8_group<A, M>(tile, pass); }
};
template <class A, int M>
struct Int8F32 {
  static void run(const Tile& tile, const Pass& pass) { int8_f32_group<A, M>(tile, pass); }
};
template <class A, int M>
struct Int4S8 {
  static void run(const Tile& tile, const Pass& pass) { int4_s8_group<A, M>(tile, pass); }
};
template <class A, int M>
struct Int4F32 {
  static void run(const Tile& tile, const Pass& pass) { int4_f32_group<A, M>(tile, pass); }
};
