// The CPU row op without torch, under AddressSanitizer and UndefinedBehaviorSanitizer (run.sh): NaN, infinities, huge
// and denormal scores, every type and size around a vector and a block, on one thread and on three. Every tensor ends
// where a page ends that must not be touched, so that also a masked vector access past it is caught.
#include "../../csrc/cpu/rows.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/embeddings.h"
#include "../../csrc/cpu/half.h"
#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cpu/metrics.h"
#include "../../csrc/cpu/relation.h"

using namespace roadmap;

namespace {

int failures = 0;

void expect(bool ok, const char* what) {
  if (!ok && failures++ < 20) std::fprintf(stderr, "failed: %s\n", what);
}

// n elements whose end is the end of the last accessible page.
template <typename T>
class Guarded {
 public:
  explicit Guarded(size_t n) : n_(n) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    size_ = (n * sizeof(T) + page - 1) / page * page + page;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + size_ - page, page, PROT_NONE) != 0) std::abort();
    data_ = reinterpret_cast<T*>(base_ + size_ - page - n * sizeof(T));
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(base_, size_); }
  T* data() { return data_; }
  T& operator[](size_t i) { return data_[i]; }
  size_t size() const { return n_; }

 private:
  size_t n_, size_;
  char* base_;
  T* data_;
};

Parallel threads(int workers) {
  return {workers, [workers](int64_t tasks, const std::function<void(int64_t, int)>& task) {
            std::atomic<int64_t> next{0};
            std::vector<std::thread> pool;
            for (int worker = 0; worker < workers; ++worker) {
              pool.emplace_back([&, worker] {
                for (int64_t index; (index = next.fetch_add(1)) < tasks;) task(index, worker);
              });
            }
            for (std::thread& thread : pool) thread.join();
          }};
}

template <typename S>
double wide(S x) {
  return static_cast<double>(x);
}

