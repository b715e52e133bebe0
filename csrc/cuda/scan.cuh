// The sorted scan: rows of many positives, whose ranks and gradients it reads off sums instead of meeting every pair.
// docs/how-it-works.md has the derivation. The steps of such a row, after its masks and the columns of its positives:
//
//   keys            every column with its score; infinities and NaN leave the row to the steps of rows.cuh
//   count, scatter  a stable radix sort, four digits of 8 bits: columns become items
//   split, places   which items are positives, and where each positive lies
//   sums, join      where leaves of 32 items meet: the exponential sums of all negatives below, and of all above
//   read            rank+, rank- and slope of each positive: its own leaf and that of the threshold pair by pair,
//                   series for the rest
//   weights         by rows.cuh
//   sums to read    once more: sums of the weighted positives, which the negatives read
//
// and for smooth twice again, among the positives. Blocks share the columns, items, leaves or positives of a row; what
// one writes the others read a launch later. There are no atomics: each warp counts digits for itself.
#pragma once

#include "rows.cuh"

namespace roadmap::cuda {

// float32 scores, or half ones. kCapacity as in rows.cuh.
template <typename S, int kCapacity>
class ScanKernel : public RowKernel<S, kCapacity, false, true> {
  using Base = RowKernel<S, kCapacity, false, true>;
  using T = float;
  using Params = RowParams<S>;
  using Base::k_, Base::p_, Base::block_, Base::row_, Base::scanned_, Base::size_, Base::slot_, Base::warps_;
  static constexpr int kLeaf = 32;
  static constexpr uint32_t kLast = ~0u;  // the key of what is left out: that of no number

 public:
  ROADMAP_DEVICE ScanKernel(const Params& p, char* shared) : Base(p, shared) {
    places_ = this->memory_.template take<int32_t>(256);
    counters_ = this->memory_.template take<int32_t>(256 * warps_);
  }
  ROADMAP_DEVICE void run() { this->run_as(*this); }

  ROADMAP_DEVICE void steps(uint32_t wanted) {
    constexpr uint32_t kBoth = kMasks | kCollect;
    scanned_ = false;
    if (wanted & kBoth) {
      Base::steps(wanted & kBoth);
    } else {
      size_ = this->positives_of_blocks(p_.schedule.blocks_per_row);
    }
    if (!this->may_scan()) return done(wanted);
    if (wanted & kKeys) keys();
    if (!(wanted & ~(kBoth | kKeys))) return;
    scanned_ = this->all_finite();
    done(wanted);
    if (!scanned_) return;
    items_ = sum_of_blocks(0);
    for (int digit = 0; digit < kDigits; ++digit) {
      if (wanted & (kCountDigit << 2 * digit)) count_digit(digit);
      if (wanted & (kScatterDigit << 2 * digit)) scatter_digit(digit);
    }
    if (wanted & kSplit) split();
    if (wanted & kPlaces) places();
    if (wanted & (kSums | kRead | kReadWeighted)) {
      const int lowest = p_.workspace.position[this->place(0)];  // of the positives
      first_ = first_within(k_.cut, value(lowest), lowest);
    }
    const bool smooth = k_.smooth, ranks = this->ranks(), gradient = p_.gradient_type != GradientType::kNone;
    const bool among = smooth && (ranks || gradient);
    if ((wanted & kSums) && ranks) sums(Source::kNegatives);
    if ((wanted & kJoin) && ranks) join();
    if ((wanted & kRead) && ranks) read_ranks();
    if ((wanted & kSumsAmong) && among) sums(Source::kPositives);
    if ((wanted & kJoinAmong) && among) join();
    if ((wanted & kReadAmong) && among) read_among();
    if (wanted & kWeights) this->weights();
    if (!gradient) return;
    const bool nan = (wanted & ~(kWeights - 1) & ~kWeights) && this->outcome(Base::kNan) != 0;
    if ((wanted & kSumsWeighted) && !nan) sums(Source::kWeighted);
    if ((wanted & kJoinWeighted) && !nan) join();
    if (wanted & kReadWeighted) {
      if (nan) {
        int begin, end;
        this->share_columns(block_, p_.schedule.blocks_per_row, begin, end);
        this->fill_nan(begin, end);
      } else {
        read_gradients();
      }
    }
    if ((wanted & kSumsOwn) && among && !nan) sums(Source::kOwn);
    if ((wanted & kJoinOwn) && among && !nan) join();
    if ((wanted & kReadOwn) && among && !nan) read_own();
    if (wanted & kScatter) {
      simt::barrier();  // own gradients have been written
      this->scatter();
    }
  }

