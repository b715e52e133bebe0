// The row kernel: a row of scores to its loss and gradient, or to the ranks of its positives. The steps of a row:
//
//   masks      masks or lists become two bits a column: negative, positive
//   collect    the columns of the positives, ascending
//   sort       the positives of a piece by score: neighbours share a centre, and a tile too low for one is too low for
//              all that follow
//   positives  rank+ of each, among the positives
//   negatives  rank- of each, and its slope: the row streams past a few positives at a time
//   weights    what a rank weighs in the loss; the loss
//   own        smooth alone: the gradient between positives
//   gradient   the row streams past all positives once more; every negative gets its gradient
//   scatter    every positive gets its own
//
// A block works on a piece of the positives at a time, which lies in shared memory. Where one piece holds all positives
// of a row, they stay in shared memory, and a block takes all steps of its rows in one launch. Longer lists are kept in
// the workspace, in global memory, and loaded piece by piece. Few long rows are shared by several blocks, with a launch
// for each step.
//
// Scores stay untouched until the gradient is written, a column by the thread that has read it, and columns of
// positives last of all: the gradient may overwrite the scores.
#pragma once

#include "pairs.cuh"

namespace roadmap::cuda {

constexpr int kWord = 32;   // places of a word of a bitmap
constexpr int kTiles = 32;  // after which sums leave their thread: longer ones would drift

// kShared: rows of one piece, which stays in shared memory; else any row, by way of the workspace. kByBoxes: rows may go
// by boxes, by the class in boxes.cuh.
template <typename S, int kCapacity, bool kShared, bool kByBoxes = false>
class RowKernel {
 protected:
  using T = Accumulation<S>;
  using Params = RowParams<S>;
  // Columns of a thread at a time: 16 bytes of a half type, and a whole number of them in a byte of a bitmap.
  static constexpr int kColumns = sizeof(T) == 8 ? 4 : 8;
  static constexpr uint32_t kColumnBits = (1u << kColumns) - 1;
  static constexpr int kGroup = sizeof(T) == 8 ? 2 : 4;  // positives whose sums a thread holds in registers

 public:
  ROADMAP_DEVICE RowKernel(const Params& p, char* shared)
      : p_(p), k_(p.pair), memory_(shared), warps_(simt::threads() / simt::kWarp) {
    constexpr int n = kCapacity;
    score_ = memory_.take<T>(n);
    factor_ = memory_.take<T>(n);
    centre_ = memory_.take<T>(n);
    weight_ = memory_.take<T>(n);
    above_ = memory_.take<double>(n);
    below_ = memory_.take<double>(n);
    slope_ = memory_.take<double>(n);
    column_ = memory_.take<int32_t>(n);
    order_ = memory_.take<int32_t>(n);
    sums_ = memory_.take<double>(warps_ * 2 * kGroup);
    outcome_ = memory_.take<double>(kOutcome);
  }

  ROADMAP_DEVICE void run() { run_as(*this); }

 protected:
  template <typename Kernel>
  ROADMAP_DEVICE void run_as(Kernel& kernel) {
    const Schedule& s = p_.schedule;
    block_ = static_cast<int>(simt::block() % s.blocks_per_row);
    slot_ = simt::block() / s.blocks_per_row;
    if (slot() >= s.slots) return;
    for (row_ = s.first_row + slot(); row_ < s.last_row; row_ += s.slots) {
      if (kShared) shift_ = static_cast<int>(row_ * p_.columns % kColumns);
      if (!kShared && s.only_longer && !find_longer()) return;
      kernel.steps(s.steps);
      simt::barrier();  // the next row's masks overwrite what this one's last step reads
    }
  }

 public:
  ROADMAP_DEVICE void steps(uint32_t wanted) {
    const bool smooth = k_.smooth, gradient = p_.gradient_type != GradientType::kNone;
    if (wanted & kMasks) {
      pair_masks();
      if (p_.op == Op::kCountPairs) return;
    }
    if (wanted & kCollect) {
      if (!collect()) return;  // too many for shared memory
    }
    if (!kShared && !(wanted & (kMasks | kCollect))) {
      size_ = positives_of_blocks(blocks());
      if (!kByBoxes && may_go_by_boxes() && all_finite()) return;  // shared, and the other kernel's
    }
    if constexpr (sizeof(T) == 4) {
      if (wanted & kSort) sort();
    }
    if ((wanted & kPositives) && ranks()) rank_positives();
    if ((wanted & kNegatives) && p_.op != Op::kRankGradient) rank_negatives();
    if (wanted & kWeights) weights();
    if ((wanted & kOwn) && smooth && gradient && weighs() && outcome(kNan) == 0) own();
    if ((wanted & kGradient) && gradient) gradients();
    if ((wanted & kScatter) && gradient) scatter();
  }

 protected:
  // Whether a row is one for boxes; it goes by them where all of it is finite.
  ROADMAP_DEVICE bool may_go_by_boxes() const {
    return p_.schedule.boxes_above != kNever && size_ > p_.schedule.boxes_above && weighs();
  }
  // What the first `blocks` blocks have counted of a row's keys: see Workspace::block_items.
  ROADMAP_DEVICE int sum_of_blocks(int what, int blocks) const {
    int sum = 0;
    for (int block = lane(); block < blocks; block += simt::kWarp) {
      sum += p_.workspace.block_items[3 * block_at(block) + what];
    }
    return sum_over_warp(sum);
  }
  ROADMAP_DEVICE bool all_finite() const { return sum_of_blocks(2, blocks()) == 0; }

  // Moves on to the next row whose positives do not fit in shared memory. Mostly there is none, so all threads look at
  // once.
  ROADMAP_DEVICE bool find_longer() {
    const Schedule& s = p_.schedule;
    for (; row_ < s.last_row; row_ += s.slots * simt::threads()) {
      const int64_t row = row_ + s.slots * simt::thread();
      bool longer = row < s.last_row && p_.workspace.count[row] > s.most;
      if (longer && s.skip_done) longer = p_.workspace.done[row] == 0;
      if (!simt::barrier_or(longer)) continue;
      double nearest[] = {static_cast<double>(longer ? -simt::thread() : -simt::threads())};
      over_block<0>(nearest);
      row_ -= s.slots * static_cast<int>(nearest[0]);
      return true;
    }
    return false;
  }

