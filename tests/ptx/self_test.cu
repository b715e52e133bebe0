// Kernels that the machine must run right, and kernels with a fault each that it must name: test_machine.py.
#include <cuda_fp16.h>

#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "../../csrc/cpu/half.h"
#include "machine.h"

namespace {

using ptx::s16, ptx::s32, ptx::s64, ptx::s8, ptx::u16, ptx::u32, ptx::u64, ptx::u8;

void check(cudaError_t error) {
  if (error) ptx::fail(cudaGetErrorString(error));
}
void expect(bool right, const std::string& what) {
  if (!right) ptx::fail("wrong: " + what);
}
// Memory of the device, for as long as it lives; written already, unless it is `fresh`.
template <typename T>
struct Memory {
  std::vector<T> values;
  explicit Memory(std::vector<T> v, bool writable = true, bool fresh = false) : values(std::move(v)) {
    ptx::allow(values.data(), values.size() * sizeof(T), writable);
    if (fresh) ptx::forget_content(values.data(), values.size() * sizeof(T));
  }
  ~Memory() { ptx::forget_memory(); }
  T* data() { return values.data(); }
};

// --- the same function on both sides ---------------------------------------------------------------------------------

#define BOTH __host__ __device__ __forceinline__

struct Integers {
  static constexpr int kCount = 19;
  template <typename T>
  static BOTH T of(int k, T a, T b, T c) {
    constexpr int kBits = 8 * sizeof(T);
    const T divisor = b == 0 || b == static_cast<T>(-1) ? 3 : b;
    const int by = static_cast<int>(b & (kBits - 1));
    switch (k) {
      case 0: return a + b;
      case 1: return a - b;
      case 2: return a * b;
      case 3: return a / divisor;
      case 4: return a % divisor;
      case 5: return (a & b) | c;
      case 6: return a ^ ~b;
      case 7: return static_cast<T>(static_cast<u64>(a) << by);
      case 8: return a >> by;
      case 9: return a < b ? a : b;
      case 10: return a > b ? a : c;
      case 11: return a * b + c;
      case 12: return -a;
      case 13: return a <= b || b >= c ? 1 : 2;
      case 14: return a == b && b != c ? a : c;
      case 15: return a < b ? -a : a;
      case 16: return static_cast<T>(static_cast<s64>(static_cast<s32>(a)) * static_cast<s32>(b));
      case 17: return static_cast<T>(static_cast<u64>(static_cast<u32>(a)) * static_cast<u32>(b) >> 32);
      default: return static_cast<T>(static_cast<u64>(static_cast<u16>(a)) * static_cast<u16>(b));
    }
  }
};
struct Conversions {
  static constexpr int kCount = 12;
  template <typename T>
  static BOTH T of(int k, T a, T b, T) {
    switch (k) {
      case 0: return static_cast<T>(static_cast<s8>(a));
      case 1: return static_cast<T>(static_cast<u8>(a));
      case 2: return static_cast<T>(static_cast<s16>(a));
      case 3: return static_cast<T>(static_cast<u16>(a));
      case 4: return static_cast<T>(static_cast<s32>(a));
      case 5: return static_cast<T>(static_cast<u32>(a));
      case 6: return static_cast<T>(static_cast<s64>(a));
      case 7: return static_cast<T>(static_cast<s8>(a) < static_cast<s8>(b));
      case 8: return static_cast<T>(static_cast<double>(a) < static_cast<double>(b));
      case 9: return static_cast<T>(static_cast<float>(a) < static_cast<float>(b));
      case 10: return static_cast<T>(static_cast<s32>(static_cast<float>(static_cast<s16>(a)) * 0.75f));
      default: return static_cast<T>(static_cast<s64>(static_cast<double>(static_cast<s16>(a)) * 0.75));
    }
  }
};
struct Floats {
  static constexpr int kCount = 24;
  template <typename T>
  static BOTH T of(int k, T a, T b, T c) {
    switch (k) {
      case 0: return a + b;
      case 1: return a - b;
      case 2: return a * b;
      case 3: return a / b;
      case 4: return fma(a, b, c);
      case 5: return a != a ? b : b != b ? a : a == b ? a + b : fmin(a, b);  // which zero is the smaller C leaves open
      case 6: return a != a ? b : b != b ? a : a == b ? a + b : fmax(a, b);
      case 7: return floor(a);
      case 8: return ceil(a);
      case 9: return trunc(a);
      case 10: return rint(a);
      case 11: return sqrt(a < 0 ? -a : a);
      case 12: return b - a;
      case 13: return -a;
      case 14: return fabs(a);
      case 15: return a < b ? c : a;
      case 16: return !(a < b) ? c : a;
      case 17: return a <= b ? c : a;
      case 18: return !(a >= b) ? c : a;
      case 19: return a == b ? c : a;
      case 20: return a != b ? c : a;
      case 21: return static_cast<T>(static_cast<float>(a));
      case 22: return 1 / b;
      default: return a > b && !(b > c) ? a : c;
    }
  }
};

template <typename F, typename T>
__global__ void apply(const T* values, int n, T* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n * n) return;
  const T a = values[i / n], b = values[i % n], c = values[(i + 3) % n];
  for (int k = 0; k < F::kCount; ++k) out[i * F::kCount + k] = F::template of<T>(k, a, b, c);
}

