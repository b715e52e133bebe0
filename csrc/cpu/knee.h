// sigma past a high knee, as a polynomial: it takes sigma off again where polynomials and series have it of sources
// that lie past a knee as well. That is as good as exact because sigma is flat there.
#pragma once

#include <algorithm>
#include <cmath>

#include "../smooth_rank.h"

namespace roadmap {

// How high a knee has to be, in units of tau.
constexpr double kHighKnee = 4;

// sigma from the knee to `reach` past it, and its slope: the polynomials that meet them at Chebyshev's points, of the
// distance from Settings::origin in units of tau.
template <int Points>
struct KneePolynomial {
  static constexpr int kPoints = Points;
  double sigma[kPoints] = {}, slope[kPoints] = {};

  template <typename T>
  KneePolynomial(const Settings<T>& s, double reach) {
    // Where the origin is far off, the knee is so high that sigma is 1.
    const double rate = 1 / s.tau, origin = static_cast<double>(s.origin), knee = std::min(origin * rate, 1e3);
    const double begin = std::max(-1.0, std::min((s.exact_delta - origin) * rate, 1.0));  // of the knee, from there
    double at[kPoints], curve[kPoints], slopes[kPoints];
    for (int k = 0; k < kPoints; ++k) {
      at[k] = reach / 2 * (1 - std::cos((2 * k + 1) * 3.141592653589793 / (2 * kPoints)));
      curve[k] = 1 / (1 + std::exp(-(knee + begin + at[k])));
      slopes[k] = curve[k] * (1 - curve[k]);
    }
    interpolate(at, begin, curve, sigma);
    interpolate(at, begin, slopes, slope);
  }

 private:
  // Newton's divided differences, and from these the coefficients of the powers.
  static void interpolate(const double* at, double begin, double* value, double* coefficient) {
    for (int order = 1; order < kPoints; ++order) {
      for (int k = kPoints - 1; k >= order; --k) value[k] = (value[k] - value[k - 1]) / (at[k] - at[k - order]);
    }
    for (int k = kPoints - 1; k >= 0; --k) {
      const double root = begin + at[k];
      for (int m = kPoints - 1; m > 0; --m) coefficient[m] = coefficient[m - 1] - root * coefficient[m];
      coefficient[0] = value[k] - root * coefficient[0];
    }
  }
};

}  // namespace roadmap
