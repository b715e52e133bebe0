// What the vector kernels take and give: the interface between the schedules (row.h, scan.h, metrics.h) and the
// kernels (the files named _kernels.h), which are compiled once for each instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "../smooth_rank.h"
#include "boxes.h"

namespace roadmap {

// Columns of a row that are worked on together: values, exponentials and gradients of a block stay in the L2 cache.
constexpr int kBlock = 4096;
constexpr int kWords = kBlock / 64;

// A sum of doubles that loses nothing to their number (Kahan).
struct KahanSum {
  double sum = 0, lost = 0;

  void add(double x) {
    const double part = x - lost, next = sum + part;
    const double error = (next - sum) - part;
    lost = error == error ? error : 0;  // an infinite sum has lost nothing
    sum = next;
  }
};

// Neighbouring positives, in ascending order, that share one centre of the exponentials.
template <typename T>
struct Group {
  int64_t begin, end;  // into Positives, [begin, end)
  T centre;
  bool finite;        // infinite positives meet only ties and limits: no exponential is taken
  double weight = 0;  // sum of Positives::weight
};

// The positives of one row, ascending in score.
template <typename T>
struct Positives {
  std::vector<T> score;            // [P]
  std::vector<T> exponential;      // [P]  e^((u - centre) / tau)
  std::vector<double> weight;      // [P]  dloss/drank- of each
  std::vector<T> weight_negative;  // [P, kPad more]  the same in units of `unit`
  std::vector<T> weight_positive;  // [P, kPad more]  dloss/drank+ of each in units of `unit` (smooth only)
  double unit = 1;                 // the largest weight: equal weights, common where scores are tied, then are exact
  std::vector<Group<T>> groups;

  int64_t size() const { return static_cast<int64_t>(score.size()); }
};

// One block of a row: its scores in T and, a bit a column, which of them are negatives.
template <typename T>
struct Block {
  const T* score;                              // [count]
  const uint64_t* negative;                    // [kWords]
  int count;                                   // <= kBlock
  T top = std::numeric_limits<T>::infinity();  // no score is above it
};

// What the rank pass of a row leaves for its gradient pass, where one thread does both and it fits: the slope of every
// active pair, so that none is computed twice. Rows with few positives, which are most rows in training, fit.
template <typename T>
struct SavedSlopes {
  static constexpr int kSlopes = 1 << 16;
  static constexpr int kBits = 1 << 14;
  static constexpr int kEntries = 1 << 11;
  struct Entry {  // one group that met some of a block's negatives; the first entry of a block has group -1
    int64_t group;
    int count;          // elements in the active set; of a block's first entry, elements kept
    int slopes;         // where their slopes begin, [positives of the group, padded count]
    int active, above;  // where their words of bits begin, -1 for all and for none; of a block's first entry, kept_bits
  };
  alignas(64) T slope[kSlopes + kPad];
  uint16_t bits[kBits];
  Entry entry[kEntries];
  int slopes, words, entries;
  int next;    // the entry that the gradient pass reads next
  bool whole;  // nothing had to be left out

