// 3x3 convolutions of stride 1 and padding 1 on channels_last images, by Winograd's minimal filtering (Lavin and Gray,
// arXiv:1509.09308): a tile of 4x4 outputs takes 36 multiplications a pair of channels in place of 144.
//
// The points are 0, +-3/4, +-3/2 and infinity. Their products are exact. The error is about five times that of the direct sum;
// with points 0, +-1, +-2 it would be two to three times larger still. It is in proportion to the whole filter and the whole
// patch, including filter entries that only meet the padding.
//   output = A^T [ (G filter G^T) . (B^T patch B) ] A       summed over input channels, one matrix product a point pair
//   filter gradient = G^T [ (A grad A^T) . (B^T patch B) ] G    summed over tiles
// and the input's gradient is a convolution of the output's with the filters turned around.
//
// Matrices lie in panels: `panel` columns side by side, one row after another, so that a product reads and writes in order.
// Storage is float32, bfloat16, float16 or float64; filters and all arithmetic are float32, or float64 for float64.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../cpu/isa.h"
#include "../cpu/storage.h"

namespace realuid_fast {

constexpr int TILE = 4, PATCH = 6, POINTS = PATCH * PATCH;

struct Images {
  int64_t batch, height, width;
  int64_t down() const { return (height + TILE - 1) / TILE; }
  int64_t across() const { return (width + TILE - 1) / TILE; }
  int64_t tiles() const { return batch * down() * across(); }
};

// Filters [out, in, 3, 3] by their strides in elements, which turn them around where they are negative.
struct Filters {
  int64_t in, out;
  int64_t by_in, by_out, by_row, by_column;
};

// G filter G^T of the panels [begin, end) of output channels: to[point][panel][in].
struct FilterArgs {
  Filters filters;
  const void* weight;
  void* to;
};

// Tiles [begin, end) of one convolution.
struct ConvArgs {
  Images images;
  int64_t in, out;
  const void *x, *filters, *bias;  // bias may be null
  void* y;
  void *patches, *products;        // scratch of patch_size() and product_size() of end - begin tiles
};

// Tiles [first + begin, first + end) of x and grad taken to the points, for a block of `count` tiles from `first` on.
struct SpreadArgs {
  Images images;
  int64_t in, out, first, count;
  const void *x, *grad;
  void *patches, *grads;  // [point][count][row of in], [point][panel][count]
};

// sums[point][panel][in] += patches^T grads for the points [begin, end).
struct SumArgs {
  int64_t in, out, count;
  const void *patches, *grads;
  void* sums;
  bool first;  // = instead of +=
};

// G^T sums G for the panels [begin, end), to the gradient of the filters.
struct FoldArgs {
  Filters filters;
  const void* sums;
  void* grad;
};

// Elements of a row of patches. Rows of many lines get one more, so that those below each other do not fall on the same
// places of the cache.
inline int64_t patch_row(int64_t channels, int64_t lanes) {
  const int64_t whole = (channels + lanes - 1) / lanes * lanes;
  return whole < 4 * lanes ? whole : whole + lanes;
}

struct ConvKernels {
  int64_t panel;  // columns
  int64_t rows;   // a block of tiles is best a multiple of this
  int64_t lanes;  // of a vector; a row of patches is padded to a multiple of this
  void (*filters)(const FilterArgs&, int64_t begin, int64_t end);
  void (*convolve)(const ConvArgs&, int64_t begin, int64_t end);
  void (*spread)(const SpreadArgs&, int64_t begin, int64_t end);
  void (*sum)(const SumArgs&, int64_t begin, int64_t end);
  void (*fold)(const FoldArgs&, int64_t begin, int64_t end);

  int64_t panels(int64_t channels) const { return (channels + panel - 1) / panel; }
  int64_t row(int64_t channels) const { return patch_row(channels, lanes); }
  int64_t patch_size(int64_t tiles, int64_t channels) const { return POINTS * tiles * row(channels); }
  int64_t product_size(int64_t rows_of_panel, int64_t channels) const { return POINTS * rows_of_panel * panels(channels) * panel; }
};

REALUID_EACH_ISA(extern const ConvKernels conv_table[DTYPES];)

// The kernels for one storage type of the images on the instruction set in use.
inline const ConvKernels& conv_kernels(Dtype dtype) { return REALUID_PICK(conv_table)[int(dtype)]; }

}  // namespace realuid_fast
