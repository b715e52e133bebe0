// Reading where targets and sources lie dense (included before sorted_body.h). Targets within a small part of tau read
// one polynomial instead of meeting the sources around them pair by pair.
//
// What the sources on either side of an edge between two leaves give is, by the series, an analytic function of the
// target, and remains one where a target passes the edge: the series hold up to kOvershoot on the wrong side. Its
// radius of convergence is pi tau, so within kDenseSpan a few terms are exact to the last bit of float. What is not
// smooth is settled source by source: how many lie below the step of each target, and what lies past its knee. There
// sigma, which the polynomial has, is taken out of it again: by a cubic, where that is as good as exact. Elsewhere the
// polynomial ends below the knees, and sources around them go pair by pair: a difference of sums in float would show.
//
// For float alone: double would need twice the terms, and is there for gradient checks.

namespace {

// In units of tau: how far targets that read together may span, and how far past a high knee sources have the cubic:
// all kDenseSources together are then off by no more than float's last bit of 1.
constexpr double kDenseSpan = 0.1, kDenseKnee = 0.1;
constexpr int kDenseTargets = 64, kDenseLeast = 16;  // how many of them, at the most and at the least
// Sources that may be met one by one, and how many are worth it.
constexpr int64_t kDenseSources = 256, kSparseSources = 8;
constexpr int kTerms = 6, kTermLanes = 8;  // of the polynomials, and of the tables, padded to vectors

// Term m of the Taylor series of the k-th exponential of the series, for e^(k x): coefficient times k^m / m!.
template <typename T>
struct Terms {
  alignas(64) double sigmoid[Series<T>::kDegree][kTermLanes] = {}, slope[Series<T>::kDegree][kTermLanes] = {};

  constexpr Terms() {
    for (int k = 0; k < Series<T>::kDegree; ++k) {
      double by = 1;
      for (int m = 0; m < kTerms; ++m) {
        sigmoid[k][m] = Series<T>::sigmoid(k) * by;
        slope[k][m] = Series<T>::slope(k) * by;
        by *= (k + 1.0) / (m + 1);
      }
    }
  }
};

// Targets in ascending order that read by polynomials, as many at a time as fit.
template <bool Smooth, bool Weighted, typename T>
class Dense {
  using X = Vec<T>;
  using V = typename X::V;
  using D = Vec<double>;

 public:
  Dense(const Sources<T>& sources, const Settings<T>& s)
      : sources_(sources),
        v_(sources.value.data()),
        s_(s),
        rate_(1 / s.tau),
        high_knee_(s.exact_delta >= kHighKnee * s.tau),
        knee_(s, kDenseKnee) {}

  // Makes the polynomials that the ascending targets from target[0] on read. Returns how many of them do: 0 where the
  // first cannot. `walk` must not be past it.
  template <typename Walk>
  int begin(const T* target, int64_t left, Walk& walk, Scratch<T>& scratch) {
    const T span = static_cast<T>(kDenseSpan * s_.tau), first = target[0];
    int count = kDenseTargets;
    while (count && !(count <= left && target[count - 1] - first <= span)) count -= kDenseLeast;
    if (!count) return 0;
    const T last = target[count - 1];
    const int64_t n = sources_.n, leaf = sources_.leaf;
    const int64_t step = walk.step(first), step_end = walk.seek_step(step, last);
    // Few sources cost wide groups little: series read by 64 targets then are cheaper than polynomials.
    if (step_end - step > kDenseSources || (Weighted && step_end - step < kSparseSources)) return 0;
    const double low = static_cast<double>(first), high = static_cast<double>(last);
    const double wrong = Series<T>::kOvershoot * s_.tau;
    near_ = std::min(((step + step_end) / 2 + leaf / 2) / leaf, n / leaf);
    far_ = near_;
    if ((near_ > 0 && static_cast<double>(v_[near_ * leaf - 1]) - low > wrong) ||
        (near_ * leaf < n && high - static_cast<double>(v_[near_ * leaf]) > wrong)) {
      near_ = step / leaf;
      far_ = (step_end + leaf - 1) / leaf;
    }
    end_ = stop_ = sources_.leaves();
    knee_pairs_ = 0;
    if constexpr (!Smooth) {
      const int64_t knee = walk.knee(first), knee_end = walk.seek_knee(knee, last);
      end_ = std::max((knee_end + leaf - 1) / leaf, far_);
      const int64_t after = std::min(n, end_ * leaf);
      if (after - knee > kDenseSources) return 0;
      stop_ = end_;
      if (after > knee &&
          (!high_knee_ || static_cast<double>(v_[after - 1]) - low - s_.exact_delta > kDenseKnee * s_.tau)) {
        stop_ = knee / leaf;
        if (stop_ < far_) near_ = far_ = stop_ = std::min(near_, stop_);  // steps and knees lie together
        knee_pairs_ = static_cast<int>(after - stop_ * leaf);
      }
    }
    near_pairs_ = static_cast<int>(std::min(n, far_ * leaf) - std::min(n, near_ * leaf));
    // Sources that are met pair by pair, with their exponentials around the lowest target.
    if (near_pairs_ + knee_pairs_ > 0) {
      std::copy_n(v_ + near_ * leaf, near_pairs_, scratch.active);
      std::copy_n(v_ + std::min(n, stop_ * leaf), knee_pairs_, scratch.active + near_pairs_);
      X::store(scratch.active + near_pairs_ + knee_pairs_, X::set(-infinity<T>()));
      active_exponentials(scratch.active, near_pairs_ + knee_pairs_, first, s_, scratch);
    }
    lowest_ = first;
    centre_ = (low + high) / 2;
    expand();
    return count;
  }

