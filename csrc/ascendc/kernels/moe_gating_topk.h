// Routing on the vector cores: logits [T, E] to the weights and ids [T, k] of each token's experts, in one pass and
// without a scalar read: lowering/ops/route.py in fp32, equal choices going to the lowest id, NaN above everything.
//
// Tokens are dealt out evenly; a core computes `tileTokens` of them at a time, one instruction for all. The steps:
//
//   logits --MTE2--> values [tokens, width] --+-- + bias, NaN -> inf --> keys --Sort32, MrgSort--> (key, address) pairs
//                         | scores, in place  |      ^ groups that lose fall to -inf                      |
//                         v                   |                                                           v
//                    scores [tokens, width] <-+ (where choices are scores)              addresses of the best k
//                         |                                                                               |
//                         +------------------------ Gather: weights, ids <--------------------------------+
//                                                        | renormalise, scale
//                                                        v MTE3
//
// What is sorted beside a key is the byte address of its place in the tile, so that one Gather fetches the weights.
// Sort32 and MrgSort keep the order of equal keys (earlier place, earlier queue first), and places are in order of ids.
// Minus zero becomes zero in the addition of the bias (or of zeros), so that both are equal keys.

#pragma once

#include "kernels/core_share.h"
#include "kernels/local_buffer.h"
#include "kernels/vector_math.h"
#include "tiling/moe_gating_topk_tiling.h"

namespace moe_fx::ascendc {

template <typename T>
class MoeGatingTopk {
 public:
  __aicore__ inline void Init(GM_ADDR logits, GM_ADDR bias, GM_ADDR weights, GM_ADDR ids,
                              const MoeGatingTopkTiling& tiling, AscendC::TPipe* pipe) {
    t_ = tiling;
    pipe_ = pipe;
    share_ = ShareOf(t_.tokens);
    slots_ = t_.width / t_.groupPitch;
    grouped_ = t_.groups > 1;
    padded_ = t_.groups * t_.groupSize != t_.width;

    logits_.SetGlobalBuffer((__gm__ Raw*)logits);
    bias_.SetGlobalBuffer((__gm__ uint32_t*)bias);
    weightsOut_.SetGlobalBuffer((__gm__ float*)weights);
    idsOut_.SetGlobalBuffer((__gm__ int32_t*)ids);

    const uint32_t places = t_.tileTokens * t_.width;
    const uint32_t chosen = t_.tileTokens * t_.topKPitch;
    pipe->InitBuffer(logitsQueue_, 2, places * sizeof(Raw));
    pipe->InitBuffer(resultsQueue_, 2, 2 * chosen * sizeof(float));
    values_ = Allot<float>(pipe, valuesBuffer_, places);
    keys_ = Allot<float>(pipe, keysBuffer_, places);
    addresses_ = Allot<int32_t>(pipe, addressesBuffer_, places);
    sorted_ = Allot<float>(pipe, sortedBuffer_, 2 * places);
    merged_ = Allot<float>(pipe, mergedBuffer_, 2 * places);
    numbers_ = Allot<uint8_t>(pipe, numbersBuffer_, places / 8);
    chosen_ = Allot<float>(pipe, chosenBuffer_, chosen);
    chosenAddress_ = Allot<int32_t>(pipe, chosenAddressBuffer_, chosen);
    tokenAddress_ = Allot<int32_t>(pipe, tokenAddressBuffer_, chosen);
    correction_ = Allot<float>(pipe, correctionBuffer_, t_.width);
    idOf_ = Allot<int32_t>(pipe, idOfBuffer_, t_.width);
    perToken_ = Allot<float>(pipe, perTokenBuffer_, RoundUp(t_.tileTokens, 8));
    tokenBlocks_ = Allot<float>(pipe, tokenBlocksBuffer_, RoundUp(t_.tileTokens, 8) * 8);
    ones_ = Allot<float>(pipe, onesBuffer_, 8);
    if (grouped_) {
      const uint32_t lanes = RoundUp(t_.tileTokens, 2) * kSortPlaces;
      groupScore_ = Allot<float>(pipe, groupScoreBuffer_, lanes);
      groupAddress_ = Allot<int32_t>(pipe, groupAddressBuffer_, lanes);
      groupOrder_ = Allot<float>(pipe, groupOrderBuffer_, lanes);
      verdict_ = Allot<float>(pipe, verdictBuffer_, lanes);
      floor_ = Allot<float>(pipe, floorBuffer_, t_.width);
    }
    FillTables();
  }

