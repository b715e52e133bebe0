// Steps of a row and their schedule: see rows.h. The work on the pairs themselves is in pairwise_body.h.
#include "rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "half.h"
#include "kernels.h"
#include "relation.h"
#include "scan.h"

namespace roadmap {
namespace {

// Columns whose sums belong together: long rows are split into spans, so that threads can share a row of few positives.
constexpr int64_t kSpan = 16 * kBlock;
// Bound on spans x positives, which is the workspace of a shared row.
constexpr int64_t kPartialSums = 1 << 18;
// Positives that one task of a shared row takes: enough to make reading the row cheap.
constexpr int64_t kPiece = 512;
// Bound on the positives of a group, which have to share its classes.
constexpr int64_t kGroup = 64;
// Blocks with a positive among so many columns, or more, are searched in vectors.
constexpr int64_t kSparseBlock = 32;
// Rows with up to so many positives have groups twice as wide.
constexpr int64_t kSparse = 8;

size_t size_of(ScoreType type) { return type == ScoreType::kDouble ? 8 : type == ScoreType::kFloat ? 4 : 2; }

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
  double scale = 1;                                 // on the gradient of the AP loss; a power of two for half types
  double positive_weight = 0, negative_weight = 0;  // of a hinge in the gradient
  int64_t negative_hinges = 0;                      // that are not 0
  Sorter<T> sorter;                                 // of its positives
  Scan* scan = nullptr;                             // holds its negatives; null: the row runs pairwise

  int64_t size() const { return p.size(); }
  int64_t spans(int64_t columns) const {
    return std::max<int64_t>(1, std::min(divide_up(columns, kSpan), kPartialSums / std::max<int64_t>(1, size())));
  }
};

constexpr Objective kApAlone = {true, false, 0, 0};

// One pass over a matrix: the steps of a row, each on a part that one thread can do alone.
template <typename T>
class Pass {
 public:
  // ranks: whether they are computed. slope: whether their slopes are.
  Pass(const Matrix& m, const SurrogateSettings& s, bool ranks, bool slope, const Objective& objective = kApAlone)
      : m_(m),
        objective_(objective),
        set_(instruction_set()),
        kernels_(set_.kernels<T>()),
        sorting_(set_.sorting<T>()),
        method_(s.method),
        settings_(static_cast<Surrogate>(s.surrogate), s.tau, s.rho, s.delta, s.start, s.offset, m.columns),
        masks_(m.relation, set_.conversions),
        smooth_(settings_.surrogate == Surrogate::kSmooth),
        ranks_(ranks),
        slope_(slope) {}

  const Matrix& matrix() const { return m_; }
  bool smooth() const { return smooth_; }
  bool ranks() const { return ranks_; }
  const Objective& objective() const { return objective_; }
  const Settings<T>& settings() const { return settings_; }
  const Kernels<T>& kernels() const { return kernels_; }
  const Sorting<T>& sorting() const { return sorting_; }

  // Positives of a span of columns.
  struct Found {
    std::vector<Entry<T>> entry;  // [at least part.count]  score and column, these ascending
    typename Sorter<T>::Part part;
  };