template <typename F, typename T>
void same_on_both(const std::vector<T>& some) {
  const int n = static_cast<int>(some.size());
  Memory<T> values(some, false), out(std::vector<T>(n * n * F::kCount), true, true);
  apply<F><<<(n * n + 63) / 64, 64>>>(values.data(), n, out.data());
  check(cudaGetLastError());
  for (int i = 0; i < n * n; ++i) {
    for (int k = 0; k < F::kCount; ++k) {
      const T a = some[i / n], b = some[i % n], c = some[(i + 3) % n], right = F::template of<T>(k, a, b, c);
      const T found = out.values[i * F::kCount + k];
      const bool same = (right != right && found != found) || std::memcmp(&right, &found, sizeof right) == 0;
      expect(same, std::to_string(k) + " of " + std::to_string(a) + ", " + std::to_string(b) + ", " +
                       std::to_string(c) + ": " + std::to_string(found) + ", not " + std::to_string(right));
    }
  }
}
template <typename T>
void integers_of() {
  std::vector<T> all;
  for (const u64 x :
       {0ull, 1ull, 2ull, 3ull, 31ull, 127ull, 128ull, 255ull, 40000ull, 65535ull, 0x12345678ull, 0x7FFFFFFFull,
        0x80000000ull, 0xFFFFFFF9ull, 0x123456789ABCDEFull, ~0ull, ~0ull - 1000, 1ull << 63}) {
    all.push_back(static_cast<T>(x));
  }
  same_on_both<Integers>(all);
  same_on_both<Conversions>(all);
}
void integers() {
  integers_of<s32>(), integers_of<u32>(), integers_of<s64>(), integers_of<u64>(), integers_of<u16>(),
      integers_of<s16>();
}
template <typename T>
void floats_of() {
  using L = std::numeric_limits<T>;
  same_on_both<Floats, T>({0, T(-0.0), 1, -1, T(0.1), T(-2.5), T(3.5), T(1e-20), T(-1e20), L::max(), L::min(),
                           L::denorm_min(), L::infinity(), -L::infinity(), L::quiet_NaN(), T(12345678.9)});
}
void floats() { floats_of<float>(), floats_of<double>(); }

__global__ void bits(u32* x, float* y, const float* z) {
  const int t = threadIdx.x;
  const u32 a = x[t];
  u32* const out = x + 64;
  out[t] = __popc(a) + 100 * __clz(a) + (__byte_perm(a, ~a, 0x5140) & 0xF00000);
  out[64 + t] = __funnelshift_l(a, a * 3, t) ^ __funnelshift_r(a, a * 5, t) ^ __umulhi(a, 12345);
  out[128 + t] = __popcll(static_cast<u64>(a) << t) + static_cast<u32>(__float2int_rz(z[t]));
  y[t] = __half2float(__float2half_rn(z[t]));
}
u32 rotated(u32 low, u32 high, int by, bool left) {
  const u64 both = static_cast<u64>(high) << 32 | low;
  return static_cast<u32>(left ? both << by >> 32 : both >> by);
}
void bit_functions() {
  std::vector<u32> in(256);
  std::vector<float> z(64);
  for (u32 t = 0; t < 64; ++t)
    in[t] = t < 2 ? t - 1 : t * 2654435761u, z[t] = std::ldexp(1.0f + t, static_cast<int>(t % 40) - 30);
  z[5] = 1e30f, z[6] = -1e30f, z[7] = NAN, z[8] = 65519, z[9] = 65520;
  Memory<u32> x(in);
  Memory<float> y(std::vector<float>(64), true, true), w(z, false);
  bits<<<1, 64>>>(x.data(), y.data(), w.data());
  check(cudaGetLastError());
  for (u32 t = 0; t < 64; ++t) {
    const u32 a = in[t], leading = a ? static_cast<u32>(__builtin_clz(a)) : 32, b = ~a;
    const u32 permuted = (b >> 8 & 255) << 24 | (a >> 8 & 255) << 16;
    expect(x.values[64 + t] == __builtin_popcount(a) + 100 * leading + (permuted & 0xF00000), "bits");
    expect(x.values[128 + t] == (rotated(a, a * 3, t & 31, true) ^ rotated(a, a * 5, t & 31, false) ^
                                 static_cast<u32>(static_cast<u64>(a) * 12345 >> 32)),
           "funnel shifts");
    const s32 whole = z[t] >= 2147483648.0f    ? 2147483647
                      : z[t] <= -2147483648.0f ? -2147483647 - 1
                      : z[t] != z[t]           ? 0
                                               : static_cast<s32>(z[t]);
    expect(x.values[192 + t] == __builtin_popcountll(static_cast<u64>(a) << t) + whole, "popc of 64 bits, truncation");
    const float half = roadmap::half_to_float(roadmap::float_to_half(z[t]));
    expect(y.values[t] == half || (half != half && y.values[t] != y.values[t]), "halves");
  }
}

