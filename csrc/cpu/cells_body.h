// The sorted scan by cells, in the vectors of whichever instruction set includes this file (after sorted_body.h).
//
// Where scores spread evenly over their range, dealing them to narrow cells of equal width is as good as sorting them.
// Over a cell of kCellWidth tau everything smooth is a short polynomial around its middle: of the sources below and
// above, by the series; of those in the cell, by the Taylor series of sigma and their moments. So a target reads
//
//     the polynomials of its cell     all sources whose sigma counts, but for those around the knee
//     the sources of its cell         how many are at least as high: the steps
//     the cells of the knee           pair by pair, exactly as by the tiled kernels
//     the cells above that            a count and a sum
//
// and nothing depends on an order within cells. All cells being alike, what the sums have to be multiplied with from one
// to the next is the same for all.
//
// For float alone: double would need twice the terms, and is there for gradient checks.

namespace {

// Taylor coefficients of sigma at 0.
constexpr int kOwnTerms = 10;
struct OwnCell {
  // Of x^i y^r in sigma(y - x) and in its slope, x the target, y the source.
  alignas(64) double sigmoid[kOwnTerms][CellSeries::kTerms] = {}, slope[kOwnTerms][CellSeries::kTerms] = {};

  constexpr OwnCell() {
    double a[kOwnTerms + 1] = {0.5};
    for (int m = 0; m < kOwnTerms; ++m) {  // sigma' = sigma - sigma^2
      double square = 0;
      for (int i = 0; i <= m; ++i) square += a[i] * a[m - i];
      a[m + 1] = (a[m] - square) / (m + 1);
    }
    for (int r = 0; r < kOwnTerms; ++r) {
      double choose = 1;  // i + r of i
      for (int i = 0; i < CellSeries::kTerms && i + r < kOwnTerms; ++i) {
        const double sign = i % 2 ? -1 : 1;
        sigmoid[r][i] = sign * choose * a[i + r];
        slope[r][i] = sign * choose * (i + r + 1) * a[i + r + 1];
        choose *= (i + r + 1.0) / (i + 1);
      }
    }
  }
};

// Taylor coefficients of e^(k x) times those of the series.
struct CellTerms {
  alignas(64) double sigmoid[CellSeries::kDegree][CellSeries::kTerms] = {};
  alignas(64) double slope[CellSeries::kDegree][CellSeries::kTerms] = {};

