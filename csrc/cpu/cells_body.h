// The sorted scan by cells, in the vectors of whichever instruction set includes this file (after sorted_body.h).
//
// Where scores spread over their range, dealing them to narrow cells is as good as sorting them. Over a cell of
// CellPlan::kWidth tau everything smooth is a short polynomial around its middle: of the sources below and above, by
// the series; of those in the cell, by the Taylor series of sigma and their moments. So a target reads
//
//     the polynomials of its cell     all sources whose sigma counts
//     the sources of its cell         how many are at least as high: the steps
//     the cells of the knees          one by one, decided exactly as by the tiled kernels
//     the cells above that            a count and a sum
//
// and nothing depends on an order within cells. Cells of a level being alike, what the sums have to be multiplied with
// from one to the next is a table.
//
// For float alone: double would need twice the terms, and is there for gradient checks.

namespace {

constexpr int kOwnTerms = 10;

// What a source of the target's own cell gives, by the Taylor series of sigma at 0.
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
    const double middle = grid.middle(c);
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
  Decays(const Grid& grid, const Settings<float>& s) : grid_(grid), s_(s) {
    for (X::V& by : by_) by = X::set(1);
  }

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
  int64_t units_ = 0;
  X::V by_[kVectors];
};

alignas(64) constexpr double kNoSums[Cells::kStride] = {};

// Where the sources around the knees of a cell's targets lie, and how these meet them.
struct Knees {
  int64_t cell, cell_end;  // in cells
  int64_t begin, end;      // the sources
  bool merged;             // some of them may lie around the steps as well
  // Whether sigma is so flat past the knee that a cubic is as good: then the polynomials have all of them, and what
  // lies past a knee is taken off again. Else they have none of them.
  bool flat;
};

// Knees are flat from kHighKnee on, to kDenseKnee past them: see KneeCubic. What is left of a sigma that is taken off
// again is a part in 10^7 or so of that: it must not show, whatever the number of sources, in what the pairs past a
// knee add themselves.
bool are_flat(const Settings<float>& s, double furthest) {
  constexpr double kLeast = 0.1;  // of rho tau and of offset, where sigma' is 0.018 at the most, and sigma 1
  return s.exact_delta >= kHighKnee * s.tau && furthest - s.exact_delta <= kDenseKnee * s.tau &&
         s.exact_rho * s.tau >= kLeast && s.exact_offset >= kLeast;
}

// ---- ranks ----

// Reads the ranks of the targets of cells, and their slopes.
template <bool Smooth, bool Slope>
class CellRanks {
  using X = Vec<float>;
  using V = X::V;
  using D = Vec<double>;
  static constexpr int kLanes = X::kWidth, kStride = Cells::kStride;
  // Vectors whose shares are summed in float: more would show where many scores tie.
  static constexpr int kRun = 8;
  // So few targets meet a vector of sources at a time; more meet one source, each in a lane.
  static constexpr int kAlone = 6;

 public:
  CellRanks(const Cells& sources, const Cells& targets, const Grid& grid, const CellSeries& series,
            const Settings<float>& s, Scratch<float>& scratch)
      : sources_(sources),
        targets_(targets),
        grid_(grid),
        series_(series),
        s_(s),
        scratch_(scratch),
        v_(sources.value.data()),
        first_(sources.first.data()),
        cubic_(cubic_of(s)),
        decays_(grid, s) {}

  void read(int64_t c, double* rank, double* slope) {
    const int64_t begin = targets_.first[c], end = targets_.first[c + 1];
    if (begin == end) return;
    find_knees(c);
    expand(c);
    lowest_ = targets_.value[begin];
    loaded_ = -1;
    for (int64_t i = begin; i < end; i += kLanes) {
      load(targets_.value.data() + i, static_cast<int>(std::min<int64_t>(kLanes, end - i)));
      if constexpr (!Smooth) {
        if (!knees_.merged) count_steps(first_[c], first_[c + 1]);
        if (knees_.begin < knees_.end) knees_.flat ? take_off_past() : meet_pairs();
      }
      finish(c, rank + i, Slope ? slope + i : nullptr);
    }
  }

