// Group normalisation and SiLU on vectors of channels: sums of an image first, then its values.
#pragma once

#include "../cpu/access.h"
#include "norm.h"

namespace realuid_fast {
namespace {
namespace REALUID_ISA {

constexpr int64_t PIXELS = 256;  // summed in single precision at most
constexpr int64_t PIXELS_TOGETHER = 16;
constexpr int SIDE_BY_SIDE = 4;  // vectors of channels summed at once: whole lines, and sums that do not wait for each other

// e^v for v up to 87, and what it is at -87 below that. With v = k ln 2 + r and r up to half of ln 2, e^r is
// 1 + r + r^2 q(r), q minimax of degree 4, relative error 4e-9; ln 2 has two parts, the first with few enough digits that k
// times it is exact.
REALUID_INLINE vf exponential(vf v) {
  v = v < -87.0f ? vf{} - 87.0f : v;
  // Adding 1.5 2^23 leaves the nearest integer in the low bits.
  const vf shifted = v * 1.4426950408889634f + 12582912.0f, k = shifted - 12582912.0f;
  const vf r = (v - k * 0.693145751953125f) - k * 1.428606765330187e-6f;
  vf q = r * 0.0013814539415761828f + 0.00836874544620514f;
  q = q * r + 0.04166838899254799f;
  q = q * r + 0.1666652113199234f;
  q = q * r + 0.4999999403953552f;
  const vf p = (q * r) * r + r + 1.0f;
  return bits<vf>(bits<vu>(p) + (bits<vu>(shifted) << 23));
}

REALUID_INLINE vd exponential(vd v) {
  for (int i = 0; i < VectorOf<double>::width; ++i) v[i] = __builtin_exp(v[i]);
  return v;
}

// 0 below -87, where float32 has no more than 1e-38 to say.
template <class V>
REALUID_INLINE V sigmoid(V z) {
  const V of_e = reciprocal(1 + exponential(-z));
  return z < -87 ? V{} : of_e;
}

// Adds up `SUMS` numbers of every channel over an image's pixels: value(access, pixel's offset, channel, sums) adds to sums[0..].
template <class T, int SUMS, class F>
REALUID_INLINE void sum_channels(int64_t pixels, int64_t channels, double* const (&to)[SUMS], F&& value) {
  using Real = ArithmeticOf<T>;
  using V = VectorFor<T>;
  constexpr int WIDE = VectorOf<Real>::width;
  for (int s = 0; s < SUMS; ++s)
    for (int64_t c = 0; c < channels; ++c) to[s][c] = 0;
  const auto flush = [&](const V& v, double* into, int n) {
    for (int lane = 0; lane < n; ++lane) into[lane] += double(v[lane]);
  };
  for (int64_t first = 0; first < pixels; first += PIXELS) {
    const int64_t last = first + PIXELS < pixels ? first + PIXELS : pixels;
    int64_t c = 0;
    for (; c + SIDE_BY_SIDE * WIDE <= channels; c += SIDE_BY_SIDE * WIDE) {
      V sums[SIDE_BY_SIDE][SUMS] = {};
      for (int64_t pixel = first; pixel < last; ++pixel)
#pragma GCC unroll 4
        for (int i = 0; i < SIDE_BY_SIDE; ++i) value(Whole{false}, pixel * channels, c + i * WIDE, sums[i]);
      for (int i = 0; i < SIDE_BY_SIDE; ++i)
        for (int s = 0; s < SUMS; ++s) flush(sums[i][s], to[s] + c + i * WIDE, WIDE);
    }
    const auto one = [&](auto access, int64_t at, int n) {
      V sums[SUMS] = {};
      for (int64_t pixel = first; pixel < last; ++pixel) value(access, pixel * channels, at, sums);
      for (int s = 0; s < SUMS; ++s) flush(sums[s], to[s] + at, n);
    };
    for (; c + WIDE <= channels; c += WIDE) one(Whole{false}, c, WIDE);
    if (c < channels) one(Rest{int(channels - c)}, c, int(channels - c));
  }
}

// body(access, pixel's offset, channel) for every vector, some pixels of a vector of channels one after another: what they have
// in common stays in registers.
template <class T, class F>
REALUID_INLINE void for_pixels(int64_t pixels, int64_t channels, F&& body) {
  for (int64_t first = 0; first < pixels; first += PIXELS_TOGETHER) {
    const int64_t last = first + PIXELS_TOGETHER < pixels ? first + PIXELS_TOGETHER : pixels;
    for_vectors<T>(false, channels, [&](auto access, int64_t c) {
      for (int64_t pixel = first; pixel < last; ++pixel) body(access, pixel * channels, c);
    });
  }
}

// The rows of scratch as numbers of the arithmetic type.
template <class Real>
REALUID_INLINE Real* row_of(void* scratch, int64_t channels, int row) {
  return reinterpret_cast<Real*>(static_cast<double*>(scratch) + row * channels);
}

template <class T>
void norm_forward(const NormArgs& args, int64_t begin, int64_t end, void* scratch) {
  using Real = ArithmeticOf<T>;
  using V = VectorFor<T>;
  const int64_t channels = args.channels, pixels = args.pixels, members = channels / args.groups;
  double* const sum = row_of<double>(scratch, channels, 0);
  double* const square = row_of<double>(scratch, channels, 1);
  Real* const start = row_of<Real>(scratch, channels, 2);
  Real* const factor = row_of<Real>(scratch, channels, 3);
  Real* const offset = row_of<Real>(scratch, channels, 4);
  const Real *const weight = static_cast<const Real*>(args.weight), *const bias = static_cast<const Real*>(args.bias);
  for (int64_t image = begin; image < end; ++image) {
    const T* const x = static_cast<const T*>(args.x) + image * pixels * channels;
    T* const y = static_cast<T*>(args.y) + image * pixels * channels;
    const Real* const shift = at<Real>(args.shift, image * channels);
    Real* const statistics = static_cast<Real*>(args.statistics) + image * args.groups * 2;
    // Sums run over differences from a channel's first pixel, so that a large mean costs no digits of the deviation.
    for_vectors<T>(false, channels, [&](auto access, int64_t c) { access.out(start, c, V(access.in(x, c))); });
    sum_channels<T, 2>(pixels, channels, {sum, square}, [&](auto access, int64_t pixel, int64_t c, V* sums) {
      const V d = access.in(x + pixel, c) - access.in(start, c);
      sums[0] += d;
      sums[1] += d * d;
    });
    const double of_pixels = 1 / double(pixels);
    for (int64_t group = 0; group < args.groups; ++group) {
      const int64_t from = group * members, to = from + members;
      double mean = 0, spread = 0;
      for (int64_t c = from; c < to; ++c) {
        const double of_channel = sum[c] * of_pixels;
        square[c] -= sum[c] * of_channel;
        sum[c] = double(start[c]) + of_channel + (shift == nullptr ? 0.0 : double(shift[c]));
        mean += sum[c];
      }
      mean /= double(members);
      for (int64_t c = from; c < to; ++c) spread += square[c] + double(pixels) * (sum[c] - mean) * (sum[c] - mean);
      const double variance = spread / (double(members) * double(pixels));
      // Rounding can make the variance negative: take 0 then. A NaN stays a NaN.
      const double rstd = 1 / __builtin_sqrt((variance < 0 ? 0 : variance) + args.eps);
      statistics[2 * group] = Real(mean);
      statistics[2 * group + 1] = Real(rstd);
      for (int64_t c = from; c < to; ++c) {
        factor[c] = Real(double(weight[c]) * rstd);
        offset[c] = Real(double(bias[c]) + ((shift == nullptr ? 0.0 : double(shift[c])) - mean) * double(weight[c]) * rstd);
      }
    }
    for_pixels<T>(pixels, channels, [&](auto access, int64_t pixel, int64_t c) {
      const V z = access.in(x + pixel, c) * access.in(factor, c) + access.in(offset, c);
      access.out(y + pixel, c, V(z * sigmoid(z)));
    });
  }
}

template <class T>
void norm_backward(const NormGradArgs& args, int64_t begin, int64_t end, void* scratch) {
  using Real = ArithmeticOf<T>;
  using V = VectorFor<T>;
  const int64_t channels = args.channels, pixels = args.pixels, members = channels / args.groups;
  double* const of_n = row_of<double>(scratch, channels, 0);
  Real* const scale = row_of<Real>(scratch, channels, 1);   // n = x scale + offset
  Real* const offset = row_of<Real>(scratch, channels, 2);
  Real* const outer = row_of<Real>(scratch, channels, 3);   // g_x = outer g_z - flat - slope n
  Real* const flat = row_of<Real>(scratch, channels, 4);
  Real* const slope = row_of<Real>(scratch, channels, 5);
  const Real *const weight = static_cast<const Real*>(args.weight), *const bias = static_cast<const Real*>(args.bias);
  for (int64_t image = begin; image < end; ++image) {
    const T *const x = static_cast<const T*>(args.x) + image * pixels * channels,
            *const grad = static_cast<const T*>(args.grad) + image * pixels * channels;
    T* const g_x = static_cast<T*>(args.g_x) + image * pixels * channels;
    const Real *const shift = at<Real>(args.shift, image * channels),
               *const statistics = static_cast<const Real*>(args.statistics) + image * args.groups * 2;
    double *const g_weight = args.of_images + image * 2 * channels, *const g_bias = g_weight + channels;
    for (int64_t c = 0; c < channels; ++c) {
      const Real *const of_group = statistics + c / members * 2;
      scale[c] = of_group[1];
      offset[c] = Real(((shift == nullptr ? 0.0 : double(shift[c])) - double(of_group[0])) * double(of_group[1]));
    }
    // dl/dz at a vector of one pixel.
    const auto to_z = [&](auto access, int64_t pixel, int64_t c, V n) {
      const V z = n * access.in(weight, c) + access.in(bias, c), gate = sigmoid(z);
      return access.in(grad + pixel, c) * (gate * (1 + z * (1 - gate)));
    };
    // If g_x has the type of the sums, it holds g_z between the pass of the sums and that of the values.
    constexpr bool KEEPS = sizeof(T) == sizeof(Real);
    sum_channels<T, 3>(pixels, channels, {g_weight, g_bias, of_n}, [&](auto access, int64_t pixel, int64_t c, V* sums) {
      const V n = access.in(x + pixel, c) * access.in(scale, c) + access.in(offset, c), g_z = to_z(access, pixel, c, n);
      if constexpr (KEEPS) access.out(g_x + pixel, c, g_z);
      sums[0] += g_z * n;
      sums[1] += g_z;
      sums[2] += n;
    });
    for (int64_t group = 0; group < args.groups; ++group) {
      const int64_t from = group * members, to = from + members;
      double mean = 0, along = 0;
      for (int64_t c = from; c < to; ++c) {
        mean += double(weight[c]) * g_bias[c];
        along += double(weight[c]) * g_weight[c];
      }
      const double rstd = double(statistics[2 * group + 1]), count = double(members) * double(pixels);
      mean *= rstd / count;
      along *= rstd / count;
      for (int64_t c = from; c < to; ++c) {
        outer[c] = Real(rstd * double(weight[c]));
        flat[c] = Real(mean);
        slope[c] = Real(along);
        if (args.g_shift != nullptr)
          static_cast<Real*>(args.g_shift)[image * channels + c] =
              Real(rstd * double(weight[c]) * g_bias[c] - double(pixels) * mean - along * of_n[c]);
      }
    }
    for_pixels<T>(pixels, channels, [&](auto access, int64_t pixel, int64_t c) {
      const V n = access.in(x + pixel, c) * access.in(scale, c) + access.in(offset, c);
      V g_z;
      if constexpr (KEEPS)
        g_z = access.in(g_x + pixel, c);
      else
        g_z = to_z(access, pixel, c, n);
      access.out(g_x + pixel, c, V(access.in(outer, c) * g_z - access.in(flat, c) - access.in(slope, c) * n));
    });
  }
}

template <class T>
constexpr NormKernels norm_kernels_for() {
  return {norm_forward<T>, norm_backward<T>};
}

}  // namespace REALUID_ISA
}  // namespace

namespace REALUID_TABLE {

const NormKernels norm_table[DTYPES] = {
    REALUID_ISA::norm_kernels_for<float>(),
    REALUID_ISA::norm_kernels_for<BFloat16>(),
    REALUID_ISA::norm_kernels_for<Half>(),
    REALUID_ISA::norm_kernels_for<double>(),
};

}  // namespace REALUID_TABLE
}  // namespace realuid_fast
