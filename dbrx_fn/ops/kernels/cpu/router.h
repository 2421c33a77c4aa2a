// The choice of a token's experts: softmax over all, the largest `top_k`, divided by their p-norm.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace dbrx {

// `top` gets the experts `[top_k]`, ascending, and `weights` theirs. `order` is the norm's p; 0 means no division.
inline void choose(
    const float* logits, int64_t experts, int64_t top_k, float order, uint32_t* top, float* weights, float* room) {
  float most = logits[0];
  for (int64_t e = 1; e < experts; ++e) most = std::max(most, logits[e]);
  float total = 0;
  for (int64_t e = 0; e < experts; ++e) total += room[e] = std::exp(logits[e] - most);
  // With equal logits the first expert is taken. Those of NaN come in some order, too.
  int64_t chosen = 0;
  for (int64_t e = 0; e < experts && chosen < top_k; ++e) {
    int64_t before = 0;
    for (int64_t other = 0; other < experts; ++other) {
      before += logits[other] > logits[e] || (!(logits[other] < logits[e]) && other < e);
    }
    if (before < top_k || experts - e == top_k - chosen) top[chosen++] = uint32_t(e);
  }
  float norm = 0;
  for (int64_t k = 0; k < top_k; ++k) {
    weights[k] = room[top[k]] / total;
    norm += order == 1 ? weights[k] : std::pow(weights[k], order);
  }
  if (order == 0) return;
  if (order != 1) norm = std::pow(norm, 1 / order);
  for (int64_t k = 0; k < top_k; ++k) weights[k] /= norm;
}

// The pairs (token, choice) of each expert that is chosen at all, experts ascending.
struct Chosen {
  std::vector<int64_t> experts;
  // Where each expert's pairs begin, and where the last one's end.
  std::vector<int64_t> starts;
  std::vector<int64_t> pairs;

  void sort(const uint32_t* top, int64_t count, int64_t all) {
    experts.clear();
    starts.clear();
    pairs.clear();
    for (int64_t e = 0; e < all; ++e) {
      const auto before = int64_t(pairs.size());
      for (int64_t n = 0; n < count; ++n) {
        if (top[n] == e) pairs.push_back(n);
      }
      if (int64_t(pairs.size()) == before) continue;
      experts.push_back(e);
      starts.push_back(before);
    }
    starts.push_back(int64_t(pairs.size()));
  }
};

}  // namespace dbrx
