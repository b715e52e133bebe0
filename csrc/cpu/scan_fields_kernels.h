// What targets read of sources in other boxes and in their own, in the vectors of whichever instruction set includes this
// file (after scan_sums_kernels.h): far fields by exponential sums, near fields by moments, single sources by polynomials.

namespace {

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
  void add_below(const Sums& sums) { add<false>(sums); }
  // Sources in higher boxes, `count` of them: sigma(d) = 1 - sigma(-d).
  void add_above(const Sums& sums, double count) {
    add<true>(sums);
    if (Curve) add_line(count, 0, 0);
  }
  // Adds constant + rate x to the curve, and to its slope by the sources' scores what is given.
  void add_line(double constant, double rate, double to_slope) {
    const auto one = D::lanes(1), two = D::lanes(2);
    curve[0] = D::add_where(two, D::add_where(one, curve[0], D::set(constant)), D::set(rate));
    slope[0] = D::add_where(one, slope[0], D::set(to_slope));
  }

  // The coefficients.
  void store(double* to_curve, double* to_slope) const {
    for (int part = 0; part < kTermVectors; ++part) {
      if (Curve) D::store(to_curve + part * D::kWidth, curve[part]);
      D::store(to_slope + part * D::kWidth, slope[part]);
    }
  }

 private:
  template <bool Above>
  void add(const Sums& sums) {
    alignas(64) double all[kStride];
    sums.store(all);
    for (int part = 0; part < kTermVectors; ++part) {
      const int m = part * D::kWidth;
      D::V value = D::set(0), rate = D::set(0);
      for (int k = 0; k < kDegree; ++k) {
        const D::V sum = D::set(all[k]);
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
  // From a box whose centre lies further up, by these decays: what one source there does, but for the signs.
  explicit Translation(const Sums& decays) {
    Field<Curve> one;
    one.add_above(decays, 1);
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
      D::V curve = D::set(0), slope = D::set(0), odd_curve = D::set(0), odd_slope = D::set(0);
      for (int r = 0; r < kTerms; r += 2) {  // two sums, for one would wait for itself
        const D::V even = D::set(moment[r]), odd = D::set(Below ? -moment[r + 1] : moment[r + 1]);
        if (Curve) curve = D::mul_add(even, D::load(curve_[r] + m), curve);
        if (Curve) odd_curve = D::mul_add(odd, D::load(curve_[r + 1] + m), odd_curve);
        slope = D::mul_add(even, D::load(slope_[r] + m), slope);
        odd_slope = D::mul_add(odd, D::load(slope_[r + 1] + m), odd_slope);
      }
      if (Curve) field.curve[part] = D::mul_add(curve + odd_curve, sign, field.curve[part]);
      field.slope[part] = D::mul_add(slope + odd_slope, sign, field.slope[part]);
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

// sigma and its slope around the point half a box below the threshold, for single sources: polynomials of z = (v - u) /
// tau - centre. Slopes are in units of 1 / tau.
template <typename T, int Terms>
struct ThresholdCurve {
  using X = Vec<T>;
  using V = typename X::V;
  T centre;
  V curve[Terms], slope[Terms];

  explicit ThresholdCurve(const Settings<float>& s) {
    // In float 1 / tau is off by a rounding, which the point makes good.
    const double delta = s.exact_delta, rate = sizeof(T) == 4 ? static_cast<double>(s.rate_hi) : 1 / s.tau;
    centre = static_cast<T>(std::min(delta * rate - Boxes::kWidth / 2, 1e30));
    double a[Terms + 1];
    taylor_of_sigma<Terms + 1>(static_cast<double>(centre) + delta * (1 / s.tau - rate), a);
    for (int m = 0; m < Terms; ++m) {
      curve[m] = X::set(static_cast<T>(a[m]));
      slope[m] = X::set(static_cast<T>((m + 1) * a[m + 1]));
    }
  }
  static V at(const V* coefficient, V z) {
    V p = coefficient[Terms - 1];
    for (int m = Terms - 2; m >= 0; --m) p = X::mul_add(p, z, coefficient[m]);
    return p;
  }
};

}  // namespace
