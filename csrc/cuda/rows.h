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

enum class Op { kLoss, kObjective, kRank, kRankGradient, kCountPairs };
enum class GradientType { kNone, kFull, kHalf, kBFloat };

// The steps of a row. A block that owns a row takes them all in one launch; blocks that share one take one a launch.
enum Step : uint32_t {
  kMasks = 1u << 0,
  kCollect = 1u << 1,
  // Rows that are scanned (scan.cuh):
  kKeys = 1u << 2,
  kCountDigit = 1u << 3,  // and kScatterDigit, one after the other for each of four digits: bits 3 to 10
  kScatterDigit = 1u << 4,
  kSplit = 1u << 11,
  kPlaces = 1u << 12,
  kSums = 1u << 13,
  kJoin = 1u << 14,
  kRead = 1u << 15,
  kSumsAmong = 1u << 16,  // smooth: of the positives
  kJoinAmong = 1u << 17,
  kReadAmong = 1u << 18,
  // Rows that are not:
  kSort = 1u << 19,
  kPositives = 1u << 20,
  kNegatives = 1u << 21,
  // All:
  kWeights = 1u << 22,
  // Scanned:
  kSumsWeighted = 1u << 23,
  kJoinWeighted = 1u << 24,
  kReadWeighted = 1u << 25,
  kSumsOwn = 1u << 26,  // smooth: of the positives, weighted
  kJoinOwn = 1u << 27,
  kReadOwn = 1u << 28,
  // Not scanned:
  kOwn = 1u << 29,
  kGradient = 1u << 30,
  kScatter = 1u << 31,
};
constexpr int kDigits = 4;  // of 8 bits
constexpr uint32_t kSortKeys = ((1u << 2 * kDigits) - 1) * kCountDigit | kKeys | kSplit | kPlaces;
constexpr uint32_t kScanSteps = ~(kSort | kPositives | kNegatives | kOwn | kGradient);
constexpr uint32_t kPairwiseSteps =
    kMasks | kCollect | kSort | kPositives | kNegatives | kWeights | kOwn | kGradient | kScatter;
constexpr uint32_t kAllSteps = ~0u;
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
  int scan_above = kNever;   // rows of more positives are scanned, in the workspace: kNever where none is
  bool scan = false;         // by this launch, which leaves all others to that of the pairwise kernel
};

// Memory for the rows in flight, [slots] each.
template <typename T>
struct Workspace {
  int64_t words = 0;            // of a bitmap: a bit a column
  Global<uint32_t> negative{};  // [slots, words]
  Global<uint32_t> positive{};  // [slots, words]
  Global<int32_t> count{};      // [rows]  positives of a row
  Global<int32_t> done{};       // [rows]  whether a row was scanned; null where none is, defined for the longer ones
  // Rows that do not stay in shared memory; `blocks` are those of a row:
  Global<int32_t> block_positives{};  // [slots, blocks]  positives that a block found
  Global<int32_t> column{};  // [slots, columns]  of the positives: ascending, then sorted by score within a piece
  Global<double> above{};    // [slots, columns]  rank+, then dloss/drank+
  Global<double> below{};    // [slots, columns]  rank-, then dloss/drank-
  Global<double> slope{};    // [slots, columns]  slope of rank-, then the positive's own gradient
  Global<double> partial{};  // [slots, blocks, 2, capacity]  rank- and slope over a span of columns
  Global<double> hinge{};    // [slots, blocks]  sum of the negative hinges over a span
  Global<int32_t> flag{};    // [slots, blocks, 2]  how many of them are not 0; whether a score is NaN
  Global<double> outcome{};  // [slots, kOutcome]
  // Scanned rows. Items are columns, sorted by score, what is left out at the end; 32 of them are a leaf.
  // [1] of both lie over `below`, a slot's keys and then its indices over the slot's share: [slots, 2, columns]
  Global<uint32_t> key[2]{};      // [slots, columns]  scores in the order of unsigned numbers
  Global<uint32_t> index[2]{};    // [slots, columns]  their columns
  Global<uint32_t> sorted{};      // [slots, words]  which items are positives, a bit each
  Global<int32_t> before{};       // [slots, words]  positives before a word of columns
  Global<int32_t> leaf_before{};  // [slots, words]  positives before a leaf
  Global<int32_t> position{};     // [slots, columns]  the item that a positive is; ascending
  Global<double> among{};         // [slots, columns]  smooth: sum of sigma' over the other positives
  Global<double> state_below{};   // [slots, words + 1, kTerms]  exponential sums of all below a leaf
  Global<double> state_above{};   // [slots, words + 1, kTerms]  of a leaf and all above
  Global<double> leaf_weight{};   // [slots, words + 1]  weights of a leaf and all above
  Global<double> leaf_sum{};      // [slots, words + 1]  of their scores, from that of its first item on
  Global<int32_t> digits{};       // [slots, blocks, 256]
  Global<int32_t> block_items{};  // [slots, blocks, 3]  items, positives among the sorted ones, and whether a score or
                                  // weight is not finite
};
constexpr int kTerms = Series::kDegree;
constexpr int kOutcome = 5;

template <typename S>
struct RowParams {
  using T = Accumulation<S>;

  explicit RowParams(const PairConstants<T>& pair) : pair(pair) {}

  PairConstants<T> pair;
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
// Threads of a block at most.
constexpr int kMostThreads = 384;
// Blocks of the kernel for rows in shared memory: while one waits at a barrier, the other works. 80 registers a thread,
// which float64 would spill.
template <typename T>
constexpr int kBlocksPerMultiprocessor = sizeof(T) == 8 ? 1 : 2;

// Shared memory of a block, in bytes.
template <typename T>
constexpr int shared_bytes(int capacity, int threads, bool scan) {
  const int arrays =
      (4 * static_cast<int>(sizeof(T)) + 3 * 8 + 2 * 4) * capacity + (scan ? (threads / 32 + 1) * 1024 : 0);
  return arrays + threads / 32 * 8 * 8 + kOutcome * 8 + 16 * 16;  // sums of each warp, and rounding up of each array
}

}  // namespace roadmap::cuda
