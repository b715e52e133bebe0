// The row kernels of float32 scores.
#include "row_kernels.cuh"

namespace roadmap::cuda {

template int launch_rows<float>(const RowParams<float>&, void*);

}  // namespace roadmap::cuda