// --- blocks and warps ------------------------------------------------------------------------------------------------

// Sums over a block in several ways, warps parting on the way.
__global__ void together(int* x, int* sums) {
  extern __shared__ int dynamic[];
  __shared__ int fixed[64];
  const int t = threadIdx.x, lane = t % 32;
  int sum = x[blockIdx.x * 64 + t];
  fixed[t] = sum;
  for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
  if (lane == 3) dynamic[t / 32] = sum;
  __syncthreads();
  int again = 0;
  for (int k = 0; k < 64 - t; ++k) again += fixed[k] * (t % 4 + 1);  // each lane for another time
  const int up = __shfl_up_sync(~0u, t, 1), down = __shfl_down_sync(~0u, t, 2, 16), first = __shfl_sync(~0u, t, 5);
  const unsigned odd = __ballot_sync(~0u, t % 2), same = __match_any_sync(~0u, t / 3);
  const bool any = __syncthreads_or(t == 9), none = __syncthreads_or(t > 99);
  int part = 0;
  if (t % 4 < 2) {
    part = __shfl_xor_sync(0x33333333u, t, 1);
  } else {
    part = __shfl_xor_sync(0xCCCCCCCCu, t, 1) + __any_sync(0xCCCCCCCCu, t == 34);
  }
  fixed[t] = again;
  __syncwarp();
  again = fixed[t ^ 1];
  atomicAdd(&sums[0], 1), atomicMax(&sums[1], t), atomicOr(&sums[2], 1 << lane);
  x[blockIdx.x * 64 + t] =
      dynamic[0] + 2 * dynamic[1] + again + up + down + first + static_cast<int>(odd + same) + any + none + part;
}
void blocks_and_warps() {
  std::vector<int> in(128);
  for (int i = 0; i < 128; ++i) in[i] = i * i;
  Memory<int> x(in), sums({0, 0, 0});
  together<<<2, 64, 8>>>(x.data(), sums.data());
  check(cudaGetLastError());
  for (int i = 0; i < 128; ++i) {
    const int t = i % 64, o = t ^ 1, begin = i - t;
    int right = 0;
    for (int k = 0; k < 64; ++k) right += (k < 32 ? 1 : 2) * in[begin + k];
    for (int k = 0; k < 64 - o; ++k) right += in[begin + k] * (o % 4 + 1);
    right += t % 32 ? t - 1 : t;
    right += t % 16 < 14 ? t + 2 : t;
    right += t / 32 * 32 + 5;
    unsigned same = 0;
    for (int k = t / 32 * 32; k < t / 32 * 32 + 32; ++k) same |= static_cast<unsigned>(k / 3 == t / 3) << k % 32;
    right += static_cast<int>(0xAAAAAAAAu + same) + 1 + (t ^ 1) + (t % 4 >= 2 && t >= 32);
    expect(x.values[i] == right,
           "thread " + std::to_string(i) + ": " + std::to_string(x.values[i]) + ", not " + std::to_string(right));
  }
  expect(sums.values[0] == 128 && sums.values[1] == 63 && sums.values[2] == -1, "atomics");
}

