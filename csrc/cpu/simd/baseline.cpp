// All kernels for every processor: 16-byte vectors, no instruction named.
#include "../half.h"
#include "../kernels.h"

namespace roadmap {
namespace baseline {
#include "vector_baseline.h"
//
#include "all_kernels.h"
}  // namespace baseline

const InstructionSet kBaseline = baseline::make_instruction_set("baseline");

}  // namespace roadmap
