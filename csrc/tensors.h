// What the ops of every device share: schemas, the border to Python and the handling of tensors. Ops are registered through torch's
// stable ABI, so that one build serves every torch from 2.11 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <new>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/rows.h"

namespace roadmap::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Words cross the stable ABI as numbers: its conversion of strings leaks each one (as of torch 2.13), that of lists none.
enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// Kernels add up settings, 1 / tau and rho tau in float32, which ends at 3.4e38: a row of 2^32 pairs stays below.
constexpr double kLargestSetting = 1e28;

// What Python flattens where it calls an op (roadmap_ext/ops.py) becomes objects again here, and nowhere else. Nothing is
// read before its length is right.

// Surrogate.flat() of roadmap_ext/settings.py, and the method.
inline SurrogateSettings surrogate_of(const std::vector<double>& given, int64_t method) {
  STD_TORCH_CHECK(given.size() == 6, "a surrogate is 6 numbers, kind, tau, rho, delta, start and offset, got ",
                  given.size());
  STD_TORCH_CHECK(given[0] == 0 || given[0] == 1, "surrogate must be 0 (sup) or 1 (smooth), got ", given[0]);
  STD_TORCH_CHECK(method >= 0 && method <= 2, "method must be 0 (auto), 1 (pairwise) or 2 (sorted), got ", method);
  const SurrogateSettings s = {static_cast<int64_t>(given[0]), given[1], given[2], given[3], given[4], given[5],
                               static_cast<Method>(method)};
  STD_TORCH_CHECK(s.tau >= 1e-20 && s.tau <= kLargestSetting, "tau must lie between 1e-20 and ", kLargestSetting);
  STD_TORCH_CHECK(s.rho >= 0 && s.rho <= kLargestSetting && s.rho * s.tau <= kLargestSetting && s.delta >= 0 &&
                      s.delta <= kLargestSetting,
                  "rho, rho * tau and delta must lie between 0 and ", kLargestSetting);
  STD_TORCH_CHECK(std::fabs(s.start) <= kLargestSetting && std::fabs(s.offset) <= kLargestSetting,
                  "start and offset must be at most ", kLargestSetting, " in magnitude");
  return s;
}

// Objective.flat() of roadmap_ext/settings.py, and the method.
struct EmbeddingObjective {
  SurrogateSettings surrogate;
  Objective parts;
};

inline EmbeddingObjective objective_of(const std::vector<double>& given, int64_t method) {
  constexpr size_t kFirst = 16;  // of k
  STD_TORCH_CHECK(given.size() >= kFirst,
                  "an objective is 16 numbers: a surrogate's 6, whether the loss of ranks and the calibration loss are "
                  "wanted, positive_margin and negative_margin, the loss of ranks, rank_temperature, leak, beta, "
                  "gamma and gain; and k, of any number; got ",
                  given.size());
  for (size_t i = 8; i < given.size(); ++i) {
    STD_TORCH_CHECK(std::fabs(given[i]) <= kLargestSetting, "settings must be at most ", kLargestSetting,
                    " in magnitude");
  }
  STD_TORCH_CHECK(given[10] == 0 || given[10] == 1 || given[10] == 2 || given[10] == 3 || given[10] == 4,
                  "the loss of ranks must be 0 (AP), 1 (recall), 2 (NDCG), 3 (MRR) or 4 (H-AP), got ", given[10]);
  STD_TORCH_CHECK(given[11] > 0, "rank_temperature must be positive, got ", given[11]);
  Ranking ranking = {static_cast<Loss>(static_cast<int64_t>(given[10])),
                     given[11],
                     given[12],
                     given[13],
                     given[14],
                     given[15] == 0,
                     {}};
  ranking.k.assign(given.begin() + kFirst, given.end());
  return {surrogate_of({given.begin(), given.begin() + 6}, method),
          {given[6] != 0, given[7] != 0, given[8], given[9], ranking}};
}

