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

template <typename F, typename D, typename... A>
void over_lanes(u32 mask, D* d, const A*... a) {
  if (mask == kAll) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) d[l] = static_cast<D>(F()(a[l]...));
  } else if (__builtin_popcount(mask) < 8) {
    each_lane(mask, [&](int l) { d[l] = static_cast<D>(F()(a[l]...)); });
  } else {
    D all[kLanes];
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) all[l] = static_cast<D>(F()(a[l]...));
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) d[l] = mask >> l & 1 ? all[l] : d[l];
  }
}

template <typename F, typename D, typename... A>
struct Function_ {
  template <size_t... k>
  static void apply(Warp& w, const Instruction& i, u32 mask, std::index_sequence<k...>) {
    over_lanes<F>(mask, w.lanes<D>(i.to[0]), w.lanes<A>(i.from[k])...);
  }
  static void execute(Warp& w, const Instruction& i, u32 mask) { apply(w, i, mask, std::index_sequence_for<A...>()); }
};

template <typename F, typename T>
void compare(Warp& w, const Instruction& i, u32 mask) {
  const T *a = w.lanes<T>(i.from[0]), *b = w.lanes<T>(i.from[1]);
  u32 bits = 0;
#pragma GCC ivdep
  for (int l = 0; l < kLanes; ++l) bits |= static_cast<u32>(F()(a[l], b[l])) << l;
  w.set_predicate(i.to[0], mask, bits);
}

template <typename T>
void select(Warp& w, const Instruction& i, u32 mask) {
  const u32 chosen = w.predicate(i, 2);
  const T *a = w.lanes<T>(i.from[0]), *b = w.lanes<T>(i.from[1]);
  T* const d = w.lanes<T>(i.to[0]);
#pragma GCC ivdep
  for (int l = 0; l < kLanes; ++l) {
    const T x = chosen >> l & 1 ? a[l] : b[l];
    d[l] = mask >> l & 1 ? x : d[l];
  }
}

// --- the names of types ----------------------------------------------------------------------------------------------

template <typename T>
std::string name_of(bool untyped = false) {
  return (untyped                       ? "b"
          : std::is_floating_point_v<T> ? "f"
          : std::is_signed_v<T>         ? "s"
                                        : "u") +
         std::to_string(8 * sizeof(T));
}
template <typename T>
void each_name(const std::string& name, const Operation& o) {
  table[name + "." + name_of<T>()] = o;
  if (std::is_unsigned_v<T>) table[name + "." + name_of<T>(true)] = o;
}

// name.T for each of the types: D(A...) given, or T(T), T(T, T), T(T, T, T) by the number of arguments.
template <typename D, typename... A, typename F>
void define(const std::string& name, F) {
  table[name] = {Function_<F, D, A...>::execute, {static_cast<int>(sizeof(A))...}};
}
template <int n, typename... T, typename F>
void each(std::initializer_list<const char*> names, F) {
  for (const char* name : names) {
    if constexpr (n == 1) (each_name<T>(name, {Function_<F, T, T>::execute, {sizeof(T)}}), ...);
    if constexpr (n == 2) (each_name<T>(name, {Function_<F, T, T, T>::execute, {sizeof(T), sizeof(T)}}), ...);
    if constexpr (n == 3) {
      (each_name<T>(name, {Function_<F, T, T, T, T>::execute, {sizeof(T), sizeof(T), sizeof(T)}}), ...);
    }
  }
}
template <typename... T, typename F>
void each_comparison(const char* name, F) {
  (each_name<T>(std::string("setp.") + name, {compare<F, T>, {sizeof(T), sizeof(T)}}), ...);
}
#define INTEGERS s16, u16, s32, u32, s64, u64
#define UNSIGNED u16, u32, u64

// --- arithmetic ------------------------------------------------------------------------------------------------------

template <typename T>
constexpr bool kIsFloat = std::is_floating_point_v<T>;

