// Products of many activation rows in AMX tiles, written once over a trait `T` of the tile instructions, so that all
// that surrounds the instructions is tested on machines without them. Included like elementwise.inl.
//
// T offers, besides the instructions (configure, release, zero, load, store, dot_int8, dot_bf16; tiles are template
// arguments), prefetch, copy_line (64 bytes) and transpose (16 rows of 16 words of 32 bits, rows `stride` bytes apart,
// to 64-byte rows).
//
// A step takes 64 bytes of a row: 64 int8 or 32 bf16. C[activation row][weight row] += A * B, where tile A is a step of
// 16 activation rows as they are, and tile B holds, per word of 32 bits of a step, that word of all 16 weight rows.
// Packed int8 blocks are sequences of B tiles; row-major bf16 weights become B tiles by transposing words. (Transposing
// the activations instead would make the weights an A tile as they lie, but up to four groups of 16 activation rows
// share one tile of weights, and each would have to be transposed for every 16 weight rows anew.)
//
// What the next step needs is brought into form before the current step's products are issued: it is in the first cache
// when it is loaded, and that work hides behind the tile unit's.

constexpr int kTileRows = 16;
constexpr std::size_t kStepBytes = 64;
constexpr std::size_t kTileBytes = kTileRows * kStepBytes;

// Tiles 0 to 3 are sums. Full groups of activations alternate between two tiles, so that one is loaded while the other
// one is multiplied; the last group may have fewer rows, and its own tile says how many.
constexpr int kSums = 4;
constexpr int kTileB = 4;
constexpr int kTileA = 5;
constexpr int kLastTileA = 7;

// Few groups keep several sums each: a product waits 52 cycles for the one before it on the same sums, and takes 16.
constexpr int split_of(int groups) { return groups == 1 ? 4 : groups == 2 ? 2 : 1; }

// Steps from a weight that is prefetched to the one that is used: 12 KiB.
constexpr std::int64_t kStepsAhead = 12;

// What LDTILECFG reads.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};

  void set(int tile, int tile_rows) {
    row_bytes[tile] = kStepBytes;
    rows[tile] = static_cast<std::uint8_t>(tile_rows);
  }
};
static_assert(sizeof(TileConfig) == 64);

// Where the weights of the step kStepsAhead after one are: of this tile, or past its last step of the next one; or
// null.
struct StepAhead {
  StepAhead(const Tile& tile, std::int64_t now, std::int64_t steps)
      : weights(now + kStepsAhead < steps ? tile.weights : tile.next),
        step(static_cast<std::size_t>(now + kStepsAhead < steps ? now + kStepsAhead : now + kStepsAhead - steps)) {}

  const std::uint8_t* weights;
  std::size_t step;
};

// Packed int8 blocks times int8 activations.
template <class T>
class Int8Tiles {
 public:
  using Sum = std::int32_t;

  explicit Int8Tiles(const Tile& tile) : tile_(tile) {}

  std::int64_t steps() const { return tile_.shape.padded() / 64; }
  void prepare(std::int64_t) {}
  const std::uint8_t* weights(std::int64_t step) const {
    return tile_.weights + kLine + static_cast<std::size_t>(step) * kTileBytes;
  }
  void prefetch(std::int64_t step) const {
    const StepAhead ahead(tile_, step, steps());
    if (ahead.weights == nullptr) return;
    const std::uint8_t* const from = ahead.weights + ahead.step * kTileBytes;
    for (std::size_t at = 0; at < kTileBytes; at += kLine)
      T::prefetch(from + at);
  }
  template <int C, int A>
  static void multiply_add() {
    T::template dot_int8<C, A, kTileB>();
  }
  float result(int row, int column, std::int32_t sum) const {
    const auto* const x_scale = reinterpret_cast<const float*>(tile_.x[row] + tile_.shape.scales_offset());
    return static_cast<float>(sum) * *x_scale * reinterpret_cast<const float*>(tile_.weights)[column];
  }

