// The phases of a call; see engine.h.

#include "cpu/engine.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/memory.h"
#include "cpu/pack.h"

namespace moe_fx::cpu {

namespace {

// Activation rows that one tile call takes: they stay in the second-level cache while a unit's weights pass by.
constexpr int kChunk = 64;
// Units of the last phase that there should be for each thread, so that threads end together.
constexpr std::int64_t kUnitsPerThread = 4;
// Bytes of results that a thread gathers in its unit of the last phase, to stay in its second-level cache.
constexpr std::int64_t kUnitBytes = 256 << 10;

std::int64_t blocks_of(std::int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }

// An expert that some token chose, and its pairs among the pairs sorted by expert.
struct ActiveExpert {
  std::int64_t expert;
  std::int64_t first, count;
};

// A counter that hands out rows, alone on its cache line.
struct alignas(2 * kLine) Counter {
  std::atomic<std::int64_t> next{0};
};

// A thread's share of a phase's units, taken from the front by the thread itself and from the back by those who are
// done with theirs. Each thread so reads its weights as one long stream: processors fetch ahead of a stream what a
// thread that hops about leaves unused (measured on Zen 4: two threads that take turns at 64 KiB reach 70 % of the
// bandwidth that they reach on contiguous halves).
class alignas(2 * kLine) Share {
 public:
  void reset(std::int64_t units) noexcept { range_.store(join(0, units), std::memory_order_relaxed); }

  // The next units, [first, second): a part of what is left, since a claim makes the processor wait for every load that
  // is under way.
  std::pair<std::int64_t, std::int64_t> take_some() noexcept {
    std::uint64_t range = range_.load(std::memory_order_relaxed);
    while (begin_of(range) < end_of(range)) {
      const std::int64_t middle = begin_of(range) + (end_of(range) - begin_of(range) + 3) / 4;
      const std::uint64_t rest = join(middle, end_of(range));
      if (range_.compare_exchange_weak(range, rest, std::memory_order_relaxed)) return {begin_of(range), middle};
    }
    return {0, 0};
  }

  // Gives away the back half of what is left: [first, second).
  std::pair<std::int64_t, std::int64_t> give_half() noexcept {
    std::uint64_t range = range_.load(std::memory_order_relaxed);
    while (begin_of(range) < end_of(range)) {
      const std::int64_t middle = (begin_of(range) + end_of(range)) / 2;
      const std::uint64_t rest = join(begin_of(range), middle);
      if (range_.compare_exchange_weak(range, rest, std::memory_order_relaxed)) return {middle, end_of(range)};
    }
    return {0, 0};
  }

 private:
  static std::uint64_t join(std::int64_t begin, std::int64_t end) {
    return static_cast<std::uint64_t>(begin) << 32 | static_cast<std::uint64_t>(end);
  }
  static std::int64_t begin_of(std::uint64_t range) { return static_cast<std::int64_t>(range >> 32); }
  static std::int64_t end_of(std::uint64_t range) { return static_cast<std::int64_t>(range & 0xffffffffU); }

  std::atomic<std::uint64_t> range_{0};
};

// Who of how many works on a segment.
struct Part {
  int index, count;

  std::int64_t begin_of(std::int64_t total, int part) const { return total * part / count; }
};

// Contiguous parts of one allocation.
class Carver {
 public:
  explicit Carver(std::uint8_t* base) : base_(base) {}

  template <class T>
  T* take(std::int64_t count) {
    auto* const part = reinterpret_cast<T*>(base_ + used_);
    used_ += static_cast<std::size_t>(round_up(static_cast<std::int64_t>(sizeof(T)) * count, 2 * kLine));
    return part;
  }
  std::size_t used() const { return used_; }