 private:
  // Whose sums are taken: of each negative 1, of each positive 1, its weight in rank-, or that in rank+.
  enum class Source { kNegatives, kPositives, kWeighted, kOwn };

  // Says whether the pairwise kernel finds the row done, where it follows and one block takes all steps.
  ROADMAP_DEVICE void done(uint32_t wanted) {
    if ((wanted & kKeys) && p_.schedule.only_longer && simt::thread() == 0) p_.workspace.done[row_] = scanned_;
  }
  // Of key[which] and index[which].
  ROADMAP_DEVICE int64_t item(int64_t j, int which = 0) const { return slot_ * (1 + which) * p_.columns + j; }
  ROADMAP_DEVICE int64_t leaf(int64_t l) const { return slot_ * p_.workspace.words + l; }
  ROADMAP_DEVICE int64_t edge(int64_t l) const { return slot_ * (p_.workspace.words + 1) + l; }
  ROADMAP_DEVICE int leaves() const { return (items_ + kLeaf - 1) / kLeaf; }
  ROADMAP_DEVICE int end_of(int l) const { return smaller(items_, (l + 1) * kLeaf); }
  // The share of this block in n.
  ROADMAP_DEVICE void share_of(int n, int& begin, int& end) const {
    begin = static_cast<int>(int64_t(n) * block_ / p_.schedule.blocks_per_row);
    end = static_cast<int>(int64_t(n) * (block_ + 1) / p_.schedule.blocks_per_row);
  }

  using Base::sum_of_blocks;
  ROADMAP_DEVICE int sum_of_blocks(int what) const { return sum_of_blocks(what, p_.schedule.blocks_per_row); }
  ROADMAP_DEVICE void note(int what, double value) {
    if (simt::thread() == 0) p_.workspace.block_items[3 * this->block_at(block_) + what] = static_cast<int32_t>(value);
  }

  // Numbers in the order of unsigned ones, and back.
  static ROADMAP_DEVICE uint32_t key_of(float x) {
    const uint32_t bits = simt::float_bits(x);
    return bits ^ (bits >> 31 ? ~0u : 0x80000000u);
  }
  static ROADMAP_DEVICE float number(uint32_t key) { return simt::bits_float(key ^ (key >> 31 ? 0x80000000u : ~0u)); }
  ROADMAP_DEVICE float value(int j) const { return number(p_.workspace.key[0][item(j)]); }
  ROADMAP_DEVICE uint32_t positives_of(int l) const { return p_.workspace.sorted[leaf(l)]; }

  // --- the sort -----------------------------------------------------------------------------------------------------

