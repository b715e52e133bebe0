// A row whose positives are of several levels: a pass over the row for each level, by the steps of row.h.
//
// The positives of a pass are those of its level; its negatives are all that is lower; what is higher is left out, and
// counted by true steps. The gradients of the passes are added up. To the surrogate "smooth" all pairs are alike: there
// one pass ranks all positives, and levels only say what they are worth.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "row.h"
#include "weights.h"

namespace roadmap {

// A row of a matrix as a matrix of its own.
inline Matrix row_of(const Matrix& m, int64_t row) {
  const auto moved = [](const void* from, int64_t bytes) -> const void* {
    return from ? static_cast<const char*>(from) + bytes : nullptr;
  };
  const bool wide = m.type == ScoreType::kFloat || m.type == ScoreType::kDouble;
  const int64_t size = !wide ? 2 : m.type == ScoreType::kFloat ? 4 : 8;
  Matrix one = m;
  Relation& r = one.relation;
  one.rows = 1;
  one.scores = moved(m.scores, row * m.score_stride * size);
  one.row_scale = moved(m.row_scale, row * size);
  if (r.target) r.target += row * r.target_stride;
  if (r.ignore) r.ignore += row * r.ignore_stride;
  for (Lists* lists : {&r.positive, &r.left_out, &r.negative}) lists->span += lists->span ? 2 * row : 0;
  if (r.own >= 0) r.own += row;
  return one;
}

template <typename T>
class GradedRow {
 public:
  // What is asked of `matrix`, whose pass is given; nothing is looked at yet.
  GradedRow(const Matrix& matrix, const SurrogateSettings& surrogate, const Pass<T>& pass, const Parallel& parallel,
            Workspace<T>& space)
      : m_(matrix), surrogate_(surrogate), pass_(pass), parallel_(parallel), space_(space), own_(space.levels) {}

