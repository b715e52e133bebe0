// What reads the sorted scan, in the vectors of whichever instruction set includes this file (after scan_fields_kernels.h): ranks
// of positives, and slopes of negatives. See scan.h.

namespace {

// ---- ranks ----

// Of a field.
Vec<double>::V polynomial(const double* coefficient, Vec<double>::V z) {
  using D = Vec<double>;
  const D::V square = z * z;
  D::V even = D::set(coefficient[kTerms - 2]), odd = D::set(coefficient[kTerms - 1]);
  for (int m = kTerms - 4; m >= 0; m -= 2) {  // two sums, for one would wait for itself
    even = D::mul_add(even, square, D::set(coefficient[m]));
    odd = D::mul_add(odd, square, D::set(coefficient[m + 1]));
  }
  return D::mul_add(odd, z, even);
}

// Where in ascending sources ascending targets belong: at the first source v for which holds(v, target), as it does for
// all after it.
template <typename Holds>
class Places {
  using X = Vec<float>;

 public:
  Places(const float* v, int64_t n, const Holds& holds) : v_(v), n_(n), holds_(holds) {}

  // Of `count` targets, none of which belongs before `at`. Returns where to go on.
  int64_t find(int64_t at, const float* target, int count, int64_t* place) const {
    for (int k = 0; k < count; ++k) {
      const auto x = X::set(target[k]);
      unsigned bits = 0;
      // From vector to vector, not from place to place: the next target need not wait for this one's.
      while (at < n_ && !(bits = X::bits(holds_(X::load(v_ + at), x)))) at += X::kWidth;
      place[k] = bits ? std::min<int64_t>(n_, at + __builtin_ctz(bits)) : n_;
    }
    return at;
  }

 private:
  const float* const v_;
  const int64_t n_;
  const Holds holds_;
};

// Reads ranks and slopes of ascending targets, one after the other.
class Ranks {
  using X = Vec<float>;
  using V = X::V;
  using D = Vec<double>;
  static constexpr int kTogether = D::kWidth / 2;  // targets whose lanes are added up at once
  static constexpr int kMany = 128;                // targets that are placed at once
  static constexpr int kChunk = Sources::kChunk;
  static constexpr int kNearTerms = 7;  // sources that are met lie within half a box of the middle

 public:
  Ranks(const Boxes& boxes, const Sources& sources, const Points& targets, const Settings<float>& s)
      : boxes_(boxes),
        sources_(sources),
        targets_(targets),
        s_(s),
        v_(sources.points->value.data()),
        n_(sources.points->n),
        first_(sources.points->first.data()),
        running_(sources.running.data()),
        smooth_(s.surrogate == Surrogate::kSmooth),
        rate_(1 / s.tau),
        near_(s) {}

  void read(int64_t begin, int64_t end, double* rank, double* slope) {
    if (begin < end) seek(begin);
    for (int64_t i = begin; i < end; i += kMany) {
      const int count = static_cast<int>(std::min<int64_t>(kMany, end - i));
      place_targets(i, count);
      for (int k = 0; k < count;) k = read_run(i, k, count);
      add_up(count, rank + i, slope ? slope + i : nullptr);
    }
  }

 private:
  // What holds for a source v and a target u (no lambdas, whose target region is not that of their function).
  struct NoLower {
    X::Bits operator()(V v, V u) const { return X::greater_equal(v, u); }
  };
  struct Past {
    V delta;
    X::Bits operator()(V v, V u) const { return X::greater(v - u, delta); }
  };

  // Before the target i.
  void seek(int64_t i) {
    const float x = targets_.value[i];
    box_ = std::upper_bound(targets_.first.begin(), targets_.first.end(), static_cast<uint32_t>(i)) -
           targets_.first.begin() - 1;
    last_step_ = std::lower_bound(v_, v_ + n_, x) - v_;
    last_past_ = std::partition_point(v_, v_ + n_, [&](float v) { return smooth_ || !(v - x > s_.delta); }) - v_;
  }

  void place_targets(int64_t i, int count) {
    if (smooth_) {
      std::fill_n(past_, count, n_);
      return;
    }
    const float* const x = targets_.value.data() + i;
    last_step_ = Places<NoLower>(v_, n_, {}).find(last_step_, x, count, step_);
    last_past_ = Places<Past>(v_, n_, {X::set(s_.delta)}).find(last_past_, x, count, past_);
  }

