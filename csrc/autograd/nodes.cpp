// The autograd nodes of the losses and of the interpolant, on the installed torch's own headers: its stable ABI has no autograd.
//
// The operators of realuid_fast_node take the arguments of those of realuid_fast and return the same bits, or nothing where a
// call is not plain: arguments that do not fit together, a transformed tensor, a device without kernels. Then Python has the
// answer, a node of its own or the sentence that names the wrong argument. The operators of explicit gradients have no node: they
// are here for their check, which takes Python as long as a small kernel. ops/registry.py is the only caller.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "plans.h"

namespace {

using at::Tensor;
using c10::DispatchKey;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using torch::jit::Stack;
template <size_t N>
using Positions = std::array<size_t, N>;
constexpr size_t NONE = size_t(-1);

c10::OperatorHandle find(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("realuid_fast::" + name).c_str(), "");
}

// Whether the call is traced or transformed: this tensor then stands for another, and no kernel may write into memory.
bool traced(const Tensor& tensor) {
  return tensor.key_set().has_any(c10::DispatchKeySet({DispatchKey::Python, DispatchKey::Functionalize,
                                                       DispatchKey::Batched, DispatchKey::FuncTorchBatched,
                                                       DispatchKey::FuncTorchGradWrapper}));
}

void refuse_second_derivative(const Tensor& incoming, const char* call) {
  // A traced backward runs in grad mode too, so only plain tensors tell that create_graph was asked for.
  if (c10::GradMode::is_enabled() && !traced(incoming))
    throw std::runtime_error(std::string(call) + " has no second derivative: call backward without create_graph=True");
}

// Whether the tensor is one number on the CPU, and that is 1. A number on a device is not read.
bool is_one(const Tensor& t) {
  if (!t.is_cpu() || t.numel() != 1) return false;
  return t.scalar_type() == at::kFloat    ? *t.const_data_ptr<float>() == 1
         : t.scalar_type() == at::kDouble ? *t.const_data_ptr<double>() == 1
                                          : false;
}

// The kept gradients times the incoming gradient, in the kernel's own buffers. The host reads no value.
void scale_by(const Tensor& incoming, variable_list& grads) {
  if (traced(incoming)) {
    // Plain arithmetic, which a compiler can fuse with later operations.
    for (Tensor& grad : grads) {
      std::vector<int64_t> per_row(grad.dim(), 1);
      per_row[0] = -1;
      grad = grad.mul(incoming.dim() == 0 ? incoming : incoming.view(per_row)).to(grad.scalar_type());
    }
    return;
  }
  // A second backward will come for the same gradients, so this one must not scale them in place.
  if (torch::autograd::get_current_graph_task_keep_graph())
    for (Tensor& grad : grads) grad = grad.clone();
  // A loss that backward() is called on has the incoming gradient 1, and on the CPU the host can read it.
  if (is_one(incoming)) return;
  static const auto scale_grads = find("scale_grads_").typed<void(at::TensorList, const Tensor&)>();
  scale_grads.call(grads, incoming.contiguous());
}

// Positions of an operator's arguments: ops/losses.py has their names. All tensors that are not listed here are like x.
struct Matching {
  static constexpr const char *kernel = "matching", *call = "matching_loss";
  static constexpr size_t x = 1, coef = 3, noise = 4, noise_rows = 6, n_real = NONE;
  static constexpr Positions<1> differentiable = {0};
  static constexpr Positions<0> by_row = {};
};
struct Fake {
  static constexpr const char *kernel = "fake", *call = "fake_loss";
  static constexpr size_t x = 1, coef = 3, noise = 4, noise_rows = 9, n_real = 10;
  static constexpr Positions<1> differentiable = {0};
  static constexpr Positions<1> by_row = {8};
};
struct Generator {
  static constexpr const char *kernel = "generator", *call = "generator_loss";
  static constexpr size_t x = 2, coef = 4, noise = 5, noise_rows = NONE, n_real = NONE;
  static constexpr Positions<5> differentiable = {0, 1, 2, 3, 7};
  static constexpr Positions<2> by_row = {8, 9};
};
struct Interpolate {
  static constexpr const char *kernel = "interpolate", *call = "interpolate";
  static constexpr size_t x = 0, coef = 1, noise = 2, noise_rows = 4, n_real = NONE;
  static constexpr Positions<2> differentiable = {0, 3};
  static constexpr Positions<0> by_row = {};
};

