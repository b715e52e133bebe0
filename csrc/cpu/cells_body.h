// The sorted scan by cells, in the vectors of whichever instruction set includes this file (after sorted_body.h).
//
// Where scores spread over their range, dealing them to narrow cells is as good as sorting them. Over a span of
// CellPlan::kWidth tau everything smooth is a short polynomial around its middle: of the sources below and above, by
// the series; of those in the span, by the Taylor series of sigma and their moments. Neighbouring targets, a party,
// read together
//
//     the polynomials of their span   all sources whose sigma counts, and the lines of those far past the knees
//     the sources of their own cells  how many are at least as high: the steps
//     the cells of their knees        one by one, decided exactly as by the pairwise kernels
//     the moments of what lies between these and the lines
//
// and nothing depends on an order within cells. Spans of a level being alike, what the sums have to be multiplied with
// from one to the next is a table.
//
// For float alone: double would need twice the terms, and is there for gradient checks.

namespace {

constexpr int kOwnTerms = 10;

// What a source of the target's own span gives, by the Taylor series of sigma at 0.
struct OwnSpan {
  // Of x^i y^r in sigma(y - x) and in its slope, x the target, y the source.
  alignas(64) double sigmoid[kOwnTerms][CellSeries::kTerms] = {}, slope[kOwnTerms][CellSeries::kTerms] = {};

