// The exponential sums of the sorted scan (after sorting_body.h): of each leaf, and from these, where leaves meet, of
// all sources below and above.
//
// A leaf is narrow beside tau where scores lie dense. Then its sums are had from moments, the sums of powers of the
// distance from its middle, by the Taylor series of e^(k x): one multiplication and one addition a source and moment,
// where powers of exponentials take four and more. Wide leaves have an exponential a source and end.

namespace {

// e^(k x) is cut off after so many terms, where a leaf is at most so wide, in units of tau. What is cut off, times the
// largest coefficients of the series, is below 2e-10 then.
constexpr int kFewMoments = 8, kManyMoments = 16;
constexpr double kNarrow = 0.06, kWider = 0.4;

// Term m of e^(k x), without x^m: k^m / m!, k = 1 ... kDegree.
template <typename T>
struct Taylor {
  static constexpr int kStride = Sources<T>::kStride;
  alignas(64) double term[kManyMoments][kStride] = {};

  constexpr Taylor() {
    for (int k = 1; k <= Sources<T>::kDegree; ++k) {
      double by = 1;
      for (int m = 0; m < kManyMoments; ++m) {
        term[m][k - 1] = by;
        by *= static_cast<double>(k) / (m + 1);
      }
    }
  }
};

// Processors are slow at denormal numbers. Float's lowest decay has no power so low.
template <typename T>
Vec<double>::V next_power(Vec<double>::V power, Vec<double>::V y) {
  if constexpr (sizeof(T) == 8) return Vec<double>::max(power * y, Vec<double>::set(1e-280));
  return power * y;
}

// q^1, q^2 ... of a decay q that stands in all lanes.
template <typename T>
void powers(Vec<double>::V q, Vec<double>::V* out) {
  using X = Vec<double>;
  X::V power = q, square = q;
  for (int bit = 1; bit < X::kWidth; bit *= 2) {
    unsigned with = 0;  // lanes whose exponent less 1 has this bit
    for (int lane = 0; lane < X::kWidth; ++lane) with |= (lane & bit ? 1u : 0u) << lane;
    power = X::select(X::lanes(with), power * square, power);
    square = square * square;
  }
  for (int k = 0; k < Sources<T>::kStride / X::kWidth; ++k) {
    out[k] = power;
    power = power * square;
  }
}

// e^(-k distance / tau), k = 1 ... kStride.
template <typename T>
void decays(double distance, const Settings<T>& s, Vec<double>::V* out) {
  using X = Vec<double>;
  if constexpr (sizeof(T) == 4) {
    powers<T>(power_decay<T>(X::set(-distance / s.tau)), out);
  } else {
    alignas(64) static constexpr double kNumbers[24] = {1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12,
                                                        13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24};
    const X::V exponent = X::set(-distance / s.tau);
    for (int k = 0; k < Sources<T>::kStride / X::kWidth; ++k) {
      out[k] = decay<T>(exponent * X::load(kNumbers + k * X::kWidth));
    }
  }
}

// out[k - 1] = a[k - 1] + sign e^(-k distance / tau) b[k - 1].
template <typename T>
void join(const double* a, double sign, double distance, const double* b, const Settings<T>& s, double* out) {
  using X = Vec<double>;
  constexpr int kVectors = Sources<T>::kStride / X::kWidth;
  X::V by[kVectors];
  decays<T>(distance, s, by);
  for (int k = 0; k < kVectors; ++k) {
    const int at = k * X::kWidth;
    X::store(out + at, X::mul_add(by[k] * X::set(sign), X::load(b + at), X::load(a + at)));
  }
}

// ---- of one leaf ----

// A leaf's sources, padded to whole vectors by some that weigh nothing.
struct Leaf {
  alignas(64) double value[64], weight[64];
  int count = 0;          // with the padding
  bool weighted = false;  // else each weighs 1, and there is no padding
  double bottom = 0, top = 0;
};

// moment[m] = sum w y^m.
template <int Moments, bool Weighted>
void moments_of(const double* y, const double* weight, int count, double* moment) {
  using X = Vec<double>;
  X::V sum[Moments];
  for (X::V& v : sum) v = X::set(0);
  for (int j = 0; j < count; j += X::kWidth) {
    const X::V distance = X::load(y + j);
    X::V power = Weighted ? X::load(weight + j) : X::set(1);
    sum[0] = sum[0] + power;
    power = Weighted ? power * distance : distance;
    for (int m = 1; m < Moments; ++m) {
      sum[m] = sum[m] + power;
      power = power * distance;
    }
  }
  for (int m = 0; m < Moments; m += X::kWidth) X::sums(sum + m, moment + m);
}

// The sums of a narrow leaf at its ends, the weight of all, and of all times its distance from the bottom.
template <int Moments, typename T>
void sum_narrow(const Leaf& leaf, double tau, Vec<double>::V half_decay, double* below, double* above, double& weights,
                double& sums) {
  using X = Vec<double>;
  static constexpr Taylor<T> taylor;
  const double half = (leaf.top - leaf.bottom) / 2, middle = leaf.bottom + half, rate = 1 / tau;
  alignas(64) double y[64], moment[Moments];
  for (int j = 0; j < leaf.count; ++j) y[j] = (leaf.value[j] - middle) * rate;
  leaf.weighted ? moments_of<Moments, true>(y, leaf.weight, leaf.count, moment)
                : moments_of<Moments, false>(y, nullptr, leaf.count, moment);
  weights = moment[0];
  sums = moment[1] * tau + moment[0] * half;
  constexpr int kVectors = Sources<T>::kStride / X::kWidth;
  X::V to_end[kVectors];
  powers<T>(half_decay, to_end);
  for (int k = 0; k < kVectors; ++k) {
    const int at = k * X::kWidth;
    X::V even = X::set(0), odd = X::set(0);
    for (int m = Moments - 2; m >= 0; m -= 2) {
      even = X::mul_add(X::set(moment[m]), X::load(taylor.term[m] + at), even);
      odd = X::mul_add(X::set(moment[m + 1]), X::load(taylor.term[m + 1] + at), odd);
    }
    X::store(below + at, (even + odd) * to_end[k]);
    X::store(above + at, (even - odd) * to_end[k]);
  }
}

// sum[k - 1] = sum w q^k.
template <bool Weighted, typename T>
void power_sums(const double* q, const double* weight, int count, double* out) {
  using X = Vec<double>;
  constexpr int kStride = Sources<T>::kStride, kDegree = Sources<T>::kDegree;
  X::V sum[kStride];
  for (X::V& v : sum) v = X::set(0);
  for (int j = 0; j < count; j += X::kWidth) {
    const X::V y = X::load(q + j), w = Weighted ? X::load(weight + j) : X::set(1);
    X::V power = y;
    for (int k = 0; k < kDegree; ++k) {
      sum[k] = Weighted ? X::mul_add(w, power, sum[k]) : sum[k] + power;
      power = next_power<T>(power, y);
    }
  }
  for (int k = 0; k < kStride; k += X::kWidth) X::sums(sum + k, out + k);
}

// The same of a wide leaf.
template <typename T>
void sum_wide(const Leaf& leaf, double tau, double* below, double* above, double& weights, double& sums) {
  using X = Vec<double>;
  const X::V rate = X::set(1 / tau), bottom = X::set(leaf.bottom), top = X::set(leaf.top);
  alignas(64) double up[64], down[64];
  weights = sums = 0;
  for (int j = 0; j < leaf.count; j += X::kWidth) {
    const X::V value = X::load(leaf.value + j);
    X::store(up + j, power_decay<T>((value - top) * rate));
    X::store(down + j, power_decay<T>((bottom - value) * rate));
  }
  for (int j = 0; j < leaf.count; ++j) {
    const double w = leaf.weighted ? leaf.weight[j] : 1;
    weights += w;
    sums += w * (leaf.value[j] - leaf.bottom);
  }
  if (leaf.weighted) {
    power_sums<true, T>(up, leaf.weight, leaf.count, below);
    power_sums<true, T>(down, leaf.weight, leaf.count, above);
  } else {
    power_sums<false, T>(up, nullptr, leaf.count, below);
    power_sums<false, T>(down, nullptr, leaf.count, above);
  }
}

template <typename T>
void sum_leaves(Sources<T>& sources, int64_t first, int64_t last, const Settings<T>& s) {
  using X = Vec<double>;
  constexpr int kStride = Sources<T>::kStride;
  const int size = sources.leaf;
  const bool weighted = !sources.weight.empty();
  const double rate = 1 / s.tau;

  Leaf leaf;
  for (int64_t begin = first; begin < last; begin += X::kWidth) {
    const int lanes = static_cast<int>(std::min<int64_t>(X::kWidth, last - begin));
    // Half the width of each, and how an exponential decays over it.
    alignas(64) double half[X::kWidth] = {}, half_decay[X::kWidth];
    for (int lane = 0; lane < lanes; ++lane) {
      const int64_t from = (begin + lane) * size, end = std::min(sources.n, from + size);
      half[lane] = (static_cast<double>(sources.value[end - 1]) - static_cast<double>(sources.value[from])) / 2 * rate;
    }
    X::store(half_decay, power_decay<T>(X::set(0) - X::load(half)));
    for (int lane = 0; lane < lanes; ++lane) {
      const int64_t at = begin + lane, from = at * size;
      const int own = static_cast<int>(std::min<int64_t>(sources.n - from, size));
      const T* const v = sources.value.data() + from;
      leaf.count = padded<double>(own);
      leaf.weighted = weighted || leaf.count != own;
      leaf.bottom = static_cast<double>(v[0]);
      leaf.top = static_cast<double>(v[own - 1]);
      for (int j = 0; j < own; ++j) leaf.value[j] = static_cast<double>(v[j]);
      for (int j = own; j < leaf.count; ++j) leaf.value[j] = leaf.top;
      if (leaf.weighted) {
        for (int j = 0; j < own; ++j) leaf.weight[j] = weighted ? static_cast<double>(sources.weight[from + j]) : 1.0;
        for (int j = own; j < leaf.count; ++j) leaf.weight[j] = 0;
      }
      double* const below = sources.below.data() + (at + 1) * kStride;
      double* const above = sources.above.data() + at * kStride;
      if (sizeof(T) == 4 && 2 * half[lane] <= kNarrow) {
        sum_narrow<kFewMoments, T>(leaf, s.tau, X::set(half_decay[lane]), below, above, sources.weights[at],
                                   sources.sums[at]);
      } else if (sizeof(T) == 4 && 2 * half[lane] <= kWider) {
        sum_narrow<kManyMoments, T>(leaf, s.tau, X::set(half_decay[lane]), below, above, sources.weights[at],
                                    sources.sums[at]);
      } else {
        sum_wide<T>(leaf, s.tau, below, above, sources.weights[at], sources.sums[at]);
      }
    }
  }
}

// ---- of all ----

// e^(-distance / tau) from an end of leaf l to the same end of its neighbour, for leaves [begin, begin + kWidth).
template <typename T, typename Distance>
void decays_between(int64_t begin, int64_t end, const Settings<T>& s, const Distance& distance, double* decay) {
  using X = Vec<double>;
  alignas(64) double exponent[X::kWidth] = {};
  for (int lane = 0; lane < X::kWidth && begin + lane < end; ++lane) exponent[lane] = -distance(begin + lane) / s.tau;
  X::store(decay, power_decay<T>(X::load(exponent)));
}

// own += e^(-k distance / tau) neighbour.
template <typename T>
void add_neighbour(double decay, double distance, const double* neighbour, const Settings<T>& s, double* own) {
  using X = Vec<double>;
  constexpr int kVectors = Sources<T>::kStride / X::kWidth;
  X::V by[kVectors];
  if constexpr (sizeof(T) == 4) {
    powers<T>(X::set(decay), by);
  } else {
    decays<T>(distance, s, by);
  }
  for (int k = 0; k < kVectors; ++k) {
    const int at = k * X::kWidth;
    X::store(own + at, X::mul_add(by[k], X::load(neighbour + at), X::load(own + at)));
  }
}

template <typename T>
void join_below(Sources<T>& sources, const Settings<T>& s) {
  using X = Vec<double>;
  constexpr int kStride = Sources<T>::kStride;
  const int size = sources.leaf;
  const int64_t leaves = sources.leaves();
  const auto distance = [&](int64_t leaf) {  // from the top of the one before
    const int64_t end = std::min(sources.n, (leaf + 1) * size);
    return static_cast<double>(sources.value[end - 1]) - static_cast<double>(sources.value[leaf * size - 1]);
  };
  std::fill_n(sources.below.data(), kStride, 0.0);
  alignas(64) double decay[X::kWidth];
  for (int64_t leaf = 1; leaf < leaves; ++leaf) {
    const int64_t lane = (leaf - 1) % X::kWidth;
    if (lane == 0) decays_between(leaf, leaves, s, distance, decay);
    double* const own = sources.below.data() + (leaf + 1) * kStride;
    add_neighbour(decay[lane], distance(leaf), own - kStride, s, own);
  }
}

template <typename T>
void join_above(Sources<T>& sources, const Settings<T>& s) {
  using X = Vec<double>;
  constexpr int kStride = Sources<T>::kStride;
  const int size = sources.leaf;
  const int64_t leaves = sources.leaves();
  const auto distance = [&](int64_t back) {  // from the bottom of leaf leaves - 1 - back to that of the one after
    const int64_t leaf = leaves - 1 - back;
    return static_cast<double>(sources.value[(leaf + 1) * size]) - static_cast<double>(sources.value[leaf * size]);
  };
  std::fill_n(sources.above.data() + leaves * kStride, kStride, 0.0);
  KahanSum weights, sum;
  sources.weights[leaves] = sources.sums[leaves] = 0;
  alignas(64) double decay[X::kWidth];
  for (int64_t back = 0; back < leaves; ++back) {
    const int64_t leaf = leaves - 1 - back;
    if (back > 0) {
      const int64_t lane = (back - 1) % X::kWidth;
      if (lane == 0) decays_between(back, leaves, s, distance, decay);
      double* const own = sources.above.data() + leaf * kStride;
      add_neighbour(decay[lane], distance(back), own + kStride, s, own);
      sum.add(sources.weights[leaf + 1] * distance(back));  // from one leaf to the next: nothing is ever taken off
    }
    weights.add(sources.weights[leaf]);
    sum.add(sources.sums[leaf]);
    sources.weights[leaf] = weights.sum;
    sources.sums[leaf] = sum.sum;
  }
}

}  // namespace
