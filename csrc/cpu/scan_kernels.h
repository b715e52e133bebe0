// What reads the sorted scan, in the vectors of whichever instruction set includes this file (after scan_fields_kernels.h): ranks
// of positives, and slopes of negatives. See scan.h.

namespace {

// ---- ranks ----

// 1, x, x^2 ... x^(kTerms - 1)
void powers_from_0(double x, Vec<double>::V* out) {
  using D = Vec<double>;
  D::V power = D::set(1), square = D::set(x);
  for (int bit = 1; bit < D::kWidth; bit *= 2) {
    unsigned with = 0;  // lanes whose exponent has this bit
    for (int lane = 0; lane < D::kWidth; ++lane) with |= (lane & bit ? 1u : 0u) << lane;
    power = D::select(D::lanes(with), power * square, power);
    square = square * square;
  }
  for (int part = 0; part < kTermVectors; ++part) {
    out[part] = power;
    power = power * square;
  }
}

// Reads ranks and slopes of ascending targets, one after the other.
class Ranks {
  using X = Vec<float>;
  using V = X::V;
  using D = Vec<double>;
  static constexpr int kTogether = D::kWidth / 2;  // targets whose lanes are added up at once
  static constexpr int kNearTerms = 7;             // sources that are met lie within half a box of the middle

 public:
  Ranks(const Boxes& boxes, const Sources& sources, const Points& targets, const Settings<float>& s)
      : boxes_(boxes),
        sources_(sources),
        targets_(targets),
        s_(s),
        v_(sources.points->value.data()),
        n_(sources.points->n),
        first_(sources.points->first.data()),
        smooth_(s.surrogate == Surrogate::kSmooth),
        near_(s) {}

  void read(int64_t begin, int64_t end, double* rank, double* slope) {
    if (begin < end) seek(begin);
    const double rate = 1 / s_.tau;
    for (int64_t i = begin; i < end; i += kTogether) {
      const int count = static_cast<int>(std::min<int64_t>(kTogether, end - i));
      D::V lanes[2 * kTogether];
      double linear[kTogether], tails[kTogether];
      for (D::V& lane : lanes) lane = D::set(0);
      for (int k = 0; k < count; ++k) {
        const float x = targets_.value[i + k];
        walk(i + k, x);
        linear[k] = tails[k] = 0;
        read_fields(x, lanes[2 * k], lanes[2 * k + 1]);
        if (past_ < n_) {
          meet(x, lanes[2 * k], lanes[2 * k + 1]);
          linear[k] = add_linear(static_cast<double>(x), lanes[2 * k]);
          tails[k] = s_.exact_rho * static_cast<double>(n_ - past_);
        }
        if (!smooth_) linear[k] += s_.exact_start * static_cast<double>(past_ - step_);
      }
      alignas(64) double sum[2 * kTogether];
      D::sums(lanes, sum);
      for (int k = 0; k < count; ++k) rank[i + k] = sum[2 * k] + linear[k];
      for (int k = 0; slope && k < count; ++k) slope[i + k] = sum[2 * k + 1] * rate + tails[k];
    }
  }

 private:
  bool is_past(float v, float x) const { return v - x > s_.delta; }

  // Before the target i.
  void seek(int64_t i) {
    const float x = targets_.value[i];
    box_ = std::upper_bound(targets_.first.begin(), targets_.first.end(), static_cast<uint32_t>(i)) -
           targets_.first.begin() - 1;
    step_ = std::lower_bound(v_, v_ + n_, x) - v_;
    past_ = n_;
    if (!smooth_) past_ = std::partition_point(v_, v_ + n_, [&](float v) { return !is_past(v, x); }) - v_;
    threshold_ = 0;
    field_box_ = -1;
  }

  // To the target i: its box, its step, its threshold and the box of that.
  void walk(int64_t i, float x) {
    while (targets_.first[box_ + 1] <= i) ++box_;
    if (!smooth_) {
      step_ = advance(step_, [&](V v) { return X::bits(X::greater(X::set(x), v)); });
      past_ =
          advance(std::max(past_, step_), [&](V v) { return ~X::bits(X::greater(v - X::set(x), X::set(s_.delta))); });
    }
    while (threshold_ < boxes_.size() && first_[threshold_ + 1] <= past_) ++threshold_;
    if (box_ != field_box_ || threshold_ != field_threshold_) set_fields();
  }
  // From `at` past all sources for which `bits` has a lane: these come first.
  template <typename Bits>
  int64_t advance(int64_t at, const Bits& bits) const {
    constexpr unsigned kAll = (1u << X::kWidth) - 1;
    while (at < n_) {
      const unsigned others = ~bits(X::load(v_ + at)) & kAll;
      if (others) return std::min<int64_t>(n_, at + __builtin_ctz(others));
      at += X::kWidth;
    }
    return n_;
  }