  __aicore__ inline void Process() {
    for (uint32_t done = 0; done < share_.count; done += t_.tileTokens) {
      const uint32_t left = share_.count - done;
      rows_ = left < t_.tileTokens ? left : t_.tileTokens;
      CopyIn(share_.first + done);
      Compute();
      CopyOut(share_.first + done);
    }
  }

 private:
  using Raw = typename Bits<T>::Type;
  using Floats = AscendC::LocalTensor<float>;
  using Words = AscendC::LocalTensor<int32_t>;

  static constexpr uint32_t kSortPlaces = 32;
  static constexpr uint32_t kMergePlaces = 128;
  static constexpr uint32_t kPairBytes = 8;  // a key and its address, as the sorts leave them
  static constexpr float kLowest = -3.4028234663852886e38F;
  static constexpr Raw kMinusInfinity = Bits<T>::kMinusInfinity;
  static constexpr uint8_t kSecondOfPairs = 2;  // GatherMask's built-in pattern of odd elements

  // Everything that is the same for all tiles.
  __aicore__ inline void FillTables() {
    const uint32_t places = t_.tileTokens * t_.width;
    // 0, 1, 2, ... from which the tables come: a first repeat, doubled. CreateVecIndex takes an instruction a repeat.
    AscendC::CreateVecIndex(addresses_, static_cast<int32_t>(0), kFloatLanes);
    for (uint32_t have = kFloatLanes; have < places; have *= 2) {
      const uint32_t missing = places - have;
      AscendC::Adds(addresses_[have], addresses_, static_cast<int32_t>(have),
                    static_cast<int32_t>(missing < have ? missing : have));
    }
    const int32_t chosen = static_cast<int32_t>(t_.tileTokens * t_.topKPitch);
    AscendC::ShiftRight(tokenAddress_, addresses_, static_cast<int32_t>(t_.topKShift), chosen);
    AscendC::Muls(tokenAddress_, tokenAddress_, static_cast<int32_t>(t_.width * sizeof(float)), chosen);
    AscendC::Adds(idOf_, addresses_, static_cast<int32_t>(0), static_cast<int32_t>(t_.width));
    if (t_.groupPitch != t_.groupSize) {
      for (uint32_t slot = 1; slot < slots_; ++slot) {
        const Words ids = idOf_[slot * t_.groupPitch];
        AscendC::Adds(ids, ids, -static_cast<int32_t>(slot * (t_.groupPitch - t_.groupSize)),
                      static_cast<int32_t>(t_.groupPitch));
      }
    }
    if (grouped_) FillGroupTables(addresses_);
    AscendC::ShiftLeft(addresses_, addresses_, static_cast<int32_t>(2), static_cast<int32_t>(places));

    AscendC::Duplicate(ones_, 1.0F, 8);
    AscendC::Duplicate(perToken_, 0.0F, static_cast<int32_t>(RoundUp(t_.tileTokens, 8)));

    AscendC::Duplicate(correction_, -kInfinity, static_cast<int32_t>(t_.width));
    if (t_.hasBias != 0) {
      LoadBias();
    } else {
      FillExperts(correction_, 0.0F);
    }
  }

  __aicore__ inline void FillExperts(const Floats& row, float value) {
    for (uint32_t group = 0; group < t_.groups; ++group) {
      AscendC::Duplicate(row[group * t_.groupPitch], value, static_cast<int32_t>(t_.groupSize));
    }
  }

  __aicore__ inline void LoadBias() {
    Order<AscendC::HardEvent::V_MTE2>(pipe_);
    CopyGroups(correction_.template ReinterpretCast<uint32_t>(), bias_, t_.groups, Bits<float>::kMinusInfinity);
    // Nothing to wait for here: it is there before the first logits, which follow it in the same pipe.
  }