  ROADMAP_DEVICE void keys() {
    int begin, end;
    this->share_columns(block_, p_.schedule.blocks_per_row, begin, end);
    bool odd = false;
    int found = 0, hinges = 0;
    double hinge = 0;
    for (int at = begin + simt::thread(); at < end; at += simt::threads()) {
      const int64_t word = this->word_at(at / kWord);
      const bool negative = p_.workspace.negative[word] >> (at % kWord) & 1;
      const bool positive = p_.workspace.positive[word] >> (at % kWord) & 1;
      uint32_t key = kLast;
      if (negative || positive) {
        const float x = this->score_of(at);
        odd |= !is_finite(x);
        key = key_of(x);
        ++found;
        if (p_.calibration && negative && x > p_.margin) {
          hinge += static_cast<double>(x - p_.margin);
          ++hinges;
        }
      }
      p_.workspace.key[0][item(at)] = key;
      p_.workspace.index[0][item(at)] = static_cast<uint32_t>(at);
    }
    if (p_.op == Op::kRankGradient && block_ == 0) {  // weights that arrive
      for (int i = simt::thread(); i < size_; i += simt::threads()) {
        const int64_t at = p_.first[row_] + i;
        if (at < 0 || at >= p_.entries) continue;
        odd |=
            !is_finite(static_cast<float>(p_.negative_weight[at])) || !is_finite(static_cast<float>(p_.slope_in[at]));
        if (p_.positive_weight) odd |= !is_finite(static_cast<float>(p_.positive_weight[at]));
      }
    }
    odd = simt::barrier_or(odd);
    const double all = this->sum_over_block(found);
    const double sum = this->sum_over_block(hinge), count = this->sum_over_block(hinges);
    note(0, all);
    note(2, odd);
    if (simt::thread() == 0) {
      p_.workspace.hinge[this->block_at(block_)] = sum;
      p_.workspace.flag[2 * this->block_at(block_)] = static_cast<int32_t>(count);
      p_.workspace.flag[2 * this->block_at(block_) + 1] = 0;
    }
    simt::barrier();  // notes are read by others than have written them
  }

  // Items of the share that lie in each bucket of a digit.
  ROADMAP_DEVICE void count_digit(int digit) {
    const int from = digit % 2;
    int begin, end;
    this->share_columns(block_, p_.schedule.blocks_per_row, begin, end);
    clear();
    for (int first = begin; first < end; first += simt::threads()) {
      const int j = first + simt::thread();
      uint32_t bucket = 256;
      if (j < end) bucket = p_.workspace.key[from][item(j, from)] >> 8 * digit & 255;
      const uint32_t same = simt::match(bucket);
      simt::barrier();  // another lane of the warp may have counted this bucket before
      if (j < end && is_first(same)) add(bucket, same);
    }
    simt::barrier();
    for (int bucket = simt::thread(); bucket < 256; bucket += simt::threads()) {
      int sum = 0;
      for (int w = 0; w < warps_; ++w) sum += counters_[w * 256 + bucket];
      p_.workspace.digits[this->block_at(block_) * 256 + bucket] = sum;
    }
    simt::barrier();  // a block alone goes on to scatter at once
  }

  // Scatters the share to the buckets, in order: where each begins for this block follows from what all have counted.
  ROADMAP_DEVICE void scatter_digit(int digit) {
    const int from = digit % 2, to = 1 - from, blocks = p_.schedule.blocks_per_row;
    for (int bucket = simt::thread(); bucket < 256; bucket += simt::threads()) {
      int all = 0;
      for (int block = 0; block < blocks; ++block) all += p_.workspace.digits[this->block_at(block) * 256 + bucket];
      counters_[bucket] = all;
    }
    simt::barrier();
    for (int bucket = simt::thread(); bucket < 256; bucket += simt::threads()) {
      int at = 0;
      for (int lower = 0; lower < bucket; ++lower) at += counters_[lower];
      for (int block = 0; block < block_; ++block) at += p_.workspace.digits[this->block_at(block) * 256 + bucket];
      places_[bucket] = at;
    }
    int begin, end;
    this->share_columns(block_, blocks, begin, end);
    for (int first = begin; first < end; first += simt::threads()) {
      const int j = first + simt::thread();
      uint32_t key = 0, index = 0, bucket = 256;
      if (j < end) {
        key = p_.workspace.key[from][item(j, from)];
        index = p_.workspace.index[from][item(j, from)];
        bucket = key >> 8 * digit & 255;
      }
      const uint32_t same = simt::match(bucket);
      simt::barrier();  // counters and places of the tile before are still read
      clear();
      if (j < end && is_first(same)) add(bucket, same);
      simt::barrier();
      for (int b = simt::thread(); b < 256; b += simt::threads()) {  // counts become places
        int at = places_[b];
        for (int w = 0; w < warps_; ++w) {
          const int more = counters_[w * 256 + b];
          counters_[w * 256 + b] = at;
          at += more;
        }
        places_[b] = at;
      }
      simt::barrier();
      if (j >= end) continue;
      const int64_t place =
          item(counters_[this->warp() * 256 + static_cast<int>(bucket)] + simt::count_bits(same & lower_lanes()), to);
      p_.workspace.key[to][place] = key;
      p_.workspace.index[to][place] = index;
    }
    simt::barrier();
  }

