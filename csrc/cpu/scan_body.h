// The kernels of the sorted scan, in the vectors of whichever instruction set includes this file: see scan.h.
//
// All is float64 but for single sources around a threshold: the coefficients of the series alternate, which would cost
// float32 two digits where scores lie close.

namespace {

constexpr int kTerms = Boxes::kTerms, kDegree = Sources::kDegree, kStride = Sources::kStride;
// Vectors of so many doubles.
constexpr int kTermVectors = kTerms / Vec<double>::kWidth, kSumVectors = kStride / Vec<double>::kWidth;

alignas(64) constexpr double kSigns[kTerms] = {1, -1, 1, -1, 1, -1, 1, -1};

// Taylor coefficients of the exponentials e^(k x), and the same times those of the series; and the binomials.
struct ScanTerms {
  alignas(64) double power[kTerms][kStride] = {};                                  // [m][k - 1]  k^m / m!
  alignas(64) double sigmoid[kDegree][kTerms] = {}, slope[kDegree][kTerms] = {};  // [k - 1][m]
  alignas(64) double choose[kTerms][kTerms] = {};                                  // (r + i)! / (r! i!)

  constexpr ScanTerms() {
    for (int k = 0; k < kDegree; ++k) {
      double by = 1;
      for (int m = 0; m < kTerms; ++m) {
        power[m][k] = by;
        sigmoid[k][m] = Series<float>::sigmoid(k) * by;
        slope[k][m] = Series<float>::slope(k) * by;
        by *= (k + 1.0) / (m + 1);
      }
    }
    for (int r = 0; r < kTerms; ++r) {
      for (int i = 0; i < kTerms; ++i) choose[r][i] = r && i ? choose[r - 1][i] + choose[r][i - 1] : 1;
    }
  }
};
constexpr ScanTerms kScanTerms;

// ---- decays ----

// e^x, x <= 0, in each lane; 0 below -kFar, where nothing counts any more.
Vec<double>::V decay_of(Vec<double>::V x) {
  using D = Vec<double>;
  const D::V far = D::set(-40);
  return D::select(D::greater(x, far), exponential<double, 11>(D::max(x, far), D::set(0)), D::set(0));
}

// q^1, q^2 ... q^kStride of a decay q that stands in all lanes.
void powers(Vec<double>::V q, Vec<double>::V* out) {
  using D = Vec<double>;
  D::V power = q, square = q;
  for (int bit = 1; bit < D::kWidth; bit *= 2) {
    unsigned with = 0;  // lanes whose exponent less 1 has this bit
    for (int lane = 0; lane < D::kWidth; ++lane) with |= (lane & bit ? 1u : 0u) << lane;
    power = D::select(D::lanes(with), power * square, power);
    square = square * square;
  }
  for (int k = 0; k < kSumVectors; ++k) {
    out[k] = power;
    power = power * square;
  }
}

void scan_decays(Boxes& boxes, double tau, int64_t begin, int64_t end) {
  using D = Vec<double>;
  alignas(64) double distance[D::kWidth] = {}, decay[D::kWidth];
  for (int64_t b = begin; b < end; b += D::kWidth) {
    const int count = static_cast<int>(std::min<int64_t>(D::kWidth, end - b));
    for (int k = 0; k < count; ++k) distance[k] = b + k ? boxes.centre[b + k] - boxes.centre[b + k - 1] : 0;
    D::store(decay, decay_of(D::load(distance) * D::set(-1 / tau)));
    std::copy_n(decay, count, &boxes.decay[b]);
  }
}

// ---- sums ----

// sum[m] += sum of w y^m over sources [begin, end).
void add_moments(const Sources& sources, int64_t begin, int64_t end, double centre, double rate,
                 Vec<double>::V* moment) {
  using D = Vec<double>;
  const float* const v = sources.points->value.data();
  D::V sum[kTerms];
  for (D::V& s : sum) s = D::set(0);
  for (int64_t j = begin; j < end; j += D::kWidth) {
    D::V power = sources.weight ? D::widened(sources.weight + j) : D::set(1);
    D::V y = (D::widened(v + j) - D::set(centre)) * D::set(rate);
    if (end - j < D::kWidth) {  // what comes next may be infinite
      const auto in = D::lanes((1u << (end - j)) - 1);
      power = D::select(in, power, D::set(0));
      y = D::select(in, y, D::set(0));
    }
    for (int m = 0; m < kTerms; ++m) {
      sum[m] = sum[m] + power;
      power = power * y;
    }
  }
  for (int part = 0; part < kTermVectors; ++part) {
    alignas(64) double total[D::kWidth];
    D::sums(sum + part * D::kWidth, total);
    moment[part] = moment[part] + D::load(total);
  }
}

// The moments of boxes [begin, end), and in `upto` and `from` the sums of each alone.
void scan_moments(const Boxes& boxes, double tau, int64_t begin, int64_t end, Sources& sources) {
  using D = Vec<double>;
  const auto& first = sources.points->first;
  for (int64_t b = begin; b < end; ++b) {
    D::V moment[kTermVectors];
    for (D::V& m : moment) m = D::set(0);
    for (int64_t j = first[b]; j < first[b + 1];) {
      const int64_t chunk = j / sources.chunk + 1, next = std::min<int64_t>(chunk * sources.chunk, first[b + 1]);
      add_moments(sources, j, next, boxes.centre[b], 1 / tau, moment);
      for (int part = 0; next < first[b + 1] && part < kTermVectors; ++part) {
        D::store(&sources.running[chunk * kTerms + part * D::kWidth], moment[part]);
      }
      j = next;
    }
    double* const own = &sources.moment[b * kTerms];
    for (int part = 0; part < kTermVectors; ++part) D::store(own + part * D::kWidth, moment[part]);
    for (int k = 0; k < kStride; k += D::kWidth) {
      D::V even = D::set(0), odd = D::set(0);
      for (int m = kTerms - 2; m >= 0; m -= 2) {
        even = D::mul_add(D::set(own[m]), D::load(kScanTerms.power[m] + k), even);
        odd = D::mul_add(D::set(own[m + 1]), D::load(kScanTerms.power[m + 1] + k), odd);
      }
      D::store(&sources.upto[b * kStride + k], even + odd);
      D::store(&sources.from[b * kStride + k], even - odd);
    }
  }
}

// own[k - 1] += q^k neighbour[k - 1]
void add_translated(double q, const double* neighbour, double* own) {
  using D = Vec<double>;
  D::V by[kSumVectors];
  powers(D::set(q), by);
  for (int k = 0; k < kSumVectors; ++k) {
    const int at = k * D::kWidth;
    D::store(own + at, D::mul_add(by[k], D::load(neighbour + at), D::load(own + at)));
  }
}

void scan_up(const Boxes& boxes, Sources& sources) {
  for (int64_t b = 1; b < boxes.size(); ++b) {
    add_translated(boxes.decay[b], &sources.upto[(b - 1) * kStride], &sources.upto[b * kStride]);
  }
}

void scan_down(const Boxes& boxes, Sources& sources) {
  for (int64_t b = boxes.size() - 2; b >= 0; --b) {
    add_translated(boxes.decay[b + 1], &sources.from[(b + 1) * kStride], &sources.from[b * kStride]);
  }
}

// `beyond`, or `passed`: distances from one chunk to the next, so that nothing is ever taken off.
void scan_linear(Sources& sources) {
  const int64_t n = sources.points->n;
  if (sources.weight) {
    double sum = 0;
    for (int64_t j = 0; j < n; ++j) {
      sources.passed[j] = sum;
      sum += static_cast<double>(sources.weight[j]);
    }
    sources.passed[n] = sum;
    return;
  }
  using D = Vec<double>;
  const float* const v = sources.points->value.data();
  double sum = 0;
  sources.beyond[sources.chunks()] = 0;
  for (int64_t c = sources.chunks() - 1; c >= 0; --c) {
    const int64_t begin = c * sources.chunk, end = std::min<int64_t>(begin + sources.chunk, n);
    const double low = static_cast<double>(v[begin]);
    D::V own = D::set(0);
    for (int64_t j = begin; j < end; j += D::kWidth) {
      const D::V d = D::widened(v + j) - D::set(low);
      own = own + (end - j < D::kWidth ? D::select(D::lanes((1u << (end - j)) - 1), d, D::set(0)) : d);
    }
    alignas(64) double lanes[D::kWidth];
    D::store(lanes, own);
    if (end < n) sum += static_cast<double>(n - end) * (static_cast<double>(v[end]) - low);
    for (const double lane : lanes) sum += lane;
    sources.beyond[c] = sum;
  }
}

// ---- fields ----

// a[m] = the m-th Taylor coefficient of sigma at x, of 1 to `terms` + 1.
template <int kCount>
void taylor_of_sigma(double x, double* a) {
  a[0] = 1 / (1 + std::exp(-x));
  for (int m = 0; m + 1 < kCount; ++m) {  // sigma' = sigma - sigma^2
    double square = 0;
    for (int i = 0; i <= m; ++i) square += a[i] * a[m - i];
    a[m + 1] = (a[m] - square) / (m + 1);
  }
}

// What sources far from a box make of it: sigma and its slope, summed over them, as polynomials of x = (target -
// centre) / tau. Slopes are in units of 1 / tau.
template <bool Curve>
struct Field {
  using D = Vec<double>;
  D::V curve[kTermVectors], slope[kTermVectors];

