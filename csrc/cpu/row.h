// One row of an op, in five steps: load its positives, choose a method, rank them, weigh the ranks, give every column
// its gradient. rows.cpp says what each op weighs and how rows are divided among threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "choose.h"
#include "kernels.h"
#include "parallel.h"
#include "row_input.h"
#include "rows.h"
#include "scan.h"

namespace roadmap {

// Columns whose sums belong together: long rows are split into spans, so that threads can share a row of few positives.
constexpr int64_t kSpan = 16 * kBlock;

template <typename T>
struct Row {
  int64_t index = 0;
  Positives<T> p;
  std::vector<int64_t> column;                   // [P]  ascending
  std::vector<typename Entry<T>::Index> source;  // [P]  the column of each in p
  // [P]  Where the columns of p stand in `column`, and the inverse; for who goes by columns: see place().
  std::vector<int64_t> ordinal, position;
  std::vector<typename Entry<T>::Index> lookup;                               // [columns]
  std::vector<double> rank_positive, rank_negative, slope, second, gradient;  // [P]  in the order of p
  std::vector<double> partial;                                                // [spans, 2, P]
  std::vector<HingeSum> hinges;                                               // [spans]  of the negatives
  bool nan = false;
  double scale = 1;  // on the gradient of the loss of ranks; a power of two for half types
  double positive_weight = 0, negative_weight = 0;  // of a hinge in the gradient
  int64_t negative_hinges = 0;                      // that are not 0
  Sorter<T> sorter;                                 // of its positives
  Scan* scan = nullptr;                             // holds its negatives; null: the row runs pairwise

  int64_t size() const { return p.size(); }

  // For a row with so many positives. The buffers stay from row to row and from call to call, and nothing else does.
  void reset(int64_t row, int64_t size, bool smooth) {
    index = row;
    scale = 1;
    positive_weight = negative_weight = 0;
    negative_hinges = 0;
    scan = nullptr;
    nan = sorter.nan();
    hinges.clear();
    column.clear();
    p.score.resize(size);
    p.weight.resize(size);
    p.weight_negative.resize(size + kPad);
    p.weight_positive.assign(smooth ? size + kPad : 0, T(0));
    p.groups.clear();
    source.resize(size);
    rank_positive.resize(size);
    rank_negative.resize(size);
    slope.resize(size);
    gradient.resize(size);
    if (smooth) std::fill_n(rank_positive.begin(), size, 1.0);
  }

  // Fills `ordinal` and `position`.
  void place(int64_t columns) {
    ordinal.resize(size());
    position.resize(size());
    if (size() < columns / 16) {
      const auto begin = column.begin(), end = column.end();
      for (int64_t i = 0; i < size(); ++i) {
        ordinal[i] = std::lower_bound(begin, end, static_cast<int64_t>(source[i])) - begin;
      }
    } else {
      lookup.resize(columns);
      for (int64_t k = 0; k < size(); ++k) lookup[column[k]] = static_cast<typename Entry<T>::Index>(k);
      for (int64_t i = 0; i < size(); ++i) ordinal[i] = lookup[source[i]];
    }
    for (int64_t i = 0; i < size(); ++i) position[ordinal[i]] = i;
  }

  // What kernels take of the weights p.weight, dloss/drank-, and `second`, dloss/drank+ (smooth), of which none is
  // larger than `largest`.
  void set_weights(bool smooth, double largest) {
    weigh_groups();
    const double unit = largest > 0 && std::isfinite(largest) ? largest : 1;
    p.unit = unit;
    const double *const first = p.weight.data(), *const other = second.data();
    T *const scaled = p.weight_negative.data(), *const scaled_other = p.weight_positive.data();
    const int64_t n = size();
    for (int64_t i = 0; i < n; ++i) scaled[i] = static_cast<T>(first[i] / unit);
    for (int64_t i = 0; smooth && i < n; ++i) scaled_other[i] = static_cast<T>(other[i] / unit);
  }

