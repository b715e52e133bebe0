// Rows of many positives in near-linear time, by boxes: a one-dimensional fast multipole method, as on the CPU
// (csrc/cpu/scan.h), but without a sort of the negatives. docs/how-it-works.md derives it.
//
// Boxes are as wide as a power of two, at most tau / 10, and centred on its multiples: a score finds its box, and its
// offset from the middle, exactly and in three instructions. Each positive u is a key, where its step is, and so is the
// least number past its threshold. Box by box, keys cut the line into cells:
//
//     cell of v = box of v + how many keys lie at or below v
//
// Cells ascend with v, so that whatever holds of v on one side of a key is a difference of running sums over cells. The
// steps of a row, after its masks and the columns of its positives:
//
//   load, sort        the positives by score; infinities and NaN leave the row to rows.cuh
//   keys, edges       the keys in order; where the cells of each box begin
//   moments           the row streams past: every negative adds 1, y, y^2 and y^3 to its cell, y being its offset. These
//                     are integers, in fixed point: their sums do not depend on the order of atomics
//   prefix            running sums over cells
//   ranks             for each box with positives, sigma of all boxes that lie below the threshold as a whole: a Taylor
//                     series at the distance of the boxes, times moments. The cells from there up to the threshold are
//                     met for each positive alone; past it, a count and a sum
//   weights           by rows.cuh
//   weigh, prefix     moments of the positives, weighted
//   table             what a negative gets is a function of its score alone: on each cell a cubic
//   gradient          the row streams past once more: each negative reads the cubic of its cell
//
// and for smooth, which has no keys, the positives among themselves.
#pragma once

#include "rows.cuh"

namespace roadmap::cuda {

// The sigmoid's derivatives at x = d width / tau, d = -reach ... reach, in units of the width: [kDerivatives, 2 reach +
// 1]. Above 0, that of order 0 is sigma - 1: these are counted apart. Takes all threads of all blocks.
template <typename S>
ROADMAP_DEVICE void tabulate_sigmoid(const RowParams<S>& p) {
  const BoxGrid& grid = p.grid;
  const double unit = grid.width / p.pair.tau;
  const int64_t size = 2 * grid.reach + 1, all = simt::blocks() * simt::threads();
  for (int64_t i = simt::block() * simt::threads() + simt::thread(); i < size; i += all) {
    const int d = static_cast<int>(i) - grid.reach;
    double a[kDerivatives];  // Taylor coefficients at -|x|: a' = a - a^2
    a[0] = 1 / (1 + exp(unit * (d < 0 ? -d : d)));
    for (int n = 0; n + 1 < kDerivatives; ++n) {
      double square = 0;
      for (int k = 0; k <= n; ++k) square += a[k] * a[n - k];
      a[n + 1] = (a[n] - square) / (n + 1);
    }
    double by = 1;
    for (int n = 0; n < kDerivatives; ++n) {
      const double sign = d > 0 && n % 2 == 0 ? -1 : 1;  // sigma(x) = 1 - sigma(-x)
      p.workspace.sigmoid[n * size + i] = static_cast<float>(sign * by * a[n]);
      by *= (n + 1) * unit;
    }
  }
}

// float32 scores, or half ones.
template <typename S>
class BoxKernel : public RowKernel<S, kBoxPiece, false, true> {
  using Base = RowKernel<S, kBoxPiece, false, true>;
  using T = float;
  using Params = RowParams<S>;
  using Base::k_, Base::p_, Base::block_, Base::row_, Base::size_, Base::slot_, Base::warps_;
  using Base::kColumns;
  static constexpr int kMoments = 4;
  static constexpr int kTerms = 5;      // of a series: the last is estimated from the others
  static constexpr int kRun = 1 << 16;  // columns whose moments fit in 32 bits
  // Bits after the point.
  static constexpr int kBits1 = 21, kBits2 = 16, kBits3 = 14, kWeightBits = 40;
  static constexpr float kMagic = 12582912.0f;  // 1.5 2^23: what is added to it is rounded to an integer
  static constexpr uint32_t kMagicBits = 0x4B400000;

 public:
  ROADMAP_DEVICE BoxKernel(const Params& p, char* shared) : Base(p, shared), grid_(p.grid) {
    word_ = this->memory_.template take<uint32_t>(kBoxWords * kMostBoxes);
    first_ = this->memory_.template take<int32_t>(kMostBoxes + 1);
    key_ = this->memory_.template take<float>(kMostBoxes);
    positive_ = this->memory_.template take<float>(kFewPositives);
    total_ = this->memory_.template take<int64_t>(kMoments * warps_);
  }
  ROADMAP_DEVICE void run() {
    if (p_.schedule.steps == kSigmoidTable) {
      tabulate_sigmoid(p_);
    } else {
      this->run_as(*this);
    }
  }