  constexpr CellTerms() {
    for (int k = 0; k < CellSeries::kDegree; ++k) {
      double by = 1;
      for (int m = 0; m < CellSeries::kTerms; ++m) {
        sigmoid[k][m] = Series<float>::sigmoid(k) * by;
        slope[k][m] = Series<float>::slope(k) * by;
        by *= (k + 1.0) / (m + 1);
      }
    }
  }
};

// ---- dealing ----

void place_units(const float* value, int64_t n, const Grid& grid, int32_t* unit) {
  const Bucketing<float> bucket(grid.buckets.low, grid.buckets.high, grid.buckets.all);
  for (int64_t j = 0; j < n; ++j) unit[j] = static_cast<int32_t>(bucket.of(value[j]));
}

void split_bucket(const Entry<float>* entry, int64_t n, const Grid& grid, int64_t bucket, uint32_t begin, float* value,
                  uint32_t* column, uint32_t* first) {
  const int level = grid.level[bucket];
  Buckets<float> cells = grid.buckets;
  cells.shift = Grid::kLevels - level;
  cells.first = static_cast<uint32_t>(bucket) << level;
  const Bucketing<float> cell(cells);
  uint32_t place[Grid::kUnits] = {};
  for_buckets(entry, n, cell, [&](int64_t, uint16_t of) { ++place[of]; });
  first += grid.first_cell[bucket];
  uint32_t at = begin;
  for (int c = 0; c < 1 << level; ++c) {
    first[c] = at;
    at += place[c];
    place[c] = first[c];
  }
  for_buckets(entry, n, cell, [&](int64_t j, uint16_t of) {
    const uint32_t to = place[of]++;
    value[to] = entry[j].value;
    column[to] = entry[j].index;
  });
}

void split_buckets(const Entry<float>* entry, const uint32_t* edge, int64_t begin, int64_t end, const Grid& grid,
                   float* value, uint32_t* column, uint32_t* first) {
  for (int64_t b = begin; b < end;) {
    if (grid.level[b] > 0) {
      split_bucket(entry + edge[b], edge[b + 1] - edge[b], grid, b, edge[b], value, column, first);
      ++b;
      continue;
    }
    const uint32_t from = edge[b];  // of a run of whole buckets
    for (; b < end && grid.level[b] == 0; ++b) first[grid.first_cell[b]] = edge[b];
    for (uint32_t j = from; j < edge[b]; ++j) {
      value[j] = entry[j].value;
      column[j] = entry[j].index;
    }
  }
}

// ---- the sums of cells ----

template <bool Weighted>
void sum_cells_as(Cells& cells, const Grid& grid, const CellSeries& series, double tau, int64_t begin, int64_t end) {
  using X = Vec<double>;
  constexpr int kStride = Cells::kStride, kMoments = Cells::kMoments, kVectors = kStride / X::kWidth;
  static constexpr Taylor<float> taylor;
  const double rate = 1 / tau;
  for (int64_t c = begin; c < end; ++c) {
    const int64_t from = cells.first[c], count = cells.first[c + 1] - from;
    double* const moment = &cells.moment[c * Cells::kMomentStride];
    double* const below = &cells.below[(c + 1) * kStride];
    double* const above = &cells.above[c * kStride];
    if (!count) {
      std::fill_n(moment, Cells::kMomentStride, 0.0);
      std::fill_n(below, kStride, 0.0);
      std::fill_n(above, kStride, 0.0);
      continue;
    }
    const double middle = (grid.at(grid.edge[c]) + grid.at(grid.edge[c + 1])) / 2;
    const double* const half = series.half[grid.level_of(c)];
    const float* const v = cells.value.data() + from;
    const float* const w = Weighted ? cells.weight.data() + from : nullptr;
    X::V sum[Cells::kMomentStride];
    for (X::V& m : sum) m = X::set(0);
    for (int64_t j = 0; j < count; j += X::kWidth) {
      // Lanes beyond the cell hold what comes next, and weigh nothing.
      alignas(64) double lane[X::kWidth], weight[X::kWidth];
      for (int k = 0; k < X::kWidth; ++k) lane[k] = static_cast<double>(v[j + k]);
      X::V power;
      if constexpr (Weighted) {
        for (int k = 0; k < X::kWidth; ++k) weight[k] = static_cast<double>(w[j + k]);
        power = X::load(weight);
      } else {
        power = X::set(1);
      }
      if (count - j < X::kWidth) power = X::select(X::lanes((1u << (count - j)) - 1), power, X::set(0));
      const X::V y = (X::load(lane) - X::set(middle)) * X::set(rate);
      for (int m = 0; m < kMoments; ++m) {
        sum[m] = sum[m] + power;
        power = power * y;
      }
    }
    for (int m = 0; m < Cells::kMomentStride; m += X::kWidth) X::sums(sum + m, moment + m);
    for (int k = 0; k < kVectors; ++k) {
      const int at = k * X::kWidth;
      X::V even = X::set(0), odd = X::set(0);
      for (int m = kMoments - 2; m >= 0; m -= 2) {
        even = X::mul_add(X::set(moment[m]), X::load(taylor.term[m] + at), even);
        odd = X::mul_add(X::set(moment[m + 1]), X::load(taylor.term[m + 1] + at), odd);
      }
      X::store(below + at, (even + odd) * X::load(half + at));
      X::store(above + at, (even - odd) * X::load(half + at));
    }
  }
}

void sum_cells(Cells& cells, const Grid& grid, const CellSeries& series, double tau, int64_t begin, int64_t end) {
  cells.weight.empty() ? sum_cells_as<false>(cells, grid, series, tau, begin, end)
                       : sum_cells_as<true>(cells, grid, series, tau, begin, end);
}

// own += whole * neighbour
void add_cell(const double* whole, const double* neighbour, double* own) {
  using X = Vec<double>;
  for (int k = 0; k < Cells::kStride; k += X::kWidth) {
    X::store(own + k, X::mul_add(X::load(whole + k), X::load(neighbour + k), X::load(own + k)));
  }
}

void join_cells_below(Cells& cells, const Grid& grid, const CellSeries& series) {
  constexpr int kStride = Cells::kStride;
  const int64_t size = grid.cells();
  const bool weighted = !cells.weight.empty();
  std::fill_n(cells.below.data(), kStride, 0.0);
  if (weighted) cells.tail[0] = 0;
  KahanSum weights;
  for (int64_t c = 0; c < size; ++c) {
    double* const own = &cells.below[(c + 1) * kStride];
    add_cell(series.whole[grid.level_of(c)], own - kStride, own);
    if (weighted) {
      weights.add(cells.moment[c * Cells::kMomentStride]);
      cells.tail[c + 1] = weights.sum;
    }
  }
}

void join_cells_above(Cells& cells, const Grid& grid, const CellSeries& series, double tau) {
  constexpr int kStride = Cells::kStride;
  const int64_t size = grid.cells();
  const bool weighted = !cells.weight.empty();
  std::fill_n(&cells.above[size * kStride], kStride, 0.0);
  if (!weighted) cells.tail[size] = 0;
  KahanSum sum;
  for (int64_t c = size - 1; c >= 0; --c) {
    double* const own = &cells.above[c * kStride];
    add_cell(series.whole[grid.level_of(c)], own + kStride, own);
    if (!weighted) {
      const double* const moment = &cells.moment[c * Cells::kMomentStride];
      const double width = static_cast<double>(grid.edge[c + 1] - grid.edge[c]) * grid.unit;
      sum.add(static_cast<double>(cells.n - cells.first[c + 1]) * width + moment[0] * width / 2 + moment[1] * tau);
      cells.tail[c] = sum.sum;
    }
  }
}

// ---- what targets read ----

// The polynomials of one cell, of x = (target - middle) / tau.
template <bool Curve, bool Slope>
class CellPolynomial {
  using X = Vec<double>;
  static constexpr int kTerms = CellSeries::kTerms;

