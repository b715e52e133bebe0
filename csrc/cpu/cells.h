// One row by cells: the sorted scan where scores spread over their range. Its steps and their order; the work
// itself is in cells_body.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels.h"
#include "rows.h"

namespace roadmap {

// What cells are worth having, and how they are laid.
struct CellPlan {
  // In units of tau: over this width the polynomials and moments are as exact as the series
  // (tests/kernels/test_sorted_scan.py).
  static constexpr double kWidth = 0.3;
  // Scores of a bucket on average: at the least, for a cell costs as much as several; and where buckets may be narrower
  // than they have to be, wide spans or not.
  static constexpr int64_t kFewest = 8, kUsualWide = 512, kUsual = 128;
  // A cell costs as much as so many pairs around steps and knees, of which there are the fewer the narrower cells are.
  // What crowds even in the narrowest is too much where scores would meet more than kMostPairs each.
  static constexpr double kPairs = 400, kMostPairs = 256;
  static constexpr int64_t kFewestScores = 256;

  // Whether spans may be wide: where there are no knees, or where sigma is so flat past them that a polynomial takes it
  // off again (knee.h). What is left of it is a part in 10^8 or so: it must not show, whatever the number of sources,
  // in what the pairs past a knee add themselves.
  template <typename T>
  static bool wide(const Settings<T>& s) {
    constexpr double kLeast = 0.1;  // of rho tau and of offset, where sigma' is 0.018 at the most, and sigma 1
    return s.surrogate == Surrogate::kSmooth ||
           (s.exact_delta >= kHighKnee * s.tau && s.exact_rho * s.tau >= kLeast && s.exact_offset >= kLeast);
  }

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
    grid.wide = wide(s);
    const int64_t usual = scores / (grid.wide ? kUsualWide : kUsual);
    const int64_t units = std::max(needed, std::min(usual, kMostBuckets)) * Grid::kUnits;
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
      if (!smooth && p > 0) pairs += p * (p + around(negative, b + knee));
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
    grid.cell = grid.first_cell;
    if (!grid.wide) {
      grid.cell.resize(grid.edge.size());
      std::iota(grid.cell.begin(), grid.cell.end(), 0);
    }
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
  if (!grid.wide || s.surrogate == Surrogate::kSmooth) return;
  near = knee >> Grid::kLevels;
  far = (knee_last + Grid::kUnits - 1) >> Grid::kLevels;
  const double rate = 1 / s.tau, span = grid.unit * Grid::kUnits;
  double curve[kKneeTerms], slope[kKneeTerms];
  const double origin = static_cast<double>(s.origin);
  const auto take_off = [&](const auto& flat, Past& out) {
    for (int m = 0; m < flat.kPoints; ++m) {
      curve[m] = -flat.sigma[m];
      slope[m] = -flat.slope[m];
    }
    curve[0] += s.exact_offset + s.exact_rho * (origin - s.exact_delta);
    curve[1] += s.exact_rho * s.tau;
    slope[0] += s.exact_rho * s.tau;
    for (int m = 0; m < flat.kPoints; ++m) {
      out.curve[m] = static_cast<float>(m ? curve[m] : curve[m] - s.exact_start);
      out.slope[m] = static_cast<float>(slope[m]);
    }
  };
  take_off(KneePolynomial<kCloseTerms>(s, kClose), close);
  take_off(KneePolynomial<kKneeTerms>(s, 2 * (span + grid.guard) * rate), past);
  for (int64_t k = near; k <= far; ++k) {
    // z = y - x + shift, or x - y + shift; the powers of that, by the binomials.
    const double shift = (static_cast<double>(k) * span - origin) * rate;
    Shifted& table = shifted[k - near];
    for (int r = 0; r < kKneeTerms; ++r) {
      for (int i = 0; i + r < kKneeTerms; ++i) {
        double of_curve = 0, of_slope = 0, choose = 1, power = 1;  // m! / (r! i! (m - r - i)!), shift^(m - r - i)
        for (int j = 1; j <= i; ++j) choose *= static_cast<double>(r + j) / j;
        for (int m = r + i; m < kKneeTerms; ++m) {
          of_curve += curve[m] * choose * power;
          of_slope += slope[m] * choose * power;
          choose *= static_cast<double>(m + 1) / (m + 1 - r - i);
          power *= shift;
        }
        table.curve[r][i] = i % 2 ? -of_curve : of_curve;
        table.slope[r][i] = i % 2 ? -of_slope : of_slope;
        table.mirrored[r][i] = r % 2 ? -of_slope : of_slope;
      }
    }
  }
}

class CellRow {
 public:
  Grid& grid() { return grid_; }
  // What Sorter::deal() fills.
  Cells& negatives() { return negatives_; }
  Cells& positives() { return positives_; }

