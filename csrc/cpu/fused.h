// The fused calls on raw pointers. Tensors are flat [rows, dim] in memory order; kernels know coefficient rows and scalars only.
//
// A call's work is cut into units: BLOCK elements of one row each (the last of a row shorter). A unit's sum is left in
// `partial[unit]`, so adding those in order gives the same bits for every number of threads. Units whose rows share their
// noise form a group, which is run together, so that the noise is drawn once; any range of groups can run on any thread.
#pragma once

#include <cstdint>

#include "isa.h"
#include "noise.h"
#include "storage.h"

namespace realuid_fast {

constexpr int64_t BLOCK = 4096;   // elements summed in single precision at most
constexpr int COEFFICIENTS = 9;   // columns of a coefficient row
enum Coefficient : int { A, B, C, P, Q, S, K_OUT, K_X, W };

struct Shape {
  int64_t rows = 0, dim = 0;
  int64_t blocks() const { return dim > BLOCK ? (dim + BLOCK - 1) / BLOCK : 1; }
  int64_t units() const { return rows * blocks(); }
  // For rows that share noise: row i uses the noise of row i % noise_rows.
  int64_t groups(int64_t noise_rows) const { return (noise_rows < rows ? noise_rows : rows) * blocks(); }
};

struct NoiseSource {
  const void* tensor = nullptr;  // [rows, dim] in the storage type, or null: drawn from the key
  NoiseKey key{0, 0};
  int64_t rows = 1;  // row i uses noise row i % rows
};

struct InterpolateArgs {
  Shape shape;
  const void *x, *y, *coef;  // y may be null
  NoiseSource noise;
  void* out;
  bool stream;
};

// The guided teacher: u + scale (c - u). Every call has the conditional output c.
struct Guidance {
  const void* uncond = nullptr;  // u like the teacher's output, or null: c alone
  const void* scales = nullptr;  // one a row, in the arithmetic type
};

struct ErrorArgs {
  Shape shape;
  const void *teacher, *x, *x_t, *coef;  // x_t may be null
  Guidance guidance;
  double* partial;                       // of sum |x - f*| / dim
};

struct FakeHalf {
  double a, b, d, c;  // l = w (a f^2 - 2 f (b tgt + d f*) + c tgt^2)
};

struct FakeArgs {
  Shape shape;
  const void *fake, *teacher, *x, *x_t, *y, *coef;  // teacher, x_t and y may be null
  Guidance guidance;
  NoiseSource noise;
  int64_t generated;  // rows before it use half[0], the others half[1]
  FakeHalf half[2];
  double scale;   // of the gradients
  void* g_fake;   // may be null
  double* partial;
  bool stream;
};

struct GeneratorArgs {
  Shape shape;
  const void *teacher, *fake, *x, *x_t, *y, *coef;  // x_t and y may be null
  Guidance guidance;
  NoiseSource noise;
  double alpha, beta, q, kappa, scale;
  const void* q_rows;                                 // one a row in the arithmetic type, in place of q; may be null
  void *g_teacher, *g_fake, *g_x, *g_x_t, *g_uncond;  // each may be null
  double* partial;
  bool stream;
};

// out[i] = in[i] * factor; factor is factors[0], or factors[row * stride] with stride > 0.
struct ScaleArgs {
  Shape shape;
  const void* in;
  void* out;
  const void* factors;
  bool wide;  // factors are double, otherwise float
  int64_t stride;
  bool skip_one;  // leave the memory of a row alone whose factor is exactly 1 (in == out)
  bool stream;
};

struct NormalArgs {
  Shape shape;
  NoiseSource noise;
  void* out;
  bool stream;
};

struct Kernels {
  void (*interpolate)(const InterpolateArgs&, int64_t begin, int64_t end);
  void (*error)(const ErrorArgs&, int64_t begin, int64_t end);
  void (*fake)(const FakeArgs&, int64_t begin, int64_t end);
  void (*generator)(const GeneratorArgs&, int64_t begin, int64_t end);
  void (*scale)(const ScaleArgs&, int64_t begin, int64_t end);
  void (*normal)(const NormalArgs&, int64_t begin, int64_t end);
};

REALUID_EACH_ISA(extern const Kernels table[DTYPES];)

// The kernels for one storage type on the instruction set in use.
inline const Kernels& kernels(Dtype dtype) { return REALUID_PICK(table)[int(dtype)]; }

}  // namespace realuid_fast
