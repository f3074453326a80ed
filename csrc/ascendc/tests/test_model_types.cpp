// half, bfloat16_t and Cast: every value of 16 bits, every rounding mode, and int4b_t.

#include <cmath>
#include <limits>

#include "model_support.h"

namespace ascendc_model {
namespace {

using namespace AscendC;

TEST_CASE("every half survives float, in bulk and one by one") {
  std::vector<uint16_t> all(65536);
  std::iota(all.begin(), all.end(), uint16_t{0});
  std::vector<float> floats(all.size());
  widen_half(reinterpret_cast<const uint8_t*>(all.data()), floats.data(), all.size());
  std::vector<uint16_t> back(all.size());
  narrow_half(floats.data(), reinterpret_cast<uint8_t*>(back.data()), all.size());
  int wrong = 0;
  for (std::size_t i = 0; i < all.size(); ++i) {
    const bool nan = (all[i] & 0x7fff) > 0x7c00;
    wrong += nan ? !std::isnan(floats[i]) || !std::isnan(half_value(back[i])) : back[i] != all[i];
    wrong += nan ? !std::isnan(half_value(all[i])) : half_value(all[i]) != floats[i];
    wrong += !nan && half_bits(floats[i]) != all[i];
  }
  CHECK(wrong == 0);
}

TEST_CASE("halves between two halves round to the even one") {
  int wrong = 0;
  std::vector<float> middles;
  std::vector<uint16_t> evens;
  for (uint32_t bits = 0; bits < 0x7bff; ++bits) {
    const float below = half_value(static_cast<uint16_t>(bits));
    const float above = half_value(static_cast<uint16_t>(bits + 1));
    const float middle = (below + above) / 2;
    const uint32_t even = bits % 2 ? bits + 1 : bits;
    wrong += half_bits(middle) != even;
    wrong += half_bits(std::nextafter(middle, 0.0f)) != bits;
    wrong += half_bits(std::nextafter(middle, 1e9f)) != bits + 1;
    wrong += half_bits(-middle) != (even | 0x8000);
    middles.push_back(middle);
    evens.push_back(static_cast<uint16_t>(even));
  }
  // The processor's conversion says the same.
  std::vector<uint16_t> narrow(middles.size());
  narrow_half(middles.data(), reinterpret_cast<uint8_t*>(narrow.data()), middles.size());
  CHECK(narrow == evens);
  CHECK(wrong == 0);
  CHECK(half_bits(65520.0f) == 0x7c00);
  CHECK(half_bits(65519.0f) == 0x7bff);
  CHECK(half_bits(1e30f) == 0x7c00);
  CHECK(half_bits(0x1p-25f) == 0);
  CHECK(half_bits(0x1.8p-25f) == 1);
}

TEST_CASE("bfloat16 rounds to the even one") {
  CHECK(bfloat16_bits(1.0f) == 0x3f80);
  CHECK(bfloat16_bits(std::bit_cast<float>(0x3f808000u)) == 0x3f80);
  CHECK(bfloat16_bits(std::bit_cast<float>(0x3f818000u)) == 0x3f82);
  CHECK(bfloat16_bits(std::bit_cast<float>(0x3f808001u)) == 0x3f81);
  CHECK(bfloat16_bits(std::numeric_limits<float>::max()) == 0x7f80);
  CHECK(std::isnan(bfloat16_value(bfloat16_bits(std::numeric_limits<float>::quiet_NaN()))));
  CHECK(ToFloat(ToBfloat16(3.0f)) == 3.0f);
}

// What a Cast makes of values, through the unified buffer.
template <typename To, typename From>
std::vector<To> cast(const std::vector<From>& values, RoundMode mode) {
  const auto count = static_cast<uint32_t>(values.size());
  const uint32_t padded = (count + 31) / 32 * 32;
  std::vector<From> whole(values);
  whole.resize(padded, From(0.0f));
  Device device;
  const auto x = device.input("x", whole);
  const auto y = device.output<To>("y", padded);
  const Report report = device.launch(1, [&] {
    TPipe pipe;
    const auto from = local<From>(pipe, padded);
    const auto to = local<To>(pipe, padded);
    DataCopy(from, global<From>(x.gm(), padded), padded);
    PipeBarrier<PIPE_ALL>();
    Cast(to, from, mode, padded);
    PipeBarrier<PIPE_ALL>();
    DataCopy(global<To>(y.gm(), padded), to, padded);
  });
  CHECK_MESSAGE(report.faults.empty(), toString(report));
  return std::vector<To>(y.data(), y.data() + count);
}

TEST_CASE("float to int32_t by every mode") {
  const std::vector<float> values = {0.5f, 1.5f, 2.5f, -0.5f, -1.5f, 2.4f, -2.6f, 3e9f, -3e9f};
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
  constexpr int32_t kLeast = std::numeric_limits<int32_t>::min();
  using Ints = std::vector<int32_t>;
  CHECK(cast<int32_t>(values, RoundMode::CAST_RINT) == Ints{0, 2, 2, 0, -2, 2, -3, kMost, kLeast});
  CHECK(cast<int32_t>(values, RoundMode::CAST_FLOOR) == Ints{0, 1, 2, -1, -2, 2, -3, kMost, kLeast});
  CHECK(cast<int32_t>(values, RoundMode::CAST_CEIL) == Ints{1, 2, 3, 0, -1, 3, -2, kMost, kLeast});
  CHECK(cast<int32_t>(values, RoundMode::CAST_ROUND) == Ints{1, 2, 3, -1, -2, 2, -3, kMost, kLeast});
  CHECK(cast<int32_t>(values, RoundMode::CAST_TRUNC) == Ints{0, 1, 2, 0, -1, 2, -2, kMost, kLeast});
}

TEST_CASE("half to int8_t saturates, and CAST_NONE rounds to nearest") {
  const std::vector<half> values = {half(0.5f), half(1.5f), half(-1.5f), half(127.5f), half(300.0f), half(-300.0f)};
  CHECK(cast<int8_t>(values, RoundMode::CAST_NONE) == std::vector<int8_t>{0, 2, -2, 127, 127, -128});
  CHECK(cast<int8_t>(values, RoundMode::CAST_TRUNC) == std::vector<int8_t>{0, 1, -1, 127, 127, -128});
}

TEST_CASE("float to half by every mode") {
  const float ulp = 0x1p-10f;
  const std::vector<float> values = {1.0f + ulp / 2, 1.0f + ulp * 0.75f, 1.0f + ulp, -1.0f - ulp / 4, 0x1.8p-25f};
  const auto bits = [&](RoundMode mode) {
    std::vector<int> result;
    for (const half value : cast<half>(values, mode)) {
      result.push_back(value.bits());
    }
    return result;
  };
  using Bits = std::vector<int>;
  CHECK(bits(RoundMode::CAST_NONE) == Bits{0x3c00, 0x3c01, 0x3c01, 0xbc00, 1});
  CHECK(bits(RoundMode::CAST_RINT) == Bits{0x3c00, 0x3c01, 0x3c01, 0xbc00, 1});
  CHECK(bits(RoundMode::CAST_FLOOR) == Bits{0x3c00, 0x3c00, 0x3c01, 0xbc01, 0});
  CHECK(bits(RoundMode::CAST_CEIL) == Bits{0x3c01, 0x3c01, 0x3c01, 0xbc00, 1});
  CHECK(bits(RoundMode::CAST_ROUND) == Bits{0x3c01, 0x3c01, 0x3c01, 0xbc00, 1});
  CHECK(bits(RoundMode::CAST_TRUNC) == Bits{0x3c00, 0x3c00, 0x3c01, 0xbc00, 0});
  CHECK(bits(RoundMode::CAST_ODD) == Bits{0x3c01, 0x3c01, 0x3c01, 0xbc01, 1});
}

TEST_CASE("float to bfloat16_t and back") {
  const std::vector<float> values = {1.0f, std::bit_cast<float>(0x3f808000u), -2.25f};
  const auto rounded = cast<bfloat16_t>(values, RoundMode::CAST_RINT);
  CHECK(rounded[1].bits() == 0x3f80);
  CHECK(cast<bfloat16_t>(values, RoundMode::CAST_CEIL)[1].bits() == 0x3f81);
  CHECK(cast<float>(rounded, RoundMode::CAST_NONE)[2] == -2.25f);
}

TEST_CASE("integers to floating point") {
  CHECK(cast<float>(std::vector<int32_t>{7, -3, 16777217}, RoundMode::CAST_RINT)[2] == 16777216.0f);
  CHECK(cast<float>(std::vector<int32_t>{7, -3, 16777217}, RoundMode::CAST_CEIL)[2] == 16777218.0f);
  CHECK(float(cast<half>(std::vector<int8_t>{-128, 127}, RoundMode::CAST_NONE)[0]) == -128.0f);
  CHECK(float(cast<half>(std::vector<uint8_t>{200, 127}, RoundMode::CAST_NONE)[0]) == 200.0f);
  CHECK(cast<float>(std::vector<int16_t>{-300}, RoundMode::CAST_NONE)[0] == -300.0f);
}

TEST_CASE("int4b_t to half, the low nibble first, and back") {
  Device device;
  std::vector<uint8_t> bytes(128);
  std::iota(bytes.begin(), bytes.end(), uint8_t{0x70});
  const auto x = device.input("x", bytes);
  const Report report = device.launch(1, [&] {
    TPipe pipe;
    const auto packed = local<uint8_t>(pipe, 128);
    const auto halves = local<half>(pipe, 256);
    const auto again = local<uint8_t>(pipe, 128);
    DataCopy(packed, global<uint8_t>(x.gm(), 128), 128);
    PipeBarrier<PIPE_ALL>();
    Cast(halves, packed.ReinterpretCast<int4b_t>(), RoundMode::CAST_NONE, 256);
    for (uint32_t i = 0; i < 256; ++i) {
      const int nibble = i % 2 ? bytes[i / 2] >> 4 : bytes[i / 2] & 15;
      CHECK(float(halves.GetValue(i)) == static_cast<float>(nibble >= 8 ? nibble - 16 : nibble));
    }
    Duplicate(again.ReinterpretCast<int32_t>(), 0, 32);
    Cast(again.ReinterpretCast<int4b_t>(), halves, RoundMode::CAST_RINT, 256);
    for (uint32_t i = 0; i < 128; ++i) {
      CHECK(again.GetValue(i) == bytes[i]);
    }
    // By repeats: 128 lanes, 64 bytes of nibbles each. The second half of the source alone.
    Cast(halves, packed.ReinterpretCast<int4b_t>()[128], RoundMode::CAST_NONE, uint64_t{128}, 1,
         UnaryRepeatParams(1, 1, 8, 2));
    CHECK(float(halves.GetValue(0)) ==
          static_cast<float>((bytes[64] & 15) >= 8 ? (bytes[64] & 15) - 16 : bytes[64] & 15));
  });
  CHECK_MESSAGE(report.faults.empty(), toString(report));
}

TEST_CASE("int32_t to half takes the scale of SetDeqScale") {
  Device device;
  const Report report = device.launch(1, [&] {
    TPipe pipe;
    const auto ints = local<int32_t>(pipe, 16);
    const auto halves = local<half>(pipe, 16);
    Duplicate(ints, 6, 16);
    SetDeqScale(half(0.5f));
    Cast(halves, ints, RoundMode::CAST_NONE, 16);
    CHECK(float(halves.GetValue(15)) == 3.0f);
  });
  CHECK_MESSAGE(report.faults.empty(), toString(report));
}

}  // namespace
}  // namespace ascendc_model
