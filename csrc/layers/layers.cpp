// The networks' operators on LibTorch's stable ABI, like ../ops.cpp for the fused calls.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

#include "../arguments.h"
#include "conv.h"
#include "norm.h"

namespace {

namespace rf = realuid_fast;
using namespace realuid_fast::arguments;

// Tiles are taken in blocks whose patches and products take about this many bytes a thread: half of a core's own cache, the
// rest for a part of the filters. More bytes leave the cache; fewer tiles would have all filters read again more often.
constexpr int64_t BLOCK_BYTES = int64_t(1) << 20;

// Below this many elements of images a second thread costs more than it saves.
constexpr int64_t IMAGE_ELEMENTS = 16384;

// Memory between the parts of a call, aligned to lines. It stays with its thread: buffers of this size would be mapped and
// given back by every call, which costs as much as filling them.
class Scratch {
 public:
  void* get(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
      REQUIRE(memory_ != nullptr, "no memory for ", bytes, " bytes between the parts of a convolution");
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  int64_t size_ = 0;
};

int64_t item_size(ScalarType dtype) { return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2; }

ScalarType arithmetic(ScalarType storage) { return storage == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// `t` is [batch, channels, height, width] in channels_last order.
void check_images(const Tensor& t, const char* name) {
  REQUIRE(t.is_cpu(), name, " must be on the CPU");
  REQUIRE(t.dim() == 4, name, " must have four dimensions, got ", t.dim());
  const auto n = t.sizes(), s = t.strides();
  const int64_t expected[4] = {n[1] * n[2] * n[3], 1, n[1] * n[3], n[1]};
  for (int d = 0; d < 4; ++d)
    REQUIRE(t.numel() == 0 || n[d] == 1 || s[d] == expected[d], name, " must be channels_last in memory");
}

Tensor images_like(const Tensor& t, int64_t channels) {
  const int64_t sizes[4] = {t.size(0), channels, t.size(2), t.size(3)};
  const int64_t strides[4] = {channels * sizes[2] * sizes[3], 1, channels * sizes[3], channels};
  return allocate(sizes, strides, 4, t.scalar_type(), "images like those of x");
}

Tensor nothing(ScalarType dtype) {
  const int64_t size = 0, stride = 1;
  return allocate(&size, &stride, 1, dtype);
}

void zero(const Tensor& t) { std::fill_n(static_cast<char*>(t.mutable_data_ptr()), t.numel() * item_size(t.scalar_type()), 0); }

// The data of every convolution call: images x and the filters that go with them.
struct Conv {
  rf::Dtype dtype;
  rf::Images images;
  rf::Filters filters;
  const void* weight;
  int64_t real;  // bytes of a number in the arithmetic type
  const rf::ConvKernels& k;

  Conv(const Tensor& x, const Tensor& w) : dtype(storage(x, "x")), k(rf::conv_kernels(dtype)) {
    check_images(x, "x");
    REQUIRE(w.is_cpu() && w.dim() == 4 && w.size(2) == 3 && w.size(3) == 3, "weight must be a CPU tensor of 3x3 filters");
    REQUIRE(w.size(1) == x.size(1), "weight must have ", x.size(1), " input channels like x, got ", w.size(1));
    const ScalarType wanted = arithmetic(x.scalar_type());
    REQUIRE(w.scalar_type() == wanted, "weight must be ", wanted == ScalarType::Double ? "float64" : "float32",
            " for this dtype of x");
    memory_of(x, "x");
    weight = memory_of(w, "weight");
    images = {x.size(0), x.size(2), x.size(3)};
    filters = {w.size(1), w.size(0), w.stride(1), w.stride(0), w.stride(2), w.stride(3)};
    real = item_size(wanted);
  }

  // The transposed filters, turned around. A convolution with them turns the output's gradient into the input's.
  rf::Filters turned() const {
    return {filters.out, filters.in, filters.by_out, filters.by_in, -filters.by_row, -filters.by_column};
  }
  const void* last_weight() const {
    return static_cast<const char*>(weight) + 2 * (filters.by_row + filters.by_column) * real;
  }

  // y = x * f, + bias.
  void convolve(const void* x, const rf::Filters& f, const void* from, const void* bias, void* y) const {
    if (images.tiles() == 0 || f.out == 0) return;
    static thread_local Scratch of_filters;
    void* const points = of_filters.get(k.product_size(f.in, f.out) * real);
    const rf::FilterArgs transform{f, from, points};
    torch::stable::parallel_for(0, k.panels(f.out), 1, [&](int64_t begin, int64_t end) { k.filters(transform, begin, end); });
    const int64_t a_tile = (k.patch_size(1, f.in) + k.product_size(1, f.out)) * real;
    const int64_t block = std::max<int64_t>(1, BLOCK_BYTES / a_tile / k.rows) * k.rows;
    const int64_t tiles = images.tiles(), blocks = (tiles + block - 1) / block;
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      static thread_local Scratch of_tiles;
      const int64_t most = std::min(block, tiles);
      char* const scratch = static_cast<char*>(of_tiles.get(most * a_tile + 64));
      rf::ConvArgs args{images, f.in, f.out, x, points, bias, y, scratch, scratch + (k.patch_size(most, f.in) * real + 63) / 64 * 64};
      for (int64_t i = begin; i < end; ++i) k.convolve(args, i * block, std::min((i + 1) * block, tiles));
    });
  }
};

Tensor conv3x3(const Tensor& x, const Tensor& weight, const Optional& bias) {
  const Conv conv(x, weight);
  const void* added = nullptr;
  if (bias.has_value()) {
    REQUIRE(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == conv.filters.out && bias->is_contiguous() &&
                bias->scalar_type() == weight.scalar_type(),
            "bias must be a contiguous CPU tensor of shape (", conv.filters.out, ",) with the dtype of weight");
    added = memory_of(*bias, "bias");
  }
  Tensor y = images_like(x, conv.filters.out);
  conv.convolve(x.const_data_ptr(), conv.filters, conv.weight, added, y.mutable_data_ptr());
  return y;
}

std::tuple<Tensor, Tensor> conv3x3_grads(const Tensor& grad, const Tensor& x, const Tensor& weight, bool want_x,
                                         bool want_weight) {
  const Conv conv(x, weight);
  check_images(grad, "grad");
  REQUIRE(grad.scalar_type() == x.scalar_type() && grad.size(0) == x.size(0) && grad.size(1) == conv.filters.out &&
              grad.size(2) == x.size(2) && grad.size(3) == x.size(3),
          "grad must have the dtype and the images of x with ", conv.filters.out, " channels");
  const void* const from = memory_of(grad, "grad");
  Tensor g_x = nothing(x.scalar_type()), g_weight = nothing(weight.scalar_type());
  if (want_x) {
    g_x = images_like(x, x.size(1));
    if (conv.filters.out == 0)
      zero(g_x);
    else
      conv.convolve(from, conv.turned(), conv.last_weight(), nullptr, g_x.mutable_data_ptr());
  }
  if (want_weight) {
    // Laid out like the filters, unless these lie with gaps or on top of each other.
    const auto sizes = weight.sizes(), strides = weight.strides();
    const int64_t in_order[4] = {9 * sizes[1], 9, 3, 1};
    g_weight = allocate(sizes.data(), gapless(weight) ? strides.data() : in_order, 4, weight.scalar_type());
    if (conv.images.tiles() == 0 || weight.numel() == 0) {
      zero(g_weight);
    } else {
      const auto& k = conv.k;
      const int64_t in = conv.filters.in, out = conv.filters.out, tiles = conv.images.tiles();
      const int64_t a_tile = (k.patch_size(1, in) + k.product_size(1, out)) * conv.real;
      // All threads share a block here.
      const int64_t bytes = BLOCK_BYTES * torch::stable::get_num_threads();
      const int64_t block = std::min(tiles, std::max<int64_t>(64, bytes / a_tile));
      static thread_local Scratch of_tiles, of_sums;
      char* const patches = static_cast<char*>(of_tiles.get(block * a_tile + 64));
      char* const grads = patches + (k.patch_size(block, in) * conv.real + 63) / 64 * 64;
      void* const sums = of_sums.get(k.product_size(in, out) * conv.real);
      for (int64_t first = 0; first < tiles; first += block) {
        const int64_t count = std::min(block, tiles - first);
        const rf::SpreadArgs spread{conv.images, in, out, first, count, x.const_data_ptr(), from, patches, grads};
        torch::stable::parallel_for(0, count, 8, [&](int64_t begin, int64_t end) { k.spread(spread, begin, end); });
        const rf::SumArgs sum{in, out, count, patches, grads, sums, first == 0};
        torch::stable::parallel_for(0, rf::POINTS, 1, [&](int64_t begin, int64_t end) { k.sum(sum, begin, end); });
      }
      const rf::Filters written{in, out, g_weight.stride(1), g_weight.stride(0), g_weight.stride(2), g_weight.stride(3)};
      const rf::FoldArgs fold{written, sums, g_weight.mutable_data_ptr()};
      torch::stable::parallel_for(0, k.panels(out), 1, [&](int64_t begin, int64_t end) { k.fold(fold, begin, end); });
    }
  }
  return {g_x, g_weight};
}

const void* of_channels(const Tensor& t, const char* name, int64_t channels, ScalarType dtype) {
  REQUIRE(t.is_cpu() && t.dim() == 1 && t.size(0) == channels && t.is_contiguous() && t.scalar_type() == dtype, name,
          " must be a contiguous CPU tensor of shape (", channels, ",), float32 (float64 for float64)");
  return memory_of(t, name);
}

// The data of the normalisation, forward and backward.
struct Norm {
  rf::Dtype dtype;
  ScalarType real;
  int64_t batch, channels, pixels, groups;
  const void *x, *shift = nullptr, *weight, *bias;

