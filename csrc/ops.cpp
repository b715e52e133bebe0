// The ops on the CPU: checks, allocation and the choice of element type. Python checks its arguments first and words
// errors for people; the checks here keep memory safe whoever calls.
#include <atomic>
#include <cmath>
#include <exception>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/embeddings.h"
#include "cpu/metrics.h"
#include "cpu/relation.h"
#include "cpu/rows.h"
#include "tensors.h"

namespace {

using roadmap::Matrix;
using roadmap::Parallel;
using roadmap::ScoreType;
using namespace roadmap::ops;

// A Matrix and the tensors that keep its memory alive.
struct Input {
  Tensor scores, target;
  std::optional<Tensor> ignore, worth;
  Matrix matrix;

  // t: bool, or levels of uint8 if there is what they are worth, w [rows, levels] float64.
  Input(const Tensor& s, const Tensor& t, const std::optional<Tensor>& i, const std::optional<Tensor>& w = std::nullopt)
      : scores((check(s, t, i, w), dense_columns(s))), target(dense_columns(t)) {
    if (i) ignore = dense_columns(*i);
    if (w) worth = as_contiguous(*w);
    matrix.scores = scores.const_data_ptr();
    matrix.type = score_type(scores);
    matrix.rows = scores.size(0);
    matrix.columns = scores.size(1);
    matrix.score_stride = scores.stride(0);
    roadmap::Relation& relation = matrix.relation;
    relation.target = static_cast<const uint8_t*>(target.const_data_ptr());
    relation.target_stride = target.stride(0);
    relation.ignore = ignore ? static_cast<const uint8_t*>(ignore->const_data_ptr()) : nullptr;
    relation.ignore_stride = ignore ? ignore->stride(0) : 0;
    relation.levels = worth ? worth->size(1) : 1;
    matrix.worth = worth ? data<double>(*worth) : nullptr;
  }

 private:
  static void check(const Tensor& s, const Tensor& t, const std::optional<Tensor>& i, const std::optional<Tensor>& w) {
    STD_TORCH_CHECK(s.dim() == 2 && s.is_cpu(), "scores must be a 2-D CPU tensor");
    STD_TORCH_CHECK(s.size(1) < (int64_t(1) << 32), "scores must have less than 2^32 columns, got ", s.size(1));
    check_mask(s, t, "target", w ? ScalarType::Byte : ScalarType::Bool);
    if (i) check_mask(s, *i, "ignore", ScalarType::Bool);
    if (w) check_worth(*w, s.size(0));
  }
  static void check_mask(const Tensor& s, const Tensor& mask, const char* name, ScalarType type) {
    STD_TORCH_CHECK(mask.dim() == 2 && mask.is_cpu() && mask.scalar_type() == type && mask.size(0) == s.size(0) &&
                        mask.size(1) == s.size(1),
                    name, " must be a bool CPU tensor of the shape of scores (target: uint8 where there are levels)");
  }
};

// Pairs from lists, and the tensors that keep its memory alive.
struct Listed {
  std::vector<Tensor> alive;
  std::vector<std::vector<int64_t>> spans;  // copies: what has been checked must not change through another tensor
  std::vector<roadmap::Lists> finer;
  roadmap::Relation relation;
  const double* worth = nullptr;

