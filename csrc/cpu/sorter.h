// Puts the scores of a row in order: the steps of the sort. The work itself is in sort_kernels.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "rows.h"

namespace roadmap {

// Sorts entries that were collected in parts, each on its own span of one buffer.
template <typename T>
class Sorter {
 public:
  struct Part {
    int64_t begin = 0, count = 0;
    T low = std::numeric_limits<T>::infinity(), high = -std::numeric_limits<T>::infinity();
    bool nan = false;
  };

  // Empty, with room for so many entries.
  void begin(int64_t entries, int64_t parts) {
    parts_.assign(parts, {});
    if (from_.size() < static_cast<size_t>(entries + kPad)) from_.resize(entries + kPad);
  }
  // Takes over what was found in spans, {entry, part} each. Returns how many there are.
  template <typename Found>
  int64_t gather(std::vector<Found>& spans, const Parallel& parallel) {
    parts_.clear();
    int64_t n = 0;
    for (Found& found : spans) {
      found.part.begin = n;
      parts_.push_back(found.part);
      n += found.part.count;
    }
    if (spans.size() == 1) {
      from_.swap(spans[0].entry);
    } else {
      if (from_.size() < static_cast<size_t>(n)) from_.resize(n);
      parallel.run(static_cast<int64_t>(spans.size()), [&](int64_t k, int) {
        std::copy_n(spans[k].entry.data(), parts_[k].count, from_.data() + parts_[k].begin);
      });
    }
    return n;
  }
  // Where the entries of a part that begins here go.
  Entry<T>* room(int64_t begin) { return from_.data() + begin; }
  const Entry<T>* room(int64_t begin) const { return from_.data() + begin; }
  Part& part(int64_t index) { return parts_[index]; }
  size_t bytes() const { return (from_.capacity() + to_.capacity()) * sizeof(Entry<T>); }

  bool nan() const {
    return std::any_of(parts_.begin(), parts_.end(), [](const Part& part) { return part.nan; });
  }
  bool finite() const {
    return std::all_of(parts_.begin(), parts_.end(), [](const Part& part) {
      return !part.count || (std::isfinite(part.low) && std::isfinite(part.high));
    });
  }
  int64_t count() const {
    int64_t n = 0;
    for (const Part& part : parts_) n += part.count;
    return n;
  }

  T low() const {
    T low = std::numeric_limits<T>::infinity();
    for (const Part& part : parts_) low = std::min(low, part.low);
    return low;
  }
  T high() const {
    T high = -std::numeric_limits<T>::infinity();
    for (const Part& part : parts_) high = std::max(high, part.high);
    return high;
  }

  // Into `value` and `column` [count()].
  void sort(const Sorting<T>& kernels, const Parallel& parallel, T* value, typename Entry<T>::Index* column) {
    const T low = this->low(), high = this->high();
    const int64_t n = count();
    if (to_.size() < static_cast<size_t>(n)) to_.resize(n);
    if (n <= kSmall) {
      int64_t end = 0;
      for (const Part& part : parts_) {
        std::copy_n(from_.data() + part.begin, part.count, from_.data() + end);  // never to the right
        end += part.count;
      }
      kernels.sort(from_.data(), n, low, high, to_.data(), value, column);
      return;
    }
    const auto buckets = static_cast<int32_t>(std::min(n / kBucket, kMostBuckets));
    scatter({low, high, buckets}, kernels, parallel);
    parallel.run(buckets, [&](int64_t b, int) {
      const int64_t begin = edges_[b], count = edges_[b + 1] - begin;
      const T width = (high - low) / static_cast<T>(buckets), first = low + static_cast<T>(b) * width;
      kernels.sort(to_.data() + begin, count, first, first + width, from_.data() + begin, value + begin,
                   column + begin);
    });
  }

 private:
  // To `to_`, bucket after bucket, those of each in the order of their parts; `edges_` has where the buckets begin.
  void scatter(const Buckets<T>& of, const Sorting<T>& kernels, const Parallel& parallel) {
    const int64_t buckets = of.all;
    const auto tasks = static_cast<int64_t>(parts_.size());
    place_.assign(tasks * buckets, 0);
    parallel.run(tasks, [&](int64_t task, int) {
      const Part& part = parts_[task];
      kernels.count_buckets(from_.data() + part.begin, part.count, of, &place_[task * buckets]);
    });
    edges_.resize(buckets + 1);
    uint32_t at = 0;
    for (int64_t b = 0; b < buckets; ++b) {
      edges_[b] = at;
      for (int64_t task = 0; task < tasks; ++task) {
        const uint32_t count = place_[task * buckets + b];
        place_[task * buckets + b] = at;
        at += count;
      }
    }
    edges_[buckets] = at;
    parallel.run(tasks, [&](int64_t task, int) {
      const Part& part = parts_[task];
      kernels.scatter_buckets(from_.data() + part.begin, part.count, of, &place_[task * buckets], to_.data());
    });
  }

  // So many entries are sorted at once; more are scattered to buckets of about kBucket first, which
  // fit a cache.
  static constexpr int64_t kSmall = 1 << 13, kBucket = 1 << 10, kMostBuckets = 1 << 12;

  std::vector<Part> parts_;
  std::vector<Entry<T>> from_, to_;
  std::vector<uint32_t> place_, edges_;
};

}  // namespace roadmap