  void weigh_groups() {
    for (Group<T>& g : p.groups) {
      KahanSum sum;
      for (int64_t i = g.begin; i < g.end; ++i) sum.add(p.weight[i]);
      g.weight = sum.sum;
    }
  }
};

// What is asked of the rows of a matrix.
template <typename T>
struct Pass {
  const RowInput<T> input;
  const Kernels<T>& kernels;
  const Sorting<T>& sorting;
  const Settings<T> settings;
  const Method method;
  const bool smooth;
  const Objective& objective;
  const bool ranks;      // whether they are computed
  const bool slope;      // whether their slopes are
  void* const gradient;  // [rows, columns]  null: not wanted
  T* const unscale;      // [rows]  half types: see ApOutput

  Pass(const Matrix& m, const SurrogateSettings& s, const Objective& objective, bool ranks, bool slope, void* gradient,
       T* unscale = nullptr)
      : input(m, instruction_set()),
        kernels(instruction_set().kernels<T>()),
        sorting(instruction_set().sorting<T>()),
        settings(static_cast<Surrogate>(s.surrogate), s.tau, s.rho, s.delta, s.start, s.offset, m.columns),
        method(s.method),
        smooth(settings.surrogate == Surrogate::kSmooth),
        objective(objective),
        ranks(ranks),
        slope(slope),
        gradient(gradient),
        unscale(unscale) {}
};

// Kept by each thread from call to call, 0.6 MiB, or 1.1 in double.
template <typename T>
Scratch<T>& scratch() {
  static thread_local const std::unique_ptr<Scratch<T>> own(new Scratch<T>);
  return *own;
}

// [columns] of a row whose positives are of several levels, and what graded.h makes of them.
template <typename T>
struct Levels {
  std::vector<uint8_t> level;           // of each column: 0 for a negative, kLeftOut
  std::vector<uint8_t> target, ignore;  // the same for one level
  std::vector<int64_t> positive;        // [P]  columns
  std::vector<std::vector<T>> score;    // [levels + 1]  of the positives of each, ascending
  std::vector<double> worth, rank;      // [P]  of the positives in hand
  std::vector<T> wide, part, sum;       // scores widened; gradients
  std::vector<double> further;          // gradient beside that by ranks
};

// What a thread needs for its rows.
template <typename T>
struct Workspace {
  Row<T> row;
  Levels<T> levels;
  Scan scan;
  std::vector<typename RowInput<T>::Found> found;  // of each span
  std::vector<int64_t> pieces;                     // see split_groups()
  std::vector<char> nan;                           // of each span and piece: whether it has met one

  size_t bytes() const { return scan.bytes() + 90 * row.p.score.capacity() + 64 * levels.level.capacity(); }
};

// The steps. Threads may share each; every sum is taken over fixed spans of columns in fixed order, so that bits do not
// depend on how many do.
template <typename T>
class RowSteps {
 public:
  RowSteps(const Pass<T>& pass, const Parallel& parallel, Workspace<T>& space)
      : pass_(pass),
        parallel_(parallel),
        columns_(pass.input.columns()),
        space_(space),
        row_(space.row),
        pieces_(space.pieces) {}

  // weigh(row) sees ranks and hinges and sets the weights.
  template <typename Weigh>
  void run(int64_t index, const Weigh& weigh) {
    load(index);
    choose();
    rank();
    weigh(row_);
    if (pass_.gradient) gradient();
  }

 private:
  // float64 is there for what float32 cannot show, gradient checks above all: it meets every pair.
  static constexpr bool kScans = sizeof(T) == sizeof(float);

  // ---- load ----

  void load(int64_t index) {
    const int64_t spans = parallel_.workers > 1 ? divide_up(columns_, kSpan) : 1;
    space_.found.resize(spans);
    parallel_.run(spans, [&](int64_t span, int) {
      const int64_t end = span + 1 == spans ? columns_ : (span + 1) * kSpan;
      pass_.input.positives(index, span * kSpan, end, pass_.settings, scratch<T>(), space_.found[span]);
    });
    row_.reset(index, row_.sorter.gather(space_.found, parallel_), pass_.smooth);
  }

  // ---- choose ----

  bool reads() const { return pass_.ranks || pass_.objective.calibration; }

  void choose() {
    if constexpr (kScans) {
      if (scans() && prune()) {
        order();
        row_.scan = &space_.scan;
        row_.scan->begin(row_.p.score, pass_.settings, parallel_);
        return;
      }
    }
    order();
    group();
  }