// S is how a score is stored, T how it is summed.
template <typename S, typename T>
void check(ScoreType type, int64_t rows, int64_t columns, unsigned seed) {
  std::mt19937 random(seed);
  const auto uniform = [&] { return std::uniform_real_distribution<double>(0, 1)(random); };
  const double special[] = {NAN, INFINITY, -INFINITY, 3e38, -3e38, 1e-40, -1e-40, 0.0, -0.0, 65504.0};
  const bool dirty = seed % 2;
  const double density[] = {0.0, 0.01, 0.2, 1.0};
  Guarded<S> scores(rows * columns), gradient(rows * columns), scaled(rows * columns);
  Guarded<uint8_t> target(rows * columns), ignore(rows * columns);
  for (int64_t i = 0; i < rows * columns; ++i) {
    double value = std::round((uniform() - 0.5) * 128) / 64;
    if (dirty && uniform() < 0.02) value = special[random() % 10];
    if constexpr (std::is_same_v<S, uint16_t>) {
      const float narrow = static_cast<float>(value);
      scores[i] = type == ScoreType::kHalf ? float_to_half(narrow) : float_to_bfloat(narrow);
    } else {
      scores[i] = static_cast<S>(value);
    }
    target[i] = uniform() < density[seed / 2 % 4];
    ignore[i] = uniform() < 0.1;
  }
  Relation masks;
  masks.target = target.data();
  masks.target_stride = masks.ignore_stride = columns;
  masks.ignore = seed % 3 ? ignore.data() : nullptr;
  const Matrix m = {scores.data(), type, rows, columns, columns, masks};
  const bool half = std::is_same_v<S, uint16_t>;
  for (int64_t surrogate = 0; surrogate < 2; ++surrogate) {
    const double taus[] = {0.01, 1e-20, 1e30};
    const SurrogateSettings settings = {
        surrogate, taus[seed / 8 % 3], seed % 5 ? 100.0 : 0.0, seed % 7 ? 0.05 : 0.0, 0.5, 1.49};
    std::vector<T> first_loss;
    for (int workers : {1, 3}) {
      Guarded<T> loss(rows), unscale(rows);
      rank_loss_rows<T>(m, settings, Ranking{}, threads(workers),
                        {loss.data(), gradient.data(), half ? unscale.data() : nullptr, 0.25});
      for (int64_t row = 0; row < rows; ++row) {
        expect(loss[row] != loss[row] || (loss[row] >= -1e-6 && loss[row] <= 1 + 1e-6), "a loss lies in [0, 1]");
      }
      if (workers == 1) {
        first_loss.assign(loss.data(), loss.data() + rows);
      } else {
        expect(std::memcmp(first_loss.data(), loss.data(), rows * sizeof(T)) == 0, "bits depend on the threads");
      }
      std::vector<double> factor(rows, 0.5);
      scale_rows<T>(gradient.data(), type, rows, columns, factor.data(), threads(workers), scaled.data());

      Guarded<int64_t> first(rows + 1), counts(2 * rows);
      count_pairs(masks, rows, columns, threads(workers), counts.data());
      first[0] = 0;
      int64_t with_positive = 0;
      for (int64_t row = 0; row < rows; ++row) {
        first[row + 1] = first[row] + counts[2 * row];
        with_positive += counts[2 * row] > 0;
      }
      expect(count_rows_with_positive(masks, rows, columns, threads(workers)) == with_positive, "rows with a positive");
      const int64_t count = first[rows];
      Guarded<int64_t> query(count), reference(count);
      Guarded<T> rank_positive(count), rank_negative(count), slope(count);
      smooth_rank_rows<T>(
          m, settings, threads(workers),
          {first.data(), query.data(), reference.data(), rank_positive.data(), rank_negative.data(), slope.data()});
      for (int64_t i = 0; i < count; ++i) {
        expect(query[i] >= 0 && query[i] < rows && reference[i] >= 0 && reference[i] < columns, "an index is inside");
      }
      smooth_rank_gradient_rows<T>(m, settings, threads(workers),
                                   {first.data(), slope.data(), surrogate ? rank_positive.data() : nullptr,
                                    rank_negative.data(), gradient.data()});
    }
  }
}

// Rows of the sorted scan, from hundreds of scores within tau to a few: no loss or gradient is far from the pairwise
// kernels', nor are bits on one thread from those on three.
void check_sorted(int64_t rows, int64_t columns, unsigned seed) {
  std::mt19937 random(seed);
  const auto uniform = [&] { return std::uniform_real_distribution<double>(0, 1)(random); };
  constexpr double kTau = 0.01;
  const double deltas[] = {0.05, 0.0, 0.005, 0.02}, density[] = {0.02, 0.3, 0.9};
  const double delta = deltas[seed % 4], width = kTau * std::pow(10.0, static_cast<int>(seed / 4 % 5) - 2);
  const double grid = seed % 3 ? 0 : 1.0 / 4096;  // ties
  Guarded<float> scores(rows * columns);
  Guarded<uint8_t> target(rows * columns), ignore(rows * columns);
  for (int64_t i = 0; i < rows * columns; ++i) {
    double value = width * uniform();
    if (grid > 0) value = std::round(value / grid) * grid;
    if (seed % 2)
      value += static_cast<double>(random() % 3) * (delta + kTau / 7);  // clusters beside one another's thresholds
    target[i] = uniform() < density[seed % 3];
    ignore[i] = seed % 5 == 0 && uniform() < 0.1;
    if (seed >= 20) {  // half of all in a crowd, or a tie, at the thresholds of seven others: over a block
      const bool few = i % columns < 7, crowd = !few && i % 2;
      value = few ? 0.2 : crowd ? 0.2 + delta + (seed % 4 < 2 ? 0 : 0.1 * kTau * uniform()) : uniform();
      target[i] = seed % 2 ? crowd : few;
    }
    scores[i] = static_cast<float>(value);
  }
  Relation masks;
  masks.target = target.data();
  masks.ignore = ignore.data();
  masks.target_stride = masks.ignore_stride = columns;
  const Matrix m = {scores.data(), ScoreType::kFloat, rows, columns, columns, masks};
  for (int64_t surrogate = 0; surrogate < 2; ++surrogate) {
    SurrogateSettings settings = {surrogate, kTau, 100.0, delta, 0.5, 1.44};
    Guarded<float> loss(rows), pairwise_loss(rows), gradient(rows * columns), pairwise(rows * columns);
    settings.method = Method::kPairwise;
    rank_loss_rows<float>(m, settings, Ranking{}, threads(3), {pairwise_loss.data(), pairwise.data(), nullptr});
    settings.method = Method::kSorted;
    std::vector<float> first;
    for (int workers : {1, 3}) {
      rank_loss_rows<float>(m, settings, Ranking{}, threads(workers), {loss.data(), gradient.data(), nullptr});
      for (int64_t row = 0; row < rows; ++row) {
        expect(std::fabs(loss[row] - pairwise_loss[row]) < 1e-5, "the loss of the pairwise kernels");
        double error = 0, norm = 0;
        for (int64_t j = 0; j < columns; ++j) {
          const double one = gradient[row * columns + j], other = pairwise[row * columns + j];
          error += (one - other) * (one - other);
          norm += other * other;
        }
        expect(std::sqrt(error) <= 1e-5 * std::sqrt(norm) + 1e-5, "the gradient of the pairwise kernels");
      }
      if (workers == 1) {
        first.assign(gradient.data(), gradient.data() + rows * columns);
      } else {
        expect(std::memcmp(first.data(), gradient.data(), first.size() * sizeof(float)) == 0,
               "bits depend on the threads");
      }
    }
  }
}

