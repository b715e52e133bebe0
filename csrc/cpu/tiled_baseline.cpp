// The tiled kernels for every processor: 16-byte vectors, no instruction named.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "half.h"
#include "kernels.h"

namespace roadmap {
namespace baseline {
#include "vector_baseline.h"
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
}  // namespace baseline

const InstructionSet kBaseline = {"baseline",
                                  baseline::make_kernels<float>(),
                                  baseline::make_kernels<double>(),
                                  baseline::make_counting<float>(),
                                  baseline::make_counting<double>(),
                                  baseline::make_sorting<float>(),
                                  baseline::make_sorting<double>(),
                                  {baseline::mask_bits, baseline::widen_half, baseline::narrow_half}};

}  // namespace roadmap
