// Vectors of 64 bytes for AVX-512 (F, BW, DQ, VL). Included inside a namespace and a target region: see avx512.cpp.

template <typename T>
struct Vec;

template <>
struct Vec<float> {
  using T = float;
  using V = __m512;
  using Bits = __mmask16;
  static constexpr int kWidth = 16;  // lanes
  static constexpr int kRows = 3;    // positives that share one load of the negatives: fills the 32 registers

  static V load(const T* p) { return _mm512_loadu_ps(p); }
  static V load_first(const T* p, int n) { return _mm512_maskz_loadu_ps(static_cast<Bits>((1u << n) - 1), p); }
  static void store(T* p, V v) { _mm512_storeu_ps(p, v); }
  static void store_first(T* p, int n, V v) { _mm512_mask_storeu_ps(p, static_cast<Bits>((1u << n) - 1), v); }
  static V set(T x) { return _mm512_set1_ps(x); }
  static V mul_add(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V negative_mul_add(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
  static V product_error(V a, V b, V p) { return _mm512_fmsub_ps(a, b, p); }      // a * b - p, exactly
  // 14 bits from the table and one Newton step: 2^-28, then rounding. Half the cost of a division.
  static V reciprocal(V x) {
    const V r = _mm512_rcp14_ps(x);
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(x, r, _mm512_set1_ps(1)), r, r);
  }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }
  static V clamp(V x, T limit) { return _mm512_max_ps(_mm512_min_ps(x, set(limit)), set(-limit)); }
  static Bits greater(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static Bits greater_equal(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static Bits not_less(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }  // true for NaN
  static Bits unordered(V a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
  static unsigned bits(Bits m) { return m; }
  static Bits lanes(unsigned bits) { return static_cast<Bits>(bits); }
  static V select(Bits m, V a, V b) { return _mm512_mask_blend_ps(m, b, a); }
  static V add_where(Bits m, V a, V b) { return _mm512_mask_add_ps(a, m, a, b); }
  static V add_product_where(Bits m, V a, V b, V c) { return _mm512_mask3_fmadd_ps(b, c, a, m); }  // a + b * c
  static V add_unless(Bits m, V a, V b) { return _mm512_mask_add_ps(a, static_cast<Bits>(~m), a, b); }
  // The lanes of v in bits, packed to the front; writes a whole vector.
  static void compress(T* out, V v, unsigned bits) { store(out, _mm512_maskz_compress_ps(static_cast<Bits>(bits), v)); }
  // The inverse: the front of `in` spread over the lanes in bits, zero elsewhere.
  static V expand(V in, unsigned bits) { return _mm512_maskz_expand_ps(static_cast<Bits>(bits), in); }
  static void widen(V v, double* out) {
    _mm512_storeu_pd(out, _mm512_cvtps_pd(_mm512_castps512_ps256(v)));
    _mm512_storeu_pd(out + 8, _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
  }
  static void accumulate(double* sum, V v) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    _mm512_storeu_pd(sum, _mm512_add_pd(_mm512_loadu_pd(sum), low));
    _mm512_storeu_pd(sum + 8, _mm512_add_pd(_mm512_loadu_pd(sum + 8), high));
  }
};

template <>
struct Vec<double> {
  using T = double;
  using V = __m512d;
  using Bits = __mmask8;
  static constexpr int kWidth = 8;
  static constexpr int kRows = 4;

  static V load(const T* p) { return _mm512_loadu_pd(p); }
  static V widened(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
  static V load_first(const T* p, int n) { return _mm512_maskz_loadu_pd(static_cast<Bits>((1u << n) - 1), p); }
  static void store(T* p, V v) { _mm512_storeu_pd(p, v); }
  static void store_first(T* p, int n, V v) { _mm512_mask_storeu_pd(p, static_cast<Bits>((1u << n) - 1), v); }
  static V set(T x) { return _mm512_set1_pd(x); }
  static V mul_add(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
  static V negative_mul_add(V a, V b, V c) { return _mm512_fnmadd_pd(a, b, c); }  // c - a * b
  static V product_error(V a, V b, V p) { return _mm512_fmsub_pd(a, b, p); }
  static V reciprocal(V x) { return _mm512_div_pd(_mm512_set1_pd(1), x); }
  static V max(V a, V b) { return _mm512_max_pd(a, b); }
  static V clamp(V x, T limit) { return _mm512_max_pd(_mm512_min_pd(x, set(limit)), set(-limit)); }
  static Bits greater(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ); }
  static Bits greater_equal(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_GE_OQ); }
  static Bits not_less(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_NLT_UQ); }
  static Bits unordered(V a) { return _mm512_cmp_pd_mask(a, a, _CMP_UNORD_Q); }
  static unsigned bits(Bits m) { return m; }
  static Bits lanes(unsigned bits) { return static_cast<Bits>(bits); }
  static V select(Bits m, V a, V b) { return _mm512_mask_blend_pd(m, b, a); }
  static V add_where(Bits m, V a, V b) { return _mm512_mask_add_pd(a, m, a, b); }
  static V add_unless(Bits m, V a, V b) { return _mm512_mask_add_pd(a, static_cast<Bits>(~m), a, b); }
  static void compress(T* out, V v, unsigned bits) { store(out, _mm512_maskz_compress_pd(static_cast<Bits>(bits), v)); }
  static V expand(V in, unsigned bits) { return _mm512_maskz_expand_pd(static_cast<Bits>(bits), in); }
  static void accumulate(double* sum, V v) { store(sum, load(sum) + v); }
  // out[i] = the sum of the lanes of v[i], for kWidth vectors.
  static void sums(const V* v, T* out) {
    V pair[4], four[2];
    for (int i = 0; i < 4; ++i) {
      pair[i] = _mm512_unpacklo_pd(v[2 * i], v[2 * i + 1]) + _mm512_unpackhi_pd(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) four[i] = fold(pair[2 * i], pair[2 * i + 1]);
    store(out, fold(four[0], four[1]));
  }
  static V fold(V a, V b) {  // neighbouring pairs of lanes, those of a first
    return _mm512_shuffle_f64x2(a, b, 0x88) + _mm512_shuffle_f64x2(a, b, 0xdd);
  }
};

// One bit for each of 64 bytes that is not zero.
static uint64_t nonzero_bits(const uint8_t* bytes) {
  const __m512i v = _mm512_loadu_si512(bytes);
  return _mm512_test_epi8_mask(v, v);
}

static void widen_half(const uint16_t* in, float* out, int64_t n) {
  int64_t j = 0;
  for (; j + 16 <= n; j += 16) {
    _mm512_storeu_ps(out + j, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + j))));
  }
  for (; j < n; ++j) out[j] = half_to_float(in[j]);
}

static void narrow_half(const float* in, uint16_t* out, int64_t n) {
  int64_t j = 0;
  for (; j + 16 <= n; j += 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j),
                        _mm512_cvtps_ph(_mm512_loadu_ps(in + j), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; j < n; ++j) out[j] = float_to_half(in[j]);
}