  // Whether ranks are computed, and whether they weigh in a gradient.
  ROADMAP_DEVICE bool ranks() const { return p_.op != Op::kRankGradient && weighs(); }
  ROADMAP_DEVICE bool weighs() const { return p_.op != Op::kObjective || p_.ap; }
  // By boxes all positives are one piece, which stays in the workspace.
  ROADMAP_DEVICE int pieces() const { return kByBoxes ? size_ > 0 : (size_ + kCapacity - 1) / kCapacity; }
  ROADMAP_DEVICE int piece_begin(int piece) const { return piece * kCapacity; }
  ROADMAP_DEVICE int piece_size(int piece) const {
    if (kByBoxes) return size_;
    const int rest = size_ - piece_begin(piece);
    return rest < kCapacity ? rest : kCapacity;
  }
  // A block's number among those of its row, how many these are, and the slot that they share.
  ROADMAP_DEVICE int block() const { return kShared ? 0 : block_; }
  ROADMAP_DEVICE int blocks() const { return kShared ? 1 : p_.schedule.blocks_per_row; }
  ROADMAP_DEVICE int64_t slot() const { return kShared ? simt::block() : slot_; }
  // The first place of a row in its bitmaps. In a contiguous matrix, rows of odd length begin at any address: column 0
  // has the place that makes a multiple of 8 places one of 8 scores in memory, too, and vectors of them can be loaded.
  ROADMAP_DEVICE int shift() const { return kShared ? shift_ : 0; }
  ROADMAP_DEVICE int last_place() const { return shift() + static_cast<int>(p_.columns); }
  ROADMAP_DEVICE int64_t word_at(int64_t word) const { return slot() * p_.workspace.words + word; }
  // Of positive i in the workspace.
  ROADMAP_DEVICE int64_t place(int64_t i) const { return slot() * p_.schedule.places + i; }
  ROADMAP_DEVICE int64_t block_at(int64_t block) const { return slot() * blocks() + block; }
  // Words [begin, end) of share `index` of `count`.
  ROADMAP_DEVICE void share_words(int index, int count, int& begin, int& end) const {
    const int64_t words = p_.workspace.words;
    begin = kShared ? 0 : static_cast<int>(words * index / count);
    end = static_cast<int>(kShared ? words : words * (index + 1) / count);
  }
  // The same in places; words come in whole, and the last one ends with the row.
  ROADMAP_DEVICE void share_columns(int index, int count, int& begin, int& end) const {
    share_words(index, count, begin, end);
    begin *= kWord;
    end = smaller(end * kWord, last_place());
  }

  // --- sums over a block: every thread gets the result, which does not depend on the order of threads ---------------

  // Of the first of several numbers the sums, of the others the largest.
  template <int kSums, int kAll>
  ROADMAP_DEVICE void over_block(double (&x)[kAll]) {
    static_assert(kAll <= 2 * kGroup);
#pragma unroll
    for (int k = 0; k < kAll; ++k) {
      for (int delta = simt::kWarp / 2; delta > 0; delta /= 2) {
        x[k] = combine(k < kSums, x[k], simt::shuffle_down(x[k], delta));
      }
    }
    simt::barrier();  // others may still read what was here
    if (lane() == 0) {
#pragma unroll
      for (int k = 0; k < kAll; ++k) sums_[warp() * kAll + k] = x[k];
    }
    simt::barrier();
    const int k = simt::thread();
    if (k < kAll) {
      double all = sums_[k];
      for (int w = 1; w < warps_; ++w) all = combine(k < kSums, all, sums_[w * kAll + k]);
      sums_[k] = all;
    }
    simt::barrier();
#pragma unroll
    for (int j = 0; j < kAll; ++j) x[j] = sums_[j];
  }
  static ROADMAP_DEVICE double combine(bool add, double a, double b) { return add ? a + b : a > b ? a : b; }
  // The sum over a warp, for every lane: a butterfly adds the same pairs in each.
  template <typename N>
  static ROADMAP_DEVICE N sum_over_warp(N x) {
    for (int mask = simt::kWarp / 2; mask > 0; mask /= 2) x += simt::shuffle_xor(x, mask);
    return x;
  }
  ROADMAP_DEVICE double sum_over_block(double x) {
    double all[] = {x};
    over_block<1>(all);
    return all[0];
  }

  // The sum of x over the threads before this one; total: over all. Its caller has just met
  // all others at a barrier, so that nobody still reads sums_.
  ROADMAP_DEVICE int sum_before(int x, int& total) {
    int inclusive = x;
    for (int delta = 1; delta < simt::kWarp; delta *= 2) {
      const int other = simt::shuffle_up(inclusive, delta);
      if (lane() >= delta) inclusive += other;
    }
    if (lane() == simt::kWarp - 1) sums_[warp()] = inclusive;
    simt::barrier();
    int before = 0;
    total = 0;
    for (int w = 0; w < warps_; ++w) {
      const int sum = static_cast<int>(static_cast<double>(sums_[w]));
      if (w < warp()) before += sum;
      total += sum;
    }
    return before + inclusive - x;
  }

  ROADMAP_DEVICE int lane() const { return simt::thread() % simt::kWarp; }
  ROADMAP_DEVICE int warp() const { return simt::thread() / simt::kWarp; }

  // --- masks --------------------------------------------------------------------------------------------------------

  ROADMAP_DEVICE void pair_masks() {
    int begin, end;
    share_words(block(), blocks(), begin, end);
    int positives = 0, negatives = 0;
    if (p_.relation.target) {
      from_masks(begin, end, positives, negatives);
    } else {
      from_lists(begin, end, positives, negatives);
    }
    double found[] = {static_cast<double>(positives), static_cast<double>(negatives)};
    over_block<2>(found);
    if (p_.op == Op::kCountPairs) {
      if (simt::thread() == 0) {
        p_.counts[2 * row_] = static_cast<int64_t>(found[0]);
        p_.counts[2 * row_ + 1] = static_cast<int64_t>(found[1]);
      }
      return;
    }
    size_ = static_cast<int>(found[0]);
    if (simt::thread() != 0) return;
    if (!kShared) {
      p_.workspace.block_positives[block_at(block())] = size_;
    } else {
      p_.workspace.count[row_] = size_;
    }
  }

  ROADMAP_DEVICE void from_masks(int begin, int end, int& positives, int& negatives) {
    const Relation& r = p_.relation;
    const Global<const uint8_t> target = r.target + row_ * r.target_stride;
    const Global<const uint8_t> ignore = r.ignore ? r.ignore + row_ * r.ignore_stride : r.ignore;
    for (int w = begin + simt::thread(); w < end; w += simt::threads()) {
      const int column = w * kWord - shift();
      const uint32_t valid = places_of(w);
      const Bytes wanted = bytes_of(target, column, valid);
      const Bytes unwanted = ignore ? bytes_of(ignore, column, valid) : Bytes{};  // before any is looked at
      const uint32_t left_out = ignore ? nonzero_bits(unwanted) : 0u;
      const uint32_t positive = nonzero_bits(wanted) & ~left_out;
      const uint32_t negative = valid & ~positive & ~left_out;
      p_.workspace.positive[word_at(w)] = positive;
      p_.workspace.negative[word_at(w)] = negative;
      positives += simt::count_bits(positive);
      negatives += simt::count_bits(negative);
    }
  }

  // The places of a word that are columns.
  ROADMAP_DEVICE uint32_t places_of(int w) const {
    const int before = shift() - w * kWord, count = last_place() - w * kWord;
    uint32_t places = count >= kWord ? ~0u : count > 0 ? (1u << count) - 1 : 0u;
    if (before > 0) places &= ~0u << before;
    return places;
  }