  // Groups of experts, dense in global memory, to groups that start `groupPitch` places apart.
  template <typename Element>
  __aicore__ inline void CopyGroups(const AscendC::LocalTensor<Element>& dst, const AscendC::GlobalTensor<Element>& src,
                                    uint32_t groups, Element padding) {
    const uint32_t bytes = t_.groupSize * sizeof(Element);
    const uint32_t blocks = RoundUp(bytes, kBlockBytes);
    const uint32_t gap = (t_.groupPitch * sizeof(Element) - blocks) / kBlockBytes;
    const AscendC::DataCopyExtParams params{static_cast<uint16_t>(groups), bytes, 0, gap, 0};
    const uint8_t right = static_cast<uint8_t>((blocks - bytes) / sizeof(Element));
    AscendC::DataCopyPad(dst, src, params, AscendC::DataCopyPadExtParams<Element>{true, 0, right, padding});
  }

  __aicore__ inline void FillGroupTables(const Words& numbers) {
    const int32_t lanes = static_cast<int32_t>(t_.tileTokens * kSortPlaces);
    const int32_t runBytes = static_cast<int32_t>(kSortPlaces * kPairBytes);
    const int32_t tokenBytes = static_cast<int32_t>(t_.width / kSortPlaces) * runBytes;
    const int32_t groupBytes = static_cast<int32_t>(t_.groupPitch / kSortPlaces) * runBytes;
    // Lane 32 r + g: the address of token r's group g among the sorted pairs. Lanes beyond its groups repeat the last.
    Words token = merged_.template ReinterpretCast<int32_t>();
    Words tokenLanes = sorted_.template ReinterpretCast<int32_t>();
    AscendC::ShiftRight(token, numbers, static_cast<int32_t>(5), lanes);
    AscendC::Muls(tokenLanes, token, static_cast<int32_t>(kSortPlaces), lanes);
    AscendC::Sub(groupAddress_, numbers, tokenLanes, lanes);
    AscendC::Mins(groupAddress_, groupAddress_, static_cast<int32_t>(t_.groups - 1), lanes);
    AscendC::Muls(groupAddress_, groupAddress_, groupBytes, lanes);
    AscendC::Muls(token, token, tokenBytes, lanes);
    AscendC::Add(groupAddress_, groupAddress_, token, lanes);

    AscendC::Cast(groupOrder_, numbers, AscendC::RoundMode::CAST_NONE, static_cast<uint32_t>(lanes));
    AscendC::Muls(groupOrder_, groupOrder_, -1.0F, lanes);
    AscendC::Duplicate(verdict_, -kInfinity, lanes);
    AscendC::Duplicate(verdict_, kInfinity, static_cast<uint64_t>(t_.keptGroups), static_cast<uint8_t>(t_.tileTokens),
                       1, kSortPlaces / 8);
    // Lanes beyond a token's groups keep this, and so rank last.
    AscendC::Duplicate(groupScore_, -kInfinity, static_cast<int32_t>(RoundUp(t_.tileTokens, 2) * kSortPlaces));
    AscendC::Duplicate(floor_, -kInfinity, static_cast<int32_t>(t_.width));
    FillExperts(floor_, kLowest);
  }

  __aicore__ inline void CopyIn(uint32_t token) {
    AscendC::LocalTensor<Raw> logits = logitsQueue_.template AllocTensor<Raw>();
    if (padded_) {
      // The copy leaves places between groups alone.
      AscendC::Duplicate(logits, kMinusInfinity, static_cast<int32_t>(rows_ * t_.width));
      Order<AscendC::HardEvent::V_MTE2>(pipe_);
    }
    const uint64_t experts = t_.groups * t_.groupSize;
    // Where groups leave room at a token's end, the distance to the next token is another one.
    const uint32_t tokensOfCopy = t_.groups == slots_ ? rows_ : 1;
    for (uint32_t row = 0; row < rows_; row += tokensOfCopy) {
      CopyGroups(logits[row * t_.width], logits_[(token + row) * experts], tokensOfCopy * t_.groups, kMinusInfinity);
    }
    logitsQueue_.EnQue(logits);
  }

