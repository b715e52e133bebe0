// All kernels for AVX-512. Every header stands before the target region: see avx2.cpp.
#if defined(__x86_64__)
#include <immintrin.h>

#include "../half.h"
#include "../kernels.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 to 14 warn of their own _mm512_undefined_*() (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace roadmap {
namespace avx512 {
#include "vector_avx512.h"
//
#include "all_kernels.h"
}  // namespace avx512
}  // namespace roadmap

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace roadmap {

const InstructionSet kAvx512 = avx512::make_instruction_set("avx512");

}  // namespace roadmap
#endif
