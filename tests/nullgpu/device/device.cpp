// The runtime's functions about the device: its properties, and errors, of which there are none.
#include <cstring>

#include "h200.h"
#include "state.h"

using namespace nullgpu::h200;

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDA_VERSION_, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDA_VERSION_, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }

cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "error of the null GPU"; }
const char* cudaGetErrorName(cudaError_t) { return "null GPU"; }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  std::memset(p, 0, sizeof *p);
  std::strcpy(p->name, NAME);
  p->major = CAPABILITY_MAJOR;
  p->minor = CAPABILITY_MINOR;
  p->multiProcessorCount = MULTIPROCESSORS;
  p->totalGlobalMem = BYTES;
  p->sharedMemPerBlock = BLOCK_SHARED;
  p->sharedMemPerBlockOptin = BLOCK_SHARED_OPTIN;
  p->sharedMemPerMultiprocessor = MULTIPROCESSOR_SHARED;
  p->regsPerBlock = p->regsPerMultiprocessor = REGISTERS;
  p->warpSize = WARP;
  p->maxThreadsPerBlock = BLOCK_THREADS;
  p->maxThreadsPerMultiProcessor = MULTIPROCESSOR_THREADS;
  p->maxBlocksPerMultiProcessor = MULTIPROCESSOR_BLOCKS;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = BLOCK_THREADS;
  p->maxThreadsDim[2] = BLOCK_Z;
  p->maxGridSize[0] = GRID_X;
  p->maxGridSize[1] = p->maxGridSize[2] = GRID_YZ;
  p->l2CacheSize = L2_BYTES;
  p->memoryBusWidth = BUS_BITS;
  p->textureAlignment = 512;
  return cudaSuccess;
}

// The driver's numbers of the attributes are the same (driver.cpp).
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = CAPABILITY_MAJOR; break;
    case cudaDevAttrComputeCapabilityMinor: *value = CAPABILITY_MINOR; break;
    case cudaDevAttrMultiProcessorCount: *value = MULTIPROCESSORS; break;
    case cudaDevAttrWarpSize: *value = WARP; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = BLOCK_THREADS; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = MULTIPROCESSOR_THREADS; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = BLOCK_SHARED; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = BLOCK_SHARED_OPTIN; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = MULTIPROCESSOR_SHARED; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = REGISTERS; break;
    case cudaDevAttrMaxGridDimX: *value = GRID_X; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = GRID_YZ; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = BUS_BITS; break;
    case cudaDevAttrClockRate: *value = CLOCK_KHZ; break;
    case cudaDevAttrMemoryClockRate: *value = MEMORY_CLOCK_KHZ; break;
    default: *value = 1;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* id, int bytes, int) {
  std::strncpy(id, "0000:00:00.0", bytes);
  return cudaSuccess;
}

}  // extern "C"