  Listed(int64_t rows, int64_t columns, const PairLists& pairs) {
    spans.reserve(3 + pairs.finer.size());  // whose addresses are handed out
    if (pairs.worth) {
      check_worth(*pairs.worth, rows);
      alive.push_back(as_contiguous(*pairs.worth));
      worth = data<double>(alive.back());
      relation.levels = pairs.worth->size(1);
    }
    STD_TORCH_CHECK(pairs.finer.empty() || static_cast<int64_t>(pairs.finer.size()) + 1 == relation.levels,
                    "worth must have a column for each level");
    STD_TORCH_CHECK(pairs.worth.has_value() <= (pairs.level.has_value() || !pairs.finer.empty()),
                    "worth is that of levels");
    if (pairs.level) {
      const Tensor& level = *pairs.level;
      STD_TORCH_CHECK(
          level.is_cpu() && level.dim() == 2 && level.size(0) == rows && level.size(1) == columns &&
              level.scalar_type() == (pairs.worth ? ScalarType::Byte : ScalarType::Bool) && pairs.finer.empty(),
          "level must be a CPU tensor [rows, columns] of bool, or of uint8 where there is worth, and alone");
      alive.push_back(dense_columns(level));
      relation.target = static_cast<const uint8_t*>(alive.back().const_data_ptr());
      relation.target_stride = alive.back().stride(0);
    }
    for (const ColumnLists& each : pairs.finer) finer.push_back(lists(rows, each, "finer"));
    relation.finer = finer.data();
    relation.positive = lists(rows, pairs.positive, "positive");
    if (pairs.left_out) relation.left_out = lists(rows, *pairs.left_out, "left_out");
    if (pairs.negative) relation.negative = lists(rows, *pairs.negative, "negative");
    relation.own = pairs.own;
  }

 private:
  roadmap::Lists lists(int64_t rows, const ColumnLists& given, const char* name) {
    const auto& [span, column] = given;
    STD_TORCH_CHECK(span.is_cpu() && span.dim() == 2 && span.size(0) == rows && span.size(1) == 2 &&
                        span.scalar_type() == ScalarType::Long,
                    name, "_span must be a CPU tensor [rows, 2] of int64");
    STD_TORCH_CHECK(column.is_cpu() && column.dim() == 1 && column.scalar_type() == ScalarType::Long, name,
                    "_column must be a 1-D CPU tensor of int64");
    const Tensor dense = as_contiguous(span);
    const auto* const first = rows ? static_cast<const int64_t*>(dense.const_data_ptr()) : nullptr;
    spans.emplace_back(first, first + 2 * rows);
    const std::vector<int64_t>& own = spans.back();
    for (int64_t row = 0; row < rows; ++row) {
      STD_TORCH_CHECK(0 <= own[2 * row] && own[2 * row] <= own[2 * row + 1] && own[2 * row + 1] <= column.numel(), name,
                      "_span must lie within ", name, "_column");
    }
    alive.push_back(as_contiguous(column));
    // An empty tensor may have no memory, and null says that there is no such list at all.
    static const int64_t none = 0;
    return {own.data(), column.numel() ? static_cast<const int64_t*>(alive.back().const_data_ptr()) : &none};
  }
};

// torch's own threads. Each starts on its own share of the tasks, so that the rows which an op wrote are in the cache
// of the thread that reads them next, and then takes from the shares of others: rows differ in cost. Few elements are
// not worth waking them.
Parallel torch_threads(int64_t elements) {
  Parallel parallel;
  if (elements < 8192) return parallel;
  const int workers = static_cast<int>(std::max<uint32_t>(1, torch::stable::get_num_threads()));
  parallel.workers = workers;
  parallel.share = [workers](int64_t tasks, const std::function<void(int64_t, int)>& task) {
    const int64_t shares = std::min<int64_t>(workers, tasks);
    struct alignas(64) Counter {
      std::atomic<int64_t> next;
    };
    const std::unique_ptr<Counter[]> counters(new Counter[shares]);
    for (int64_t share = 0; share < shares; ++share) counters[share].next = tasks * share / shares;
    const auto work = [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        for (int64_t turn = 0; turn < shares; ++turn) {
          const int64_t share = (worker + turn) % shares, last = tasks * (share + 1) / shares;
          for (int64_t index; (index = counters[share].next.fetch_add(1)) < last;) {
            task(index, static_cast<int>(worker));
          }
        }
      }
    };
    // Carried out by hand: the stable ABI would lose what it was.
    std::exception_ptr failure;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
      try {
        work(begin, end);
      } catch (...) {
        if (!failed.test_and_set()) failure = std::current_exception();
      }
    });
    if (failure) std::rethrow_exception(failure);
  };
  return parallel;
}

