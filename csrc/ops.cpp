// The losses' operators on LibTorch's stable ABI: arguments are checked and named here, kernels are dumb. Schemas live in Python.
#include <torch/csrc/stable/ops.h>

#include <memory>
#include <tuple>
#include <vector>

#include "frame.h"

namespace {

namespace rf = realuid_fast;
using namespace realuid_fast::arguments;
using Grads2 = std::tuple<Tensor, Tensor>;
using Grads3 = std::tuple<Tensor, Tensor, Tensor>;
using Grads7 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

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
            const Optional& teacher_out, const Optional& endpoint, const Optional& teacher_uncond, const Optional& guidance,
            int64_t noise_rows, int64_t n_real, double a_gen, double b_gen, double d_gen, double c_gen, double a_real,
            double b_real, double d_real, double c_real, bool mean, bool want_fake) {
  return fake_frame(Frame(x, "x"), "fake_out", fake_out, x, x_t, coef, noise, teacher_out, endpoint, teacher_uncond, guidance,
                    noise_rows, n_real, {a_gen, b_gen, d_gen, c_gen}, {a_real, b_real, d_real, c_real}, mean, want_fake);
}

Grads7 generator(const Tensor& teacher_out, const Tensor& fake_out, const Tensor& x, const Optional& x_t, const Tensor& coef,
                 const Tensor& noise, const Optional& endpoint, const Optional& teacher_uncond, const Optional& guidance,
                 const Optional& q_rows, double alpha, double beta, double q, double kappa, bool mean, bool want_teacher,
                 bool want_fake, bool want_x, bool want_x_t, bool want_uncond) {
  const Frame frame(x, "x");
  REQUIRE(x_t.has_value() || !want_x_t, "x_t is needed where its gradient is asked for");
  Tensor g_teacher = frame.like_if(want_teacher), g_fake = frame.like_if(want_fake), g_x = frame.like_if(want_x),
         g_x_t = frame.like_if(want_x_t), g_uncond = frame.like_if(want_uncond && teacher_uncond.has_value());
  std::vector<double> partial = frame.sums(coef);
  const rf::GeneratorArgs args{frame.shape,
                               frame.same(teacher_out, "teacher_out"),
                               frame.same(fake_out, "fake_out"),
                               x.const_data_ptr(),
                               frame.same(x_t, "x_t"),
                               frame.same(endpoint, "endpoint"),
                               frame.coefficients(coef),
                               frame.guidance(teacher_uncond, guidance),
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
                               pointer(g_uncond),
                               partial.data(),
                               frame.stream()};
  frame.check_x_t(x_t, args.coef);
  frame.check_left_out(endpoint, "endpoint", args.coef, rf::Q, "q");
  const auto& k = rf::kernels(frame.dtype);
  frame.run([&](int64_t begin, int64_t end) { k.generator(args, begin, end); });
  auto [loss, rows] = frame.reduce(partial, frame.shape.rows);
  return {loss, rows, g_teacher, g_fake, g_x, g_x_t, g_uncond};
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(realuid_fast, CPU, m) {
  m.impl("normal_like", TORCH_BOX(&normal_like));
  m.impl("interpolate", TORCH_BOX(&interpolate));
  m.impl("interpolate_grads", TORCH_BOX(&interpolate_grads));
  m.impl("mean_abs_error", TORCH_BOX(&mean_abs_error));
  m.impl("matching", TORCH_BOX(&matching));
  m.impl("fake", TORCH_BOX(&fake));
  m.impl("generator", TORCH_BOX(&generator));
  m.impl("scale_grads_", TORCH_BOX(&scale_grads_));
}