template <class Call>
const c10::OperatorHandle& kernel() {
  static const c10::OperatorHandle found = find(Call::kernel);
  return found;
}

template <size_t N>
bool among(const Positions<N>& positions, size_t i) {
  return std::find(positions.begin(), positions.end(), i) != positions.end();
}

// The dtype of the arithmetic and of the coefficients, or nothing for a dtype that the calls do not take.
std::optional<at::ScalarType> arithmetic(at::ScalarType dtype) {
  if (dtype == at::kDouble) return at::kDouble;
  if (dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16) return at::kFloat;
  return std::nullopt;
}

// Whether the arguments of a call fit together: what tensors.py checks, by metadata alone. Names no culprit. An `explicit_call`
// records nothing, so only what no call differentiates may not require a gradient.
template <class Call>
bool fits(at::ArrayRef<c10::IValue> inputs, bool recording, bool explicit_call = false) {
  const auto plain = [](const Tensor& t) {
    return t.layout() == at::kStrided && !t.is_quantized() && !t.is_nested() && !traced(t);
  };
  const Tensor& x = inputs[Call::x].toTensor();
  const auto wide = arithmetic(x.scalar_type());
  if (!plain(x) || x.dim() == 0 || x.size(0) == 0 || !wide) return false;
  // Without a kernel the reference runs, of which Python warns.
  const auto device = x.is_cpu() ? DispatchKey::CPU : x.is_cuda() ? DispatchKey::CUDA : DispatchKey::Undefined;
  if (!kernel<Call>().hasKernelForDispatchKey(device)) return false;
  const int64_t rows = x.size(0);
  const auto layout = x.is_contiguous() ? at::MemoryFormat::Contiguous
                      : x.dim() == 4    ? at::MemoryFormat::ChannelsLast
                      : x.dim() == 5    ? at::MemoryFormat::ChannelsLast3d
                                        : at::MemoryFormat::Contiguous;
  int64_t noise_rows = rows;
  if constexpr (Call::noise_rows != NONE)
    if (!inputs[Call::noise_rows].isNone()) noise_rows = inputs[Call::noise_rows].toInt();
  if (noise_rows < 1 || noise_rows > rows) return false;
  if constexpr (Call::n_real != NONE) {
    const int64_t n_real = inputs[Call::n_real].toInt();
    if (n_real < 0 || n_real >= rows) return false;
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!inputs[i].isTensor()) continue;
    const Tensor& t = inputs[i].toTensor();
    const bool free = explicit_call ? i != Call::coef && i != Call::noise && !among(Call::by_row, i) : among(Call::differentiable, i);
    if (!plain(t) || t.device() != x.device() || (recording && t.requires_grad() && !free)) return false;
    if (i == Call::coef) {
      if (t.dim() != 2 || t.size(0) != rows || t.size(1) != 9 || t.scalar_type() != *wide || !t.is_contiguous()) return false;
    } else if (i == Call::noise && t.scalar_type() == at::kLong) {
      if (t.dim() != 1 || t.size(0) != 2) return false;
    } else if (among(Call::by_row, i)) {
      if (t.dim() != 1 || t.size(0) != rows || t.scalar_type() != *wide || !t.is_contiguous()) return false;
    } else {
      const int64_t own = i == Call::noise ? noise_rows : rows;
      if (t.scalar_type() != x.scalar_type() || t.dim() != x.dim() || t.size(0) != own ||
          t.sizes().slice(1) != x.sizes().slice(1) || !t.is_contiguous(layout))
        return false;
    }
  }
  return true;
}