// The columns of each row for which `has` holds, as lists that end where their page ends.
struct GuardedLists {
  Guarded<int64_t> span, column;

  template <typename Has>
  GuardedLists(int64_t rows, int64_t columns, const Has& has) : span(2 * rows), column(count(rows, columns, has)) {
    int64_t at = 0;
    for (int64_t row = 0; row < rows; ++row) {
      span[2 * row] = at;
      for (int64_t j = 0; j < columns; ++j) {
        if (has(row, j)) column[at++] = j;
      }
      span[2 * row + 1] = at;
    }
  }
  Lists lists() { return {span.data(), column.data()}; }

 private:
  template <typename Has>
  static size_t count(int64_t rows, int64_t columns, const Has& has) {
    size_t n = 0;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t j = 0; j < columns; ++j) n += has(row, j);
    }
    return n;
  }
};

// The objective in place of its scores: lists give the bits that masks give, on one thread as on three, and lists of
// nonsense lead nowhere outside.
template <typename T>
void check_objective(ScoreType type, int64_t rows, int64_t columns, unsigned seed) {
  std::mt19937 random(seed);
  const auto uniform = [&] { return std::uniform_real_distribution<double>(0, 1)(random); };
  std::vector<T> original(rows * columns);
  std::vector<uint8_t> target(rows * columns), ignore(rows * columns);
  const double density[] = {0.0, 0.01, 0.2, 1.0};
  for (int64_t i = 0; i < rows * columns; ++i) {
    original[i] = static_cast<T>(std::round((uniform() - 0.5) * 128) / 64);
    if (seed % 4 == 3 && uniform() < 0.01) original[i] = static_cast<T>(uniform() < 0.5 ? NAN : INFINITY);
    target[i] = uniform() < density[seed / 2 % 4];
    ignore[i] = uniform() < 0.1;
  }
  const int64_t own = seed % 3 ? 1 : -1;
  GuardedLists positive(rows, columns, [&](int64_t row, int64_t j) { return target[row * columns + j] != 0; });
  GuardedLists left_out(rows, columns, [&](int64_t row, int64_t j) { return ignore[row * columns + j] != 0; });
  GuardedLists negative(rows, columns, [&](int64_t row, int64_t j) { return (row + j) % 3 != 0; });
  Relation listed;
  listed.positive = positive.lists();
  listed.left_out = left_out.lists();
  if (seed % 5 == 0) listed.negative = negative.lists();
  listed.own = own;
  for (int64_t row = 0; row < rows; ++row) {
    if (own >= 0 && own + row < columns) ignore[row * columns + own + row] = 1;
    for (int64_t j = 0; j < columns && seed % 5 == 0; ++j) {
      if (!target[row * columns + j] && (row + j) % 3 == 0) ignore[row * columns + j] = 1;
    }
  }
  Relation masks;
  masks.target = target.data();
  masks.ignore = ignore.data();
  masks.target_stride = masks.ignore_stride = columns;
  Relation nonsense = listed;
  GuardedLists wild(rows, columns, [&](int64_t row, int64_t j) { return (row * 7 + j) % 3 == 0; });
  const int64_t values[] = {INT64_MIN, INT64_MAX, -1, columns, columns + 1, -4096, 0, columns - 1};
  for (size_t i = 0; i < wild.column.size(); ++i) wild.column[i] = values[random() % 8];
  nonsense.positive = wild.lists();
  nonsense.left_out = wild.lists();

  std::vector<double> weight(3 * rows);
  for (double& w : weight) w = uniform() - 0.2;
  Guarded<T> scores(rows * columns);
  for (int64_t surrogate = 0; surrogate < 2; ++surrogate) {
    const SurrogateSettings settings = {surrogate, 0.01, 100.0, 0.05, 0.5, 1.49};
    for (const Objective& objective :
         {Objective{true, true, 0.9, 0.6}, Objective{true, false, 0, 0}, Objective{false, true, 0.5, -0.5}}) {
      std::vector<T> first_gradient;
      std::vector<double> first_value;
      for (const Relation* relation : {&masks, &listed, &nonsense}) {
        for (int workers : {1, 3}) {
          std::copy(original.begin(), original.end(), scores.data());
          Guarded<double> value(5 * rows);
          std::fill(value.data(), value.data() + 5 * rows, 0.0);
          const Matrix m = {scores.data(), type, rows, columns, columns, *relation};
          objective_rows<T>(m, settings, objective, threads(workers), {weight.data(), value.data(), scores.data()});
          if (relation == &nonsense) continue;
          if (first_value.empty()) {
            first_value.assign(value.data(), value.data() + 5 * rows);
            first_gradient.assign(scores.data(), scores.data() + rows * columns);
          }
          expect(std::memcmp(first_value.data(), value.data(), 5 * rows * sizeof(double)) == 0, "values differ");
          expect(std::memcmp(first_gradient.data(), scores.data(), rows * columns * sizeof(T)) == 0,
                 "gradients of masks and lists, or of one thread and three, differ");
        }
      }
    }
  }
}