 private:
  const Tile& tile_;
};

// Row-major bf16 weights times bf16 activations.
template <class T>
class Bf16Tiles {
 public:
  using Sum = float;

  explicit Bf16Tiles(const Tile& tile) : tile_(tile) {}

  std::int64_t steps() const { return (tile_.inputs + 31) / 32; }
  void prepare(std::int64_t step) {
    if (tile_.rows == kTileRows && (step + 1) * 32 <= tile_.inputs) {
      T::transpose(tile_.weights + static_cast<std::size_t>(step) * kStepBytes, tile_.weight_stride,
                   transposed_[step % 2]);
    } else {
      prepare_part(step);
    }
  }
  const std::uint8_t* weights(std::int64_t step) const { return transposed_[step % 2]; }
  void prefetch(std::int64_t step) const {
    const StepAhead ahead(tile_, step, steps());
    if (ahead.weights == nullptr) return;
    const std::uint8_t* row = ahead.weights + ahead.step * kStepBytes;
    for (int r = 0; r < tile_.rows; ++r, row += tile_.weight_stride)
      T::prefetch(row);
  }
  template <int C, int A>
  static void multiply_add() {
    T::template dot_bf16<C, A, kTileB>();
  }
  float result(int, int, float sum) const { return sum; }

 private:
  // A step of which there are fewer rows or, at the rows' end, fewer inputs: zeros stand for the others, and nothing
  // beyond the weights is read.
  [[gnu::noinline]] void prepare_part(std::int64_t step) {
    alignas(64) std::uint8_t padded[kTileBytes] = {};
    const std::int64_t left = tile_.inputs - step * 32;
    const std::size_t bytes = left < 32 ? static_cast<std::size_t>(left) * 2 : kStepBytes;
    const std::uint8_t* row = tile_.weights + static_cast<std::size_t>(step) * kStepBytes;
    for (int r = 0; r < tile_.rows; ++r, row += tile_.weight_stride) {
      __builtin_memcpy(padded + static_cast<std::size_t>(r) * kStepBytes, row, bytes);
    }
    T::transpose(padded, kStepBytes, transposed_[step % 2]);
  }

  const Tile& tile_;
  alignas(64) std::uint8_t transposed_[2][kTileBytes];
};

// A step of up to G groups of activation rows, whose places in memory are anywhere, as tiles.
template <class T, int G>
class ActivationTiles {
 public:
  // Rows are copied four at a time; the last row stands in for those that are missing, in places that no tile reads.
  ActivationTiles(const std::uint8_t* const* rows, int m) : padded_(static_cast<int>(round_up(m, 4))) {
    for (int i = 0; i < padded_; ++i)
      rows_[i] = rows[i < m ? i : m - 1];
  }

  void prepare(std::int64_t step) {
    const std::size_t offset = static_cast<std::size_t>(step) * kStepBytes;
    std::uint8_t* to = tiles_[step % 2];
    for (int i = 0; i < padded_; i += 4, to += 4 * kStepBytes) {
      for (int j = 0; j < 4; ++j)
        T::copy_line(rows_[i + j] + offset, to + j * static_cast<int>(kStepBytes));
    }
  }
  const std::uint8_t* tiles(std::int64_t step) const { return tiles_[step % 2]; }

 private:
  const std::uint8_t* rows_[G * kTileRows];
  int padded_;
  alignas(64) std::uint8_t tiles_[2][G * kTileBytes];
};

// The tile that group g of G is loaded into.
constexpr int tile_a_of(int g, int groups) { return g + 1 < groups ? kTileA + g % 2 : kLastTileA; }