  void clear() {
    slopes = words = entries = next = 0;
    whole = true;
  }
  // Space for one more entry, or null where there is none: what has been saved is then of no use.
  Entry* add(int64_t group, int count, int64_t new_slopes, int new_words) {
    whole = whole && entries < kEntries && slopes + new_slopes <= kSlopes && words + new_words <= kBits;
    if (!whole) return nullptr;
    entry[entries] = {group, count, slopes, -1, -1};
    slopes += static_cast<int>(new_slopes);
    return &entry[entries++];
  }
  // Whether the block at `next` has one entry more, in which all that was kept is active.
  bool single() const {
    return next < entries && entry[next].group >= 0 && entry[next].active < 0 && entry[next].count > 0 &&
           (next + 1 == entries || entry[next + 1].group < 0);
  }
  int add_bits(const uint16_t* from, int count) {
    std::memcpy(bits + words, from, count * sizeof(uint16_t));
    words += count;
    return words - count;
  }
};

// What each column of a block is, a bit each: all that kernels see of masks and lists.
struct BlockMasks {
  uint64_t positive[kWords];
  uint64_t negative[kWords];
  uint64_t ignored[kWords];
};

// max(s - margin, 0) of every negative, and what one of them weighs in the gradient.
template <typename T>
struct Hinge {
  T margin, weight;
};

// How many are not 0, and their sum.
struct HingeSum {
  double sum = 0;
  int64_t count = 0;
};

// Buffers of one thread.
template <typename T>
struct Scratch {
  alignas(64) T kept[kBlock + kPad];    // negatives that reach some positive, packed
  alignas(64) T active[kBlock + kPad];  // the active set of one group, packed
  alignas(64) T active_exponential[kBlock + kPad];
  alignas(64) T active_weight[kBlock + kPad];
  alignas(64) T active_gradient[kBlock + kPad];
  alignas(64) T linear[kBlock + kPad];         // in the linear parts of how many groups an element is
  std::vector<double> linear_slope;            // the slope that so many of them give, scaled
  alignas(64) double gradient[kBlock + kPad];  // slope from active sets, in units of 1 / tau
  alignas(64) T score[kBlock + kPad];          // a block widened from a half type
  alignas(64) T out[kBlock + kPad];            // its gradient before narrowing
  uint16_t kept_bits[kBlock / 2];              // which columns of the block are kept, a word a vector
  uint16_t active_bits[kBlock / 2];            // which kept elements are active
  uint16_t above_bits[kBlock / 2];             // which are in the linear part
  BlockMasks masks;
  SavedSlopes<T> saved;
};

// Ranks and slopes are added to [P]; they are sums over the pairs of one span of columns.
template <typename T>
struct Sums {
  double* rank;   // [P]
  double* slope;  // [P], null when no gradient is wanted
};

template <typename T>
struct Kernels {
  bool (*any_nan)(const Block<T>&, const Settings<T>&, Scratch<T>&);
  // Fills Positives::exponential.
  void (*exponentials)(Positives<T>&, const Settings<T>&);
  // Adds the shares of a block's negatives to the sums of groups [first, last). Returns whether a negative is NaN.
  // `saved` may be null; else blocks come in order, all groups at once.
  bool (*rank_block)(const Block<T>&, const Positives<T>&, int64_t first, int64_t last, const Settings<T>&, Scratch<T>&,
                     Sums<T>, SavedSlopes<T>* saved);
  // Gradient of a block's negatives: out[j] = scale * sum_i w_i H'(s_j - s_i), 0 elsewhere. out is [count] and may be
  // the block itself. Reads a whole `saved`, blocks in order, if there is one. With `hinge`, the gradient of the hinges
  // is added; with `column_scale` [count], all is multiplied by it.
  void (*gradient_block)(const Block<T>&, const Positives<T>&, const Settings<T>&, double scale, const Hinge<T>* hinge,
                         const T* column_scale, Scratch<T>&, T* out, SavedSlopes<T>* saved);
  // out[j] = score[j] * column_scale[j] * row_scale. Returns the largest, NaN aside.
  T (*scale_block)(const T* score, const T* column_scale, T row_scale, int count, T* out);
  // gradient -= x (x . gradient) scale^2, each [n].
  void (*remove_radial)(T* gradient, const T* x, T scale, int64_t n);
  // Adds a block's negatives above the margin.
  void (*hinge_block)(const Block<T>&, T margin, HingeSum& sum);
  // AP = mean of rank+ / (rank+ + rank-): the weights dloss/drank-, and dloss/drank+ unless `second` is null. Returns
  // the sum of the losses of the positives; `largest` becomes the largest weight, by magnitude.
  double (*ap_weights)(const double* rank_positive, const double* rank_negative, int64_t size, double* weight,
                       double* second, double& largest);
  // Smooth: adds sum_{j in P, j != i} sigma(s_j - s_i) for the positives i of groups [first, last).
  void (*rank_positives)(const Positives<T>&, int64_t first, int64_t last, const Settings<T>&, Scratch<T>&,
                         double* rank);
  // Smooth: out[j - begin] = sum_i (w+_i - w+_j) sigma'(s_j - s_i) for the positives j in [begin, end).
  void (*gradient_positives)(const Positives<T>&, int64_t begin, int64_t end, const Settings<T>&, Scratch<T>&,
                             double* out);
};

// A score and where it came from, as they are sorted.
template <typename T>
struct Entry {
  using Index = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  T value;
  Index index;
};

// Equal parts of the range [low, high], 2^16 at the most.
template <typename T>
struct Buckets {
  T low, high;
  int32_t all;
};

// The kernels that put scores in order. All may be called for parts at once.
template <typename T>
struct Sorting {
  // The negatives of a block that reach the lowest positive, with their columns, `first` being the block's first.
  // Returns how many; widens [low, high] to hold them; `nan` is set if a negative is NaN.
  int (*prune_entries)(const Block<T>&, T lowest, int64_t first, const Settings<T>&, Scratch<T>&, Entry<T>* out, T& low,
                       T& high, bool& nan);
  // count[b] += how many of n entries lie in bucket b.
  void (*count_buckets)(const Entry<T>*, int64_t n, const Buckets<T>&, uint32_t* count);
  // Scatters them to `to`, where place[b] is the next free place of bucket b. Stable.
  void (*scatter_buckets)(const Entry<T>*, int64_t n, const Buckets<T>&, uint32_t* place, Entry<T>* to);
  // Sorts n entries, values within about [low, high], into `value` and `column` [n]: by value, equal ones by index if
  // they come so. Overwrites `from` and `space` [n].
  void (*sort)(Entry<T>* from, int64_t n, T low, T high, Entry<T>* space, T* value, typename Entry<T>::Index* column);
  // As Kernels::gradient_block, from what each column has: slope [count].
  void (*spread_block)(const Block<T>&, const T* slope, double scale, const Hinge<T>* hinge, const T* column_scale,
                       Scratch<T>&, T* out);
};

// The kernels of the sorted scan: see boxes.h for what they fill, and scan.h for the order. All that take a range may
// be called for parts of it at once.
struct ScanKernels {
  // Boxes::decay of boxes [begin, end).
  void (*decays)(Boxes&, double tau, int64_t begin, int64_t end);
  // Moments of boxes [begin, end), and `upto` and `from` of each alone; up() and down() make them those of all.
  void (*moments)(const Boxes&, double tau, int64_t begin, int64_t end, Sources&);
  void (*up)(const Boxes&, Sources&);
  void (*down)(const Boxes&, double tau, Sources&);  // and `beyond`
  void (*weights)(Sources&);                         // `passed`
  // Of targets u in [begin, end): rank[i] = sum over sources of H-(v - u), slope[i] = sum of H-'(v - u); this may be
  // null. Sources without weights.
  void (*ranks)(const Boxes&, const Sources&, const Points& targets, int64_t begin, int64_t end, const Settings<float>&,
                double* rank, double* slope);
  // Of targets v, and weighted sources u: out[column[j]] = scale times tau sum over sources of w H-'(v - u). A target
  // at `begin` must not be tied with the one before.
  void (*slopes)(const Boxes&, const Sources&, const Points& targets, int64_t begin, int64_t end,
                 const Settings<float>&, double scale, const uint32_t* column, float* out);
  // The same, out[j], without a scale.
  void (*slopes_in_order)(const Boxes&, const Sources&, const Points& targets, int64_t begin, int64_t end,
                          const Settings<float>&, double* out);
};

// The positives of one row in ascending order, and where they are many, a table that leads any score to its place among
// them. A score is in bucket floor((score - low) * scale), clamped to the buckets of the table. This never falls where
// the score rises, so what lies in lower buckets is lower, and only the positives of its own bucket have to be compared
// with it.
template <typename T>
struct LookupTable {
  // Rows with up to so many positives compare each score with each of them.
  static constexpr int64_t kFew = 32;
  // NaN at the end, which no score reaches.
  static constexpr int64_t kEnd = 3;