struct Smaller {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (kIsFloat<T>) return a != a ? b : a < b || (a == b && std::signbit(a)) || b != b ? a : b;
    return a < b ? a : b;
  }
};
struct Larger {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (kIsFloat<T>) return a != a ? b : a > b || (a == b && std::signbit(b)) || b != b ? a : b;
    return a > b ? a : b;
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
  each<2, INTEGERS, f32, f64>({"add", "add.rn"}, [](auto a, auto b) { return a + b; });
  each<2, INTEGERS, f32, f64>({"sub", "sub.rn"}, [](auto a, auto b) { return a - b; });
  each<2, f32, f64>({"mul", "mul.rn"}, [](auto a, auto b) { return a * b; });
  each<2, f32, f64>({"div.rn"}, [](auto a, auto b) { return a / b; });
  each<3, f32, f64>({"fma.rn"}, [](auto a, auto b, auto c) { return std::fma(a, b, c); });
  each<1, f32, f64>({"rcp.rn"}, [](auto a) { return 1 / a; });
  each<1, f32, f64>({"sqrt.rn"}, [](auto a) { return std::sqrt(a); });
  each<2, UNSIGNED>({"mul.lo"}, [](u64 a, u64 b) { return a * b; });
  each<2, s16, s32, s64>({"mul.lo"}, [](u64 a, u64 b) { return a * b; });
  each<3, INTEGERS>({"mad.lo"}, [](u64 a, u64 b, u64 c) { return a * b + c; });
  each<2, s32, u32>({"mul.hi"}, [](auto a, auto b) { return static_cast<u64>(s64(a) * s64(b)) >> 32; });
  each<2, u64>({"mul.hi"}, [](u64 a, u64 b) { return static_cast<u64>(static_cast<unsigned __int128>(a) * b >> 64); });
  each<2, s64>({"mul.hi"}, [](s64 a, s64 b) { return static_cast<s64>(static_cast<__int128>(a) * b >> 64); });
  const auto product = [](u64 a, u64 b) { return a * b; };
  const auto product_and_sum = [](u64 a, u64 b, u64 c) { return a * b + c; };
  define<u32, u16, u16>("mul.wide.u16", product), define<s32, s16, s16>("mul.wide.s16", product);
  define<u64, u32, u32>("mul.wide.u32", product), define<s64, s32, s32>("mul.wide.s32", product);
  define<u64, u32, u32, u64>("mad.wide.u32", product_and_sum);
  define<s64, s32, s32, s64>("mad.wide.s32", product_and_sum);
  each<2, INTEGERS>({"div"}, [](auto a, auto b) {
    using T = decltype(a);
    if (b == 0) return static_cast<T>(-1);
    return std::is_signed_v<T> && b == static_cast<T>(-1) ? static_cast<T>(0 - a) : static_cast<T>(a / b);
  });
  each<2, INTEGERS>({"rem"}, [](auto a, auto b) {
    using T = decltype(a);
    if (b == 0) return a;
    return std::is_signed_v<T> && b == static_cast<T>(-1) ? T(0) : static_cast<T>(a % b);
  });
  each<2, INTEGERS, f32, f64>({"min"}, Smaller());
  each<2, INTEGERS, f32, f64>({"max"}, Larger());
  each<1, s16, s32, s64, f32, f64>({"neg"}, [](auto a) { return -a; });
  each<1, s16, s32, s64, f32, f64>({"abs"}, [](auto a) {
    if constexpr (kIsFloat<decltype(a)>) return std::fabs(a);
    return a < 0 ? -a : a;
  });
  each<2, f32, f64>({"copysign"}, [](auto a, auto b) { return std::copysign(b, a); });
  each<2, UNSIGNED>({"and"}, [](auto a, auto b) { return a & b; });
  each<2, UNSIGNED>({"or"}, [](auto a, auto b) { return a | b; });
  each<2, UNSIGNED>({"xor"}, [](auto a, auto b) { return a ^ b; });
  each<1, UNSIGNED>({"not"}, [](auto a) { return ~a; });
  define<f32, f32>("ex2.approx.ftz.f32", Exp2());
  define<f32, f32>("rcp.approx.ftz.f32", Reciprocal());
  define<f64, f64>("rcp.approx.ftz.f64", ReciprocalOfDouble());
  // Shifts, whose second source has 32 bits.
  const auto shift = [](auto type, const char* name, auto f) {
    using T = decltype(type);
    each_name<T>(name, {Function_<decltype(f), T, T, u32>::execute, {sizeof(T), 4}});
  };
  const auto left = [](auto a, u32 b) { return b < 8 * sizeof a ? a << b : 0; };
  const auto right = [](auto a, u32 b) { return a >> (b < 8 * sizeof a ? b : 8 * sizeof a - 1); };
  const auto right_unsigned = [](auto a, u32 b) { return b < 8 * sizeof a ? a >> b : 0; };
  shift(u16(), "shl", left), shift(u32(), "shl", left), shift(u64(), "shl", left);
  shift(s16(), "shr", right), shift(s32(), "shr", right), shift(s64(), "shr", right);
  shift(u16(), "shr", right_unsigned), shift(u32(), "shr", right_unsigned), shift(u64(), "shr", right_unsigned);
  each<3, u32>({"shf.l.wrap"}, [](u32 a, u32 b, u32 c) { return (u64(b) << 32 | a) << (c & 31) >> 32; });
  each<3, u32>({"shf.r.wrap"}, [](u32 a, u32 b, u32 c) { return (u64(b) << 32 | a) >> (c & 31); });
  each<3, u32>({"bfe"}, [](u32 a, u32 at, u32 n) {
    return u64(a) >> std::min(at & 255, 63u) & ((u64(1) << std::min(n & 255, 32u)) - 1);
  });
  define<u32, u32, u32, u32, u32>("bfi.b32", [](u32 a, u32 b, u32 at, u32 n) {
    const u64 mask = ((u64(1) << std::min(n & 255, 32u)) - 1) << std::min(at & 255, 32u);
    return static_cast<u32>((b & ~mask) | (u64(a) << std::min(at & 255, 32u) & mask));
  });
  each<3, u32>({"prmt"}, [](u32 a, u32 b, u32 c) {
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
  define<u32, u32>("bfind.shiftamt.u32", [](u32 a) { return a ? __builtin_clz(a) : -1; });
  define<u32, u64>("clz.b64", [](u64 a) { return a ? __builtin_clzll(a) : 64; });
  define<u32, u32>("brev.b32", [](u32 a) {
    u32 result = 0;
    for (int k = 0; k < 32; ++k) result |= (a >> k & 1) << (31 - k);
    return result;
  });
}

void define_comparisons() {
  const auto ordered = [](auto a, auto b) { return a == a && b == b; };
  each_comparison<INTEGERS, f32, f64>("eq", [](auto a, auto b) { return a == b; });
  each_comparison<INTEGERS>("ne", [](auto a, auto b) { return a != b; });
  each_comparison<INTEGERS, f32, f64>("lt", [](auto a, auto b) { return a < b; });
  each_comparison<INTEGERS, f32, f64>("le", [](auto a, auto b) { return a <= b; });
  each_comparison<INTEGERS, f32, f64>("gt", [](auto a, auto b) { return a > b; });
  each_comparison<INTEGERS, f32, f64>("ge", [](auto a, auto b) { return a >= b; });
  each_comparison<f32, f64>("ne", [](auto a, auto b) { return a < b || a > b; });
  each_comparison<f32, f64>("equ", [](auto a, auto b) { return !(a < b || a > b); });
  each_comparison<f32, f64>("neu", [](auto a, auto b) { return a != b; });
  each_comparison<f32, f64>("ltu", [](auto a, auto b) { return !(a >= b); });
  each_comparison<f32, f64>("leu", [](auto a, auto b) { return !(a > b); });
  each_comparison<f32, f64>("gtu", [](auto a, auto b) { return !(a <= b); });
  each_comparison<f32, f64>("geu", [](auto a, auto b) { return !(a < b); });
  each_comparison<f32, f64>("num", ordered);
  each_comparison<f32, f64>("nan", [](auto a, auto b) { return a != a || b != b; });
  table["setp.lo.u32"] = table["setp.lt.u32"], table["setp.hi.u32"] = table["setp.gt.u32"];
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
template <typename D, typename... A>
void define_conversions_to_float() {
  const auto convert = [](auto a) { return static_cast<D>(a); };
  (define<D, A>("cvt.rn." + name_of<D>() + "." + name_of<A>(), convert), ...);
}
template <typename... D>
void define_conversions_from_float() {
  (define<D, f32>("cvt.rzi." + name_of<D>() + ".f32", Truncated<D>()), ...);
  (define<D, f64>("cvt.rzi." + name_of<D>() + ".f64", Truncated<D>()), ...);
  (define<D, f64>("cvt.rni." + name_of<D>() + ".f64", [](f64 a) { return Truncated<D>()(std::nearbyint(a)); }), ...);
}
template <typename T>
void define_rounding() {
  const std::string type = "." + name_of<T>() + "." + name_of<T>();
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
  each<1, INTEGERS, f32, f64>({"mov", "cvta.to.global", "cvta.global", "cvta.param", "cvta.to.param"}, same);
  // Generic addresses of shared memory have their highest bit set.
  each<1, u64>({"cvta.shared"}, [](u64 a) { return a | u64(1) << 63; });
  each<1, u64>({"cvta.to.shared"}, [](u64 a) { return a & ~(u64(1) << 63); });
  (void)std::initializer_list<int>{
      (each_name<u16>("selp", {select<u16>, {2, 2, 0}}), 0), (each_name<s16>("selp", {select<u16>, {2, 2, 0}}), 0),
      (each_name<u32>("selp", {select<u32>, {4, 4, 0}}), 0), (each_name<s32>("selp", {select<u32>, {4, 4, 0}}), 0),
      (each_name<u64>("selp", {select<u64>, {8, 8, 0}}), 0), (each_name<s64>("selp", {select<u64>, {8, 8, 0}}), 0),
      (each_name<f32>("selp", {select<u32>, {4, 4, 0}}), 0), (each_name<f64>("selp", {select<u64>, {8, 8, 0}}), 0)};
  define_conversions<UNSIGNED>();
  define_conversions_to_float<f32, INTEGERS, f64>(), define_conversions_to_float<f64, INTEGERS>();
  define_conversions_from_float<INTEGERS>();
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

template <typename F>
void of_predicates(Warp& w, const Instruction& i, u32 mask) {
  w.set_predicate(i.to[0], mask, F()(w.predicate(i, 0), i.from[1] < 0 ? 0 : w.predicate(i, 1)));
}
template <typename F>
void define_of_predicates(const char* name, int sources, F) {
  table[name] = {of_predicates<F>, std::vector<int>(sources, 0)};
}

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
template <typename T>
void match_any(Warp& w, const Instruction& i, u32 mask) {
  T a[kLanes];
  std::memcpy(a, w.lanes<T>(i.from[0]), sizeof a);
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
  define_of_predicates("and.pred", 2, [](u32 a, u32 b) { return a & b; });
  define_of_predicates("or.pred", 2, [](u32 a, u32 b) { return a | b; });
  define_of_predicates("xor.pred", 2, [](u32 a, u32 b) { return a ^ b; });
  define_of_predicates("not.pred", 1, [](u32 a, u32) { return ~a; });
  define_of_predicates("mov.pred", 1, [](u32 a, u32) { return a; });
  define_shuffle("down", [](int& l, int by, int, int last) { return (l += by) <= last; });
  define_shuffle("up", [](int& l, int by, int, int last) { return (l -= by) >= last; });
  define_shuffle("bfly", [](int& l, int by, int, int last) { return (l ^= by) <= last; });
  define_shuffle("idx",
                 [](int& l, int by, int segment, int last) { return (l = (l & segment) | (by & ~segment)) <= last; });
  define_vote("any", [](u32 yes, u32) { return yes != 0; });
  define_vote("all", [](u32 yes, u32 mask) { return yes == mask; });
  define_vote("uni", [](u32 yes, u32 mask) { return yes == 0 || yes == mask; });
  table["vote.sync.ballot.b32"] = {ballot, {0, 4}, Kind::kWarpWide};
  table["match.any.sync.b32"] = {match_any<u32>, {4, 4}, Kind::kWarpWide};
  table["match.any.sync.b64"] = {match_any<u64>, {8, 4}, Kind::kWarpWide};
  table["bar.warp.sync"] = {[](Warp& w, const Instruction&, u32) { w.ordered = ++machine.now; }, {4}, Kind::kWarpWide};
  table["bar.sync"] = {nullptr, {4}, Kind::kBarrier};
  table["bar.red.or.pred"] = {nullptr, {4, 0}, Kind::kBarrier};
  table["bar.red.and.pred"] = {nullptr, {4, 0}, Kind::kBarrier};
  table["bar.red.popc.u32"] = {nullptr, {4, 0}, Kind::kBarrier};
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
  (each_name<T>(std::string("atom.") + name, {atomic<F, T>, {8, sizeof(T), sizeof(T)}}), ...);
}
void define_atomics() {  // of the old value, the first argument and the second; no floating-point ones: see style
  define_atomic<s32, u32, s64, u64>("add", [](auto old, auto a, auto) { return old + a; });
  define_atomic<s32, u32, s64, u64>("min", [](auto old, auto a, auto) { return std::min(old, a); });
  define_atomic<s32, u32, s64, u64>("max", [](auto old, auto a, auto) { return std::max(old, a); });
  define_atomic<u32, u64>("or", [](auto old, auto a, auto) { return old | a; });
  define_atomic<u32, u64>("and", [](auto old, auto a, auto) { return old & a; });
  define_atomic<u32, u64>("xor", [](auto old, auto a, auto) { return old ^ a; });
  define_atomic<u32, u64>("exch", [](auto, auto a, auto) { return a; });
  define_atomic<u32, u64>("cas", [](auto old, auto a, auto b) { return old == a ? b : old; });
}

}  // namespace

Execute memory_access(bool is_store, const std::string& type, int register_bytes) {
  const auto by_register = [&](auto m) {
    using M = decltype(m);
    if (register_bytes == 2) return is_store ? store<M, u16> : load<M, u16>;
    if (register_bytes == 4) return is_store ? store<M, u32> : load<M, u32>;
    return is_store ? store<M, u64> : load<M, u64>;
  };
  const int bits = std::stoi(type.substr(1));
  if (type[0] == 's')
    return bits == 8    ? by_register(s8())
           : bits == 16 ? by_register(s16())
           : bits == 32 ? by_register(s32())
                        : by_register(s64());
  return bits == 8    ? by_register(u8())
         : bits == 16 ? by_register(u16())
         : bits == 32 ? by_register(u32())
                      : by_register(u64());
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