 private:
  std::uint8_t* base_;
  std::size_t used_ = 0;
};

// What a thread needs for itself.
struct Scratch {
  float* gate;             // [kChunk][16]
  float* up;               // [kChunk][16]
  const std::uint8_t** x;  // [kChunk]
  float* weights;          // [kChunk]
  float** sums;            // [kChunk]
  float* output;           // [T][blocks of a unit * 16]
  float* row;              // [padded H]
};

// A call's shared scratch memory, carved out of the workspace.
struct Buffers {
  std::uint8_t* x_rows;   // activation rows of w13: one per token, or per pair when weights go on the input
  float* h;               // [pairs][padded I] results of the activation, pairs sorted by expert
  std::uint8_t* h_rows;   // activation rows of w2
  std::int64_t* pairs;    // [T * k] pair numbers sorted by expert
  std::int32_t* experts;  // [T * k] local expert of each pair, -1 for none
  float* weights;         // [T * k]
  std::int64_t* begins;   // [E + 1]
  ActiveExpert* active;   // [min(E, T * k)]
  Scratch* scratch;       // [threads]
  Share* shares;          // [2 phases][segments][threads]
};

struct Shapes {
  RowShape x, h;
  std::int64_t padded_intermediate;
  std::int64_t x_rows;
};

Shapes shapes_of(const Layer& layer, const Kernels& kernels, DType x_dtype, std::int64_t tokens, std::int64_t top_k) {
  Shapes shapes;
  const bool packed = is_packed(layer.format);
  const ActivationForm form = layer.int8_activations ? ActivationForm::s8 : kernels.exact_form(layer.format, x_dtype);
  const bool int4 = layer.format == WeightFormat::int4;
  shapes.x = {form, layer.hidden, packed ? layer.layout->groups(Matrix::w13) : 1, int4};
  shapes.h = {form, layer.intermediate, packed ? layer.layout->groups(Matrix::w2) : 1, int4};
  shapes.padded_intermediate = round_up(layer.intermediate, kBlockRows);
  shapes.x_rows = layer.weight_on_input ? tokens * top_k : tokens;
  return shapes;
}

// Blocks of output rows that a unit of the last phase takes.
std::int64_t unit_blocks(const Layer& layer, std::int64_t tokens, int threads) {
  const std::int64_t for_balance = blocks_of(layer.hidden) / (kUnitsPerThread * threads);
  const std::int64_t for_cache = kUnitBytes / (kBlockRows * 4 * std::max<std::int64_t>(tokens, 1));
  return std::max<std::int64_t>(std::min(for_balance, for_cache), 1);
}

// Carves everything out of `base`; with a null base only the size means something.
std::size_t carve(std::uint8_t* base, const Layer& layer, const Shapes& shapes, std::int64_t tokens, std::int64_t top_k,
                  int threads, Buffers& buffers) {
  Carver carver(base);
  const std::int64_t pairs = tokens * top_k;
  buffers.x_rows = carver.take<std::uint8_t>(shapes.x_rows * static_cast<std::int64_t>(shapes.x.bytes()));
  buffers.h = carver.take<float>(pairs * shapes.padded_intermediate);
  buffers.h_rows = carver.take<std::uint8_t>(pairs * static_cast<std::int64_t>(shapes.h.bytes()));
  buffers.pairs = carver.take<std::int64_t>(pairs);
  buffers.experts = carver.take<std::int32_t>(pairs);
  buffers.weights = carver.take<float>(pairs);
  buffers.begins = carver.take<std::int64_t>(layer.experts + 1);
  buffers.active = carver.take<ActiveExpert>(std::min(layer.experts, pairs));
  buffers.scratch = carver.take<Scratch>(threads);
  buffers.shares = carver.take<Share>(2 * kMaxSegments * threads);
  for (int thread = 0; thread < threads; ++thread) {
    Scratch scratch;
    scratch.gate = carver.take<float>(kChunk * kBlockRows);
    scratch.up = carver.take<float>(kChunk * kBlockRows);
    scratch.x = carver.take<const std::uint8_t*>(kChunk);
    scratch.weights = carver.take<float>(kChunk);
    scratch.sums = carver.take<float*>(kChunk);
    scratch.output = carver.take<float>(tokens * unit_blocks(layer, tokens, threads) * kBlockRows);
    scratch.row = carver.take<float>(round_up(layer.hidden, 64));
    if (base != nullptr) buffers.scratch[thread] = scratch;
  }
  return carver.used();
}

// Where the blocks of 16 rows of a projection are.
struct RowBlocks {
  const std::uint8_t* base = nullptr;  // of expert 0, block first_block
  std::size_t expert_stride = 0, block_stride = 0;
  std::int64_t first_block = 0;
  std::int64_t count = 0;  // rows of the whole projection
  Tile tile;               // what all tiles of the projection have in common