  ROADMAP_DEVICE uint32_t lower_lanes() const { return (1u << this->lane()) - 1; }
  ROADMAP_DEVICE bool is_first(uint32_t same) const { return !(same & lower_lanes()); }
  ROADMAP_DEVICE void add(uint32_t bucket, uint32_t same) {
    const int at = this->warp() * 256 + static_cast<int>(bucket);
    counters_[at] = counters_[at] + simt::count_bits(same);
  }
  ROADMAP_DEVICE void clear() {
    for (int i = simt::thread(); i < 256 * warps_; i += simt::threads()) counters_[i] = 0;
    simt::barrier();
  }

  // Which items are positives.
  ROADMAP_DEVICE void split() {
    int begin, end, found = 0;
    share_of(leaves(), begin, end);
    for (int l = begin + simt::thread(); l < end; l += simt::threads()) {
      uint32_t bits = 0;
      for (int j = l * kLeaf; j < end_of(l); ++j) {
        const int column = static_cast<int>(p_.workspace.index[0][item(j)]);
        const uint32_t positive = p_.workspace.positive[this->word_at(column / kWord)] >> (column % kWord) & 1;
        bits |= positive << (j % kLeaf);
      }
      p_.workspace.sorted[leaf(l)] = bits;
      found += simt::count_bits(bits);
    }
    const double sum = this->sum_over_block(found);
    note(1, sum);
    simt::barrier();
  }

  // Where each positive lies; their columns, from now on in the order of their scores.
  ROADMAP_DEVICE void places() {
    int begin, end, at = sum_of_blocks(1, block_);
    share_of(leaves(), begin, end);
    for (int first = begin; first < end; first += simt::threads()) {
      const int l = first + simt::thread();
      uint32_t bits = 0;
      if (l < end) bits = positives_of(l);
      simt::barrier();  // sums of the tile before are still read
      int total;
      int to = at + this->sum_before(simt::count_bits(bits), total);
      if (l < end) p_.workspace.leaf_before[leaf(l)] = to;
      for (int j = 0; bits; ++j, bits >>= 1) {
        if (!(bits & 1)) continue;
        p_.workspace.position[this->place(to)] = l * kLeaf + j;
        p_.workspace.column[this->place(to)] = static_cast<int32_t>(p_.workspace.index[0][item(l * kLeaf + j)]);
        ++to;
      }
      at += total;
    }
    simt::barrier();
  }

  // --- the sums -----------------------------------------------------------------------------------------------------

  ROADMAP_DEVICE bool takes(Source source, uint32_t positives, int j) const {
    const bool positive = positives >> (j % kLeaf) & 1;
    return source == Source::kNegatives ? !positive && j >= first_ : positive;
  }
  // Weight of positive i.
  ROADMAP_DEVICE double weight(Source source, int i) const {
    if (source == Source::kWeighted) return p_.workspace.below[this->place(i)];
    if (source == Source::kOwn) return p_.workspace.above[this->place(i)];
    return 1;
  }

