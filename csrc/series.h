// Written by tools/fit_series.py: the sigmoid and its slope as sums of exponentials. For
// t <= 0 and y = e^(t / tau), with relative errors as noted below:
//
//     sigma ~ sum_k sigmoid(k - 1) y^k    sigma (1 - sigma) ~ sum_k slope(k - 1) y^k
//
// Functions, for device code has no use for a host's array.
#pragma once

// clang-format off
namespace roadmap {

struct Series {
  static constexpr int kDegree = 12;
  static constexpr double sigmoid(int k) {
    constexpr double kCoefficients[12] = {  // 1.3e-09
        0.9999999986985918,
        -0.9999996238930227,
        0.9999817581608944,
        -0.9996482644945015,
        0.9964324327114262,
        -0.9781379230121537,
        0.9121668122784133,
        -0.7555760439433814,
        0.5076406607462475,
        -0.24836182864466944,
        0.07641902419835983,
        -0.010917003456908547,
    };
    return kCoefficients[k];
  }
  static constexpr double slope(int k) {
    constexpr double kCoefficients[12] = {  // 2.0e-08
        0.9999999857611293,
        -1.9999960046993006,
        2.9998104854884793,
        -3.996405308725378,
        4.963945862906054,
        -5.780368291037724,
        6.117539370721117,
        -5.525044112928566,
        3.9214161753322205,
        -1.9832793247903844,
        0.6222881173412822,
        -0.08990696026836392,
    };
    return kCoefficients[k];
  }
};

}  // namespace roadmap