  const std::uint8_t* weights(std::int64_t expert, std::int64_t block) const {
    return base + static_cast<std::size_t>(expert) * expert_stride +
           static_cast<std::size_t>(block - first_block) * block_stride;
  }
  Tile tile_of(std::int64_t expert, std::int64_t block) const {
    Tile result = tile;
    result.weights = weights(expert, block);
    result.rows = static_cast<int>(std::min(kBlockRows, count - block * kBlockRows));
    return result;
  }
};

// One call while it runs: shared by all threads of its team.
class Run {
 public:
  Run(const Layer& layer, const Call& call, const Kernels& kernels, std::uint8_t* workspace, int threads, int groups)
      : layer_(layer),
        call_(call),
        kernels_(kernels),
        tokens_(call.tokens),
        shapes_(shapes_of(layer, kernels, call.x_dtype, call.tokens, call.top_k)) {
    carve(workspace, layer, shapes_, call.tokens, call.top_k, threads, buffers_);
    tile_ = kernels.tile[static_cast<std::size_t>(layer.format)][static_cast<std::size_t>(shapes_.x.form)];
    segments_ = is_packed(layer.format) ? layer.layout->spec().segments : std::min(groups, kMaxSegments);
    unit_blocks_ = unit_blocks(layer, call.tokens, threads);
    threads_ = threads;
  }

  static void on_worker(void* run, const Worker& worker) noexcept { static_cast<Run*>(run)->work(worker); }

  // Makes the object fit for another run of the same call.
  void rewind(std::int64_t tokens) noexcept {
    tokens_ = tokens;
    meeting_.store(kNobodyCame, std::memory_order_relaxed);
    inputs_.next = intermediates_.next = 0;
  }

 private:
  // The blocks of a matrix in a segment: of packed weights as they were packed, of dense ones an even share.
  std::pair<std::int64_t, std::int64_t> segment_blocks(Matrix matrix, int segment) const {
    if (is_packed(layer_.format)) return layer_.layout->segment_blocks(matrix, segment);
    const std::int64_t blocks = blocks_of(matrix == Matrix::w13 ? layer_.intermediate : layer_.hidden);
    // Of w2 an even number, so that two nodes never write to one cache line of a 16-bit result.
    const std::int64_t step = matrix == Matrix::w13 ? 1 : 2;
    const auto begin = [&](int s) { return std::min(round_up(blocks * s / segments_, step), blocks); };
    return {begin(segment), segment + 1 == segments_ ? blocks : begin(segment + 1)};
  }

  void work(const Worker& worker) {
    meet(worker.count);
    convert_inputs(worker);
    if (worker.index == 0) route();
    barrier_.wait();
    set_out_shares(worker);
    barrier_.wait();
    for_my_segments(worker, [&](int segment, const Part& part) { gate_and_up(worker, segment, part); });
    barrier_.wait();
    convert_intermediate();
    barrier_.wait();
    for_my_segments(worker, [&](int segment, const Part& part) { down(worker, segment, part); });
  }

  // Sets the barrier to the number of threads that really came, which OpenMP may have made smaller than was asked for.
  void meet(int count) {
    int expected = kNobodyCame;
    if (meeting_.compare_exchange_strong(expected, kFirstCame, std::memory_order_relaxed)) {
      barrier_.reset(count);
      meeting_.store(kReady, std::memory_order_release);
    }
    while (meeting_.load(std::memory_order_acquire) != kReady)
      std::this_thread::yield();
  }

  // A segment's weights lie on one node: its threads take them. With fewer segments than nodes all take part in all.
  template <class Function>
  void for_my_segments(const Worker& worker, Function function) {
    for (int segment = 0; segment < segments_; ++segment) {
      if (segments_ < worker.groups) {
        function(segment, Part{worker.index, worker.count});
      } else if (segment % worker.groups == worker.group) {
        function(segment, Part{worker.index_in_group, worker.group_size});
      }
    }
  }

  Share& share(int phase, int segment, int part) {
    return buffers_.shares[(phase * kMaxSegments + segment) * threads_ + part];
  }

  // Calls `function(owner, unit, next)` for the thread's own units, then for those that others have left: `owner` is
  // the part whose unit it is, `next` the unit that the thread will do next, or -1.
  template <class Function>
  void for_units(int phase, int segment, const Part& mine, Function function) {
    for (int i = 0; i < mine.count; ++i) {
      const int owner = (mine.index + i) % mine.count;
      Share& work = share(phase, segment, owner);
      const auto claim = [&] { return owner == mine.index ? work.take_some() : work.give_half(); };
      for (auto [unit, end] = claim(); unit < end;) {
        // More is claimed before the last unit is done, so that what follows it can be prefetched.
        const auto [next, next_end] = unit + 1 < end ? std::pair{unit + 1, end} : claim();
        function(owner, unit, next < next_end ? next : -1);
        unit = next;
        end = next_end;
      }
    }
  }

