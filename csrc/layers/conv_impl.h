// Winograd's transformations on vectors of channels, and the matrix product between them.
#pragma once

#include "../cpu/access.h"
#include "conv.h"

namespace realuid_fast {
namespace {
namespace REALUID_ISA {

// The points and the constants of the transformations; each is exact in float32.
constexpr float P = 0.75f, Q = 1.5f, P2 = P * P, Q2 = Q * Q, P3 = P * P2, Q3 = Q * Q2;

constexpr int COLUMNS = 2;                                                           // vectors of a panel, as product() has it
constexpr int ROWS = REALUID_LEVEL == 2 ? 12 : REALUID_LEVEL == 1 ? 6 : 3;           // of a product kept in registers
template <class Real>
constexpr int PANEL = COLUMNS * VectorOf<Real>::width;

// --- one dimension of each transformation ------------------------------------------------------------------------------

// B^T d.
template <class V>
REALUID_INLINE void patch_points(const V d[PATCH], V v[PATCH]) {
  using R = typename std::decay<decltype(d[0][0])>::type;
  const R sum = R(P2 + Q2), product = R(P2 * Q2);
  const V even_p = d[4] - R(Q2) * d[2], odd_p = R(P) * (d[3] - R(Q2) * d[1]);
  const V even_q = d[4] - R(P2) * d[2], odd_q = R(Q) * (d[3] - R(P2) * d[1]);
  v[0] = product * d[0] - sum * d[2] + d[4];
  v[1] = even_p + odd_p;
  v[2] = even_p - odd_p;
  v[3] = even_q + odd_q;
  v[4] = even_q - odd_q;
  v[5] = product * d[1] - sum * d[3] + d[5];
}

// A^T m.
template <class V>
REALUID_INLINE void outputs(const V m[PATCH], V y[TILE]) {
  using R = typename std::decay<decltype(m[0][0])>::type;
  const V even_p = m[1] + m[2], odd_p = m[1] - m[2], even_q = m[3] + m[4], odd_q = m[3] - m[4];
  y[0] = m[0] + even_p + even_q;
  y[1] = R(P) * odd_p + R(Q) * odd_q;
  y[2] = R(P2) * even_p + R(Q2) * even_q;
  y[3] = R(P3) * odd_p + R(Q3) * odd_q + m[5];
}

// A g.
template <class V>
REALUID_INLINE void grad_points(const V g[TILE], V v[PATCH]) {
  using R = typename std::decay<decltype(g[0][0])>::type;
  const V even_p = g[0] + R(P2) * g[2], odd_p = R(P) * g[1] + R(P3) * g[3];
  const V even_q = g[0] + R(Q2) * g[2], odd_q = R(Q) * g[1] + R(Q3) * g[3];
  v[0] = g[0];
  v[1] = even_p + odd_p;
  v[2] = even_p - odd_p;
  v[3] = even_q + odd_q;
  v[4] = even_q - odd_q;
  v[5] = g[3];
}

// The rows of G: 1 / (P^2 Q^2), and 1 / (2 P^2 (P^2 - Q^2)) and 1 / (2 Q^2 (Q^2 - P^2)) with 1, p, p^2.
template <class R>
struct Scales {
  static constexpr R zero = R(1.0 / (double(P2) * Q2)), p = R(1.0 / (2.0 * P2 * (double(P2) - Q2))),
                     q = R(1.0 / (2.0 * Q2 * (double(Q2) - P2)));
};

// G f.
template <class V>
REALUID_INLINE void filter_points(const V f[3], V v[PATCH]) {
  using R = typename std::decay<decltype(f[0][0])>::type;
  const V even_p = f[0] + R(P2) * f[2], odd_p = R(P) * f[1], even_q = f[0] + R(Q2) * f[2], odd_q = R(Q) * f[1];
  v[0] = Scales<R>::zero * f[0];
  v[1] = Scales<R>::p * (even_p + odd_p);
  v[2] = Scales<R>::p * (even_p - odd_p);
  v[3] = Scales<R>::q * (even_q + odd_q);
  v[4] = Scales<R>::q * (even_q - odd_q);
  v[5] = f[2];
}

// G^T s.
template <class V>
REALUID_INLINE void filter_grads(const V s[PATCH], V f[3]) {
  using R = typename std::decay<decltype(s[0][0])>::type;
  const V even_p = Scales<R>::p * (s[1] + s[2]), odd_p = Scales<R>::p * (s[1] - s[2]);
  const V even_q = Scales<R>::q * (s[3] + s[4]), odd_q = Scales<R>::q * (s[3] - s[4]);
  f[0] = Scales<R>::zero * s[0] + even_p + even_q;
  f[1] = R(P) * odd_p + R(Q) * odd_q;
  f[2] = R(P2) * even_p + R(Q2) * even_q + s[5];
}

// --- the matrix product ------------------------------------------------------------------------------------------------

// out[i][:] (+)= sum over k of a(i, k) b[k][:] for N rows and the first VECTORS of a panel; a(i, k) lies at
// a + i * by_row + k * by_step.
template <class Real, int VECTORS, int N>
REALUID_INLINE void product_rows(const Real* a, int64_t by_row, int64_t by_step, const Real* b, int64_t depth, Real* out,
                                 bool add) {
  using V = typename VectorOf<Real>::type;
  constexpr int WIDE = VectorOf<Real>::width;
  V sum[N][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j) sum[i][j] = add ? load(out + i * PANEL<Real> + j * WIDE) : V{};
  // One pointer for every three rows: the others are one and two strides from it, which an address can say.
  const Real* base[(N + 2) / 3];
#pragma GCC unroll 16
  for (int i = 0; i < (N + 2) / 3; ++i) base[i] = a + 3 * i * by_row;
  for (int64_t k = 0; k < depth; ++k) {
    V row[VECTORS];
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j) row[j] = load(b + j * WIDE);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      const Real factor = base[i / 3][(i % 3) * by_row];
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) sum[i][j] += factor * row[j];
    }
#pragma GCC unroll 16
    for (int i = 0; i < (N + 2) / 3; ++i) base[i] += by_step;
    b += PANEL<Real>;
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j) store(out + i * PANEL<Real> + j * WIDE, sum[i][j]);
}