  // Puts the positives of each cell, and so all, into ascending order, equal ones by column.
  void order_positives(const Parallel& parallel) {
    for_spans(parallel, [&](int64_t begin, int64_t end) {
      std::vector<std::pair<float, uint32_t>> entry;
      for (int64_t c = grid_.cell[begin]; c < grid_.cell[end]; ++c) {
        const uint32_t from = positives_.first[c], to = positives_.first[c + 1];
        entry.clear();
        for (uint32_t i = from; i < to; ++i) entry.emplace_back(positives_.value[i], positives_.column[i]);
        std::sort(entry.begin(), entry.end());
        for (uint32_t i = from; i < to; ++i) {
          std::tie(positives_.value[i], positives_.column[i]) = entry[i - from];
        }
      }
    });
  }

  // Of the positives, as they were dealt: ranks among the negatives, slopes of these if `slope` is not null, and, but
  // for smooth ranks, ranks among themselves.
  void rank(const Settings<float>& s, const CellKernels& kernels, const Parallel& parallel,
            Scratch<float>& (*scratch)(), double* rank, double* slope, double* rank_positive) {
    const CellSeries series(grid_, s);
    negatives_.weight.clear();
    sum(negatives_, series, s, kernels, parallel);
    for_spans(parallel, [&](int64_t begin, int64_t end) {
      kernels.rank(negatives_, positives_, grid_, series, begin, end, s, scratch(), rank, slope, rank_positive);
    });
  }

  // out[column] = scale times the slope of each negative.
  void gradient(std::vector<float>& weight, double scale, const Settings<float>& s, const CellKernels& kernels,
                const Parallel& parallel, Scratch<float>& (*scratch)(), float* out) {
    const CellSeries series(grid_, s);
    positives_.weight.swap(weight);  // lent
    sum(positives_, series, s, kernels, parallel);
    for_spans(parallel, [&](int64_t begin, int64_t end) {
      kernels.slope(positives_, negatives_, grid_, series, begin, end, s, scratch(), scale, out);
    });
    positives_.weight.swap(weight);
  }

 private:
  // Spans of one task.
  static constexpr int64_t kWideSpans = 8, kSpans = 64;

  template <typename Body>
  void for_spans(const Parallel& parallel, const Body& body) const {
    const int64_t spans = grid_.spans(), together = grid_.wide ? kWideSpans : kSpans;
    parallel.run((spans + together - 1) / together,
                 [&](int64_t task, int) { body(task * together, std::min(spans, (task + 1) * together)); });
  }

  void sum(Cells& cells, const CellSeries& series, const Settings<float>& s, const CellKernels& kernels,
           const Parallel& parallel) {
    cells.resize(grid_.cells(), grid_.spans());
    for_spans(parallel, [&](int64_t begin, int64_t end) { kernels.sum(cells, grid_, series, s.tau, begin, end); });
    parallel.run(2, [&](int64_t task, int) {
      task ? kernels.join_above(cells, grid_, series, s.tau) : kernels.join_below(cells, grid_, series);
    });
  }

  Grid grid_;
  Cells negatives_, positives_;
};

}  // namespace roadmap