  // --- Phase 1 ---

  void convert_inputs(const Worker& worker) {
    Scratch& scratch = buffers_.scratch[worker.index];
    const auto* const x = static_cast<const std::uint8_t*>(call_.x);
    const std::size_t row_bytes = static_cast<std::size_t>(layer_.hidden) * dtype_bytes(call_.x_dtype);
    const std::int64_t rows = layer_.weight_on_input ? tokens_ * call_.top_k : tokens_;
    for (std::int64_t row = inputs_.next++; row < rows; row = inputs_.next++) {
      if (layer_.weight_on_input && local_expert(row) < 0) continue;
      const std::int64_t token = layer_.weight_on_input ? row / call_.top_k : row;
      kernels_.widen(call_.x_dtype, x + static_cast<std::size_t>(token) * row_bytes, layer_.hidden, scratch.row);
      if (layer_.weight_on_input) weigh_row(row, scratch.row);
      kernels_.write_row(shapes_.x, scratch.row, buffers_.x_rows + static_cast<std::size_t>(row) * shapes_.x.bytes());
    }
  }

  // Multiplies a row by its routing weight and rounds it to x's dtype, as the model does. `values` is rewritten.
  void weigh_row(std::int64_t pair, float* values) {
    const float weight = routing_weight(pair);
    std::uint8_t rounded[256];
    constexpr std::int64_t kStep = 64;
    for (std::int64_t i = 0; i < layer_.hidden; i += kStep) {
      const std::int64_t n = std::min(kStep, layer_.hidden - i);
      for (std::int64_t j = 0; j < n; ++j)
        values[i + j] *= weight;
      kernels_.narrow(call_.x_dtype, values + i, n, rounded);
      kernels_.widen(call_.x_dtype, rounded, n, values + i);
    }
  }

  float routing_weight(std::int64_t pair) const {
    float weight;
    const std::size_t offset = static_cast<std::size_t>(pair) * dtype_bytes(call_.weights_dtype);
    kernels_.widen(call_.weights_dtype, static_cast<const std::uint8_t*>(call_.weights) + offset, 1, &weight);
    return weight;
  }

  std::int32_t local_expert(std::int64_t pair) const {
    std::int64_t id = call_.id_type == IdType::i32 ? static_cast<const std::int32_t*>(call_.ids)[pair]
                                                   : static_cast<const std::int64_t*>(call_.ids)[pair];
    if (call_.expert_map != nullptr) id = id >= 0 && id < call_.map_size ? call_.expert_map[id] : -1;
    return id >= 0 && id < layer_.experts ? static_cast<std::int32_t>(id) : -1;
  }

  // Groups pairs by expert, by counting; within an expert they stay in the order of tokens.
  void route() {
    const std::int64_t pairs = tokens_ * call_.top_k;
    std::int64_t* const begins = buffers_.begins;
    std::fill_n(begins, layer_.experts + 1, 0);
    for (std::int64_t pair = 0; pair < pairs; ++pair) {
      const std::int32_t expert = local_expert(pair);
      buffers_.experts[pair] = expert;
      buffers_.weights[pair] = layer_.weight_on_input ? 1.0F : routing_weight(pair);
      if (expert >= 0) ++begins[expert + 1];
    }
    active_ = 0;
    for (std::int64_t e = 0; e < layer_.experts; ++e) {
      if (begins[e + 1] > 0) buffers_.active[active_++] = {e, begins[e], begins[e + 1]};
      begins[e + 1] += begins[e];
    }
    for (std::int64_t pair = 0; pair < pairs; ++pair) {
      const std::int32_t expert = buffers_.experts[pair];
      if (expert >= 0) buffers_.pairs[begins[expert]++] = pair;
    }
    routed_pairs_ = active_ == 0 ? 0 : buffers_.active[active_ - 1].first + buffers_.active[active_ - 1].count;
  }

  // --- Phase 2 ---

