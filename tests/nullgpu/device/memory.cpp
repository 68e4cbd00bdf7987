// Memory of the device, which is the host's, and of the host; copies and memsets, which take place.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "h200.h"
#include "state.h"

using namespace nullgpu;

namespace {

constexpr size_t PAGE = 4096;
constexpr size_t ALIGNMENT = size_t(2) << 20;
// Larger memsets are left out: they would turn addresses into memory.
constexpr size_t LARGEST_MEMSET = size_t(64) << 20;

using Ranges = std::map<const char*, size_t>;  // bytes by first address

Ranges& device() {
  static auto& made = *new Ranges;
  return made;
}

Ranges& pinned() {
  static auto& made = *new Ranges;
  return made;
}

size_t used = 0;  // bytes of device memory

size_t pages(size_t bytes) { return (bytes + PAGE - 1) & ~(PAGE - 1); }

bool within(const Ranges& ranges, const void* pointer) {
  auto found = ranges.upper_bound(static_cast<const char*>(pointer));
  if (found == ranges.begin()) return false;
  --found;
  return static_cast<const char*>(pointer) < found->first + found->second;
}

cudaError_t copy(void* to, const void* from, size_t bytes, const char* name, cudaStream_t stream) {
  Guard guard(lock);
  work(stream, name);
  if (!of(stream)->capture) return std::memcpy(to, from, bytes), cudaSuccess;
  for (const void* end : {static_cast<const void*>(to), from})
    if (!within(device(), end) && !within(pinned(), end))
      violate(std::string(name) + " of pageable host memory during capture: every replay goes to this address");
  return cudaSuccess;
}

}  // namespace

extern "C" {

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  Guard guard(lock);
  *total = h200::BYTES;
  *free = h200::BYTES - used;
  return cudaSuccess;
}

// Takes addresses only: a page becomes memory when something writes to it.
cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  Guard guard(lock);
  unsafe("cudaMalloc");
  called(captures().empty() ? "cudaMalloc" : "cudaMalloc during capture");
  bytes = pages(bytes);
  if (used + bytes > h200::BYTES) return cudaErrorMemoryAllocation;
  void* mapped = mmap(nullptr, bytes + ALIGNMENT, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                      -1, 0);
  if (mapped == MAP_FAILED) return cudaErrorMemoryAllocation;
  *pointer = reinterpret_cast<void*>((size_t(mapped) + ALIGNMENT - 1) & ~(ALIGNMENT - 1));
  device()[static_cast<char*>(*pointer)] = bytes;
  used += bytes;
  return cudaSuccess;
}

// The few addresses that aligned the block stay mapped; nothing has written to them.
cudaError_t cudaFree(void* pointer) {
  Guard guard(lock);
  const auto found = device().find(static_cast<char*>(pointer));
  if (found == device().end()) return cudaSuccess;
  unsafe("cudaFree");
  called("cudaFree");
  munmap(pointer, found->second);
  used -= found->second;
  device().erase(found);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  Guard guard(lock);
  unsafe("cudaHostAlloc");
  called("cudaHostAlloc");
  *pointer = std::aligned_alloc(PAGE, pages(bytes));
  pinned()[static_cast<char*>(*pointer)] = pages(bytes);
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* pointer) {
  Guard guard(lock);
  unsafe("cudaFreeHost");
  pinned().erase(static_cast<char*>(pointer));
  return std::free(pointer), cudaSuccess;
}

cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned) {
  Guard guard(lock);
  pinned()[static_cast<char*>(pointer)] = bytes;
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* pointer) {
  Guard guard(lock);
  pinned().erase(static_cast<char*>(pointer));
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* pointer) {
  Guard guard(lock);
  std::memset(a, 0, sizeof *a);
  const bool on_device = within(device(), pointer);
  a->type = on_device                  ? cudaMemoryTypeDevice
            : within(pinned(), pointer) ? cudaMemoryTypeHost
                                        : cudaMemoryTypeUnregistered;
  if (on_device) a->devicePointer = const_cast<void*>(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  static const char* const names[] = {"copy H2H", "copy H2D", "copy D2H", "copy D2D", "copy"};
  return copy(to, from, bytes, names[kind], stream);
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  Guard guard(lock);
  unsafe("cudaMemcpy");
  called("cudaMemcpy");
  return copy(to, from, bytes, "copy", nullptr);
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  Guard guard(lock);
  work(stream, "memset");
  if (!of(stream)->capture && bytes < LARGEST_MEMSET) std::memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  unsafe("cudaMemset");
  return cudaMemsetAsync(to, value, bytes, nullptr);
}

cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }

cudaError_t cudaGetSymbolAddress(void** pointer, const void*) {
  static char symbol[1 << 16];
  *pointer = symbol;
  return cudaSuccess;
}

}  // extern "C"
