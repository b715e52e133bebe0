// One row by cells: the sorted scan where scores spread over their range. Its steps and their order; the work
// itself is in cells_body.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "rows.h"

namespace roadmap {

// What cells are worth having, and how they are laid.
struct CellPlan {
  // In units of tau: over this width the polynomials and moments are as exact as the series
  // (tests/test_sorted_scan.py).
  static constexpr double kWidth = 0.3;
  // Scores of a bucket on average: at the least, for a cell costs as much as several; and where buckets may be narrower
  // than they have to be.
  static constexpr int64_t kFewest = 8, kUsual = 128;
  // A cell costs as much as so many pairs around steps and knees, of which there are the fewer the narrower cells are.
  // What crowds even in the narrowest is too much where scores would meet more than kMostPairs each.
  static constexpr double kPairs = 2000, kMostPairs = 256;
  static constexpr int64_t kFewestScores = 256;

  // Whether so many scores over so wide a range are worth cells.
  static bool suit(double scores, double range, double tau) {
    return scores >= kFewestScores && range / (kWidth * tau) * kFewest <= scores;
  }

  // The buckets for so many scores, positives and negatives, between low and high. Returns whether there are any.
  static bool lay(Grid& grid, int64_t scores, float low, float high, const Settings<float>& s) {
    const double bottom = low, range = static_cast<double>(high) - bottom;
    const double size = std::max(std::fabs(bottom), std::fabs(static_cast<double>(high)));
    if (!(range > 0)) return false;
    if (!suit(static_cast<double>(scores), range, s.tau)) return false;
    const auto needed = static_cast<int64_t>(std::ceil(range / (kWidth * s.tau)));
    const int64_t units = std::max(needed, std::min(scores / kUsual, kMostBuckets)) * Grid::kUnits;
    // Of the difference of two scores, of its comparison with the knee, and of the number of a unit.
    const double guard = size * 0x1p-20, unit = range / static_cast<double>(units);
    const float scale = static_cast<float>(units) / (high - low);
    if (!(guard * 4 < unit * Grid::kUnits) || !(scale > 0 && scale < std::numeric_limits<float>::infinity()) ||
        needed > kMostBuckets)
      return false;
    grid.buckets = {low, high, static_cast<int32_t>(units), Grid::kLevels};
    grid.unit = unit;
    grid.guard = guard;
    return true;
  }
  // Their numbers have 16 bits, and those of their units fit a float.
  static constexpr int64_t kMostBuckets = 1 << 16;

  // Cuts the buckets into cells, given where the negatives of each begin, and the positives. Returns whether they are
  // few enough in each.
  static bool cut(Grid& grid, const std::vector<uint32_t>& negative, const std::vector<uint32_t>& positive,
                  const Settings<float>& s) {
    const int64_t buckets = grid.units() >> Grid::kLevels;
    // From a bucket to those of its knees.
    const double far = static_cast<double>(s.delta) / (grid.unit * Grid::kUnits);
    const int64_t knee = static_cast<int64_t>(std::min(far, static_cast<double>(buckets)));
    const bool smooth = s.surrogate == Surrogate::kSmooth;
    const auto in = [&](const std::vector<uint32_t>& first, int64_t bucket) {
      return bucket < 0 || bucket >= buckets ? 0.0 : static_cast<double>(first[bucket + 1] - first[bucket]);
    };
    const auto around = [&](const std::vector<uint32_t>& first, int64_t bucket) {
      return std::max({in(first, bucket - 1), in(first, bucket), in(first, bucket + 1)});
    };
    grid.level.resize(buckets);
    grid.first_cell.resize(buckets + 1);
    grid.edge.clear();
    double all = 0;
    for (int64_t b = 0; b < buckets; ++b) {
      const double n = in(negative, b), p = in(positive, b);
      double pairs = 0;  // steps, knees of the positives here, knees of others
      if (!smooth && n > 0) pairs += n * (p + around(positive, b - knee));
      if (!smooth && p > 0) pairs += p * around(negative, b + knee);
      int level = 0;
      while (level < Grid::kLevels && pairs > std::ldexp(kPairs, 2 * level)) ++level;
      all += std::ldexp(pairs, -level);
      grid.level[b] = static_cast<uint8_t>(level);
      grid.first_cell[b] = static_cast<uint32_t>(grid.edge.size());
      for (int cell = 0; cell < 1 << level; ++cell) {
        grid.edge.push_back(static_cast<int32_t>(b * Grid::kUnits + cell * (Grid::kUnits >> level)));
      }
    }
    grid.first_cell[buckets] = static_cast<uint32_t>(grid.edge.size());
    grid.edge.push_back(static_cast<int32_t>(grid.units()));
    return all <= kMostPairs * static_cast<double>(negative[buckets] + positive[buckets]);
  }
};

inline CellSeries::CellSeries(const Grid& grid, const Settings<float>& s) {
  const double units = static_cast<double>(s.delta) / grid.unit, guard = grid.guard / grid.unit;
  constexpr double kFar = 1 << 30;
  knee = static_cast<int64_t>(std::floor(std::min(units - guard, kFar)));
  knee_last = static_cast<int64_t>(std::floor(std::min(units + guard, kFar))) + 1;
  for (int level = 0; level <= Grid::kLevels; ++level) {
    const double width = grid.unit / s.tau * (Grid::kUnits >> level), q = std::exp(-width / 2);
    double power = 1;
    for (int k = 0; k < kStride; ++k) {
      power *= q;
      half[level][k] = power;
      whole[level][k] = power * power;
    }
  }
}

class CellRow {
 public:
  // The negatives of a row, once they are dealt: see Sorter::deal().
  Grid& grid() { return grid_; }
  Cells& negatives() { return negatives_; }
  std::vector<uint32_t>& column() { return column_; }