  // The rows of one projection that lie in a segment, worked out once per phase: a unit is short.
  RowBlocks row_blocks(Projection projection, int segment) const {
    const bool is_down = projection == Projection::down;
    RowBlocks rows;
    rows.tile.inputs = is_down ? layer_.intermediate : layer_.hidden;
    rows.tile.shape = is_down ? shapes_.h : shapes_.x;
    rows.count = is_down ? layer_.hidden : layer_.intermediate;
    if (!is_packed(layer_.format)) {
      const DenseMatrix& matrix = is_down ? layer_.down : projection == Projection::up ? layer_.up : layer_.gate;
      rows.base = matrix.data;
      rows.expert_stride = matrix.expert_stride;
      rows.block_stride = kBlockRows * matrix.row_stride;
      rows.tile.weight_stride = matrix.row_stride;
      return rows;
    }
    const PackedLayout& layout = *layer_.layout;
    const Matrix matrix = is_down ? Matrix::w2 : Matrix::w13;
    const auto [first, end] = layout.segment_blocks(matrix, segment);
    if (first == end) return rows;
    rows.first_block = first;
    rows.base = layer_.packed + layout.block_offset(matrix, 0, first, projection == Projection::up ? 1 : 0);
    rows.block_stride = layout.block_bytes(matrix) * (!is_down && layer_.activation.gated ? 2 : 1);
    rows.expert_stride = rows.block_stride * static_cast<std::size_t>(end - first);
    rows.tile.groups = layout.groups(matrix);
    rows.tile.zero_points = layout.spec().zero_points;
    return rows;
  }

  // The biases of 16 rows in fp32, or null; `space` holds them when they have to be gathered.
  const float* bias_of(Projection projection, std::int64_t expert, std::int64_t block, float* space) const {
    const bool is_down = projection == Projection::down;
    if (is_packed(layer_.format)) {
      if (!layer_.layout->spec().biases) return nullptr;
      const Matrix matrix = is_down ? Matrix::w2 : Matrix::w13;
      const std::size_t offset = layer_.layout->bias_offset(matrix, expert, projection == Projection::up ? 1 : 0);
      return reinterpret_cast<const float*>(layer_.packed + offset) + block * kBlockRows;
    }
    const DenseBias& bias = is_down                        ? layer_.down_bias
                            : projection == Projection::up ? layer_.up_bias
                                                           : layer_.gate_bias;
    if (bias.data == nullptr) return nullptr;
    const std::int64_t rows = (is_down ? layer_.hidden : layer_.intermediate) - block * kBlockRows;
    const DType dtype = layer_.format == WeightFormat::f16 ? DType::f16 : DType::bf16;
    for (std::int64_t r = 0; r < kBlockRows; ++r) {
      space[r] = 0.0F;
      if (r >= rows) continue;
      const std::size_t offset = static_cast<std::size_t>(expert) * bias.expert_stride +
                                 static_cast<std::size_t>(block * kBlockRows + r) * bias.row_stride;
      kernels_.widen(dtype, bias.data + offset, 1, space + r);
    }
    return space;
  }

  // Each thread fills its own shares of both phases.
  void set_out_shares(const Worker& worker) {
    for_my_segments(worker, [&](int segment, const Part& part) {
      const auto [first13, end13] = segment_blocks(Matrix::w13, segment);
      const auto [first2, end2] = segment_blocks(Matrix::w2, segment);
      const auto mine = [&](std::int64_t total) {
        return part.begin_of(total, part.index + 1) - part.begin_of(total, part.index);
      };
      share(0, segment, part.index).reset(active_ * mine(end13 - first13));
      share(1, segment, part.index).reset(mine(down_units(first2, end2)));
    });
  }

  void gate_and_up(const Worker& worker, int segment, const Part& part) {
    const auto [first_block, end_block] = segment_blocks(Matrix::w13, segment);
    const RowBlocks gate = row_blocks(Projection::gate, segment);
    const RowBlocks up = layer_.activation.gated ? row_blocks(Projection::up, segment) : RowBlocks{};
    for_units(0, segment, part,
              [&, first = first_block, total = end_block - first_block](int owner, auto unit, auto next) {
                const std::int64_t begin = part.begin_of(total, owner);
                const std::int64_t blocks = part.begin_of(total, owner + 1) - begin;
                const std::uint8_t* prefetch = nullptr;
                if (next >= 0)
                  prefetch = gate.weights(buffers_.active[next / blocks].expert, first + begin + next % blocks);
                gate_and_up_unit(buffers_.scratch[worker.index], gate, up, buffers_.active[unit / blocks],
                                 first + begin + unit % blocks, prefetch);
              });
  }

