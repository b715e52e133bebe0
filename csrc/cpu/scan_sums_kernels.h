// The sums of the sorted scan, in the vectors of whichever instruction set includes this file: of each box the moments,
// and from these, by one walk up and one down, the exponential sums of all below and above. See boxes.h.
//
// All is float64: the coefficients of the series alternate, which would cost float32 two digits where scores lie close.

namespace {

constexpr int kTerms = Boxes::kTerms, kDegree = Sources::kDegree, kStride = Sources::kStride;
// Vectors of so many doubles.
constexpr int kTermVectors = kTerms / Vec<double>::kWidth, kSumVectors = kStride / Vec<double>::kWidth;

alignas(64) constexpr double kSigns[kTerms] = {1, -1, 1, -1, 1, -1, 1, -1};

// Taylor coefficients of the exponentials e^(k x), and the same times those of the series; and the binomials.
struct ScanTerms {
  alignas(64) double power[kTerms][kStride] = {};                                 // [m][k - 1]  k^m / m!
  alignas(64) double sigmoid[kDegree][kTerms] = {}, slope[kDegree][kTerms] = {};  // [k - 1][m]
  alignas(64) double choose[kTerms][kTerms] = {};                                 // (r + i)! / (r! i!)

  constexpr ScanTerms() {
    for (int k = 0; k < kDegree; ++k) {
      double by = 1;
      for (int m = 0; m < kTerms; ++m) {
        power[m][k] = by;
        sigmoid[k][m] = Series::sigmoid(k) * by;
        slope[k][m] = Series::slope(k) * by;
        by *= (k + 1.0) / (m + 1);
      }
    }
    for (int r = 0; r < kTerms; ++r) {
      for (int i = 0; i < kTerms; ++i) choose[r][i] = r && i ? choose[r - 1][i] + choose[r][i - 1] : 1;
    }
  }
};
constexpr ScanTerms kScanTerms;

// ---- exponential sums ----

// e^x, x <= 0, in each lane; 0 below -40, where nothing counts any more.
Vec<double>::V decay_of(Vec<double>::V x) {
  using D = Vec<double>;
  const D::V far = D::set(-40);
  return D::select(D::greater(x, far), exponential<double, 11>(D::max(x, far), D::set(0)), D::set(0));
}

// A sum for each k = 1 ... kStride.
struct Sums {
  using D = Vec<double>;
  D::V of[kSumVectors];

  static Sums load(const double* from) {
    Sums sums;
    for (int k = 0; k < kSumVectors; ++k) sums.of[k] = D::load(from + k * D::kWidth);
    return sums;
  }
  // q, q^2, q^3 ...
  static Sums powers(double q) {
    D::V power = D::set(q), square = power;
    for (int bit = 1; bit < D::kWidth; bit *= 2) {
      unsigned with = 0;  // lanes whose exponent less 1 has this bit
      for (int lane = 0; lane < D::kWidth; ++lane) with |= (lane & bit ? 1u : 0u) << lane;
      power = D::select(D::lanes(with), power * square, power);
      square = square * square;
    }
    Sums sums;
    for (D::V& part : sums.of) {
      part = power;
      power = power * square;
    }
    return sums;
  }
  // e^(-k distance / tau)
  static Sums decays(double distance, double tau) {
    alignas(64) double q[D::kWidth];
    D::store(q, decay_of(D::set(-distance / tau)));
    return powers(q[0]);
  }

  void store(double* to) const {
    for (int k = 0; k < kSumVectors; ++k) D::store(to + k * D::kWidth, of[k]);
  }
  Sums operator*(const Sums& other) const {
    Sums sums;
    for (int k = 0; k < kSumVectors; ++k) sums.of[k] = of[k] * other.of[k];
    return sums;
  }
  Sums operator+(const Sums& other) const {
    Sums sums;
    for (int k = 0; k < kSumVectors; ++k) sums.of[k] = of[k] + other.of[k];
    return sums;
  }
  Sums operator-(const Sums& other) const {
    Sums sums;
    for (int k = 0; k < kSumVectors; ++k) sums.of[k] = of[k] - other.of[k];
    return sums;
  }
};

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
    if (first[b] == first[b + 1]) {
      std::fill_n(&sources.moment[b * kTerms], kTerms, 0.0);
      std::fill_n(&sources.upto[b * kStride], kStride, 0.0);
      std::fill_n(&sources.from[b * kStride], kStride, 0.0);
      continue;
    }
    D::V moment[kTermVectors];
    for (D::V& m : moment) m = D::set(0);
    for (int64_t j = first[b]; j < first[b + 1];) {
      const int64_t chunk = j / Sources::kChunk + 1, next = std::min<int64_t>(chunk * Sources::kChunk, first[b + 1]);
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

void scan_up(const Boxes& boxes, Sources& sources) {
  Sums sum = Sums::load(sources.upto.data());
  for (int64_t b = 1; b < boxes.size(); ++b) {
    double* const own = &sources.upto[b * kStride];
    sum = Sums::load(own) + Sums::powers(boxes.decay[b]) * sum;
    sum.store(own);
  }
}

void scan_down(const Boxes& boxes, double tau, Sources& sources) {
  Sums sum = Sums::load(&sources.from[(boxes.size() - 1) * kStride]);
  for (int64_t b = boxes.size() - 2; b >= 0; --b) {
    double* const own = &sources.from[b * kStride];
    sum = Sums::load(own) + Sums::powers(boxes.decay[b + 1]) * sum;
    sum.store(own);
  }
  if (sources.weight) return;
  const auto& first = sources.points->first;
  double beyond = 0;
  for (int64_t b = boxes.size() - 1; b >= 0; --b) {
    const double higher = static_cast<double>(sources.points->n - first[b + 1]);
    if (higher > 0) beyond += higher * (boxes.centre[b + 1] - boxes.centre[b]);
    beyond += tau * sources.moment[b * kTerms + 1];
    sources.beyond[b] = beyond;
  }
}

void scan_weights(Sources& sources) {
  const int64_t n = sources.points->n;
  double* const passed = sources.passed.data();
  double sum = 0;
  for (int64_t begin = 0; begin <= n; begin += Sources::kChunk) {
    const int64_t end = std::min<int64_t>(begin + Sources::kChunk, n + 1);
    double own = 0;  // of this chunk: the next need not wait for it
    for (int64_t j = begin; j < end; ++j) {
      passed[j] = sum + own;
      own += static_cast<double>(sources.weight[j]);
    }
    sum += own;
  }
}

}  // namespace
