// What each op does with its rows, and how rows are divided among threads: see rows.h. The steps of a row are in row.h.
#include "rows.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "graded.h"
#include "half.h"
#include "kernels.h"
#include "relation.h"
#include "row.h"
#include "weights.h"
#include "workspace.h"

namespace roadmap {
namespace {

// The loss of a row whose positives are all of one level, and the weights of its ranks.
template <typename T>
double weigh(Row<T>& row, const Pass<T>& pass) {
  if (row.nan) return std::numeric_limits<double>::quiet_NaN();
  const int64_t size = row.size();
  if (!size) return 0;
  row.second.resize(pass.smooth ? size : 0);
  Weights weights = {row.p.weight.data(), pass.smooth ? row.second.data() : nullptr};
  const Ranking& ranking = pass.objective.ranking;
  const std::vector<T>& score = row.p.score;
  Ranked ranked = {row.rank_positive.data(), row.rank_negative.data(), size, size, 0};
  double loss = 0;
  switch (ranking.loss) {
    case Loss::kAp:
    case Loss::kHap:  // which is AP, then
      loss = pass.kernels.ap_weights(ranked.positive, ranked.negative, size, weights.negative, weights.positive,
                                     weights.largest) /
             static_cast<double>(size);
      break;
    case Loss::kRecall: loss = 1 - recall_weights(ranking, ranked, weights); break;
    case Loss::kNdcg:
      ranked.all = discounts(size);
      loss = 1 - ndcg_weights(ranked, weights);
      break;
    case Loss::kMrr:
      while (ranked.highest < size && score[size - 1 - ranked.highest] == score[size - 1]) ++ranked.highest;
      loss = 1 - mrr_weights(ranked, weights);
      break;
  }
  row.set_weights(pass.smooth, weights.largest);
  return loss;
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

// Many rows: a thread does a whole row. Few long ones: all threads share the steps of one row after the other.
template <typename T, typename Each>
void run_rows(const Pass<T>& pass, const Parallel& parallel, const Each& each) {
  const int64_t rows = pass.input.rows();
  std::vector<Leased<Workspace<T>>> spaces(parallel.workers);
  if (parallel.workers > 1 && rows < 4 * parallel.workers && pass.input.columns() >= 2 * kBlock) {
    for (int64_t row = 0; row < rows; ++row) each(row, parallel, spaces[0].get());
    return;
  }
  const Parallel alone;
  parallel.run(rows, [&](int64_t row, int worker) { each(row, alone, spaces[worker].get()); });
}

// The same, where rows may have positives of several levels: level_row(graded, index) is called for those, and
// weigh(row, index) for all others.
template <typename T, typename LevelRow, typename WeighRow>
void run_rows_of_levels(const Matrix& m, const SurrogateSettings& settings, const Pass<T>& pass,
                        const Parallel& parallel, const LevelRow& level_row, const WeighRow& weigh_row) {
  const Loss loss = pass.objective.ranking.loss;
  const bool graded = pass.objective.ranks && m.relation.levels > 1 && (loss == Loss::kNdcg || loss == Loss::kHap);
  run_rows(pass, parallel, [&](int64_t index, const Parallel& sharing, Workspace<T>& space) {
    if (graded) {
      GradedRow<T> row(m, settings, pass, sharing, space);
      if (row.mark(index)) return level_row(row, index);
    }
    RowSteps<T>(pass, sharing, space).run(index, [&](Row<T>& row) { weigh_row(row, index); });
  });
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
void rank_loss_rows(const Matrix& m, const SurrogateSettings& settings, const Ranking& ranking,
                    const Parallel& parallel, const LossOutput<T>& out) {
  const Objective alone = {true, false, 0, 0, ranking};
  const Pass<T> pass(m, settings, alone, true, out.gradient, out.gradient, out.unscale);
  run_rows_of_levels(
      m, settings, pass, parallel,
      [&](GradedRow<T>& row, int64_t index) { out.loss[index] = static_cast<T>(row.run(out.share, [](Row<T>&) {})); },
      [&](Row<T>& row, int64_t index) {
        row.scale = out.share;
        out.loss[index] = static_cast<T>(weigh(row, pass));
      });
}

template <typename T>
void objective_rows(const Matrix& m, const SurrogateSettings& settings, const Objective& objective,
                    const Parallel& parallel, const ObjectiveOutput& out) {
  const Pass<T> pass(m, settings, objective, objective.ranks, objective.ranks && out.gradient, out.gradient);
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  const auto calibrate = [&](Row<T>& row, int64_t index) {
    const double* const weight = out.weight + 3 * index;
    double* const value = out.value + 5 * index;
    row.positive_weight = weight[1];
    row.negative_weight = weight[2];
    // Nothing of a row with a NaN counts: what it has summed depends on where it met the NaN.
    const HingeSum none = {kNan, 0};
    const HingeSum below = row.nan ? none : positive_hinges(row, objective);
    const HingeSum above = row.nan ? none : negative_hinges(row, objective);
    row.negative_hinges = above.count;
    value[1] = below.sum;
    value[2] = above.sum;
    value[3] = static_cast<double>(below.count);
    value[4] = static_cast<double>(above.count);
  };
  run_rows_of_levels(
      m, settings, pass, parallel,
      [&](GradedRow<T>& row, int64_t index) {
        out.value[5 * index] = row.run(out.weight[3 * index], [&](Row<T>& hinged) { calibrate(hinged, index); });
      },
      [&](Row<T>& row, int64_t index) {
        row.scale = out.weight[3 * index];
        out.value[5 * index] = objective.ranks ? weigh(row, pass) : row.nan ? kNan : 0;
        if (objective.calibration) calibrate(row, index);
      });
}

template <typename T>
void smooth_rank_rows(const Matrix& m, const SurrogateSettings& settings, const Parallel& parallel,
                      const RankOutput<T>& out) {
  const Objective ranks = {true, false, 0, 0};
  const Pass<T> pass(m, settings, ranks, true, out.slope, nullptr);
  const auto write = [&](Row<T>& row) {
    constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
    row.place(m.columns);
    for (int64_t i = 0; i < row.size(); ++i) {
      const int64_t k = row.ordinal[i], at = out.first[row.index] + k;
      out.query[at] = row.index;
      out.reference[at] = row.column[k];
      out.positive_rank[at] = row.nan ? kNan : static_cast<T>(row.rank_positive[i]);
      out.negative_rank[at] = row.nan ? kNan : static_cast<T>(row.rank_negative[i]);
      if (out.slope) out.slope[at] = row.nan ? kNan : static_cast<T>(row.slope[i]);
    }
  };
  run_rows(pass, parallel, [&](int64_t index, const Parallel& sharing, Workspace<T>& space) {
    RowSteps<T>(pass, sharing, space).run(index, write);
  });
}

template <typename T>
void smooth_rank_gradient_rows(const Matrix& m, const SurrogateSettings& settings, const Parallel& parallel,
                               const RankGradient<T>& in) {
  const Objective ranks = {true, false, 0, 0};
  const Pass<T> pass(m, settings, ranks, false, false, in.gradient);
  const auto read = [&](Row<T>& row) {
    const int64_t first = in.first[row.index];
    row.place(m.columns);
    for (int64_t i = 0; i < row.size(); ++i) {
      const T slope = in.slope[first + row.ordinal[i]];
      row.slope[i] = static_cast<double>(slope);
      row.nan |= slope != slope;  // the forward pass met a NaN score
    }
    double largest = 0;
    row.second.resize(pass.smooth ? row.size() : 0);
    for (int64_t i = 0; i < row.size(); ++i) {
      const int64_t at = first + row.ordinal[i];
      row.p.weight[i] = in.negative_weight[at];
      if (pass.smooth) row.second[i] = in.positive_weight ? in.positive_weight[at] : 0;
      largest = std::max({largest, std::fabs(row.p.weight[i]), pass.smooth ? std::fabs(row.second[i]) : 0.0});
    }
    row.set_weights(pass.smooth, largest);
  };
  run_rows(pass, parallel, [&](int64_t index, const Parallel& sharing, Workspace<T>& space) {
    RowSteps<T>(pass, sharing, space).run(index, read);
  });
}

int64_t count_rows_with_positive(const Relation& relation, int64_t rows, int64_t columns, const Parallel& parallel) {
  const PairMasks masks(relation, instruction_set().conversions);
  std::vector<char> has(rows);
  parallel.run(rows, [&](int64_t row, int) {
    BlockMasks bits;
    for (int64_t at = 0; at < columns && !has[row]; at += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, columns - at));
      masks.fill(row, at, count, bits);
      has[row] = std::any_of(bits.positive, bits.positive + divide_up(count, 64), [](uint64_t word) { return word; });
    }
  });
  return std::count(has.begin(), has.end(), 1);
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
  template void rank_loss_rows<T>(const Matrix&, const SurrogateSettings&, const Ranking&, const Parallel&,          \
                                  const LossOutput<T>&);                                                             \
  template void smooth_rank_rows<T>(const Matrix&, const SurrogateSettings&, const Parallel&, const RankOutput<T>&); \
  template void smooth_rank_gradient_rows<T>(const Matrix&, const SurrogateSettings&, const Parallel&,               \
                                             const RankGradient<T>&);                                                \
  template void objective_rows<T>(const Matrix&, const SurrogateSettings&, const Objective&, const Parallel&,        \
                                  const ObjectiveOutput&);                                                           \
  template void scale_rows<T>(const void*, ScoreType, int64_t, int64_t, const double*, const Parallel&, void*);
ROADMAP_INSTANTIATE(float)
ROADMAP_INSTANTIATE(double)

}  // namespace roadmap