  Field() {
    for (int part = 0; part < kTermVectors; ++part) curve[part] = slope[part] = D::set(0);
  }

  // Sources in lower boxes, by their sums at the centre of this one: sigma(-d) ~ sum_k a_k e^(-k d) each.
  void add_below(const double* sums) { add<false>(sums); }
  // Sources in higher boxes, `count` of them: sigma(d) = 1 - sigma(-d).
  void add_above(const double* sums, double count) {
    add<true>(sums);
    if (Curve) curve[0] = curve[0] + D::select(D::lanes(1), D::set(count), D::set(0));
  }

 private:
  template <bool Above>
  void add(const double* sums) {
    for (int part = 0; part < kTermVectors; ++part) {
      const int m = part * D::kWidth;
      D::V value = D::set(0), rate = D::set(0);
      for (int k = 0; k < kDegree; ++k) {
        const D::V sum = D::set(sums[k]);
        if (Curve) value = D::mul_add(sum, D::load(kScanTerms.sigmoid[k] + m), value);
        rate = D::mul_add(sum, D::load(kScanTerms.slope[k] + m), rate);
      }
      const D::V sign = D::load(kSigns + m);  // e^(-k x) of sources below, e^(k x) of those above
      if (Curve) curve[part] = Above ? curve[part] - value : D::mul_add(value, sign, curve[part]);
      slope[part] = Above ? slope[part] + rate : D::mul_add(rate, sign, slope[part]);
    }
  }
};

// What sources in one box make of targets in another, from the moments of the sources: sigma(d + y - x) is a sum over
// r and i of y^r (-x)^i times an entry of a symmetric table, for the distance d of the centres; so is its slope.
template <bool Curve>
class Translation {
  using D = Vec<double>;

