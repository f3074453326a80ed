// Products with row-major weights, written once over a trait `A` of the instruction set. Included like elementwise.inl.
//
// A::kStep inputs are taken at a time: load_weights / load_weights_tail (fewer inputs, the rest zero; never reads
// beyond them), load_x (padded rows), multiply_add, and sums of vectors' lanes (sum, sum4).
//
// Vectors run along the inputs, so weights stay as the model has them. R weight rows times M activation rows are held
// in registers; U > 1 splits a row's sum where R * M accumulators are too few to hide a multiply-add's latency.

template <class A, int R, int M, int U>
inline void dense_rows(const Tile& tile, int first_row, const std::uint8_t* const* x, float* out,
                       const std::uint8_t* ahead) {
  using Vector = typename A::Vector;
  constexpr std::int64_t kStepBytes = A::kStep * 2;
  const std::uint8_t* const weights = tile.weights + static_cast<std::size_t>(first_row) * tile.weight_stride;
  Vector sums[U][R][M];
  for (int u = 0; u < U; ++u) {
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < M; ++i)
        sums[u][r][i] = A::zero();
    }
  }
  const std::int64_t inputs = tile.inputs;
  std::int64_t k = 0;
  for (; k + A::kStep * U <= inputs; k += A::kStep * U) {
    for (int u = 0; u < U; ++u) {
      const std::int64_t at = k + u * A::kStep;
      typename A::Weights w[R];
      for (int r = 0; r < R; ++r) {
        const std::size_t offset = static_cast<std::size_t>(r) * tile.weight_stride + static_cast<std::size_t>(at) * 2;
        w[r] = A::load_weights(weights + offset);
        if (kStepBytes == 64 || ((at * 2) & 63) == 0) __builtin_prefetch(ahead + offset, 0, 2);
      }
      for (int i = 0; i < M; ++i) {
        const auto values = A::load_x(x[i], at);
        for (int r = 0; r < R; ++r)
          sums[u][r][i] = A::multiply_add(sums[u][r][i], w[r], values);
      }
    }
  }
  for (; k < inputs; k += A::kStep) {
    const std::int64_t left = inputs - k;
    typename A::Weights w[R];
    for (int r = 0; r < R; ++r) {
      const std::uint8_t* const at =
          weights + static_cast<std::size_t>(r) * tile.weight_stride + static_cast<std::size_t>(k) * 2;
      w[r] = left >= A::kStep ? A::load_weights(at) : A::load_weights_tail(at, static_cast<int>(left));
    }
    for (int i = 0; i < M; ++i) {
      const auto values = A::load_x(x[i], k);
      for (int r = 0; r < R; ++r)
        sums[0][r][i] = A::multiply_add(sums[0][r][i], w[r], values);
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int r = 0; r < R; ++r) {
      for (int u = 1; u < U; ++u)
        sums[0][r][i] = A::add(sums[0][r][i], sums[u][r][i]);
    }
    float* const to = out + i * kBlockRows + first_row;
    if constexpr (R == 4) {
      A::sum4(sums[0][0][i], sums[0][1][i], sums[0][2][i], sums[0][3][i], to);
    } else {
      for (int r = 0; r < R; ++r)
        to[r] = A::sum(sums[0][r][i]);
    }
  }
}

// All rows of a tile for M activation rows. `fresh`: the weights come from memory for the first time in this tile, so
// that what follows them is worth prefetching.
template <class A, int M>
void dense_group(const Tile& tile, const std::uint8_t* const* x, float* out, bool fresh) {
  constexpr int kRows = M <= A::kMaxStreamed ? 1 : 4;
  constexpr int kUnroll = M == 1 ? 4 : M * kRows <= 3 ? 2 : 1;
  // As for packed weights: close behind the processor's own prefetcher where a line takes little time, else far.
  constexpr std::size_t kAheadBytes = M == 1 ? 2048 : M == 2 ? 4096 : 12288;
  const int step = tile.rows - tile.rows % kRows;
  const std::size_t bytes = static_cast<std::size_t>(tile.rows) * tile.weight_stride;
  const auto ahead_of = [&](int row) {
    const std::size_t here = static_cast<std::size_t>(row) * tile.weight_stride;
    if (!fresh) return tile.weights + here;
    // Several rows at a time: the same inputs of later rows.
    const std::size_t distance = kRows == 1 ? kAheadBytes : (kAheadBytes / tile.weight_stride + 1) * tile.weight_stride;
    const std::size_t target = here + distance;
    return target < bytes || tile.next == nullptr ? tile.weights + target : tile.next + (target - bytes);
  };
  if (fresh && tile.next != nullptr && kAheadBytes < tile.weight_stride) {
    for (std::size_t at = 0; at < kAheadBytes; at += 64)
      __builtin_prefetch(tile.next + at, 0, 2);
  }
  for (int row = 0; row < step; row += kRows)
    dense_rows<A, kRows, M, kUnroll>(tile, row, x, out, ahead_of(row));
  for (int row = step; row < tile.rows; ++row)
    dense_rows<A, 1, M, 1>(tile, row, x, out, ahead_of(row));
}

template <class A, class M>
struct DenseGroups;
template <class A, int... M>
struct DenseGroups<A, std::integer_sequence<int, M...>> {
  using Group = void (*)(const Tile&, const std::uint8_t* const*, float*, bool);
  static constexpr Group of_size[] = {dense_group<A, M + 1>...};
};

template <class A>
void dense_tile(const Tile& tile) {
  using Groups = DenseGroups<A, std::make_integer_sequence<int, A::kMaxM>>;
  // Groups of nearly equal size: a last group of one row would waste its weight loads.
  const int count = (tile.m + A::kMaxM - 1) / A::kMaxM;
  for (int g = 0, done = 0; g < count; ++g) {
    const int size = (tile.m - done + count - g - 1) / (count - g);
    Groups::of_size[size - 1](tile, tile.x + done, tile.out + done * kBlockRows, g == 0);
    done += size;
  }
}
