// The main input of a fused call: its shape, the checks of all other tensors against it, new results, and the run over threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "arguments.h"
#include "cpu/fused.h"

namespace realuid_fast::arguments {

namespace rf = realuid_fast;

// Outputs larger than this leave the caches before anyone reads them: write them past the caches.
constexpr int64_t STREAM_BYTES = int64_t(1) << 20;

// Whether a tensor has no gaps and samples are its outermost dimension.
inline bool dense(const Tensor& t) {
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

inline void* pointer(const Tensor& t) { return t.numel() == 0 ? nullptr : t.mutable_data_ptr(); }

inline double mean_scale(bool mean, int64_t count) { return mean && count > 0 ? 1.0 / double(count) : 1.0; }

}  // namespace realuid_fast::arguments