// Runs the loss' kernel in the forward pass, keeps the gradients it computed, and hands them on in the backward pass.
template <class Loss>
struct LossNode : Function<LossNode<Loss>> {
  static constexpr bool is_traceable = true;
  using Wants = std::array<bool, Loss::differentiable.size()>;

  // Takes the loss' arguments off the stack, runs the kernel, and adds the gradients that `wants` asks for to `grads`.
  static Tensor run(Stack& stack, const Wants& wants, variable_list& grads) {
    const bool mean = stack.back().toBool();
    for (const bool want : wants) stack.emplace_back(want);
    kernel<Loss>().callBoxed(&stack);
    const auto results = stack.end() - wants.size() - 2;
    Tensor loss = std::move(results[mean ? 0 : 1]).toTensor();
    for (size_t i = 0; i < wants.size(); ++i)
      if (wants[i]) grads.push_back(std::move(results[i + 2]).toTensor());
    stack.erase(results, stack.end());
    return loss;
  }

  static Tensor forward(AutogradContext* ctx, Stack* stack, const Wants& wants, at::TensorList leaves) {
    variable_list grads;
    grads.reserve(leaves.size());
    Tensor loss = run(*stack, wants, grads);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(std::move(grads));
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    variable_list grads = ctx->get_saved_variables();
    if (incoming[0].defined()) {
      refuse_second_derivative(incoming[0], Loss::call);
      scale_by(incoming[0], grads);
    } else {
      grads.assign(grads.size(), Tensor());
    }
    grads.insert(grads.begin(), 2, Tensor());  // in the place of `stack` and `wants`
    return grads;
  }
};

template <class Loss>
Tensor loss(Stack& stack, at::ArrayRef<c10::IValue> inputs, bool recording) {
  using Node = LossNode<Loss>;
  typename Node::Wants wants{};
  variable_list leaves, none;
  for (size_t i = 0; i < wants.size(); ++i) {
    const c10::IValue& input = inputs[Loss::differentiable[i]];
    wants[i] = recording && input.isTensor() && input.toTensor().requires_grad();
    if (wants[i]) leaves.push_back(input.toTensor());
  }
  return leaves.empty() ? Node::run(stack, wants, none) : Node::apply(&stack, wants, at::TensorList(leaves));
}

// The node of the interpolant, by which of its two differentiable arguments want a gradient.
template <bool x, bool endpoint>
struct InterpolateNode : Function<InterpolateNode<x, endpoint>> {
  static constexpr bool is_traceable = true;

  static Tensor run(Stack& stack) {
    at::AutoDispatchBelowADInplaceOrView guard;  // past the node in Python
    kernel<Interpolate>().callBoxed(&stack);
    return torch::jit::pop(stack).toTensor();
  }

  static Tensor forward(AutogradContext* ctx, Stack* stack, const Tensor* coef, at::TensorList /*leaves*/) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({*coef});
    return run(*stack);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    static const auto interpolate_grads =
        find("interpolate_grads").typed<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, bool, bool)>();
    variable_list grads(2 + x + endpoint);  // the first two in the place of `stack` and `coef`
    if (!incoming[0].defined()) return grads;
    refuse_second_derivative(incoming[0], "interpolate");
    const bool want_x = x && ctx->needs_input_grad(0), want_endpoint = endpoint && ctx->needs_input_grad(x);
    const auto [of_x, of_endpoint] =
        interpolate_grads.call(dense(incoming[0]), ctx->get_saved_variables()[0], want_x, want_endpoint);
    if (want_x) grads[2] = of_x;
    if (want_endpoint) grads[2 + x] = of_endpoint;
    return grads;
  }

  // The gradient of x_t may come back in another layout, and the operator takes dense rows.
  static Tensor dense(const Tensor& grad) {
    const bool channels_last = (grad.dim() == 4 && grad.is_contiguous(at::MemoryFormat::ChannelsLast)) ||
                               (grad.dim() == 5 && grad.is_contiguous(at::MemoryFormat::ChannelsLast3d));
    return channels_last ? grad : grad.contiguous();
  }
};