  __aicore__ inline void Compute() {
    const uint32_t places = rows_ * t_.width;
    AscendC::LocalTensor<Raw> logits = logitsQueue_.template DeQue<Raw>();
    if constexpr (sizeof(T) == sizeof(float)) {
      AscendC::Adds(values_, logits.template ReinterpretCast<float>(), 0.0F, static_cast<int32_t>(places));
    } else {
      AscendC::Cast(values_, logits.template ReinterpretCast<T>(), AscendC::RoundMode::CAST_NONE, places);
    }
    logitsQueue_.FreeTensor(logits);

    if (t_.selectOnScores == 0) MakeKeys();
    if (t_.scoreAfter == 0) Score(values_, t_.width, t_.width);
    if (t_.selectOnScores != 0) MakeKeys();
    if (grouped_) DropGroups();
    SelectTopK();

    const uint32_t chosen = rows_ * t_.topKPitch;
    AscendC::Gather(chosen_, values_, chosenAddress_.template ReinterpretCast<uint32_t>(), 0, chosen);
    if (t_.scoreAfter != 0) Score(chosen_, t_.topKPitch, t_.topK);
    if (t_.renormalize != GatingRenormalize::kNone) Renormalize();
    AscendC::Sub(chosenAddress_, chosenAddress_, tokenAddress_, static_cast<int32_t>(chosen));

    Floats results = resultsQueue_.template AllocTensor<float>();
    AscendC::Muls(results, chosen_, t_.scale, static_cast<int32_t>(chosen));
    AscendC::Gather(results[chosen].template ReinterpretCast<int32_t>(), idOf_,
                    chosenAddress_.template ReinterpretCast<uint32_t>(), 0, chosen);
    resultsQueue_.EnQue(results);
  }

  __aicore__ inline void CopyOut(uint32_t token) {
    Floats results = resultsQueue_.template DeQue<float>();
    const uint32_t bytes = t_.topK * sizeof(float);
    const uint32_t gap = (t_.topKPitch * sizeof(float) - RoundUp(bytes, kBlockBytes)) / kBlockBytes;
    const AscendC::DataCopyExtParams params{static_cast<uint16_t>(rows_), bytes, gap, 0, 0};
    const uint64_t at = static_cast<uint64_t>(token) * t_.topK;
    AscendC::DataCopyPad(weightsOut_[at], results, params);
    AscendC::DataCopyPad(idsOut_[at], results[rows_ * t_.topKPitch].template ReinterpretCast<int32_t>(), params);
    resultsQueue_.FreeTensor(results);
  }

  // keys: the values plus the correction, minus infinity in places without an expert.
  __aicore__ inline void MakeKeys() {
    ByPlace<Op::kAdd>(keys_, values_, correction_);
    NanToInfinity(keys_, rows_ * t_.width);
  }

  // The order of the sorts is defined for numbers only. `count` is a multiple of 64.
  __aicore__ inline void NanToInfinity(const Floats& x, uint32_t count) {
    AscendC::Compare(numbers_, x, x, AscendC::CMPMODE::EQ, count);
    AscendC::Select(x, numbers_, x, kInfinity, AscendC::SELMODE::VSEL_TENSOR_SCALAR_MODE, count);
  }

  // Scores, in place, of the first `lanes` values of each token; tokens are `pitch` places apart.
  __aicore__ inline void Score(const Floats& x, uint32_t pitch, uint32_t lanes) {
    const uint32_t count = rows_ * pitch;
    if (t_.score == GatingScore::kSoftmax) {
      Reduce<Op::kMax>(x, pitch, lanes);
      ByToken<Op::kSub>(x, pitch);
      AscendC::Exp(x, x, static_cast<int32_t>(count));
      Reduce<Op::kAdd>(x, pitch, lanes);
      ByToken<Op::kDiv>(x, pitch);
    } else if (t_.score == GatingScore::kSigmoid) {
      AscendC::Muls(x, x, -1.0F, static_cast<int32_t>(count));
      AscendC::Exp(x, x, static_cast<int32_t>(count));
      AscendC::Adds(x, x, 1.0F, static_cast<int32_t>(count));
      Invert(x, ones_, count);
    } else {
      SqrtSoftplus(x, static_cast<int32_t>(count));
    }
  }

