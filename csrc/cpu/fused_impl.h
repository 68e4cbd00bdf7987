// The fused calls on vectors: one pass over the tensors each.
#pragma once

#include "spans.h"

namespace realuid_fast {
namespace {
namespace REALUID_ISA {

// --- x_t = a x + b y + c n --------------------------------------------------------------------------------------------

template <class T>
void interpolate(const InterpolateArgs& args, int64_t begin, int64_t end) {
  Noise<T> noise(args.noise, args.shape, end);
  for_spans(args.shape, args.noise.rows, begin, end, [&](const Span& span) {
    const auto* coef = coefficient_row<T>(args.coef, span.row);
    const T *x = at<T>(args.x, span.offset), *y = at<T>(args.y, span.offset);
    T* out = at<T>(args.out, span.offset);
    const auto a = coef[A], b = coef[B], c = coef[C];
    const bool streams = args.stream && aligned<T>(out);
    for_noisy_vectors<T, true, false>(streams, noise, span, c != 0, [&](auto access, int64_t i, auto n) REALUID_INLINED {
      auto v = a * access.in(x, i) + c * n;
      if (y != nullptr) v += b * access.in(y, i);
      access.out(out, i, v);
    });
  });
  if (args.stream) stream_fence();
}

// --- normals ----------------------------------------------------------------------------------------------------------

template <class T>
void normal(const NormalArgs& args, int64_t begin, int64_t end) {
  Noise<T> noise(args.noise, args.shape, end);
  for_spans(args.shape, args.noise.rows, begin, end, [&](const Span& span) {
    T* out = at<T>(args.out, span.offset);
    const bool streams = args.stream && aligned<T>(out);
    for_noisy_vectors<T, true, false>(streams, noise, span, true,
                                      [&](auto access, int64_t i, auto n) REALUID_INLINED { access.out(out, i, n); });
  });
  if (args.stream) stream_fence();
}

// --- out = factor * in -------------------------------------------------------------------------------------------------

template <class T>
void scale(const ScaleArgs& args, int64_t begin, int64_t end) {
  using Real = ArithmeticOf<T>;
  for_spans(args.shape, args.shape.rows, begin, end, [&](const Span& span) {
    const int64_t at_factor = span.row * args.stride;
    const double wide = args.wide ? static_cast<const double*>(args.factors)[at_factor]
                                  : static_cast<const float*>(args.factors)[at_factor];
    if (args.skip_one && wide == 1.0) return;
    const Real factor = Real(wide);
    const T* in = at<T>(args.in, span.offset);
    T* out = at<T>(args.out, span.offset);
    for_vectors<T>(args.stream && aligned<T>(out), span.count,
                   [&](auto access, int64_t i) { access.out(out, i, factor * access.in(in, i)); });
  });
  if (args.stream) stream_fence();
}

// --- mean |x - f*| ------------------------------------------------------------------------------------------------------

template <class T>
void error(const ErrorArgs& args, int64_t begin, int64_t end) {
  using V = VectorFor<T>;
  for_spans(args.shape, args.shape.rows, begin, end, [&](const Span& span) {
    const auto* coef = coefficient_row<T>(args.coef, span.row);
    const T *teacher = at<T>(args.teacher, span.offset), *x = at<T>(args.x, span.offset);
    const T* x_t = coef[K_X] == 0 ? nullptr : at<T>(args.x_t, span.offset);
    const Guided<T> guided(args.guidance, span);
    const auto k_out = coef[K_OUT], k_x = coef[K_X];
    V sum = {};
    for_vectors<T>(false, span.count, [&](auto access, int64_t i) {
      V t = access.in(teacher, i);
      if (guided.uncond != nullptr) t = guided(access, i, t);
      V e = access.in(x, i) - k_out * t;
      if (x_t != nullptr) e -= k_x * access.in(x_t, i);
      sum += e < 0 ? -e : e;
    });
    args.partial[span.unit] = sum_lanes(sum) / double(args.shape.dim);
  });
}

// --- fake: l = w (A f^2 - 2 f (B tgt + D f*) + C tgt^2), g = dl/dF = 2 w k_out (A f - B tgt - D f*) --------------------

// A row's constants, with e = A f - B tgt - D f*. Where D = 0 and C = B^2 / A, as for the usual objectives, the loss is the
// square e^2 / A, and nothing cancels where f is near its optimum. Elsewhere it is summed as it is written, f (e - B tgt -
// D f*) + C tgt^2: completing the square would add and subtract (B tgt + D f*)^2 / A, which drowns the loss where A is small.
// They are vectors, so that the loop has them as operands from memory where it runs out of registers.
template <class T>
struct FakeRow {
  using Real = ArithmeticOf<T>;
  using V = VectorFor<T>;
  V k_out, k_x, p, q, s;
  V a, b, d;
  double inverse_a;  // of the square, else 0
  V open, c;         // 1 and C where the loss is summed as it is written, else 0
  V gradient;
  bool square;