  // e^(-gap / tau), in float64: the coefficients of the series alternate.
  ROADMAP_DEVICE double decay(double gap, double most) const {
    const double x = gap / k_.tau;
    return exp(x < most ? -x : -most);
  }

  // Each leaf's own, until join() adds them up.
  ROADMAP_DEVICE void sums(Source source) {
    int begin, end;
    share_of(leaves(), begin, end);
    for (int l = begin + simt::thread(); l < end; l += simt::threads()) {
      const uint32_t positives = positives_of(l);
      const double low = static_cast<double>(value(l * kLeaf)), high = static_cast<double>(value(end_of(l) - 1));
      double weights = 0, sum = 0;
      for (int side = 0; side < 2; ++side) {
        double terms[kTerms];
#pragma unroll
        for (int k = 0; k < kTerms; ++k) terms[k] = 0;
        int i = p_.workspace.leaf_before[leaf(l)];
#pragma unroll 1
        for (int j = l * kLeaf; j < end_of(l); ++j) {
          if (!takes(source, positives, j)) continue;
          const double v = static_cast<double>(value(j)), w = weight(source, i++);
          const double q = decay(side ? v - low : high - v, 55);
          double power = w * q;
#pragma unroll
          for (int k = 0; k < kTerms; ++k) {
            terms[k] += power;
            power *= q;
          }
          if (side) continue;
          weights += w;
          sum += v - low;
        }
        const Global<double> state = side ? p_.workspace.state_above : p_.workspace.state_below;
        const int64_t to = edge(side ? l : l + 1) * kTerms;
#pragma unroll
        for (int k = 0; k < kTerms; ++k) state[to + k] = terms[k];
      }
      p_.workspace.leaf_weight[edge(l)] = weights;
      p_.workspace.leaf_sum[edge(l)] = sum;
    }
    simt::barrier();
  }

  // Sums over all below each leaf, and over it and all above. A term a thread; the two sides in different blocks.
  ROADMAP_DEVICE void join() {
    const int count = leaves(), k = simt::thread();
    const double power = k + 1;
    if (block_ == 0 && k < kTerms) {
      double sum = 0;
      p_.workspace.state_below[edge(0) * kTerms + k] = 0;
#pragma unroll 1
      for (int l = 0; l < count; ++l) {
        if (l > 0) {
          const double gap = static_cast<double>(value(end_of(l) - 1)) - static_cast<double>(value(l * kLeaf - 1));
          sum *= decay(power * gap, 600);
        }
        const double own = p_.workspace.state_below[edge(l + 1) * kTerms + k];
        sum += own;
        p_.workspace.state_below[edge(l + 1) * kTerms + k] = sum;
      }
    }
    if (block_ == p_.schedule.blocks_per_row - 1) {
      const int above = k - (simt::threads() > kWord ? kWord : 0);  // the next warp, if there is one
      if (above >= 0 && above < kTerms) {
        const double times = above + 1;
        double sum = 0;
        p_.workspace.state_above[edge(count) * kTerms + above] = 0;
#pragma unroll 1
        for (int l = count - 1; l >= 0; --l) {
          if (l + 1 < count) {
            const double gap = static_cast<double>(value((l + 1) * kLeaf)) - static_cast<double>(value(l * kLeaf));
            sum *= decay(times * gap, 600);
          }
          const double own = p_.workspace.state_above[edge(l) * kTerms + above];
          sum += own;
          p_.workspace.state_above[edge(l) * kTerms + above] = sum;
        }
      }
      if (above == kTerms) {
        double weights = 0, sum = 0;
        p_.workspace.leaf_weight[edge(count)] = 0;
        p_.workspace.leaf_sum[edge(count)] = 0;
        for (int l = count - 1; l >= 0; --l) {
          if (l + 1 < count) {  // from one leaf to the next: nothing is ever taken off
            sum += weights * (static_cast<double>(value((l + 1) * kLeaf)) - static_cast<double>(value(l * kLeaf)));
          }
          const double own = p_.workspace.leaf_weight[edge(l)], own_sum = p_.workspace.leaf_sum[edge(l)];
          weights += own;
          sum += own_sum;
          p_.workspace.leaf_weight[edge(l)] = weights;
          p_.workspace.leaf_sum[edge(l)] = sum;
        }
      }
    }
    simt::barrier();
  }