 public:
  // Within one box.
  static const Translation& own() {
    static const Translation table(0);
    return table;
  }
  Translation() = default;
  // From a box whose centre lies so far above, q = e^(-d / tau): what one source there does, with a sign that turns.
  void set(const double* powers_of_q) {
    Field<Curve> one;
    one.add_above(powers_of_q, 1);
    alignas(64) double curve[kTerms], slope[kTerms];
    for (int part = 0; part < kTermVectors; ++part) {
      const int m = part * D::kWidth;
      D::store(curve + m, one.curve[part] * D::load(kSigns + m));
      D::store(slope + m, one.slope[part] * D::load(kSigns + m));
    }
    fill(curve, slope);
  }

  // Adds sources of these moments, all in that box; or in one as far below, with the signs of y and x turned round.
  template <bool Below>
  void add(const double* moment, Field<Curve>& field) const {
    for (int part = 0; part < kTermVectors; ++part) {
      const int m = part * D::kWidth;
      const D::V sign = Below ? D::set(1) : D::load(kSigns + m);
      D::V curve = D::set(0), slope = D::set(0);
      for (int r = 0; r < kTerms; ++r) {
        const D::V own = D::set(Below && r % 2 ? -moment[r] : moment[r]);
        if (Curve) curve = D::mul_add(own, D::load(curve_[r] + m), curve);
        slope = D::mul_add(own, D::load(slope_[r] + m), slope);
      }
      if (Curve) field.curve[part] = D::mul_add(curve, sign, field.curve[part]);
      field.slope[part] = D::mul_add(slope, sign, field.slope[part]);
    }
  }

