// The operators on LibTorch's stable ABI: arguments are checked and named here, kernels are dumb. Schemas live in Python.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu/fused.h"
#include "cpu/optimiser.h"

namespace {

namespace rf = realuid_fast;
using namespace realuid_fast::arguments;
using Grads2 = std::tuple<Tensor, Tensor>;
using Grads3 = std::tuple<Tensor, Tensor, Tensor>;
using Grads6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Grads7 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Below this many elements a second thread costs more than it saves.
constexpr int64_t ELEMENTS_PER_THREAD = 32768;
// Outputs larger than this leave the caches before anyone reads them: write them past the caches.
constexpr int64_t STREAM_BYTES = int64_t(1) << 20;

// Whether a tensor has no gaps and samples are its outermost dimension.
bool dense(const Tensor& t) {
  if (t.is_contiguous() || t.numel() == 0) return true;
  return gapless(t) && (t.size(0) == 1 || t.stride(0) * t.size(0) == t.numel());
}

// The main input of a call. Every other tensor is compared with it.
struct Frame {
  const Tensor& main;
  const char* name;
  rf::Dtype dtype;
  rf::Shape shape;

  Frame(const Tensor& t, const char* label) : main(t), name(label), dtype(storage(t, label)) {
    REQUIRE(t.is_cpu(), label, " must be on the CPU");
    REQUIRE(t.dim() >= 1, label, " must have a batch dimension");
    REQUIRE(dense(t), label, " must be dense in memory with samples outermost: contiguous or channels_last");
    shape.rows = t.size(0);
    shape.dim = shape.rows == 0 ? 0 : t.numel() / shape.rows;
    memory_of(t, label);
  }

  int64_t elements() const { return shape.rows * shape.dim; }
  bool wide() const { return dtype == rf::Dtype::float64; }
  ScalarType real() const { return wide() ? ScalarType::Double : ScalarType::Float; }
  int64_t item_size() const { return dtype == rf::Dtype::float32 ? 4 : wide() ? 8 : 2; }
  bool stream() const { return elements() * item_size() >= STREAM_BYTES; }

  // `rows` >= 0: the other tensor may have that many samples instead.
  const void* same(const Tensor& t, const char* label, int64_t rows = -1) const {
    REQUIRE(t.is_cpu(), label, " must be on the CPU like ", name);
    REQUIRE(t.scalar_type() == main.scalar_type(), label, " must have the dtype of ", name);
    REQUIRE(t.dim() == main.dim(), label, " must have as many dimensions as ", name);
    const int64_t dims = main.dim();
    const auto a = t.sizes(), b = main.sizes();
    for (int64_t d = 0; d < dims; ++d) {
      const int64_t wanted = d == 0 && rows >= 0 ? rows : b[d];
      REQUIRE(a[d] == wanted, label, " must have size ", wanted, " in dimension ", d, " like ", name, ", got ", a[d]);
    }
    if (t.numel() == 0) return t.const_data_ptr();
    const void* memory = memory_of(t, label);
    const auto sa = t.strides(), sb = main.strides();
    // The stride of a dimension of size 1 has no meaning, so it is not compared.
    for (int64_t d = 0; d < dims; ++d)
      REQUIRE(a[d] == 1 || b[d] == 1 || sa[d] == sb[d], label, " must have the memory layout of ", name);
    return memory;
  }

  const void* same(const Optional& t, const char* label) const { return t.has_value() ? same(*t, label) : nullptr; }

  rf::Guidance guidance(const Optional& uncond, const Optional& scales) const {
    REQUIRE(uncond.has_value() == scales.has_value(), "teacher_uncond and guidance go together");
    if (!uncond.has_value()) return {};
    return {same(*uncond, "teacher_uncond"), by_row(scales, "guidance")};
  }

  // The address of a vector with one number for each row, or null without one.
  const void* by_row(const Optional& numbers, const char* label) const {
    if (!numbers.has_value()) return nullptr;
    REQUIRE(numbers->is_cpu() && numbers->dim() == 1 && numbers->size(0) == shape.rows && numbers->is_contiguous(),
            label, " must be a contiguous CPU tensor of shape (", shape.rows, ",)");
    REQUIRE(numbers->scalar_type() == real(), label, " must be ", wide() ? "float64" : "float32", " for this dtype of ", name);
    return memory_of(*numbers, label);
  }

