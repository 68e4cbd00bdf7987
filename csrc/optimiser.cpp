// The optimiser step's operators on LibTorch's stable ABI: arguments are checked and named here, kernels are dumb.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "arguments.h"
#include "cpu/optimiser.h"

namespace {

namespace rf = realuid_fast;
using namespace realuid_fast::arguments;

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
  m.impl("begin_step_", TORCH_BOX(&begin_step_));
  m.impl("adam_", TORCH_BOX(&adam_));
}