  // Reads target i + k, and those after it that are in the same box, with their thresholds in the same chunk and box.
  // Returns where the next one is.
  int read_run(int64_t i, int k, int count) {
    const int64_t chunk = past_[k] / kChunk;
    while (targets_.first[box_ + 1] <= i + k) ++box_;
    while (threshold_ < boxes_.size() && first_[threshold_ + 1] <= past_[k]) ++threshold_;
    if (box_ != field_box_ || threshold_ != field_threshold_ || chunk != field_chunk_) set_field(chunk);
    const bool all = threshold_ == boxes_.size();
    const int64_t last = all ? n_ : std::min<int64_t>((chunk + 1) * kChunk, first_[threshold_ + 1]) - 1;
    const int most = static_cast<int>(std::min<int64_t>(count, targets_.first[box_ + 1] - i));
    const float* const x = targets_.value.data() + i;
    const int begin = k;
    if (all) {
      for (; k < most; ++k) lanes_[2 * k] = lanes_[2 * k + 1] = D::set(0);
    } else {
      const Chunk met(*this, chunk * kChunk, last);
      do {
        met.read(static_cast<double>(x[k]), past_[k], lanes_ + 2 * k);
      } while (++k < most && past_[k] <= last);
    }
    for (int at = begin; at < k; at += D::kWidth) {
      const D::V z = (D::widened(x + at) - D::set(boxes_.centre[box_])) * D::set(rate_);
      D::store(curve_ + at, polynomial(coefficient_[0], z));
      D::store(slope_ + at, polynomial(coefficient_[1], z));
    }
    return k;
  }

  void add_up(int count, double* rank, double* slope) {
    for (int k = 0; k < count; k += kTogether) {
      alignas(64) double sum[2 * kTogether];
      D::sums(lanes_ + 2 * k, sum);
      for (int at = k; at < std::min(k + kTogether, count); ++at) {
        const double steps = smooth_ ? 0 : static_cast<double>(past_[at] - step_[at]);
        rank[at] = curve_[at] + sum[2 * (at - k)] + s_.exact_start * steps;
        if (slope) slope[at] = (slope_[at] + sum[2 * (at - k) + 1]) * rate_;
      }
    }
  }

  // What the targets of a box read whose thresholds lie in the same chunk: all but this chunk.
  void set_field(int64_t chunk) {
    const int64_t b = box_, t = threshold_;
    if (b != field_box_ || t != field_threshold_) set_whole_boxes(b, t);
    field_chunk_ = chunk;
    Field<true> field = whole_boxes_;
    if (t < boxes_.size()) {
      add_linear(t, chunk, field);
      if (chunk * kChunk > first_[t]) {
        (t == b ? own_ : of_threshold_).template add<false>(&running_[chunk * kTerms], field);
      }
    }
    field.store(coefficient_[0], coefficient_[1]);
  }
  // What lies past the chunk of the threshold: rho (v - u - delta) + offset each, of which a count and a sum are enough.
  void add_linear(int64_t t, int64_t chunk, Field<true>& field) const {
    const int64_t next = (chunk + 1) * kChunk;
    const double centre = boxes_.centre[box_];
    double count = 0, sum = 0;  // of v - centre
    if (next < first_[t + 1]) {
      count = static_cast<double>(first_[t + 1] - next);
      sum = s_.tau * (sources_.moment[t * kTerms + 1] - running_[(chunk + 1) * kTerms + 1]) +
            count * (boxes_.centre[t] - centre);
    }
    if (first_[t + 1] < n_) {
      const double higher = static_cast<double>(n_ - first_[t + 1]);
      sum += sources_.beyond[t + 1] + higher * (boxes_.centre[t + 1] - centre);
      count += higher;
    }
    const double rate = s_.exact_rho * s_.tau * count;
    field.add_line(s_.exact_rho * (sum - count * s_.exact_delta) + s_.exact_offset * count, -rate, rate);
  }
  // All boxes from the lowest to the one before the threshold's.
  void set_whole_boxes(int64_t b, int64_t t) {
    if (b != field_box_) {
      whole_boxes_ = {};
      if (first_[b] > 0) {
        whole_boxes_.add_below(Sums::powers(boxes_.decay[b]) * Sums::load(&sources_.upto[(b - 1) * kStride]));
      }
      below_ = whole_boxes_;
      if (first_[b + 1] > first_[b]) own_.add<false>(&sources_.moment[b * kTerms], below_);
    }
    field_box_ = b;
    field_threshold_ = t;
    if (t == b) return;
    whole_boxes_ = below_;
    Sums decays = Sums::powers(0);
    if (t < boxes_.size()) {
      decays = Sums::decays(boxes_.centre[t] - boxes_.centre[b], s_.tau);
      of_threshold_ = Translation<true>(decays);
    }
    const int64_t between = first_[t] - first_[b + 1];
    if (!between) return;
    Sums above = Sums::powers(boxes_.decay[b + 1]) * Sums::load(&sources_.from[(b + 1) * kStride]);
    if (t < boxes_.size()) above = above - decays * Sums::load(&sources_.from[t * kStride]);
    whole_boxes_.add_above(above, static_cast<double>(between));
  }