  Norm(const Tensor& images, const Optional& added, const Tensor& w, const Tensor& b, int64_t in_groups)
      : dtype(storage(images, "x")), real(arithmetic(images.scalar_type())), groups(in_groups) {
    check_images(images, "x");
    batch = images.size(0), channels = images.size(1), pixels = images.size(2) * images.size(3);
    REQUIRE(groups > 0 && groups <= channels && channels % groups == 0, "groups must divide the ", channels, " channels of x, got ", groups);
    x = memory_of(images, "x");
    weight = of_channels(w, "weight", channels, real);
    bias = of_channels(b, "bias", channels, real);
    if (added.has_value()) {
      REQUIRE(added->is_cpu() && added->dim() == 2 && added->size(0) == batch && added->size(1) == channels &&
                  added->is_contiguous() && added->scalar_type() == real,
              "shift must be a contiguous CPU tensor of shape (", batch, ", ", channels, "), float32 (float64 for float64)");
      shift = memory_of(*added, "shift");
    }
  }

  bool empty() const { return batch == 0 || channels == 0 || pixels == 0; }

  template <class F>
  void run(const F& body) const {
    const int64_t grain = std::max<int64_t>(1, IMAGE_ELEMENTS / (channels * pixels));
    torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
      static thread_local Scratch rows;
      body(begin, end, rows.get(rf::NORM_ROWS * channels * int64_t(sizeof(double))));
    });
  }
};

