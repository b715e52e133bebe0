// The kernels that put scores in order, in the vectors of whichever instruction set includes this file: the negatives of
// a row are pruned, scattered to buckets, and sorted there by 16 bits of where they lie.

namespace {

template <typename T>
struct Bucketing {
  T low, scale, last;

  explicit Bucketing(const Buckets<T>& b) : low(b.low), scale(b.all / (b.high - b.low)), last(T(b.all - 1)) {}
  // Whether the buckets tell anything apart: the range may be too wide or too narrow for T.
  bool usable() const { return scale > 0 && scale < infinity<T>(); }
  // Never falls where the value rises.
  uint32_t of(T value) const {
    const T x = (value - low) * scale, from = x > 0 ? x : T(0);
    return static_cast<uint32_t>(static_cast<int32_t>(from < last ? from : last));
  }
};

// Of n values and some +inf.
template <typename T>
T lowest_of(const T* values, int n) {
  using X = Vec<T>;
  auto top = X::set(-infinity<T>());
  for (int j = 0; j < n; j += X::kWidth) top = X::max(top, X::set(0) - X::load(values + j));
  T lanes[X::kWidth];
  X::store(lanes, top);
  return -*std::max_element(lanes, lanes + X::kWidth);
}

// Entries from values and the bits of their columns.
template <typename T>
void join_entries(const T* value, const T* column, int n, Entry<T>* out) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  if constexpr (sizeof(T) == 4) {  // a word each: in vectors
    for (int j = 0; j < n; ++j) {
      uint32_t low, high;
      std::memcpy(&low, value + j, sizeof low);
      std::memcpy(&high, column + j, sizeof high);
      const uint64_t entry = low | static_cast<uint64_t>(high) << 32;
      std::memcpy(static_cast<void*>(out + j), &entry, sizeof entry);
    }
    return;
  }
#endif
  for (int j = 0; j < n; ++j) {
    out[j].value = value[j];
    std::memcpy(&out[j].index, &column[j], sizeof(T));
  }
}

template <typename T>
int prune_entries(const Block<T>& block, T lowest, int64_t first, const Settings<T>& s, Scratch<T>& scratch,
                  Entry<T>* out, T& low, T& high, bool& nan) {
  using X = Vec<T>;
  using Index = typename Entry<T>::Index;
  const int kept = prune(block, lowest, s, scratch, nan);
  // The columns, packed as the scores were: their bits pass for scores, no arithmetic is done on them.
  typedef Index Indices __attribute__((vector_size(sizeof(typename X::V))));
  Indices column;
  for (int lane = 0; lane < X::kWidth; ++lane) column[lane] = static_cast<Index>(first + lane);
  int front = 0;
  for (int j = 0; j < block.count; j += X::kWidth, column += static_cast<Index>(X::kWidth)) {
    const unsigned bits = scratch.kept_bits[j / X::kWidth];
    if (!bits) continue;
    typename X::V packed;
    std::memcpy(&packed, &column, sizeof packed);
    X::compress(scratch.active + front, packed, bits);
    front += __builtin_popcount(bits);
  }
  join_entries(scratch.kept, scratch.active, kept, out);
  if (kept && !nan) {
    high = std::max(high, highest(scratch.kept, kept));
    X::store(scratch.kept + kept, X::set(infinity<T>()));
    low = std::min(low, lowest_of(scratch.kept, kept));
  }
  return kept;
}

// body(j, bucket) for each entry. The buckets of many are found before any is used, in vectors.
template <typename T, typename Body>
void for_buckets(const Entry<T>* entry, int64_t n, const Bucketing<T>& bucket, const Body& body) {
  constexpr int kMany = 512;
  uint16_t of[kMany];
  for (int64_t begin = 0; begin < n; begin += kMany) {
    const int count = static_cast<int>(std::min<int64_t>(kMany, n - begin));
    for (int j = 0; j < count; ++j) of[j] = static_cast<uint16_t>(bucket.of(entry[begin + j].value));
    for (int j = 0; j < count; ++j) body(begin + j, of[j]);
  }
}

template <typename T>
void count_buckets(const Entry<T>* entry, int64_t n, const Buckets<T>& buckets, uint32_t* count) {
  const Bucketing<T> bucket(buckets);
  if (!bucket.usable()) {
    count[0] += static_cast<uint32_t>(n);
    return;
  }
  for_buckets(entry, n, bucket, [&](int64_t, uint16_t b) { ++count[b]; });
}

template <typename T>
void scatter_buckets(const Entry<T>* entry, int64_t n, const Buckets<T>& buckets, uint32_t* place, Entry<T>* to) {
  const Bucketing<T> bucket(buckets);
  if (!bucket.usable()) {
    std::copy_n(entry, n, to + place[0]);
    place[0] += static_cast<uint32_t>(n);
    return;
  }
  for_buckets(entry, n, bucket, [&](int64_t j, uint16_t b) { to[place[b]++] = entry[j]; });
}

