// Kernels that nvcc compiled: their names, as their libraries register them, and their launches.
#include <cstring>
#include <unordered_map>

#include "h200.h"
#include "state.h"

using namespace nullgpu;

namespace {

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

thread_local std::vector<Configuration> configurations;

// Mangled names by what kernels are launched by; made on first use, before this library's constructors.
auto& names() {
  static auto& made = *new std::unordered_map<const void*, const char*>;
  return made;
}

// The one kernel that is run: small contiguous fills, so that counts and flags begin as torch.zeros says.
void fill(const char* name, void** arguments) {
  static const std::string before = "vectorized_elementwise_kernel", functor = "11FillFunctorI";
  constexpr int LARGEST = 1 << 16;
  static const std::map<char, size_t> sizes{{'b', 1}, {'a', 1}, {'h', 1}, {'s', 2}, {'i', 4}, {'f', 4}, {'l', 8}, {'d', 8}};
  const char* found = std::strstr(name, functor.c_str());
  if (!found || !std::strstr(name, before.c_str())) return;
  const auto size = sizes.find(found[functor.size()]);
  // The functor of these types holds the value alone; a class begins with N or S.
  if (size == sizes.end() || found[functor.size() + 1] != 'E') return;
  const int count = *static_cast<int*>(arguments[0]);
  char* to = *static_cast<char**>(arguments[2]);
  for (int i = 0; count * size->second <= LARGEST && i < count; i++)
    std::memcpy(to + i * size->second, arguments[1], size->second);
}

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, void** arguments, cudaStream_t stream) {
  const auto found = names().find(kernel);
  const char* name = found == names().end() ? "unknown kernel" : found->second;
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || grid.x > h200::GRID_X || grid.y > h200::GRID_YZ || grid.z > h200::GRID_YZ)
    violate(std::string("a launch with a grid that no device has: ") + name);
  if (!threads || threads > h200::BLOCK_THREADS || block.z > h200::BLOCK_Z)
    violate(std::string("a launch with a block that no device has: ") + name);
  work(stream, name);
  if (!of(stream)->capture) fill(name, arguments);
  return cudaSuccess;
}

long nothing() { return 0; }

}  // namespace

extern "C" {

void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  names()[kernel] = name;
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}

void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

// The functions that kernel<<<grid, block, shared, stream>>> calls.
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* handle, const void* kernel) {
  *handle = reinterpret_cast<cudaKernel_t>(const_cast<void*>(kernel));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t,
                             cudaStream_t stream) {
  return launch(kernel, grid, block, arguments, stream);
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t,
                             cudaStream_t stream) {
  return launch(kernel, grid, block, arguments, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  return launch(kernel, config->gridDim, config->blockDim, arguments, config->stream);
}

// Registers and occupancy are made up.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  std::memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = h200::BLOCK_THREADS;
  a->numRegs = 64;
  a->binaryVersion = a->ptxVersion = 10 * h200::CAPABILITY_MAJOR + h200::CAPABILITY_MINOR;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute, int, int) { return cudaSuccess; }

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  return *blocks = 2, cudaSuccess;
}

// Whatever function of the driver is asked for by name succeeds and does nothing.
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(nothing);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

}  // extern "C"
