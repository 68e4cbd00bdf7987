// The bandwidth probe: non-temporal copies and fills where the processor has them, memcpy and memset elsewhere.
#include "bandwidth.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "arch.h"

#if REALUID_X86
#include <emmintrin.h>
#endif

namespace realuid_fast {

static void copy(char* to, const char* from, size_t bytes) {
#if REALUID_X86
  for (size_t i = 0; i < bytes; i += 64) {
    const auto* source = reinterpret_cast<const __m128i*>(from + i);
    auto* target = reinterpret_cast<__m128i*>(to + i);
    for (int j = 0; j < 4; ++j) _mm_stream_si128(target + j, _mm_load_si128(source + j));
  }
  _mm_sfence();
#else
  std::memcpy(to, from, bytes);
#endif
}

static void fill(char* to, size_t bytes) {
#if REALUID_X86
  const __m128i zero = _mm_setzero_si128();
  for (size_t i = 0; i < bytes; i += 16) _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), zero);
  _mm_sfence();
#else
  std::memset(to, 0, bytes);
#endif
}

template <class F>
static double best_seconds(int repeats, int threads, size_t slice, const F& work) {
  double best = 1e300;
  for (int r = 0; r < repeats; ++r) {
    std::vector<std::thread> pool;
    const auto start = std::chrono::steady_clock::now();
    for (int t = 1; t < threads; ++t) pool.emplace_back([&, t] { work(size_t(t) * slice); });
    work(0);
    for (auto& thread : pool) thread.join();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

Bandwidth measure_bandwidth(size_t bytes, int repeats, int threads) {
  threads = std::max(threads, 1);
  const size_t slice = std::max<size_t>(bytes / size_t(threads) / 64, 1) * 64;
  const size_t total = slice * size_t(threads);
  std::vector<char> memory(2 * total + 64, 1);
  char* from = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  char* to = from + total;
  const double copied = best_seconds(repeats, threads, slice, [&](size_t at) { copy(to + at, from + at, slice); });
  const double filled = best_seconds(repeats, threads, slice, [&](size_t at) { fill(to + at, slice); });
  return {2 * double(total) / copied / 1e9, double(total) / filled / 1e9};
}

}  // namespace realuid_fast
