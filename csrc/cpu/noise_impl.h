// Philox4x32-10 and Box-Muller on vectors: WIDTH groups, 4 * WIDTH normals, per step.
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

REALUID_INLINE Words philox_vector(NoiseKey key, Counters offsets, uint64_t first) {
  const vq zero = {};
  const vq m0 = zero + uint64_t(PHILOX_M0), m1 = zero + uint64_t(PHILOX_M1);
  vq a0 = offsets.even + first, b0 = offsets.odd + first;
  vq a1 = a0 >> 32, b1 = b0 >> 32;
  vq a2 = zero + (key.offset & 0xffffffffull), b2 = a2;
  vq a3 = zero + (key.offset >> 32), b3 = a3;
  uint32_t k0 = uint32_t(key.seed), k1 = uint32_t(key.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < PHILOX_ROUNDS; ++round) {
    const vq key0 = zero + uint64_t(k0), key1 = zero + uint64_t(k1);
    const vq pa0 = multiply_low_halves(a0, m0), pa1 = multiply_low_halves(a2, m1);
    const vq pb0 = multiply_low_halves(b0, m0), pb1 = multiply_low_halves(b2, m1);
    a0 = xor3(pa1 >> 32, a1, key0);
    b0 = xor3(pb1 >> 32, b1, key0);
    a2 = xor3(pa0 >> 32, a3, key1);
    b2 = xor3(pb0 >> 32, b3, key1);
    a1 = pa1, b1 = pb1, a3 = pa0, b3 = pb0;
    k0 += PHILOX_W0;
    k1 += PHILOX_W1;
  }
  return {{interleave_low_halves(a0, b0), interleave_low_halves(a1, b1), interleave_low_halves(a2, b2),
           interleave_low_halves(a3, b3)}};
}

// sqrt(-2 ln u), u = ((w >> 8) + 1) 2^-24. ln m = e ln 2 + ln(1 + f) with 1 + f in [sqrt 1/2, sqrt 2): e = 0 around u = 1,
// so the result keeps its relative accuracy there. The polynomial is -2 ln(1 + f) / f, minimax, relative error 1.7e-7.
REALUID_INLINE vf radius(vu w) {
  const vf m = __builtin_convertvector(bits<vi>(w >> 8) + 1, vf);
  const vi b = bits<vi>(m);
  const vi e = (b - 0x3f3504f3) >> 23;
  const vf f = bits<vf>(b - (e << 23)) - 1.0f;
  const vf exponent = __builtin_convertvector(e - 24, vf) * -1.3862943611198906f;
  vf p = f * 0.20213790237903595f - 0.3244517147541046f;
  p = p * f + 0.34501662850379944f;
  p = p * f - 0.39800330996513367f;
  p = p * f + 0.4993981719017029f;
  p = p * f - 0.6667011976242065f;
  p = p * f + 1.0000072717666626f;
  p = p * f - 1.9999998807907104f;
  return square_root(p * f + exponent);
}

// r cos(theta) and r sin(theta), theta = 2 pi (w >> 8) 2^-24. The quadrant and the remainder in [-pi/4, pi/4] are exact
// integer operations, so no range reduction loses digits.
REALUID_INLINE void polar(vf r, vu w, vf* cosine, vf* sine) {
  const vi k = bits<vi>(w >> 8);
  const vi quadrant = (k + (1 << 21)) >> 22;
  const vf x = __builtin_convertvector(k - (quadrant << 22), vf) * 3.7450702829238413e-7f;
  const vf z = x * x;
  vf s = z * -0.00019503988733049482f + 0.008332036435604095f;
  s = s * z - 0.16666650772094727f;
  s = (s * z) * x + x;
  vf c = z * -0.00135858787689358f + 0.041655026376247406f;
  c = c * z - 0.4999985694885254f;
  c = c * z + 1.0f;
  const vi swap = (quadrant & 1) != 0;
  const vf a = swap ? s : c, b = swap ? c : s;
  const vi sign_a = ((quadrant + 1) & 2) << 30, sign_b = (quadrant & 2) << 30;
  *cosine = bits<vf>(bits<vi>(r * a) ^ sign_a);
  *sine = bits<vf>(bits<vi>(r * b) ^ sign_b);
}

