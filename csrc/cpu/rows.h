// The row op on the CPU: what happens to a row, and how rows are dealt to threads. Knows nothing of torch.
//
// A row goes through five steps: its positives are collected and sorted; every block of its columns adds to their
// ranks; ranks become weights; every block gets its gradient. Many rows: a thread does a whole row. Few rows: all
// threads share the steps of one row, split by columns and by positives. Either way each sum is taken over fixed spans
// of columns in fixed order, so the bits of a result do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <functional>

namespace roadmap {

enum class ScoreType { kHalf, kBFloat16, kFloat, kDouble };

// Scores [rows, columns] and the masks that say what each pair is. Strides are in elements; columns are contiguous.
struct Matrix {
  const void* scores;
  ScoreType type;
  int64_t rows, columns;
  int64_t score_stride;
  const uint8_t* target;  // nonzero: positive
  int64_t target_stride;
  const uint8_t* ignore;  // nonzero: left out, positive or not; may be null
  int64_t ignore_stride;
};

struct SurrogateSettings {
  int64_t surrogate;
  double tau, rho, delta, start, offset;
};

// Outputs of the average-precision op. T is double for double scores, float for all others.
template <typename T>
struct ApOutput {
  T* loss;             // [rows]
  int64_t* positives;  // [rows]
  void* gradient;      // [rows, columns] in the type of the scores, contiguous; null when not wanted
  T* unscale;          // [rows]  half types: gradient times this is the true one; null otherwise
};

// Of smooth_rank: one entry a positive, row after row, columns ascending.
template <typename T>
struct RankOutput {
  const int64_t* first;  // [rows + 1]  where a row's entries begin
  int64_t* query;        // [nnz]
  int64_t* reference;    // [nnz]
  T* positive_rank;      // [nnz]
  T* negative_rank;      // [nnz]
  T* slope;  // [nnz]  minus the derivative of negative_rank by the positive's own score; null when not wanted
};

template <typename T>
struct RankGradient {
  const int64_t* first;      // [rows + 1]
  const T* slope;            // [nnz]  from the forward pass
  const T* positive_weight;  // [nnz]  gradient that arrives at positive_rank; null for none
  const T* negative_weight;  // [nnz]
  void* gradient;            // [rows, columns]
};

// Runs task(index, worker) for every index below tasks, each once, workers below `workers` in parallel.
struct Parallel {
  int workers;
  std::function<void(int64_t tasks, const std::function<void(int64_t, int)>&)> run;
};

template <typename T>
void average_precision_rows(const Matrix&, const SurrogateSettings&, const Parallel&, const ApOutput<T>&);
template <typename T>
void smooth_rank_rows(const Matrix&, const SurrogateSettings&, const Parallel&, const RankOutput<T>&);
template <typename T>
void smooth_rank_gradient_rows(const Matrix&, const SurrogateSettings&, const Parallel&, const RankGradient<T>&);

// first[r + 1] - first[r] is the number of positives of row r; first[0] = 0.
void count_positives(const Matrix&, const Parallel&, int64_t* first);

// out = factor[row] * gradient, both [rows, columns] of one type.
template <typename T>
void scale_rows(const void* gradient, ScoreType, int64_t rows, int64_t columns, const double* factor, const Parallel&,
                void* out);

}  // namespace roadmap