std::tuple<Tensor, Tensor, Tensor> rank_loss(Tensor scores, Tensor level, std::optional<Tensor> worth,
                                             std::optional<Tensor> ignore, std::vector<double> objective,
                                             int64_t reduction, bool want_gradient, int64_t method) {
  const EmbeddingObjective wanted = objective_of(objective, method);
  STD_TORCH_CHECK(reduction == kNone || reduction == kMean || reduction == kSum,
                  "reduction must be 0 (none), 1 (mean) or 2 (sum), got ", reduction);
  const Input input(scores, level, ignore, worth);
  const Matrix& m = input.matrix;
  const bool half = is_half(m.type), each = reduction == kNone;
  const ScalarType type = accumulation(scores);
  Tensor loss = empty(scores, {m.rows}, type);
  Tensor reduced = each ? loss : empty(scores, {}, type);
  Tensor gradient = want_gradient ? empty(scores, {m.rows, m.columns}, scores.scalar_type())
                                  : empty(scores, {0, 0}, scores.scalar_type());
  Tensor factor = empty(scores, {!want_gradient ? 0 : half ? m.rows : 1}, type);
  const auto parallel = torch_threads(m.rows * m.columns);
  // The mean is over queries with a positive; the others have loss 0.
  const int64_t count =
      reduction == kMean ? roadmap::count_rows_with_positive(m.relation, m.rows, m.columns, parallel) : 1;
  const double share = 1.0 / static_cast<double>(std::max<int64_t>(count, 1));
  dispatch(scores, [&](auto zero) {
    using T = decltype(zero);
    T* const factors = data<T>(factor);
    std::fill(factors, factors + factor.numel(), T(1));
    void* const out = data<void>(gradient);
    roadmap::rank_loss_rows<T>(m, wanted.surrogate, wanted.parts.ranking, parallel,
                               {data<T>(loss), out, out && half ? factors : nullptr, share});
    if (each) return;
    double sum = 0;  // in row order
    for (int64_t row = 0; row < m.rows; ++row) sum += static_cast<double>(data<T>(loss)[row]);
    *data<T>(reduced) = static_cast<T>(sum * share);
  });
  return {reduced, gradient, factor};
}

// out = weight * factor * gradient, row by row; out may be the gradient itself.
void scale_rows_into(const Tensor& gradient, const Tensor& weight, const Tensor& factor, Tensor out) {
  STD_TORCH_CHECK(gradient.dim() == 2 && gradient.is_cpu() && gradient.is_contiguous(),
                  "gradient must be a contiguous 2-D CPU tensor");
  const ScoreType type = score_type(gradient);
  const int64_t rows = gradient.size(0), columns = gradient.size(1);
  const auto check = [&](const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == accumulation(gradient) &&
                        (t.numel() == 1 || (t.dim() == 1 && t.size(0) == rows)),
                    name, " must be a CPU tensor, one element or [rows], in the accumulation type of the gradient");
    return as_contiguous(t);
  };
  const Tensor weights = check(weight, "weight"), factors = check(factor, "factor");
  if (!gradient.numel()) return;
  dispatch(gradient, [&](auto zero) {
    using T = decltype(zero);
    const T* const w = data<T>(weights);
    const T* const f = data<T>(factors);
    // In double: the factor of a half type may pass float's range where the result does not.
    std::vector<double> by(rows);
    for (int64_t row = 0; row < rows; ++row) {
      by[row] = static_cast<double>(w[weights.numel() == 1 ? 0 : row]) *
                static_cast<double>(f[factors.numel() == 1 ? 0 : row]);
    }
    const bool same = std::all_of(by.begin(), by.end(), [](double factor) { return factor == 1; });
    if (same && out.const_data_ptr() == gradient.const_data_ptr()) return;
    roadmap::scale_rows<T>(gradient.const_data_ptr(), type, rows, columns, by.data(), torch_threads(rows * columns),
                           out.mutable_data_ptr());
  });
}

