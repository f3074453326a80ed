// Products with row-major weights, written once over a trait `A` of the instruction set. Included like elementwise.inl.
//
// A::kStep inputs are taken at a time: load_weights / load_weights_tail (fewer inputs, the rest zero; never reads
// beyond them), load_x (padded rows), multiply_add, and sums of vectors' lanes (sum, sum4).
//
// Vectors run along the inputs, so weights stay as the model has them. R weight rows times M activation rows are held
// in registers; U > 1 splits a row's sum where R * M accumulators are too few to hide a multiply-add's latency.

// Weight rows that are held in registers together.
constexpr int kTogether = 4;

template <class A, int R, int M, int U>
inline void dense_rows(const Tile& tile, int first_row, const std::uint8_t* const* x, float* out,
                       const std::uint8_t* const (&ahead)[R]) {
  using Vector = typename A::Vector;
  constexpr std::int64_t kStepBytes = A::kStep * 2;
  const std::uint8_t* const weights = tile.weights + static_cast<std::size_t>(first_row) * tile.weight_stride;
  Vector sums[U][R][M];
#pragma GCC unroll 16
  for (int u = 0; u < U; ++u) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i)
        sums[u][r][i] = A::zero();
    }
  }
  const std::int64_t inputs = tile.inputs;
  std::int64_t k = 0;
  for (; k + A::kStep * U <= inputs; k += A::kStep * U) {
#pragma GCC unroll 16
    for (int u = 0; u < U; ++u) {
      const std::int64_t at = k + u * A::kStep;
      typename A::Weights w[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const std::size_t offset = static_cast<std::size_t>(r) * tile.weight_stride + static_cast<std::size_t>(at) * 2;
        w[r] = A::load_weights(weights + offset);
        if (kStepBytes == 64 || ((at * 2) & 63) == 0) __builtin_prefetch(ahead[r] + at * 2, 0, 2);
      }
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const auto values = A::load_x(x[i], at);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
          sums[u][r][i] = A::multiply_add(sums[u][r][i], w[r], values);
      }
    }
  }
  for (; k < inputs; k += A::kStep) {
    const std::int64_t left = inputs - k;
    typename A::Weights w[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const std::uint8_t* const at =
          weights + static_cast<std::size_t>(r) * tile.weight_stride + static_cast<std::size_t>(k) * 2;
      w[r] = left >= A::kStep ? A::load_weights(at) : A::load_weights_tail(at, static_cast<int>(left));
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const auto values = A::load_x(x[i], k);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
        sums[0][r][i] = A::multiply_add(sums[0][r][i], w[r], values);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
      for (int u = 1; u < U; ++u)
        sums[0][r][i] = A::add(sums[0][r][i], sums[u][r][i]);
    }
    float* const to = out + i * kBlockRows + first_row;
    if constexpr (R == kTogether) {
      A::sum4(sums[0][0][i], sums[0][1][i], sums[0][2][i], sums[0][3][i], to);
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
        to[r] = A::sum(sums[0][r][i]);
    }
  }
}

// Which of how many groups of activation rows passes a tile's weights.
struct DensePass {
  int index, count;

  // Whether this group prefetches for the row that is r-th of kTogether: each row's turn is one group's, so that memory
  // is read all the time and no group's own loads wait behind all the prefetches.
  bool prefetches(int r) const { return r * count / kTogether == index; }
};

// Some rows of a tile for M activation rows.
template <class A, int M, bool kStreamed>
void dense_group(const Tile& tile, int first_row, int rows, const std::uint8_t* const* x, float* out,
                 const DensePass& pass) {
  constexpr int kRows = kStreamed ? 1 : kTogether;
  constexpr int kUnroll = !kStreamed ? 1 : M <= 2 ? 4 : 2;
  // As for packed weights: close behind the processor's own prefetcher where a line takes little time, else far.
  constexpr std::size_t kAheadBytes = M == 1 ? 2048 : M == 2 ? 4096 : 12288;
  const std::size_t stride = tile.weight_stride;
  const std::size_t bytes = static_cast<std::size_t>(tile.rows) * stride;
  // Several rows at a time: the same inputs of later rows.
  const std::size_t distance = kRows == 1 ? kAheadBytes : (kAheadBytes / stride / kRows + 1) * kRows * stride;
  const auto ahead_of = [&](int row, int r) {
    const std::size_t here = static_cast<std::size_t>(row + r) * stride;
    if (!kStreamed && !pass.prefetches(r)) return tile.weights + here;
    const std::size_t target = here + distance;
    return target < bytes || tile.next == nullptr ? tile.weights + target : tile.next + (target - bytes);
  };
  const int end = first_row + rows;
  const int whole = end - rows % kRows;
  for (int row = first_row; row < whole; row += kRows) {
    if constexpr (kStreamed) {
      dense_rows<A, 1, M, kUnroll>(tile, row, x, out, {ahead_of(row, 0)});
    } else {
      static_assert(kTogether == 4);
      dense_rows<A, 4, M, kUnroll>(tile, row, x, out,
                                   {ahead_of(row, 0), ahead_of(row, 1), ahead_of(row, 2), ahead_of(row, 3)});
    }
  }
  for (int row = whole; row < end; ++row)
    dense_rows<A, 1, M, 1>(tile, row, x, out, {ahead_of(row, 0)});
  if (kStreamed && tile.next != nullptr && kAheadBytes < stride) {
    for (std::size_t at = 0; at < kAheadBytes; at += 64)
      __builtin_prefetch(tile.next + at, 0, 2);
  }
}

template <class A, bool kStreamed, class M>
struct DenseGroups;
template <class A, bool kStreamed, int... M>
struct DenseGroups<A, kStreamed, std::integer_sequence<int, M...>> {
  using Group = void (*)(const Tile&, int, int, const std::uint8_t* const*, float*, const DensePass&);
  static constexpr Group of_size[] = {dense_group<A, M + 1, kStreamed>...};
};

template <class A>
void dense_tile(const Tile& tile) {
  // A few activation rows: one weight row at a time is one linear stream, and fast enough. More: fewer loads count.
  using Streamed = DenseGroups<A, true, std::make_integer_sequence<int, A::kMaxStreamed>>;
  using Groups = DenseGroups<A, false, std::make_integer_sequence<int, A::kMaxM>>;
  if (tile.m <= A::kMaxStreamed) return Streamed::of_size[tile.m - 1](tile, 0, tile.rows, tile.x, tile.out, {0, 1});
  // Groups of nearly equal size: a last group of one row would waste its weight loads.
  const int count = (tile.m + A::kMaxM - 1) / A::kMaxM;
  // With several groups, few weight rows at a time pass all of them: they stay in the first cache meanwhile, and memory
  // is read all the time instead of only by the first group.
  const int rows = count == 1 ? tile.rows : kTogether;
  for (int row = 0; row < tile.rows; row += rows) {
    for (int g = 0, done = 0; g < count; ++g) {
      const int size = (tile.m - done + count - g - 1) / (count - g);
      Groups::of_size[size - 1](tile, row, (rows < tile.rows - row ? rows : tile.rows - row), tile.x + done,
                                tile.out + done * kBlockRows, {g, count});
      done += size;
    }
  }
}