// What surrounds the matrix products.
template <typename T>
void check_embeddings(int64_t n, unsigned seed) {
  std::mt19937 random(seed);
  const auto uniform = [&] { return std::uniform_real_distribution<double>(-1, 1)(random); };
  std::vector<T> original(n * n);
  for (T& value : original) value = static_cast<T>(uniform());
  Guarded<T> matrix(n * n), x(n * n), scale(n);
  for (int workers : {1, 3}) {
    std::copy(original.begin(), original.end(), matrix.data());
    symmetrise<T>(matrix.data(), n, threads(workers));
    for (int64_t i = 0; i < n * n; ++i) {
      expect(matrix[i] == original[i] + original[i % n * n + i / n], "a matrix and its transpose");
    }
    for (int64_t i = 0; i < n; ++i) scale[i] = i % 5 ? static_cast<T>(1.0 / (1 + i)) : T(0);
    for (int64_t i = 0; i < n * n; ++i) x[i] = static_cast<T>(uniform());
    std::copy(original.begin(), original.end(), matrix.data());
    remove_radial<T>(matrix.data(), x.data(), n, scale.data(), n, n, threads(workers));
    for (int64_t i = 0; i < n; ++i) {
      double dot = 0;
      for (int64_t j = 0; j < n; ++j) dot += static_cast<double>(original[i * n + j]) * x[i * n + j];
      for (int64_t j = 0; j < n; ++j) {
        const double expected = original[i * n + j] - x[i * n + j] * dot * scale[i] * scale[i];
        expect(std::fabs(matrix[i * n + j] - expected) < 1e-4, "the radial part is removed");
      }
    }
  }
  prefault(matrix.data(), static_cast<int64_t>(n * n * sizeof(T)), threads(3));

  Guarded<int64_t> values(n), references(2 * n), span(2 * n), column(2 * n);
  const uint64_t steps[] = {1, 102334155, uint64_t(1) << 54, 0x9E3779B97F4A7C15u};
  for (int64_t i = 0; i < 2 * n; ++i) references[i] = static_cast<int64_t>(random() % (n + 1) * steps[seed % 4]);
  for (int64_t i = 0; i < n; ++i) values[i] = static_cast<int64_t>(random() % (n + 1) * steps[seed % 4]);
  equal_lists(values.data(), n, references.data(), 2 * n, span.data(), column.data());
  for (int64_t i = 0; i < n; ++i) {
    int64_t at = span[2 * i];
    for (int64_t j = 0; j < 2 * n; ++j) {
      if (references[j] == values[i]) expect(at < span[2 * i + 1] && column[at++] == j, "a list has what is equal");
    }
    expect(at == span[2 * i + 1], "and nothing else");
  }
}

