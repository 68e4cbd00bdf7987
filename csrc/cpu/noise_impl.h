// The vectorised generator as one function: normals of whole groups into memory.
#include "noise_vector.h"

namespace realuid_fast {
namespace REALUID_TABLE {

void fill(NoiseKey key, uint64_t first, int64_t groups, float* out) {
  using namespace REALUID_ISA;
  const int64_t steps = groups / WIDTH, left = groups % WIDTH;
  for_normals(key, first, steps, [&](int64_t i, const Normals& normals) {
    for (int j = 0; j < 4; ++j) store(out + i + j * WIDTH, normals.v[j]);
  });
  if (left == 0) return;
  float last[4 * WIDTH];
  for_normals(key, first + uint64_t(steps * WIDTH), 1, [&](int64_t, const Normals& normals) {
    for (int j = 0; j < 4; ++j) store(last + j * WIDTH, normals.v[j]);
  });
  std::memcpy(out + 4 * steps * WIDTH, last, size_t(left) * 4 * sizeof(float));
}

}  // namespace REALUID_TABLE
}  // namespace realuid_fast