Tensor interpolate(Stack& stack, at::ArrayRef<c10::IValue> inputs, bool recording) {
  // The kernel takes its arguments off the stack, so what is needed later is kept here.
  const Tensor x = inputs[0].toTensor(), coef = inputs[1].toTensor();
  const Tensor endpoint = inputs[3].isTensor() ? inputs[3].toTensor() : Tensor();
  const bool of_x = recording && x.requires_grad(), of_endpoint = recording && endpoint.defined() && endpoint.requires_grad();
  if (of_x && of_endpoint) {
    const variable_list both = {x, endpoint};
    return InterpolateNode<true, true>::apply(&stack, &coef, at::TensorList(both));
  }
  if (of_x) return InterpolateNode<true, false>::apply(&stack, &coef, at::TensorList(x));
  if (of_endpoint) return InterpolateNode<false, true>::apply(&stack, &coef, at::TensorList(endpoint));
  return InterpolateNode<false, false>::run(stack);
}

// Takes the number of noise rows that was left out for as many as there are samples.
template <class Call>
void complete(Stack& stack, size_t count, const Tensor& x) {
  if constexpr (Call::noise_rows != NONE) {
    c10::IValue& noise_rows = *(stack.end() - count + Call::noise_rows);
    if (noise_rows.isNone()) noise_rows = x.size(0);
  }
}

// An operator on the stack: `body` if the arguments fit together, else no result.
template <class Call, Tensor (*body)(Stack&, at::ArrayRef<c10::IValue>, bool)>
void operation(const c10::OperatorHandle& op, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  const auto inputs = torch::jit::last(*stack, count);
  const bool recording = c10::GradMode::is_enabled();
  if (!fits<Call>(inputs, recording)) {
    torch::jit::drop(*stack, count);
    stack->emplace_back();
    return;
  }
  complete<Call>(*stack, count, inputs[Call::x].toTensor());
  stack->emplace_back(body(*stack, inputs, recording));
}

// A loss' kernel, whose gradients are among its results: no node. If the arguments do not fit together, it has no results.
template <class Call>
void explicit_gradients(const c10::OperatorHandle& op, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  const auto inputs = torch::jit::last(*stack, count);
  if (!fits<Call>(inputs, c10::GradMode::is_enabled(), true)) {
    torch::jit::drop(*stack, count);
    stack->resize(stack->size() + op.schema().returns().size());
    return;
  }
  complete<Call>(*stack, count, inputs[Call::x].toTensor());
  kernel<Call>().callBoxed(stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(realuid_fast_node, CompositeImplicitAutograd, m) {
  m.impl("interpolate", torch::CppFunction::makeFromBoxedFunction<&operation<Interpolate, interpolate>>());
  m.impl("matching_loss", torch::CppFunction::makeFromBoxedFunction<&operation<Matching, loss<Matching>>>());
  m.impl("fake_loss", torch::CppFunction::makeFromBoxedFunction<&operation<Fake, loss<Fake>>>());
  m.impl("generator_loss", torch::CppFunction::makeFromBoxedFunction<&operation<Generator, loss<Generator>>>());
  m.impl("matching", torch::CppFunction::makeFromBoxedFunction<&explicit_gradients<Matching>>());
  m.impl("fake", torch::CppFunction::makeFromBoxedFunction<&explicit_gradients<Fake>>());
  m.impl("generator", torch::CppFunction::makeFromBoxedFunction<&explicit_gradients<Generator>>());
}