  void gate_and_up_unit(Scratch& scratch, const RowBlocks& gate_rows, const RowBlocks& up_rows,
                        const ActiveExpert& active, std::int64_t block, const std::uint8_t* prefetch) {
    const bool gated = layer_.activation.gated;
    Tile gate = gate_rows.tile_of(active.expert, block);
    Tile up = gated ? up_rows.tile_of(active.expert, block) : Tile{};
    alignas(64) float bias_space[2][kBlockRows];
    const float* const gate_bias = bias_of(Projection::gate, active.expert, block, bias_space[0]);
    const float* const up_bias = gated ? bias_of(Projection::up, active.expert, block, bias_space[1]) : nullptr;
    gate.out = scratch.gate;
    up.out = scratch.up;
    gate.next = gated ? up.weights : prefetch;
    up.next = prefetch;
    for (std::int64_t done = 0; done < active.count; done += kChunk) {
      const int m = static_cast<int>(std::min<std::int64_t>(kChunk, active.count - done));
      for (int i = 0; i < m; ++i) {
        const std::int64_t pair = buffers_.pairs[active.first + done + i];
        const std::int64_t row = layer_.weight_on_input ? pair : pair / call_.top_k;
        scratch.x[i] = buffers_.x_rows + static_cast<std::size_t>(row) * shapes_.x.bytes();
      }
      gate.x = up.x = scratch.x;
      gate.m = up.m = m;
      tile_(gate);
      if (gated) tile_(up);
      kernels_.activate(layer_.activation, m, scratch.gate, scratch.up, gate_bias, up_bias, scratch.gate);
      for (int i = 0; i < m; ++i) {
        float* const h = buffers_.h + (active.first + done + i) * shapes_.padded_intermediate + block * kBlockRows;
        std::memcpy(h, scratch.gate + i * kBlockRows, kBlockRows * sizeof(float));
      }
    }
  }

  void convert_intermediate() {
    for (std::int64_t row = intermediates_.next++; row < routed_pairs_; row = intermediates_.next++) {
      kernels_.write_row(shapes_.h, buffers_.h + row * shapes_.padded_intermediate,
                         buffers_.h_rows + static_cast<std::size_t>(row) * shapes_.h.bytes());
    }
  }

  // --- Phase 3 ---

  void down(const Worker& worker, int segment, const Part& part) {
    const auto [first_block, end_block] = segment_blocks(Matrix::w2, segment);
    const RowBlocks rows = row_blocks(Projection::down, segment);
    for_units(1, segment, part, [&, first = first_block, end = end_block](int owner, auto unit, auto next) {
      const std::int64_t before = part.begin_of(down_units(first, end), owner);
      const auto block = [&](std::int64_t u) { return std::min(first + (before + u) * unit_blocks_, end); };
      down_unit(buffers_.scratch[worker.index], rows, block(unit), block(unit + 1), next >= 0 ? block(next) : -1);
    });
  }

  std::int64_t down_units(std::int64_t first_block, std::int64_t end_block) const {
    return (end_block - first_block + unit_blocks_ - 1) / unit_blocks_;
  }

  // Output rows of some blocks for all tokens. `next_block`: the first of the unit after it, or -1.
  void down_unit(Scratch& scratch, const RowBlocks& rows, std::int64_t first_block, std::int64_t end_block,
                 std::int64_t next_block) {
    const int width = static_cast<int>(end_block - first_block) * static_cast<int>(kBlockRows);
    std::fill_n(scratch.output, tokens_ * width, 0.0F);
    for (std::int64_t index = 0; index < active_; ++index) {
      const ActiveExpert& active = buffers_.active[index];
      for (std::int64_t block = first_block; block < end_block; ++block) {
        Tile tile = rows.tile_of(active.expert, block);
        if (block + 1 < end_block) {
          tile.next = rows.weights(active.expert, block + 1);
        } else if (index + 1 < active_) {
          tile.next = rows.weights(buffers_.active[index + 1].expert, first_block);
        } else if (next_block >= 0) {
          tile.next = rows.weights(buffers_.active[0].expert, next_block);
        }
        down_block(scratch, tile, active, block, width, static_cast<int>(block - first_block));
      }
    }
    const std::size_t value_bytes = dtype_bytes(call_.y_dtype);
    const std::int64_t column = first_block * kBlockRows;
    const std::int64_t columns = std::min<std::int64_t>(width, layer_.hidden - column);
    auto* const y = static_cast<std::uint8_t*>(call_.y);
    for (std::int64_t token = 0; token < tokens_; ++token) {
      kernels_.narrow(call_.y_dtype, scratch.output + token * width, columns,
                      y + static_cast<std::size_t>(token * layer_.hidden + column) * value_bytes);
    }
  }

