// Access of a kernel to memory: whole vectors, then the rest, streamed or not. It builds on simd.h and is included like it.
#pragma once

#include "simd.h"

namespace realuid_fast {
namespace {
namespace REALUID_ISA {

template <class T>
using ArithmeticOf = typename Arithmetic<T>::type;
template <class T>
using VectorFor = typename VectorOf<ArithmeticOf<T>>::type;

// Distance in elements at which memory is prefetched. Of 256 to 2048, 256 and 512 were best if noise is drawn in between.
constexpr int64_t AHEAD = 512;

// Access to vectors of a span: whole ones, and the rest behind them padded with zeros (which add nothing to any sum).
struct Whole {
  bool streams;
  template <class T>
  REALUID_INLINE auto in(const T* from, int64_t i) const {
    prefetch(from + i + AHEAD);
    return load(from + i);
  }
  template <class T, class V>
  REALUID_INLINE void out(T* to, int64_t i, V v) const {
    if (streams)
      stream(to + i, v);
    else
      store(to + i, v);
  }
};

struct Rest {
  int n;
  template <class T>
  REALUID_INLINE auto in(const T* from, int64_t i) const {
    return load_first(from + i, n);
  }
  template <class T, class V>
  REALUID_INLINE void out(T* to, int64_t i, V v) const {
    store_first(to + i, v, n);
  }
};

// body(access, i) for every vector of `count` elements.
template <class T, class F>
REALUID_INLINE void for_vectors(bool streams, int64_t count, F&& body) {
  constexpr int WIDE = VectorOf<ArithmeticOf<T>>::width;
  int64_t i = 0;
  for (; i + WIDE <= count; i += WIDE) body(Whole{streams}, i);
  if (i < count) body(Rest{int(count - i)}, i);
}

// Streaming needs every vector of the span aligned, in every output.
template <class T, class... P>
REALUID_INLINE bool aligned(const P*... outputs) {
  const uintptr_t mask = sizeof(VectorFor<T>) * sizeof(T) / sizeof(ArithmeticOf<T>) - 1;
  return (((reinterpret_cast<uintptr_t>(outputs)) & mask) | ... | 0) == 0;
}

template <class T>
REALUID_INLINE const T* at(const void* base, int64_t offset) {
  return base == nullptr ? nullptr : static_cast<const T*>(base) + offset;
}
template <class T>
REALUID_INLINE T* at(void* base, int64_t offset) {
  return base == nullptr ? nullptr : static_cast<T*>(base) + offset;
}

}  // namespace REALUID_ISA
}  // namespace
}  // namespace realuid_fast
