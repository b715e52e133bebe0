// The boxes of the sorted scan, and the sums that stand for the scores in them: see scan.h for what they are good for.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../series.h"

namespace roadmap {

// Elements past the end that a vector may touch.
constexpr int kPad = 16;

// Scores in ascending order.
struct Points {
  int64_t n = 0;
  std::vector<float> value;     // [n + kPad]  infinity from n on
  std::vector<uint32_t> first;  // [boxes + 1]  the first in each box

  void resize(int64_t size) {
    n = size;
    value.resize(n + kPad);
    std::fill(value.begin() + n, value.end(), std::numeric_limits<float>::infinity());
  }
  // The first past `at` that is above `highest`.
  int64_t end_of(int64_t at, float highest) const {
    while (at + kPad <= n && value[at + kPad - 1] <= highest) at += kPad;
    while (at < n && value[at] <= highest) ++at;
    return at;
  }
};

// Intervals no wider than kWidth tau that hold all scores of a row, positives and negatives. Only what lies in them
// is stored: a box begins at the lowest score above the one before, however far off that is.
struct Boxes {
  // In units of tau. Polynomials of kTerms terms then are as exact as the series.
  static constexpr double kWidth = 0.3;
  static constexpr int kTerms = 8;

  std::vector<double> centre;  // [boxes]
  std::vector<double> decay;   // [boxes]  e^(-d / tau) over the distance d from the centre before

  int64_t size() const { return static_cast<int64_t>(centre.size()); }
  size_t bytes() const { return 8 * (centre.capacity() + decay.capacity()); }

  // Lays them over two lists. `decay` is left to ScanKernels::decays.
  void lay(Points& a, Points& b, double tau) {
    const double width = kWidth * tau;
    centre.clear();
    a.first.clear();
    b.first.clear();
    for (int64_t i = 0, j = 0; i < a.n || j < b.n;) {
      a.first.push_back(static_cast<uint32_t>(i));
      b.first.push_back(static_cast<uint32_t>(j));
      const float low = std::min(a.value[i], b.value[j]);
      const double most = static_cast<double>(low) + width;
      float limit = static_cast<float>(std::min(most, static_cast<double>(std::numeric_limits<float>::max())));
      if (static_cast<double>(limit) > most) limit = std::nextafter(limit, low);
      i = a.end_of(i, limit);
      j = b.end_of(j, limit);
      float high = low;
      if (i > a.first.back()) high = std::max(high, a.value[i - 1]);
      if (j > b.first.back()) high = std::max(high, b.value[j - 1]);
      centre.push_back((static_cast<double>(low) + static_cast<double>(high)) / 2);
    }
    a.first.push_back(static_cast<uint32_t>(a.n));
    b.first.push_back(static_cast<uint32_t>(b.n));
    decay.resize(centre.size());
  }
};

// What targets read in place of the scores of one list, its sources v, each with a weight w (or 1). With
// y = (v - centre) / tau in the box of v and k = 1 ... kDegree,
//
//     moment[b][m]   = sum over box b of w y^m
//     running[c][m]  = the same of what stands before source c kChunk in the box of that source
//     upto[b][k - 1] = sum over all boxes <= b of w e^(-k (centre[b] - v) / tau)
//     from[b][k - 1] = sum over all boxes >= b of w e^(-k (v - centre[b]) / tau)
//
// and for what lies past the threshold
//
//     beyond[b] = sum over all boxes >= b of v - centre[b]      without weights
//     passed[j] = sum over all sources before j of w            with weights
struct Sources {
  static constexpr int kTerms = Boxes::kTerms, kDegree = Series::kDegree, kStride = (kDegree + 7) / 8 * 8;

  // Sources of a chunk that a threshold cuts are met one by one.
  static constexpr int kChunk = 8;

  const Points* points = nullptr;
  const float* weight = nullptr;   // [n + kPad]  null: 1
  std::vector<double> moment;      // [boxes, kTerms]
  std::vector<double> running;     // [n / kChunk + 1, kTerms]
  std::vector<double> upto, from;  // [boxes, kStride]
  std::vector<double> beyond;      // [boxes]
  std::vector<double> passed;      // [n + 1]

  // Takes other sources; ScanKernels compute the sums.
  void begin(const Points& of, const float* with, int64_t boxes) {
    points = &of;
    weight = with;
    at_least(moment, boxes * kTerms);
    at_least(running, (of.n / kChunk + 1) * kTerms);
    at_least(upto, boxes * kStride);
    at_least(from, boxes * kStride);
    at_least(beyond, weight ? 0 : boxes);
    at_least(passed, weight ? of.n + 1 : 0);
  }
  size_t bytes() const {
    return 8 * (moment.capacity() + running.capacity() + upto.capacity() + from.capacity() + beyond.capacity() +
                passed.capacity());
  }

 private:
  static void at_least(std::vector<double>& values, size_t size) {
    if (values.size() < size) values.resize(size);
  }
};

}  // namespace roadmap
