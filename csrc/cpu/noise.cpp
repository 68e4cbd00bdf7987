// Picks the vectorised generator; the double-precision one.
#include "noise.h"

#include <algorithm>
#include <cmath>

namespace realuid_fast {

void fill_normals(NoiseKey key, uint64_t first, int64_t groups, float* out) {
  static const auto fill = REALUID_PICK(fill);
  fill(key, first, groups, out);
}

void fill_normals(NoiseKey key, uint64_t first, int64_t groups, double* out) {
  const double two_pi = 6.283185307179586476925286766559;
  for (int64_t g = 0; g < groups; ++g) {
    uint32_t w[4];
    philox_words(key, first + uint64_t(g), w);
    for (int pair = 0; pair < 4; pair += 2) {
      const double u = (double(w[pair] >> 8) + 1) * 0x1p-24, theta = two_pi * double(w[pair + 1] >> 8) * 0x1p-24;
      const double r = std::sqrt(-2 * std::log(u));
      out[4 * g + pair] = r * std::cos(theta);
      out[4 * g + pair + 1] = r * std::sin(theta);
    }
  }
}

template <class C>
void fill_elements(NoiseKey key, uint64_t start, int64_t count, C* out) {
  C group[4];
  while (count > 0 && (start % 4 != 0 || count < 4)) {
    const int skip = int(start % 4);
    const int64_t take = std::min<int64_t>(count, 4 - skip);
    fill_normals(key, start / 4, 1, group);
    std::copy(group + skip, group + skip + take, out);
    start += uint64_t(take), out += take, count -= take;
  }
  if (count == 0) return;
  const int64_t whole = count / 4;
  fill_normals(key, start / 4, whole, out);
  if (count % 4) fill_elements(key, start + uint64_t(4 * whole), count % 4, out + 4 * whole);
}

template void fill_elements<float>(NoiseKey, uint64_t, int64_t, float*);
template void fill_elements<double>(NoiseKey, uint64_t, int64_t, double*);

}  // namespace realuid_fast
