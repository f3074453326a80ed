// Seeded faults of single instructions: addresses, sizes, types, masks, and memory that is not there or not written.

#include "model_support.h"

namespace ascendc_model {
namespace {

using namespace AscendC;

constexpr uint32_t kCount = 64;

TEST_CASE("a copy counted in int4b_t moves twice the bytes") {
  check_seeded(FaultKind::kInt4Copy, [](bool broken) {
    Device device;
    const auto x = device.input("x", std::vector<int8_t>(kCount, 0x21));
    return device.launch(1, [&] {
      TPipe pipe;
      const auto a = local<int8_t>(pipe, kCount);
      const auto b = local<half>(pipe, 2 * kCount);
      if (broken) {
        DataCopy(a.ReinterpretCast<int4b_t>(), global<int4b_t>(x.gm(), 2 * kCount), 2 * kCount);
        Duplicate(b, half(0), 2 * kCount);
        return;
      }
      DataCopy(a, global<int8_t>(x.gm(), kCount), kCount);
      SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
      WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
      Cast(b, a.ReinterpretCast<int4b_t>(), RoundMode::CAST_NONE, 2 * kCount);
      CHECK(float(b.GetValue(0)) == 1.0f);
      CHECK(float(b.GetValue(1)) == 2.0f);
    });
  });
}

TEST_CASE("a copy's size is a multiple of 32 bytes") {
  check_seeded(FaultKind::kUnaligned, [](bool broken) {
    Device device;
    const auto x = device.input("x", counting<float>(kCount));
    return device.launch(1, [&] {
      TPipe pipe;
      const auto a = local<float>(pipe, kCount);
      DataCopy(a, global<float>(x.gm(), kCount), broken ? 12 : 16);
    });
  });
}

TEST_CASE("a copy's place in the unified buffer is a multiple of 32 bytes") {
  check_seeded(FaultKind::kUnaligned, [](bool broken) {
    Device device;
    const auto x = device.input("x", counting<float>(kCount));
    return device.launch(1, [&] {
      TPipe pipe;
      const auto a = local<float>(pipe, kCount);
      DataCopy(a[broken ? 4 : 8], global<float>(x.gm(), kCount), 8);
    });
  });
}

TEST_CASE("a vector operand's address is a multiple of 32 bytes") {
  check_seeded_alone(FaultKind::kUnaligned, [](bool broken) {
    TPipe pipe;
    const auto a = local<float>(pipe, kCount);
    const auto b = local<float>(pipe, kCount);
    Duplicate(a, 1.0f, kCount);
    Adds(b, a[broken ? 1 : 8], 1.0f, 8);
  });
}

TEST_CASE("Compare by count works on whole repeats") {
  check_seeded_alone(FaultKind::kUnaligned, [](bool broken) {
    TPipe pipe;
    const auto a = local<float>(pipe, kCount);
    const auto bits = local<uint8_t>(pipe, 32);
    Duplicate(a, 1.0f, kCount);
    CompareScalar(bits, a, 0.0f, CMPMODE::GT, broken ? 48 : 64);
  });
}

TEST_CASE("the unified buffer has 192 KiB") {
  check_seeded_alone(FaultKind::kUbOverflow, [](bool broken) {
    TPipe pipe;
    TQue<TPosition::VECIN, 1> queue;
    TBuf<> rest;
    pipe.InitBuffer(queue, 2, 64 * 1024);
    pipe.InitBuffer(rest, 64 * 1024 + (broken ? 32 : 0));
  });
}

TEST_CASE("Select needs the end of the unified buffer for itself") {
  check_seeded_alone(FaultKind::kUbOverflow, [](bool broken) {
    TPipe pipe;
    const auto a = local<float>(pipe, kCount);
    const auto bits = local<uint8_t>(pipe, 32);
    local<uint8_t>(pipe, 184 * 1024 - 288 + (broken ? 32 : 0));
    Duplicate(a, 1.0f, kCount);
    Duplicate(bits.ReinterpretCast<int32_t>(), 0, 8);
    Select(a, bits, a, 2.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE, kCount);
  });
}

TEST_CASE("nobody reads the unified buffer before it is written") {
  check_seeded_alone(FaultKind::kUnwrittenRead, [](bool broken) {
    TPipe pipe;
    const auto a = local<float>(pipe, kCount);
    const auto b = local<float>(pipe, kCount);
    Duplicate(a, 1.0f, broken ? kCount - 1 : kCount);
    Adds(b, a, 1.0f, kCount);
  });
}

TEST_CASE("what an earlier user of a queue's buffer wrote is not there any more") {
  check_seeded_alone(FaultKind::kUnwrittenRead, [](bool broken) {
    TPipe pipe;
    TQue<TPosition::VECIN, 1> queue;
    pipe.InitBuffer(queue, 1, 4 * kCount);
    auto a = queue.AllocTensor<float>();
    Duplicate(a, 1.0f, kCount);
    queue.FreeTensor(a);
    a = queue.AllocTensor<float>();
    if (!broken) Duplicate(a, 1.0f, kCount);
    Adds(a, a, 1.0f, kCount);
  });
}

TEST_CASE("the dummies behind an unaligned DataCopyPad are not data, named padding is") {
  check_seeded(FaultKind::kUnwrittenRead, [](bool broken) {
    Device device;
    const auto x = device.input("x", counting<float>(kCount));
    return device.launch(1, [&] {
      TPipe pipe;
      const auto a = local<float>(pipe, 8);
      Duplicate(a, 0.0f, 8);
      PipeBarrier<PIPE_ALL>();
      DataCopyPad(a, global<float>(x.gm(), kCount), DataCopyExtParams{1, 5 * sizeof(float), 0, 0, 0},
                  DataCopyPadExtParams<float>{!broken, 0, 3, -1.0f});
      SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
      WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
      Adds(a, a, 1.0f, 8);
    });
  });
}

TEST_CASE("nobody reads global memory before it is written") {
  check_seeded(FaultKind::kUnwrittenRead, [](bool broken) {
    Device device;
    const auto y = device.output<float>("y", kCount);
    const auto z = device.inout("z", std::vector<float>(kCount, 0.0f));
    return device.launch(1, [&] {
      TPipe pipe;
      const auto a = local<float>(pipe, kCount);
      DataCopy(a, global<float>(broken ? y.gm() : z.gm(), kCount), kCount);
    });
  });
}

TEST_CASE("an atomic update needs something to update") {
  check_seeded(FaultKind::kUnwrittenRead, [](bool broken) {
    Device device;
    const auto y = device.output<float>("y", kCount);
    const auto z = device.inout("z", std::vector<float>(kCount, 0.0f));
    return device.launch(1, [&] {
      TPipe pipe;
      const auto a = local<float>(pipe, kCount);
      Duplicate(a, 1.0f, kCount);
      PipeBarrier<PIPE_ALL>();
      SetAtomicAdd<float>();
      DataCopy(global<float>(broken ? y.gm() : z.gm(), kCount), a, kCount);
      SetAtomicNone();
    });
  });
}

TEST_CASE("what one launch wrote the next may read") {
  Device device;
  const auto y = device.output<float>("y", kCount);
  const Report first = device.launch(1, [&] {
    TPipe pipe;
    const auto a = local<float>(pipe, kCount);
    Duplicate(a, 1.0f, kCount);
    PipeBarrier<PIPE_ALL>();
    DataCopy(global<float>(y.gm(), kCount), a, kCount / 2);
  });
  CHECK(first.faults.empty());
  for (const uint32_t count : {kCount / 2, kCount}) {
    const Report second = device.launch(1, [&] {
      TPipe pipe;
      DataCopy(local<float>(pipe, kCount), global<float>(y.gm(), kCount), count);
    });
    CHECK(second.only(FaultKind::kUnwrittenRead) == (count == kCount));
  }
}

TEST_CASE("global memory ends where it ends") {
  check_seeded(FaultKind::kOutOfBounds, [](bool broken) {
    Device device;
    const auto x = device.input("x", counting<float>(kCount));
    return device.launch(1, [&] {
      TPipe pipe;
      const auto a = local<float>(pipe, kCount);
      GlobalTensor<float> tensor;
      tensor.SetGlobalBuffer(reinterpret_cast<float*>(x.gm()));
      DataCopy(a, tensor[broken ? 8 : 0], kCount);
    });
  });
}

TEST_CASE("a global tensor ends where SetGlobalBuffer said") {
  check_seeded(FaultKind::kOutOfBounds, [](bool broken) {
    Device device;
    const auto x = device.input("x", counting<float>(kCount));
    return device.launch(1, [&] {
      TPipe pipe;
      const auto a = local<float>(pipe, kCount);
      DataCopy(a, global<float>(x.gm(), broken ? kCount - 8 : kCount), kCount);
    });
  });
}

TEST_CASE("a local tensor ends with its buffer") {
  check_seeded_alone(FaultKind::kOutOfBounds, [](bool broken) {
    TPipe pipe;
    const auto a = local<float>(pipe, kCount);
    const auto beside = local<float>(pipe, kCount);
    Duplicate(a, 1.0f, kCount + (broken ? 8 : 0));
    Duplicate(beside, 1.0f, kCount);
  });
  check_seeded_alone(FaultKind::kOutOfBounds, [](bool broken) {
    TPipe pipe;
    TBuf<> buffer;
    pipe.InitBuffer(buffer, 256);
    buffer.Get<float>(broken ? 72 : 64);
  });
}

TEST_CASE("raw pointers run into guard pages") {
  check_seeded(FaultKind::kOutOfBounds, [](bool broken) {
    Device device;
    const auto x = device.input("tiling", std::vector<uint32_t>(1024, 7));
    return device.launch(2, [&] {
      const auto* words = reinterpret_cast<const volatile uint32_t*>(x.gm());
      uint32_t sum = 0;
      for (int i = 0; i < (broken ? 1025 : 1024); ++i) {
        sum += words[i];
      }
      CHECK(sum == 7 * 1024);  // not reached by the broken one
    });
  });
}

TEST_CASE("inputs are read only") {
  check_seeded(FaultKind::kReadOnlyWrite, [](bool broken) {
    Device device;
    const auto x = device.input("x", counting<float>(kCount));
    const auto y = device.output<float>("y", kCount);
    return device.launch(1, [&] {
      TPipe pipe;
      const auto a = local<float>(pipe, kCount);
      Duplicate(a, 1.0f, kCount);
      PipeBarrier<PIPE_ALL>();
      DataCopy(global<float>(broken ? x.gm() : y.gm(), kCount), a, kCount);
    });
  });
}

TEST_CASE("an instruction repeats at most 255 times") {
  check_seeded_alone(FaultKind::kRepeatRange, [](bool broken) {
    TPipe pipe;
    const auto a = local<half>(pipe, 128 * 256);
    Duplicate(a, half(1.0f), 128 * 256);
    Adds(a, a, half(1.0f), uint64_t{128}, broken ? 256 : 255, UnaryRepeatParams(1, 1, 8, 8));
  });
}

TEST_CASE("parameters are not wider than their fields") {
  check_seeded_alone(FaultKind::kRepeatRange, [](bool broken) {
    BinaryRepeatParams params;
    params.dstRepStride = broken ? 256 : 255;
  });
}

TEST_CASE("masks follow the wider type") {
  check_seeded_alone(FaultKind::kMaskRange, [](bool broken) {
    TPipe pipe;
    const auto a = local<half>(pipe, 128);
    const auto b = local<float>(pipe, 128);
    Duplicate(a, half(1.0f), 128);
    Cast(b, a, RoundMode::CAST_NONE, uint64_t{broken ? 128u : 64u}, 1, UnaryRepeatParams(1, 1, 8, 4));
  });
  check_seeded_alone(FaultKind::kMaskRange, [](bool broken) {
    TPipe pipe;
    const auto a = local<float>(pipe, 64);
    Duplicate(a, 1.0f, 64);
    uint64_t bits[2] = {~0ull, broken ? 1ull : 0ull};
    Adds(a, a, 1.0f, bits, 1, UnaryRepeatParams(1, 1, 8, 8));
  });
}

TEST_CASE("a Cast has the rounding modes of its types") {
  check_seeded_alone(FaultKind::kRoundMode, [](bool broken) {
    TPipe pipe;
    const auto a = local<float>(pipe, kCount);
    const auto b = local<bfloat16_t>(pipe, kCount);
    Duplicate(a, 1.0f, kCount);
    Cast(b, a, broken ? RoundMode::CAST_NONE : RoundMode::CAST_RINT, kCount);
  });
  check_seeded_alone(FaultKind::kRoundMode, [](bool broken) {
    TPipe pipe;
    const auto a = local<half>(pipe, 2 * kCount);
    const auto b = local<int16_t>(pipe, kCount);
    Duplicate(b, int16_t{0}, kCount);
    Cast(a, b.ReinterpretCast<int4b_t>(), broken ? RoundMode::CAST_RINT : RoundMode::CAST_NONE, 2 * kCount);
  });
}

TEST_CASE("int4b_t are cast in pairs") {
  check_seeded_alone(FaultKind::kBadArgument, [](bool broken) {
    TPipe pipe;
    const auto a = local<half>(pipe, 2 * kCount);
    const auto b = local<int16_t>(pipe, kCount);
    Duplicate(b, int16_t{0}, kCount);
    Cast(a, b.ReinterpretCast<int4b_t>(), RoundMode::CAST_NONE, broken ? 65 : 64);
  });
}

TEST_CASE("operands are the same or apart") {
  check_seeded_alone(FaultKind::kOverlap, [](bool broken) {
    TPipe pipe;
    const auto a = local<float>(pipe, 2 * kCount);
    Duplicate(a, 1.0f, 2 * kCount);
    Adds(a[broken ? 8 : 0], a, 1.0f, kCount);
  });
  check_seeded_alone(FaultKind::kOverlap, [](bool broken) {
    TPipe pipe;
    const auto a = local<half>(pipe, 4 * kCount);
    Duplicate(a, half(1.0f), 4 * kCount);
    Cast(a.ReinterpretCast<float>(), a[broken ? 0 : 2 * kCount], RoundMode::CAST_NONE, kCount);
  });
}

TEST_CASE("an atomic store is of the type that was set, and the mode does not outlive the kernel") {
  check_seeded(FaultKind::kAtomicType, [](bool broken) {
    Device device;
    const auto y = device.inout("y", std::vector<float>(kCount, 0.0f));
    return device.launch(1, [&] {
      TPipe pipe;
      const auto a = local<float>(pipe, kCount);
      Duplicate(a, 1.0f, kCount);
      PipeBarrier<PIPE_ALL>();
      if (broken) {
        SetAtomicAdd<half>();
      } else {
        SetAtomicAdd<float>();
      }
      DataCopy(global<float>(y.gm(), kCount), a, kCount);
      SetAtomicNone();
    });
  });
  check_seeded_alone(FaultKind::kAtomicLeftOn, [](bool broken) {
    SetAtomicAdd<float>();
    if (!broken) SetAtomicNone();
  });
}

TEST_CASE("the soft SyncAll's workspace is zero before the kernel") {
  check_seeded(FaultKind::kBadArgument, [](bool broken) {
    Device device;
    const auto workspace = device.inout("workspace", std::vector<int32_t>(16, broken ? 1 : 0));
    return device.launch(2, [&] {
      TPipe pipe;
      SyncAll(global<int32_t>(workspace.gm(), 16), local<int32_t>(pipe, 16));
    });
  });
}

TEST_CASE("a copy has bursts, and the bursts bytes") {
  check_seeded(FaultKind::kBadArgument, [](bool broken) {
    Device device;
    const auto x = device.input("x", counting<float>(kCount));
    return device.launch(1, [&] {
      TPipe pipe;
      DataCopyParams params;
      params.blockLen = broken ? 0 : 2;
      DataCopy(local<float>(pipe, kCount), global<float>(x.gm(), kCount), params);
    });
  });
}

TEST_CASE("faults are kept once for each core and instruction, and counted all") {
  Device device;
  const Report report = device.launch(3, [&] {
    TPipe pipe;
    const auto a = local<float>(pipe, kCount);
    for (int i = 0; i < 100; ++i) {
      Adds(a[8], a[9], 1.0f, 8);
    }
  });
  CHECK(report.count(FaultKind::kUnaligned) == 3);
  CHECK(report.fault_count >= 300);
  CHECK(report.faults.size() < 10);
}

}  // namespace
}  // namespace ascendc_model