Tensor scale_rows(Tensor gradient, Tensor weight, Tensor factor) {
  Tensor out = empty(gradient, gradient.sizes().vec(), gradient.scalar_type());
  scale_rows_into(gradient, weight, factor, out);
  return out;
}

void scale_rows_in_place(Tensor gradient, Tensor weight, Tensor factor) {
  scale_rows_into(gradient, weight, factor, gradient);
}

// Overwrites scores, if a gradient is wanted, with that of the weighted sum of the first three values.
void objective_rows(Tensor scores, Tensor values, std::vector<std::optional<Tensor>> pairs, int64_t own, Tensor weight,
                    std::vector<double> objective, std::optional<Tensor> row_scale, std::optional<Tensor> column_scale,
                    bool want_gradient, std::optional<Tensor> gradient, int64_t method) {
  const EmbeddingObjective wanted = objective_of(objective, method);
  STD_TORCH_CHECK(!gradient, "on the CPU the gradient goes over the scores, and nowhere else");
  STD_TORCH_CHECK(scores.dim() == 2 && scores.is_cpu() && scores.is_contiguous() &&
                      (scores.scalar_type() == ScalarType::Float || scores.scalar_type() == ScalarType::Double),
                  "scores must be a contiguous 2-D CPU tensor of float32 or float64");
  const int64_t rows = scores.size(0);
  const auto check = [&](const Tensor& t, int64_t columns, const char* name) {
    STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.is_contiguous() &&
                        t.scalar_type() == ScalarType::Double,
                    name, " must be a contiguous CPU tensor [rows, ", columns, "] of float64");
  };
  check(values, 5, "values");
  check(weight, 3, "weight");
  const Listed listed(rows, scores.size(1), pairs_of(pairs, own));
  Matrix m = {scores.const_data_ptr(), score_type(scores), rows, scores.size(1), scores.size(1), listed.relation};
  m.worth = listed.worth;
  STD_TORCH_CHECK(row_scale.has_value() == column_scale.has_value(), "row_scale and column_scale come together");
  const auto scale = [&](const Tensor& t, int64_t size, const char* name) {
    STD_TORCH_CHECK(
        t.is_cpu() && t.dim() == 1 && t.size(0) == size && t.is_contiguous() && t.scalar_type() == scores.scalar_type(),
        name, " must be a contiguous 1-D CPU tensor of ", size, " elements and the dtype of scores");
    return t.const_data_ptr();
  };
  if (row_scale && scores.numel()) {
    m.row_scale = scale(*row_scale, m.rows, "row_scale");
    m.column_scale = scale(*column_scale, m.columns, "column_scale");
  }
  dispatch(scores, [&](auto zero) {
    using T = decltype(zero);
    roadmap::objective_rows<T>(m, wanted.surrogate, wanted.parts, torch_threads(m.rows * m.columns),
                               {data<double>(weight), data<double>(values), want_gradient ? data<T>(scores) : nullptr});
  });
}

// matrix + matrix', in its own place.
void symmetrise(Tensor matrix) {
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.is_cpu() && matrix.is_contiguous() && matrix.size(0) == matrix.size(1) &&
                      (matrix.scalar_type() == ScalarType::Float || matrix.scalar_type() == ScalarType::Double),
                  "matrix must be a contiguous square CPU tensor of float32 or float64");
  dispatch(matrix, [&](auto zero) {
    using T = decltype(zero);
    roadmap::symmetrise<T>(data<T>(matrix), matrix.size(0), torch_threads(matrix.numel()));
  });
}

