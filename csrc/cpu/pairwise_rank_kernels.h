// The pairwise kernels: ranks of the positives of a row among a block of its negatives, in the vectors of whichever
// instruction set includes this file.
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

namespace {

// A group of up to so many positives meets its linear part pair by pair: see linear_distance().
constexpr int64_t kFew = 4;

// An exponential that makes any product with a positive's vanish in 1 / (1 + product), and stay finite.
template <typename T>
constexpr T kVanish = sizeof(T) == 4 ? T(1e26) : T(1e250);

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

// rho (t - delta) + offset over `count` pairs whose distances above the threshold, as rounded to T, add up to `past`.
// With rho = 0 the linear part is flat, even at an infinite distance: 0 times infinity is not meant.
template <typename T>
double linear_value(double past, double count, const Settings<T>& s) {
  const double shift = static_cast<double>(s.origin) - s.exact_delta;
  return (s.exact_rho == 0 ? 0 : s.exact_rho * (past + count * shift)) + s.exact_offset * count;
}

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

}  // namespace