 public:
  // below, above: sums at the lower and upper edge. half: of the cell. own: moments, or null. count: the sources above.
  void expand(const double* below, const double* above, const double* half, const double* own, double count) {
    static constexpr OwnCell own_cell;
    static constexpr CellTerms terms;
    alignas(64) double at_middle[2][Cells::kStride];
    for (int k = 0; k < Cells::kStride; k += X::kWidth) {
      X::store(at_middle[0] + k, X::load(below + k) * X::load(half + k));
      X::store(at_middle[1] + k, X::load(above + k) * X::load(half + k));
    }
    for (int m = 0; m < kTerms; m += X::kWidth) {
      X::V lower = X::set(0), upper = X::set(0), lower_slope = X::set(0), upper_slope = X::set(0);
      X::V curve = X::set(0), slope = X::set(0);
      for (int k = 0; k < CellSeries::kDegree; ++k) {
        const X::V a = X::set(at_middle[0][k]), b = X::set(at_middle[1][k]);
        if constexpr (Curve) {
          const X::V term = X::load(terms.sigmoid[k] + m);
          lower = X::mul_add(a, term, lower);
          upper = X::mul_add(b, term, upper);
        }
        if constexpr (Slope) {
          const X::V term = X::load(terms.slope[k] + m);
          lower_slope = X::mul_add(a, term, lower_slope);
          upper_slope = X::mul_add(b, term, upper_slope);
        }
      }
      for (int r = 0; own && r < kOwnTerms; ++r) {
        const X::V moment = X::set(own[r]);
        if constexpr (Curve) curve = X::mul_add(moment, X::load(own_cell.sigmoid[r] + m), curve);
        if constexpr (Slope) slope = X::mul_add(moment, X::load(own_cell.slope[r] + m), slope);
      }
      // A source below the target: e^(-k x); one above: 1 less the series, e^(k x).
      alignas(64) static constexpr double kSigns[kTerms] = {1, -1, 1, -1, 1, -1, 1, -1};
      const X::V sign = X::load(kSigns + m);
      if constexpr (Curve) X::store(curve_ + m, X::mul_add(lower, sign, curve) - upper);
      if constexpr (Slope) X::store(slope_ + m, X::mul_add(lower_slope, sign, slope) + upper_slope);
    }
    if constexpr (Curve) curve_[0] += count;
  }

  X::V curve(X::V x) const { return at(curve_, x); }
  X::V slope(X::V x) const { return at(slope_, x); }