  // Takes the ascending positives, once buckets are laid. Returns where those of each bucket begin.
  const std::vector<uint32_t>& begin(const std::vector<float>& positive, const CellKernels& kernels) {
    const auto size = static_cast<int64_t>(positive.size());
    positives_.n = size;
    positives_.value.resize(size + kPad);
    std::copy(positive.begin(), positive.end(), positives_.value.begin());
    unit_.resize(size);
    kernels.place(positive.data(), size, grid_, unit_.data());
    first_.assign((grid_.units() >> Grid::kLevels) + 1, 0);
    find_ends([](int32_t unit) { return unit >> Grid::kLevels; }, first_);
    return first_;
  }
  // And again, once buckets are cut.
  void place() {
    positives_.first.assign(grid_.cells() + 1, 0);
    find_ends([&](int32_t unit) { return grid_.cell_of(unit); }, positives_.first);
  }

  void rank(const Settings<float>& s, const CellKernels& kernels, const Parallel& parallel,
            Scratch<float>& (*scratch)(), double* rank, double* slope) {
    const CellSeries series(grid_, s);
    negatives_.weight.clear();
    sum(negatives_, series, s, kernels, parallel);
    for_cells(parallel, [&](int64_t begin, int64_t end) {
      kernels.rank(negatives_, positives_, grid_, series, begin, end, s, scratch(), rank, slope);
    });
  }

  // out[column] = scale times the slope of each negative.
  void gradient(const std::vector<float>& weight, double scale, const Settings<float>& s, const CellKernels& kernels,
                const Parallel& parallel, Scratch<float>& (*scratch)(), float* out) {
    const CellSeries series(grid_, s);
    positives_.weight.resize(positives_.n + kPad);
    std::copy(weight.begin(), weight.end(), positives_.weight.begin());
    sum(positives_, series, s, kernels, parallel);
    for_cells(parallel, [&](int64_t begin, int64_t end) {
      kernels.slope(positives_, negatives_, grid_, series, begin, end, s, scratch(), scale, column_.data(), out);
    });
  }

 private:
  // Cells of one task.
  static constexpr int64_t kCells = 64;

  // first[of(unit) + 1] = where the positives up to there end. They ascend, so no count has to wait for the one before.
  template <typename Of>
  void find_ends(const Of& of, std::vector<uint32_t>& first) const {
    for (int64_t i = 0; i < positives_.n; ++i) first[of(unit_[i]) + 1] = static_cast<uint32_t>(i + 1);
    for (size_t k = 1; k < first.size(); ++k) first[k] = std::max(first[k - 1], first[k]);
  }

  template <typename Body>
  void for_cells(const Parallel& parallel, const Body& body) const {
    const int64_t cells = grid_.cells();
    parallel.run((cells + kCells - 1) / kCells,
                 [&](int64_t task, int) { body(task * kCells, std::min(cells, (task + 1) * kCells)); });
  }

  void sum(Cells& cells, const CellSeries& series, const Settings<float>& s, const CellKernels& kernels,
           const Parallel& parallel) {
    cells.resize(grid_.cells());
    for_cells(parallel, [&](int64_t begin, int64_t end) { kernels.sum(cells, grid_, series, s.tau, begin, end); });
    parallel.run(2, [&](int64_t task, int) {
      task ? kernels.join_above(cells, grid_, series, s.tau) : kernels.join_below(cells, grid_, series);
    });
  }

  Grid grid_;
  Cells negatives_, positives_;
  std::vector<uint32_t> column_;  // [n]  of each negative
  std::vector<int32_t> unit_;     // [P]  of each positive
  std::vector<uint32_t> first_;   // [buckets + 1]
};

}  // namespace roadmap