  ROADMAP_DEVICE void steps(uint32_t wanted) {
    constexpr uint32_t kBoth = kMasks | kCollect;
    done_ = false;
    if (wanted & kBoth) {
      Base::steps(wanted & kBoth);
    } else {
      size_ = this->positives_of_blocks(p_.schedule.blocks_per_row);
    }
    if (!this->may_go_by_boxes()) return done(wanted);
    if (size_ > p_.schedule.room) {
      if (wanted & kSumMoments) note(2, true);
      return done(wanted);
    }
    if (wanted & kLoad) load_positives();
    if (!(wanted & ~(kBoth | kLoad))) return;
    fits_ = this->sum_of_blocks(0, p_.schedule.blocks_per_row) == 0;
    if (fits_ && (wanted & kSortChunks)) sort_chunks();
    if (fits_ && (wanted & kMerge)) merge_chunks();
    if (!(wanted & ~(kBoth | kLoad | kSortChunks | kMerge))) return;
    fits_ = fits_ && lay_grid();
    if (fits_ && (wanted & kKeys)) keys();
    if (fits_ && (wanted & kEdges)) edges();
    if (wanted & kSumMoments) moments();
    if (!(wanted & ~(kTotals - 1))) return;
    done_ = this->all_finite();
    done(wanted);
    if (!done_) return;
    const bool smooth = k_.smooth, ranks = this->ranks(), gradient = p_.gradient_type != GradientType::kNone;
    const bool among = smooth && (ranks || gradient);
    if (wanted & kTotals) {
      take_columns();
      if (ranks) totals(cells_ + 2);
    }
    if ((wanted & kPrefix) && ranks) prefix(cells_ + 2);
    if ((wanted & kRanks) && ranks) rank_among_negatives();
    if ((wanted & kWeighOnes) && among) weigh(Weigh::kOnes);
    if ((wanted & kPrefixOnes) && among) prefix(size_ + 1);
    if ((wanted & kRanksAmong) && among) rank_among_positives();
    if (wanted & kWeights) this->weights();
    if (!gradient) return;
    const bool nan = (wanted & ~(2 * kWeights - 1)) && this->outcome(Base::kNan) != 0;
    if ((wanted & kWeigh) && !nan) weigh(Weigh::kNegativeRank);
    if ((wanted & kPrefixWeights) && !nan) prefix(size_ + 1);
    if ((wanted & kTable) && !nan) table();
    if (wanted & kBoxGradient) box_gradient(nan);
    if ((wanted & kWeighOwn) && among && !nan) weigh(Weigh::kPositiveRank);
    if ((wanted & kPrefixOwn) && among && !nan) prefix(size_ + 1);
    if ((wanted & kGradientAmong) && among && !nan) gradient_among_positives();
    if (wanted & kScatter) {
      simt::barrier();  // own gradients have been written
      this->scatter();
    }
  }

 private:
  // Says whether another kernel finds the row done, where it follows and one block takes all steps.
  ROADMAP_DEVICE void done(uint32_t wanted) {
    if ((wanted & kLoad) && p_.schedule.only_longer && simt::thread() == 0) p_.workspace.done[row_] = done_;
  }
  ROADMAP_DEVICE void note(int what, bool value) {
    if (simt::thread() == 0) p_.workspace.block_items[3 * this->block_at(block_) + what] = value;
  }
  // The share of this block in n.
  ROADMAP_DEVICE void share_of(int n, int& begin, int& end) const {
    begin = static_cast<int>(int64_t(n) * block_ / p_.schedule.blocks_per_row);
    end = static_cast<int>(int64_t(n) * (block_ + 1) / p_.schedule.blocks_per_row);
  }

  // How many of 0 ... n - 1 hold: none does after one that does not.
  template <typename Holds>
  static ROADMAP_DEVICE int how_many(int n, const Holds& holds) {
    int count = 0;
    while (n > 0) {
      const int half = (n + 1) / 2;
      if (holds(count + half - 1)) {
        count += half;
        n -= half;
      } else {
        n = half - 1;
      }
    }
    return count;
  }

  // --- the positives, sorted ----------------------------------------------------------------------------------------

  ROADMAP_DEVICE int64_t item(int64_t i) const { return slot_ * p_.schedule.room + i; }
  ROADMAP_DEVICE float positive(int i) const {
    return size_ <= kFewPositives ? static_cast<float>(positive_[i])
                                  : static_cast<float>(p_.workspace.sorted[0][item(i)]);
  }

  // Passes of the sort: runs of 1, 2, 4 ... are merged. Each reads one of two lists and writes the other, the last of
  // them list 0.
  ROADMAP_DEVICE int passes() const {
    int count = 0;
    while ((1 << count) < size_) ++count;
    return count;
  }

  ROADMAP_DEVICE void load_positives() {
    int begin, end;
    share_of(size_, begin, end);
    const int list = passes() % 2;
    bool odd = false;
    for (int i = begin + simt::thread(); i < end; i += simt::threads()) {
      const int32_t column = p_.workspace.column[this->place(i)];
      const float u = this->score_of(column);
      odd |= !is_finite(u);
      p_.workspace.sorted[list][item(i)] = u;
      p_.workspace.sorted_column[list][item(i)] = column;
      if (p_.op != Op::kRankGradient) continue;
      const int64_t at = p_.first[row_] + i;  // weights that arrive
      if (at < 0 || at >= p_.entries) continue;
      odd |= !is_finite(static_cast<float>(p_.negative_weight[at])) || !is_finite(static_cast<float>(p_.slope_in[at]));
      if (p_.positive_weight) odd |= !is_finite(static_cast<float>(p_.positive_weight[at]));
    }
    odd = simt::barrier_or(odd);
    note(0, odd);
    simt::barrier();
  }

  // Each chunk by one block.
  ROADMAP_DEVICE void sort_chunks() {
    int begin, end;
    share_of((size_ + kSortChunk - 1) / kSortChunk, begin, end);
    for (int run = 1; run < kSortChunk && run < size_; run *= 2) {
      merge(run, begin * kSortChunk, smaller(size_, end * kSortChunk));
      simt::barrier();
    }
  }
  ROADMAP_DEVICE void merge_chunks() {
    int begin, end;
    share_of(size_, begin, end);
    if (p_.schedule.run) {
      if (p_.schedule.run < size_) merge(p_.schedule.run, begin, end);
      return;
    }
    for (int run = kSortChunk; run < size_; run *= 2) {
      merge(run, begin, end);
      simt::barrier();
    }
  }
  // Items [begin, end) of sorted runs find their places among pairs of runs.
  ROADMAP_DEVICE void merge(int run, int begin, int end) {
    int pass = 0;
    while ((1 << pass) < run) ++pass;
    const int from = (passes() - pass) % 2, to = 1 - from;
    for (int i = begin + simt::thread(); i < end; i += simt::threads()) {
      const float u = p_.workspace.sorted[from][item(i)];
      const int low = i & ~(2 * run - 1), middle = low + run;
      const bool upper = i >= middle;
      const int other = upper ? low : middle;
      const int before = how_many(smaller(run, size_ - other), [&](int k) {  // stable: the lower run comes first
        const float v = p_.workspace.sorted[from][item(other + k)];
        return v < u || (upper && v == u);
      });
      const int at = low + before + i - (upper ? middle : low);
      p_.workspace.sorted[to][item(at)] = u;
      const int32_t column = p_.workspace.sorted_column[from][item(i)];
      p_.workspace.sorted_column[to][item(at)] = column;
    }
  }