  // sqrt(log(1 + e**x)); the logarithm as max(x, 0) + log1p(e**-|x|), which Ln(1 + ...) would round away where x is
  // very negative: log1p by its series in e / (2 + e), which is at most 1/3.
  __aicore__ inline void SqrtSoftplus(const Floats& x, int32_t count) {
    Floats s = sorted_;
    Floats square = sorted_[t_.tileTokens * t_.width];
    Floats series = merged_;
    AscendC::Abs(s, x, count);
    AscendC::Muls(s, s, -1.0F, count);
    AscendC::Exp(s, s, count);
    AscendC::Adds(square, s, 2.0F, count);
    AscendC::Div(s, s, square, count);
    AscendC::Mul(square, s, s, count);
    AscendC::Muls(series, square, 1.0F / 15.0F, count);
    NextTerm(series, square, 1.0F / 13.0F, count);
    NextTerm(series, square, 1.0F / 11.0F, count);
    NextTerm(series, square, 1.0F / 9.0F, count);
    NextTerm(series, square, 1.0F / 7.0F, count);
    NextTerm(series, square, 1.0F / 5.0F, count);
    NextTerm(series, square, 1.0F / 3.0F, count);
    AscendC::Adds(series, series, 1.0F, count);
    AscendC::Mul(series, series, s, count);
    AscendC::Muls(series, series, 2.0F, count);
    AscendC::Maxs(x, x, 0.0F, count);
    AscendC::Add(x, x, series, count);
    AscendC::Sqrt(x, x, count);
  }

  __aicore__ inline void NextTerm(const Floats& series, const Floats& x, float coefficient, int32_t count) {
    AscendC::Adds(series, series, coefficient, count);
    AscendC::Mul(series, series, x, count);
  }

  // perToken_: the largest value or the sum of each token's first `lanes`, at most 64 or a multiple of 64.
  template <Op op>
  __aicore__ inline void Reduce(const Floats& x, uint32_t pitch, uint32_t lanes) {
    Floats from = x;
    uint32_t blocks = pitch / 8;
    if (lanes > kFloatLanes) {
      const uint8_t far = static_cast<uint8_t>(blocks);
      from = sorted_;
      Apply<op>(from, x, x[kFloatLanes], kFloatLanes, rows_, {1, 1, 1, 8, far, far});
      for (uint32_t at = 2 * kFloatLanes; at < lanes; at += kFloatLanes) {
        Apply<op>(from, from, x[at], kFloatLanes, rows_, {1, 1, 1, 8, 8, far});
      }
      lanes = kFloatLanes;
      blocks = 8;
    }
    const int32_t mask = static_cast<int32_t>(lanes);
    const int32_t repeats = static_cast<int32_t>(rows_);
    if constexpr (op == Op::kMax) {
      AscendC::WholeReduceMax(perToken_, from, mask, repeats, 1, 1, static_cast<int32_t>(blocks),
                              AscendC::ReduceOrder::ORDER_ONLY_VALUE);
    } else {
      AscendC::WholeReduceSum(perToken_, from, mask, repeats, 1, 1, static_cast<int32_t>(blocks));
    }
  }

  // x = x op perToken_, each token's values with its own.
  template <Op op>
  __aicore__ inline void ByToken(const Floats& x, uint32_t pitch) {
    AscendC::Brcb(tokenBlocks_, perToken_, static_cast<uint8_t>(RoundUp(rows_, 8) / 8), {1, 8});
    const uint32_t mask = pitch < kFloatLanes ? pitch : kFloatLanes;
    const uint8_t blocks = static_cast<uint8_t>(pitch / 8);
    for (uint32_t at = 0; at < pitch; at += mask) {
      Apply<op>(x[at], x[at], tokenBlocks_, mask, rows_, {1, 1, 0, blocks, blocks, 1});
    }
  }

  // dst = x op row, each token's places with the same row.
  template <Op op>
  __aicore__ inline void ByPlace(const Floats& dst, const Floats& x, const Floats& row) {
    const uint8_t blocks = static_cast<uint8_t>(t_.width / 8);
    for (uint32_t at = 0; at < t_.width; at += kFloatLanes) {
      Apply<op>(dst[at], x[at], row[at], kFloatLanes, rows_, {1, 1, 1, blocks, blocks, 0});
    }
  }