// The metrics: lists give what masks give, on one thread as on three; the smallest rank is what a count gives; nonsense
// leads nowhere outside.
template <typename T>
void check_ranking(ScoreType type, int64_t rows, int64_t columns, unsigned seed) {
  std::mt19937 random(seed);
  const auto uniform = [&] { return std::uniform_real_distribution<double>(0, 1)(random); };
  const double special[] = {INFINITY, -INFINITY, 3e38, -3e38, 1e-40, -1e-40, 0.0, -0.0};
  const double density[] = {0.0, 0.01, 0.2, 1.0};
  Guarded<T> scores(rows * columns);
  Guarded<uint8_t> target(rows * columns), ignore(rows * columns);
  for (int64_t i = 0; i < rows * columns; ++i) {
    // Ties; nearly all in one bucket; or spread out.
    const double value = uniform() - 0.5;
    scores[i] = static_cast<T>(seed % 3 == 0 ? std::round(value * 64) : seed % 3 == 1 ? 0.5 + value * 1e-6 : value);
    if (seed % 2 && uniform() < 0.02) scores[i] = static_cast<T>(special[random() % 8]);
    if (seed % 5 == 4 && uniform() < 0.5 / static_cast<double>(columns)) scores[i] = static_cast<T>(NAN);
    target[i] = uniform() < density[seed / 2 % 4];
    ignore[i] = uniform() < 0.1;
  }
  const auto at = [&](int64_t row, int64_t j) { return row * columns + j; };
  GuardedLists positive(rows, columns, [&](int64_t row, int64_t j) { return target[at(row, j)] != 0; });
  GuardedLists left_out(rows, columns, [&](int64_t row, int64_t j) { return ignore[at(row, j)] != 0; });
  Relation listed, masks;
  listed.positive = positive.lists();
  listed.left_out = left_out.lists();
  listed.own = seed % 2 ? 1 : -1;
  for (int64_t row = 0; seed % 2 && row < rows && row + 1 < columns; ++row) ignore[at(row, row + 1)] = 1;
  masks.target = target.data();
  masks.ignore = ignore.data();
  masks.target_stride = masks.ignore_stride = columns;
  Relation nonsense = listed;
  GuardedLists wild(rows, columns, [&](int64_t row, int64_t j) { return (row * 7 + j) % 3 == 0; });
  const int64_t values[] = {INT64_MIN, INT64_MAX, -1, columns, columns + 1, -4096, 0, columns - 1};
  for (size_t i = 0; i < wild.column.size(); ++i) wild.column[i] = values[random() % 8];
  nonsense.positive = nonsense.left_out = wild.lists();
  std::vector<double> first;
  for (const Relation* relation : {&masks, &listed, &nonsense}) {
    for (int workers : {1, 3}) {
      Guarded<double> out(kRankValues * rows);
      rank_metrics<T>({scores.data(), type, rows, columns, columns, *relation}, threads(workers), out.data());
      if (relation == &nonsense) continue;
      if (first.empty()) first.assign(out.data(), out.data() + kRankValues * rows);
      expect(std::memcmp(first.data(), out.data(), first.size() * sizeof(double)) == 0,
             "metrics of masks and lists, or of one thread and three, differ");
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    double best = -INFINITY, rank = 0;
    bool any = false, nan = false;
    for (int64_t j = 0; j < columns; ++j) {
      if (ignore[at(row, j)]) continue;
      nan |= scores[at(row, j)] != scores[at(row, j)];
      if (!target[at(row, j)]) continue;
      any = true;
      best = std::max(best, static_cast<double>(scores[at(row, j)]));
    }
    for (int64_t j = 0; j < columns; ++j) rank += !ignore[at(row, j)] && scores[at(row, j)] >= best;
    const double found = first[kRankValues * row + 3];
    expect(!any ? std::isinf(found) : nan ? std::isnan(found) : found == rank, "the smallest rank of a positive");
  }
}

}  // namespace