  // What the targets of a box read whose thresholds lie in the same box: of all whole boxes the field, of the box of
  // the threshold a table that takes moments.
  void set_fields() {
    const int64_t b = box_, t = threshold_;
    if (b != field_box_) {
      below_ = {};
      if (first_[b] > 0) below_.add_below(from_below(b));
    }
    if (t > b && (b != field_box_ || field_threshold_ == b)) {
      if (first_[b + 1] > first_[b]) own_.add<false>(&sources_.moment[b * kTerms], below_);
    }
    field_box_ = b;
    field_threshold_ = t;
    field_ = below_;
    translation_ = &own_;
    if (t == b) return;
    Sums decays;
    if (t < boxes_.size()) {
      decays = Sums::decays(boxes_.centre[t] - boxes_.centre[b], s_.tau);
      of_threshold_ = Translation<true>(decays);
      translation_ = &of_threshold_;
    }
    const int64_t between = first_[t] - first_[b + 1];
    if (!between) return;
    Sums above = Sums::powers(boxes_.decay[b + 1]) * Sums::load(&sources_.from[(b + 1) * kStride]);
    if (t < boxes_.size()) above = above - decays * Sums::load(&sources_.from[t * kStride]);
    field_.add_above(above, static_cast<double>(between));
  }
  // All sources in lower boxes, at the centre of this one.
  Sums from_below(int64_t b) const {
    return Sums::powers(boxes_.decay[b]) * Sums::load(&sources_.upto[(b - 1) * kStride]);
  }

  void read_fields(float x, D::V& curve, D::V& slope) {
    x_ = (static_cast<double>(x) - boxes_.centre[box_]) / s_.tau;
    D::V power[kTermVectors];
    powers_from_0(x_, power);
    for (int part = 0; part < kTermVectors; ++part) {
      curve = D::mul_add(field_.curve[part], power[part], curve);
      slope = D::mul_add(field_.slope[part], power[part], slope);
    }
  }

  // The sources of the threshold's box up to the threshold: whole chunks by moments, the rest one by one.
  void meet(float x, D::V& curve, D::V& slope) const {
    int64_t from = first_[threshold_];
    const int64_t chunk = past_ / sources_.chunk;
    if (chunk * sources_.chunk > from) {
      from = chunk * sources_.chunk;
      translation_->read(&sources_.running[chunk * kTerms], x_, curve, slope);
    }
    for (int64_t j = from; j < past_; j += X::kWidth) {
      const V z = ((X::load(v_ + j) - X::set(x)) - X::set(near_.middle)) * X::set(s_.rate_hi);
      const auto in = X::lanes(past_ - j < X::kWidth ? (1u << (past_ - j)) - 1 : (1u << X::kWidth) - 1);
      add_widened(X::select(in, near_.at(near_.curve, z), X::set(0)), curve);
      add_widened(X::select(in, near_.at(near_.slope, z), X::set(0)), slope);
    }
  }
  static void add_widened(V v, D::V& sum) {
    alignas(64) double wide[X::kWidth];
    X::widen(v, wide);
    for (int k = 0; k < X::kWidth; k += D::kWidth) sum = sum + D::load(wide + k);
  }

  // What lies past the threshold. The rest of its chunk goes to `curve`.
  double add_linear(double u, D::V& curve) const {
    const int64_t end = std::min<int64_t>((past_ / sources_.chunk + 1) * sources_.chunk, n_);
    const D::V origin = D::set(u + s_.exact_delta), rho = D::set(s_.exact_rho);
    for (int64_t j = past_; j < end; j += D::kWidth) {
      const D::V past = (D::widened(v_ + j) - origin) * rho;
      curve = curve + (end - j < D::kWidth ? D::select(D::lanes((1u << (end - j)) - 1), past, D::set(0)) : past);
    }
    double sum = 0;
    if (end < n_) {
      const double gap = static_cast<double>(v_[end]) - u - s_.exact_delta;
      sum = sources_.beyond[end / sources_.chunk] + static_cast<double>(n_ - end) * gap;
    }
    return s_.exact_rho * sum + s_.exact_offset * static_cast<double>(n_ - past_);
  }

