// The kernels that count who reaches a positive, in the vectors of whichever instruction set includes this file. All
// they give are integers, the same for each of them.

namespace {

// 64 columns at a time: most have none to pack where positives are few, and a branch for every vector would guess wrong
// where they are many.
template <typename T>
int pack(const T* score, const uint64_t* ignored, int count, T lowest, T* packed, bool& nan) {
  using X = Vec<T>;
  const auto low = X::set(lowest);
  constexpr unsigned kLanes = (1u << X::kWidth) - 1;
  constexpr int kAhead = 4096 / sizeof(T);  // the processor itself reads ahead to the end of a page only
  int n = 0;
  uint64_t unordered = 0;
  for (int begin = 0; begin < count; begin += 64) {
    const uint64_t counted = ~ignored[begin / 64];
    if (!counted) continue;
    const auto load = [&](int j) {
      const int left = count - j;
      return left >= X::kWidth ? X::load(score + j) : X::load_first(score + j, std::max(0, left));
    };
    uint64_t bits = 0, nans = 0;
    for (int lane = 0; lane < 64; lane += X::kWidth) {
      __builtin_prefetch(score + begin + lane + kAhead, 0, 2);
      const auto v = load(begin + lane);
      bits |= static_cast<uint64_t>(X::bits(X::greater_equal(v, low))) << lane;
      nans |= static_cast<uint64_t>(X::bits(X::unordered(v))) << lane;
    }
    unordered |= nans & counted;
    bits &= counted;
    if (!bits) continue;
    for (int lane = 0; lane < 64; lane += X::kWidth) {
      const unsigned of = static_cast<unsigned>(bits >> lane) & kLanes;
      X::compress(packed + n, load(begin + lane), of);
      n += __builtin_popcount(of);
    }
  }
  nan |= unordered != 0;
  X::store(packed + n, X::set(std::numeric_limits<T>::quiet_NaN()));
  return n;
}

template <typename T>
void range(const T* score, int64_t n, T& low, T& high) {
  using X = Vec<T>;
  const auto infinite = X::set(-std::numeric_limits<T>::infinity());
  auto top = infinite, bottom = infinite;  // of the scores, and of the scores negated
  for (int64_t j = 0; j < n; j += X::kWidth) {
    const auto v = X::load(score + j);
    top = X::max(v, top);
    bottom = X::max(X::set(0) - v, bottom);
  }
  T lanes[2][X::kWidth];
  X::store(lanes[0], top);
  X::store(lanes[1], bottom);
  high = *std::max_element(lanes[0], lanes[0] + X::kWidth);
  low = -*std::max_element(lanes[1], lanes[1] + X::kWidth);
}

template <typename T>
void place(const T* score, int n, const LookupTable<T>& table, int32_t* bucket) {
  const T low = table.low, scale = table.scale, last = table.last;
  for (int j = 0; j < n; ++j) {
    const T x = (score[j] - low) * scale;
    const T from = x > 0 ? x : T(0);  // so is NaN, of infinity minus itself or times 0
    bucket[j] = static_cast<int32_t>(from < last ? from : last);
  }
}

// Lanes count in T, exactly: a block has fewer vectors than T has integers.
template <typename T, int Rows>
void count_rows(const T* packed, int n, const T* positive, uint32_t* reached) {
  using X = Vec<T>;
  const auto one = X::set(1);
  typename X::V u[Rows], sum[Rows];
  for (int r = 0; r < Rows; ++r) {
    u[r] = X::set(positive[r]);
    sum[r] = X::set(0);
  }
  for (int j = 0; j < n; j += X::kWidth) {
    const auto v = X::load(packed + j);
    for (int r = 0; r < Rows; ++r) sum[r] = X::add_where(X::greater_equal(v, u[r]), sum[r], one);
  }
  for (int r = 0; r < Rows; ++r) {
    T lanes[X::kWidth];
    X::store(lanes, sum[r]);
    T total = 0;
    for (const T lane : lanes) total += lane;
    reached[r] += static_cast<uint32_t>(total);
  }
}

template <typename T>
void count_few(const T* packed, int n, const LookupTable<T>& table, uint32_t* reached) {
  if (!n) return;
  const T* const positive = table.score.data();
  const int64_t size = table.size();
  int64_t i = 0;
  for (; i + 4 <= size; i += 4) count_rows<T, 4>(packed, n, positive + i, reached + i + 1);
  switch (size - i) {
    case 3: count_rows<T, 3>(packed, n, positive + i, reached + i + 1); break;
    case 2: count_rows<T, 2>(packed, n, positive + i, reached + i + 1); break;
    case 1: count_rows<T, 1>(packed, n, positive + i, reached + i + 1); break;
    default: break;
  }
}

template <typename T>
void count_many(const T* packed, int n, const LookupTable<T>& table, int32_t* at, uint32_t* reached) {
  place(packed, n, table, at);
  const T* const positive = table.score.data();
  const int32_t* const first = table.first.data();
  for (int j = 0; j < n; ++j) {
    const T v = packed[j];
    const int32_t begin = first[at[j]];
    const T* const own = positive + begin;
    // A bucket seldom has more than two positives: up to then there is no branch.
    at[j] = begin + (v >= own[0]) + (v >= own[1]);
    if (v >= own[2]) at[j] = static_cast<int32_t>(std::upper_bound(own + 2, positive + table.size(), v) - positive);
  }
  // Apart from the search: a store that may be what the next search reads would hold it up.
  for (int j = 0; j < n; ++j) ++reached[at[j]];
}

template <typename T>
constexpr Counting<T> make_counting() {
  return {pack<T>, range<T>, place<T>, count_few<T>, count_many<T>};
}

}  // namespace
