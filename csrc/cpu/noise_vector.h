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

template <class V>
REALUID_INLINE V xor3(V a, V b, V c) {
#if REALUID_LEVEL == 2
  return (V)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}

// Moves the high halves to the low ones; the new high halves have no meaning. It is a shuffle and not a shift, because shifts
// compete with multiplications for the same port.
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

// The high halves of `even` and `odd`, interleaved.
REALUID_INLINE vu interleave_high_halves(vq even, vq odd) {
#if REALUID_LEVEL == 2
  return (vu)_mm512_mask_movehdup_ps((__m512)odd, 0x5555, (__m512)even);
#elif REALUID_LEVEL == 1
  return (vu)_mm256_blend_ps(_mm256_movehdup_ps((__m256)even), (__m256)odd, 0xAA);
#else
  return bits<vu>((even >> 32) | (odd & 0xffffffff00000000ull));
#endif
}

// A step's groups are two halves of WIDTH / 2 groups, one group a 64-bit lane. Numbered this way, the pairs of normals leave the
// unpacking below, which works inside 128-bit parts only, in memory order.
constexpr int group_of_lane(int half, int lane) { return half * (WIDTH / 2) + (WIDTH / 4) * (lane % 2) + lane / 2; }

// For every half: the words of the radii (the first and the third of a group) and those of the angles (second and fourth).
template <int HALVES>
struct Words {
  vu radii[HALVES], angles[HALVES];
};

// The case, once in 2^32 groups, that the group numbers of a vector do not share their high word.
template <int HALVES>
__attribute__((noinline)) Words<HALVES> philox_lanes(NoiseKey key, uint64_t first) {
  Words<HALVES> words;
  for (int half = 0; half < HALVES; ++half) {
    for (int lane = 0; lane < WIDTH / 2; ++lane) {
      uint32_t w[4];
      philox_words(key, first + uint64_t(group_of_lane(half, lane)), w);
      for (int pair = 0; pair < 2; ++pair) {
        words.radii[half][2 * lane + pair] = w[2 * pair];
        words.angles[half][2 * lane + pair] = w[2 * pair + 1];
      }
    }
  }
  return words;
}

// sqrt(-2 ln u / s), s = 2^-22 ln 2, u = m 2^-24, m = (w >> 8) + 1. With m = 2^(e + 24) (1 + f) and 1 + f in
// [sqrt 1/2, sqrt 2), e = 0 around u = 1, so the result keeps its relative accuracy there. The exponent is never shifted down:
// converted as it is it counts in s, and what turns the normals back is in polar's coefficients. The polynomial is
// -2 ln(1 + f) / (s f), minimax, relative error 1.1e-6: 5e-7 in a normal.
REALUID_INLINE vf radius(vu w) {
  const vi b = bits<vi>(__builtin_convertvector(bits<vi>(w >> 8) + 1, vf));
  const vi e = ((0x3f3504f3 + (24 << 23) + 0x7fffff) - b) & int32_t(0xff800000);  // of 1 / u
  const vf f = bits<vf>(b + e) * 0x1p-24f - 1.0f;
  vf p = f * -1439690.875f + 2259221.75f;
  p = p * f - 2480507.5f;
  p = p * f + 3014627.75f;
  p = p * f - 4031789.5f;
  p = p * f + 6051236.5f;
  p = p * f - 12102215.0f;
  return square_root(p * f + __builtin_convertvector(e, vf));
}

REALUID_INLINE vf flip_sign(vf v, vu sign) {
#if REALUID_LEVEL == 2
  return (vf)_mm512_ternarylogic_epi32((__m512i)v, (__m512i)sign, _mm512_set1_epi32(int(0x80000000u)), 0x78);
#else
  return bits<vf>(bits<vu>(v) ^ (sign & 0x80000000u));
#endif
}

// 1 + the 23 low bits of w >> 8, as a fraction.
REALUID_INLINE vf low_bits(vu w) {
#if REALUID_LEVEL == 2
  const __m512i fraction = _mm512_set1_epi32(0x7fffff), one = _mm512_set1_epi32(0x3f800000);
  return (vf)_mm512_ternarylogic_epi32(_mm512_srli_epi32((__m512i)w, 8), fraction, one, 0xEA);  // (a & b) | c
#else
  return bits<vf>(((w >> 8) & 0x7fffffu) | 0x3f800000u);
#endif
}

