// The optimiser step on vectors: every element is read once, and written once where it changes.
//
// Stores go through the caches: what is written was read just before, so its line is there and nothing is fetched for it.
// Streaming the same lines would first throw them out again. What helps instead is that reads ask for their stream's next page
// (AHEAD) before the processor's own prefetching, which stops at page ends.
#pragma once

#include "access.h"
#include "optimiser.h"

namespace realuid_fast {
namespace {
namespace REALUID_ISA {

template <class T>
double sum_squares(const void* grad, int64_t begin, int64_t end) {
  const T* g = static_cast<const T*>(grad) + begin;
  // Independent sums: one alone would wait for its own addition.
  VectorFor<T> sum[4] = {};
  constexpr int WIDE = VectorOf<T>::width;
  const int64_t count = end - begin;
  int64_t i = 0;
  for (; i + 4 * WIDE <= count; i += 4 * WIDE)
    for (int j = 0; j < 4; ++j) {
      prefetch(g + i + j * WIDE + AHEAD);
      const auto v = load(g + i + j * WIDE);
      sum[j] += v * v;
    }
  for_vectors<T>(false, count - i, [&](auto access, int64_t k) {
    const auto v = access.in(g, i + k);
    sum[0] += v * v;
  });
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class T, bool MOMENT>
REALUID_INLINE void adam_piece(const AdamStep& step, const AdamTensor& tensor, int64_t begin, int64_t end) {
  using V = VectorFor<T>;
  T *const p = at<T>(tensor.param, begin), *const v = at<T>(tensor.exp_avg_sq, begin);
  T *const m = MOMENT ? at<T>(tensor.exp_avg, begin) : nullptr, *const ema = at<T>(tensor.ema, begin);
  const T* const g = at<T>(tensor.grad, begin);
  const T factor = T(step.factor), decay = T(step.weight_decay), beta2 = T(step.beta2), rest1 = T(1 - step.beta1),
          rest2 = T(1 - step.beta2), size = T(step.size), correction = T(step.root_correction2), eps = T(step.eps);
  for_vectors<T>(false, end - begin, [&](auto access, int64_t i) {
    V x = access.in(p, i);
    const V gradient = factor * access.in(g, i) + decay * x;
    V moment = gradient;
    if constexpr (MOMENT) {
      const V old = access.in(m, i);
      moment = old + rest1 * (gradient - old);
      access.out(m, i, moment);
    }
    const V square = beta2 * access.in(v, i) + (rest2 * gradient) * gradient;
    access.out(v, i, square);
    x -= size * moment / (correction * square_root(square) + eps);
    access.out(p, i, x);
    for (int64_t k = 0; k < step.emas; ++k) {
      T* const average = ema + k * tensor.ema_stride;
      const V old = access.in(average, i);
      access.out(average, i, old + T(step.ema_weight[k]) * (x - old));
    }
  });
}

template <class T>
void adam(const AdamStep& step, const AdamTensor& tensor, int64_t begin, int64_t end) {
  if (tensor.exp_avg != nullptr)
    adam_piece<T, true>(step, tensor, begin, end);
  else
    adam_piece<T, false>(step, tensor, begin, end);
}

}  // namespace REALUID_ISA
}  // namespace

namespace REALUID_TABLE {

const OptimiserKernels optimiser_table[2] = {
    {REALUID_ISA::sum_squares<float>, REALUID_ISA::adam<float>},
    {REALUID_ISA::sum_squares<double>, REALUID_ISA::adam<double>},
};

}  // namespace REALUID_TABLE
}  // namespace realuid_fast
