// The Python module around the ops: importing it registers them; build_info() says what was built and what runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "tensors.h"

#ifndef ROADMAP_CUDA_REASON
#define ROADMAP_CUDA_REASON "not decided by setup.py"
#endif

namespace py = pybind11;

static py::dict build_info() {
  std::vector<std::string> available;
  for (const roadmap::InstructionSet* set : roadmap::available_instruction_sets()) available.push_back(set->name);
  py::dict info;
  info["torch"] = ROADMAP_TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["cuda"] = static_cast<bool>(ROADMAP_WITH_CUDA);
  info["cuda_reason"] = ROADMAP_CUDA_REASON;
  info["cuda_archs"] = ROADMAP_CUDA_ARCHS;
  info["cpu"] = roadmap::instruction_set().name;
  info["cpu_available"] = available;
  return info;
}

// Of a function that Python calls, pybind11 lets a Python error through as it is.
static void allocate_aloud(const roadmap::ops::Tensor& like, int64_t bytes) {
  const py::gil_scoped_acquire locked;
  const py::module_ torch = py::module_::import("torch");
  const std::string device = like.is_cuda() ? "cuda:" + std::to_string(like.get_device_index()) : "cpu";
  torch.attr("empty")(bytes, py::arg("dtype") = torch.attr("uint8"), py::arg("device") = device);
}

PYBIND11_MODULE(_C, m) {
  roadmap::ops::allocate_aloud = &allocate_aloud;
  m.doc() = "Kernels of roadmap_ext. Importing this module registers torch.ops.roadmap_ext.";
  m.attr("with_cuda") = static_cast<bool>(ROADMAP_WITH_CUDA);
  m.attr("cuda_reason") = ROADMAP_CUDA_REASON;
  m.def("build_info", &build_info, "What was built and which instruction set the CPU kernels use.");
}
