// The ops that torch sees: schemas, checks, allocation and the choice of element type. Registered through torch's stable
// ABI, so that one build serves every torch from 2.11 on. Python checks its arguments first and words errors for people;
// the checks here keep memory safe whoever calls.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/rows.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using roadmap::Matrix;
using roadmap::Parallel;
using roadmap::ScoreType;

roadmap::SurrogateSettings make_settings(const std::string& surrogate, double tau, double rho, double delta,
                                         double start, double offset) {
  STD_TORCH_CHECK(surrogate == "sup" || surrogate == "smooth", "surrogate must be 'sup' or 'smooth', got ", surrogate);
  STD_TORCH_CHECK(tau > 0 && std::isfinite(tau) && std::isfinite(1 / static_cast<float>(tau)),
                  "tau must be positive and finite, and so must 1 / tau in float32");
  STD_TORCH_CHECK(rho >= 0 && std::isfinite(rho) && delta >= 0 && std::isfinite(delta),
                  "rho and delta must be finite and not negative");
  STD_TORCH_CHECK(std::isfinite(start) && std::isfinite(offset), "start and offset must be finite");
  return {surrogate == "smooth" ? 1 : 0, tau, rho, delta, start, offset};
}

ScoreType score_type(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return ScoreType::kHalf;
    case ScalarType::BFloat16: return ScoreType::kBFloat16;
    case ScalarType::Float: return ScoreType::kFloat;
    case ScalarType::Double: return ScoreType::kDouble;
    default: STD_TORCH_CHECK(false, "scores must be float16, bfloat16, float32 or float64"); return ScoreType::kFloat;
  }
}

bool is_half(ScoreType type) { return type == ScoreType::kHalf || type == ScoreType::kBFloat16; }

// Kernels walk along a row; its columns must be contiguous, rows may be anywhere (strided, expanded).
Tensor dense_columns(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

// A Matrix and the tensors that keep its memory alive.
struct Input {
  Tensor scores, target;
  std::optional<Tensor> ignore;
  Matrix matrix;

  Input(const Tensor& s, const Tensor& t, const std::optional<Tensor>& i)
      : scores((check(s, t, i), dense_columns(s))), target(dense_columns(t)) {
    if (i) ignore = dense_columns(*i);
    matrix.scores = scores.const_data_ptr();
    matrix.type = score_type(scores);
    matrix.rows = scores.size(0);
    matrix.columns = scores.size(1);
    matrix.score_stride = scores.stride(0);
    matrix.target = static_cast<const uint8_t*>(target.const_data_ptr());
    matrix.target_stride = target.stride(0);
    matrix.ignore = ignore ? static_cast<const uint8_t*>(ignore->const_data_ptr()) : nullptr;
    matrix.ignore_stride = ignore ? ignore->stride(0) : 0;
  }

 private:
  static void check(const Tensor& s, const Tensor& t, const std::optional<Tensor>& i) {
    STD_TORCH_CHECK(s.dim() == 2 && s.is_cpu(), "scores must be a 2-D CPU tensor");
    check_mask(s, t, "target");
    if (i) check_mask(s, *i, "ignore");
  }
  static void check_mask(const Tensor& s, const Tensor& mask, const char* name) {
    STD_TORCH_CHECK(mask.dim() == 2 && mask.is_cpu() && mask.scalar_type() == ScalarType::Bool &&
                        mask.size(0) == s.size(0) && mask.size(1) == s.size(1),
                    name, " must be a bool CPU tensor of the shape of scores");
  }
};

// torch's own threads, fed from a counter: torch splits a range statically, and rows differ in cost.
Parallel torch_threads() {
  Parallel parallel;
  parallel.workers = static_cast<int>(std::max<uint32_t>(1, torch::stable::get_num_threads()));
  const int workers = parallel.workers;
  parallel.run = [workers](int64_t tasks, const std::function<void(int64_t, int)>& task) {
    std::atomic<int64_t> next{0};
    const auto work = [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        for (int64_t index; (index = next.fetch_add(1)) < tasks;) task(index, static_cast<int>(worker));
      }
    };
    if (workers == 1 || tasks <= 1) {
      work(0, 1);
    } else {
      torch::stable::parallel_for(0, std::min<int64_t>(workers, tasks), 1, work);
    }
  };
  return parallel;
}

Tensor empty(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}