  FakeRow(const Real* coef, const FakeHalf& half, double scale)
      : k_out(V{} + coef[K_OUT]), k_x(V{} + coef[K_X]), p(V{} + coef[P]), q(V{} + coef[Q]), s(V{} + coef[S]),
        a(V{} + Real(half.a)), b(V{} + Real(half.b)), d(V{} + Real(half.d)),
        gradient(V{} + Real(2.0 * scale * double(coef[W]) * double(coef[K_OUT]))) {
    const double residual = half.c - half.b * half.b / half.a;
    // Rounding of the scalars themselves must not leave a term behind.
    square = half.a != 0 && half.d == 0 && residual * residual < 1e-28 * (half.c * half.c);
    inverse_a = square ? 1 / half.a : 0;
    open = V{} + Real(square ? 0 : 1);
    c = V{} + Real(square ? 0 : half.c);
  }
};

// The fake loss on a block of one row.
template <class T>
struct FakeSpan {
  using Real = ArithmeticOf<T>;
  Span span;
  FakeRow<T> k;
  const T *fake, *teacher, *x, *x_t, *y;
  T* g_fake;
  Guided<T> guided;
  double weight;
  bool noisy, extra;

  FakeSpan(const FakeArgs& args, const Span& place, const Real* coef, const FakeHalf& half)
      : span(place),
        k(coef, half, args.scale),
        fake(at<T>(args.fake, span.offset)),
        teacher(half.d == 0 ? nullptr : at<T>(args.teacher, span.offset)),
        x(at<T>(args.x, span.offset)),
        x_t(coef[K_X] == 0 ? nullptr : at<T>(args.x_t, span.offset)),
        y(at<T>(args.y, span.offset)),
        g_fake(at<T>(args.g_fake, span.offset)),
        guided(args.guidance, span),
        weight(coef[W]),
        noisy(coef[S] != 0),
        extra(x_t != nullptr || y != nullptr) {}
  FakeSpan(const FakeArgs& args, const Span& place)
      : FakeSpan(args, place, coefficient_row<T>(args.coef, place.row), args.half[place.row < args.generated ? 0 : 1]) {}

  bool goes_with(const FakeSpan& other) const {
    return noisy == other.noisy && extra == other.extra && (teacher == nullptr) == (other.teacher == nullptr);
  }

  // Whether the row needs only the published loss and its gradient.
  bool plain() const { return k.square && teacher == nullptr && !extra && g_fake != nullptr; }

