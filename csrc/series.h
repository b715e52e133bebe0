// Written by tools/fit_series.py: the sigmoid and its slope as sums of exponentials. For
// y = e^(t / tau) <= 1.1, with relative errors as noted below:
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
    constexpr double kCoefficients[12] = {  // 2.9e-09
        0.999999997106487,
        -0.999999239532169,
        0.9999664113117234,
        -0.9994093263587074,
        0.9945257894329176,
        -0.9692695176550955,
        0.8864734751878551,
        -0.7078126842495541,
        0.45064942456563606,
        -0.2061686072784888,
        0.05877825810059138,
        -0.007733981329025182,
    };
    return kCoefficients[k];
  }
  static constexpr double slope(int k) {
    constexpr double kCoefficients[12] = {  // 4.4e-08
        0.9999999687518897,
        -1.9999920456148492,
        2.9996569631787455,
        -3.9940719276880188,
        4.945698588365507,
        -5.6969429870073816,
        5.879406189909968,
        -5.088059498077846,
        3.4059184075606144,
        -1.6054724749202316,
        0.4657484514806678,
        -0.06188964030142024,
    };
    return kCoefficients[k];
  }
};

}  // namespace roadmap