  // Adds what one target at x reads of them, lane by lane: these have to be added up.
  void read(const double* moment, double x, D::V& curve, D::V& slope) const {
    const D::V by = D::set(-x);
    for (int part = 0; part < kTermVectors; ++part) {
      const int m = part * D::kWidth;
      D::V value = D::load(curve_[kTerms - 1] + m), rate = D::load(slope_[kTerms - 1] + m);
      for (int i = kTerms - 2; i >= 0; --i) {
        value = D::mul_add(value, by, D::load(curve_[i] + m));
        rate = D::mul_add(rate, by, D::load(slope_[i] + m));
      }
      const D::V own = D::load(moment + m);
      curve = D::mul_add(own, value, curve);
      slope = D::mul_add(own, rate, slope);
    }
  }

 private:
  explicit Translation(double distance) {
    double a[kTerms + 1];
    taylor_of_sigma<kTerms + 1>(distance, a);
    double slope[kTerms];
    for (int m = 0; m < kTerms; ++m) slope[m] = (m + 1) * a[m + 1];
    fill(a, slope);
  }
  // From the Taylor coefficients of sigma and of its slope at the distance.
  void fill(const double* curve, const double* slope) {
    alignas(64) double padded[2][2 * kTerms] = {};
    std::copy_n(curve, kTerms, padded[0]);
    std::copy_n(slope, kTerms, padded[1]);
    for (int r = 0; r < kTerms; ++r) {
      for (int m = 0; m < kTerms; m += D::kWidth) {
        const D::V choose = D::load(kScanTerms.choose[r] + m);
        D::store(curve_[r] + m, D::load(padded[0] + r + m) * choose);
        D::store(slope_[r] + m, D::load(padded[1] + r + m) * choose);
      }
    }
  }

  alignas(64) double curve_[kTerms][kTerms], slope_[kTerms][kTerms];
};

// sigma and its slope near a threshold, for single sources: polynomials of (v - u - middle) / tau in float. Sources
// that are met up to the threshold lie less than a box below it.
template <int Terms>
struct ThresholdCurve {
  using X = Vec<float>;
  float middle;
  X::V curve[Terms], slope[Terms];

  explicit ThresholdCurve(const Settings<float>& s)
      : middle(static_cast<float>(s.exact_delta - Boxes::kWidth / 2 * s.tau)) {
    double a[Terms + 1];
    taylor_of_sigma<Terms + 1>(static_cast<double>(middle) / s.tau, a);
    for (int m = 0; m < Terms; ++m) {
      curve[m] = X::set(static_cast<float>(a[m]));
      slope[m] = X::set(static_cast<float>((m + 1) * a[m + 1]));
    }
  }
  static X::V at(const X::V* coefficient, X::V z) {
    X::V p = coefficient[Terms - 1];
    for (int m = Terms - 2; m >= 0; --m) p = X::mul_add(p, z, coefficient[m]);
    return p;
  }
};

// ---- ranks ----

// 1, x, x^2 ... x^(kTerms - 1)
void powers_from_0(double x, Vec<double>::V* out) {
  using D = Vec<double>;
  D::V power = D::set(1), square = D::set(x);
  for (int bit = 1; bit < D::kWidth; bit *= 2) {
    unsigned with = 0;  // lanes whose exponent has this bit
    for (int lane = 0; lane < D::kWidth; ++lane) with |= (lane & bit ? 1u : 0u) << lane;
    power = D::select(D::lanes(with), power * square, power);
    square = square * square;
  }
  for (int part = 0; part < kTermVectors; ++part) {
    out[part] = power;
    power = power * square;
  }
}

// Reads ranks and slopes of ascending targets, one after the other.
class Ranks {
  using X = Vec<float>;
  using V = X::V;
  using D = Vec<double>;
  static constexpr int kTogether = D::kWidth / 2;  // targets whose lanes are added up at once
  static constexpr int kNearTerms = 7;             // sources that are met lie within half a box of the middle

 public:
  Ranks(const Boxes& boxes, const Sources& sources, const Points& targets, const Settings<float>& s)
      : boxes_(boxes),
        sources_(sources),
        targets_(targets),
        s_(s),
        v_(sources.points->value.data()),
        n_(sources.points->n),
        first_(sources.points->first.data()),
        smooth_(s.surrogate == Surrogate::kSmooth),
        near_(s) {}