  // Finds those of columns [begin, end).
  void collect(int64_t row, int64_t begin, int64_t end, Scratch<T>& scratch, Found& found) const {
    // A score as it lies needs none of the questions of score(), asked once for each positive.
    const bool plain = (m_.type == ScoreType::kFloat || m_.type == ScoreType::kDouble) && !m_.row_scale;
    const T* const scores = plain ? static_cast<const T*>(m_.scores) + row * m_.score_stride : nullptr;
    auto part = found.part = {};
    for (int64_t at = begin; at < end; at += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, end - at));
      masks_.fill(row, at, count, scratch.masks);
      const int words = static_cast<int>(divide_up(count, 64));
      int64_t k = part.count;
      for (int w = 0; w < words; ++w) part.count += __builtin_popcountll(scratch.masks.positive[w]);
      if (found.entry.size() < static_cast<size_t>(part.count)) found.entry.resize(std::max(2 * k, part.count));
      Entry<T>* const entry = found.entry.data();
      if (plain && (part.count - k) * kSparseBlock > count) {
        sorting_.prune_entries({scores + at, scratch.masks.positive, count}, -std::numeric_limits<T>::infinity(), at,
                               settings_, scratch, entry + k, part.low, part.high, part.nan);
        continue;
      }
      for (int w = 0; w < words; ++w) {
        for (uint64_t bits = scratch.masks.positive[w]; bits; bits &= bits - 1, ++k) {
          const int64_t column = at + 64 * w + __builtin_ctzll(bits);
          const T value = plain ? scores[column] : score(row, column);
          entry[k] = {value, static_cast<typename Entry<T>::Index>(column)};
          part.nan |= value != value;
          part.low = value < part.low ? value : part.low;
          part.high = value > part.high ? value : part.high;
        }
      }
    }
    found.part = part;
  }

  // Takes what collect() found in the spans of a row. Its positives have no order yet: order() gives it.
  void arrange(int64_t index, std::vector<Found>& spans, Row<T>& row, const Parallel& parallel) const {
    const int64_t size = row.sorter.gather(spans, parallel);
    // The buffers stay from row to row and from call to call, and nothing else does.
    row.index = index;
    row.scale = 1;
    row.positive_weight = row.negative_weight = 0;
    row.negative_hinges = 0;
    row.scan = nullptr;
    row.nan = row.sorter.nan();
    row.hinges.clear();
    row.column.clear();
    Positives<T>& p = row.p;
    p.score.resize(size);
    p.weight.resize(size);
    p.weight_negative.resize(size + kPad);
    p.weight_positive.assign(smooth_ ? size + kPad : 0, T(0));
    p.groups.clear();
    row.source.resize(size);
    row.rank_positive.resize(size);
    row.rank_negative.resize(size);
    row.slope.resize(size);
    row.gradient.resize(size);
    if (smooth_) std::fill_n(row.rank_positive.begin(), size, 1.0);
  }

  // Fills `column` and sorts them.
  void order(Row<T>& row, const Parallel& parallel) const {
    const int64_t size = row.size();
    const Entry<T>* const entry = row.sorter.room(0);
    row.column.resize(size);
    for (int64_t k = 0; k < size; ++k) row.column[k] = static_cast<int64_t>(entry[k].index);
    T* const score = row.p.score.data();
    // A NaN has no place in an order; such a row is not computed at all.
    if (row.nan || !objective_.ap) {
      for (int64_t i = 0; i < size; ++i) {
        score[i] = entry[i].value;
        row.source[i] = entry[i].index;
      }
      return;
    }
    row.sorter.sort(sorting_, parallel, score, row.source.data());
    if (smooth_) return;
    double* const rank = row.rank_positive.data();  // positives at least as high, ties included
    for (int64_t i = 0, tied = 0; i < size; ++i) {
      tied = i > 0 && score[i] == score[i - 1] ? tied : i;
      rank[i] = static_cast<double>(size - tied);
    }
  }

  // Fills `ordinal` and `position`.
  void place(Row<T>& row) const {
    const int64_t size = row.size();
    row.ordinal.resize(size);
    row.position.resize(size);
    if (size < m_.columns / 16) {
      const auto begin = row.column.begin(), end = row.column.end();
      for (int64_t i = 0; i < size; ++i) {
        row.ordinal[i] = std::lower_bound(begin, end, static_cast<int64_t>(row.source[i])) - begin;
      }
    } else {
      row.lookup.resize(m_.columns);
      for (int64_t k = 0; k < size; ++k) row.lookup[row.column[k]] = static_cast<typename Entry<T>::Index>(k);
      for (int64_t i = 0; i < size; ++i) row.ordinal[i] = row.lookup[row.source[i]];
    }
    for (int64_t i = 0; i < size; ++i) row.position[row.ordinal[i]] = i;
  }

  // Groups neighbours of the ascending positives, for the pairwise kernels.
  void group(Row<T>& row) const {
    if (row.nan || !objective_.ap) return;
    Positives<T>& p = row.p;
    const int64_t size = row.size();
    p.exponential.resize(size);
    // Few positives share their exponentials over all the range there is; with many, pairs count for more, and a narrow
    // group skips more of them.
    const T span = size <= kSparse ? settings_.group_span : settings_.group_span / 2;
    for (int64_t i = 0; i < size;) {
      const T first = p.score[i];
      int64_t end = i + 1;
      while (end < size && end - i < kGroup && (p.score[end] == first || p.score[end] - first <= span)) ++end;
      const T last = p.score[end - 1];
      p.groups.push_back({i, end, first / 2 + last / 2, std::isfinite(first) && std::isfinite(last)});
      i = end;
    }
    kernels_.exponentials(p, settings_);
  }

  // Whether the sorted scan takes a row, as far as its positives can tell. float64 is there for gradient checks: the
  // series would need twice the terms.
  bool scans(const Row<T>& row) const {
    if (sizeof(T) != sizeof(float)) return false;
    if (row.nan || !objective_.ap || !row.size() || method_ == Method::kPairwise) return false;
    if (!row.sorter.finite()) return false;
    if (m_.columns > std::numeric_limits<int32_t>::max()) return false;
    return method_ == Method::kSorted || pays(row);
  }

  // Whether the sorted scan is the faster way: its nanoseconds against those of the pairwise kernels, as measured for
  // each negative in reach, each positive, each pair of both and each pair up to the threshold, which takes an
  // exponential (benchmarks/sorted_scan.py shows how well that chooses). A few columns say how many pairs there are.
  bool pays(const Row<T>& row) const {
    constexpr int64_t kFewest = 32;  // below, pairwise is as fast whatever the scores
    constexpr int64_t kSeen = 128;   // positives; more are alike
    const int64_t size = row.size();
    if (size < kFewest) return false;
    const T low = row.sorter.low(), high = row.sorter.high();
    T u[kSeen];
    const int64_t seen = std::min(size, kSeen);
    for (int64_t k = 0; k < seen; ++k) u[k] = row.sorter.room(0)[(2 * k + 1) * size / (2 * seen)].value;
    const int64_t samples = std::min<int64_t>(64, std::max<int64_t>(8, m_.columns / 64));
    const T above = smooth_ ? settings_.cut : settings_.delta;
    int64_t kept = 0, curve = 0;
    T top = high;  // of what is seen
    for (int64_t k = 0; k < samples; ++k) {
      const int64_t column = (2 * k + 1) * m_.columns / (2 * samples);
      const T v = score(row.index, column);
      if (!(v - low >= -settings_.cut) || is_positive(row, column)) continue;
      ++kept;
      top = std::max(top, v);
      const T from = v - above, to = v + settings_.cut;
      int within = 0;
      for (int64_t i = 0; i < seen; ++i) within += (u[i] >= from) & (u[i] <= to);
      curve += within;
    }
    const double of_all = static_cast<double>(m_.columns) / static_cast<double>(samples);
    const double positives = static_cast<double>(size), of_seen = positives / static_cast<double>(seen);
    const double negatives = (static_cast<double>(kept) + 0.5) * of_all;  // none seen: there may be some
    const double range = static_cast<double>(top) - static_cast<double>(low);
    const double boxes = std::min(range / (Boxes::kWidth * settings_.tau), negatives + positives);
    double scan = 2500 + 110 * boxes + 9 * negatives + 20 * positives;
    double pairwise = 0.3 * static_cast<double>(curve) * of_seen * of_all + 0.12 * negatives * positives;
    if (smooth_) {  // which compares positives with positives, too
      scan += 220 * boxes + 20 * positives;
      pairwise += 0.3 * positives * positives;
    }
    return scan < pairwise;
  }

  // The negatives of columns [begin, end) that reach a positive, and the hinges of all.
  void prune(const Row<T>& row, int64_t begin, int64_t end, Scratch<T>& scratch, typename Sorter<T>::Part& part,
             Entry<T>* out, HingeSum* hinges) const {
    part.begin = begin;
    for (int64_t at = begin; at < end; at += kBlock) {
      const Block<T> block = load(row.index, at, std::min<int64_t>(kBlock, end - at), scratch);
      part.count += sorting_.prune_entries(block, row.sorter.low(), at, settings_, scratch, out + part.count, part.low,
                                           part.high, part.nan);
      if (hinges && block.top > static_cast<T>(objective_.negative_margin))
        kernels_.hinge_block(block, static_cast<T>(objective_.negative_margin), *hinges);
    }
  }

  // Ranks of the positives in groups [first, last) among the negatives of one span of columns, and the hinges of these,
  // if `hinges` is not null. Returns whether one is NaN.
  bool rank(const Row<T>& row, int64_t begin, int64_t end, int64_t first, int64_t last, Scratch<T>& scratch,
            Sums<T> sums, HingeSum* hinges, SavedSlopes<T>* saved) const {
    bool nan = false;
    for (int64_t at = begin; at < end; at += kBlock) {
      const Block<T> block = load(row.index, at, std::min<int64_t>(kBlock, end - at), scratch);
      nan |= first < last ? kernels_.rank_block(block, row.p, first, last, settings_, scratch, sums, saved)
                          : kernels_.any_nan(block, settings_, scratch);
      if (hinges && block.top > static_cast<T>(objective_.negative_margin))
        kernels_.hinge_block(block, static_cast<T>(objective_.negative_margin), *hinges);
    }
    return nan;
  }

  bool is_positive(const Row<T>& row, int64_t column) const {
    const Entry<T>* const begin = row.sorter.room(0);
    const Entry<T>* const end = begin + row.size();
    const auto index = static_cast<typename Entry<T>::Index>(column);
    const Entry<T>* const at =
        std::lower_bound(begin, end, index, [](const Entry<T>& e, auto of) { return e.index < of; });
    return at != end && at->index == index;
  }

  void rank_positives(Row<T>& row, int64_t first, int64_t last, Scratch<T>& scratch) const {
    kernels_.rank_positives(row.p, first, last, settings_, scratch, row.rank_positive.data());
  }

  // Gradients of the positives in [begin, end) from the weights; whatever kernels have no part in. They stay in `row`,
  // or go where they belong if the row is written at once: `direct` is that of direct(), or null.
  void gradient_positives(Row<T>& row, int64_t begin, int64_t end, Scratch<T>& scratch, T* direct) const {
    const double by = row_scale(row.index);
    if (direct && !smooth_) {  // then no one else asks for them
      constexpr int64_t kMany = 512;
      T own[kMany];
      for (; begin < end; begin += kMany) {
        const int64_t count = std::min(end - begin, kMany);
        const double *const weight = row.p.weight.data() + begin, *const slope = row.slope.data() + begin;
        for (int64_t k = 0; k < count; ++k) own[k] = own_gradient(row, begin + k, 0 - weight[k] * slope[k], by);
        for (int64_t k = 0; k < count; ++k) direct[row.source[begin + k]] = own[k];
      }
      return;
    }
    double* const gradient = row.gradient.data();
    if (row.scan && smooth_) {
      // The scan has them.
    } else if (smooth_ && objective_.ap) {
      kernels_.gradient_positives(row.p, begin, end, settings_, scratch, gradient + begin);
    } else {
      std::fill(gradient + begin, gradient + end, 0.0);
    }
    for (int64_t i = begin; i < end; ++i) {
      // A pair without slope carries nothing back, whatever arrives.
      if (objective_.ap && row.slope[i] != 0) gradient[i] -= row.p.weight[i] * row.slope[i];
    }
    for (int64_t i = begin; direct && i < end; ++i) direct[row.source[i]] = own_gradient(row, i, gradient[i], by);
  }

  // The gradient of one block of columns, in the type of the scores.
  void gradient(const Row<T>& row, int64_t begin, Scratch<T>& scratch, SavedSlopes<T>* saved, void* gradient) const {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, m_.columns - begin));
    // Saved slopes need no scores, nor do hinges that are all 0.
    const bool hinges = row.negative_hinges > 0;
    const Block<T> block = (saved || row.scan) && !hinges && !row.nan ? Block<T>{nullptr, nullptr, count}
                                                                      : load(row.index, begin, count, scratch);
    char* const target = static_cast<char*>(gradient) + (row.index * m_.columns + begin) * size_of(m_.type);
    const bool narrow = m_.type == ScoreType::kHalf || m_.type == ScoreType::kBFloat16;
    T* const out = narrow ? scratch.out : reinterpret_cast<T*>(target);
    if (row.nan) {
      for (int j = 0; j < count; ++j) {
        out[j] = scratch.masks.ignored[j / 64] >> (j % 64) & 1 ? T(0) : std::numeric_limits<T>::quiet_NaN();
      }
    } else {
      static const Positives<T> none;
      const double by = row_scale(row.index);
      const Hinge<T> hinge = {static_cast<T>(objective_.negative_margin), static_cast<T>(row.negative_weight * by)};
      const Hinge<T>* const hinged = hinges ? &hinge : nullptr;
      const T* const column_scales = m_.column_scale ? static_cast<const T*>(m_.column_scale) + begin : nullptr;
      if (row.scan) {
        if constexpr (sizeof(T) == sizeof(float)) {
          sorting_.spread_block(block, row.scan->gradient() + begin, row.scale * by, hinged, column_scales, scratch,
                                out);
        }
      } else {
        kernels_.gradient_block(block, objective_.ap ? row.p : none, settings_, row.scale * by, hinged, column_scales,
                                scratch, out, saved);
      }
      auto k = std::lower_bound(row.column.begin(), row.column.end(), begin) - row.column.begin();
      for (; k < row.size() && row.column[k] < begin + count; ++k) {
        const int64_t i = row.position[k];
        out[row.column[k] - begin] = own_gradient(row, i, row.gradient[i], by) * column_scale(row.column[k]);
      }
    }
    if constexpr (sizeof(T) == 4) {
      if (m_.type == ScoreType::kHalf) {
        set_.conversions.narrow_half(out, reinterpret_cast<uint16_t*>(target), count);
      } else if (m_.type == ScoreType::kBFloat16) {
        uint16_t* const to = reinterpret_cast<uint16_t*>(target);
        for (int j = 0; j < count; ++j) to[j] = float_to_bfloat(out[j]);
      }
    }
  }

  // Where the scan may write the gradient of a row at once: nothing is to be added to it, narrowed or scaled by column.
  T* direct(const Row<T>& row, void* gradient) const {
    return whole() && !row.negative_hinges ? static_cast<T*>(gradient) + row.index * m_.columns : nullptr;
  }
  bool whole() const { return (m_.type == ScoreType::kFloat || m_.type == ScoreType::kDouble) && !m_.column_scale; }
  // What the gradient of the AP loss by the ranked scores is multiplied with.
  double factor(const Row<T>& row) const { return row.scale * row_scale(row.index); }

  bool wants_slope() const { return slope_; }

 private:
  T score(int64_t row, int64_t column) const {
    const int64_t at = row * m_.score_stride + column;
    switch (m_.type) {
      case ScoreType::kHalf: return half_to_float(static_cast<const uint16_t*>(m_.scores)[at]);
      case ScoreType::kBFloat16: return bfloat_to_float(static_cast<const uint16_t*>(m_.scores)[at]);
      default: break;
    }
    const T value = static_cast<const T*>(m_.scores)[at];
    return m_.row_scale ? value * column_scale(column) * row_scale(row) : value;
  }

  // Of positive i by its own score: `gradient` is that of the AP loss; hinge and all.
  T own_gradient(const Row<T>& row, int64_t i, double gradient, double by) const {
    const bool below = objective_.calibration && row.p.score[i] < static_cast<T>(objective_.positive_margin);
    return static_cast<T>((gradient * row.scale - (below ? row.positive_weight : 0.0)) * by);
  }

  T row_scale(int64_t row) const { return m_.row_scale ? static_cast<const T*>(m_.row_scale)[row] : T(1); }
  T column_scale(int64_t j) const { return m_.column_scale ? static_cast<const T*>(m_.column_scale)[j] : T(1); }

  Block<T> load(int64_t row, int64_t begin, int64_t count, Scratch<T>& scratch) const {
    masks_.fill(row, begin, static_cast<int>(count), scratch.masks);
    const int64_t at = row * m_.score_stride + begin;
    const T* score = static_cast<const T*>(m_.scores) + at;
    if (m_.row_scale) {
      const T top = kernels_.scale_block(score, static_cast<const T*>(m_.column_scale) + begin, row_scale(row),
                                         static_cast<int>(count), scratch.score);
      return {scratch.score, scratch.masks.negative, static_cast<int>(count), top};
    }
    if constexpr (sizeof(T) == 4) {
      if (m_.type == ScoreType::kHalf) {
        set_.conversions.widen_half(static_cast<const uint16_t*>(m_.scores) + at, scratch.score, count);
        score = scratch.score;
      } else if (m_.type == ScoreType::kBFloat16) {
        const uint16_t* const from = static_cast<const uint16_t*>(m_.scores) + at;
        for (int64_t j = 0; j < count; ++j) scratch.score[j] = bfloat_to_float(from[j]);
        score = scratch.score;
      }
    }
    return {score, scratch.masks.negative, static_cast<int>(count)};
  }

  const Matrix m_;
  const Objective objective_;
  const InstructionSet& set_;
  const Kernels<T>& kernels_;
  const Sorting<T>& sorting_;
  const Method method_;
  const Settings<T> settings_;
  const PairMasks masks_;
  const bool smooth_, ranks_, slope_;
};