// sqrt(s) r cos(theta) and sqrt(s) r sin(theta), theta = 2 pi (w >> 8) 2^-24. The word's top bit is the half of the turn, a
// sign; the bits below, an exact fraction, count x = -1/2 to 1/2 half turns around its middle, where the cosine is -sin(pi x)
// and the sine cos(pi x). Both are polynomials in q = 1/4 - x^2 of one sign, by x and by q, so neither loses digits near its
// zeros. Minimax, errors 3.3e-8 and 5.5e-8.
REALUID_INLINE void polar(vf r, vu w, vf* cosine, vf* sine) {
  r = flip_sign(r, w);
  const vf x = low_bits(w) - 1.5f;
  const vf q = 0.25f - x * x;
  vf a = q * -3.1391587981488556e-05f - 0.0002117262192768976f;
  a = a * q - 0.0008660742896609008f;
  a = a * q - 0.0016260825796052814f;
  a = a * q - 0.0008130416390486062f;
  vf b = q * 8.915636863093823e-05f + 0.0004522120289038867f;
  b = b * q + 0.0012772269546985626f;
  b = b * q + 0.0012771200854331255f;
  *cosine = r * (a * x);
  *sine = r * (b * q);
}

// Pairs to memory order: of a half's groups, the first and third normals are cosines, the second and fourth sines.
REALUID_INLINE void interleave(vf cosine, vf sine, vf* low, vf* high) {
#if REALUID_LEVEL == 2
  *low = (vf)_mm512_unpacklo_ps((__m512)cosine, (__m512)sine), *high = (vf)_mm512_unpackhi_ps((__m512)cosine, (__m512)sine);
#elif REALUID_LEVEL == 1
  *low = (vf)_mm256_unpacklo_ps((__m256)cosine, (__m256)sine), *high = (vf)_mm256_unpackhi_ps((__m256)cosine, (__m256)sine);
#elif REALUID_X86
  *low = (vf)_mm_unpacklo_ps((__m128)cosine, (__m128)sine), *high = (vf)_mm_unpackhi_ps((__m128)cosine, (__m128)sine);
#else
  float flat[2 * WIDTH];
  for (int lane = 0; lane < WIDTH; ++lane) {
    float* pair = flat + 4 * group_of_lane(0, lane / 2) + 2 * (lane % 2);
    pair[0] = cosine[lane], pair[1] = sine[lane];
  }
  *low = load(flat), *high = load(flat + WIDTH);
#endif
}

// Normals of one group after another, the WIDTH groups of each of STEPS steps a call. Only the low word of the group differs
// between lanes and calls, so half of Philox' first two rounds happens once, and the first product, which is linear in the group,
// is added to.
//
// With two steps, the rounds of one fill the gaps in which those of the other wait for a multiplication, and Box and Muller's
// floating-point work on them runs between the rounds of the next two. That takes more registers than there are. With one step
// nearly all of it stays in registers.
template <int STEPS>
class Normals {
 public:
  static constexpr int HALVES = 2 * STEPS, COUNT = 4 * STEPS * WIDTH;