  // A chunk that thresholds cut: its sources in the box of these, which are met one by one.
  class Chunk {
   public:
    Chunk(const Ranks& of, int64_t begin, int64_t last)
        : begin_(begin),
          delta_(of.s_.exact_delta),
          rate_(D::set(of.rate_)),
          rho_(D::set(of.s_.exact_rho)),
          offset_(D::set(of.s_.exact_offset)),
          rho_tau_(D::set(of.s_.exact_rho * of.s_.tau)),
          near_(of.near_) {
      for (int k = 0; k < kVectors; ++k) v_[k] = D::widened(of.v_ + begin + k * D::kWidth);
      all_ = below(last + 1 - begin) & ~below(std::max<int64_t>(0, of.first_[of.threshold_] - begin));
    }
    // What a target u reads, `past` being the first source past its threshold: lanes of curve and slope, the second in
    // units of 1 / tau, which have to be added up.
    void read(double u, int64_t past, D::V* lanes) const {
      const unsigned before = below(past - begin_);
      const D::V threshold = D::set(u + delta_);
      D::V curve = D::set(0), slope = D::set(0);
      for (int k = 0; k < kVectors; ++k) {
        const D::V t = v_[k] - threshold, z = D::mul_add(t, rate_, D::set(Boxes::kWidth / 2));
        const auto in = D::lanes((all_ & before) >> k * D::kWidth & kLanes);
        const auto out = D::lanes((all_ & ~before) >> k * D::kWidth & kLanes);
        const D::V sigma = near_.at(near_.curve, z);
        curve = D::add_where(in, curve, sigma);
        slope = D::add_where(in, slope, D::negative_mul_add(sigma, sigma, sigma));
        curve = D::add_where(out, curve, D::mul_add(t, rho_, offset_));
        slope = D::add_where(out, slope, rho_tau_);
      }
      lanes[0] = curve;
      lanes[1] = slope;
    }

   private:
    static constexpr int kVectors = kChunk / D::kWidth;
    static constexpr unsigned kLanes = (1u << D::kWidth) - 1;
    static unsigned below(int64_t count) { return (1u << count) - 1; }

    const int64_t begin_;
    unsigned all_;
    const double delta_;
    const D::V rate_, rho_, offset_, rho_tau_;
    D::V v_[kVectors];
    const ThresholdCurve<double, kNearTerms>& near_;
  };

  const Boxes& boxes_;
  const Sources& sources_;
  const Points& targets_;
  const Settings<float>& s_;
  const float* const v_;
  const int64_t n_;
  const uint32_t* const first_;
  const double* const running_;
  const bool smooth_;
  const double rate_;
  const ThresholdCurve<double, kNearTerms> near_;
  const Translation<true>& own_ = Translation<true>::own();

  int64_t step_[kMany], past_[kMany];  // of targets: their first source that is no lower, and past the threshold
  D::V lanes_[2 * kMany];              // what they have read of the chunks of their thresholds
  alignas(64) double curve_[kMany + D::kWidth], slope_[kMany + D::kWidth];  // and of all else
  int64_t last_step_ = 0, last_past_ = 0;                                   // of the last of these
  int64_t box_ = 0, threshold_ = 0;  // of a target, and of its first source past the threshold
  int64_t field_box_ = -1, field_threshold_ = -1, field_chunk_ = -1;  // those that the field is for
  Field<true> below_, whole_boxes_;                                   // of lower boxes and the own; of all whole ones
  alignas(64) double coefficient_[2][kTerms];                         // of the field, and of its slope
  Translation<true> of_threshold_;
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
  static constexpr int kTogether = X::kWidth;  // targets, within half a box: the fewer, the fewer sources they meet
  static constexpr int kNearTerms = 8;         // what they meet lies within one box of the middle
  static constexpr int kChunk = Sources::kChunk;
  static constexpr int kRun = 8;  // sources whose shares are summed in float

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
        half_box_(static_cast<float>(Boxes::kWidth / 2 * s.tau)),
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
      int count = static_cast<int>(std::min<int64_t>(kTogether, std::min<int64_t>(of_box[b + 1], end) - j));
      while (targets_.value[j + count - 1] - targets_.value[j] > half_box_) --count;
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
    if (!smooth_) {
      while (last_ < n_ && is_past(x[0], u_[last_])) ++last_;
      first_past_ = last_;
      while (last_ < n_ && is_past(x[count - 1], u_[last_])) ++last_;
    }
    if (b != box_ || last_ > end_) set_field(b);
    const double past = smooth_ ? 0 : s_.exact_rho * s_.tau * sources_.passed[first_past_];
    for (int k = 0; k < kTogether; k += D::kWidth) {
      const D::V z = (D::widened(x + k) - D::set(boxes_.centre[b])) * D::set(1 / s_.tau);
      D::store(slope_ + k, polynomial(coefficient_, z) + D::set(past));
    }
    if (first_past_ < end_) meet(x);
  }