template <typename T>
void weigh_groups(Positives<T>& p) {
  for (Group<T>& g : p.groups) {
    KahanSum sum;
    for (int64_t i = g.begin; i < g.end; ++i) sum.add(p.weight[i]);
    g.weight = sum.sum;
  }
}

template <typename T>
bool all_finite(const std::vector<T>& values) {
  unsigned other = 0;  // looked at to the end: in vectors
  for (const T value : values) other |= std::fabs(value) <= std::numeric_limits<T>::max() ? 0 : 1;
  return !other;
}

// What kernels take of the weights p.weight, dloss/drank-, and `second`, dloss/drank+ (smooth), of which none is larger
// than `largest`.
template <typename T>
void set_weights(Row<T>& row, bool smooth, double largest) {
  Positives<T>& p = row.p;
  const int64_t size = row.size();
  weigh_groups(p);
  const double unit = largest > 0 && std::isfinite(largest) ? largest : 1;
  p.unit = unit;
  const double *const first = p.weight.data(), *const second = row.second.data();
  T *const scaled = p.weight_negative.data(), *const scaled_second = p.weight_positive.data();
  for (int64_t i = 0; i < size; ++i) scaled[i] = static_cast<T>(first[i] / unit);
  for (int64_t i = 0; smooth && i < size; ++i) scaled_second[i] = static_cast<T>(second[i] / unit);
}