// Sorts values that are nearly in order, and columns with them, where they stand; gives up, and returns false, where
// that takes more than `most` moves.
template <typename T>
bool insertion_sort(T* value, typename Entry<T>::Index* column, int64_t n, int64_t most) {
  using X = Vec<T>;
  for (int64_t j = 1; j < n; j += X::kWidth) {
    const int lanes = static_cast<int>(std::min<int64_t>(X::kWidth, n - j));
    // Lanes lower than the one before. Moving one leaves those after it as they are, but for the next one's neighbour.
    const auto before = X::load_first(value + j - 1, lanes), own = X::load_first(value + j, lanes);
    unsigned bits = X::bits(X::greater(before, own));
    for (; bits; bits &= bits - 1) {
      int64_t at = j + __builtin_ctz(bits);
      do {
        const T moved = value[at];
        const auto moved_column = column[at];
        int64_t to = at;
        for (; to > 0 && moved < value[to - 1]; --to) {
          value[to] = value[to - 1];
          column[to] = column[to - 1];
        }
        value[to] = moved;
        column[to] = moved_column;
        most -= at - to;
        if (most < 0) return false;
        ++at;
      } while (at < n && value[at] < value[at - 1]);
    }
  }
  return true;
}

// Sorts entries that lie between low and high, about: by 16 bits of where they lie in that range, two stable passes of
// 8 bits each, after which they are nearly in order. The entries of an overfull key are sorted again over their own
// range. Overwrites `from` and `space`.
template <typename T>
void sort_entries(Entry<T>* from, int64_t n, T low, T high, Entry<T>* space, T* value, typename Entry<T>::Index* column,
                  int depth) {
  constexpr int64_t kFewEntries = 24, kMostOfKey = 24;
  constexpr int32_t kKeys = 1 << 16;
  const auto put = [&](int64_t at, const Entry<T>& entry) {
    value[at] = entry.value;
    column[at] = entry.index;
  };
  if (n <= kFewEntries) {
    for (int64_t j = 0; j < n; ++j) put(j, from[j]);
    insertion_sort(value, column, n, n * n);
    return;
  }
  const Bucketing<T> bucket({low, high, kKeys});
  if (!bucket.usable() || depth > 3) {
    std::sort(from, from + n, [](const Entry<T>& a, const Entry<T>& b) {
      return a.value < b.value || (a.value == b.value && a.index < b.index);
    });
    for (int64_t j = 0; j < n; ++j) put(j, from[j]);
    return;
  }
  uint32_t fine[257] = {}, coarse[257] = {};
  for_buckets(from, n, bucket, [&](int64_t, uint16_t key) {
    ++fine[(key & 255) + 1];
    ++coarse[(key >> 8) + 1];
  });
  for (int b = 1; b <= 256; ++b) {
    fine[b] += fine[b - 1];
    coarse[b] += coarse[b - 1];
  }
  for_buckets(from, n, bucket, [&](int64_t j, uint16_t key) { space[fine[key & 255]++] = from[j]; });
  for_buckets(space, n, bucket, [&](int64_t j, uint16_t key) { put(coarse[key >> 8]++, space[j]); });
  if (insertion_sort(value, column, n, 4 * n)) return;
  for (int64_t begin = 0; begin < n;) {
    const uint32_t key = bucket.of(value[begin]);
    T bottom = value[begin], top = bottom;
    int64_t end = begin + 1;
    for (; end < n && bucket.of(value[end]) == key; ++end) {
      bottom = value[end] < bottom ? value[end] : bottom;
      top = value[end] > top ? value[end] : top;
    }
    if (end - begin > kMostOfKey && bottom < top) {
      for (int64_t j = begin; j < end; ++j) from[j] = {value[j], column[j]};
      sort_entries(from + begin, end - begin, bottom, top, space, value + begin, column + begin, depth + 1);
    }
    begin = end;
  }
  insertion_sort(value, column, n, n * n);
}

template <typename T>
void sort(Entry<T>* from, int64_t n, T low, T high, Entry<T>* space, T* value, typename Entry<T>::Index* column) {
  sort_entries(from, n, low, high, space, value, column, 0);
}

// The block's slopes stand in scratch.kept, as if each of its columns had been kept.
template <typename T>
void spread_block(const Block<T>& block, const T* slope, double scale, const Hinge<T>* hinge, const T* column_scale,
                  Scratch<T>& scratch, T* out) {
  for (int j = 0; j < block.count; ++j) scratch.kept[j] = static_cast<T>(slope[j] * scale);
  std::fill_n(scratch.kept_bits, padded<T>(block.count) / Vec<T>::kWidth,
              static_cast<uint16_t>((1u << Vec<T>::kWidth) - 1));
  if (hinge) {
    unpack<true>(block, scratch.kept_bits, hinge, column_scale, scratch, out);
  } else {
    unpack<false>(block, scratch.kept_bits, hinge, column_scale, scratch, out);
  }
}

template <typename T>
constexpr Sorting<T> make_sorting() {
  return {prune_entries<T>, count_buckets<T>, scatter_buckets<T>, sort<T>, spread_block<T>};
}

}  // namespace
