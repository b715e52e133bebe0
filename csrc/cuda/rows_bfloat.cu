// The row kernels of bfloat16 scores.
#include "row_kernels.cuh"

namespace roadmap::cuda {

template int launch_rows<BFloat>(const RowParams<BFloat>&, void*);

}  // namespace roadmap::cuda
