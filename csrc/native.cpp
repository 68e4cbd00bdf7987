// Functions of this library that Python calls beside the operators: the processor's report, the bandwidth probe, Philox and the
// noise stream for NumPy. Plain C functions for ctypes, so that the library is tied to no version of Python.
#include <cstdint>
#include <exception>
#include <string>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "cpu/bandwidth.h"
#include "cpu/isa.h"
#include "cpu/noise.h"

namespace rf = realuid_fast;

#define EXPORTED extern "C" __attribute__((visibility("default")))

// The instruction set in use, or null where REALUID_FAST_CPU_ISA cannot be followed; `error` then points at the reason.
EXPORTED const char* realuid_fast_isa(const char** error) {
  static thread_local std::string reason;
  try {
    return rf::isa_name(rf::active_isa());
  } catch (const std::exception& caught) {
    reason = caught.what();
    *error = reason.c_str();
    return nullptr;
  }
}

// Whether this processor runs baseline (0), avx2 (1) or avx512 (2).
EXPORTED bool realuid_fast_supports(int isa) { return rf::supports(static_cast<rf::Isa>(isa)); }

// GB/s of copying and of filling; false where there is no memory for the buffers.
EXPORTED bool realuid_fast_bandwidth(uint64_t bytes, int repeats, int threads, double* copy, double* fill) {
  try {
    const rf::Bandwidth measured = rf::measure_bandwidth(bytes, repeats, threads);
    *copy = measured.copy;
    *fill = measured.fill;
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

// By default glibc returns large buffers to the system when they are freed, and a training loop that allocates the same
// tensors every step has all their pages zeroed and mapped again every step.
EXPORTED bool realuid_fast_keep_freed_memory() {
#if defined(__GLIBC__)
  return mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, -1) == 1;
#else
  return false;
#endif
}

// Replaces the four counter words by the four words that Philox4x32-10 makes of them.
EXPORTED void realuid_fast_philox(const uint32_t* key, uint32_t* counter) { rf::philox(key[0], key[1], counter); }

// The normals of the elements [start, start + count) of the stream (seed, offset). They throw where
// REALUID_FAST_CPU_ISA cannot be followed, which loading the library has asked before.
EXPORTED void realuid_fast_normals_f32(uint64_t seed, uint64_t offset, uint64_t start, int64_t count, float* out) {
  rf::fill_elements({seed, offset}, start, count, out);
}
EXPORTED void realuid_fast_normals_f64(uint64_t seed, uint64_t offset, uint64_t start, int64_t count, double* out) {
  rf::fill_elements({seed, offset}, start, count, out);
}