// The loss of a row and the weights of its ranks.
template <typename T>
double ap_weights(Row<T>& row, const Pass<T>& pass) {
  if (row.nan) return std::numeric_limits<double>::quiet_NaN();
  const int64_t size = row.size();
  if (!size) return 0;
  row.second.resize(pass.smooth() ? size : 0);
  double largest;
  const double loss =
      pass.kernels().ap_weights(row.rank_positive.data(), row.rank_negative.data(), size, row.p.weight.data(),
                                pass.smooth() ? row.second.data() : nullptr, largest);
  set_weights(row, pass.smooth(), largest);
  return loss / static_cast<double>(size);
}

// Hinges of the positives below their margin. Decided in T, as the scores are; summed in double.
template <typename T>
HingeSum positive_hinges(const Row<T>& row, const Objective& objective) {
  HingeSum hinges;
  KahanSum sum;
  const T margin = static_cast<T>(objective.positive_margin);
  for (const T score : row.p.score) {
    if (!(score < margin)) continue;
    sum.add(objective.positive_margin - static_cast<double>(score));
    ++hinges.count;
  }
  hinges.sum = sum.sum;
  return hinges;
}

// Hinges of the negatives above theirs, from the sums of the spans, which were taken from the margin as rounded to T.
template <typename T>
HingeSum negative_hinges(const Row<T>& row, const Objective& objective) {
  HingeSum hinges;
  for (const HingeSum& span : row.hinges) {
    hinges.sum += span.sum;
    hinges.count += span.count;
  }
  const double margin = static_cast<T>(objective.negative_margin);
  hinges.sum += static_cast<double>(hinges.count) * (margin - objective.negative_margin);
  return hinges;
}