  // --- what is read -------------------------------------------------------------------------------------------------

  struct Read {
    double curve, slope;
  };

  // The series of all below leaf l at u; of those from leaf `from` on alone, if that is above 0.
  ROADMAP_DEVICE Read below_leaf(int l, int from, float u) const {
    if (l <= 0 || l <= from) return {0, 0};
    const double anchor = static_cast<double>(value(l * kLeaf - 1));
    double less = 0;
    if (from > 0) less = decay(anchor - static_cast<double>(value(from * kLeaf - 1)), 600);
    return series(p_.workspace.state_below, edge(l), edge(from), less, decay(static_cast<double>(u) - anchor, 600));
  }
  // Of leaf l and all above, up to leaf `end`.
  ROADMAP_DEVICE Read above_leaf(int l, int end, float u) const {
    if (l >= end) return {0, 0};
    const double anchor = static_cast<double>(value(l * kLeaf));
    double less = 0;
    if (end < leaves()) less = decay(static_cast<double>(value(end * kLeaf)) - anchor, 600);
    return series(p_.workspace.state_above, edge(l), edge(end), less, decay(anchor - static_cast<double>(u), 600));
  }
  // sum_k coefficient_k (state[at][k] - less^k state[minus][k]) q^k, less 0 for the first alone.
  ROADMAP_DEVICE Read series(const Global<double>& state, int64_t at, int64_t minus, double less, double q) const {
    Read read = {0, 0};
    double power = q, lesser = less;
#pragma unroll
    for (int k = 0; k < kTerms; ++k) {
      double sum = state[at * kTerms + k];
      if (less > 0) sum -= lesser * state[minus * kTerms + k];
      read.curve += Series::sigmoid(k) * (sum * power);
      read.slope += Series::slope(k) * (sum * power);
      power *= q;
      lesser *= less;
    }
    return read;
  }