// gradient -= x (x . gradient) scale^2, row by row.
void remove_radial(Tensor gradient, Tensor x, Tensor scale) {
  STD_TORCH_CHECK(gradient.dim() == 2 && gradient.is_cpu() && gradient.is_contiguous() &&
                      (gradient.scalar_type() == ScalarType::Float || gradient.scalar_type() == ScalarType::Double),
                  "gradient must be a contiguous 2-D CPU tensor of float32 or float64");
  STD_TORCH_CHECK(x.dim() == 2 && x.is_cpu() && x.size(0) == gradient.size(0) && x.size(1) == gradient.size(1) &&
                      x.scalar_type() == gradient.scalar_type(),
                  "x must be a CPU tensor of the shape and dtype of gradient");
  STD_TORCH_CHECK(scale.dim() == 1 && scale.is_cpu() && scale.size(0) == gradient.size(0) && scale.is_contiguous() &&
                      scale.scalar_type() == gradient.scalar_type(),
                  "scale must be a contiguous CPU tensor [rows] of the dtype of gradient");
  if (!gradient.numel()) return;
  const Tensor dense = dense_columns(x);
  dispatch(gradient, [&](auto zero) {
    using T = decltype(zero);
    roadmap::remove_radial<T>(data<T>(gradient), static_cast<const T*>(dense.const_data_ptr()), dense.stride(0),
                              static_cast<const T*>(scale.const_data_ptr()), gradient.size(0), gradient.size(1),
                              torch_threads(gradient.numel()));
  });
}

void prefault(Tensor memory) {
  STD_TORCH_CHECK(memory.is_cpu() && memory.is_contiguous(), "memory must be a contiguous CPU tensor");
  const int64_t bytes = memory.numel() * memory.element_size();
  // Smaller memory comes from the heap, mostly with its pages.
  if (bytes >= int64_t(1) << 22) roadmap::prefault(memory.mutable_data_ptr(), bytes, torch_threads(memory.numel()));
}

std::tuple<Tensor, Tensor> equal_lists(Tensor values, Tensor references) {
  const auto check = [](const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.is_cpu() && t.dim() == 1 && t.scalar_type() == ScalarType::Long, name,
                    " must be a 1-D CPU tensor of int64");
    return as_contiguous(t);
  };
  const Tensor of = check(values, "values"), among = check(references, "references");
  Tensor span = empty(of, {of.numel(), 2}, ScalarType::Long), column = empty(of, {among.numel()}, ScalarType::Long);
  roadmap::equal_lists(static_cast<const int64_t*>(of.const_data_ptr()), of.numel(),
                       static_cast<const int64_t*>(among.const_data_ptr()), among.numel(), data<int64_t>(span),
                       data<int64_t>(column));
  return {span, column};
}

// Levels [rows, columns] of relevance, what they stand for [rows, kMostLevels], and how many a row has: see relation.h.
std::tuple<Tensor, Tensor, Tensor> levels_of(Tensor relevance, std::optional<Tensor> ignore) {
  STD_TORCH_CHECK(relevance.dim() == 2 && relevance.is_cpu() &&
                      (relevance.scalar_type() == ScalarType::Float || relevance.scalar_type() == ScalarType::Double),
                  "relevance must be a 2-D CPU tensor of float32 or float64");
  const int64_t rows = relevance.size(0), columns = relevance.size(1);
  STD_TORCH_CHECK(!ignore || (ignore->dim() == 2 && ignore->is_cpu() && ignore->scalar_type() == ScalarType::Bool &&
                              ignore->size(0) == rows && ignore->size(1) == columns),
                  "ignore must be a bool CPU tensor of the shape of relevance");
  const Tensor from = dense_columns(relevance);
  const std::optional<Tensor> ignored = ignore ? std::optional<Tensor>(dense_columns(*ignore)) : std::nullopt;
  Tensor level = empty(from, {rows, columns}, ScalarType::Byte);
  Tensor value = empty(from, {rows, roadmap::kMostLevels}, ScalarType::Double);
  Tensor count = empty(from, {rows}, ScalarType::Long);
  dispatch(from, [&](auto zero) {
    using T = decltype(zero);
    torch_threads(rows * columns).run(rows, [&](int64_t row, int) {
      const uint8_t* const mask =
          ignored && columns ? static_cast<const uint8_t*>(ignored->const_data_ptr()) + row * ignored->stride(0)
                             : nullptr;
      const T* const given = columns ? static_cast<const T*>(from.const_data_ptr()) + row * from.stride(0) : nullptr;
      double* const values = data<double>(value) + row * roadmap::kMostLevels;
      const int found = roadmap::row_levels<T>(given, mask, columns, data<uint8_t>(level) + row * columns, values);
      data<int64_t>(count)[row] = found;
      if (found >= 0) return;
      // Where nobody looks at the count, the loss becomes NaN.
      std::fill_n(data<uint8_t>(level) + row * columns, columns, uint8_t(1));
      std::fill_n(values, roadmap::kMostLevels, std::numeric_limits<double>::quiet_NaN());
    });
  });
  return {level, value, count};
}

