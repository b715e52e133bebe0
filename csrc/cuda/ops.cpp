// The ops on CUDA: checks, allocation, the choice of element type, and the launches of the plan. Nothing here waits for
// the device, but for smooth_rank, which has to learn how many positives there are.
//
// The values of spans and columns lie on the device and are not checked here; the kernels touch nothing outside a list
// or a row, whatever they hold.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "launch.h"
#include "plan.h"

namespace roadmap::cuda {
namespace {

using namespace roadmap::ops;

// Bits of a row kernel's grid and 32-bit columns.
constexpr int64_t kMostColumns = int64_t(1) << 30;
constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;

#if defined(ROADMAP_EMULATED)
bool on_device(const Tensor& t) { return t.is_cpu(); }
struct Device {
  explicit Device(const Tensor&) {}
  ~Device() { end_op(); }
  void* stream = nullptr;
};
// Whoever reads what nobody wrote shall notice.
Tensor allocate(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  Tensor t = empty(like, std::move(shape), type);
  if (t.numel()) poison(t.mutable_data_ptr(), t.numel() * t.element_size());
  return t;
}
#else
bool on_device(const Tensor& t) { return t.is_cuda(); }
// The device of a tensor is the current one as long as this lives; its current stream is the only one used.
struct Device {
  explicit Device(const Tensor& t) : guard(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};
Tensor allocate(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  return empty(like, std::move(shape), type);
}
#endif

void check(int error, const char* what) {
  STD_TORCH_CHECK(error == 0, "roadmap_ext: ", what, " failed: ", error_text(error));
}

bool together(const Tensor& a, const Tensor& b) { return on_device(b) && a.get_device_index() == b.get_device_index(); }

template <typename T>
Global<T> global_of(const Tensor& t, int64_t size) {
  using Plain = std::remove_const_t<T>;
  if (!t.numel()) return Global<T>(nullptr);
  if constexpr (std::is_const_v<T>) {
    return simt::global(static_cast<const Plain*>(t.const_data_ptr()), size);
  } else {
    return simt::global(static_cast<Plain*>(t.mutable_data_ptr()), size);
  }
}
template <typename T>
Global<T> global_of(const Tensor& t) {
  return global_of<T>(t, t.numel());
}
// Rows anywhere, columns dense.
template <typename T>
Global<T> global_of_rows(const Tensor& t) {
  return global_of<T>(t, t.numel() ? (t.size(0) - 1) * t.stride(0) + t.size(1) : 0);
}

// Calls body(S{}) with the element type of the scores.
template <typename Body>
void dispatch_elements(const Tensor& scores, const Body& body) {
  switch (score_type(scores)) {
    case ScoreType::kHalf: return body(Half{});
    case ScoreType::kBFloat16: return body(BFloat{});
    case ScoreType::kFloat: return body(float{});
    case ScoreType::kDouble: return body(double{});
  }
}

// Scores and masks, and what keeps their memory alive.
struct Masked {
  Tensor scores, target;
  std::optional<Tensor> ignore;

  Masked(const Tensor& s, const Tensor& t, const std::optional<Tensor>& i) : scores(s), target(t) {
    STD_TORCH_CHECK(s.dim() == 2 && on_device(s), "scores must be a 2-D tensor on the device");
    check_mask(s, t, "target");
    if (i) check_mask(s, *i, "ignore");
    const Device device(s);
    scores = dense_columns(s);
    target = dense_columns(t);
    if (i) ignore = dense_columns(*i);
  }

  template <typename S>
  void fill(RowParams<S>& p) const {
    p.rows = scores.size(0);
    p.columns = scores.size(1);
    p.score_stride = scores.stride(0);
    p.scores = global_of_rows<const S>(scores);
    fill(p.relation);
  }
  void fill(Relation& r) const {
    r.target = global_of_rows<const uint8_t>(target);
    r.target_stride = target.stride(0);
    if (ignore) {
      r.ignore = global_of_rows<const uint8_t>(*ignore);
      r.ignore_stride = ignore->stride(0);
    }
  }