ScalarType accumulation(const Tensor& scores) {
  return scores.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
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

std::tuple<Tensor, Tensor, Tensor, Tensor> average_precision(Tensor scores, Tensor target, std::optional<Tensor> ignore,
                                                             std::string surrogate, double tau, double rho, double delta,
                                                             double start, double offset, bool want_gradient) {
  const auto settings = make_settings(surrogate, tau, rho, delta, start, offset);
  const Input input(scores, target, ignore);
  const Matrix& m = input.matrix;
  const bool half = is_half(m.type);
  Tensor loss = empty(scores, {m.rows}, accumulation(scores));
  Tensor positives = empty(scores, {m.rows}, ScalarType::Long);
  Tensor gradient = want_gradient ? empty(scores, {m.rows, m.columns}, scores.scalar_type())
                                  : empty(scores, {0, 0}, scores.scalar_type());
  Tensor unscale = empty(scores, {want_gradient && half ? m.rows : 0}, ScalarType::Float);
  dispatch(scores, [&](auto zero) {
    using T = decltype(zero);
    // A matrix without columns has a gradient without elements: nothing to want.
    void* const out = want_gradient && m.columns ? data<void>(gradient) : nullptr;
    if (want_gradient && half && !out) {
      for (int64_t row = 0; row < m.rows; ++row) data<float>(unscale)[row] = 1;
    }
    roadmap::average_precision_rows<T>(
        m, settings, torch_threads(),
        {data<T>(loss), data<int64_t>(positives), out, out && half ? data<float>(unscale) : nullptr});
  });
  return {loss, positives, gradient, unscale};
}

Tensor scale_rows(Tensor gradient, Tensor weight, Tensor unscale) {
  STD_TORCH_CHECK(gradient.dim() == 2 && gradient.is_cpu() && gradient.is_contiguous(),
                  "gradient must be a contiguous 2-D CPU tensor");
  const ScoreType type = score_type(gradient);
  const int64_t rows = gradient.size(0), columns = gradient.size(1);
  STD_TORCH_CHECK(weight.dim() == 1 && weight.is_cpu() && weight.size(0) == rows &&
                      weight.scalar_type() == accumulation(gradient),
                  "weight must be a CPU tensor [rows] in the accumulation type of the gradient");
  STD_TORCH_CHECK(unscale.dim() == 1 && unscale.is_cpu() && unscale.scalar_type() == ScalarType::Float &&
                      unscale.size(0) == (is_half(type) ? rows : 0),
                  "unscale must be a float32 CPU tensor, [rows] for half types and empty for others");
  const Tensor factor = torch::stable::contiguous(weight), power = torch::stable::contiguous(unscale);
  Tensor out = empty(gradient, {rows, columns}, gradient.scalar_type());
  if (!gradient.numel()) return out;
  dispatch(gradient, [&](auto zero) {
    using T = decltype(zero);
    roadmap::scale_rows<T>(gradient.const_data_ptr(), type, rows, columns, static_cast<const T*>(factor.const_data_ptr()),
                           is_half(type) ? static_cast<const float*>(power.const_data_ptr()) : nullptr, torch_threads(),
                           out.mutable_data_ptr());
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> smooth_rank(Tensor scores, Tensor target,
                                                               std::optional<Tensor> ignore, std::string surrogate,
                                                               double tau, double rho, double delta, double start,
                                                               double offset, bool want_slope) {
  const auto settings = make_settings(surrogate, tau, rho, delta, start, offset);
  const Input input(scores, target, ignore);
  std::vector<int64_t> first(input.matrix.rows + 1, 0);
  const Parallel parallel = torch_threads();
  roadmap::count_positives(input.matrix, parallel, first.data());
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
                            std::optional<Tensor> positive_grad, Tensor negative_grad, std::string surrogate, double tau,
                            double rho, double delta, double start, double offset) {
  const auto settings = make_settings(surrogate, tau, rho, delta, start, offset);
  const Input input(scores, target, ignore);
  const Matrix& m = input.matrix;
  std::vector<int64_t> first(m.rows + 1, 0);
  const Parallel parallel = torch_threads();
  roadmap::count_positives(m, parallel, first.data());
  const auto check = [&](const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.dim() == 1 && t.is_cpu() && t.size(0) == first.back() && t.scalar_type() == accumulation(scores),
                    name, " must be a CPU tensor with one element a positive, in the accumulation type of the scores");
    return torch::stable::contiguous(t);
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

}  // namespace

STABLE_TORCH_LIBRARY(roadmap_ext, m) {
  m.def(
      "average_precision(Tensor scores, Tensor target, Tensor? ignore, str surrogate, float tau, float rho, float delta, "
      "float start, float offset, bool want_gradient) -> (Tensor loss, Tensor positives, Tensor gradient, Tensor unscale)");
  m.def("scale_rows(Tensor gradient, Tensor weight, Tensor unscale) -> Tensor");
  m.def(
      "smooth_rank(Tensor scores, Tensor target, Tensor? ignore, str surrogate, float tau, float rho, float delta, "
      "float start, float offset, bool want_slope) -> (Tensor query, Tensor reference, Tensor positive_rank, "
      "Tensor negative_rank, Tensor slope)");
  m.def(
      "smooth_rank_backward(Tensor scores, Tensor target, Tensor? ignore, Tensor slope, Tensor? positive_grad, "
      "Tensor negative_grad, str surrogate, float tau, float rho, float delta, float start, float offset) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(roadmap_ext, CPU, m) {
  m.impl("average_precision", TORCH_BOX(&average_precision));
  m.impl("scale_rows", TORCH_BOX(&scale_rows));
  m.impl("smooth_rank", TORCH_BOX(&smooth_rank));
  m.impl("smooth_rank_backward", TORCH_BOX(&smooth_rank_backward));
}