  template <bool TEACHER, bool EXTRA, bool GUIDED, bool PLAIN, class Access, class V>
  REALUID_INLINE void add(const Access& access, int64_t i, V n, V& sum, V& rest) const {
    V target = k.p * access.in(x, i) + k.s * n;
    V f = k.k_out * access.in(fake, i);
    V shift = {};
    if constexpr (EXTRA) {
      if (y != nullptr) target += k.q * access.in(y, i);
      if (x_t != nullptr) shift = k.k_x * access.in(x_t, i);
      f += shift;
    }
    V pull = k.b * target;
    if constexpr (TEACHER) {
      V other = access.in(teacher, i);
      if constexpr (GUIDED) other = guided(access, i, other);
      other *= k.k_out;
      if constexpr (EXTRA) other += shift;
      pull += k.d * other;
    }
    const V e = k.a * f - pull;
    if constexpr (!PLAIN) rest += (k.open * f) * (e - pull) + (k.c * target) * target;
    sum += e * e;
    if (PLAIN || g_fake != nullptr) access.out(g_fake, i, k.gradient * e);
  }
};

// ROWS spans on the same noise, which no others use if they are several.
template <class T, int ROWS, bool TEACHER, bool EXTRA, bool GUIDED, bool PLAIN = false>
REALUID_INLINE void fake_spans(const FakeArgs& args, Noise<T>& noise, const FakeSpan<T>* spans) {
  using V = VectorFor<T>;
  V sum[ROWS] = {}, rest[ROWS] = {};
  const bool streams = args.stream && aligned<T>(spans[0].g_fake, spans[ROWS - 1].g_fake);
  const auto add = [&](auto access, int64_t i, V n) REALUID_INLINED {
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; ++r) spans[r].template add<TEACHER, EXTRA, GUIDED, PLAIN>(access, i, n, sum[r], rest[r]);
  };
  for_noisy_vectors<T, ROWS == 1, PLAIN && HELD<T>>(streams, noise, spans[0].span, spans[0].noisy, add);
  for (int r = 0; r < ROWS; ++r)
    args.partial[spans[r].span.unit] = spans[r].weight * (spans[r].k.inverse_a * sum_lanes(sum[r]) + sum_lanes(rest[r]));
}

template <class T, int ROWS>
REALUID_INLINE void fake_spans(const FakeArgs& args, Noise<T>& noise, const FakeSpan<T>* spans) {
  if (spans[0].plain() && spans[ROWS - 1].plain())
    fake_spans<T, ROWS, false, false, false, true>(args, noise, spans);
  else if (spans->teacher == nullptr)
    spans->extra ? fake_spans<T, ROWS, false, true, false>(args, noise, spans)
                 : fake_spans<T, ROWS, false, false, false>(args, noise, spans);
  else if (spans->guided.uncond != nullptr)
    fake_spans<T, ROWS, true, true, true>(args, noise, spans);
  else
    spans->extra ? fake_spans<T, ROWS, true, true, false>(args, noise, spans)
                 : fake_spans<T, ROWS, true, false, false>(args, noise, spans);
}

template <class T>
void fake(const FakeArgs& args, int64_t begin, int64_t end) {
  Noise<T> noise(args.noise, args.shape, end);
  const int64_t apart = args.noise.rows;
  for_groups(args.shape, begin, end, [&](const Span& first) {
    // A generated row and the real one that shares its noise, side by side: the memory of both goes with one drawing.
    if (first.row + apart < args.shape.rows && first.row + 2 * apart >= args.shape.rows) {
      const FakeSpan<T> spans[2] = {{args, first}, {args, below(args.shape, first, apart)}};
      if (spans[0].goes_with(spans[1])) return fake_spans<T, 2>(args, noise, spans);
    }
    for (Span span = first; span.row < args.shape.rows; span = below(args.shape, span, apart)) {
      const FakeSpan<T> alone(args, span);
      fake_spans<T, 1>(args, noise, &alone);
    }
  });
  if (args.stream) stream_fence();
}

// --- generator: D = f* - f, r = alpha f* - beta tgt, l = w (-Q k^2 D^2 + 2 k D r) --------------------------------------

// With u = 2 k r - 2 Q k^2 D:  l = w D (u + Q k^2 D),  dl/df* = w (u + 2 alpha k D),  dl/df = -w u,  dl/dtgt = -2 w beta k D,
// and D = k_out (F* - F) exactly: the shift k_x x_t drops out.
// A row's constants, vectors as in FakeRow.
template <class T>
struct GeneratorRow {
  using Real = ArithmeticOf<T>;
  using V = VectorFor<T>;
  V k_out, alpha, x_t, p, q, s, d_in_u;  // u = alpha F* + x_t x_t - p x - q y - s n - d_in_u D
  V half_d;                              // D (u + half_d D) is the loss
  V outer, teacher_d, g_x, g_x_t;        // gradients: outer (u + teacher_d D), -outer u, g_x D, g_x_t D

