// A matrix as the steps of a row read and write it: scores widened and scaled, what each pair is, gradients narrowed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "half.h"
#include "kernels.h"
#include "relation.h"
#include "rows.h"
#include "sorter.h"

namespace roadmap {

template <typename T>
class RowInput {
 public:
  // Positives of a span of columns.
  struct Found {
    std::vector<Entry<T>> entry;  // [at least part.count]  score and column, these ascending
    typename Sorter<T>::Part part;
  };

  RowInput(const Matrix& m, const InstructionSet& set)
      : m_(m),
        convert_(set.conversions),
        kernels_(set.kernels<T>()),
        sorting_(set.sorting<T>()),
        masks_(m.relation, convert_) {}

  int64_t rows() const { return m_.rows; }
  int64_t columns() const { return m_.columns; }

  // Scores of the type that they are summed in.
  bool wide() const { return m_.type == ScoreType::kFloat || m_.type == ScoreType::kDouble; }
  T row_scale(int64_t row) const { return m_.row_scale ? static_cast<const T*>(m_.row_scale)[row] : T(1); }
  // Of the columns from `begin` on; null: 1.
  const T* column_scale(int64_t begin) const {
    return m_.column_scale ? static_cast<const T*>(m_.column_scale) + begin : nullptr;
  }

  T score(int64_t row, int64_t column) const {
    const int64_t at = row * m_.score_stride + column;
    switch (m_.type) {
      case ScoreType::kHalf: return half_to_float(static_cast<const uint16_t*>(m_.scores)[at]);
      case ScoreType::kBFloat16: return bfloat_to_float(static_cast<const uint16_t*>(m_.scores)[at]);
      default: break;
    }
    const T value = static_cast<const T*>(m_.scores)[at];
    return m_.row_scale ? value * *column_scale(column) * row_scale(row) : value;
  }

  // Columns [begin, begin + count) of a row. What has to be computed goes to scratch, and so do the masks.
  Block<T> load(int64_t row, int64_t begin, int64_t count, Scratch<T>& scratch) const {
    masks_.fill(row, begin, static_cast<int>(count), scratch.masks);
    const int64_t at = row * m_.score_stride + begin;
    const T* score = static_cast<const T*>(m_.scores) + at;
    if (m_.row_scale) {
      const T top =
          kernels_.scale_block(score, column_scale(begin), row_scale(row), static_cast<int>(count), scratch.score);
      return {scratch.score, scratch.masks.negative, static_cast<int>(count), top};
    }
    if (!wide()) {
      widen(static_cast<const uint16_t*>(m_.scores) + at, count, scratch.score);
      score = scratch.score;
    }
    return {score, scratch.masks.negative, static_cast<int>(count)};
  }

  // Finds the positives of columns [begin, end).
  void positives(int64_t row, int64_t begin, int64_t end, const Settings<T>& settings, Scratch<T>& scratch,
                 Found& found) const {
    // A score as it lies needs none of the questions of score(), asked once for each positive.
    const bool plain = wide() && !m_.row_scale;
    const T* const scores = plain ? static_cast<const T*>(m_.scores) + row * m_.score_stride : nullptr;
    typename Sorter<T>::Part part;
    for (int64_t at = begin; at < end; at += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, end - at));
      masks_.fill(row, at, count, scratch.masks);
      const int words = static_cast<int>(divide_up(count, 64));
      int64_t k = part.count;
      for (int w = 0; w < words; ++w) part.count += __builtin_popcountll(scratch.masks.positive[w]);
      if (found.entry.size() < static_cast<size_t>(part.count)) found.entry.resize(std::max(2 * k, part.count));
      Entry<T>* const entry = found.entry.data();
      if (plain && (part.count - k) * kSparseBlock > count) {
        sorting_.prune_entries({scores + at, scratch.masks.positive, count}, -std::numeric_limits<T>::infinity(), at,
                               settings, scratch, entry + k, part.low, part.high, part.nan);
        continue;
      }
      for (int w = 0; w < words; ++w) {
        for (uint64_t bits = scratch.masks.positive[w]; bits; bits &= bits - 1, ++k) {
          const int64_t column = at + 64 * w + __builtin_ctzll(bits);
          const T value = plain ? scores[column] : score(row, column);
          entry[k] = {value, static_cast<typename Entry<T>::Index>(column)};
          part.nan |= value != value;
          part.low = value < part.low ? value : part.low;
          part.high = value > part.high ? value : part.high;
        }
      }
    }
    found.part = part;
  }

  // The gradient of a block is computed at out() and done once it is narrowed.
  T* out(int64_t row, int64_t begin, void* gradient, Scratch<T>& scratch) const {
    return wide() ? static_cast<T*>(gradient) + row * m_.columns + begin : scratch.out;
  }
  void narrow(const T* out, int64_t row, int64_t begin, int count, void* gradient) const {
    if constexpr (sizeof(T) == 4) {
      uint16_t* const to = static_cast<uint16_t*>(gradient) + row * m_.columns + begin;
      if (m_.type == ScoreType::kHalf) {
        convert_.narrow_half(out, to, count);
      } else if (m_.type == ScoreType::kBFloat16) {
        for (int j = 0; j < count; ++j) to[j] = float_to_bfloat(out[j]);
      }
    }
  }

 private:
  // Blocks with a positive among so many columns, or more, are searched in vectors.
  static constexpr int64_t kSparseBlock = 32;

  void widen(const uint16_t* from, int64_t count, T* to) const {
    if constexpr (sizeof(T) == 4) {
      if (m_.type == ScoreType::kHalf) {
        convert_.widen_half(from, to, count);
      } else {
        for (int64_t j = 0; j < count; ++j) to[j] = bfloat_to_float(from[j]);
      }
    }
  }

  const Matrix m_;
  const Conversions& convert_;
  const Kernels<T>& kernels_;
  const Sorting<T>& sorting_;
  const PairMasks masks_;
};

}  // namespace roadmap