template <class Real, int VECTORS, int N, class... Arguments>
REALUID_INLINE void product_rest(int64_t rows, Arguments... arguments) {
  if constexpr (N > 0) {
    if (rows == N)
      product_rows<Real, VECTORS, N>(arguments...);
    else
      product_rest<Real, VECTORS, N - 1>(rows, arguments...);
  }
}

template <class Real, int VECTORS>
void product_of(const Real* a, int64_t by_row, int64_t by_step, int64_t rows, const Real* b, int64_t depth, Real* out,
                bool add) {
  int64_t i = 0;
  for (; i + ROWS <= rows; i += ROWS)
    product_rows<Real, VECTORS, ROWS>(a + i * by_row, by_row, by_step, b, depth, out + i * PANEL<Real>, add);
  product_rest<Real, VECTORS, ROWS - 1>(rows - i, a + i * by_row, by_row, by_step, b, depth, out + i * PANEL<Real>, add);
}

// One panel of out = a b, of which `columns` from its first one are wanted. TRANSPOSED: a's rows are its memory's columns.
template <class Real, bool TRANSPOSED>
REALUID_INLINE void product(const Real* a, int64_t stride, int64_t rows, const Real* b, int64_t depth, Real* out,
                            int64_t columns, bool add) {
  const int64_t by_row = TRANSPOSED ? 1 : stride, by_step = TRANSPOSED ? stride : 1;
  if (columns > VectorOf<Real>::width)
    product_of<Real, 2>(a, by_row, by_step, rows, b, depth, out, add);
  else
    product_of<Real, 1>(a, by_row, by_step, rows, b, depth, out, add);
}

// --- filters -------------------------------------------------------------------------------------------------------------

constexpr int64_t CHUNK = 16;  // input channels whose filters are turned between their own order and vectors at once

// The filters of one vector of output channels, a chunk of input channels: between [out][in][3][3] by its strides and
// vectors of output channels. Lane by lane through memory, far enough apart that no load waits for its store.
template <class Real>
struct FilterChunk {
  static constexpr int WIDE = VectorOf<Real>::width;
  alignas(64) Real of[9][CHUNK][WIDE];

