// What all methods do with a block of scores: keep what reaches a positive, scale, add hinges up, write a gradient; and the
// vector mathematics that they share. In the vectors of whichever instruction set includes this file.
//
// Lanes hold sums in T of at most kTile vectors; everything longer is added in float64, always in column order, so that
// no result depends on the number of threads.

namespace {

constexpr int kTile = 16;
static_assert(kBlock % 64 == 0 && kPad >= 16);

template <typename T>
constexpr T infinity() {
  return std::numeric_limits<T>::infinity();
}

template <typename T>
int padded(int n) {
  return (n + Vec<T>::kWidth - 1) / Vec<T>::kWidth * Vec<T>::kWidth;
}

// e^x for |x| <= Settings::exponent_max, x = high + low with |low| < 1: 1 ulp at the default degree.
template <typename T, int kDegree = sizeof(T) == 4 ? 7 : 13>
typename Vec<T>::V exponential(typename Vec<T>::V high, typename Vec<T>::V low) {
  using X = Vec<T>;
  using V = typename X::V;
  using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  typedef Word Words __attribute__((vector_size(sizeof(V))));
  constexpr bool kFloat = sizeof(T) == 4;
  constexpr int kMantissa = kFloat ? 23 : 52;
  constexpr Word kBias = kFloat ? 127 : 1023;
  // Adding 1.5 * 2^mantissa rounds to an integer, which then stands in the low bits.
  const V magic = X::set(kFloat ? T(12582912.0) : T(6755399441055744.0));
  const V shifted = X::mul_add(high, X::set(T(1.4426950408889634)), magic);
  const V n = shifted - magic;
  // -ln 2 in two parts; the first has few enough bits that n times it is exact.
  const V ln2_high = X::set(kFloat ? T(-0.693359375) : T(-6.93145751953125e-1));
  const V ln2_low = X::set(kFloat ? T(2.12194440054690583e-4) : T(-1.42860682030941723212e-6));
  const V r = X::mul_add(n, ln2_low, X::mul_add(n, ln2_high, high)) + low;
  // Taylor: the next term is below 5e-9 at degree 7 and 5e-18 at 13 for |r| <= 0.35.
  constexpr double kInverseFactorial[14] = {
      1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
      1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  V p = X::set(static_cast<T>(kInverseFactorial[kDegree]));
  for (int k = kDegree - 1; k >= 0; --k) p = X::mul_add(p, r, X::set(static_cast<T>(kInverseFactorial[k])));
  Words power;
  std::memcpy(&power, &shifted, sizeof power);
  power = (power << kMantissa) + (kBias << kMantissa);
  V scale;
  std::memcpy(&scale, &power, sizeof scale);
  return p * scale;
}

// e^((a - b) / tau). The difference and the product with 1 / tau carry their rounding errors along: without them an
// exponent of 50 would be off by 3e-6. The exponent stops at +-exponent_max.
template <typename T>
typename Vec<T>::V difference_exponential(typename Vec<T>::V a, typename Vec<T>::V b, const Settings<T>& s) {
  using X = Vec<T>;
  using V = typename X::V;
  V d = a - b;
  const V b_used = a - d;
  const V a_used = d + b_used;
  const V lost = (a - a_used) - (b - b_used);
  d = X::clamp(d, s.exponent_max * static_cast<T>(s.tau));
  const V rate = X::set(s.rate_hi);
  const V high = d * rate;
  const V low = X::mul_add(lost, rate, X::mul_add(d, X::set(s.rate_lo), X::product_error(d, rate, high)));
  return exponential<T>(high, X::clamp(low, T(0.5)));  // large only where d was cut off
}

template <typename T>
T highest(const T* values, int n) {
  using X = Vec<T>;
  auto top = X::set(-std::numeric_limits<T>::infinity());
  for (int j = 0; j < n; j += X::kWidth) top = X::max(top, X::load(values + j));
  T lanes[X::kWidth];
  X::store(lanes, top);
  return *std::max_element(lanes, lanes + X::kWidth);
}

// A sum a lane in float64, flushed from short sums in T. Sums in float64 carry their rounding errors along (Knuth's
// two-sum): a plain one over a long row would lose to PyTorch's pairwise sums.
template <typename T>
struct LaneSum {
  using X = Vec<T>;
  static constexpr bool kCompensate = sizeof(T) == 8;
  double lanes[X::kWidth] = {};
  double errors[kCompensate ? X::kWidth : 1] = {};

  void add(typename X::V v) {
    if constexpr (kCompensate) {
      const auto old = X::load(lanes), sum = old + v;
      const auto v_used = sum - old;
      const auto error = (old - (sum - v_used)) + (v - v_used);
      X::store(lanes, sum);
      X::store(errors, X::load(errors) + X::select(X::unordered(error), X::set(0), error));  // infinite sums have none
    } else {
      X::accumulate(lanes, v);
    }
  }
  double total() const {
    double sum = 0;
    for (int lane = 0; lane < X::kWidth; ++lane) sum += lanes[lane];
    if constexpr (kCompensate) {
      for (int lane = 0; lane < X::kWidth; ++lane) sum += errors[lane];
    }
    return sum;
  }
};

// The negatives of the block that reach the lowest positive of the span: packed into scratch.kept, padded with -inf,
// and marked in scratch.kept_bits. The test is the groups' own (below), so no group would have kept what is dropped.
template <typename T>
int prune(const Block<T>& block, T lowest, const Settings<T>& s, Scratch<T>& scratch, bool& nan) {
  using X = Vec<T>;
  const auto floor = X::set(-s.cut), low = X::set(lowest);
  constexpr unsigned kLanes = (1u << X::kWidth) - 1;
  int kept = 0;
  unsigned unordered = 0;
  for (int j = 0; j < block.count; j += X::kWidth) {
    const unsigned negative = static_cast<unsigned>(block.negative[j / 64] >> (j % 64)) & kLanes;
    const int left = block.count - j;
    const auto v = left >= X::kWidth ? X::load(block.score + j) : X::load_first(block.score + j, left);
    unordered |= X::bits(X::unordered(v)) & negative;
    const unsigned bits = X::bits(X::not_less(v - low, floor)) & negative;
    scratch.kept_bits[j / X::kWidth] = static_cast<uint16_t>(bits);
    if (!bits) continue;
    X::compress(scratch.kept + kept, v, bits);
    kept += __builtin_popcount(bits);
  }
  nan |= unordered != 0;
  X::store(scratch.kept + kept, X::set(-std::numeric_limits<T>::infinity()));
  return kept;
}

template <typename T>
bool any_nan(const Block<T>& block, const Settings<T>& s, Scratch<T>& scratch) {
  bool nan = false;
  prune(block, std::numeric_limits<T>::infinity(), s, scratch, nan);
  return nan;
}

template <typename T>
T scale_block(const T* score, const T* column_scale, T row_scale, int count, T* out) {
  using X = Vec<T>;
  const auto by = X::set(row_scale), lowest = X::set(-infinity<T>());
  auto top = lowest;
  int j = 0;
  for (; j + X::kWidth <= count; j += X::kWidth) {
    const auto v = X::load(score + j) * X::load(column_scale + j) * by;
    X::store(out + j, v);
    top = X::select(X::greater(v, top), v, top);  // false for NaN
  }
  T lanes[X::kWidth];
  X::store(lanes, top);
  T highest = *std::max_element(lanes, lanes + X::kWidth);
  for (; j < count; ++j) {
    out[j] = score[j] * column_scale[j] * row_scale;
    highest = out[j] > highest ? out[j] : highest;
  }
  return highest;
}

template <typename T>
void remove_radial(T* gradient, const T* x, T scale, int64_t n) {
  using X = Vec<T>;
  LaneSum<T> dot;
  for (int64_t tile = 0; tile < n; tile += kTile * X::kWidth) {
    auto part = X::set(0);
    int64_t j = tile;
    const int64_t end = std::min<int64_t>(n, tile + kTile * X::kWidth);
    for (; j + X::kWidth <= end; j += X::kWidth) part = X::mul_add(X::load(gradient + j), X::load(x + j), part);
    if (j < end) {
      const int left = static_cast<int>(end - j);
      part = X::mul_add(X::load_first(gradient + j, left), X::load_first(x + j, left), part);
    }
    dot.add(part);
  }
  const T share = static_cast<T>(dot.total() * scale * scale);
  const auto by = X::set(share);
  int64_t j = 0;
  for (; j + X::kWidth <= n; j += X::kWidth) {
    X::store(gradient + j, X::negative_mul_add(by, X::load(x + j), X::load(gradient + j)));
  }
  for (; j < n; ++j) gradient[j] -= share * x[j];
}

template <typename T>
void hinge_block(const Block<T>& block, T margin, HingeSum& sum) {
  using X = Vec<T>;
  const auto bound = X::set(margin), zero = X::set(0);
  LaneSum<T> total;
  for (int tile = 0; tile < block.count; tile += kTile * X::kWidth) {
    const int end = std::min(block.count, tile + kTile * X::kWidth);
    auto part = zero;
    for (int j = tile; j < end; j += X::kWidth) {
      const int left = block.count - j;
      const unsigned negative = static_cast<unsigned>(block.negative[j / 64] >> (j % 64));
      const auto v = left >= X::kWidth ? X::load(block.score + j) : X::load_first(block.score + j, left);
      const unsigned above = X::bits(X::greater(v, bound)) & negative;
      if (!above) continue;
      part = X::add_where(X::lanes(above), part, v - bound);
      sum.count += __builtin_popcount(above);
    }
    total.add(part);
  }
  sum.sum += total.total();
}

// Unpacks the gradients of the kept elements over the block, zero elsewhere. The block is read no further than it is
// written: `out` may be the block itself.
template <bool Hinges, typename T>
void unpack(const Block<T>& block, const uint16_t* kept_bits, const Hinge<T>* hinge, const T* column_scale,
            const Scratch<T>& scratch, T* out) {
  using X = Vec<T>;
  const auto margin = X::set(Hinges ? hinge->margin : T(0)), weight = X::set(Hinges ? hinge->weight : T(0));
  int front = 0;
  for (int j = 0; j < block.count; j += X::kWidth) {
    const int left = block.count - j;
    const unsigned bits = kept_bits[j / X::kWidth];
    auto g = X::expand(X::load(scratch.kept + front), bits);
    front += __builtin_popcount(bits);
    if constexpr (Hinges) {
      const unsigned negative = static_cast<unsigned>(block.negative[j / 64] >> (j % 64));
      const auto v = left >= X::kWidth ? X::load(block.score + j) : X::load_first(block.score + j, left);
      const unsigned above = X::bits(X::greater(v, margin)) & negative;
      if (above) g = X::add_where(X::lanes(above), g, weight);
    }
    if (left >= X::kWidth) {
      X::store(out + j, column_scale ? g * X::load(column_scale + j) : g);
    } else {
      X::store_first(out + j, left, column_scale ? g * X::load_first(column_scale + j, left) : g);
    }
  }
}

// One bit for each byte that is not zero; zeros fill the last word.
void mask_bits(const uint8_t* bytes, int count, uint64_t* bits) {
  int j = 0;
  for (; j + 64 <= count; j += 64) bits[j / 64] = nonzero_bits(bytes + j);
  if (j < count) {
    uint8_t rest[64] = {};
    std::memcpy(rest, bytes + j, count - j);
    bits[j / 64] = nonzero_bits(rest);
  }
}

inline double ap_weights(const double* rank_positive, const double* rank_negative, int64_t size, double* weight,
                         double* second, double& largest) {
  using X = Vec<double>;
  const auto one = X::set(1), zero = X::set(0), finite = X::set(std::numeric_limits<double>::max());
  const auto share = X::set(1 / static_cast<double>(size));
  auto sum = zero, lost = zero, high = zero;  // sums a lane, compensated (Kahan)
  for (int64_t i = 0; i < size; i += X::kWidth) {
    const int count = static_cast<int>(std::min<int64_t>(size - i, X::kWidth));
    const bool whole = count == X::kWidth;
    alignas(64) double lanes[2][X::kWidth];
    if (!whole) {  // past the end ranks are such that nothing is added
      std::fill_n(lanes[0], X::kWidth, 1e300);
      std::fill_n(lanes[1], X::kWidth, 0.0);
      std::copy_n(rank_positive + i, count, lanes[0]);
      std::copy_n(rank_negative + i, count, lanes[1]);
    }
    const auto positive = X::load(whole ? rank_positive + i : lanes[0]);
    const auto negative = X::load(whole ? rank_negative + i : lanes[1]);
    const auto inverse = one / (positive + negative);
    // The share of rank- directly: 1 - AP would cancel where the ranking is nearly right.
    const auto miss = X::select(X::greater(negative, finite), one, negative * inverse);
    // Multiplied twice: rank squared can overflow.
    const auto by = inverse * share, first = positive * inverse * by, other = miss * by;
    const auto part = miss - lost, next = sum + part;
    lost = (next - sum) - part;
    sum = next;
    high = X::max(high, first);
    X::store(whole ? weight + i : lanes[0], first);
    if (!whole) std::copy_n(lanes[0], count, weight + i);
    if (!second) continue;
    high = X::max(high, other);
    X::store(whole ? second + i : lanes[1], zero - other);
    if (!whole) std::copy_n(lanes[1], count, second + i);
  }
  alignas(64) double sums[X::kWidth];
  X::store(sums, sum);
  KahanSum loss;
  for (const double lane : sums) loss.add(lane);
  X::store(sums, high);
  largest = *std::max_element(sums, sums + X::kWidth);
  return loss.sum;
}

}  // namespace