  // 32 bytes of a mask, from a column on.
  struct Bytes {
    uint32_t four[8] = {};
  };
  ROADMAP_DEVICE Bytes bytes_of(const Global<const uint8_t>& mask, int column, uint32_t valid) const {
    Bytes bytes;
    if (valid == ~0u && simt::address(mask + column) % 8 == 0) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const auto eight = simt::load_as<uint64_t>(mask, column + 8 * j);
        bytes.four[2 * j] = static_cast<uint32_t>(eight);
        bytes.four[2 * j + 1] = static_cast<uint32_t>(eight >> 32);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kWord; ++j) {
        if (valid >> j & 1) bytes.four[j / 4] |= static_cast<uint32_t>(mask[column + j]) << 8 * (j % 4);
      }
    }
    return bytes;
  }
  // A bit a byte: not zero. The top bits of four bytes, gathered by a product in which no two of them meet.
  static ROADMAP_DEVICE uint32_t nonzero_bits(const Bytes& bytes) {
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t x = bytes.four[j], top = (((x & 0x7f7f7f7fu) + 0x7f7f7f7fu) | x) & 0x80808080u;
      bits |= (top * 0x00204081u >> 28) << 4 * j;
    }
    return bits;
  }

  ROADMAP_DEVICE void from_lists(int begin, int end, int& positives, int& negatives) {
    const Relation& r = p_.relation;
    for (int w = begin + simt::thread(); w < end; w += simt::threads()) {
      p_.workspace.positive[word_at(w)] = 0;
      p_.workspace.negative[word_at(w)] = r.negative.span ? 0u : places_of(w);
    }
    simt::barrier();  // threads set bits in words that others have cleared
    mark(r.positive, begin, end, true, p_.workspace.positive);
    mark(r.negative, begin, end, true, p_.workspace.negative);
    simt::barrier();  // what is left out is so whatever else it is
    mark(r.left_out, begin, end, false, p_.workspace.positive);
    mark(r.left_out, begin, end, false, p_.workspace.negative);
    const int64_t own = r.own < 0 || r.own + row_ >= p_.columns ? -1 : r.own + row_ + shift();
    if (simt::thread() == 0 && own >= begin * kWord && own < int64_t(end) * kWord) {
      simt::atomic_and(p_.workspace.positive, word_at(own / kWord), ~(1u << (own % kWord)));
      simt::atomic_and(p_.workspace.negative, word_at(own / kWord), ~(1u << (own % kWord)));
    }
    simt::barrier();
    for (int w = begin + simt::thread(); w < end; w += simt::threads()) {
      const uint32_t positive = p_.workspace.positive[word_at(w)];
      const uint32_t negative = p_.workspace.negative[word_at(w)] & ~positive;
      p_.workspace.negative[word_at(w)] = negative;
      positives += simt::count_bits(positive);
      negatives += simt::count_bits(negative);
    }
  }

  // Sets or clears the bits of a row's listed columns within words [begin, end). No span and no column leads elsewhere.
  ROADMAP_DEVICE void mark(const Lists& lists, int begin, int end, bool set, const Global<uint32_t>& bits) {
    if (!lists.span) return;
    const int64_t first = smaller<int64_t>(lists.size, larger<int64_t>(0, lists.span[2 * row_]));
    const int64_t last = smaller<int64_t>(lists.size, lists.span[2 * row_ + 1]);
    for (int64_t k = first + simt::thread(); k < last; k += simt::threads()) {
      const int64_t column = lists.column[k];
      if (column < 0 || column >= p_.columns) continue;
      const int64_t at = column + shift();
      if (at < begin * kWord || at >= int64_t(end) * kWord) continue;
      const uint32_t bit = 1u << (at % kWord);
      if (set) {
        simt::atomic_or(bits, word_at(at / kWord), bit);
      } else {
        simt::atomic_and(bits, word_at(at / kWord), ~bit);
      }
    }
  }

  // --- the positives ------------------------------------------------------------------------------------------------

  // How many the first `blocks` blocks have found.
  ROADMAP_DEVICE int positives_of_blocks(int blocks) const {
    int sum = 0;
    for (int block = lane(); block < blocks; block += simt::kWarp) {
      sum += p_.workspace.block_positives[block_at(block)];
    }
    return sum_over_warp(sum);
  }

  // Writes their columns, ascending, to shared memory or to the workspace. False: too many, so that another launch has
  // to take this row.
  ROADMAP_DEVICE bool collect() {
    int at = 0;
    if (kShared) {
      if (size_ > p_.schedule.most) return false;
    } else {
      simt::barrier();  // the count has been written
      at = positives_of_blocks(block());
      size_ = positives_of_blocks(blocks());
      if (size_ > p_.schedule.places) return false;
    }
    int begin, end;
    share_words(block(), blocks(), begin, end);
    for (int first = begin; first < end; first += simt::threads()) {
      const int w = first + simt::thread();
      uint32_t bits = w < end ? p_.workspace.positive[word_at(w)] : 0u;
      if (!simt::barrier_or(bits != 0)) continue;
      int total;
      int to = at + sum_before(simt::count_bits(bits), total);
      if constexpr (kByBoxes) {
        if (w < end) p_.workspace.before[word_at(w)] = to;
      }
      for (int j = 0; bits; ++j, bits >>= 1) {
        if (!(bits & 1)) continue;
        if (kShared) {
          column_[to] = w * kWord + j - shift();
        } else {
          p_.workspace.column[place(to)] = w * kWord + j;
        }
        ++to;
      }
      at += total;
    }
    simt::barrier();
    if (kShared) load(0);
    return true;
  }

  ROADMAP_DEVICE T score_of(int64_t column) const {
    const T raw = widen(p_.scores[row_ * p_.score_stride + column]);
    return p_.column_scale ? raw * p_.column_scale[column] * p_.row_scale[row_] : raw;
  }

  // Loads columns and scores of a piece to shared memory. Where the row stays there, so are the columns already; else
  // other threads may still read the piece before.
  ROADMAP_DEVICE void load(int piece) {
    if (kByBoxes) return;
    const int n = piece_size(piece);
    if (!kShared) simt::barrier();
    for (int i = simt::thread(); i < n; i += simt::threads()) {
      if (!kShared) column_[i] = p_.workspace.column[place(piece_begin(piece) + i)];
      const int32_t column = column_[i];
      score_[i] = score_of(column);
    }
    simt::barrier();
  }

  // Positive i of the piece that is loaded.
  ROADMAP_DEVICE T score_at(int i) const {
    if constexpr (kByBoxes) {
      return p_.workspace.sorted[0][slot() * p_.schedule.room + i];
    } else {
      return score_[i];
    }
  }
  ROADMAP_DEVICE int32_t column_at(int i) const {
    if constexpr (kByBoxes) {
      return p_.workspace.column[place(i)];
    } else {
      return column_[i];
    }
  }

  // Pieces sorted by score, ties by column. float64 has no use for an order.
  ROADMAP_DEVICE void sort() {
    for (int piece = block(); piece < pieces(); piece += blocks()) {
      if (!kShared) load(piece);
      const int n = piece_size(piece);
      for (int i = simt::thread(); i < n; i += simt::threads()) {
        const T u = score_[i];
        int lower = 0;
        for (int j = 0; j < n; ++j) {
          const T other = score_[j];
          lower += other < u || (other == u && j < i);
        }
        const int32_t column = column_[i];
        if (u == u) {
          factor_[lower] = u;
          order_[lower] = column;
        }
      }
      // A NaN has no place in an order; such a row is not ranked, and any order will do.
      bool nan = false;
      for (int i = simt::thread(); i < n; i += simt::threads()) {
        const T u = score_[i];
        nan |= u != u;
      }
      if (simt::barrier_or(nan)) continue;
      for (int i = simt::thread(); i < n; i += simt::threads()) {
        const T u = factor_[i];
        const int32_t column = order_[i];
        score_[i] = u;
        column_[i] = column;
        if (!kShared) p_.workspace.column[place(piece_begin(piece) + i)] = column;
      }
      simt::barrier();
    }
  }

  // The number of a positive in its piece by column, which is the order of smooth_rank.
  ROADMAP_DEVICE int ordinal(int i, int n) const {
    const int32_t column = column_at(i);
    if constexpr (kByBoxes) {
      const uint32_t lower = p_.workspace.positive[word_at(column / kWord)] & ((1u << (column % kWord)) - 1);
      return p_.workspace.before[word_at(column / kWord)] + simt::count_bits(lower);
    }
    int before = 0;
    for (int j = 0; j < n; ++j) before += column_[j] < column;
    return before;
  }

  // Score of positive j of the row, whichever piece it is in.
  ROADMAP_DEVICE T any_score(int j) const {
    return kShared ? static_cast<T>(score_[j]) : score_of(p_.workspace.column[place(j)]);
  }

  ROADMAP_DEVICE void rank_positives() {
    for (int piece = block(); piece < pieces(); piece += blocks()) {
      if (!kShared) load(piece);
      const int n = piece_size(piece), begin = piece_begin(piece);
      for (int i = simt::thread(); i < n; i += simt::threads()) {
        const T u = score_[i];
        double rank = 1;
        if (k_.smooth) {
          for (int j = 0; j < size_; ++j) {
            if (j != begin + i) rank += static_cast<double>(logistic_of(gap_of(any_score(j), u), k_).value);
          }
        } else {  // the true step
          int count = 0;
          for (int j = 0; j < size_; ++j) count += any_score(j) >= u;
          rank = count;  // itself included
        }
        if (kShared) {
          above_[i] = rank;
        } else {
          p_.workspace.above[place(begin + i)] = rank;
        }
      }
    }
  }

  // Centres and factors of a piece that is loaded. The centre is the lowest positive of a cell of the width in which
  // exponentials can be shared; one that rounding leaves too far away is its own.
  ROADMAP_DEVICE void centre(int n) {
    for (int i = simt::thread(); i < n; i += simt::threads()) {
      const T u = score_[i];
      T c = u;
      if (sizeof(T) == 4) {
        const T lowest = score_[0];
        const T cell = floor((u - lowest) / k_.span);
        int low = 0, high = i;  // the first of the same cell: they are sorted
        while (low < high) {
          const int middle = (low + high) / 2;
          if (floor((score_[middle] - lowest) / k_.span) < cell) {
            low = middle + 1;
          } else {
            high = middle;
          }
        }
        c = score_[low];
        if (!(u - c <= k_.span)) c = u;
      }
      centre_[i] = c;
      factor_[i] = u == c ? factor(T(0), T(0), k_, u) : factor(u, c, k_, u);
    }
    simt::barrier();
  }
  // Equal infinities are no distance apart.
  static ROADMAP_DEVICE float factor(float u, float c, const PairConstants<float>& k, float) {
    return cuda::factor(u, c, k);
  }
  static ROADMAP_DEVICE double factor(double, double, const PairConstants<double>& k, double u) {
    return cuda::factor(u, u, k);
  }

  // --- the row ------------------------------------------------------------------------------------------------------

  // Places [at, at + 8) of the row as they lie in memory, and the word of their negatives. `at` is a multiple of 8.
  static constexpr int kEach = 16 / sizeof(S);
  static constexpr bool kScales = sizeof(S) == sizeof(T);  // whether there may be any: products are float32 or float64
  struct Fetched {
    uint32_t word;
    Vector<S> part[kColumns / kEach];
  };
  // What a row is fetched from: place i is at [i].
  struct Row {
    Global<const S> scores;
    Global<const uint32_t> words;
    bool aligned;
  };
  ROADMAP_DEVICE Row row_in_memory() const {
    const Global<const S> scores = p_.scores + (row_ * p_.score_stride - shift());
    return {scores, p_.workspace.negative + word_at(0), simt::address(scores) % 16 == 0};
  }
  // Nothing is computed here and no load waits for another: a tile is on its way while the last one is worked on.
  ROADMAP_DEVICE Fetched fetch(const Row& from, int at, int end) const {
    Fetched f;
    f.word = 0;
    if (at < end) f.word = from.words[static_cast<uint32_t>(at) / kWord];
    if (from.aligned && at >= shift() && at + kColumns <= end) {
#pragma unroll
      for (int v = 0; v < kColumns / kEach; ++v) f.part[v] = simt::load_as<Vector<S>>(from.scores, at + v * kEach);
    } else {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        f.part[j / kEach].at[j % kEach] = at + j >= shift() && at + j < end ? from.scores[at + j] : S{};
      }
    }
    return f;
  }

  // The scores as they are ranked, and the byte of their negatives. All others, and what is past the end, are -inf:
  // there H- and its slope vanish.
  ROADMAP_DEVICE uint32_t unpack(const Fetched& f, int at, T (&x)[kColumns], T (&scale)[kColumns]) const {
    const uint32_t bits = f.word >> (static_cast<uint32_t>(at) % kWord) & kColumnBits;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) x[j] = widen(f.part[j / kEach].at[j % kEach]);
    if (kScales && p_.column_scale && bits) {  // in the order of score_of: equal scores are to be ties
      column_scales(at, bits, scale);
      const T row_scale = p_.row_scale[row_];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) x[j] = x[j] * scale[j] * row_scale;
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (!(bits >> j & 1)) x[j] = -infinity();
    }
    return bits;
  }
  // Those of the places that a bit is set of, at least.
  ROADMAP_DEVICE void column_scales(int at, uint32_t bits, T (&scale)[kColumns]) const {
    const int column = at - shift();
    constexpr int kScales = 16 / sizeof(T);
    if (column >= 0 && column + kColumns <= p_.columns && simt::address(p_.column_scale + column) % 16 == 0) {
#pragma unroll
      for (int v = 0; v < kColumns / kScales; ++v) {
        const auto part = simt::load_as<Vector<T>>(p_.column_scale, column + v * kScales);
#pragma unroll
        for (int j = 0; j < kScales; ++j) scale[v * kScales + j] = part.at[j];
      }
    } else {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) scale[j] = bits >> j & 1 ? static_cast<T>(p_.column_scale[column + j]) : T(0);
    }
  }
  static ROADMAP_DEVICE T not_a_number() { return static_cast<T>(NAN); }
  static ROADMAP_DEVICE T infinity() { return static_cast<T>(INFINITY); }

  // NaN aside.
  static ROADMAP_DEVICE T largest(const T (&x)[kColumns]) {
    T top = x[0];
#pragma unroll
    for (int j = 1; j < kColumns; ++j) top = larger(x[j], top);
    return top;
  }

  // --- ranks among the negatives ------------------------------------------------------------------------------------

  ROADMAP_DEVICE void rank_negatives() {
    const Schedule& s = p_.schedule;
    const int count = ranks() ? pieces() : 0, at_least = count > 0 ? count : 1;
    const int spans = blocks() / at_least > 1 ? blocks() / at_least : 1;
    for (int task = block(); task < at_least * spans; task += blocks()) {
      const int piece = task / spans, span = task % spans, n = count ? piece_size(piece) : 0;
      int begin, end;
      share_columns(span, spans, begin, end);
      if (n) {
        if (!kShared) load(piece);
        centre(n);
      }
      bool nan = false;
      hinge_ = 0;
      hinges_ = 0;
      const int tile = simt::threads() * kColumns, tiles = (end - begin + tile - 1) / tile;
      bool look = piece == 0;
      for (int first = 0; look || first < n; look = false) {
        int group = 0;  // infinite positives are worked one by one
        while (group < kGroup && first + group < n && is_finite(score_[first + group])) ++group;
        for (int t = 0; (t == 0 || t < tiles) && (look || group > 0); t += kTiles) {
          stream(first, group, begin, end, t, smaller(tiles, t + kTiles), look, nan);
        }
        if (group == 0 && first < n) stream_limits(first++, begin, end);
        first += group;
      }
      simt::barrier();  // sums are read by others than have written them
      if (piece == 0) save_seen(span, nan);
      if (kShared) break;
      const int64_t to = block_at(task) * 2 * kCapacity;
      for (int i = simt::thread(); i < n; i += simt::threads()) {  // that this thread may not have written itself
        const double rank = below_[i], slope = slope_[i];
        if (spans > 1) {
          p_.workspace.partial[to + i] = rank;
          p_.workspace.partial[to + kCapacity + i] = slope;
        } else {
          p_.workspace.below[place(piece_begin(piece) + i)] = rank;
          p_.workspace.slope[place(piece_begin(piece) + i)] = slope;
        }
      }
    }
    simt::barrier();  // thread 0 has left what the row's first piece has seen
  }

  // What the first pass over a span has seen: NaN, and the hinges of negatives.
  ROADMAP_DEVICE void save_seen(int span, bool nan) {
    double all[] = {hinge_, static_cast<double>(hinges_), static_cast<double>(nan)};
    over_block<2>(all);
    if (simt::thread() != 0) return;
    if (kShared) {
      outcome_[kHingeSum] = all[0];
      outcome_[kHinges] = all[1];
      outcome_[kNan] = all[2];
    } else {
      p_.workspace.hinge[block_at(span)] = all[0];
      p_.workspace.flag[2 * block_at(span)] = static_cast<int32_t>(all[1]);
      p_.workspace.flag[2 * block_at(span) + 1] = all[2] != 0;
    }
  }

  // Tiles [tile, last) of columns [begin, end) past positives [first, first + n), n <= kGroup, whose sums stay in
  // registers. look: it is the first time that these columns are seen.
  ROADMAP_DEVICE void stream(int first, int n, int begin, int end, int tile, int last, bool look, bool& nan) {
    const bool more = tile > 0;
    const T lowest = n > 0 ? static_cast<T>(score_[first]) : infinity();  // float: they are sorted
    const T out_of_reach = sizeof(T) == 4 ? lowest - k_.cut : -infinity();
    Shares<T> sum[kGroup];
    const int stride = simt::threads() * kColumns;
    int at = begin + tile * stride + simt::thread() * kColumns;
    const Row from = row_in_memory();
    Fetched next = fetch(from, at, end);
    for (; tile < last; ++tile, at += stride) {
      T x[kColumns], a[kColumns], scale[kColumns];
      unpack(next, at, x, scale);
      next = fetch(from, at + stride, end);  // past the end there is nothing to fetch
      if (look) look_at(x, nan);
      const T top = largest(x);
      if (n <= 0 || !simt::warp_any(top >= out_of_reach)) continue;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (i >= n) continue;
        const T u = score_[first + i];
        if (sizeof(T) == 4 && i > 0 && !simt::warp_any(top >= u - k_.cut)) continue;
        const bool below = k_.smooth || !simt::warp_any(top >= u);  // no pair of this warp has t >= 0
        const T c = centre_[first + i], f = factor_[first + i];
        if (i == 0 || c != centre_[first + i - 1]) {
#pragma unroll
          for (int j = 0; j < kColumns; ++j) a[j] = share(x[j], c, k_);
        }
        T value[kColumns], part[kColumns];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const Parts<T> h = logistic(a[j], f, k_);
          value[j] = h.value;
          part[j] = h.part;
        }
        if (!below) {
          T far[kColumns];
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            const T t = x[j] - u;
            const bool linear = t > k_.delta;
            value[j] = linear ? T(0) : value[j];
            far[j] = linear ? t - k_.origin : T(0);
            sum[i].count += linear ? Shares<T>::kLinear + 1 : t >= T(0) ? 1 : 0;
          }
          sum[i].far += total(far);
        }
        // As trees: a chain of eight would round eight times.
        T slope[kColumns / 2];