  const Boxes& boxes_;
  const Sources& sources_;
  const Points& targets_;
  const Settings<float>& s_;
  const float* const v_;
  const int64_t n_;
  const uint32_t* const first_;
  const bool smooth_;
  const ThresholdCurve<kNearTerms> near_;
  const Translation<true>& own_ = Translation<true>::own();

  int64_t box_ = 0, step_ = 0, past_ = 0, threshold_ = 0;  // of the target; its threshold is in the box `threshold_`
  int64_t field_box_ = -1, field_threshold_ = -1;
  Field<true> below_, field_;
  const Translation<true>* translation_ = &own_;
  Translation<true> of_threshold_;
  double x_ = 0;
};

void scan_ranks(const Boxes& boxes, const Sources& sources, const Points& targets, int64_t begin, int64_t end,
                const Settings<float>& s, double* rank, double* slope) {
  Ranks(boxes, sources, targets, s).read(begin, end, rank, slope);
}

// ---- slopes ----

// Reads slopes of ascending targets, which here are the higher ones: H-'(target - source), the sources weighted.
class Slopes {
  using X = Vec<float>;
  using V = X::V;
  using D = Vec<double>;
  static constexpr int kTogether = 16, kVectors = kTogether / X::kWidth;  // targets
  static constexpr int kNearTerms = 10;  // what they meet lies within one and a half boxes of the middle
  static constexpr int kRun = 8;         // sources whose shares are summed in float

 public:
  Slopes(const Boxes& boxes, const Sources& sources, const Points& targets, const Settings<float>& s)
      : boxes_(boxes),
        sources_(sources),
        targets_(targets),
        s_(s),
        u_(sources.points->value.data()),
        n_(sources.points->n),
        first_(sources.points->first.data()),
        smooth_(s.surrogate == Surrogate::kSmooth),
        near_(s) {}

  // put(j, slope) of targets [begin, end), in units of 1 / tau.
  template <typename Put>
  void read(int64_t begin, int64_t end, const Put& put) {
    const auto& of_box = targets_.first;
    int64_t b = std::upper_bound(of_box.begin(), of_box.end(), static_cast<uint32_t>(begin)) - of_box.begin() - 1;
    if (!smooth_ && begin < end) {
      const float x = targets_.value[begin];
      last_ = std::partition_point(u_, u_ + n_, [&](float u) { return is_past(x, u); }) - u_;
    }
    double before = 0;
    for (int64_t j = begin; j < end;) {
      if (j > begin && targets_.value[j] == targets_.value[j - 1]) {
        put(j++, before);  // to the bit, whoever they stand with
        continue;
      }
      while (of_box[b + 1] <= j) ++b;
      const int count = static_cast<int>(std::min<int64_t>({kTogether, of_box[b + 1] - j, end - j}));
      together(b, j, count);
      for (int k = 0; k < count; ++k) put(j + k, slope_[k]);
      before = slope_[count - 1];
      j += count;
    }
  }

 private:
  bool is_past(float v, float u) const { return v - u > s_.delta; }

  // Fills slope_ for `count` neighbours in the box b.
  void together(int64_t b, int64_t j, int count) {
    const float* const x = targets_.value.data() + j;
    if (!smooth_) {  // sources before first_past_ are past the threshold for all, from last_ on for none
      while (last_ < n_ && is_past(x[0], u_[last_])) ++last_;
      first_past_ = last_;
      while (last_ < n_ && is_past(x[count - 1], u_[last_])) ++last_;
    }
    if (b != box_ || last_ > end_) set_field(b);
    const double past = smooth_ ? 0 : s_.exact_rho * s_.tau * sources_.passed[first_past_];
    alignas(64) double coefficient[kTerms];
    for (int m = 0; m < kTermVectors; ++m) D::store(coefficient + m * D::kWidth, field_.slope[m]);
    for (int k = 0; k < kTogether; k += D::kWidth) {
      const D::V z = (D::widened(x + k) - D::set(boxes_.centre[b])) * D::set(1 / s_.tau);
      D::V p = D::set(coefficient[kTerms - 1]);
      for (int m = kTerms - 2; m >= 0; --m) p = D::mul_add(p, z, D::set(coefficient[m]));
      D::store(slope_ + k, p + D::set(past));
    }
    if (first_past_ < end_) meet(x);
  }