  std::vector<T> score;  // [P + kEnd]
  bool many = false;
  std::vector<int32_t> first;  // [buckets + 1] at least  how many positives lie in lower buckets
  T low = 0, scale = 0, last = 0;

  int64_t size() const { return static_cast<int64_t>(score.size()) - kEnd; }
};

// How many references reach a positive: kernels of the retrieval metrics.
template <typename T>
struct Counting {
  // The scores of a block that count and are at least `lowest`, packed, with NaN after them. Returns how many. `nan` is
  // set if one that counts is NaN.
  int (*pack)(const T* score, const uint64_t* ignored, int count, T lowest, T* packed, bool& nan);
  // The lowest and the highest of n packed scores.
  void (*range)(const T* packed, int64_t n, T& low, T& high);
  // The buckets of n scores.
  void (*place)(const T* score, int n, const LookupTable<T>&, int32_t* bucket);
  // reached[i + 1] += how many packed scores are at least positive i.
  void (*count_few)(const T* packed, int n, const LookupTable<T>&, uint32_t* reached);
  // reached[i] += how many packed scores are at least i of the positives and no more. `bucket` [n] is workspace.
  void (*count_many)(const T* packed, int n, const LookupTable<T>&, int32_t* bucket, uint32_t* reached);
};

struct Conversions {
  void (*mask_bits)(const uint8_t* bytes, int count, uint64_t* bits);  // a bit a byte: not zero
  void (*widen_half)(const uint16_t*, float*, int64_t);
  void (*narrow_half)(const float*, uint16_t*, int64_t);
};

struct InstructionSet {
  const char* name;
  Kernels<float> kernels_float;
  Kernels<double> kernels_double;
  Counting<float> counting_float;
  Counting<double> counting_double;
  Sorting<float> sorting_float;
  Sorting<double> sorting_double;
  ScanKernels scan;
  Conversions conversions;

  template <typename T>
  const Kernels<T>& kernels() const {
    if constexpr (sizeof(T) == 4) {
      return kernels_float;
    } else {
      return kernels_double;
    }
  }
  template <typename T>
  const Counting<T>& counting() const {
    if constexpr (sizeof(T) == 4) {
      return counting_float;
    } else {
      return counting_double;
    }
  }
  template <typename T>
  const Sorting<T>& sorting() const {
    if constexpr (sizeof(T) == 4) {
      return sorting_float;
    } else {
      return sorting_double;
    }
  }
};

extern const InstructionSet kBaseline;
#if defined(__x86_64__)
extern const InstructionSet kAvx2;
extern const InstructionSet kAvx512;
#endif

// The widest this processor has, or the one ROADMAP_EXT_CPU names. Throws std::runtime_error for one it cannot run.
const InstructionSet& instruction_set();
// Those this processor can run, widest first.
std::vector<const InstructionSet*> available_instruction_sets();

}  // namespace roadmap