  // The field of all sources from end_ on, which is at last_ or a little further, in the box b.
  void set_field(int64_t b) {
    while (threshold_ < boxes_.size() && first_[threshold_ + 1] <= last_) ++threshold_;
    int64_t whole = threshold_;
    end_ = last_;
    const double* before = nullptr;  // moments of the box `whole` that do not count
    if (whole < boxes_.size() && last_ > first_[whole]) {
      const int64_t chunk = (last_ + kChunk - 1) / kChunk;
      end_ = std::min<int64_t>(chunk * kChunk, first_[whole + 1]);
      if (end_ < first_[whole + 1]) before = &sources_.running[chunk * kTerms];
      ++whole;
    }
    if (b != box_ || whole != whole_) set_whole_boxes(b, whole);
    Field<false> field = whole_boxes_;
    if (before) {
      alignas(64) double rest[kTerms];
      for (int m = 0; m < kTerms; m += D::kWidth) {
        D::store(rest + m, D::load(&sources_.moment[(whole - 1) * kTerms + m]) - D::load(before + m));
      }
      if (whole - 1 < b && !translated_) {
        of_threshold_ = Translation<false>(Sums::decays(boxes_.centre[b] - boxes_.centre[whole - 1], s_.tau));
        translated_ = true;
      }
      (whole - 1 == b ? own_ : of_threshold_).template add<true>(rest, field);
    }
    field.store(nullptr, coefficient_);
  }
  // That of all in boxes from `whole` on.
  void set_whole_boxes(int64_t b, int64_t whole) {
    if (b != box_) {
      above_ = {};
      if (first_[b + 1] < n_) {
        above_.add_above(Sums::powers(boxes_.decay[b + 1]) * Sums::load(&sources_.from[(b + 1) * kStride]), 0);
      }
    }
    box_ = b;
    whole_ = whole;
    translated_ = false;
    whole_boxes_ = above_;
    if (whole > b) return;
    if (first_[b + 1] > first_[b]) own_.add<true>(&sources_.moment[b * kTerms], whole_boxes_);
    if (first_[whole] == first_[b]) return;
    Sums below = Sums::powers(boxes_.decay[b]) * Sums::load(&sources_.upto[(b - 1) * kStride]);
    if (first_[whole] > 0) {
      below = below - Sums::decays(boxes_.centre[b] - boxes_.centre[whole - 1], s_.tau) *
                          Sums::load(&sources_.upto[(whole - 1) * kStride]);
    }
    whole_boxes_.add_below(below);
  }

  // Sources around the thresholds, one by one.
  void meet(const float* x) {
    const V delta = X::set(s_.delta), rho = X::set(s_.rho_tau), rate = X::set(s_.rate_hi);
    const V centre = X::set(-near_.centre);
    const V v = X::load(x);
    for (int64_t run = first_past_; run < end_; run += kRun) {
      V sum = X::set(0);
      for (int64_t i = run; i < std::min(end_, run + kRun); ++i) {
        const V t = v - X::set(u_[i]), z = X::clamp(X::mul_add(t, rate, centre), 1);
        const V slope = X::select(X::greater(t, delta), rho, near_.at(near_.slope, z));
        sum = X::mul_add(X::set(sources_.weight[i]), slope, sum);
      }
      X::accumulate(slope_, sum);
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
  const float half_box_;
  const ThresholdCurve<float, kNearTerms> near_;
  const Translation<false>& own_ = Translation<false>::own();

  // Sources before first_past_ are past the threshold for all targets that read together, those from last_ on for none;
  // those from end_ on are in the field, with all boxes from whole_ on. last_ lies in the box threshold_.
  int64_t first_past_ = 0, last_ = 0, end_ = -1, threshold_ = 0, whole_ = -1;
  int64_t box_ = -1;                        // of the targets
  Field<false> above_, whole_boxes_;        // of higher boxes; of all whole ones
  alignas(64) double coefficient_[kTerms];  // of the field
  Translation<false> of_threshold_;         // once `translated_`: from the box before `whole_`
  bool translated_ = false;
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
  return {scan_decays, scan_moments, scan_up, scan_down, scan_weights, scan_ranks, scan_slopes, scan_slopes_in_order};
}

}  // namespace