#pragma unroll
        for (int j = 0; j < kColumns / 2; ++j) {
          slope[j] = fused(part[j], value[j], part[j + kColumns / 2] * value[j + kColumns / 2]);
        }
        sum[i].value += total(value);
        sum[i].slope += total(slope);
      }
    }
    if (n <= 0) return;
    simt::barrier();  // others may still read what was here
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (i < n) reduce_warp(i, sum[i].rank(k_), sum[i].rise(k_));
    }
    reduce_block(first, n, more);
  }

  template <int n>
  static ROADMAP_DEVICE T total(T (&x)[n]) {
#pragma unroll
    for (int half = n / 2; half > 0; half /= 2) {
#pragma unroll
      for (int j = 0; j < half; ++j) x[j] += x[j + half];
    }
    return x[0];
  }

  ROADMAP_DEVICE void look_at(const T (&x)[kColumns], bool& nan) {
    // Not std::isunordered: on the device nvcc makes a constant of it.
#pragma unroll
    for (int j = 0; j < kColumns; j += 2) nan |= x[j] != x[j] || x[j + 1] != x[j + 1];  // one comparison
    if (!p_.calibration) return;
    T sum = 0;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const bool above = x[j] > p_.margin;
      sum += above ? x[j] - p_.margin : T(0);
      hinges_ += above;
    }
    hinge_ += static_cast<double>(sum);
  }

  // The same for one positive that is infinite: ties and limits. Rare, and so plain.
  ROADMAP_DEVICE void stream_limits(int first, int begin, int end) {
    const T u = score_[first];
    double rank = 0, slope = 0;
    for (int at = begin + simt::thread(); at < end; at += simt::threads()) {
      if (!negative_at(at)) continue;
      const Logistic<T> h = limit(score_of(at - shift()), u);
      rank += static_cast<double>(h.value);
      slope += static_cast<double>(h.slope);
    }
    simt::barrier();  // others may still read what was here
    reduce_warp(0, rank, slope);
    reduce_block(first, 1, false);
  }
  ROADMAP_DEVICE bool negative_at(int at) const {
    return p_.workspace.negative[word_at(at / kWord)] >> (at % kWord) & 1;
  }

  ROADMAP_DEVICE Logistic<T> limit(T v, T u) const {
    const T t = gap_of(v, u);
    Logistic<T> h = logistic_of(t, k_);
    if (!k_.smooth) h = surrogate(t, h, k_);
    if (v == u && !is_finite(u)) h.slope = 0;  // such a tie stays one when either moves
    return h;
  }

  // Adds up the sums of all threads for positive `first` + i in shared memory, in a fixed order; more: onto those that
  // are there.
  ROADMAP_DEVICE void reduce_warp(int i, double rank, double slope) {
#pragma unroll
    for (int delta = simt::kWarp / 2; delta > 0; delta /= 2) {
      rank += simt::shuffle_down(rank, delta);
      slope += simt::shuffle_down(slope, delta);
    }
    if (lane() != 0) return;
    sums_[warp() * 2 * kGroup + 2 * i] = rank;
    sums_[warp() * 2 * kGroup + 2 * i + 1] = slope;
  }
  ROADMAP_DEVICE void reduce_block(int first, int n, bool more) {
    simt::barrier();
    if (simt::thread() >= 2 * n) return;
    const simt::Shared<double> to = simt::thread() % 2 ? slope_ : below_;
    const int i = first + simt::thread() / 2;
    double sum = 0;
    if (more) sum = to[i];
    for (int w = 0; w < warps_; ++w) sum += sums_[w * 2 * kGroup + simt::thread()];
    to[i] = sum;
  }

  // --- weights ------------------------------------------------------------------------------------------------------

  // rank+, rank- and slope of positive i of a piece.
  struct Ranks {
    double above, below, slope;
  };
  ROADMAP_DEVICE Ranks ranks_of(int piece, int i) const {
    if (kShared) return {above_[i], below_[i], slope_[i]};
    const int64_t at = place(piece_begin(piece) + i);
    return {p_.workspace.above[at], p_.workspace.below[at], p_.workspace.slope[at]};
  }

  // For rows in the workspace: rank- and slope of every positive, summed over spans, a warp a positive.
  ROADMAP_DEVICE void sum_spans() {
    const int spans = blocks() / pieces();
    if (spans <= 1 || kByBoxes) return;
    for (int i = warp(); i < size_; i += warps_) {
      const int piece = i / kCapacity;
      double rank = 0, slope = 0;
      for (int span = lane(); span < spans; span += simt::kWarp) {
        const int64_t from = block_at(piece * spans + span) * 2 * kCapacity + i % kCapacity;
        rank += p_.workspace.partial[from];
        slope += p_.workspace.partial[from + kCapacity];
      }
      rank = sum_over_warp(rank);
      slope = sum_over_warp(slope);
      if (lane() != 0) continue;
      p_.workspace.below[place(i)] = rank;
      p_.workspace.slope[place(i)] = slope;
    }
    simt::barrier();  // sums are read by others than have written them
  }

  struct Weight {
    double below, above, slope;  // dloss/drank-, dloss/drank+, slope of rank-
  };
  ROADMAP_DEVICE Weight weight_of(int piece, int i) const {
    if (p_.op == Op::kRankGradient) {
      const int64_t at = entry(piece, i);
      if (at < 0) return {0, 0, 0};
      return {static_cast<double>(p_.negative_weight[at]),
              p_.positive_weight ? static_cast<double>(p_.positive_weight[at]) : 0.0,
              static_cast<double>(p_.slope_in[at])};
    }
    const Ranks r = ranks_of(piece, i);
    const double rank = r.above + r.below, all = static_cast<double>(size_);
    // Divided twice: rank squared can overflow.
    return {r.above / rank / (rank * all), -miss(r) / (rank * all), r.slope};
  }

  // The share of rank- in the rank directly: 1 - AP would cancel where the ranking is nearly right.
  static ROADMAP_DEVICE double miss(const Ranks& r) { return is_finite(r.below) ? r.below / (r.above + r.below) : 1.0; }

  // Where the numbers of a positive lie among those of all, or -1.
  ROADMAP_DEVICE int64_t entry(int piece, int i) const {
    const int64_t at = p_.first[row_] + piece_begin(piece) + ordinal(i, piece_size(piece));
    return at >= 0 && at < p_.entries ? at : -1;
  }

  ROADMAP_DEVICE void weights() {
    if (block() != 0) return;
    Seen seen = look_back();
    if (!kShared && ranks() && size_ > 0) sum_spans();
    const bool ranked = p_.op == Op::kRankGradient || ranks();
    const int count = ranked ? pieces() : 0;
    double loss = 0, unit = 0, total = 0, largest = 0;
    bool nan = false;
    for (int piece = 0; piece < count; ++piece) {
      if (!kShared) load(piece);
      for (int i = simt::thread(); i < piece_size(piece); i += simt::threads()) {
        const T u = score_at(i);
        nan |= u != u;
        if (p_.op == Op::kRank) continue;
        const Weight w = weight_of(piece, i);
        if (p_.op == Op::kRankGradient) {
          nan |= w.slope != w.slope;  // the forward pass met a NaN score
        } else {
          loss += miss(ranks_of(piece, i));
        }
        const double above = k_.smooth ? fabs(w.above) : 0.0, below = fabs(w.below);
        unit = larger(unit, larger(above, below));
        total += above + below;
        // Of the positive's own gradient: with the negatives, and for smooth with positives of the mean weight.
        largest = larger(largest, below * w.slope / k_.tau + above * size_ * 0.25 / k_.tau);
      }
    }
    if (!ranked) {  // calibration alone: NaN still shows
      for (int piece = 0; piece < pieces(); ++piece) {
        if (!kShared) load(piece);
        for (int i = simt::thread(); i < piece_size(piece); i += simt::threads()) {
          const T u = score_at(i);
          nan |= u != u;
        }
      }
    }
    double all[] = {loss, total, unit, largest};
    over_block<2>(all);
    loss = all[0], total = all[1], unit = all[2], largest = all[3];
    seen.nan = simt::barrier_or(nan) || seen.nan;
    if (p_.op == Op::kRank) {
      for (int piece = 0; piece < count; ++piece) save_ranks(piece, seen.nan);
      return;
    }
    if (!(unit > 0) || !is_finite(unit)) unit = 1;
    // A power of two that brings the largest possible gradient of the row near the top of float16: what GradScaler's
    // factor would have saved is then still there when it arrives.
    double scale = 1;
    const double bound = larger(largest, total * k_.steepest);
    if (p_.unscale && !seen.nan && bound > 0 && is_finite(bound)) {
      const int power = 14 - static_cast<int>(floor(log2(bound)));
      scale = exp2(static_cast<double>(power < -100 ? -100 : power > 100 ? 100 : power));
    }
    for (int piece = 0; piece < count; ++piece) save_weights(piece, unit);
    save_values(size_ ? loss / size_ : 0.0, scale, seen);
    if (simt::thread() == 0) {
      const double outcome[] = {unit, scale, static_cast<double>(seen.nan), seen.hinges};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (kShared) {
          outcome_[i] = outcome[i];
        } else {
          p_.workspace.outcome[slot() * kOutcome + i] = outcome[i];
        }
      }
    }
    simt::barrier();
  }

  // Unit of the weights, scale of the gradient (both as they are multiplied), whether a score is NaN, how many hinges
  // of negatives are not 0, and their sum.
  enum { kUnit, kScale, kNan, kHinges, kHingeSum };
  ROADMAP_DEVICE double outcome(int i) const {
    return kShared ? static_cast<double>(outcome_[i]) : p_.workspace.outcome[slot() * kOutcome + i];
  }

  struct Seen {
    bool nan = false;
    double hinges = 0, hinge_sum = 0;
  };
  // What the first passes over all spans have seen.
  ROADMAP_DEVICE Seen look_back() const {
    Seen seen;
    if (p_.op == Op::kRankGradient) return seen;
    if (kShared) {
      seen.nan = outcome_[kNan] != 0;
      seen.hinges = outcome_[kHinges];
      seen.hinge_sum = outcome_[kHingeSum];
      return seen;
    }
    const int count = ranks() && pieces() ? pieces() : 1;
    int spans = blocks() / count > 1 ? blocks() / count : 1;
    if (kByBoxes) spans = blocks();
    bool nan = false;
    for (int span = lane(); span < spans; span += simt::kWarp) {
      seen.hinge_sum += p_.workspace.hinge[block_at(span)];
      seen.hinges += p_.workspace.flag[2 * block_at(span)];
      nan |= p_.workspace.flag[2 * block_at(span) + 1] != 0;
    }
    seen.hinge_sum = sum_over_warp(seen.hinge_sum);
    seen.hinges = sum_over_warp(seen.hinges);
    seen.nan = simt::warp_any(nan);
    return seen;
  }

  ROADMAP_DEVICE void save_ranks(int piece, bool is_nan) {
    if (!kShared) load(piece);
    const T nan = not_a_number();
    for (int i = simt::thread(); i < piece_size(piece); i += simt::threads()) {
      const int64_t at = entry(piece, i);
      if (at < 0) continue;
      const Ranks r = ranks_of(piece, i);
      p_.query[at] = row_;
      p_.reference[at] = column_at(i);
      p_.positive_rank[at] = is_nan ? nan : static_cast<T>(r.above);
      p_.negative_rank[at] = is_nan ? nan : static_cast<T>(r.below);
      if (p_.slope_out) p_.slope_out[at] = is_nan ? nan : static_cast<T>(r.slope);
    }
  }

  // Weights in units of the largest, so that equal ones, common where scores are tied, are exact.
  ROADMAP_DEVICE void save_weights(int piece, double unit) {
    if (!kShared && p_.op == Op::kRankGradient) load(piece);  // for its ordinals
    for (int i = simt::thread(); i < piece_size(piece); i += simt::threads()) {
      const Weight w = weight_of(piece, i);
      // A pair without slope carries nothing back, whatever arrives.
      const double own = w.slope != 0 ? -w.below * (w.slope / k_.tau) : 0.0;
      if (kShared) {
        weight_[i] = static_cast<T>(w.below / unit);
        above_[i] = w.above / unit;
        slope_[i] = own;
      } else {
        const int64_t at = place(piece_begin(piece) + i);
        p_.workspace.below[at] = w.below / unit;
        p_.workspace.above[at] = w.above / unit;
        p_.workspace.slope[at] = own;
      }
    }
  }

  ROADMAP_DEVICE void save_values(double loss, double scale, const Seen& seen) {
    if (p_.op == Op::kRankGradient) return;
    const double nan = NAN;
    double positive = 0, hinges = 0;
    if (p_.calibration) {
      const T margin = static_cast<T>(p_.positive_margin);
      for (int piece = 0; piece < pieces(); ++piece) {
        if (!kShared) load(piece);
        for (int i = simt::thread(); i < piece_size(piece); i += simt::threads()) {
          const T u = score_at(i);
          if (!(u < margin)) continue;  // decided in T, as scores are; summed in double
          positive += p_.positive_margin - static_cast<double>(u);
          hinges += 1;
        }
      }
      double all[] = {positive, hinges};
      over_block<2>(all);
      positive = all[0], hinges = all[1];
    }
    if (simt::thread() != 0) return;
    p_.workspace.count[row_] = size_;
    if (p_.op == Op::kLoss) {
      p_.loss[row_] = static_cast<T>(seen.nan ? nan : loss);
      if (p_.unscale) p_.unscale[row_] = static_cast<T>(1 / scale);
      return;
    }
    const int64_t at = 5 * row_;
    p_.value[at] = seen.nan ? nan : p_.ap ? loss : 0.0;
    if (!p_.calibration) return;
    // Negative hinges were taken from the margin as rounded to T.
    const double rounded = static_cast<double>(static_cast<T>(p_.negative_margin));
    const double negative = seen.hinge_sum + seen.hinges * (rounded - p_.negative_margin);
    p_.value[at + 1] = seen.nan ? nan : positive;
    p_.value[at + 2] = seen.nan ? nan : negative;
    p_.value[at + 3] = seen.nan ? 0.0 : hinges;
    p_.value[at + 4] = seen.nan ? 0.0 : seen.hinges;
  }

  // --- gradients ----------------------------------------------------------------------------------------------------

  // smooth: positive i also gets sum_j (w+_j - w+_i) sigma'(s_i - s_j), which is 0 for equal weights.
  ROADMAP_DEVICE void own() {
    for (int piece = block(); piece < pieces(); piece += blocks()) {
      if (!kShared) load(piece);
      const int n = piece_size(piece), begin = piece_begin(piece);
      for (int i = simt::thread(); i < n; i += simt::threads()) {
        const T u = score_[i];
        const double weight = any_above(begin + i);
        double sum = 0;
        for (int j = 0; j < size_; ++j) {
          if (j == begin + i) continue;
          const T other = any_score(j), slope = logistic_of(gap_of(other, u), k_).slope;
          if (slope != T(0) && !(other == u && !is_finite(u)))
            sum += (any_above(j) - weight) * static_cast<double>(slope);
        }
        sum *= outcome(kUnit) / k_.tau;
        if (kShared) {
          slope_[i] += sum;
        } else {
          p_.workspace.slope[place(begin + i)] += sum;
        }
      }
    }
  }
  ROADMAP_DEVICE double any_above(int j) const {
    return kShared ? static_cast<double>(above_[j]) : p_.workspace.above[place(j)];
  }

  // A piece with all that the gradient takes of it.
  ROADMAP_DEVICE void load_weighted(int piece) {
    if (!kShared) {
      load(piece);
      for (int i = simt::thread(); i < piece_size(piece); i += simt::threads()) {
        weight_[i] = static_cast<T>(p_.workspace.below[place(piece_begin(piece) + i)]);
      }
    }
    centre(piece_size(piece));
    bool limits = false;
    for (int i = simt::thread(); i < piece_size(piece); i += simt::threads()) {
      limits |= !is_finite(static_cast<T>(score_[i])) || !is_finite(static_cast<T>(weight_[i]));
    }
    limits_ = simt::barrier_or(limits);
  }

  ROADMAP_DEVICE void gradients() {
    int begin, end;
    share_columns(block(), blocks(), begin, end);
    const int tile = simt::threads() * kColumns;
    if (outcome(kNan) != 0) {
      fill_nan(begin, end);
      return;
    }
    const int count = weighs() ? pieces() : 0;
    if (count == 1) load_weighted(0);
    const double row = p_.row_scale ? static_cast<double>(p_.row_scale[row_]) : 1.0;
    const double weight = p_.op == Op::kObjective ? p_.weight[3 * row_] : p_.row_weight;
    const T by = static_cast<T>(outcome(kUnit) / k_.tau * outcome(kScale) * weight * row);
    T hinge = 0;
    if (p_.calibration && outcome(kHinges) > 0) hinge = static_cast<T>(p_.weight[3 * row_ + 2] * row);
    const int tiles = (end - begin + tile - 1) / tile;
    if (tiles == 0) return;
    // Last tiles first: they were read last and are still in the cache.
    int at = begin + (tiles - 1) * tile + simt::thread() * kColumns;
    const Row from = row_in_memory();
    Fetched next = fetch(from, at, end);
    for (int t = 0; t < tiles; ++t, at -= tile) {
      T x[kColumns], g[kColumns], scale[kColumns];
      const uint32_t bits = unpack(next, at, x, scale);
      if (t + 1 < tiles) next = fetch(from, at - tile, end);
      const T top = largest(x);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) g[j] = 0;
      for (int piece = 0; piece < count; ++piece) {
        if (count > 1) load_weighted(piece);
        add_gradient(piece_size(piece), bits, x, top, g);
      }
      if (at >= end) continue;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) g[j] = bits >> j & 1 ? g[j] * by : T(0);
      if (hinge != T(0)) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) g[j] += x[j] > p_.margin ? hinge : T(0);
      }
      if (kScales && p_.column_scale) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          if (bits >> j & 1) g[j] *= scale[j];
        }
      }
      store_columns(at, g);
    }
  }

  // A row with a NaN: so are the gradients of all that is not left out.
  ROADMAP_DEVICE void fill_nan(int begin, int end) const {
    for (int at = larger(begin, shift()) + simt::thread(); at < end; at += simt::threads()) {
      const int64_t word = word_at(at / kWord);
      if (p_.workspace.positive[word] >> (at % kWord) & 1) continue;  // which come later
      const bool negative = p_.workspace.negative[word] >> (at % kWord) & 1;
      store(row_ * p_.columns + at - shift(), negative ? not_a_number() : T(0));
    }
  }

  ROADMAP_DEVICE void add_gradient(int n, uint32_t bits, const T (&x)[kColumns], T top, T (&g)[kColumns]) const {
    constexpr int kTogether = 16;  // summed before they are added to the others: sums of a thousand would drift
    T a[kColumns];
    T before = not_a_number();  // the centre of a[]: no centre equals it yet
    for (int first = 0; first < n; first += kTogether) {
      T sum[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[j] = 0;
      const int last = first + kTogether < n ? first + kTogether : n;
      for (int i = first; i < last; ++i) {
        const T u = score_[i], w = weight_[i];
        if (limits_ && (!is_finite(u) || !is_finite(w))) {
          add_limit_gradient(u, w, bits, x, sum);
          continue;
        }
        if (!simt::warp_any(top >= u - k_.cut)) {
          if (sizeof(T) == 4) break;  // sorted: all that follow are further
          continue;
        }
        const T f = factor_[i], c = centre_[i];
        if (sizeof(T) == 8 || !(c == before)) {
#pragma unroll
          for (int j = 0; j < kColumns; ++j) a[j] = share(x[j], c, k_);
          before = c;
        }
        if (k_.smooth || !simt::warp_any(top - u > k_.delta)) {  // no pair of this warp is in the linear part
#pragma unroll
          for (int j = 0; j < kColumns; ++j) sum[j] = add_slope(a[j], f, w, sum[j], k_);
        } else {
          const T linear = w * k_.rho_tau;
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            sum[j] = x[j] - u > k_.delta ? sum[j] + linear : add_slope(a[j], f, w, sum[j], k_);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) g[j] += sum[j];
    }
  }

  // The same for an infinite score or weight: a pair without slope carries nothing.
  ROADMAP_DEVICE void add_limit_gradient(T u, T w, uint32_t bits, const T (&x)[kColumns], T (&sum)[kColumns]) const {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const T d = limit(x[j], u).slope;
      if ((bits >> j & 1) && d != T(0)) sum[j] += w * d;
    }
  }

  // Places [at, at + 8) of the gradient. Those of positives come later; as long as other blocks may read their scores,
  // they are left alone.
  ROADMAP_DEVICE void store_columns(int at, const T (&g)[kColumns]) const {
    uint32_t kept = 0;
    if (!kShared) kept = p_.workspace.positive[word_at(at / kWord)] >> (at % kWord) & kColumnBits;
    const int column = at - shift();
    const int64_t to = row_ * p_.columns + column;
    const bool whole = !kept && column >= 0 && column + kColumns <= p_.columns;
    if (p_.gradient_type == GradientType::kFull) {
      if (whole && simt::address(p_.gradient + to) % 16 == 0) {
        constexpr int kEach = 16 / sizeof(T);
#pragma unroll
        for (int v = 0; v < kColumns / kEach; ++v) {
          Vector<T> part;
#pragma unroll
          for (int j = 0; j < kEach; ++j) part.at[j] = g[v * kEach + j];
          simt::store_as(p_.gradient, to + v * kEach, part);
        }
        return;
      }
    } else if (whole && simt::address(p_.gradient_half + to) % 16 == 0) {
      Vector<uint16_t> all;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) all.at[j] = narrow(g[j]);
      simt::store_as(p_.gradient_half, to, all);
      return;
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (column + j >= 0 && column + j < p_.columns && !(kept >> j & 1)) store(to + j, g[j]);
    }
  }

  ROADMAP_DEVICE uint16_t narrow(T x) const {
    const float value = static_cast<float>(x);
    return p_.gradient_type == GradientType::kHalf ? simt::float_to_half(value) : simt::float_to_bfloat(value);
  }
  ROADMAP_DEVICE void store(int64_t at, T x) const {
    if (p_.gradient_type == GradientType::kFull) {
      p_.gradient[at] = x;
    } else {
      p_.gradient_half[at] = narrow(x);
    }
  }

  ROADMAP_DEVICE void scatter() {
    if (kShared) simt::barrier();  // others may still load these columns along with their own; else load() waits
    const bool nan = outcome(kNan) != 0;
    const double scale = outcome(kScale);
    const double row = p_.row_scale ? static_cast<double>(p_.row_scale[row_]) : 1.0;
    const double weight = p_.op == Op::kObjective ? p_.weight[3 * row_] : p_.row_weight;
    const T margin = static_cast<T>(p_.positive_margin);
    for (int piece = block(); piece < pieces(); piece += blocks()) {
      if (!kShared) load(piece);
      for (int i = simt::thread(); i < piece_size(piece); i += simt::threads()) {
        const int32_t column = column_at(i);
        const T u = score_at(i);
        double own = 0;
        if (weighs()) {
          own = kShared ? static_cast<double>(slope_[i]) : p_.workspace.slope[place(piece_begin(piece) + i)];
          own *= scale * weight;
        }
        if (p_.calibration && u < margin) own -= p_.weight[3 * row_ + 1];
        T value = static_cast<T>(own * row);
        if (p_.column_scale) value *= p_.column_scale[column];
        store(row_ * p_.columns + column, nan ? not_a_number() : value);
      }
    }
  }

  const Params& p_;
  const PairConstants<T>& k_;
  simt::SharedMemory memory_;
  const int warps_;

  // A piece of the positives, [capacity] each.
  simt::Shared<T> score_;
  simt::Shared<T> factor_;      // of the exponential, see pairs.cuh
  simt::Shared<T> centre_;      // that it was taken from
  simt::Shared<T> weight_;      // dloss/drank- in units of the largest
  simt::Shared<double> above_;  // rank+, then dloss/drank+ in units of the largest
  simt::Shared<double> below_;  // rank-
  simt::Shared<double> slope_;  // of rank-, then the positive's own gradient
  simt::Shared<int32_t> column_;
  simt::Shared<int32_t> order_;   // workspace of sort
  simt::Shared<double> sums_;     // [warps, 2 kGroup]
  simt::Shared<double> outcome_;  // [kOutcome]  of the row, for the steps that follow

  int block_ = 0;
  int64_t slot_ = 0, row_ = 0;
  int size_ = 0;  // positives of the row
  int shift_ = 0;
  bool limits_ = false;  // whether a score or a weight of the piece is not finite

  // Hinges of the negatives that this thread has seen.
  double hinge_ = 0;
  int hinges_ = 0;
};

}  // namespace roadmap::cuda