  // Whether the scan takes the row, as far as its positives can tell.
  bool scans() const {
    if (row_.nan || !pass_.objective.ranks || !row_.size() || pass_.method == Method::kPairwise) return false;
    if (!(reads() || pass_.gradient) || !row_.sorter.finite()) return false;
    if (columns_ > std::numeric_limits<int32_t>::max()) return false;
    return pass_.method == Method::kSorted ||
           scan_pays(pass_.input, row_.index, row_.sorter, row_.size(), pass_.settings);
  }

  // Collects the negatives that reach a positive, and the hinges of all. Returns whether the scan can take them.
  bool prune() {
    Sorter<T>& negatives = space_.scan.negatives();
    const int64_t spans = divide_up(columns_, kSpan);
    negatives.begin(columns_, spans);
    row_.hinges.assign(pass_.objective.calibration ? spans : 0, {});
    parallel_.run(spans, [&](int64_t span, int) {
      Scratch<T>& own = scratch<T>();
      typename Sorter<T>::Part& part = negatives.part(span);
      part.begin = span * kSpan;
      Entry<T>* const out = negatives.room(part.begin);
      for_blocks(part.begin, std::min(columns_, part.begin + kSpan), own, [&](const Block<T>& block, int64_t at) {
        part.count += pass_.sorting.prune_entries(block, row_.sorter.low(), at, pass_.settings, own, out + part.count,
                                                  part.low, part.high, part.nan);
        add_hinges(block, span, 0);
      });
    });
    row_.nan = negatives.nan();
    return !row_.nan && negatives.finite();
  }

  // Sorts the positives.
  void order() {
    const int64_t size = row_.size();
    const Entry<T>* const entry = row_.sorter.room(0);
    row_.column.resize(size);
    for (int64_t k = 0; k < size; ++k) row_.column[k] = static_cast<int64_t>(entry[k].index);
    T* const score = row_.p.score.data();
    // A NaN has no place in an order; such a row is not computed at all.
    if (row_.nan || !pass_.objective.ranks) {
      for (int64_t i = 0; i < size; ++i) {
        score[i] = entry[i].value;
        row_.source[i] = entry[i].index;
      }
      return;
    }
    row_.sorter.sort(pass_.sorting, parallel_, score, row_.source.data());
    if (pass_.smooth) return;
    double* const rank = row_.rank_positive.data();  // positives at least as high, ties included
    for (int64_t i = 0, tied = 0; i < size; ++i) {
      tied = i > 0 && score[i] == score[i - 1] ? tied : i;
      rank[i] = static_cast<double>(size - tied);
    }
  }

  // Groups neighbours of the ascending positives, for the pairwise kernels.
  void group() {
    constexpr int64_t kMost = 64;  // positives of a group, which have to share its classes
    constexpr int64_t kFew = 8;    // rows with up to so many positives have groups twice as wide
    if (row_.nan || !pass_.objective.ranks) return;
    Positives<T>& p = row_.p;
    const int64_t size = row_.size();
    p.exponential.resize(size);
    // Few positives share their exponentials over all the range there is; with many, pairs count for more, and a narrow
    // group skips more of them.
    const T span = size <= kFew ? pass_.settings.group_span : pass_.settings.group_span / 2;
    for (int64_t i = 0; i < size;) {
      const T first = p.score[i];
      int64_t end = i + 1;
      while (end < size && end - i < kMost && (p.score[end] == first || p.score[end] - first <= span)) ++end;
      const T last = p.score[end - 1];
      p.groups.push_back({i, end, first / 2 + last / 2, std::isfinite(first) && std::isfinite(last)});
      i = end;
    }
    pass_.kernels.exponentials(p, pass_.settings);
  }

  // ---- rank ----

  void rank() {
    if constexpr (kScans) {
      if (row_.scan) return rank_by_scan();
    }
    rank_pairwise();
  }

  void rank_by_scan() {
    if (!pass_.ranks) return;
    row_.scan->rank(pass_.settings, parallel_, row_.rank_negative.data(), pass_.slope ? row_.slope.data() : nullptr);
    if (pass_.smooth) row_.scan->rank_positives(pass_.settings, parallel_, row_.rank_positive.data());
  }

