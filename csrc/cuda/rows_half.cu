// The row kernels of float16 scores.
#include "row_kernels.cuh"

namespace roadmap::cuda {

template int launch_rows<Half>(const RowParams<Half>&, void*);

}  // namespace roadmap::cuda
