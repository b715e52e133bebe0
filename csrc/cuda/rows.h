// What the row kernel takes: the parameters of rows.cuh, for host and device. Knows nothing of torch.
#pragma once

#include <cmath>
#include <cstdint>

#include "../series.h"
#include "../smooth_rank.h"
#include "simt.h"

namespace roadmap::cuda {

using simt::Global;

// Elements as they lie in memory.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// 16 bytes of them, which are loaded and stored at once.
template <typename S>
struct alignas(16) Vector {
  S at[16 / sizeof(S)];
};

// Sums run in float at least.
template <typename S>
struct AccumulationOf {
  using type = float;
};
template <>
struct AccumulationOf<double> {
  using type = double;
};
template <typename S>
using Accumulation = typename AccumulationOf<S>::type;

// A list of columns for each row. Whatever a span or a column holds, nothing outside the list or the row is touched.
struct Lists {
  Global<const int64_t> span{};    // [rows, 2]  null: there are none of this kind
  Global<const int64_t> column{};  // [size]
  int64_t size = 0;
};

// Which pairs are positive, negative or left out: masks, or where target is null, lists.
struct Relation {
  Global<const uint8_t> target{};  // [rows, columns]
  Global<const uint8_t> ignore{};  // [rows, columns]  may be null
  int64_t target_stride = 0, ignore_stride = 0;
  Lists positive, left_out, negative;
  int64_t own = -1;  // row r's own column is own + r and left out; negative for none
};

// Constants of a pair, from the settings.
template <typename T>
struct PairConstants {
  bool smooth;
  T delta;
  T origin;         // near the threshold, in few bits
  T rho_tau;        // slopes are summed in units of 1 / tau
  T rate, rate_lo;  // float: log2(e) / tau in two parts; double: tau and 0
  T cut;            // a pair further below its positive counts for nothing
  T span;           // positives so far apart share a centre of the exponentials
  T reach;          // no exponential is taken of more than this, either way
  T most;           // nor of more by what a share of it is multiplied with: all products are finite
  double tau, rho, start, offset;
  double beyond;    // origin - delta
  double steepest;  // a bound of the slope

  explicit PairConstants(const Settings<T>& s)
      : smooth(s.surrogate == Surrogate::kSmooth),
        delta(s.delta),
        origin(s.origin),
        rho_tau(s.rho_tau),
        rate(sizeof(T) == 8 ? static_cast<T>(s.tau) : static_cast<T>(kLog2E / s.tau)),
        rate_lo(sizeof(T) == 8 ? T(0) : static_cast<T>(kLog2E / s.tau - static_cast<double>(rate))),
        cut(s.cut),
        span(static_cast<T>(40 * s.tau)),
        reach(static_cast<T>(200 * s.tau)),
        most(static_cast<T>(47 * s.tau)),
        tau(s.tau),
        rho(s.exact_rho),
        start(s.exact_start),
        offset(s.exact_offset),
        beyond(static_cast<double>(s.origin) - s.exact_delta),
        steepest(std::fmax(smooth ? 0 : s.exact_rho, 0.25 / s.tau)) {}

  static constexpr double kLog2E = 1.4426950408889634;
};

// Boxes of boxes.cuh are this wide, and their middles are multiples of it.
struct BoxGrid {
  double width = 0;  // a power of two, at most tau / 10
  float inverse = 0;
  int reach = 0;     // boxes so far apart do not count, sigma being 0 or 1; 0: there is no such grid
  int whole = 0;     // a box that is less far above a positive's is below its threshold as a whole
  double delta = 0;  // the threshold, as the settings have it