  // From now on the row is done here, and its positives have the order of their scores.
  ROADMAP_DEVICE void take_columns() {
    int begin, end;
    share_of(size_, begin, end);
    for (int i = begin + simt::thread(); i < end; i += simt::threads()) {
      const int32_t column = p_.workspace.sorted_column[0][item(i)];
      p_.workspace.column[this->place(i)] = column;
    }
    simt::barrier();
  }

  template <typename Holds>
  ROADMAP_DEVICE int how_many_positives(const Holds& holds) const {
    return how_many(size_, [&](int i) { return holds(positive(i)); });
  }
  // Positives whose thresholds v is past.
  ROADMAP_DEVICE int passed(float v) const {
    return how_many_positives([&](float u) { return v - u > k_.delta; });
  }
  // Positives whose thresholds are not past that of u.
  ROADMAP_DEVICE int within(float u) const {
    return how_many_positives([&](float other) { return !(other - u > k_.delta); });
  }
  // The least number past the threshold of u.
  ROADMAP_DEVICE float threshold_of(float u) const {
    uint32_t low = order_of(u), high = order_of(this->infinity());
    while (low + 1 < high) {
      const uint32_t middle = low + (high - low) / 2;
      if (number(middle) - u > k_.delta) {
        high = middle;
      } else {
        low = middle;
      }
    }
    return number(high);
  }
  // Numbers in the order of unsigned ones, and back.
  static ROADMAP_DEVICE uint32_t order_of(float x) {
    const uint32_t bits = simt::float_bits(x);
    return bits ^ (bits >> 31 ? ~0u : 0x80000000u);
  }
  static ROADMAP_DEVICE float number(uint32_t key) { return simt::bits_float(key ^ (key >> 31 ? 0x80000000u : ~0u)); }

  // --- boxes and cells ----------------------------------------------------------------------------------------------

  // From what is in reach of the lowest positive to the threshold of the highest. False: too many boxes, or scores that
  // float32 hardly tells from their neighbours' boxes.
  ROADMAP_DEVICE bool lay_grid() {
    for (int i = simt::thread(); size_ <= kFewPositives && i < size_; i += simt::threads()) {
      positive_[i] = p_.workspace.sorted[0][item(i)];
    }
    simt::barrier();
    lowest_ = positive(0);
    const double low = (static_cast<double>(lowest_) - static_cast<double>(k_.cut)) / grid_.width;
    const double above = static_cast<double>(k_.smooth ? k_.cut : k_.delta);
    const double high = (static_cast<double>(positive(size_ - 1)) + above) / grid_.width;
    if (!(low > -kFarthest && high < kFarthest && high - low < kMostBoxes - 4) || !grid_.reach) return false;
    low_ = static_cast<int>(rint(low));
    boxes_ = static_cast<int>(rint(high)) - low_ + 3;
    keys_ = k_.smooth ? 0 : 2 * size_;
    cells_ = boxes_ + keys_;
    shared_ = cells_ <= kMostBoxes;
    return true;
  }
  static constexpr double kFarthest = 1 << 20;

  // What a score is on the grid: its box, past all others (or below 0) where it is in none, and its offset from the
  // middle in units of the width.
  struct Point {
    int box;
    float y;
  };
  ROADMAP_DEVICE Point point_of(float x) const {
    const float t = fmaf(x, grid_.inverse, kMagic);
    return {static_cast<int>(simt::float_bits(t) - kMagicBits) - low_, fmaf(x, grid_.inverse, kMagic - t)};
  }
  ROADMAP_DEVICE bool in_grid(int box) const { return static_cast<uint32_t>(box) < static_cast<uint32_t>(boxes_); }
  ROADMAP_DEVICE int cell_of(int box, float x) const {
    return shared_ ? cell_of<true>(box, x) : cell_of<false>(box, x);
  }
  template <bool kShared>
  ROADMAP_DEVICE int cell_of(int box, float x) const {
    const int begin = first_[box], key = begin - box;
    return begin + how_many(first_[box + 1] - begin - 1, [&](int k) { return key_at<kShared>(key + k) <= x; });
  }
  ROADMAP_DEVICE float key_at(int i) const { return shared_ ? key_at<true>(i) : key_at<false>(i); }
  template <bool kShared>
  ROADMAP_DEVICE float key_at(int i) const {
    if constexpr (kShared) {
      return key_[i];
    } else {
      return p_.workspace.key[2 * item(0) + i];
    }
  }
  ROADMAP_DEVICE int64_t edge(int64_t box) const { return slot_ * (kMostBoxes + 1) + box; }
  ROADMAP_DEVICE int first_positive(int box) const { return p_.workspace.first_positive[edge(box)]; }

