// From the ranks of a row's positives to its loss, and to what each rank weighs in it: a function a loss.
//
// roadmap_ext/reference.py has the formulas. All but AP, whose kernel is vectorised, see rank- and rank+ by their sum.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "rows.h"

namespace roadmap {

// The positives of a row, ascending in score, or some of them.
struct Ranked {
  const double* positive;  // [size]  rank+
  const double* negative;  // [size]  rank-
  int64_t size;
  int64_t row_size;                      // positives of the whole row
  int64_t highest;                       // how many have the highest score
  const double* worth = nullptr;         // [size]  NDCG: gains; null: 1 each
  const double* hierarchical = nullptr;  // [size]  H-AP: ranks among what they share relevance with
  double all = 1;                        // NDCG: the ideal DCG of the row; H-AP: what its positives are worth
};

// dloss/drank- and, of the smooth surrogate, dloss/drank+.
struct Weights {
  double* negative;  // [size]
  double* positive;  // [size]  null: not wanted
  double largest = 0;

  void set(int64_t i, double by_negative, double by_positive) {
    negative[i] = by_negative;
    if (positive) positive[i] = by_positive;
    largest = std::max(largest, std::fabs(by_negative));
  }
};

// Sum of 1 / log2(1 + rank) over the first n ranks.
inline double discounts(int64_t n) {
  static thread_local std::vector<double> sums(1, 0.0);
  while (static_cast<int64_t>(sums.size()) <= n) {
    sums.push_back(sums.back() + 1 / std::log2(static_cast<double>(sums.size()) + 1));
  }
  return sums[n];
}

// Each returns how much of the loss's 1 the positives have gained.

inline double recall_weights(const Ranking& ranking, const Ranked& q, Weights& weights) {
  constexpr double kNothing = -745;  // the sigmoid of less is 0
  double gained = 0;
  for (int64_t i = 0; i < q.size; ++i) {
    const double rank = q.positive[i] + q.negative[i];
    double found = 0, slope = 0;
    for (const double k : ranking.k) {
      const double x = (k - rank) / ranking.temperature;
      if (!(x > kNothing)) continue;
      const double hit = 1 / (1 + std::exp(-x)), share = 1 / std::min(k, static_cast<double>(q.row_size));
      found += hit * share;
      slope += hit * (1 - hit) * share;
    }
    const double of_all = 1 / static_cast<double>(ranking.k.size());
    gained += found * of_all;
    weights.set(i, slope * of_all / ranking.temperature, slope * of_all / ranking.temperature);
  }
  return gained;
}

inline double ndcg_weights(const Ranked& q, Weights& weights) {
  constexpr double kLn2 = 0.6931471805599453;
  double gained = 0;
  for (int64_t i = 0; i < q.size; ++i) {
    const double after = 1 + q.positive[i] + q.negative[i], digits = std::log2(after);
    const double share = (q.worth ? q.worth[i] : 1.0) / q.all / digits;
    gained += share;
    const double slope = share / digits / (after * kLn2);
    weights.set(i, slope, slope);
  }
  return gained;
}

// The positives of the highest score have the same rank: each has its part of the weight.
inline double mrr_weights(const Ranked& q, Weights& weights) {
  const int64_t first = q.size - q.highest;
  double before = 0;
  for (int64_t i = first; i < q.size; ++i) before += q.negative[i] / static_cast<double>(q.highest);
  const double gained = 1 / (1 + before);
  for (int64_t i = 0; i < q.size; ++i) {
    weights.set(i, i < first ? 0.0 : gained * gained / static_cast<double>(q.highest), 0.0);
  }
  return gained;
}

inline double hap_weights(const Ranked& q, Weights& weights) {
  double gained = 0;
  for (int64_t i = 0; i < q.size; ++i) {
    const double rank = q.positive[i] + q.negative[i], share = q.hierarchical[i] / rank / q.all;
    gained += share;
    weights.set(i, share / rank, share / rank);
  }
  return gained;
}

}  // namespace roadmap
