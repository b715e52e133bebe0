// The table of PTX instructions, each a loop over the lanes of a warp, from the ISA manual.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "../../csrc/cpu/half.h"
#include "machine.h"

namespace ptx {
namespace {

using f32 = float;
using f64 = double;
using roadmap::bfloat_to_float, roadmap::float_to_bfloat, roadmap::float_to_half, roadmap::half_to_float;

std::unordered_map<std::string, Operation> table;

template <typename To, typename From>
To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

template <typename F>
void each_lane(u32 mask, const F& f) {
  for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}

// --- functions of the values of a lane -------------------------------------------------------------------------------

// A source by lanes; bool stands for a predicate.
template <typename T>
auto source(const Warp& w, const Instruction& i, int k) {
  struct Bits {
    u32 bits;
    bool operator[](int l) const { return bits >> l & 1; }
  };
  if constexpr (std::is_same_v<T, bool>) return Bits{w.predicate(i, k)};
  if constexpr (!std::is_same_v<T, bool>) return static_cast<const T*>(w.lanes<T>(i.from[k]));
}

template <typename F, typename D, typename... A>
struct Apply {
  static void execute(Warp& w, const Instruction& i, u32 mask) { with(w, i, mask, std::index_sequence_for<A...>()); }
  template <size_t... k>
  static void with(Warp& w, const Instruction& i, u32 mask, std::index_sequence<k...>) {
    over_lanes(w, i, mask, source<A>(w, i, k)...);
  }
  template <typename... S>
  static void over_lanes(Warp& w, const Instruction& i, u32 mask, const S... a) {
    if constexpr (std::is_same_v<D, bool>) {
      u32 bits = 0;
#pragma GCC ivdep
      for (int l = 0; l < kLanes; ++l) bits |= static_cast<u32>(F()(a[l]...)) << l;
      w.set_predicate(i.to[0], mask, bits);
    } else {
      D* const d = w.lanes<D>(i.to[0]);
      if (__builtin_popcount(mask) < 8) {
        for (; mask; mask &= mask - 1) d[__builtin_ctz(mask)] = static_cast<D>(F()(a[__builtin_ctz(mask)]...));
        return;
      }
      D all[kLanes];
#pragma GCC ivdep
      for (int l = 0; l < kLanes; ++l) all[l] = static_cast<D>(F()(a[l]...));
#pragma GCC ivdep
      for (int l = 0; l < kLanes; ++l) d[l] = mask >> l & 1 ? all[l] : d[l];
    }
  }
};

template <typename T>
std::string name_of(char of_unsigned = 'u') {
  const char kind = std::is_floating_point_v<T> ? 'f' : std::is_signed_v<T> ? 's' : of_unsigned;
  return "." + (kind + std::to_string(8 * sizeof(T)));
}
// name.T, of untyped bits, too.
template <typename T>
void name_it(const std::string& name, const Operation& o) {
  table[name + name_of<T>()] = table[name + name_of<T>(std::is_unsigned_v<T> ? 'b' : 'u')] = o;
}
template <typename... A>
std::vector<int> bytes_of() {
  return {(std::is_same_v<A, bool> ? 0 : static_cast<int>(sizeof(A)))...};
}
// D(A...), by its full name.
template <typename D, typename... A, typename F>
void define(const std::string& name, F) {
  table[name] = {Apply<F, D, A...>::execute, bytes_of<A...>()};
}
// name.T for each of the types: T(T), T(T, T) or T(T, T, T) by the number of arguments; and bool(T, T).
template <int n, typename... T, typename F>
void each(const char* name, F) {
  if constexpr (n == 1) (name_it<T>(name, {Apply<F, T, T>::execute, bytes_of<T>()}), ...);
  if constexpr (n == 2) (name_it<T>(name, {Apply<F, T, T, T>::execute, bytes_of<T, T>()}), ...);
  if constexpr (n == 3) (name_it<T>(name, {Apply<F, T, T, T, T>::execute, bytes_of<T, T, T>()}), ...);
}
template <typename... T, typename F>
void compare(const char* name, F) {
  (name_it<T>(std::string("setp.") + name, {Apply<F, bool, T, T>::execute, bytes_of<T, T>()}), ...);
}
#define INTEGERS s16, u16, s32, u32, s64, u64
#define UNSIGNED u16, u32, u64

// --- arithmetic ------------------------------------------------------------------------------------------------------

template <typename T>
constexpr bool kIsFloat = std::is_floating_point_v<T>;

// The smaller or larger one; of a number and a NaN the number, and -0 lies below 0.
template <bool smaller>
struct Extreme {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (kIsFloat<T>) {
      if (a != a || b != b) return a != a ? b : a;
      if (a == b) return std::signbit(a) == smaller ? a : b;
    }
    return (a < b) == smaller ? a : b;
  }
};

// Truncated, and held within what the type holds; a NaN is 0, of 64 bits the lowest number.
template <typename D>
struct Truncated {
  template <typename A>
  D operator()(A a) const {
    constexpr A top = static_cast<A>(u64(1) << (8 * sizeof(D) - 2)) * (std::is_signed_v<D> ? 2 : 4);
    if (a != a) return sizeof(D) == 8 || sizeof(A) == 8 ? D(u64(1) << (8 * sizeof(D) - 1)) : D(0);
    if (a >= top) return std::numeric_limits<D>::max();
    if (std::is_signed_v<D> ? a < -top : a < 0) return std::numeric_limits<D>::min();
    return static_cast<D>(a);
  }
};

f32 flushed(f32 x) { return std::fabs(x) < std::numeric_limits<f32>::min() ? std::copysign(0.0f, x) : x; }

// The value of an approximate instruction: up to so many ulp off what is true, differently for every argument and noise.
f32 approximate(f64 exact, f32 argument, f64 ulps) {
  const f32 nearest = static_cast<f32>(exact);
  u32 h = (bits_as<u32>(argument) ^ static_cast<u32>(machine.noise * 0x9E3779B1u)) * 0x9E3779B1u;
  h = (h ^ h >> 15) * 0x85EBCA6Bu;
  h = (h ^ h >> 13) * 0xC2B2AE35u;
  h ^= h >> 16;
  const f64 ulp = static_cast<f64>(bits_as<f32>(bits_as<u32>(nearest) & 0x7F800000u)) * 0x1p-23;
  const f64 off = (static_cast<f64>(h) * 0x1p-31 - 1) * (ulps - 0.5) * ulp;  // rounding may add the other half
  const f32 result = static_cast<f32>(exact + off), size = std::fabs(nearest);
  const bool keep =
      machine.noise == 0 || !(size <= std::numeric_limits<f32>::max()) || size < std::numeric_limits<f32>::min();
  return flushed(keep ? nearest : result);
}
// By the manual 2^0 is 1, 2^x is good to 2 ulp, and a reciprocal to 1. That 1 / 2^n is exact it does not say.
struct Exp2 {
  f32 operator()(f32 x) const {
    const f32 a = flushed(x);
    const f64 bounded = a < -200 ? -200.0 : a > 200 ? 200.0 : static_cast<f64>(a);  // so that a NaN passes
    const f64 whole = std::rint(bounded), t = (bounded - whole) * 0.6931471805599453;
    f64 sum = 1.0 / 362880;
    for (const int n : {40320, 5040, 720, 120, 24, 6, 2, 1, 1}) sum = sum * t + 1.0 / n;
    const u64 power = static_cast<u64>(static_cast<s64>(static_cast<s32>(whole)) + 1023) << 52;
    return a == 0 ? 1.0f : a != a ? a : approximate(sum * bits_as<f64>(power), a, 2);
  }
};
struct Reciprocal {
  f32 operator()(f32 x) const { return approximate(1.0 / static_cast<f64>(flushed(x)), x, 1); }
};
// Of the upper word, to the upper word.
struct ReciprocalOfDouble {
  static f64 upper(f64 x) {
    x = bits_as<f64>(bits_as<u64>(x) & 0xFFFFFFFF00000000u);
    return std::fabs(x) < std::numeric_limits<f64>::min() ? std::copysign(0.0, x) : x;
  }
  f64 operator()(f64 x) const { return upper(1 / upper(x)); }
};

void define_arithmetic() {
  const auto sum = [](auto a, auto b) { return a + b; };
  const auto difference = [](auto a, auto b) { return a - b; };
  const auto product_of_floats = [](auto a, auto b) { return a * b; };
  each<2, INTEGERS, f32, f64>("add", sum), each<2, f32, f64>("add.rn", sum);
  each<2, INTEGERS, f32, f64>("sub", difference), each<2, f32, f64>("sub.rn", difference);
  each<2, f32, f64>("mul", product_of_floats), each<2, f32, f64>("mul.rn", product_of_floats);
  each<2, f32, f64>("div.rn", [](auto a, auto b) { return a / b; });
  each<3, f32, f64>("fma.rn", [](auto a, auto b, auto c) { return std::fma(a, b, c); });
  each<1, f32, f64>("rcp.rn", [](auto a) { return 1 / a; });
  each<1, f32, f64>("sqrt.rn", [](auto a) { return std::sqrt(a); });
  each<2, UNSIGNED>("mul.lo", [](u64 a, u64 b) { return a * b; });
  each<2, s16, s32, s64>("mul.lo", [](u64 a, u64 b) { return a * b; });
  each<3, INTEGERS>("mad.lo", [](u64 a, u64 b, u64 c) { return a * b + c; });
  each<2, s32, u32>("mul.hi", [](auto a, auto b) { return static_cast<u64>(s64(a) * s64(b)) >> 32; });
  each<2, u64>("mul.hi", [](u64 a, u64 b) { return static_cast<u64>(static_cast<unsigned __int128>(a) * b >> 64); });
  each<2, s64>("mul.hi", [](s64 a, s64 b) { return static_cast<s64>(static_cast<__int128>(a) * b >> 64); });
  const auto product = [](u64 a, u64 b) { return a * b; };
  const auto product_and_sum = [](u64 a, u64 b, u64 c) { return a * b + c; };
  define<u32, u16, u16>("mul.wide.u16", product), define<s32, s16, s16>("mul.wide.s16", product);
  define<u64, u32, u32>("mul.wide.u32", product), define<s64, s32, s32>("mul.wide.s32", product);
  define<u64, u32, u32, u64>("mad.wide.u32", product_and_sum);
  define<s64, s32, s32, s64>("mad.wide.s32", product_and_sum);
  each<2, INTEGERS>("div", [](auto a, auto b) {
    using T = decltype(a);
    if (b == 0) return static_cast<T>(-1);
    return std::is_signed_v<T> && b == static_cast<T>(-1) ? static_cast<T>(0 - a) : static_cast<T>(a / b);
  });
  each<2, INTEGERS>("rem", [](auto a, auto b) {
    using T = decltype(a);
    if (b == 0) return a;
    return std::is_signed_v<T> && b == static_cast<T>(-1) ? T(0) : static_cast<T>(a % b);
  });
  each<2, INTEGERS, f32, f64>("min", Extreme<true>());
  each<2, INTEGERS, f32, f64>("max", Extreme<false>());
  each<1, s16, s32, s64, f32, f64>("neg", [](auto a) { return -a; });
  each<1, s16, s32, s64>("abs", [](auto a) { return a < 0 ? -a : a; });
  each<1, f32, f64>("abs", [](auto a) { return std::fabs(a); });
  each<2, UNSIGNED>("and", [](auto a, auto b) { return a & b; });
  each<2, UNSIGNED>("or", [](auto a, auto b) { return a | b; });
  each<2, UNSIGNED>("xor", [](auto a, auto b) { return a ^ b; });
  each<1, UNSIGNED>("not", [](auto a) { return ~a; });
  define<f32, f32>("ex2.approx.ftz.f32", Exp2());
  define<f32, f32>("rcp.approx.ftz.f32", Reciprocal());
  define<f64, f64>("rcp.approx.ftz.f64", ReciprocalOfDouble());
  // Shifts, whose second source has 32 bits.
  const auto shift = [](auto type, const char* name, auto f) {
    using T = decltype(type);
    name_it<T>(name, {Apply<decltype(f), T, T, u32>::execute, bytes_of<T, u32>()});
  };
  const auto left = [](auto a, u32 b) { return b < 8 * sizeof a ? a << b : 0; };
  const auto right = [](auto a, u32 b) { return a >> (b < 8 * sizeof a ? b : 8 * sizeof a - 1); };
  const auto right_unsigned = [](auto a, u32 b) { return b < 8 * sizeof a ? a >> b : 0; };
  shift(u16(), "shl", left), shift(u32(), "shl", left), shift(u64(), "shl", left);
  shift(s16(), "shr", right), shift(s32(), "shr", right), shift(s64(), "shr", right);
  shift(u16(), "shr", right_unsigned), shift(u32(), "shr", right_unsigned), shift(u64(), "shr", right_unsigned);
  each<3, u32>("shf.l.wrap", [](u32 a, u32 b, u32 c) { return (u64(b) << 32 | a) << (c & 31) >> 32; });
  each<3, u32>("shf.r.wrap", [](u32 a, u32 b, u32 c) { return (u64(b) << 32 | a) >> (c & 31); });
  define<u32, u32, u32, u32, u32>("bfi.b32", [](u32 a, u32 b, u32 at, u32 n) {
    const u64 mask = ((u64(1) << std::min(n & 255, 32u)) - 1) << std::min(at & 255, 32u);
    return static_cast<u32>((b & ~mask) | (u64(a) << std::min(at & 255, 32u) & mask));
  });
  each<3, u32>("prmt", [](u32 a, u32 b, u32 c) {
    const u64 all = u64(b) << 32 | a;
    u32 result = 0;
    for (int k = 0; k < 4; ++k) {
      const u32 which = c >> 4 * k & 15, byte = all >> 8 * (which & 7) & 255;
      result |= (which & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * k;
    }
    return result;
  });
  define<u32, u32>("popc.b32", [](u32 a) { return __builtin_popcount(a); });
  define<u32, u64>("popc.b64", [](u64 a) { return __builtin_popcountll(a); });
  define<u32, u32>("clz.b32", [](u32 a) { return a ? __builtin_clz(a) : 32; });
}

void define_comparisons() {
  compare<INTEGERS, f32, f64>("eq", [](auto a, auto b) { return a == b; });
  compare<INTEGERS>("ne", [](auto a, auto b) { return a != b; });
  compare<INTEGERS, f32, f64>("lt", [](auto a, auto b) { return a < b; });
  compare<INTEGERS, f32, f64>("le", [](auto a, auto b) { return a <= b; });
  compare<INTEGERS, f32, f64>("gt", [](auto a, auto b) { return a > b; });
  compare<INTEGERS, f32, f64>("ge", [](auto a, auto b) { return a >= b; });
  compare<f32, f64>("ne", [](auto a, auto b) { return a < b || a > b; });
  compare<f32, f64>("equ", [](auto a, auto b) { return !(a < b || a > b); });
  compare<f32, f64>("neu", [](auto a, auto b) { return a != b; });
  compare<f32, f64>("ltu", [](auto a, auto b) { return !(a >= b); });
  compare<f32, f64>("leu", [](auto a, auto b) { return !(a > b); });
  compare<f32, f64>("gtu", [](auto a, auto b) { return !(a <= b); });
  compare<f32, f64>("geu", [](auto a, auto b) { return !(a < b); });
  compare<f32, f64>("num", [](auto a, auto b) { return a == a && b == b; });
  compare<f32, f64>("nan", [](auto a, auto b) { return a != a || b != b; });
}

// --- moves and conversions -------------------------------------------------------------------------------------------

// Between integers, in registers of any width: what the types hold, sign or zero above.
s64 held(u64 x, int bits) {  // negative for signed ones
  return bits < 0 ? static_cast<s64>(x << (64 + bits)) >> (64 + bits)
                  : static_cast<s64>(x << (64 - bits) >> (64 - bits));
}
template <typename D, typename A>
void convert_integers(Warp& w, const Instruction& i, u32 mask) {
  const int from = i.from_bits, to = i.to_bits;
  D all[kLanes];
  const A* const a = w.lanes<A>(i.from[0]);
#pragma GCC ivdep
  for (int l = 0; l < kLanes; ++l) all[l] = static_cast<D>(held(held(a[l], from), to));
  D* const d = w.lanes<D>(i.to[0]);
#pragma GCC ivdep
  for (int l = 0; l < kLanes; ++l) d[l] = mask >> l & 1 ? all[l] : d[l];
}
template <typename... A>
void define_conversions() {  // by the bytes of both registers
  const auto name = [](size_t to, size_t from) { return "cvt/" + std::to_string(to) + "." + std::to_string(from); };
  ((table[name(2, sizeof(A))] = {convert_integers<u16, A>, {sizeof(A)}}), ...);
  ((table[name(4, sizeof(A))] = {convert_integers<u32, A>, {sizeof(A)}}), ...);
  ((table[name(8, sizeof(A))] = {convert_integers<u64, A>, {sizeof(A)}}), ...);
}
template <typename F, typename... I>
void define_conversions_of_floats() {
  (define<F, I>("cvt.rn" + name_of<F>() + name_of<I>(), [](auto a) { return a; }), ...);
  (define<I, F>("cvt.rzi" + name_of<I>() + name_of<F>(), Truncated<I>()), ...);
}
template <typename T>
void define_rounding() {
  const std::string type = name_of<T>() + name_of<T>();
  define<T, T>("cvt.rmi" + type, [](T a) { return std::floor(a); });
  define<T, T>("cvt.rpi" + type, [](T a) { return std::ceil(a); });
  define<T, T>("cvt.rzi" + type, [](T a) { return std::trunc(a); });
  define<T, T>("cvt.rni" + type, [](T a) { return std::nearbyint(a); });
}

template <typename Whole, typename Part>
void split(Warp& w, const Instruction& i, u32 mask) {
  Whole whole[kLanes];
  std::memcpy(whole, w.lanes<Whole>(i.from[0]), sizeof whole);
  for (size_t k = 0; k < sizeof(Whole) / sizeof(Part); ++k) {
    if (i.to[k] < 0) continue;
    Part* const d = w.lanes<Part>(i.to[k]);
    each_lane(mask, [&](int l) { d[l] = static_cast<Part>(whole[l] >> 8 * sizeof(Part) * k); });
  }
}
template <typename Whole, typename Part>
void join(Warp& w, const Instruction& i, u32 mask) {
  Whole* const d = w.lanes<Whole>(i.to[0]);
  each_lane(mask, [&](int l) {
    Whole whole = 0;
    for (size_t k = 0; k < sizeof(Whole) / sizeof(Part); ++k) {
      whole |= static_cast<Whole>(w.lanes<Part>(i.from[k])[l]) << 8 * sizeof(Part) * k;
    }
    d[l] = whole;
  });
}

void define_moves() {
  const auto same = [](auto a) { return a; };
  for (const char* name : {"mov", "cvta.to.global", "cvta.global", "cvta.param"})
    each<1, INTEGERS, f32, f64>(name, same);
  const auto choose = [](auto type) {
    using T = decltype(type);
    const auto f = [](auto a, auto b, bool first) { return first ? a : b; };
    name_it<T>("selp", {Apply<decltype(f), T, T, T, bool>::execute, bytes_of<T, T, bool>()});
  };
  choose(u16()), choose(s16()), choose(u32()), choose(s32()), choose(u64()), choose(s64()), choose(f32()),
      choose(f64());
  define_conversions<UNSIGNED>();
  define_conversions_of_floats<f32, INTEGERS>(), define_conversions_of_floats<f64, INTEGERS>();
  define<f32, f64>("cvt.rn.f32.f64", [](f64 a) { return a; });
  define_rounding<f32>(), define_rounding<f64>();
  define<f64, f32>("cvt.f64.f32", [](f32 a) { return f64(a); });
  define<f32, u16>("cvt.f32.f16", [](u16 a) { return half_to_float(a); });
  define<u16, f32>("cvt.rn.f16.f32", [](f32 a) { return float_to_half(a); });
  define<f32, u16>("cvt.f32.bf16", [](u16 a) { return bfloat_to_float(a); });
  define<u16, f32>("cvt.rn.bf16.f32", [](f32 a) { return float_to_bfloat(a); });
  table["split.8.4"] = {split<u64, u32>, {8}}, table["split.8.2"] = {split<u64, u16>, {8}};
  table["split.4.2"] = {split<u32, u16>, {4}};
  table["join.8.4"] = {join<u64, u32>, {4, 4}}, table["join.8.2"] = {join<u64, u16>, {2, 2, 2, 2}};
  table["join.4.2"] = {join<u32, u16>, {2, 2}};
}

// --- predicates, and what a warp does together -----------------------------------------------------------------------

template <typename F>  // the lane to take from, by lane, by and limits
void shuffle(Warp& w, const Instruction& i, u32 mask) {
  u32 from[kLanes], valid = 0;
  std::memcpy(from, w.lanes<u32>(i.from[0]), sizeof from);
  u32* const d = w.lanes<u32>(i.to[0]);
  const u32 *by = w.lanes<u32>(i.from[1]), *limits = w.lanes<u32>(i.from[2]);
  each_lane(mask, [&](int l) {
    const int segment = limits[l] >> 8 & 31, last = (l & segment) | (limits[l] & 31 & ~segment);
    int source = l;
    const bool inside = F()(source, static_cast<int>(by[l] & 31), segment, last);
    if (!inside) source = l;
    if (!(mask >> source & 1)) fail_at(w, i, l, "a shuffle from a lane that takes no part");
    valid |= static_cast<u32>(inside) << l;
    d[l] = from[source];
  });
  if (i.to[1] >= 0) w.set_predicate(i.to[1], mask, valid);
}
template <typename F>
void vote(Warp& w, const Instruction& i, u32 mask) {
  w.set_predicate(i.to[0], mask, F()(w.predicate(i, 0) & mask, mask) ? kAll : 0);
}
void ballot(Warp& w, const Instruction& i, u32 mask) {
  const u32 bits = w.predicate(i, 0) & mask;
  each_lane(mask, [&](int l) { w.lanes<u32>(i.to[0])[l] = bits; });
}
void match_any(Warp& w, const Instruction& i, u32 mask) {
  u32 a[kLanes];
  std::memcpy(a, w.lanes<u32>(i.from[0]), sizeof a);
  each_lane(mask, [&](int l) {
    u32 same = 0;
    each_lane(mask, [&](int other) { same |= static_cast<u32>(a[other] == a[l]) << other; });
    w.lanes<u32>(i.to[0])[l] = same;
  });
}
template <typename F>
void define_shuffle(const char* name, F) {
  table[std::string("shfl.sync.") + name + ".b32"] = {shuffle<F>, {4, 4, 4, 4}, Kind::kWarpWide};
}
template <typename F>
void define_vote(const char* name, F) {
  table[std::string("vote.sync.") + name + ".pred"] = {vote<F>, {0, 4}, Kind::kWarpWide};
}
void define_warps() {
  define<bool, bool, bool>("and.pred", [](bool a, bool b) { return a && b; });
  define<bool, bool, bool>("or.pred", [](bool a, bool b) { return a || b; });
  define<bool, bool, bool>("xor.pred", [](bool a, bool b) { return a != b; });
  define<bool, bool>("not.pred", [](bool a) { return !a; });
  define<bool, bool>("mov.pred", [](bool a) { return a; });
  define_shuffle("down", [](int& l, int by, int, int last) { return (l += by) <= last; });
  define_shuffle("up", [](int& l, int by, int, int last) { return (l -= by) >= last; });
  define_shuffle("bfly", [](int& l, int by, int, int last) { return (l ^= by) <= last; });
  define_shuffle("idx",
                 [](int& l, int by, int segment, int last) { return (l = (l & segment) | (by & ~segment)) <= last; });
  define_vote("any", [](u32 yes, u32) { return yes != 0; });
  define_vote("all", [](u32 yes, u32 mask) { return yes == mask; });
  table["vote.sync.ballot.b32"] = {ballot, {0, 4}, Kind::kWarpWide};
  table["match.any.sync.b32"] = {match_any, {4, 4}, Kind::kWarpWide};
  table["bar.warp.sync"] = {[](Warp& w, const Instruction&, u32) { w.ordered = ++machine.now; }, {4}, Kind::kWarpWide};
  table["bar.sync"] = {nullptr, {4}, Kind::kBarrier};
  table["bar.red.or.pred"] = {nullptr, {4, 0}, Kind::kBarrier};
}

// --- memory ----------------------------------------------------------------------------------------------------------

template <typename M, typename R>
void load(Warp& w, const Instruction& i, u32 mask) {
  char* at[kLanes];
  locate(w, i, mask, Access::kRead, at);
  for (int v = 0; v < i.vector; ++v) {
    if (i.to[v] < 0) continue;
    R* const d = w.lanes<R>(i.to[v]);
    each_lane(mask, [&](int l) {
      M x;
      std::memcpy(&x, at[l] + v * sizeof(M), sizeof x);
      d[l] = static_cast<R>(x);
    });
  }
}
template <typename M, typename R>
void store(Warp& w, const Instruction& i, u32 mask) {
  char* at[kLanes];
  locate(w, i, mask, Access::kWrite, at);
  for (int v = 0; v < i.vector; ++v) {
    const R* const from = w.lanes<R>(i.from[1 + v]);
    each_lane(mask, [&](int l) {
      const M x = static_cast<M>(from[l]);
      std::memcpy(at[l] + v * sizeof(M), &x, sizeof x);
    });
  }
}
template <typename F, typename T>
void atomic(Warp& w, const Instruction& i, u32 mask) {
  char* at[kLanes];
  locate(w, i, mask, Access::kAtomic, at);
  const T *a = w.lanes<T>(i.from[1]), *b = w.lanes<T>(i.from[i.from[2] < 0 ? 1 : 2]);
  each_lane(mask, [&](int l) {
    T old;
    std::memcpy(&old, at[l], sizeof old);
    const T now = F()(old, a[l], b[l]);
    std::memcpy(at[l], &now, sizeof now);
    if (i.to[0] >= 0) w.lanes<T>(i.to[0])[l] = old;
  });
}
template <typename... T, typename F>
void define_atomic(const char* name, F) {
  (name_it<T>(std::string("atom.") + name, {atomic<F, T>, {8, sizeof(T), sizeof(T)}}), ...);
}
void define_atomics() {  // of the old value, the first argument and the second; no floating-point ones: see style
  define_atomic<s32, u32, s64, u64>("add", [](auto old, auto a, auto) { return old + a; });
  define_atomic<s32, u32, s64, u64>("min", [](auto old, auto a, auto) { return std::min(old, a); });
  define_atomic<s32, u32, s64, u64>("max", [](auto old, auto a, auto) { return std::max(old, a); });
  define_atomic<u32, u64>("or", [](auto old, auto a, auto) { return old | a; });
  define_atomic<u32, u64>("and", [](auto old, auto a, auto) { return old & a; });
  define_atomic<u32, u64>("exch", [](auto, auto a, auto) { return a; });
  define_atomic<u32, u64>("cas", [](auto old, auto a, auto b) { return old == a ? b : old; });
}

}  // namespace

Execute memory_access(bool is_store, const std::string& type, int register_bytes) {
  const auto by_register = [&]<typename M>(M) {
    if (register_bytes == 2) return is_store ? store<M, u16> : load<M, u16>;
    if (register_bytes == 4) return is_store ? store<M, u32> : load<M, u32>;
    return is_store ? store<M, u64> : load<M, u64>;
  };
  if (type == "s8") return by_register(s8());
  if (type == "s16") return by_register(s16());
  if (type == "s32") return by_register(s32());
  const int bits = std::stoi(type.substr(1));
  return bits > 16  ? bits > 32 ? by_register(u64()) : by_register(u32())
         : bits > 8 ? by_register(u16())
                    : by_register(u8());
}

const Operation* operation(const std::string& name) {
  if (table.empty()) {
    define_arithmetic();
    define_comparisons();
    define_moves();
    define_warps();
    define_atomics();
  }
  const auto found = table.find(name);
  return found == table.end() ? nullptr : &found->second;
}

}  // namespace ptx