  // By spans of columns and pieces of positives. Also looks for NaN where there is no positive.
  void rank_pairwise() {
    split_groups();
    const int64_t count = static_cast<int64_t>(pieces_.size()) - 1, size = row_.size();
    SavedSlopes<T>& saved = scratch<T>().saved;
    saved.clear();
    // One thread that meets each block once, with all positives, need not compute a slope twice.
    saves_ = pass_.gradient && pieces_.back() > 0 && count == 1 && parallel_.workers == 1;
    if (!reads() || row_.nan) return;
    const int64_t spans =
        std::max<int64_t>(1, std::min(divide_up(columns_, kSpan), kPartialSums / std::max<int64_t>(1, size)));
    std::fill(row_.rank_negative.begin(), row_.rank_negative.end(), 0.0);
    std::fill(row_.slope.begin(), row_.slope.end(), 0.0);
    row_.partial.assign(spans > 1 ? spans * 2 * size : 0, 0.0);
    row_.hinges.assign(pass_.objective.calibration ? spans : 0, {});
    std::vector<char>& nan = space_.nan;
    nan.assign(spans * count, 0);
    parallel_.run(spans * count, [&](int64_t task, int) { nan[task] = rank_span(task / count, spans, task % count); });
    row_.nan = std::any_of(nan.begin(), nan.end(), [](char c) { return c != 0; });
    for (int64_t span = 0; spans > 1 && span < spans; ++span) {
      const double* const rank = row_.partial.data() + span * 2 * size;
      for (int64_t i = 0; i < size; ++i) {
        row_.rank_negative[i] += rank[i];
        row_.slope[i] += rank[i + size];
      }
    }
    if (!pass_.smooth) return;
    parallel_.run(count, [&](int64_t piece, int) {
      pass_.kernels.rank_positives(row_.p, pieces_[piece], pieces_[piece + 1], pass_.settings, scratch<T>(),
                                   row_.rank_positive.data());
    });
  }

  // Boundaries of pieces of groups, about kPiece positives each: enough to make reading a row cheap. A piece sees the
  // columns packed in its own way, on which the last bits of float64 sums depend, so that no thread count may move them.
  void split_groups() {
    constexpr int64_t kPiece = 512;
    const std::vector<Group<T>>& groups = row_.p.groups;
    pieces_.assign(1, 0);
    for (size_t g = 0; pass_.ranks && g < groups.size(); ++g) {
      if (g + 1 == groups.size() || groups[g].end - groups[pieces_.back()].begin >= kPiece) {
        pieces_.push_back(static_cast<int64_t>(g) + 1);
      }
    }
    if (pieces_.size() == 1) pieces_.push_back(0);  // still looks for NaN
  }

  // Ranks of a piece's positives among the negatives of a span. Returns whether one is NaN.
  bool rank_span(int64_t span, int64_t spans, int64_t piece) {
    const int64_t first = pieces_[piece], last = pieces_[piece + 1], size = row_.size();
    double* const rank = spans > 1 ? row_.partial.data() + span * 2 * size : row_.rank_negative.data();
    double* const slope = spans > 1 ? rank + size : row_.slope.data();
    const Sums<T> sums = {rank, pass_.slope ? slope : nullptr};
    Scratch<T>& own = scratch<T>();
    bool nan = false;
    for_blocks(span_begin(span, spans), span_begin(span + 1, spans), own, [&](const Block<T>& block, int64_t) {
      nan |= first < last ? pass_.kernels.rank_block(block, row_.p, first, last, pass_.settings, own, sums,
                                                     saves_ ? &own.saved : nullptr)
                          : pass_.kernels.any_nan(block, pass_.settings, own);
      add_hinges(block, span, piece);
    });
    return nan;
  }

  // Whole blocks, as even as can be; a function of the matrix and the row alone.
  int64_t span_begin(int64_t span, int64_t spans) const {
    return std::min(columns_, divide_up(columns_, kBlock) * span / spans * kBlock);
  }