 private:
  static X::V at(const double* coefficient, X::V x) {
    X::V p = X::set(coefficient[kTerms - 1]);
    for (int m = kTerms - 2; m >= 0; --m) p = X::mul_add(p, x, X::set(coefficient[m]));
    return p;
  }

  alignas(64) double curve_[kTerms], slope_[kTerms];
};

// e^(d / tau) for the distance d of two scores of one cell: no more than an ulp off, for the exponent is small.
Vec<float>::V cell_exponential(Vec<float>::V d, const Settings<float>& s) {
  using X = Vec<float>;
  constexpr float kInverseFactorial[8] = {1.0f,      1.0f,       1.0f / 2,   1.0f / 6,
                                          1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040};
  const X::V x = d * X::set(s.rate_hi);
  X::V p = X::set(kInverseFactorial[7]);
  for (int k = 6; k >= 0; --k) p = X::mul_add(p, x, X::set(kInverseFactorial[k]));
  return p;
}

// Decays over a distance, kept for the next cell: neighbouring cells mostly have the same.
class Decays {
  using X = Vec<double>;
  static constexpr int kVectors = Cells::kStride / X::kWidth;

 public:
  Decays(const Grid& grid, const Settings<float>& s) : grid_(grid), s_(s) {}

  // out[k - 1] = a[k - 1] + sign e^(-k units / tau) b[k - 1]
  void join(const double* a, double sign, int64_t units, const double* b, double* out) {
    if (units != units_) decays<float>(static_cast<double>(units) * grid_.unit, s_, by_);
    units_ = units;
    for (int k = 0; k < kVectors; ++k) {
      const int at = k * X::kWidth;
      X::store(out + at, X::mul_add(by_[k] * X::set(sign), X::load(b + at), X::load(a + at)));
    }
  }

 private:
  const Grid& grid_;
  const Settings<float>& s_;
  int64_t units_ = -1;
  X::V by_[kVectors];
};

alignas(64) constexpr double kNoSums[Cells::kStride] = {};

// Sums of up to kWidth targets, each of which met a vector of sources at a time: a vector of lanes each, in float64.
template <int Sums>
struct LaneSums {
  using X = Vec<float>;
  using D = Vec<double>;
  alignas(64) double lanes[Sums][X::kWidth][X::kWidth];

