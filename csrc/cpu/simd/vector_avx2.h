// Vectors of 32 bytes for AVX2, FMA and F16C. Included inside a namespace and a target region: see avx2.cpp.

// Lane numbers that pack the set bits of a byte to the front, and their inverse. Eight lanes of 32 bits.
struct PermuteTables {
  alignas(32) uint32_t compress[256][8];
  alignas(32) uint32_t expand[256][8];
  constexpr PermuteTables() : compress(), expand() {
    for (unsigned bits = 0; bits < 256; ++bits) {
      unsigned front = 0;
      for (unsigned lane = 0; lane < 8; ++lane) {
        if (bits >> lane & 1) {
          compress[bits][front] = lane;
          expand[bits][lane] = front++;
        }
      }
    }
  }
};
static constexpr PermuteTables kPermute;
// A bit a lane of 64 bits, doubled to a bit a lane of 32.
static constexpr unsigned kDoubled[16] = {0x00, 0x03, 0x0c, 0x0f, 0x30, 0x33, 0x3c, 0x3f,
                                          0xc0, 0xc3, 0xcc, 0xcf, 0xf0, 0xf3, 0xfc, 0xff};

static __m256i permutation(const uint32_t* table) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(table)); }

template <typename T>
struct Vec;

template <>
struct Vec<float> {
  using T = float;
  using V = __m256;
  using Bits = __m256;  // all ones or all zeros a lane
  static constexpr int kWidth = 8;
  static constexpr int kRows = 2;

