// The tiled kernels for avx512. Every header stands before the target region: code of theirs compiled inside it could
// be the copy that the linker keeps for everyone, and would stop on an older processor.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "half.h"
#include "kernels.h"

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
#include "tiled_body.h"
//
#include "counting_body.h"
//
#include "sorting_body.h"
//
#include "sums_body.h"
//
#include "dense_body.h"
//
#include "sorted_body.h"
//
#include "cells_body.h"
}  // namespace avx512
}  // namespace roadmap

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace roadmap {

const InstructionSet kAvx512 = {"avx512",
                                avx512::make_kernels<float>(),
                                avx512::make_kernels<double>(),
                                avx512::make_counting<float>(),
                                avx512::make_counting<double>(),
                                avx512::make_sorting<float>(),
                                avx512::make_sorting<double>(),
                                {avx512::mask_bits, avx512::widen_half, avx512::narrow_half}};

}  // namespace roadmap
#endif