  template <typename T>
  explicit BoxGrid(const PairConstants<T>& k)
      : width(std::exp2(std::floor(std::log2(k.tau / 10)))),
        inverse(static_cast<float>(1 / width)),
        delta(static_cast<double>(k.origin) - k.beyond) {
    if (!(width > 1e-30 && width < 1e30)) return;
    reach = static_cast<int>(std::ceil(static_cast<double>(k.cut) / width)) + 1;
    // Two boxes for what rounding moves.
    whole = k.smooth ? kFarAbove : static_cast<int>(std::fmin(std::floor(k.delta / width) - 2, kFarAbove));
  }
  static constexpr int kFarAbove = 1 << 20;
};
constexpr int kMostBoxes = 2816;     // of a row; and cells whose sums stay in shared memory
constexpr int kBoxWords = 6;         // a box, or a cell
constexpr int kFewPositives = 1024;  // of a row by boxes: those with more have a launch of their own
constexpr int kSortChunk = 2048;     // positives that one block sorts
constexpr int kDerivatives = 10;     // of the sigmoid

enum class Op { kLoss, kObjective, kRank, kRankGradient, kCountPairs };
enum class GradientType { kNone, kFull, kHalf, kBFloat };

// The steps of a row. A block that owns a row takes them all in one launch; blocks that share one take one a launch.
enum Step : uint32_t {
  kMasks = 1u << 0,
  kCollect = 1u << 1,
  // By boxes (boxes.cuh):
  kLoad = 1u << 2,
  kSortChunks = 1u << 3,
  kMerge = 1u << 4,  // a launch for each pass, where blocks share a row
  kKeys = 1u << 5,
  kEdges = 1u << 6,
  kSumMoments = 1u << 7,
  kTotals = 1u << 8,
  kPrefix = 1u << 9,
  kRanks = 1u << 10,
  kWeighOnes = 1u << 11,  // smooth: among the positives
  kPrefixOnes = 1u << 12,
  kRanksAmong = 1u << 13,
  // Pairwise:
  kSort = 1u << 14,
  kPositives = 1u << 15,
  kNegatives = 1u << 16,
  // All:
  kWeights = 1u << 17,
  // By boxes:
  kWeigh = 1u << 18,
  kPrefixWeights = 1u << 19,
  kTable = 1u << 20,
  kBoxGradient = 1u << 21,
  kWeighOwn = 1u << 22,  // smooth: among the positives
  kPrefixOwn = 1u << 23,
  kGradientAmong = 1u << 24,
  // Pairwise:
  kOwn = 1u << 25,
  kGradient = 1u << 26,
  // All:
  kScatter = 1u << 27,
  // Of a launch, not of a row:
  kSigmoidTable = 1u << 28,
};
constexpr uint32_t kPairwiseSteps =
    kMasks | kCollect | kSort | kPositives | kNegatives | kWeights | kOwn | kGradient | kScatter;
constexpr uint32_t kAllSteps = kSigmoidTable - 1;
constexpr uint32_t kBoxSteps = kAllSteps & ~(kSort | kPositives | kNegatives | kOwn | kGradient);
// More positives than there can be.
constexpr int kNever = 1 << 30;

// Who does what. Rows first_row, first_row + 1, ... go to the slots in turn, and the blocks of a slot share its rows.
struct Schedule {
  uint32_t steps = kAllSteps;
  int threads = 0;  // a block; a multiple of 32
  int blocks_per_row = 1;
  int64_t slots = 0;
  int64_t first_row = 0, last_row = 0;
  bool in_shared = true;     // rows of one piece, which stays in shared memory; else any row, by way of the workspace
  bool only_longer = false;  // by way of the workspace: leave out the rows that were done in shared memory
  int most = kNever;         // positives of a row that is done in shared memory
  int boxes_above = kNever;  // rows of more positives go by boxes, in the workspace: kNever where none does
  bool by_boxes = false;     // by this launch, which leaves all others to that of the pairwise kernel
  bool skip_done = false;    // leave out the rows that a launch before has done by boxes
  int run = 0;               // kMerge: positives of a sorted run; 0: all passes
  int64_t places = 0;        // positives that the workspace has space for
  int64_t room = 0;          // and those of a row by boxes
  int reach = 0;             // of BoxGrid
};

// Memory for the rows in flight, [slots] each.
template <typename T>
struct Workspace {
  int64_t words = 0;            // of a bitmap: a bit a column
  int64_t sums = 0;             // of a slot
  Global<uint32_t> negative{};  // [slots, words]
  Global<uint32_t> positive{};  // [slots, words]
  Global<int32_t> count{};      // [rows]  positives of a row
  Global<int32_t> done{};  // [rows]  whether a row went by boxes; null where none does, defined for the longer ones
  // Rows that do not stay in shared memory; `blocks` are those of a row:
  Global<int32_t> block_positives{};  // [slots, blocks]  positives that a block found
  Global<int32_t> column{};  // [slots, places]  of the positives: ascending, then sorted by score within a piece
  Global<double> above{};    // [slots, places]  rank+, then dloss/drank+
  Global<double> below{};    // [slots, places]  rank-, then dloss/drank-
  Global<double> slope{};    // [slots, places]  slope of rank-, then the positive's own gradient
  Global<double> partial{};  // [slots, blocks, 2, capacity]  rank- and slope over a span of columns
  Global<double> hinge{};    // [slots, blocks]  sum of the negative hinges over a span
  Global<int32_t> flag{};    // [slots, blocks, 2]  how many of them are not 0; whether a score is NaN
  Global<double> outcome{};  // [slots, kOutcome]
  // By boxes:
  Global<float> sigmoid{};             // [kDerivatives, 2 reach + 1]  see tabulate_sigmoid()
  Global<float> sorted[2]{};           // [slots, room]  scores of the positives, ascending in [0]
  Global<int32_t> sorted_column[2]{};  // [slots, room]  their columns
  Global<int32_t> before{};            // [slots, words]  positives before a word of columns
  Global<float> key{};                 // [slots, 2 room]  steps and thresholds of the positives, ascending
  Global<int32_t> first{};             // [slots, kMostBoxes + 1]  the first cell of a box
  Global<int32_t> first_positive{};    // [slots, kMostBoxes + 1]  in it
  Global<int64_t> sum{};               // [slots, sums]  moments of cells, four each; then of positives
  Global<float> cubic{};               // the same memory
  Global<int64_t> block_sum{};         // [slots, blocks, 4]
  Global<double> among{};              // [slots, room]  smooth: sum of sigma' over the positives
  Global<int32_t>
      block_items{};  // [slots, blocks, 3]  whether a positive is not finite; -; whether the row is pairwise
};
constexpr int kOutcome = 5;

template <typename S>
struct RowParams {
  using T = Accumulation<S>;