  // copy(number in the tensor, number here) for every number there is.
  template <class F>
  REALUID_INLINE void each(const Filters& f, int64_t first, int lanes, int64_t c, F&& copy) {
    const int64_t count = f.in - c < CHUNK ? f.in - c : CHUNK;
    for (int lane = 0; lane < lanes; ++lane)
      for (int point = 0; point < 9; ++point) {
        const int64_t from = (first + lane) * f.by_out + point / 3 * f.by_row + point % 3 * f.by_column;
        for (int64_t i = 0; i < count; ++i) copy(from + (c + i) * f.by_in, of[point][i][lane]);
      }
  }
};

// How many output channels the vector from `first` on really has.
template <class Real>
REALUID_INLINE int lanes_of(const Filters& f, int64_t first) {
  constexpr int WIDE = VectorOf<Real>::width;
  const int64_t left = f.out - first;
  return left < 0 ? 0 : left < WIDE ? int(left) : WIDE;
}

template <class Real>
void filters(const FilterArgs& args, int64_t begin, int64_t end) {
  using V = typename VectorOf<Real>::type;
  constexpr int WIDE = VectorOf<Real>::width;
  const Filters& f = args.filters;
  const Real* const weight = static_cast<const Real*>(args.weight);
  const int64_t panels = (f.out + PANEL<Real> - 1) / PANEL<Real>, plane = panels * f.in * PANEL<Real>;
  FilterChunk<Real> chunk = {};
  for (int64_t vector = begin * COLUMNS; vector < end * COLUMNS; ++vector) {
    const int64_t first = vector * WIDE;
    const int lanes = lanes_of<Real>(f, first);
    if (lanes == 0) break;
    if (lanes < WIDE) chunk = {};
    Real* to = static_cast<Real*>(args.to) + (vector / COLUMNS) * f.in * PANEL<Real> + (vector % COLUMNS) * WIDE;
    for (int64_t c = 0; c < f.in; ++c) {
      if (c % CHUNK == 0) chunk.each(f, first, lanes, c, [&](int64_t from, Real& here) { here = weight[from]; });
      V half[3][PATCH];
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        V row[3];
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) row[j] = load(chunk.of[3 * i + j][c % CHUNK]);
        filter_points(row, half[i]);
      }
#pragma GCC unroll 6
      for (int j = 0; j < PATCH; ++j) {
        const V column[3] = {half[0][j], half[1][j], half[2][j]};
        V points[PATCH];
        filter_points(column, points);
#pragma GCC unroll 6
        for (int i = 0; i < PATCH; ++i) store(to + (i * PATCH + j) * plane + c * PANEL<Real>, points[i]);
      }
    }
  }
}

template <class Real>
void fold(const FoldArgs& args, int64_t begin, int64_t end) {
  using V = typename VectorOf<Real>::type;
  constexpr int WIDE = VectorOf<Real>::width;
  const Filters& f = args.filters;
  Real* const grad = static_cast<Real*>(args.grad);
  const int64_t panels = (f.out + PANEL<Real> - 1) / PANEL<Real>, plane = panels * f.in * PANEL<Real>;
  FilterChunk<Real> chunk;
  for (int64_t vector = begin * COLUMNS; vector < end * COLUMNS; ++vector) {
    const int64_t first = vector * WIDE;
    const int lanes = lanes_of<Real>(f, first);
    if (lanes == 0) break;
    const Real* from = static_cast<const Real*>(args.sums) + (vector / COLUMNS) * f.in * PANEL<Real> + (vector % COLUMNS) * WIDE;
    for (int64_t c = 0; c < f.in; ++c) {
      V half[3][PATCH];
#pragma GCC unroll 6
      for (int j = 0; j < PATCH; ++j) {
        V column[PATCH], folded[3];
#pragma GCC unroll 6
        for (int i = 0; i < PATCH; ++i) column[i] = load(from + (i * PATCH + j) * plane + c * PANEL<Real>);
        filter_grads(column, folded);
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) half[i][j] = folded[i];
      }
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        V row[3];
        filter_grads(half[i], row);
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) store(chunk.of[3 * i + j][c % CHUNK], row[j]);
      }
      if (c % CHUNK == CHUNK - 1 || c == f.in - 1)
        chunk.each(f, first, lanes, c / CHUNK * CHUNK, [&](int64_t to, Real& here) { grad[to] = here; });
    }
  }
}

// --- images --------------------------------------------------------------------------------------------------------------

// A tile's place: its image and the position of its first output.
struct Place {
  int64_t image, y, x;
  Place(const Images& images, int64_t tile)
      : image(tile / (images.down() * images.across())),
        y(tile / images.across() % images.down() * TILE),
        x(tile % images.across() * TILE) {}
};

