// Copies and what a launch counts: strides, padding, bytes, bursts, repeats, phases, and the estimate made of them.

#include <stdexcept>

#include "model_support.h"

namespace ascendc_model {
namespace {

using namespace AscendC;

TEST_CASE("DataCopy with gaps, in blocks") {
  Device device;
  const auto x = device.input("x", counting<float>(256));
  const auto y = device.inout("y", std::vector<float>(256, -1.0f));
  const Report report = device.launch(1, [&] {
    TPipe pipe;
    const auto a = local<float>(pipe, 256);
    // Four bursts of 2 blocks, 2 blocks apart in x, 1 block apart in the buffer.
    DataCopy(a, global<float>(x.gm(), 256), DataCopyParams(4, 2, 2, 1));
    PipeBarrier<PIPE_ALL>();
    CHECK(a.GetValue(24) == 32.0f);
    CHECK(a.GetValue(24 + 15) == 47.0f);
    DataCopy(global<float>(y.gm(), 256), a, DataCopyParams(4, 2, 1, 6));
  });
  CHECK_MESSAGE(report.faults.empty(), toString(report));
  CHECK(y[0] == 0.0f);
  CHECK(y[15] == 15.0f);
  CHECK(y[16] == -1.0f);
  CHECK(y[64] == 32.0f);
  CHECK(report.total.mte2_bytes == 256);
  CHECK(report.total.mte2_bursts == 4);
  CHECK(report.total.mte3_bytes == 256);
}

TEST_CASE("DataCopyPad by bytes, gaps in bytes outside and in blocks inside") {
  Device device;
  const auto x = device.input("x", counting<half>(256));
  const auto y = device.inout("y", std::vector<half>(256, half(-1.0f)));
  const Report report = device.launch(1, [&] {
    TPipe pipe;
    const auto a = local<half>(pipe, 256);
    // Three bursts of 5 halves, 4 bytes apart in x; each fills a block, with a gap of one block between.
    DataCopyPad(a, global<half>(x.gm(), 256), DataCopyExtParams{3, 10, 4, 1, 0},
                DataCopyPadExtParams<half>{true, 1, 2, half(9.0f)});
    PipeBarrier<PIPE_ALL>();
    CHECK(float(a.GetValue(0)) == 9.0f);
    CHECK(float(a.GetValue(1)) == 0.0f);
    CHECK(float(a.GetValue(6)) == 9.0f);
    CHECK(float(a.GetValue(33)) == 7.0f);
    PipeBarrier<PIPE_ALL>();
    Duplicate(a, half(4.0f), 256);
    PipeBarrier<PIPE_ALL>();
    DataCopyPad(global<half>(y.gm(), 256)[3], a, DataCopyExtParams{2, 6, 1, 2, 0});
  });
  CHECK_MESSAGE(report.faults.empty(), toString(report));
  CHECK(float(y[2]) == -1.0f);
  CHECK(float(y[3]) == 4.0f);
  CHECK(float(y[5]) == 4.0f);
  CHECK(float(y[6]) == -1.0f);
  CHECK(float(y[7]) == 4.0f);
  CHECK(float(y[9]) == 4.0f);
  CHECK(float(y[10]) == -1.0f);
  CHECK(report.total.mte2_bytes == 30);
  CHECK(report.total.mte3_bytes == 12);
}

TEST_CASE("atomic stores add, take the largest or the smallest") {
  Device device;
  const auto y = device.inout("y", std::vector<half>(48, half(1.0f)));
  const Report report = device.launch(4, [&] {
    TPipe pipe;
    const auto a = local<half>(pipe, 16);
    Duplicate(a, half(static_cast<float>(GetBlockIdx())), 16);
    PipeBarrier<PIPE_ALL>();
    const auto tensor = global<half>(y.gm(), 48);
    SetAtomicAdd<half>();
    DataCopy(tensor, a, 16);
    SetAtomicMax<half>();
    DataCopy(tensor[16], a, 16);
    SetAtomicMin<half>();
    DataCopy(tensor[32], a, 16);
    SetAtomicNone();
  });
  CHECK_MESSAGE(report.faults.empty(), toString(report));
  CHECK(float(y[0]) == 7.0f);
  CHECK(float(y[16]) == 3.0f);
  CHECK(float(y[32]) == 0.0f);
}

// Every core reads and doubles its part, twice, with a SyncAll between.
Report work(Device& device, int blocks) {
  const auto x = device.input("x", counting<float>(256 * static_cast<std::size_t>(blocks)));
  const auto y = device.output<float>("y", 256 * static_cast<std::size_t>(blocks));
  return device.launch(blocks, [&] {
    TPipe pipe;
    TQueBind<TPosition::VECIN, TPosition::VECOUT, 1> queue;
    pipe.InitBuffer(queue, 2, 1024);
    const auto mine = static_cast<uint64_t>(GetBlockIdx()) * 256;
    for (int half_way = 0; half_way < 2; ++half_way) {
      auto a = queue.AllocTensor<float>();
      DataCopy(a, global<float>(x.gm(), x.size())[mine], 256);
      queue.EnQue(a);
      a = queue.DeQue<float>();
      SetFlag<HardEvent::MTE2_V>(EVENT_ID5);
      WaitFlag<HardEvent::MTE2_V>(EVENT_ID5);
      Adds(a, a, 1.0f, 256);
      SetFlag<HardEvent::V_MTE3>(EVENT_ID5);
      WaitFlag<HardEvent::V_MTE3>(EVENT_ID5);
      DataCopy(global<float>(y.gm(), y.size())[mine], a, 256);
      queue.FreeTensor(a);
      if (half_way == 0) SyncAll();
    }
  });
}

TEST_CASE("a launch is counted, by phase, instruction and buffer") {
  for (const int cores : {40, 48}) {
    Device device(cores);
    const Report report = work(device, cores);
    CHECK_MESSAGE(report.faults.empty(), toString(report));
    const auto blocks = static_cast<uint64_t>(cores);
    CHECK(report.blocks == blocks);
    CHECK(report.syncs() == 1);
    CHECK(report.phases.size() == 2);
    CHECK(report.peak_ub == 2048);
    CHECK(report.total.mte2_bytes == 2 * 1024 * blocks);
    CHECK(report.total.mte3_bytes == 2 * 1024 * blocks);
    CHECK(report.total.vector_instructions == 2 * blocks);
    CHECK(report.total.vector_repeats == 8 * blocks);
    CHECK(report.phases[0].total.mte2_bytes == 1024 * blocks);
    CHECK(report.phases[1].most.vector_repeats == 4);
    CHECK(report.ops.at("Adds").repeats == 8 * blocks);
    CHECK(report.traffic.at("x").read == 2 * 1024 * blocks);
    CHECK(report.traffic.at("x").written == 0);
    CHECK(report.traffic.at("y").written == 2 * 1024 * blocks);
  }
}

TEST_CASE("launches are deterministic") {
  std::ostringstream first;
  std::ostringstream second;
  Device one;
  Device other;
  first << work(one, 48);
  second << work(other, 48);
  CHECK(first.str() == second.str());
}

TEST_CASE("an estimate says that it is one, and what it assumes") {
  Device device;
  const Report report = work(device, 48);
  const Estimate guess = estimate(report);
  CHECK(guess.phases.size() == 2);
  CHECK(guess.fixed_us == doctest::Approx(Npu{}.launch_us + Npu{}.sync_us));
  CHECK(guess.us > guess.fixed_us);
  CHECK(guess.bytes == report.total.mte2_bytes + report.total.mte3_bytes);
  std::ostringstream text;
  text << guess;
  CHECK(text.str().find("ESTIMATE") == 0);
  CHECK(text.str().find("assumes") != std::string::npos);

  // A gigabyte at 1 TB/s and full efficiency, and nothing else, is a millisecond.
  Report reads;
  reads.phases.resize(1);
  reads.phases[0].total.mte2_bytes = 1'000'000'000;
  Npu npu;
  npu.memory_bytes_per_s = 1e12;
  npu.memory_efficiency = 1;
  npu.launch_us = 0;
  CHECK(estimate(reads, npu).us == doctest::Approx(1000.0));

  // Half as much vector work hides behind it, twice as much is what remains to be seen; a second phase comes on top.
  npu.clock_hz = 1e9;
  npu.cycles_per_repeat = 1;
  reads.phases[0].most.vector_repeats = 500'000;
  CHECK(estimate(reads, npu).us == doctest::Approx(1000.0));
  reads.phases[0].most.vector_repeats = 2'000'000;
  CHECK(estimate(reads, npu).us == doctest::Approx(2000.0));
  npu.sync_us = 7;
  reads.phases.push_back(reads.phases[0]);
  CHECK(estimate(reads, npu).us == doctest::Approx(4007.0));
}

TEST_CASE("what a kernel throws leaves the launch, after the other cores") {
  Device device;
  int ended = 0;
  const auto kernel = [&] {
    if (GetBlockIdx() == 1) throw std::runtime_error("here");
    SyncAll();
    ++ended;
  };
  CHECK_THROWS_WITH(device.launch(4, kernel), "here");
  CHECK(ended == 3);
}

TEST_CASE("memory of the caller's can be attached") {
  const std::vector<float> x = counting<float>(64);
  std::vector<float> y(64, 0.0f);
  Device device;
  device.attach("x", x.data(), 256, Access::kInput);
  device.attach("y", y.data(), 256, Access::kOutput);
  const Report report = device.launch(1, [&] {
    TPipe pipe;
    const auto a = local<float>(pipe, 64);
    DataCopy(a, global<float>(reinterpret_cast<uint8_t*>(const_cast<float*>(x.data())), 64), 64);
    PipeBarrier<PIPE_ALL>();
    DataCopy(global<float>(reinterpret_cast<uint8_t*>(y.data()), 64), a, 64);
  });
  CHECK_MESSAGE(report.faults.empty(), toString(report));
  CHECK(y[63] == 63.0f);
}

TEST_CASE("the model keeps up with real shapes") {
  // 16 million int4 weights, dequantised and accumulated: a minute's worth would be caught here, a second's is
  // expected.
  Device device;
  constexpr uint32_t kRow = 4096;
  constexpr uint32_t kRows = 4096;
  const auto weights = device.input("w", std::vector<int8_t>(kRow / 2 * kRows, 0x21));
  const auto y = device.inout("y", std::vector<float>(kRow, 0.0f));
  const Report report = device.launch(48, [&] {
    TPipe pipe;
    TQue<TPosition::VECIN, 1> queue;
    pipe.InitBuffer(queue, 2, kRow / 2);
    const auto halves = local<half>(pipe, kRow);
    const auto sum = local<float>(pipe, kRow);
    Duplicate(sum, 0.0f, kRow);
    const auto tensor = global<int8_t>(weights.gm(), weights.size());
    for (auto row = static_cast<uint32_t>(GetBlockIdx()); row < kRows; row += 48) {
      auto packed = queue.AllocTensor<int8_t>();
      DataCopy(packed, tensor[uint64_t{row} * kRow / 2], kRow / 2);
      queue.EnQue(packed);
      packed = queue.DeQue<int8_t>();
      Cast(halves, packed.ReinterpretCast<int4b_t>(), RoundMode::CAST_NONE, kRow);
      queue.FreeTensor(packed);
      Axpy(sum, halves, half(0.5f), kRow);
    }
    SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
    WaitFlag<HardEvent::V_MTE3>(EVENT_ID0);
    SetAtomicAdd<float>();
    DataCopy(global<float>(y.gm(), kRow), sum, kRow);
    SetAtomicNone();
  });
  CHECK_MESSAGE(report.faults.empty(), toString(report));
  CHECK(y[0] == 0.5f * kRows);
  CHECK(y[1] == 1.0f * kRows);
  CHECK(report.traffic.at("w").read == weights.size());
}

}  // namespace
}  // namespace ascendc_model