// Reads and writes that barriers, or a launch, order; and halves of a word, which two threads may write.
__global__ void ordered(int* x, u16* halves) {
  const int t = threadIdx.x;
  int* const own = x + blockIdx.x * 64;
  own[t] = t;
  halves[blockIdx.x * 64 + t] = static_cast<u16>(t);
  __syncthreads();
  const int other = own[63 - t];
  __syncthreads();
  own[t] = other + halves[blockIdx.x * 64 + (t ^ 1)];
}
void orders() {
  Memory<int> x(std::vector<int>(128), true, true);
  Memory<u16> halves(std::vector<u16>(128), true, true);
  for (int k = 0; k < 2; ++k) ordered<<<2, 64>>>(x.data(), halves.data());
  check(cudaGetLastError());
  for (int i = 0; i < 128; ++i) expect(x.values[i] == 63 - i % 64 + (i % 64 ^ 1), "order");
}

__global__ void approximations(const float* x, float* y) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y[2 * i]) : "f"(x[i]));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y[2 * i + 1]) : "f"(x[i]));
}
void fast_functions() {
  constexpr int n = 2048;
  std::vector<float> in(n);
  for (int i = 0; i < n; ++i) in[i] = 0.123f * static_cast<float>(i - n / 2) + 0.001f;
  const float special[] = {0, INFINITY, -INFINITY, NAN, 128, -127, 1e-39f, 1};
  std::copy(special, special + 8, in.begin());
  Memory<float> x(in, false), y(std::vector<float>(2 * n), true, true);
  approximations<<<n / 64, 64>>>(x.data(), y.data());
  check(cudaGetLastError());
  double worst[2] = {};
  for (int i = 8; i < n; ++i) {
    for (int f = 0; f < 2; ++f) {
      const double exact = f ? 1 / static_cast<double>(in[i]) : std::exp2(static_cast<double>(in[i]));
      if (std::fabs(exact) > 1e38 || std::fabs(exact) < 2e-38) continue;
      int exponent;
      std::frexp(exact, &exponent);
      worst[f] = std::max(worst[f], std::fabs(y.values[2 * i + f] - exact) / std::ldexp(1.0, exponent - 24));
    }
  }
  expect(worst[0] <= 2 && worst[0] > 1.5 && worst[1] <= 1 && worst[1] > 0.7, "errors of the fast functions");
  const auto power = [&](int i) { return y.values[2 * i]; };
  const auto inverse = [&](int i) { return y.values[2 * i + 1]; };
  expect(power(0) == 1 && power(1) == INFINITY && power(2) == 0 && power(3) != power(3), "powers");
  expect(power(4) == INFINITY && power(5) == 0 && power(6) == 1, "powers at the ends");
  expect(inverse(0) == INFINITY && inverse(1) == 0 && inverse(3) != inverse(3) && inverse(6) == INFINITY, "inverses");
}

// --- cases -----------------------------------------------------------------------------------------------------------

struct Case {
  const char* name;
  std::function<void()> run;
};
std::vector<Case> cases = {{"integers", integers},
                           {"floats", floats},
                           {"bit_functions", bit_functions},
                           {"blocks_and_warps", blocks_and_warps},
                           {"orders", orders},
                           {"fast_functions", fast_functions}};

// Two blocks of 64 threads, with 256 ints in global memory and 64 in shared: what they do must fail, with these words.
bool faulty(const char* name, const std::string& expected, void (*kernel)(int*, const int*), int threads = 64) {
  cases.push_back({name, [=] {
                     const bool fresh = expected == "reads what was never written; ";
                     Memory<int> x(std::vector<int>(256), true, fresh), y(std::vector<int>(64), false);
                     kernel<<<2, threads, 64 * sizeof(int)>>>(x.data(), y.data());
                     const bool failed = cudaGetLastError() != cudaSuccess;
                     const std::string found = failed ? cudaGetErrorString(cudaErrorLaunchFailure) : "nothing";
                     expect(found.find(expected) != std::string::npos, found + " was noticed, not " + expected);
                   }});
  return true;
}
#define FAULT(name, expected, ...)             \
  __global__ void name(int* x, const int* y) { \
    extern __shared__ int s[];                 \
    const int t = threadIdx.x;                 \
    __VA_ARGS__;                               \
    (void)x, (void)y, (void)s, (void)t;        \
  }                                            \
  const bool name##_is_faulty = faulty(#name, expected, name);
// What is read is used, or nvcc takes the read out.
#define USE(value) x[128 + blockIdx.x * 64 + t] = value
#define RACE(where, does) "race on " where " memory: " does
#define INCOMPLETE "a warp-wide instruction that others have reached than its mask names; "

