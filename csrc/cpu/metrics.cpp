// From a row's scores to its metrics, and how rows are divided among threads: see metrics.h.
#include "metrics.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "relation.h"

namespace roadmap {
namespace {

// Columns of one task where threads share a row.
constexpr int64_t kShare = 4 * kBlock;
// Buckets a positive: more make a bucket of several rarer, and the table larger. A row of 60,000 with 6,000 positives
// takes 199 us with 4, 176 with 8, 179 with 12.
constexpr int64_t kBuckets = 8;
constexpr int64_t kMostBuckets = int64_t(1) << 20;  // which float32 still counts one by one
// A bucket of more positives is overfull: comparing sorts them faster.
constexpr int32_t kMostInBucket = 32;

// What a thread works with.
template <typename T>
struct Workspace {
  alignas(64) T packed[kBlock + kPad];
  alignas(64) int32_t bucket[kBlock];
  BlockMasks masks;
  std::vector<T> found;           // [P] and more  positives as they stand in the row
  std::vector<int32_t> found_in;  // [P]  their buckets
  LookupTable<T> table;
  std::vector<uint32_t> reached;  // [P + 1]
};

template <typename T>
class RankCounts {
 public:
  explicit RankCounts(const Matrix& m)
      : m_(m), set_(instruction_set()), counting_(set_.counting<T>()), masks_(m.relation, set_.conversions) {}

  // The positives of a row, sorted. Returns false if one is NaN.
  bool arrange(int64_t row, Workspace<T>& w) const {
    int64_t size = 0;
    bool nan = false;
    for (int64_t at = 0; at < m_.columns; at += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, m_.columns - at));
      masks_.fill(row, at, count, w.masks);
      for (int word = 0; word < divide_up(count, 64); ++word) w.masks.ignored[word] = ~w.masks.positive[word];
      if (w.found.size() < static_cast<size_t>(size + kBlock + kPad)) w.found.resize(2 * (size + kBlock + kPad));
      size += counting_.pack(scores(row) + at, w.masks.ignored, count, -std::numeric_limits<T>::infinity(),
                             w.found.data() + size, nan);
    }
    if (nan) return false;
    LookupTable<T>& table = w.table;
    table.score.assign(size + LookupTable<T>::kEnd, std::numeric_limits<T>::quiet_NaN());
    table.many = size > LookupTable<T>::kFew;
    if (table.many) {
      sort_by_bucket(w);
    } else {
      std::copy(w.found.begin(), w.found.begin() + size, table.score.begin());
      std::sort(table.score.begin(), table.score.begin() + size);
    }
    w.reached.assign(size + 1, 0);
    return true;
  }