// A power of two that brings the largest possible gradient of the row near the top of float16: what GradScaler's factor
// would have saved is then still there when it arrives.
template <typename T>
double half_scale(const Row<T>& row, const Pass<T>& pass) {
  double sum = 0, largest = 0;
  for (int64_t i = 0; i < row.size(); ++i) {
    sum += std::fabs(row.p.weight[i]);
    largest = std::max(largest, std::fabs(row.gradient[i]));
  }
  const Settings<T>& s = pass.settings();
  const double slope = std::max(pass.smooth() ? 0 : s.exact_rho, 0.25 / s.tau);
  const double bound = std::max(largest, sum * slope);
  if (!(bound > 0) || !std::isfinite(bound)) return 1;
  return std::ldexp(1.0, std::max(-100, std::min(100, 14 - std::ilogb(bound))));
}

// Kept by each thread from call to call: allocating it anew costs more page faults than a small batch costs time.
template <typename T>
Scratch<T>& scratch() {
  static thread_local const std::unique_ptr<Scratch<T>> own(new Scratch<T>);
  return *own;
}

// So is the workspace of its rows, unless it is large.
template <typename T>
struct Workspace {
  Row<T> row;
  Scan scan;
  std::vector<typename Pass<T>::Found> found;  // of each span

  void trim() {
    if (row.size() > 1 << 18) {
      row = {};
      found.clear();
    }
    scan.trim();
  }
};

template <typename T>
Workspace<T>& workspace() {
  static thread_local Workspace<T> own;
  return own;
}

// Boundaries of pieces of groups, about kPiece positives each. A piece sees the columns packed in its own way, on which
// the last bits of float64 sums depend: rows that are not shared are worked in the same pieces.
template <typename T>
std::vector<int64_t> split_groups(const std::vector<Group<T>>& groups) {
  std::vector<int64_t> pieces = {0};
  for (size_t g = 0; g < groups.size(); ++g) {
    if (g + 1 == groups.size() || groups[g].end - groups[pieces.back()].begin >= kPiece) {
      pieces.push_back(static_cast<int64_t>(g) + 1);
    }
  }
  if (groups.empty()) pieces.push_back(0);  // still looks for NaN
  return pieces;
}