// Of the CUDA kernels, which know AP alone.
inline void check_is_ap(const EmbeddingObjective& objective) {
  STD_TORCH_CHECK(!objective.parts.ranks || objective.parts.ranking.loss == Loss::kAp,
                  "on CUDA there is no kernel of this loss of ranks yet");
}

// Pairs.flat() of roadmap_ext/pairs.py, and the column of row 0 itself.
struct ColumnLists {
  Tensor span, column;
};

struct PairLists {
  ColumnLists positive;
  std::optional<ColumnLists> left_out, negative;
  int64_t own;
  std::optional<Tensor> level, worth;
  std::vector<ColumnLists> finer;
};

inline PairLists pairs_of(const std::vector<std::optional<Tensor>>& given, int64_t own) {
  constexpr size_t kFiner = 10;
  STD_TORCH_CHECK(
      given.size() == 6 || (given.size() >= kFiner && given.size() % 2 == 0),
      "pairs are 6 tensors, span and column of the positive, the left out and the negative; or further ones, "
      "level, worth, two that are none, and span and column for each level from the second on; got ",
      given.size());
  const auto lists = [&](size_t at) -> std::optional<ColumnLists> {
    STD_TORCH_CHECK(given[at].has_value() == given[at + 1].has_value(), "span and column of a list come together");
    if (!given[at]) return std::nullopt;
    return ColumnLists{*given[at], *given[at + 1]};
  };
  const std::optional<ColumnLists> positive = lists(0);
  STD_TORCH_CHECK(positive.has_value(), "pairs must say which are positive");
  STD_TORCH_CHECK(own < (int64_t(1) << 62), "own must be a column of row 0, or negative");
  PairLists pairs = {*positive, lists(2), lists(4), own, std::nullopt, std::nullopt, {}};
  if (given.size() < kFiner) return pairs;
  STD_TORCH_CHECK(!given[8] && !given[9], "classes have to become a mask before they come here");
  pairs.level = given[6];
  pairs.worth = given[7];
  for (size_t at = kFiner; at < given.size(); at += 2) {
    const std::optional<ColumnLists> finer = lists(at);
    STD_TORCH_CHECK(finer.has_value(), "each level has its lists");
    pairs.finer.push_back(*finer);
  }
  return pairs;
}

// Of the CUDA kernels.
inline const PairLists& check_one_level(const PairLists& pairs) {
  STD_TORCH_CHECK(!pairs.level && !pairs.worth && pairs.finer.empty(),
                  "on CUDA pairs come from lists of one level yet");
  return pairs;
}

inline ScoreType score_type(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return ScoreType::kHalf;
    case ScalarType::BFloat16: return ScoreType::kBFloat16;
    case ScalarType::Float: return ScoreType::kFloat;
    case ScalarType::Double: return ScoreType::kDouble;
    default: STD_TORCH_CHECK(false, "scores must be float16, bfloat16, float32 or float64"); return ScoreType::kFloat;
  }
}

inline bool is_half(ScoreType type) { return type == ScoreType::kHalf || type == ScoreType::kBFloat16; }

// Has torch allocate so many bytes where `like` lies, in a way that lets its own error through (errors.h): of a call
// that failed the stable ABI keeps neither the type nor the text, by which programs know to try a smaller batch.
inline void (*allocate_aloud)(const Tensor& like, int64_t bytes) = nullptr;

// What allocate() returns, which takes so many bytes.
template <typename Allocate>
Tensor allocated(const Tensor& like, int64_t bytes, const Allocate& allocate) {
  try {
    return allocate();
  } catch (const std::exception&) {
    if (!allocate_aloud) throw;
    allocate_aloud(like, bytes);
    return allocate();  // there is memory, after all
  }
}

inline Tensor empty(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  int64_t bytes = aoti_torch_dtype_element_size(torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)));
  for (const int64_t size : shape) bytes *= size;
  return allocated(like, bytes, [&] { return torch::stable::new_empty(like, shape, type); });
}

