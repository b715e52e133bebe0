// One row by the sorted scan: its steps and their order. The work itself is in sorted_body.h.
//
// The negatives are kept and sorted; ranks of the positives are read off them; once ranks have become weights, the
// gradients of the negatives are read off the positives. The second is the first in a mirror: with both scores negated
// and in reverse order, v - u = (-u) - (-v), so that one kernel does both.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cells.h"
#include "kernels.h"
#include "rows.h"

namespace roadmap {

// Which scores the scan takes: sums of them, times a count, must be finite in float64.
template <typename T>
constexpr double kLargestSorted = sizeof(T) == 4 ? 3.5e38 : 1e150;

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
  size_t capacity() const { return from_.capacity(); }

  bool nan() const {
    return std::any_of(parts_.begin(), parts_.end(), [](const Part& part) { return part.nan; });
  }
  // Whether the scan can take them all; false for infinities.
  bool finite() const {
    return std::all_of(parts_.begin(), parts_.end(), [](const Part& part) {
      return !part.count || (std::fabs(part.low) <= kLargestSorted<T> && std::fabs(part.high) <= kLargestSorted<T>);
    });
  }
  int64_t count() const {
    int64_t n = 0;
    for (const Part& part : parts_) n += part.count;
    return n;
  }

  // Where those of each bucket of a grid begin.
  const std::vector<uint32_t>& count(const Grid& grid, const Sorting<T>& kernels, const Parallel& parallel) {
    count_buckets(grid.buckets, grid.units() >> Grid::kLevels, kernels, parallel);
    return edges_;
  }
  // Takes over the room that another has done with: it is in a cache.
  void borrow(Sorter& other) { to_.swap(other.to_); }
  // Deals them to cells, once they are counted and the buckets are cut.
  void deal(const Grid& grid, const Sorting<T>& kernels, const Parallel& parallel, Cells& cells) {
    const int64_t n = count(), buckets = grid.units() >> Grid::kLevels;
    deal_buckets(grid.buckets, buckets, kernels, parallel);
    cells.n = n;
    cells.value.resize(n + kPad);
    cells.column.resize(n);
    cells.first.resize(grid.cells() + 1);
    cells.first[grid.cells()] = static_cast<uint32_t>(n);
    parallel.run((buckets + kTogether - 1) / kTogether, [&](int64_t task, int) {
      kernels.cells->split(to_.data(), edges_.data(), task * kTogether, std::min(buckets, (task + 1) * kTogether), grid,
                           cells.value.data(), cells.column.data(), cells.first.data());
    });
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
    count_buckets({low, high, buckets}, buckets, kernels, parallel);
    deal_buckets({low, high, buckets}, buckets, kernels, parallel);
    parallel.run(buckets, [&](int64_t b, int) {
      const int64_t begin = edges_[b], count = edges_[b + 1] - begin;
      const T width = (high - low) / static_cast<T>(buckets), first = low + static_cast<T>(b) * width;
      kernels.sort(to_.data() + begin, count, first, first + width, from_.data() + begin, value + begin,
                   column + begin);
    });
  }

 private:
  // Finds where the entries of each bucket begin, and those of each part in it.
  void count_buckets(const Buckets<T>& of, int64_t buckets, const Sorting<T>& kernels, const Parallel& parallel) {
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
  }
  // And puts them there.
  void deal_buckets(const Buckets<T>& of, int64_t buckets, const Sorting<T>& kernels, const Parallel& parallel) {
    if (to_.size() < static_cast<size_t>(edges_[buckets])) to_.resize(edges_[buckets]);
    parallel.run(static_cast<int64_t>(parts_.size()), [&](int64_t task, int) {
      const Part& part = parts_[task];
      kernels.scatter_buckets(from_.data() + part.begin, part.count, of, &place_[task * buckets], to_.data());
    });
  }

  // So many entries are sorted at once; more are dealt to buckets of about kBucket first, which fit a cache.
  static constexpr int64_t kTogether = 16, kSmall = 1 << 13, kBucket = 1 << 11, kMostBuckets = 1 << 12;

  std::vector<Part> parts_;
  std::vector<Entry<T>> from_, to_;
  std::vector<uint32_t> place_, edges_;
};

template <typename T>
class SortedRow {
 public:
  // Sources in a leaf: few where many targets read them, for they are met pair by pair.
  static int leaf_for(int64_t sources, int64_t targets) {
    return targets * 4 < sources ? 32 : targets < 4 * sources ? 16 : 8;
  }
  // Leaves and targets of one task.
  static constexpr int64_t kLeaves = 64, kPiece = 2048;

