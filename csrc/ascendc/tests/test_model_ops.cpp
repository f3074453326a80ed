// What the vector instructions compute, in their forms by count, by mask and repeats, and by bits.

#include <cmath>

#include "model_support.h"

namespace ascendc_model {
namespace {

using namespace AscendC;

// Runs a kernel that checks its own results with GetValue; it has to be free of faults.
void on_core(const std::function<void(TPipe&)>& kernel) {
  Device device;
  const Report report = device.launch(1, [&] {
    TPipe pipe;
    kernel(pipe);
  });
  CHECK_MESSAGE(report.faults.empty(), toString(report));
}

template <typename T>
LocalTensor<T> sequence(TPipe& pipe, uint32_t count, float first = 0.0f, float step = 1.0f) {
  const auto tensor = local<T>(pipe, count);
  for (uint32_t i = 0; i < count; ++i) {
    tensor.SetValue(i, T(first + step * static_cast<float>(i)));
  }
  return tensor;
}

TEST_CASE_TEMPLATE("arithmetic", T, half, float, int16_t, int32_t) {
  on_core([](TPipe& pipe) {
    const uint32_t count = 70;
    const auto a = sequence<T>(pipe, count, 1.0f);
    const auto b = sequence<T>(pipe, count, 3.0f, 2.0f);
    const auto c = local<T>(pipe, count);
    const auto expect = [&](auto value) {
      for (uint32_t i = 0; i < count; ++i) {
        const auto x = static_cast<float>(a.GetValue(i));
        const auto y = static_cast<float>(b.GetValue(i));
        CHECK(static_cast<float>(c.GetValue(i)) == static_cast<float>(T(value(x, y))));
      }
    };
    Add(c, a, b, count);
    expect([](float x, float y) { return x + y; });
    Sub(c, a, b, count);
    expect([](float x, float y) { return x - y; });
    Mul(c, a, b, count);
    expect([](float x, float y) { return x * y; });
    Max(c, a, b, count);
    expect([](float x, float y) { return std::max(x, y); });
    Min(c, a, b, count);
    expect([](float x, float y) { return std::min(x, y); });
    Adds(c, a, T(5), count);
    expect([](float x, float) { return x + 5; });
    Muls(c, a, T(3), count);
    expect([](float x, float) { return x * 3; });
    Maxs(c, a, T(30), count);
    expect([](float x, float) { return std::max(x, 30.0f); });
    Mins(c, a, T(30), count);
    expect([](float x, float) { return std::min(x, 30.0f); });
  });
}

TEST_CASE_TEMPLATE("functions", T, half, float) {
  on_core([](TPipe& pipe) {
    const auto a = sequence<T>(pipe, 40, 0.25f, 0.25f);
    const auto b = local<T>(pipe, 40);
    const auto expect = [&](auto value) {
      for (uint32_t i = 0; i < 40; ++i) {
        CHECK(float(b.GetValue(i)) == doctest::Approx(value(float(a.GetValue(i)))).epsilon(1e-3));
      }
    };
    Exp(b, a, 40);
    expect([](float x) { return std::exp(x); });
    Ln(b, a, 40);
    expect([](float x) { return std::log(x); });
    Sqrt(b, a, 40);
    expect([](float x) { return std::sqrt(x); });
    Rsqrt(b, a, 40);
    expect([](float x) { return 1 / std::sqrt(x); });
    Reciprocal(b, a, 40);
    expect([](float x) { return 1 / x; });
    Div(b, a, a, 40);
    expect([](float) { return 1.0f; });
    Muls(b, a, T(-1), 40);
    Abs(b, b, 40);
    expect([](float x) { return x; });
    Adds(b, a, T(-5), 40);
    Relu(b, b, 40);
    expect([](float x) { return std::max(0.0f, x - 5); });
  });
}

TEST_CASE("bits and shifts") {
  on_core([](TPipe& pipe) {
    const auto a = sequence<uint16_t>(pipe, 32);
    const auto b = local<uint16_t>(pipe, 32);
    Duplicate(b, uint16_t{0x0f}, 32);
    And(b, a, b, 32);
    CHECK(b.GetValue(17) == 1);
    Or(b, a, b, 32);
    CHECK(b.GetValue(18) == 18);
    Not(b, b, 32);
    CHECK(b.GetValue(18) == 0xffed);
    const auto c = local<int32_t>(pipe, 32);
    Duplicate(c, -16, 32);
    ShiftRight(c, c, 2, 32);
    CHECK(c.GetValue(31) == -4);
    ShiftLeft(c, c, 3, 32);
    CHECK(c.GetValue(31) == -32);
  });
}

TEST_CASE("Axpy and MulAddDst accumulate in the destination's type") {
  on_core([](TPipe& pipe) {
    const uint32_t count = 100;
    const auto a = sequence<half>(pipe, count);
    const auto acc = local<float>(pipe, count);
    Duplicate(acc, 0.5f, count);
    Axpy(acc, a, half(3.0f), count);
    for (uint32_t i = 0; i < count; ++i) {
      CHECK(acc.GetValue(i) == 0.5f + 3.0f * static_cast<float>(i));
    }
    MulAddDst(acc, a, a, count);
    CHECK(acc.GetValue(99) == 0.5f + 297.0f + 9801.0f);
    // In half the sum is rounded to half.
    const auto sum = local<half>(pipe, count);
    Duplicate(sum, half(2048.0f), count);
    Axpy(sum, a, half(1.0f), count);
    CHECK(float(sum.GetValue(1)) == 2048.0f);
    CHECK(float(sum.GetValue(3)) == 2052.0f);
    // By repeats: 64 lanes of float, so 4 blocks of half each.
    Duplicate(acc, 0.0f, count);
    Axpy(acc, a, half(1.0f), uint64_t{32}, 3, UnaryRepeatParams(1, 1, 4, 2));
    CHECK(acc.GetValue(95) == 95.0f);
    CHECK(acc.GetValue(96) == 0.0f);
  });
}

TEST_CASE("masks, repeats and strides") {
  on_core([](TPipe& pipe) {
    const auto a = sequence<float>(pipe, 256);
    const auto b = local<float>(pipe, 256);
    const auto clear = [&] { Duplicate(b, -1.0f, 256); };
    // The first 10 lanes of each of 3 repeats.
    clear();
    Adds(b, a, 0.0f, uint64_t{10}, 3, UnaryRepeatParams(1, 1, 8, 8));
    CHECK(b.GetValue(9) == 9.0f);
    CHECK(b.GetValue(10) == -1.0f);
    CHECK(b.GetValue(64 + 9) == 73.0f);
    CHECK(b.GetValue(192) == -1.0f);
    // Every other lane.
    clear();
    uint64_t odd[2] = {0xaaaaaaaaaaaaaaaaull, 0};
    Adds(b, a, 0.0f, odd, 2, UnaryRepeatParams(1, 1, 8, 8));
    CHECK(b.GetValue(0) == -1.0f);
    CHECK(b.GetValue(127) == 127.0f);
    // Every other block of the source.
    clear();
    Adds(b, a, 0.0f, uint64_t{64}, 1, UnaryRepeatParams(1, 2, 8, 8));
    CHECK(b.GetValue(7) == 7.0f);
    CHECK(b.GetValue(8) == 16.0f);
    CHECK(b.GetValue(63) == 119.0f);
    // One block of src1 for all blocks: a row of factors over many rows.
    clear();
    Add(b, a, a, uint64_t{64}, 4, BinaryRepeatParams(1, 1, 0, 8, 8, 0));
    CHECK(b.GetValue(255) == 255.0f + 7.0f);
    // Counter mode: lanes in all.
    clear();
    SetMaskCount();
    SetVectorMask<float, MaskMode::COUNTER>(0, 100);
    Adds<float, false>(b, a, 0.0f, uint64_t{MASK_PLACEHOLDER}, 1, UnaryRepeatParams(1, 1, 8, 8));
    SetMaskNorm();
    ResetMask();
    CHECK(b.GetValue(99) == 99.0f);
    CHECK(b.GetValue(100) == -1.0f);
  });
}

TEST_CASE("Duplicate, Brcb, Copy and indices") {
  on_core([](TPipe& pipe) {
    const auto a = sequence<float>(pipe, 16, 1.0f);
    const auto spread = local<float>(pipe, 128);
    Brcb(spread, a, 2, BrcbRepeatParams(1, 8));
    CHECK(spread.GetValue(7) == 1.0f);
    CHECK(spread.GetValue(8) == 2.0f);
    CHECK(spread.GetValue(127) == 16.0f);
    const auto index = local<int32_t>(pipe, 64);
    CreateVecIndex(index, 5, 64u);
    CHECK(index.GetValue(63) == 68);
    ArithProgression(index, 3, 2, 64);
    CHECK(index.GetValue(10) == 23);
    const auto copy = local<float>(pipe, 64);
    Duplicate(copy, 0.0f, 64);
    Copy(copy, spread, uint64_t{8}, 2, CopyRepeatParams(1, 1, 1, 8));
    CHECK(copy.GetValue(8) == 9.0f);
    DataCopy(copy, spread, 64);
    CHECK(copy.GetValue(63) == 8.0f);
  });
}

TEST_CASE_TEMPLATE("reductions", T, half, float) {
  on_core([](TPipe& pipe) {
    constexpr uint32_t kLanes = 256 / sizeof(T);
    constexpr uint32_t kBlock = 32 / sizeof(T);
    const uint32_t count = kLanes + 20;
    const auto a = sequence<T>(pipe, count);
    a.SetValue(33, T(500));
    const auto out = local<T>(pipe, 64);
    const auto work = local<T>(pipe, 64);
    float total = 0;
    for (uint32_t i = 0; i < count; ++i) {
      total += static_cast<float>(a.GetValue(i));
    }
    ReduceSum(out, a, work, static_cast<int32_t>(count));
    CHECK(float(out.GetValue(0)) == doctest::Approx(total).epsilon(1e-3));
    ReduceMax(out, a, work, static_cast<int32_t>(count), true);
    CHECK(float(out.GetValue(0)) == 500.0f);
    using Index = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
    CHECK(out.template ReinterpretCast<Index>().GetValue(1) == 33);
    ReduceMin(out, a, work, static_cast<int32_t>(count));
    CHECK(float(out.GetValue(0)) == 0.0f);
    WholeReduceMax(out, a, static_cast<int32_t>(kLanes), 1, 1, 1, 8);
    CHECK(float(out.GetValue(0)) == 500.0f);
    CHECK(out.template ReinterpretCast<Index>().GetValue(1) == 33);
    WholeReduceMax(out, a, static_cast<int32_t>(kBlock), 2, 1, 1, 1, ReduceOrder::ORDER_ONLY_VALUE);
    CHECK(float(out.GetValue(1)) == 2.0f * kBlock - 1);
    WholeReduceSum(out, a, 4, 2, 1, 1, 1);
    CHECK(float(out.GetValue(0)) == 6.0f);
    CHECK(float(out.GetValue(1)) == 4.0f * kBlock + 6.0f);
    BlockReduceSum(out, a, 1, static_cast<int32_t>(kLanes), 1, 1, 8);
    CHECK(float(out.GetValue(0)) == (kBlock - 1) * kBlock / 2.0f);
    CHECK(float(out.GetValue(7)) == (7.0f * kBlock) * kBlock + (kBlock - 1) * kBlock / 2.0f);
    BlockReduceMax(out, a, 1, static_cast<int32_t>(kLanes), 1, 1, 8);
    CHECK(float(out.GetValue(1)) == 2.0f * kBlock - 1);
    PairReduceSum(out, a, 1, 8, 1, 1, 8);
    CHECK(float(out.GetValue(3)) == 13.0f);
  });
}

TEST_CASE("sums are added as a tree, rounding to the type") {
  on_core([](TPipe& pipe) {
    const auto a = local<half>(pipe, 128);
    Duplicate(a, half(0.5f), 128);
    a.SetValue(0, half(2048.0f));
    const auto out = local<half>(pipe, 16);
    WholeReduceSum(out, a, 4, 1, 1, 1, 8);
    // (2048 + 0.5) is 2048 in half, and (0.5 + 0.5) is too little to change it.
    CHECK(float(out.GetValue(0)) == 2048.0f);
  });
}

TEST_CASE("Gather and GatherMask") {
  on_core([](TPipe& pipe) {
    const auto a = sequence<float>(pipe, 128);
    const auto offsets = local<uint32_t>(pipe, 64);
    for (uint32_t i = 0; i < 64; ++i) {
      offsets.SetValue(i, (63 - i) * 4);
    }
    const auto out = local<float>(pipe, 128);
    Gather(out, a, offsets, 8 * 4, 64u);
    CHECK(out.GetValue(0) == 71.0f);
    CHECK(out.GetValue(63) == 8.0f);
    uint64_t kept = 0;
    GatherMask(out, a, 2, false, 0, GatherMaskParams(1, 2, 8, 0), kept);
    CHECK(kept == 64);
    CHECK(out.GetValue(63) == 127.0f);
    GatherMask(out, a, 4, true, 10, GatherMaskParams(1, 1, 0, 0), kept);
    CHECK(kept == 3);
    CHECK(out.GetValue(2) == 9.0f);
    const auto pattern = local<uint32_t>(pipe, 8);
    Duplicate(pattern, 0u, 8);
    pattern.SetValue(0, 0b1001u);
    pattern.SetValue(1, 1u << 31);
    GatherMask(out, a, pattern, true, 64, GatherMaskParams(1, 1, 8, 1), kept);
    CHECK(kept == 3);
    CHECK(out.GetValue(1) == 3.0f);
    CHECK(out.GetValue(2) == 63.0f);
  });
}

TEST_CASE("Compare, CompareScalar and Select") {
  on_core([](TPipe& pipe) {
    const auto a = sequence<float>(pipe, 128);
    const auto b = sequence<float>(pipe, 128, 127.0f, -1.0f);
    const auto bits = local<uint8_t>(pipe, 32);
    const auto out = local<float>(pipe, 128);
    Compare(bits, a, b, CMPMODE::LT, 128u);
    CHECK(bits.GetValue(7) == 0xff);
    CHECK(bits.GetValue(8) == 0x00);
    Select(out, bits, a, b, SELMODE::VSEL_TENSOR_TENSOR_MODE, 128u);
    CHECK(out.GetValue(10) == 10.0f);
    CHECK(out.GetValue(100) == 27.0f);
    Select(out, bits, a, -5.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE, 128u);
    CHECK(out.GetValue(63) == 63.0f);
    CHECK(out.GetValue(64) == -5.0f);
    CompareScalar(bits, a, 3.0f, CMPMODE::EQ, uint64_t{64}, 2, UnaryRepeatParams(1, 1, 8, 8));
    CHECK(bits.GetValue(0) == 0b1000);
    CHECK(bits.GetValue(15) == 0);
    Select(out, bits, a, b, SELMODE::VSEL_CMPMASK_SPR, uint64_t{64}, 2, BinaryRepeatParams());
    CHECK(out.GetValue(3) == 3.0f);
    CHECK(out.GetValue(67) == 67.0f);
    CHECK(out.GetValue(68) == 59.0f);
  });
}

TEST_CASE_TEMPLATE("sorting", T, half, float) {
  on_core([](TPipe& pipe) {
    constexpr uint32_t kPer = 8 / sizeof(T);  // elements that a structure takes
    const uint32_t count = 128;
    const auto scores = local<T>(pipe, count);
    const auto index = local<uint32_t>(pipe, count);
    for (uint32_t i = 0; i < count; ++i) {
      scores.SetValue(i, T(static_cast<float>(i * 37 % 128)));
      index.SetValue(i, i);
    }
    const auto sorted = local<T>(pipe, count * kPer);
    Sort32(sorted, scores, index, 4);
    CHECK(float(sorted.GetValue(0)) > float(sorted.GetValue(kPer)));
    const auto merged = local<T>(pipe, count * kPer);
    const uint16_t lengths[4] = {32, 32, 32, 32};
    MrgSort(merged, MrgSortSrcList<T>(sorted, sorted[32 * kPer], sorted[64 * kPer], sorted[96 * kPer]),
            MrgSort4Info(lengths, false, 15, 1));
    const auto values = local<T>(pipe, count);
    const auto places = local<uint32_t>(pipe, count);
    Extract(values, places, merged, 4);
    for (uint32_t i = 0; i < count; ++i) {
      CHECK(float(values.GetValue(i)) == static_cast<float>(127 - i));
      CHECK(places.GetValue(i) * 37 % 128 == 127 - i);
    }
    // The whole at once, and only the first of equals.
    auto work = local<T>(pipe, GetSortLen<T>(count));
    LocalTensor<T> concat;
    Concat(concat, scores, work, 8);
    Sort<T, true>(sorted, concat, index, work, 4);
    Extract(values, places, sorted, 4);
    CHECK(float(values.GetValue(127)) == 0.0f);
    Duplicate(scores, T(1), 32);
    Sort32(sorted, scores, index, 1);
    CHECK(sorted.template ReinterpretCast<uint32_t>().GetValue(1) == 0);
    CHECK(sorted.template ReinterpretCast<uint32_t>().GetValue(63) == 31);
  });
}

TEST_CASE("a merge stops when a list is exhausted, if it is to") {
  on_core([](TPipe& pipe) {
    const auto scores = sequence<float>(pipe, 64);
    const auto index = local<uint32_t>(pipe, 64);
    CreateVecIndex(index.ReinterpretCast<int32_t>(), 0, 64u);
    const auto sorted = local<float>(pipe, 128);
    const auto merged = local<float>(pipe, 128);
    Sort32(sorted, scores, index, 2);
    const uint16_t lengths[4] = {32, 32, 0, 0};
    uint32_t taken[4];
    MrgSort<float, true>(merged, MrgSortSrcList<float>(sorted, sorted[64], sorted, sorted), lengths, taken, 3, 1);
    CHECK(taken[0] == 0);
    CHECK(taken[1] == 32);
  });
}

}  // namespace
}  // namespace ascendc_model