inline Tensor as_contiguous(const Tensor& t) {
  return allocated(t, t.numel() * static_cast<int64_t>(t.element_size()), [&] { return torch::stable::contiguous(t); });
}

// Kernels walk along a row; its columns must be contiguous, rows may be anywhere (strided, expanded).
inline Tensor dense_columns(const Tensor& t) { return t.size(1) <= 1 || t.stride(1) == 1 ? t : as_contiguous(t); }

// An op, with torch's words where it is the workspace that there is no memory for.
template <auto op>
struct Op;
template <typename Result, typename... Arguments, Result (*op)(Arguments...)>
struct Op<op> {
  static Result call(Arguments... arguments) {
    try {
      return op(std::move(arguments)...);
    } catch (const std::bad_alloc&) {
      throw std::runtime_error(
          "DefaultCPUAllocator: can't allocate memory: the workspace of roadmap_ext's CPU kernels");
    }
  }
};

inline ScalarType accumulation(const Tensor& scores) {
  return scores.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// What an item of each level is worth to a query.
inline void check_worth(const Tensor& worth, int64_t rows) {
  STD_TORCH_CHECK(worth.is_cpu() && worth.dim() == 2 && worth.size(0) == rows && worth.size(1) >= 1 &&
                      worth.size(1) <= kMostLevels && worth.scalar_type() == ScalarType::Double,
                  "worth must be a CPU tensor [rows, 1 to 16] of float64");
}

// Calls body(T{}) with the accumulation type of the scores.
template <typename Body>
void dispatch(const Tensor& scores, const Body& body) {
  if (scores.scalar_type() == ScalarType::Double) {
    body(double{});
  } else {
    body(float{});
  }
}

template <typename T>
T* data(const Tensor& t) {
  return t.numel() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

// The schemas, once for all devices.
template <typename Library>
void define(Library& m) {
  m.def(
      "rank_loss(Tensor scores, Tensor level, Tensor? worth, Tensor? ignore, float[] objective, int reduction, bool "
      "want_gradient, int method=0) -> (Tensor loss, Tensor gradient, Tensor factor)");
  m.def(
      "objective_rows_(Tensor(a!) scores, Tensor(b!) values, Tensor?[] pairs, int own, Tensor weight, float[] "
      "objective, Tensor? row_scale, Tensor? column_scale, bool want_gradient, Tensor(c!)? gradient=None, int "
      "method=0) -> ()");
  m.def("equal_lists(Tensor values, Tensor references) -> (Tensor span, Tensor column)");
  m.def("levels_of(Tensor relevance, Tensor? ignore) -> (Tensor level, Tensor value, Tensor count)");
  m.def("symmetrise_(Tensor(a!) matrix) -> ()");
  m.def("remove_radial_(Tensor(a!) gradient, Tensor x, Tensor scale) -> ()");
  m.def("prefault_(Tensor(a!) memory) -> ()");
  m.def("count_pairs(Tensor?[] pairs, int own, SymInt rows, SymInt columns) -> Tensor");
  m.def("scale_rows(Tensor gradient, Tensor weight, Tensor factor) -> Tensor");
  m.def("scale_rows_(Tensor(a!) gradient, Tensor weight, Tensor factor) -> ()");
  m.def(
      "smooth_rank(Tensor scores, Tensor target, Tensor? ignore, float[] surrogate, bool want_slope, int method=0) -> "
      "(Tensor query, Tensor reference, Tensor positive_rank, Tensor negative_rank, Tensor slope)");
  m.def("rank_metrics(Tensor scores, Tensor?[] pairs, int own) -> Tensor");
  m.def("rank_metrics_masked(Tensor scores, Tensor target, Tensor? ignore) -> Tensor");
  m.def(
      "smooth_rank_backward(Tensor scores, Tensor target, Tensor? ignore, Tensor slope, Tensor? positive_grad, "
      "Tensor negative_grad, float[] surrogate, int method=0) -> Tensor");
}

}  // namespace roadmap::ops