  // Merged, thresholds before equal positives; and all sums cleared.
  ROADMAP_DEVICE void keys() {
    int begin, end;
    share_of(size_, begin, end);
    const int64_t to = 2 * item(0);
    for (int i = begin + simt::thread(); keys_ && i < end; i += simt::threads()) {
      const float u = positive(i);
      p_.workspace.key[to + i + passed(u)] = u;
      p_.workspace.key[to + i + within(u)] = threshold_of(u);
    }
    share_of(kMoments * (cells_ + 2), begin, end);
    for (int i = begin + simt::thread(); i < end; i += simt::threads()) p_.workspace.sum[sum_at(0) + i] = 0;
    simt::barrier();
  }
  // The first cell and the first positive of each box.
  ROADMAP_DEVICE void edges() {
    load_keys();
    int begin, end;
    share_of(boxes_ + 1, begin, end);
    for (int box = begin + simt::thread(); box < end; box += simt::threads()) {
      p_.workspace.first_positive[edge(box)] = how_many_positives([&](float u) { return point_of(u).box < box; });
      const int before = how_many(keys_, [&](int k) { return point_of(key_at(k)).box < box; });
      p_.workspace.first[edge(box)] = box + before;
    }
    simt::barrier();
  }
  ROADMAP_DEVICE void load_keys() {
    for (int i = simt::thread(); i < keys_ && shared_; i += simt::threads()) {
      key_[i] = p_.workspace.key[2 * item(0) + i];
    }
    simt::barrier();
  }
  ROADMAP_DEVICE void load_edges() {
    simt::barrier();  // the step before may still read others
    for (int box = simt::thread(); box <= boxes_; box += simt::threads()) first_[box] = p_.workspace.first[edge(box)];
    load_keys();
  }
  ROADMAP_DEVICE int box_of_cell(int cell) const {
    return how_many(boxes_, [&](int box) { return first_[box] <= cell; }) - 1;
  }

  // --- moments of the negatives -------------------------------------------------------------------------------------

  // Four sums a cell, in fixed point: of 1, of the offset from the lower end of the grid, of y^2 and of y^3. One more
  // cell is for what lies above the grid.
  ROADMAP_DEVICE int64_t sum_at(int64_t i) const { return p_.workspace.sums * slot_ + kMoments * i; }
  ROADMAP_DEVICE int64_t sum(int64_t i, int k) const { return p_.workspace.sum[sum_at(i) + k]; }

  static ROADMAP_DEVICE int fixed(float x, int bits) {  // |x| 2^bits < 2^22
    return static_cast<int>(simt::float_bits(fmaf(x, static_cast<float>(1 << bits), kMagic)) - kMagicBits);
  }

  ROADMAP_DEVICE void moments() {
    bool odd = !fits_;
    this->hinge_ = 0;
    this->hinges_ = 0;
    if (fits_ && p_.op != Op::kRankGradient) {
      load_edges();
      int begin, end, far = 0;
      int64_t far_sum = 0;
      this->share_columns(block_, p_.schedule.blocks_per_row, begin, end);
      for (; begin < end; begin += kRun) {
        for (int i = simt::thread(); shared_ && i < kMoments * kMostBoxes + cells_; i += simt::threads()) word_[i] = 0;
        simt::barrier();
        if (shared_) {
          add_columns<true>(begin, smaller(end, begin + kRun), odd, far, far_sum);
        } else {
          add_columns<false>(begin, smaller(end, begin + kRun), odd, far, far_sum);
        }
        simt::barrier();
        if (shared_) flush();
        simt::barrier();
      }
      const int64_t all = Base::sum_over_warp(static_cast<int64_t>(far)), sum = Base::sum_over_warp(far_sum);
      if (this->lane() == 0 && all) {
        simt::atomic_add(p_.workspace.sum, sum_at(cells_), all);
        simt::atomic_add(p_.workspace.sum, sum_at(cells_) + 1, sum);
      }
    }
    odd = simt::barrier_or(odd);
    note(2, odd);
    this->save_seen(block_, false);
    simt::barrier();
  }

  template <bool kShared>
  ROADMAP_DEVICE void add_columns(int begin, int end, bool& odd, int& far, int64_t& far_sum) {
    const int tile = simt::threads() * kColumns;
    const float limit = static_cast<float>(kFarthest * grid_.width);
    int at = begin + simt::thread() * kColumns;
    const typename Base::Row from = this->row_in_memory();
    typename Base::Fetched next = this->fetch(from, at, end);
    for (int first = begin; first < end; first += tile, at += tile) {
      float x[kColumns], scale[kColumns];
      this->unpack(next, at, x, scale);
      if (first + tile < end) next = this->fetch(from, at + tile, end);
      bool nan = false;
      this->look_at(x, nan);
      odd |= nan;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const Point p = point_of(x[j]);
        odd |= x[j] >= limit;
        if (in_grid(p.box)) {
          add<kShared>(p.box, x[j], p.y);
        } else if (x[j] > lowest_) {
          ++far;
          far_sum += (static_cast<int64_t>(p.box) << kBits1) + fixed(p.y, kBits1);
        }
      }
    }
  }
  template <bool kShared>
  ROADMAP_DEVICE void add(int box, float x, float y) {
    const int cell = cell_of<kShared>(box, x), first = fixed(y, kBits1);
    const float square = y * y;
    const int second = fixed(square, kBits2), third = fixed(square * y, kBits3);
    if constexpr (!kShared) {
      const int64_t to = sum_at(cell);
      simt::atomic_add(p_.workspace.sum, to, int64_t(1));
      simt::atomic_add(p_.workspace.sum, to + 1, (static_cast<int64_t>(box) << kBits1) + first);
      simt::atomic_add(p_.workspace.sum, to + 2, static_cast<int64_t>(second));
      simt::atomic_add(p_.workspace.sum, to + 3, static_cast<int64_t>(third));
      return;
    }
    simt::atomic_add(word_, cell, 1u);
    simt::atomic_add(word_, 2 * kMostBoxes + cell, static_cast<uint32_t>(second));
    simt::atomic_add(word_, 3 * kMostBoxes + cell, static_cast<uint32_t>(third));
    const uint32_t more = static_cast<uint32_t>(first);
    const uint32_t before = simt::atomic_add(word_, kMostBoxes + cell, more), after = before + more;
    if (((before ^ after) & (more ^ after)) >> 31) {  // past 31 bits: its upper word moves
      simt::atomic_add(word_, 4 * kMostBoxes + cell, first > 0 ? 1u : ~0u);
    }
  }
  ROADMAP_DEVICE void flush() {
    for (int cell = simt::thread(); cell < cells_; cell += simt::threads()) {
      const int64_t count = word(cell);
      if (!count) continue;
      const int64_t to = sum_at(cell),
                    first = word(kMostBoxes + cell) + word(4 * kMostBoxes + cell) * (int64_t(1) << 32);
      simt::atomic_add(p_.workspace.sum, to, count);
      simt::atomic_add(p_.workspace.sum, to + 1, first + count * (static_cast<int64_t>(box_of_cell(cell)) << kBits1));
      simt::atomic_add(p_.workspace.sum, to + 2, word(2 * kMostBoxes + cell));
      simt::atomic_add(p_.workspace.sum, to + 3, word(3 * kMostBoxes + cell));
    }
  }
  ROADMAP_DEVICE int64_t word(int i) const {
    const uint32_t x = word_[i];
    return static_cast<int32_t>(x);
  }