// What distinguishes the ops, beside the pass: `finish(row)` sees ranks and hinges and sets the weights; `gradient` is
// null when none is wanted.
template <typename T, typename Finish>
void run_rows(const Pass<T>& pass, const Parallel& parallel, const Finish& finish, void* gradient, T* unscale) {
  const Matrix& m = pass.matrix();
  const auto scale = [&](Row<T>& row) {
    if (unscale) {
      row.scale = row.nan ? 1 : half_scale(row, pass);
      unscale[row.index] = static_cast<T>(1 / row.scale);
    }
  };
  const auto sums_of = [&](Row<T>& row, int64_t span, int64_t spans) -> Sums<T> {
    double* rank = row.rank_negative.data();
    double* slope = row.slope.data();
    if (spans > 1) {
      rank = row.partial.data() + span * 2 * row.size();
      slope = rank + row.size();
    }
    return {rank, pass.wants_slope() ? slope : nullptr};
  };
  const auto span_begin = [&](int64_t span, int64_t spans) {
    // Whole blocks, as even as can be; a function of the matrix and the row alone.
    return std::min(m.columns, divide_up(m.columns, kBlock) * span / spans * kBlock);
  };
  const bool reads = pass.ranks() || pass.objective().calibration;
  const auto clear_spans = [&](Row<T>& row, int64_t spans) {
    std::fill(row.rank_negative.begin(), row.rank_negative.end(), 0.0);
    std::fill(row.slope.begin(), row.slope.end(), 0.0);
    row.partial.assign(spans > 1 ? spans * 2 * row.size() : 0, 0.0);
    row.hinges.assign(pass.objective().calibration ? spans : 0, {});
  };
  // The first piece of a row's positives has the hinges with it.
  const auto hinges_of = [&](Row<T>& row, int64_t span, int64_t piece) {
    return pass.objective().calibration && piece == 0 ? &row.hinges[span] : nullptr;
  };
  const auto add_spans = [&](Row<T>& row, int64_t spans) {
    for (int64_t span = 0; spans > 1 && span < spans; ++span) {
      const double* rank = row.partial.data() + span * 2 * row.size();
      for (int64_t i = 0; i < row.size(); ++i) {
        row.rank_negative[i] += rank[i];
        row.slope[i] += rank[i + row.size()];
      }
    }
  };

  // Collects and sorts the negatives of a row, and reads its ranks off them. Returns whether the scan takes the row.
  const auto scan = [&](Row<T>& row, const Parallel& parallel) {
    if (!pass.scans(row) || !(reads || gradient)) return false;
    if constexpr (sizeof(T) == sizeof(float)) {
      Scan& scan = workspace<T>().scan;
      const int64_t spans = divide_up(m.columns, kSpan);
      scan.negatives().begin(m.columns, spans);
      row.hinges.assign(pass.objective().calibration ? spans : 0, {});
      parallel.run(spans, [&](int64_t span, int) {
        pass.prune(row, span * kSpan, std::min(m.columns, (span + 1) * kSpan), scratch<T>(),
                   scan.negatives().part(span), scan.negatives().room(span * kSpan), hinges_of(row, span, 0));
      });
      row.nan = scan.negatives().nan();
      if (row.nan || !scan.negatives().finite()) return false;
      row.scan = &scan;
      pass.order(row, parallel);
      scan.begin(row.p.score, pass.settings(), parallel);
      if (!pass.ranks()) return true;
      scan.rank(pass.settings(), parallel, row.rank_negative.data(), pass.wants_slope() ? row.slope.data() : nullptr);
      if (pass.smooth()) scan.rank_positives(pass.settings(), parallel, row.rank_positive.data());
    }
    return true;
  };
  // The gradients of a sorted row, once it has weights. Returns where they went, if that is where they belong.
  const auto scan_gradient = [&](Row<T>& row, const Parallel& parallel) -> T* {
    Positives<T>& p = row.p;
    if (!all_finite(p.weight) || !all_finite(p.weight_positive)) {
      row.scan = nullptr;  // sums would carry them to all
      pass.group(row);
      weigh_groups(p);
      return nullptr;
    }
    T* const out = pass.direct(row, gradient);
    if constexpr (sizeof(T) == sizeof(float)) {
      const double unit = p.unit / pass.settings().tau;
      row.scan->read_gradient(p.weight_negative, m.columns, (out ? pass.factor(row) : 1.0) * unit, pass.settings(),
                              parallel, out);
      if (pass.smooth()) {
        row.scan->gradient_positives(p.weight_positive, unit, pass.settings(), parallel, row.gradient.data());
      }
    }
    return out;
  };

  const bool shared = parallel.workers > 1 && m.rows < 4 * parallel.workers && m.columns >= 2 * kBlock;
  if (!shared) {
    parallel.run(m.rows, [&](int64_t index, int) {
      Workspace<T>& space = workspace<T>();
      Row<T>& row = space.row;
      Scratch<T>& own = scratch<T>();
      space.found.resize(1);
      pass.collect(index, 0, m.columns, own, space.found[0]);
      pass.arrange(index, space.found, row, serial());
      const bool scanned = scan(row, serial());
      if (!scanned) {
        pass.order(row, serial());
        pass.group(row);
      }
      const std::vector<int64_t> pieces = split_groups(pass.ranks() ? row.p.groups : decltype(row.p.groups)());
      const int64_t groups = pieces.back();
      SavedSlopes<T>& saved = own.saved;
      saved.clear();
      saved.whole = gradient && groups > 0 && pieces.size() == 2;  // which meets each block once
      if (reads && !row.nan && !scanned) {
        const int64_t spans = row.spans(m.columns);
        clear_spans(row, spans);
        for (int64_t span = 0; span < spans; ++span) {
          for (size_t piece = 0; piece + 1 < pieces.size(); ++piece) {
            row.nan |=
                pass.rank(row, span_begin(span, spans), span_begin(span + 1, spans), pieces[piece], pieces[piece + 1],
                          own, sums_of(row, span, spans), hinges_of(row, span, piece), saved.whole ? &saved : nullptr);
          }
        }
        add_spans(row, spans);
        if (pass.smooth()) pass.rank_positives(row, 0, groups, own);
      }
      finish(row);
      if (!gradient) return space.trim();
      T* const direct = row.scan ? scan_gradient(row, serial()) : nullptr;
      if (!row.nan) {
        for (int64_t i = 0; i < row.size(); i += kBlock) {
          pass.gradient_positives(row, i, std::min(row.size(), i + kBlock), own, direct);
        }
      }
      if (!direct) {
        scale(row);
        pass.place(row);
        for (int64_t begin = 0; begin < m.columns; begin += kBlock) {
          pass.gradient(row, begin, own, saved.whole ? &saved : nullptr, gradient);
        }
      }
      space.trim();
    });
    return;
  }

  Workspace<T>& space = workspace<T>();
  Row<T>& row = space.row;
  for (int64_t index = 0; index < m.rows; ++index) {
    space.found.resize(divide_up(m.columns, kSpan));
    parallel.run(static_cast<int64_t>(space.found.size()), [&](int64_t part, int) {
      pass.collect(index, part * kSpan, std::min(m.columns, (part + 1) * kSpan), scratch<T>(), space.found[part]);
    });
    pass.arrange(index, space.found, row, parallel);
    const bool scanned = scan(row, parallel);
    if (!scanned) {
      pass.order(row, parallel);
      pass.group(row);
    }
    const std::vector<int64_t> pieces = split_groups(pass.ranks() ? row.p.groups : decltype(row.p.groups)());
    const int64_t count = static_cast<int64_t>(pieces.size()) - 1;
    if (reads && !row.nan && !scanned) {
      const int64_t spans = row.spans(m.columns);
      clear_spans(row, spans);
      std::vector<char> nan(spans * count, 0);
      parallel.run(spans * count, [&](int64_t task, int) {
        const int64_t span = task / count, piece = task % count;
        nan[task] =
            pass.rank(row, span_begin(span, spans), span_begin(span + 1, spans), pieces[piece], pieces[piece + 1],
                      scratch<T>(), sums_of(row, span, spans), hinges_of(row, span, piece), nullptr);
      });
      row.nan = std::any_of(nan.begin(), nan.end(), [](char c) { return c != 0; });
      add_spans(row, spans);
      if (pass.smooth()) {
        parallel.run(count, [&](int64_t piece, int) {
          pass.rank_positives(row, pieces[piece], pieces[piece + 1], scratch<T>());
        });
      }
    }
    finish(row);
    if (!gradient) {
      space.trim();
      continue;
    }
    T* const direct = row.scan ? scan_gradient(row, parallel) : nullptr;
    if (!row.nan) {
      parallel.run(divide_up(row.size(), kBlock), [&](int64_t piece, int) {
        pass.gradient_positives(row, piece * kBlock, std::min(row.size(), (piece + 1) * kBlock), scratch<T>(), direct);
      });
    }
    if (!direct) {
      scale(row);
      pass.place(row);
      parallel.run(divide_up(m.columns, kBlock),
                   [&](int64_t block, int) { pass.gradient(row, block * kBlock, scratch<T>(), nullptr, gradient); });
    }
    space.trim();
  }
}