  // The first piece of a row's positives has the hinges with it.
  void add_hinges(const Block<T>& block, int64_t span, int64_t piece) {
    const T margin = static_cast<T>(pass_.objective.negative_margin);
    if (pass_.objective.calibration && piece == 0 && block.top > margin) {
      pass_.kernels.hinge_block(block, margin, row_.hinges[span]);
    }
  }

  template <typename Body>
  void for_blocks(int64_t begin, int64_t end, Scratch<T>& own, const Body& body) const {
    for (int64_t at = begin; at < end; at += kBlock) {
      body(pass_.input.load(row_.index, at, std::min<int64_t>(kBlock, end - at), own), at);
    }
  }

  // ---- gradient ----

  // Whether nothing is to be narrowed or scaled by column.
  bool whole() const { return pass_.input.wide() && !pass_.input.column_scale(0); }

  void gradient() {
    T* direct = nullptr;
    if constexpr (kScans) {
      if (row_.scan) direct = scan_gradient();
    }
    if (!row_.nan) {
      parallel_.run(divide_up(row_.size(), kBlock), [&](int64_t piece, int) {
        positive_gradients(piece * kBlock, std::min(row_.size(), (piece + 1) * kBlock), direct);
      });
    }
    if (direct) return;
    if (pass_.unscale) {
      const double share = row_.scale;
      row_.scale = row_.nan ? 1 : half_scale();
      pass_.unscale[row_.index] = static_cast<T>(share / row_.scale);
    }
    row_.place(columns_);
    parallel_.run(divide_up(columns_, kBlock), [&](int64_t block, int) { block_gradient(block * kBlock); });
  }

  // Of the negatives of a scanned row. Returns the row's place in the gradient if it is written there at once: nothing
  // else is to be added to it, narrowed or scaled by column.
  T* scan_gradient() {
    Positives<T>& p = row_.p;
    if (!all_finite(p.weight) || !all_finite(p.weight_positive)) {
      row_.scan = nullptr;  // sums would carry them to all
      group();
      row_.weigh_groups();
      return nullptr;
    }
    T* const direct =
        whole() && !row_.negative_hinges ? static_cast<T*>(pass_.gradient) + row_.index * columns_ : nullptr;
    const double by = direct ? row_.scale * pass_.input.row_scale(row_.index) : 1.0, unit = p.unit / pass_.settings.tau;
    row_.scan->read_gradient(p.weight_negative, columns_, by * unit, pass_.settings, parallel_, direct);
    if (pass_.smooth) {
      row_.scan->gradient_positives(p.weight_positive, unit, pass_.settings, parallel_, row_.gradient.data());
    }
    return direct;
  }

  template <typename V>
  static bool all_finite(const std::vector<V>& values) {
    unsigned other = 0;  // looked at to the end: in vectors
    for (const V value : values) other |= std::fabs(value) <= std::numeric_limits<V>::max() ? 0 : 1;
    return !other;
  }

  // Gradients of the positives in [begin, end) from the weights; whatever kernels have no part in. They stay in `row`,
  // or go where they belong if the row is written at once.
  void positive_gradients(int64_t begin, int64_t end, T* direct) {
    const double by = pass_.input.row_scale(row_.index);
    if (direct && !pass_.smooth) {  // then no one else asks for them
      constexpr int64_t kMany = 512;
      T own[kMany];
      for (; begin < end; begin += kMany) {
        const int64_t count = std::min(end - begin, kMany);
        const double *const weight = row_.p.weight.data() + begin, *const slope = row_.slope.data() + begin;
        for (int64_t k = 0; k < count; ++k) own[k] = own_gradient(begin + k, 0 - weight[k] * slope[k], by);
        for (int64_t k = 0; k < count; ++k) direct[row_.source[begin + k]] = own[k];
      }
      return;
    }
    double* const gradient = row_.gradient.data();
    const bool ranks = pass_.objective.ranks;
    if (!pass_.smooth || !ranks) {
      std::fill(gradient + begin, gradient + end, 0.0);
    } else if (!row_.scan) {  // a scan has left them here
      pass_.kernels.gradient_positives(row_.p, begin, end, pass_.settings, scratch<T>(), gradient + begin);
    }
    for (int64_t i = begin; i < end; ++i) {
      // A pair without slope carries nothing back, whatever arrives.
      if (ranks && row_.slope[i] != 0) gradient[i] -= row_.p.weight[i] * row_.slope[i];
    }
    for (int64_t i = begin; direct && i < end; ++i) direct[row_.source[i]] = own_gradient(i, gradient[i], by);
  }