  // --- running sums -------------------------------------------------------------------------------------------------

  // What this block's share of n sums adds up to, for the blocks that follow.
  ROADMAP_DEVICE void totals(int n) {
    int begin, end;
    share_of(n, begin, end);
    int64_t all[kMoments] = {0, 0, 0, 0};
    for (int i = begin + simt::thread(); i < end; i += simt::threads()) {
#pragma unroll
      for (int k = 0; k < kMoments; ++k) all[k] += sum(i, k);
    }
#pragma unroll
    for (int k = 0; k < kMoments; ++k) {
      all[k] = Base::sum_over_warp(all[k]);
      if (this->lane() == 0) total_[kMoments * this->warp() + k] = all[k];
    }
    simt::barrier();
    if (simt::thread() < kMoments) {
      int64_t sum = 0;
      for (int w = 0; w < warps_; ++w) sum += total_[kMoments * w + simt::thread()];
      p_.workspace.block_sum[kMoments * this->block_at(block_) + simt::thread()] = sum;
    }
    simt::barrier();
  }
  // Sum i becomes that of all before it; after totals().
  ROADMAP_DEVICE void prefix(int n) {
    int begin, end;
    share_of(n, begin, end);
    const int each = (end - begin + simt::threads() - 1) / simt::threads();
    const int from = smaller(end, begin + simt::thread() * each), to = smaller(end, from + each);
    int64_t own[kMoments] = {0, 0, 0, 0}, before[kMoments];
    for (int i = from; i < to; ++i) {
#pragma unroll
      for (int k = 0; k < kMoments; ++k) own[k] += sum(i, k);
    }
#pragma unroll
    for (int k = 0; k < kMoments; ++k) {
      int64_t inclusive = own[k];
      for (int delta = 1; delta < simt::kWarp; delta *= 2) {
        const int64_t other = simt::shuffle_up(inclusive, delta);
        if (this->lane() >= delta) inclusive += other;
      }
      if (this->lane() == simt::kWarp - 1) total_[kMoments * this->warp() + k] = inclusive;
      before[k] = inclusive - own[k];
      int64_t of_blocks = 0;
      for (int block = this->lane(); block < block_; block += simt::kWarp) {
        of_blocks += p_.workspace.block_sum[kMoments * this->block_at(block) + k];
      }
      before[k] += Base::sum_over_warp(of_blocks);
    }
    simt::barrier();
#pragma unroll
    for (int k = 0; k < kMoments; ++k) {
      for (int w = 0; w < this->warp(); ++w) before[k] += total_[kMoments * w + k];
    }
    for (int i = from; i < to; ++i) {
#pragma unroll
      for (int k = 0; k < kMoments; ++k) {
        const int64_t x = sum(i, k);
        p_.workspace.sum[sum_at(i) + k] = before[k];
        before[k] += x;
      }
    }
    simt::barrier();
  }

  // --- fields -------------------------------------------------------------------------------------------------------

  // sum of y^m / m! over some sources of a box. That of y^4 follows from the others to 1/128, the error of the best
  // approximation of y^4 by a parabola on [-1/2, 1/2].
  struct Moments {
    float m[kTerms];
  };
  static ROADMAP_DEVICE Moments moments_of(double m0, double m1, double m2, double m3) {
    return {{static_cast<float>(m0), static_cast<float>(m1), static_cast<float>(m2 * 0.5),
             static_cast<float>(m3 * (1 / 6.0)), static_cast<float>((m2 * 0.25 - m0 * (1 / 128.0)) * (1 / 24.0))}};
  }
  ROADMAP_DEVICE double difference(int begin, int end, int k) const {
    return static_cast<double>(sum(end, k) - sum(begin, k));
  }
  ROADMAP_DEVICE Moments of_negatives(int begin, int end, int box) const {  // of cells of the box
    const int64_t count = sum(end, 0) - sum(begin, 0);
    const int64_t first = sum(end, 1) - sum(begin, 1) - count * (static_cast<int64_t>(box) << kBits1);
    return moments_of(static_cast<double>(count), static_cast<double>(first) / (1 << kBits1),
                      difference(begin, end, 2) / (1 << kBits2), difference(begin, end, 3) / (1 << kBits3));
  }
  ROADMAP_DEVICE Moments of_positives(int begin, int end) const {
    constexpr double kUnit = 1.0 / (int64_t(1) << kWeightBits);
    return moments_of(difference(begin, end, 0) * kUnit, difference(begin, end, 1) * kUnit,
                      difference(begin, end, 2) * kUnit, difference(begin, end, 3) * kUnit);
  }