  const void* coefficients(const Tensor& coef) const {
    REQUIRE(coef.is_cpu() && coef.dim() == 2 && coef.size(0) == shape.rows && coef.size(1) == rf::COEFFICIENTS &&
                        coef.is_contiguous(),
                    "coef must be a contiguous CPU tensor of shape (", shape.rows, ", ", rf::COEFFICIENTS, ")");
    REQUIRE(coef.scalar_type() == real(), "coef must be ", wide() ? "float64" : "float32", " for this dtype of ", name);
    return memory_of(coef, "coef");
  }

  rf::NoiseSource noise(const Tensor& noise, int64_t noise_rows, const char* label = "noise") const {
    rf::NoiseSource source;
    REQUIRE(noise_rows > 0 || shape.rows == 0, "noise_rows must be positive, got ", noise_rows);
    // More rows of noise than samples are never used; the kernels add this number to a row's.
    source.rows = std::max<int64_t>(std::min(noise_rows, shape.rows), 1);
    if (noise.scalar_type() == ScalarType::Long) {
      REQUIRE(noise.is_cpu() && noise.dim() == 1 && noise.size(0) == 2, label,
                      " as a key must be an int64 CPU tensor of shape (2,)");
      const auto* words = static_cast<const int64_t*>(memory_of(noise, label));
      const int64_t step = noise.stride(0);
      source.key = {uint64_t(words[0]), uint64_t(words[step])};
      return source;
    }
    source.tensor = same(noise, label, std::min(source.rows, shape.rows));
    return source;
  }

  Tensor like() const {
    const auto sizes = main.sizes(), strides = main.strides();
    return allocate(sizes.data(), strides.data(), main.dim(), main.scalar_type());
  }

  Tensor like_if(bool wanted) const { return wanted ? like() : none(); }

  Tensor none() const {
    const int64_t size = 0, stride = 1;
    return allocate(&size, &stride, 1, main.scalar_type());
  }

  Tensor vector(int64_t n) const {
    const int64_t stride = 1;
    return allocate(&n, &stride, 1, real());
  }

  Tensor scalar() const { return allocate(nullptr, nullptr, 0, real()); }

  // Runs body(begin, end) over the groups of units on torch's threads.
  template <class F>
  void run(int64_t noise_rows, const F& body) const {
    if (elements() == 0) return;
    const int64_t groups = shape.groups(noise_rows);
    const int64_t grain = std::max<int64_t>(1, ELEMENTS_PER_THREAD * groups / elements());
    if (groups <= grain)
      body(int64_t(0), groups);
    else
      torch::stable::parallel_for(0, groups, grain, body);
  }

  template <class F>
  void run(const F& body) const {
    run(shape.rows, body);
  }

  // A sum for every unit. Rows without elements take no memory, so their number means nothing until coef has been checked.
  std::vector<double> sums(const Tensor& coef) const {
    coefficients(coef);
    return std::vector<double>(shape.units(), 0.0);
  }

  // Adds the units' sums in their fixed order: (sum over rows / count, rows).
  std::pair<Tensor, Tensor> reduce(const std::vector<double>& partial, int64_t count) const {
    Tensor loss = scalar(), rows = vector(shape.rows);
    return wide() ? reduce_to<double>(partial, count, std::move(loss), std::move(rows))
                  : reduce_to<float>(partial, count, std::move(loss), std::move(rows));
  }

  template <class Real>
  std::pair<Tensor, Tensor> reduce_to(const std::vector<double>& partial, int64_t count, Tensor loss, Tensor rows) const {
    Real* out = static_cast<Real*>(rows.mutable_data_ptr());
    const int64_t blocks = shape.blocks();
    double total = 0;
    for (int64_t row = 0; row < shape.rows; ++row) {
      double sum = 0;
      for (int64_t block = 0; block < blocks; ++block) sum += partial[row * blocks + block];
      out[row] = Real(sum);
      total += sum;
    }
    *static_cast<Real*>(loss.mutable_data_ptr()) = Real(total / double(std::max<int64_t>(count, 1)));
    return {std::move(loss), std::move(rows)};
  }

