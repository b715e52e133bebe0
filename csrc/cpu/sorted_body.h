// The kernels of the sorted scan, in the vectors of whichever instruction set includes this file.
//
// On a half line the sigmoid is a short sum of exponentials (series.h), and a sum of e^(-k |v - u| / tau) over all v on
// one side of u is the sum at any other point times a power of a decay. So the sources v are sorted and cut into leaves
// of equal size; where leaves meet, the sums over all sources below and above are kept. A target u reads
//
//     the sources below its own leaf                one series
//     its own leaf, and whatever else is near       pair by pair
//     from there to the leaf of the knee u + delta  a count less the series of both ends
//     the leaf of the knee                          pair by pair
//     the sources above that                        a count and a sum
//
// Neighbouring targets do so together. Series are float64: their coefficients alternate, which would cost float32 two
// digits where scores lie close. Steps and knees are decided pair by pair, exactly as by the pairwise kernels.

namespace {

// Sources between the steps, or the knees, of the first and the last of the targets that read together: ranks and
// slopes.
constexpr int64_t kRankSpread = 160, kSlopeSpread = 40;
// So few targets at once meet a vector of sources at a time; more meet one source at a time, each in a lane.
constexpr int kFewTargets = 2;
// Vectors of targets that read together: ranks, of which each has several, and slopes.
constexpr int kRankVectors = 1, kSlopeVectors = 4;
template <typename T>
constexpr int kTargets = kSlopeVectors * Vec<T>::kWidth;

// ---- what targets read ----

// Where neighbouring targets find what, in leaves: [near, far) and [knee, end) are met pair by pair, and in between
// steps are 1.
struct Reach {
  int64_t near, far, knee, end;
  bool merged;  // steps and knees lie together, all in [near, far)
};

// Neighbouring targets that read together, and what they have read so far.
template <typename T>
struct Readers {
  const T* target;
  int count;
  Reach reach;
  alignas(64) double curve[kTargets<T>];
  alignas(64) double slope[kTargets<T>];  // in units of 1 / tau
  alignas(64) double steps[kTargets<T>];
  alignas(64) double tails[kTargets<T>];
  alignas(64) double past[kTargets<T>];
};

// The first of the ascending values from `from` on of which `before` is not true: near, mostly. before(v) are the
// lanes' bits of a vector.
template <typename T, typename Before>
int64_t seek(const T* value, int64_t from, int64_t n, const Before& before) {
  using X = Vec<T>;
  constexpr unsigned kLanes = (1u << X::kWidth) - 1;
  const auto all = [&](int64_t j) { return before(X::set(value[j])) == kLanes; };
  for (int vector = 0; vector < 4; ++vector) {
    if (from + X::kWidth > n) break;
    const unsigned bits = before(X::load(value + from));
    if (bits != kLanes) return from + __builtin_popcount(bits);
    from += X::kWidth;
  }
  int64_t step = 4 * X::kWidth;
  while (from + step <= n && all(from + step - 1)) {
    from += step;
    step *= 2;
  }
  int64_t end = std::min(n, from + step);
  while (from < end) {
    const int64_t middle = from + (end - from) / 2;
    if (all(middle)) {
      from = middle + 1;
    } else {
      end = middle;
    }
  }
  return from;
}

// Walks along the targets and the steps and knees of the sources with them.
template <bool Smooth, typename T>
class Walk {
 public:
  Walk(const Sources<T>& sources, int64_t spread, const Settings<T>& s)
      : v_(sources.value.data()), n_(sources.n), leaf_(sources.leaf), spread_(spread), s_(s) {}

