// The parts that all fused calls share: the blocks that a call's work is cut into, the noise of a block, and a row's own numbers. Noise is
// drawn a few vectors at a time between the loads and stores it goes with, so that arithmetic and memory overlap; where rows and
// groups do not line up, it is drawn into a buffer in the L1 cache.
#pragma once

#include "access.h"
#include "fused.h"
#include "noise_vector.h"

namespace realuid_fast {
namespace {
namespace REALUID_ISA {

constexpr int64_t BUFFER = BLOCK;  // elements of noise drawn ahead at most: a whole unit's, for the rows that share it
constexpr int64_t SHORT = 256;     // elements of a row below which drawing ahead beats drawing between loads and stores

// A block of one row: its unit, where it lies in the row and in memory, how long it is.
struct Span {
  int64_t unit, row, first, count, offset;
};

// Calls body(span) for the first row of the groups [begin, end).
template <class F>
REALUID_INLINE void for_groups(const Shape& shape, int64_t begin, int64_t end, F&& body) {
  const int64_t blocks = shape.blocks();
  for (int64_t group = begin; group < end; ++group) {
    const int64_t row = group / blocks, first = group % blocks * BLOCK, left = shape.dim - first;
    body(Span{group, row, first, left < BLOCK ? left : BLOCK, row * shape.dim + first});
  }
}

// The same block, `rows` rows further down.
REALUID_INLINE Span below(const Shape& shape, const Span& span, int64_t rows) {
  return {span.unit + rows * shape.blocks(), span.row + rows, span.first, span.count, span.offset + rows * shape.dim};
}

// Calls body(span) for the units of the groups [begin, end): all rows that share a group's noise, then the next group.
template <class F>
REALUID_INLINE void for_spans(const Shape& shape, int64_t noise_rows, int64_t begin, int64_t end, F&& body) {
  for_groups(shape, begin, end, [&](const Span& first) {
    for (Span span = first; span.row < shape.rows; span = below(shape, span, noise_rows)) body(span);
  });
}

// Noise of a span in the arithmetic type, in pieces. Draws run ahead of short rows, which lie one after another in the stream.
template <class T>
class Noise {
  using Real = ArithmeticOf<T>;

 public:
  // `end` is the end of the groups this object will serve.
  Noise(const NoiseSource& source, const Shape& shape, int64_t end)
      : source_(source), dim_(shape.dim), shared_(source.rows < shape.rows), end_((end - 1) / shape.blocks() * dim_ + dim_) {}

  // Whether a span's noise is best drawn where it is used; otherwise get() it.
  REALUID_INLINE bool in_place(const Span& span) const {
    const int64_t from = start(span);
    return drawn() && span.count >= SHORT && from % 4 == 0 && !(from >= have_ && from + span.count <= have_ + held_);
  }

  // Memory for a span's normals, all but the last `count % step`: the caller writes them there as it draws them, for other
  // rows that use them too. Null if no other rows do.
  REALUID_INLINE Real* keep(const Span& span, int64_t step) {
    if (!shared_) return nullptr;
    have_ = start(span);
    held_ = (span.count + 3) & ~int64_t(3);
    const int64_t whole = span.count - span.count % step;
    if (whole < span.count) fill_normals(source_.key, uint64_t(have_ + whole) / 4, (held_ - whole) / 4, buffer_ + whole);
    return buffer_;
  }

  REALUID_INLINE bool drawn() const { return source_.tensor == nullptr; }
  REALUID_INLINE NoiseKey key() const { return source_.key; }

  // Element number, in the noise, of a span's first element.
  REALUID_INLINE int64_t start(const Span& span) const { return (span.row % source_.rows) * dim_ + span.first; }

