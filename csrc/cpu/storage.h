// Storage types and the type their arithmetic runs in. No torch, no vectors.
#pragma once

#include <cstdint>

namespace realuid_fast {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };
constexpr int DTYPES = 4;

}  // namespace realuid_fast
