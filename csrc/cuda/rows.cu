// The row kernel for each type of scores, and its launch.
#include "launch.h"
#include "scan.cuh"

namespace roadmap::cuda {

namespace {

template <typename S>
__global__ void __launch_bounds__(kMostThreads) row_kernel(const __grid_constant__ RowParams<S> p) {
  extern __shared__ __align__(16) char shared[];
  RowKernel<S, kPiece>(p, shared).run();
}

template <typename S>
__global__ void __launch_bounds__(kMostThreads, 1) scan_kernel(const __grid_constant__ RowParams<S> p) {
  extern __shared__ __align__(16) char shared[];
  ScanKernel<S, kPiece>(p, shared).run();
}

}  // namespace

template <typename S>
int launch_rows(const RowParams<S>& p, void* stream) {
  const Schedule& s = p.schedule;
  const int bytes = shared_bytes<Accumulation<S>>(kPiece, s.threads, s.scan);
  const auto blocks = static_cast<unsigned>(s.slots * s.blocks_per_row);
  const auto on = static_cast<cudaStream_t>(stream);
  if constexpr (!std::is_same_v<S, double>) {
    if (s.scan) {
      scan_kernel<S><<<blocks, s.threads, bytes, on>>>(p);
      return cudaGetLastError();
    }
  }
  row_kernel<S><<<blocks, s.threads, bytes, on>>>(p);
  return cudaGetLastError();
}

template int launch_rows<Half>(const RowParams<Half>&, void*);
template int launch_rows<BFloat>(const RowParams<BFloat>&, void*);
template int launch_rows<float>(const RowParams<float>&, void*);
template int launch_rows<double>(const RowParams<double>&, void*);

}  // namespace roadmap::cuda
