// One row by cells: the sorted scan where scores spread evenly over their range. Its steps and their order; the work
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
  // In units of tau: over this width the polynomials and moments are as exact as the series (tests/test_sorted_scan.py).
  static constexpr double kWidth = 0.3;
  // Scores that a cell has on average: at the least, for a cell costs as much as several; and where cells may be
  // narrower than they have to be, for what lies around steps and knees is met one by one.
  static constexpr int64_t kFewest = 8, kUsual = 32;
  // No cell may have more, nor all scores on average in theirs.
  static constexpr int64_t kMostInCell = kBlock / 4;
  static constexpr double kMostOnAverage = 128;
  static constexpr int64_t kFewestScores = 256;

  // The grid for so many scores, positives and negatives, between low and high; without cells where there is none.
  static Grid grid(int64_t scores, float low, float high, const Settings<float>& s) {
    Grid grid;
    const double bottom = low, range = static_cast<double>(high) - bottom;
    const double size = std::max(std::fabs(bottom), std::fabs(static_cast<double>(high)));
    if (scores < kFewestScores || !(range > 0)) return grid;
    const double needed = std::ceil(range / (kWidth * s.tau));
    if (!(needed * kFewest <= static_cast<double>(scores))) return grid;
    int64_t cells = std::max(static_cast<int64_t>(needed), scores / kUsual);
    cells = (cells + kTogether - 1) / kTogether * kTogether;
    // Of the difference of two scores, of its comparison with the knee, and of the number of a cell.
    const double guard = size * 0x1p-20, width = range / static_cast<double>(cells);
    const Buckets<float> buckets = {low, high, static_cast<int32_t>(cells)};
    const float scale = static_cast<float>(cells) / (high - low);
    if (!(guard * 4 < width) || !(scale > 0 && scale < std::numeric_limits<float>::infinity())) return grid;
    grid.buckets = buckets;
    grid.width = width;
    grid.guard = guard;
    return grid;
  }

  // Cells are dealt to so many at a time, where there are too many for all at once.
  static constexpr int kShift = 6;
  static constexpr int64_t kTogether = 1 << kShift;
};

inline CellSeries::CellSeries(const Grid& grid, const Settings<float>& s) {
  const double knee_cells = static_cast<double>(s.delta) / grid.width, guard = grid.guard / grid.width;
  constexpr double kFar = 1 << 30;
  knee = static_cast<int64_t>(std::floor(std::min(knee_cells - guard, kFar)));
  knee_end = static_cast<int64_t>(std::floor(std::min(knee_cells + guard, kFar))) + 2;
  const double width = grid.width / s.tau;
  const double between = static_cast<double>(std::max<int64_t>(0, knee - 1)), under = static_cast<double>(std::max<int64_t>(0, -knee));
  for (int k = 0; k < kStride; ++k) {
    const double rate = -(k + 1) * width;
    half[k] = std::exp(rate / 2);
    whole[k] = std::exp(rate);
    window[k] = std::exp(std::max(rate * between, -600.0));
    merged[k] = std::exp(rate * under);
  }
  for (int k = 0; k < kDegree; ++k) {
    double by = half[k];
    for (int m = 0; m < kTerms; ++m) {
      sigmoid[k][m] = Series<float>::sigmoid(k) * by;
      slope[k][m] = Series<float>::slope(k) * by;
      by *= (k + 1.0) / (m + 1);
    }
  }
}

class CellRow {
 public:
  // The negatives of a row, once they are dealt: see Sorter::deal().
  Cells& negatives() { return negatives_; }
  std::vector<uint32_t>& column() { return column_; }

  // Takes the ascending positives.
  void begin(const Grid& grid, const std::vector<float>& positive, const Sorting<float>& kernels) {
    grid_ = grid;
    const auto size = static_cast<int64_t>(positive.size());
    positives_.n = size;
    positives_.value.resize(size + kPad);
    std::copy(positive.begin(), positive.end(), positives_.value.begin());
    positives_.first.assign(grid.cells() + 1, 0);
    kernels.cells->count(positive.data(), size, grid, positives_.first.data() + 1);
    for (int64_t c = 0; c < grid.cells(); ++c) positives_.first[c + 1] += positives_.first[c];
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

  template <typename Body>
  void for_cells(const Parallel& parallel, const Body& body) const {
    const int64_t cells = grid_.cells();
    parallel.run((cells + kCells - 1) / kCells,
                 [&](int64_t task, int) { body(task * kCells, std::min(cells, (task + 1) * kCells)); });
  }

  void sum(Cells& cells, const CellSeries& series, const Settings<float>& s, const CellKernels& kernels,
           const Parallel& parallel) {
    cells.resize(grid_.cells());
    for_cells(parallel,
              [&](int64_t begin, int64_t end) { kernels.sum(cells, grid_, series, s.tau, begin, end); });
    parallel.run(2, [&](int64_t task, int) {
      task ? kernels.join_above(cells, grid_, series, s.tau) : kernels.join_below(cells, grid_, series);
    });
  }

  Grid grid_;
  Cells negatives_, positives_;
  std::vector<uint32_t> column_;  // [n]  of each negative
};

}  // namespace roadmap