template <typename T, typename Factor>
void scale_block(const T* from, T* to, int64_t count, Factor by) {
  if (std::isfinite(by)) {
    for (int64_t j = 0; j < count; ++j) to[j] = static_cast<T>(from[j] * by);
  } else {  // no gradient stays none, whatever arrives: 0 times infinity is not meant
    for (int64_t j = 0; j < count; ++j) to[j] = from[j] == 0 ? T(0) : static_cast<T>(from[j] * by);
  }
}

}  // namespace

template <typename T>
void average_precision_rows(const Matrix& m, const SurrogateSettings& settings, const Parallel& parallel,
                            const ApOutput<T>& out) {
  const Pass<T> pass(m, settings, true, out.gradient != nullptr);
  run_rows(
      pass, parallel,
      [&](Row<T>& row) {
        out.loss[row.index] = static_cast<T>(ap_weights(row, pass));
        out.positives[row.index] = row.size();
      },
      out.gradient, out.unscale);
}

template <typename T>
void objective_rows(const Matrix& m, const SurrogateSettings& settings, const Objective& objective,
                    const Parallel& parallel, const ObjectiveOutput& out) {
  const Pass<T> pass(m, settings, objective.ap, objective.ap && out.gradient, objective);
  run_rows(
      pass, parallel,
      [&](Row<T>& row) {
        const double* const weight = out.weight + 3 * row.index;
        double* const value = out.value + 5 * row.index;
        row.scale = weight[0];
        row.positive_weight = weight[1];
        row.negative_weight = weight[2];
        const double nan = std::numeric_limits<double>::quiet_NaN();
        value[0] = objective.ap ? ap_weights(row, pass) : row.nan ? nan : 0;
        if (!objective.calibration) return;
        // Nothing of a row with a NaN counts: what it has summed depends on where it met the NaN.
        const HingeSum none = {nan, 0};
        const HingeSum below = row.nan ? none : positive_hinges(row, objective);
        const HingeSum above = row.nan ? none : negative_hinges(row, objective);
        row.negative_hinges = above.count;
        value[1] = below.sum;
        value[2] = above.sum;
        value[3] = static_cast<double>(below.count);
        value[4] = static_cast<double>(above.count);
      },
      out.gradient, static_cast<T*>(nullptr));
}