// Pixels around (y, x) of one image, zeros outside it.
template <class T>
struct Pixels {
  const T* origin;
  int64_t channels, width;
  int64_t top, bottom, left, right;  // which rows and columns, counted from (y, x), are in the image

  Pixels(const void* images, const Images& shape, int64_t channels_, const Place& place, int64_t y, int64_t x)
      : origin(static_cast<const T*>(images) + ((place.image * shape.height + y) * shape.width + x) * channels_),
        channels(channels_),
        width(shape.width),
        top(-y),
        bottom(shape.height - y),
        left(-x),
        right(shape.width - x) {}

  template <class Access>
  REALUID_INLINE auto get(const Access& access, int i, int j, int64_t c) const {
    const bool inside = i >= top && i < bottom && j >= left && j < right;
    return inside ? access.in(origin + (i * width + j) * channels, c) : VectorFor<T>{};
  }
};

// B^T patch B of one tile, all channels; rows of `row` elements, points `plane` apart.
template <class T>
REALUID_INLINE void spread_patch(const Pixels<T>& pixels, int64_t channels, ArithmeticOf<T>* to, int64_t plane) {
  using V = VectorFor<T>;
  for_vectors<T>(false, channels, [&](auto access, int64_t c) {
    V half[PATCH][PATCH];
#pragma GCC unroll 6
    for (int i = 0; i < PATCH; ++i) {
      V row[PATCH];
#pragma GCC unroll 6
      for (int j = 0; j < PATCH; ++j) row[j] = pixels.get(access, i, j, c);
      patch_points(row, half[i]);
    }
#pragma GCC unroll 6
    for (int j = 0; j < PATCH; ++j) {
      const V column[PATCH] = {half[0][j], half[1][j], half[2][j], half[3][j], half[4][j], half[5][j]};
      V points[PATCH];
      patch_points(column, points);
#pragma GCC unroll 6
      for (int i = 0; i < PATCH; ++i) store(to + (i * PATCH + j) * plane + c, points[i]);
    }
  });
}

// A^T products A of one tile, to the image.
template <class T>
REALUID_INLINE void gather_tile(const ConvArgs& args, const Place& place, const ArithmeticOf<T>* from, int64_t plane,
                                int64_t by_panel) {
  using Real = ArithmeticOf<T>;
  using V = VectorFor<T>;
  const Images& images = args.images;
  T* const origin = static_cast<T*>(args.y) + ((place.image * images.height + place.y) * images.width + place.x) * args.out;
  const int64_t below = images.height - place.y, beside = images.width - place.x;
  for_vectors<T>(false, args.out, [&](auto access, int64_t k) {
    const Real* const at = from + k / PANEL<Real> * by_panel + k % PANEL<Real>;
    V half[TILE][PATCH];
#pragma GCC unroll 6
    for (int j = 0; j < PATCH; ++j) {
      V column[PATCH], rows[TILE];
#pragma GCC unroll 6
      for (int i = 0; i < PATCH; ++i) column[i] = load(at + (i * PATCH + j) * plane);
      outputs(column, rows);
#pragma GCC unroll 6
      for (int i = 0; i < TILE; ++i) half[i][j] = rows[i];
    }
    V bias = {};
    if (args.bias != nullptr) bias = access.in(static_cast<const Real*>(args.bias), k);
#pragma GCC unroll 6
    for (int i = 0; i < TILE; ++i) {
      V row[TILE];
      outputs(half[i], row);
#pragma GCC unroll 6
      for (int j = 0; j < TILE; ++j)
        if (i < below && j < beside) access.out(origin + (i * images.width + j) * args.out, k, row[j] + bias);
    }
  });
}