  // Lowers the keys of experts outside each token's best groups to minus infinity.
  //
  // A group's best two keys head its sorted run. Groups are sorted by score, each beside a number that falls with its
  // index; sorting by that number, beside the verdict of a rank (plus or minus infinity), brings the verdicts back into
  // the order of groups: a scatter, which the vector unit lacks.
  __aicore__ inline void DropGroups() {
    const uint32_t runsOfGroup = t_.groupPitch / kSortPlaces;
    const uint32_t lanes = rows_ * kSortPlaces;
    const uint32_t slotLanes = t_.tileTokens * kSortPlaces;
    Floats best = merged_;
    Floats second = merged_[slotLanes];
    Floats other = merged_[2 * slotLanes];
    Floats otherSecond = merged_[3 * slotLanes];
    const AscendC::LocalTensor<uint32_t> heads = groupAddress_.template ReinterpretCast<uint32_t>();
    AscendC::Sort32(sorted_, keys_, addresses_.template ReinterpretCast<uint32_t>(),
                    static_cast<int32_t>(rows_ * t_.width / kSortPlaces));
    AscendC::Gather(best, sorted_, heads, 0, lanes);
    AscendC::Gather(second, sorted_, heads, kPairBytes, lanes);
    for (uint32_t run = 1; run < runsOfGroup; ++run) {
      const uint32_t at = run * kSortPlaces * kPairBytes;
      AscendC::Gather(other, sorted_, heads, at, lanes);
      AscendC::Gather(otherSecond, sorted_, heads, at + kPairBytes, lanes);
      // The second of two pairs: the smaller of the firsts, or a second.
      AscendC::Max(second, second, otherSecond, static_cast<int32_t>(lanes));
      AscendC::Min(otherSecond, best, other, static_cast<int32_t>(lanes));
      AscendC::Max(second, second, otherSecond, static_cast<int32_t>(lanes));
      AscendC::Max(best, best, other, static_cast<int32_t>(lanes));
    }
    if (t_.groupByTop2 != 0) AscendC::Add(best, best, second, static_cast<int32_t>(lanes));
    AscendC::Adds(groupScore_, best, 0.0F, static_cast<uint64_t>(t_.groups), static_cast<uint8_t>(rows_),
                  {1, 1, kSortPlaces / 8, kSortPlaces / 8});
    NanToInfinity(groupScore_, RoundUp(lanes, kFloatLanes));

    uint64_t unused = 0;
    Floats order = other;
    AscendC::Sort32(sorted_, groupScore_, groupOrder_.template ReinterpretCast<uint32_t>(),
                    static_cast<int32_t>(rows_));
    AscendC::GatherMask(order, sorted_, kSecondOfPairs, true, 2 * lanes, {1, 1, 0, 0}, unused);
    AscendC::Sort32(sorted_, order, verdict_.template ReinterpretCast<uint32_t>(), static_cast<int32_t>(rows_));
    AscendC::GatherMask(best, sorted_, kSecondOfPairs, true, 2 * slots_,
                        {1, static_cast<uint16_t>(rows_), kSortPlaces * kPairBytes / kBlockBytes, 0}, unused);
    const uint32_t groups = rows_ * slots_;
    Floats blocks = sorted_;
    AscendC::Brcb(blocks, best, static_cast<uint8_t>(RoundUp(groups, 8) / 8), {1, 8});
    const uint8_t pitch = static_cast<uint8_t>(t_.groupPitch / 8);
    for (uint32_t at = 0; at < t_.groupPitch; at += kSortPlaces) {
      Apply<Op::kMin>(keys_[at], keys_[at], blocks, kSortPlaces, groups, {1, 1, 0, pitch, pitch, 1});
    }
    // Experts at minus infinity, dropped or so by themselves, still come before places that hold none.
    if (t_.groupPitch != t_.groupSize) ByPlace<Op::kMax>(keys_, keys_, floor_);
  }

  // chosenAddress_: the places of each token's best, in falling order.
  __aicore__ inline void SelectTopK() {
    const uint32_t quads = t_.width / kMergePlaces;
    AscendC::Sort32(sorted_, keys_, addresses_.template ReinterpretCast<uint32_t>(),
                    static_cast<int32_t>(rows_ * t_.width / kSortPlaces));
    Merge(merged_, sorted_, 2 * kSortPlaces, kSortPlaces, 4, rows_ * quads);
    Floats top = merged_;
    uint32_t pitch = 2 * kMergePlaces;
    if (quads > 1) {
      top = sorted_;
      pitch = 2 * quads * t_.topKPitch;
      for (uint32_t row = 0; row < rows_; ++row) {
        Merge(top[row * pitch], merged_[row * quads * 2 * kMergePlaces], 2 * kMergePlaces, t_.topKPitch, quads, 1);
      }
    }
    uint64_t unused = 0;
    AscendC::GatherMask(chosenAddress_, top.template ReinterpretCast<int32_t>(), kSecondOfPairs, true, 2 * t_.topKPitch,
                        {1, static_cast<uint16_t>(rows_), static_cast<uint16_t>(pitch / 8), 0}, unused);
  }