  // Marks the columns of a row. Returns whether its positives are of several levels (or of more than there can be, which
  // makes what they are worth NaN): others need not come here.
  bool mark(int64_t row) {
    row_ = row;
    const Relation& r = m_.relation;
    const PairMasks masks(r, instruction_set().conversions);
    own_.level.assign(m_.columns, 0);
    own_.positive.clear();
    uint8_t* const level = own_.level.data();
    const auto most = static_cast<uint8_t>(r.levels);
    BlockMasks& bits = scratch<T>().masks;
    for (int64_t at = 0; at < m_.columns; at += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, m_.columns - at));
      masks.fill(row, at, count, bits);
      for_bits(bits.ignored, count, [&](int j) { level[at + j] = kLeftOut; });
      for_bits(bits.positive, count, [&](int j) {
        level[at + j] = r.target ? std::min(r.target[row * r.target_stride + at + j], most) : uint8_t(1);
        own_.positive.push_back(at + j);
      });
    }
    for (uint8_t each = 2; !r.target && each <= most; ++each) {
      const Lists& lists = r.finer[each - 2];
      for (int64_t k = lists.span[2 * row]; k < lists.span[2 * row + 1]; ++k) {
        const int64_t column = lists.column[k];
        if (column < 0 || column >= m_.columns) continue;
        if (level[column] > 0 && level[column] <= most) level[column] = each;
      }
    }
    const auto lowest = [&](int64_t a, int64_t b) { return level[a] < level[b]; };
    const auto& positive = own_.positive;
    if (positive.empty()) return false;
    const auto [low, high] = std::minmax_element(positive.begin(), positive.end(), lowest);
    const double worth = m_.worth ? m_.worth[row * r.levels] : 1;
    return level[*low] != level[*high] || worth != worth;
  }

  // The loss of the row, and its gradient, of `scale` times the loss and of what weighs `positive` and `negative` of
  // the hinges. calibrate(row) is called with what has the hinges, where they are wanted.
  template <typename Calibrate>
  double run(double scale, const Calibrate& calibrate) {
    scale_ = scale;
    gather();
    if (pass_.gradient) own_.sum.assign(m_.columns, T(0));
    own_.further.assign(rises() ? m_.columns : 0, 0.0);
    if (pass_.smooth) {
      pass(0);
    } else {
      for (int64_t level = m_.relation.levels; level > 0 && !nan_; --level) {
        if (!own_.score[level].empty()) pass(level);
      }
    }
    if (pass_.objective.calibration) {
      const Objective hinges = {false, true, pass_.objective.positive_margin, pass_.objective.negative_margin};
      run_pass(row_of(m_, row_), hinges, calibrate);
    }
    if (pass_.gradient) write();
    return nan_ ? std::numeric_limits<double>::quiet_NaN() : 1 - gained_;
  }

 private:
  static constexpr uint8_t kLeftOut = 255;

  template <typename Body>
  static void for_bits(const uint64_t* words, int count, const Body& body) {
    for (int w = 0; w < divide_up(count, 64); ++w) {
      for (uint64_t bits = words[w]; bits; bits &= bits - 1) {
        const int j = 64 * w + __builtin_ctzll(bits);
        if (j < count) body(j);
      }
    }
  }

  double worth(int64_t level) const {
    const double relevance = m_.worth ? m_.worth[row_ * m_.relation.levels + level - 1] : 1;
    return ranking().loss == Loss::kNdcg && ranking().exponential ? std::exp2(relevance) - 1 : relevance;
  }
  const Ranking& ranking() const { return pass_.objective.ranking; }
  // Whether hierarchical ranks have a gradient.
  bool rises() const {
    return ranking().loss == Loss::kHap && (pass_.smooth || ranking().leak > 0 || ranking().beta > 0);
  }

  // Scores of the positives by level, what the row is worth, and the scores widened where they are of a half type.
  void gather() {
    const int64_t levels = m_.relation.levels;
    nan_ = false;
    gained_ = all_ = 0;
    own_.score.resize(levels + 1);
    for (std::vector<T>& score : own_.score) score.clear();
    for (const int64_t column : own_.positive) {
      const T score = pass_.input.score(row_, column);
      nan_ |= score != score;
      own_.score[own_.level[column]].push_back(score);
    }
    int64_t above = 0;
    for (int64_t level = levels; level > 0; --level) {
      std::vector<T>& score = own_.score[level];
      const auto size = static_cast<int64_t>(score.size());
      if (!nan_) std::sort(score.begin(), score.end());
      all_ += worth(level) *
              (ranking().loss == Loss::kHap ? static_cast<double>(size) : discounts(above + size) - discounts(above));
      above += size;
    }
    nan_ |= all_ != all_;
    if (pass_.input.wide()) return;
    own_.wide.resize(m_.columns);
    for (int64_t at = 0; at < m_.columns; at += kBlock) {
      const int64_t count = std::min<int64_t>(kBlock, m_.columns - at);
      const Block<T> block = pass_.input.load(row_, at, count, scratch<T>());
      std::copy_n(block.score, count, own_.wide.data() + at);
    }
  }

  // Of all positives, for level 0, or of one level.
  void pass(int64_t level) {
    Matrix one = row_of(m_, row_);
    if (level) {
      own_.target.resize(m_.columns);
      own_.ignore.resize(m_.columns);
      for (int64_t j = 0; j < m_.columns; ++j) {
        own_.target[j] = own_.level[j] == level;
        own_.ignore[j] = own_.level[j] > level;
      }
      one.relation = {};
      one.relation.target = own_.target.data();
      one.relation.ignore = own_.ignore.data();
    }
    const Objective alone = {true, false, 0, 0, ranking()};
    run_pass(one, alone, [&](Row<T>& row) {
      nan_ |= row.nan;
      if (!row.nan && row.size()) weigh(row, level);
      row.scale = scale_;
    });
  }

  // Adds the gradient of a pass.
  template <typename Weigh>
  void run_pass(Matrix one, const Objective& objective, const Weigh& weigh) {
    if (!pass_.input.wide()) {
      one.scores = own_.wide.data();
      one.type = ScoreType::kFloat;
    }
    own_.part.resize(pass_.gradient ? m_.columns : 0);
    void* const gradient = pass_.gradient ? own_.part.data() : nullptr;
    const Pass<T> made(one, surrogate_, objective, objective.ranks, objective.ranks && gradient, gradient);
    RowSteps<T>(made, parallel_, space_).run(0, weigh);
    for (int64_t j = 0; gradient && j < m_.columns; ++j) own_.sum[j] += own_.part[j];
  }

  // The weights of a pass.
  void weigh(Row<T>& row, int64_t level) {
    const int64_t size = row.size();
    const std::vector<T>& score = row.p.score;
    for (int64_t higher = level + 1; level && higher <= m_.relation.levels; ++higher) {
      add_reaching(own_.score[higher], score, 1.0, row.rank_positive);
    }
    own_.worth.resize(size);
    for (int64_t i = 0; i < size; ++i) own_.worth[i] = worth(level ? level : own_.level[row.source[i]]);
    Ranked ranked = {row.rank_positive.data(), row.rank_negative.data(), size, 0, 0, own_.worth.data()};
    ranked.all = all_;
    if (ranking().loss == Loss::kHap) {
      rank_hierarchically(row, level);
      ranked.hierarchical = own_.rank.data();
    }
    row.second.resize(pass_.smooth ? size : 0);
    Weights weights = {row.p.weight.data(), pass_.smooth ? row.second.data() : nullptr};
    gained_ += ranking().loss == Loss::kHap ? hap_weights(ranked, weights) : ndcg_weights(ranked, weights);
    row.set_weights(pass_.smooth, weights.largest);
  }

  // rank[i] += by, for each of the `others` that is at least score[i]; both ascend.
  static void add_reaching(const std::vector<T>& others, const std::vector<T>& score, double by,
                           std::vector<double>& rank) {
    const auto all = static_cast<int64_t>(others.size());
    for (int64_t i = 0, lower = 0; i < static_cast<int64_t>(score.size()); ++i) {
      while (lower < all && others[lower] < score[i]) ++lower;
      rank[i] += by * static_cast<double>(all - lower);
    }
  }

  // Ranks of the positives in hand among all, each counting for the relevance that both share; and their gradient.
  void rank_hierarchically(const Row<T>& row, int64_t level) {
    const std::vector<T>& score = row.p.score;
    own_.rank.assign(row.size(), 0.0);
    if (!pass_.smooth) {
      const bool rising = rises();
      for (int64_t other = 1; other <= m_.relation.levels; ++other) {
        const double shared = std::min(worth(level), worth(other));
        const bool plain = other <= level || !rising;
        add_reaching(own_.score[other], score,
                     plain && other > level ? shared * ranking().gamma
                     : plain                ? shared
                                            : 0.0,
                     own_.rank);
      }
      if (!rising) return;
    }
    const double smoothness = pass_.settings.tau;
    for (int64_t i = 0; i < row.size(); ++i) {
      const double mine = own_.worth[i];
      double rank = pass_.smooth ? mine : 0, own = 0;
      const double by = scale_ / all_ / (row.rank_positive[i] + row.rank_negative[i]);
      const auto column = static_cast<int64_t>(row.source[i]);
      for (const int64_t other : own_.positive) {
        if (other == column || (!pass_.smooth && own_.level[other] <= level)) continue;
        const T theirs = pass_.input.score(row_, other);
        const double t = theirs == score[i] ? 0.0 : static_cast<double>(theirs - score[i]);
        const double shared = std::min(mine, worth(own_.level[other]));
        double step, slope;
        if (pass_.smooth) {
          step = 1 / (1 + std::exp(-t / smoothness));
          slope = step * (1 - step) / smoothness;
        } else if (t < 0) {
          step = ranking().leak * t;
          slope = ranking().leak;
        } else {
          const double rising = ranking().beta * t + ranking().gamma;
          step = std::min(rising, 1.0);
          slope = rising <= 1 ? ranking().beta : 0.0;
        }
        rank += shared * step;
        own_.further[other] -= by * shared * slope;
        own += by * shared * slope;
      }
      own_.rank[i] += rank;
      own_.further[column] += own;
    }
  }

  // The sum, to where the gradient of the row belongs.
  void write() {
    T* const sum = own_.sum.data();
    const T* const column_scale = pass_.input.column_scale(0);
    if (!own_.further.empty()) {
      for (const int64_t j : own_.positive) {
        const double by = pass_.input.row_scale(row_) * (column_scale ? column_scale[j] : T(1));
        sum[j] += static_cast<T>(own_.further[j] * by);
      }
    }
    if (nan_) {
      for (int64_t j = 0; j < m_.columns; ++j) {
        sum[j] = own_.level[j] == kLeftOut ? T(0) : std::numeric_limits<T>::quiet_NaN();
      }
    }
    if (pass_.input.wide()) {
      std::copy_n(sum, m_.columns, static_cast<T*>(pass_.gradient) + row_ * m_.columns);
      return;
    }
    T largest = 0;
    for (int64_t j = 0; j < m_.columns; ++j) largest = std::max(largest, std::fabs(sum[j]));
    const bool scales = largest > 0 && std::isfinite(largest);
    const double up = scales ? std::ldexp(1.0, std::max(-100, std::min(100, 14 - std::ilogb(largest)))) : 1.0;
    pass_.unscale[row_] = static_cast<T>(1 / up);
    for (int64_t j = 0; j < m_.columns; ++j) sum[j] = static_cast<T>(sum[j] * up);
    for (int64_t at = 0; at < m_.columns; at += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, m_.columns - at));
      pass_.input.narrow(sum + at, row_, at, count, pass_.gradient);
    }
  }

  const Matrix& m_;
  const SurrogateSettings& surrogate_;
  const Pass<T>& pass_;
  const Parallel& parallel_;
  Workspace<T>& space_;
  Levels<T>& own_;
  int64_t row_ = 0;
  double scale_ = 1, gained_ = 0, all_ = 0;
  bool nan_ = false;
};

}  // namespace roadmap
