// Which experts a call routes to, and which tokens to each: every core finds it out for itself, from ids and weights.
//
// Experts are listed in the order in which tokens name them. A token that names an expert twice counts once, with the
// sum of the weights. Ids outside [0, experts), -1 above all, are skipped.

#pragma once

#include <cstdint>

#include "kernel_operator.h"
#include "kernels/local_buffer.h"
#include "kernels/w4a16_panel.h"

namespace moe_fx::ascendc {

class Routing {
 public:
  __aicore__ inline void Init(AscendC::TPipe* pipe, uint32_t tokens, uint32_t topK, uint32_t experts, uint32_t slots) {
    tokens_ = tokens;
    pairs_ = tokens * topK;
    topK_ = topK;
    experts_ = experts;
    slotOf_ = Allot<int32_t>(pipe, slotBuffer_, experts);
    expert_ = Allot<uint32_t>(pipe, expertBuffer_, slots);
    mask_ = Allot<uint32_t>(pipe, maskBuffer_, slots);
    before_ = Allot<uint32_t>(pipe, beforeBuffer_, slots + 1);
    weight_ = Allot<float>(pipe, weightBuffer_, slots * tokens);
    given_ = Allot<float>(pipe, givenBuffer_, pairs_);
  }

  // W: float, half or bfloat16_t, of the routing weights.
  template <typename W>
  __aicore__ inline void Build(GM_ADDR ids, GM_ADDR weights, LoadQueue& queue) {
    AscendC::Duplicate(slotOf_, -1, static_cast<int32_t>(experts_));
    Load<int32_t>(ids, queue);
    Load<W>(weights, queue);
    AscendC::LocalTensor<int32_t> id = queue.DeQue<int32_t>();
    AscendC::LocalTensor<W> raw = queue.DeQue<W>();
    AscendC::LocalTensor<float> given = given_;
    if constexpr (sizeof(W) == sizeof(float)) {
      given = raw;
    } else {
      AscendC::Cast(given, raw, AscendC::RoundMode::CAST_NONE, pairs_);
    }
    // From here on the scalar unit reads what the others brought.
    AscendC::PipeBarrier<PIPE_ALL>();
    matrices_ = 0;
    for (uint32_t token = 0; token < tokens_; ++token) {
      for (uint32_t k = 0; k < topK_; ++k) {
        const int32_t expert = id.GetValue(token * topK_ + k);
        if (expert < 0 || expert >= static_cast<int32_t>(experts_)) continue;
        int32_t slot = slotOf_.GetValue(expert);
        if (slot < 0) {
          slot = static_cast<int32_t>(matrices_++);
          slotOf_.SetValue(expert, slot);
          expert_.SetValue(slot, static_cast<uint32_t>(expert));
          mask_.SetValue(slot, 0);
        }
        const uint32_t bit = 1u << token;
        const uint32_t place = static_cast<uint32_t>(slot) * tokens_ + token;
        float weight = given.GetValue(token * topK_ + k);
        if (mask_.GetValue(slot) & bit) weight += weight_.GetValue(place);
        mask_.SetValue(slot, mask_.GetValue(slot) | bit);
        weight_.SetValue(place, weight);
      }
    }
    queue.FreeTensor(id);
    queue.FreeTensor(raw);
    // What Partition wants: costs of the matrices before each, and the dearest.
    uint32_t sum = 0;
    dearest_ = 0;
    for (uint32_t slot = 0; slot < matrices_; ++slot) {
      const uint32_t cost = 1 + 2 * Tokens(slot);
      before_.SetValue(slot, sum);
      sum += cost;
      if (cost > dearest_) dearest_ = cost;
    }
    before_.SetValue(matrices_, sum);
  }

  __aicore__ inline uint32_t Matrices() const { return matrices_; }
  __aicore__ inline uint32_t Dearest() const { return dearest_; }
  __aicore__ inline const AscendC::LocalTensor<uint32_t>& Before() const { return before_; }
  __aicore__ inline uint32_t Matrix(uint32_t slot) const { return expert_.GetValue(slot); }
  __aicore__ inline float Weight(uint32_t slot, uint32_t token) const {
    return weight_.GetValue(slot * tokens_ + token);
  }

  __aicore__ inline uint32_t Tokens(uint32_t slot) const {
    uint32_t count = 0;
    for (uint32_t mask = mask_.GetValue(slot); mask != 0; mask &= mask - 1)
      ++count;
    return count;
  }

  // The i-th token of a matrix.
  __aicore__ inline uint32_t Token(uint32_t slot, uint32_t i) const {
    uint32_t mask = mask_.GetValue(slot);
    for (; i > 0; --i)
      mask &= mask - 1;
    uint32_t token = 0;
    while ((mask >> token & 1) == 0)
      ++token;
    return token;
  }

 private:
  template <typename V>
  __aicore__ inline void Load(GM_ADDR from, LoadQueue& queue) const {
    AscendC::GlobalTensor<V> global;
    global.SetGlobalBuffer(reinterpret_cast<__gm__ V*>(from));
    AscendC::LocalTensor<V> local = queue.AllocTensor<V>();
    AscendC::DataCopyPad(local, global, AscendC::DataCopyExtParams(1, pairs_ * sizeof(V), 0, 0, 0),
                         AscendC::DataCopyPadExtParams<V>(false, 0, 0, V()));
    queue.EnQue(local);
  }

  uint32_t tokens_, topK_, pairs_, experts_, matrices_, dearest_;
  LocalBuffer slotBuffer_, expertBuffer_, maskBuffer_, beforeBuffer_, weightBuffer_, givenBuffer_;
  AscendC::LocalTensor<int32_t> slotOf_;
  AscendC::LocalTensor<uint32_t> expert_, mask_, before_;
  AscendC::LocalTensor<float> weight_, given_;
};

}  // namespace moe_fx::ascendc