Tensor count_pairs(std::vector<std::optional<Tensor>> pairs, int64_t own, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, "rows and columns must not be negative");
  const PairLists lists = pairs_of(pairs, own);
  const Listed listed(rows, columns, lists);
  Tensor counts = empty(lists.positive.span, {rows, 2}, ScalarType::Long);
  roadmap::count_pairs(listed.relation, rows, columns, torch_threads(rows * columns / 16), data<int64_t>(counts));
  return counts;
}

// Where the positives of each row begin among all, [rows + 1].
std::vector<int64_t> first_positives(const Matrix& m, const Parallel& parallel) {
  std::vector<int64_t> counts(2 * m.rows), first(m.rows + 1, 0);
  roadmap::count_pairs(m.relation, m.rows, m.columns, parallel, counts.data());
  for (int64_t row = 0; row < m.rows; ++row) first[row + 1] = first[row] + counts[2 * row];
  return first;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> smooth_rank(Tensor scores, Tensor target,
                                                               std::optional<Tensor> ignore,
                                                               std::vector<double> surrogate, bool want_slope,
                                                               int64_t method) {
  const auto settings = surrogate_of(surrogate, method);
  const Input input(scores, target, ignore);
  const Parallel parallel = torch_threads(scores.numel());
  const std::vector<int64_t> first = first_positives(input.matrix, parallel);
  const int64_t count = first.back();
  Tensor query = empty(scores, {count}, ScalarType::Long), reference = empty(scores, {count}, ScalarType::Long);
  const ScalarType type = accumulation(scores);
  Tensor positive_rank = empty(scores, {count}, type), negative_rank = empty(scores, {count}, type);
  Tensor slope = empty(scores, {want_slope ? count : 0}, type);
  if (count) {
    dispatch(scores, [&](auto zero) {
      using T = decltype(zero);
      roadmap::smooth_rank_rows<T>(input.matrix, settings, parallel,
                                   {first.data(), data<int64_t>(query), data<int64_t>(reference),
                                    data<T>(positive_rank), data<T>(negative_rank), data<T>(slope)});
    });
  }
  return {query, reference, positive_rank, negative_rank, slope};
}

Tensor smooth_rank_backward(Tensor scores, Tensor target, std::optional<Tensor> ignore, Tensor slope,
                            std::optional<Tensor> positive_grad, Tensor negative_grad, std::vector<double> surrogate,
                            int64_t method) {
  const auto settings = surrogate_of(surrogate, method);
  const Input input(scores, target, ignore);
  const Matrix& m = input.matrix;
  const Parallel parallel = torch_threads(scores.numel());
  const std::vector<int64_t> first = first_positives(m, parallel);
  const auto check = [&](const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.dim() == 1 && t.is_cpu() && t.size(0) == first.back() && t.scalar_type() == accumulation(scores),
                    name, " must be a CPU tensor with one element a positive, in the accumulation type of the scores");
    return as_contiguous(t);
  };
  const Tensor slopes = check(slope, "slope"), negative = check(negative_grad, "negative_grad");
  std::optional<Tensor> positive;
  if (positive_grad) positive = check(*positive_grad, "positive_grad");
  Tensor gradient = empty(scores, {m.rows, m.columns}, scores.scalar_type());
  if (!gradient.numel()) return gradient;
  dispatch(scores, [&](auto zero) {
    using T = decltype(zero);
    roadmap::smooth_rank_gradient_rows<T>(m, settings, parallel,
                                          {first.data(), data<T>(slopes), positive ? data<T>(*positive) : nullptr,
                                           data<T>(negative), gradient.mutable_data_ptr()});
  });
  return gradient;
}