 private:
  void find_knees(int64_t c) {
    const int64_t cells = grid_.cells(), units = grid_.units();
    const int64_t from = grid_.edge[c] + series_.knee, to = grid_.edge[c + 1] - 1 + series_.knee_last;
    Knees& k = knees_;
    k.cell = Smooth || from >= units ? cells : grid_.cell_of(from);
    k.cell_end = Smooth || to >= units ? cells : grid_.cell_of(to) + 1;
    k.begin = first_[k.cell];
    k.end = first_[k.cell_end];
    k.merged = k.cell <= c;
    k.flat = !k.merged && are_flat(s_, grid_.at(grid_.edge[k.cell_end]) - grid_.at(grid_.edge[c]) + grid_.guard);
  }

  void expand(int64_t c) {
    const double* const half = series_.half[grid_.level_of(c)];
    middle_ = grid_.middle(c);
    if (knees_.merged) {
      decays_.join(kNoSums, 1, grid_.edge[c] - grid_.edge[knees_.cell], &sources_.below[knees_.cell * kStride], sums_);
      polynomial_.expand(sums_, kNoSums, half, nullptr, 0);
      return;
    }
    const int64_t stop = knees_.flat ? knees_.cell_end : knees_.cell;
    const double* above = &sources_.above[(c + 1) * kStride];
    if (stop < grid_.cells()) {
      decays_.join(above, -1, grid_.edge[stop] - grid_.edge[c + 1], &sources_.above[stop * kStride], sums_);
      above = sums_;
    }
    polynomial_.expand(&sources_.below[c * kStride], above, half, &sources_.moment[c * Cells::kMomentStride],
                       static_cast<double>(first_[stop] - first_[c + 1]));
  }

  // Sources of the block at `begin`, with their exponentials around the lowest target, whose own is then 1: tied
  // targets would all repeat an error. Returns how many.
  int load_pairs(int64_t begin) {
    const int count = static_cast<int>(std::min<int64_t>(knees_.end - begin, kBlock));
    if (loaded_ == begin) return count;  // most cells have one block, which serves all their targets
    loaded_ = begin;
    for (int j = 0; j < count; j += kLanes) X::store(scratch_.band + j, X::load(v_ + begin + j));
    X::store(scratch_.band + count, X::set(-infinity<float>()));
    band_exponentials(scratch_.band, count, lowest_, s_, scratch_);
    return count;
  }

  // Takes up to a vector of targets, and what the polynomials say of them.
  void load(const float* target, int count) {
    count_ = count;
    readers_.target = target;
    readers_.count = count;
    x_ = X::load(target);  // the first one stands where there are no more
    if (count < kLanes) x_ = X::select(X::lanes((1u << count) - 1), x_, X::set(target[0]));
    widen(x_, u_);
    for (int k = 0; k < kLanes; k += D::kWidth) {
      const D::V distance = (D::load(u_ + k) - D::set(middle_)) * D::set(1 / s_.tau);
      D::store(readers_.curve + k, polynomial_.curve(distance));
      if constexpr (Slope) D::store(readers_.slope + k, polynomial_.slope(distance));
    }
    for (double* lanes : {readers_.steps, readers_.tails, readers_.past}) std::fill_n(lanes, kLanes, 0.0);
  }

  static void widen(V v, double* out) {
    std::fill_n(out, kLanes, 0.0);
    X::accumulate(out, v);
  }
  // The lanes that hold sources, of those from j on that end at `end`.
  static unsigned lanes_of(int64_t j, int64_t end) {
    return end - j < kLanes ? (1u << (end - j)) - 1 : (1u << (kLanes - 1)) * 2 - 1;
  }