std::tuple<Tensor, Tensor> norm_silu(const Tensor& x, const Optional& shift, const Tensor& weight, const Tensor& bias,
                                     int64_t groups, double eps) {
  const Norm norm(x, shift, weight, bias, groups);
  Tensor y = images_like(x, norm.channels);
  const int64_t sizes[3] = {norm.batch, groups, 2}, strides[3] = {2 * groups, 2, 1};
  Tensor statistics = allocate(sizes, strides, 3, norm.real, "the statistics of x");
  if (norm.empty()) {
    zero(statistics);
    return {y, statistics};
  }
  const rf::NormArgs args{norm.batch, norm.pixels, norm.channels, groups, eps, norm.x, norm.shift, norm.weight, norm.bias,
                          statistics.mutable_data_ptr(), y.mutable_data_ptr()};
  const auto& k = rf::norm_kernels(norm.dtype);
  norm.run([&](int64_t begin, int64_t end, void* scratch) { k.forward(args, begin, end, scratch); });
  return {y, statistics};
}

template <class Real>
void add_images(const std::vector<double>& of_images, int64_t batch, int64_t channels, int64_t which, const Tensor& to) {
  Real* const out = static_cast<Real*>(to.mutable_data_ptr());
  for (int64_t c = 0; c < channels; ++c) {
    double total = 0;
    for (int64_t image = 0; image < batch; ++image) total += of_images[(2 * image + which) * channels + c];
    out[c] = Real(total);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_silu_grads(const Tensor& grad, const Tensor& x, const Optional& shift,
                                                           const Tensor& weight, const Tensor& bias,
                                                           const Tensor& statistics) {
  REQUIRE(statistics.is_cpu() && statistics.dim() == 3 && statistics.size(2) == 2 && statistics.is_contiguous(),
          "statistics must be a contiguous CPU tensor of shape (batch, groups, 2)");
  const Norm norm(x, shift, weight, bias, statistics.size(1));
  REQUIRE(statistics.size(0) == norm.batch && statistics.scalar_type() == norm.real,
          "statistics must belong to the images of x, float32 (float64 for float64)");
  check_images(grad, "grad");
  REQUIRE(grad.scalar_type() == x.scalar_type() && grad.size(0) == x.size(0) && grad.size(1) == x.size(1) &&
              grad.size(2) == x.size(2) && grad.size(3) == x.size(3),
          "grad must have the dtype and the shape of x");
  const void *const from = memory_of(grad, "grad"), *const kept = memory_of(statistics, "statistics");
  const int64_t channels = norm.channels, one = 1;
  const int64_t sizes[2] = {norm.batch, channels}, strides[2] = {channels, 1};
  Tensor g_x = images_like(x, channels), g_weight = allocate(&channels, &one, 1, norm.real),
         g_bias = allocate(&channels, &one, 1, norm.real);
  Tensor g_shift = norm.shift == nullptr && !shift.has_value() ? nothing(norm.real) : allocate(sizes, strides, 2, norm.real);
  if (norm.empty()) {
    for (const Tensor* t : {&g_x, &g_shift, &g_weight, &g_bias}) zero(*t);
    return {g_x, g_shift, g_weight, g_bias};
  }
  std::vector<double> of_images(norm.batch * 2 * channels);
  const rf::NormGradArgs args{norm.batch, norm.pixels, channels, norm.groups, norm.x, norm.shift, norm.weight, norm.bias,
                              kept, from, g_x.mutable_data_ptr(),
                              norm.shift == nullptr ? nullptr : g_shift.mutable_data_ptr(), of_images.data()};
  const auto& k = rf::norm_kernels(norm.dtype);
  norm.run([&](int64_t begin, int64_t end, void* scratch) { k.backward(args, begin, end, scratch); });
  for (int64_t which = 0; which < 2; ++which) {
    const Tensor& to = which == 0 ? g_weight : g_bias;
    if (norm.real == ScalarType::Double)
      add_images<double>(of_images, norm.batch, channels, which, to);
    else
      add_images<float>(of_images, norm.batch, channels, which, to);
  }
  return {g_x, g_shift, g_weight, g_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(realuid_fast, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3));
  m.impl("conv3x3_grads", TORCH_BOX(&conv3x3_grads));
  m.impl("norm_silu", TORCH_BOX(&norm_silu));
  m.impl("norm_silu_grads", TORCH_BOX(&norm_silu_grads));
}
