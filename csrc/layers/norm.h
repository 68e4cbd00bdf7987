// Group normalisation and SiLU in one pass each way over channels_last images [batch, pixels, channels].
//
//   n = (x + shift - mean) rstd over a group of channels of one image,  z = weight n + bias,  y = z sigmoid(z)
//
// Nothing but the input and every group's mean and rstd is kept for the way back: n and z are computed again. Storage is
// float32, bfloat16, float16 or float64; parameters, statistics and arithmetic are float32, or float64 for float64.
#pragma once

#include <cstdint>

#include "../cpu/isa.h"
#include "../cpu/storage.h"

namespace realuid_fast {

struct NormArgs {
  int64_t batch, pixels, channels, groups;
  double eps;
  const void *x, *shift, *weight, *bias;  // shift [batch, channels], may be null
  void* statistics;                       // [batch, groups, 2]: mean, rstd
  void* y;
};

struct NormGradArgs {
  int64_t batch, pixels, channels, groups;
  const void *x, *shift, *weight, *bias, *statistics, *grad;
  void *g_x, *g_shift;   // g_shift may be null
  double* of_images;     // [batch, 2, channels]: every image's part of the gradients of weight and bias
};

struct NormKernels {
  // Images [begin, end). `scratch` has the size in bytes that scratch() returns.
  void (*forward)(const NormArgs&, int64_t begin, int64_t end, void* scratch);
  void (*backward)(const NormGradArgs&, int64_t begin, int64_t end, void* scratch);
};

// Six rows of channels in double, for the sums and the numbers computed from them.
constexpr int NORM_ROWS = 6;

REALUID_EACH_ISA(extern const NormKernels norm_table[DTYPES];)

inline const NormKernels& norm_kernels(Dtype dtype) { return REALUID_PICK(norm_table)[int(dtype)]; }

}  // namespace realuid_fast