  // Merges `queues` sorted queues, `distance` floats apart, of which the first `length` pairs count.
  __aicore__ inline void Merge(const Floats& dst, const Floats& src, uint32_t distance, uint32_t length,
                               uint32_t queues, uint32_t repeats) {
    AscendC::MrgSort4Info info;
    for (uint32_t queue = 0; queue < 4; ++queue) {
      info.elementLengths[queue] = static_cast<uint16_t>(queue < queues ? length : 0);
    }
    info.ifExhaustedSuspension = false;
    info.validBit = static_cast<uint16_t>((1U << queues) - 1);
    info.repeatTimes = static_cast<uint8_t>(repeats);
    // A queue that does not count must still be a tensor.
    AscendC::MrgSort(dst,
                     AscendC::MrgSortSrcList<float>(src, src[distance], queues > 2 ? src[2 * distance] : src,
                                                    queues > 3 ? src[3 * distance] : src),
                     info);
  }

  __aicore__ inline void Renormalize() {
    Reduce<Op::kAdd>(chosen_, t_.topKPitch, t_.topK);
    if (t_.renormalize == GatingRenormalize::kEps) {
      AscendC::Adds(perToken_, perToken_, t_.eps, static_cast<int32_t>(rows_));
    } else {
      AscendC::Maxs(perToken_, perToken_, t_.eps, static_cast<int32_t>(rows_));
    }
    ByToken<Op::kDiv>(chosen_, t_.topKPitch);
  }

  MoeGatingTopkTiling t_;
  AscendC::TPipe* pipe_ = nullptr;
  CoreShare share_{};
  uint32_t rows_ = 0;   // tokens of this tile
  uint32_t slots_ = 0;  // groups that have room in a token's places
  bool grouped_ = false;
  bool padded_ = false;

  AscendC::GlobalTensor<Raw> logits_;
  AscendC::GlobalTensor<uint32_t> bias_;
  AscendC::GlobalTensor<float> weightsOut_;
  AscendC::GlobalTensor<int32_t> idsOut_;

  AscendC::TQue<AscendC::TPosition::VECIN, 1> logitsQueue_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> resultsQueue_;
  LocalBuffer valuesBuffer_, keysBuffer_, addressesBuffer_, sortedBuffer_, mergedBuffer_, numbersBuffer_;
  LocalBuffer chosenBuffer_, chosenAddressBuffer_, tokenAddressBuffer_, correctionBuffer_, floorBuffer_, idOfBuffer_;
  LocalBuffer perTokenBuffer_, tokenBlocksBuffer_, onesBuffer_;
  LocalBuffer groupScoreBuffer_, groupAddressBuffer_, groupOrderBuffer_, verdictBuffer_;

  Floats values_, keys_, sorted_, merged_;  // [tokens, width]; the last two hold pairs
  Words addresses_;                         // of each place of the tile, in bytes
  AscendC::LocalTensor<uint8_t> numbers_;   // a bit per place: not NaN
  Floats chosen_;                           // [tokens, topKPitch]
  Words chosenAddress_, tokenAddress_;
  Floats correction_, floor_;  // [width]
  Words idOf_;                 // [width], addressed in bytes within a token
  Floats perToken_, tokenBlocks_, ones_;
  Floats groupScore_, groupOrder_, verdict_;  // [tokens, 32]
  Words groupAddress_;
};

// What a launch runs on each core.
template <typename T>
__aicore__ inline void MoeGatingTopkBody(GM_ADDR logits, GM_ADDR bias, GM_ADDR weights, GM_ADDR ids,
                                         const MoeGatingTopkTiling& tiling) {
  AscendC::TPipe pipe;
  MoeGatingTopk<T> kernel;
  kernel.Init(logits, bias, weights, ids, tiling, &pipe);
  kernel.Process();
}

}  // namespace moe_fx::ascendc
