// The row kernels of float64 scores.
#include "row_kernels.cuh"

namespace roadmap::cuda {

template int launch_rows<double>(const RowParams<double>&, void*);

}  // namespace roadmap::cuda