  // The moments of all boxes that hold sources, to shared memory.
  ROADMAP_DEVICE void gather(bool positives) {
    sources_ = 0;
    for (int first = 0; first < boxes_; first += simt::threads()) {
      const int box = first + simt::thread();
      int begin = 0, end = 0;
      if (box < boxes_) {
        begin = positives ? first_positive(box) : static_cast<int>(first_[box]);
        end = positives ? first_positive(box + 1) : static_cast<int>(first_[box + 1]);
      }
      const bool any = positives ? end > begin : end > begin && sum(end, 0) > sum(begin, 0);
      simt::barrier();  // sums of the tile before are still read
      int total;
      const int to = sources_ + this->sum_before(any, total);
      if (any) {
        const Moments of = positives ? of_positives(begin, end) : of_negatives(begin, end, box);
#pragma unroll
        for (int p = 0; p < kTerms; ++p) word_[p * kMostBoxes + to] = simt::float_bits(of.m[p]);
        word_[kTerms * kMostBoxes + to] = static_cast<uint32_t>(box);
      }
      sources_ += total;
    }
    simt::barrier();
  }
  ROADMAP_DEVICE int box_of_source(int i) const {
    const uint32_t box = word_[kTerms * kMostBoxes + i];
    return static_cast<int>(box);
  }
  // Sources in boxes below this one.
  ROADMAP_DEVICE int sources_below(int box) const {
    return how_many(sources_, [&](int i) { return box_of_source(i) < box; });
  }

  // Sums of sigma and of width sigma' over sources, for targets of one box: polynomials in -y, the target's offset, with
  // coefficients times m!.
  struct Field {
    float curve[kTerms] = {0, 0, 0, 0, 0}, slope[kTerms] = {0, 0, 0, 0, 0};

    // Sources d boxes above.
    template <bool kCurve>
    ROADMAP_DEVICE void add(const Global<float>& sigmoid, const BoxGrid& grid, int d, const Moments& of) {
      const int size = 2 * grid.reach + 1;
      float s[kDerivatives];
#pragma unroll
      for (int n = kCurve ? 0 : 1; n < kDerivatives; ++n) s[n] = sigmoid[n * size + grid.reach + d];
#pragma unroll
      for (int q = 0; q < kTerms; ++q) {
#pragma unroll
        for (int p = 0; p < kTerms; ++p) {
          if (kCurve) curve[q] += s[p + q] * of.m[p];
          slope[q] += s[p + q + 1] * of.m[p];
        }
      }
    }
    static ROADMAP_DEVICE float at(const float (&c)[kTerms], float y) {
      return c[0] - y * (c[1] - y * (c[2] * 0.5f - y * (c[3] * (1 / 6.0f) - y * (c[4] * (1 / 24.0f)))));
    }
  };

  template <bool kCurve>
  ROADMAP_DEVICE void add_source(Field& f, int box, int i) const {
    Moments of;
#pragma unroll
    for (int p = 0; p < kTerms; ++p) of.m[p] = simt::bits_float(word_[p * kMostBoxes + i]);
    f.template add<kCurve>(p_.workspace.sigmoid, grid_, box_of_source(i) - box, of);
  }

  // That of the gathered sources from `lowest` to `highest` boxes above, by a warp.
  template <bool kCurve>
  ROADMAP_DEVICE Field field(int box, int lowest, int highest) const {
    Field f;
    const int begin = sources_below(box + larger(lowest, -grid_.reach));
    const int end = sources_below(box + smaller(highest, grid_.reach) + 1);
    for (int i = begin + this->lane(); i < end; i += simt::kWarp) add_source<kCurve>(f, box, i);
#pragma unroll
    for (int q = 0; q < kTerms; ++q) {
      if (kCurve) f.curve[q] = Base::sum_over_warp(f.curve[q]);
      f.slope[q] = Base::sum_over_warp(f.slope[q]);
    }
    return f;
  }
  // In units of 1 / tau.
  ROADMAP_DEVICE double slope_of(const Field& f, float y) const {
    return static_cast<double>(Field::at(f.slope, y)) * (k_.tau / grid_.width);
  }

  // body(box) for this block's boxes with positives, a warp each; neighbours go to different warps.
  template <typename Body>
  ROADMAP_DEVICE void each_box(const Body& body) {
    int begin, end;
    share_of(boxes_, begin, end);
    const int groups = (end - begin + simt::kWarp - 1) / simt::kWarp;
    for (int group = this->warp(); group < groups; group += warps_) {
      const int own = begin + group + this->lane() * groups;
      uint32_t occupied = simt::ballot(own < end && first_positive(own) < first_positive(own + 1));
      for (; occupied; occupied &= occupied - 1) {
        body(begin + group + simt::count_bits((occupied - 1) & ~occupied) * groups);
      }
    }
    simt::barrier();
  }
  // body(i) for the positives of a box, a lane each.
  template <typename Body>
  ROADMAP_DEVICE void each_positive(int box, const Body& body) {
    const int end = first_positive(box + 1);
    for (int i = first_positive(box) + this->lane(); i < end; i += simt::kWarp) body(i);
  }

  // --- ranks --------------------------------------------------------------------------------------------------------

  ROADMAP_DEVICE void rank_among_negatives() {
    load_edges();
    gather(false);
    each_box([&](int box) {
      const Field f = field<true>(box, -grid_.reach, grid_.whole - 1);
      each_positive(box, [&](int i) { rank(box, i, f); });
    });
  }