  // The negatives, which the caller collects: by column, a part a span, so that several threads may.
  Sorter<T>& negatives() { return sorter_; }
  const Sorter<T>& negatives() const { return sorter_; }

  int64_t size() const { return n_; }

  // Deals what was collected, and the positives, to cells, if these are worth it: whether they are. The positives then
  // are in the order of their cells: ascending where ranks are smooth, else in any order within a cell. `column` [P]
  // becomes theirs; positive_scores() has the rest.
  bool deal(Sorter<T>& positives, const Settings<T>& s, const Sorting<T>& kernels, const Parallel& parallel,
            std::vector<typename Entry<T>::Index>& column) {
    n_ = sorter_.count();
    by_cells_ = false;
    if constexpr (sizeof(T) == 4) {
      Grid& grid = cells_.grid();
      by_cells_ =
          CellPlan::lay(grid, n_ + positives.count(), std::min(sorter_.low(), positives.low()),
                        std::max(sorter_.high(), positives.high()), s) &&
          CellPlan::cut(grid, sorter_.count(grid, kernels, parallel), positives.count(grid, kernels, parallel), s);
      if (!by_cells_) return false;
      sorter_.deal(grid, kernels, parallel, cells_.negatives());
      positives.borrow(sorter_);
      positives.deal(grid, kernels, parallel, cells_.positives());
      if (s.surrogate == Surrogate::kSmooth) cells_.order_positives(parallel);
      column.swap(cells_.positives().column);
    }
    return by_cells_;
  }
  bool by_cells() const { return by_cells_; }
  void positive_scores(std::vector<T>& score) {
    std::copy_n(cells_.positives().value.begin(), score.size(), score.begin());
  }

  // Sorts what was collected, where cells are not worth it.
  void sort(int64_t positives, const Sorting<T>& kernels, const Parallel& parallel) {
    negatives_.weight.clear();
    negatives_.resize(n_, leaf_for(n_, positives));
    column_.resize(n_);
    sorter_.sort(kernels, parallel, negatives_.value.data(), column_.data());
  }

  // ---- reading ----

  // Ranks of the positives among the negatives, and their slopes if `slope` is not null; where they are in cells, but
  // for smooth ranks, those among themselves as well.
  void rank(const std::vector<T>& positive, const Settings<T>& s, const Sorting<T>& kernels, const Parallel& parallel,
            Scratch<T>& (*scratch)(), double* rank, double* slope, double* rank_positive) {
    if constexpr (sizeof(T) == 4) {
      if (by_cells_) return cells_.rank(s, *kernels.cells, parallel, scratch, rank, slope, rank_positive);
    }
    read(negatives_, positive, s, kernels, parallel, scratch, rank, slope);
  }

  // Smooth: ranks of the positives among themselves, from 1.
  void rank_positives(const std::vector<T>& positive, const Settings<T>& s, const Sorting<T>& kernels,
                      const Parallel& parallel, Scratch<T>& (*scratch)(), double* rank) {
    mirrored_.weight.clear();
    mirrored_.resize(static_cast<int64_t>(positive.size()), leaf_for(1, 1));
    std::copy(positive.begin(), positive.end(), mirrored_.value.begin());
    read(mirrored_, positive, s, kernels, parallel, scratch, rank, nullptr);
    for (size_t i = 0; i < positive.size(); ++i) rank[i] += 0.5;  // less sigma(0) of itself, plus 1
  }

  // What each negative gets, by column: scale times its slope, weight [P + kPad] being that of the positives' ranks; 0
  // for columns that were not collected, and nothing for positives where these are all others. It goes to `out`
  // [columns], or is kept for gradient() where that is null.
  void gradient(const std::vector<T>& positive, std::vector<T>& weight, int64_t columns, double scale, T* out,
                const Settings<T>& s, const Sorting<T>& kernels, const Parallel& parallel, Scratch<T>& (*scratch)()) {
    const int64_t n = size();
    direct_ = out != nullptr;
    if (!direct_) gradient_.resize(columns);
    T* const by_column = direct_ ? out : gradient_.data();
    const bool all = n + static_cast<int64_t>(positive.size()) == columns;
    parallel.run(all ? 0 : (columns + kSpread - 1) / kSpread, [&](int64_t task, int) {
      const int64_t begin = task * kSpread;
      std::fill(by_column + begin, by_column + std::min(columns, begin + kSpread), T(0));
    });
    if constexpr (sizeof(T) == 4) {
      if (by_cells_) return cells_.gradient(weight, scale, s, *kernels.cells, parallel, scratch, by_column);
    }
    mirror(positive, weight, s, kernels, parallel);
    parallel.run((n + kPiece - 1) / kPiece, [&](int64_t task, int) {
      const int64_t begin = task * kPiece, count = std::min(n - begin, kPiece);
      T target[kPiece];
      double slope[kPiece];
      for (int64_t j = 0; j < count; ++j) target[j] = -negatives_.value[n - 1 - begin - j];
      kernels.slope_targets(mirrored_, target, 0, count, s, scratch(), slope);
      for (int64_t j = 0; j < count; ++j) by_column[column_[n - 1 - begin - j]] = static_cast<T>(slope[j] * scale);
    });
  }
  // [columns]; null: it is where it belongs
  const T* gradient() const { return direct_ ? nullptr : gradient_.data(); }