  void read(int64_t begin, int64_t end, double* rank, double* slope) {
    if (begin < end) seek(begin);
    const double rate = 1 / s_.tau;
    for (int64_t i = begin; i < end; i += kTogether) {
      const int count = static_cast<int>(std::min<int64_t>(kTogether, end - i));
      D::V lanes[2 * kTogether];
      double linear[kTogether], tails[kTogether];
      for (D::V& lane : lanes) lane = D::set(0);
      for (int k = 0; k < count; ++k) {
        const float x = targets_.value[i + k];
        walk(i + k, x);
        linear[k] = tails[k] = 0;
        read_fields(x, lanes[2 * k], lanes[2 * k + 1]);
        if (past_ < n_) {
          meet(x, lanes[2 * k], lanes[2 * k + 1]);
          linear[k] = add_linear(static_cast<double>(x), lanes[2 * k]);
          tails[k] = s_.exact_rho * static_cast<double>(n_ - past_);
        }
        if (!smooth_) linear[k] += s_.exact_start * static_cast<double>(past_ - step_);
      }
      alignas(64) double sum[2 * kTogether];
      D::sums(lanes, sum);
      for (int k = 0; k < count; ++k) rank[i + k] = sum[2 * k] + linear[k];
      for (int k = 0; slope && k < count; ++k) slope[i + k] = sum[2 * k + 1] * rate + tails[k];
    }
  }

 private:
  bool is_past(float v, float x) const { return v - x > s_.delta; }

  // Before the target i.
  void seek(int64_t i) {
    const float x = targets_.value[i];
    box_ = std::upper_bound(targets_.first.begin(), targets_.first.end(), static_cast<uint32_t>(i)) -
           targets_.first.begin() - 1;
    step_ = std::lower_bound(v_, v_ + n_, x) - v_;
    past_ = n_;
    if (!smooth_) past_ = std::partition_point(v_, v_ + n_, [&](float v) { return !is_past(v, x); }) - v_;
    threshold_ = 0;
    field_box_ = -1;
  }

  // To the target i: its box, its step, its threshold and the box of that.
  void walk(int64_t i, float x) {
    while (targets_.first[box_ + 1] <= i) ++box_;
    if (!smooth_) {
      step_ = advance(step_, [&](V v) { return X::bits(X::greater(X::set(x), v)); });
      past_ = advance(std::max(past_, step_), [&](V v) {
        return ~X::bits(X::greater(v - X::set(x), X::set(s_.delta)));
      });
    }
    while (threshold_ < boxes_.size() && first_[threshold_ + 1] <= past_) ++threshold_;
    if (box_ != field_box_ || threshold_ != field_threshold_) set_fields();
  }
  // From `at` past all sources for which `bits` has a lane: these come first.
  template <typename Bits>
  int64_t advance(int64_t at, const Bits& bits) const {
    constexpr unsigned kAll = (1u << X::kWidth) - 1;
    while (at < n_) {
      const unsigned others = ~bits(X::load(v_ + at)) & kAll;
      if (others) return std::min<int64_t>(n_, at + __builtin_ctz(others));
      at += X::kWidth;
    }
    return n_;
  }

  // What the targets of a box read whose thresholds lie in the same box: of all whole boxes the field, of the box of
  // the threshold a table that takes moments.
  void set_fields() {
    const int64_t b = box_, t = threshold_;
    if (b != field_box_) {
      below_ = {};
      if (first_[b] > 0) {
        translate(boxes_.decay[b], &sources_.upto[(b - 1) * kStride]);
        below_.add_below(sums_);
      }
    }
    field_box_ = b;
    field_threshold_ = t;
    field_ = below_;
    translation_ = &own_;
    if (t == b) return;
    if (first_[b + 1] > first_[b]) own_.add<false>(&sources_.moment[b * kTerms], field_);
    if (t < boxes_.size()) {
      powers(decay_of(D::set((boxes_.centre[b] - boxes_.centre[t]) / s_.tau)), by_);
      alignas(64) double one[kStride];
      for (int k = 0; k < kSumVectors; ++k) D::store(one + k * D::kWidth, by_[k]);
      of_threshold_.set(one);
      translation_ = &of_threshold_;
    }
    const int64_t between = first_[t] - first_[b + 1];
    if (!between) return;
    translate(boxes_.decay[b + 1], &sources_.from[(b + 1) * kStride]);
    for (int k = 0; t < boxes_.size() && k < kSumVectors; ++k) {
      const int at = k * D::kWidth;
      D::store(sums_ + at, D::load(sums_ + at) - by_[k] * D::load(&sources_.from[t * kStride + at]));
    }
    field_.add_above(sums_, static_cast<double>(between));
  }
  // The sums of a neighbour at this box.
  void translate(double decay, const double* neighbour) {
    std::fill_n(sums_, kStride, 0.0);
    add_translated(decay, neighbour, sums_);
  }

