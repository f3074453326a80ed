// Routing in double, as lowering/ops/route.py defines it with equal choices going to the lowest id, for the tests of
// moe_gating_topk.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "tiling/moe_gating_topk.h"

namespace moe_fx::ascendc::test {

struct Routed {
  std::vector<int32_t> ids;     // in falling order of choice
  std::vector<double> weights;  // of these
  double margin;  // between what was chosen and what was not, experts and groups, relative to the larger of 1 and them
};

inline double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }

inline void score(GatingScore kind, std::vector<double>& x) {
  if (kind == GatingScore::kSoftmax) {
    double most = -std::numeric_limits<double>::infinity();
    for (double value : x)
      most = std::isnan(value) ? value : std::max(most, value);
    double sum = 0;
    for (double& value : x)
      sum += value = std::exp(value - most);
    for (double& value : x)
      value /= sum;
    return;
  }
  for (double& value : x) {
    value = kind == GatingScore::kSigmoid ? 1 / (1 + std::exp(-value)) : std::sqrt(softplus(value));
  }
}

// Indices of the best `count`, the best first; NaN counts as infinity. `margin` shrinks to how clear the choice is.
inline std::vector<int32_t> best(std::vector<double> keys, std::size_t count, double& margin) {
  for (double& key : keys) {
    if (std::isnan(key)) key = std::numeric_limits<double>::infinity();
  }
  std::vector<int32_t> order(keys.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return keys[a] > keys[b]; });
  if (count < keys.size()) {
    const double in = keys[order[count - 1]], out = keys[order[count]];
    if (in != out) margin = std::min(margin, (in - out) / std::max({1.0, std::abs(in), std::abs(out)}));
  }
  order.resize(count);
  return order;
}

inline Routed route(const MoeGatingTopkProblem& p, std::vector<double> values, const std::vector<float>& bias) {
  Routed result{{}, {}, std::numeric_limits<double>::infinity()};
  const auto experts = static_cast<std::size_t>(p.experts);
  // Without a bias, scores rank as logits do, but for those that rounding makes equal.
  std::vector<double> choice = values;
  if (!p.scoreAfter) score(p.score, values);
  if (!p.scoreAfter && (p.hasBias || (p.nGroup > 1 && p.groupByTop2))) choice = values;
  for (std::size_t e = 0; p.hasBias && e < experts; ++e)
    choice[e] += bias[e];
  if (p.nGroup > 1) {
    const std::size_t size = experts / p.nGroup;
    std::vector<double> groups;
    for (std::size_t first = 0; first < experts; first += size) {
      std::vector<double> members(choice.begin() + first, choice.begin() + first + size);
      for (double& member : members) {
        if (std::isnan(member)) member = std::numeric_limits<double>::infinity();
      }
      std::sort(members.rbegin(), members.rend());
      groups.push_back(p.groupByTop2 ? members[0] + members[1] : members[0]);
    }
    std::vector<bool> kept(groups.size());
    for (int32_t group : best(groups, p.topkGroup, result.margin))
      kept[group] = true;
    for (std::size_t e = 0; e < experts; ++e) {
      if (!kept[e / size]) choice[e] = -std::numeric_limits<double>::infinity();
    }
  }
  result.ids = best(choice, p.topK, result.margin);
  for (int32_t id : result.ids)
    result.weights.push_back(values[id]);
  if (p.scoreAfter) score(p.score, result.weights);
  if (p.renormalize != GatingRenormalize::kNone) {
    double sum = std::accumulate(result.weights.begin(), result.weights.end(), 0.0);
    sum = p.renormalize == GatingRenormalize::kEps ? sum + p.eps : std::max<double>(sum, p.eps);
    for (double& weight : result.weights)
      weight /= sum;
  }
  for (double& weight : result.weights)
    weight *= p.scale;
  return result;
}

}  // namespace moe_fx::ascendc::test