  ROADMAP_DEVICE void rank(int box, int i, const Field& f) {
    const int end = cells_ + 1;
    const float u = positive(i), y = point_of(u).y;
    int threshold = end;  // its cell
    double rank = static_cast<double>(Field::at(f.curve, y)), slope = slope_of(f, y);
    if (!k_.smooth) {
      const float from = p_.workspace.key[2 * item(0) + i + within(u)];
      const int last = point_of(from).box, own = cell_of(box, u);
      threshold = cell_of(last, from);
      for (int b = larger(0, box + grid_.whole); b <= last && b - box <= grid_.reach; ++b) {
        Field near;
        near.template add<true>(p_.workspace.sigmoid, grid_, b - box,
                                of_negatives(first_[b], b < last ? static_cast<int>(first_[b + 1]) : threshold, b));
        rank += static_cast<double>(Field::at(near.curve, y));
        slope += slope_of(near, y);
      }
      rank += k_.start * difference(own, threshold, 0);
      const double count = difference(threshold, end, 0);
      if (count > 0) {
        const double sum = difference(threshold, end, 1) / (1 << kBits1) + count * low_;
        const double gaps = grid_.width * sum - count * (static_cast<double>(u) + grid_.delta);
        if (k_.rho > 0) rank += k_.rho * gaps;
        rank += count * k_.offset;
        slope += count * k_.rho * k_.tau;
      }
      p_.workspace.above[this->place(i)] = size_ - how_many_positives([&](float other) { return other < u; });
    }
    const int above = first_[box + 1];  // sigma there is 1 and what the field says
    if (threshold > above) rank += difference(above, threshold, 0);
    p_.workspace.below[this->place(i)] = rank;
    p_.workspace.slope[this->place(i)] = slope;
  }

  // smooth: rank+, and the sum of the slopes among the positives, its own included.
  ROADMAP_DEVICE void rank_among_positives() {
    gather(true);
    each_box([&](int box) {
      const Field f = field<true>(box, -grid_.reach, grid_.reach);
      const int above = size_ - first_positive(box + 1);
      each_positive(box, [&](int i) {
        const float y = point_of(positive(i)).y;
        if (this->ranks()) {  // from 1, and less sigma(0) of itself
          p_.workspace.above[this->place(i)] = 0.5 + above + static_cast<double>(Field::at(f.curve, y));
        }
        p_.workspace.among[item(i)] = slope_of(f, y);
      });
    });
  }

  // --- gradients ----------------------------------------------------------------------------------------------------

  enum class Weigh { kOnes, kNegativeRank, kPositiveRank };
  // Weights in rank+ are taken from that of a positive in the middle: equal ones cancel.
  ROADMAP_DEVICE double positive_weight(int i) const {
    return p_.workspace.above[this->place(i)] - p_.workspace.above[this->place(size_ / 2)];
  }

  // Moments of each positive, in place of those of the negatives; and the blocks' totals.
  ROADMAP_DEVICE void weigh(Weigh by) {
    int begin, end;
    share_of(size_ + 1, begin, end);
    for (int i = begin + simt::thread(); i < end; i += simt::threads()) {
      double w = 0, y = 0;
      if (i < size_) {
        y = static_cast<double>(point_of(positive(i)).y);
        w = by == Weigh::kOnes           ? 1.0
            : by == Weigh::kPositiveRank ? positive_weight(i)
                                         : p_.workspace.below[this->place(i)];
      }
      w *= static_cast<double>(int64_t(1) << kWeightBits);
      for (int k = 0; k < kMoments; ++k, w *= y) p_.workspace.sum[sum_at(i) + k] = llrint(w);
    }
    simt::barrier();
    totals(size_ + 1);
  }

  // Where the cubic of a cell lies, as four floats: behind the moments of the positives. Behind those of all cells are
  // those of boxes, without the positives near their thresholds.
  ROADMAP_DEVICE int64_t cubic_at(int cell) const { return 2 * sum_at(size_ + 1) + 4 * int64_t(cell); }
  ROADMAP_DEVICE Vector<float> cubic(int cell) const {
    return simt::load_as<Vector<float>>(Global<const float>(p_.workspace.cubic), cubic_at(cell));
  }
  // From a polynomial in -y, of degree 4.
  ROADMAP_DEVICE Vector<float> cubic_of(const Field& f) const {
    const float unit = static_cast<float>(k_.tau / grid_.width);
    float c[kTerms];
#pragma unroll
    for (int q = 0; q < kTerms; ++q) c[q] = f.slope[q] * unit;
    return {{c[0] - c[4] * (1 / 3072.0f), -c[1], c[2] * 0.5f + c[4] * (1 / 96.0f), c[3] * (-1 / 6.0f)}};
  }

  ROADMAP_DEVICE void table() {
    load_edges();
    gather(true);
    int begin, end;
    share_of(boxes_, begin, end);
    const int lowest = k_.smooth ? -grid_.reach : larger(-grid_.reach, 1 - grid_.whole);
    for (int box = begin + simt::thread(); box < end; box += simt::threads()) {
      Field f;
      const int last = sources_below(box + grid_.reach + 1);
      for (int i = sources_below(box + lowest); i < last; ++i) add_source<false>(f, box, i);
      simt::store_as(p_.workspace.cubic, cubic_at(cells_ + box), cubic_of(f));
    }
    simt::barrier();
    for (int cell = first_[begin] + simt::thread(); cell < first_[end]; cell += simt::threads()) {
      const int box = box_of_cell(cell);
      Vector<float> all = cubic(cells_ + box);
      if (!k_.smooth) {
        Field f;
        const int past = cell > box ? passed(key_at(cell - box - 1)) : 0;  // positives
        for (int b = smaller(boxes_ - 1, box - grid_.whole); b >= 0 && box - b <= grid_.reach; --b) {
          const int stop = first_positive(b + 1);
          if (stop <= past) break;
          const int from = larger(past, first_positive(b));
          if (from < stop) f.template add<false>(p_.workspace.sigmoid, grid_, b - box, of_positives(from, stop));
        }
        const Vector<float> near = cubic_of(f);
#pragma unroll
        for (int k = 0; k < 4; ++k) all.at[k] += near.at[k];
        all.at[0] += static_cast<float>(slope_past(past));
      }
      simt::store_as(p_.workspace.cubic, cubic_at(cell), all);
    }
    simt::barrier();
  }
  // The linear part of the first n positives.
  ROADMAP_DEVICE double slope_past(int n) const {
    return static_cast<double>(sum(n, 0) - sum(0, 0)) / static_cast<double>(int64_t(1) << kWeightBits) * k_.rho *
           k_.tau;
  }

