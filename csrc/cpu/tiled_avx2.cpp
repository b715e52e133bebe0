// The tiled kernels for avx2. Every header stands before the target region: code of theirs compiled inside it could be
// the copy that the linker keeps for everyone, and would stop on an older processor.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "half.h"
#include "kernels.h"

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
}  // namespace avx2
}  // namespace roadmap

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace roadmap {

const InstructionSet kAvx2 = {"avx2",
                              avx2::make_kernels<float>(),
                              avx2::make_kernels<double>(),
                              avx2::make_counting<float>(),
                              avx2::make_counting<double>(),
                              avx2::make_sorting<float>(),
                              avx2::make_sorting<double>(),
                              {avx2::mask_bits, avx2::widen_half, avx2::narrow_half}};

}  // namespace roadmap
#endif