  // Of positive i by its own score: `gradient` is that of the loss of ranks; hinge and all.
  T own_gradient(int64_t i, double gradient, double by) const {
    const Objective& objective = pass_.objective;
    const bool below = objective.calibration && row_.p.score[i] < static_cast<T>(objective.positive_margin);
    return static_cast<T>((gradient * row_.scale - (below ? row_.positive_weight : 0.0)) * by);
  }

  // The gradient of one block of columns, in the type of the scores.
  void block_gradient(int64_t begin) const {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, columns_ - begin));
    Scratch<T>& own = scratch<T>();
    SavedSlopes<T>* const saved = saves_ && own.saved.whole ? &own.saved : nullptr;
    // Saved slopes need no scores, nor do hinges that are all 0.
    const bool hinges = row_.negative_hinges > 0;
    const Block<T> block = (saved || row_.scan) && !hinges && !row_.nan
                               ? Block<T>{nullptr, nullptr, count}
                               : pass_.input.load(row_.index, begin, count, own);
    T* const out = pass_.input.out(row_.index, begin, pass_.gradient, own);
    if (row_.nan) {
      for (int j = 0; j < count; ++j) {
        out[j] = own.masks.ignored[j / 64] >> (j % 64) & 1 ? T(0) : std::numeric_limits<T>::quiet_NaN();
      }
    } else {
      static const Positives<T> none;
      const Objective& objective = pass_.objective;
      const double by = pass_.input.row_scale(row_.index);
      const Hinge<T> hinge = {static_cast<T>(objective.negative_margin), static_cast<T>(row_.negative_weight * by)};
      const Hinge<T>* const hinged = hinges ? &hinge : nullptr;
      const T* const column_scale = pass_.input.column_scale(begin);
      if (row_.scan) {
        if constexpr (kScans) {
          pass_.sorting.spread_block(block, row_.scan->gradient() + begin, row_.scale * by, hinged, column_scale, own,
                                     out);
        }
      } else {
        pass_.kernels.gradient_block(block, objective.ranks ? row_.p : none, pass_.settings, row_.scale * by, hinged,
                                     column_scale, own, out, saved);
      }
      auto k = std::lower_bound(row_.column.begin(), row_.column.end(), begin) - row_.column.begin();
      for (; k < row_.size() && row_.column[k] < begin + count; ++k) {
        const int64_t i = row_.position[k], j = row_.column[k] - begin;
        out[j] = own_gradient(i, row_.gradient[i], by) * (column_scale ? column_scale[j] : T(1));
      }
    }
    pass_.input.narrow(out, row_.index, begin, count, pass_.gradient);
  }

  // A power of two that brings the largest possible gradient of the row near the top of float16: what GradScaler's
  // factor would have saved is then still there when it arrives.
  double half_scale() const {
    double sum = 0, largest = 0;
    for (int64_t i = 0; i < row_.size(); ++i) {
      sum += std::fabs(row_.p.weight[i]);
      largest = std::max(largest, std::fabs(row_.gradient[i]));
    }
    const Settings<T>& s = pass_.settings;
    const double slope = std::max(pass_.smooth ? 0 : s.exact_rho, 0.25 / s.tau);
    const double bound = std::max(largest, sum * slope);
    if (!(bound > 0) || !std::isfinite(bound)) return 1;
    return std::ldexp(1.0, std::max(-100, std::min(100, 14 - std::ilogb(bound))));
  }

  // Bound on spans x positives, which is the workspace of a shared row.
  static constexpr int64_t kPartialSums = 1 << 18;

  const Pass<T>& pass_;
  const Parallel& parallel_;
  const int64_t columns_;
  Workspace<T>& space_;
  Row<T>& row_;
  std::vector<int64_t>& pieces_;
  bool saves_ = false;
};

}  // namespace roadmap
