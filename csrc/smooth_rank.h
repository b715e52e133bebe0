// The settings of the rank surrogate and the constants that every kernel derives from them, for host and device.
//
// H-(t), an upper bound of the step [t >= 0] (Ramzi et al., NeurIPS 2021, eq. 4), with t = s_j - s_i:
//
//     t < 0            sigma(t / tau)
//     0 <= t <= delta  start + sigma(t / tau)
//     t > delta        rho (t - delta) + offset
//
// Its slope is sigma (1 - sigma) / tau up to the threshold delta and rho in the linear part above it. The surrogate
// `smooth` is sigma(t / tau) everywhere (Brown et al., ECCV 2020). All methods decide by fl(t) > delta and fl(t) >= 0 in
// the accumulation type T.
#pragma once

#include <cmath>
#include <cstdint>

namespace roadmap {

enum class Surrogate : int64_t { kSup = 0, kSmooth = 1 };

template <typename T>
struct Settings {
  Surrogate surrogate;
  T delta;    // the threshold, rounded to T: this value decides
  T origin;   // near the threshold: distances in the linear part are summed from here
  T rho_tau;  // the same in units of 1 / tau, as the pair loops sum slopes
  T rate_hi;  // 1 / tau in two parts: one rounding of 1 / tau would show in every exponent
  T rate_lo;
  T cut;           // a pair further than this below a positive adds less than half an ulp, all pairs together
  T group_span;    // widest span of positives that may share one centre of the exponentials
  T exponent_max;  // exponents of elements are clamped to this; with group_span it keeps every product finite
  double tau;
  double exact_rho;
  double exact_delta;
  double exact_start;
  double exact_offset;

  // columns: the number of pairs that skipping must bound together.
  Settings(Surrogate surrogate, double tau, double rho, double delta, double start, double offset, int64_t columns)
      : surrogate(surrogate),
        delta(static_cast<T>(delta)),
        origin(near_threshold(delta)),
        rho_tau(static_cast<T>(rho * tau)),
        rate_hi(static_cast<T>(1 / tau)),
        // The remainder of 1/tau after rate_hi. In double 1/tau has an error of its own, which fma recovers.
        rate_lo(static_cast<T>(std::fma(-static_cast<double>(rate_hi), tau, 1.0) / tau)),
        // e^-17 = 4e-8 and e^-37 = 9e-17 are below half an ulp of 1, the smallest rank.
        cut(static_cast<T>((kDigits + std::log(static_cast<double>(columns > 1 ? columns : 1))) * tau)),
        group_span(static_cast<T>(40 * tau)),
        // An active set reaches 20 + 17 + ln(2^31) < 60 below its centre (float), and e^(60 + 20) is finite.
        exponent_max(static_cast<T>(sizeof(T) == 4 ? 60 : 600)),
        tau(tau),
        exact_rho(rho),
        exact_delta(delta),
        exact_start(start),
        exact_offset(offset) {}

  // The threshold in few enough bits that float32 gaps of scores on a grid stay exact when it is subtracted from them;
  // float64 has bits to spare and subtracts the threshold itself.
  static T near_threshold(double delta) {
    if (sizeof(T) == 8) return static_cast<T>(delta);
    int exponent;
    const double mantissa = std::frexp(delta, &exponent);
    return static_cast<T>(std::ldexp(std::round(std::ldexp(mantissa, 8)), exponent - 8));
  }

  static constexpr double kDigits = sizeof(T) == 4 ? 17 : 37;
};

}  // namespace roadmap