  GeneratorRow(const Real* coef, const GeneratorArgs& args, int64_t row) {
    const double k = args.kappa, w = double(coef[W]) * args.scale, ko = coef[K_OUT], kx = coef[K_X];
    const double square = args.q_rows == nullptr ? args.q : double(static_cast<const Real*>(args.q_rows)[row]);
    k_out = V{} + Real(ko);
    alpha = V{} + Real(2 * k * args.alpha * ko);
    x_t = V{} + Real(2 * k * args.alpha * kx);
    p = V{} + Real(2 * k * args.beta * double(coef[P]));
    q = V{} + Real(2 * k * args.beta * double(coef[Q]));
    s = V{} + Real(2 * k * args.beta * double(coef[S]));
    d_in_u = V{} + Real(2 * square * k * k);
    half_d = V{} + Real(square * k * k);
    outer = V{} + Real(w * ko);
    teacher_d = V{} + Real(2 * args.alpha * k);
    g_x = V{} + Real(-2 * args.beta * k * w * double(coef[P]));
    g_x_t = V{} + Real(2 * args.alpha * k * w * kx);
  }
};

template <class T>
struct GeneratorInputs {
  const T *teacher, *fake, *x, *x_t, *y;
  T *g_teacher, *g_fake, *g_x, *g_x_t, *g_uncond;
};

template <class T, bool EXTRA, bool GUIDED = false, bool ALL = false>
REALUID_INLINE double generator_span(bool streams, Noise<T>& noise, const Span& span, bool noisy,
                                     const GeneratorRow<T>& k, const GeneratorInputs<T>& in,
                                     const Guided<T>& guided) {
  using V = VectorFor<T>;
  V sum = {};
  constexpr bool HOLD = ALL && HELD<T>;
  for_noisy_vectors<T, false, HOLD>(streams, noise, span, noisy, [&](auto access, int64_t i, V n) REALUID_INLINED {
    V t = access.in(in.teacher, i);
    if constexpr (GUIDED) t = guided(access, i, t);
    const V d = k.k_out * (t - access.in(in.fake, i));
    V u = k.alpha * t - k.p * access.in(in.x, i) - k.s * n - k.d_in_u * d;
    if constexpr (EXTRA) {
      if (in.y != nullptr) u -= k.q * access.in(in.y, i);
      if (in.x_t != nullptr) u += k.x_t * access.in(in.x_t, i);
    }
    sum += d * (u + k.half_d * d);
    if constexpr (GUIDED) {
      const V g = k.outer * (u + k.teacher_d * d), conditional = guided.scale * g;
      if (in.g_teacher != nullptr) access.out(in.g_teacher, i, conditional);
      if (in.g_uncond != nullptr) access.out(in.g_uncond, i, g - conditional);
    } else {
      if (ALL || in.g_teacher != nullptr) access.out(in.g_teacher, i, k.outer * (u + k.teacher_d * d));
    }
    if (ALL || in.g_fake != nullptr) access.out(in.g_fake, i, -k.outer * u);
    if (ALL || in.g_x != nullptr) access.out(in.g_x, i, k.g_x * d);
    if constexpr (EXTRA)
      if (in.g_x_t != nullptr) access.out(in.g_x_t, i, k.g_x_t * d);
  });
  return sum_lanes(sum);
}

template <class T>
void generator(const GeneratorArgs& args, int64_t begin, int64_t end) {
  using Real = ArithmeticOf<T>;
  Noise<T> noise(args.noise, args.shape, end);
  for_spans(args.shape, args.noise.rows, begin, end, [&](const Span& span) {
    const Real* coef = coefficient_row<T>(args.coef, span.row);
    const GeneratorRow<T> k(coef, args, span.row);
    const GeneratorInputs<T> in{at<T>(args.teacher, span.offset),
                                at<T>(args.fake, span.offset),
                                at<T>(args.x, span.offset),
                                coef[K_X] == 0 ? nullptr : at<T>(args.x_t, span.offset),
                                at<T>(args.y, span.offset),
                                at<T>(args.g_teacher, span.offset),
                                at<T>(args.g_fake, span.offset),
                                at<T>(args.g_x, span.offset),
                                at<T>(args.g_x_t, span.offset),
                                at<T>(args.g_uncond, span.offset)};
    const Guided<T> guided(args.guidance, span);
    const bool stream = args.stream && aligned<T>(in.g_teacher, in.g_fake, in.g_x, in.g_x_t, in.g_uncond);
    const bool noisy = coef[S] != 0, extra = in.x_t != nullptr || in.y != nullptr || in.g_x_t != nullptr;
    const bool all = in.g_teacher != nullptr && in.g_fake != nullptr && in.g_x != nullptr;
    double sum;
    if (guided.uncond != nullptr)
      sum = generator_span<T, true, true>(stream, noise, span, noisy, k, in, guided);
    else if (all && !extra)
      sum = generator_span<T, false, false, true>(stream, noise, span, noisy, k, in, guided);
    else
      sum = extra ? generator_span<T, true>(stream, noise, span, noisy, k, in, guided)
                  : generator_span<T, false>(stream, noise, span, noisy, k, in, guided);
    args.partial[span.unit] = double(coef[W]) * sum;
  });
  if (args.stream) stream_fence();
}

template <class T>
constexpr Kernels kernels_for() {
  return {interpolate<T>, error<T>, fake<T>, generator<T>, scale<T>, normal<T>};
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