  // How many of the sources are at least as high.
  void count_steps(int64_t begin, int64_t end) {
    if (count_ <= kAlone) {
      for (int k = 0; k < count_; ++k) {
        const V own = X::set(readers_.target[k]);
        int above = 0;
        for (int64_t j = begin; j < end; j += kLanes) {
          above += __builtin_popcount(X::bits(X::greater_equal(X::load(v_ + j), own)) & lanes_of(j, end));
        }
        readers_.steps[k] += above;
      }
      return;
    }
    constexpr int kCounts = 4;  // one would wait for itself
    const V one = X::set(1);
    V above[kCounts];
    for (V& v : above) v = X::set(0);
    int64_t j = begin;
    for (; j + kCounts <= end; j += kCounts) {
      for (int k = 0; k < kCounts; ++k) {
        above[k] = X::add_where(X::greater_equal(X::set(v_[j + k]), x_), above[k], one);
      }
    }
    for (; j < end; ++j) above[0] = X::add_where(X::greater_equal(X::set(v_[j]), x_), above[0], one);
    X::accumulate(readers_.steps, (above[0] + above[1]) + (above[2] + above[3]));
  }

  // What lies past the knees: how many, how far, and the squares and cubes of how far. The cubic then takes sigma off.
  void take_off_past() {
    const V delta = X::set(s_.delta), origin = X::set(s_.origin), zero = X::set(0), one = X::set(1);
    alignas(64) double square[kLanes] = {}, cube[kLanes] = {};
    if (count_ <= kAlone) {
      for (int k = 0; k < count_; ++k) {
        const V own = X::set(readers_.target[k]);
        int tails = 0;
        lanes_.clear(k);
        V squares = zero, cubes = zero;
        for (int64_t run = knees_.begin; run < knees_.end; run += kRun * kLanes) {
          V past = zero;
          for (int64_t j = run; j < std::min(knees_.end, run + kRun * kLanes); j += kLanes) {
            const V t = X::load(v_ + j) - own;
            const unsigned beyond = X::bits(X::greater(t, delta)) & lanes_of(j, knees_.end);
            const V d = X::select(X::lanes(beyond), t - origin, zero), dd = d * d;
            tails += __builtin_popcount(beyond);
            past = past + d;
            squares = squares + dd;
            cubes = X::mul_add(dd, d, cubes);
          }
          X::accumulate(lanes_.lanes[0][k], past);
        }
        X::accumulate(lanes_.lanes[1][k], squares);
        X::accumulate(lanes_.lanes[2][k], cubes);
        readers_.tails[k] += tails;
      }
      lanes_.add_to(0, count_, readers_.past);
      lanes_.add_to(1, count_, square);
      lanes_.add_to(2, count_, cube);
    } else {
      V tails = zero, squares = zero, cubes = zero;
      for (int64_t run = knees_.begin; run < knees_.end; run += kRun) {
        V past = zero;
        for (int64_t j = run; j < std::min(knees_.end, run + kRun); ++j) {
          const V t = X::set(v_[j]) - x_;
          const auto beyond = X::greater(t, delta);
          const V d = X::select(beyond, t - origin, zero), dd = d * d;
          tails = X::add_where(beyond, tails, one);
          past = past + d;
          squares = squares + dd;
          cubes = X::mul_add(dd, d, cubes);
        }
        X::accumulate(readers_.past, past);
      }
      X::accumulate(readers_.tails, tails);
      X::accumulate(square, squares);
      X::accumulate(cube, cubes);
    }
    const double rate = 1 / s_.tau;
    const auto value = [&](const double* cubic, int k) {
      return D::set(cubic[0]) * D::load(readers_.tails + k) + D::set(cubic[1] * rate) * D::load(readers_.past + k) +
             D::set(cubic[2] * rate * rate) * D::load(square + k) +
             D::set(cubic[3] * rate * rate * rate) * D::load(cube + k);
    };
    for (int k = 0; k < kLanes; k += D::kWidth) {
      D::store(readers_.curve + k, D::load(readers_.curve + k) - value(cubic_.sigma, k));
      if constexpr (Slope) D::store(readers_.slope + k, D::load(readers_.slope + k) - value(cubic_.slope, k));
    }
  }

