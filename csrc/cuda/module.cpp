// The module _cuda: importing it registers the CUDA kernels of the ops that _C defines. It is apart from _C because it
// needs torch's CUDA libraries, which a CPU build of torch lacks.
#include <pybind11/pybind11.h>

#include "../errors.h"

PYBIND11_MODULE(_cuda, m) {
  roadmap::ops::allocate_aloud = &roadmap::ops::allocate_by_python;
  m.doc() = "CUDA kernels of roadmap_ext. Importing this module registers them with torch.ops.roadmap_ext.";
}
