// From a row's scores to its metrics, and how rows are dealt to threads: see ranking.h.
#include "ranking.h"

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
// So many positives in one bucket are better sorted by comparing.
constexpr int32_t kCrowd = 32;

// What a thread works with.
template <typename T>
struct Workspace {
  alignas(64) T packed[kBlock + kPad];
  alignas(64) int32_t bucket[kBlock];
  RoleBits roles;
  std::vector<T> found;           // [P] and more  positives as they stand in the row
  std::vector<int32_t> found_in;  // [P]  their buckets
  Ladder<T> ladder;
  std::vector<uint32_t> reached;  // [P + 1]
};

template <typename T>
class Ranking {
 public:
  explicit Ranking(const Matrix& m)
      : m_(m), set_(instruction_set()), counting_(set_.counting<T>()), roles_(m.relation, set_.conversions) {}

  // The positives of a row, sorted. Returns false if one is NaN.
  bool arrange(int64_t row, Workspace<T>& w) const {
    int64_t size = 0;
    bool nan = false;
    for (int64_t at = 0; at < m_.columns; at += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, m_.columns - at));
      roles_.fill(row, at, count, w.roles);
      for (int word = 0; word < divide_up(count, 64); ++word) w.roles.ignored[word] = ~w.roles.positive[word];
      if (w.found.size() < static_cast<size_t>(size + kBlock + kPad)) w.found.resize(2 * (size + kBlock + kPad));
      size += counting_.pack(scores(row) + at, w.roles.ignored, count, -std::numeric_limits<T>::infinity(),
                             w.found.data() + size, nan);
    }
    if (nan) return false;
    Ladder<T>& ladder = w.ladder;
    ladder.score.assign(size + Ladder<T>::kEnd, std::numeric_limits<T>::quiet_NaN());
    ladder.many = size > Ladder<T>::kFew;
    if (ladder.many) {
      sort_by_bucket(w);
    } else {
      std::copy(w.found.begin(), w.found.begin() + size, ladder.score.begin());
      std::sort(ladder.score.begin(), ladder.score.begin() + size);
    }
    w.reached.assign(size + 1, 0);
    return true;
  }

  // Adds to `reached` the references of columns [begin, end) that count and reach a positive of the ladder. Returns
  // false if one that counts is NaN.
  bool count(int64_t row, int64_t begin, int64_t end, const Ladder<T>& ladder, Workspace<T>& w,
             uint32_t* reached) const {
    bool nan = false;
    for (int64_t at = begin; at < end && !nan; at += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, m_.columns - at));
      roles_.fill_ignored(row, at, count, w.roles);
      const int n = counting_.pack(scores(row) + at, w.roles.ignored, count, ladder.score[0], w.packed, nan);
      if (ladder.many) {
        counting_.count_many(w.packed, n, ladder, w.bucket, reached);
      } else {
        counting_.count_few(w.packed, n, ladder, reached);
      }
    }
    return !nan;
  }

  // The metrics of a row whose references have all been counted.
  void finish(const Ladder<T>& ladder, std::vector<uint32_t>& reached, double* values) const {
    const int64_t size = ladder.size();
    if (ladder.many) {  // whoever reaches a higher positive reaches the lower ones
      uint32_t sum = 0;
      for (int64_t i = size; i > 0; --i) reached[i] = sum += reached[i];
    }
    double all = 0, near = 0;
    int64_t hits = 0, tied = 0;  // the first positive of equal score
    for (int64_t i = 0; i < size; ++i) {
      if (ladder.score[i] != ladder.score[tied]) tied = i;
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

  // The table of buckets, and with it the order of the positives: dealt to their buckets they are nearly sorted.
  void sort_by_bucket(Workspace<T>& w) const {
    Ladder<T>& ladder = w.ladder;
    const int64_t size = ladder.size(), buckets = std::min(kBuckets * size, kMostBuckets);
    T low, high;
    counting_.range(w.found.data(), size, low, high);
    ladder.low = low;
    ladder.last = static_cast<T>(buckets - 1);
    // Where there is no span, or an infinite one, NaN leads all to the first bucket, in which they are found by
    // bisection.
    ladder.scale = static_cast<T>(buckets) / (high - low);
    w.found_in.resize(size);
    for (int64_t i = 0; i < size; i += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, size - i));
      counting_.place(w.found.data() + i, count, ladder, w.found_in.data() + i);
    }
    // A bucket's count goes two places on. Summed, the next place says where the bucket begins, moves on to its end as
    // it is filled, and so comes to say where the next one begins.
    ladder.first.assign(buckets + 2, 0);
    int32_t* const first = ladder.first.data();
    int32_t crowd = 0;
    for (int64_t i = 0; i < size; ++i) crowd = std::max(crowd, ++first[w.found_in[i] + 2]);
    std::partial_sum(first, first + buckets + 2, first);
    T* const score = ladder.score.data();
    for (int64_t i = 0; i < size; ++i) score[first[w.found_in[i] + 1]++] = w.found[i];
    if (crowd > kCrowd) {
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
  const Roles roles_;
};

}  // namespace

template <typename T>
void rank_metrics(const Matrix& m, const Parallel& parallel, double* values) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  constexpr double kNone[kRankValues] = {kNan, kNan, kNan, std::numeric_limits<double>::infinity()};
  const Ranking<T> ranking(m);
  std::vector<Workspace<T>> work(parallel.workers);
  const auto settle = [&](int64_t row, bool good, Workspace<T>& w) {
    double* const out = values + kRankValues * row;
    if (!good) {
      std::fill(out, out + kRankValues, kNan);
    } else if (!w.ladder.size()) {
      std::copy(kNone, kNone + kRankValues, out);
    } else {
      ranking.finish(w.ladder, w.reached, out);
    }
  };

  if (parallel.workers == 1 || m.rows >= 4 * parallel.workers || m.columns < 2 * kShare) {
    parallel.run(m.rows, [&](int64_t row, int worker) {
      Workspace<T>& w = work[worker];
      bool good = ranking.arrange(row, w);
      if (good && w.ladder.size()) good = ranking.count(row, 0, m.columns, w.ladder, w, w.reached.data());
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
    if (good && w.ladder.size()) {
      const Ladder<T>& ladder = w.ladder;
      for (auto& share : shares) share.assign(w.reached.size(), 0);
      std::fill(nan.begin(), nan.end(), 0);
      parallel.run(divide_up(m.columns, kShare), [&](int64_t task, int worker) {
        const int64_t begin = task * kShare, end = std::min(m.columns, begin + kShare);
        nan[worker] |= !ranking.count(row, begin, end, ladder, work[worker], shares[worker].data());
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