  // Ranks, and slopes unless null, of the targets that begin() counted.
  template <typename Walk>
  void rank(const T* target, int count, Walk& walk, const Scratch<T>& scratch, double* rank, double* slope) const {
    const int64_t n = sources_.n, after = std::min(n, end_ * sources_.leaf);
    const double tail = Smooth ? 0 : sources_.weights[end_], tail_sum = Smooth ? 0 : sources_.sums[end_];
    const double beyond = (tail > 0 ? static_cast<double>(v_[after]) : 0) - static_cast<double>(s_.origin);
    const V one = X::set(1), zero = X::set(0), delta = X::set(s_.delta), origin = X::set(s_.origin);
    const V rate = X::set(s_.rate_hi);
    alignas(64) double u[kWide], curve[kWide], slopes[kWide];
    alignas(64) double below[kWide], tails[kWide], past[kWide], square[kWide], cube[kWide];
    for (int at = 0; at < count; at += X::kWidth) {
      const int lanes = std::min(count - at, X::kWidth);
      const V x = load(target + at, lanes, u);
      polynomial(u, curve_, curve);
      polynomial(u, slope_, slopes);
      const V ex = near_pairs_ + knee_pairs_ ? difference_exponential<T>(x, X::set(lowest_), s_) : zero;
      for (int begin = 0; begin < near_pairs_; begin += kRun) {
        V sum = zero, slope_sum = zero;
        for (int j = begin; j < std::min(near_pairs_, begin + kRun); ++j) {
          const V ev = X::set(scratch.active_exponential[j]), value = sigma<T>(ev, ex);
          sum = sum + value;
          slope_sum = slope_sum + sigma_slope<T>(ev, ex, value);
        }
        X::accumulate(curve, sum);
        X::accumulate(slopes, slope_sum);
      }
      if constexpr (Smooth) {
        for (int k = 0; k < X::kWidth; ++k) slopes[k] *= rate_;
        put(curve, lanes, rank + at);
        if (slope) put(slopes, lanes, slope + at);
        continue;
      }
      const T last = target[at + lanes - 1];
      const int64_t step = walk.step(target[at]), step_end = walk.seek_step(step, last);
      V count_below = zero;
      for (int64_t j = step; j < step_end; ++j) {
        count_below = X::add_where(X::greater(x, X::set(v_[j])), count_below, one);
      }
      // Past the knee: how many, how far, and for the cubic the squares and cubes of how far.
      const int64_t around = knee_pairs_ ? after - knee_pairs_ : walk.knee(target[at]);
      V count_tails = zero, squares = zero, cubes = zero;
      std::fill_n(past, kWide, 0.0);
      for (int64_t begin = around; begin < after; begin += kRun) {
        V sum = zero, value_sum = zero, slope_sum = zero;
        for (int64_t j = begin; j < std::min(after, begin + kRun); ++j) {
          const V t = X::set(v_[j]) - x, d = t - origin;
          const auto beyond_knee = X::greater(t, delta);
          count_tails = X::add_where(beyond_knee, count_tails, one);
          sum = X::add_where(beyond_knee, sum, d);
          if (knee_pairs_) {
            const V ev = X::set(scratch.active_exponential[near_pairs_ + (j - around)]), value = sigma<T>(ev, ex);
            value_sum = X::add_unless(beyond_knee, value_sum, value);
            slope_sum = X::add_unless(beyond_knee, slope_sum, sigma_slope<T>(ev, ex, value));
          } else {
            const V y = d * rate, yy = y * y;
            squares = X::add_where(beyond_knee, squares, yy);
            cubes = X::add_where(beyond_knee, cubes, yy * y);
          }
        }
        X::accumulate(past, sum);
        if (knee_pairs_) {
          X::accumulate(curve, value_sum);
          X::accumulate(slopes, slope_sum);
        }
      }
      widen(count_below, below);
      widen(count_tails, tails);
      widen(squares, square);
      widen(cubes, cube);
      const double base = static_cast<double>(n - step);
      for (int k = 0; !knee_pairs_ && k < X::kWidth; ++k) {
        const double y = past[k] * rate_;
        curve[k] -=
            knee_.sigma[0] * tails[k] + knee_.sigma[1] * y + knee_.sigma[2] * square[k] + knee_.sigma[3] * cube[k];
        slopes[k] -=
            knee_.slope[0] * tails[k] + knee_.slope[1] * y + knee_.slope[2] * square[k] + knee_.slope[3] * cube[k];
      }
      for (int k = 0; k < X::kWidth; ++k) {
        const double all = tails[k] + tail;
        curve[k] += s_.exact_start * (base - below[k] - all) +
                    linear_value(past[k] + (tail_sum + tail * (beyond - u[k])), all, s_);
        slopes[k] = slopes[k] * rate_ + s_.exact_rho * all;
      }
      put(curve, lanes, rank + at);
      if (slope) put(slopes, lanes, slope + at);
    }
  }