  ROADMAP_DEVICE void box_gradient(bool nan) {
    int begin, end;
    this->share_columns(block_, p_.schedule.blocks_per_row, begin, end);
    if (nan) {
      this->fill_nan(begin, end);
      return;
    }
    load_edges();
    for (int i = simt::thread(); shared_ && i < cells_; i += simt::threads()) {
      const Vector<float> all = cubic(i);
#pragma unroll
      for (int k = 0; k < 4; ++k) word_[k * kMostBoxes + i] = simt::float_bits(all.at[k]);
    }
    simt::barrier();
    if (shared_) {
      write_gradient<true>(begin, end);
    } else {
      write_gradient<false>(begin, end);
    }
    simt::barrier();
  }
  template <bool kShared>
  ROADMAP_DEVICE void write_gradient(int begin, int end) {
    const float far = k_.smooth ? 0.0f : static_cast<float>(slope_past(size_));
    const double row = p_.row_scale ? static_cast<double>(p_.row_scale[row_]) : 1.0;
    const double weight = p_.op == Op::kObjective ? p_.weight[3 * row_] : p_.row_weight;
    const float by =
        static_cast<float>(this->outcome(Base::kUnit) / k_.tau * this->outcome(Base::kScale) * weight * row);
    float hinge = 0;
    if (p_.calibration && this->outcome(Base::kHinges) > 0) hinge = static_cast<float>(p_.weight[3 * row_ + 2] * row);
    const int tile = simt::threads() * kColumns, tiles = (end - begin + tile - 1) / tile;
    if (tiles == 0) return;
    // Last tiles first: they were read last and are still in the cache.
    int at = begin + (tiles - 1) * tile + simt::thread() * kColumns;
    const typename Base::Row from = this->row_in_memory();
    typename Base::Fetched next = this->fetch(from, at, end);
    for (int t = 0; t < tiles; ++t, at -= tile) {
      float x[kColumns], g[kColumns], scale[kColumns];
      const uint32_t bits = this->unpack(next, at, x, scale);
      if (t + 1 < tiles) next = this->fetch(from, at - tile, end);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const Point p = point_of(x[j]);
        g[j] = x[j] > lowest_ ? far : 0.0f;
        if (in_grid(p.box)) g[j] = read_cubic<kShared>(cell_of<kShared>(p.box, x[j]), p.y);
        g[j] *= by;
        if (hinge != 0.0f && x[j] > p_.margin) g[j] += hinge;
      }
      if (at >= end) continue;
      if (Base::kScales && p_.column_scale) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          if (bits >> j & 1) g[j] *= scale[j];
        }
      }
      this->store_columns(at, g);
    }
  }
  template <bool kShared>
  ROADMAP_DEVICE float read_cubic(int cell, float y) const {
    float c[4];
    if constexpr (kShared) {
#pragma unroll
      for (int k = 0; k < 4; ++k) c[k] = simt::bits_float(word_[k * kMostBoxes + cell]);
    } else {
      const Vector<float> all = cubic(cell);
#pragma unroll
      for (int k = 0; k < 4; ++k) c[k] = all.at[k];
    }
    return c[0] + y * (c[1] + y * (c[2] + y * c[3]));
  }

  // smooth: positive i also gets sum_j (w+_j - w+_i) sigma'(s_i - s_j).
  ROADMAP_DEVICE void gradient_among_positives() {
    gather(true);
    const double by = this->outcome(Base::kUnit) / k_.tau;
    each_box([&](int box) {
      const Field f = field<false>(box, -grid_.reach, grid_.reach);
      each_positive(box, [&](int i) {
        const double sum = slope_of(f, point_of(positive(i)).y);
        const double among = p_.workspace.among[item(i)], slope = p_.workspace.slope[this->place(i)];
        p_.workspace.slope[this->place(i)] = slope + (sum - positive_weight(i) * among) * by;
      });
    });
  }

  const BoxGrid& grid_;
  simt::Shared<uint32_t> word_;   // [kBoxWords, kMostBoxes]  moments of cells, then of boxes, then cubics of cells
  simt::Shared<int32_t> first_;   // [kMostBoxes + 1]  first cell of each box
  simt::Shared<float> key_;       // [kMostBoxes]  the keys, if cells are so few
  simt::Shared<float> positive_;  // [kFewPositives]  ascending, if there are no more
  simt::Shared<int64_t> total_;   // [warps, kMoments]
  bool done_ = false;             // whether the row is done here
  bool fits_ = false;             // whether all positives are finite, and boxes few enough
  float lowest_ = 0;              // positive
  int low_ = 0;                   // the lowest box, as a multiple of the width
  int boxes_ = 0, keys_ = 0, cells_ = 0;
  bool shared_ = false;  // whether cells have their sums, keys and cubics in shared memory
  int sources_ = 0;      // boxes that were gathered
};

}  // namespace roadmap::cuda
