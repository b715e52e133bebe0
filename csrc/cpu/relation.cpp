// Lists from labels, and levels from relevance: see relation.h.
#include "relation.h"

#include <algorithm>
#include <vector>

namespace roadmap {

namespace {

// MurmurHash3's finaliser: every bit of a label changes every bit of its slot, so that no spacing of labels is bad.
uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 33)) * 0xFF51AFD7ED558CCDu;
  x = (x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53u;
  return x ^ (x >> 33);
}

}  // namespace

void equal_lists(const int64_t* values, int64_t rows, const int64_t* references, int64_t columns, int64_t* span,
                 int64_t* column) {
  // A table of classes by their label, open addressing, at most half full.
  int bits = 4;
  while ((int64_t(1) << bits) < 2 * columns) ++bits;
  const int64_t slots = int64_t(1) << bits;
  constexpr int64_t kFree = -1;
  std::vector<int64_t> slot_class(slots, kFree), label, size, begin;
  // Where a label stands, or where it would.
  const auto find = [&](int64_t value) {
    int64_t slot = static_cast<int64_t>(mixed(static_cast<uint64_t>(value)) >> (64 - bits));
    while (slot_class[slot] != kFree && label[slot_class[slot]] != value) slot = (slot + 1) & (slots - 1);
    return slot;
  };
  std::vector<int64_t> of(columns);
  for (int64_t j = 0; j < columns; ++j) {
    int64_t& found = slot_class[find(references[j])];
    if (found == kFree) {
      found = static_cast<int64_t>(label.size());
      label.push_back(references[j]);
      size.push_back(0);
    }
    of[j] = found;
    ++size[found];
  }
  int64_t at = 0;
  for (const int64_t n : size) {
    begin.push_back(at);
    at += n;
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t found = slot_class[find(values[row])];
    span[2 * row] = found == kFree ? 0 : begin[found];
    span[2 * row + 1] = found == kFree ? 0 : begin[found] + size[found];
  }
  for (int64_t j = 0; j < columns; ++j) column[begin[of[j]]++] = j;  // columns ascend within a class
}

template <typename T>
int row_levels(const T* relevance, const uint8_t* ignore, int64_t columns, uint8_t* level, double* value) {
  T known[kMostLevels];  // ascending
  int count = 0;
  const auto place = [&](T of) { return static_cast<int>(std::lower_bound(known, known + count, of) - known); };
  T last = 0;  // most are alike
  for (int64_t j = 0; j < columns; ++j) {
    const T of = relevance[j];
    if (of == last || (ignore && ignore[j])) continue;
    if (!(of >= 0)) return -1;
    last = of;
    if (of == 0) continue;
    const int at = place(of);
    if (at < count && known[at] == of) continue;
    if (count == kMostLevels) return -1;
    std::copy_backward(known + at, known + count, known + count + 1);
    known[at] = of;
    ++count;
  }
  std::fill_n(value, kMostLevels, 0.0);
  std::copy_n(known, count, value);
  uint8_t last_level = 0;
  last = 0;
  for (int64_t j = 0; j < columns; ++j) {
    if (ignore && ignore[j]) {
      level[j] = 0;
      continue;
    }
    if (relevance[j] != last) {
      last = relevance[j];
      last_level = static_cast<uint8_t>(last == 0 ? 0 : place(last) + 1);
    }
    level[j] = last_level;
  }
  return count;
}

template int row_levels<float>(const float*, const uint8_t*, int64_t, uint8_t*, double*);
template int row_levels<double>(const double*, const uint8_t*, int64_t, uint8_t*, double*);

}  // namespace roadmap