  void read_fields(float x, D::V& curve, D::V& slope) {
    x_ = (static_cast<double>(x) - boxes_.centre[box_]) / s_.tau;
    D::V power[kTermVectors];
    powers_from_0(x_, power);
    for (int part = 0; part < kTermVectors; ++part) {
      curve = D::mul_add(field_.curve[part], power[part], curve);
      slope = D::mul_add(field_.slope[part], power[part], slope);
    }
  }

  // The sources of the threshold's box up to the threshold: whole chunks by moments, the rest one by one.
  void meet(float x, D::V& curve, D::V& slope) const {
    int64_t from = first_[threshold_];
    const int64_t chunk = past_ / sources_.chunk;
    if (chunk * sources_.chunk > from) {
      from = chunk * sources_.chunk;
      translation_->read(&sources_.running[chunk * kTerms], x_, curve, slope);
    }
    for (int64_t j = from; j < past_; j += X::kWidth) {
      const V z = ((X::load(v_ + j) - X::set(x)) - X::set(near_.middle)) * X::set(s_.rate_hi);
      const auto in = X::lanes(past_ - j < X::kWidth ? (1u << (past_ - j)) - 1 : (1u << X::kWidth) - 1);
      add_widened(X::select(in, near_.at(near_.curve, z), X::set(0)), curve);
      add_widened(X::select(in, near_.at(near_.slope, z), X::set(0)), slope);
    }
  }
  static void add_widened(V v, D::V& sum) {
    alignas(64) double wide[X::kWidth];
    X::widen(v, wide);
    for (int k = 0; k < X::kWidth; k += D::kWidth) sum = sum + D::load(wide + k);
  }

  // What lies past the threshold. The rest of its chunk goes to `curve`.
  double add_linear(double u, D::V& curve) const {
    const int64_t end = std::min<int64_t>((past_ / sources_.chunk + 1) * sources_.chunk, n_);
    const D::V origin = D::set(u + s_.exact_delta), rho = D::set(s_.exact_rho);
    for (int64_t j = past_; j < end; j += D::kWidth) {
      const D::V past = (D::widened(v_ + j) - origin) * rho;
      curve = curve + (end - j < D::kWidth ? D::select(D::lanes((1u << (end - j)) - 1), past, D::set(0)) : past);
    }
    double sum = 0;
    if (end < n_) {
      const double gap = static_cast<double>(v_[end]) - u - s_.exact_delta;
      sum = sources_.beyond[end / sources_.chunk] + static_cast<double>(n_ - end) * gap;
    }
    return s_.exact_rho * sum + s_.exact_offset * static_cast<double>(n_ - past_);
  }

  const Boxes& boxes_;
  const Sources& sources_;
  const Points& targets_;
  const Settings<float>& s_;
  const float* const v_;
  const int64_t n_;
  const uint32_t* const first_;
  const bool smooth_;
  const ThresholdCurve<kNearTerms> near_;
  const Translation<true>& own_ = Translation<true>::own();

  int64_t box_ = 0, step_ = 0, past_ = 0, threshold_ = 0;  // of the target; its threshold is in the box `threshold_`
  int64_t field_box_ = -1, field_threshold_ = -1;
  Field<true> below_, field_;
  const Translation<true>* translation_ = &own_;
  Translation<true> of_threshold_;
  D::V by_[kSumVectors];
  alignas(64) double sums_[kStride];
  double x_ = 0;
};

void scan_ranks(const Boxes& boxes, const Sources& sources, const Points& targets, int64_t begin, int64_t end,
                const Settings<float>& s, double* rank, double* slope) {
  Ranks(boxes, sources, targets, s).read(begin, end, rank, slope);
}

// ---- slopes ----

// Reads slopes of ascending targets, which here are the higher ones: H-'(target - source), the sources weighted.
class Slopes {
  using X = Vec<float>;
  using V = X::V;
  using D = Vec<double>;
  static constexpr int kTogether = 16, kVectors = kTogether / X::kWidth;  // targets
  static constexpr int kNearTerms = 10;  // what they meet lies within one and a half boxes of the middle
  static constexpr int kRun = 8;         // sources whose shares are summed in float

