// One pair of a reference and a positive: sigma and the surrogate H- of smooth_rank.h, with its slope in units of 1 / tau.
//
// float32 takes one exponential an element, not a pair: sigma((v - u) / tau) = 1 / (1 + e^((c - v) / tau) e^((u - c) /
// tau)) with c, the centre, the score of a positive near u. That leaves a multiply-add and a reciprocal a pair. float64
// takes the exponential of each pair: it is for gradient checks.
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
template <typename T>
ROADMAP_DEVICE constexpr T largest() {
  return sizeof(T) == 4 ? T(3.402823466e38f) : static_cast<T>(1.7976931348623157e308);
}
ROADMAP_DEVICE bool is_finite(float x) { return fabsf(x) <= 3.402823466e38f; }
ROADMAP_DEVICE bool is_finite(double x) { return fabs(x) <= 1.7976931348623157e308; }

// e^(gap / tau). The product with 1 / tau is compensated: its rounding alone would cost 20 ulp of the result. Limited to
// the reach, an infinite gap leads to 0 or infinity and not to NaN.
ROADMAP_DEVICE float exponential(float gap, const PairConstants<float>& k) {
  const float x = fmaxf(-k.reach, fminf(k.reach, gap));
  const float high = x * k.rate;
  const float low = fmaf(x, k.rate, -high) + x * k.rate_lo;
  return simt::exp2_fast(high) * fmaf(low, 0.693147181f, 1.0f);
}
ROADMAP_DEVICE double exponential(double gap, const PairConstants<double>& k) { return exp(gap / k.rate); }

// sigma(gap / tau), to full precision.
template <typename T>
ROADMAP_DEVICE T sigma(T gap, const PairConstants<T>& k) {
  return T(1) / (T(1) + exponential(-gap, k));
}

// t, where equal infinities are a tie.
template <typename T>
ROADMAP_DEVICE T gap_of(T v, T u) {
  return v == u ? T(0) : v - u;
}

// What an element brings to its pairs: the share of the exponential that is its own, or for float64 its score.
ROADMAP_DEVICE float share(float v, float centre, const PairConstants<float>& k) { return exponential(centre - v, k); }
ROADMAP_DEVICE double share(double v, double, const PairConstants<double>&) { return v; }
// What a positive brings.
ROADMAP_DEVICE float factor(float u, float centre, const PairConstants<float>& k) { return exponential(u - centre, k); }
ROADMAP_DEVICE double factor(double u, double, const PairConstants<double>&) { return u; }

ROADMAP_DEVICE float pair_sigma(float share, float factor, const PairConstants<float>&) {
  return simt::reciprocal_fast(fmaf(share, factor, 1.0f));
}
ROADMAP_DEVICE double pair_sigma(double v, double u, const PairConstants<double>& k) {
  return 1 / (1 + exp((u - v) / k.rate));
}

// H- and its slope at t, given sigma. Not (t < 0) rather than t >= 0: equal infinities are ties.
template <typename T>
ROADMAP_DEVICE void surrogate(T t, T s, const PairConstants<T>& k, T& value, T& slope) {
  const bool tail = t > k.delta;
  const T near = t < T(0) ? s : s + k.start;
  // Limited, so that an infinite t has a limit with rho = 0, too.
  value = tail ? k.rho * smaller(t - k.delta, largest<T>()) + k.offset : near;
  slope = tail ? k.rho_tau : s - s * s;
}

template <typename T>
ROADMAP_DEVICE T surrogate_slope(T t, T s, const PairConstants<T>& k) {
  return t > k.delta ? k.rho_tau : s - s * s;
}

// A sum that loses nothing to its number of terms (Kahan): two numbers where one would drift over a million columns.
template <typename T>
struct Sum {
  T sum = 0, lost = 0;
  ROADMAP_DEVICE void add(T x) {
    const T part = x - lost, next = sum + part;
    const T error = (next - sum) - part;
    lost = error == error ? error : T(0);  // an infinite sum has lost nothing
    sum = next;
  }
  ROADMAP_DEVICE T value() const { return sum - lost; }
};

}  // namespace roadmap::cuda