  // A tensor may be left out if its column of coefficients is zero in every row.
  void check_left_out(const Optional& t, const char* label, const void* coef, int column, const char* column_name) const {
    if (t.has_value()) return;
    for (int64_t row = 0; row < shape.rows; ++row) {
      const int64_t i = row * rf::COEFFICIENTS + column;
      const double value = wide() ? static_cast<const double*>(coef)[i] : double(static_cast<const float*>(coef)[i]);
      REQUIRE(value == 0, label, " is needed: row ", row, " of coef has ", column_name, " different from 0");
    }
  }

  void check_x_t(const Optional& x_t, const void* coef) const { check_left_out(x_t, "x_t", coef, rf::K_X, "k_x"); }
};

void* pointer(const Tensor& t) { return t.numel() == 0 ? nullptr : t.mutable_data_ptr(); }

double mean_scale(bool mean, int64_t count) { return mean && count > 0 ? 1.0 / double(count) : 1.0; }

Tensor normal_like(const Tensor& key, const Tensor& like, int64_t noise_rows) {
  const Frame frame(like, "like");
  REQUIRE(key.scalar_type() == ScalarType::Long, "key must be an int64 tensor of shape (2,)");
  Tensor out = frame.like();
  const rf::NormalArgs args{frame.shape, frame.noise(key, noise_rows, "key"), out.mutable_data_ptr(), frame.stream()};
  const auto& k = rf::kernels(frame.dtype);
  frame.run(args.noise.rows, [&](int64_t begin, int64_t end) { k.normal(args, begin, end); });
  return out;
}

Tensor interpolate(const Tensor& x, const Tensor& coef, const Tensor& noise, const Optional& endpoint, int64_t noise_rows) {
  const Frame frame(x, "x");
  Tensor out = frame.like();
  const rf::InterpolateArgs args{frame.shape,
                                 x.const_data_ptr(),
                                 frame.same(endpoint, "endpoint"),
                                 frame.coefficients(coef),
                                 frame.noise(noise, noise_rows),
                                 out.mutable_data_ptr(),
                                 frame.stream()};
  frame.check_left_out(endpoint, "endpoint", args.coef, rf::B, "b");
  const auto& k = rf::kernels(frame.dtype);
  frame.run(args.noise.rows, [&](int64_t begin, int64_t end) { k.interpolate(args, begin, end); });
  return out;
}

Grads2 interpolate_grads(const Tensor& grad, const Tensor& coef, bool want_x, bool want_endpoint) {
  const Frame frame(grad, "grad");
  const char* table = static_cast<const char*>(frame.coefficients(coef));
  const auto& k = rf::kernels(frame.dtype);
  const auto scaled = [&](bool wanted, int column) {
    Tensor out = frame.like_if(wanted);
    if (!wanted) return out;
    const rf::ScaleArgs args{frame.shape,
                             grad.const_data_ptr(),
                             out.mutable_data_ptr(),
                             table + column * (frame.wide() ? sizeof(double) : sizeof(float)),
                             frame.wide(),
                             rf::COEFFICIENTS,
                             false,
                             frame.stream()};
    frame.run([&](int64_t begin, int64_t end) { k.scale(args, begin, end); });
    return out;
  };
  return {scaled(want_x, rf::A), scaled(want_endpoint, rf::B)};
}

Tensor mean_abs_error(const Tensor& teacher_out, const Tensor& x, const Optional& x_t, const Tensor& coef,
                      const Optional& teacher_uncond, const Optional& guidance) {
  const Frame frame(x, "x");
  std::vector<double> partial = frame.sums(coef);
  const rf::ErrorArgs args{frame.shape, frame.same(teacher_out, "teacher_out"), x.const_data_ptr(),
                           frame.same(x_t, "x_t"), frame.coefficients(coef), frame.guidance(teacher_uncond, guidance),
                           partial.data()};
  frame.check_x_t(x_t, args.coef);
  const auto& k = rf::kernels(frame.dtype);
  frame.run([&](int64_t begin, int64_t end) { k.error(args, begin, end); });
  return frame.reduce(partial, 1).second;
}

Grads3 fake_frame(const Frame& frame, const char* fake_name, const Tensor& fake, const Tensor& x, const Optional& x_t,
                  const Tensor& coef, const Tensor& noise, const Optional& teacher, const Optional& endpoint,
                  const Optional& uncond, const Optional& guidance, int64_t noise_rows, int64_t n_real, rf::FakeHalf generated, rf::FakeHalf real, bool mean, bool want) {
  REQUIRE(n_real >= 0 && n_real <= frame.shape.rows, "n_real must be between 0 and the ", frame.shape.rows, " rows, got ", n_real);
  const int64_t count = frame.shape.rows - n_real;
  const bool reads_teacher = (generated.d != 0 && count > 0) || (real.d != 0 && n_real > 0);
  REQUIRE(teacher.has_value() || !reads_teacher, "teacher_out is needed: this objective's d is different from 0");
  Tensor g = frame.like_if(want);
  std::vector<double> partial = frame.sums(coef);
  const rf::FakeArgs args{frame.shape,
                          frame.same(fake, fake_name),
                          frame.same(teacher, "teacher_out"),
                          x.const_data_ptr(),
                          frame.same(x_t, "x_t"),
                          frame.same(endpoint, "endpoint"),
                          frame.coefficients(coef),
                          frame.guidance(uncond, guidance),
                          frame.noise(noise, noise_rows),
                          count,
                          {generated, real},
                          mean_scale(mean, count),
                          pointer(g),
                          partial.data(),
                          frame.stream()};
  frame.check_x_t(x_t, args.coef);
  frame.check_left_out(endpoint, "endpoint", args.coef, rf::Q, "q");
  const auto& k = rf::kernels(frame.dtype);
  frame.run(args.noise.rows, [&](int64_t begin, int64_t end) { k.fake(args, begin, end); });
  auto [loss, rows] = frame.reduce(partial, count);
  return {loss, rows, g};
}

Grads3 matching(const Tensor& out, const Tensor& x, const Optional& x_t, const Tensor& coef, const Tensor& noise,
                const Optional& endpoint, int64_t noise_rows, bool mean, bool want_out) {
  // ||f - tgt||^2 is the fake loss with a = b = c = 1 and no teacher.
  return fake_frame(Frame(x, "x"), "out", out, x, x_t, coef, noise, std::nullopt, endpoint, std::nullopt, std::nullopt,
                    noise_rows, 0, {1, 1, 0, 1}, {1, 1, 0, 1}, mean, want_out);
}

Grads3 fake(const Tensor& fake_out, const Tensor& x, const Optional& x_t, const Tensor& coef, const Tensor& noise,
            const Optional& teacher_out, const Optional& endpoint, int64_t noise_rows, int64_t n_real, double a_gen,
            double b_gen, double d_gen, double c_gen, double a_real, double b_real, double d_real, double c_real, bool mean,
            bool want_fake) {
  return fake_frame(Frame(x, "x"), "fake_out", fake_out, x, x_t, coef, noise, teacher_out, endpoint, std::nullopt,
                    std::nullopt, noise_rows, n_real, {a_gen, b_gen, d_gen, c_gen}, {a_real, b_real, d_real, c_real}, mean,
                    want_fake);
}

Grads3 guided_fake(const Tensor& fake_out, const Tensor& x, const Optional& x_t, const Tensor& coef, const Tensor& noise,
                   const Tensor& teacher_out, const Optional& endpoint, const Tensor& teacher_uncond,
                   const Tensor& guidance, int64_t noise_rows, int64_t n_real, double a_gen, double b_gen, double d_gen,
                   double c_gen, double a_real, double b_real, double d_real, double c_real, bool mean, bool want_fake) {
  return fake_frame(Frame(x, "x"), "fake_out", fake_out, x, x_t, coef, noise, teacher_out, endpoint, teacher_uncond, guidance,
                    noise_rows, n_real, {a_gen, b_gen, d_gen, c_gen}, {a_real, b_real, d_real, c_real}, mean, want_fake);
}

// Which gradients a generator call asks for.
struct Wants {
  bool teacher, fake, x, x_t, uncond;
};

// Without guidance there is no last gradient. Its place gets another tensor's handle, so that no memory is allocated.
Grads7 generator_frame(const Tensor& teacher_out, const Tensor& fake_out, const Tensor& x, const Optional& x_t,
                       const Tensor& coef, const Tensor& noise, const Optional& endpoint, const Optional& uncond,
                       const Optional& guidance, const Optional& q_rows, double alpha, double beta, double q, double kappa,
                       bool mean, Wants want) {
  const Frame frame(x, "x");
  REQUIRE(x_t.has_value() || !want.x_t, "x_t is needed where its gradient is asked for");
  Tensor g_teacher = frame.like_if(want.teacher), g_fake = frame.like_if(want.fake), g_x = frame.like_if(want.x),
         g_x_t = frame.like_if(want.x_t);
  Tensor g_uncond = uncond.has_value() ? frame.like_if(want.uncond) : g_x_t;
  std::vector<double> partial = frame.sums(coef);
  const rf::GeneratorArgs args{frame.shape,
                               frame.same(teacher_out, "teacher_out"),
                               frame.same(fake_out, "fake_out"),
                               x.const_data_ptr(),
                               frame.same(x_t, "x_t"),
                               frame.same(endpoint, "endpoint"),
                               frame.coefficients(coef),
                               frame.guidance(uncond, guidance),
                               frame.noise(noise, frame.shape.rows),
                               alpha,
                               beta,
                               q,
                               kappa,
                               mean_scale(mean, frame.shape.rows),
                               frame.by_row(q_rows, "q_rows"),
                               pointer(g_teacher),
                               pointer(g_fake),
                               pointer(g_x),
                               pointer(g_x_t),
                               uncond.has_value() ? pointer(g_uncond) : nullptr,
                               partial.data(),
                               frame.stream()};
  frame.check_x_t(x_t, args.coef);
  frame.check_left_out(endpoint, "endpoint", args.coef, rf::Q, "q");
  const auto& k = rf::kernels(frame.dtype);
  frame.run([&](int64_t begin, int64_t end) { k.generator(args, begin, end); });
  auto [loss, rows] = frame.reduce(partial, frame.shape.rows);
  return {loss, rows, g_teacher, g_fake, g_x, g_x_t, g_uncond};
}

Grads6 generator(const Tensor& teacher_out, const Tensor& fake_out, const Tensor& x, const Optional& x_t, const Tensor& coef,
                 const Tensor& noise, const Optional& endpoint, double alpha, double beta, double q, double kappa, bool mean,
                 bool want_teacher, bool want_fake, bool want_x, bool want_x_t) {
  auto [loss, rows, g_teacher, g_fake, g_x, g_x_t, unused] =
      generator_frame(teacher_out, fake_out, x, x_t, coef, noise, endpoint, std::nullopt, std::nullopt, std::nullopt, alpha,
                      beta, q, kappa, mean, {want_teacher, want_fake, want_x, want_x_t, false});
  return {std::move(loss), std::move(rows), std::move(g_teacher), std::move(g_fake), std::move(g_x), std::move(g_x_t)};
}

Grads7 guided_generator(const Tensor& teacher_out, const Tensor& fake_out, const Tensor& x, const Optional& x_t,
                        const Tensor& coef, const Tensor& noise, const Optional& endpoint, const Optional& teacher_uncond,
                        const Optional& guidance, const Optional& q_rows, double alpha, double beta, double q, double kappa,
                        bool mean, bool want_teacher, bool want_fake, bool want_x, bool want_x_t, bool want_uncond) {
  Grads7 grads = generator_frame(teacher_out, fake_out, x, x_t, coef, noise, endpoint, teacher_uncond, guidance, q_rows, alpha,
                                 beta, q, kappa, mean, {want_teacher, want_fake, want_x, want_x_t, want_uncond});
  // An operator's results may not share their memory.
  if (!teacher_uncond.has_value()) std::get<6>(grads) = Frame(x, "x").none();
  return grads;
}

void scale_grads_(const std::vector<Tensor>& grads, const Tensor& scale) {
  REQUIRE(scale.is_cpu() && (scale.scalar_type() == ScalarType::Float || scale.scalar_type() == ScalarType::Double),
                  "scale must be a float32 or float64 CPU tensor");
  const bool wide = scale.scalar_type() == ScalarType::Double;
  const int64_t factors = scale.numel();
  REQUIRE(factors == 1 || scale.is_contiguous(), "scale must be contiguous");
  const char* const factor = static_cast<const char*>(memory_of(scale, "scale"));
  std::vector<Frame> frames;
  for (const Tensor& grad : grads) {
    if (grad.numel() == 0) continue;
    const Frame& frame = frames.emplace_back(grad, "grads");
    REQUIRE(factors == 1 || factors == frame.shape.rows, "scale must have 1 or ", frame.shape.rows,
                    " elements, got ", factors);
    const char* const memory = static_cast<const char*>(grad.const_data_ptr());
    REQUIRE(memory + frame.elements() * frame.item_size() <= factor || factor + factors * (wide ? 8 : 4) <= memory,
            "scale must not share memory with grads");
  }
  for (const Frame& frame : frames) {
    void* memory = frame.main.mutable_data_ptr();
    const rf::ScaleArgs args{frame.shape, memory, memory, factor, wide, factors == 1 ? 0 : 1, true, false};
    const auto& k = rf::kernels(frame.dtype);
    frame.run([&](int64_t begin, int64_t end) { k.scale(args, begin, end); });
  }
}

// The pieces of a list of tensors, tensor by tensor. Threads divide the pieces among themselves.
class Pieces {
 public:
  explicit Pieces(const std::vector<Tensor>& tensors) : first_{0} {
    for (const Tensor& t : tensors) {
      sizes_.push_back(t.numel());
      first_.push_back(first_.back() + (t.numel() + rf::PIECE - 1) / rf::PIECE);
    }
  }

