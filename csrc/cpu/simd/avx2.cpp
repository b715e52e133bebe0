// All kernels for AVX2. Every header stands before the target region: code of theirs compiled inside it could be the
// copy that the linker keeps for everyone, and would stop on an older processor.
#if defined(__x86_64__)
#include <immintrin.h>

#include "../half.h"
#include "../kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace roadmap {
namespace avx2 {
#include "vector_avx2.h"
//
#include "all_kernels.h"
}  // namespace avx2
}  // namespace roadmap

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace roadmap {

const InstructionSet kAvx2 = avx2::make_instruction_set("avx2");

}  // namespace roadmap
#endif
