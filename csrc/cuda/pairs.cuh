// One pair of a reference and a positive: sigma and the surrogate H- of smooth_rank.h, with its slope in units of
// 1 / tau.
//
// float32 takes one exponential an element, not a pair: with c, the centre, the score of a positive near u,
//
//     sigma((v - u) / tau) = 1 / (1 + e^((c - v) / tau) e^((u - c) / tau)).
//
// That leaves a multiply-add and a reciprocal a pair. float64 takes the exponential of each pair: it is for gradient
// checks.
#pragma once

#include <cmath>

#include "rows.h"

namespace roadmap::cuda {

ROADMAP_DEVICE float widen(Half x) { return simt::half_to_float(x.bits); }
ROADMAP_DEVICE float widen(BFloat x) { return simt::bfloat_to_float(x.bits); }
ROADMAP_DEVICE float widen(float x) { return x; }
ROADMAP_DEVICE double widen(double x) { return x; }

template <typename T>
ROADMAP_DEVICE T larger(T a, T b) {
  return a > b ? a : b;
}
ROADMAP_DEVICE float larger(float a, float b) { return fmaxf(a, b); }  // one instruction; leaves NaN out
template <typename T>
ROADMAP_DEVICE T smaller(T a, T b) {
  return a < b ? a : b;
}
ROADMAP_DEVICE float smaller(float a, float b) { return fminf(a, b); }
ROADMAP_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
ROADMAP_DEVICE double fused(double a, double b, double c) { return fma(a, b, c); }
ROADMAP_DEVICE bool is_finite(float x) { return fabsf(x) <= 3.402823466e38f; }
ROADMAP_DEVICE bool is_finite(double x) { return fabs(x) <= 1.7976931348623157e308; }

// e^(gap / tau), of a gap that is not infinite. The product with 1 / tau is compensated: its rounding alone would cost
// 20 ulp of the result.
ROADMAP_DEVICE float exponential_within(float gap, const PairConstants<float>& k) {
  const float high = gap * k.rate;
  const float low = fmaf(gap, k.rate, -high) + gap * k.rate_lo;
  return simt::exp2_fast(high) * fmaf(low, 0.693147181f, 1.0f);
}
// Limited to the reach, an infinite gap leads to 0 or infinity and not to NaN.
ROADMAP_DEVICE float exponential(float gap, const PairConstants<float>& k) {
  return exponential_within(fmaxf(-k.reach, fminf(k.reach, gap)), k);
}
ROADMAP_DEVICE double exponential(double gap, const PairConstants<double>& k) { return exp(gap / k.rate); }

// t, where equal infinities are a tie.
template <typename T>
ROADMAP_DEVICE T gap_of(T v, T u) {
  return v == u ? T(0) : v - u;
}

// What an element brings to its pairs: the share of the exponential that is its own, or for float64 its score. Where it
// is limited, sigma is e^-47, which nothing notices; but what is no negative is not exactly 0.
ROADMAP_DEVICE float share(float v, float centre, const PairConstants<float>& k) {
  return exponential_within(fmaxf(-k.reach, fminf(k.most, centre - v)), k);
}
ROADMAP_DEVICE double share(double v, double, const PairConstants<double>&) { return v; }
// What a positive brings.
ROADMAP_DEVICE float factor(float u, float centre, const PairConstants<float>& k) {
  return exponential_within(u - centre, k);
}
ROADMAP_DEVICE double factor(double u, double, const PairConstants<double>&) { return u; }

// sigma and its slope in units of 1 / tau. The slope is e s s, e = e^(-t / tau), rather than s - s s, which would be
// left with an ulp of noise wherever sigma is nearly 1.
template <typename T>
struct Logistic {
  T value, slope;
};
// sigma, and e sigma: the slope but for a factor sigma.
template <typename T>
struct Parts {
  T value, part;
};
ROADMAP_DEVICE Parts<float> logistic(float share, float factor, const PairConstants<float>&) {
  const float s = simt::reciprocal_fast(fmaf(share, factor, 1.0f));
  return {s, share * factor * s};
}
ROADMAP_DEVICE Parts<double> logistic(double v, double u, const PairConstants<double>& k) {
  const double e = exp((u - v) / k.rate), s = 1 / (1 + e);
  return {s, s > 0 ? e * s : 0.0};
}
// sum + weight x slope.
ROADMAP_DEVICE float add_slope(float share, float factor, float weight, float sum, const PairConstants<float>&) {
  const float s = simt::reciprocal_fast(fmaf(share, factor, 1.0f));
  return fmaf(share * (factor * weight) * s, s, sum);
}
ROADMAP_DEVICE double add_slope(double v, double u, double weight, double sum, const PairConstants<double>& k) {
  const Parts<double> h = logistic(v, u, k);
  return sum + weight * (h.part * h.value);
}
template <typename T>
ROADMAP_DEVICE Logistic<T> logistic_of(T t, const PairConstants<T>& k) {  // to full precision
  const T e = exponential(-t, k), s = T(1) / (T(1) + e);
  return {s, s > T(0) ? e * s * s : T(0)};
}

// H- and its slope at t, given sigma's. Not (t < 0) rather than t >= 0: equal infinities are ties.
template <typename T>
ROADMAP_DEVICE Logistic<T> surrogate(T t, const Logistic<T>& s, const PairConstants<T>& k) {
  if (!(t > k.delta)) return {t < T(0) ? s.value : s.value + static_cast<T>(k.start), s.slope};
  const double far = k.rho > 0 ? k.rho * (static_cast<double>(t - k.origin) + k.beyond) : 0.0;
  return {static_cast<T>(far + k.offset), k.rho_tau};
}

// Shares of a positive's rank- and slope that a thread has summed. Of the linear part it sums gaps, from a number of few
// bits near the threshold, and counts pairs: rho (t - delta) + offset, rounded pair by pair, would cost the rank its
// last digits.
template <typename T>
struct Shares {
  T value = 0, slope = 0;  // of the pairs up to the threshold
  T far = 0;               // sum of t - origin over the linear part
  int count = 0;           // 1 for each pair from 0 on, and kLinear for each in the linear part
  static constexpr int kLinear = 1 << 16;

  ROADMAP_DEVICE double rank(const PairConstants<T>& k) const {
    double sum = static_cast<double>(value) + (count % kLinear - count / kLinear) * k.start;
    if (count >= kLinear) {
      const double linear = count / kLinear;
      // Not 0 x infinity: with rho = 0 an infinite t has a limit, too.
      if (k.rho > 0) sum += k.rho * (static_cast<double>(far) + linear * k.beyond);
      sum += linear * k.offset;
    }
    return sum;
  }
  ROADMAP_DEVICE double rise(const PairConstants<T>& k) const {
    return static_cast<double>(slope) + (count / kLinear) * (k.rho * k.tau);
  }
};

}  // namespace roadmap::cuda