// Four vectors n0..n3, one normal a group each, to memory order.
REALUID_INLINE void interleave4(vf n0, vf n1, vf n2, vf n3, float* out) {
#if REALUID_LEVEL == 2
  const __m512d a = (__m512d)_mm512_unpacklo_ps((__m512)n0, (__m512)n1), b = (__m512d)_mm512_unpackhi_ps((__m512)n0, (__m512)n1);
  const __m512d c = (__m512d)_mm512_unpacklo_ps((__m512)n2, (__m512)n3), d = (__m512d)_mm512_unpackhi_ps((__m512)n2, (__m512)n3);
  _mm512_storeu_pd(out, _mm512_unpacklo_pd(a, c));
  _mm512_storeu_pd(out + 16, _mm512_unpackhi_pd(a, c));
  _mm512_storeu_pd(out + 32, _mm512_unpacklo_pd(b, d));
  _mm512_storeu_pd(out + 48, _mm512_unpackhi_pd(b, d));
#elif REALUID_LEVEL == 1
  const __m256d a = (__m256d)_mm256_unpacklo_ps((__m256)n0, (__m256)n1), b = (__m256d)_mm256_unpackhi_ps((__m256)n0, (__m256)n1);
  const __m256d c = (__m256d)_mm256_unpacklo_ps((__m256)n2, (__m256)n3), d = (__m256d)_mm256_unpackhi_ps((__m256)n2, (__m256)n3);
  _mm256_storeu_ps(out, (__m256)_mm256_unpacklo_pd(a, c));
  _mm256_storeu_ps(out + 8, (__m256)_mm256_unpackhi_pd(a, c));
  _mm256_storeu_ps(out + 16, (__m256)_mm256_unpacklo_pd(b, d));
  _mm256_storeu_ps(out + 24, (__m256)_mm256_unpackhi_pd(b, d));
#elif REALUID_X86
  const __m128 a = _mm_unpacklo_ps((__m128)n0, (__m128)n1), b = _mm_unpackhi_ps((__m128)n0, (__m128)n1);
  const __m128 c = _mm_unpacklo_ps((__m128)n2, (__m128)n3), d = _mm_unpackhi_ps((__m128)n2, (__m128)n3);
  _mm_storeu_ps(out, _mm_movelh_ps(a, c));
  _mm_storeu_ps(out + 4, _mm_movehl_ps(c, a));
  _mm_storeu_ps(out + 8, _mm_movelh_ps(b, d));
  _mm_storeu_ps(out + 12, _mm_movehl_ps(d, b));
#else
  for (int lane = 0; lane < WIDTH; ++lane) {
    float* group = out + 4 * group_of_lane(lane);
    group[0] = n0[lane], group[1] = n1[lane], group[2] = n2[lane], group[3] = n3[lane];
  }
#endif
}

REALUID_INLINE void step(NoiseKey key, Counters offsets, uint64_t first, float* out) {
  const Words words = philox_vector(key, offsets, first);
  vf n0, n1, n2, n3;
  polar(radius(words.w[0]), words.w[1], &n0, &n1);
  polar(radius(words.w[2]), words.w[3], &n2, &n3);
  interleave4(n0, n1, n2, n3, out);
}

}  // namespace REALUID_ISA
}  // namespace

namespace REALUID_TABLE {

void fill(NoiseKey key, uint64_t first, int64_t groups, float* out) {
  using namespace REALUID_ISA;
  const Counters offsets = counters();
  int64_t done = 0;
  for (; done + WIDTH <= groups; done += WIDTH) step(key, offsets, first + uint64_t(done), out + 4 * done);
  if (done < groups) {
    float last[4 * WIDTH];
    step(key, offsets, first + uint64_t(done), last);
    std::memcpy(out + 4 * done, last, size_t(groups - done) * 4 * sizeof(float));
  }
}

}  // namespace REALUID_TABLE
}  // namespace realuid_fast