 public:
  Slopes(const Boxes& boxes, const Sources& sources, const Points& targets, const Settings<float>& s)
      : boxes_(boxes),
        sources_(sources),
        targets_(targets),
        s_(s),
        u_(sources.points->value.data()),
        n_(sources.points->n),
        first_(sources.points->first.data()),
        smooth_(s.surrogate == Surrogate::kSmooth),
        near_(s) {}

  // put(j, slope) of targets [begin, end), in units of 1 / tau.
  template <typename Put>
  void read(int64_t begin, int64_t end, const Put& put) {
    const auto& of_box = targets_.first;
    int64_t b = std::upper_bound(of_box.begin(), of_box.end(), static_cast<uint32_t>(begin)) - of_box.begin() - 1;
    if (!smooth_ && begin < end) {
      const float x = targets_.value[begin];
      last_ = std::partition_point(u_, u_ + n_, [&](float u) { return is_past(x, u); }) - u_;
    }
    double before = 0;
    for (int64_t j = begin; j < end;) {
      if (j > begin && targets_.value[j] == targets_.value[j - 1]) {
        put(j++, before);  // to the bit, whoever they stand with
        continue;
      }
      while (of_box[b + 1] <= j) ++b;
      const int count = static_cast<int>(std::min<int64_t>({kTogether, of_box[b + 1] - j, end - j}));
      together(b, j, count);
      for (int k = 0; k < count; ++k) put(j + k, slope_[k]);
      before = slope_[count - 1];
      j += count;
    }
  }

 private:
  bool is_past(float v, float u) const { return v - u > s_.delta; }

  // Fills slope_ for `count` neighbours in the box b.
  void together(int64_t b, int64_t j, int count) {
    const float* const x = targets_.value.data() + j;
    if (!smooth_) {  // sources before first_past_ are past the threshold for all, from last_ on for none
      while (last_ < n_ && is_past(x[0], u_[last_])) ++last_;
      first_past_ = last_;
      while (last_ < n_ && is_past(x[count - 1], u_[last_])) ++last_;
    }
    if (b != box_ || last_ != field_last_) set_field(b);
    const double past = smooth_ ? 0 : s_.exact_rho * s_.tau * sources_.passed[first_past_];
    alignas(64) double coefficient[kTerms];
    for (int m = 0; m < kTermVectors; ++m) D::store(coefficient + m * D::kWidth, field_.slope[m]);
    for (int k = 0; k < kTogether; k += D::kWidth) {
      const D::V z = (D::widened(x + k) - D::set(boxes_.centre[b])) * D::set(1 / s_.tau);
      D::V p = D::set(coefficient[kTerms - 1]);
      for (int m = kTerms - 2; m >= 0; --m) p = D::mul_add(p, z, D::set(coefficient[m]));
      D::store(slope_ + k, p + D::set(past));
    }
    if (first_past_ < end_) meet(x);
  }

