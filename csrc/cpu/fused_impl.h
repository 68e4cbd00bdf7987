// The fused calls on vectors: one pass over the tensors, noise drawn chunk by chunk into a buffer that stays in the L1 cache.
#include "fused.h"
#include "simd.h"

namespace realuid_fast {
namespace {
namespace REALUID_ISA {

constexpr int64_t CHUNK = 1024;  // elements between two draws of noise and two additions in double

template <class T>
using ArithmeticOf = typename Arithmetic<T>::type;
template <class T>
using VectorFor = typename VectorOf<ArithmeticOf<T>>::type;

// A chunk of one row: where it lies in memory and in the noise, and how long it is.
struct Chunk {
  int64_t row, first, count;  // first: offset inside the row
};

// Splits the units [begin, end) into chunks and calls body(chunk, unit), in order.
template <class F>
REALUID_INLINE void for_chunks(const Shape& shape, int64_t begin, int64_t end, F&& body) {
  const int64_t blocks = shape.blocks();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / blocks, start = (unit % blocks) * BLOCK;
    const int64_t stop = start + BLOCK < shape.dim ? start + BLOCK : shape.dim;
    for (int64_t first = start; first < stop; first += CHUNK)
      body(Chunk{row, first, first + CHUNK < stop ? CHUNK : stop - first}, unit);
  }
}

// Noise of a chunk in the arithmetic type. Draws run ahead of short rows, which lie one after another in the stream.
template <class T>
class Noise {
  using Real = ArithmeticOf<T>;

 public:
  // `begin` and `end` are the units this object will serve.
  Noise(const NoiseSource& source, const Shape& shape, int64_t begin, int64_t end)
      : source_(source), dim_(shape.dim), rows_ahead_(end == begin ? 0 : (end - 1) / shape.blocks() + 1) {}

  // Pointer to chunk.count values; reads of a vector's width past them stay inside the allocation only for drawn noise.
  REALUID_INLINE const Real* get(const Chunk& chunk) {
    const int64_t noise_row = chunk.row % source_.rows;
    const int64_t start = noise_row * dim_ + chunk.first;
    if (source_.tensor == nullptr) return draw(start, chunk.count, chunk.row - noise_row);
    const T* from = static_cast<const T*>(source_.tensor) + start;
    if constexpr (sizeof(T) == sizeof(Real)) {
      return from;
    } else {
      constexpr int W = VectorOf<Real>::width;
      int64_t i = 0;
      for (; i + W <= chunk.count; i += W) store(buffer_ + i, load(from + i));
      if (i < chunk.count) store(buffer_ + i, load_first(from + i, int(chunk.count - i)));
      return buffer_;
    }
  }

 private:
  REALUID_INLINE const Real* draw(int64_t start, int64_t count, int64_t row_shift) {
    if (start < have_ || start + count > have_ + held_) {
      // The last element that this object can be asked for in this round through the noise rows.
      int64_t last_row = rows_ahead_ - row_shift;
      if (last_row > source_.rows) last_row = source_.rows;
      int64_t stop = last_row * dim_;
      have_ = start & ~int64_t(3);
      if (stop > have_ + CHUNK) stop = have_ + CHUNK;
      if (stop < start + count) stop = start + count;
      const int64_t groups = (stop - have_ + 3) / 4;
      held_ = 4 * groups;
      fill_normals(source_.key, uint64_t(have_) / 4, groups, buffer_);
    }
    return buffer_ + (start - have_);
  }