  static V load(const T* p) { return _mm256_loadu_ps(p); }
  static V load_first(const T* p, int n) { return _mm256_maskload_ps(p, _mm256_castps_si256(lanes((1u << n) - 1))); }
  static void store(T* p, V v) { _mm256_storeu_ps(p, v); }
  static void store_first(T* p, int n, V v) { _mm256_maskstore_ps(p, _mm256_castps_si256(lanes((1u << n) - 1)), v); }
  static V set(T x) { return _mm256_set1_ps(x); }
  static V mul_add(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V negative_mul_add(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a * b
  static V product_error(V a, V b, V p) { return _mm256_fmsub_ps(a, b, p); }
  static V reciprocal(V x) { return _mm256_div_ps(_mm256_set1_ps(1), x); }  // rcpps with one step is 2 ulp off
  static V max(V a, V b) { return _mm256_max_ps(a, b); }
  static V clamp(V x, T limit) { return _mm256_max_ps(_mm256_min_ps(x, set(limit)), set(-limit)); }
  static Bits greater(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
  static Bits greater_equal(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
  static Bits not_less(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_NLT_UQ); }
  static Bits unordered(V a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
  static unsigned bits(Bits m) { return static_cast<unsigned>(_mm256_movemask_ps(m)); }
  static Bits lanes(unsigned bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i spread = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(spread, lane));
  }
  static V select(Bits m, V a, V b) { return _mm256_blendv_ps(b, a, m); }
  static V add_where(Bits m, V a, V b) { return a + _mm256_and_ps(m, b); }
  static V add_product_where(Bits m, V a, V b, V c) {
    return mul_add(_mm256_and_ps(m, b), c, a);
  }  // a + b * c, c finite
  static V add_unless(Bits m, V a, V b) { return a + _mm256_andnot_ps(m, b); }
  static void compress(T* out, V v, unsigned bits) {
    store(out, _mm256_permutevar8x32_ps(v, permutation(kPermute.compress[bits])));
  }
  static V expand(V in, unsigned bits) {
    return _mm256_and_ps(lanes(bits), _mm256_permutevar8x32_ps(in, permutation(kPermute.expand[bits])));
  }
  static void widen(V v, double* out) {
    _mm256_storeu_pd(out, _mm256_cvtps_pd(_mm256_castps256_ps128(v)));
    _mm256_storeu_pd(out + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
  }
  static void accumulate(double* sum, V v) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
    _mm256_storeu_pd(sum, _mm256_add_pd(_mm256_loadu_pd(sum), low));
    _mm256_storeu_pd(sum + 4, _mm256_add_pd(_mm256_loadu_pd(sum + 4), high));
  }
};

template <>
struct Vec<double> {
  using T = double;
  using V = __m256d;
  using Bits = __m256d;
  static constexpr int kWidth = 4;
  static constexpr int kRows = 2;

  static V load(const T* p) { return _mm256_loadu_pd(p); }
  static V widened(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
  static V load_first(const T* p, int n) { return _mm256_maskload_pd(p, _mm256_castpd_si256(lanes((1u << n) - 1))); }
  static void store(T* p, V v) { _mm256_storeu_pd(p, v); }
  static void store_first(T* p, int n, V v) { _mm256_maskstore_pd(p, _mm256_castpd_si256(lanes((1u << n) - 1)), v); }
  static V set(T x) { return _mm256_set1_pd(x); }
  static V mul_add(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
  static V negative_mul_add(V a, V b, V c) { return _mm256_fnmadd_pd(a, b, c); }  // c - a * b
  static V product_error(V a, V b, V p) { return _mm256_fmsub_pd(a, b, p); }
  static V reciprocal(V x) { return _mm256_div_pd(_mm256_set1_pd(1), x); }
  static V max(V a, V b) { return _mm256_max_pd(a, b); }
  static V clamp(V x, T limit) { return _mm256_max_pd(_mm256_min_pd(x, set(limit)), set(-limit)); }
  static Bits greater(V a, V b) { return _mm256_cmp_pd(a, b, _CMP_GT_OQ); }
  static Bits greater_equal(V a, V b) { return _mm256_cmp_pd(a, b, _CMP_GE_OQ); }
  static Bits not_less(V a, V b) { return _mm256_cmp_pd(a, b, _CMP_NLT_UQ); }
  static Bits unordered(V a) { return _mm256_cmp_pd(a, a, _CMP_UNORD_Q); }
  static unsigned bits(Bits m) { return static_cast<unsigned>(_mm256_movemask_pd(m)); }
  static Bits lanes(unsigned bits) {
    const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i spread = _mm256_and_si256(_mm256_set1_epi64x(static_cast<long long>(bits)), lane);
    return _mm256_castsi256_pd(_mm256_cmpeq_epi64(spread, lane));
  }
  static V select(Bits m, V a, V b) { return _mm256_blendv_pd(b, a, m); }
  static V add_where(Bits m, V a, V b) { return a + _mm256_and_pd(m, b); }
  static V add_unless(Bits m, V a, V b) { return a + _mm256_andnot_pd(m, b); }
  static V permute(V v, __m256i order) {
    return _mm256_castps_pd(_mm256_permutevar8x32_ps(_mm256_castpd_ps(v), order));
  }
  static void compress(T* out, V v, unsigned bits) {
    store(out, permute(v, permutation(kPermute.compress[kDoubled[bits]])));
  }
  static V expand(V in, unsigned bits) {
    return _mm256_and_pd(lanes(bits), permute(in, permutation(kPermute.expand[kDoubled[bits]])));
  }
  static void accumulate(double* sum, V v) { store(sum, load(sum) + v); }
  // out[i] = the sum of the lanes of v[i], for kWidth vectors.
  static void sums(const V* v, T* out) {
    const V a = _mm256_hadd_pd(v[0], v[1]), b = _mm256_hadd_pd(v[2], v[3]);
    store(out, _mm256_permute2f128_pd(a, b, 0x20) + _mm256_permute2f128_pd(a, b, 0x31));
  }
};

static uint64_t nonzero_bits(const uint8_t* bytes) {
  uint64_t bits = 0;
  for (int half = 0; half < 2; ++half) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + 32 * half));
    const int zero = _mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_setzero_si256()));
    bits |= static_cast<uint64_t>(~static_cast<uint32_t>(zero)) << (32 * half);
  }
  return bits;
}

static void widen_half(const uint16_t* in, float* out, int64_t n) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) {
    _mm256_storeu_ps(out + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + j))));
  }
  for (; j < n; ++j) out[j] = half_to_float(in[j]);
}

static void narrow_half(const float* in, uint16_t* out, int64_t n) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + j), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; j < n; ++j) out[j] = float_to_half(in[j]);
}