  // The field of all sources from end_ on, which is at last_ or a little further, in the box b.
  void set_field(int64_t b) {
    if (b != box_) {
      above_ = {};
      if (first_[b + 1] < n_) {
        translate(boxes_.decay[b + 1], &sources_.from[(b + 1) * kStride]);
        above_.add_above(sums_, 0);
      }
      box_ = b;
    }
    field_last_ = last_;
    field_ = above_;
    int64_t whole = std::upper_bound(first_, first_ + boxes_.size() + 1, static_cast<uint32_t>(last_)) - first_ - 1;
    end_ = last_;
    if (whole < boxes_.size() && last_ > first_[whole]) {  // in the midst of a box
      const int64_t chunk = (last_ + sources_.chunk - 1) / sources_.chunk;
      end_ = std::min<int64_t>(chunk * sources_.chunk, first_[whole + 1]);
      if (end_ < first_[whole + 1]) add_rest(whole, chunk);
      ++whole;
    }
    if (whole > b) return;
    if (first_[b + 1] > first_[b]) own_.add<true>(&sources_.moment[b * kTerms], field_);
    if (first_[whole] == first_[b]) return;
    translate(boxes_.decay[b], &sources_.upto[(b - 1) * kStride]);
    if (first_[whole] > 0) {
      D::V by[kSumVectors];
      powers(decay_of(D::set((boxes_.centre[whole - 1] - boxes_.centre[b]) / s_.tau)), by);
      for (int k = 0; k < kSumVectors; ++k) {
        const int at = k * D::kWidth;
        D::store(sums_ + at, D::load(sums_ + at) - by[k] * D::load(&sources_.upto[(whole - 1) * kStride + at]));
      }
    }
    field_.add_below(sums_);
  }
  // The sources of the box q from the chunk on.
  void add_rest(int64_t q, int64_t chunk) {
    double rest[kTerms];
    const double *const all = &sources_.moment[q * kTerms], *const before = &sources_.running[chunk * kTerms];
    for (int m = 0; m < kTerms; ++m) rest[m] = all[m] - before[m];
    if (q == box_) return own_.add<true>(rest, field_);
    D::V by[kSumVectors];
    alignas(64) double one[kStride];
    powers(decay_of(D::set((boxes_.centre[q] - boxes_.centre[box_]) / s_.tau)), by);
    for (int k = 0; k < kSumVectors; ++k) D::store(one + k * D::kWidth, by[k]);
    of_threshold_.set(one);
    of_threshold_.add<true>(rest, field_);
  }
  void translate(double decay, const double* neighbour) {
    std::fill_n(sums_, kStride, 0.0);
    add_translated(decay, neighbour, sums_);
  }

  // Sources around the thresholds, one by one.
  void meet(const float* x) {
    const V middle = X::set(near_.middle), rate = X::set(s_.rate_hi), delta = X::set(s_.delta);
    const V rho = X::set(s_.rho_tau);
    for (int64_t run = first_past_; run < end_; run += kRun) {
      V sum[kVectors];
      for (V& v : sum) v = X::set(0);
      for (int64_t i = run; i < std::min(end_, run + kRun); ++i) {
        const V u = X::set(u_[i]), w = X::set(sources_.weight[i]);
        for (int r = 0; r < kVectors; ++r) {
          const V t = X::load(x + r * X::kWidth) - u, z = X::clamp((t - middle) * rate, 1);
          sum[r] = X::mul_add(w, X::select(X::greater(t, delta), rho, near_.at(near_.slope, z)), sum[r]);
        }
      }
      for (int r = 0; r < kVectors; ++r) X::accumulate(slope_ + r * X::kWidth, sum[r]);
    }
  }

  const Boxes& boxes_;
  const Sources& sources_;
  const Points& targets_;
  const Settings<float>& s_;
  const float* const u_;
  const int64_t n_;
  const uint32_t* const first_;
  const bool smooth_;
  const ThresholdCurve<kNearTerms> near_;
  const Translation<false>& own_ = Translation<false>::own();

  int64_t first_past_ = 0, last_ = 0, end_ = 0, box_ = -1, field_last_ = -1;
  Field<false> above_, field_;
  Translation<false> of_threshold_;
  alignas(64) double sums_[kStride];
  alignas(64) double slope_[kTogether];
};

// out[column[j]] = scale times the slope of target j.
void scan_slopes(const Boxes& boxes, const Sources& sources, const Points& targets, int64_t begin, int64_t end,
                 const Settings<float>& s, double scale, const uint32_t* column, float* out) {
  Slopes(boxes, sources, targets, s).read(begin, end, [&](int64_t j, double slope) {
    out[column[j]] = static_cast<float>(slope * scale);
  });
}

// out[j] = the slope of target j.
void scan_slopes_in_order(const Boxes& boxes, const Sources& sources, const Points& targets, int64_t begin,
                          int64_t end, const Settings<float>& s, double* out) {
  Slopes(boxes, sources, targets, s).read(begin, end, [&](int64_t j, double slope) { out[j] = slope; });
}

constexpr ScanKernels make_scan() {
  return {scan_decays, scan_moments, scan_up, scan_down, scan_linear, scan_ranks, scan_slopes, scan_slopes_in_order};
}

}  // namespace