  const NoiseSource& source_;
  const int64_t dim_, rows_ahead_;
  int64_t have_ = 0, held_ = 0;
  alignas(64) Real buffer_[CHUNK + 64];
};

template <class T>
struct alignas(64) Zeros {
  T value[CHUNK] = {};
};

// Access to a chunk's vectors: whole ones, and the rest behind them padded with zeros (which add nothing to any sum).
template <bool STREAM>
struct Whole {
  template <class T>
  REALUID_INLINE auto in(const T* from, int64_t i) const {
    return load(from + i);
  }
  template <class T, class V>
  REALUID_INLINE void out(T* to, int64_t i, V v) const {
    if constexpr (STREAM)
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

// body(access, i) for every vector of a chunk of `count` elements.
template <class T, bool STREAM, class F>
REALUID_INLINE void for_vectors(int64_t count, F&& body) {
  constexpr int W = VectorOf<ArithmeticOf<T>>::width;
  int64_t i = 0;
  for (; i + W <= count; i += W) body(Whole<STREAM>{}, i);
  if (i < count) body(Rest{int(count - i)}, i);
}

// Streaming needs every vector of the chunk aligned, in every output.
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

template <class T>
REALUID_INLINE const ArithmeticOf<T>* coefficient_row(const void* coef, int64_t row) {
  return static_cast<const ArithmeticOf<T>*>(coef) + row * COEFFICIENTS;
}

// --- x_t = a x + b y + c n --------------------------------------------------------------------------------------------

template <class T, bool ENDPOINT, bool STREAM>
REALUID_INLINE void interpolate_chunk(const T* x, const T* y, const ArithmeticOf<T>* n, const ArithmeticOf<T>* coef, T* out,
                                      int64_t count) {
  const auto a = coef[A], b = coef[B], c = coef[C];
  for_vectors<T, STREAM>(count, [&](auto access, int64_t i) {
    auto v = a * access.in(x, i) + c * access.in(n, i);
    if constexpr (ENDPOINT) v += b * access.in(y, i);
    access.out(out, i, v);
  });
}

template <class T>
void interpolate(const InterpolateArgs& args, int64_t begin, int64_t end) {
  using Real = ArithmeticOf<T>;
  static constexpr Zeros<Real> zeros{};
  Noise<T> noise(args.noise, args.shape, begin, end);
  for_chunks(args.shape, begin, end, [&](const Chunk& chunk, int64_t) {
    const int64_t offset = chunk.row * args.shape.dim + chunk.first;
    const Real* coef = coefficient_row<T>(args.coef, chunk.row);
    const Real* n = coef[C] == 0 ? zeros.value : noise.get(chunk);
    const T *x = at<T>(args.x, offset), *y = at<T>(args.y, offset);
    T* out = at<T>(args.out, offset);
    const bool stream = args.stream && aligned<T>(out);
    if (y != nullptr)
      stream ? interpolate_chunk<T, true, true>(x, y, n, coef, out, chunk.count)
             : interpolate_chunk<T, true, false>(x, y, n, coef, out, chunk.count);
    else
      stream ? interpolate_chunk<T, false, true>(x, y, n, coef, out, chunk.count)
             : interpolate_chunk<T, false, false>(x, y, n, coef, out, chunk.count);
  });
  if (args.stream) stream_fence();
}

// --- normals ----------------------------------------------------------------------------------------------------------

template <class T>
void normal(const NormalArgs& args, int64_t begin, int64_t end) {
  Noise<T> noise(args.noise, args.shape, begin, end);
  for_chunks(args.shape, begin, end, [&](const Chunk& chunk, int64_t) {
    T* out = at<T>(args.out, chunk.row * args.shape.dim + chunk.first);
    const auto* n = noise.get(chunk);
    const auto copy = [&](auto access, int64_t i) { access.out(out, i, access.in(n, i)); };
    if (args.stream && aligned<T>(out))
      for_vectors<T, true>(chunk.count, copy);
    else
      for_vectors<T, false>(chunk.count, copy);
  });
  if (args.stream) stream_fence();
}

// --- out = factor * in -------------------------------------------------------------------------------------------------

template <class T>
void scale(const ScaleArgs& args, int64_t begin, int64_t end) {
  using Real = ArithmeticOf<T>;
  for_chunks(args.shape, begin, end, [&](const Chunk& chunk, int64_t) {
    const int64_t at_factor = chunk.row * args.stride;
    const double wide = args.wide ? static_cast<const double*>(args.factors)[at_factor]
                                  : static_cast<const float*>(args.factors)[at_factor];
    if (args.skip_one && wide == 1.0) return;
    const Real factor = Real(wide);
    const int64_t offset = chunk.row * args.shape.dim + chunk.first;
    const T* in = at<T>(args.in, offset);
    T* out = at<T>(args.out, offset);
    const auto multiply = [&](auto access, int64_t i) { access.out(out, i, factor * access.in(in, i)); };
    if (args.stream && aligned<T>(out))
      for_vectors<T, true>(chunk.count, multiply);
    else
      for_vectors<T, false>(chunk.count, multiply);
  });
  if (args.stream) stream_fence();
}

// --- fake: l = w (A f^2 - 2 f (B tgt + D f*) + C tgt^2), g = dl/dF = 2 w k_out (A f - B tgt - D f*) --------------------

// A row's constants. For A != 0 the loss is summed as e^2 / A + tgt (c2 tgt + c3 f*) + c4 f*^2 with e = A f - B tgt - D f*:
// the square is complete, so nothing cancels where f is near its optimum, and c2, c3, c4 vanish for the usual objectives.
template <class Real>
struct FakeRow {
  Real k_out, k_x, p, q, s;
  Real a, b, d;
  Real inverse_a, cross, c2, c3, c4;
  Real gradient;

  FakeRow(const Real* coef, const FakeHalf& half, double scale)
      : k_out(coef[K_OUT]), k_x(coef[K_X]), p(coef[P]), q(coef[Q]), s(coef[S]), a(Real(half.a)), b(Real(half.b)),
        d(Real(half.d)), gradient(Real(2.0 * scale * double(coef[W]) * double(coef[K_OUT]))) {
    if (half.a != 0) {
      const double residual = half.c - half.b * half.b / half.a;
      // Rounding of the scalars themselves must not leave a term behind.
      const bool complete = residual * residual < 1e-28 * (half.c * half.c);
      inverse_a = Real(1 / half.a);
      cross = 0;
      c2 = complete ? Real(0) : Real(residual);
      c3 = Real(-2 * half.b * half.d / half.a);
      c4 = Real(-half.d * half.d / half.a);
    } else {
      inverse_a = 0;
      cross = -2;
      c2 = Real(half.c);
      c3 = c4 = 0;
    }
  }
};

template <class T, bool TEACHER, bool EXTRA, bool STREAM>
REALUID_INLINE double fake_chunk(const FakeRow<ArithmeticOf<T>>& k, const T* fake, const T* teacher, const T* x, const T* x_t,
                                 const T* y, const ArithmeticOf<T>* n, T* g_fake, int64_t count) {
  using V = VectorFor<T>;
  V sum = {}, rest = {};
  for_vectors<T, STREAM>(count, [&](auto access, int64_t i) {
    V target = k.p * access.in(x, i) + k.s * access.in(n, i);
    V shift = {};
    if constexpr (EXTRA) {
      if (y != nullptr) target += k.q * access.in(y, i);
      if (x_t != nullptr) shift = k.k_x * access.in(x_t, i);
    }
    V f = k.k_out * access.in(fake, i);
    if constexpr (EXTRA) f += shift;
    V pull = k.b * target, other = {};
    if constexpr (TEACHER) {
      other = k.k_out * access.in(teacher, i);
      if constexpr (EXTRA) other += shift;
      pull += k.d * other;
    }
    const V e = k.a * f - pull;
    sum += e * e;
    if constexpr (TEACHER)
      rest += target * (k.c2 * target + k.c3 * other) + (k.c4 * other) * other + (k.cross * f) * pull;
    else
      rest += target * (k.c2 * target) + (k.cross * f) * pull;
    if (g_fake != nullptr) access.out(g_fake, i, k.gradient * e);
  });
  return double(k.inverse_a) * sum_lanes(sum) + sum_lanes(rest);
}

template <class T, bool TEACHER, bool EXTRA>
REALUID_INLINE double fake_chunk_to(const FakeRow<ArithmeticOf<T>>& k, const T* fake, const T* teacher, const T* x,
                                    const T* x_t, const T* y, const ArithmeticOf<T>* n, T* g_fake, int64_t count,
                                    bool stream) {
  return stream ? fake_chunk<T, TEACHER, EXTRA, true>(k, fake, teacher, x, x_t, y, n, g_fake, count)
                : fake_chunk<T, TEACHER, EXTRA, false>(k, fake, teacher, x, x_t, y, n, g_fake, count);
}

template <class T>
void fake(const FakeArgs& args, int64_t begin, int64_t end) {
  using Real = ArithmeticOf<T>;
  static constexpr Zeros<Real> zeros{};
  Noise<T> noise(args.noise, args.shape, begin, end);
  for (int64_t unit = begin; unit < end; ++unit) args.partial[unit] = 0;
  for_chunks(args.shape, begin, end, [&](const Chunk& chunk, int64_t unit) {
    const int64_t offset = chunk.row * args.shape.dim + chunk.first;
    const Real* coef = coefficient_row<T>(args.coef, chunk.row);
    const FakeHalf& half = args.half[chunk.row < args.generated ? 0 : 1];
    const FakeRow<Real> k(coef, half, args.scale);
    const Real* n = coef[S] == 0 ? zeros.value : noise.get(chunk);
    const T *f = at<T>(args.fake, offset), *x = at<T>(args.x, offset), *y = at<T>(args.y, offset);
    const T* teacher = half.d == 0 ? nullptr : at<T>(args.teacher, offset);
    const T* x_t = coef[K_X] == 0 ? nullptr : at<T>(args.x_t, offset);
    T* g = at<T>(args.g_fake, offset);
    const bool stream = args.stream && aligned<T>(g), extra = x_t != nullptr || y != nullptr;
    double sum;
    if (teacher != nullptr)
      sum = extra ? fake_chunk_to<T, true, true>(k, f, teacher, x, x_t, y, n, g, chunk.count, stream)
                  : fake_chunk_to<T, true, false>(k, f, teacher, x, x_t, y, n, g, chunk.count, stream);
    else
      sum = extra ? fake_chunk_to<T, false, true>(k, f, teacher, x, x_t, y, n, g, chunk.count, stream)
                  : fake_chunk_to<T, false, false>(k, f, teacher, x, x_t, y, n, g, chunk.count, stream);
    args.partial[unit] += double(coef[W]) * sum;
  });
  if (args.stream) stream_fence();
}

// --- generator: D = f* - f, r = alpha f* - beta tgt, l = w (-Q k^2 D^2 + 2 k D r) --------------------------------------

// With u = 2 k r - 2 Q k^2 D:  l = w D (u + Q k^2 D),  dl/df* = w (u + 2 alpha k D),  dl/df = -w u,  dl/dtgt = -2 w beta k D,
// and D = k_out (F* - F) exactly: the shift k_x x_t drops out.
template <class Real>
struct GeneratorRow {
  Real k_out, alpha, x_t, p, q, s, d_in_u;  // u = alpha F* + x_t x_t - p x - q y - s n - d_in_u D
  Real half_d;                              // D (u + half_d D) is the loss
  Real outer, teacher_d, g_x, g_x_t;        // gradients: outer (u + teacher_d D), -outer u, g_x D, g_x_t D

  GeneratorRow(const Real* coef, const GeneratorArgs& args) {
    const double k = args.kappa, w = double(coef[W]) * args.scale, ko = coef[K_OUT], kx = coef[K_X];
    k_out = Real(ko);
    alpha = Real(2 * k * args.alpha * ko);
    x_t = Real(2 * k * args.alpha * kx);
    p = Real(2 * k * args.beta * double(coef[P]));
    q = Real(2 * k * args.beta * double(coef[Q]));
    s = Real(2 * k * args.beta * double(coef[S]));
    d_in_u = Real(2 * args.q * k * k);
    half_d = Real(args.q * k * k);
    outer = Real(w * ko);
    teacher_d = Real(2 * args.alpha * k);
    g_x = Real(-2 * args.beta * k * w * double(coef[P]));
    g_x_t = Real(2 * args.alpha * k * w * kx);
  }
};

template <class T, bool EXTRA, bool STREAM>
REALUID_INLINE double generator_chunk(const GeneratorRow<ArithmeticOf<T>>& k, const T* teacher, const T* fake, const T* x,
                                      const T* x_t, const T* y, const ArithmeticOf<T>* n, T* g_teacher, T* g_fake, T* g_x,
                                      T* g_x_t, int64_t count) {
  using V = VectorFor<T>;
  V sum = {};
  for_vectors<T, STREAM>(count, [&](auto access, int64_t i) {
    const V t = access.in(teacher, i);
    const V d = k.k_out * (t - access.in(fake, i));
    V u = k.alpha * t - k.p * access.in(x, i) - k.s * access.in(n, i) - k.d_in_u * d;
    if constexpr (EXTRA) {
      if (y != nullptr) u -= k.q * access.in(y, i);
      if (x_t != nullptr) u += k.x_t * access.in(x_t, i);
    }
    sum += d * (u + k.half_d * d);
    if (g_teacher != nullptr) access.out(g_teacher, i, k.outer * (u + k.teacher_d * d));
    if (g_fake != nullptr) access.out(g_fake, i, -k.outer * u);
    if (g_x != nullptr) access.out(g_x, i, k.g_x * d);
    if constexpr (EXTRA)
      if (g_x_t != nullptr) access.out(g_x_t, i, k.g_x_t * d);
  });
  return sum_lanes(sum);
}

template <class T>
void generator(const GeneratorArgs& args, int64_t begin, int64_t end) {
  using Real = ArithmeticOf<T>;
  static constexpr Zeros<Real> zeros{};
  Noise<T> noise(args.noise, args.shape, begin, end);
  for (int64_t unit = begin; unit < end; ++unit) args.partial[unit] = 0;
  for_chunks(args.shape, begin, end, [&](const Chunk& chunk, int64_t unit) {
    const int64_t offset = chunk.row * args.shape.dim + chunk.first;
    const Real* coef = coefficient_row<T>(args.coef, chunk.row);
    const GeneratorRow<Real> k(coef, args);
    const Real* n = coef[S] == 0 ? zeros.value : noise.get(chunk);
    const T *t = at<T>(args.teacher, offset), *f = at<T>(args.fake, offset), *x = at<T>(args.x, offset);
    const T *y = at<T>(args.y, offset), *x_t = coef[K_X] == 0 ? nullptr : at<T>(args.x_t, offset);
    T *gt = at<T>(args.g_teacher, offset), *gf = at<T>(args.g_fake, offset), *gx = at<T>(args.g_x, offset);
    T* gxt = at<T>(args.g_x_t, offset);
    const bool stream = args.stream && aligned<T>(gt, gf, gx, gxt);
    const bool extra = x_t != nullptr || y != nullptr || gxt != nullptr;
    double sum;
    if (extra)
      sum = stream ? generator_chunk<T, true, true>(k, t, f, x, x_t, y, n, gt, gf, gx, gxt, chunk.count)
                   : generator_chunk<T, true, false>(k, t, f, x, x_t, y, n, gt, gf, gx, gxt, chunk.count);
    else
      sum = stream ? generator_chunk<T, false, true>(k, t, f, x, x_t, y, n, gt, gf, gx, gxt, chunk.count)
                   : generator_chunk<T, false, false>(k, t, f, x, x_t, y, n, gt, gf, gx, gxt, chunk.count);
    args.partial[unit] += double(coef[W]) * sum;
  });
  if (args.stream) stream_fence();
}

template <class T>
constexpr Kernels kernels_for() {
  return {interpolate<T>, fake<T>, generator<T>, scale<T>, normal<T>};
}

}  // namespace REALUID_ISA
}  // namespace

namespace REALUID_TABLE {

const Kernels table[DTYPES] = {
    REALUID_ISA::kernels_for<float>(),
    REALUID_ISA::kernels_for<BFloat16>(),
    REALUID_ISA::kernels_for<Half>(),
    REALUID_ISA::kernels_for<double>(),
};

}  // namespace REALUID_TABLE
}  // namespace realuid_fast
