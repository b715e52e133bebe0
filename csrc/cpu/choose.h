// Pairwise or by the scan, on the CPU: the rule by which method="auto" takes the faster for a row.
#pragma once

#include <algorithm>
#include <cstdint>

#include "boxes.h"
#include "row_input.h"

namespace roadmap {

// Whether a column is among the positives, sorted by column.
template <typename T>
bool is_positive(const Sorter<T>& positives, int64_t size, int64_t column) {
  const Entry<T>*const begin = positives.room(0), *const end = begin + size;
  const auto index = static_cast<typename Entry<T>::Index>(column);
  const Entry<T>* const at =
      std::lower_bound(begin, end, index, [](const Entry<T>& e, auto of) { return e.index < of; });
  return at != end && at->index == index;
}

// The scan's nanoseconds against those of the pairwise kernels, as measured for each negative in reach, each positive,
// each pair of both and each pair up to the threshold, which takes an exponential (benchmarks/sorted_scan.py shows how
// well that chooses). A few columns say how many pairs there are.
template <typename T>
bool scan_pays(const RowInput<T>& input,    //
               int64_t row,                 //
               const Sorter<T>& positives,  // finite, by column
               int64_t size,                // how many
               const Settings<T>& settings) {
  constexpr int64_t kFewest = 32;  // below, pairwise is as fast whatever the scores
  constexpr int64_t kSeen = 128;   // positives; more are alike
  if (size < kFewest) return false;
  const bool smooth = settings.surrogate == Surrogate::kSmooth;
  const T low = positives.low(), high = positives.high();
  T u[kSeen];
  const int64_t seen = std::min(size, kSeen);
  for (int64_t k = 0; k < seen; ++k) u[k] = positives.room(0)[(2 * k + 1) * size / (2 * seen)].value;
  const int64_t columns = input.columns(), samples = std::min<int64_t>(64, std::max<int64_t>(8, columns / 64));
  const T above = smooth ? settings.cut : settings.delta;
  int64_t kept = 0, curve = 0;
  T top = high;  // of what is seen
  for (int64_t k = 0; k < samples; ++k) {
    const int64_t column = (2 * k + 1) * columns / (2 * samples);
    const T v = input.score(row, column);
    if (!(v - low >= -settings.cut) || is_positive(positives, size, column)) continue;
    ++kept;
    top = std::max(top, v);
    const T from = v - above, to = v + settings.cut;
    int within = 0;
    for (int64_t i = 0; i < seen; ++i) within += (u[i] >= from) & (u[i] <= to);
    curve += within;
  }
  const double of_all = static_cast<double>(columns) / static_cast<double>(samples);
  const double all = static_cast<double>(size), of_seen = all / static_cast<double>(seen);
  const double negatives = (static_cast<double>(kept) + 0.5) * of_all;  // none seen: there may be some
  const double range = static_cast<double>(top) - static_cast<double>(low);
  const double boxes = std::min(range / (Boxes::kWidth * settings.tau), negatives + all);
  double scan = 2500 + 110 * boxes + 9 * negatives + 20 * all;
  double pairwise = 0.3 * static_cast<double>(curve) * of_seen * of_all + 0.12 * negatives * all;
  if (smooth) {  // which compares positives with positives, too
    scan += 220 * boxes + 20 * all;
    pairwise += 0.3 * all * all;
  }
  return scan < pairwise;
}

}  // namespace roadmap