  // Adds to `reached` the references of columns [begin, end) that count and reach a positive of the table. Returns
  // false if one that counts is NaN.
  bool count(int64_t row, int64_t begin, int64_t end, const LookupTable<T>& table, Workspace<T>& w,
             uint32_t* reached) const {
    bool nan = false;
    for (int64_t at = begin; at < end && !nan; at += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, m_.columns - at));
      masks_.fill_ignored(row, at, count, w.masks);
      const int n = counting_.pack(scores(row) + at, w.masks.ignored, count, table.score[0], w.packed, nan);
      if (table.many) {
        counting_.count_many(w.packed, n, table, w.bucket, reached);
      } else {
        counting_.count_few(w.packed, n, table, reached);
      }
    }
    return !nan;
  }

  // The metrics of a row whose references have all been counted.
  void finish(const LookupTable<T>& table, std::vector<uint32_t>& reached, double* values) const {
    const int64_t size = table.size();
    if (table.many) {  // whoever reaches a higher positive reaches the lower ones
      uint32_t sum = 0;
      for (int64_t i = size; i > 0; --i) reached[i] = sum += reached[i];
    }
    double all = 0, near = 0;
    int64_t hits = 0, tied = 0;  // the first positive of equal score
    for (int64_t i = 0; i < size; ++i) {
      if (table.score[i] != table.score[tied]) tied = i;
      const int64_t rank = reached[i + 1];
      const double precision = static_cast<double>(size - tied) / static_cast<double>(rank);
      all += precision;
      if (rank <= size) {
        near += precision;
        ++hits;
      }
    }
    const double positives = static_cast<double>(size);
    values[0] = all / positives;
    values[1] = near / positives;
    values[2] = static_cast<double>(hits) / positives;
    values[3] = reached[size];
  }

 private:
  const T* scores(int64_t row) const { return static_cast<const T*>(m_.scores) + row * m_.score_stride; }

  // Fills the table, and with it sorts the positives: once scattered to their buckets they are nearly in order.
  void sort_by_bucket(Workspace<T>& w) const {
    LookupTable<T>& table = w.table;
    const int64_t size = table.size(), buckets = std::min(kBuckets * size, kMostBuckets);
    T low, high;
    counting_.range(w.found.data(), size, low, high);
    table.low = low;
    table.last = static_cast<T>(buckets - 1);
    // Where the range is empty or infinite, NaN leads all to the first bucket, where bisection finds them.
    table.scale = static_cast<T>(buckets) / (high - low);
    w.found_in.resize(size);
    for (int64_t i = 0; i < size; i += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, size - i));
      counting_.place(w.found.data() + i, count, table, w.found_in.data() + i);
    }
    // A bucket's count goes two places on. Summed, the next place says where the bucket begins, moves on to its end as
    // it is filled, and so comes to say where the next one begins.
    table.first.assign(buckets + 2, 0);
    int32_t* const first = table.first.data();
    int32_t fullest = 0;
    for (int64_t i = 0; i < size; ++i) fullest = std::max(fullest, ++first[w.found_in[i] + 2]);
    std::partial_sum(first, first + buckets + 2, first);
    T* const score = table.score.data();
    for (int64_t i = 0; i < size; ++i) score[first[w.found_in[i] + 1]++] = w.found[i];
    if (fullest > kMostInBucket) {
      std::sort(score, score + size);
    } else {
      for (int64_t i = 1; i < size; ++i) {  // insertion, which stays within a bucket
        const T u = score[i];
        int64_t at = i;
        for (; at > 0 && score[at - 1] > u; --at) score[at] = score[at - 1];
        score[at] = u;
      }
    }
  }

  const Matrix m_;
  const InstructionSet& set_;
  const Counting<T>& counting_;
  const PairMasks masks_;
};

}  // namespace

template <typename T>
void rank_metrics(const Matrix& m, const Parallel& parallel, double* values) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  constexpr double kNone[kRankValues] = {kNan, kNan, kNan, std::numeric_limits<double>::infinity()};
  const RankCounts<T> ranking(m);
  std::vector<Workspace<T>> work(parallel.workers);
  const auto settle = [&](int64_t row, bool good, Workspace<T>& w) {
    double* const out = values + kRankValues * row;
    if (!good) {
      std::fill(out, out + kRankValues, kNan);
    } else if (!w.table.size()) {
      std::copy(kNone, kNone + kRankValues, out);
    } else {
      ranking.finish(w.table, w.reached, out);
    }
  };

  if (parallel.workers == 1 || m.rows >= 4 * parallel.workers || m.columns < 2 * kShare) {
    parallel.run(m.rows, [&](int64_t row, int worker) {
      Workspace<T>& w = work[worker];
      bool good = ranking.arrange(row, w);
      if (good && w.table.size()) good = ranking.count(row, 0, m.columns, w.table, w, w.reached.data());
      settle(row, good, w);
    });
    return;
  }

  // Few rows: threads share the columns of one, and their counts are added.
  std::vector<std::vector<uint32_t>> shares(parallel.workers);
  std::vector<char> nan(parallel.workers);
  for (int64_t row = 0; row < m.rows; ++row) {
    Workspace<T>& w = work[0];
    bool good = ranking.arrange(row, w);
    if (good && w.table.size()) {
      const LookupTable<T>& table = w.table;
      for (auto& share : shares) share.assign(w.reached.size(), 0);
      std::fill(nan.begin(), nan.end(), 0);
      parallel.run(divide_up(m.columns, kShare), [&](int64_t task, int worker) {
        const int64_t begin = task * kShare, end = std::min(m.columns, begin + kShare);
        nan[worker] |= !ranking.count(row, begin, end, table, work[worker], shares[worker].data());
      });
      for (const auto& share : shares) {
        for (size_t i = 0; i < share.size(); ++i) w.reached[i] += share[i];
      }
      good = std::all_of(nan.begin(), nan.end(), [](char c) { return !c; });
    }
    settle(row, good, w);
  }
}

template void rank_metrics<float>(const Matrix&, const Parallel&, double*);
template void rank_metrics<double>(const Matrix&, const Parallel&, double*);

}  // namespace roadmap