  int64_t count() const { return first_.back(); }

  // Runs body(piece, tensor, begin, end) for every piece on torch's threads.
  template <class F>
  void run(const F& body) const {
    const auto work = [&](int64_t from, int64_t to) {
      size_t tensor = std::upper_bound(first_.begin(), first_.end(), from) - first_.begin() - 1;
      for (int64_t piece = from; piece < to; ++piece) {
        while (piece >= first_[tensor + 1]) ++tensor;
        const int64_t begin = (piece - first_[tensor]) * rf::PIECE;
        body(piece, tensor, begin, std::min(begin + rf::PIECE, sizes_[tensor]));
      }
    };
    constexpr int64_t GRAIN = ELEMENTS_PER_THREAD / rf::PIECE;
    if (count() <= GRAIN)
      work(0, count());
    else
      torch::stable::parallel_for(0, count(), GRAIN, work);
  }

 private:
  std::vector<int64_t> first_, sizes_;
};

bool wide_reals(const std::vector<Tensor>& tensors, const char* name) {
  REQUIRE(!tensors.empty(), name, " must have at least one tensor");
  const ScalarType dtype = tensors[0].scalar_type();
  REQUIRE(dtype == ScalarType::Float || dtype == ScalarType::Double, name, " must be float32 or float64");
  for (const Tensor& t : tensors) {
    REQUIRE(t.is_cpu() && t.scalar_type() == dtype, name, " must all be on the CPU and of one dtype");
    REQUIRE(gapless(t), name, " must have no gaps in memory");
  }
  return dtype == ScalarType::Double;
}

// One number of a float32 or float64 tensor that is contiguous.
double number(const Tensor& t, int64_t i, const char* name) {
  REQUIRE(t.is_cpu() && t.is_contiguous() && i < t.numel(), name, " must be a contiguous CPU tensor with ", i + 1,
          " or more elements");
  const void* const memory = memory_of(t, name);
  if (t.scalar_type() == ScalarType::Double) return static_cast<const double*>(memory)[i];
  REQUIRE(t.scalar_type() == ScalarType::Float, name, " must be float32 or float64");
  return static_cast<const float*>(memory)[i];
}

int64_t* counters(const Tensor& counts) {
  REQUIRE(counts.is_cpu() && counts.scalar_type() == ScalarType::Long && counts.numel() == 2 && counts.is_contiguous(),
          "counts must be a contiguous int64 CPU tensor of shape (2,)");
  int64_t* const counted = static_cast<int64_t*>(writable(counts, "counts"));
  REQUIRE(std::min(counted[0], counted[1]) >= 0 && std::max(counted[0], counted[1]) < int64_t(1) << 62,
          "counts must hold two counts, got ", counted[0], " and ", counted[1]);
  return counted;
}

Tensor begin_step_(const std::vector<Tensor>& grads, const std::vector<Tensor>& steps, const Tensor& counts) {
  const bool wide = wide_reals(grads, "grads");
  const Pieces pieces(grads);
  std::vector<double> partial(pieces.count(), 0.0);
  std::vector<const void*> memory;
  for (const Tensor& grad : grads) memory.push_back(memory_of(grad, "grads"));
  int64_t* const counted = counters(counts);
  std::vector<float*> taken;
  for (const Tensor& step : steps) {
    REQUIRE(step.is_cpu() && step.scalar_type() == ScalarType::Float && step.numel() == 1,
            "steps must be float32 CPU tensors of one element");
    taken.push_back(static_cast<float*>(writable(step, "steps")));
  }
  const auto& k = rf::optimiser_kernels(wide);
  pieces.run([&](int64_t piece, size_t tensor, int64_t begin, int64_t end) {
    partial[piece] = k.sum_squares(memory[tensor], begin, end);
  });
  double total = 0;
  for (double sum : partial) total += sum;
  Tensor norm = allocate(nullptr, nullptr, 0, wide ? ScalarType::Double : ScalarType::Float);
  if (wide)
    *static_cast<double*>(norm.mutable_data_ptr()) = std::sqrt(total);
  else
    *static_cast<float*>(norm.mutable_data_ptr()) = float(std::sqrt(total));

  const bool finite = std::isfinite(number(norm, 0, "norm"));
  counted[0] += 1;
  counted[1] += !finite;
  for (float* step : taken) *step += finite;
  return norm;
}

// Refuses memory that a call writes and also reads or writes through another argument: threads run in no fixed order.
class Apart {
 public:
  void add(const void* memory, int64_t bytes, const char* name, bool written) {
    if (bytes > 0) spans_.push_back({static_cast<const char*>(memory), static_cast<const char*>(memory) + bytes, name, written});
  }

