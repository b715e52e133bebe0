// The module _C: importing it registers the ops and their CPU kernels; build_info() says what was built and what runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "errors.h"

namespace py = pybind11;

static py::dict build_info() {
  std::vector<std::string> available;
  for (const roadmap::InstructionSet* set : roadmap::available_instruction_sets()) available.push_back(set->name);
  py::dict info;
  info["torch"] = ROADMAP_TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["cuda_archs"] = ROADMAP_CUDA_ARCHS;
  info["cpu"] = roadmap::instruction_set().name;
  info["cpu_available"] = available;
  return info;
}

PYBIND11_MODULE(_C, m) {
  roadmap::ops::allocate_aloud = &roadmap::ops::allocate_by_python;
  m.doc() = "CPU kernels of roadmap_ext. Importing this module registers torch.ops.roadmap_ext.";
  // Of the module _cuda beside this one: the CUDA that it was built with, empty where it was not, and why.
  m.attr("cuda_version") = ROADMAP_CUDA_VERSION;
  m.attr("cuda_reason") = ROADMAP_CUDA_REASON;
  m.def("build_info", &build_info, "What was built and which instruction set the CPU kernels use.");
}
