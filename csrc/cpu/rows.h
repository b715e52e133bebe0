// The ops on rows of scores on the CPU. Know nothing of torch.
//
// Each takes every row through the five steps of row.h. With many positives the pairwise kernels give
// way to the sorted scan (scan.h). Bits of a result do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace roadmap {

enum class ScoreType { kHalf, kBFloat16, kFloat, kDouble };

// A list of columns for each row, ascending.
struct Lists {
  const int64_t* span = nullptr;    // [rows, 2]  begin and end within column
  const int64_t* column = nullptr;  // null: there are none of this kind
};

// Which pairs are positive, negative or left out; the last wins. Either masks say it, or lists.
struct Relation {
  const uint8_t* target = nullptr;  // [rows, columns]  nonzero: positive; null: lists
  int64_t target_stride = 0;
  const uint8_t* ignore = nullptr;  // [rows, columns]  nonzero: left out; may be null
  int64_t ignore_stride = 0;

  Lists positive, left_out;
  Lists negative;    // null: every other column
  int64_t own = -1;  // row r's own column is own + r and left out; negative for none
};

// Scores [rows, columns] and what the pairs are. Strides are in elements; columns are contiguous. What is ranked is
// score x column scale x row scale, where these are given (cosines from plain products); gradients are those of the
// scores as they lie.
struct Matrix {
  const void* scores;
  ScoreType type;
  int64_t rows, columns;
  int64_t score_stride;
  Relation relation;
  const void* row_scale = nullptr;     // [rows]  null for 1; scales have the type of the scores, float or double
  const void* column_scale = nullptr;  // [columns]  null if and only if row_scale is
};

// Which kernels: pairwise meets every positive with every negative in reach; sorted sorts these and reads sums instead.
// Both give the same up to rounding. Auto takes the faster for each row.
enum class Method : int64_t { kAuto = 0, kPairwise = 1, kSorted = 2 };

struct SurrogateSettings {
  int64_t surrogate;
  double tau, rho, delta, start, offset;
  Method method = Method::kAuto;
};

// Outputs of the average-precision op. T is double for double scores, float for all others.
template <typename T>
struct ApOutput {
  T* loss;  // [rows]
  void*
      gradient;  // [rows, columns]  of `share` times the losses, in the type of the scores, contiguous; null: not wanted
  T* unscale;    // [rows]  half types: gradient times this is the true one; null otherwise
  double share = 1;
};

// The ROADMAP objective of a row: which parts are wanted, and the margins of the calibration loss.
struct Objective {
  bool ap, calibration;
  double positive_margin, negative_margin;
};

// Outputs of the objective. The gradient is that of the weighted sum of the first three values.
struct ObjectiveOutput {
  const double* weight;  // [rows, 3]  of the AP loss, of the sums of positive and of negative hinges
  double* value;         // [rows, 5]  these three, then how many hinges of each kind are not 0
  void* gradient;        // [rows, columns]  may be the scores themselves where these are contiguous; null: not wanted
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

template <typename T>
void average_precision_rows(const Matrix&, const SurrogateSettings&, const Parallel&, const ApOutput<T>&);
template <typename T>  // scores of type T alone
void objective_rows(const Matrix&, const SurrogateSettings&, const Objective&, const Parallel&, const ObjectiveOutput&);
template <typename T>
void smooth_rank_rows(const Matrix&, const SurrogateSettings&, const Parallel&, const RankOutput<T>&);
template <typename T>
void smooth_rank_gradient_rows(const Matrix&, const SurrogateSettings&, const Parallel&, const RankGradient<T>&);

// How many rows have a positive.
int64_t count_rows_with_positive(const Relation&, int64_t rows, int64_t columns, const Parallel&);

// Positives and negatives of each row, [rows, 2].
void count_pairs(const Relation&, int64_t rows, int64_t columns, const Parallel&, int64_t* counts);

// out = factor[row] * gradient, both [rows, columns] of one type.
template <typename T>
void scale_rows(const void* gradient, ScoreType, int64_t rows, int64_t columns, const double* factor, const Parallel&,
                void* out);

}  // namespace roadmap