  // The first item that is as high as item `high`, whose score u is.
  ROADMAP_DEVICE int first_tie(int high, float u) const {
    int low = 0;
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (value(middle) < u) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
  // The first item from `low` on that lies above the threshold of u.
  ROADMAP_DEVICE int threshold_above(int low, float u) const {
    int high = items_;
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (value(middle) - u > k_.delta) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }
  // The first item, up to `high`, that lies no further than `distance` below v.
  ROADMAP_DEVICE int first_within(float distance, float v, int high) const {
    int low = 0;
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (v - value(middle) > distance) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Adds the sources of leaf l to the shares of u, pair by pair; `self` is left out.
  ROADMAP_DEVICE void add_pairs(Source source, int l, float u, int self, Shares<T>& shares) const {
    const uint32_t positives = positives_of(l);
#pragma unroll 1
    for (int j = l * kLeaf; j < end_of(l); ++j) {
      if (!takes(source, positives, j) || j == self) continue;
      const float t = value(j) - u;
      const bool linear = !k_.smooth && t > k_.delta;
      const Logistic<T> h = logistic_of(t, k_);
      shares.value += linear ? 0.0f : h.value;
      shares.slope += linear ? 0.0f : h.slope;
      shares.far += linear ? t - k_.origin : 0.0f;
      if (!k_.smooth) shares.count += (t < 0.0f ? 0 : 1) + (linear ? Shares<T>::kLinear : 0);
    }
  }

  ROADMAP_DEVICE void read_ranks() {
    int begin, end;
    share_of(size_, begin, end);
    for (int i = begin + simt::thread(); i < end; i += simt::threads()) {
      const int j = p_.workspace.position[this->place(i)];
      const float u = value(j);
      // The leaf in which steps begin: ties may stand before it.
      const int l = (k_.smooth ? j : first_tie(j, u)) / kLeaf;
      Shares<T> shares;
      add_pairs(Source::kNegatives, l, u, -1, shares);
      const Read below = below_leaf(l, 0, u);
      int threshold = leaves();  // its leaf
      if (!k_.smooth) {
        const int at = threshold_above(j, u);
        if (at < items_) threshold = at / kLeaf;
        if (at < items_ && threshold > l) add_pairs(Source::kNegatives, threshold, u, -1, shares);
      }
      const Read above = above_leaf(l + 1, threshold, u);
      const int linear = smaller(leaves(), threshold + 1);  // the first leaf that is linear as a whole
      const double weight_near = p_.workspace.leaf_weight[edge(smaller(leaves(), l + 1))];
      const double weight_threshold = p_.workspace.leaf_weight[edge(threshold)];
      const double between = threshold > l ? weight_near - weight_threshold : 0.0;
      double rank = shares.rank(k_) + below.curve + between - above.curve;
      double slope = shares.rise(k_) + below.slope + above.slope;
      if (!k_.smooth) {
        rank += k_.start * between;
        const double weight_linear = p_.workspace.leaf_weight[edge(linear)];
        if (weight_linear > 0) {
          const double first = static_cast<double>(value(linear * kLeaf));
          const double past = p_.workspace.leaf_sum[edge(linear)] +
                              weight_linear * (first - static_cast<double>(u) - static_cast<double>(k_.origin));
          if (k_.rho > 0) rank += k_.rho * (past + weight_linear * k_.beyond);
          rank += weight_linear * k_.offset;
          slope += weight_linear * (k_.rho * k_.tau);
        }
        int low = 0, high = i;  // the first positive that is as high
        while (low < high) {
          const int middle = low + (high - low) / 2;
          const int at = p_.workspace.position[this->place(middle)];
          if (value(at) < u) {
            low = middle + 1;
          } else {
            high = middle;
          }
        }
        p_.workspace.above[this->place(i)] = size_ - low;
      }
      p_.workspace.below[this->place(i)] = rank;
      p_.workspace.slope[this->place(i)] = slope;
    }
    simt::barrier();
  }

  // smooth: rank+, and the sum of the slopes among the positives.
  ROADMAP_DEVICE void read_among() {
    int begin, end;
    share_of(size_, begin, end);
    for (int i = begin + simt::thread(); i < end; i += simt::threads()) {
      const int j = p_.workspace.position[this->place(i)], l = j / kLeaf;
      const float u = value(j);
      Shares<T> shares;
      add_pairs(Source::kPositives, l, u, j, shares);
      const Read below = below_leaf(l, 0, u), above = above_leaf(l + 1, leaves(), u);
      const double between = p_.workspace.leaf_weight[edge(smaller(leaves(), l + 1))];
      if (this->ranks()) {
        p_.workspace.above[this->place(i)] =
            1 + static_cast<double>(shares.value) + below.curve + between - above.curve;
      }
      p_.workspace.among[this->place(i)] = static_cast<double>(shares.slope) + below.slope + above.slope;
    }
    simt::barrier();
  }

  // sum_i w_i H-'(v - u_i) over the positives of a leaf, in units of 1 / tau; `self` is left out.
  ROADMAP_DEVICE double weighted_pairs(Source source, int l, float v, int self) const {
    const uint32_t positives = positives_of(l);
    int i = p_.workspace.leaf_before[leaf(l)];
    double sum = 0;
#pragma unroll 1
    for (int j = l * kLeaf; j < end_of(l); ++j) {
      if (!(positives >> (j % kLeaf) & 1)) continue;
      const double w = weight(source, i++);
      if (j == self) continue;
      const float t = v - value(j);
      sum += w * static_cast<double>(!k_.smooth && t > k_.delta ? k_.rho_tau : logistic_of(t, k_).slope);
    }
    return sum;
  }

  // The same over all positives, for a negative: item j, whose score v is.
  ROADMAP_DEVICE double weighted_slopes(int j, float v) const {
    const int l = j / kLeaf;
    double sum = weighted_pairs(Source::kWeighted, l, v, -1);
    int from = 0;  // from this leaf on, v is above no threshold
    if (!k_.smooth) {
      const int threshold = first_within(k_.delta, v, j) / kLeaf;
      if (threshold < l) {
        sum += weighted_pairs(Source::kWeighted, threshold, v, -1);
        const double all = p_.workspace.leaf_weight[edge(0)], rest = p_.workspace.leaf_weight[edge(threshold)];
        if (threshold > 0) sum += (all - rest) * static_cast<double>(k_.rho_tau);
        from = threshold + 1;
      } else {
        const double all = p_.workspace.leaf_weight[edge(0)], rest = p_.workspace.leaf_weight[edge(l)];
        if (l > 0) sum += (all - rest) * static_cast<double>(k_.rho_tau);
        from = l;
      }
    }
    return sum + below_leaf(l, from, v).slope + above_leaf(l + 1, leaves(), v).slope;
  }

  ROADMAP_DEVICE void read_gradients() {
    int begin, end;
    this->share_columns(block_, p_.schedule.blocks_per_row, begin, end);
    const double row = p_.row_scale ? static_cast<double>(p_.row_scale[row_]) : 1.0;
    const double weight = p_.op == Op::kObjective ? p_.weight[3 * row_] : p_.row_weight;
    const double by = this->outcome(Base::kUnit) / k_.tau * this->outcome(Base::kScale) * weight * row;
    float hinge = 0;
    if (p_.calibration && this->outcome(Base::kHinges) > 0) hinge = static_cast<float>(p_.weight[3 * row_ + 2] * row);
    for (int j = begin + simt::thread(); j < end; j += simt::threads()) {
      const int column = static_cast<int>(p_.workspace.index[0][item(j)]);
      const int64_t to = row_ * p_.columns + column;
      if (j >= items_) {  // left out
        this->store(to, 0.0f);
        continue;
      }
      const int l = j / kLeaf;
      if (positives_of(l) >> (j % kLeaf) & 1) continue;  // positives come last
      const float v = value(j);
      const double sum = j >= first_ ? weighted_slopes(j, v) : 0.0;
      float g = static_cast<float>(sum * by);
      if (hinge != 0.0f && v > p_.margin) g += hinge;
      if (p_.column_scale) g *= p_.column_scale[column];
      this->store(to, g);
    }
    simt::barrier();
  }

  // smooth: positive i also gets sum_j (w+_j - w+_i) sigma'(s_i - s_j).
  ROADMAP_DEVICE void read_own() {
    int begin, end;
    share_of(size_, begin, end);
    for (int i = begin + simt::thread(); i < end; i += simt::threads()) {
      const int j = p_.workspace.position[this->place(i)], l = j / kLeaf;
      const float u = value(j);
      double sum = weighted_pairs(Source::kOwn, l, u, j);
      sum += below_leaf(l, 0, u).slope + above_leaf(l + 1, leaves(), u).slope;
      const double own = p_.workspace.above[this->place(i)], among = p_.workspace.among[this->place(i)];
      const double slope = p_.workspace.slope[this->place(i)];
      p_.workspace.slope[this->place(i)] = slope + (sum - own * among) * (this->outcome(Base::kUnit) / k_.tau);
    }
    simt::barrier();
  }

  simt::Shared<int32_t> places_;    // [256]  where the next item of each bucket goes
  simt::Shared<int32_t> counters_;  // [warps, 256]
  int items_ = 0;                   // columns that are positive or negative
  int first_ = 0;                   // negatives before this item lie too far below all positives to count
};

}  // namespace roadmap::cuda