  void down_block(Scratch& scratch, Tile& tile, const ActiveExpert& active, std::int64_t block, int width, int part) {
    alignas(64) float bias_space[kBlockRows];
    const float* const bias = bias_of(Projection::down, active.expert, block, bias_space);
    tile.out = scratch.gate;
    for (std::int64_t done = 0; done < active.count; done += kChunk) {
      const int m = static_cast<int>(std::min<std::int64_t>(kChunk, active.count - done));
      for (int i = 0; i < m; ++i) {
        const std::int64_t position = active.first + done + i;
        const std::int64_t pair = buffers_.pairs[position];
        scratch.x[i] = buffers_.h_rows + static_cast<std::size_t>(position) * shapes_.h.bytes();
        scratch.weights[i] = buffers_.weights[pair];
        scratch.sums[i] = scratch.output + (pair / call_.top_k) * width + part * kBlockRows;
      }
      tile.x = scratch.x;
      tile.m = m;
      tile_(tile);
      kernels_.accumulate(m, scratch.gate, bias, scratch.weights, scratch.sums);
    }
  }

  static constexpr int kNobodyCame = 0, kFirstCame = 1, kReady = 2;

  const Layer& layer_;
  const Call& call_;
  const Kernels& kernels_;
  std::int64_t tokens_;
  Shapes shapes_;
  Buffers buffers_;
  TileKernel tile_ = nullptr;
  int segments_ = 1;
  std::int64_t unit_blocks_ = 1;
  int threads_ = 1;
  std::int64_t active_ = 0;
  std::int64_t routed_pairs_ = 0;
  std::atomic<int> meeting_{kNobodyCame};
  Barrier barrier_;
  Counter inputs_, intermediates_;
};

// Throws unless the kernels can run the layer and the call's operands fit it.
void check(const Layer& layer, const Call& call) {
  const auto require = [](bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument("experts: " + message);
  };
  require(layer.experts > 0 && layer.hidden > 0 && layer.intermediate > 0, "E, H and I must be positive");
  require(call.tokens >= 0 && call.top_k >= 0, "the numbers of tokens and of experts per token must not be negative");
  require(call.tokens * call.top_k <= std::numeric_limits<std::int32_t>::max(), "more than 2^31 pairs in one call");
  require(layer.experts <= std::numeric_limits<std::int32_t>::max(), "more than 2^31 experts");
  if (is_packed(layer.format)) {
    require(layer.packed != nullptr && layer.layout != nullptr, "packed weights are missing");
    require(layer.layout->spec().segments <= kMaxSegments,
            "packed for more than " + std::to_string(kMaxSegments) + " memory nodes; pack again for this machine");
  } else {
    require(!layer.int8_activations, "int8 activations need int8 or int4 weights");
    require(layer.gate.data != nullptr && layer.down.data != nullptr, "a weight is missing");
    const auto rows_are_apart = [](const DenseMatrix& matrix, std::int64_t inputs) {
      return matrix.data == nullptr || matrix.row_stride >= static_cast<std::size_t>(inputs) * 2;
    };
    require(rows_are_apart(layer.gate, layer.hidden) && rows_are_apart(layer.up, layer.hidden) &&
                rows_are_apart(layer.down, layer.intermediate),
            "a weight's rows overlap");
    require(!layer.activation.gated || layer.up.data != nullptr, "the up projection of gated experts is missing");
    const DType weights = layer.format == WeightFormat::f16 ? DType::f16 : DType::bf16;
    require(call.x_dtype == weights, "x is " + std::string(dtype_name(call.x_dtype)) + ", the weights are " +
                                         std::string(dtype_name(weights)) + "; they must be of one dtype");
  }
  const bool needs_limit = layer.activation.kind == Activation::silu_then_clamp;
  require(!needs_limit || layer.activation.limited, "act='silu_then_clamp' needs a limit");
}

// Workspaces that no call uses at the moment.
class IdleWorkspaces {
 public:
  HugeBuffer take(std::size_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      for (auto it = idle_.begin(); it != idle_.end(); ++it) {
        if (it->size() < bytes) continue;
        HugeBuffer found = std::move(*it);
        idle_.erase(it);
        return found;
      }
      // The smaller ones would never be asked for again by calls like this one.
      if (!idle_.empty()) idle_.pop_back();
    }
    return HugeBuffer(bytes);
  }
  void give(HugeBuffer workspace) {
    const std::lock_guard lock(mutex_);
    idle_.push_back(std::move(workspace));
  }

