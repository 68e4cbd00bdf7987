// The optimiser step on raw pointers: a sum of squares for the global norm, and Adam with its moving averages in one pass.
//
// A tensor is cut into pieces of PIECE elements, which any thread can take. A piece's sum of squares is added in double to
// the others' in their order, so the norm has the same bits for every number of threads.
#pragma once

#include <cstdint>

#include "isa.h"
#include "storage.h"

namespace realuid_fast {

constexpr int64_t PIECE = 4096;  // elements summed in single precision at most

// The addresses of a parameter and of the tensors that belong to it, all in one memory order.
struct AdamTensor {
  void* param;
  const void* grad;
  void *exp_avg, *exp_avg_sq;  // exp_avg may be null: beta1 = 0 needs no first moment
  void* ema;                   // the averages' rows, `ema_stride` elements apart
  int64_t ema_stride;
};

// The numbers of one step, the same for all its tensors.
struct AdamStep {
  double factor;        // of the gradient: the clip, negative to maximise
  double weight_decay;  // L2: added to the gradient, times the parameter
  double beta1, beta2, eps;
  double size;               // learning rate / (1 - beta1^step)
  double root_correction2;   // 1 / sqrt(1 - beta2^step)
  const double* ema_weight;  // one minus the decay, for each average
  int64_t emas;
};

struct OptimiserKernels {
  double (*sum_squares)(const void* grad, int64_t begin, int64_t end);
  void (*adam)(const AdamStep&, const AdamTensor&, int64_t begin, int64_t end);
};

REALUID_EACH_ISA(extern const OptimiserKernels optimiser_table[2];)

// The kernels for float32, or for float64 where `wide`, on the instruction set in use.
inline const OptimiserKernels& optimiser_kernels(bool wide) { return REALUID_PICK(optimiser_table)[wide]; }

}  // namespace realuid_fast
