// Written by tools/fit_series.py: the sigmoid and its slope as sums of exponentials. For
// t <= kOvershoot tau and y = e^(t / tau), with relative errors as noted below:
//
//     sigma ~ sum_k sigmoid(k - 1) y^k    sigma (1 - sigma) ~ sum_k slope(k - 1) y^k
//
// Functions, for device code has no use for a host's array.
#pragma once

// clang-format off
namespace roadmap {

template <typename T>
struct Series;

template <>
struct Series<float> {
  static constexpr int kDegree = 12;
  static constexpr double kOvershoot = 0.095;
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

template <>
struct Series<double> {
  static constexpr int kDegree = 24;
  static constexpr double kOvershoot = 0.0;
  static constexpr double sigmoid(int k) {
    constexpr double kCoefficients[24] = {  // 8.5e-19
        1.0,
        -0.999999999999999,
        0.999999999999812,
        -0.9999999999855517,
        0.9999999994080065,
        -0.9999999850335489,
        0.9999997450236661,
        -0.9999968965547265,
        0.999971877502541,
        -0.9998044297284367,
        0.998931938694946,
        -0.995336218072075,
        0.9834807623952175,
        -0.9519634894573569,
        0.8840929599033391,
        -0.7655145634411474,
        0.5976878813515132,
        -0.4062278518731426,
        0.23178649168173823,
        -0.1067246914876162,
        0.03778036573957456,
        -0.00959406764049133,
        0.0015493525382159912,
        -0.00011918096447815317,
    };
    return kCoefficients[k];
  }
  static constexpr double slope(int k) {
    constexpr double kCoefficients[24] = {  // 2.5e-17
        1.0,
        -1.99999999999998,
        2.999999999996192,
        -3.9999999997109636,
        4.999999988290142,
        -5.99999970691006,
        6.999995050777079,
        -7.99994022503198,
        8.999461927251401,
        -9.9962787997587,
        10.979766158159519,
        -11.911918508855774,
        12.688505018102154,
        -13.09398853329783,
        12.808391064693284,
        -11.541955235874376,
        9.279241953750795,
        -6.438850615621425,
        3.726836132390659,
        -1.7326939096405456,
        0.6173183074152832,
        -0.15741143610626343,
        0.02548439917349235,
        -0.0019630291920997365,
    };
    return kCoefficients[k];
  }
};

}  // namespace roadmap
