// The ops on rows of scores on the CPU. Know nothing of torch.
//
// Each takes every row through the five steps of row.h. With many positives the pairwise kernels give
// way to the sorted scan (scan.h). Bits of a result do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "parallel.h"

namespace roadmap {

enum class ScoreType { kHalf, kBFloat16, kFloat, kDouble };

// A list of columns for each row, ascending.
struct Lists {
  const int64_t* span = nullptr;    // [rows, 2]  begin and end within column
  const int64_t* column = nullptr;  // null: there are none of this kind
};

constexpr int kMostLevels = 16;

// Which pairs are positive, negative or left out; the last wins. Masks say it, or lists: of either question.
struct Relation {
  const uint8_t* target = nullptr;  // [rows, columns]  0, or the level of a positive; null: lists
  int64_t target_stride = 0;
  const uint8_t* ignore = nullptr;  // [rows, columns]  nonzero: left out; may be null
  int64_t ignore_stride = 0;

  Lists positive, left_out;
  Lists negative;    // null: every other column
  int64_t own = -1;  // row r's own column is own + r and left out; negative for none

  int64_t levels = 1;            // of positives, up to kMostLevels: the higher, the more relevant
  const Lists* finer = nullptr;  // [levels - 1]  of lists: which positives have at least level 2, 3, ...
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
  const double* worth = nullptr;       // [rows, levels]  relevance of each level to a query; null for one level
};

// Which kernels: pairwise meets every positive with every negative in reach; sorted sorts these and reads sums instead.
// Both give the same up to rounding. Auto takes the faster for each row.
enum class Method : int64_t { kAuto = 0, kPairwise = 1, kSorted = 2 };

struct SurrogateSettings {
  int64_t surrogate;
  double tau, rho, delta, start, offset;
  Method method = Method::kAuto;
};

// What the loss is of the ranks of a row's positives. NDCG and H-AP know levels; to the others a positive is one.
enum class Loss : int64_t { kAp = 0, kRecall = 1, kNdcg = 2, kMrr = 3, kHap = 4 };

struct Ranking {
  Loss loss = Loss::kAp;
  double temperature = 1;                // recall: on ranks
  double leak = 0, beta = 0, gamma = 1;  // H-AP: of the step towards higher levels
  bool exponential = true;               // NDCG: an item of relevance r gains 2^r - 1, else r
  std::vector<double> k;                 // recall
};

// Outputs of the op that has scores. T is double for double scores, float for all others.
template <typename T>
struct LossOutput {
  T* loss;  // [rows]
  void*
      gradient;  // [rows, columns]  of `share` times the losses, in the type of the scores, contiguous; null: not wanted
  T* unscale;    // [rows]  half types: gradient times this is the true one; null otherwise
  double share = 1;
};

// The objective of a row: which parts are wanted, the loss of ranks and the calibration loss, and how they are made.
struct Objective {
  bool ranks, calibration;
  double positive_margin, negative_margin;
  Ranking ranking = {};
};

// Outputs of the objective. The gradient is that of the weighted sum of the first three values.
struct ObjectiveOutput {
  const double* weight;  // [rows, 3]  of the loss of ranks, of the sums of positive and of negative hinges
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
void rank_loss_rows(const Matrix&, const SurrogateSettings&, const Ranking&, const Parallel&, const LossOutput<T>&);
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