  // The same for slopes of weighted sources, in units of 1 / tau.
  template <typename Walk>
  void slope(const T* target, int count, Walk& walk, const Scratch<T>& scratch, double* slope) const {
    const int64_t after = std::min(sources_.n, end_ * sources_.leaf);
    const T* const w_ = sources_.weight.data();
    const V zero = X::set(0), delta = X::set(s_.delta), origin = X::set(s_.origin), rate = X::set(s_.rate_hi);
    const V rho_tau = X::set(s_.rho_tau);
    const double tail = Smooth ? 0 : s_.exact_rho * s_.tau * sources_.weights[end_];
    alignas(64) double u[kWide], slopes[kWide], tails[kWide], linear[kWide], square[kWide], cube[kWide];
    for (int at = 0; at < count; at += X::kWidth) {
      const int lanes = std::min(count - at, X::kWidth);
      const V x = load(target + at, lanes, u);
      polynomial(u, slope_, slopes);
      const V ex = near_pairs_ + knee_pairs_ ? difference_exponential<T>(x, X::set(lowest_), s_) : zero;
      for (int begin = 0; begin < near_pairs_; begin += kRun) {
        V sum = zero;
        for (int j = begin; j < std::min(near_pairs_, begin + kRun); ++j) {
          const V ev = X::set(scratch.active_exponential[j]);
          sum = X::mul_add(X::set(w_[near_ * sources_.leaf + j]), sigma_slope<T>(ev, ex, sigma<T>(ev, ex)), sum);
        }
        X::accumulate(slopes, sum);
      }
      if constexpr (!Smooth) {
        if (knee_pairs_) {
          const T* const exponential = scratch.active_exponential + near_pairs_;
          const int64_t around = after - knee_pairs_;
          for (int64_t begin = around; begin < after; begin += kRun) {
            V sum = zero;
            for (int64_t j = begin; j < std::min(after, begin + kRun); ++j) {
              const V ev = X::set(exponential[j - around]);
              sum = X::mul_add(X::set(w_[j]), pair_slope<Smooth, T>(X::set(v_[j]), ev, x, ex, delta, rho_tau), sum);
            }
            X::accumulate(slopes, sum);
          }
          for (int k = 0; k < X::kWidth; ++k) slopes[k] += tail;
          put(slopes, lanes, slope + at);
          continue;
        }
        V squares = zero, cubes = zero;
        std::fill_n(tails, kWide, 0.0);
        std::fill_n(linear, kWide, 0.0);
        for (int64_t begin = walk.knee(target[at]); begin < after; begin += kRun) {
          V sum = zero, line = zero;
          for (int64_t j = begin; j < std::min(after, begin + kRun); ++j) {
            const V t = X::set(v_[j]) - x, w = X::set(w_[j]), y = (t - origin) * rate, wy = w * y, wyy = wy * y;
            const auto beyond_knee = X::greater(t, delta);
            sum = X::add_where(beyond_knee, sum, w);
            line = X::add_where(beyond_knee, line, wy);
            squares = X::add_where(beyond_knee, squares, wyy);
            cubes = X::add_where(beyond_knee, cubes, wyy * y);
          }
          X::accumulate(tails, sum);
          X::accumulate(linear, line);
        }
        widen(squares, square);
        widen(cubes, cube);
        const double by = s_.exact_rho * s_.tau - knee_.slope[0];
        for (int k = 0; k < X::kWidth; ++k) {
          slopes[k] +=
              tail + by * tails[k] - knee_.slope[1] * linear[k] - knee_.slope[2] * square[k] - knee_.slope[3] * cube[k];
        }
      }
      put(slopes, lanes, slope + at);
    }
  }

