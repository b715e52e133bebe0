// One row by the sorted scan, a one-dimensional fast multipole method: its steps and their order. The work itself is in
// scan_body.h.
//
// Negatives v and positives u are sorted, and boxes are laid over both (boxes.h). On a half line the sigmoid is a short
// sum of exponentials (series.h), and a sum of e^(-k (u - v) / tau) over all v on one side of u is the sum at any other
// point times a power of a decay. So a positive u reads
//
//     the boxes below its own            far field: the exponential sums of all of them, one polynomial a box
//     its own box                        Taylor series of sigma at 0, times the moments of the box
//     the boxes up to the threshold      far field: a count, less the sums of the nearest and of the threshold's box
//     the threshold's box, up to it      Taylor series at the distance of the boxes, times moments of whole chunks
//     the last chunk, up to it           one by one
//     all that lies past it              a count and a sum: a sigma past the threshold is never formed
//
// Steps and thresholds are found by walking both lists, by the same rounded differences as in the pairwise kernels.
// The gradient of a negative v is the adjoint: the same with targets and sources exchanged, positives being the
// sources, each with the weight of its rank. "smooth" is the same without steps, the threshold at infinity.
#pragma once

#include <algorithm>
#include <vector>

#include "boxes.h"
#include "kernels.h"
#include "rows.h"
#include "sorter.h"

namespace roadmap {

class Scan {
 public:
  // The negatives, which the caller collects: by column, a part a span, so that several threads may.
  Sorter<float>& negatives() { return sorter_; }

  // Gives back what a very long row has taken.
  void trim() {
    if (sorter_.bytes() + sources_.bytes() > size_t(32) << 20) *this = {};
  }

  // Sorts what was collected, and lays boxes; the positives are ascending.
  void begin(const std::vector<float>& positive, const Settings<float>& s, const Parallel& parallel) {
    const int64_t n = sorter_.count();
    negatives_.resize(n);
    column_.resize(n);
    sorter_.sort(instruction_set().sorting_float, parallel, negatives_.value.data(), column_.data());
    positives_.resize(static_cast<int64_t>(positive.size()));
    std::copy(positive.begin(), positive.end(), positives_.value.begin());
    boxes_.lay(negatives_, positives_, s.tau);
    in_pieces(boxes_.size(), kPiece, parallel,
              [&](int64_t begin, int64_t end) { kernels().decays(boxes_, s.tau, begin, end); });
  }

  // Ranks of the positives among the negatives, and their slopes if `slope` is not null.
  void rank(const Settings<float>& s, const Parallel& parallel, double* rank, double* slope) {
    sum(negatives_, nullptr, s, parallel);
    read_ranks(s, parallel, rank, slope);
  }
  // Smooth: ranks of the positives among themselves, from 1.
  void rank_positives(const Settings<float>& s, const Parallel& parallel, double* rank) {
    sum(positives_, nullptr, s, parallel);
    read_ranks(s, parallel, rank, nullptr);
    for (int64_t i = 0; i < positives_.n; ++i) rank[i] += 0.5;  // less sigma(0) of itself, plus 1
  }

  // What each negative gets, by column: scale times its slope, weight [P + kPad] being that of the positives' ranks; 0
  // for columns that were not collected, and nothing for positives where these are all others. It goes to `out`
  // [columns], or is kept for gradient() where that is null.
  void read_gradient(const std::vector<float>& weight, int64_t columns, double scale, const Settings<float>& s,
                     const Parallel& parallel, float* out) {
    gradient_.resize(out ? 0 : columns);
    float* const by_column = out ? out : gradient_.data();
    if (negatives_.n + positives_.n < columns) {
      in_pieces(columns, kSpread, parallel,
                [&](int64_t begin, int64_t end) { std::fill(by_column + begin, by_column + end, 0.0f); });
    }
    sum(positives_, weight.data(), s, parallel);
    for_targets(negatives_, parallel, [&](int64_t begin, int64_t end) {
      kernels().slopes(boxes_, sources_, negatives_, begin, end, s, scale, column_.data(), by_column);
    });
  }
  // [columns]
  const float* gradient() const { return gradient_.data(); }

  // Smooth: out[j] = sum_i (w_i - w_j) tau H'(s_j - s_i) of positives among themselves, times scale.
  void gradient_positives(const std::vector<float>& weight, double scale, const Settings<float>& s,
                          const Parallel& parallel, double* out) {
    std::vector<double> all(positives_.n), weighted(positives_.n);
    const auto read = [&](const float* of, std::vector<double>& slope) {
      sum(positives_, of, s, parallel);
      for_targets(positives_, parallel, [&](int64_t begin, int64_t end) {
        kernels().slopes_in_order(boxes_, sources_, positives_, begin, end, s, slope.data());
      });
    };
    read(nullptr, all);
    read(weight.data(), weighted);
    for (int64_t i = 0; i < positives_.n; ++i) out[i] = (weighted[i] - static_cast<double>(weight[i]) * all[i]) * scale;
  }

 private:
  // Targets, boxes and columns of one task.
  static constexpr int64_t kPiece = 2048, kBoxes = 8, kSpread = 1 << 16;

  static const ScanKernels& kernels() { return instruction_set().scan; }

  // body(begin, end) of equal pieces.
  template <typename Body>
  static void in_pieces(int64_t size, int64_t piece, const Parallel& parallel, const Body& body) {
    parallel.run((size + piece - 1) / piece,
                 [&](int64_t task, int) { body(task * piece, std::min(size, (task + 1) * piece)); });
  }
  // The same of targets, of which those that are tied stay together.
  template <typename Body>
  static void for_targets(const Points& targets, const Parallel& parallel, const Body& body) {
    const float* const value = targets.value.data();
    const auto untied = [&](int64_t at) -> int64_t {
      if (at == 0 || at == targets.n || value[at - 1] < value[at]) return at;
      return std::upper_bound(value + at, value + targets.n, value[at]) - value;
    };
    in_pieces(targets.n, kPiece, parallel, [&](int64_t begin, int64_t end) { body(untied(begin), untied(end)); });
  }

  void sum(const Points& points, const float* weight, const Settings<float>& s, const Parallel& parallel) {
    sources_.begin(points, weight, boxes_.size());
    in_pieces(boxes_.size(), kBoxes, parallel,
              [&](int64_t begin, int64_t end) { kernels().moments(boxes_, s.tau, begin, end, sources_); });
    parallel.run(weight && s.surrogate != Surrogate::kSmooth ? 3 : 2, [&](int64_t task, int) {
      if (task == 0) kernels().up(boxes_, sources_);
      if (task == 1) kernels().down(boxes_, s.tau, sources_);
      if (task == 2) kernels().weights(sources_);
    });
  }

  void read_ranks(const Settings<float>& s, const Parallel& parallel, double* rank, double* slope) {
    in_pieces(positives_.n, kPiece, parallel, [&](int64_t begin, int64_t end) {
      kernels().ranks(boxes_, sources_, positives_, begin, end, s, rank, slope);
    });
  }

  Sorter<float> sorter_;
  Points negatives_, positives_;
  std::vector<uint32_t> column_;  // [n]  of each sorted negative
  Boxes boxes_;
  Sources sources_;
  std::vector<float> gradient_;  // [columns]
};

}  // namespace roadmap