  explicit RowParams(const PairConstants<T>& pair) : pair(pair), grid(pair) {}

  PairConstants<T> pair;
  BoxGrid grid;
  Op op = Op::kLoss;
  int64_t rows = 0, columns = 0, score_stride = 0;
  Global<const S> scores{};  // [rows, columns]
  Relation relation;
  Global<const T> row_scale{};     // [rows]  null for 1: what is ranked is score x row scale x column scale
  Global<const T> column_scale{};  // [columns]  null if and only if row_scale is
  bool ap = true, calibration = false;
  double positive_margin = 0, negative_margin = 0;
  T margin = 0;  // negative_margin as rounded to T, by which scores are decided

  GradientType gradient_type = GradientType::kNone;
  Global<T> gradient{};              // [rows, columns]  kFull; may be the scores
  Global<uint16_t> gradient_half{};  // [rows, columns]  kHalf, kBFloat

  Global<T> loss{};               // [rows]  kLoss
  double row_weight = 1;          // kLoss: of every row in what the gradient is of
  Global<T> unscale{};            // [rows]  kLoss of half types: gradient times this is the true one; may be null
  Global<const double> weight{};  // [rows, 3]  kObjective
  Global<double> value{};         // [rows, 5]  kObjective
  Global<int64_t> counts{};       // [rows, 2]  kCountPairs: positives and negatives
  Global<const int64_t> first{};  // [rows + 1]  kRank, kRankGradient: where a row's entries begin
  int64_t entries = 0;            // of which there are so many
  Global<int64_t> query{}, reference{};  // [entries]  kRank
  Global<T> positive_rank{};             // [entries]  kRank
  Global<T> negative_rank{};             // [entries]  kRank
  Global<T> slope_out{};                 // [entries]  kRank; may be null
  Global<const T> slope_in{};            // [entries]  kRankGradient
  Global<const T> positive_weight{};     // [entries]  kRankGradient; may be null
  Global<const T> negative_weight{};     // [entries]  kRankGradient

  Schedule schedule;
  Workspace<T> workspace;
};

// Positives of a piece, which is what a block works on at a time.
constexpr int kPiece = 512;
constexpr int kBoxPiece = 1;  // by boxes there are none
// Threads of a block at most.
constexpr int kMostThreads = 384;
// Blocks of the kernel for rows in shared memory: while one waits at a barrier, the other works. 80 registers a thread,
// which float64 would spill.
template <typename T>
constexpr int kBlocksPerMultiprocessor = sizeof(T) == 8 ? 1 : 2;

// Shared memory of a block, in bytes.
template <typename T>
constexpr int shared_bytes(int capacity, int threads, bool by_boxes) {
  const int arrays = (4 * static_cast<int>(sizeof(T)) + 3 * 8 + 2 * 4) * capacity +
                     (by_boxes ? (kBoxWords + 2) * 4 * kMostBoxes + 4 * kFewPositives + threads / 32 * 32 + 64 : 0);
  return arrays + threads / 32 * 8 * 8 + kOutcome * 8 + 16 * 16;  // sums of each warp, and rounding up of each array
}

}  // namespace roadmap::cuda
