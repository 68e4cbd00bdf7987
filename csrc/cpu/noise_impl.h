// The vectorised generator as one function: normals of whole groups into memory.
#include "noise_vector.h"

namespace realuid_fast {
namespace REALUID_TABLE {

void fill(NoiseKey key, uint64_t first, int64_t groups, float* out) {
  using namespace REALUID_ISA;
  const int64_t steps = groups / WIDTH, left = groups % WIDTH;
  for_normals<false>(key, first, steps, [&](int64_t i, vf n) { store(out + i, n); });
  if (left == 0) return;
  float last[4 * WIDTH];
  for_normals<true>(key, first + uint64_t(steps * WIDTH), 1, [&](int64_t i, vf n) { store(last + i, n); });
  std::memcpy(out + 4 * steps * WIDTH, last, size_t(left) * 4 * sizeof(float));
}

}  // namespace REALUID_TABLE
}  // namespace realuid_fast