 private:
  std::mutex mutex_;
  std::vector<HugeBuffer> idle_;
};

IdleWorkspaces& idle_workspaces() {
  static IdleWorkspaces workspaces;
  return workspaces;
}

std::size_t workspace_bytes(const Layer& layer, const Call& call, const Kernels& kernels, int threads) {
  Buffers buffers;
  const Shapes shapes = shapes_of(layer, kernels, call.x_dtype, call.tokens, call.top_k);
  return carve(nullptr, layer, shapes, call.tokens, call.top_k, threads, buffers);
}

}  // namespace

bool runs_on_own_threads() {
  static const bool own = [] {
    const Topology topology = current_topology();
    const char* const threads = std::getenv("MOE_FX_THREADS");
    return topology.nodes.size() > 1 || topology.made_up || (threads != nullptr && *threads != '\0');
  }();
  return own;
}

void run_experts(const Layer& layer, const Call& call, int threads) {
  check(layer, call);
  if (call.tokens == 0) return;
  const Kernels& kernels = chosen_kernels();
  // Calls `team`, which runs the task on `size` threads or returns false.
  const auto run_on = [&](int size, int groups, auto team) {
    HugeBuffer workspace = idle_workspaces().take(workspace_bytes(layer, call, kernels, size));
    Run run(layer, call, kernels, workspace.data(), size, groups);
    const bool done = team(&Run::on_worker, &run);
    idle_workspaces().give(std::move(workspace));
    return done;
  };
  if (!runs_on_own_threads()) {
    if (threads <= 1) {
      run_on(1, 1, [](Task task, void* run) { return task(run, Worker{}), true; });
      return;
    }
    if (run_on(threads, 1, [=](Task task, void* run) { return run_on_openmp(threads, task, run); })) return;
  }
  Pool& pool = process_pool();
  run_on(pool.size(), pool.groups(), [&](Task task, void* run) { return pool.run(task, run), true; });
}

void run_on_team(int threads, Task task, void* context) {
  if (!runs_on_own_threads()) {
    if (threads <= 1) return task(context, Worker{});
    if (run_on_openmp(threads, task, context)) return;
  }
  process_pool().run(task, context);
}

struct Submission::State {
  State(Layer the_layer, const Call& the_call, Pool& the_pool)
      : layer(std::move(the_layer)),
        call(the_call),
        pool(the_pool),
        kernels(chosen_kernels()),
        workspace(workspace_bytes(layer, call, kernels, pool.size())),
        run(layer, call, kernels, workspace.data(), pool.size(), pool.groups()) {}

  Layer layer;
  Call call;
  Pool& pool;
  const Kernels& kernels;
  HugeBuffer workspace;
  Run run;
  std::atomic<std::uint64_t> ticket{0};  // of the latest run; 0 before the first
};

Submission::Submission(Layer layer, const Call& call) {
  check(layer, call);
  state_ = std::make_unique<State>(std::move(layer), call, process_pool());
}

Submission::~Submission() { wait(); }

void Submission::submit(std::int64_t tokens) noexcept {
  wait();
  state_->run.rewind(std::clamp<std::int64_t>(tokens, 0, state_->call.tokens));
  state_->ticket = state_->pool.submit(&Run::on_worker, &state_->run);
}

void Submission::wait() noexcept {
  if (state_->ticket != 0) state_->pool.wait(state_->ticket);
}

bool Submission::done() const noexcept { return state_->ticket == 0 || state_->pool.done(state_->ticket); }

void Submission::submit_callback(void* submission) noexcept {
  auto* const self = static_cast<Submission*>(submission);
  self->submit(self->state_->call.tokens);
}

void Submission::wait_callback(void* submission) noexcept { static_cast<Submission*>(submission)->wait(); }

}  // namespace moe_fx::cpu
