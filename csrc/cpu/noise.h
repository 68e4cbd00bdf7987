// Standard normals of the counter-based stream, on raw pointers: element i is normal i % 4 of group i / 4.
#pragma once

#include <cstdint>

#include "isa.h"
#include "philox.h"

namespace realuid_fast {

// Writes the 4 * groups normals of the groups [first, first + groups). Single precision is vectorised and within 1e-6 of
// the exact value; double precision is evaluated with the C library, for tests and float64 storage.
void fill_normals(NoiseKey key, uint64_t first, int64_t groups, float* out);
void fill_normals(NoiseKey key, uint64_t first, int64_t groups, double* out);

// The normals of the elements [start, start + count), whatever start is a multiple of.
template <class C>
void fill_elements(NoiseKey key, uint64_t start, int64_t count, C* out);

REALUID_EACH_ISA(void fill(NoiseKey key, uint64_t first, int64_t groups, float* out);)

}  // namespace realuid_fast
