// csrc/cuda/simt.h for host code whose kernels run as PTX: plain pointers, of which the machine is told.
#pragma once

#include <type_traits>

#include "machine.h"

#define ROADMAP_DEVICE inline

namespace roadmap::simt {

template <typename T>
using Global = T*;
template <typename T>
using Shared = T*;

template <typename T>
Global<T> global(T* p, int64_t size) {
  ptx::allow(p, size * static_cast<int64_t>(sizeof(T)), !std::is_const_v<T>);
  return p;
}

}  // namespace roadmap::simt