  REALUID_INLINE Normals(NoiseKey key, uint64_t first) : key_(key), first_(first) {
    const vq zero = {};
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
      keys_[round][0] = zero + uint64_t(uint32_t(key.seed) + uint32_t(round) * PHILOX_W0);
      keys_[round][1] = zero + uint64_t(uint32_t(key.seed >> 32) + uint32_t(round) * PHILOX_W1);
    }
    start();
    advance([](int) {});
  }

  // take(i, n, m) for all of the next COUNT normals, those from the i-th on in n and m. more: others will be asked for.
  template <class F>
  REALUID_INLINE void next(bool more, F&& take) {
    if (!more) {
      for (int half = 0; half < HALVES; ++half) turn(words_, half, take);
      return;
    }
    const Words<HALVES> words = words_;
    if constexpr (STEPS > 1) {
      advance([&](int half) REALUID_INLINED { turn(words, half, take); });
    } else {
      advance([](int) {});
      for (int half = 0; half < HALVES; ++half) turn(words, half, take);
    }
  }

 private:
  template <class F>
  static REALUID_INLINE void turn(const Words<HALVES>& words, int half, F&& take) {
    vf cosine, sine, low, high;
    polar(radius(words.radii[half]), words.angles[half], &cosine, &sine);
    interleave(cosine, sine, &low, &high);
    take(half * 2 * WIDTH, low, high);
  }

  // To the words of the groups from first_ on. between(half), for every half once, is done among the rounds.
  template <class F>
  REALUID_INLINE void advance(F&& between) {
    constexpr uint64_t GROUPS = STEPS * WIDTH;
    if (__builtin_expect(uint32_t(first_) < GROUPS, 0)) start();  // the low word has come round
    const vq zero = {};
    const vq m0 = zero + uint64_t(PHILOX_M0), m1 = zero + uint64_t(PHILOX_M1);
    vq c0[HALVES], c1[HALVES], c2[HALVES], c3[HALVES];
    for (int half = 0; half < HALVES; ++half) {
      c1[half] = multiply_low_halves(high_halves(product_[half]) ^ once_, m1);
      c0[half] = high_halves(c1[half]) ^ left_;
      c2[half] = product_[half] ^ right_;
      c3[half] = low_;
      product_[half] += uint64_t(PHILOX_M0) * GROUPS;
    }
#pragma GCC unroll 10
    for (int round = 2; round < PHILOX_ROUNDS - 1; ++round) {
      for (int half = 0; half < HALVES; ++half) {
        const vq p0 = multiply_low_halves(c0[half], m0), p1 = multiply_low_halves(c2[half], m1);
        c0[half] = xor3(high_halves(p1), c1[half], keys_[round][0]);
        c2[half] = xor3(high_halves(p0), c3[half], keys_[round][1]);
        c1[half] = p1, c3[half] = p0;
      }
      if (round % (8 / HALVES) == 0) between(round / (8 / HALVES) - 1);
    }
    const vu keys = interleave_low_halves(keys_[PHILOX_ROUNDS - 1][0], keys_[PHILOX_ROUNDS - 1][1]);
    for (int half = 0; half < HALVES; ++half) {
      const vq p0 = multiply_low_halves(c0[half], m0), p1 = multiply_low_halves(c2[half], m1);
      words_.radii[half] = xor3(interleave_high_halves(p1, p0), interleave_low_halves(c1[half], c3[half]), keys);
      words_.angles[half] = interleave_low_halves(p1, p0);
    }
    if (__builtin_expect((first_ ^ (first_ + GROUPS - 1)) >> 32 != 0, 0)) words_ = philox_lanes<HALVES>(key_, first_);
    first_ += GROUPS;
  }

  // The first two rounds of what does not differ between lanes, and the first product of what does.
  REALUID_INLINE void start() {
    const vq zero = {};
    const uint64_t q1 = uint64_t(PHILOX_M1) * uint32_t(key_.offset);
    const uint64_t q0 = uint64_t(PHILOX_M0) * (uint32_t(q1 >> 32) ^ uint32_t(first_ >> 32) ^ uint32_t(key_.seed));
    once_ = (zero + uint64_t(uint32_t(key_.offset >> 32))) ^ keys_[0][1];
    left_ = (zero + uint64_t(uint32_t(q1))) ^ keys_[1][0];
    right_ = (zero + uint64_t(uint32_t(q0 >> 32))) ^ keys_[1][1];
    low_ = zero + uint64_t(uint32_t(q0));
    for (int half = 0; half < HALVES; ++half) {
      vq groups;
      for (int lane = 0; lane < WIDTH / 2; ++lane) groups[lane] = uint64_t(group_of_lane(half, lane));
      product_[half] = multiply_low_halves(groups + first_, zero + uint64_t(PHILOX_M0));
    }
  }

  const NoiseKey key_;
  uint64_t first_;
  vq keys_[PHILOX_ROUNDS][2];  // as vectors: the rounds have them as operands from memory
  vq product_[HALVES];
  vq once_, left_, right_, low_;  // keys included
  Words<HALVES> words_;
};

// The next normals to memory. Not inlined: one copy of it serves all kernels.
__attribute__((noinline)) void draw(Normals<2>& normals, bool more, float* to) {
  normals.next(more, [&](int i, vf n, vf m) REALUID_INLINED {
    store(to + i, n);
    store(to + i + WIDTH, m);
  });
}

// body(i, n) for the vectors n of normals i, i + WIDTH, ... of every step from the group `first` on. IN_REGISTERS: one step at a
// time, not put down in between.
template <bool IN_REGISTERS, class F>
REALUID_INLINE void for_normals(NoiseKey key, uint64_t first, int64_t steps, F&& body) {
  if (steps == 0) return;
  const int64_t count = steps * 4 * WIDTH;
  if constexpr (IN_REGISTERS) {
    Normals<1> normals(key, first);
    constexpr int AT_ONCE = Normals<1>::COUNT;
    for (int64_t i = 0; i < count; i += AT_ONCE) {
      vf drawn[AT_ONCE / WIDTH];
      normals.next(i + AT_ONCE < count, [&](int j, vf n, vf m) REALUID_INLINED {
        drawn[j / WIDTH] = n;
        drawn[j / WIDTH + 1] = m;
      });
#pragma GCC unroll 4
      for (int j = 0; j < AT_ONCE / WIDTH; ++j) body(i + j * WIDTH, drawn[j]);
    }
  } else {
    Normals<2> normals(key, first);
    constexpr int AT_ONCE = Normals<2>::COUNT;
    alignas(VECTOR_BYTES) float drawn[AT_ONCE];
    for (int64_t i = 0; i < count; i += AT_ONCE) {
      draw(normals, i + AT_ONCE < count, drawn);
      const int left = count - i < AT_ONCE ? int(count - i) : AT_ONCE;
      for (int j = 0; j < left; j += WIDTH) body(i + j, load(drawn + j));
    }
  }
}

}  // namespace REALUID_ISA
}  // namespace
}  // namespace realuid_fast