  // The field of all sources from end_ on, which is at last_ or a little further, in the box b.
  void set_field(int64_t b) {
    if (b != box_) {
      above_ = {};
      if (first_[b + 1] < n_) {
        above_.add_above(Sums::powers(boxes_.decay[b + 1]) * Sums::load(&sources_.from[(b + 1) * kStride]), 0);
      }
      box_ = b;
    }
    field_ = above_;
    int64_t whole = std::upper_bound(first_, first_ + boxes_.size() + 1, static_cast<uint32_t>(last_)) - first_ - 1;
    end_ = last_;
    if (whole < boxes_.size() && last_ > first_[whole]) {  // in the midst of a box
      const int64_t chunk = (last_ + sources_.chunk - 1) / sources_.chunk;
      end_ = std::min<int64_t>(chunk * sources_.chunk, first_[whole + 1]);
      if (end_ < first_[whole + 1]) add_rest(whole, chunk);
      ++whole;
    }
    if (whole > b) return;
    if (first_[b + 1] > first_[b]) own_.add<true>(&sources_.moment[b * kTerms], field_);
    if (first_[whole] == first_[b]) return;
    Sums below = Sums::powers(boxes_.decay[b]) * Sums::load(&sources_.upto[(b - 1) * kStride]);
    if (first_[whole] > 0) {
      below = below - Sums::decays(boxes_.centre[b] - boxes_.centre[whole - 1], s_.tau) *
                          Sums::load(&sources_.upto[(whole - 1) * kStride]);
    }
    field_.add_below(below);
  }
  // The sources of the box q from the chunk on.
  void add_rest(int64_t q, int64_t chunk) {
    double rest[kTerms];
    const double *const all = &sources_.moment[q * kTerms], *const before = &sources_.running[chunk * kTerms];
    for (int m = 0; m < kTerms; ++m) rest[m] = all[m] - before[m];
    if (q == box_) return own_.add<true>(rest, field_);
    Translation<false>(Sums::decays(boxes_.centre[box_] - boxes_.centre[q], s_.tau)).add<true>(rest, field_);
  }

  // Sources around the thresholds, one by one.
  void meet(const float* x) {
    const V middle = X::set(near_.middle), rate = X::set(s_.rate_hi), delta = X::set(s_.delta);
    const V rho = X::set(s_.rho_tau);
    for (int64_t run = first_past_; run < end_; run += kRun) {
      V sum[kVectors];
      for (V& v : sum) v = X::set(0);
      for (int64_t i = run; i < std::min(end_, run + kRun); ++i) {
        const V u = X::set(u_[i]), w = X::set(sources_.weight[i]);
        for (int r = 0; r < kVectors; ++r) {
          const V t = X::load(x + r * X::kWidth) - u, z = X::clamp((t - middle) * rate, 1);
          sum[r] = X::mul_add(w, X::select(X::greater(t, delta), rho, near_.at(near_.slope, z)), sum[r]);
        }
      }
      for (int r = 0; r < kVectors; ++r) X::accumulate(slope_ + r * X::kWidth, sum[r]);
    }
  }

  const Boxes& boxes_;
  const Sources& sources_;
  const Points& targets_;
  const Settings<float>& s_;
  const float* const u_;
  const int64_t n_;
  const uint32_t* const first_;
  const bool smooth_;
  const ThresholdCurve<kNearTerms> near_;
  const Translation<false>& own_ = Translation<false>::own();

  int64_t first_past_ = 0, last_ = 0, end_ = 0, box_ = -1;
  Field<false> above_, field_;
  alignas(64) double slope_[kTogether];
};

// out[column[j]] = scale times the slope of target j.
void scan_slopes(const Boxes& boxes, const Sources& sources, const Points& targets, int64_t begin, int64_t end,
                 const Settings<float>& s, double scale, const uint32_t* column, float* out) {
  Slopes(boxes, sources, targets, s).read(begin, end, [&](int64_t j, double slope) {
    out[column[j]] = static_cast<float>(slope * scale);
  });
}

// out[j] = the slope of target j.
void scan_slopes_in_order(const Boxes& boxes, const Sources& sources, const Points& targets, int64_t begin, int64_t end,
                          const Settings<float>& s, double* out) {
  Slopes(boxes, sources, targets, s).read(begin, end, [&](int64_t j, double slope) { out[j] = slope; });
}

constexpr ScanKernels make_scan() {
  return {scan_decays, scan_moments, scan_up, scan_down, scan_linear, scan_ranks, scan_slopes, scan_slopes_in_order};
}

}  // namespace
