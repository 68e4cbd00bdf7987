// Helpers for the operators' arguments: errors that name an argument, pointers to its memory, and new results.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "cpu/storage.h"

namespace realuid_fast::arguments {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Below this many elements a second thread costs more than it saves.
constexpr int64_t ELEMENTS_PER_THREAD = 32768;

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

// An error of one sentence without a source location, because it is meant for the caller of the operator.
#define REQUIRE(condition, ...) \
  do {                          \
    if (!(condition)) refuse(__VA_ARGS__); \
  } while (false)

inline Dtype storage(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::Double:
      return Dtype::float64;
    default:
      refuse(name, " must be float32, bfloat16, float16 or float64");
  }
}

// The address of `t`. A tensor whose storage was freed (sharded training does that) has a shape but no memory.
inline const void* memory_of(const Tensor& t, const char* name) {
  const void* memory = t.const_data_ptr();
  REQUIRE(memory != nullptr || t.numel() == 0, name, " has no memory: its storage was freed");
  return memory;
}

inline void* writable(const Tensor& t, const char* name) {
  memory_of(t, name);
  return t.mutable_data_ptr();
}

// Whether the memory of `t` holds each element once and has no gaps, in any order.
inline bool gapless(const Tensor& t) {
  if (t.is_contiguous() || t.numel() == 0) return true;
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t dims = t.dim();
  std::vector<int64_t> order;
  for (int64_t d = 0; d < dims; ++d)
    if (sizes[d] != 1) order.push_back(d);
  std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return strides[i] < strides[j]; });
  int64_t expected = 1;
  for (int64_t d : order) {
    if (strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// The C shim rather than a dispatched empty: a small call spends most of its time here.
inline Tensor allocate(const int64_t* sizes, const int64_t* strides, int64_t dims, ScalarType dtype,
                       const char* what = "the result") {
  AtenTensorHandle handle = nullptr;
  static const int64_t nothing = 0;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  REQUIRE(aoti_torch_empty_strided(dims, dims ? sizes : &nothing, dims ? strides : &nothing, code,
                                   aoti_torch_device_type_cpu(), 0, &handle) == 0,
          "no memory for ", what);
  return Tensor(handle);
}

}  // namespace realuid_fast::arguments