 private:
  static constexpr int kWide = X::kWidth, kRun = 8;
  static constexpr int kDegree = Series<T>::kDegree, kStride = Sources<T>::kStride;

  // The polynomials of what all sources below the leaf `stop_` give, in units of tau around the centre.
  void expand() {
    static constexpr Terms<T> terms;
    const int64_t n = sources_.n, leaf = sources_.leaf;
    alignas(64) double below[kStride] = {}, above[kStride] = {};
    if (near_ > 0) {
      join(below, 1, centre_ - static_cast<double>(v_[near_ * leaf - 1]), sources_.below.data() + near_ * kStride, s_,
           below);
    }
    if (far_ < stop_ && far_ * leaf < n) {
      join(above, 1, static_cast<double>(v_[far_ * leaf]) - centre_, sources_.above.data() + far_ * kStride, s_, above);
      if (stop_ * leaf < n) {
        join(above, -1, static_cast<double>(v_[stop_ * leaf]) - centre_, sources_.above.data() + stop_ * kStride, s_,
             above);
      }
    }
    for (int m = 0; m < kTermLanes; m += D::kWidth) {
      typename D::V lower = D::set(0), upper = D::set(0), lower_slope = D::set(0), upper_slope = D::set(0);
      for (int k = 0; k < kDegree; ++k) {
        const auto a = D::set(below[k]), b = D::set(above[k]);
        const auto sigmoid = D::load(terms.sigmoid[k] + m), slope = D::load(terms.slope[k] + m);
        if constexpr (!Weighted) {
          lower = D::mul_add(a, sigmoid, lower);
          upper = D::mul_add(b, sigmoid, upper);
        }
        lower_slope = D::mul_add(a, slope, lower_slope);
        upper_slope = D::mul_add(b, slope, upper_slope);
      }
      // A source below the target: e^(-k x); one above: 1 less the series, e^(k x).
      alignas(64) static constexpr double kSigns[kTermLanes] = {1, -1, 1, -1, 1, -1, 1, -1};
      const auto sign = D::load(kSigns + m);
      D::store(curve_ + m, lower * sign - upper);
      D::store(slope_ + m, lower_slope * sign + upper_slope);
    }
    if constexpr (!Weighted) curve_[0] += sources_.weights[far_] - sources_.weights[stop_];
  }

  void polynomial(const double* u, const double* coefficient, double* out) const {
    for (int k = 0; k < kWide; k += D::kWidth) {
      const auto x = (D::load(u + k) - D::set(centre_)) * D::set(rate_);
      auto p = D::set(coefficient[kTerms - 1]);
      for (int m = kTerms - 2; m >= 0; --m) p = D::mul_add(p, x, D::set(coefficient[m]));
      D::store(out + k, p);
    }
  }

  // The targets, the last one repeated, and the same as doubles.
  static V load(const T* target, int lanes, double* wide) {
    alignas(64) T all[X::kWidth];
    std::copy_n(target, lanes, all);
    std::fill(all + lanes, all + X::kWidth, target[lanes - 1]);
    const V x = X::load(all);
    widen(x, wide);
    return x;
  }

  static void put(const double* lanes, int count, double* out) {
    if (count == kWide) {
      std::copy_n(lanes, kWide, out);  // of a size that the compiler knows
    } else {
      std::copy_n(lanes, count, out);
    }
  }

  static void widen(V v, double* out) {
    std::fill_n(out, kWide, 0.0);
    X::accumulate(out, v);
  }

  const Sources<T>& sources_;
  const T* const v_;
  const Settings<T>& s_;
  const double rate_;
  const bool high_knee_;
  const KneePolynomial<4> knee_;
  // Leaves. The sources before near_ and those in [far_, stop_) are in the polynomials, those in [near_, far_) go pair
  // by pair. So do those in [stop_, end_), knee_pairs_ of them, or stop_ is end_ and the cubic takes out what lies past
  // the knees. Sources from end_ on lie past the knees of all targets.
  int64_t near_ = 0, far_ = 0, stop_ = 0, end_ = 0;
  int near_pairs_ = 0, knee_pairs_ = 0;
  T lowest_ = 0;
  double centre_ = 0;
  alignas(64) double curve_[kTermLanes], slope_[kTermLanes];
};

}  // namespace