  // As many targets from target[0] on as may read together; those after it must not be lower.
  void next(const T* target, int64_t left, int most, Readers<T>& readers) {
    step_ = seek_step(step_, target[0]);
    knee_ = Smooth ? n_ : seek_knee(knee_, target[0]);
    int count = static_cast<int>(std::min<int64_t>({left, most, grow_ ? 2 * count_ : count_}));
    int64_t step = step_, knee = knee_;
    for (; count > 1; count = (count + 1) / 2) {
      const T last = target[count - 1];
      if (last - target[0] <= s_.group_span / 2) {
        step = seek_step(step_, last);
        knee = Smooth ? n_ : seek_knee(knee_, last);
        if (step - step_ <= spread_ && knee - knee_ <= spread_) break;
      }
      step = step_;
      knee = knee_;
    }
    readers.target = target;
    readers.count = count_ = count;
    grow_ = 2 * std::max(step - step_, knee - knee_) <= spread_;
    Reach& r = readers.reach;
    r = {step_ / leaf_, up(step), knee_ == n_ ? up(n_) : knee_ / leaf_, up(knee), false};
    if (r.knee < r.far) {
      r.far = std::max(r.far, r.end);
      r.knee = r.end = r.far;
      r.merged = true;
    }
  }

  // The first source at the step of a target, and past its knee; targets must not fall.
  int64_t step(T x) { return step_ = seek_step(step_, x); }
  int64_t knee(T x) { return knee_ = seek_knee(knee_, x); }
  int64_t seek_step(int64_t from, T x) const {
    const auto low = Vec<T>::set(x);
    return seek(v_, from, n_, [&](typename Vec<T>::V v) { return Vec<T>::bits(Vec<T>::greater(low, v)); });
  }
  int64_t seek_knee(int64_t from, T x) const {
    const auto low = Vec<T>::set(x), delta = Vec<T>::set(s_.delta);
    constexpr unsigned kLanes = (1u << Vec<T>::kWidth) - 1;
    return seek(v_, from, n_,
                [&](typename Vec<T>::V v) { return kLanes & ~Vec<T>::bits(Vec<T>::greater(v - low, delta)); });
  }

 private:
  int64_t up(int64_t n) const { return (n + leaf_ - 1) / leaf_; }