// One step's products of all groups, added to the u-th sums of each.
template <class T, class Weights, int u, int... g>
inline void add_products(const std::uint8_t* x, const std::uint8_t* weights, std::integer_sequence<int, g...>) {
  constexpr int kGroups = sizeof...(g);
  T::template load<kTileB>(weights, kStepBytes);
  ((T::template load<tile_a_of(g, kGroups)>(x + g * kTileBytes, kStepBytes),
    Weights::template multiply_add<g * split_of(kGroups) + u, tile_a_of(g, kGroups)>()),
   ...);
}

template <class T, int... C>
inline void zero_sums(std::integer_sequence<int, C...>) {
  (T::template zero<C>(), ...);
}
template <class T, class Sum, int... C>
inline void store_sums(Sum (*sums)[kTileRows][kBlockRows], std::integer_sequence<int, C...>) {
  (T::template store<C>(sums[C], kStepBytes), ...);
}

// G groups of activation rows: the m rows from `first` on.
template <class T, class Weights, int G>
void tile_groups(const Tile& tile, int first, int m) {
  constexpr int kSplit = split_of(G);
  constexpr std::make_integer_sequence<int, G> kGroups;
  constexpr std::make_integer_sequence<int, G * kSplit> kSumTiles;
  static_assert(G * kSplit <= kSums);

  TileConfig config;
  config.set(kTileB, kTileRows);
  for (int g = 0; g < G; ++g) {
    const int rows = g + 1 < G ? kTileRows : m - g * kTileRows;
    config.set(tile_a_of(g, G), rows);
    for (int u = 0; u < kSplit; ++u)
      config.set(g * kSplit + u, rows);
  }
  // Configured and released by every call: other code of this thread may use the tiles too, and while they are in use
  // the system has 8 KiB more to save at every switch to another thread. A call is long against both.
  T::configure(config);
  zero_sums<T>(kSumTiles);

  Weights weights(tile);
  ActivationTiles<T, G> x(tile.x + first, m);
  const std::int64_t steps = weights.steps();
  weights.prepare(0);
  x.prepare(0);
  for (std::int64_t step = 0; step < steps; ++step) {
    weights.prefetch(step);
    if (step + 1 < steps) {
      weights.prepare(step + 1);
      x.prepare(step + 1);
    }
    const std::uint8_t* const a = x.tiles(step);
    const std::uint8_t* const b = weights.weights(step);
    switch (step % kSplit) {
      case 0: add_products<T, Weights, 0>(a, b, kGroups); break;
      case 1: add_products<T, Weights, kSplit == 1 ? 0 : 1>(a, b, kGroups); break;
      case 2: add_products < T, Weights, kSplit<4 ? 0 : 2>(a, b, kGroups); break;
      case 3: add_products < T, Weights, kSplit<4 ? 0 : 3>(a, b, kGroups); break;
    }
  }

  alignas(64) typename Weights::Sum sums[G * kSplit][kTileRows][kBlockRows];
  store_sums<T>(sums, kSumTiles);
  T::release();
  for (int i = 0; i < m; ++i) {
    const auto* const of_row = sums + i / kTileRows * kSplit;
    const int row = i % kTileRows;
    for (int r = 0; r < kBlockRows; ++r) {
      auto sum = of_row[0][row][r];
      for (int u = 1; u < kSplit; ++u)
        sum += of_row[u][row][r];
      tile.out[(first + i) * kBlockRows + r] = weights.result(first + i, r, sum);
    }
  }
}

template <class T, class Weights>
void tile_product(const Tile& tile) {
  constexpr void (*kOfGroups[])(const Tile&, int, int) = {tile_groups<T, Weights, 1>, tile_groups<T, Weights, 2>,
                                                          tile_groups<T, Weights, 3>, tile_groups<T, Weights, 4>};
  constexpr int kMost = kTileRows * static_cast<int>(sizeof kOfGroups / sizeof *kOfGroups);
  for (int first = 0; first < tile.m; first += kMost) {
    const int m = tile.m - first < kMost ? tile.m - first : kMost;
    kOfGroups[(m - 1) / kTileRows](tile, first, m);
  }
}
