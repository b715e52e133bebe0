// Every kernel, in the vectors of the file that includes this one, within its namespace and target region. For that
// reason no body includes a header: kernels.h has all that they need.

// clang-format off: each stands on those before it
#include "../block_kernels.h"
#include "../pairwise_rank_kernels.h"
#include "../pairwise_gradient_kernels.h"
#include "../count_kernels.h"
#include "../sort_kernels.h"
#include "../scan_sums_kernels.h"
#include "../scan_fields_kernels.h"
#include "../scan_kernels.h"
// clang-format on

namespace {

constexpr InstructionSet make_instruction_set(const char* name) {
  return {name,
          make_kernels<float>(),
          make_kernels<double>(),
          make_counting<float>(),
          make_counting<double>(),
          make_sorting<float>(),
          make_sorting<double>(),
          make_scan(),
          {mask_bits, widen_half, narrow_half}};
}

}  // namespace
