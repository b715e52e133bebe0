// Lets torch's own error of memory that runs out through to Python: what each module of ops sets when it is imported.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "tensors.h"

namespace roadmap::ops {

// Of a function that Python calls, pybind11 lets a Python error through as it is.
inline void allocate_by_python(const Tensor& like, int64_t bytes) {
  namespace py = pybind11;
  const py::gil_scoped_acquire locked;
  const py::module_ torch = py::module_::import("torch");
  const std::string device = like.is_cuda() ? "cuda:" + std::to_string(like.get_device_index()) : "cpu";
  torch.attr("empty")(bytes, py::arg("dtype") = torch.attr("uint8"), py::arg("device") = device);
}

}  // namespace roadmap::ops