  // Smooth: out[j] = sum_i (w_i - w_j) tau H'(s_j - s_i) of positives among themselves, times scale.
  void gradient_positives(const std::vector<T>& positive, const std::vector<T>& weight, double scale,
                          const Settings<T>& s, const Sorting<T>& kernels, const Parallel& parallel,
                          Scratch<T>& (*scratch)(), double* out) {
    const auto size = static_cast<int64_t>(positive.size());
    std::vector<double> all(size), weighted(size);
    const auto slopes = [&](const std::vector<T>& weights, std::vector<double>& slope) {
      mirror(positive, weights, s, kernels, parallel);
      parallel.run((size + kPiece - 1) / kPiece, [&](int64_t task, int) {
        const int64_t begin = task * kPiece;
        kernels.slope_targets(mirrored_, mirrored_.value.data(), begin, std::min(size, begin + kPiece), s, scratch(),
                              slope.data());
      });
    };
    slopes(std::vector<T>(size, T(1)), all);
    slopes(weight, weighted);
    for (int64_t i = 0; i < size; ++i) {
      out[i] = (weighted[size - 1 - i] - static_cast<double>(weight[i]) * all[size - 1 - i]) * scale;
    }
  }

 private:
  static constexpr int64_t kSpread = 1 << 16;

  void sum(Sources<T>& sources, const Settings<T>& s, const Sorting<T>& kernels, const Parallel& parallel) {
    const int64_t leaves = sources.leaves();
    parallel.run((leaves + kLeaves - 1) / kLeaves, [&](int64_t task, int) {
      kernels.sum_leaves(sources, task * kLeaves, std::min(leaves, (task + 1) * kLeaves), s);
    });
    parallel.run(2, [&](int64_t task, int) { task ? kernels.join_above(sources, s) : kernels.join_below(sources, s); });
  }

  void read(Sources<T>& sources, const std::vector<T>& target, const Settings<T>& s, const Sorting<T>& kernels,
            const Parallel& parallel, Scratch<T>& (*scratch)(), double* rank, double* slope) {
    const auto size = static_cast<int64_t>(target.size());
    if (!sources.n) {
      std::fill_n(rank, size, 0.0);
      if (slope) std::fill_n(slope, size, 0.0);
      return;
    }
    sum(sources, s, kernels, parallel);
    parallel.run((size + kPiece - 1) / kPiece, [&](int64_t task, int) {
      const int64_t begin = task * kPiece;
      kernels.rank_targets(sources, target.data(), begin, std::min(size, begin + kPiece), s, scratch(), rank, slope);
    });
  }

  void mirror(const std::vector<T>& positive, const std::vector<T>& weight, const Settings<T>& s,
              const Sorting<T>& kernels, const Parallel& parallel) {
    const auto size = static_cast<int64_t>(positive.size());
    mirrored_.weight.resize(size + kPad);
    mirrored_.resize(size, leaf_for(size, this->size()));
    for (int64_t i = 0; i < size; ++i) {
      mirrored_.value[size - 1 - i] = -positive[i];
      mirrored_.weight[size - 1 - i] = weight[i];
    }
    sum(mirrored_, s, kernels, parallel);
  }

  Sorter<T> sorter_;
  int64_t n_ = 0;
  bool by_cells_ = false;
  CellRow cells_;
  std::vector<typename Entry<T>::Index> column_;  // [n]  of each sorted negative
  Sources<T> negatives_, mirrored_;
  std::vector<T> gradient_;  // [columns]
  bool direct_ = false;
};

}  // namespace roadmap
