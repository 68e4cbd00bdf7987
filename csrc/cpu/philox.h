// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), one counter at a time.
#pragma once

#include <cstdint>

namespace realuid_fast {

constexpr uint32_t PHILOX_M0 = 0xD2511F53u, PHILOX_M1 = 0xCD9E8D57u;  // round multipliers
constexpr uint32_t PHILOX_W0 = 0x9E3779B9u, PHILOX_W1 = 0xBB67AE85u;  // key increments
constexpr int PHILOX_ROUNDS = 10;

// The stream a call draws from: the 64-bit seed and the 64-bit stream offset, two words of key and two of counter.
struct NoiseKey {
  uint64_t seed, offset;
};

// counter -> four words, in place.
inline void philox(uint32_t key0, uint32_t key1, uint32_t counter[4]) {
  for (int round = 0; round < PHILOX_ROUNDS; ++round) {
    const uint64_t p0 = uint64_t(PHILOX_M0) * counter[0], p1 = uint64_t(PHILOX_M1) * counter[2];
    const uint32_t next[4] = {uint32_t(p1 >> 32) ^ counter[1] ^ key0, uint32_t(p1), uint32_t(p0 >> 32) ^ counter[3] ^ key1,
                              uint32_t(p0)};
    for (int i = 0; i < 4; ++i) counter[i] = next[i];
    key0 += PHILOX_W0;
    key1 += PHILOX_W1;
  }
}

inline void philox_words(NoiseKey key, uint64_t group, uint32_t words[4]) {
  words[0] = uint32_t(group);
  words[1] = uint32_t(group >> 32);
  words[2] = uint32_t(key.offset);
  words[3] = uint32_t(key.offset >> 32);
  philox(uint32_t(key.seed), uint32_t(key.seed >> 32), words);
}

}  // namespace realuid_fast
