// The kernels around the row kernel, their launches, and what the host asks of the CUDA runtime.
#include <algorithm>

#include "elements.cuh"
#include "launch.h"

namespace roadmap::cuda {

namespace {

template <typename T>
__global__ void __launch_bounds__(kOneBlock) reduce_kernel(const __grid_constant__ ReduceParams<T> p) {
  extern __shared__ __align__(16) char shared[];
  reduce_losses(p, shared);
}

__global__ void __launch_bounds__(kOneBlock) start_kernel(const __grid_constant__ StartParams p) {
  extern __shared__ __align__(16) char shared[];
  find_starts(p, shared);
}

template <typename S>
__global__ void __launch_bounds__(kElementThreads) scale_kernel(const __grid_constant__ ScaleParams<S> p) {
  scale_rows(p);
}

template <typename S>
__global__ void __launch_bounds__(kElementThreads) radial_kernel(const __grid_constant__ RadialParams<S> p) {
  remove_radial(p);
}

template <typename T>
__global__ void __launch_bounds__(kElementThreads) symmetrise_kernel(const __grid_constant__ SymmetriseParams<T> p) {
  extern __shared__ __align__(16) char shared[];
  symmetrise(p, shared);
}

cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

template <typename T>
int launch_reduce(const ReduceParams<T>& p, void* stream) {
  reduce_kernel<T><<<1, kOneBlock, kOneBlock / 32 * sizeof(double), as_stream(stream)>>>(p);
  return cudaGetLastError();
}

int launch_starts(const StartParams& p, void* stream) {
  start_kernel<<<1, kOneBlock, kOneBlock * sizeof(int64_t), as_stream(stream)>>>(p);
  return cudaGetLastError();
}

template <typename S>
int launch_scale(const ScaleParams<S>& p, void* stream) {
  // As many as run at a time: most calls find that nothing is to be done.
  const int64_t resident = int64_t(device_resources().multiprocessors) * (2048 / kElementThreads);
  const auto blocks = static_cast<unsigned>(std::min(resident, p.rows * p.segments));
  scale_kernel<S><<<blocks, p.threads, 0, as_stream(stream)>>>(p);
  return cudaGetLastError();
}

template <typename S>
int launch_radial(const RadialParams<S>& p, void* stream) {
  constexpr int kWarps = kElementThreads / 32;
  radial_kernel<S><<<static_cast<unsigned>((p.rows + kWarps - 1) / kWarps), kElementThreads, 0, as_stream(stream)>>>(p);
  return cudaGetLastError();
}

template <typename T>
int launch_symmetrise(const SymmetriseParams<T>& p, void* stream) {
  const int64_t tiles = (p.n + kTile - 1) / kTile;
  const int bytes = 2 * kTile * (kTile + 1) * static_cast<int>(sizeof(T));
  symmetrise_kernel<T><<<static_cast<unsigned>(tiles * tiles), kElementThreads, bytes, as_stream(stream)>>>(p);
  return cudaGetLastError();
}

int read_back(Global<const int64_t> from, int64_t& to, void* stream) {
  const cudaError_t error = cudaMemcpyAsync(&to, from, sizeof(to), cudaMemcpyDeviceToHost, as_stream(stream));
  return error ? error : cudaStreamSynchronize(as_stream(stream));
}

Resources device_resources() {
  int device = 0, count = 0;
  // A failure leaves 0 and shows at the launch.
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  int shared = 0;
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  Resources resources = {count > 0 ? count : 1};
  resources.boxes = shared >= shared_bytes<float>(kBoxPiece, kMostThreads, true);
  return resources;
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

template int launch_reduce<float>(const ReduceParams<float>&, void*);
template int launch_reduce<double>(const ReduceParams<double>&, void*);
template int launch_scale<Half>(const ScaleParams<Half>&, void*);
template int launch_scale<BFloat>(const ScaleParams<BFloat>&, void*);
template int launch_scale<float>(const ScaleParams<float>&, void*);
template int launch_scale<double>(const ScaleParams<double>&, void*);
template int launch_radial<Half>(const RadialParams<Half>&, void*);
template int launch_radial<BFloat>(const RadialParams<BFloat>&, void*);
template int launch_radial<float>(const RadialParams<float>&, void*);
template int launch_radial<double>(const RadialParams<double>&, void*);
template int launch_symmetrise<float>(const SymmetriseParams<float>&, void*);
template int launch_symmetrise<double>(const SymmetriseParams<double>&, void*);

}  // namespace roadmap::cuda