 private:
  static void check_mask(const Tensor& s, const Tensor& mask, const char* name) {
    STD_TORCH_CHECK(mask.dim() == 2 && together(s, mask) && mask.scalar_type() == ScalarType::Bool &&
                        mask.size(0) == s.size(0) && mask.size(1) == s.size(1),
                    name, " must be a bool tensor of the shape and on the device of scores");
  }
};

// Pairs from lists, and what keeps its memory alive.
struct Listed {
  std::vector<Tensor> alive;
  Relation relation;

  Listed(int64_t rows, const PairLists& pairs) {
    const Tensor& device = pairs.positive.span;
    relation.positive = lists(rows, pairs.positive, device, "positive");
    if (pairs.left_out) relation.left_out = lists(rows, *pairs.left_out, device, "left_out");
    if (pairs.negative) relation.negative = lists(rows, *pairs.negative, device, "negative");
    relation.own = pairs.own;
  }

 private:
  Lists lists(int64_t rows, const ColumnLists& given, const Tensor& device, const char* name) {
    const auto& [span, column] = given;
    STD_TORCH_CHECK(together(device, span) && span.dim() == 2 && span.size(0) == rows && span.size(1) == 2 &&
                        span.scalar_type() == ScalarType::Long,
                    name, "_span must be a tensor [rows, 2] of int64 on the device of the others");
    STD_TORCH_CHECK(together(device, column) && column.dim() == 1 && column.scalar_type() == ScalarType::Long, name,
                    "_column must be a 1-D tensor of int64 on the device of the others");
    const Device current(span);
    alive.push_back(as_contiguous(span));
    alive.push_back(as_contiguous(column));
    return {global_of<const int64_t>(alive[alive.size() - 2]), global_of<const int64_t>(alive.back()), column.numel()};
  }
};

// Runs the plan of a matrix. Returns the workspace, in which the numbers of positives are left.
template <typename S>
Tensor run_rows(RowParams<S>& p, const Tensor& like, uint32_t steps, Method method, void* stream) {
  using T = Accumulation<S>;
  STD_TORCH_CHECK(p.columns < kMostColumns, "on CUDA scores must have less than 2^30 columns, got ", p.columns);
  const Resources resources = device_resources();
  const bool count_only = p.op == Op::kCountPairs;
  // float64 is there for gradient checks: it goes pair by pair.
  const bool boxes = sizeof(T) == 4 && resources.boxes && method != Method::kPairwise && (steps & kSort);
  const int chosen = resources.boxes_above < 0 ? boxes_pay_above(p.columns) : resources.boxes_above;
  const int boxes_above = !boxes ? kNever : method == Method::kSorted ? 0 : chosen;
  const Plan plan = make_plan<T>(p.rows, p.columns, count_only, steps, boxes_above, p.grid.reach, resources);
  Tensor memory = allocate(like, {std::max<int64_t>(plan.bytes, 1)}, ScalarType::Byte);
  for (const Schedule& schedule : plan.launches) {
    STD_TORCH_CHECK(schedule.slots * schedule.blocks_per_row <= kMostBlocks, "too many rows for a launch");
    int64_t bytes;
    p.schedule = schedule;
    p.workspace = workspace_of<T>(schedule, p.rows, p.columns, resources.capacity,
                                  static_cast<char*>(memory.mutable_data_ptr()), bytes);
    check(launch_rows(p, stream), "the row kernel");
  }
  return memory;
}

// The steps that an op needs.
template <typename S>
uint32_t steps_of(const RowParams<S>& p) {
  uint32_t steps = kMasks | kCollect | kWeights;
  if (p.ap) steps |= kSort;
  if (p.op != Op::kRankGradient) steps |= kNegatives | (p.ap ? kPositives : 0);
  const bool gradient = p.gradient_type != GradientType::kNone, own = p.pair.smooth && p.ap;
  if (gradient) steps |= kGradient | kScatter | (own ? kOwn : 0);
  if (!p.ap) return steps;
  // The same for rows by boxes.
  steps |= kLoad | kSortChunks | kMerge | kKeys | kEdges | kSumMoments | kTotals;
  if (p.op != Op::kRankGradient) steps |= kPrefix | kRanks;
  if (own && (p.op != Op::kRankGradient || gradient)) steps |= kWeighOnes | kPrefixOnes | kRanksAmong;
  if (gradient) steps |= kWeigh | kPrefixWeights | kTable | kBoxGradient;
  if (gradient && own) steps |= kWeighOwn | kPrefixOwn | kGradientAmong;
  return steps;
}

template <typename S>
PairConstants<Accumulation<S>> constants(const SurrogateSettings& s, int64_t columns) {
  return PairConstants<Accumulation<S>>(Settings<Accumulation<S>>(static_cast<Surrogate>(s.surrogate), s.tau, s.rho,
                                                                  s.delta, s.start, s.offset, columns));
}

// Where the gradient goes, in the type of the tensor.
template <typename S>
void set_gradient(RowParams<S>& p, const Tensor& gradient) {
  switch (gradient.scalar_type()) {
    case ScalarType::Half: p.gradient_type = GradientType::kHalf; break;
    case ScalarType::BFloat16: p.gradient_type = GradientType::kBFloat; break;
    default: p.gradient_type = GradientType::kFull;
  }
  if (p.gradient_type == GradientType::kFull) {
    p.gradient = global_of<Accumulation<S>>(gradient);
  } else {
    p.gradient_half = global_of<uint16_t>(gradient);
  }
}

std::tuple<Tensor, Tensor, Tensor> rank_loss(Tensor scores, Tensor target, std::optional<Tensor> worth,
                                             std::optional<Tensor> ignore, std::vector<double> objective,
                                             int64_t reduction, bool want_gradient, int64_t method) {
  const EmbeddingObjective wanted = objective_of(objective, method);
  check_is_ap(wanted);
  STD_TORCH_CHECK(!worth, "on CUDA there are no levels yet");
  const SurrogateSettings& settings = wanted.surrogate;
  STD_TORCH_CHECK(reduction == kNone || reduction == kMean || reduction == kSum,
                  "reduction must be 0 (none), 1 (mean) or 2 (sum), got ", reduction);
  const Masked input(scores, target, ignore);
  const Device device(scores);
  const int64_t rows = scores.size(0), columns = scores.size(1);
  const bool half = is_half(score_type(scores)), each = reduction == kNone;
  const ScalarType type = accumulation(scores);
  Tensor loss = allocate(scores, {rows}, type);
  Tensor reduced = each ? loss : allocate(scores, {}, type);
  Tensor gradient = allocate(scores, want_gradient ? std::vector<int64_t>{rows, columns} : std::vector<int64_t>{0, 0},
                             scores.scalar_type());
  const bool nothing = !scores.numel();
  const std::vector<int64_t> factors = {!want_gradient ? 0 : half ? rows : 1};
  Tensor factor = nothing || !half ? empty(scores, factors, type) : allocate(scores, factors, type);
  if (nothing) torch::stable::zero_(loss);
  // A mean over all rows is in the gradient already, but for half types, which keep it in a scale of its own: where
  // every row has a positive, backward finds nothing left to multiply by.
  const double all = reduction == kMean && rows ? static_cast<double>(rows) : 1.0;
  if (factor.numel() && (nothing || !half)) torch::stable::fill_(factor, nothing ? 1.0 : all);
  dispatch_elements(scores, [&](auto zero) {
    using S = decltype(zero);
    using T = Accumulation<S>;
    RowParams<S> p(constants<S>(settings, columns));
    Tensor workspace;  // whose counts the reduction reads
    if (!nothing) {
      input.fill(p);
      p.op = Op::kLoss;
      p.loss = global_of<T>(loss);
      if (want_gradient) set_gradient(p, gradient);
      if (want_gradient && half) p.unscale = global_of<T>(factor);
      if (!half) p.row_weight = 1 / all;
      workspace = run_rows(p, scores, steps_of(p), settings.method, device.stream);
    }
    if (each) return;
    ReduceParams<T> r;
    r.rows = nothing ? 0 : rows;
    r.mean = reduction == kMean;
    if (!nothing) {
      r.loss = global_of<const T>(loss);
      r.count = p.workspace.count;
    }
    r.reduced = global_of<T>(reduced);
    r.factor = global_of<T>(factor);
    r.factors = factor.numel();
    check(launch_reduce(r, device.stream), "the reduction");
  });
  return {reduced, gradient, factor};
}

// out = weight * factor * gradient, row by row; out may be the gradient itself.
void scale_rows_into(const Tensor& gradient, const Tensor& weight, const Tensor& factor, const Tensor& out) {
  STD_TORCH_CHECK(gradient.dim() == 2 && on_device(gradient) && gradient.is_contiguous(),
                  "gradient must be a contiguous 2-D tensor on the device");
  (void)score_type(gradient);
  const int64_t rows = gradient.size(0), columns = gradient.size(1);
  const Device device(gradient);
  const auto checked = [&](const Tensor& t, const char* name) {
    STD_TORCH_CHECK(together(gradient, t) && t.scalar_type() == accumulation(gradient) &&
                        (t.numel() == 1 || (t.dim() == 1 && t.size(0) == rows)),
                    name, " must be one element or [rows] on the device and in the accumulation type of the gradient");
    return as_contiguous(t);
  };
  const Tensor weights = checked(weight, "weight"), factors = checked(factor, "factor");
  if (!gradient.numel()) return;
  dispatch_elements(gradient, [&](auto zero) {
    using S = decltype(zero);
    using T = Accumulation<S>;
    ScaleParams<S> p;
    p.rows = rows;
    p.columns = columns;
    p.gradient = global_of<const S>(gradient);
    p.weight = global_of<const T>(weights);
    p.factor = global_of<const T>(factors);
    p.one_weight = weights.numel() == 1;
    p.one_factor = factors.numel() == 1;
    p.out = global_of<S>(out);
    constexpr int64_t kEach = 16 / sizeof(S);
    const int64_t vectors = (columns + kEach - 1) / kEach;
    p.threads = static_cast<int>(std::min<int64_t>(kElementThreads, (vectors + 31) / 32 * 32));
    p.segments = std::max<int64_t>(1, vectors / (kScaleVectors * kElementThreads));
    p.in_place = gradient.const_data_ptr() == out.const_data_ptr();
    check(launch_scale(p, device.stream), "scaling the gradient");
  });
}

Tensor scale_rows(Tensor gradient, Tensor weight, Tensor factor) {
  Tensor out = allocate(gradient, gradient.sizes().vec(), gradient.scalar_type());
  scale_rows_into(gradient, weight, factor, out);
  return out;
}

void scale_rows_in_place(Tensor gradient, Tensor weight, Tensor factor) {
  scale_rows_into(gradient, weight, factor, gradient);
}

// Overwrites scores with the gradient of the weighted sum of the first three values, if one is wanted; or writes it to
// `gradient`, of a half type.
void objective_rows(Tensor scores, Tensor values, std::vector<std::optional<Tensor>> pairs, int64_t own, Tensor weight,
                    std::vector<double> objective, std::optional<Tensor> row_scale, std::optional<Tensor> column_scale,
                    bool want_gradient, std::optional<Tensor> gradient, int64_t method) {
  const EmbeddingObjective wanted = objective_of(objective, method);
  check_is_ap(wanted);
  STD_TORCH_CHECK(scores.dim() == 2 && on_device(scores) && scores.is_contiguous() &&
                      (scores.scalar_type() == ScalarType::Float || scores.scalar_type() == ScalarType::Double),
                  "scores must be a contiguous 2-D tensor of float32 or float64 on the device");
  const int64_t rows = scores.size(0), columns = scores.size(1);
  const auto check_rows = [&](const Tensor& t, int64_t width, const char* name) {
    STD_TORCH_CHECK(together(scores, t) && t.dim() == 2 && t.size(0) == rows && t.size(1) == width &&
                        t.is_contiguous() && t.scalar_type() == ScalarType::Double,
                    name, " must be a contiguous tensor [rows, ", width, "] of float64 on the device of scores");
  };
  check_rows(values, 5, "values");
  check_rows(weight, 3, "weight");
  const PairLists lists = check_one_level(pairs_of(pairs, own));
  const Listed listed(rows, lists);
  STD_TORCH_CHECK(together(scores, lists.positive.span), "lists must be on the device of scores");
  STD_TORCH_CHECK(row_scale.has_value() == column_scale.has_value(), "row_scale and column_scale come together");
  const auto check_scale = [&](const Tensor& t, int64_t size, const char* name) {
    STD_TORCH_CHECK(together(scores, t) && t.dim() == 1 && t.size(0) == size && t.is_contiguous() &&
                        t.scalar_type() == scores.scalar_type(),
                    name, " must be a contiguous 1-D tensor of ", size, " elements, with dtype and device of scores");
  };
  if (row_scale) {
    check_scale(*row_scale, rows, "row_scale");
    check_scale(*column_scale, columns, "column_scale");
  }
  if (gradient) {
    STD_TORCH_CHECK(together(scores, *gradient) && gradient->is_contiguous() && gradient->dim() == 2 &&
                        gradient->size(0) == rows && gradient->size(1) == columns && is_half(score_type(*gradient)) &&
                        scores.scalar_type() == ScalarType::Float,
                    "gradient must be a contiguous tensor of float16 or bfloat16 of the shape of float32 scores");
  }
  const Device device(scores);
  if (!scores.numel()) {
    if (values.numel()) torch::stable::zero_(values);
    return;
  }
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    RowParams<T> p(constants<T>(wanted.surrogate, columns));
    p.op = Op::kObjective;
    p.rows = rows;
    p.columns = columns;
    p.score_stride = columns;
    p.scores = global_of<const T>(scores);
    p.relation = listed.relation;
    p.ap = wanted.parts.ranks;
    p.calibration = wanted.parts.calibration;
    p.positive_margin = wanted.parts.positive_margin;
    p.negative_margin = wanted.parts.negative_margin;
    p.margin = static_cast<T>(wanted.parts.negative_margin);
    if (row_scale) {
      p.row_scale = global_of<const T>(*row_scale);
      p.column_scale = global_of<const T>(*column_scale);
    }
    p.weight = global_of<const double>(weight);
    p.value = global_of<double>(values);
    if (want_gradient) set_gradient(p, gradient ? *gradient : scores);
    run_rows(p, scores, steps_of(p), wanted.surrogate.method, device.stream);
  };
  dispatch(scores, run);
}

Tensor count_pairs(std::vector<std::optional<Tensor>> pairs, int64_t own, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, "rows and columns must not be negative");
  const PairLists lists = check_one_level(pairs_of(pairs, own));
  const Listed listed(rows, lists);
  const Tensor& like = lists.positive.span;
  const Device device(like);
  Tensor counts = allocate(like, {rows, 2}, ScalarType::Long);
  if (!rows) return counts;
  if (!columns) return torch::stable::zero_(counts);
  RowParams<float> p(constants<float>({0, 0.01, 100, 0.05, 0.5, 1.5}, columns));
  p.op = Op::kCountPairs;
  p.rows = rows;
  p.columns = columns;
  p.relation = listed.relation;
  p.counts = global_of<int64_t>(counts);
  run_rows(p, like, kMasks, Method::kPairwise, device.stream);
  return counts;
}

// Where the positives of each row begin among all, [rows + 1].
Tensor first_positives(const Masked& input, void* stream) {
  const int64_t rows = input.scores.size(0), columns = input.scores.size(1);
  Tensor first = allocate(input.scores, {rows + 1}, ScalarType::Long);
  if (!rows || !columns) return torch::stable::zero_(first);
  Tensor counts = allocate(input.scores, {rows, 2}, ScalarType::Long);
  RowParams<float> p(constants<float>({0, 0.01, 100, 0.05, 0.5, 1.5}, columns));
  p.op = Op::kCountPairs;
  p.rows = rows;
  p.columns = columns;
  input.fill(p.relation);
  p.counts = global_of<int64_t>(counts);
  run_rows(p, input.scores, kMasks, Method::kPairwise, stream);
  StartParams s;
  s.rows = rows;
  s.counts = global_of<const int64_t>(counts);
  s.first = global_of<int64_t>(first);
  check(launch_starts(s, stream), "counting positives");
  return first;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> smooth_rank(Tensor scores, Tensor target,
                                                               std::optional<Tensor> ignore,
                                                               std::vector<double> surrogate, bool want_slope,
                                                               int64_t method) {
  const auto settings = surrogate_of(surrogate, method);
  const Masked input(scores, target, ignore);
  const Device device(scores);
  const Tensor first = first_positives(input, device.stream);
  int64_t count = 0;
  if (scores.numel()) {
    const Global<const int64_t> starts = global_of<const int64_t>(first);
    check(read_back(starts + scores.size(0), count, device.stream), "counting positives");
  }
  Tensor query = allocate(scores, {count}, ScalarType::Long), reference = allocate(scores, {count}, ScalarType::Long);
  const ScalarType type = accumulation(scores);
  Tensor positive_rank = allocate(scores, {count}, type), negative_rank = allocate(scores, {count}, type);
  Tensor slope = allocate(scores, {want_slope ? count : 0}, type);
  if (count) {
    dispatch_elements(scores, [&](auto zero) {
      using S = decltype(zero);
      using T = Accumulation<S>;
      RowParams<S> p(constants<S>(settings, scores.size(1)));
      input.fill(p);
      p.op = Op::kRank;
      p.first = global_of<const int64_t>(first);
      p.entries = count;
      p.query = global_of<int64_t>(query);
      p.reference = global_of<int64_t>(reference);
      p.positive_rank = global_of<T>(positive_rank);
      p.negative_rank = global_of<T>(negative_rank);
      p.slope_out = global_of<T>(slope);
      run_rows(p, scores, steps_of(p), settings.method, device.stream);
    });
  }
  return {query, reference, positive_rank, negative_rank, slope};
}

Tensor smooth_rank_backward(Tensor scores, Tensor target, std::optional<Tensor> ignore, Tensor slope,
                            std::optional<Tensor> positive_grad, Tensor negative_grad, std::vector<double> surrogate,
                            int64_t method) {
  const auto settings = surrogate_of(surrogate, method);
  const Masked input(scores, target, ignore);
  const Device device(scores);
  const int64_t entries = slope.numel();
  const auto checked = [&](const Tensor& t, const char* name) {
    STD_TORCH_CHECK(
        t.dim() == 1 && together(scores, t) && t.size(0) == entries && t.scalar_type() == accumulation(scores), name,
        " must have one element a positive, on the device and in the accumulation type of the scores");
    return as_contiguous(t);
  };
  const Tensor slopes = checked(slope, "slope"), negative = checked(negative_grad, "negative_grad");
  std::optional<Tensor> positive;
  if (positive_grad) positive = checked(*positive_grad, "positive_grad");
  Tensor gradient = allocate(scores, {scores.size(0), scores.size(1)}, scores.scalar_type());
  if (!gradient.numel()) return gradient;
  const Tensor first = first_positives(input, device.stream);
  dispatch_elements(scores, [&](auto zero) {
    using S = decltype(zero);
    using T = Accumulation<S>;
    RowParams<S> p(constants<S>(settings, scores.size(1)));
    input.fill(p);
    p.op = Op::kRankGradient;
    p.first = global_of<const int64_t>(first);
    p.entries = entries;
    p.slope_in = global_of<const T>(slopes);
    if (positive) p.positive_weight = global_of<const T>(*positive);
    p.negative_weight = global_of<const T>(negative);
    set_gradient(p, gradient);
    run_rows(p, scores, steps_of(p), settings.method, device.stream);
  });
  return gradient;
}

// matrix + matrix', in its own place.
void symmetrise(Tensor matrix) {
  STD_TORCH_CHECK(matrix.dim() == 2 && on_device(matrix) && matrix.is_contiguous() &&
                      matrix.size(0) == matrix.size(1) &&
                      (matrix.scalar_type() == ScalarType::Float || matrix.scalar_type() == ScalarType::Double),
                  "matrix must be a contiguous square tensor of float32 or float64 on the device");
  if (!matrix.numel()) return;
  const Device device(matrix);
  dispatch(matrix, [&](auto zero) {
    using T = decltype(zero);
    SymmetriseParams<T> p;
    p.n = matrix.size(0);
    p.matrix = global_of<T>(matrix);
    check(launch_symmetrise(p, device.stream), "symmetrise_");
  });
}

// gradient -= x (x . gradient) scale^2, row by row.
void remove_radial(Tensor gradient, Tensor x, Tensor scale) {
  STD_TORCH_CHECK(gradient.dim() == 2 && on_device(gradient) && gradient.is_contiguous() &&
                      (gradient.scalar_type() == ScalarType::Float || gradient.scalar_type() == ScalarType::Double),
                  "gradient must be a contiguous 2-D tensor of float32 or float64 on the device");
  STD_TORCH_CHECK(x.dim() == 2 && together(gradient, x) && x.size(0) == gradient.size(0) &&
                      x.size(1) == gradient.size(1) &&
                      (x.scalar_type() == gradient.scalar_type() ||
                       (gradient.scalar_type() == ScalarType::Float && is_half(score_type(x)))),
                  "x must have the shape and device of gradient, and its dtype, or a half type beside float32");
  STD_TORCH_CHECK(scale.dim() == 1 && together(gradient, scale) && scale.size(0) == gradient.size(0) &&
                      scale.is_contiguous() && scale.scalar_type() == gradient.scalar_type(),
                  "scale must be a contiguous tensor [rows] of the dtype of gradient");
  if (!gradient.numel()) return;
  const Device device(gradient);
  const Tensor dense = dense_columns(x);
  dispatch_elements(dense, [&](auto zero) {
    using S = decltype(zero);
    using T = Accumulation<S>;
    RadialParams<S> p;
    p.rows = gradient.size(0);
    p.dimension = gradient.size(1);
    p.stride = dense.stride(0);
    p.gradient = global_of<T>(gradient);
    p.x = global_of_rows<const S>(dense);
    p.scale = global_of<const T>(scale);
    check(launch_radial(p, device.stream), "remove_radial_");
  });
}

template <typename Library>
void implement(Library& m) {
  m.impl("rank_loss", TORCH_BOX(&rank_loss));
  m.impl("objective_rows_", TORCH_BOX(&objective_rows));
  m.impl("count_pairs", TORCH_BOX(&count_pairs));
  m.impl("symmetrise_", TORCH_BOX(&symmetrise));
  m.impl("remove_radial_", TORCH_BOX(&remove_radial));
  m.impl("scale_rows", TORCH_BOX(&scale_rows));
  m.impl("scale_rows_", TORCH_BOX(&scale_rows_in_place));
  m.impl("smooth_rank", TORCH_BOX(&smooth_rank));
  m.impl("smooth_rank_backward", TORCH_BOX(&smooth_rank_backward));
}

}  // namespace
}  // namespace roadmap::cuda

#if !defined(ROADMAP_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(roadmap_ext, CUDA, m) { roadmap::cuda::implement(m); }
#endif
