// Vectors of one width: loads and stores of every storage type, and the few operations the language lacks.
//
// Included once by each translation unit of an instruction set, after it has set REALUID_ISA (the namespace) and
// REALUID_LEVEL (0 baseline, 1 AVX2 + FMA + F16C, 2 AVX-512). Everything here has internal linkage: two instruction sets
// must never share an inline function, or the linker would keep one body for both.
#pragma once

#include <cstdint>
#include <cstring>

#include "arch.h"
#include "storage.h"

namespace realuid_fast {
namespace {
namespace REALUID_ISA {

constexpr int VECTOR_BYTES = REALUID_LEVEL == 2 ? 64 : REALUID_LEVEL == 1 ? 32 : 16;

template <class C>
struct VectorOf {
  typedef C type __attribute__((vector_size(VECTOR_BYTES)));
  static constexpr int width = VECTOR_BYTES / sizeof(C);
};

using vf = VectorOf<float>::type;
using vd = VectorOf<double>::type;
using vi = VectorOf<int32_t>::type;
using vu = VectorOf<uint32_t>::type;
using vq = VectorOf<uint64_t>::type;
typedef uint16_t vh __attribute__((vector_size(VECTOR_BYTES / 2)));
constexpr int WIDTH = VectorOf<float>::width;

template <class To, class From>
REALUID_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class V, class T>
REALUID_INLINE V load_as(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

// --- 16-bit storage -------------------------------------------------------------------------------------------------

#if REALUID_LEVEL == 2
// Moving halves by a permutation takes one operation in place of a shift and a change of width.
typedef uint16_t vw __attribute__((vector_size(VECTOR_BYTES)));

REALUID_INLINE vf widen(vh h, BFloat16) {
  const vw places = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                     0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  return (vf)_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, (__m512i)places, _mm512_castsi256_si512((__m256i)h));
}

REALUID_INLINE vh narrow(vf v, BFloat16) {
  const __m512i u = (__m512i)v;
  // To nearest, ties to even.
  __m512i rounded = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
  rounded = _mm512_mask_add_epi32(rounded, _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000)), rounded, _mm512_set1_epi32(1));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  const vw high = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  return (vh)_mm512_castsi512_si256(_mm512_permutexvar_epi16((__m512i)high, rounded));
}
#else
REALUID_INLINE vf widen(vh h, BFloat16) { return bits<vf>(__builtin_convertvector(h, vu) << 16); }

REALUID_INLINE vh narrow(vf v, BFloat16) {
  const vu u = bits<vu>(v);
  const vu nearest_even = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return __builtin_convertvector(v != v ? (nearest_even & 0u) + 0x7fc0u : nearest_even, vh);
}
#endif

#if REALUID_LEVEL == 2
REALUID_INLINE vf widen(vh h, Half) { return (vf)_mm512_cvtph_ps((__m256i)h); }
REALUID_INLINE vh narrow(vf v, Half) { return (vh)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#elif REALUID_LEVEL == 1
REALUID_INLINE vf widen(vh h, Half) { return (vf)_mm256_cvtph_ps((__m128i)h); }
REALUID_INLINE vh narrow(vf v, Half) { return (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#else
REALUID_INLINE vf widen(vh h, Half) {
  const vu u = __builtin_convertvector(h, vu);
  const vu magnitude = (u & 0x7fffu) << 13;
  // Multiplying by 2^112 rebiases the exponent and normalises subnormals in one exact step.
  const vu finite = bits<vu>(bits<vf>(magnitude) * 0x1p112f);
  const vi special = bits<vi>(u & 0x7c00u) == 0x7c00;
  return bits<vf>((special ? (magnitude | 0x7f800000u) : finite) | ((u & 0x8000u) << 16));
}

REALUID_INLINE vh narrow(vf v, Half) {
  const vu u = bits<vu>(v);
  const vu a = u & 0x7fffffffu;
  const vi s = bits<vi>(a);
  const vu normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // Below 2^-14 the addition of 0.5 lets the processor round to the subnormal grid.
  const vu subnormal = bits<vu>(bits<vf>(a) + 0.5f) - 0x3f000000u;
  vu half = s < 0x38800000 ? subnormal : normal;
  half = s >= 0x477ff000 ? (half & 0u) + 0x7c00u : half;
  half = s > 0x7f800000 ? (half & 0u) + 0x7e00u : half;
  return __builtin_convertvector(half | ((u >> 16) & 0x8000u), vh);
}
#endif

// --- loads and stores in the arithmetic type --------------------------------------------------------------------------

REALUID_INLINE vf load(const float* from) { return load_as<vf>(from); }
REALUID_INLINE vd load(const double* from) { return load_as<vd>(from); }
template <class T>
REALUID_INLINE vf load(const T* from) {
  return widen(load_as<vh>(from), T());
}

REALUID_INLINE void store(float* to, vf v) { std::memcpy(to, &v, sizeof(v)); }
REALUID_INLINE void store(double* to, vd v) { std::memcpy(to, &v, sizeof(v)); }
template <class T>
REALUID_INLINE void store(T* to, vf v) {
  const vh h = narrow(v, T());
  std::memcpy(to, &h, sizeof(h));
}

// The first n < width elements, zeros behind them.
template <class T>
REALUID_INLINE auto load_first(const T* from, int n) {
  T padded[VectorOf<typename Arithmetic<T>::type>::width] = {};
  std::memcpy(padded, from, n * sizeof(T));
  return load(padded);
}

template <class T, class V>
REALUID_INLINE void store_first(T* to, V v, int n) {
  T padded[VectorOf<typename Arithmetic<T>::type>::width];
  store(padded, v);
  std::memcpy(to, padded, n * sizeof(T));
}

// Past the caches: a line that nobody reads soon is not fetched before it is overwritten. `to` is aligned to the vector.
REALUID_INLINE void stream_bytes(void* to, const void* from, int bytes) {
#if REALUID_LEVEL == 2
  if (bytes == 64) return _mm512_stream_si512((__m512i*)to, load_as<__m512i>((const char*)from));
#endif
#if REALUID_LEVEL >= 1
  if (bytes == 32) return _mm256_stream_si256((__m256i*)to, load_as<__m256i>((const char*)from));
#endif
#if REALUID_X86
  if (bytes == 16) return _mm_stream_si128((__m128i*)to, load_as<__m128i>((const char*)from));
#endif
  std::memcpy(to, from, bytes);
}

REALUID_INLINE void stream(float* to, vf v) { stream_bytes(to, &v, sizeof(v)); }
REALUID_INLINE void stream(double* to, vd v) { stream_bytes(to, &v, sizeof(v)); }
template <class T>
REALUID_INLINE void stream(T* to, vf v) {
  const vh h = narrow(v, T());
  stream_bytes(to, &h, sizeof(h));
}

// Streamed lines become visible to other threads only behind a fence.
REALUID_INLINE void stream_fence() {
#if REALUID_X86
  _mm_sfence();
#endif
}

REALUID_INLINE void prefetch(const void* at) { __builtin_prefetch(at, 0, 3); }

REALUID_INLINE vf square_root(vf v) {
#if REALUID_LEVEL == 2
  return (vf)_mm512_sqrt_ps((__m512)v);
#elif REALUID_LEVEL == 1
  return (vf)_mm256_sqrt_ps((__m256)v);
#elif REALUID_X86
  return (vf)_mm_sqrt_ps((__m128)v);
#else
  for (int i = 0; i < WIDTH; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

REALUID_INLINE vd square_root(vd v) {
  for (int i = 0; i < VectorOf<double>::width; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
}

// 1 / v for v from 1 to 2^125, relative error 2e-7 at most: the processor's approximation and one step of Newton's, a third of
// a division's cost.
REALUID_INLINE vf reciprocal(vf v) {
#if REALUID_LEVEL == 2
  const vf r = (vf)_mm512_rcp14_ps((__m512)v);
#elif REALUID_LEVEL == 1
  const vf r = (vf)_mm256_rcp_ps((__m256)v);
#else
  return 1 / v;
#endif
#if REALUID_LEVEL >= 1
  return r * (2 - v * r);
#endif
}

REALUID_INLINE vd reciprocal(vd v) { return 1 / v; }

// Fixed order, in double.
template <class V>
REALUID_INLINE double sum_lanes(V v) {
  double total = 0;
  for (int i = 0; i < int(sizeof(V) / sizeof(v[0])); ++i) total += v[i];
  return total;
}

}  // namespace REALUID_ISA
}  // namespace
}  // namespace realuid_fast
