// The row kernels and their launch, for rows_*.cu: one type of scores in each, so that they compile side by side.
#pragma once

#include "boxes.cuh"
#include "launch.h"

namespace roadmap::cuda {

namespace {

template <typename S>
__global__ void __launch_bounds__(kMostThreads, kBlocksPerMultiprocessor<Accumulation<S>>)
    row_kernel(const __grid_constant__ RowParams<S> p) {
  extern __shared__ __align__(16) char shared[];
  RowKernel<S, kPiece, true>(p, shared).run();
}

template <typename S>
__global__ void __launch_bounds__(kMostThreads, 1) long_row_kernel(const __grid_constant__ RowParams<S> p) {
  extern __shared__ __align__(16) char shared[];
  RowKernel<S, kPiece, false>(p, shared).run();
}

template <typename S>
__global__ void __launch_bounds__(kMostThreads, 2) box_kernel(const __grid_constant__ RowParams<S> p) {
  extern __shared__ __align__(16) char shared[];
  BoxKernel<S>(p, shared).run();
}

}  // namespace

template <typename S>
int launch_rows(const RowParams<S>& p, void* stream) {
  const Schedule& s = p.schedule;
  const int bytes = shared_bytes<Accumulation<S>>(s.by_boxes ? kBoxPiece : kPiece, s.threads, s.by_boxes);
  const auto blocks = static_cast<unsigned>(s.slots * s.blocks_per_row);
  const auto on = static_cast<cudaStream_t>(stream);
  if constexpr (!std::is_same_v<S, double>) {
    if (s.by_boxes) {
      // More than kernels have unless they ask.
      const cudaError_t error = cudaFuncSetAttribute(box_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      if (error != cudaSuccess) return error;
      box_kernel<S><<<blocks, s.threads, bytes, on>>>(p);
      return cudaGetLastError();
    }
  }
  if (s.in_shared) {
    row_kernel<S><<<blocks, s.threads, bytes, on>>>(p);
  } else {
    long_row_kernel<S><<<blocks, s.threads, bytes, on>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace roadmap::cuda