  void check() {
    std::sort(spans_.begin(), spans_.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
    const Span* read = nullptr;     // the one that reaches furthest
    const Span* written = nullptr;
    for (const Span& span : spans_) {
      for (const Span* before : {written, span.written ? read : nullptr})
        REQUIRE(before == nullptr || before->end <= span.begin, span.name, " must not share memory with ",
                before->name == span.name ? "each other" : before->name);
      const Span*& last = span.written ? written : read;
      if (last == nullptr || last->end < span.end) last = &span;
    }
  }

 private:
  struct Span {
    const char *begin, *end, *name;
    bool written;
  };
  std::vector<Span> spans_;
};

// The memory of list[i], which must be laid out like params[i].
std::vector<char*> like_params(Apart& apart, const std::vector<Tensor>& list, const std::vector<Tensor>& params,
                               const char* name, bool written = true, int64_t rows = 0) {
  REQUIRE(list.size() == params.size(), name, " must have ", params.size(), " tensors like params, got ", list.size());
  std::vector<char*> memory;
  for (size_t i = 0; i < list.size(); ++i) {
    const Tensor &t = list[i], &p = params[i];
    const int64_t dims = p.dim(), extra = rows > 0;
    REQUIRE(t.is_cpu() && t.scalar_type() == p.scalar_type(), name, " must be on the CPU with the dtype of params");
    REQUIRE(t.dim() == dims + extra && (rows == 0 || t.size(0) == rows), name, "[", i, "] must have ",
            rows > 0 ? "a row for each average, of" : "", " the shape of its parameter");
    const auto a = t.sizes(), b = p.sizes(), sa = t.strides(), sb = p.strides();
    for (int64_t d = 0; d < dims; ++d)
      REQUIRE(a[d + extra] == b[d] && (b[d] < 2 || sa[d + extra] == sb[d]), name, "[", i,
              "] must have the shape and the memory layout of its parameter");
    char* const start = static_cast<char*>(written ? writable(t, name) : const_cast<void*>(memory_of(t, name)));
    const int64_t item = t.scalar_type() == ScalarType::Double ? 8 : 4;
    for (int64_t row = 0; row < (extra ? rows : 1); ++row)
      apart.add(start + (extra ? row * t.stride(0) * item : 0), p.numel() * item, name, written);
    memory.push_back(start);
  }
  return memory;
}

void adam_(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& exp_avgs,
           const std::vector<Tensor>& exp_avg_sqs, const std::vector<Tensor>& emas, const Tensor& norm, const Tensor& step,
           const Tensor& lr, const Tensor& counts, const Tensor& ema_decays, double clip, double beta1, double beta2,
           double eps, double weight_decay, bool maximize, bool ema_warmup) {
  const bool wide = wide_reals(params, "params");
  REQUIRE(ema_decays.defined(), "ema_decays must be a tensor, empty where there are no averages");
  const int64_t rows = ema_decays.numel();
  REQUIRE(!exp_avgs.empty() || beta1 == 0, "exp_avgs are needed unless beta1 is 0");
  Apart apart;
  const std::vector<char*> none(params.size(), nullptr);
  const auto p = like_params(apart, params, params, "params"), g = like_params(apart, grads, params, "grads", false),
             v = like_params(apart, exp_avg_sqs, params, "exp_avg_sqs");
  const auto m = exp_avgs.empty() ? none : like_params(apart, exp_avgs, params, "exp_avgs");
  const auto e = rows == 0 ? none : like_params(apart, emas, params, "emas", true, rows);
  apart.check();
  std::vector<rf::AdamTensor> tensors;
  for (size_t i = 0; i < p.size(); ++i)
    tensors.push_back({p[i], g[i], m[i], v[i], e[i], rows == 0 ? 0 : emas[i].stride(0)});

  const double length = number(norm, 0, "norm");
  const int64_t before = counters(counts)[0] - 1;
  // If the very first step is skipped, no step has been taken yet, and its count is 0.
  const double taken = std::max(number(step, 0, "step"), 1.0);
  const double rate = number(lr, std::max<int64_t>(0, std::min(before, lr.numel() - 1)), "lr");
  const double ramp = ema_warmup ? double(1 + before) / double(10 + before) : 1.0;
  std::vector<double> weights;
  for (int64_t k = 0; k < rows; ++k) weights.push_back(1 - std::min(number(ema_decays, k, "ema_decays"), ramp));
  if (!std::isfinite(length)) return;
  const double factor = clip > 0 && length > clip ? clip / length : 1.0;
  const rf::AdamStep numbers{maximize ? -factor : factor,
                             weight_decay,
                             beta1,
                             beta2,
                             eps,
                             rate / (1 - std::pow(beta1, taken)),
                             1 / std::sqrt(1 - std::pow(beta2, taken)),
                             weights.data(),
                             rows};
  const auto& k = rf::optimiser_kernels(wide);
  Pieces(params).run([&](int64_t, size_t tensor, int64_t begin, int64_t end) {
    k.adam(numbers, tensors[tensor], begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(realuid_fast, CPU, m) {
  m.impl("normal_like", TORCH_BOX(&normal_like));
  m.impl("interpolate", TORCH_BOX(&interpolate));
  m.impl("interpolate_grads", TORCH_BOX(&interpolate_grads));
  m.impl("mean_abs_error", TORCH_BOX(&mean_abs_error));
  m.impl("matching", TORCH_BOX(&matching));
  m.impl("fake", TORCH_BOX(&fake));
  m.impl("generator", TORCH_BOX(&generator));
  m.impl("guided_fake", TORCH_BOX(&guided_fake));
  m.impl("guided_generator", TORCH_BOX(&guided_generator));
  m.impl("scale_grads_", TORCH_BOX(&scale_grads_));
  m.impl("begin_step_", TORCH_BOX(&begin_step_));
  m.impl("adam_", TORCH_BOX(&adam_));
}