FAULT(no_barrier_after_write, RACE("shared", ""), s[t] = 0; __syncthreads(); s[t] = t; USE(s[63 - t]))
FAULT(no_barrier_after_read, RACE("shared", ""), s[t] = t; __syncthreads(); const int other = s[63 - t];
      s[t] = other + 1)
FAULT(two_writers, RACE("shared", "writes what thread "), s[t / 2] = t)
FAULT(race_in_warp, RACE("shared", "reads what thread "), s[t] = t; if (__any_sync(~0u, t == 3)) USE(s[t ^ 1]))
FAULT(race_of_warps, RACE("shared", ""), s[t] = 0; __syncthreads(); s[t] = t; __syncwarp(); USE(s[t ^ 32]))
FAULT(race_with_readers, RACE("shared", ""), s[t] = t; __syncthreads(); const int read = s[7]; __syncwarp();
      if (t == 1) s[7] = read + 1; USE(read))
FAULT(global_no_barrier, RACE("global", ""), x[64 * blockIdx.x + t] = t; USE(x[64 * blockIdx.x + 63 - t]))
FAULT(global_two_blocks, RACE("global", "writes what another block has written"), x[t] = t)
FAULT(global_read_of_another_block, "what another block has ", if (blockIdx.x) x[t] = 1; else USE(x[t]))
FAULT(half_and_whole, RACE("shared", "writes what thread "), reinterpret_cast<u16*>(s)[t] = 1; if (t == 40) s[1] = 5)
FAULT(atomic_and_plain, RACE("global", "reads what thread "), atomicOr(&x[blockIdx.x], 1 << t); USE(x[blockIdx.x]))
FAULT(past_the_end, "out of bounds of global memory; self_test.cu:", x[t == 9 ? 256 : t + 64 * blockIdx.x] = 1)
FAULT(before_the_begin, "(st.global.u32), thread 9 of 64, block ", x[t == 9 ? -1 : t] = 1)
FAULT(shared_past_the_end, "out of bounds of shared memory: byte ", s[t + (t == 63)] = 1)
FAULT(null_pointer, "out of bounds of global memory; ", if (t == 5) * reinterpret_cast<int*>(blockIdx.x * 4) = 1)
FAULT(read_only, "a write to memory that is only to be read; ", const_cast<int*>(y)[t] = 1)
FAULT(never_written, "never written; self_test.cu:", if (t != 5) s[t] = t; __syncthreads(); USE(s[t ^ 1]))
FAULT(never_written_global, "reads what was never written; ", USE(x[t + 64 * blockIdx.x]))
FAULT(
    divergent_barrier, "lanes of a warp at different barriers; ",
    if (t % 2) {
      x[64 * blockIdx.x + t] = 1;
      __syncthreads();
    } else {
      __syncthreads();
      USE(1);
    })
FAULT(barriers_too_many, "a barrier that some warps have returned before; ",
      for (int i = 0; i < 2 + t / 32; ++i) __syncthreads())
FAULT(early_return, "a barrier that some lanes have returned before; ", if (t == 40) return; __syncthreads(); USE(1))
FAULT(lanes_missing, INCOMPLETE, if (t != 40) USE(__shfl_down_sync(~0u, t, 1)))
FAULT(lanes_of_another_mask, INCOMPLETE, USE(__shfl_xor_sync(t % 2 ? 0x55555555u : 0xFFFFFFFFu, t, 1)))
FAULT(lane_out_of_mask, "a shuffle from a lane that takes no part; ", if (t % 32 < 8) USE(__shfl_sync(0xFFu, t, 9)))
FAULT(misaligned, "a misaligned access to shared memory; ", if (t == 3) * reinterpret_cast<int4*>(s + 6) = int4())
FAULT(float_atomic, "not supported: an instruction; ", atomicAdd(reinterpret_cast<float*>(x), 1.0f))
const bool odd_threads = faulty("odd_threads", "a launch of 2 blocks of 48 threads", two_writers, 48);

}  // namespace

// Lists the cases, or runs one of them: "ok", or what was wrong, for each seed.
int main(int argc, char** argv) {
  for (const Case& c : cases) {
    if (argc < 2) std::puts(c.name);
    if (argc < 2 || std::strcmp(argv[1], c.name) != 0) continue;
    for (ptx::machine.seed = 1; ptx::machine.seed <= 10; ++ptx::machine.seed) {
      ptx::machine.noise = ptx::machine.seed;
      try {
        c.run();
        orders();  // a fault leaves no traces
        std::puts("ok");
      } catch (const std::exception& error) {
        std::puts(error.what());
      }
    }
  }
}