template <class T>
void convolve(const ConvArgs& args, int64_t begin, int64_t end) {
  using Real = ArithmeticOf<T>;
  constexpr int64_t WIDE = VectorOf<Real>::width;
  const int64_t count = end - begin, row = patch_row(args.in, WIDE);
  const int64_t panels = (args.out + PANEL<Real> - 1) / PANEL<Real>, by_panel = count * PANEL<Real>;
  Real *const patches = static_cast<Real*>(args.patches), *const products = static_cast<Real*>(args.products);
  for (int64_t tile = 0; tile < count; ++tile) {
    const Place place(args.images, begin + tile);
    const Pixels<T> pixels(args.x, args.images, args.in, place, place.y - 1, place.x - 1);
    spread_patch<T>(pixels, args.in, patches + tile * row, count * row);
  }
  const Real* filters = static_cast<const Real*>(args.filters);
  for (int64_t point = 0; point < POINTS; ++point)
    for (int64_t panel = 0; panel < panels; ++panel)
      product<Real, false>(patches + point * count * row, row, count, filters + (point * panels + panel) * args.in * PANEL<Real>,
                           args.in, products + (point * panels + panel) * by_panel, args.out - panel * PANEL<Real>, false);
  for (int64_t tile = 0; tile < count; ++tile)
    gather_tile<T>(args, Place(args.images, begin + tile), products + tile * PANEL<Real>, panels * by_panel, by_panel);
}

template <class T>
void spread(const SpreadArgs& args, int64_t begin, int64_t end) {
  using Real = ArithmeticOf<T>;
  using V = VectorFor<T>;
  constexpr int64_t WIDE = VectorOf<Real>::width;
  const int64_t row = patch_row(args.in, WIDE);
  const int64_t panels = (args.out + PANEL<Real> - 1) / PANEL<Real>, by_panel = args.count * PANEL<Real>;
  for (int64_t tile = begin; tile < end; ++tile) {
    const Place place(args.images, args.first + tile);
    const Pixels<T> pixels(args.x, args.images, args.in, place, place.y - 1, place.x - 1);
    spread_patch<T>(pixels, args.in, static_cast<Real*>(args.patches) + tile * row, args.count * row);
    const Pixels<T> grads(args.grad, args.images, args.out, place, place.y, place.x);
    for_vectors<T>(false, args.out, [&](auto access, int64_t k) {
      Real* const to = static_cast<Real*>(args.grads) + k / PANEL<Real> * by_panel + tile * PANEL<Real> + k % PANEL<Real>;
      V half[TILE][PATCH];
#pragma GCC unroll 6
      for (int i = 0; i < TILE; ++i) {
        V pixel[TILE];
#pragma GCC unroll 6
        for (int j = 0; j < TILE; ++j) pixel[j] = grads.get(access, i, j, k);
        grad_points(pixel, half[i]);
      }
#pragma GCC unroll 6
      for (int j = 0; j < PATCH; ++j) {
        const V column[TILE] = {half[0][j], half[1][j], half[2][j], half[3][j]};
        V points[PATCH];
        grad_points(column, points);
#pragma GCC unroll 6
        for (int i = 0; i < PATCH; ++i) store(to + (i * PATCH + j) * panels * by_panel, points[i]);
      }
    });
  }
}

template <class T>
void sum(const SumArgs& args, int64_t begin, int64_t end) {
  using Real = ArithmeticOf<T>;
  constexpr int64_t WIDE = VectorOf<Real>::width;
  const int64_t row = patch_row(args.in, WIDE);
  const int64_t panels = (args.out + PANEL<Real> - 1) / PANEL<Real>;
  const Real *const patches = static_cast<const Real*>(args.patches), *const grads = static_cast<const Real*>(args.grads);
  for (int64_t point = begin; point < end; ++point)
    for (int64_t panel = 0; panel < panels; ++panel)
      product<Real, true>(patches + point * args.count * row, row, args.in, grads + (point * panels + panel) * args.count * PANEL<Real>,
                          args.count, static_cast<Real*>(args.sums) + (point * panels + panel) * args.in * PANEL<Real>,
                          args.out - panel * PANEL<Real>, !args.first);
}

template <class T>
constexpr ConvKernels conv_kernels_for() {
  using Real = ArithmeticOf<T>;
  return {PANEL<Real>, ROWS, VectorOf<Real>::width, filters<Real>, convolve<T>, spread<T>, sum<T>, fold<Real>};
}

}  // namespace REALUID_ISA
}  // namespace

namespace REALUID_TABLE {

const ConvKernels conv_table[DTYPES] = {
    REALUID_ISA::conv_kernels_for<float>(),
    REALUID_ISA::conv_kernels_for<BFloat16>(),
    REALUID_ISA::conv_kernels_for<Half>(),
    REALUID_ISA::conv_kernels_for<double>(),
};

}  // namespace REALUID_TABLE
}  // namespace realuid_fast