  void clear(int target) {
    for (auto& sum : lanes) std::fill_n(sum[target], X::kWidth, 0.0);
  }
  // out[i] += the sum of target i.
  void add_to(int sum, int targets, double* out) const {
    for (int i = 0; i < targets; i += D::kWidth) {
      D::V half[D::kWidth];
      for (int k = 0; k < D::kWidth; ++k) {
        const double* const lane = lanes[sum][std::min(i + k, targets - 1)];
        half[k] = D::load(lane) + D::load(lane + D::kWidth);
      }
      alignas(64) double total[D::kWidth];
      D::sums(half, total);
      for (int k = 0; k < D::kWidth && i + k < targets; ++k) out[i + k] += total[k];
    }
  }
};

template <bool Smooth, bool Slope>
void rank_cells_as(const Cells& sources, const Cells& targets, const Grid& grid, const CellSeries& series,
                   int64_t begin, int64_t end, const Settings<float>& s, Scratch<float>& scratch, double* rank,
                   double* slope) {
  using X = Vec<float>;
  using V = X::V;
  using D = Vec<double>;
  constexpr int kLanes = X::kWidth, kStride = Cells::kStride;
  constexpr int kRun = 8;    // vectors whose shares are summed in float: more would show where many scores tie
  constexpr int kAlone = 6;  // so few targets meet a vector of sources at a time; more meet one source, each in a lane
  const int64_t cells = grid.cells();
  const double rate = 1 / s.tau;
  const float* const v = sources.value.data();
  const uint32_t* const first = sources.first.data();
  const V delta = X::set(s.delta), origin = X::set(s.origin), zero = X::set(0);
  CellPolynomial<true, Slope> polynomial;
  Readers<float> readers;
  LaneSums<3> sums;
  alignas(64) double reduced[kStride];
  Decays decays(grid, s);

  for (int64_t c = begin; c < end; ++c) {
    const int64_t t_begin = targets.first[c], t_end = targets.first[c + 1];
    if (t_begin == t_end) continue;
    const int64_t knee = Smooth ? cells : grid.edge[c] + series.knee < grid.units() ? grid.cell_of(grid.edge[c] + series.knee) : cells;
    const int64_t knee_end = Smooth ? cells : grid.edge[c + 1] - 1 + series.knee_last < grid.units() ? grid.cell_of(grid.edge[c + 1] - 1 + series.knee_last) + 1 : cells;
    const bool merged = knee <= c;
    const double* const half = series.half[grid.level_of(c)];
    if (merged) {
      decays.join(kNoSums, 1, grid.edge[c] - grid.edge[knee], &sources.below[knee * kStride], reduced);
      polynomial.expand(reduced, kNoSums, half, nullptr, 0);
    } else {
      const double* above = &sources.above[(c + 1) * kStride];
      if (knee < cells) {
        decays.join(above, -1, grid.edge[knee] - grid.edge[c + 1], &sources.above[knee * kStride], reduced);
        above = reduced;
      }
      polynomial.expand(&sources.below[c * kStride], above, half, &sources.moment[c * Cells::kMomentStride],
                        static_cast<double>(first[knee] - first[c + 1]));
    }
    // The sources around the knees, with their exponentials around the lowest target, whose own is then 1: tied targets
    // would all repeat an error.
    const float* const target = targets.value.data();
    const int around = static_cast<int>(first[knee_end] - first[knee]);
    if (around) {
      for (int j = 0; j < around; j += kLanes) X::store(scratch.band + j, X::load(v + first[knee] + j));
      X::store(scratch.band + around, X::set(-infinity<float>()));
      band_exponentials(scratch.band, around, target[t_begin], s, scratch);
    }
    const int64_t own_begin = first[c], own_end = merged ? own_begin : first[c + 1];
    const double at_least = merged ? 0 : static_cast<double>(first[knee] - first[c + 1]);
    const double tail = static_cast<double>(sources.n - first[knee_end]);
    const double tail_sum = Smooth ? 0 : sources.tail[knee_end];
    const double middle = (grid.at(grid.edge[c]) + grid.at(grid.edge[c + 1])) / 2;
    const double beyond = grid.at(grid.edge[knee_end]) - static_cast<double>(s.origin);

    for (int64_t i = t_begin; i < t_end; i += kLanes) {
      const int count = static_cast<int>(std::min<int64_t>(kLanes, t_end - i));
      const bool alone = count <= kAlone;
      readers.target = target + i;
      readers.count = count;
      V x = X::load(target + i);  // the first one stands where there are no more
      if (count < kLanes) x = X::select(X::lanes((1u << count) - 1), x, X::set(target[i]));
      const V ex = cell_exponential(x - X::set(target[t_begin]), s);
      alignas(64) double u[kLanes];
      std::fill_n(u, kLanes, 0.0);
      X::accumulate(u, x);
      for (int k = 0; k < kLanes; k += D::kWidth) {
        const D::V distance = (D::load(u + k) - D::set(middle)) * D::set(rate);
        D::store(readers.curve + k, polynomial.curve(distance));
        if constexpr (Slope) D::store(readers.slope + k, polynomial.slope(distance));
      }
      for (double* lanes : {readers.steps, readers.tails, readers.past}) std::fill_n(lanes, kLanes, 0.0);
      if (!Smooth && alone) {
        for (int k = 0; k < count; ++k) {
          const V own = X::set(target[i + k]);
          int above = 0;
          for (int64_t j = own_begin; j < own_end; j += kLanes) {
            const unsigned there = own_end - j < kLanes ? (1u << (own_end - j)) - 1 : (1u << (kLanes - 1)) * 2 - 1;
            above += __builtin_popcount(X::bits(X::greater_equal(X::load(v + j), own)) & there);
          }
          readers.steps[k] += above;
        }
      } else if (!Smooth) {
        constexpr int kCounts = 4;  // one would wait for itself
        V above[kCounts] = {zero, zero, zero, zero};
        int64_t j = own_begin;
        for (; j + kCounts <= own_end; j += kCounts) {
          for (int k = 0; k < kCounts; ++k) {
            above[k] = X::add_where(X::greater_equal(X::set(v[j + k]), x), above[k], X::set(1));
          }
        }
        for (; j < own_end; ++j) above[0] = X::add_where(X::greater_equal(X::set(v[j]), x), above[0], X::set(1));
        X::accumulate(readers.steps, (above[0] + above[1]) + (above[2] + above[3]));
      }
      if (around && alone) {
        alignas(64) float exponential[kLanes];
        X::store(exponential, ex);
        for (int k = 0; k < count; ++k) {
          sums.clear(k);
          const V own = X::set(target[i + k]), own_exponential = X::set(exponential[k]);
          int steps = 0, tails = 0;
          for (int tile = 0; tile < around; tile += kRun * kLanes) {
            V curve = zero, slopes = zero, past = zero;
            for (int j = tile; j < std::min(around, tile + kRun * kLanes); j += kLanes) {
              const V ev = X::load(scratch.band_exponential + j), t = X::load(scratch.band + j) - own;
              const V value = sigma<float>(ev, own_exponential);
              const auto beyond_knee = X::greater(t, delta);
              steps += __builtin_popcount(X::bits(X::greater_equal(t, zero)));
              tails += __builtin_popcount(X::bits(beyond_knee));
              curve = X::add_unless(beyond_knee, curve, value);
              past = X::add_where(beyond_knee, past, t - origin);
              if constexpr (Slope) {
                slopes = X::add_unless(beyond_knee, slopes, sigma_slope<float>(ev, own_exponential, value));
              }
            }
            X::accumulate(sums.lanes[0][k], curve);
            X::accumulate(sums.lanes[1][k], past);
            if constexpr (Slope) X::accumulate(sums.lanes[2][k], slopes);
          }
          readers.steps[k] += steps;
          readers.tails[k] += tails;
        }
        sums.add_to(0, count, readers.curve);
        sums.add_to(1, count, readers.past);
        if constexpr (Slope) sums.add_to(2, count, readers.slope);
      } else if (around) {
        rank_pairs<false, Slope, Where::kAnywhere, 1>(0, around, target[t_begin], s, scratch, readers);
      }
      for (int k = 0; k < count; ++k) {
        double value = readers.curve[k];
        if constexpr (!Smooth) {
          const double past = readers.past[k] + (tail_sum + tail * (beyond - u[k]));
          value += s.exact_start * (readers.steps[k] + at_least - readers.tails[k]) +
                   tail_value(past, readers.tails[k] + tail, s);
        }
        rank[i + k] = value;
        if constexpr (Slope) {
          slope[i + k] = readers.slope[k] * rate + (Smooth ? 0 : s.exact_rho * (readers.tails[k] + tail));
        }
      }
    }
  }
}

void rank_cells(const Cells& sources, const Cells& targets, const Grid& grid, const CellSeries& series, int64_t begin,
                int64_t end, const Settings<float>& s, Scratch<float>& scratch, double* rank, double* slope) {
  const auto run = s.surrogate == Surrogate::kSmooth ? slope ? rank_cells_as<true, true> : rank_cells_as<true, false>
                   : slope                           ? rank_cells_as<false, true>
                                                     : rank_cells_as<false, false>;
  run(sources, targets, grid, series, begin, end, s, scratch, rank, slope);
}

template <bool Smooth>
void slope_cells_as(const Cells& sources, const Cells& targets, const Grid& grid, const CellSeries& series,
                    int64_t begin, int64_t end, const Settings<float>& s, Scratch<float>& scratch, double scale,
                    const uint32_t* column, float* out) {
  using X = Vec<float>;
  using V = X::V;
  using D = Vec<double>;
  constexpr int kLanes = X::kWidth, kStride = Cells::kStride;
  constexpr int kRun = 8;  // of sources whose shares are summed in float
  const int64_t cells = grid.cells();
  const double rate = 1 / s.tau;
  const V delta = X::set(s.delta), rho_tau = X::set(s.rho_tau);
  CellPolynomial<false, true> polynomial;
  alignas(64) double reduced[kStride];
  Decays decays(grid, s);

  for (int64_t c = begin; c < end; ++c) {
    const int64_t t_begin = targets.first[c], t_end = targets.first[c + 1];
    if (t_begin == t_end) continue;
    // Sources u whose knees u + delta lie around the cell.
    const int64_t knee = Smooth ? 0 : grid.edge[c] - series.knee_last >= 0 ? grid.cell_of(grid.edge[c] - series.knee_last) : 0;
    const int64_t knee_end = Smooth ? 0 : grid.edge[c + 1] - 1 - series.knee >= 0 ? grid.cell_of(grid.edge[c + 1] - 1 - series.knee) + 1 : 0;
    const bool merged = knee_end > c;
    const double* const half = series.half[grid.level_of(c)];
    if (merged) {
      decays.join(kNoSums, 1, grid.edge[knee_end] - grid.edge[c + 1], &sources.above[knee_end * kStride], reduced);
      polynomial.expand(kNoSums, reduced, half, nullptr, 0);
    } else {
      const double* below = &sources.below[c * kStride];
      if (knee_end > 0) {
        decays.join(below, -1, grid.edge[c] - grid.edge[knee_end], &sources.below[knee_end * kStride], reduced);
        below = reduced;
      }
      polynomial.expand(below, &sources.above[(c + 1) * kStride], half, &sources.moment[c * Cells::kMomentStride], 0);
    }
    const int around = static_cast<int>(sources.first[knee_end] - sources.first[knee]);
    const double middle = (grid.at(grid.edge[c]) + grid.at(grid.edge[c + 1])) / 2;
    const V centre = X::set(static_cast<float>(middle));
    if (around) {
      const float* const u = sources.value.data() + sources.first[knee];
      for (int j = 0; j < around; j += kLanes) {
        X::store(scratch.band_exponential + j, difference_exponential<float>(X::load(u + j), centre, s));
      }
    }
    const float* const u = sources.value.data() + sources.first[knee];
    const float* const w = sources.weight.data() + sources.first[knee];
    const double tail = Smooth ? 0 : s.exact_rho * s.tau * sources.tail[knee];
    constexpr int kVectors = 2;  // of targets that share what is loaded of a source
    for (int64_t i = t_begin; i < t_end; i += kVectors * kLanes) {
      alignas(64) double slope[kVectors * kLanes];
      V x[kVectors], ex[kVectors];
      for (int r = 0; r < kVectors; ++r) {
        const int64_t at = std::min(i + r * kLanes, t_end - 1);
        x[r] = X::load(targets.value.data() + at);  // beyond the cell: whatever comes next
        ex[r] = cell_exponential(centre - x[r], s);
        alignas(64) double lanes[kLanes];
        std::fill_n(lanes, kLanes, 0.0);
        X::accumulate(lanes, x[r]);
        for (int k = 0; k < kLanes; k += D::kWidth) {
          D::store(slope + r * kLanes + k,
                   polynomial.slope((D::load(lanes + k) - D::set(middle)) * D::set(rate)) + D::set(tail));
        }
      }
      for (int run = 0; run < around; run += kRun) {
        V sum[kVectors];
        for (V& v : sum) v = X::set(0);
        for (int j = run; j < std::min(around, run + kRun); ++j) {
          const V own = X::set(u[j]), exponential = X::set(scratch.band_exponential[j]), weight = X::set(w[j]);
          for (int r = 0; r < kVectors; ++r) {
            sum[r] = X::mul_add(weight, pair_slope<false, float>(x[r], ex[r], own, exponential, delta, rho_tau), sum[r]);
          }
        }
        for (int r = 0; r < kVectors; ++r) X::accumulate(slope + r * kLanes, sum[r]);
      }
      const int count = static_cast<int>(std::min<int64_t>(kVectors * kLanes, t_end - i));
      for (int k = 0; k < count; ++k) out[column[i + k]] = static_cast<float>(slope[k] * scale);
    }
  }
}

void slope_cells(const Cells& sources, const Cells& targets, const Grid& grid, const CellSeries& series, int64_t begin,
                 int64_t end, const Settings<float>& s, Scratch<float>& scratch, double scale, const uint32_t* column,
                 float* out) {
  const auto run = s.surrogate == Surrogate::kSmooth ? slope_cells_as<true> : slope_cells_as<false>;
  run(sources, targets, grid, series, begin, end, s, scratch, scale, column, out);
}

constexpr CellKernels kCellKernels = {place_units,      split_buckets, sum_cells,  join_cells_below,
                                      join_cells_above, rank_cells,   slope_cells};

template <typename T>
constexpr Sorting<T> make_sorting() {
  return {keep_entries<T>, count_buckets<T>,    deal_buckets<T>, sort<T>,          sum_leaves<T>,   join_below<T>,
          join_above<T>,   rank_targets<T>, slope_targets<T>, spread_block<T>, sizeof(T) == 4 ? &kCellKernels : nullptr};
}

}  // namespace
