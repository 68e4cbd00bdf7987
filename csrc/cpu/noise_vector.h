// Philox4x32-10 and Box-Muller on vectors: WIDTH groups, 4 * WIDTH normals, per step.
#pragma once

#include "noise.h"
#include "simd.h"

namespace realuid_fast {
namespace {
namespace REALUID_ISA {

// Low halves of the 64-bit lanes multiplied to 64 bits; the high halves are ignored, so Philox never has to clear them.
REALUID_INLINE vq multiply_low_halves(vq a, vq b) {
#if REALUID_LEVEL == 2
  return (vq)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif REALUID_LEVEL == 1
  return (vq)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif REALUID_X86
  return (vq)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffull) * (b & 0xffffffffull);
#endif
}

REALUID_INLINE vq xor3(vq a, vq b, vq c) {
#if REALUID_LEVEL == 2
  return (vq)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}

// The high halves moved to the low ones; what is left above is as good as anything else. A shuffle, since the port that
// shifts is the one that multiplies.
REALUID_INLINE vq high_halves(vq v) {
#if REALUID_LEVEL == 2
  return (vq)_mm512_shuffle_epi32((__m512i)v, _MM_PERM_DDBB);
#elif REALUID_LEVEL == 1
  return (vq)_mm256_shuffle_epi32((__m256i)v, 0xF5);
#elif REALUID_X86
  return (vq)_mm_shuffle_epi32((__m128i)v, 0xF5);
#else
  return v >> 32;
#endif
}

// The low halves of `even` and `odd`, interleaved.
REALUID_INLINE vu interleave_low_halves(vq even, vq odd) {
#if REALUID_LEVEL == 2
  return (vu)_mm512_mask_moveldup_ps((__m512)even, 0xAAAA, (__m512)odd);
#elif REALUID_LEVEL == 1
  return (vu)_mm256_blend_ps((__m256)even, _mm256_moveldup_ps((__m256)odd), 0xAA);
#else
  return bits<vu>((even & 0xffffffffull) | (odd << 32));
#endif
}

// Group offset of each 32-bit lane. The transposition below works inside 128-bit parts only; numbering the lanes this way
// lets it leave the normals in memory order.
constexpr int group_of_lane(int lane) { return (WIDTH / 4) * (lane % 4) + lane / 4; }

struct Words {
  vu w[4];
};

struct Counters {
  vq even, odd;  // group offsets of the even and the odd lanes
};

REALUID_INLINE Counters counters() {
  Counters c;
  for (int i = 0; i < WIDTH / 2; ++i) {
    c.even[i] = uint64_t(group_of_lane(2 * i));
    c.odd[i] = uint64_t(group_of_lane(2 * i + 1));
  }
  return c;
}

// Where the group numbers of a vector do not share their high word: once in 2^32 groups.
__attribute__((noinline)) Words philox_lanes(NoiseKey key, uint64_t first) {
  Words words;
  for (int lane = 0; lane < WIDTH; ++lane) {
    uint32_t w[4];
    philox_words(key, first + uint64_t(group_of_lane(lane)), w);
    for (int i = 0; i < 4; ++i) words.w[i][lane] = w[i];
  }
  return words;
}

// Only the low word of the group differs between lanes, so half of the first two rounds is scalar arithmetic.
REALUID_INLINE Words philox_vector(NoiseKey key, const Counters& offsets, uint64_t first) {
  if ((first ^ (first + WIDTH - 1)) >> 32) return philox_lanes(key, first);
  const vq zero = {};
  const vq m0 = zero + uint64_t(PHILOX_M0), m1 = zero + uint64_t(PHILOX_M1);
  uint32_t k0 = uint32_t(key.seed), k1 = uint32_t(key.seed >> 32);

  const uint64_t q1 = uint64_t(PHILOX_M1) * uint32_t(key.offset);
  const uint32_t c0 = uint32_t(q1 >> 32) ^ uint32_t(first >> 32) ^ k0, c1 = uint32_t(q1);
  const vq once = zero + uint64_t(uint32_t(key.offset >> 32) ^ k1);
  vq a3 = multiply_low_halves(offsets.even + first, m0), b3 = multiply_low_halves(offsets.odd + first, m0);
  vq a2 = high_halves(a3) ^ once, b2 = high_halves(b3) ^ once;
  k0 += PHILOX_W0;
  k1 += PHILOX_W1;

  const uint64_t q0 = uint64_t(PHILOX_M0) * c0;
  const vq left = zero + uint64_t(c1 ^ k0), right = zero + uint64_t(uint32_t(q0 >> 32) ^ k1);
  vq a1 = multiply_low_halves(a2, m1), b1 = multiply_low_halves(b2, m1);
  vq a0 = high_halves(a1) ^ left, b0 = high_halves(b1) ^ left;
  a2 = a3 ^ right, b2 = b3 ^ right;
  a3 = b3 = zero + uint64_t(uint32_t(q0));

#pragma GCC unroll 10
  for (int round = 2; round < PHILOX_ROUNDS; ++round) {
    k0 += PHILOX_W0;
    k1 += PHILOX_W1;
    const vq key0 = zero + uint64_t(k0), key1 = zero + uint64_t(k1);
    const vq pa0 = multiply_low_halves(a0, m0), pa1 = multiply_low_halves(a2, m1);
    const vq pb0 = multiply_low_halves(b0, m0), pb1 = multiply_low_halves(b2, m1);
    a0 = xor3(high_halves(pa1), a1, key0);
    b0 = xor3(high_halves(pb1), b1, key0);
    a2 = xor3(high_halves(pa0), a3, key1);
    b2 = xor3(high_halves(pb0), b3, key1);
    a1 = pa1, b1 = pb1, a3 = pa0, b3 = pb0;
  }
  return {{interleave_low_halves(a0, b0), interleave_low_halves(a1, b1), interleave_low_halves(a2, b2),
           interleave_low_halves(a3, b3)}};
}

// sqrt(-2 ln u), u = m 2^-24, m = (w >> 8) + 1. With m = 2^(e + 24) (1 + f) and 1 + f in [sqrt 1/2, sqrt 2), e = 0 around
// u = 1, so the result keeps its relative accuracy there. The exponent is never shifted down: the conversion takes it as
// 2^23 e. The polynomial is -2 ln(1 + f) / f, minimax, relative error 1.7e-7.
REALUID_INLINE vf radius(vu w) {
  const vi b = bits<vi>(__builtin_convertvector(bits<vi>(w >> 8) + 1, vf));
  const vi e = (b - (0x3f3504f3 + (24 << 23))) & int32_t(0xff800000);
  const vf f = bits<vf>(b - e) * 0x1p-24f - 1.0f;
  const vf exponent = __builtin_convertvector(e, vf) * (-1.3862943611198906f * 0x1p-23f);
  vf p = f * 0.20213790237903595f - 0.3244517147541046f;
  p = p * f + 0.34501662850379944f;
  p = p * f - 0.39800330996513367f;
  p = p * f + 0.4993981719017029f;
  p = p * f - 0.6667011976242065f;
  p = p * f + 1.0000072717666626f;
  p = p * f - 1.9999998807907104f;
  return square_root(p * f + exponent);
}

REALUID_INLINE vf flip_sign(vf v, vu sign) {
#if REALUID_LEVEL == 2
  return (vf)_mm512_ternarylogic_epi32((__m512i)v, (__m512i)sign, _mm512_set1_epi32(int(0x80000000u)), 0x78);
#else
  return bits<vf>(bits<vu>(v) ^ (sign & 0x80000000u));
#endif
}

// r cos(theta) and r sin(theta), theta = 2 pi (w >> 8) 2^-24. An eighth of a turn further, the word's two top bits are the
// quadrant, and the bits below count from -pi/4 to pi/4: an exact integer reduction, which loses no digits.
REALUID_INLINE void polar(vf r, vu w, vf* cosine, vf* sine) {
  const vu turned = w + (1u << 29);
  const vi k = bits<vi>(turned & 0x3fffff00u) - (1 << 29);
  const vf x = __builtin_convertvector(k, vf) * (3.7450702829238413e-7f * 0x1p-8f);
  const vf z = x * x;
  vf s = z * -0.00019503988733049482f + 0.008332036435604095f;
  s = s * z - 0.16666650772094727f;
  s = (s * z) * x + x;
  vf c = z * -0.00135858787689358f + 0.041655026376247406f;
  c = c * z - 0.4999985694885254f;
  c = c * z + 1.0f;
  const vi swap = bits<vi>(turned & (1u << 30)) != 0;
  const vf a = swap ? s : c, b = swap ? c : s;
  *cosine = flip_sign(r * a, turned + (1u << 30));
  *sine = flip_sign(r * b, turned);
}

// 4 * WIDTH normals in memory order.
struct Normals {
  vf v[4];
};

// From four vectors n0..n3, one normal a group each.
REALUID_INLINE Normals interleave(vf n0, vf n1, vf n2, vf n3) {
#if REALUID_LEVEL == 2
  const __m512d a = (__m512d)_mm512_unpacklo_ps((__m512)n0, (__m512)n1), b = (__m512d)_mm512_unpackhi_ps((__m512)n0, (__m512)n1);
  const __m512d c = (__m512d)_mm512_unpacklo_ps((__m512)n2, (__m512)n3), d = (__m512d)_mm512_unpackhi_ps((__m512)n2, (__m512)n3);
  return {{(vf)_mm512_unpacklo_pd(a, c), (vf)_mm512_unpackhi_pd(a, c), (vf)_mm512_unpacklo_pd(b, d), (vf)_mm512_unpackhi_pd(b, d)}};
#elif REALUID_LEVEL == 1
  const __m256d a = (__m256d)_mm256_unpacklo_ps((__m256)n0, (__m256)n1), b = (__m256d)_mm256_unpackhi_ps((__m256)n0, (__m256)n1);
  const __m256d c = (__m256d)_mm256_unpacklo_ps((__m256)n2, (__m256)n3), d = (__m256d)_mm256_unpackhi_ps((__m256)n2, (__m256)n3);
  return {{(vf)_mm256_unpacklo_pd(a, c), (vf)_mm256_unpackhi_pd(a, c), (vf)_mm256_unpacklo_pd(b, d), (vf)_mm256_unpackhi_pd(b, d)}};
#elif REALUID_X86
  const __m128 a = _mm_unpacklo_ps((__m128)n0, (__m128)n1), b = _mm_unpackhi_ps((__m128)n0, (__m128)n1);
  const __m128 c = _mm_unpacklo_ps((__m128)n2, (__m128)n3), d = _mm_unpackhi_ps((__m128)n2, (__m128)n3);
  return {{(vf)_mm_movelh_ps(a, c), (vf)_mm_movehl_ps(c, a), (vf)_mm_movelh_ps(b, d), (vf)_mm_movehl_ps(d, b)}};
#else
  float flat[4 * WIDTH];
  for (int lane = 0; lane < WIDTH; ++lane) {
    float* group = flat + 4 * group_of_lane(lane);
    group[0] = n0[lane], group[1] = n1[lane], group[2] = n2[lane], group[3] = n3[lane];
  }
  return {{load(flat), load(flat + WIDTH), load(flat + 2 * WIDTH), load(flat + 3 * WIDTH)}};
#endif
}

REALUID_INLINE Normals box_muller(const Words& words) {
  vf n0, n1, n2, n3;
  polar(radius(words.w[0]), words.w[1], &n0, &n1);
  polar(radius(words.w[2]), words.w[3], &n2, &n3);
  return interleave(n0, n1, n2, n3);
}

// body(i, normals) for the elements [i, i + 4 * WIDTH) of every step from the group `first` on. The integer half of the next
// step runs beside the floating-point half of this one.
template <class F>
REALUID_INLINE void for_normals(NoiseKey key, uint64_t first, int64_t steps, F&& body) {
  if (steps == 0) return;
  const Counters offsets = counters();
  Words words = philox_vector(key, offsets, first);
  for (int64_t step = 0; step < steps; ++step) {
    Words next;
    if (step + 1 < steps) next = philox_vector(key, offsets, first + uint64_t((step + 1) * WIDTH));
    body(step * 4 * WIDTH, box_muller(words));
    words = next;
  }
}

}  // namespace REALUID_ISA
}  // namespace
}  // namespace realuid_fast
