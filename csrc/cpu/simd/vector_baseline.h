// Vectors of 16 bytes in the compilers' own vector types: SSE2 on x86-64, NEON on arm64, no instruction named.
// Included inside a namespace: see baseline.cpp.

template <typename Element>
struct Vec {
  using T = Element;
  typedef T V __attribute__((vector_size(16)));
  using Word = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Word Bits __attribute__((vector_size(16)));  // all ones or all zeros a lane
  static constexpr int kWidth = 16 / sizeof(T);
  static constexpr int kRows = 2;

  static V load(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static V widened(const float* p) {
    V v;
    for (int lane = 0; lane < kWidth; ++lane) v[lane] = static_cast<T>(p[lane]);
    return v;
  }
  static V load_first(const T* p, int n) {
    V v = set(0);
    std::memcpy(&v, p, n * sizeof(T));
    return v;
  }
  static void store(T* p, V v) { std::memcpy(p, &v, sizeof v); }
  static void store_first(T* p, int n, V v) { std::memcpy(p, &v, n * sizeof(T)); }
  static V set(T x) { return x - V{}; }
  static V mul_add(V a, V b, V c) { return a * b + c; }
  static V negative_mul_add(V a, V b, V c) { return c - a * b; }
  // a * b - p, exactly, without a fused multiply-add (Dekker 1971; Veltkamp's splitting).
  static V product_error(V a, V b, V p) {
    const V splitter = set(sizeof(T) == 4 ? T(4097) : T(134217729));
    const V ca = splitter * a, cb = splitter * b;
    const V ah = ca - (ca - a), bh = cb - (cb - b);
    const V al = a - ah, bl = b - bh;
    return ((ah * bh - p) + ah * bl + al * bh) + al * bl;
  }
  static V reciprocal(V x) { return set(1) / x; }
  static V max(V a, V b) { return select(a > b, a, b); }
  static V clamp(V x, T limit) {
    x = select(x > set(limit), set(limit), x);
    return select(x < set(-limit), set(-limit), x);
  }
  static Bits greater(V a, V b) { return a > b; }
  static Bits greater_equal(V a, V b) { return a >= b; }
  static Bits not_less(V a, V b) { return ~(a < b); }
  static Bits unordered(V a) { return a != a; }
  static unsigned bits(Bits m) {
    unsigned bits = 0;
    for (int lane = 0; lane < kWidth; ++lane) bits |= static_cast<unsigned>(m[lane] & 1) << lane;
    return bits;
  }
  static Bits lanes(unsigned bits) {
    Bits m;
    for (int lane = 0; lane < kWidth; ++lane) m[lane] = -static_cast<Word>(bits >> lane & 1);
    return m;
  }
  static V select(Bits m, V a, V b) {
    return reinterpret_cast<V>((reinterpret_cast<Bits>(a) & m) | (reinterpret_cast<Bits>(b) & ~m));
  }
  static V add_where(Bits m, V a, V b) { return a + reinterpret_cast<V>(reinterpret_cast<Bits>(b) & m); }
  static V add_product_where(Bits m, V a, V b, V c) { return add_where(m, a, b * c); }  // a + b * c
  static V add_unless(Bits m, V a, V b) { return a + reinterpret_cast<V>(reinterpret_cast<Bits>(b) & ~m); }
  static void compress(T* out, V v, unsigned bits) {
    for (int lane = 0, front = 0; lane < kWidth; ++lane) {
      out[front] = v[lane];
      front += bits >> lane & 1;
    }
  }
  static V expand(V in, unsigned bits) {
    V v = set(0);
    for (int lane = 0, front = 0; lane < kWidth; ++lane) {
      if (bits >> lane & 1) v[lane] = in[front++];
    }
    return v;
  }
  static void widen(V v, double* out) {
    for (int lane = 0; lane < kWidth; ++lane) out[lane] = v[lane];
  }
  static void accumulate(double* sum, V v) {
    for (int lane = 0; lane < kWidth; ++lane) sum[lane] += v[lane];
  }
  // out[i] = the sum of the lanes of v[i], for kWidth vectors.
  static void sums(const V* v, T* out) {
    for (int i = 0; i < kWidth; ++i) {
      out[i] = 0;
      for (int lane = 0; lane < kWidth; ++lane) out[i] += v[i][lane];
    }
  }
};

static uint64_t nonzero_bits(const uint8_t* bytes) {
  uint64_t bits = 0;
  for (int j = 0; j < 64; ++j) bits |= static_cast<uint64_t>(bytes[j] != 0) << j;
  return bits;
}

static void widen_half(const uint16_t* in, float* out, int64_t n) {
  for (int64_t j = 0; j < n; ++j) out[j] = half_to_float(in[j]);
}

static void narrow_half(const float* in, uint16_t* out, int64_t n) {
  for (int64_t j = 0; j < n; ++j) out[j] = float_to_half(in[j]);
}
