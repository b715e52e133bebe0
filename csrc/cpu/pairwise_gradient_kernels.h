// The pairwise kernels: the gradient of a block of negatives from the weights of the positives, by the classes and groups
// of pairwise_rank_kernels.h, or by slopes that ranking has saved.

namespace {

// Positives whose shares of a gradient are summed plainly in T.
constexpr int64_t kRun = 8;

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
constexpr Kernels<T> make_kernels() {
  return {any_nan<T>,       positive_exponentials<T>, rank_block<T>, gradient_block<T>, scale_block<T>,
          remove_radial<T>, hinge_block<T>,           ap_weights,    rank_positives<T>, gradient_positives<T>};
}

}  // namespace
