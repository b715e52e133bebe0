// Launchers of the CUDA kernels: what csrc/cuda/ops.cpp calls. Each returns a cudaError_t as int, 0 for success; the
// stream is a cudaStream_t. No host code waits, but for read_back.
#pragma once

#include <cstdint>

#include "elements.h"
#include "plan.h"
#include "rows.h"

namespace roadmap::cuda {

template <typename S>
int launch_rows(const RowParams<S>&, void* stream);
template <typename T>
int launch_reduce(const ReduceParams<T>&, void* stream);
template <typename S>
int launch_scale(const ScaleParams<S>&, void* stream);
int launch_starts(const StartParams&, void* stream);
template <typename S>
int launch_radial(const RadialParams<S>&, void* stream);
template <typename T>
int launch_symmetrise(const SymmetriseParams<T>&, void* stream);

// One number from the device, once all before it in the stream is done.
int read_back(Global<const int64_t> from, int64_t& to, void* stream);
Resources device_resources();  // of the current device
const char* error_text(int error);
#if defined(ROADMAP_EMULATED)
void poison(void* begin, int64_t bytes);  // new memory
void end_op();                            // all memory is the caller's again
#endif

}  // namespace roadmap::cuda