  constexpr OwnSpan() {
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

// A vector of floats as doubles.
Vec<double>::V widened(const float* v) {
  using X = Vec<double>;
  alignas(64) double lane[X::kWidth];
  for (int k = 0; k < X::kWidth; ++k) lane[k] = static_cast<double>(v[k]);
  return X::load(lane);
}

// ---- dealing ----

void split_bucket(const Entry<float>* entry, int64_t n, const Grid& grid, int64_t bucket, uint32_t begin, float* value,
                  uint32_t* column, uint32_t* first) {
  const int level = grid.level[bucket];
  Buckets<float> cells = grid.buckets;
  cells.shift = Grid::kLevels - level;
  cells.first = static_cast<uint32_t>(bucket) << level;
  const Bucketing<float> cell(cells);
  // Most buckets are small enough to be told apart once.
  constexpr int64_t kMany = 1024;
  uint8_t of[kMany];
  const auto for_cells = [&](const auto& body) {
    if (n > kMany) return for_buckets(entry, n, cell, body);
    for (int64_t j = 0; j < n; ++j) body(j, of[j]);
  };
  for (int64_t j = 0; n <= kMany && j < n; ++j) of[j] = static_cast<uint8_t>(cell.of(entry[j].value));
  uint32_t place[Grid::kUnits] = {};
  for_cells([&](int64_t, unsigned own) { ++place[own]; });
  first += grid.first_cell[bucket];
  uint32_t at = begin;
  for (int c = 0; c < 1 << level; ++c) {
    first[c] = at;
    at += place[c];
    place[c] = first[c];
  }
  for_cells([&](int64_t j, unsigned own) {
    const uint32_t to = place[own]++;
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

// ---- the sums of spans ----

// The moments of a whole span.
const double* moments_of(const Cells& cells, const Grid& grid, int64_t span) {
  return &cells.moment[(grid.cell[span + 1] - 1) * Cells::kMoments];
}

template <bool Weighted>
void sum_spans_as(Cells& cells, const Grid& grid, const CellSeries& series, double tau, int64_t begin, int64_t end) {
  using X = Vec<double>;
  constexpr int kStride = Cells::kStride, kMoments = Cells::kMoments, kVectors = kStride / X::kWidth;
  static constexpr Taylor<float> taylor;
  const double rate = 1 / tau;
  for (int64_t span = begin; span < end; ++span) {
    const X::V middle = X::set(grid.middle(span));
    alignas(64) double moment[kMoments] = {};
    for (int64_t c = grid.cell[span]; c < grid.cell[span + 1]; c += Grid::kShared) {
      const int64_t end = std::min<int64_t>(c + Grid::kShared, grid.cell[span + 1]);
      const int64_t from = cells.first[c], count = cells.first[end] - from;
      const float* const v = cells.value.data() + from;
      const float* const w = Weighted ? cells.weight.data() + from : nullptr;
      X::V sum[kMoments];
      for (X::V& m : sum) m = X::set(0);
      for (int64_t j = 0; j < count; j += X::kWidth) {
        // Lanes beyond these cells hold what comes next, and weigh nothing.
        X::V power = Weighted ? widened(w + j) : X::set(1);
        if (count - j < X::kWidth) power = X::select(X::lanes((1u << (count - j)) - 1), power, X::set(0));
        const X::V y = (widened(v + j) - middle) * X::set(rate);
        for (int m = 0; m < kMoments; ++m) {
          sum[m] = sum[m] + power;
          power = power * y;
        }
      }
      for (int m = 0; count && m < kMoments; m += X::kWidth) {
        alignas(64) double own[X::kWidth];
        X::sums(sum + m, own);
        X::store(moment + m, X::load(moment + m) + X::load(own));
      }
      std::copy_n(moment, kMoments, &cells.moment[(end - 1) * kMoments]);
    }
    const double* const half = series.half[grid.span_level(span)];
    double* const below = &cells.below[(span + 1) * kStride];
    double* const above = &cells.above[span * kStride];
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

void sum_spans(Cells& cells, const Grid& grid, const CellSeries& series, double tau, int64_t begin, int64_t end) {
  cells.weight.empty() ? sum_spans_as<false>(cells, grid, series, tau, begin, end)
                       : sum_spans_as<true>(cells, grid, series, tau, begin, end);
}

// own += whole * neighbour
void add_span(const double* whole, const double* neighbour, double* own) {
  using X = Vec<double>;
  for (int k = 0; k < Cells::kStride; k += X::kWidth) {
    X::store(own + k, X::mul_add(X::load(whole + k), X::load(neighbour + k), X::load(own + k)));
  }
}

void join_spans_below(Cells& cells, const Grid& grid, const CellSeries& series) {
  constexpr int kStride = Cells::kStride;
  const bool weighted = !cells.weight.empty();
  std::fill_n(cells.below.data(), kStride, 0.0);
  if (weighted) cells.tail[0] = 0;
  KahanSum weights;
  for (int64_t span = 0; span < grid.spans(); ++span) {
    double* const own = &cells.below[(span + 1) * kStride];
    add_span(series.whole[grid.span_level(span)], own - kStride, own);
    if (weighted) {
      weights.add(moments_of(cells, grid, span)[0]);
      cells.tail[span + 1] = weights.sum;
    }
  }
}

void join_spans_above(Cells& cells, const Grid& grid, const CellSeries& series, double tau) {
  constexpr int kStride = Cells::kStride;
  const bool weighted = !cells.weight.empty();
  const int64_t size = grid.spans();
  std::fill_n(&cells.above[size * kStride], kStride, 0.0);
  if (!weighted) cells.tail[size] = 0;
  KahanSum sum;
  for (int64_t span = size - 1; span >= 0; --span) {
    double* const own = &cells.above[span * kStride];
    add_span(series.whole[grid.span_level(span)], own + kStride, own);
    if (!weighted) {
      const double* const moment = moments_of(cells, grid, span);
      const double width = static_cast<double>(grid.span_edge(span + 1) - grid.span_edge(span)) * grid.unit;
      const auto higher = static_cast<double>(cells.n - cells.first[grid.cell[span + 1]]);
      sum.add(higher * width + moment[0] * width / 2 + moment[1] * tau);
      cells.tail[span] = sum.sum;
    }
  }
}

// ---- what targets read ----

// The polynomials of one span, of x = (target - middle) / tau.
template <bool Curve, bool Slope>
class SpanPolynomial {
  using X = Vec<double>;
  static constexpr int kTerms = CellSeries::kTerms;

 public:
  // below, above: sums at the lower and upper edge. half: of the span. own: moments, or null. count: the sources above.
  void expand(const double* below, const double* above, const double* half, const double* own, double count) {
    static constexpr OwnSpan own_span;
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
      for (int r = 0; own && r < Cells::kMoments; ++r) {
        const X::V moment = X::set(own[r]);
        if constexpr (Curve) curve = X::mul_add(moment, X::load(own_span.sigmoid[r] + m), curve);
        if constexpr (Slope) slope = X::mul_add(moment, X::load(own_span.slope[r] + m), slope);
      }
      // A source below the target: e^(-k x); one above: 1 less the series, e^(k x).
      alignas(64) static constexpr double kSigns[kTerms] = {1, -1, 1, -1, 1, -1, 1, -1};
      const X::V sign = X::load(kSigns + m);
      if constexpr (Curve) X::store(curve_ + m, X::mul_add(lower, sign, curve) - upper);
      if constexpr (Slope) X::store(slope_ + m, X::mul_add(lower_slope, sign, slope) + upper_slope);
    }
    if constexpr (Curve) curve_[0] += count;
  }

  // What sources add that are past the knees of all targets, whether their sigma is in here or not.
  void add_line(double constant, double rate) {
    if constexpr (Curve) {
      curve_[0] += constant;
      curve_[1] -= rate;
    }
    if constexpr (Slope) slope_[0] += rate;
  }
  // And what those with these moments do, by the table of their span.
  using Table = double[CellSeries::kKneeTerms][kTerms];
  void add_past(const double* moment, const Table& curve, const Table& slope) {
    for (int m = 0; m < kTerms; m += X::kWidth) {
      X::V of_curve = X::load(curve_ + m), of_slope = X::load(slope_ + m);
      for (int r = 0; r < CellSeries::kKneeTerms; ++r) {
        const X::V own = X::set(moment[r]);
        if constexpr (Curve) of_curve = X::mul_add(own, X::load(curve[r] + m), of_curve);
        if constexpr (Slope) of_slope = X::mul_add(own, X::load(slope[r] + m), of_slope);
      }
      if constexpr (Curve) X::store(curve_ + m, of_curve);
      if constexpr (Slope) X::store(slope_ + m, of_slope);
    }
  }

  X::V curve(X::V x) const { return at(curve_, x); }
  X::V slope(X::V x) const { return at(slope_, x); }

 private:
  static X::V at(const double* coefficient, X::V x) {
    X::V p = X::set(coefficient[kTerms - 1]);
    for (int m = kTerms - 2; m >= 0; --m) p = X::mul_add(p, x, X::set(coefficient[m]));
    return p;
  }

  alignas(64) double curve_[kTerms] = {}, slope_[kTerms] = {};
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

// What targets read where no source lies between them and their knees: a difference of sums would leave a residue, and
// no slope has to be exactly none.
alignas(64) constexpr double kNoSums[Cells::kStride] = {};

// Where the sources around the knees of a cell's targets lie. Where spans are wide the polynomials have all of them,
// and what lies past a knee is made good: see CellSeries::past. Else they have none of them.
struct Knees {
  int64_t cell, cell_end;  // in cells
  int64_t begin, end;      // the sources
  bool merged;             // some of them may lie around the steps as well
  bool close;              // none is further than CellSeries::kClose past a knee
};

bool is_close(int64_t units, const Grid& grid, const Settings<float>& s) {
  return static_cast<double>(units) * grid.unit + 2 * grid.guard - s.exact_delta <= CellSeries::kClose * s.tau;
}

// Targets that read together, and the cells of a span that they come from.
struct Party {
  int64_t begin = 0, end = 0;  // into the targets
  int64_t cell = -1, cell_end = 0;

  int count() const { return static_cast<int>(end - begin); }
  bool same_cells(const Party& other) const { return cell == other.cell && cell_end == other.cell_end; }

  // The party after this one, of up to `most`; `last` is where the cells of the span end. Each meets the sources of all
  // cells: where these are many, another cell has to wait.
  Party next(const Cells& targets, const Cells& sources, int64_t last, int most) const {
    constexpr uint32_t kMostSources = 48;
    Party p;
    p.begin = end;
    p.cell = std::max<int64_t>(cell, 0);
    while (targets.first[p.cell + 1] <= end) ++p.cell;
    p.cell_end = p.cell + 1;
    while (targets.first[p.cell_end] < p.begin + most && p.cell_end < last &&
           sources.first[p.cell_end + 1] - sources.first[p.cell] <= kMostSources)
      ++p.cell_end;
    p.end = std::min<int64_t>(targets.first[p.cell_end], p.begin + most);
    while (targets.first[p.cell_end - 1] >= p.end) --p.cell_end;
    return p;
  }
};

// A party and its knees, found for several parties before any reads: each would wait for these steps.
struct Planned {
  Party party;
  Knees knees;
};
constexpr int kPlan = 16;

// Plans the parties of up to `most` after this one, in cells that end at `last`. Returns how many.
template <typename Find>
int plan_parties(Party party, const Cells& targets, const Cells& sources, int64_t last, int most, const Find& knees_of,
                 Planned* plan) {
  int count = 0;
  while (count < kPlan && party.end < targets.first[last]) {
    party = party.next(targets, sources, last, most);
    plan[count++] = {party, knees_of(party)};
  }
  return count;
}

// The polynomial of a pair past its flat knee.
template <int Terms>
Vec<float>::V polynomial_of(const Vec<float>::V* coefficient, Vec<float>::V z) {
  using X = Vec<float>;
  X::V p = coefficient[Terms - 1];
  for (int m = Terms - 2; m >= 0; --m) p = X::mul_add(p, z, coefficient[m]);
  return p;
}

// ---- ranks ----

// Reads the ranks of the targets of cells, and their slopes.
template <bool Smooth, bool Slope>
class CellRanks {
  using X = Vec<float>;
  using V = X::V;
  using D = Vec<double>;
  static constexpr int kLanes = X::kWidth, kStride = Cells::kStride, kMoments = Cells::kMoments;
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
        decays_(grid, s) {}

  void read(int64_t span, double* rank, double* slope, double* rank_target) {
    const int64_t first = grid_.cell[span], last = grid_.cell[span + 1];
    if (targets_.first[first] == targets_.first[last]) return;
    if (grid_.wide) expand_wide(span);
    party_ = {targets_.first[first], targets_.first[first], first, first};
    while (party_.end < targets_.first[last]) {
      const auto find = [&](const Party& party) { return knees_of(party); };
      const int planned = plan_parties(party_, targets_, sources_, last, kLanes, find, plan_);
      for (int at = 0; at < planned; ++at) read(span, plan_[at], rank, slope, rank_target);
    }
  }

 private:
  void read(int64_t span, const Planned& planned, double* rank, double* slope, double* rank_target) {
    const bool same = planned.party.same_cells(party_);
    party_ = planned.party;
    knees_ = planned.knees;
    if (!same) {
      if (grid_.wide) {
        polynomial_ = of_span_;
        if constexpr (!Smooth) add_past(span);
      } else {
        expand(span);
      }
      lowest_ = targets_.value[party_.begin];
      loaded_ = -1;
    }
    load();
    if constexpr (!Smooth) {
      count_reached(targets_, targets_.n - targets_.first[party_.cell_end], reached_);
      put(reached_, rank_target + party_.begin);
      if (!knees_.merged) count_reached(sources_, 0, readers_.steps);
      if (knees_.begin < knees_.end) meet_knees();
    }
    finish(rank + party_.begin, Slope ? slope + party_.begin : nullptr);
  }

  Knees knees_of(const Party& party) const {
    const int64_t cells = grid_.cells(), units = grid_.units();
    const int32_t low = grid_.edge[party.cell], high = grid_.edge[party.cell_end];
    const int64_t from = low + series_.knee, to = high - 1 + series_.knee_last;
    Knees k;
    k.cell = Smooth || from >= units ? cells : grid_.cell_of(from);
    k.cell_end = Smooth || to >= units ? cells : grid_.wide ? grid_.shared_end(to) : grid_.cell_of(to) + 1;
    k.begin = first_[k.cell];
    k.end = first_[k.cell_end];
    k.merged = k.cell < party.cell_end;
    k.close = is_close(grid_.edge[k.cell_end] - low, grid_, s_);
    return k;
  }

  // The polynomial of a wide span: sigma of all up to the spans of its knees, and the lines of those above.
  void expand_wide(int64_t span) {
    const int64_t spans = grid_.spans(), stop = Smooth ? spans : std::min(spans, span + series_.far + 1);
    const double* above = &sources_.above[(span + 1) * kStride];
    middle_ = grid_.middle(span);
    const uint32_t between = first_[grid_.cell[stop]] - first_[grid_.cell[span + 1]];
    if (!between) {
      above = kNoSums;
    } else if (stop < spans) {
      decays_.join(above, -1, grid_.span_edge(stop) - grid_.span_edge(span + 1), &sources_.above[stop * kStride],
                   sums_);
      above = sums_;
    }
    of_span_.expand(&sources_.below[span * kStride], above, series_.half[0], moments_of(sources_, grid_, span),
                    static_cast<double>(between));
    if constexpr (!Smooth) add_lines(of_span_, stop);
  }

  // The polynomial of a span that is a cell, without the sources around its knees.
  void expand(int64_t c) {
    const double* const half = series_.half[grid_.span_level(c)];
    middle_ = grid_.middle(c);
    if (knees_.merged) {
      decays_.join(kNoSums, 1, grid_.edge[c] - grid_.edge[knees_.cell], &sources_.below[knees_.cell * kStride], sums_);
      polynomial_.expand(sums_, kNoSums, half, nullptr, 0);
    } else {
      const double* above = &sources_.above[(c + 1) * kStride];
      const uint32_t between = first_[knees_.cell] - first_[c + 1];
      if (!between) {
        above = kNoSums;
      } else if (knees_.cell < grid_.cells()) {
        decays_.join(above, -1, grid_.edge[knees_.cell] - grid_.edge[c + 1], &sources_.above[knees_.cell * kStride],
                     sums_);
        above = sums_;
      }
      polynomial_.expand(&sources_.below[c * kStride], above, half, moments_of(sources_, grid_, c),
                         static_cast<double>(between));
    }
    if constexpr (!Smooth) add_lines(polynomial_, knees_.cell_end);
  }

  // What the sources of spans from `stop` on add, all of them past the knees.
  void add_lines(SpanPolynomial<true, Slope>& polynomial, int64_t stop) const {
    const auto count = static_cast<double>(sources_.n - first_[grid_.cell[stop]]);
    // Scores may be far from 0: their difference comes first.
    const double distance = (grid_.span_at(stop) - middle_) - s_.exact_delta;
    polynomial.add_line(s_.exact_rho * (sources_.tail[stop] + count * distance) + s_.exact_offset * count,
                        s_.exact_rho * s_.tau * count);
  }

  // And what those between the knees of a cell and the lines of its wide span do.
  void add_past(int64_t span) {
    for (int64_t k = series_.near; k <= series_.far && span + k < grid_.spans(); ++k) {
      const int64_t first = grid_.cell[span + k], last = grid_.cell[span + k + 1];
      const int64_t from = std::max(first, knees_.cell_end);
      if (from >= last || first_[from] == first_[last]) continue;
      const double *const all = moments_of(sources_, grid_, span + k), *const before = all - (last - from) * kMoments;
      double moment[kMoments];
      for (int m = 0; m < kMoments; ++m) moment[m] = from > first ? all[m] - before[m] : all[m];
      const CellSeries::Shifted& shifted = series_.shifted[k - series_.near];
      polynomial_.add_past(moment, shifted.curve, shifted.slope);
    }
  }

  // Sources of the block at `begin`, with their exponentials around the lowest target, whose own is then 1: tied
  // targets would all repeat an error. Returns how many.
  int load_pairs(int64_t begin) {
    const int count = static_cast<int>(std::min<int64_t>(knees_.end - begin, kBlock));
    if (loaded_ == begin) return count;  // most cells have one block, which serves all their targets
    loaded_ = begin;
    for (int j = 0; j < count; j += kLanes) X::store(scratch_.active + j, X::load(v_ + begin + j));
    X::store(scratch_.active + count, X::set(-infinity<float>()));
    active_exponentials(scratch_.active, count, lowest_, s_, scratch_);
    return count;
  }

  // Takes the targets of the party, and what the polynomials say of them.
  void load() {
    const float* const target = targets_.value.data() + party_.begin;
    const int count = count_ = party_.count();
    readers_.target = target;
    readers_.count = count;
    x_ = X::load(target);  // the first one stands where there are no more
    if (count < kLanes) x_ = X::select(X::lanes((1u << count) - 1), x_, X::set(target[0]));
    X::widen(x_, u_);
    for (int k = 0; k < kLanes; k += D::kWidth) {
      const D::V distance = (D::load(u_ + k) - D::set(middle_)) * D::set(1 / s_.tau);
      D::store(readers_.curve + k, polynomial_.curve(distance));
      if constexpr (Slope) D::store(readers_.slope + k, polynomial_.slope(distance));
    }
    if (!grid_.wide) {
      for (double* lanes : {readers_.steps, readers_.tails, readers_.past}) std::fill_n(lanes, kLanes, 0.0);
    }
  }

  // The lanes that hold targets.
  void put(const double* lanes, double* out) const {
    int k = 0;
    for (; k + D::kWidth <= count_; k += D::kWidth) D::store(out + k, D::load(lanes + k));
    if (k < count_) D::store_first(out + k, count_ - k, D::load(lanes + k));
  }
  // The lanes that hold sources, of those from j on that end at `end`.
  static unsigned lanes_of(int64_t j, int64_t end) {
    return end - j < kLanes ? (1u << (end - j)) - 1 : (1u << (kLanes - 1)) * 2 - 1;
  }

  // reached[k] = how many scores in the cells of the party are at least as high as target k, and `above`, which are all
  // higher.
  void count_reached(const Cells& cells, int64_t above, double* reached) {
    const float* const v = cells.value.data();
    const int64_t begin = cells.first[party_.cell], end = cells.first[party_.cell_end];
    const auto higher = static_cast<double>(above);
    if (count_ <= kAlone) {
      for (int k = 0; k < count_; ++k) {
        const V own = X::set(readers_.target[k]);
        int count = 0;
        for (int64_t j = begin; j < end; j += kLanes) {
          count += __builtin_popcount(X::bits(X::greater_equal(X::load(v + j), own)) & lanes_of(j, end));
        }
        reached[k] = higher + count;
      }
      return;
    }
    constexpr int kCounts = 4;  // one would wait for itself
    const V one = X::set(1);
    V counts[kCounts];
    for (V& v : counts) v = X::set(0);
    // A few more are higher ones, each of which all count: cheaper than an odd number of rounds.
    const int64_t more = std::min(-(end - begin) & (kCounts - 1), cells.n - end), stop = end + more;
    int64_t j = begin;
    for (; j + kCounts <= stop; j += kCounts) {
      for (int k = 0; k < kCounts; ++k) {
        counts[k] = X::add_where(X::greater_equal(X::set(v[j + k]), x_), counts[k], one);
      }
    }
    for (; j < stop; ++j) counts[0] = X::add_where(X::greater_equal(X::set(v[j]), x_), counts[0], one);
    X::widen((counts[0] + counts[1]) + (counts[2] + counts[3]), reached);
    for (int k = 0; k < kLanes; k += D::kWidth)
      D::store(reached + k, D::load(reached + k) + D::set(higher - static_cast<double>(more)));
  }

  void meet_knees() {
    if (!grid_.wide) {
      meet_pairs();
    } else if (knees_.close) {
      meet_flat<CellSeries::kCloseTerms>(series_.close);
    } else {
      meet_flat<CellSeries::kKneeTerms>(series_.past);
    }
  }

  // What the sources around flat knees add that lie past them.
  template <int Terms>
  void meet_flat(const CellSeries::Past& past) {
    const V delta = X::set(s_.delta), origin = X::set(s_.origin), rate = X::set(s_.rate_hi), zero = X::set(0);
    V curve_of[Terms], slope_of[Terms];
    for (int m = 0; m < Terms; ++m) {
      curve_of[m] = X::set(past.curve[m]);
      slope_of[m] = X::set(past.slope[m]);
    }
    if (count_ <= kAlone) {
      for (int k = 0; k < count_; ++k) {
        const V own = X::set(readers_.target[k]);
        lanes_.clear(k);
        for (int64_t run = knees_.begin; run < knees_.end; run += kRun * kLanes) {
          V curve = zero, slope = zero;
          for (int64_t j = run; j < std::min(knees_.end, run + kRun * kLanes); j += kLanes) {
            const V t = X::load(v_ + j) - own, z = (t - origin) * rate;
            const auto beyond = X::lanes(X::bits(X::greater(t, delta)) & lanes_of(j, knees_.end));
            curve = X::add_where(beyond, curve, polynomial_of<Terms>(curve_of, z));
            if constexpr (Slope) slope = X::add_where(beyond, slope, polynomial_of<Terms>(slope_of, z));
          }
          X::accumulate(lanes_.lanes[0][k], curve);
          if constexpr (Slope) X::accumulate(lanes_.lanes[1][k], slope);
        }
      }
      lanes_.add_to(0, count_, readers_.curve);
      if constexpr (Slope) lanes_.add_to(1, count_, readers_.slope);
      return;
    }
    for (int64_t run = knees_.begin; run < knees_.end; run += kRun) {
      V curve = zero, slope = zero;
      for (int64_t j = run; j < std::min(knees_.end, run + kRun); ++j) {
        const V t = X::set(v_[j]) - x_, z = (t - origin) * rate;
        const auto beyond = X::greater(t, delta);
        curve = X::add_where(beyond, curve, polynomial_of<Terms>(curve_of, z));
        if constexpr (Slope) slope = X::add_where(beyond, slope, polynomial_of<Terms>(slope_of, z));
      }
      X::accumulate(readers_.curve, curve);
      if constexpr (Slope) X::accumulate(readers_.slope, slope);
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
          const V ev = X::load(scratch_.active_exponential + j), t = X::load(scratch_.active + j) - own;
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

  // Puts together what the targets have read with the steps of the sources in cells above.
  void finish(double* rank, double* slope) {
    const auto higher = static_cast<double>(knees_.merged ? 0 : first_[knees_.cell_end] - first_[party_.cell_end]);
    const D::V start = D::set(s_.exact_start), rho = D::set(s_.exact_rho), offset = D::set(s_.exact_offset);
    alignas(64) double value[kLanes], slopes[kLanes];
    for (int k = 0; k < kLanes; k += D::kWidth) {
      D::V sum = D::load(readers_.curve + k), gradient = D::set(0);
      if constexpr (Slope) gradient = D::load(readers_.slope + k) * D::set(1 / s_.tau);
      if (!Smooth && grid_.wide) {  // the curve has the rest
        sum = sum + start * (D::load(readers_.steps + k) + D::set(higher));
      } else if (!Smooth) {
        const D::V tails = D::load(readers_.tails + k);
        const D::V past = D::load(readers_.past + k) + tails * D::set(static_cast<double>(s_.origin) - s_.exact_delta);
        sum = sum + start * (D::load(readers_.steps + k) + D::set(higher) - tails) + rho * past + offset * tails;
        gradient = gradient + rho * tails;
      }
      D::store(value + k, sum);
      if constexpr (Slope) D::store(slopes + k, gradient);
    }
    put(value, rank);
    if constexpr (Slope) put(slopes, slope);
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
  Decays decays_;
  SpanPolynomial<true, Slope> of_span_, polynomial_;  // of a wide span, and as a cell has it
  alignas(64) double sums_[kStride];
  Knees knees_;
  double middle_;  // of the span that is read
  float lowest_;
  int64_t loaded_;  // where the block begins that is in the scratch
  Planned plan_[kPlan];
  Party party_;
  int count_;
  V x_;
  alignas(64) double u_[kLanes], reached_[kLanes];
  Readers<float> readers_;
  LaneSums lanes_;
};

template <bool Smooth, bool Slope>
void rank_cells_as(const Cells& sources, const Cells& targets, const Grid& grid, const CellSeries& series,
                   int64_t begin, int64_t end, const Settings<float>& s, Scratch<float>& scratch, double* rank,
                   double* slope, double* rank_target) {
  CellRanks<Smooth, Slope> ranks(sources, targets, grid, series, s, scratch);
  for (int64_t span = begin; span < end; ++span) ranks.read(span, rank, slope, rank_target);
}

void rank_cells(const Cells& sources, const Cells& targets, const Grid& grid, const CellSeries& series, int64_t begin,
                int64_t end, const Settings<float>& s, Scratch<float>& scratch, double* rank, double* slope,
                double* rank_target) {
  const auto run = s.surrogate == Surrogate::kSmooth ? slope ? rank_cells_as<true, true> : rank_cells_as<true, false>
                   : slope                           ? rank_cells_as<false, true>
                                                     : rank_cells_as<false, false>;
  run(sources, targets, grid, series, begin, end, s, scratch, rank, slope, rank_target);
}

// ---- slopes ----

// Reads the slopes of the targets of cells, among weighted sources.
template <bool Smooth>
class CellSlopes {
  using X = Vec<float>;
  using V = X::V;
  using D = Vec<double>;
  static constexpr int kLanes = X::kWidth, kStride = Cells::kStride, kMoments = Cells::kMoments;
  static constexpr int kVectors = 2;  // of targets that share what is loaded of a source
  static constexpr int kRun = 8;      // of sources whose shares are summed in float

 public:
  CellSlopes(const Cells& sources, const Cells& targets, const Grid& grid, const CellSeries& series,
             const Settings<float>& s, Scratch<float>& scratch)
      : sources_(sources),
        targets_(targets),
        grid_(grid),
        series_(series),
        s_(s),
        scratch_(scratch),
        u_(sources.value.data()),
        w_(sources.weight.data()),
        first_(sources.first.data()),
        decays_(grid, s) {}

  void read(int64_t span, double scale, float* out) {
    const int64_t first = grid_.cell[span], last = grid_.cell[span + 1];
    if (targets_.first[first] == targets_.first[last]) return;
    middle_ = grid_.middle(span);
    if (grid_.wide) expand_wide(span);
    party_ = {targets_.first[first], targets_.first[first], first, first};
    while (party_.end < targets_.first[last]) {
      const auto find = [&](const Party& party) { return knees_of(party); };
      const int planned = plan_parties(party_, targets_, sources_, last, kVectors * kLanes, find, plan_);
      for (int at = 0; at < planned; ++at) read(span, plan_[at], scale, out);
    }
  }

 private:
  void read(int64_t span, const Planned& planned, double scale, float* out) {
    const bool same = planned.party.same_cells(party_);
    party_ = planned.party;
    knees_ = planned.knees;
    if (!same) {
      if (grid_.wide) {
        polynomial_ = of_span_;
        if constexpr (!Smooth) add_past(span);
      } else {
        expand(span);
      }
      loaded_ = -1;
    }
    party_.count() > kLanes ? meet<kVectors>() : meet<1>();
    const uint32_t* const column = targets_.column.data() + party_.begin;
    for (int k = 0; k < party_.count(); ++k) out[column[k]] = static_cast<float>(slope_[k] * scale);
  }

  // Sources u whose knees u + delta lie around the cells of the party.
  Knees knees_of(const Party& party) const {
    const int32_t low = grid_.edge[party.cell], high = grid_.edge[party.cell_end];
    const int64_t from = low - series_.knee_last, to = high - 1 - series_.knee;
    Knees k;
    k.cell = Smooth || from < 0 ? 0 : grid_.wide ? grid_.shared_begin(from) : grid_.cell_of(from);
    k.cell_end = Smooth || to < 0 ? 0 : grid_.cell_of(to) + 1;
    k.begin = first_[k.cell];
    k.end = first_[k.cell_end];
    k.merged = k.cell_end > party.cell;
    k.close = is_close(high - grid_.edge[k.cell], grid_, s_);
    return k;
  }

  void expand_wide(int64_t span) {
    const int64_t stop = Smooth ? 0 : std::max<int64_t>(0, span - series_.far);
    const double* below = &sources_.below[span * kStride];
    if (first_[grid_.cell[stop]] == first_[grid_.cell[span]]) {
      below = kNoSums;
    } else if (stop > 0) {
      decays_.join(below, -1, grid_.span_edge(span) - grid_.span_edge(stop), &sources_.below[stop * kStride], sums_);
      below = sums_;
    }
    of_span_.expand(below, &sources_.above[(span + 1) * kStride], series_.half[0], moments_of(sources_, grid_, span),
                    0);
    if constexpr (!Smooth) add_lines(of_span_, stop);
  }

  void expand(int64_t c) {
    const double* const half = series_.half[grid_.span_level(c)];
    if (knees_.merged) {
      decays_.join(kNoSums, 1, grid_.edge[knees_.cell_end] - grid_.edge[c + 1],
                   &sources_.above[knees_.cell_end * kStride], sums_);
      polynomial_.expand(kNoSums, sums_, half, nullptr, 0);
    } else {
      const double* below = &sources_.below[c * kStride];
      if (first_[knees_.cell_end] == first_[c]) {
        below = kNoSums;
      } else if (knees_.cell_end > 0) {
        decays_.join(below, -1, grid_.edge[c] - grid_.edge[knees_.cell_end], &sources_.below[knees_.cell_end * kStride],
                     sums_);
        below = sums_;
      }
      polynomial_.expand(below, &sources_.above[(c + 1) * kStride], half, moments_of(sources_, grid_, c), 0);
    }
    if constexpr (!Smooth) add_lines(polynomial_, knees_.cell);
  }

  // What the sources of spans below `stop` add, whose knees are all lower.
  void add_lines(SpanPolynomial<false, true>& polynomial, int64_t stop) const {
    polynomial.add_line(0, s_.exact_rho * s_.tau * sources_.tail[stop]);
  }

  // And what those between these lines and the sources around the knees do.
  void add_past(int64_t span) {
    for (int64_t k = series_.near; k <= series_.far && k <= span; ++k) {
      const int64_t first = grid_.cell[span - k], to = std::min<int64_t>(grid_.cell[span - k + 1], knees_.cell);
      if (to <= first || first_[first] == first_[to]) continue;
      const CellSeries::Shifted& shifted = series_.shifted[k - series_.near];
      polynomial_.add_past(&sources_.moment[(to - 1) * kMoments], shifted.curve, shifted.mirrored);
    }
  }

  // The exponentials of the block of sources at `begin`; most cells have one block, which serves all their targets.
  void load(int64_t begin) {
    if (loaded_ == begin) return;
    loaded_ = begin;
    const int64_t end = std::min(knees_.end, begin + kBlock);
    const V centre = X::set(static_cast<float>(middle_));
    for (int64_t j = begin; j < end; j += kLanes) {
      X::store(scratch_.active_exponential + (j - begin), difference_exponential<float>(X::load(u_ + j), centre, s_));
    }
  }

  // Fills slope_ for the party.
  template <int Vectors>
  void meet() {
    const double rate = 1 / s_.tau;
    V x[Vectors];
    for (int r = 0; r < Vectors; ++r) {
      // Beyond the party: whatever comes next.
      const float* const own = targets_.value.data() + party_.begin + r * kLanes;
      x[r] = X::load(own);
      for (int k = 0; k < kLanes; k += D::kWidth) {
        D::store(slope_ + r * kLanes + k, polynomial_.slope((widened(own + k) - D::set(middle_)) * D::set(rate)));
      }
    }
    if (knees_.begin == knees_.end) return;
    if (!grid_.wide) {
      meet_pairs<Vectors>(x);
    } else if (knees_.close) {
      meet_flat<CellSeries::kCloseTerms, Vectors>(x, series_.close);
    } else {
      meet_flat<CellSeries::kKneeTerms, Vectors>(x, series_.past);
    }
  }

  template <int Terms, int Vectors>
  void meet_flat(const V* x, const CellSeries::Past& past) {
    const V delta = X::set(s_.delta), origin = X::set(s_.origin), rate = X::set(s_.rate_hi);
    V slope_of[Terms];
    for (int m = 0; m < Terms; ++m) slope_of[m] = X::set(past.slope[m]);
    for (int64_t run = knees_.begin; run < knees_.end; run += kRun) {
      V sum[Vectors];
      for (V& v : sum) v = X::set(0);
      for (int64_t j = run; j < std::min(knees_.end, run + kRun); ++j) {
        const V own = X::set(u_[j]), weight = X::set(w_[j]);
        for (int r = 0; r < Vectors; ++r) {
          const V t = x[r] - own, z = (t - origin) * rate;
          sum[r] = X::add_product_where(X::greater(t, delta), sum[r], weight, polynomial_of<Terms>(slope_of, z));
        }
      }
      for (int r = 0; r < Vectors; ++r) X::accumulate(slope_ + r * kLanes, sum[r]);
    }
  }

  template <int Vectors>
  void meet_pairs(const V* x) {
    const V delta = X::set(s_.delta), rho_tau = X::set(s_.rho_tau), centre = X::set(static_cast<float>(middle_));
    V ex[Vectors];
    for (int r = 0; r < Vectors; ++r) ex[r] = cell_exponential(centre - x[r], s_);
    for (int64_t run = knees_.begin; run < knees_.end; run += kRun) {
      const int64_t block = run - (run - knees_.begin) % kBlock;
      load(block);
      V sum[Vectors];
      for (V& v : sum) v = X::set(0);
      for (int64_t j = run; j < std::min(knees_.end, run + kRun); ++j) {
        const V own = X::set(u_[j]), weight = X::set(w_[j]);
        const V exponential = X::set(scratch_.active_exponential[j - block]);
        for (int r = 0; r < Vectors; ++r) {
          const V pair = pair_slope<false, float>(x[r], ex[r], own, exponential, delta, rho_tau);
          sum[r] = X::mul_add(weight, pair, sum[r]);
        }
      }
      for (int r = 0; r < Vectors; ++r) X::accumulate(slope_ + r * kLanes, sum[r]);
    }
  }

  const Cells &sources_, &targets_;
  const Grid& grid_;
  const CellSeries& series_;
  const Settings<float>& s_;
  Scratch<float>& scratch_;
  const float *const u_, *const w_;
  const uint32_t* const first_;
  Decays decays_;
  SpanPolynomial<false, true> of_span_, polynomial_;  // of a wide span, and as a cell has it
  alignas(64) double sums_[kStride];
  double middle_;  // of the span that is read
  Planned plan_[kPlan];
  Party party_;
  Knees knees_;
  int64_t loaded_;  // where the block of sources begins whose exponentials are in the scratch
  alignas(64) double slope_[kVectors * kLanes];  // of the targets that read together
};

template <bool Smooth>
void slope_cells_as(const Cells& sources, const Cells& targets, const Grid& grid, const CellSeries& series,
                    int64_t begin, int64_t end, const Settings<float>& s, Scratch<float>& scratch, double scale,
                    float* out) {
  CellSlopes<Smooth> slopes(sources, targets, grid, series, s, scratch);
  for (int64_t span = begin; span < end; ++span) slopes.read(span, scale, out);
}

void slope_cells(const Cells& sources, const Cells& targets, const Grid& grid, const CellSeries& series, int64_t begin,
                 int64_t end, const Settings<float>& s, Scratch<float>& scratch, double scale, float* out) {
  const auto run = s.surrogate == Surrogate::kSmooth ? slope_cells_as<true> : slope_cells_as<false>;
  run(sources, targets, grid, series, begin, end, s, scratch, scale, out);
}

constexpr CellKernels kCellKernels = {split_buckets,    sum_spans,  join_spans_below,
                                      join_spans_above, rank_cells, slope_cells};

template <typename T>
constexpr Sorting<T> make_sorting() {
  if constexpr (sizeof(T) == 8) return {prune_entries<T>, count_buckets<T>, scatter_buckets<T>, sort<T>};
  return {prune_entries<T>, count_buckets<T>, scatter_buckets<T>, sort<T>,         sum_leaves<T>, join_below<T>,
          join_above<T>,    rank_targets<T>,  slope_targets<T>,   spread_block<T>, &kCellKernels};
}

}  // namespace
