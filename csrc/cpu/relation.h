// What each pair of a query and a reference is: positive, negative or left out. Masks or lists come in, bits go out.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "rows.h"

namespace roadmap {

// For each of `values` the columns of `references` that equal it, ascending, as Lists.
void equal_lists(const int64_t* values,      // [rows]
                 int64_t rows,               //
                 const int64_t* references,  // [columns]
                 int64_t columns,            //
                 int64_t* span,              // [rows, 2]
                 int64_t* column);           // [columns]

// The level of each pair by its relevance: how many distinct positive values of the row it reaches. Returns how many
// there are, or -1 if there are more than kMostLevels, or one that is NaN or negative.
template <typename T>
int row_levels(const T* relevance,     // [columns]
               const uint8_t* ignore,  // [columns]  nonzero: whatever it is, its level is 0; may be null
               int64_t columns,        //
               uint8_t* level,         // [columns]
               double* value);         // [kMostLevels]  relevance by level, from level 1 on; 0 beyond the last

// A relation as bits, a block at a time.
class PairMasks {
 public:
  PairMasks(const Relation& relation, const Conversions& convert) : r_(relation), convert_(convert) {}

  // The masks of columns [begin, begin + count) of a row; what lies beyond is ignored.
  void fill(int64_t row, int64_t begin, int count, BlockMasks& bits) const {
    const int words = static_cast<int>(divide_up(count, 64));
    if (r_.target) {
      convert_.mask_bits(r_.target + row * r_.target_stride + begin, count, bits.positive);
    } else {
      std::fill(bits.positive, bits.positive + words, uint64_t(0));
      mark(r_.positive, row, begin, count, bits.positive);
    }
    if (r_.ignore) {
      convert_.mask_bits(r_.ignore + row * r_.ignore_stride + begin, count, bits.ignored);
    } else {
      fill_left_out(row, begin, count, words, bits);
    }
    close(count, words, bits.ignored);
    for (int w = 0; w < words; ++w) {
      bits.positive[w] &= ~bits.ignored[w];
      bits.negative[w] = ~(bits.positive[w] | bits.ignored[w]);
    }
  }

  // The ignored columns alone: a pass that has the positives needs no more.
  void fill_ignored(int64_t row, int64_t begin, int count, BlockMasks& bits) const {
    if (r_.ignore || r_.negative.column) {
      fill(row, begin, count, bits);
      return;
    }
    const int words = static_cast<int>(divide_up(count, 64));
    std::fill(bits.ignored, bits.ignored + words, uint64_t(0));
    mark_left_out(row, begin, count, bits);
    close(count, words, bits.ignored);
  }

 private:
  void fill_left_out(int64_t row, int64_t begin, int count, int words, BlockMasks& bits) const {
    if (r_.negative.column) {  // a pair has to be listed to count
      std::copy(bits.positive, bits.positive + words, bits.ignored);
      mark(r_.negative, row, begin, count, bits.ignored);
      for (int w = 0; w < words; ++w) bits.ignored[w] = ~bits.ignored[w];
    } else {
      std::fill(bits.ignored, bits.ignored + words, uint64_t(0));
    }
    mark_left_out(row, begin, count, bits);
  }

  void mark_left_out(int64_t row, int64_t begin, int count, BlockMasks& bits) const {
    if (r_.left_out.column) mark(r_.left_out, row, begin, count, bits.ignored);
    const int64_t own = r_.own < 0 ? -1 : r_.own + row - begin;
    if (own >= 0 && own < count) bits.ignored[own / 64] |= uint64_t(1) << (own % 64);
  }

  // Past the end all are ignored.
  static void close(int count, int words, uint64_t* ignored) {
    if (count % 64) ignored[words - 1] |= ~uint64_t(0) << (count % 64);
  }

  // Sets the bits of a row's listed columns. No order of them, nor any value, leads outside the block.
  static void mark(const Lists& lists, int64_t row, int64_t begin, int count, uint64_t* bits) {
    const int64_t* const last = lists.column + lists.span[2 * row + 1];
    for (const int64_t* at = std::lower_bound(lists.column + lists.span[2 * row], last, begin); at < last; ++at) {
      if (*at >= begin + count) break;
      if (*at >= begin) bits[(*at - begin) / 64] |= uint64_t(1) << ((*at - begin) % 64);
    }
  }

  const Relation r_;
  const Conversions& convert_;
};

}  // namespace roadmap
