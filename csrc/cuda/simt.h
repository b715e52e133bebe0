// The words that kernel bodies are written in: memory, barriers, shuffles, votes and fast functions of a GPU. Bodies
// use nothing else of CUDA, so that the same text runs on the CPU, in the test suite, where every access and every
// barrier is checked (tests/emulated/emulator.h defines all of this once more, for ROADMAP_EMULATED).
//
// Global<T> is memory of the device, Shared<T> that of a block: plain pointers here, checked ones there. A body reads
// `const T x = p[i];` and writes `p[i] = x;`, no references kept. All shared memory comes from the launcher.
#pragma once

#include <cstdint>

#if defined(ROADMAP_EMULATED)
#include "emulator.h"
#else

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define ROADMAP_DEVICE __device__ __forceinline__
#else
#define ROADMAP_DEVICE inline
#endif

namespace roadmap::simt {

template <typename T>
using Global = T*;
template <typename T>
using Shared = T*;

// Memory that torch owns, as a body sees it. size: elements that may be touched from p on.
template <typename T>
Global<T> global(T* p, int64_t size) {
  (void)size;
  return p;
}

#if defined(__CUDACC__)

// Hands out the shared memory of a block, piece after piece, each aligned for its type.
class SharedMemory {
 public:
  explicit ROADMAP_DEVICE SharedMemory(char* begin) : at_(begin) {}
  template <typename T>
  ROADMAP_DEVICE Shared<T> take(int count) {
    T* const begin = reinterpret_cast<T*>(at_);
    at_ += (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
    return begin;
  }

 private:
  char* at_;
};

constexpr int kWarp = 32;

ROADMAP_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
ROADMAP_DEVICE int threads() { return static_cast<int>(blockDim.x); }
ROADMAP_DEVICE int64_t block() { return blockIdx.x; }
ROADMAP_DEVICE int64_t blocks() { return gridDim.x; }

// All threads of the block meet; what they wrote before, to shared and global memory, all see after.
ROADMAP_DEVICE void barrier() { __syncthreads(); }
ROADMAP_DEVICE bool barrier_or(bool x) { return __syncthreads_or(x) != 0; }

// All 32 threads of a warp take part.
template <typename T>
ROADMAP_DEVICE T shuffle_down(T x, int delta) {
  return __shfl_down_sync(0xFFFFFFFFu, x, delta);
}
template <typename T>
ROADMAP_DEVICE T shuffle_up(T x, int delta) {
  return __shfl_up_sync(0xFFFFFFFFu, x, delta);
}
template <typename T>
ROADMAP_DEVICE T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, x, mask);
}
ROADMAP_DEVICE bool warp_any(bool x) { return __any_sync(0xFFFFFFFFu, x) != 0; }
// The lanes that say true, a bit each.
ROADMAP_DEVICE uint32_t ballot(bool x) { return __ballot_sync(0xFFFFFFFFu, x); }

ROADMAP_DEVICE void atomic_or(Global<uint32_t> p, int64_t i, uint32_t bits) { atomicOr(p + i, bits); }
ROADMAP_DEVICE void atomic_and(Global<uint32_t> p, int64_t i, uint32_t bits) { atomicAnd(p + i, bits); }
// Integers alone, whose sums do not depend on the order; the first returns what was there.
ROADMAP_DEVICE uint32_t atomic_add(Shared<uint32_t> p, int64_t i, uint32_t x) { return atomicAdd(p + i, x); }
ROADMAP_DEVICE void atomic_add(Global<int64_t> p, int64_t i, int64_t x) {
  atomicAdd(reinterpret_cast<unsigned long long*>(p + i), static_cast<unsigned long long>(x));
}
ROADMAP_DEVICE int count_bits(uint32_t x) { return __popc(x); }
ROADMAP_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
ROADMAP_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }

// A vector of 4, 8 or 16 bytes in one access; p + i is aligned to its size.
template <typename V, typename T>
ROADMAP_DEVICE V load_as(Global<const T> p, int64_t i) {
  return *reinterpret_cast<const V*>(p + i);
}
template <typename V, typename T>
ROADMAP_DEVICE void store_as(Global<T> p, int64_t i, V x) {
  *reinterpret_cast<V*>(p + i) = x;
}
template <typename T>
ROADMAP_DEVICE uint64_t address(Global<T> p) {
  return reinterpret_cast<uint64_t>(p);
}

// 2^x, good to 2 ulp, and 1 / x, to 1: one instruction each.
ROADMAP_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
ROADMAP_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

ROADMAP_DEVICE float half_to_float(uint16_t x) { return __half2float(__ushort_as_half(x)); }
ROADMAP_DEVICE uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
ROADMAP_DEVICE float bfloat_to_float(uint16_t x) { return __uint_as_float(static_cast<uint32_t>(x) << 16); }
ROADMAP_DEVICE uint16_t float_to_bfloat(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

#endif  // __CUDACC__

}  // namespace roadmap::simt
#endif
