// What code compiled by nvcc asks of the CUDA runtime, so far as the launchers of this project do: kernels are found in
// the PTX that their object file holds, and run here. Everything is done when a call returns.
#include <cstring>
#include <string>
#include <utility>

#include "machine.h"

namespace {

struct Dim {
  unsigned x, y, z;
};
struct Kernel {
  ptx::Module* module;
  std::string name;
};
struct Configuration {
  Dim grid, block;
  size_t shared;
  void* stream;
} pushed;

std::map<const void*, Kernel>& kernels() {  // constructors of object files come first
  static std::map<const void*, Kernel> all;
  return all;
}
std::string failure;
constexpr int kError = 719;  // cudaErrorLaunchFailure
int last_error = 0;

int run(const Kernel& kernel, Dim grid, Dim block, void** arguments, size_t shared) {
  try {
    if (grid.y * grid.z * block.y * block.z != 1) ptx::fail("a launch of more than one dimension");
    ptx::launch(kernel.module->function(kernel.name), grid.x, static_cast<int>(block.x), static_cast<int>(shared),
                arguments);
    return 0;
  } catch (const std::exception& error) {
    failure = error.what();
    return last_error = kError;
  }
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper {
    int magic, version;
    const char* data;
  };
  struct Header {
    unsigned magic;
    unsigned short version, header_bytes;
    unsigned long long bytes;
  };
  const char* const data = static_cast<Wrapper*>(wrapper)->data;
  const auto* const header = reinterpret_cast<const Header*>(data);
  const std::string all(data, header->header_bytes + header->bytes);
  const size_t begin = all.find(".version");  // PTX as text: nvcc --no-compress
  const size_t end = all.find('\0', begin);
  auto* const module = new ptx::Module(begin == std::string::npos ? "" : all.substr(begin, end - begin));
  return reinterpret_cast<void**>(module);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void** module) { delete reinterpret_cast<ptx::Module*>(module); }
void __cudaRegisterFunction(void** module, const char* host, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
  kernels()[host] = {reinterpret_cast<ptx::Module*>(module), name};
}
unsigned __cudaPushCallConfiguration(Dim grid, Dim block, size_t shared, void* stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(Dim* grid, Dim* block, size_t* shared, void** stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *stream = pushed.stream;
  return 0;
}
int __cudaGetKernel(const Kernel** kernel, const void* host) {
  *kernel = &kernels().at(host);
  return 0;
}
int __cudaLaunchKernel(const Kernel* kernel, Dim grid, Dim block, void** arguments, size_t shared, void*) {
  return run(*kernel, grid, block, arguments, shared);
}
int cudaLaunchKernel(const void* host, Dim grid, Dim block, void** arguments, size_t shared, void*) {
  return run(kernels().at(host), grid, block, arguments, shared);
}
int cudaFuncSetAttribute(const void*, int, int) { return 0; }
int cudaGetDevice(int* device) { return *device = 0; }
int cudaDeviceGetAttribute(int* value, int, int) {
  *value = 2;
  return 0;
}
int cudaGetLastError() { return std::exchange(last_error, 0); }
const char* cudaGetErrorString(int) { return failure.c_str(); }
int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, void*) {
  std::memcpy(to, from, bytes);
  return 0;
}
int cudaStreamSynchronize(void*) { return 0; }

}  // extern "C"
