// libcuda.so.1: the functions of the driver by which Triton and inductor load and launch their kernels. build.py adds those that
// torch's libraries are linked to, which succeed and do nothing.
//
// A function's handle is its name. Triton's own launcher calls this library, so its share of a launch is a real one.
#include <cuda.h>

#include <cstring>
#include <map>
#include <string>

#include "h200.h"

using namespace nullgpu;

extern "C" {

// These functions are in libnullgpu.so, which is preloaded.
void nullgpu_launch(void* stream, const char* name);
void nullgpu_violation(const char* what);
const char* nullgpu_interned(const char* text);
int nullgpu_capturing();
int cudaDeviceGetAttribute(int* value, int attribute, int device);

static void refuse(const std::string& what) { nullgpu_violation(what.c_str()); }

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = h200::CUDA_VERSION_, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int) { return *device = 0, CUDA_SUCCESS; }

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  return cudaDeviceGetAttribute(value, attribute, device), CUDA_SUCCESS;
}

static CUcontext context() {
  static int any;
  return reinterpret_cast<CUcontext>(&any);
}

CUresult cuCtxGetCurrent(CUcontext* current) { return *current = context(), CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* current, CUdevice) { return *current = context(), CUDA_SUCCESS; }

CUresult cuGetErrorString(CUresult, const char** text) { return *text = "error of the null GPU", CUDA_SUCCESS; }

CUresult cuModuleLoadData(CUmodule* module, const void*) {
  *module = reinterpret_cast<CUmodule>(context());
  return CUDA_SUCCESS;
}

CUresult cuModuleLoad(CUmodule* module, const char*) { return cuModuleLoadData(module, nullptr); }
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }

// A kernel that is loaded inside a capture was not called in the warm-up: it may have been compiled there too.
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  if (nullgpu_capturing()) refuse(std::string("kernel ") + name + " is loaded during capture");
  *function = reinterpret_cast<CUfunction>(const_cast<char*>(nullgpu_interned((std::string("triton ") + name).c_str())));
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? h200::BLOCK_THREADS
           : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 32
                                                                : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute, CUdeviceptr pointer) {
  std::memcpy(value, &pointer, sizeof pointer);
  return CUDA_SUCCESS;
}

// Kernels whose launches are written down, with the bytes of each of their arguments; and what was written down.
static std::map<std::string, std::string> watched;
static std::string written;

void nullgpu_watch(const char* kernel, const char* sizes) { watched[std::string("triton ") + kernel] = sizes; }

// One line a launch: name, grid, threads, shared memory, stream, and the arguments' bytes in hexadecimal.
const char* nullgpu_written() {
  static std::string last;
  last.swap(written);
  written.clear();
  return last.c_str();
}

static void write_down(const std::string& name, std::initializer_list<size_t> words, void** arguments) {
  written += name;
  for (const size_t word : words) written += " " + std::to_string(word);
  const std::string& sizes = watched[name];
  for (size_t i = 0; i < sizes.size(); ++i) {
    written += " ";
    for (int byte = sizes[i] - '0' - 1; byte >= 0; --byte) {
      const unsigned value = static_cast<unsigned char*>(arguments[i])[byte];
      written += {"0123456789abcdef"[value / 16], "0123456789abcdef"[value % 16]};
    }
  }
  written += "\n";
}

static CUresult launch(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared,
                       CUstream stream, void** arguments) {
  const char* name = reinterpret_cast<const char*>(function);
  if (!x || !y || !z || x > h200::GRID_X || y > h200::GRID_YZ || z > h200::GRID_YZ)
    refuse(std::string("a launch with a grid that no device has: ") + name);
  if (!threads || threads > h200::BLOCK_THREADS || shared > h200::BLOCK_SHARED_OPTIN)
    refuse(std::string("a launch with a block that no device has: ") + name);
  if (watched.count(name)) write_down(name, {x, y, z, threads, shared, reinterpret_cast<size_t>(stream)}, arguments);
  return nullgpu_launch(stream, name), CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void** arguments, void**) {
  const unsigned threads = c->blockDimX * c->blockDimY * c->blockDimZ;
  return launch(function, c->gridDimX, c->gridDimY, c->gridDimZ, threads, c->sharedMemBytes, c->hStream,
                arguments);
}

CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y,
                        unsigned block_z, unsigned shared, CUstream stream, void** arguments, void**) {
  return launch(function, x, y, z, block_x * block_y * block_z, shared, stream, arguments);
}

CUresult cuGetProcAddress_v2(const char*, void** function, int, cuuint64_t, CUdriverProcAddressQueryResult* status) {
  *function = reinterpret_cast<void*>(cuInit);
  if (status) *status = CU_GET_PROC_ADDRESS_SUCCESS;
  return CUDA_SUCCESS;
}

}  // extern "C"