  // The pairs around the knees, one by one.
  void meet_pairs() {
    for (int64_t begin = knees_.begin; begin < knees_.end; begin += kBlock) {
      const int count = load_pairs(begin);
      if (count_ > kAlone) {
        rank_pairs<false, Slope, Where::kAnywhere, 1>(0, count, lowest_, s_, scratch_, readers_);
      } else {
        meet_alone(count);
      }
    }
    // They are among the higher ones already.
    const auto counted = static_cast<double>(knees_.merged ? 0 : knees_.end - knees_.begin);
    for (int k = 0; k < count_; ++k) readers_.steps[k] -= counted;
  }

  // A vector of sources at a time.
  void meet_alone(int sources) {
    const V delta = X::set(s_.delta), origin = X::set(s_.origin), zero = X::set(0);
    alignas(64) float exponential[kLanes];
    X::store(exponential, cell_exponential(x_ - X::set(lowest_), s_));
    for (int k = 0; k < count_; ++k) {
      const V own = X::set(readers_.target[k]), own_exponential = X::set(exponential[k]);
      int steps = 0, tails = 0;
      lanes_.clear(k);
      for (int run = 0; run < sources; run += kRun * kLanes) {
        V curve = zero, slopes = zero, past = zero;
        for (int j = run; j < std::min(sources, run + kRun * kLanes); j += kLanes) {
          const V ev = X::load(scratch_.band_exponential + j), t = X::load(scratch_.band + j) - own;
          const V value = sigma<float>(ev, own_exponential);
          const auto beyond = X::greater(t, delta);
          steps += __builtin_popcount(X::bits(X::greater_equal(t, zero)));
          tails += __builtin_popcount(X::bits(beyond));
          curve = X::add_unless(beyond, curve, value);
          past = X::add_where(beyond, past, t - origin);
          if constexpr (Slope) {
            slopes = X::add_unless(beyond, slopes, sigma_slope<float>(ev, own_exponential, value));
          }
        }
        X::accumulate(lanes_.lanes[0][k], curve);
        X::accumulate(lanes_.lanes[1][k], past);
        if constexpr (Slope) X::accumulate(lanes_.lanes[2][k], slopes);
      }
      readers_.steps[k] += steps;
      readers_.tails[k] += tails;
    }
    lanes_.add_to(0, count_, readers_.curve);
    lanes_.add_to(1, count_, readers_.past);
    if constexpr (Slope) lanes_.add_to(2, count_, readers_.slope);
  }

  // Puts together what the targets have read with what is the same for all: sources at least as high, in cells above;
  // sources past all knees, and how far.
  void finish(int64_t c, double* rank, double* slope) {
    const auto higher = static_cast<double>(knees_.merged ? 0 : first_[knees_.cell_end] - first_[c + 1]);
    const auto tail = static_cast<double>(sources_.n - first_[knees_.cell_end]);
    const double tail_sum = Smooth ? 0 : sources_.tail[knees_.cell_end];
    const double knee = grid_.at(grid_.edge[knees_.cell_end]);
    const D::V start = D::set(s_.exact_start), rho = D::set(s_.exact_rho), offset = D::set(s_.exact_offset);
    alignas(64) double value[kLanes], slopes[kLanes];
    for (int k = 0; k < kLanes; k += D::kWidth) {
      D::V sum = D::load(readers_.curve + k), gradient = D::set(0);
      if constexpr (Slope) gradient = D::load(readers_.slope + k) * D::set(1 / s_.tau);
      if constexpr (!Smooth) {
        const D::V tails = D::load(readers_.tails + k), all = tails + D::set(tail);
        // Scores may be far from 0: their difference comes first.
        const D::V beyond = (D::set(knee) - D::load(u_ + k)) - D::set(s_.exact_delta);
        const D::V past = D::load(readers_.past + k) + tails * D::set(static_cast<double>(s_.origin) - s_.exact_delta);
        sum = sum + start * (D::load(readers_.steps + k) + D::set(higher) - tails) +
              rho * (past + (D::set(tail_sum) + D::set(tail) * beyond)) + offset * all;
        gradient = gradient + rho * all;
      }
      D::store(value + k, sum);
      if constexpr (Slope) D::store(slopes + k, gradient);
    }
    for (int k = 0; k < count_; ++k) rank[k] = value[k];
    for (int k = 0; Slope && k < count_; ++k) slope[k] = slopes[k];
  }