void check_rankable(const Tensor& scores) {
  STD_TORCH_CHECK(scores.dim() == 2 && scores.is_cpu() &&
                      (scores.scalar_type() == ScalarType::Float || scores.scalar_type() == ScalarType::Double),
                  "scores must be a 2-D CPU tensor of float32 or float64");
  STD_TORCH_CHECK(scores.size(1) < (int64_t(1) << 31), "scores must have less than 2^31 columns");
}

Tensor rank_rows(const Tensor& scores, const Matrix& m) {
  Tensor values = empty(scores, {m.rows, roadmap::kRankValues}, ScalarType::Double);
  dispatch(scores, [&](auto zero) {
    roadmap::rank_metrics<decltype(zero)>(m, torch_threads(m.rows * m.columns), data<double>(values));
  });
  return values;
}

Tensor rank_metrics(Tensor scores, std::vector<std::optional<Tensor>> pairs, int64_t own) {
  check_rankable(scores);
  const Listed listed(scores.size(0), scores.size(1), pairs_of(pairs, own));
  const Tensor dense = dense_columns(scores);
  return rank_rows(dense, {dense.const_data_ptr(), score_type(dense), dense.size(0), dense.size(1), dense.stride(0),
                           listed.relation});
}

Tensor rank_metrics_masked(Tensor scores, Tensor target, std::optional<Tensor> ignore) {
  check_rankable(scores);
  const Input input(scores, target, ignore);
  return rank_rows(input.scores, input.matrix);
}

}  // namespace

STABLE_TORCH_LIBRARY(roadmap_ext, m) { roadmap::ops::define(m); }

STABLE_TORCH_LIBRARY_IMPL(roadmap_ext, CPU, m) {
  m.impl("rank_loss", TORCH_BOX(&Op<&rank_loss>::call));
  m.impl("objective_rows_", TORCH_BOX(&Op<&objective_rows>::call));
  m.impl("equal_lists", TORCH_BOX(&Op<&equal_lists>::call));
  m.impl("levels_of", TORCH_BOX(&Op<&levels_of>::call));
  m.impl("symmetrise_", TORCH_BOX(&Op<&symmetrise>::call));
  m.impl("remove_radial_", TORCH_BOX(&Op<&remove_radial>::call));
  m.impl("prefault_", TORCH_BOX(&Op<&prefault>::call));
  m.impl("count_pairs", TORCH_BOX(&Op<&count_pairs>::call));
  m.impl("scale_rows", TORCH_BOX(&Op<&scale_rows>::call));
  m.impl("scale_rows_", TORCH_BOX(&Op<&scale_rows_in_place>::call));
  m.impl("smooth_rank", TORCH_BOX(&Op<&smooth_rank>::call));
  m.impl("rank_metrics", TORCH_BOX(&Op<&rank_metrics>::call));
  m.impl("rank_metrics_masked", TORCH_BOX(&Op<&rank_metrics_masked>::call));
  m.impl("smooth_rank_backward", TORCH_BOX(&Op<&smooth_rank_backward>::call));
}