  const T* const v_;
  const int64_t n_;
  const int leaf_;
  const int64_t spread_;
  const Settings<T>& s_;
  int64_t step_ = 0, knee_ = 0;
  int count_ = kTargets<T>;  // how many read together last
  bool grow_ = true;         // whether twice as many are worth a try
};

// Adds sign times the series of exponential sums at the distance of each target from the anchor.
template <bool Curve, bool Slope, typename T>
void add_series(const double* sums, double anchor, double sign, const Settings<T>& s, Readers<T>& readers) {
  using X = Vec<double>;
  constexpr int kDegree = Sources<T>::kDegree;
  double a[kDegree], b[kDegree];
  for (int k = 0; k < kDegree; ++k) {
    a[k] = sign * Series<T>::sigmoid(k) * sums[k];
    b[k] = Series<T>::slope(k) * sums[k];
  }
  const double rate = 1 / s.tau;
  alignas(64) double exponent[kTargets<T>];
  const int full = padded<double>(readers.count);
  for (int i = 0; i < readers.count; ++i) {
    exponent[i] = -std::fabs(static_cast<double>(readers.target[i]) - anchor) * rate;
  }
  for (int i = readers.count; i < full; ++i) exponent[i] = 0;
  for (int i = 0; i < full; i += X::kWidth) {
    const X::V q = decay<T>(X::load(exponent + i));
    X::V curve = X::set(0), slope = X::set(0);
    for (int k = kDegree - 1; k >= 0; --k) {
      if constexpr (Curve) curve = X::mul_add(curve, q, X::set(a[k]));
      if constexpr (Slope) slope = X::mul_add(slope, q, X::set(b[k]));
    }
    if constexpr (Curve) X::store(readers.curve + i, X::mul_add(curve, q, X::load(readers.curve + i)));
    if constexpr (Slope) X::store(readers.slope + i, X::mul_add(slope, q, X::load(readers.slope + i)));
  }
}

// The two series of the sources that are not met pair by pair. Above the target sigma is 1 less the series.
template <bool Curve, bool Slope, typename T>
void add_both_series(const Sources<T>& sources, const Settings<T>& s, Readers<T>& readers) {
  const int size = sources.leaf;
  constexpr int kStride = Sources<T>::kStride;
  const Reach& r = readers.reach;
  const T* const v = sources.value.data();
  if (r.near > 0) {
    add_series<Curve, Slope>(sources.below.data() + r.near * kStride, static_cast<double>(v[r.near * size - 1]), 1.0, s,
                             readers);
  }
  if (r.far >= r.knee) return;
  const double anchor = static_cast<double>(v[r.far * size]);
  const double* sums = sources.above.data() + r.far * kStride;
  alignas(64) double window[kStride];
  if (r.knee * size < sources.n) {
    join(sums, -1.0, static_cast<double>(v[r.knee * size]) - anchor, sources.above.data() + r.knee * kStride, s,
         window);
    sums = window;
  }
  add_series<Curve, Slope>(sums, anchor, -1.0, s, readers);
}

// The sources that are met pair by pair, in a row: values, exponentials around the centre, weights. Returns how many.
template <bool Weighted, typename T>
int gather(const Sources<T>& sources, const Reach& r, T centre, const Settings<T>& s, Scratch<T>& scratch) {
  const int size = sources.leaf;
  int count = 0;
  const auto take = [&](int64_t first, int64_t last) {
    const int64_t begin = first * size, end = std::min(sources.n, last * size);
    if (begin >= end) return;
    std::copy_n(sources.value.data() + begin, end - begin, scratch.active + count);
    if constexpr (Weighted) std::copy_n(sources.weight.data() + begin, end - begin, scratch.active_weight + count);
    count += static_cast<int>(end - begin);
  };
  take(r.near, r.far);
  take(r.knee, r.end);
  Vec<T>::store(scratch.active + count, Vec<T>::set(-infinity<T>()));
  active_exponentials(scratch.active, count, centre, s, scratch);
  return count;
}

// How many of them are near.
template <typename T>
int near_count(const Sources<T>& sources, const Reach& r) {
  return static_cast<int>(std::max<int64_t>(0, std::min(sources.n, r.far * sources.leaf) - r.near * sources.leaf));
}

// That of the exponentials: the lowest target, whose own is then 1, so that tied targets, which would all repeat an
// error, have none.
template <typename T>
T centre_of(const Readers<T>& readers) {
  return readers.target[0];
}

// Loads the targets, the last one repeated, and their exponentials around the centre.
template <int Vectors, typename T>
void load_targets(const Readers<T>& readers, T centre, const Settings<T>& s, typename Vec<T>::V* x,
                  typename Vec<T>::V* ex) {
  using X = Vec<T>;
  constexpr int kLanes = Vectors * X::kWidth;
  alignas(64) T lanes[kLanes];
  const int count = std::min(readers.count, kLanes);
  std::copy_n(readers.target, count, lanes);
  std::fill(lanes + count, lanes + kLanes, lanes[count - 1]);
  for (int r = 0; r < Vectors; ++r) {
    x[r] = X::load(lanes + r * X::kWidth);
    ex[r] = difference_exponential<T>(x[r], X::set(centre), s);
  }
}

// Ranks from the pairs with the gathered sources [first, last): many targets. Below the knees of all targets only steps
// have to be told apart, above their steps only tails.
enum class Where { kBelowKnees, kAboveSteps, kAnywhere };
template <bool Smooth, bool Slope, Where Place, int Vectors, typename T>
void rank_pairs(int first, int last, T centre, const Settings<T>& s, const Scratch<T>& scratch, Readers<T>& readers) {
  using X = Vec<T>;
  using V = typename X::V;
  constexpr int kRun = 8;  // of sources whose shares are summed in T: more would show where many scores tie
  constexpr bool kSteps = !Smooth && Place != Where::kAboveSteps, kTails = !Smooth && Place != Where::kBelowKnees;
  if (first == last) return;
  const V delta = X::set(s.delta), origin = X::set(s.origin), one = X::set(1), zero = X::set(0);
  V x[Vectors], ex[Vectors], steps[Vectors], tails[Vectors];  // counts: exact in T
  load_targets<Vectors>(readers, centre, s, x, ex);
  for (int r = 0; r < Vectors; ++r) steps[r] = tails[r] = zero;
  for (int begin = first; begin < last; begin += kRun) {
    const int end = std::min(last, begin + kRun);
    V curve[Vectors], slope[Vectors], past[Vectors];
    for (int r = 0; r < Vectors; ++r) curve[r] = slope[r] = past[r] = zero;
    for (int j = begin; j < end; ++j) {
      const V v = X::set(scratch.active[j]), ev = X::set(scratch.active_exponential[j]);
      for (int r = 0; r < Vectors; ++r) {
        const V value = sigma<T>(ev, ex[r]), t = v - x[r];
        if constexpr (kSteps) steps[r] = X::add_where(X::greater_equal(t, zero), steps[r], one);
        if constexpr (kTails) {
          const auto tail = X::greater(t, delta);
          curve[r] = X::add_unless(tail, curve[r], value);
          if constexpr (Slope) slope[r] = X::add_unless(tail, slope[r], sigma_slope<T>(ev, ex[r], value));
          tails[r] = X::add_where(tail, tails[r], one);
          past[r] = X::add_where(tail, past[r], t - origin);
        } else {
          curve[r] = curve[r] + value;
          if constexpr (Slope) slope[r] = slope[r] + sigma_slope<T>(ev, ex[r], value);
        }
      }
    }
    for (int r = 0; r < Vectors; ++r) {
      X::accumulate(readers.curve + r * X::kWidth, curve[r]);
      if constexpr (Slope) X::accumulate(readers.slope + r * X::kWidth, slope[r]);
      if constexpr (kTails) X::accumulate(readers.past + r * X::kWidth, past[r]);
    }
  }
  for (int r = 0; r < Vectors; ++r) {
    if constexpr (kTails) X::accumulate(readers.tails + r * X::kWidth, tails[r]);
    if constexpr (!Smooth)
      X::accumulate(readers.steps + r * X::kWidth, kSteps ? steps[r] : X::set(static_cast<T>(last - first)));
  }
}

// The gathered sources: near ones, then those around the knee, if these are apart.
template <bool Smooth, bool Slope, int Vectors, typename T>
void rank_gathered(int near, int count, T centre, const Settings<T>& s, const Scratch<T>& scratch,
                   Readers<T>& readers) {
  if (readers.reach.merged) {
    rank_pairs<Smooth, Slope, Where::kAnywhere, Vectors>(0, count, centre, s, scratch, readers);
  } else {
    rank_pairs<Smooth, Slope, Where::kBelowKnees, Vectors>(0, near, centre, s, scratch, readers);
    rank_pairs<Smooth, Slope, Where::kAboveSteps, Vectors>(near, count, centre, s, scratch, readers);
  }
}

template <bool Smooth, bool Slope, typename T>
void rank_targets_as(const Sources<T>& sources, const T* target, int64_t begin, int64_t end, const Settings<T>& s,
                     Scratch<T>& scratch, double* rank, double* slope) {
  Walk<Smooth, T> walk(sources, kRankSpread, s);
  Readers<T> readers;
  Dense<Smooth, false, T> dense(sources, s);
  for (int64_t i = begin; i < end; i += readers.count) {
    if constexpr (sizeof(T) == 4) {
      readers.count = dense.begin(target + i, end - i, walk, scratch);
      if (readers.count) {
        dense.rank(target + i, readers.count, walk, scratch, rank + i, Slope ? slope + i : nullptr);
        continue;
      }
    }
    walk.next(target + i, end - i, kRankVectors * Vec<T>::kWidth, readers);
    const Reach& r = readers.reach;
    for (double* lanes : {readers.curve, readers.slope, readers.steps, readers.tails, readers.past}) {
      std::fill_n(lanes, kRankVectors * Vec<T>::kWidth, 0.0);
    }
    const T centre = centre_of(readers);
    const int count = gather<false>(sources, r, centre, s, scratch);
    double direct[kFewTargets] = {}, direct_slope[kFewTargets] = {};
    const bool few = readers.count <= kFewTargets;
    if (few) {
      T ex[kFewTargets];
      alignas(64) T lanes[kTargets<T>];
      typename Vec<T>::V x, exponential;
      load_targets<1>(readers, centre, s, &x, &exponential);
      Vec<T>::store(lanes, exponential);
      for (int k = 0; k < readers.count; ++k) {
        ex[k] = lanes[k];
        rank_rows<Smooth, Slope, false, 1>(scratch.active, scratch.active_exponential, count, readers.target + k,
                                           ex + k, s, direct + k, direct_slope + k, static_cast<T*>(nullptr));
      }
    } else {
      const int near = near_count(sources, r);
      rank_gathered<Smooth, Slope, kRankVectors>(near, count, centre, s, scratch, readers);
    }
    add_both_series<true, Slope>(sources, s, readers);
    const double all = sources.weights[r.far] - sources.weights[r.knee];  // from the steps to the knees
    const double tail = Smooth ? 0 : sources.weights[r.end];
    const double tail_sum = Smooth ? 0 : sources.sums[r.end];
    const double first = tail > 0 ? static_cast<double>(sources.value[r.end * sources.leaf]) : 0;
    double* const out = rank + i;
    for (int k = 0; k < readers.count; ++k) {
      double value = readers.curve[k] + all;
      if constexpr (!Smooth) {
        // Scores may be far from 0: their difference comes first.
        const double past = first - static_cast<double>(readers.target[k]) - static_cast<double>(s.origin);
        value += s.exact_start * (readers.steps[k] - readers.tails[k] + all) +
                 linear_value(readers.past[k] + (tail_sum + tail * past), readers.tails[k] + tail, s);
      }
      out[k] = value;
    }
    for (int k = 0; Slope && k < readers.count; ++k) {
      slope[i + k] = readers.slope[k] / s.tau + (Smooth ? 0 : s.exact_rho * (readers.tails[k] + tail));
    }
    for (int k = 0; few && k < readers.count; ++k) {
      out[k] += direct[k];
      if constexpr (Slope) slope[i + k] += direct_slope[k];
    }
  }
}

template <typename T>
void rank_targets(const Sources<T>& sources, const T* target, int64_t begin, int64_t end, const Settings<T>& s,
                  Scratch<T>& scratch, double* rank, double* slope) {
  if (s.surrogate == Surrogate::kSmooth) {
    slope ? rank_targets_as<true, true>(sources, target, begin, end, s, scratch, rank, slope)
          : rank_targets_as<true, false>(sources, target, begin, end, s, scratch, rank, slope);
  } else {
    slope ? rank_targets_as<false, true>(sources, target, begin, end, s, scratch, rank, slope)
          : rank_targets_as<false, false>(sources, target, begin, end, s, scratch, rank, slope);
  }
}

// Slopes from the pairs with the gathered sources [first, last).
template <bool Smooth, int Vectors, typename T>
void slope_pairs(int first, int last, const typename Vec<T>::V* x, const typename Vec<T>::V* ex, const Settings<T>& s,
                 const Scratch<T>& scratch, Readers<T>& readers) {
  using X = Vec<T>;
  using V = typename X::V;
  constexpr int kRun = 8;  // of sources whose shares are summed in T: more would show where many scores tie
  const V delta = X::set(s.delta), rho_tau = X::set(s.rho_tau);
  for (int begin = first; begin < last; begin += kRun) {
    V sum[Vectors];
    for (int k = 0; k < Vectors; ++k) sum[k] = X::set(0);
    for (int j = begin; j < std::min(last, begin + kRun); ++j) {
      const V v = X::set(scratch.active[j]), ev = X::set(scratch.active_exponential[j]);
      const V w = X::set(scratch.active_weight[j]);
      for (int k = 0; k < Vectors; ++k) {
        sum[k] = X::mul_add(w, pair_slope<Smooth, T>(v, ev, x[k], ex[k], delta, rho_tau), sum[k]);
      }
    }
    for (int k = 0; k < Vectors; ++k) X::accumulate(readers.slope + k * X::kWidth, sum[k]);
  }
}

template <bool Smooth, int Vectors, typename T>
void slope_gathered(int near, int count, T centre, const Settings<T>& s, const Scratch<T>& scratch,
                    Readers<T>& readers) {
  typename Vec<T>::V x[Vectors], ex[Vectors];
  load_targets<Vectors>(readers, centre, s, x, ex);
  slope_pairs<true, Vectors>(0, near, x, ex, s, scratch, readers);  // below every knee
  slope_pairs<Smooth, Vectors>(near, count, x, ex, s, scratch, readers);
}

template <bool Smooth, typename T>
void slope_targets_as(const Sources<T>& sources, const T* target, int64_t begin, int64_t end, const Settings<T>& s,
                      Scratch<T>& scratch, double* slope) {
  Walk<Smooth, T> walk(sources, kSlopeSpread, s);
  Readers<T> readers;
  Dense<Smooth, true, T> dense(sources, s);
  for (int64_t i = begin; i < end; i += readers.count) {
    if constexpr (sizeof(T) == 4) {
      readers.count = dense.begin(target + i, end - i, walk, scratch);
      if (readers.count) {
        dense.slope(target + i, readers.count, walk, scratch, slope + i);
        continue;
      }
    }
    walk.next(target + i, end - i, kTargets<T>, readers);
    const Reach& r = readers.reach;
    std::fill_n(readers.slope, kTargets<T>, 0.0);
    const T centre = centre_of(readers);
    const int count = gather<true>(sources, r, centre, s, scratch);
    const int near = r.merged ? 0 : near_count(sources, r);
    const auto gathered = readers.count <= Vec<T>::kWidth       ? slope_gathered<Smooth, 1, T>
                          : readers.count <= 2 * Vec<T>::kWidth ? slope_gathered<Smooth, 2, T>
                                                                : slope_gathered<Smooth, kSlopeVectors, T>;
    gathered(near, count, centre, s, scratch, readers);
    add_both_series<false, true>(sources, s, readers);
    const double tail = Smooth ? 0 : s.exact_rho * s.tau * sources.weights[r.end];
    for (int k = 0; k < readers.count; ++k) slope[i + k] = readers.slope[k] + tail;
  }
}

template <typename T>
void slope_targets(const Sources<T>& sources, const T* target, int64_t begin, int64_t end, const Settings<T>& s,
                   Scratch<T>& scratch, double* slope) {
  if (s.surrogate == Surrogate::kSmooth) {
    slope_targets_as<true>(sources, target, begin, end, s, scratch, slope);
  } else {
    slope_targets_as<false>(sources, target, begin, end, s, scratch, slope);
  }
}

// The block's slopes stand in scratch.kept, as if each of its columns had been kept.
template <typename T>
void spread_block(const Block<T>& block, const T* slope, double scale, const Hinge<T>* hinge, const T* column_scale,
                  Scratch<T>& scratch, T* out) {
  for (int j = 0; j < block.count; ++j) scratch.kept[j] = static_cast<T>(slope[j] * scale);
  std::fill_n(scratch.kept_bits, padded<T>(block.count) / Vec<T>::kWidth,
              static_cast<uint16_t>((1u << Vec<T>::kWidth) - 1));
  if (hinge) {
    unpack<true>(block, scratch.kept_bits, hinge, column_scale, scratch, out);
  } else {
    unpack<false>(block, scratch.kept_bits, hinge, column_scale, scratch, out);
  }
}

}  // namespace