template <typename T>
void smooth_rank_rows(const Matrix& m, const SurrogateSettings& settings, const Parallel& parallel,
                      const RankOutput<T>& out) {
  const Pass<T> pass(m, settings, true, out.slope != nullptr);
  run_rows(
      pass, parallel,
      [&](Row<T>& row) {
        constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
        pass.place(row);
        for (int64_t i = 0; i < row.size(); ++i) {
          const int64_t k = row.ordinal[i], at = out.first[row.index] + k;
          out.query[at] = row.index;
          out.reference[at] = row.column[k];
          out.positive_rank[at] = row.nan ? kNan : static_cast<T>(row.rank_positive[i]);
          out.negative_rank[at] = row.nan ? kNan : static_cast<T>(row.rank_negative[i]);
          if (out.slope) out.slope[at] = row.nan ? kNan : static_cast<T>(row.slope[i]);
        }
      },
      nullptr, static_cast<T*>(nullptr));
}

template <typename T>
void smooth_rank_gradient_rows(const Matrix& m, const SurrogateSettings& settings, const Parallel& parallel,
                               const RankGradient<T>& in) {
  const Pass<T> pass(m, settings, false, false);
  run_rows(
      pass, parallel,
      [&](Row<T>& row) {
        const int64_t first = in.first[row.index];
        pass.place(row);
        for (int64_t i = 0; i < row.size(); ++i) {
          const T slope = in.slope[first + row.ordinal[i]];
          row.slope[i] = static_cast<double>(slope);
          row.nan |= slope != slope;  // the forward pass met a NaN score
        }
        double largest = 0;
        row.second.resize(pass.smooth() ? row.size() : 0);
        for (int64_t i = 0; i < row.size(); ++i) {
          const int64_t at = first + row.ordinal[i];
          row.p.weight[i] = in.negative_weight[at];
          if (pass.smooth()) row.second[i] = in.positive_weight ? in.positive_weight[at] : 0;
          largest = std::max({largest, std::fabs(row.p.weight[i]), pass.smooth() ? std::fabs(row.second[i]) : 0.0});
        }
        set_weights(row, pass.smooth(), largest);
      },
      in.gradient, static_cast<T*>(nullptr));
}

void count_pairs(const Relation& relation, int64_t rows, int64_t columns, const Parallel& parallel, int64_t* counts) {
  const PairMasks masks(relation, instruction_set().conversions);
  parallel.run(rows, [&](int64_t row, int) {
    BlockMasks bits;
    int64_t positives = 0, negatives = 0;
    for (int64_t at = 0; at < columns; at += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, columns - at));
      masks.fill(row, at, count, bits);
      for (int w = 0; w < divide_up(count, 64); ++w) {
        positives += __builtin_popcountll(bits.positive[w]);
        negatives += __builtin_popcountll(bits.negative[w]);
      }
    }
    counts[2 * row] = positives;
    counts[2 * row + 1] = negatives;
  });
}

template <typename T>
void scale_rows(const void* gradient, ScoreType type, int64_t rows, int64_t columns, const double* factor,
                const Parallel& parallel, void* out) {
  const Conversions& convert = instruction_set().conversions;
  const int64_t blocks = divide_up(columns, kBlock);
  const int64_t rows_a_task = std::max<int64_t>(1, kSpan / std::max<int64_t>(1, columns));
  const int64_t row_tasks = divide_up(rows, rows_a_task);
  const int64_t column_tasks = rows_a_task > 1 ? 1 : divide_up(blocks, 16);
  parallel.run(row_tasks * column_tasks, [&](int64_t task, int) {
    const int64_t first = task / column_tasks * rows_a_task, part = task % column_tasks;
    for (int64_t row = first; row < std::min(rows, first + rows_a_task); ++row) {
      for (int64_t block = part * blocks / column_tasks; block < (part + 1) * blocks / column_tasks; ++block) {
        const int64_t at = row * columns + block * kBlock;
        const int64_t count = std::min<int64_t>(kBlock, columns - block * kBlock);
        if (type == ScoreType::kFloat || type == ScoreType::kDouble) {
          const T* const from = static_cast<const T*>(gradient) + at;
          T* const to = static_cast<T*>(out) + at;
          const T by = static_cast<T>(factor[row]);
          scale_block(from, to, count, by);
        } else {
          const uint16_t* const from = static_cast<const uint16_t*>(gradient) + at;
          uint16_t* const to = static_cast<uint16_t*>(out) + at;
          float values[kBlock];
          if (type == ScoreType::kHalf) {
            convert.widen_half(from, values, count);
          } else {
            for (int64_t j = 0; j < count; ++j) values[j] = bfloat_to_float(from[j]);
          }
          scale_block(values, values, count, factor[row]);
          if (type == ScoreType::kHalf) {
            convert.narrow_half(values, to, count);
          } else {
            for (int64_t j = 0; j < count; ++j) to[j] = float_to_bfloat(values[j]);
          }
        }
      }
    }
  });
}

#define ROADMAP_INSTANTIATE(T)                                                                                       \
  template void average_precision_rows<T>(const Matrix&, const SurrogateSettings&, const Parallel&,                  \
                                          const ApOutput<T>&);                                                       \
  template void smooth_rank_rows<T>(const Matrix&, const SurrogateSettings&, const Parallel&, const RankOutput<T>&); \
  template void smooth_rank_gradient_rows<T>(const Matrix&, const SurrogateSettings&, const Parallel&,               \
                                             const RankGradient<T>&);                                                \
  template void objective_rows<T>(const Matrix&, const SurrogateSettings&, const Objective&, const Parallel&,        \
                                  const ObjectiveOutput&);                                                           \
  template void scale_rows<T>(const void*, ScoreType, int64_t, int64_t, const double*, const Parallel&, void*);
ROADMAP_INSTANTIATE(float)
ROADMAP_INSTANTIATE(double)

}  // namespace roadmap