  // Pointer to the `count` <= BUFFER values from the span's i-th on.
  REALUID_INLINE const Real* get(const Span& span, int64_t i, int64_t count) {
    const int64_t from = start(span) + i;
    if (drawn()) return draw(from, count);
    const T* stored = static_cast<const T*>(source_.tensor) + from;
    if constexpr (sizeof(T) == sizeof(Real)) {
      return stored;
    } else {
      constexpr int WIDE = VectorOf<Real>::width;
      int64_t j = 0;
      for (; j + WIDE <= count; j += WIDE) store(buffer_ + j, load(stored + j));
      if (j < count) store(buffer_ + j, load_first(stored + j, int(count - j)));
      return buffer_;
    }
  }

 private:
  REALUID_INLINE const Real* draw(int64_t from, int64_t count) {
    if (from < have_ || from + count > have_ + held_) {
      // Draw ahead to the end of this object's rows.
      have_ = from & ~int64_t(3);
      int64_t stop = end_;
      if (stop > have_ + BUFFER) stop = have_ + BUFFER;
      if (stop < from + count) stop = from + count;
      held_ = (stop - have_ + 3) & ~int64_t(3);
      fill_normals(source_.key, uint64_t(have_) / 4, held_ / 4, buffer_);
    }
    return buffer_ + (from - have_);
  }

  const NoiseSource& source_;
  const int64_t dim_;
  const bool shared_;
  const int64_t end_;
  int64_t have_ = 0, held_ = 0;
  alignas(64) Real buffer_[BUFFER + 64];
};

// Whether the usual case of a kernel keeps normals in registers: where that was faster, in float32 with AVX-512's 32 registers.
template <class T>
constexpr bool HELD = REALUID_LEVEL == 2 && sizeof(T) == sizeof(float);

// body(access, i, n) for every vector of a span, n its noise; zeros where none is wanted. SHARED: rows may share their noise.
template <class T, bool SHARED, bool IN_REGISTERS, class F>
REALUID_INLINE void for_noisy_vectors(bool streams, Noise<T>& noise, const Span& span, bool wanted, F&& body) {
  using V = VectorFor<T>;
  if (!wanted) return for_vectors<T>(streams, span.count, [&](auto access, int64_t i) { body(access, i, V{}); });
  int64_t done = 0;
  if constexpr (sizeof(ArithmeticOf<T>) == sizeof(float)) {
    if (noise.in_place(span)) {
      constexpr int STEP = 4 * WIDTH;
      float* const kept = SHARED ? noise.keep(span, STEP) : nullptr;
      const uint64_t group = uint64_t(noise.start(span)) / 4;
      for_normals<IN_REGISTERS>(noise.key(), group, span.count / STEP, [&](int64_t i, vf n) REALUID_INLINED {
        body(Whole{streams}, i, n);
        if (SHARED && kept != nullptr) store(kept + i, n);
      });
      done = span.count - span.count % STEP;
    }
  }
  while (done < span.count) {
    const int64_t count = span.count - done < BUFFER ? span.count - done : BUFFER;
    const auto* n = noise.get(span, done, count);
    for_vectors<T>(streams, count, [&](auto access, int64_t i) { body(access, done + i, access.in(n, i)); });
    done += count;
  }
}

template <class T>
REALUID_INLINE const ArithmeticOf<T>* coefficient_row(const void* coef, int64_t row) {
  return static_cast<const ArithmeticOf<T>*>(coef) + row * COEFFICIENTS;
}

// A row's guidance: u + scale (c - u).
template <class T>
struct Guided {
  const T* uncond;
  ArithmeticOf<T> scale = 1;

  Guided(const Guidance& guidance, const Span& span) : uncond(at<T>(guidance.uncond, span.offset)) {
    if (uncond != nullptr) scale = static_cast<const ArithmeticOf<T>*>(guidance.scales)[span.row];
  }

  template <class Access, class V>
  REALUID_INLINE V operator()(const Access& access, int64_t i, V conditional) const {
    const V u = access.in(uncond, i);
    return u + scale * (conditional - u);
  }
};

}  // namespace REALUID_ISA
}  // namespace
}  // namespace realuid_fast