  // Sums of up to kLanes targets, each of which met a vector of sources at a time: a vector of lanes each, in float64.
  struct LaneSums {
    alignas(64) double lanes[3][kLanes][kLanes];

    void clear(int target) {
      for (auto& sum : lanes) std::fill_n(sum[target], kLanes, 0.0);
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

  const Cells &sources_, &targets_;
  const Grid& grid_;
  const CellSeries& series_;
  const Settings<float>& s_;
  Scratch<float>& scratch_;
  const float* const v_;
  const uint32_t* const first_;
  const KneeCubic cubic_;
  Decays decays_;
  CellPolynomial<true, Slope> polynomial_;
  alignas(64) double sums_[kStride];
  // Of the cell that is read.
  Knees knees_;
  double middle_;
  float lowest_;
  int64_t loaded_;  // where the block begins that is in the scratch
  // Of the targets that read together.
  int count_;
  V x_;
  alignas(64) double u_[kLanes];
  Readers<float> readers_;
  LaneSums lanes_;
};

template <bool Smooth, bool Slope>
void rank_cells_as(const Cells& sources, const Cells& targets, const Grid& grid, const CellSeries& series,
                   int64_t begin, int64_t end, const Settings<float>& s, Scratch<float>& scratch, double* rank,
                   double* slope) {
  CellRanks<Smooth, Slope> ranks(sources, targets, grid, series, s, scratch);
  for (int64_t c = begin; c < end; ++c) ranks.read(c, rank, slope);
}

void rank_cells(const Cells& sources, const Cells& targets, const Grid& grid, const CellSeries& series, int64_t begin,
                int64_t end, const Settings<float>& s, Scratch<float>& scratch, double* rank, double* slope) {
  const auto run = s.surrogate == Surrogate::kSmooth ? slope ? rank_cells_as<true, true> : rank_cells_as<true, false>
                   : slope                           ? rank_cells_as<false, true>
                                                     : rank_cells_as<false, false>;
  run(sources, targets, grid, series, begin, end, s, scratch, rank, slope);
}

// ---- slopes ----

template <bool Smooth>
void slope_cells_as(const Cells& sources, const Cells& targets, const Grid& grid, const CellSeries& series,
                    int64_t begin, int64_t end, const Settings<float>& s, Scratch<float>& scratch, double scale,
                    const uint32_t* column, float* out) {
  using X = Vec<float>;
  using V = X::V;
  using D = Vec<double>;
  constexpr int kLanes = X::kWidth, kStride = Cells::kStride;
  constexpr int kVectors = 2;  // of targets that share what is loaded of a source
  constexpr int kRun = 8;      // of sources whose shares are summed in float
  const double rate = 1 / s.tau;
  const V delta = X::set(s.delta), origin = X::set(s.origin), rho_tau = X::set(s.rho_tau);
  // rho tau less the cubic of sigma', of the distance itself.
  const KneeCubic cubic = cubic_of(s);
  V flat[KneeCubic::kPoints];
  double power = 1;
  for (int m = 0; m < KneeCubic::kPoints; ++m) {
    flat[m] = X::set(static_cast<float>((m ? 0 : s.exact_rho * s.tau) - cubic.slope[m] * power));
    power *= rate;
  }
  CellPolynomial<false, true> polynomial;
  Decays decays(grid, s);
  alignas(64) double sums[kStride];

  for (int64_t c = begin; c < end; ++c) {
    const int64_t t_begin = targets.first[c], t_end = targets.first[c + 1];
    if (t_begin == t_end) continue;
    // Sources u whose knees u + delta lie around the cell.
    const int64_t from = grid.edge[c] - series.knee_last, to = grid.edge[c + 1] - 1 - series.knee;
    Knees knees;
    knees.cell = Smooth || from < 0 ? 0 : grid.cell_of(from);
    knees.cell_end = Smooth || to < 0 ? 0 : grid.cell_of(to) + 1;
    knees.begin = sources.first[knees.cell];
    knees.end = sources.first[knees.cell_end];
    knees.merged = knees.cell_end > c;
    knees.flat = !knees.merged && are_flat(s, grid.at(grid.edge[c + 1]) - grid.at(grid.edge[knees.cell]) + grid.guard);

    const double* const half = series.half[grid.level_of(c)];
    const double middle = grid.middle(c);
    if (knees.merged) {
      decays.join(kNoSums, 1, grid.edge[knees.cell_end] - grid.edge[c + 1], &sources.above[knees.cell_end * kStride],
                  sums);
      polynomial.expand(kNoSums, sums, half, nullptr, 0);
    } else {
      const int64_t stop = knees.flat ? knees.cell : knees.cell_end;
      const double* below = &sources.below[c * kStride];
      if (stop > 0) {
        decays.join(below, -1, grid.edge[c] - grid.edge[stop], &sources.below[stop * kStride], sums);
        below = sums;
      }
      polynomial.expand(below, &sources.above[(c + 1) * kStride], half, &sources.moment[c * Cells::kMomentStride], 0);
    }
    const V centre = X::set(static_cast<float>(middle));
    const float* const u = sources.value.data();
    const float* const w = sources.weight.data();
    int64_t loaded = -1;  // where the block of sources begins whose exponentials are in the scratch
    const auto load = [&](int64_t first, int64_t last) {
      if (loaded == first) return;
      loaded = first;
      for (int64_t j = first; j < last; j += kLanes) {
        X::store(scratch.band_exponential + (j - first), difference_exponential<float>(X::load(u + j), centre, s));
      }
    };
    const double tail = Smooth ? 0 : s.exact_rho * s.tau * sources.tail[knees.cell];
    for (int64_t i = t_begin; i < t_end; i += kVectors * kLanes) {
      alignas(64) double slope[kVectors * kLanes];
      V x[kVectors], ex[kVectors];
      for (int r = 0; r < kVectors; ++r) {
        // Beyond the cell: whatever comes next.
        x[r] = X::load(targets.value.data() + std::min(i + r * kLanes, t_end - 1));
        ex[r] = cell_exponential(centre - x[r], s);
        alignas(64) double lanes[kLanes];
        std::fill_n(lanes, kLanes, 0.0);
        X::accumulate(lanes, x[r]);
        for (int k = 0; k < kLanes; k += D::kWidth) {
          D::store(slope + r * kLanes + k,
                   polynomial.slope((D::load(lanes + k) - D::set(middle)) * D::set(rate)) + D::set(tail));
        }
      }
      for (int64_t run = knees.begin; run < knees.end; run += kRun) {
        const int64_t block = run - (run - knees.begin) % kBlock, last = std::min(knees.end, run + kRun);
        if (!knees.flat) load(block, std::min(knees.end, block + kBlock));
        V sum[kVectors];
        for (V& v : sum) v = X::set(0);
        for (int64_t j = run; j < last; ++j) {
          const V own = X::set(u[j]), weight = X::set(w[j]);
          if (knees.flat) {
            for (int r = 0; r < kVectors; ++r) {
              const V t = x[r] - own, d = t - origin;
              const V value = X::mul_add(X::mul_add(X::mul_add(flat[3], d, flat[2]), d, flat[1]), d, flat[0]);
              sum[r] = X::add_where(X::greater(t, delta), sum[r], weight * value);
            }
          } else {
            const V exponential = X::set(scratch.band_exponential[j - block]);
            for (int r = 0; r < kVectors; ++r) {
              const V pair = pair_slope<false, float>(x[r], ex[r], own, exponential, delta, rho_tau);
              sum[r] = X::mul_add(weight, pair, sum[r]);
            }
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
                                      join_cells_above, rank_cells,    slope_cells};

template <typename T>
constexpr Sorting<T> make_sorting() {
  return {keep_entries<T>,
          count_buckets<T>,
          deal_buckets<T>,
          sort<T>,
          sum_leaves<T>,
          join_below<T>,
          join_above<T>,
          rank_targets<T>,
          slope_targets<T>,
          spread_block<T>,
          sizeof(T) == 4 ? &kCellKernels : nullptr};
}

}  // namespace
