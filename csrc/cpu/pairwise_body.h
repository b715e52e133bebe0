// The pairwise kernels, one row against its positives, in the vectors of whichever instruction set includes this file.
//
// For a group of positives that share a centre c,
//
//     sigma((v - u) / tau) = 1 / (1 + e^((c - v) / tau) e^((u - c) / tau)):
//
// one exponential an element instead of one a pair leaves a multiply-add and a reciprocal in the pair loops. Before
// those, each negative of a block falls into one of three classes for the group:
//
//     skipped       fl(v - min u) < -cut     all of them together stay below half an ulp of the rank
//     linear part   fl(v - max u) > delta    linear for every positive of the group: a count and a sum are enough
//     active set    the others               packed densely, they meet every positive of the group
//
// Lanes hold float32 sums of at most kTile vectors; everything longer is added in float64, always in column order, so
// that no result depends on the number of threads.

namespace {

constexpr int kTile = 16;
// Positives whose shares of a gradient are summed plainly in T.
constexpr int64_t kRun = 8;
// A group of up to so many positives meets its linear part pair by pair: see linear_distance().
constexpr int64_t kFew = 4;
static_assert(kBlock % 64 == 0 && kPad >= 16);

// An exponential that makes any product with a positive's vanish in 1 / (1 + product), and stay finite.
template <typename T>
constexpr T kVanish = sizeof(T) == 4 ? T(1e26) : T(1e250);

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
T highest(const T* values, int n) {
  using X = Vec<T>;
  auto top = X::set(-std::numeric_limits<T>::infinity());
  for (int j = 0; j < n; j += X::kWidth) top = X::max(top, X::load(values + j));
  T lanes[X::kWidth];
  X::store(lanes, top);
  return *std::max_element(lanes, lanes + X::kWidth);
}

template <typename T>
constexpr T infinity() {
  return std::numeric_limits<T>::infinity();
}

// What one group makes of the kept elements of a block.
template <typename T>
struct Classes {
  const T* active;  // values of the active set, padded with -inf
  int count;        // elements in it
  int above;        // elements in the linear part
  bool all;         // all are active: no bits were written
};

// Distance above the highest positive of the group from which its pairs need no curve: sup is linear there, smooth is 1
// to half an ulp. A few positives meet that part pair by pair, which costs less than separating it. The choice depends
// on the group alone, so that it is the same however a row is split.
template <bool Smooth, typename T>
T linear_distance(const Group<T>& g, const Settings<T>& s) {
  if (Smooth) return s.cut;
  return g.end - g.begin > kFew || !g.finite ? s.delta : infinity<T>();
}

// Splits n kept elements, the highest of which is `top`, for one group. Calls linear(j, bits, v) for each vector with
// elements in the linear part.
template <typename T, typename Linear>
Classes<T> classify(T* kept, int n, T top, T lowest, T highest, T distance, bool all_reach, const Settings<T>& s,
                    Scratch<T>& scratch, Linear linear) {
  using X = Vec<T>;
  if (all_reach && !(top - highest > distance)) return {kept, n, 0, true};
  const auto floor = X::set(-s.cut), low = X::set(lowest), high = X::set(highest), threshold = X::set(distance);
  int active = 0, count = 0;
  for (int j = 0; j < n; j += X::kWidth) {
    const auto v = X::load(kept + j);
    const unsigned valid = n - j >= X::kWidth ? (1u << X::kWidth) - 1 : (1u << (n - j)) - 1;
    const unsigned above = X::bits(X::greater(v - high, threshold)) & valid;
    const unsigned bits = X::bits(X::not_less(v - low, floor)) & valid & ~above;
    if (above) linear(j, above, v);
    count += __builtin_popcount(above);
    X::compress(scratch.active + active, v, bits);
    scratch.active_bits[j / X::kWidth] = static_cast<uint16_t>(bits);
    scratch.above_bits[j / X::kWidth] = static_cast<uint16_t>(above);
    active += __builtin_popcount(bits);
  }
  X::store(scratch.active + active, X::set(-infinity<T>()));
  return {scratch.active, active, count, false};
}

template <typename T>
void active_exponentials(const T* values, int count, T centre, const Settings<T>& s, Scratch<T>& scratch) {
  using X = Vec<T>;
  const auto c = X::set(centre);
  for (int j = 0; j < count; j += X::kWidth) {
    X::store(scratch.active_exponential + j, difference_exponential<T>(c, X::load(values + j), s));
  }
  X::store(scratch.active_exponential + count, X::set(kVanish<T>));
}

// rho (t - delta) + offset over `count` pairs whose distances above the threshold, as rounded to T, add up to `past`.
// With rho = 0 the linear part is flat, even at an infinite distance: 0 times infinity is not meant.
template <typename T>
double linear_value(double past, double count, const Settings<T>& s) {
  const double shift = static_cast<double>(s.origin) - s.exact_delta;
  return (s.exact_rho == 0 ? 0 : s.exact_rho * (past + count * shift)) + s.exact_offset * count;
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

// sigma of a vector of pairs, from the exponentials of its elements: product = e^(-(v - u) / tau).
template <typename T>
typename Vec<T>::V sigma(typename Vec<T>::V ev, typename Vec<T>::V eu) {
  return Vec<T>::reciprocal(Vec<T>::mul_add(ev, eu, Vec<T>::set(1)));
}

// sigma (1 - sigma). Near 1 the short form loses the digits that float64 is asked for.
template <typename T>
typename Vec<T>::V sigma_slope(typename Vec<T>::V ev, typename Vec<T>::V eu, typename Vec<T>::V r) {
  if constexpr (sizeof(T) == 8) return ev * eu * r * r;
  return Vec<T>::negative_mul_add(r, r, r);
}

// tau H-' of a vector of pairs.
template <bool Smooth, typename T>
typename Vec<T>::V pair_slope(typename Vec<T>::V v, typename Vec<T>::V ev, typename Vec<T>::V u, typename Vec<T>::V eu,
                              typename Vec<T>::V delta, typename Vec<T>::V rho_tau) {
  using X = Vec<T>;
  const auto r = sigma<T>(ev, eu);
  const auto curve = sigma_slope<T>(ev, eu, r);
  if constexpr (Smooth) return curve;
  return X::select(X::greater(v - u, delta), rho_tau, curve);
}

// The sums of one positive over an active set. Above the threshold only counts and distances are summed, and the steps
// at 0 are counted: rho, delta, start and offset then multiply exact numbers once, in float64.
template <bool Smooth, bool Slope, typename T>
struct PairSums {
  using X = Vec<T>;
  using V = typename X::V;
  V curve, slope, steps, linear, past;

  void clear() { curve = slope = steps = linear = past = X::set(0); }

  // Adds a vector of pairs. Returns its slopes.
  V add(V v, V ev, V u, V eu, V delta, V origin, V rho_tau) {
    const V zero = X::set(0), one = X::set(1);
    const V r = sigma<T>(ev, eu);
    V d = zero;
    if constexpr (Slope) d = sigma_slope<T>(ev, eu, r);
    if constexpr (Smooth) {
      curve = curve + r;
      if constexpr (Slope) slope = slope + d;
    } else {
      const V t = v - u;
      const auto above = X::greater(t, delta);
      curve = X::add_unless(above, curve, r);
      steps = X::add_where(X::greater_equal(t, zero), steps, one);
      linear = X::add_where(above, linear, one);
      past = X::add_where(above, past, t - origin);  // gap and threshold may be far larger than their difference
      if constexpr (Slope) {
        slope = X::add_unless(above, slope, d);
        d = X::select(above, rho_tau, d);
      }
    }
    return d;
  }
};

// Sums over the active set for Rows positives at once, which share its loads. `saved` takes the slopes,
// [Rows, padded active], if it is not null.
template <bool Smooth, bool Slope, bool Store, int Rows, typename T>
void rank_rows(const T* values, const T* exponentials, int active, const T* u, const T* eu, const Settings<T>& s,
               double* rank, double* slope, T* saved) {
  using X = Vec<T>;
  using V = typename X::V;
  const int stride = padded<T>(active);
  const V delta = X::set(s.delta), origin = X::set(s.origin), rho_tau = X::set(s.rho_tau);
  V score[Rows], exponential[Rows];
  for (int i = 0; i < Rows; ++i) {
    score[i] = X::set(u[i]);
    exponential[i] = X::set(eu[i]);
  }
  LaneSum<T> curves[Rows], slopes[Rows], steps[Rows], linear[Rows], past[Rows];
  for (int tile = 0; tile < active; tile += kTile * X::kWidth) {
    const int end = std::min(active, tile + kTile * X::kWidth);
    PairSums<Smooth, Slope, T> sums[Rows];
    for (int i = 0; i < Rows; ++i) sums[i].clear();
    for (int j = tile; j < end; j += X::kWidth) {
      const V v = X::load(values + j), ev = X::load(exponentials + j);
      for (int i = 0; i < Rows; ++i) {
        const V d = sums[i].add(v, ev, score[i], exponential[i], delta, origin, rho_tau);
        if constexpr (Store) X::store(saved + i * stride + j, d);
      }
    }
    for (int i = 0; i < Rows; ++i) {
      curves[i].add(sums[i].curve);
      if constexpr (Slope) slopes[i].add(sums[i].slope);
      if constexpr (!Smooth) {
        steps[i].add(sums[i].steps);
        linear[i].add(sums[i].linear);
        past[i].add(sums[i].past);
      }
    }
  }
  for (int i = 0; i < Rows; ++i) {
    double value = curves[i].total();
    if constexpr (Slope) slope[i] += slopes[i].total() / s.tau;
    if constexpr (!Smooth) {
      const double count = linear[i].total();
      value += s.exact_start * (steps[i].total() - count);
      if (count != 0) {
        value += linear_value(past[i].total(), count, s);
        if constexpr (Slope) slope[i] += s.exact_rho * count;
      }
    }
    rank[i] += value;
  }
}

template <bool Smooth, bool Slope, bool Store, typename T>
void rank_group(const T* values, const T* exponentials, int active, T top, const Positives<T>& p, const Group<T>& g,
                const Settings<T>& s, Sums<T> sums, T* saved) {
  int64_t i = g.begin;
  const auto run = [&](auto rows) {
    constexpr int kCount = decltype(rows)::value;
    for (; i + kCount <= g.end; i += kCount) {
      // Below 0 both surrogates are the sigmoid: positives above the whole active set have no steps and no linear part.
      const auto rank =
          top < p.score[i] ? rank_rows<true, Slope, Store, kCount, T> : rank_rows<Smooth, Slope, Store, kCount, T>;
      rank(values, exponentials, active, &p.score[i], &p.exponential[i], s, sums.rank + i,
           Slope ? sums.slope + i : nullptr, Store ? saved + (i - g.begin) * padded<T>(active) : nullptr);
    }
  };
  run(std::integral_constant<int, Vec<T>::kRows>());
  if constexpr (Vec<T>::kRows > 3) run(std::integral_constant<int, 3>());
  if constexpr (Vec<T>::kRows > 2) run(std::integral_constant<int, 2>());
  run(std::integral_constant<int, 1>());
}

template <bool Smooth, bool Slope, typename T>
bool rank_block_as(const Block<T>& block, const Positives<T>& p, int64_t first, int64_t last, const Settings<T>& s,
                   Scratch<T>& scratch, Sums<T> sums, SavedSlopes<T>* saved) {
  using X = Vec<T>;
  bool nan = false;
  const int kept = prune(block, p.score[p.groups[first].begin], s, scratch, nan);
  if (nan) return true;
  const int vectors = padded<T>(block.count) / X::kWidth;
  if (typename SavedSlopes<T>::Entry* entry = saved ? saved->add(-1, kept, 0, vectors) : nullptr) {
    entry->active = saved->add_bits(scratch.kept_bits, vectors);
  } else {
    saved = nullptr;
  }
  const T top = highest(scratch.kept, kept);
  for (int64_t index = first; index < last && kept; ++index) {
    const Group<T>& g = p.groups[index];
    const T low = p.score[g.begin], high = p.score[g.end - 1];
    if (top - low < -s.cut) break;  // nor does it reach any higher group
    LaneSum<T> linear_sum;
    const Classes<T> classes =
        classify(scratch.kept, kept, top, low, high, linear_distance<Smooth>(g, s), index == first, s, scratch,
                 [&](int, unsigned bits, typename X::V v) {
                   linear_sum.add(X::select(X::lanes(bits), (v - X::set(high)) - X::set(s.origin), X::set(0)));
                 });
    const int active = g.finite ? classes.count : 0;
    const int words = padded<T>(kept) / X::kWidth;
    typename SavedSlopes<T>::Entry* entry = nullptr;
    if (saved) {
      entry = saved->add(index, active, (g.end - g.begin) * padded<T>(active), 2 * words);
      if (!entry) saved = nullptr;
    }
    if (entry && !classes.all) entry->active = saved->add_bits(scratch.active_bits, words);
    if (entry && classes.above) entry->above = saved->add_bits(scratch.above_bits, words);
    if (classes.above) {
      const double sum = linear_sum.total(), count = classes.above;
      for (int64_t i = g.begin; i < g.end; ++i) {
        if constexpr (Smooth) {
          sums.rank[i] += count;
        } else {
          const double higher = g.finite ? static_cast<double>(high) - static_cast<double>(p.score[i]) : 0;
          sums.rank[i] += linear_value(sum + count * higher, count, s);
          if constexpr (Slope) sums.slope[i] += s.exact_rho * count;
        }
      }
    }
    if (!g.finite) {  // the active set of an infinite positive is its ties
      const double tie = (Smooth ? 0.5 : 0.5 + s.exact_start) * classes.count;
      for (int64_t i = g.begin; i < g.end; ++i) sums.rank[i] += tie;
    }
    if (!active) continue;
    active_exponentials(classes.active, active, g.centre, s, scratch);
    if (Slope && entry) {
      rank_group<Smooth, Slope, Slope>(classes.active, scratch.active_exponential, active, top, p, g, s, sums,
                                       saved->slope + entry->slopes);
    } else {
      rank_group<Smooth, Slope, false>(classes.active, scratch.active_exponential, active, top, p, g, s, sums,
                                       static_cast<T*>(nullptr));
    }
  }
  return false;
}

template <typename T>
bool rank_block(const Block<T>& block, const Positives<T>& p, int64_t first, int64_t last, const Settings<T>& s,
                Scratch<T>& scratch, Sums<T> sums, SavedSlopes<T>* saved) {
  const bool slope = sums.slope != nullptr;
  if (s.surrogate == Surrogate::kSmooth) {
    return slope ? rank_block_as<true, true>(block, p, first, last, s, scratch, sums, saved)
                 : rank_block_as<true, false>(block, p, first, last, s, scratch, sums, saved);
  }
  return slope ? rank_block_as<false, true>(block, p, first, last, s, scratch, sums, saved)
               : rank_block_as<false, false>(block, p, first, last, s, scratch, sums, saved);
}

// A sum in T of which the rounding errors are kept, for short partial sums: columns of one score meet the same
// roundings again and again, so that over a group they would add up where they should average out.
template <typename T>
struct LongSum {
  using V = typename Vec<T>::V;
  V sum, lost;

  LongSum()
      : sum(Vec<T>::set(0)), lost(Vec<T>::set(0)) {}  // an implicit one would be compiled for the oldest processor
  void add(V part) {                                  // Knuth's two-sum
    const V next = sum + part;
    const V part_used = next - sum;
    lost = lost + ((sum - (next - part_used)) + (part - part_used));
    sum = next;
  }
  V total() const { return sum + lost; }
};

// The positives of a group in runs short enough for a plain sum: body(begin, end) for each.
template <typename T, typename Body>
void for_runs(const Group<T>& g, const Body& body) {
  for (int64_t i = g.begin; i < g.end; i += kRun) body(i, std::min(g.end, i + kRun));
}

// active_gradient[j] = sum over the group of w_i tau H'(s_j - s_i), for Columns vectors of the active set at once.
template <bool Smooth, int Columns, typename T>
void gradient_columns(const T* values, Scratch<T>& scratch, int j, const Positives<T>& p, const Group<T>& g,
                      const Settings<T>& s) {
  using X = Vec<T>;
  using V = typename X::V;
  const V delta = X::set(s.delta), rho_tau = X::set(s.rho_tau);
  V v[Columns], ev[Columns];
  LongSum<T> sums[Columns];
  for (int k = 0; k < Columns; ++k) {
    v[k] = X::load(values + j + k * X::kWidth);
    ev[k] = X::load(scratch.active_exponential + j + k * X::kWidth);
  }
  for_runs(g, [&](int64_t begin, int64_t end) {
    V part[Columns];
    for (int k = 0; k < Columns; ++k) part[k] = X::set(0);
    for (int64_t i = begin; i < end; ++i) {
      const V u = X::set(p.score[i]), eu = X::set(p.exponential[i]), w = X::set(p.weight_negative[i]);
      for (int k = 0; k < Columns; ++k) {
        part[k] = X::mul_add(w, pair_slope<Smooth, T>(v[k], ev[k], u, eu, delta, rho_tau), part[k]);
      }
    }
    for (int k = 0; k < Columns; ++k) sums[k].add(part[k]);
  });
  for (int k = 0; k < Columns; ++k) X::store(scratch.active_gradient + j + k * X::kWidth, sums[k].total());
}

// The same from saved slopes, [positives of the group, padded active].
template <typename T>
void gradient_from_saved(const T* slopes, int active, Scratch<T>& scratch, const Positives<T>& p, const Group<T>& g) {
  using X = Vec<T>;
  const int stride = padded<T>(active);
  for (int j = 0; j < active; j += X::kWidth) {
    LongSum<T> sum;
    const T* slope = slopes + j;
    for_runs(g, [&](int64_t begin, int64_t end) {
      auto part = X::set(0);
      for (int64_t i = begin; i < end; ++i, slope += stride) {
        part = X::mul_add(X::set(p.weight_negative[i]), X::load(slope), part);
      }
      sum.add(part);
    });
    X::store(scratch.active_gradient + j, sum.total());
  }
}

// Adds active_gradient to the kept elements it belongs to; active_bits is null when all of them are active.
template <typename T>
void spread_active(int kept, const uint16_t* active_bits, Scratch<T>& scratch) {
  using X = Vec<T>;
  int front = 0;
  for (int j = 0; j < kept; j += X::kWidth) {
    if (!active_bits) {
      X::accumulate(scratch.gradient + j, X::load(scratch.active_gradient + j));
      continue;
    }
    const unsigned bits = active_bits[j / X::kWidth];
    if (!bits) continue;
    X::accumulate(scratch.gradient + j, X::expand(X::load(scratch.active_gradient + front), bits));
    front += __builtin_popcount(bits);
  }
}

// scratch.kept becomes the gradient of the kept elements.
template <bool Smooth, typename T>
void gradient_kept(const Block<T>& block, const Positives<T>& p, const Settings<T>& s, double scale,
                   Scratch<T>& scratch, SavedSlopes<T>* saved) {
  using X = Vec<T>;
  using V = typename X::V;
  bool nan = false;
  const int kept = saved ? saved->entry[saved->next++].count : prune(block, p.score[0], s, scratch, nan);
  if (!kept) return;
  const int full = padded<T>(kept);
  const double to_slope = scale * p.unit / s.tau;
  if (saved && saved->single()) {  // one group, and all elements active in it: the general case, shortened
    const typename SavedSlopes<T>::Entry& entry = saved->entry[saved->next++];
    gradient_from_saved(saved->slope + entry.slopes, entry.count, scratch, p, p.groups[entry.group]);
    for (int j = 0; j < full; ++j) {
      scratch.kept[j] = static_cast<T>(static_cast<double>(scratch.active_gradient[j]) * to_slope);
    }
    return;
  }
  std::fill(scratch.gradient, scratch.gradient + full, 0.0);
  std::fill(scratch.linear, scratch.linear + full, T(0));
  // Groups ascend, so an element in the linear part of one is in that of every group before it that has one: a count of
  // groups says it all.
  double weights = 0;
  V groups = X::set(0);
  scratch.linear_slope.assign(1, 0.0);
  const auto in_linear_part = [&](int j, unsigned bits, V) {
    if constexpr (!Smooth) {
      X::store(scratch.linear + j, X::select(X::lanes(bits), groups, X::load(scratch.linear + j)));
    }
  };
  const auto weigh = [&](const Group<T>& g) {
    weights += g.weight;
    groups = X::set(static_cast<T>(scratch.linear_slope.size()));
    scratch.linear_slope.push_back(s.exact_rho * weights * scale);
  };
  if (saved) {
    for (; saved->next < saved->entries && saved->entry[saved->next].group >= 0; ++saved->next) {
      const typename SavedSlopes<T>::Entry& entry = saved->entry[saved->next];
      const Group<T>& g = p.groups[entry.group];
      if (entry.above >= 0) {
        weigh(g);
        for (int j = 0; j < kept; j += X::kWidth) {
          const unsigned bits = saved->bits[entry.above + j / X::kWidth];
          if (bits) in_linear_part(j, bits, groups);
        }
      }
      if (!entry.count) continue;
      gradient_from_saved(saved->slope + entry.slopes, entry.count, scratch, p, g);
      spread_active(kept, entry.active < 0 ? nullptr : saved->bits + entry.active, scratch);
    }
  } else {
    const T top = highest(scratch.kept, kept);
    for (const Group<T>& g : p.groups) {
      const T low = p.score[g.begin], high = p.score[g.end - 1];
      if (top - low < -s.cut) break;
      const T distance = linear_distance<Smooth>(g, s);
      if (distance < infinity<T>()) weigh(g);
      const Classes<T> classes =
          classify(scratch.kept, kept, top, low, high, distance, g.begin == 0, s, scratch, in_linear_part);
      const int active = classes.count;
      if (!active || !g.finite) continue;
      active_exponentials(classes.active, active, g.centre, s, scratch);
      int j = 0;
      for (; j + 4 * X::kWidth <= active; j += 4 * X::kWidth) {
        gradient_columns<Smooth, 4>(classes.active, scratch, j, p, g, s);
      }
      for (; j < active; j += X::kWidth) gradient_columns<Smooth, 1>(classes.active, scratch, j, p, g, s);
      spread_active(kept, classes.all ? nullptr : scratch.active_bits, scratch);
    }
  }
  for (int j = 0; j < full; ++j) {
    scratch.kept[j] =
        static_cast<T>(scratch.gradient[j] * to_slope + scratch.linear_slope[static_cast<int64_t>(scratch.linear[j])]);
  }
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

template <typename T>
void gradient_block(const Block<T>& block, const Positives<T>& p, const Settings<T>& s, double scale,
                    const Hinge<T>* hinge, const T* column_scale, Scratch<T>& scratch, T* out, SavedSlopes<T>* saved) {
  const uint16_t* const kept_bits = saved ? saved->bits + saved->entry[saved->next].active : scratch.kept_bits;
  if (p.score.empty()) {
    std::fill(scratch.kept_bits, scratch.kept_bits + padded<T>(block.count) / Vec<T>::kWidth, uint16_t(0));
  } else if (s.surrogate == Surrogate::kSmooth) {
    gradient_kept<true>(block, p, s, scale, scratch, saved);
  } else {
    gradient_kept<false>(block, p, s, scale, scratch, saved);
  }
  if (hinge) {
    unpack<true>(block, kept_bits, hinge, column_scale, scratch, out);
  } else {
    unpack<false>(block, kept_bits, hinge, column_scale, scratch, out);
  }
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

// The references of these two are the positives themselves, in ascending pieces of a block.
template <typename T>
void rank_positives(const Positives<T>& p, int64_t first, int64_t last, const Settings<T>& s, Scratch<T>& scratch,
                    double* rank) {
  for (int64_t piece = 0; piece < p.size(); piece += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, p.size() - piece));
    std::copy_n(p.score.data() + piece, count, scratch.kept);
    const T top = scratch.kept[count - 1];
    for (int64_t index = first; index < last; ++index) {
      const Group<T>& g = p.groups[index];
      const Classes<T> classes = classify(scratch.kept, count, top, p.score[g.begin], p.score[g.end - 1], s.cut, false,
                                          s, scratch, [](int, unsigned, typename Vec<T>::V) {});
      // The pieces ascend, so what lies before the active set was skipped, and self stands at i - before.
      const int64_t before = piece + count - classes.above - classes.count;
      if (g.finite && classes.count) active_exponentials(classes.active, classes.count, g.centre, s, scratch);
      for (int64_t i = g.begin; i < g.end; ++i) {
        rank[i] += classes.above;
        const int64_t self = i - before;
        const bool here = self >= 0 && self < classes.count;
        if (!g.finite) {
          rank[i] += 0.5 * (classes.count - (here ? 1 : 0));
        } else if (classes.count) {
          const T own = here ? scratch.active_exponential[self] : T(0);
          if (here) scratch.active_exponential[self] = kVanish<T>;  // self is left out, not subtracted
          rank_rows<true, false, false, 1>(classes.active, scratch.active_exponential, classes.count, &p.score[i],
                                           &p.exponential[i], s, rank + i, nullptr, static_cast<T*>(nullptr));
          if (here) scratch.active_exponential[self] = own;
        }
      }
    }
  }
}

// sigma' is even, so what j gets from i and what it gives as a positive itself combine into (w+_i - w+_j) sigma'.
template <typename T>
void gradient_positives(const Positives<T>& p, int64_t begin, int64_t end, const Settings<T>& s, Scratch<T>& scratch,
                        double* out) {
  using X = Vec<T>;
  using V = typename X::V;
  const V none = X::set(0);
  const int count = static_cast<int>(end - begin);
  std::copy_n(p.score.data() + begin, count, scratch.kept);
  std::fill(scratch.gradient, scratch.gradient + padded<T>(count), 0.0);
  const T top = scratch.kept[count - 1];
  for (const Group<T>& g : p.groups) {
    if (!g.finite) continue;
    const Classes<T> classes = classify(scratch.kept, count, top, p.score[g.begin], p.score[g.end - 1], s.cut, false, s,
                                        scratch, [](int, unsigned, V) {});
    const int active = classes.count;
    if (!active) continue;
    active_exponentials(classes.active, active, g.centre, s, scratch);
    const int64_t before = begin + count - classes.above - active;
    std::copy_n(p.weight_positive.data() + before, active, scratch.active_weight);
    X::store(scratch.active_weight + active, X::set(0));
    for (int j = 0; j < active; j += X::kWidth) {
      const V ev = X::load(scratch.active_exponential + j), own = X::load(scratch.active_weight + j);
      LongSum<T> sum;
      for_runs(g, [&](int64_t begin, int64_t end) {
        V part = X::set(0);
        for (int64_t i = begin; i < end; ++i) {
          const V curve = pair_slope<true, T>(none, ev, none, X::set(p.exponential[i]), none, none);
          part = X::mul_add(X::set(p.weight_positive[i]) - own, curve, part);
        }
        sum.add(part);
      });
      X::store(scratch.active_gradient + j, sum.total());
    }
    spread_active(count, scratch.active_bits, scratch);
  }
  for (int j = 0; j < count; ++j) out[j] = scratch.gradient[j] * p.unit / s.tau;
}

template <typename T>
bool any_nan(const Block<T>& block, const Settings<T>& s, Scratch<T>& scratch) {
  bool nan = false;
  prune(block, std::numeric_limits<T>::infinity(), s, scratch, nan);
  return nan;
}

template <typename T>
void positive_exponentials(Positives<T>& p, const Settings<T>& s) {
  using X = Vec<T>;
  for (const Group<T>& g : p.groups) {
    if (!g.finite) continue;
    for (int64_t i = g.begin; i < g.end; i += X::kWidth) {
      const int left = static_cast<int>(std::min<int64_t>(X::kWidth, g.end - i));
      const auto u = X::load_first(&p.score[i], left);
      X::store_first(&p.exponential[i], left, difference_exponential<T>(u, X::set(g.centre), s));
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

template <typename T>
constexpr Kernels<T> make_kernels() {
  return {any_nan<T>,       positive_exponentials<T>, rank_block<T>, gradient_block<T>, scale_block<T>,
          remove_radial<T>, hinge_block<T>,           ap_weights,    rank_positives<T>, gradient_positives<T>};
}

}  // namespace
