// Seeded faults of order: between the pipes of a core, between cores, and in the life of queue buffers.

#include "model_support.h"

namespace ascendc_model {
namespace {

using namespace AscendC;

constexpr uint32_t kCount = 64;

// Sets a flag and waits for it, unless the kernel is the broken one.
template <HardEvent event>
void order(bool broken) {
  if (broken) return;
  SetFlag<event>(EVENT_ID0);
  WaitFlag<event>(EVENT_ID0);
}

TEST_CASE("a vector read of what MTE2 wrote waits for it") {
  check_seeded(FaultKind::kMissingWait, [](bool broken) {
    Device device;
    const auto x = device.input("x", counting<float>(kCount));
    return device.launch(1, [&] {
      TPipe pipe;
      const auto a = local<float>(pipe, kCount);
      const auto b = local<float>(pipe, kCount);
      DataCopy(a, global<float>(x.gm(), kCount), kCount);
      order<HardEvent::MTE2_V>(broken);
      Adds(b, a, 1.0f, kCount);
    });
  });
}

TEST_CASE("MTE2 overwrites what the vector unit reads only after it did") {
  check_seeded(FaultKind::kMissingWait, [](bool broken) {
    Device device;
    const auto x = device.input("x", counting<float>(kCount));
    return device.launch(1, [&] {
      TPipe pipe;
      const auto a = local<float>(pipe, kCount);
      const auto b = local<float>(pipe, kCount);
      DataCopy(a, global<float>(x.gm(), kCount), kCount);
      order<HardEvent::MTE2_V>(false);
      Adds(b, a, 1.0f, kCount);
      order<HardEvent::V_MTE2>(broken);
      DataCopy(a, global<float>(x.gm(), kCount), kCount);
      order<HardEvent::MTE2_V>(false);
    });
  });
}

TEST_CASE("MTE2 overwrites what the vector unit wrote only after it did") {
  check_seeded(FaultKind::kMissingWait, [](bool broken) {
    Device device;
    const auto x = device.input("x", counting<float>(kCount));
    return device.launch(1, [&] {
      TPipe pipe;
      const auto a = local<float>(pipe, kCount);
      Duplicate(a, 0.0f, kCount);
      order<HardEvent::V_MTE2>(broken);
      DataCopy(a, global<float>(x.gm(), kCount), kCount);
    });
  });
}

TEST_CASE("MTE3 takes out what the vector unit wrote after it did") {
  check_seeded(FaultKind::kMissingWait, [](bool broken) {
    Device device;
    const auto y = device.output<float>("y", kCount);
    return device.launch(1, [&] {
      TPipe pipe;
      const auto a = local<float>(pipe, kCount);
      Duplicate(a, 1.0f, kCount);
      order<HardEvent::V_MTE3>(broken);
      DataCopy(global<float>(y.gm(), kCount), a, kCount);
    });
  });
}

TEST_CASE("the vector unit overwrites what MTE3 takes out only after it did") {
  check_seeded(FaultKind::kMissingWait, [](bool broken) {
    Device device;
    const auto y = device.output<float>("y", kCount);
    return device.launch(1, [&] {
      TPipe pipe;
      const auto a = local<float>(pipe, kCount);
      Duplicate(a, 1.0f, kCount);
      order<HardEvent::V_MTE3>(false);
      DataCopy(global<float>(y.gm(), kCount), a, kCount);
      order<HardEvent::MTE3_V>(broken);
      Duplicate(a, 2.0f, kCount);
    });
  });
}

TEST_CASE("MTE3 takes out what MTE2 brought in after it did") {
  check_seeded(FaultKind::kMissingWait, [](bool broken) {
    Device device;
    const auto x = device.input("x", counting<float>(kCount));
    const auto y = device.output<float>("y", kCount);
    return device.launch(1, [&] {
      TPipe pipe;
      const auto a = local<float>(pipe, kCount);
      DataCopy(a, global<float>(x.gm(), kCount), kCount);
      order<HardEvent::MTE2_MTE3>(broken);
      DataCopy(global<float>(y.gm(), kCount), a, kCount);
    });
  });
}

TEST_CASE("MTE2 overwrites what MTE3 takes out only after it did") {
  check_seeded(FaultKind::kMissingWait, [](bool broken) {
    Device device;
    const auto x = device.input("x", counting<float>(2 * kCount));
    const auto y = device.output<float>("y", kCount);
    return device.launch(1, [&] {
      TPipe pipe;
      const auto a = local<float>(pipe, kCount);
      DataCopy(a, global<float>(x.gm(), kCount), kCount);
      order<HardEvent::MTE2_MTE3>(false);
      DataCopy(global<float>(y.gm(), kCount), a, kCount);
      order<HardEvent::MTE3_MTE2>(broken);
      DataCopy(a, global<float>(x.gm(), 2 * kCount)[kCount], kCount);
    });
  });
}

TEST_CASE("MTE2 reads global memory that MTE3 of its core wrote after it did") {
  check_seeded(FaultKind::kMissingWait, [](bool broken) {
    Device device;
    const auto y = device.output<float>("y", kCount);
    return device.launch(1, [&] {
      TPipe pipe;
      const auto a = local<float>(pipe, kCount);
      const auto b = local<float>(pipe, kCount);
      Duplicate(a, 1.0f, kCount);
      order<HardEvent::V_MTE3>(false);
      DataCopy(global<float>(y.gm(), kCount), a, kCount);
      order<HardEvent::MTE3_MTE2>(broken);
      DataCopy(b, global<float>(y.gm(), kCount), kCount);
    });
  });
}

TEST_CASE("a flag covers all that its pipe did before, and what that was ordered after") {
  Device device;
  const auto x = device.input("x", counting<float>(kCount));
  const auto y = device.output<float>("y", kCount);
  const Report report = device.launch(1, [&] {
    TPipe pipe;
    const auto a = local<float>(pipe, kCount);
    const auto b = local<float>(pipe, kCount);
    DataCopy(a, global<float>(x.gm(), kCount), kCount);
    Duplicate(b, 1.0f, kCount);
    order<HardEvent::MTE2_V>(false);
    order<HardEvent::V_MTE3>(false);
    DataCopy(global<float>(y.gm(), kCount), a, kCount);  // MTE2 -> V -> MTE3
  });
  CHECK_MESSAGE(report.faults.empty(), toString(report));
}

TEST_CASE("a flag set before an instruction does not cover it") {
  check_seeded(FaultKind::kMissingWait, [](bool broken) {
    Device device;
    const auto x = device.input("x", counting<float>(kCount));
    return device.launch(1, [&] {
      TPipe pipe;
      const auto a = local<float>(pipe, kCount);
      const auto b = local<float>(pipe, kCount);
      if (broken) SetFlag<HardEvent::MTE2_V>(EVENT_ID1);
      DataCopy(a, global<float>(x.gm(), kCount), kCount);
      if (!broken) SetFlag<HardEvent::MTE2_V>(EVENT_ID1);
      WaitFlag<HardEvent::MTE2_V>(EVENT_ID1);
      Adds(b, a, 1.0f, kCount);
    });
  });
}

TEST_CASE("what the compiler does for a scalar read orders no other pipe, an explicit wait does") {
  check_seeded(FaultKind::kMissingWait, [](bool broken) {
    Device device;
    const auto x = device.input("x", counting<float>(kCount));
    return device.launch(1, [&] {
      TPipe pipe;
      const auto a = local<float>(pipe, kCount);
      const auto b = local<float>(pipe, kCount);
      DataCopy(a, global<float>(x.gm(), kCount), kCount);
      order<HardEvent::MTE2_S>(broken);
      CHECK(a.GetValue(3) == 3.0f);
      Adds(b, a, 1.0f, kCount);
    });
  });
}

TEST_CASE("flags that nobody waits for, or nobody sets") {
  check_seeded_alone(FaultKind::kUnbalancedFlag, [](bool broken) {
    SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
    if (!broken) WaitFlag<HardEvent::V_MTE3>(EVENT_ID0);
  });
  check_seeded_alone(FaultKind::kUnbalancedFlag, [](bool broken) {
    if (!broken) SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
    WaitFlag<HardEvent::V_MTE3>(EVENT_ID0);
  });
  check_seeded_alone(FaultKind::kUnbalancedFlag, [](bool broken) {
    SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
    SetFlag<HardEvent::V_MTE3>(broken ? EVENT_ID0 : EVENT_ID1);
    WaitFlag<HardEvent::V_MTE3>(EVENT_ID0);
    if (!broken) WaitFlag<HardEvent::V_MTE3>(EVENT_ID1);
  });
}

TEST_CASE("event ids outside 0..5, and more events than there are") {
  check_seeded_alone(FaultKind::kEventRange, [](bool broken) {
    const int id = broken ? 6 : 5;
    SetFlag<HardEvent::MTE2_V>(id);
    WaitFlag<HardEvent::MTE2_V>(id);
  });
  check_seeded_alone(FaultKind::kEventRange, [](bool broken) {
    TPipe pipe;
    for (int i = 0; i < (broken ? 7 : 6); ++i) {
      pipe.AllocEventID<HardEvent::MTE2_V>();
    }
  });
}

TEST_CASE("queues and kernels share the events") {
  // The queue's EnQue holds MTE2_V 0 when the kernel sets it; FetchEventID would have given 1.
  check_seeded(FaultKind::kUnbalancedFlag, [](bool broken) {
    Device device;
    const auto x = device.input("x", counting<float>(kCount));
    return device.launch(1, [&] {
      TPipe pipe;
      TQue<TPosition::VECIN, 1> queue;
      pipe.InitBuffer(queue, 1, kCount * 4);
      auto a = queue.AllocTensor<float>();
      DataCopy(a, global<float>(x.gm(), kCount), kCount);
      queue.EnQue(a);
      const int id = broken ? 0 : pipe.FetchEventID(HardEvent::MTE2_V);
      SetFlag<HardEvent::MTE2_V>(id);
      WaitFlag<HardEvent::MTE2_V>(id);
      a = queue.DeQue<float>();
      queue.FreeTensor(a);
    });
  });
}

// A queue from global memory through a doubling to global memory, over a few tiles.
Report stream(bool deque, bool enque, bool free_in) {
  Device device;
  const auto x = device.input("x", counting<float>(4 * kCount));
  const auto y = device.output<float>("y", 4 * kCount);
  const Report report = device.launch(1, [&] {
    TPipe pipe;
    TQue<TPosition::VECIN, 1> in;
    TQue<TPosition::VECOUT, 1> out;
    pipe.InitBuffer(in, 2, kCount * 4);
    pipe.InitBuffer(out, 2, kCount * 4);
    for (uint32_t tile = 0; tile < 4; ++tile) {
      auto a = in.AllocTensor<float>();
      DataCopy(a, global<float>(x.gm(), 4 * kCount)[tile * kCount], kCount);
      if (enque) in.EnQue(a);
      if (deque) a = in.DeQue<float>();
      auto b = out.AllocTensor<float>();
      Muls(b, a, 2.0f, kCount);
      if (free_in) in.FreeTensor(a);
      out.EnQue(b);
      b = out.DeQue<float>();
      DataCopy(global<float>(y.gm(), 4 * kCount)[tile * kCount], b, kCount);
      out.FreeTensor(b);
    }
  });
  if (report.faults.empty()) {
    for (uint32_t i = 0; i < 4 * kCount; ++i) {
      CHECK(y[i] == 2.0f * static_cast<float>(i));
    }
  }
  return report;
}

TEST_CASE("queues order the pipes") { CHECK(stream(true, true, true).faults.empty()); }

TEST_CASE("a queue without EnQue and DeQue orders nothing") {
  CHECK(stream(false, false, true).only(FaultKind::kMissingWait));
}

TEST_CASE("DeQue needs an EnQue") { CHECK(stream(true, false, true).only(FaultKind::kQueueMisuse)); }

TEST_CASE("AllocTensor needs a free buffer") { CHECK(stream(true, true, false).only(FaultKind::kDoubleAlloc)); }

TEST_CASE("a queue of depth 1 takes one EnQue at a time") {
  check_seeded_alone(FaultKind::kQueueMisuse, [](bool broken) {
    TPipe pipe;
    TQue<TPosition::VECOUT, 1> queue;
    pipe.InitBuffer(queue, 2, 256);
    auto a = queue.AllocTensor<float>();
    queue.EnQue(a);
    if (!broken) a = queue.DeQue<float>();
    auto b = queue.AllocTensor<float>();
    queue.EnQue(b);
    if (broken) queue.DeQue<float>();
    queue.DeQue<float>();
  });
}

TEST_CASE("a tensor is stale after FreeTensor, even when its buffer is in use again") {
  check_seeded_alone(FaultKind::kStaleBuffer, [](bool broken) {
    TPipe pipe;
    TQue<TPosition::VECIN, 1> queue;
    pipe.InitBuffer(queue, 1, 256);
    auto a = queue.AllocTensor<float>();
    if (!broken) Duplicate(a, 0.0f, 64);
    queue.FreeTensor(a);
    auto b = queue.AllocTensor<float>();
    Duplicate(broken ? a : b, 0.0f, 64);
  });
}

TEST_CASE("FreeTensor is not given a tensor of another queue") {
  check_seeded_alone(FaultKind::kQueueMisuse, [](bool broken) {
    TPipe pipe;
    TQue<TPosition::VECIN, 1> one;
    TQue<TPosition::VECIN, 1> other;
    pipe.InitBuffer(one, 1, 256);
    pipe.InitBuffer(other, 1, 256);
    auto a = one.AllocTensor<float>();
    (broken ? other : one).FreeTensor(a);
  });
}

TEST_CASE("TQueBind from VECIN to VECOUT orders MTE2 and MTE3") {
  Device device;
  const auto x = device.input("x", counting<float>(4 * kCount));
  const auto y = device.output<float>("y", 4 * kCount);
  const Report report = device.launch(1, [&] {
    TPipe pipe;
    TQueBind<TPosition::VECIN, TPosition::VECOUT, 1> queue;
    pipe.InitBuffer(queue, 2, kCount * 4);
    for (uint32_t tile = 0; tile < 4; ++tile) {
      auto a = queue.AllocTensor<float>();
      DataCopy(a, global<float>(x.gm(), 4 * kCount)[tile * kCount], kCount);
      queue.EnQue(a);
      a = queue.DeQue<float>();
      DataCopy(global<float>(y.gm(), 4 * kCount)[tile * kCount], a, kCount);
      queue.FreeTensor(a);
    }
  });
  CHECK_MESSAGE(report.faults.empty(), toString(report));
  CHECK(y[4 * kCount - 1] == 4.0f * kCount - 1);
}

// Each core writes its part of y; then each reads its neighbour's.
template <typename Synchronise>
Report exchange(int blocks, Synchronise synchronise) {
  Device device;
  const auto workspace = device.inout("workspace", std::vector<int32_t>(blocks * 8, 0));
  const auto y = device.inout("y", std::vector<float>(blocks * kCount, -1.0f));
  const auto z = device.output<float>("z", blocks * kCount);
  const Report report = device.launch(blocks, [&] {
    TPipe pipe;
    const auto a = local<float>(pipe, kCount);
    const auto b = local<float>(pipe, kCount);
    const auto flags = local<int32_t>(pipe, static_cast<uint32_t>(blocks) * 8);
    const auto me = static_cast<uint32_t>(GetBlockIdx());
    const uint32_t next = (me + 1) % static_cast<uint32_t>(GetBlockNum());
    Duplicate(a, static_cast<float>(me), kCount);
    order<HardEvent::V_MTE3>(false);
    const auto all_y = global<float>(y.gm(), y.size());
    const auto all_z = global<float>(z.gm(), z.size());
    DataCopy(all_y[me * kCount], a, kCount);
    synchronise(global<int32_t>(workspace.gm(), workspace.size()), flags);
    DataCopy(b, all_y[next * kCount], kCount);
    order<HardEvent::MTE2_MTE3>(false);
    DataCopy(all_z[me * kCount], b, kCount);
  });
  if (report.faults.empty()) {
    for (int core = 0; core < blocks; ++core) {
      CHECK(z[core * kCount] == static_cast<float>((core + 1) % blocks));
    }
  }
  return report;
}

TEST_CASE("cores that exchange data need a SyncAll") {
  for (const int blocks : {2, 40, 48}) {
    CAPTURE(blocks);
    check_seeded(FaultKind::kCoreRace, [&](bool broken) {
      return exchange(blocks, [&](auto, auto) {
        // A core orders itself even where it does not wait for others.
        PipeBarrier<PIPE_ALL>();
        if (!broken) SyncAll();
      });
    });
  }
}

TEST_CASE("the soft SyncAll does as well") {
  const Report report = exchange(48, [](auto workspace, auto flags) { SyncAll(workspace, flags); });
  CHECK_MESSAGE(report.faults.empty(), toString(report));
  CHECK(report.syncs() == 1);
}

TEST_CASE("a cross-core flag releases what its pipe did, and no more") {
  check_seeded(FaultKind::kCoreRace, [](bool broken) {
    return exchange(48, [&](auto, auto) {
      // MTE2 has nothing to do with the store that the others wait for.
      if (broken) {
        CrossCoreSetFlag<0, PIPE_MTE2>(3);
      } else {
        CrossCoreSetFlag<0, PIPE_MTE3>(3);
      }
      CrossCoreWaitFlag(3);
    });
  });
}

TEST_CASE("who waited for a cross-core flag is ordered after his own share too") {
  check_seeded(FaultKind::kMissingWait, [](bool broken) {
    Device device;
    const auto x = device.inout("x", std::vector<float>(kCount, 1.0f));
    return device.launch(1, [&] {
      TPipe pipe;
      const auto a = local<float>(pipe, kCount);
      const auto b = local<float>(pipe, kCount);
      Duplicate(a, 2.0f, kCount);
      SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
      WaitFlag<HardEvent::V_MTE3>(EVENT_ID0);
      DataCopy(global<float>(x.gm(), kCount), a, kCount);
      if (broken) {
        CrossCoreSetFlag<0, PIPE_MTE2>(3);
      } else {
        CrossCoreSetFlag<0, PIPE_MTE3>(3);
      }
      CrossCoreWaitFlag(3);
      DataCopy(b, global<float>(x.gm(), kCount), kCount);
    });
  });
}

TEST_CASE("a kernel names the cross-core flags 0 to 10") {
  check_seeded_alone(FaultKind::kEventRange, [](bool broken) {
    const uint16_t flag = broken ? 11 : 10;
    CrossCoreSetFlag<0, PIPE_MTE3>(flag);
    CrossCoreWaitFlag(flag);
  });
}

TEST_CASE("two cores do not write the same memory, unless atomically") {
  check_seeded(FaultKind::kCoreRace, [](bool broken) {
    Device device;
    const auto y = device.inout("y", std::vector<float>(kCount, 0.0f));
    const Report report = device.launch(48, [&] {
      TPipe pipe;
      const auto a = local<float>(pipe, kCount);
      Duplicate(a, 1.0f, kCount);
      order<HardEvent::V_MTE3>(false);
      if (!broken) SetAtomicAdd<float>();
      DataCopy(global<float>(y.gm(), kCount), a, kCount);
      if (!broken) SetAtomicNone();
    });
    CHECK(y[5] == (broken ? 1.0f : 48.0f));
    return report;
  });
}

TEST_CASE("a core does not write what another reads, whichever comes first") {
  for (const int writer : {0, 1}) {
    check_seeded(FaultKind::kCoreRace, [&](bool broken) {
      Device device;
      const auto y = device.inout("y", std::vector<float>(kCount, 0.0f));
      return device.launch(2, [&] {
        TPipe pipe;
        const auto a = local<float>(pipe, kCount);
        const auto y_tensor = global<float>(y.gm(), kCount);
        if (GetBlockIdx() == writer) {
          Duplicate(a, 1.0f, kCount);
          order<HardEvent::V_MTE3>(false);
          if (!broken) SyncAll();
          DataCopy(y_tensor, a, kCount);
        } else {
          DataCopy(a, y_tensor, kCount);
          if (!broken) SyncAll();
        }
      });
    });
  }
}

TEST_CASE("what the scalar unit stored is cleaned before others read it") {
  check_seeded(FaultKind::kDirtyCache, [](bool broken) {
    Device device;
    const auto y = device.inout("y", std::vector<float>(64, 0.0f));
    return device.launch(2, [&] {
      TPipe pipe;
      const auto a = local<float>(pipe, 8);
      auto y_tensor = global<float>(y.gm(), 64);
      if (GetBlockIdx() == 0) {
        y_tensor.SetValue(0, 7.0f);
        if (!broken) {
          DataCacheCleanAndInvalid<float, CacheLine::SINGLE_CACHE_LINE, DcciDst::CACHELINE_OUT>(y_tensor);
        }
      }
      SyncAll();
      if (GetBlockIdx() == 1) DataCopy(a, y_tensor, 8);
    });
  });
}

TEST_CASE("what the scalar unit read before others stored is read anew") {
  check_seeded(FaultKind::kDirtyCache, [](bool broken) {
    Device device;
    const auto y = device.inout("y", std::vector<float>(64, 0.0f));
    return device.launch(2, [&] {
      TPipe pipe;
      const auto a = local<float>(pipe, 8);
      auto y_tensor = global<float>(y.gm(), 64);
      if (GetBlockIdx() == 0) y_tensor.GetValue(0);
      SyncAll();
      if (GetBlockIdx() == 1) {
        Duplicate(a, 1.0f, 8);
        order<HardEvent::V_MTE3>(false);
        DataCopy(y_tensor, a, 8);
      }
      SyncAll();
      if (GetBlockIdx() == 0) {
        if (!broken) {
          DataCacheCleanAndInvalid<float, CacheLine::SINGLE_CACHE_LINE, DcciDst::CACHELINE_OUT>(y_tensor);
        }
        y_tensor.GetValue(0);
      }
    });
  });
}

TEST_CASE("all cores come to a SyncAll, and no more than there are") {
  check_seeded_alone(
      FaultKind::kSyncMismatch,
      [](bool broken) {
        if (!broken || GetBlockIdx() != 3) SyncAll();
      },
      8);
  check_seeded(FaultKind::kTooManyCores, [](bool broken) {
    Device device(40);
    return device.launch(broken ? 48 : 40, [] { SyncAll(); });
  });
}

}  // namespace
}  // namespace ascendc_model