int main() {
  unsigned seed = 0, ranking = 0, cases = 0;              // seeds apart: each kind of check meets all its kinds of data
  const char* const few = std::getenv("ROADMAP_ROUNDS");  // 6: `make asan`; the tests have less time
  for (int round = 0; round < (few ? std::atoi(few) : 6); ++round) {
    for (int64_t columns : {1, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 129, 300, 4095, 4096, 4097, 4128, 8193}) {
      const int64_t rows = columns > 1000 ? 2 : 5;
      check<float, float>(ScoreType::kFloat, rows, columns, seed++);
      check<double, double>(ScoreType::kDouble, rows, columns, seed++);
      check<uint16_t, float>(ScoreType::kHalf, rows, columns, seed++);
      check<uint16_t, float>(ScoreType::kBFloat16, rows, columns, seed++);
      check_objective<float>(ScoreType::kFloat, rows, columns, seed++);
      check_objective<double>(ScoreType::kDouble, rows, columns, seed++);
      check_ranking<float>(ScoreType::kFloat, rows, columns, ranking);
      check_ranking<double>(ScoreType::kDouble, rows, columns, ranking++);
      cases += 8;
    }
  }
  check<float, float>(ScoreType::kFloat, 1, 140001, 2);  // spans of columns; 1 % positives
  check<float, float>(ScoreType::kFloat, 1, 140001, 3);
  check_objective<float>(ScoreType::kFloat, 2, 140001, 2);
  check_objective<float>(ScoreType::kFloat, 2, 140001, 10);
  for (unsigned own : {2, 3, 4, 5, 6, 7, 11}) check_ranking<float>(ScoreType::kFloat, 2, 140001, own);
  cases += 9;
  for (unsigned kind = 0; kind < 20; ++kind) {  // 20,001 columns: three threads share a row
    for (int64_t columns : {301, 2048, 4097, 20001}) {
      if (columns > 5000 && kind % 5) continue;
      check_sorted(2, columns, kind);
      ++cases;
    }
  }
  for (unsigned kind = 20; kind < 28; ++kind) check_sorted(1, 20001, kind);
  cases += 8;
  for (int64_t n : {1, 7, 16, 17, 31, 32, 33, 65, 130}) {
    check_embeddings<float>(n, seed++);
    check_embeddings<double>(n, seed++);
    cases += 2;
  }
  std::printf("%s: %u cases, %d failures\n", instruction_set().name, cases + 2, failures);
  return failures != 0;
}
